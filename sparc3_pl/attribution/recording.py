"""Records what linear layers read and make, and the gradient there, without touching a parameter's ``.grad``."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from sparc3_pl.attribution.targets import last_hidden_state
from sparc3_pl.data.batches import ReferenceBatch
from sparc3_pl.errors import InputError
from sparc3_pl.model.experts import Routed, is_routed
from sparc3_pl.model.kernels import onednn_linears
from sparc3_pl.model.patching import as_forward
from sparc3_pl.model.placement import is_offloaded, matrix_of, values_of
from sparc3_pl.model.structure import output_head, weight_matrix

__all__ = ["LayerPass", "Places", "check_tokens", "inputs_shown", "recording"]


@dataclass(frozen=True)
class Places:
    """The places of the N tokens of a batch that reach an expert.

    Attributes:
        sample_N: The sample of each, ascending.
        token_N: Its position in the sample.
        slot_N: Its place among the tokens of its sample that reach the expert.
        num_samples: Samples in the batch.
        length: Tokens of a sample, padding included.
    """

    sample_N: Tensor
    token_N: Tensor
    slot_N: Tensor
    num_samples: int
    length: int

    @classmethod
    def of(cls, routed: Routed, num_samples: int) -> Places:
        """The places of an expert's tokens in a batch of ``num_samples`` samples."""
        length = routed.num_tokens // num_samples
        sample_N, token_N = routed.tokens_N // length, routed.tokens_N % length
        first_N = torch.searchsorted(sample_N, sample_N)
        return cls(
            sample_N, token_N, torch.arange(len(sample_N), device=sample_N.device) - first_N, num_samples, length
        )

    def by_sample(self, values_ND: Tensor) -> Tensor:
        """The tokens' values ``[N, D]`` by sample: ``[B, T, D]``, T the most tokens of any sample; the rest is 0."""
        most = int(self.slot_N.max()) + 1 if len(self.slot_N) else 1
        result = values_ND.new_zeros(self.num_samples, most, values_ND.shape[-1])
        result[self.sample_N, self.slot_N] = values_ND
        return result

    def at_tokens(self, values_BT: Tensor) -> Tensor:
        """Values ``[B, T]`` of the expert's tokens at their positions in the samples: ``[B, length]``, 0 elsewhere."""
        result = values_BT.new_zeros(self.num_samples, self.length)
        result[self.sample_N, self.token_N] = values_BT[self.sample_N, self.slot_N]
        return result

    def first(self, num_samples: int) -> Places:
        """The places of the tokens of the first ``num_samples`` samples."""
        own = self.sample_N < num_samples
        return Places(self.sample_N[own], self.token_N[own], self.slot_N[own], num_samples, self.length)

    def count(self, mask_BT: Tensor) -> Tensor:
        """How many of the tokens are real by the attention mask, int64 scalar."""
        mask_BT = mask_BT.to(self.sample_N.device)
        return mask_BT[self.sample_N, self.token_N].sum()


@dataclass(frozen=True)
class LayerPass:
    """One linear layer in one forward and backward pass of a batch (B samples, T tokens, I inputs, O outputs)."""

    name: str
    x_BTI: Tensor
    """The layer's input."""
    z_BTO: Tensor | None
    """The layer's output without its bias; None: it is made from ``x_BTI`` where ``units_BTO`` is asked for."""
    delta_BTO: Tensor
    """The gradient of the target at the layer's output."""
    weight_OI: Tensor
    places: Places | None = None
    """Which tokens these T are, for an expert; the rest of a sample's T is 0. None: they are the sample's own."""
    dx_BTI: Tensor | None = field(default=None, init=False)
    """The gradient at the layer's input, if the backward pass has shown it; ``replace`` drops it, since it belongs to
    this input, gradient and weight."""

    @property
    def units_BTO(self) -> Tensor:
        """The units' pre-activations as far as the weight makes them, x W^T."""
        return self.x_BTI @ self.weight_OI.mT if self.z_BTO is None else self.z_BTO

    def first(self, num_samples: int) -> LayerPass:
        """The pass of the first ``num_samples`` samples of the batch, as views."""
        tensors = self.x_BTI, self.z_BTO, self.delta_BTO, self.dx_BTI
        x, z, delta, dx = (None if t is None else t[:num_samples] for t in tensors)
        places = None if self.places is None else self.places.first(num_samples)
        return LayerPass(self.name, x, z, delta, self.weight_OI, places).shown(dx)

    def shown(self, dx_BTI: Tensor | None) -> LayerPass:
        """The pass with the gradient at the layer's input, which need not be made again."""
        layer = replace(self)
        object.__setattr__(layer, "dx_BTI", dx_BTI)
        return layer

    def transposed(self) -> LayerPass:
        """The pass with inputs and outputs exchanged: what holds of rows of W here, holds of its columns there.

        W^T reads delta, and x stands where the gradient did. The gradient of W^T is x^T delta = G^T, so row sums of
        W^T * G^T are column sums of W * G; and its units are delta W, the gradient at the layer's input.
        """
        return LayerPass(self.name, self.delta_BTO, self.dx_BTI, self.x_BTI, self.weight_OI.mT, self.places)


