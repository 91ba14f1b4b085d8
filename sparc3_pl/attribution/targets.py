"""Targets: the number for each sample that is attributed, and at which the backward pass begins."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from sparc3_pl.data.batches import ReferenceBatch
from sparc3_pl.model.logits import OutputHead
from sparc3_pl.model.patching import as_forward
from sparc3_pl.model.structure import decoder
from sparc3_pl.registry import Registry

__all__ = [
    "TARGETS",
    "Attributed",
    "Predicted",
    "Target",
    "attribute",
    "last_hidden",
    "last_hidden_state",
    "last_logits",
]


class Attributed(NamedTuple):
    """The result of a target for a batch.

    Attributes:
        value_B: The numbers to differentiate, ``[B]``.
        records: What ``samples.jsonl`` says of each sample, ``[B]`` tensors by name.
    """

    value_B: Tensor
    records: dict[str, Tensor]


class Target(ABC):
    """A kind of target. Sample b's number must depend on the hidden states of sample b alone."""

    needs: ClassVar[tuple[str, ...]] = ()
    """The fields of a batch without which there is nothing to attribute."""
    reads: ClassVar[frozenset[str] | None] = None
    """All fields of a batch that make a difference; None: unknown."""
    at_values: bool = True
    """Whether signed scores are read where the components' values are read (``Group.site``): they are then the
    derivative of the target by each component's gain, whatever the activation function and the biases."""

    def check(self, model: nn.Module, sample: Sequence[int]) -> None:
        """Checks that the target is right on a model, before any batch; every rank must call it.

        Args:
            model: A causal language model in eval mode, its weights whole.
            sample: Token ids.

        Raises:
            InputError: if it is not.
        """
        return None

    @abstractmethod
    def __call__(self, hidden_BTH: Tensor, head: OutputHead, batch: ReferenceBatch) -> Attributed:
        """Reads the numbers off the decoder's output.

        Args:
            hidden_BTH: The decoder's output; padding may stand on either side.
            head: ``head(hidden)`` gives logits as the linear map makes them, ``head.logits(hidden)`` the model's own.
            batch: The samples' tokens, and ``fields`` that came with them.
        """


class Predicted(Target):
    """The largest logit after the sample's last real token, before any final scaling or soft-cap.

    Signed scores of neurons are read at the rows of the up-projection, as the paper has them (SparC3, App. B).
    """

    at_values = False
    reads = frozenset()

    def __call__(self, hidden_BTH: Tensor, head: OutputHead, batch: ReferenceBatch) -> Attributed:
        logit_B, token_B = last_logits(hidden_BTH, head, batch.attention_mask).max(1)
        return Attributed(logit_B, {"logit": logit_B.detach().double(), "target": token_B})


TARGETS: Registry[Target] = Registry(
    "model.target",
    Target,
    {
        "predicted": f"{__name__}.Predicted",
        "completion": "sparc3_pl.attribution.targets_completion.CompletionLikelihood",
        "text": "sparc3_pl.attribution.targets_text.TextLikelihood",
        "answer": "sparc3_pl.attribution.targets_answer.AnswerLogit",
    },
)


def last_hidden(hidden_BTH: Tensor, attention_mask_BT: Tensor) -> Tensor:
    """The decoder's output at each sample's last real token, ``[B, 1, H]``."""
    last_B = attention_mask_BT.shape[1] - 1 - attention_mask_BT.flip(1).argmax(1)
    batch = torch.arange(len(last_B), device=hidden_BTH.device)
    return hidden_BTH[batch, last_B.to(hidden_BTH.device), None]


def last_logits(hidden_BTH: Tensor, head: Callable[[Tensor], Tensor], attention_mask_BT: Tensor) -> Tensor:
    """The output head's logits at each sample's last real token, ``[B, V]``."""
    return head(last_hidden(hidden_BTH, attention_mask_BT))[:, 0]


def last_hidden_state(model: nn.Module, input_ids_BT: Tensor, attention_mask_BT: Tensor) -> Tensor:
    """The decoder's output ``[B, T, H]``; padding may stand on either side.

    Padding on the right needs no mask: no token looks ahead. Without a mask attention takes its fastest way.
    """
    where: dict[str, Tensor] = {}
    if bool((attention_mask_BT[:, 1:] > attention_mask_BT[:, :-1]).any()):
        where["attention_mask"] = attention_mask_BT
        where["position_ids"] = (attention_mask_BT.cumsum(1) - 1).clamp(min=0)
    return decoder(model)(input_ids=input_ids_BT, use_cache=False, **where).last_hidden_state


def attribute(model: nn.Module, target: Target, batch: ReferenceBatch) -> Attributed:
    """The target of a batch, from one forward pass."""

    def forward(model: nn.Module, input_ids_BT: Tensor, attention_mask_BT: Tensor) -> Attributed:
        return target(last_hidden_state(model, input_ids_BT, attention_mask_BT), OutputHead(model), batch)

    return as_forward(forward, model, batch.input_ids, batch.attention_mask)
