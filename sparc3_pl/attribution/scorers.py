"""Scorers: what a method accumulates over batches of samples, and how the sums become scores.

Each scorer holds, for every target layer, tensors that simply add up: over batches, over ranks and over shards.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sparc3_pl.attribution.accumulators import (
    Accumulator,
    NeuronScores,
    SignedNeuronScores,
    WeightScores,
    drop_nonfinite,
    token_relevance,
)
from sparc3_pl.attribution.checkpointing import checkpointed
from sparc3_pl.attribution.recording import LayerPass, recording
from sparc3_pl.attribution.sharded import ShardedWeightScores
from sparc3_pl.distributed import whole
from sparc3_pl.errors import InputError
from sparc3_pl.families import decoder, output_head, swapped, weight_matrix
from sparc3_pl.linear_kernels import onednn_linears

__all__ = ["BatchStatistics", "GradientScorer", "MagnitudeScorer", "RandomScorer", "Scorer", "WandaScorer"]

LayerTensors = dict[str, Tensor]


@dataclass(frozen=True)
class BatchStatistics:
    """What a gradient method knows of each sample of a batch besides its scores."""

    relevance: Tensor
    """Sum of the sample's scores over all target layers, ``[B]`` float64."""
    first_token_share: Tensor | None
    """Share of the first position in the sum over tokens, neurons and layers of |z * dz|, ``[B]`` float64; None where
    the only target, the output head, sees one position."""
    logit: Tensor
    """The target's logit, ``[B]`` float64."""
    target: Tensor
    """The predicted token, ``[B]`` int64."""

    def records(self) -> list[dict[str, float]]:
        """One dictionary a sample."""
        columns = {name: values.tolist() for name, values in vars(self).items() if values is not None}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


class Scorer(ABC):
    """Accumulates one method's statistics of the target ``layers`` of a model.

    Args:
        layers: The target linear layers by name.
        granularity: ``weight`` (scores ``[O, I]``) or ``neuron`` (their row sums ``[O]``).
    """

    needs_samples = True

    def __init__(self, layers: Mapping[str, nn.Module], granularity: str) -> None:
        self.layers = dict(layers)
        self.granularity = granularity
        self.tensors: dict[str, LayerTensors] = {}
        """By layer, the tensors that add up over batches, ranks and shards; updated in place."""

    @abstractmethod
    def update(self, model: nn.Module, input_ids_BT: Tensor, attention_mask_BT: Tensor) -> BatchStatistics | None:
        """Takes in a batch of samples.

        Rows without a real token, after all others, are stand-ins: they run, and count for nothing. A rank that has
        no sample left takes part by them in the passes of a sharded model.

        Raises:
            InputError: if a layer's statistics are not finite, or a layer takes no part in the model's forward pass.
        """

    @abstractmethod
    def scores(self, name: str, num_samples: int) -> Tensor:
        """The layer's scores, ``[O, I]`` or ``[O]`` float32, once ``tensors`` holds ``num_samples`` samples.

        Of a sharded model they are gathered: every rank must ask for them, layer by layer in the same order.
        """

    def squares(self, name: str, num_samples: int) -> Tensor | None:
        """Mean over samples of the squared neuron scores, ``[O]`` float32, where they were asked for."""
        return None

    def groups(self, name: str) -> tuple[Tensor, list[int]] | None:
        """Mean neuron scores of each group of samples, ``[G, O]`` float32, and their sizes, where asked for."""
        return None

    def _granular(self, weight_scores_OI: Tensor) -> Tensor:
        return (weight_scores_OI if self.granularity == "weight" else weight_scores_OI.sum(1)).float()


