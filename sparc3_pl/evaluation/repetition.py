"""Repetition: how many of a completion's tokens are different ones."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["RepetitionJudge", "uniqueness"]


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
