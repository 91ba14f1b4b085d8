"""What a scoring run shows while it runs: a progress bar on stderr, and the Trainer's logger."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from sparc3_pl.io.yaml_format import load_yaml
from sparc3_pl.runtime.run_config import resolved_config

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from sparc3_pl.scoring.module import ScoringModule
from sparc3_pl.runtime.progress import RunningMean

__all__ = ["ScoringMonitor", "hyperparameters", "tensorboard"]


MAX_HISTOGRAM_VALUES = 1_000_000
"""A histogram of a larger layer is that of evenly spaced scores."""


def tensorboard(trainer: pl.Trainer) -> SummaryWriter | None:
    """This process's TensorBoard writer; None on other ranks, with another logger, or with none."""
    loggers = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
    return loggers[0].experiment if loggers and trainer.is_global_zero else None


def hyperparameters(trainer: pl.Trainer, config: str | None, figures: Mapping[str, float]) -> None:
    """Writes a run's settings and its final figures to TensorBoard's table of runs.

    Args:
        trainer: Whose loggers are written to.
        config: The resolved configuration as YAML; of its keys, those of ``model`` and ``data``.
        figures: By ``stage/name``.
    """
    if config is None or tensorboard(trainer) is None:
        return
    settings = load_yaml(config)
    chosen = {part: settings.get(part) or {} for part in ("model", "data")}
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.log_hyperparams(chosen, dict(figures))


class ScoringMonitor(Callback):
    """Writes speed, running total relevance and its standard error to the bar and to TensorBoard, by sample.

    At the end: a histogram of the scores of every layer, and a figure of relevance by layer. Speeds are those of one
    process.
    """

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock."""
        self._start, self._seen, self._tokens = time.perf_counter(), 0, 0
        self._relevance = RunningMean()

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
        if (bar := trainer.progress_bar_callback) is not None and isinstance(bar, TQDMProgressBar):
            bar.predict_progress_bar.set_postfix({name: f"{value:.4g}" for name, value in status.items()})
        writer = tensorboard(trainer)
        if writer is not None and batch_idx % trainer.log_every_n_steps == 0:
            for name, value in status.items():
                writer.add_scalar(f"score/{name}", value, self._seen)

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

        writer = tensorboard(trainer)
        if writer is None or pl_module.manifest is None:
            return
        folder = ScoreFolder.open(pl_module.output)
        for name in folder.layers:
            writer.add_histogram(
                f"score/{name}", _at_most(folder.load(name).flatten(), MAX_HISTOGRAM_VALUES), self._seen
            )
        sums = {name: layer.sum for name, layer in folder.manifest.layers.items()}
        writer.add_figure("score/relevance_by_layer", relevance_by_layer(sums), self._seen)
        figures = {"score/final_total_relevance": folder.manifest.total_relevance}
        hyperparameters(trainer, resolved_config(trainer), figures)


def _at_most(values: Tensor, count: int) -> Tensor:
    """Evenly spaced ``values``, at most ``count``."""
    return values[:: -(-len(values) // count)]
