"""Layer after layer: each decoder layer is pruned before the inputs of the next are measured (Sun et al., ICLR 2024).

This is how Wanda's authors prune. A layer's linear maps are all measured with the layer as it was loaded, on the
hidden states that the pruned layers before it make. Then the lowest scores of every row are removed, and the hidden
states that the next layer reads are made with what is left. The model itself is as it was when the work is done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparc3_pl.attribution.targets import last_hidden_state
from sparc3_pl.data.batches import ReferenceBatch
from sparc3_pl.errors import InputError
from sparc3_pl.model.kernels import onednn_linears
from sparc3_pl.model.patching import as_forward
from sparc3_pl.model.structure import decoder_layers, features, weight_matrix
from sparc3_pl.statistics.lowest_of_groups import lowest_of_each_group

__all__ = ["Blocks", "Sparsity"]

Take = Callable[[int, str, Tensor], None]
"""Is shown the number of a batch, the name of a linear layer, and what the layer reads."""


@dataclass(frozen=True)
class Sparsity:
    """The share or pattern of weights to remove from a row: ``int(share * inputs)`` of them, or all but n of every m.

    Attributes:
        text: The setting as it was given: ``0.5`` or ``2:4``.
        share: Share of every row that is pruned; None for a pattern.
        pattern: n and m: n of every m consecutive weights of a row stay; None for a share.
    """

    text: str
    share: float | None = None
    pattern: tuple[int, int] | None = None

    @classmethod
    def of(cls, value: str | float) -> Sparsity:
        """Reads a share or a pattern.

        Raises:
            InputError: if it is neither.
        """
        text = str(value).strip()
        count, colon, of = text.partition(":")
        if colon and count.isdecimal() and of.isdecimal() and 0 < int(count) < int(of):
            return cls(text, pattern=(int(count), int(of)))
        try:
            share = float(text)
        except ValueError:
            share = 0.0
        if not 0 < share < 1:
            raise InputError(
                f"model.sequential={value}: give a share between 0 and 1, such as 0.5, or a pattern n:m, such as 2:4 "
                "(n of every m weights stay)"
            )
        return cls(text, share=share)

    def check(self, name: str, num_inputs: int) -> None:
        """Refuses a layer whose rows cannot be pruned so.

        Raises:
            InputError: naming the layer.
        """
        if self.pattern is not None and num_inputs % self.pattern[1]:
            raise InputError(
                f"model.sequential={self.text}: the {num_inputs} inputs of {name} are not a multiple of "
                f"{self.pattern[1]}; leave the layer out (model.targets), or use another pattern"
            )
        if self.share is not None and not int(num_inputs * self.share):
            raise InputError(f"model.sequential={self.text} of {num_inputs} inputs of {name} is less than 1; raise it")

    def lowest(self, scores_OI: Tensor) -> Tensor:
        """A mask of the scores to remove, ``[O, I]`` bool on the host; of equal scores the first go."""
        values = scores_OI.float().cpu().numpy()
        num_inputs = values.shape[1]
        width, count = (
            (self.pattern[1], self.pattern[1] - self.pattern[0])
            if self.pattern is not None
            else (num_inputs, int(num_inputs * self.share))
        )
        return torch.from_numpy(lowest_of_each_group(values.reshape(-1, width), count)).view(scores_OI.shape)


@dataclass
class _Batch:
    """One batch between two decoder layers."""

    input_ids: Tensor
    attention_mask: Tensor
    hidden: Tensor
    """The hidden states that the next layer reads, ``[B, T, H]``."""
    more: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    """The other arguments of each layer's call: masks and positions, which the layers share."""


