"""What a scoring run shows while it runs: a progress bar on stderr, and what its loggers get."""

from __future__ import annotations

import logging
import math
import time
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from sparc3_pl.runtime.progress import Done, RunningMean, Watch, duration, show_progress
from sparc3_pl.runtime.run_config import shown_settings
from sparc3_pl.runtime.run_log import RunLog

if TYPE_CHECKING:
    from sparc3_pl.scoring.module import ScoringModule

__all__ = ["ScoringMonitor"]

log = logging.getLogger(__name__)

MAX_HISTOGRAM_VALUES = 1_000_000
"""A histogram of a larger layer is that of evenly spaced scores."""


class ScoringMonitor(Callback):
    """Writes speed, running total relevance and its standard error to the bar and to the loggers, by sample.

    At the end: a histogram of the scores of every layer, and a figure of relevance by layer. Speeds are those of one
    process.
    """

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock."""
        self._log = RunLog(trainer)  # on every rank
        self._start, self._timed, self._seen, self._tokens = time.perf_counter(), 0.0, 0, 0
        self._relevance = RunningMean()
        batches = trainer.predict_dataloaders.dataset[: trainer.num_predict_batches[0]]
        self._total, self._batches = sum(map(len, batches)), 0
        self._watch = Watch({"samples": self._total})

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: ScoringModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Takes in the samples of the batch."""
        for sample in pl_module.samples[self._seen :]:
            self._tokens += sample.num_tokens
            if sample.relevance is not None:
                self._relevance.add(sample.relevance)
        self._seen = len(pl_module.samples)
        status = self._status()
        seconds, self._batches = time.perf_counter() - self._start - self._timed, self._batches + 1
        self._watch.took("samples", seconds)
        # The first batch is no measure of how long a sample takes: much is done only once, in that batch.
        if self._batches == 2 and trainer.is_global_zero and len(batch.ids):
            each, left = seconds / len(batch.ids), self._total - self._seen
            rest = f", {duration(each * left)} for the {left} that are left" if left > 0 else ""
            log.info("score: %.3g s per sample after the first batch%s", each, rest)
        self._timed = time.perf_counter() - self._start
        mean = self._relevance.mean if self._relevance.count else math.nan
        figures = {"figure": "total relevance", "mean": mean, "error": self._relevance.standard_error}
        show_progress(trainer, "score", self._watch, Done("samples", self._seen, self._tokens, **figures))
        if batch_idx % trainer.log_every_n_steps == 0:
            self._log.scalars({f"score/{name}": value for name, value in status.items()}, self._seen)

    def _status(self) -> dict[str, float]:
        seconds = time.perf_counter() - self._start
        status = {"samples_per_second": self._seen / seconds, "tokens_per_second": self._tokens / seconds}
        if self._relevance.count:
            status["total_relevance"] = self._relevance.mean
        if self._relevance.count > 1:
            status["standard_error"] = self._relevance.standard_error
        return status

    def on_predict_end(self, trainer: pl.Trainer, pl_module: ScoringModule) -> None:
        """Draws the scores that were written."""
        from sparc3_pl.document.figures import relevance_by_layer
        from sparc3_pl.scores.folder import ScoreFolder

        if not self._log or pl_module.manifest is None:
            return
        folder = ScoreFolder.open(pl_module.output)
        for name in folder.layers:
            values = folder.load(name).flatten()
            evenly_spaced = values[:: -(-len(values) // MAX_HISTOGRAM_VALUES)]
            self._log.histogram(f"score/{name}", evenly_spaced, self._seen)
        sums = {name: layer.sum for name, layer in folder.manifest.layers.items()}
        self._log.figure("score/relevance_by_layer", relevance_by_layer(sums), self._seen)
        if (settings := shown_settings(trainer)) is not None:
            self._log.settings(settings, {"score/final_total_relevance": folder.manifest.total_relevance})
