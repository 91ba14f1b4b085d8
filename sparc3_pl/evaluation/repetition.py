"""Repetition: how many of a completion's tokens are different ones."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

__all__ = ["Repetition", "RepetitionJudge", "uniqueness"]


def uniqueness(tokens: Sequence[int] | Sequence[str]) -> float:
    """Response uniqueness ratio: unique tokens / tokens, in (0, 1]; 0 for an empty response."""
    return len(set(tokens)) / len(tokens) if len(tokens) else 0.0


class RepetitionJudge:
    """A judge that needs no model: the share of a text's words that stand in it before, under the label ``repetition``.

    Words are what white space separates. What ``repetition.uniqueness`` of the results tells is of tokens instead:
    unique ones / all, which only the evaluation knows. A text without words repeats nothing: 0.
    """

    def score(self, texts: list[str]) -> dict[str, Tensor]:
        """Scores in [0, 1], ``[N]``."""
        words = [text.split() for text in texts]
        return {"repetition": torch.tensor([1 - uniqueness(each) if each else 0.0 for each in words])}


class Repetition(Metric):
    """Mean response uniqueness ratio of completions: 1 if no token comes twice, near 0 if one is said over and over.

    States: ``total`` (float64) and ``count`` (int64), reduced by their sum. With no completion the value is NaN.
    """

    full_state_update = False
    higher_is_better = True
    is_differentiable = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, responses: Iterable[Sequence[int]]) -> None:
        """Count the token ids of each response (new tokens only, without padding and end token)."""
        ratios = [uniqueness(tokens) for tokens in responses]
        self.total = self.total + sum(ratios)
        self.count = self.count + len(ratios)

    def compute(self) -> Tensor:
        """The mean ratio, a float64 scalar."""
        return self.total / self.count
