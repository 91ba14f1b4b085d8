"""The data of an evaluation: windows of a running text for perplexity, and prompts to complete."""

from __future__ import annotations

import itertools
import logging
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sparc3_pl.data.batches import chunks
from sparc3_pl.data.encoding import Encoder
from sparc3_pl.data.reference import check_positive, rank_of
from sparc3_pl.data.running_text import RunningText
from sparc3_pl.data.samples import SEPARATOR, pad_right
from sparc3_pl.data.sources import local_source, text_id
from sparc3_pl.data.texts import PartitionChoice, TextQuery
from sparc3_pl.errors import InputError
from sparc3_pl.io.formats import Record
from sparc3_pl.model.likelihood import IGNORE

__all__ = [
    "EvaluationData",
    "NeutralBatch",
    "PromptBatch",
    "UnitBatch",
    "Units",
    "Window",
    "WindowBatch",
    "WindowSize",
    "Windows",
    "check_window",
    "published_windows",
    "read_tokens",
    "sliding_windows",
    "window_size",
]

log = logging.getLogger(__name__)


@dataclass
class WindowBatch:
    """Windows of the running text, padded on the right.

    Attributes:
        input_ids: ``[B, T]`` int64.
        attention_mask: ``[B, T]`` int64, 1 for real tokens.
        labels: ``[B, T]`` int64: the token at that place if this window is the one that scores it, else ``IGNORE``.
            Its prediction stands one place to the left.
        index: Place of each window among all windows of the text.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    index: list[int]


@dataclass
class PromptBatch:
    """Prompts to complete, as text: ids (``text_id`` of the prompt) and prompts, in the same order."""

    ids: list[str]
    prompts: list[str]


@dataclass
class NeutralBatch:
    """Neutral prompts to complete, which are counted apart: ids and prompts, as in a ``PromptBatch``."""

    ids: list[str]
    prompts: list[str]


@dataclass(frozen=True)
class Units:
    """The units of a measurement of the user's own, over all ranks.

    Attributes:
        measurement: Name of the measurement.
        items: The units.
        batch_size: Number of units that are measured at once.
    """

    measurement: str
    items: Sequence[Any]
    batch_size: int


class UnitBatch:
    """Some units of a measurement, as they are. This is no dataclass: Lightning would copy every field of one.

    Args:
        measurement: Name of the measurement.
        items: The units.
    """

    def __init__(self, measurement: str, items: Sequence[Any]) -> None:
        self.measurement, self.items = measurement, items


Windows = Literal["sliding", "published"]
"""How a text is read: each token scored once (``sliding_windows``), or as pruning papers do (``published_windows``)."""


@dataclass(frozen=True)
class WindowSize:
    """Length of a perplexity window and the distance from one to the next, in tokens; and which windows there are."""

    max_length: int
    stride: int
    windows: Windows = "sliding"


LONGEST_WINDOW = 2048
"""Length of a window where ``max_length`` is not set and the model could read more: that of published figures."""


def window_size(
    context: int | None, max_length: int | None = None, stride: int | None = None, windows: Windows = "sliding"
) -> WindowSize:
    """The window for a model.

    Args:
        context: Tokens that the model can read; None: nothing says so.
        max_length: The length asked for; None: the context, at most ``LONGEST_WINDOW``.
        stride: The stride asked for; None: windows that do not overlap.
        windows: Which windows there are; published ones never overlap.

    Raises:
        InputError: as ``check_window``.
    """
    if max_length is None:
        max_length = min(context or LONGEST_WINDOW, LONGEST_WINDOW)
    stride = max_length if stride is None else stride
    check_window(max_length, stride, windows, context)
    return WindowSize(max_length, stride, windows)


def check_window(
    max_length: int | None, stride: int | None, windows: Windows = "sliding", context: int | None = None
) -> None:
    """Refuses windows that no text can be read in.

    Args:
        max_length: Length of a window; None: not known yet.
        stride: Distance from one to the next; None: windows that do not overlap.
        windows: Which windows there are.
        context: Tokens that the model can read; None: nothing says so.

    Raises:
        InputError: for the first setting that is wrong.
    """
    if max_length is not None and max_length < 2:
        raise InputError(f"model.max_length={max_length}; give at least 2 tokens (the first of a window is not scored)")
    if max_length is not None and context is not None and max_length > context:
        raise InputError(
            f"model.max_length={max_length} is longer than the model's context of {context} tokens; give at most "
            f"{context}"
        )
    if stride is not None and stride < 1:
        raise InputError(f"model.stride={stride}; give at least 1")
    if stride is not None and max_length is not None and stride > max_length:
        raise InputError(
            f"model.stride={stride} is longer than model.max_length={max_length}; give at most {max_length}"
        )
    if windows not in get_args(Windows):
        raise InputError(f"model.windows={windows!r} is unknown; give {' or '.join(get_args(Windows))}")
    if windows == "published" and stride is not None and stride != max_length:
        raise InputError(
            f"model.stride={stride}: published windows do not overlap; leave it out, or set model.windows: sliding"
        )


@dataclass(frozen=True)
class Window:
    """The ``index``-th window: tokens ``start`` to ``end`` (exclusive) of the text; those from ``scored`` on count."""

    index: int
    start: int
    end: int
    scored: int


def sliding_windows(num_tokens: int, max_length: int, stride: int) -> list[Window]:
    """Windows of up to ``max_length`` tokens, ``stride`` apart; each token is scored in the first one that reaches it.

    The first token of a window has nothing before it and is never scored. So the text's very first token is left out,
    and with ``stride == max_length`` the first token of every window.

    Raises:
        InputError: If ``max_length`` is below 2, or ``stride`` not between 1 and ``max_length``.
    """
    check_window(max_length, stride)
    windows: list[Window] = []
    last_end = 0
    for start in range(0, num_tokens, stride):
        end = min(start + max_length, num_tokens)
        scored = max(last_end, start + 1)
        if scored < end:  # a last token alone in its window has no context: nothing to score
            windows.append(Window(len(windows), start, end, scored))
        last_end = end
    return windows


def published_windows(num_tokens: int, max_length: int) -> list[Window]:
    """The windows by which SparseGPT and Wanda measure: whole ones without overlap; what is left at the end is dropped.

    Their code multiplies each window's mean loss, which is over its ``max_length - 1`` predicted tokens, by
    ``max_length``, and divides the sum by ``max_length`` times the number of windows. Since all windows are equally
    long, that is the sum of all losses divided by the number of predicted tokens: ``Perplexity`` as it is.

    Raises:
        InputError: If ``max_length`` is below 2, or the text does not fill a window.
    """
    check_window(max_length, None, "published")
    if num_tokens < max_length:
        raise InputError(
            f"model.windows=published: the text's {num_tokens} tokens fill no window of model.max_length={max_length}; "
            "lower it, or give more text"
        )
    starts = range(0, num_tokens - max_length + 1, max_length)
    return [Window(index, start, start + max_length, start + 1) for index, start in enumerate(starts)]


def read_tokens(text: str, encoder: Encoder, source: str, key: str = "data.text_source") -> list[int]:
    """A running text as token ids, with what the tokenizer puts before a text (BOS), and nothing after it.

    Raises:
        InputError: If there are too few for a perplexity.
    """
    ids = encoder(text)
    if len(ids) < 2 or len(ids) == len(encoder.prefix):
        raise InputError(f"{key}={source!r}: {len(ids)} tokens are too few for a perplexity; give more text")
    if encoder.special_counts(text).get("num_with_special"):
        log.warning("%s=%r: special tokens stand in the text, and the model reads them as such", key, source)
    return ids


@dataclass(frozen=True)
class Listed:
    """What is held in memory, in place of what a source gives; None: nothing of that kind.

    Attributes:
        text: One text, or documents.
        prompts: Prompts.
        neutral: Neutral prompts.
    """

    text: str | Sequence[str] | None = None
    prompts: Sequence[str] | None = None
    neutral: Sequence[str] | None = None


class EvaluationData(LightningDataModule):
    """Text for perplexity and prompts to complete; either may be null, and both beside a measurement of your own.

    The module that evaluates calls ``read`` in its ``setup``, and ``plan_batches`` once it knows the model.

    Args:
        text_source: Hub data set id, local file, or ``demo``. A .txt file is read verbatim as one text, but for a byte
            order mark and with line ends as on Unix; records of anything else are joined by an empty line. null: no
            perplexity.
        text_field: Field of the text, dots for nesting.
        text_split: Split of a hub data set.
        text_subset: Configuration of a hub data set.
        text_max_bytes: Read only this many of the text's first bytes (UTF-8, whole characters).
        further_texts: Other texts whose perplexity is measured too, in windows of the same size, by names of your
            choice: ``{c4: {source: c4.jsonl}}``, each with ``source`` and perhaps ``field``, ``split``, ``subset`` and
            ``max_bytes``.
        prompts_source: Hub data set id, local file, or ``demo``. null: no completions.
        prompts_field: Field of the prompt, dots for nesting.
        prompts_filter: Condition on a record's fields, such as ``prompt.toxicity >= 0.9``. A null never passes.
        prompts_split: Split of a hub data set.
        prompts_subset: Configuration of a hub data set.
        num_prompts: How many prompts; null: all.
        neutral_filter: Condition on the records of neutral prompts, such as ``prompt.toxicity < 0.1``. Their
            completions are judged too, and counted apart: an edit should leave them as they are. null: no neutral
            prompts.
        neutral_source: Where the neutral prompts are; null: in ``prompts_source``.
        neutral_field: Field of a neutral prompt; null: that of ``prompts_field``.
        num_neutral: How many neutral prompts; null: all.
        pairs_source: Hub data set id or local file of sentences in pairs, of which the model finds one more likely
            (measurement ``pairs``). null: none.
        pairs_first_field: Field of a pair's first sentence, the stereotyping one: ``compare`` takes a lower share of
            pairs in which it is the likelier one for better.
        pairs_second_field: Field of a pair's second sentence.
        pairs_filter: Condition on a record's fields, such as ``bias_type == "gender"``. A null never passes.
        pairs_partition: ``attribution`` or ``evaluation``: only pairs of that half, which is that of the first sentence
            (``partition_field`` of score); by ``partition_seed`` and ``partition_share``. ``all``: both.
        pairs_split: Split of a hub data set.
        pairs_subset: Configuration of a hub data set.
        num_pairs: How many pairs, drawn by ``seed``; null: all.
        seed: Decides which prompts are drawn.
        partition: ``evaluation`` or ``attribution``: only prompts of that half, told apart by content. ``all``: both.
        partition_seed: Decides the halves; use the same one everywhere.
        partition_share: Share of the prompts that are in the attribution half.
        batch_size: The most prompts of one batch; null: as many as are completed at once.
        window_batch_size: Windows of one batch.
    """

    def __init__(
        self,
        text_source: str | None = "demo",
        text_field: str = "text",
        text_split: str = "test",
        text_subset: str | None = None,
        text_max_bytes: int | None = None,
        further_texts: dict[str, dict[str, str | int | None]] | None = None,
        prompts_source: str | None = "demo",
        prompts_field: str = "prompt.text",
        prompts_filter: str | None = None,
        prompts_split: str = "train",
        prompts_subset: str | None = None,
        num_prompts: int | None = None,
        neutral_filter: str | None = None,
        neutral_source: str | None = None,
        neutral_field: str | None = None,
        num_neutral: int | None = None,
        pairs_source: str | None = None,
        pairs_first_field: str = "more",
        pairs_second_field: str = "less",
        pairs_filter: str | None = None,
        pairs_partition: PartitionChoice = "all",
        pairs_split: str = "train",
        pairs_subset: str | None = None,
        num_pairs: int | None = None,
        seed: int = 0,
        partition: PartitionChoice = "all",
        partition_seed: int = 0,
        partition_share: float = 0.5,
        batch_size: int | None = None,
        window_batch_size: int = 1,
        _listed: Listed | None = None,  # no key of the configuration: ``of_lists`` gives it
    ) -> None:
        super().__init__()
        # A rank may have nothing to do: three windows on four ranks.
        self.allow_zero_length_dataloader_with_multiple_devices = True
        counts = {"text_max_bytes": text_max_bytes, "num_prompts": num_prompts, "num_neutral": num_neutral}
        check_positive(window_batch_size=window_batch_size, batch_size=batch_size, **counts)
        listed = _listed or Listed()
        self.text_source = "demo:text" if text_source == "demo" else text_source
        self.text = None
        """The text that perplexity is measured of."""
        if self.text_source is not None:
            self.text = RunningText(
                self.text_source, text_field, text_split, text_subset, text_max_bytes, listed=listed.text
            )
        self.further_texts = _checked_texts(further_texts or {})
        """The arguments of ``RunningText`` for each further text, by its name."""
        self.num_prompts, self.seed = num_prompts, seed
        self.batch_size, self.window_batch_size = batch_size, window_batch_size
        self.num_neutral = num_neutral

        def query(
            source: str, field: str, condition: str | None, prefix: str, texts: Sequence[str] | None
        ) -> TextQuery:
            return TextQuery(
                source="demo:prompts_heldout" if source == "demo" else source,
                text_field=field,
                filter=condition,
                split=prompts_split,
                subset=prompts_subset,
                seed=seed,
                half=partition,
                partition_seed=partition_seed,
                partition_share=partition_share,
                prefix=prefix,
                token_ids=False,  # prompts are completed, and judged, as text
                listed=None if texts is None else [{field: text} for text in texts],
            )

        self.query = None
        if prompts_source is not None:
            self.query = query(prompts_source, prompts_field, prompts_filter, "data.prompts_", listed.prompts)
        self.neutral_query = None
        neutral = {"neutral_source": neutral_source, "neutral_filter": neutral_filter}
        if any(neutral.values()) and prompts_source is not None:
            self.neutral_query = query(
                neutral_source or prompts_source,
                neutral_field or prompts_field,
                neutral_filter,
                "data.neutral_",
                listed.neutral,
            )
        else:
            needed = "data.prompts_source" if any(neutral.values()) else "data.neutral_filter or data.neutral_source"
            for name, value in (neutral | {"neutral_field": neutral_field, "num_neutral": num_neutral}).items():
                if value is not None:
                    raise InputError(f"data.{name}={value!r} needs {needed}; give it, or leave data.{name} out")
        self.pairs: Record | None = None
        """The measurement of pairs, as ``model.measurements`` would name it."""
        if pairs_source is not None:
            fields = {"first_field": pairs_first_field, "second_field": pairs_second_field, "filter": pairs_filter}
            where = {"source": pairs_source, "split": pairs_split, "subset": pairs_subset}
            number = {} if num_pairs is None else {"num_pairs": num_pairs, "seed": seed}
            half: Record = {}
            if pairs_partition != "all":
                half = {"partition": pairs_partition, "partition_seed": partition_seed}
                half["partition_share"] = partition_share
            self.pairs = {"class_path": "pairs", "init_args": {**where, **fields, **number, **half}}
        else:
            unused = {"pairs_filter": pairs_filter, "pairs_subset": pairs_subset, "num_pairs": num_pairs}
            for name, value in unused.items():
                if value is not None:
                    raise InputError(
                        f"data.{name}={value!r} needs data.pairs_source; give it, or leave data.{name} out"
                    )
        self._encoder: Encoder | None = None
        self.prompts: list[str] = []
        self.neutral: list[str] = []
        """The neutral prompts."""
        self.token_ids: list[int] = []
        self._window: WindowSize | None = None
        self._units: Sequence[Units] = ()
        self._prompts_at_once = 1
        self._num_bytes = 0

    @classmethod
    def of_lists(
        cls,
        text: str | Sequence[str] | None,
        prompts: Sequence[str] | None,
        name: str,
        neutral: Sequence[str] | None = None,
        **options: Any,
    ) -> Self:
        """The data module for text and prompts that are held in memory.

        Args:
            text: One text, read verbatim, or documents, joined by an empty line. None: no perplexity.
            prompts: The prompts. None: no completions.
            name: Their name in messages and results.
            neutral: Neutral prompts. None: none.
            options: Arguments of this class, but for those that say where text and prompts are read.

        Raises:
            InputError: if there are neutral prompts and no others.
        """
        if neutral is not None and prompts is None:
            raise InputError("neutral prompts are measured beside prompts that show the behaviour; give prompts, too")
        lists = {"text_source": text, "prompts_source": prompts, "neutral_source": neutral}
        sources = {key: None if value is None else name for key, value in lists.items()}
        return cls(**sources, prompts_field="text", _listed=Listed(text, prompts, neutral), **options)

    # --- reading ------------------------------------------------------------------------------------------------------

    def read(self, encoder: Encoder) -> None:
        """Read text and prompts; every rank reads the same. A second call does nothing.

        Args:
            encoder: The model's encoder.

        Raises:
            InputError: If a source cannot be read, or gives less than asked for.
        """
        self._encoder = encoder
        if self.text_source is not None and not self.token_ids:
            assert self.text is not None
            text = self.text.read()
            self._num_bytes = len(text.encode())
            self.token_ids = read_tokens(text, encoder, self.text_source)
        if self.query is not None and not self.prompts:
            self.prompts = self._draw_prompts(self.query, self.num_prompts, ("num_prompts", "prompts_filter"))
            log.info("%d prompts from %s", len(self.prompts), self.query.seen())
        if self.neutral_query is not None and not self.neutral:
            keys = ("num_neutral", "neutral_filter")
            self.neutral = self._draw_prompts(self.neutral_query, self.num_neutral, keys)
            log.info("%d neutral prompts from %s", len(self.neutral), self.neutral_query.seen())
            if both := set(self.prompts).intersection(self.neutral):
                raise InputError(
                    f"{len(both)} prompts (one of them {min(both)[:40]!r}) are neutral ones as well; give "
                    "data.prompts_filter and data.neutral_filter that exclude each other"
                )

    @property
    def encoder(self) -> Encoder:
        """The encoder that ``read`` was given."""
        assert self._encoder is not None, "read() comes first"
        return self._encoder

    def _draw_prompts(self, query: TextQuery, number: int | None, keys: tuple[str, str]) -> list[str]:
        """The first ``number`` prompts, or all; ``keys`` are those of their number and filter, for messages."""
        prompts = list(itertools.islice(query.texts(), number))
        if len(prompts) < (number or 1):
            raise InputError(
                f"data.{keys[0]}={number}: only {len(prompts)} prompts in {query.seen()}; lower data.{keys[0]} or "
                f"widen data.{keys[1]}"
            )
        self._tell_special(prompts, query.counts)
        return prompts

    def _tell_special(self, prompts: list[str], counts: Counter[str]) -> None:
        """Count, and say in the log, which prompts bring special tokens along."""
        encoder = self.encoder
        counts.update(num_with_prefix=0, num_with_special=0)
        for prompt in prompts:
            counts.update(encoder.special_counts(prompt))
        if counts["num_with_prefix"] or counts["num_with_special"]:
            log.warning(
                "%d of %d prompts begin with special tokens that the tokenizer puts before every text (they are not "
                "put there twice), %d have special tokens within, which the model reads as such",
                counts["num_with_prefix"],
                len(prompts),
                counts["num_with_special"],
            )

    # --- serving ------------------------------------------------------------------------------------------------------

    @property
    def prompt_ids(self) -> list[str]:
        """Identities of the prompts, in the order drawn, over all ranks."""
        return [text_id(prompt) for prompt in self.prompts]

    @property
    def neutral_ids(self) -> list[str]:
        """Identities of the neutral prompts, likewise."""
        return [text_id(prompt) for prompt in self.neutral]

    def known_prompts(self, ids: Collection[str]) -> set[str]:
        """Identities of those prompts from which samples with these ids, or ids of their texts, were made.

        Neutral prompts are among them. A prompt is known by its letters, by what is seen of it (a rendered ``<s>`` or
        a space at its end makes no new prompt), and by its token ids.
        """
        if not ids:
            return set()
        encoder = self.encoder
        prompts = (*self.prompts, *self.neutral)
        return {text_id(prompt) for prompt in prompts if not encoder.identities(prompt).isdisjoint(ids)}

    def known_text(self, ids: Collection[str]) -> float:
        """The share of the text, by letters, that is in texts of these identities (``RunningText.known``)."""
        return 0.0 if self.text is None else self.text.known(ids, self.encoder)

    @property
    def prompts_per_batch(self) -> int:
        """The most prompts of one batch."""
        return self._prompts_at_once if self.batch_size is None else self.batch_size

    def plan_batches(
        self, window: WindowSize | None, units: Sequence[Units] = (), prompts_at_once: int | None = None
    ) -> None:
        """Plans what the batches hold; whoever knows the model calls this before they are asked for.

        Args:
            window: Size of the text's windows; None if there is no text.
            units: Units of the user's own measurements.
            prompts_at_once: How many prompts are completed at once; None: all.

        Raises:
            InputError: If the tokenizer says that the model cannot read a whole window.
        """
        if window is not None and self.token_ids:
            check_window(**vars(window), context=self.encoder.context)
        self._window, self._units = window, units
        self._prompts_at_once = prompts_at_once or max(1, len(self.prompts))

    def windows(self) -> list[Window]:
        """All windows of the text over all ranks."""
        if not self.token_ids:
            return []
        assert self._window is not None, "plan_batches says how long a window is"
        if self._window.windows == "published":
            return published_windows(len(self.token_ids), self._window.max_length)
        return sliding_windows(len(self.token_ids), self._window.max_length, self._window.stride)

    def shares(self) -> dict[str, int]:
        """Numbers of this rank's units, by kind: ``windows``, ``prompts``, ``neutral prompts``, ``units of NAME``."""
        rank, world_size = rank_of(self)
        totals = {"windows": len(self.windows()), "prompts": len(self.prompts)}
        totals |= {"neutral prompts": len(self.neutral)} if self.neutral else {}
        totals |= {f"units of {one.measurement}": len(one.items) for one in self._units}
        return {name: len(range(rank, total, world_size)) for name, total in totals.items()}

    def test_dataloader(self) -> DataLoader:
        """The share of this rank: batches of windows, of prompts, of other units; nothing is on two ranks."""
        rank, world_size = rank_of(self)
        windows = self.windows()[rank::world_size]
        # Prompts of similar length share a batch and need little padding; the longest come first.
        prompts, neutral = (
            chunks(sorted(texts, key=lambda prompt: (-len(prompt), prompt))[rank::world_size], self.prompts_per_batch)
            for texts in (self.prompts, self.neutral)
        )
        batches = [PromptBatch([text_id(prompt) for prompt in chunk], chunk) for chunk in prompts]
        batches += [NeutralBatch([text_id(prompt) for prompt in chunk], chunk) for chunk in neutral]
        units = [
            UnitBatch(one.measurement, chunk)
            for one in self._units
            for chunk in chunks(one.items[rank::world_size], one.batch_size)
        ]
        return DataLoader(_Batches(self, windows, [*batches, *units]), batch_size=None, collate_fn=_unchanged)

    def window_batch(self, windows: list[Window]) -> WindowBatch:
        """Tokens and labels of some windows, ``[B, T]``."""
        pad_id = self.encoder.pad_id
        input_ids, mask = pad_right([self.token_ids[w.start : w.end] for w in windows], pad_id)
        labels = torch.full_like(input_ids, IGNORE)
        for row, window in enumerate(windows):
            own = slice(window.scored - window.start, window.end - window.start)
            labels[row, own] = input_ids[row, own]
        return WindowBatch(input_ids, mask, labels, [window.index for window in windows])

    def describe(self) -> Record:
        """The record of the data, under the names of the configuration keys; either source may be null.

        ``protocol`` tells what perplexity depends on beside the window: how documents were joined, and the special
        tokens (BOS) that stand before the text.
        """
        further = {"further_texts": self.further_texts} if self.further_texts else {}
        return {"text_source": self.text_source, **self._describe_text(), **further, **self._describe_prompts()}

    def _describe_text(self) -> Record:
        text = self.text
        if text is None:
            return {"protocol": None}
        return {
            "text_field": None if text.verbatim else text.field,
            "text_split": text.split,
            "text_subset": text.subset,
            "text_revision": text.revision,
            "text_max_bytes": text.max_bytes,
            "protocol": {
                "documents": "one text, verbatim" if text.verbatim else f"joined by {SEPARATOR!r}",
                "tokens_before_text": list(self.encoder.prefix),
                "num_bytes": self._num_bytes,
                "num_text_tokens": len(self.token_ids),
            },
        }

    def _describe_prompts(self) -> Record:
        query = self.query
        if query is None:
            return {"prompts_source": None}
        neutral: Record = {}
        if (other := self.neutral_query) is not None:
            about = {"source": other.source, "field": other.text_field, "filter": other.filter, **other.origin}
            neutral = {"neutral": {**about, "num_prompts": len(self.neutral), **dict(other.counts)}}
        return {
            "prompts_source": query.source,
            "prompts_field": query.text_field,
            "prompts_filter": query.filter,
            "prompts_split": query.split,
            "prompts_subset": query.subset,
            **{f"prompts_{name}": value for name, value in query.origin.items()},
            "num_prompts": len(self.prompts),
            "seed": self.seed,
            "partition": query.half,
            "partition_seed": query.partition_seed,
            "partition_share": query.partition_share,
            **dict(query.counts),
            **neutral,
        }


