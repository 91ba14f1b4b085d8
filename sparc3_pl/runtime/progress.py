"""Progress of long passes on the terminal."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout

import lightning.pytorch as pl
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

__all__ = ["ProgressBar", "RunningMean", "show_beside_bar"]


class RunningMean:
    """Mean and standard error of numbers that come one by one (Welford's update)."""

    def __init__(self) -> None:
        self.count, self.mean, self._squares = 0, 0.0, 0.0

    def add(self, value: float) -> None:
        """Takes in one number."""
        self.count += 1
        step = value - self.mean
        self.mean += step / self.count
        self._squares += step * (value - self.mean)

    @property
    def standard_error(self) -> float:
        """Standard error of the mean; NaN for fewer than two numbers."""
        return math.sqrt(self._squares / (self.count - 1) / self.count) if self.count > 1 else math.nan


class ProgressBar(TQDMProgressBar):
    """Lightning's bar on stderr, so that stdout holds results only."""

    def init_predict_tqdm(self) -> Tqdm:
        """The bar of a scoring pass."""
        with redirect_stdout(sys.stderr):
            return super().init_predict_tqdm()

    def init_test_tqdm(self) -> Tqdm:
        """The bar of an evaluation pass."""
        with redirect_stdout(sys.stderr):
            return super().init_test_tqdm()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Ends the bar's line, so that the error stands on one of its own."""
        for bar in (self._predict_progress_bar, self._test_progress_bar):
            if bar is not None:
                bar.close()


def show_beside_bar(trainer: pl.Trainer, figures: Mapping[str, float]) -> None:
    """Running figures beside the bar of the pass that goes on, where there is one."""
    bar = trainer.progress_bar_callback
    if isinstance(bar, TQDMProgressBar) and trainer.is_global_zero:
        running = bar.predict_progress_bar if trainer.predicting else bar.test_progress_bar
        running.set_postfix({name: f"{value:.4g}" for name, value in figures.items()})
