"""A batch of reference samples, as the data module makes it and methods and targets take it in."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

__all__ = ["ReferenceBatch", "chunks"]

T = TypeVar("T")


def chunks(items: Sequence[T], size: int) -> list[Sequence[T]]:
    """The items in their order, ``size`` at a time; the last may be fewer."""
    return [items[start : start + size] for start in range(0, len(items), size)]


@dataclass
class ReferenceBatch:
    """Samples padded on the right to the longest of them.

    Without any sample it is a stand-in, one row without a real token: something to run where every rank must.

    Attributes:
        input_ids: ``[B, T]`` int64.
        attention_mask: ``[B, T]`` int64, 1 for real tokens.
        ids: The samples' ids.
        endings: ``stop``, ``cut`` or None (nothing can decode the ids) for each sample.
        text_ids: Identities of the texts that each sample was made from.
        fields: Values that a target needs of the samples besides their tokens (labels, weights, spans of the
            completions), by name: tensors or lists with an entry for each sample. Those that data modules make:
            ``completion_mask`` ``[B, T]`` bool, the completion's tokens; ``weight`` ``[B]`` float64, less its baseline;
            ``token_weight`` ``[B, T]`` float64, in place of the weight for each token of the completion;
            ``label`` ``[B]`` float64; ``answer`` ``[B]`` int64, a token id; ``foil`` ``[B]`` int64, -1 for none;
            ``counterfactual_ids`` ``[B, T]`` int64, padded as ``input_ids``.
    """

    input_ids: Tensor
    attention_mask: Tensor
    ids: list[str] = field(default_factory=list)
    endings: list[str | None] = field(default_factory=list)
    text_ids: list[tuple[str, ...]] = field(default_factory=list)
    fields: dict[str, Any] = field(default_factory=dict)

    def to(self, device: torch.device) -> Self:
        """The batch with its tensors on ``device``."""
        fields = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in self.fields.items()}
        tensors = {"input_ids": self.input_ids.to(device), "attention_mask": self.attention_mask.to(device)}
        return replace(self, **tensors, fields=fields)
