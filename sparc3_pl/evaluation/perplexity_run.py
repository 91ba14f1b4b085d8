"""Perplexity during an evaluation: windows of the text are scored one batch after the other."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Self

import torch

from sparc3_pl.data.evaluation_data import WindowBatch, WindowSize
from sparc3_pl.evaluation.figures import PerplexityFigures
from sparc3_pl.evaluation.measurement_run import MeasurementRun, Outcome, Subject
from sparc3_pl.evaluation.perplexity import Perplexity
from sparc3_pl.evaluation.rows import WindowRow
from sparc3_pl.io.formats import Record
from sparc3_pl.model.likelihood import WindowScorer
from sparc3_pl.model.placement import input_device
from sparc3_pl.model.size import decoder_flops, head_flops
from sparc3_pl.runtime.collectives import gather_lists, is_rank_zero
from sparc3_pl.runtime.progress import Done
from sparc3_pl.runtime.timing import timed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["PerplexityRun"]

log = logging.getLogger(__name__)


class PerplexityRun(MeasurementRun):
    """Scores the windows of a text.

    Args:
        model: The model in eval mode, edited if it is to be.
        window: Size of the windows.
        device: Device of the sums that the ranks add up; None: the model's.
    """

    takes = WindowBatch

    def __init__(self, model: PreTrainedModel, window: WindowSize, device: torch.device | None = None) -> None:
        self.window = window
        self.rows: list[WindowRow] = []
        """One for each window of this rank."""
        self._products = [0.0, 0.0, 0.0]
        self._device, self._scorer = input_device(model), WindowScorer(model)
        self._flops, self._weight = (decoder_flops(model), head_flops(model)), model.get_input_embeddings().weight
        self.perplexity = Perplexity().to(device or self._device)
        nothing = torch.zeros(0, dtype=torch.int64, device=self.perplexity.device)
        self.perplexity.update(nll=nothing, num_tokens=nothing)  # a rank without windows takes part like the others

    @classmethod
    def of(cls, subject: Subject) -> Self | None:
        return None if subject.window is None else cls(subject.model, subject.window, subject.device)

    def add(self, batch: WindowBatch) -> None:
        """Scores one batch of windows."""
        with timed("perplexity") as now:
            tensors = (t.to(self._device) for t in (batch.input_ids, batch.attention_mask, batch.labels))
            nll, num_tokens = self._scorer(*tensors)
            self.perplexity.update(nll=nll, num_tokens=num_tokens)
            rows = list(map(WindowRow, batch.index, nll.tolist(), num_tokens.tolist()))
            tokens, num_scored = int(batch.attention_mask.sum()), sum(row.num_tokens for row in rows)
            flops = self._flops[0] * tokens + self._flops[1] * num_scored
            now.did(
                samples=len(rows),
                tokens=tokens,
                padded=batch.attention_mask.numel() - tokens,
                flops=flops,
                passes=1,
                like=self._weight,
            )
        self.rows += rows
        for row in rows:
            products = (row.nll * row.nll, row.nll * row.num_tokens, row.num_tokens * row.num_tokens)
            self._products = [old + new for old, new in zip(self._products, products, strict=True)]

    def done(self) -> Done:
        """The perplexity so far, and its standard error as that of a ratio of sums over independent windows."""
        n, tokens, mean = len(self.rows), int(self.perplexity.num_tokens), self.status().get("perplexity", math.nan)
        if n < 2 or not 0 < mean < math.inf:
            return Done("windows", n, tokens, "perplexity", mean)
        rate, (loss2, loss_count, count2) = math.log(mean), self._products
        squares = max(0.0, loss2 - 2 * rate * loss_count + rate * rate * count2)  # of loss - rate * count
        error = mean * math.sqrt(squares * n / (n - 1)) / tokens
        return Done("windows", n, tokens, "perplexity", mean, error)

    def status(self) -> dict[str, float]:
        """The perplexity of this rank's windows so far."""
        if not (count := int(self.perplexity.num_tokens)):
            return {}
        mean = float(self.perplexity.nll) / count
        return {"perplexity": math.exp(mean) if mean < 709 else math.inf}

    def finish(self, data: Record) -> Outcome:
        """The perplexity and its windows, in the order of the text."""
        windows = sorted(gather_lists(self.rows), key=lambda row: row.index)
        if not windows:
            return Outcome({})
        nll, num_tokens = self.perplexity.totals()
        if is_rank_zero():
            size = self.window
            log.info(
                "perplexity of %d tokens in %d %s windows of %d",
                num_tokens,
                len(windows),
                size.windows,
                size.max_length,
            )
        figures = PerplexityFigures(
            value=float(self.perplexity.compute()),
            nll=nll,
            num_tokens=num_tokens,
            max_length=self.window.max_length,
            stride=self.window.stride,
            windows=self.window.windows,
            num_windows=len(windows),
            source=data["text_source"],
            protocol=data["protocol"],
        )
        return Outcome({"perplexity": figures}, windows=windows)
