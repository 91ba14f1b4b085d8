"""The reference samples whose attributions are averaged, as a DataModule."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from sparc3_pl.data.batches import ReferenceBatch
from sparc3_pl.data.samples import Sample, Target, matched_samples, pack_windows, read_targets, text_samples
from sparc3_pl.data.sources import local_source
from sparc3_pl.data.texts import PartitionChoice, TextQuery
from sparc3_pl.distributed import gather_lists
from sparc3_pl.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ReferenceBatch", "ReferenceData"]

log = logging.getLogger(__name__)


class ReferenceData(LightningDataModule):
    """Reference samples: windows packed from documents, or one text a sample.

    Args:
        source: Hub data set id, local .jsonl, .json, .csv, .tsv, .parquet or .txt file (also .gz), or ``demo``
            (``demo:prompts``, ``demo:general_heldout``, ``demo:prompts_heldout`` are the other embedded corpora).
        text_field: Field of the text, dots for nesting (``prompt.text``).
        filter: Condition on a record's fields, as ``prompt.toxicity >= 0.9``, joined by ``and``. A null never passes.
        seq_len: Window length in tokens, special tokens included; documents are packed. null: each text is a sample.
        num_samples: How many samples; null: as many as there are (or as ``match`` has).
        seed: Decides which samples are drawn.
        batch_size: Samples of one batch.
        split: Split of a hub data set.
        subset: Configuration of a hub data set (``en`` for C4).
        partition: ``attribution`` or ``evaluation``: only texts of that half, told apart by content. ``all``: both.
        partition_seed: Decides the halves; use the same one everywhere.
        partition_share: Share of the texts that are in the attribution half.
        match: Score folder or data file whose samples' token lengths and endings (mid-sentence or full stop) the
            samples get, so that a contrast between the two compares contents, not formats. ``seq_len`` is not used.
        match_field: Field of the text if ``match`` is a data file; null: as ``text_field``.
        match_filter: Filter if ``match`` is a data file.
        max_tokens: Where each text is a sample: keep only its first so many tokens.
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
        match: str | None = None,
        match_field: str | None = None,
        match_filter: str | None = None,
        max_tokens: int | None = None,
    ) -> None:
        super().__init__()
        # A rank may have no sample at all: seven samples on eight ranks.
        self.allow_zero_length_dataloader_with_multiple_devices = True
        positive = {"seq_len": seq_len, "num_samples": num_samples, "batch_size": batch_size, "max_tokens": max_tokens}
        check_positive(**positive)
        self.query = TextQuery(
            source, text_field, filter, split, subset, seed, partition, partition_seed, partition_share
        )
        self.match_query = _match_query(match, match_field or text_field, match_filter, split, subset)
        self.match, self.seq_len, self.num_samples, self.seed = match, seq_len, num_samples, seed
        self.batch_size, self.max_tokens = batch_size, max_tokens
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.samples: list[Sample] = []
        self.equal_passes = False
        """Whether all ranks get as many batches as the one with the most, the last of them stand-ins."""
        self._excluded: set[str] = set()
        self._match_counts: dict[str, int] = {}

    def setup(self, stage: str | None = None) -> None:
        """Draw the samples; every rank draws the same ones. A second call does nothing.

        Raises:
            InputError: If the source cannot be read or gives fewer samples than asked for.
        """
        if self.samples:
            return
        tokenizer = tokenizer_of(self)
        try:
            self.samples = self._draw(tokenizer)
        except InputError as error:
            if not self.query.counts["num_null"]:
                raise
            raise InputError(f"{error} ({self.query.counts['num_null']} records hold a null and never pass)") from error
        counts = self.query.counts
        if any(counts[name] for name in ("num_null", "num_empty", "num_duplicates")):
            log.info("%d samples from %s", len(self.samples), self.query.seen())

    def _draw(self, tokenizer: PreTrainedTokenizerBase) -> list[Sample]:
        name = f"data.source={self.query.source!r}"
        texts = self.query.texts()
        total, counts = self.num_samples, self.query.counts
        if self.match is not None:
            targets = self._targets(tokenizer)
            samples, self._match_counts = matched_samples(texts, tokenizer, targets, name)
            if missed := self._match_counts["num_unmatched_endings"]:
                log.warning(
                    "%d of %d samples end mid-sentence where %s ends in a full stop", missed, len(targets), self.match
                )
            return samples
        if self.seq_len is not None:
            return pack_windows(_progress(texts, self, "documents"), tokenizer, self.seq_len, total, name, counts)
        return text_samples(_progress(texts, self, "texts", total), tokenizer, total, self.max_tokens, name)

    def _targets(self, tokenizer: PreTrainedTokenizerBase) -> list[Target]:
        """Formats to match: those of ``match``, repeated or reduced to ``num_samples`` if that is given."""
        if self.match_query is None:
            targets = read_targets(local_source(self.match, "data.match"))
        else:
            samples = text_samples(
                self.match_query.texts(), tokenizer, None, self.max_tokens, f"data.match={self.match!r}"
            )
            targets = [Target(len(sample.input_ids), sample.ending) for sample in samples]
        if self.num_samples is None or self.num_samples == len(targets):
            return targets
        whole, rest = divmod(self.num_samples, len(targets))
        return targets * whole + random.Random(self.seed).sample(targets, rest)

    def exclude(self, ids: Iterable[str]) -> None:
        """Do not serve these samples (they are scored already). They stay in ``samples`` and in ``describe()``."""
        self._excluded |= set(ids)

    def predict_dataloader(self) -> DataLoader:
        """The share of the samples that is this rank's, the longest first; no sample is on two ranks."""
        rank, world_size = rank_of(self)
        todo = [sample for sample in self.samples if sample.id not in self._excluded]
        # Longest first over all ranks: the shares cost about the same, and too long a sample fails at once.
        todo.sort(key=lambda sample: (-len(sample.input_ids), sample.id))
        own = todo[rank::world_size]
        batches = [own[start : start + self.batch_size] for start in range(0, len(own), self.batch_size)]
        if self.equal_passes:
            batches += [[]] * (max(gather_lists([len(batches)])) - len(batches))
        collate = partial(pad_samples, pad_id=tokenizer_of(self).pad_token_id)
        return DataLoader(batches, batch_size=None, collate_fn=collate)

    def describe(self) -> dict[str, Any]:
        """The manifest's ``data`` entry: where the samples come from, which they are, and what was left out."""
        query = self.query
        return {
            "source": query.source,
            "split": query.split,
            "subset": query.subset,
            "text_field": query.text_field,
            "filter": query.filter,
            **query.origin,
            "seed": self.seed,
            "seq_len": None if self.match else self.seq_len,
            "max_tokens": self.max_tokens,
            "partition": query.half,
            "partition_seed": query.partition_seed,
            "partition_share": query.partition_share,
            "match": self.match,
            "match_filter": self.match_query.filter if self.match_query else None,
            "match_revision": self.match_query.origin["revision"] if self.match_query else None,
            "sample_ids": [sample.id for sample in self.samples],
            **dict(query.counts),
            **self._match_counts,
        }


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


