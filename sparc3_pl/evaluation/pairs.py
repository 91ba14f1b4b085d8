"""Which of two sentences a model finds more likely, as CrowS-Pairs, StereoSet and WinoBias ask."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from sparc3_pl.data.encoding import Encoder
from sparc3_pl.data.samples import pad_right
from sparc3_pl.data.sources import get_field, local_source, parse_filter, partition, read_records, text_id
from sparc3_pl.data.texts import PartitionChoice, check_partition
from sparc3_pl.errors import InputError
from sparc3_pl.evaluation.measurement import Measurement, Row
from sparc3_pl.io.formats import Record
from sparc3_pl.model.likelihood import IGNORE, WindowScorer
from sparc3_pl.model.placement import input_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["SentencePair", "SentencePairs"]

log = logging.getLogger(__name__)

_KEY = "pairs"


@dataclass(frozen=True)
class SentencePair:
    """Two sentences as the model reads them.

    Attributes:
        id: Identity by content, of both.
        ids: Token ids of the first and of the second, with what stands before them.
        num_before: How many tokens stand before each sentence: they are read but not scored.
        text_ids: Identities of both sentences, by which a plan knows those that it was made from.
    """

    id: str
    ids: tuple[list[int], list[int]]
    num_before: int
    text_ids: tuple[str, ...] = ()


@dataclass(frozen=True)
class SentencePairs(Measurement):
    """Share of pairs whose first sentence is the more likely one, and by how many nats on average.

    A sentence's log-likelihood is the sum over all its tokens. Where the tokenizer puts nothing before a text, the
    token that begins or ends a text (BOS, else EOS) is put there, as lm-eval does: else a sentence's first token could
    not be scored, and often the two differ in it. Two sentences that are exactly as likely count half. 0.5 means no
    preference. What ``compare`` calls better is a lower value of either figure, on both sides of 0.5: so the
    stereotyping sentence must be the first.

    Values of a pair: ``prefers_first`` (0, 0.5 or 1) and ``difference`` (first less second, nats). Their means are the
    figures; ``compare`` gives their changes with intervals over pairs.

    Args:
        source: As ``data.source`` of score: a local file or a hub data set.
        first_field: Field of the first sentence.
        second_field: Field of the second.
        filter: Condition on a record's fields, as ``bias_type == "gender"``. A null never passes.
        num_pairs: How many; None: all.
        seed: Decides which; None: the first ones.
        split: Split of a hub data set.
        subset: Configuration of a hub data set.
        batch_size: Pairs that are read at once.
        partition: ``attribution`` or ``evaluation``: only pairs of that half, which is that of the first sentence.
        partition_seed: Decides the halves.
        partition_share: Share of the attribution half.

    Raises:
        InputError: If the source is written like a path and is not there, or the filter cannot be read.
    """

    source: str
    first_field: str = "more"
    second_field: str = "less"
    filter: str | None = None
    num_pairs: int | None = None
    seed: int | None = None
    split: str = "train"
    subset: str | None = None
    batch_size: int = field(default=8)
    partition: PartitionChoice = "all"
    partition_seed: int = 0
    partition_share: float = 0.5

    name = "pairs"
    unit = "pairs"
    better = "lower"
    paired = ("prefers_first", "difference")

    def __post_init__(self) -> None:
        local_source(self.source, f"{_KEY}.source")
        if self.filter:
            parse_filter(self.filter, f"{_KEY}.filter")
        if self.num_pairs is not None and self.num_pairs < 1:
            raise InputError(f"{_KEY}.num_pairs={self.num_pairs} is too small; give 1 or more")
        check_partition(self.partition, self.partition_share, f"{_KEY}.partition")

    def describe(self) -> Record:
        """Its settings, those of halves only where there are halves, so that earlier evaluations compare."""
        settings = asdict(self)
        halves = ("partition", "partition_seed", "partition_share") if self.partition == "all" else ()
        return {name: value for name, value in settings.items() if name not in halves}

    def units(self, encoder: Encoder) -> list[SentencePair]:
        """The pairs, each once, in the order in which they are drawn.

        Raises:
            InputError: If the source cannot be read, has too few pairs, or one that the model cannot read.
        """
        condition = parse_filter(self.filter, f"{_KEY}.filter") if self.filter else None
        records = read_records(self.source, split=self.split, subset=self.subset, seed=self.seed, key=f"{_KEY}.source")
        before = _before(encoder)
        counts: Counter[str] = Counter()
        pairs: dict[str, SentencePair] = {}
        for record in records:
            if len(pairs) == self.num_pairs:
                break
            try:
                passes = True if condition is None else condition.passes(record)
                sentences = [
                    get_field(record, name, f"{_KEY}.{key}")
                    for key, name in (("first_field", self.first_field), ("second_field", self.second_field))
                ]
                if passes is None or None in sentences:
                    counts["null"] += 1
                    continue
                half = partition(text_id(str(sentences[0])), self.partition_seed, self.partition_share)
                if passes and self.partition in ("all", half):
                    pair = self._pair(sentences, encoder, before)
                    if min(map(len, pair.ids)) == pair.num_before:  # an empty sentence would be the likeliest of all
                        counts["with a sentence that gives no token"] += 1
                        continue
                    counts["the same as another"] += pair.id in pairs
                    pairs[pair.id] = pair
            except InputError as error:
                raise InputError(f"{error} ({records.place})") from error
        if left_out := ", ".join(f"{number} {why}" for why, number in counts.items() if number):
            log.warning("pairs: %s left out", left_out)
        if len(pairs) < (self.num_pairs or 1):
            raise InputError(
                f"{_KEY}.num_pairs={self.num_pairs}: {self.source!r} gives only {len(pairs)} pairs; lower it, widen "
                "the filter or give more"
            )
        return list(pairs.values())

    def _pair(self, sentences: Sequence[object], encoder: Encoder, before: list[int]) -> SentencePair:
        for name, sentence in zip((self.first_field, self.second_field), sentences, strict=True):
            if not isinstance(sentence, str) or not sentence.strip():
                raise InputError(f"{_KEY}: {name!r} holds {str(sentence)[:40]!r}, no sentence; name another field")
        texts = map(str, sentences)
        first, second = ([] if encoder.is_only_special(text) else encoder.body(text) for text in texts)
        identity = text_id("\n".join(map(str, sentences)))
        text_ids = tuple(encoder.identity(str(sentence)) for sentence in sentences)
        return SentencePair(identity, ([*before, *first], [*before, *second]), len(before), text_ids)

    def measure(self, model: PreTrainedModel, encoder: Encoder, units: Sequence[SentencePair]) -> list[Row]:
        """Scores both sentences of every pair in one padded batch."""
        fitting = [pair for pair in units if encoder.context is None or max(map(len, pair.ids)) <= encoder.context]
        rows: dict[str, Row] = {}
        if fitting:
            values = _log_likelihoods(model, [ids for pair in fitting for ids in pair.ids], fitting[0].num_before)
            for pair, first, second in zip(fitting, values[::2], values[1::2], strict=True):
                preference = 0.5 if first == second else float(first > second)
                rows[pair.id] = {"unit": pair.id, "prefers_first": preference, "difference": first - second}
        too_long = f"longer than the model's context of {encoder.context} tokens"
        return [rows.get(pair.id, {"unit": pair.id, "failed": too_long}) for pair in units]


def _before(encoder: Encoder) -> list[int]:
    """What stands before every sentence.

    Raises:
        InputError: If the tokenizer has nothing that could.
    """
    if beginning := encoder.beginning():
        return beginning
    raise InputError(
        f"{_KEY}: the model has no token that begins or ends a text, without which the first token of a sentence "
        "cannot be scored; put the model's tokenizer files beside its config.json"
    )


def _log_likelihoods(model: PreTrainedModel, rows: Sequence[list[int]], num_before: int) -> list[float]:
    """The log-likelihood of each row's tokens after the first ``num_before``, in nats."""
    input_ids_BT, mask_BT = (tensor.to(input_device(model)) for tensor in pad_right(rows, 0))
    labels_BT = input_ids_BT.masked_fill(mask_BT == 0, IGNORE)
    labels_BT[:, :num_before] = IGNORE
    nll_B, _ = WindowScorer(model)(input_ids_BT, mask_BT, labels_BT)
    return (-nll_B).tolist()
