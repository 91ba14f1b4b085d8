"""What is kept of each completion and of each text window: the lines of ``completions.jsonl`` and ``windows.jsonl``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar

from sparc3_pl.io.formats import Record

__all__ = ["FLUENCY", "CompletionRow", "WindowRow", "from_json", "is_empty"]

R = TypeVar("R")

FLUENCY = {
    "uniqueness": "unique tokens / tokens",
    "length": "tokens per completion",
    "empty": "share of empty completions",
}
"""The figures of ``repetition``, and what tables call them."""


@dataclass(frozen=True)
class WindowRow:
    """One text window.

    Attributes:
        index: Its place among all windows of the text.
        nll: Negative log-likelihood of its scored tokens, in nats.
        num_tokens: How many tokens it scores.
    """

    index: int
    nll: float
    num_tokens: int

    def to_json(self) -> Record:
        """Its line of ``windows.jsonl``."""
        return asdict(self)


@dataclass(frozen=True)
class CompletionRow:
    """One completion, judged.

    Attributes:
        id: ID of the prompt.
        prompt: Its text.
        k: Number of the completion among those of the prompt, from 0.
        completion: The new text; None if the completion could not be made.
        scores: The judge's scores by label, in [0, 1]; none if the completion failed.
        judges: Further judges' scores by label, by the judge's name; none if the completion failed.
        prefix_scores: The judge's scores, by label, of the completion cut after each of ``completion_ids``, where they
            were asked for.
        seed: Seed of its random numbers.
        num_tokens: Number of new tokens; None if it failed.
        uniqueness: Response uniqueness ratio; None if it failed.
        failed: Why it could not be made; None if it was.
        tokens: Token ids of the new text. Kept during a run, and left out of ``completions.jsonl``.
        redraws: How often a word filter had it drawn again; None without one.
        completion_ids: All token ids that were drawn, an end token among them; None if it failed, or was made by an
            earlier version.
    """

    id: str
    prompt: str
    k: int
    completion: str | None = None
    scores: dict[str, float] = field(default_factory=dict)
    seed: int | None = None
    num_tokens: int | None = None
    uniqueness: float | None = None
    failed: str | None = None
    tokens: list[int] = field(default_factory=list)
    completion_ids: list[int] | None = None
    judges: dict[str, dict[str, float]] = field(default_factory=dict)
    redraws: int | None = None
    prefix_scores: dict[str, list[float]] = field(default_factory=dict)

    def to_json(self, *, tokens: bool = False) -> Record:
        """Its line of ``completions.jsonl``, with its token ids if they are asked for."""
        is_kept = {"tokens": tokens, "judges": bool(self.judges), "prefix_scores": bool(self.prefix_scores)}
        is_kept["redraws"] = self.redraws is not None
        return {name: value for name, value in asdict(self).items() if is_kept.get(name, True)}


def is_empty(text: str) -> bool:
    """Whether a completion has nothing to read: no character but white space."""
    return not text.strip()


def from_json(kind: type[R], line: Mapping[str, Any]) -> R:
    """The row that a line holds; what a later version has added to it is left out."""
    names = {one.name for one in fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in line.items() if name in names})
