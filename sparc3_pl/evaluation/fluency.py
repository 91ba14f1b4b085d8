"""Fluency of completions, beside perplexity: whether they repeat themselves, how long they are, how many are empty."""

from collections.abc import Sequence

import torch
from torchmetrics import Metric

from sparc3_pl.evaluation.repetition import uniqueness
from sparc3_pl.evaluation.rows import is_empty

__all__ = ["Fluency"]


class Fluency(Metric):
    """Means over completions, by name.

    - ``uniqueness``: unique tokens / tokens: 1 if no token comes twice, near 0 if one is said over and over;
    - ``length``: new tokens, without padding and end token;
    - ``empty``: 1 for a completion without a character that can be read, else 0: their share.

    States: three sums (float64) and ``count`` (int64), reduced by their sum. With no completion the values are NaN.
    """

    full_state_update = False
    is_differentiable = False
    names = ("uniqueness", "length", "empty")

    def __init__(self) -> None:
        super().__init__()
        for name in self.names:
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, tokens: Sequence[Sequence[int]], texts: Sequence[str]) -> None:
        """Count completions: the token ids of each (new ones, without padding and end token), and its text."""
        self.uniqueness = self.uniqueness + sum(uniqueness(one) for one in tokens)
        self.length = self.length + sum(map(len, tokens))
        self.empty = self.empty + sum(map(is_empty, texts))
        self.count = self.count + len(tokens)

    def compute(self) -> dict[str, float]:
        """The means."""
        return {name: float(getattr(self, name) / self.count) for name in self.names}