class GradientScorer(Scorer):
    """Mean over samples of |W * G| (or its row sums), G the gradient of the target logit of one sample.

    Args:
        layers: See ``Scorer``.
        granularity: See ``Scorer``.
        rules: Makes the context of a batch's passes: ``PreparedRules()``, or ``nullcontext`` for the plain gradient.
        signed: Neuron scores keep their sign, and need no weight gradient.
        squares: Keep squared neuron scores too, from which a standard error follows.
        groups: Keep the neuron scores of this many groups of samples too (``group_of``), for split halves.
        zero_nonfinite: See ``Accumulator``.
        device: Where the sums of weight scores are kept; by default with the weights. See ``WeightScores``.
        checkpointing: Keep the activations of one decoder layer at a time, see ``checkpointed``.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        granularity: str,
        rules: Callable[[nn.Module], AbstractContextManager[object]],
        *,
        signed: bool = False,
        squares: bool = False,
        groups: int = 0,
        zero_nonfinite: bool = False,
        device: torch.device | str | None = None,
        checkpointing: bool = False,
    ) -> None:
        super().__init__(layers, granularity)
        self._rules, self._num_groups = rules, groups
        self._checkpointing = checkpointed if checkpointing else nullcontext
        make: Callable[[Tensor, bool], Accumulator] = partial(_weight_scores, device=device)
        if granularity == "neuron":
            make = partial(SignedNeuronScores if signed else NeuronScores, squares=squares, groups=groups)
        self._accumulators = {name: make(weight_matrix(module), zero_nonfinite) for name, module in layers.items()}
        self.tensors = {name: accumulator.tensors for name, accumulator in self._accumulators.items()}

    def update(self, model: nn.Module, input_ids_BT: Tensor, attention_mask_BT: Tensor) -> BatchStatistics:
        relevance: dict[str, Tensor] = {}
        by_token: dict[str, Tensor] = {}
        num_samples = int(attention_mask_BT.any(1).sum())
        samples = input_ids_BT[:num_samples], attention_mask_BT[:num_samples]
        groups_B = group_of(*samples, self._num_groups) if self._num_groups else None

        def take(layer: LayerPass) -> None:
            if layer.name in relevance:
                raise InputError(f"layer {layer.name} runs twice in one pass: leave it out of model.targets")
            layer = layer.first(num_samples)
            relevance[layer.name] = self._accumulators[layer.name].add(layer, groups_B)
            by_token[layer.name] = token_relevance(layer)

        recorded = recording(self.layers, len(input_ids_BT), take)
        with torch.enable_grad(), self._rules(model), self._checkpointing(model), recorded:
            logit_B, target_B = as_forward(predicted, model, input_ids_BT, attention_mask_BT)
            logit_B.sum().backward()
        _require_all(self.layers, relevance)
        _require_finite(relevance)
        return BatchStatistics(
            relevance=_sum_of_layers(relevance),
            first_token_share=_first_token_share(by_token, samples[1]),
            logit=logit_B[:num_samples].detach().double(),
            target=target_B[:num_samples],
        )

    def scores(self, name: str, num_samples: int) -> Tensor:
        return (whole(self.tensors[name]["sum"]) / num_samples).float()

    def groups(self, name: str) -> tuple[Tensor, list[int]] | None:
        return group_means(self.tensors[name])

    def squares(self, name: str, num_samples: int) -> Tensor | None:
        squares = self.tensors[name].get("squares")
        return None if squares is None else (squares / num_samples).float()


class WandaScorer(Scorer):
    r"""S_ij = |W_ij| * ||x_j||_2, the norm over all real tokens of all samples (Sun et al., ICLR 2024, Eq. 1).

    Memory: one float64 vector ``[I]`` a layer, whatever the number of tokens.
    """

    def __init__(self, layers: Mapping[str, nn.Module], granularity: str, *, zero_nonfinite: bool = False) -> None:
        super().__init__(layers, granularity)
        self._zero_nonfinite = zero_nonfinite
        self.tensors = {name: _wanda_tensors(weight_matrix(module)) for name, module in layers.items()}

    @torch.no_grad()
    def update(self, model: nn.Module, input_ids_BT: Tensor, attention_mask_BT: Tensor) -> None:
        energy: dict[str, Tensor] = {}
        head_name, _ = output_head(model)
        add = partial(self._add_inputs, _InputSquares(attention_mask_BT.bool()), energy)
        with onednn_linears(model), ExitStack() as hooks:
            for name, module in self.layers.items():
                hook = module.register_forward_pre_hook(lambda _, args, name=name: add(name, args[0]))
                hooks.callback(hook.remove)
            hidden_BTH = as_forward(last_hidden_state, model, input_ids_BT, attention_mask_BT)
        if head_name in self.layers:  # the norm of what the head reads needs no logits
            add(head_name, hidden_BTH)
        _require_all(self.layers, energy)
        _require_finite(energy)

    def _add_inputs(self, squares: "_InputSquares", energy: dict[str, Tensor], name: str, x: Tensor) -> None:
        tensors = self.tensors[name]
        squares_I, counts = squares.of(x, self._zero_nonfinite)
        tensors["sum"] += squares_I
        for kind, count in counts.items():
            tensors[kind] += count
        energy[name] = squares_I.sum()

    def scores(self, name: str, num_samples: int) -> Tensor:
        weight_OI = whole(weight_matrix(self.layers[name]).detach()).float()
        return self._granular(weight_OI.abs() * self.tensors[name]["sum"].sqrt().float())


class _InputSquares:
    """Squares of a batch's inputs summed over its real tokens; layers that read the same tensor share one sum."""

    def __init__(self, mask_BT: Tensor) -> None:
        self._mask_BT = mask_BT
        self._padded = not bool(mask_BT.all())
        self._last: tuple[Tensor, Tensor, dict[str, Tensor]] | None = None

    def of(self, x: Tensor, zero_nonfinite: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum, ``[I]`` float64, and with ``zero_nonfinite`` the numbers of NaN and infinite inputs."""
        if self._last is None or self._last[0] is not x:
            self._last = (x, *self._sum(x, zero_nonfinite))
        return self._last[1:]

    def _sum(self, x: Tensor, zero_nonfinite: bool) -> tuple[Tensor, dict[str, Tensor]]:
        tokens_NI = x.reshape(*self._mask_BT.shape, -1)
        tokens_NI = tokens_NI[self._mask_BT.to(x.device)] if self._padded else tokens_NI.flatten(0, 1)
        counts: dict[str, Tensor] = {}
        if zero_nonfinite:
            counts = {kind: torch.zeros((), dtype=torch.int64, device=x.device) for kind in ("nan", "inf")}
            tokens_NI = drop_nonfinite(tokens_NI.clone(), counts)
        return tokens_NI.float().square().sum(0).double(), counts


class MagnitudeScorer(Scorer):
    """S = |W|: needs no sample."""

    needs_samples = False

    def update(self, model: nn.Module, input_ids_BT: Tensor, attention_mask_BT: Tensor) -> None:
        """Magnitudes do not depend on samples."""

    def scores(self, name: str, num_samples: int) -> Tensor:
        return self._granular(whole(weight_matrix(self.layers[name]).detach()).float().abs())


class RandomScorer(Scorer):
    """Uniform numbers in [0, 1), a function of ``seed`` and the layer's name alone: needs no sample."""

    needs_samples = False

    def __init__(self, layers: Mapping[str, nn.Module], granularity: str, *, seed: int) -> None:
        super().__init__(layers, granularity)
        self._seed = seed

    def update(self, model: nn.Module, input_ids_BT: Tensor, attention_mask_BT: Tensor) -> None:
        """Random scores do not depend on samples."""

    def scores(self, name: str, num_samples: int) -> Tensor:
        digest = hashlib.sha256(f"{self._seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
        shape = weight_matrix(self.layers[name]).shape
        return torch.rand(shape if self.granularity == "weight" else shape[:1], generator=generator)


def group_of(input_ids_BT: Tensor, attention_mask_BT: Tensor, num_groups: int) -> Tensor:
    """The group of each sample, ``[B]`` int64: told by its tokens alone, so the same however the work is split."""
    rows = [ids[mask.bool()].tolist() for ids, mask in zip(input_ids_BT, attention_mask_BT, strict=True)]
    digests = [hashlib.sha256(" ".join(map(str, row)).encode()).digest() for row in rows]
    return torch.tensor([int.from_bytes(digest[:8], "big") % num_groups for digest in digests], dtype=torch.int64)


def group_means(tensors: LayerTensors) -> tuple[Tensor, list[int]] | None:
    """Means ``[G, O]`` float32 and sizes of the groups whose sums are in ``tensors``; an empty group's mean is 0."""
    if "groups" not in tensors:
        return None
    sizes_G = tensors["group_sizes"]
    return (tensors["groups"] / sizes_G.clamp(min=1)[:, None]).float(), sizes_G.tolist()


def as_forward(function: Callable[..., Any], model: nn.Module, *args: Tensor) -> Any:
    """``function(model, *args)``, called as the model's own forward pass, with whatever hooks the model has.

    The hooks of a sharded model put together the weights outside its decoder layers.
    """
    with swapped(model, "forward", partial(function, model)):
        return model(*args)


def last_hidden_state(model: nn.Module, input_ids_BT: Tensor, attention_mask_BT: Tensor) -> Tensor:
    """The decoder's output ``[B, T, H]``; padding may stand on either side.

    Padding on the right needs no mask: no token looks ahead. Without a mask attention takes its fastest way.
    """
    where: dict[str, Tensor] = {}
    if bool((attention_mask_BT[:, 1:] > attention_mask_BT[:, :-1]).any()):
        where["attention_mask"] = attention_mask_BT
        where["position_ids"] = (attention_mask_BT.cumsum(1) - 1).clamp(min=0)
    return decoder(model)(input_ids=input_ids_BT, use_cache=False, **where).last_hidden_state


def target_logits(model: nn.Module, input_ids_BT: Tensor, attention_mask_BT: Tensor) -> Tensor:
    """The output head's logits at each sample's last real token, ``[B, V]``, before any final scaling or soft-cap."""
    hidden_BTH = last_hidden_state(model, input_ids_BT, attention_mask_BT)
    last_B = attention_mask_BT.shape[1] - 1 - attention_mask_BT.flip(1).argmax(1)
    batch = torch.arange(len(last_B), device=hidden_BTH.device)
    _, head = output_head(model)
    return head(hidden_BTH[batch, last_B.to(hidden_BTH.device), None])[:, 0]


def predicted(model: nn.Module, input_ids_BT: Tensor, attention_mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    """The largest logit at each sample's last real token, ``[B]``, and its token, ``[B]`` int64."""
    logit_B, target_B = target_logits(model, input_ids_BT, attention_mask_BT).max(1)
    return logit_B, target_B


def _weight_scores(weight_OI: Tensor, zero_nonfinite: bool, device: torch.device | str | None) -> WeightScores:
    if isinstance(weight_OI, DTensor):
        return ShardedWeightScores(weight_OI, zero_nonfinite)
    return WeightScores(weight_OI, zero_nonfinite, device)


def _wanda_tensors(weight_OI: Tensor) -> LayerTensors:
    device = weight_OI.device
    counts = {name: torch.zeros((), dtype=torch.int64, device=device) for name in ("nan", "inf")}
    return {**counts, "sum": torch.zeros(weight_OI.shape[1], dtype=torch.float64, device=device)}


def _require_all(layers: Mapping[str, nn.Module], seen: Mapping[str, object]) -> None:
    missing = [name for name in layers if name not in seen]
    if missing:
        raise InputError(f"layer {missing[0]} takes no part in the model's pass: leave it out of model.targets")


def _require_finite(values: Mapping[str, Tensor]) -> None:
    """One device synchronisation for all layers; the layers come in the order in which the pass met them."""
    first = next(iter(values.values()))
    finite = torch.stack([value.isfinite().all().to(first.device) for value in values.values()])
    if not finite.all():
        name = list(values)[int(finite.logical_not().nonzero()[0, 0])]
        raise InputError(
            f"layer {name}: NaN or infinite values in its scores; load the model in float32 (model.dtype), "
            "or count them and take them for 0 (model.nonfinite: zero)"
        )


def _sum_of_layers(values: Mapping[str, Tensor]) -> Tensor:
    """The layers may lie on several devices."""
    first = next(iter(values.values()))
    return torch.stack([value.to(first.device) for value in values.values()]).sum(0, dtype=torch.float64)


def _first_token_share(by_token: Mapping[str, Tensor], attention_mask_BT: Tensor) -> Tensor | None:
    """A layer that sees one position only (the output head) says nothing about the share and is left out."""
    every = {name: value for name, value in by_token.items() if value.shape == attention_mask_BT.shape}
    if not every:
        return None
    total_BT = _sum_of_layers(every)
    first_B1 = attention_mask_BT.argmax(1, keepdim=True).to(total_BT.device)
    return total_BT.gather(1, first_B1)[:, 0] / total_BT.sum(1)
