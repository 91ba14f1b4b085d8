"""The base of tasks of sentences in pairs: how their sentences are made, and how they are divided into two halves."""

from __future__ import annotations

import hashlib
import random
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar

from sparc3_pl.data.encoding import Encoder
from sparc3_pl.errors import InputError

__all__ = ["PairTask", "PairText", "Partition", "one_token"]

T = TypeVar("T")


@dataclass(frozen=True)
class PairText:
    """A sentence that breaks off before the answer, and what it is compared with.

    Attributes:
        clean: The sentence. ``answer`` and ``foil`` continue it as they stand, so they begin with the space, if any.
        answer: The right continuation.
        foil: A wrong one; None: only the answer is looked at.
        counterfactual: A sentence that differs from ``clean`` in what decides the answer; None: there is none.
        template: Template that the sentence was made from; empty for a sentence out of a file.
        words: Words that fill the template's places: names (the indirect object first), nouns, years.
    """

    clean: str
    answer: str
    foil: str | None
    counterfactual: str | None = None
    template: str = ""
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class Partition:
    """The templates and words that sentences are made from: all, or those of one half.

    Attributes:
        half: ``attribution`` (to find a circuit), ``evaluation`` (to test it) or ``all``.
        seed: Decides the halves.
        share: Share of the attribution half.
    """

    half: str = "all"
    seed: int = 0
    share: float = 0.5

    def of(self, items: Sequence[T]) -> list[T]:
        """The items of this half, in an order that the seed alone decides. The halves are disjoint, and whole."""
        order = sorted(items, key=lambda item: hashlib.sha256(f"{self.seed}:{item}".encode()).digest())
        cut = round(self.share * len(order))
        return {"all": order, "attribution": order[:cut], "evaluation": order[cut:]}[self.half]


class PairTask(ABC):
    """A task that makes its own sentences for a tokenizer.

    Attributes:
        name: Name of the task, as ``data.source`` gives it.
        counterfactuals: The kinds of counterfactual sentences that it knows; the first is the default.
    """

    name: ClassVar[str]
    counterfactuals: ClassVar[tuple[str, ...]]

    @abstractmethod
    def texts(
        self, encoder: Encoder, partition: Partition, counterfactual: str, rng: random.Random
    ) -> Iterator[PairText]:
        """Sentences without end, some of them repeated. Clean and counterfactual have the same number of tokens.

        Args:
            encoder: The model's encoder; it has a tokenizer.
            partition: The half to make them from.
            counterfactual: One of ``counterfactuals``.
            rng: Draws the words; nothing else is random.

        Raises:
            InputError: If the tokenizer does not allow the task, saying why.
        """

    def enough(self, items: Sequence[T], partition: Partition, at_least: int, what: str) -> list[T]:
        """The items of the partition.

        Raises:
            InputError: If there are fewer than ``at_least``.
        """
        own = partition.of(items)
        if len(own) < at_least:
            where = "" if partition.half == "all" else f" in the {partition.half} half"
            raise InputError(
                f"data.source={self.name}: it needs {at_least} {what}{where}, but there are {len(own)} ({len(items)} "
                "in all); give another model or task, pairs of your own in a file, or another data.partition_share"
            )
        return own


def one_token(words: Iterable[str], encoder: Encoder) -> list[str]:
    """The words that are one token of their own within a sentence, after a space."""
    tokens = {word: encoder.body(f"to {word}") for word in words}
    before = encoder.body("to")
    single = {word: ids[-1] for word, ids in tokens.items() if len(ids) == len(before) + 1 and ids[:-1] == before}
    times = Counter(single.values())  # a token of several words stands for what the tokenizer does not know
    return [word for word, token in single.items() if times[token] == 1]
