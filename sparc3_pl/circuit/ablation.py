"""Ablations: what stands in for a component that is taken out of the model, and how it gets there.

A component is ablated where the model reads it: at the input columns of the one linear layer that does (of an MLP's
down-projection for a neuron, of attention's output projection for a head). Every token's value there is replaced. A
single weight is ablated in the weight matrix itself.

* ``zero``: by 0;
* ``mean``: by the component's mean over the real tokens of the discovery samples, or over those at the same position;
* ``counterfactual``: by the component's value at the same token of the paired sentence (Vig et al., NeurIPS 2020).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparc3_pl.attribution.targets import last_hidden_state
from sparc3_pl.circuit.components import Candidates
from sparc3_pl.data.batches import ReferenceBatch
from sparc3_pl.errors import InputError
from sparc3_pl.model.components import mlp_by_up
from sparc3_pl.model.patching import as_forward, swapped
from sparc3_pl.model.placement import put_values, values_of
from sparc3_pl.model.structure import MLP, weight_matrix
from sparc3_pl.registry import Registry
from sparc3_pl.runtime.collectives import is_sharded

__all__ = [
    "ABLATIONS",
    "Ablation",
    "Counterfactual",
    "Mean",
    "Replacement",
    "Zero",
    "ablated",
    "allows_compact",
    "masked_weights",
    "readings",
]

Replacement = Callable[[ReferenceBatch], Mapping[str, Tensor]]
"""Gives, for a batch, the values that take the place of each reading layer's input, by the layer's name and in a shape
that broadcasts to the input. A layer that is left out reads 0 instead."""


class Ablation(ABC):
    """A kind of ablation."""

    of_weights: bool = False
    """Whether single weights can be ablated in this way."""
    needs_pairs: bool = False
    """Whether every sample needs a counterfactual."""

    @abstractmethod
    def replacement(self, model: nn.Module, readers: Sequence[str], discovery: Sequence[ReferenceBatch]) -> Replacement:
        """Gives what is read in place of ablated components.

        Args:
            model: A causal language model in eval mode.
            readers: Names of the layers that read the components.
            discovery: The samples that the components were chosen by.
        """


@dataclass(frozen=True)
class Zero(Ablation):
    """An ablated component is read as 0."""

    of_weights = True

    def replacement(self, model: nn.Module, readers: Sequence[str], discovery: Sequence[ReferenceBatch]) -> Replacement:
        return lambda batch: {}


@dataclass(frozen=True)
class Mean(Ablation):
    """An ablated component is read as its mean over the discovery samples.

    Args:
        by_position: A mean for each position, counted from the sample's first token. Beyond the longest discovery
            sample the mean over all tokens takes its place.
    """

    by_position: bool = False

    def replacement(self, model: nn.Module, readers: Sequence[str], discovery: Sequence[ReferenceBatch]) -> Replacement:
        length = max(batch.input_ids.shape[1] for batch in discovery)
        sums: dict[str, Tensor] = {}
        counts_T = torch.zeros(length, dtype=torch.float64)
        for batch in discovery:
            mask_BT = batch.attention_mask.double().cpu()
            counts_T[: mask_BT.shape[1]] += mask_BT.sum(0)
            for name, x_BTI in readings(model, readers, batch.input_ids, batch.attention_mask).items():
                # A padded position may hold anything, NaN in half precision too: it is dropped, not multiplied by 0.
                x_BTI = x_BTI.double().masked_fill(~batch.attention_mask.bool().to(x_BTI.device)[..., None], 0.0)
                total_TI = sums.setdefault(name, x_BTI.new_zeros(length, x_BTI.shape[2]))
                total_TI[: x_BTI.shape[1]] += x_BTI.sum(0)
        means = {}
        for name, total_TI in sums.items():
            overall_I = total_TI.sum(0) / counts_T.sum().to(total_TI.device)
            means[name] = overall_I
            if self.by_position:
                counts = counts_T.to(total_TI.device)[:, None]
                means[name] = torch.where(counts > 0, total_TI / counts.clamp(min=1), overall_I)
                means[name] = torch.cat([means[name], overall_I[None]])  # the last row: for all positions beyond
        return partial(self._at, means)

    def _at(self, means: Mapping[str, Tensor], batch: ReferenceBatch) -> dict[str, Tensor]:
        if not self.by_position:
            return dict(means)
        shape = batch.input_ids.shape
        position_T = torch.arange(shape[1]).clamp(max=len(next(iter(means.values()))) - 1)
        return {name: mean_TI[position_T.to(mean_TI.device)].expand(*shape, -1) for name, mean_TI in means.items()}


@dataclass(frozen=True)
class Counterfactual(Ablation):
    """An ablated component is read as in the paired sentence, token by token."""

    needs_pairs = True

    def replacement(self, model: nn.Module, readers: Sequence[str], discovery: Sequence[ReferenceBatch]) -> Replacement:
        def of(batch: ReferenceBatch) -> dict[str, Tensor]:
            return readings(model, readers, batch.fields["counterfactual_ids"], batch.attention_mask)

        return of


ABLATIONS: Registry[Ablation] = Registry(
    "ablation",
    Ablation,
    {name: f"{__name__}.{name.title()}" for name in ("zero", "mean", "counterfactual")},
)


@torch.no_grad()
def readings(
    model: nn.Module, readers: Sequence[str], input_ids_BT: Tensor, attention_mask_BT: Tensor
) -> dict[str, Tensor]:
    """The input ``[B, T, I]`` of each of the layers ``readers`` in one forward pass.

    Raises:
        InputError: if one of them runs twice in it, or not at all.
    """
    values: dict[str, Tensor] = {}

    def keep(name: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        if name in values:
            raise InputError(f"layer {name} runs twice in one pass: its components cannot be told apart")
        values[name] = args[0].reshape(*input_ids_BT.shape, -1)  # OPT's second map sees [B * T, I]

    with ExitStack() as hooks:
        for name in readers:
            hook = model.get_submodule(name).register_forward_pre_hook(partial(keep, name))
            hooks.callback(hook.remove)
        as_forward(last_hidden_state, model, input_ids_BT, attention_mask_BT)
    if missing := set(readers) - set(values):
        raise InputError(f"layer {min(missing)} takes no part in the model's forward pass; leave it out")
    return values


@contextmanager
def ablated(
    model: nn.Module, candidates: Candidates, kept_N: Tensor, values: Mapping[str, Tensor], compact: bool = False
) -> Iterator[None]:
    """Inside the block, components that are not kept are read as ``values`` say. Nothing is left behind.

    Args:
        model: The model.
        candidates: All N components.
        kept_N: Which of them stay as they are, bool.
        values: See ``Replacement``; of the batch that runs in the block.
        compact: Make no neurons that are then read as 0, where that saves time: the same to rounding, for MLPs whose
            maps have nothing but functions of single neurons between them (see ``allows_compact``).
    """
    blocks = {mlp.down: mlp for mlp in mlp_by_up(model).values()} if compact else {}
    with ExitStack() as undo:
        for name, owner_I in candidates.readers.items():
            ablated_I = ~kept_N[owner_I] & (owner_I >= 0)
            module = model.get_submodule(name)
            if name in blocks and name not in values and ablated_I.float().mean() > _WORTH_COMPACTING:
                undo.enter_context(_without(model, blocks[name], (~ablated_I).nonzero().flatten()))
            elif ablated_I.any():
                hook = module.register_forward_pre_hook(partial(_replace, ablated_I, values.get(name)))
                undo.callback(hook.remove)
        yield


_WORTH_COMPACTING = 0.3
"""Share of ablated neurons from which on leaving them out saves more time than copying the others' weights takes."""


