"""The reference samples whose attributions are averaged, as a DataModule."""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self, get_args

from lightning.pytorch import LightningDataModule
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.utils.data import DataLoader

from sparc3_pl.data.batches import ReferenceBatch
from sparc3_pl.data.encoding import Encoder, Text, UnreadableTextError
from sparc3_pl.data.fields import Baseline, RecordFields, Unequal, check_unequal, less_baseline
from sparc3_pl.data.matching import SampleFormat, matched_samples, read_formats
from sparc3_pl.data.pairs import PAIR_TASKS, PairQuery, make_pairs
from sparc3_pl.data.samples import (
    Sample,
    pack_windows,
    pad_samples,
    random_windows,
    record_samples,
    text_samples,
)
from sparc3_pl.data.sources import local_source
from sparc3_pl.data.texts import PartitionChoice, TextQuery
from sparc3_pl.errors import InputError
from sparc3_pl.io.formats import Record
from sparc3_pl.runtime.collectives import gather_lists

__all__ = ["ReferenceBatch", "ReferenceData", "build_formats", "build_samples"]

log = logging.getLogger(__name__)


# --- from a source to samples -----------------------------------------------------------------------------------------

Windows = Literal["packed", "random"]
"""How windows are cut out of documents: joined and cut without gaps, or one at a random place of each."""

Progress = Callable[[Iterator[Any], str, int | None], Iterator[Any]]
"""Shows how many texts have been read; its arguments are the texts, their unit, and how many there will be."""


def build_samples(
    query: TextQuery,
    encoder: Encoder,
    *,
    seq_len: int | None = None,
    num_samples: int | None = None,
    max_tokens: int | None = None,
    formats: Sequence[SampleFormat] | None = None,
    baseline: Baseline = "mean",
    gae_lambda: float = 1.0,
    unequal: Unequal = "drop",
    windows: Windows = "packed",
    seed: int = 0,
    progress: Progress = lambda texts, unit, total: texts,
) -> list[Sample]:
    """Draw samples from a source: matched to ``formats`` if they are given, else each record a sample if fields of it
    are asked for (``query.fields``), else windows of ``seq_len`` tokens, else each text a sample.

    ``query.counts`` holds afterwards what was read and left out; beside the counts of ``TextQuery``:
    ``num_without_tokens``, ``num_with_prefix`` (texts with a rendered BOS of their own, which got no second one),
    ``num_with_special`` (texts within which special tokens stand), and those of ``matched_samples``,
    ``record_samples`` and ``random_windows``.

    Args:
        query: The source, and which of its texts.
        encoder: The model's encoder.
        seq_len: Tokens of a window, special tokens included.
        num_samples: Number of samples; None: all.
        max_tokens: Where each text is a sample: keep only this many of its first tokens.
        formats: Lengths and endings to match.
        baseline: What is taken off the weights of records, see ``less_baseline`` and ``token_advantages``.
        gae_lambda: See ``token_advantages``.
        unequal: What to do with records that cannot be compared, see ``record_samples``.
        windows: How windows are cut out of documents.
        seed: Decides where a random window begins.
        progress: Wraps the texts while they are read.

    Raises:
        InputError: If the source cannot be read, holds what the model cannot read, or gives too few samples.
    """
    name = f"{query.source_key or f'{query.prefix}source'}={query.source!r}"
    counts: Counter[str] = Counter()
    about = {"source": name, "counts": counts, "origins": query.made_from}
    texts = query.texts()
    try:
        if formats is not None:
            samples = matched_samples(texts, encoder, formats, **about)
        elif query.fields.given:
            records = progress(query.records(), "records", num_samples)
            weights = {"baseline": baseline, "gae_lambda": gae_lambda}
            samples = record_samples(records, encoder, num_samples, max_tokens, **weights, **about, unequal=unequal)
        elif seq_len is not None and windows == "random":
            texts = progress(texts, "documents", None)
            samples = random_windows(texts, encoder, seq_len, num_samples, seed, **about)
        elif seq_len is not None:
            samples = pack_windows(progress(texts, "documents", None), encoder, seq_len, num_samples, **about)
        else:
            samples = text_samples(progress(texts, "texts", num_samples), encoder, num_samples, max_tokens, **about)
    except UnreadableTextError as error:
        raise InputError(f"{name}: {query.place}: {error}") from error
    except InputError as error:
        left_out = {"hold a null and never pass": query.counts["num_null"]}
        left_out["give no token"] = counts["num_without_tokens"]
        left_out["have a counterfactual of another length"] = counts["num_unequal_lengths"]
        left_out["have an answer and a foil with one first token"] = counts["num_equal_answers"]
        left_out["have an answer or foil that is not told apart from the text's end"] = counts["num_not_continuing"]
        reasons = ", ".join(f"{number} records {what}" for what, number in left_out.items() if number)
        if not reasons:
            raise
        raise InputError(f"{error} ({reasons})") from error
    finally:
        query.counts.update(num_without_tokens=0, num_with_prefix=0, num_with_special=0)
        query.counts.update(counts)
    return samples


