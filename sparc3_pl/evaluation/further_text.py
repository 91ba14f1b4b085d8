"""Perplexity of a further text, beside that of ``data.text_source``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from sparc3_pl.data.encoding import Encoder
from sparc3_pl.data.evaluation_data import Windows, WindowSize, published_windows, read_tokens, sliding_windows
from sparc3_pl.data.running_text import RunningText
from sparc3_pl.data.samples import pad_right
from sparc3_pl.errors import InputError
from sparc3_pl.evaluation.measurement import TEXT, TEXT_FIGURE, Measurement, Row
from sparc3_pl.io.formats import Record
from sparc3_pl.model.likelihood import IGNORE, WindowScorer
from sparc3_pl.model.placement import input_device
from sparc3_pl.statistics.paired import PairedChange, paired_change, ratio_change

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["FurtherText", "TextWindow", "further_texts"]


@dataclass(frozen=True)
class TextWindow:
    """Tokens of a window, its place in the text, and how many of its first tokens an earlier window has scored."""

    index: int
    ids: list[int]
    num_unscored: int


@dataclass(frozen=True)
class FurtherText(Measurement):
    """exp of the mean negative log-likelihood of a text's tokens, as ``perplexity`` of ``results.json``.

    Values of a window: ``nll`` (nats) and ``num_tokens``. ``compare`` resamples blocks of windows.

    Args:
        label: Name of the text; results name the measurement ``text LABEL``.
        source: Local file or hub data set.
        max_length: Tokens of a window.
        stride: Tokens from one window to the next.
        windows: ``sliding`` or ``published``.
        field: Field of the text.
        split: Split of a hub data set.
        subset: Configuration of a hub data set.
        max_bytes: Read only the first so many bytes.
        batch_size: Windows of one batch.
        listed: The text, or its documents, if somebody holds them in memory; ``source`` is then only a name.
    """

    label: str
    source: str
    max_length: int
    stride: int
    windows: Windows = "sliding"
    field: str = "text"
    split: str = "test"
    subset: str | None = None
    max_bytes: int | None = None
    batch_size: int = 1
    listed: str | Sequence[str] | None = None

    unit = "windows"
    better = "lower"
    paired = ("nll", "num_tokens")

    @property
    def name(self) -> str:  # type: ignore[override]
        """Its name in results: ``text LABEL``."""
        return TEXT + self.label

    @property
    def text(self) -> RunningText:
        """The text, not yet read."""
        key = f"data.further_texts.{self.label}.source"
        return RunningText(self.source, self.field, self.split, self.subset, self.max_bytes, key, self.listed)

    def describe(self) -> Record:
        """Its settings, without the text itself."""
        return {name: value for name, value in super().describe().items() if name != "listed"}

    def units(self, encoder: Encoder) -> list[TextWindow]:
        """The windows, in the order of the text.

        Raises:
            InputError: if the text cannot be read, or gives no window.
        """
        text = self.text
        ids = read_tokens(text.read(), encoder, self.source, text.key)
        if self.windows == "published":
            windows = published_windows(len(ids), self.max_length)
        else:
            windows = sliding_windows(len(ids), self.max_length, self.stride)
        return [TextWindow(one.index, ids[one.start : one.end], one.scored - one.start) for one in windows]

    def measure(self, model: PreTrainedModel, encoder: Encoder, units: Sequence[TextWindow]) -> list[Row]:
        """Scores the windows in one padded batch."""
        input_ids, mask = pad_right([one.ids for one in units], encoder.pad_id)
        labels = input_ids.masked_fill(mask == 0, IGNORE)
        for row, one in enumerate(units):
            labels[row, : one.num_unscored] = IGNORE
        device = input_device(model)
        nll, num_tokens = WindowScorer(model)(input_ids.to(device), mask.to(device), labels.to(device))
        return [
            {"unit": one.index, "nll": total, "num_tokens": count}
            for one, total, count in zip(units, nll.tolist(), num_tokens.tolist(), strict=True)
        ]

    def figures(self, rows: Sequence[Row]) -> dict[str, float]:
        """The perplexity of the windows."""
        mean = math.fsum(row["nll"] for row in rows) / sum(row["num_tokens"] for row in rows)
        return {TEXT_FIGURE: math.exp(mean) if mean < 709 else math.inf}

    def compare(
        self, before: Sequence[Row], after: Sequence[Row], *, seed: int, num_resamples: int
    ) -> Mapping[str, PairedChange]:
        """The change of perplexity, with the interval of the ratio.

        How many units are better or worse, and how many a change of this size needs, is told by the windows' mean
        losses.

        Raises:
            InputError: if the windows are of different texts.
        """
        sides = [np.array([[row["nll"], row["num_tokens"]] for row in rows], np.float64).T for rows in (before, after)]
        if not np.array_equal(sides[0][1], sides[1][1]):
            raise InputError(f"{self.name}: the windows before and after differ; evaluate both on the same text")
        options = {"seed": seed, "num_resamples": num_resamples}
        overlap = math.ceil(self.max_length / self.stride)
        ratio = ratio_change(sides[0][0], sides[1][0], sides[0][1], overlap=overlap, **options)
        windows = paired_change(sides[0][0] / sides[0][1], sides[1][0] / sides[1][1], **options)
        low, high = (None if end is None else (end - 1) * ratio.before for end in (ratio.low, ratio.high))
        own = {one.name: getattr(windows, one.name) for one in fields(windows)}
        own |= {"before": ratio.before, "after": ratio.after, "change": ratio.after - ratio.before}
        own |= {"relative_change": ratio.ratio - 1, "low": low, "high": high, "p_value": ratio.p_value}
        return {TEXT_FIGURE: PairedChange(**own)}


def further_texts(texts: Mapping[str, Mapping[str, Any]], window: WindowSize, batch_size: int) -> list[Record]:
    """The measurements of ``data.further_texts``, as ``model.measurements`` would name them."""
    size = {"max_length": window.max_length, "stride": window.stride, "windows": window.windows}
    return [
        {"class_path": "text", "init_args": {"label": label, **size, **text, "batch_size": batch_size}}
        for label, text in texts.items()
    ]