@contextmanager
def _without(model: nn.Module, mlp: MLP, neurons: Tensor) -> Iterator[None]:
    """Inside the block, an MLP makes and reads only these ``neurons``, ``[n]`` int64."""
    rows = torch.cat([neurons, neurons + mlp.width]) if mlp.fused else neurons
    with ExitStack() as undo:
        for name in (mlp.up, mlp.gate, mlp.down):
            if name is None:
                continue
            module = model.get_submodule(name)
            weight, bias = weight_matrix(module).detach(), module.bias
            index = (neurons if name == mlp.down else rows).to(weight.device)
            weight = weight[:, index] if name == mlp.down else weight[index]
            bias = bias if bias is None or name == mlp.down else bias[index]
            undo.enter_context(swapped(module, "forward", partial(F.linear, weight=weight, bias=bias)))
        yield


def allows_compact(model: nn.Module, candidates: Candidates, batch: ReferenceBatch) -> bool:
    """Whether ``compact`` changes nothing on a model, tried on a batch with every second component ablated.

    A model whose layers are spread over devices by hooks of their own, or over ranks, is left as it is.
    """
    blocks = [mlp for mlp in mlp_by_up(model).values() if mlp.down in candidates.readers]
    layers = [model.get_submodule(mlp.down) for mlp in blocks]
    if not blocks or any(hasattr(layer, "_hf_hook") or is_sharded(layer.weight) for layer in layers):
        return False
    kept_N = torch.arange(candidates.count) % 2 == 0
    hidden = []
    for compact in (False, True):
        with torch.no_grad(), ablated(model, candidates, kept_N, {}, compact):
            try:
                hidden.append(as_forward(last_hidden_state, model, batch.input_ids, batch.attention_mask).double())
            except RuntimeError:  # something between the maps has a size of its own
                return False
    real_BT = batch.attention_mask.bool().to(hidden[0].device)
    one, other = (states[real_BT] for states in hidden)
    return bool((one - other).abs().max() <= _ROUNDING * one.abs().max())


_ROUNDING = 1e-3
"""Largest difference of equal outputs, relative to the largest hidden state; in half precision sums in another order
differ by some 1e-2."""


def _replace(ablated_I: Tensor, value: Tensor | None, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    x, *others = args
    ablated_I = ablated_I.to(x.device)
    if value is None:
        return x.masked_fill(ablated_I, 0.0), *others
    value = value.to(x)
    return torch.where(ablated_I, value.reshape(x.shape) if value.dim() == 3 else value, x), *others


@contextmanager
def masked_weights(model: nn.Module, candidates: Candidates, kept_N: Tensor) -> Iterator[None]:
    """Inside the block, single weights that are not kept are 0. Afterwards every bit is as it was."""
    before: dict[str, Tensor] = {}
    try:
        for span in candidates.spans:
            layer = model.get_submodule(span.group.layer)
            mask = kept_N[span.own].view(span.group.shape)
            if not mask.all():
                values = values_of(layer)
                before[span.group.layer] = values.clone()
                weight_matrix(layer, values).masked_fill_(~mask.to(values.device), 0.0)
                put_values(layer, "weight", values)
        yield
    finally:
        for name, values in before.items():
            put_values(model.get_submodule(name), "weight", values)