def build_formats(
    match: Path | TextQuery, encoder: Encoder, *, max_tokens: int | None = None, count: int | None = None, seed: int = 0
) -> list[SampleFormat]:
    """Lengths and endings of a score folder's samples, or of the texts of a source.

    Args:
        match: The folder or the source.
        encoder: The model's encoder.
        max_tokens: Keep only this many of a text's first tokens.
        count: Number of formats; those of the samples are repeated or reduced to it. None: as many as there are.
        seed: Seed for drawing the remainder where ``count`` is not a multiple of their number.

    Raises:
        InputError: If there is no sample, or one whose ending is not known.
    """
    if isinstance(match, Path):
        formats = read_formats(match)
    else:
        samples = build_samples(match, encoder, max_tokens=max_tokens)
        formats = [SampleFormat(len(sample.input_ids), sample.ending) for sample in samples if sample.ending]
        if len(formats) < len(samples):
            raise InputError(
                f"data.match={match.source!r} holds token ids, whose endings only a tokenizer can tell; put the "
                "model's tokenizer beside its config.json, or leave data.match out"
            )
    if count is None or count == len(formats):
        return formats
    whole, rest = divmod(count, len(formats))
    return formats * whole + random.Random(seed).sample(formats, rest)


# --- the DataModule ---------------------------------------------------------------------------------------------------