class _Tap(torch.autograd.Function):
    """The identity on ``value``, which shows the gradient there, and what was ``kept``, in the backward pass.

    What is kept goes through ``save_for_backward``, so that activation checkpointing drops and recomputes it.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, show: Callable[..., None], *kept: Tensor) -> Tensor:
        ctx.save_for_backward(*kept)
        ctx.show = show
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        kept = ctx.saved_tensors  # asked for once only: a checkpoint gives them once
        ctx.show(gradients[0], *(tensor.detach() for tensor in kept))
        return gradients[0], None, *(None for _ in kept)


@contextmanager
def recording(
    layers: Mapping[str, nn.Module],
    batch: tuple[int, int],
    sink: Callable[[LayerPass], None],
    with_dx: Collection[str] = (),
) -> Iterator[None]:
    """Backward passes inside the block call ``sink`` once for every layer, in the order of the backward pass.

    Parameters stay frozen. The graph begins at the output of the first layer that the forward pass meets, so nothing
    below the lowest target is differentiated.

    Args:
        layers: The linear layers to watch, by name.
        batch: B and T. Some models flatten ``[B, T]`` to ``[B*T]`` before their MLP; it is undone here.
        sink: Receives a ``LayerPass``; whatever it keeps of it keeps the memory too.
        with_dx: Those that are shown once the backward pass has made the gradient at their input too, and with it;
            but without it where nothing below is differentiated. It is one product with the weight less for whoever
            needs it, and the layer's tensors are held for as long as that takes.

    Raises:
        InputError: in the backward pass, if nothing tells which tokens of several samples a layer reads.
    """
    with ExitStack() as hooks:
        for name, module in layers.items():
            tap = _LayerTap(name, batch, sink)
            if name in with_dx:
                hooks.callback(module.register_forward_pre_hook(tap.at_input).remove)
            hooks.callback(module.register_forward_hook(tap.at_output).remove)
        yield


@torch.no_grad()
def inputs_shown(
    model: nn.Module,
    batch: ReferenceBatch,
    layers: Mapping[str, nn.Module],
    see: Callable[[str, Tensor], None],
    see_tokens: Callable[[str, Places], None] | None = None,
) -> None:
    """Runs the batch forward, and shows ``see`` the name and the input of every one of ``layers``.

    Inputs are ``[B, T, I]`` or ``[B*T, I]``. The output head's are the hidden states of all positions: it makes no
    logits. An expert's are 0 where a token goes to others; ``see_tokens`` is told which tokens reach it.

    Raises:
        InputError: if nothing tells which tokens of the batch a layer reads.
    """

    def show(name: str, module: nn.Module, x: Tensor) -> None:
        routed = module.routed if is_routed(module) else None
        if routed is None:
            check_tokens(name, x, *batch.input_ids.shape, single=False)
        if routed is not None and see_tokens is not None:
            see_tokens(name, Places.of(routed, len(batch.input_ids)))
        see(name, x if routed is None else routed.everywhere(x))

    _, head = output_head(model)
    with onednn_linears(model), ExitStack() as hooks:
        for name, module in layers.items():
            handle = module.register_forward_pre_hook(lambda module, args, name=name: show(name, module, args[0]))
            hooks.callback(handle.remove)
        hidden_BTH = as_forward(last_hidden_state, model, batch.input_ids, batch.attention_mask)
    for name, module in layers.items():
        if module is head:
            see(name, hidden_BTH)


def check_tokens(name: str, x: Tensor, num_samples: int, length: int, single: bool = True) -> None:
    """Refuses a layer that reads rows of some tokens only, if nothing tells which sample each belongs to.

    A mixture whose experts are modules of their own gives each just its tokens. Shared out over the samples in equal
    parts they would make scores, and wrong ones.

    Args:
        name: Name of the layer.
        x: The layer's input (or output): ``[B, T, D]``, or rows ``[B * T, D]``.
        num_samples: B.
        length: T.
        single: Whether some tokens of a single sample will do.

    Raises:
        InputError: for rows that are not those of all tokens.
    """
    if x.dim() == 2 and len(x) != num_samples * length and not (single and num_samples == 1):
        way_out = "score with data.batch_size 1, or " if single else ""
        raise InputError(
            f"{name} reads {len(x)} tokens of a batch of {num_samples} x {length}: only some reach it, and nothing "
            f"tells which, as for an expert that is a module of its own; {way_out}choose other layers by model.targets"
        )


class _LayerTap:
    """Shows one layer's passes to ``sink``; if its input is tapped too, with the gradient there."""

    def __init__(self, name: str, batch: tuple[int, int], sink: Callable[[LayerPass], None]) -> None:
        self._name, self._batch, self._sink = name, batch, sink
        self._awaited: Callable[[LayerPass], None] | None = None

    def at_input(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if not args[0].requires_grad:
            return None
        halves: list[LayerPass] = []  # of this forward pass: the layer's pass without the gradient at its input
        self._awaited = halves.append

        def show(dx: Tensor) -> None:
            layer = halves.pop()
            self._sink(layer.shown(self._by_sample(dx, layer.places)))

        return _Tap.apply(args[0], show), *args[1:]

    def at_output(self, module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        places = Places.of(module.routed, self._batch[0]) if is_routed(module) else None
        sink, self._awaited = self._awaited or self._sink, None

        def show(delta: Tensor, x: Tensor, y: Tensor) -> None:
            if places is None:
                check_tokens(self._name, x, *self._batch)
            has_bias, offloaded = getattr(module, "bias", None) is not None, is_offloaded(module)
            bias = values_of(module, "bias").to(y.device) if has_bias and offloaded else getattr(module, "bias", None)
            z = y if bias is None else y - bias
            weight_OI = matrix_of(module) if offloaded else weight_matrix(module)
            sink(LayerPass(self._name, *(self._by_sample(t, places) for t in (x, z, delta)), weight_OI, places))

        if not y.requires_grad:  # nothing below carries a gradient: the graph begins here
            y.requires_grad_()
        return _Tap.apply(y, show, args[0].detach(), y.detach())

    def _by_sample(self, values: Tensor, places: Places | None) -> Tensor:
        """Outside of experts ``[B, T, D]`` from ``[B, T, D]`` or from ``[B*T, D]``."""
        return values.reshape(self._batch[0], -1, values.shape[-1]) if places is None else places.by_sample(values)