def pad_samples(samples: Sequence[Sample], pad_id: int) -> ReferenceBatch:
    """Pad on the right to the longest sample. ``[B, T]``; of no sample: a stand-in ``[1, 1]``."""
    input_ids, mask = pad_right([sample.input_ids for sample in samples] or [[]], pad_id)
    return ReferenceBatch(input_ids, mask, [s.id for s in samples], [s.ending for s in samples])


def pad_right(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, each ``[B, T]`` int64, padded on the right to the longest row."""
    length = max(1, *map(len, rows))
    input_ids = torch.tensor([[*row, *[pad_id] * (length - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return input_ids, mask


# --- what both DataModules need ---------------------------------------------------------------------------------------


def check_positive(**values: int | None) -> None:
    """Refuse counts below 1, naming the configuration key.

    Raises:
        InputError: For the first such value.
    """
    for name, value in values.items():
        if value is not None and value < 1:
            raise InputError(f"data.{name}={value} is too small; give 1 or more")


def tokenizer_of(data: LightningDataModule) -> PreTrainedTokenizerBase:
    """The tokenizer of the Trainer's module; without a Trainer the one set as ``data.tokenizer``."""
    if data.trainer is not None:
        return data.trainer.lightning_module.tokenizer
    assert data.tokenizer is not None, "attach a Trainer or set .tokenizer first"
    return data.tokenizer


def rank_of(data: LightningDataModule) -> tuple[int, int]:
    """The number of this process and how many there are; (0, 1) without a Trainer."""
    return (data.trainer.global_rank, data.trainer.world_size) if data.trainer is not None else (0, 1)


def _progress(texts: Iterator[str], data: LightningDataModule, unit: str, total: int | None = None) -> Iterator[str]:
    """Show on stderr, on the first rank, how many texts have been read, once it takes longer than a second."""
    from tqdm import tqdm

    return tqdm(
        texts, desc="reading", unit=f" {unit}", total=total, disable=rank_of(data)[0] != 0, delay=1, leave=False
    )