class ReferenceData(LightningDataModule):
    """Reference samples: windows packed from documents, or one text a sample.

    The module that scores them hands over its encoder: it calls ``read`` in its ``setup``.

    Args:
        source: Hub data set id, local .jsonl, .json, .csv, .tsv, .parquet or .txt file (also .gz), or ``demo``
            (``demo:prompts``, ``demo:general_heldout``, ``demo:prompts_heldout`` are the other embedded corpora).
            ``ioi``, ``greater_than`` and ``agreement`` make sentences in pairs for the model's tokenizer, with answer,
            foil and counterfactual; ``seq_len`` is not used, and without ``num_samples`` they make 128.
        text_field: Field of the text, dots for nesting (``prompt.text``). It may hold lists of token ids instead of
            text: these are taken as they stand, and the model then needs no tokenizer.
        filter: Condition on a record's fields, such as ``prompt.toxicity >= 0.9``; several are joined by ``and``. A
            null never passes.
        seq_len: Window length in tokens, special tokens included. null: each text is a sample.
        num_samples: How many samples; null: as many as there are (or as ``match`` has).
        seed: Decides which samples are drawn.
        batch_size: Samples of one batch.
        split: Split of a hub data set.
        subset: Configuration of a hub data set (``en`` for C4).
        partition: ``attribution`` or ``evaluation``: only texts of that half, told apart by content. ``all``: both.
        partition_seed: Decides the halves; use the same one everywhere.
        partition_share: Share of the texts that are in the attribution half.
        partition_field: Field whose text decides the half of a record, where texts of one record belong together, like
            the two sentences of a pair; null: the text itself.
        match: Score folder or data file whose samples' token lengths and endings (mid-sentence or full stop) the
            samples get, so that a contrast between the two compares contents, not formats. ``seq_len`` is not used.
        match_field: Field of the text if ``match`` is a data file; null: as ``text_field``.
        match_filter: Filter if ``match`` is a data file.
        max_tokens: Where each text is a sample: keep only this many of its first tokens.
        completion_field: Field of what follows the text, for target ``completion``: text or, exact to the token, a list
            of token ids. With this or any field below each record is a sample, and ``seq_len`` is not used.
        weight_field: Field of the completion's weight, such as a judge's score.
        weight_baseline: What is taken off the weights: ``mean`` of all samples, ``prompt`` (the mean of the prompt's
            other completions), ``prefix`` (for each token, the weight expected before it: the least noise; needs
            ``prefix_field``), or ``none``.
        prefix_field: Field of the weights that the completion would have if it were cut after each of its tokens, a
            list: eval writes such scores with ``model.judge_prefixes``.
        gae_lambda: With ``weight_baseline: prefix``, how far ahead a token's credit looks: 1 to the end, without bias;
            0 to the next token; between them less noise for some bias.
        label_field: Field of the text's label, a number.
        answer_field: Field of what the model should say next, for target ``answer``: text, of which the first token
            counts (give it with its space), or a token id.
        foil_field: Field of what it should not say, likewise.
        counterfactual_field: Field of the text with the decisive words exchanged, of as many tokens.
        counterfactual: Where the source makes the sentences: their kind of counterfactual, ``abc`` or ``s2_io`` for
            ``ioi``, ``start_01`` for ``greater_than``, ``number`` for ``agreement``. null: the first.
        unequal: What to do with a record whose text and counterfactual differ in their number of tokens, or whose
            answer and foil begin with the same token: ``drop`` it and count it, or end with an ``error``.
        windows: ``packed``: documents are joined and cut into windows without gaps. ``random``: one window out of every
            document longer than ``seq_len``, at a random place, as SparseGPT and Wanda calibrate.
    """

    def __init__(
        self,
        source: str = "demo",
        text_field: str = "text",
        filter: str | None = None,
        seq_len: int | None = 64,
        num_samples: int | None = None,
        seed: int = 0,
        batch_size: int = 1,
        split: str = "train",
        subset: str | None = None,
        partition: PartitionChoice = "all",
        partition_seed: int = 0,
        partition_share: float = 0.5,
        partition_field: str | None = None,
        match: str | None = None,
        match_field: str | None = None,
        match_filter: str | None = None,
        max_tokens: int | None = None,
        completion_field: str | None = None,
        weight_field: str | None = None,
        weight_baseline: Baseline = "mean",
        prefix_field: str | None = None,
        gae_lambda: float = 1.0,
        label_field: str | None = None,
        answer_field: str | None = None,
        foil_field: str | None = None,
        counterfactual_field: str | None = None,
        counterfactual: str | None = None,
        unequal: Unequal = "drop",
        windows: Windows = "packed",
        _listed: Sequence[Record] | None = None,  # no key of the configuration: ``of_records`` gives it
    ) -> None:
        super().__init__()
        # A rank may have no sample at all: seven samples on eight ranks.
        self.allow_zero_length_dataloader_with_multiple_devices = True
        positive = {"seq_len": seq_len, "num_samples": num_samples, "batch_size": batch_size, "max_tokens": max_tokens}
        check_positive(**positive)
        if windows not in get_args(Windows):
            raise InputError(f"data.windows={windows!r} is unknown; give {' or '.join(get_args(Windows))}")
        fields = RecordFields(
            completion_field, weight_field, prefix_field, label_field, answer_field, foil_field, counterfactual_field
        )
        _check_fields(fields, weight_baseline, gae_lambda, match, max_tokens)
        check_unequal(unequal)
        if source in PAIR_TASKS:
            of_read_data = {
                "filter": filter,
                "partition_field": partition_field,
                "match": match,
                "max_tokens": max_tokens,
                "subset": subset,
                **fields.given,
            }
            for name, value in of_read_data.items():
                if value is not None:
                    raise InputError(
                        f"data.{name}={value!r} has no meaning where data.source={source} makes sentences; leave it out"
                    )
        elif counterfactual is not None:
            raise InputError(
                f"data.counterfactual={counterfactual!r} is for sources that make their sentences "
                f"({', '.join(PAIR_TASKS)}); give data.counterfactual_field, or leave it out"
            )
        if windows == "random" and (seq_len is None or match is not None or fields.given or source in PAIR_TASKS):
            other = f"match={match!r}" if match is not None else next(iter(fields.given), "seq_len=null")
            other = f"source={source}" if source in PAIR_TASKS else other
            raise InputError(f"data.windows=random: with data.{other} no windows are cut; leave out one of the two")
        self.query = TextQuery(
            source, text_field, filter, split, subset, seed, partition, partition_seed, partition_share,
            partition_field, fields=fields, listed=_listed,
        )  # fmt: skip
        self.pair_query = (
            PairQuery(source, num_samples, partition, seed, counterfactual, partition_seed, partition_share, unequal)
            if source in PAIR_TASKS
            else None
        )
        """The query for sentences to make; None: the source has its own."""
        self.weight_baseline: Baseline = weight_baseline
        self.gae_lambda = gae_lambda
        self.unequal: Unequal = unequal
        self.match_query = _match_query(match, match_field or text_field, match_filter, split, subset)
        self.match, self.seq_len, self.num_samples, self.seed = match, seq_len, num_samples, seed
        self.windows = windows
        self.batch_size, self.max_tokens = batch_size, max_tokens
        self.samples: list[Sample] = []
        self._pad_id: int | None = None
        self._excluded: set[str] = set()

    @classmethod
    def of_records(cls, records: Sequence[Record], name: str, **options: Any) -> Self:
        """The data module for records that are held in memory, in their order.

        Args:
            records: The records.
            name: Their name in messages and manifests.
            options: Arguments of this class, but for those that say where and what to read.
        """
        return cls(source=name, _listed=records, **options)

    @property
    def longest(self) -> int | None:
        """Tokens of the longest sample, as the settings bound it; None: as many as the texts have."""
        has_windows = self.match is None and self.pair_query is None and not self.query.fields.given
        return self.seq_len if has_windows and self.seq_len is not None else self.max_tokens

    def read(self, encoder: Encoder) -> None:
        """Draw the samples; every rank draws the same ones. A second call does nothing.

        Args:
            encoder: The model's encoder.

        Raises:
            InputError: If the source cannot be read or gives fewer samples than asked for.
        """
        if self.samples:
            return
        self._pad_id = encoder.pad_id
        if self.pair_query is not None:
            pairs = make_pairs(self.pair_query, encoder)
            self.samples = [pair.sample for pair in pairs.pairs]
            self.query.counts.update(pairs.counts)
            self._tell()
            return
        formats = None
        if self.match is not None:
            match = self.match_query or local_source(self.match, "data.match")
            options = {"max_tokens": self.max_tokens, "count": self.num_samples, "seed": self.seed}
            formats = build_formats(match, encoder, **options)
        self.samples = build_samples(
            self.query,
            encoder,
            seq_len=self.seq_len,
            num_samples=self.num_samples,
            max_tokens=self.max_tokens,
            formats=formats,
            baseline=self.weight_baseline,
            gae_lambda=self.gae_lambda,
            unequal=self.unequal,
            windows=self.windows,
            seed=self.seed,
            progress=partial(_progress, data=self),
        )
        self._tell()

    def _tell(self) -> None:
        """Say in the log what was left out, and what of the texts changes what the model reads."""
        counts, total = self.query.counts, len(self.samples)
        if counts["num_too_short"] and self.match is None:
            log.info(
                "%d documents have no window of data.seq_len=%s tokens and were passed over",
                counts["num_too_short"],
                self.seq_len,
            )
        if any(counts[name] for name in ("num_null", "num_empty", "num_duplicates", "num_without_tokens")):
            log.info("%d samples from %s", total, self.query.seen())
        of_completions = self.query.fields.completion is not None
        left_out = {
            "without a completion or a value asked for": counts["num_null"] if of_completions else 0,
            "whose completion is empty": counts["num_empty"] if of_completions else 0,
            "that are the only completion of their prompt (data.weight_baseline=prompt)": counts[
                "num_without_baseline"
            ],
            "whose answer and foil begin with the same token": counts["num_equal_answers"],
            "whose answer or foil is not told apart from the text's end": counts["num_not_continuing"],
            "whose counterfactual has more or fewer tokens than the text": counts["num_unequal_lengths"],
        }
        for what, number in left_out.items():
            if number:
                log.warning("%d records %s were left out", number, what)
        if counts["num_long_answers"]:
            log.info("%d pairs have answers of several tokens; the first counts", counts["num_long_answers"])
        if counts["num_without_space"]:
            log.warning(
                "%d answers go on within the text's last word; where a word of its own is meant, let it begin with "
                "the space",
                counts["num_without_space"],
            )
        if counts["num_without_tokens"]:
            log.warning("%d texts give no token and were left out", counts["num_without_tokens"])
        if counts["num_with_prefix"]:
            log.warning(
                "%d texts begin with special tokens that the tokenizer puts before every text; they were not put there "
                "twice",
                counts["num_with_prefix"],
            )
        if counts["num_with_special"]:
            log.warning(
                "%d texts have special tokens within, which the model reads as such (as in a chat template)",
                counts["num_with_special"],
            )
        if counts["num_unmatched_endings"]:
            log.warning(
                "%d of %d samples end mid-sentence where %s ends in a full stop",
                counts["num_unmatched_endings"],
                total,
                self.match,
            )

    @property
    def equal_passes(self) -> bool:
        """Whether all ranks get as many batches as the one with the most, the last of them stand-ins.

        Every rank must take part in every pass of a model that is shared out over the ranks.
        """
        return isinstance(getattr(self.trainer, "strategy", None), ModelParallelStrategy)

    def exclude(self, ids: Iterable[str]) -> None:
        """Do not serve these samples (they are scored already). They stay in ``samples`` and in ``describe()``."""
        self._excluded |= set(ids)

    def predict_dataloader(self) -> DataLoader:
        """The share of the samples that is this rank's, the longest first; no sample is on two ranks."""
        assert self._pad_id is not None, "read() draws the samples first"
        rank, world_size = rank_of(self)
        todo = [sample for sample in self.samples if sample.id not in self._excluded]
        # Longest first over all ranks: the shares cost about the same, and too long a sample fails at once.
        todo.sort(key=lambda sample: (-len(sample.input_ids), sample.id))
        own = todo[rank::world_size]
        batches = [own[start : start + self.batch_size] for start in range(0, len(own), self.batch_size)]
        if self.equal_passes:
            batches += [[]] * (max(gather_lists([len(batches)])) - len(batches))
        return DataLoader(batches, batch_size=None, collate_fn=partial(pad_samples, pad_id=self._pad_id))

    def describe(self) -> Record:
        """The manifest's ``data`` entry: where the samples come from, which they are, and what was left out."""
        query = self.query
        return {
            "source": query.source,
            "split": query.split,
            "subset": query.subset,
            "text_field": None if self.pair_query else query.text_field,
            "filter": query.filter,
            **query.origin,
            "seed": self.seed,
            "seq_len": None if self.match or query.fields.given or self.pair_query else self.seq_len,
            **({} if self.windows == "packed" else {"windows": self.windows}),
            "max_tokens": self.max_tokens,
            "partition": query.half,
            "partition_seed": query.partition_seed,
            "partition_share": query.partition_share,
            **({} if query.partition_field is None else {"partition_field": query.partition_field}),
            "match": self.match,
            "match_filter": self.match_query.filter if self.match_query else None,
            "match_revision": self.match_query.origin["revision"] if self.match_query else None,
            "sample_ids": [sample.id for sample in self.samples],
            **query.fields.given,
            **({"counterfactual": self.pair_query.kind} if self.pair_query else {}),
            **({"weight_baseline": self.weight_baseline} if query.fields.weight else {}),
            **({"gae_lambda": self.gae_lambda} if self.weight_baseline == "prefix" else {}),
            **dict(query.counts),
        }


