"""Progress of long passes: beside the bar on a terminal, else one line per minute."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass

import lightning.pytorch as pl
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

__all__ = ["Done", "ProgressBar", "RunningMean", "Watch", "duration", "show_progress"]

log = logging.getLogger(__name__)

INTERVAL = 60.0
"""Seconds between two lines where there is no terminal."""


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


@dataclass(frozen=True)
class Done:
    """The units of one kind that one process has done in a pass.

    Attributes:
        unit: What is counted, in the plural: ``prompts``.
        count: Number of units that are done.
        tokens: Tokens that were read or made for them.
        figure: Name of the figure that is measured of them; empty where nothing is known before the end.
        mean: Mean of the figure so far.
        error: The standard error of ``mean``; NaN where it is not known.
    """

    unit: str
    count: int
    tokens: int = 0
    figure: str = ""
    mean: float = math.nan
    error: float = math.nan


class Watch:
    """Turns what is done, and how long it took, into what is shown.

    Args:
        totals: Number of units of this process, by their word.
        clock: Tells the time in seconds.
    """

    def __init__(self, totals: Mapping[str, int], clock: Callable[[], float] = time.monotonic) -> None:
        self._totals, self._clock = totals, clock
        self._seconds: Counter[str] = Counter()
        self._told = clock()

    def took(self, unit: str, seconds: float) -> None:
        """Counts ``seconds`` of work on units of this kind."""
        self._seconds[unit] += seconds

    def text(self, done: Done) -> str:
        """The text that is shown: ``12 of 240 prompts, 68 tokens/s, 12 min left, toxicity 0.31 ± 0.02``."""
        total, seconds = self._totals.get(done.unit, 0), self._seconds[done.unit]
        parts = [f"{done.count} of {total} {done.unit}" if total else f"{done.count} {done.unit}"]
        if seconds and done.tokens:
            parts.append(f"{done.tokens / seconds:.3g} tokens/s")
        if seconds and 0 < done.count < total:
            parts.append(f"{duration(seconds / done.count * (total - done.count))} left")
        if done.figure and not math.isnan(done.mean):
            error = "" if math.isnan(done.error) else f" ± {done.error:.2g}"
            parts.append(f"{done.figure} {done.mean:.4g}{error}")
        return ", ".join(parts)

    def is_due(self) -> bool:
        """Whether a line may be written: once in ``INTERVAL``."""
        now = self._clock()
        if now - self._told < INTERVAL:
            return False
        self._told = now
        return True


def duration(seconds: float) -> str:
    """A duration in words: ``45 s``, ``12 min``, ``3 h 20 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


class ProgressBar(TQDMProgressBar):
    """Lightning's bar on stderr, so that stdout holds results only; none where stderr is no terminal."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=1 if sys.stderr.isatty() else 0)

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


def show_progress(trainer: pl.Trainer, what: str, watch: Watch, done: Done) -> None:
    """Shows on rank 0 what it has done: beside the bar of the current pass, or in the log, at most once a minute.

    Args:
        trainer: The pass's Trainer.
        what: Name of the pass in the log.
        watch: The pass's watch.
        done: What rank 0 has done.
    """
    if not trainer.is_global_zero:
        return
    text = watch.text(done)
    if trainer.world_size > 1:
        text += f" (process 1 of {trainer.world_size})"
    bar = trainer.progress_bar_callback
    if isinstance(bar, TQDMProgressBar) and bar.is_enabled:
        (bar.predict_progress_bar if trainer.predicting else bar.test_progress_bar).set_postfix_str(text)
    elif watch.is_due():
        log.info("%s: %s", what, text)