class Blocks:
    """The decoder layers of a model, and the hidden states of all samples of this process before one of them.

    Args:
        model: A causal language model in eval mode.
        layers: The linear layers that are scored, by name.
        sparsity: The share or pattern to remove.

    Raises:
        InputError: if the model has no decoder layers, none of ``layers`` lies in one, or a row cannot be pruned so.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module], sparsity: Sparsity) -> None:
        self.model, self.layers, self.sparsity = model, layers, sparsity
        try:
            self.blocks = decoder_layers(model)
        except InputError:
            raise InputError(
                f"model.sequential: {type(model).__name__} has no list of decoder layers to prune one after the other; "
                "leave it out"
            ) from None
        self.own: list[list[str]] = []
        for block in self.blocks:
            inside = {id(module) for module in block.modules()}
            self.own.append([name for name, module in layers.items() if id(module) in inside])
        self.outside = [name for name in layers if not any(name in own for own in self.own)]
        if len(self.outside) == len(layers):
            raise InputError("model.sequential: no layer of model.targets lies in a decoder layer; choose others")
        for name in (name for own in self.own for name in own):
            sparsity.check(name, features(layers[name])[1])
            if weight_matrix(layers[name]).is_meta:
                raise InputError(
                    f"model.sequential={sparsity.text}: {name} was offloaded, so that its weights cannot be pruned "
                    "and put back; use devices that hold the model"
                )
        self.batches: list[_Batch] = []

    def hold(self, batch: ReferenceBatch) -> None:
        """Keeps what the first decoder layer reads of a batch, and the other arguments of each layer's call.

        One pass of the whole model shows it: layers of a model may have masks of several kinds.

        Raises:
            InputError: if the layers do not simply hand their hidden states on, one after the other.
        """
        calls: list[tuple[int, Tensor, tuple[Any, ...], dict[str, Any]]] = []
        outputs: list[Tensor] = []

        def before(number: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                hidden, args, kwargs = _split(args, kwargs)
                if len(calls) and not (hidden is outputs[-1] or torch.equal(hidden, outputs[-1].to(hidden.device))):
                    raise self._not_a_chain()
                calls.append((number, hidden if not calls else hidden[:0], args, kwargs))

            return hook

        def after(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            outputs[:] = [_hidden(out)]

        with ExitStack() as hooks, onednn_linears(self.model):
            for number, block in enumerate(self.blocks):
                hooks.callback(block.register_forward_pre_hook(before(number), with_kwargs=True).remove)
                hooks.callback(block.register_forward_hook(after).remove)
            as_forward(last_hidden_state, self.model, batch.input_ids, batch.attention_mask)
        if [number for number, *_ in calls] != list(range(len(self.blocks))):
            raise self._not_a_chain()
        more = [(args, kwargs) for _, _, args, kwargs in calls]
        self.batches.append(_Batch(batch.input_ids, batch.attention_mask, calls[0][1], more))

    def _not_a_chain(self) -> InputError:
        return InputError(
            f"model.sequential: the decoder layers of {type(self.model).__name__} do not read just what the one before "
            "makes; leave it out"
        )

    def run(self, take: Take, scores_of: Callable[[str], Tensor]) -> None:
        """Goes through the decoder layers; every process of several must call it.

        Args:
            take: Is shown what each linear layer reads, batch by batch.
            scores_of: Gives a layer's scores ``[O, I]`` once all its inputs have been seen, by other processes too.
        """
        for number, own in enumerate(self.own):
            with onednn_linears(self.model), self._watching(own, take) as batch_number:
                for batch_number[0], batch in enumerate(self.batches):
                    self._called(number, batch)
            with ExitStack() as undo:
                for name in own:
                    lowest = self.sparsity.lowest(scores_of(name))
                    undo.enter_context(_without(weight_matrix(self.layers[name]), lowest))
                with onednn_linears(self.model):
                    for batch in self.batches:
                        batch.hidden = self._called(number, batch)
        if self.outside:
            self._run_outside(take)
            for name in self.outside:
                scores_of(name)

    def _called(self, number: int, batch: _Batch) -> Tensor:
        args, kwargs = batch.more[number]
        return _hidden(self.blocks[number](batch.hidden, *args, **kwargs))

    @contextmanager
    def _watching(self, names: list[str], take: Take) -> Iterator[list[int]]:
        """Shows what the layers read to ``take``; whoever runs a batch writes its number into the list."""
        number = [0]
        with ExitStack() as hooks:
            for name in names:
                hook = self.layers[name].register_forward_pre_hook(
                    lambda _, args, name=name: take(number[0], name, args[0])
                )
                hooks.callback(hook.remove)
            yield number

    def _run_outside(self, take: Take) -> None:
        """Shows the layers outside of the decoder layers, such as the head, what the pruned layers make."""
        last: list[Tensor] = []
        hook = self.blocks[-1].register_forward_hook(
            lambda _, args, out: (last[0], *out[1:]) if isinstance(out, tuple) else last[0]
        )
        heads = [name for name in self.outside if self.layers[name] is self.model.get_output_embeddings()]
        with ExitStack() as undo:
            undo.callback(hook.remove)
            number = undo.enter_context(self._watching([name for name in self.outside if name not in heads], take))
            for number[0], batch in enumerate(self.batches):
                last[:] = [batch.hidden]
                hidden = as_forward(last_hidden_state, self.model, batch.input_ids, batch.attention_mask)
                for name in heads:
                    take(number[0], name, hidden)


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """The hidden states of a decoder layer's call, and the rest of it."""
    if args:
        return args[0], args[1:], dict(kwargs)
    return kwargs["hidden_states"], (), {name: value for name, value in kwargs.items() if name != "hidden_states"}


def _hidden(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


@contextmanager
def _without(weight_OI: Tensor, mask_OI: Tensor) -> Iterator[None]:
    """Inside the block the weights of ``mask_OI`` are 0; afterwards they are what they were, bit for bit."""
    mask_OI = mask_OI.to(weight_OI.device)
    before = weight_OI.detach().clone()
    with torch.no_grad():
        weight_OI.masked_fill_(mask_OI, 0)
    try:
        yield
    finally:
        with torch.no_grad():
            weight_OI.copy_(before)