def _check_fields(
    fields: RecordFields, baseline: Baseline, gae_lambda: float, match: str | None, max_tokens: int | None
) -> None:
    """Refuses fields that do not go together, or not with what cuts the texts."""
    names = list(fields.given)
    less_baseline([], [], baseline)
    if names and match is not None:
        raise InputError(
            f"data.match={match!r} cuts samples out of texts, which data.{names[0]} does not fit; leave one"
        )
    ends = [name for name in names if name not in ("label_field", "weight_field", "prefix_field")]
    if ends and max_tokens is not None:
        raise InputError(f"data.max_tokens={max_tokens} would cut the end that data.{ends[0]} is about; leave it out")
    if baseline != "mean" and fields.weight is None:
        raise InputError(f"data.weight_baseline={baseline} needs weights; give data.weight_field")
    if (baseline == "prefix") is not (fields.prefix is not None):
        raise InputError("data.weight_baseline=prefix and data.prefix_field need each other; give both or neither")
    if baseline == "prefix" and fields.completion is None:
        raise InputError("data.prefix_field needs the completions that the scores are of; give data.completion_field")
    if not 0 <= gae_lambda <= 1:
        raise InputError(f"data.gae_lambda={gae_lambda}; give a number from 0 to 1")
    if gae_lambda != 1 and baseline != "prefix":
        raise InputError(f"data.gae_lambda={gae_lambda} is for data.weight_baseline=prefix; leave it out")
    if fields.foil is not None and fields.answer is None:
        raise InputError(f"data.foil_field={fields.foil!r} needs an answer; give data.answer_field")
    if fields.completion is not None and (fields.answer or fields.counterfactual):
        raise InputError(f"data.completion_field={fields.completion!r} and data.{ends[1]} are of two kinds of sample")