Batch = WindowBatch | PromptBatch | NeutralBatch | UnitBatch


_TEXT_KEYS = ("source", "field", "split", "subset", "max_bytes")


def _checked_texts(texts: Mapping[str, Mapping[str, Any]]) -> dict[str, Record]:
    """The further texts by name.

    Raises:
        InputError: if a name cannot be one, or a text has no source, an unknown key, or a file that is missing.
    """
    by_name = {}
    for name, text in texts.items():
        where = f"data.further_texts.{name}"
        if not re.fullmatch(r"\w[\w.+ -]*", name):
            raise InputError(f"data.further_texts: {name!r} is not a name; use letters, digits, _, -, + and full stops")
        if wrong := sorted(text.keys() - set(_TEXT_KEYS)):
            raise InputError(f"{where}: {wrong[0]} is none of its keys; they are {', '.join(_TEXT_KEYS)}")
        source = text.get("source")
        if not isinstance(source, str) or not source:
            raise InputError(f"{where} has no source; give {where}.source, a local file or a hub data set")
        local_source(source, f"{where}.source")
        if (size := text.get("max_bytes")) is not None and (type(size) is not int or size < 1):
            raise InputError(f"{where}.max_bytes={size!r}: give 1 or more")
        source = "demo:text" if source == "demo" else source
        by_name[name] = {key: value for key, value in text.items() if value is not None} | {"source": source}
    return by_name


class _Batches(Dataset):
    """Batches; those of windows are built when asked for: a long text's overlapping windows would fill the memory."""

    def __init__(self, data: EvaluationData, windows: list[Window], others: list[Batch]) -> None:
        self.data, self.others = data, others
        self.windows = chunks(windows, data.window_batch_size)

    def __len__(self) -> int:
        return len(self.windows) + len(self.others)

    def __getitem__(self, index: int) -> Batch:
        if index < len(self.windows):
            return self.data.window_batch(self.windows[index])
        return self.others[index - len(self.windows)]


def _unchanged(batch: Batch) -> Batch:
    return batch
