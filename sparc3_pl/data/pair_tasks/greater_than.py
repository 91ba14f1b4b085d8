"""Years: what began in one year ends in a later one, and the sentence breaks off within that later year.

The task is that of Hanna et al., "How does GPT-2 compute greater-than?" (NeurIPS 2023, arXiv 2305.00586). Sentences
here are our own, and the answer is one year against another, not the sum over all years.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from sparc3_pl.data.encoding import Encoder
from sparc3_pl.data.pair_tasks.task import PairTask, PairText, Partition
from sparc3_pl.errors import InputError

__all__ = ["EVENTS", "TEMPLATES", "GreaterThan"]

TEMPLATES = (
    "The {event} began in {start} and ended in",
    "The {event} lasted from the year {start} to the year",
    "The {event}, which started in {start}, went on until",
    "Historians date the {event} from {start} to",
    "A long {event} broke out in {start}; it was over in",
    "People had known about the {event} since {start}, but it came to an end in",
    "In {start} the {event} was announced, and it was completed in",
    "The {event} of {start} was not settled before",
)
EVENTS = (
    "war", "campaign", "siege", "dispute", "project", "reform", "expedition", "strike", "rebellion", "drought",
    "famine", "debate", "trial", "voyage", "conflict", "construction", "negotiation", "investigation", "occupation",
    "revolt", "boycott", "crusade", "programme", "epidemic",
)  # fmt: skip
CENTURIES = range(11, 20)


@dataclass(frozen=True)
class _Years:
    """A start year with the years that continue a sentence, told apart by their first token."""

    century: int
    start: int
    later: tuple[int, ...]
    earlier: tuple[int, ...]


class GreaterThan(PairTask):
    """``The war began in 1732 and ended in 17`` -> ``58``, not ``13``.

    The tens of answer and foil differ from the start year's: so the task is the same whether the tokenizer writes two
    digits as one token or as two. Where it joins digits over the century's end (``175`` ``8``), the sentence breaks off
    before the year instead. In the counterfactual, ``start_01``, the start year ends in 01, and any year is later.
    """

    name: ClassVar[str] = "greater_than"
    counterfactuals: ClassVar[tuple[str, ...]] = ("start_01",)

    def texts(
        self, encoder: Encoder, partition: Partition, counterfactual: str, rng: random.Random
    ) -> Iterator[PairText]:
        years_by_end = {within: self._years(encoder, within) for within in (True, False)}
        within_year = len(years_by_end[True]) >= len(years_by_end[False])
        years = years_by_end[within_year]
        if len(years) < 50:
            tokens = [encoder.decode([token]) for token in encoder.body("in 1758")]
            raise InputError(
                f"data.source={self.name}: the tokenizer writes 'in 1758' as {tokens}, so that only {len(years)} start "
                "years leave room for a later and an earlier one told apart by one token; give another model or task"
            )
        events = self.enough(EVENTS, partition, 2, "events")
        kinds = self.enough(TEMPLATES, partition, 1, "templates")
        while True:
            rng.shuffle(kinds)
            for template in kinds:
                year, event = rng.choice(years), rng.choice(events)
                clean, other_sentence = (
                    f"{template.format(event=event, start=f'{year.century}{last:02}')} "
                    f"{year.century if within_year else ''}"
                    for last in (year.start, 1)
                )
                answer, foil = (
                    f"{'' if within_year else year.century}{last:02}"
                    for last in (rng.choice(year.later), rng.choice(year.earlier))
                )
                words = event, f"{year.century}{year.start:02}"
                yield PairText(clean, answer, foil, other_sentence, template, words)

    def _years(self, encoder: Encoder, within_year: bool) -> list[_Years]:
        """The start years that this tokenizer allows, the sentence breaking off within the year or before it."""
        years = []
        for century in CENTURIES:
            before = encoder.body(f"in {century if within_year else ''}")
            first: dict[int, int] = {}  # the token that continues the sentence, by the last two digits
            for last in range(2, 100):
                ids = encoder.body(f"in {century}{last:02}")
                if ids[: len(before)] == before and len(ids) > len(before):
                    first[last] = ids[len(before)]
            # A token that two tens share tells nothing: it is the unknown one, or does not reach to the tens.
            tens = {token: {last // 10 for last, own in first.items() if own == token} for token in set(first.values())}
            clear = [last for last, token in first.items() if len(tens[token]) == 1]
            lengths = {last: len(encoder.body(f"in {century}{last:02}")) for last in (1, *clear)}
            for start in clear:
                later = tuple(last for last in clear if last // 10 > start // 10)
                earlier = tuple(last for last in clear if last // 10 < start // 10)
                if later and earlier and lengths[start] == lengths[1]:
                    years.append(_Years(century, start, later, earlier))
        return years