def _match_query(
    match: str | None, field: str, condition: str | None, split: str, subset: str | None
) -> TextQuery | None:
    """How to read ``match``; None for a score folder (or no match)."""
    if match is None:
        return None
    path = local_source(match, "data.match")
    if path is not None and path.is_dir():
        return None
    return TextQuery(match, field, condition, split, subset, prefix="data.match_", source_key="data.match")


# --- what both DataModules need ---------------------------------------------------------------------------------------


def check_positive(**values: int | None) -> None:
    """Refuse counts below 1, naming the configuration key.

    Raises:
        InputError: For the first such value.
    """
    for name, value in values.items():
        if value is not None and value < 1:
            raise InputError(f"data.{name}={value} is too small; give 1 or more")


def rank_of(data: LightningDataModule) -> tuple[int, int]:
    """The number of this process and how many there are; (0, 1) without a Trainer."""
    return (data.trainer.global_rank, data.trainer.world_size) if data.trainer is not None else (0, 1)


def _progress(texts: Iterator[Text], unit: str, total: int | None, data: LightningDataModule) -> Iterator[Text]:
    """Show on stderr, on the first rank, how many texts have been read, once it takes longer than a second."""
    from tqdm import tqdm

    return tqdm(
        texts, desc="reading", unit=f" {unit}", total=total, disable=rank_of(data)[0] != 0, delay=1, leave=False
    )
