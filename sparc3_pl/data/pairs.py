"""Pairs of sentences with a right and a wrong continuation: made by a task for a tokenizer.

``make_pairs`` gives the pairs, ``pad_pairs`` a batch of them. Nothing here needs a Trainer.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import cast

from sparc3_pl.data.batches import ReferenceBatch
from sparc3_pl.data.encoding import Encoder
from sparc3_pl.data.fields import TextRecord, Unequal, Values, check_unequal
from sparc3_pl.data.pair_tasks.agreement import Agreement
from sparc3_pl.data.pair_tasks.greater_than import GreaterThan
from sparc3_pl.data.pair_tasks.indirect_objects import IndirectObjects
from sparc3_pl.data.pair_tasks.task import PairTask, PairText, Partition
from sparc3_pl.data.samples import Sample, pad_samples, record_sample
from sparc3_pl.data.texts import PartitionChoice, check_partition
from sparc3_pl.errors import InputError

__all__ = ["PAIR_TASKS", "Pair", "PairQuery", "PairSet", "encode_pair", "make_pairs", "pad_pairs"]

PAIR_TASKS: dict[str, PairTask] = {task.name: task for task in (IndirectObjects(), GreaterThan(), Agreement())}
"""The tasks that make their own sentences, by what ``data.source`` calls them."""

DEFAULT_PAIRS = 128
"""How many pairs a task makes where the number is not given."""

_PATIENCE = 1000  # a task that gives no new pair in so many sentences has no more


@dataclass(frozen=True)
class Pair:
    """A sentence as the model reads it, and what it is compared with.

    Attributes:
        sample: The clean sentence as a sample: its ``numbers`` are the first tokens of answer and foil (-1: none), its
            ``counterfactual_ids`` those of the other sentence, as many as its own.
        text: The sentences as text, and what they were made from.
    """

    sample: Sample
    text: PairText

    @property
    def id(self) -> str:
        """Identity by content: of the two sentences, the answer and the foil."""
        return self.sample.id

    @property
    def clean_ids(self) -> list[int]:
        """Token ids of the sentence, with what the tokenizer puts before a text."""
        return self.sample.input_ids

    @property
    def counterfactual_ids(self) -> list[int] | None:
        """Token ids of the other sentence, as many as ``clean_ids``; None: there is none."""
        return cast("list[int] | None", self.sample.by_token.get("counterfactual_ids"))

    @property
    def answer(self) -> int:
        """The first token of the right continuation."""
        return int(self.sample.numbers["answer"])

    @property
    def foil(self) -> int | None:
        """The first token of the wrong continuation; None: there is none."""
        foil = int(self.sample.numbers["foil"])
        return None if foil < 0 else foil


@dataclass(frozen=True)
class PairQuery:
    """A query for pairs of a task.

    Attributes:
        source: ``ioi``, ``greater_than`` or ``agreement``.
        num_pairs: Number of pairs; None: ``DEFAULT_PAIRS``.
        half: Pairs of one half only: ``attribution`` to find a circuit, ``evaluation`` to test it. The halves of a task
            share neither templates nor names (or nouns, or events). ``all``: both.
        seed: Decides which pairs are drawn.
        counterfactual: Kind of counterfactual sentence; None: the task's first.
        partition_seed: Decides the halves; use the same one everywhere.
        partition_share: Share of the attribution half.
        unequal: What to do with a pair whose sentences differ in their number of tokens, or whose answer and foil begin
            with the same token: ``drop`` it and count it, or end with an ``error``.
    """

    source: str = "ioi"
    num_pairs: int | None = None
    half: PartitionChoice = "all"
    seed: int = 0
    counterfactual: str | None = None
    partition_seed: int = 0
    partition_share: float = 0.5
    unequal: Unequal = "drop"

    def __post_init__(self) -> None:
        if self.source not in PAIR_TASKS:
            raise InputError(f"data.source={self.source!r} makes no pairs; give {', '.join(PAIR_TASKS)}")
        check_partition(self.half, self.partition_share)
        if self.num_pairs is not None and self.num_pairs < 1:
            raise InputError(f"data.num_samples={self.num_pairs} is too small; give 1 or more")
        check_unequal(self.unequal)
        kinds = PAIR_TASKS[self.source].counterfactuals
        if self.counterfactual is not None and self.counterfactual not in kinds:
            raise InputError(
                f"data.counterfactual={self.counterfactual!r} is not a kind that {self.source} knows; give "
                f"{' or '.join(kinds)}"
            )

    @property
    def kind(self) -> str:
        """The kind of counterfactual sentence."""
        return self.counterfactual or PAIR_TASKS[self.source].counterfactuals[0]

    def texts(self, encoder: Encoder) -> Iterator[PairText]:
        """The pairs as text, without end.

        Raises:
            InputError: If the model has no tokenizer, or one that does not allow the task.
        """
        if encoder.tokenizer is None:
            raise InputError(
                f"data.source={self.source} makes sentences for the model's tokenizer, and the model has none; put the "
                "tokenizer's files (tokenizer.json, tokenizer_config.json) beside its config.json"
            )
        partition = Partition(self.half, self.partition_seed, self.partition_share)
        # The counterfactual has no say in the draw: both kinds are made of the same sentences.
        rng = random.Random(f"{self.seed} {self.source} {self.half}")
        return PAIR_TASKS[self.source].texts(encoder, partition, self.kind, rng)


@dataclass(frozen=True)
class PairSet:
    """Pairs, and what was left out on the way.

    Attributes:
        pairs: The pairs, in the order in which they were made or read.
        counts: ``num_duplicates``; dropped: ``num_unequal_lengths`` (sentences of different numbers of tokens),
            ``num_equal_answers`` (answer and foil begin with the same token), ``num_not_continuing`` (the tokenizer
            joins the sentence's end and the answer or foil in one token, or makes nothing of either); kept:
            ``num_long_answers`` (answer or foil has several tokens, of which the first counts).
    """

    pairs: list[Pair]
    counts: Counter[str] = field(default_factory=Counter)


def make_pairs(query: PairQuery, encoder: Encoder) -> PairSet:
    """Pairs that all differ, drawn by the query's seed alone.

    Raises:
        InputError: If the tokenizer does not allow the task, or there are fewer pairs than asked for.
    """
    number = query.num_pairs or DEFAULT_PAIRS
    pairs: dict[str, Pair] = {}
    names = ("num_duplicates", "num_unequal_lengths", "num_equal_answers", "num_not_continuing", "num_long_answers")
    counts = Counter(dict.fromkeys(names, 0))
    last_new = 0
    for step, text in enumerate(query.texts(encoder)):
        if len(pairs) == number or step - last_new > _PATIENCE:
            break
        pair = encode_pair(text, encoder, counts, query.unequal)
        if pair is None:
            continue
        if pair.id in pairs:
            counts["num_duplicates"] += 1
            continue
        pairs[pair.id] = pair
        last_new = step
    if len(pairs) < number:
        left_out = ", ".join(f"{name} {count}" for name, count in counts.items() if count)
        raise InputError(
            f"data.num_samples={number}: data.source={query.source} gives only {len(pairs)} pairs for this tokenizer"
            f"{f' ({left_out})' if left_out else ''}; lower data.num_samples"
        )
    return PairSet(list(pairs.values()), counts)


def encode_pair(text: PairText, encoder: Encoder, counts: Counter[str], unequal: Unequal = "drop") -> Pair | None:
    """The pair as the model reads it; None if it is dropped, for a reason that ``counts`` grows by (see ``PairSet``).

    Answer and foil are read as they continue the sentence: the tokens of sentence and answer together, less those of
    the sentence. Whether a space stands between them is up to the texts.

    Raises:
        InputError: If the pair is to be dropped and ``unequal`` is ``error``, or it is longer than the model's context.
    """
    values = Values(answer=text.answer, foil=text.foil, counterfactual=text.counterfactual)
    sample = record_sample(TextRecord(text.clean, values), encoder, counts, unequal=unequal)
    return None if sample is None else Pair(sample, text)


def pad_pairs(pairs: Sequence[Pair], pad_id: int) -> ReferenceBatch:
    """One batch of pairs, padded on the right to the longest sentence.

    Returns:
        The clean sentences, with ``fields``: ``answer`` and ``foil`` (-1: none), ``[B]`` int64, and, if they have one,
        ``counterfactual_ids``, ``[B, T]`` int64, which ``attention_mask`` is valid for too.
    """
    return pad_samples([pair.sample for pair in pairs], pad_id)
