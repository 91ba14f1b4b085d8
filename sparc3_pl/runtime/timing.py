"""Where the time of a command went: seconds, tokens and arithmetic by stage, beside what the machine can multiply.

A command opens a clock (``measuring``); whatever works inside names its stage (``timed``), from which code below says
what it has done (``current``). Without a clock nothing is kept. Times are those of one process.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from sparc3_pl.io.formats import Count, omitted
from sparc3_pl.runtime.memory import peak_memory

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = [
    "COLUMNS",
    "Clock",
    "Stage",
    "StageTime",
    "Timing",
    "current",
    "measuring",
    "rows_of_results",
    "table_rows",
    "table_text",
    "timed",
    "timing",
]

log = logging.getLogger(__name__)

HELD_BELOW = 1 / 3
"""Share of the machine's matrix products below which a stage says what held it."""


@dataclass
class Stage:
    """The work of one stage.

    Attributes:
        seconds: On the wall, without stages inside it.
        samples: Texts, windows, completions.
        tokens: Real tokens that went through the model, each counted once.
        padded: Places that were computed beside them: padding, and rows that had ended.
        flops: Operations of matrix products with parameters that the tokens need.
        sampling: Seconds of choosing tokens, among ``seconds``.
        rows: Tokens that went through the model at once, summed over its passes.
        passes: Number of those passes.
        peak_bytes: The most memory that the process has held until the stage's end.
        like: A weight of the model: the device and the number format of the arithmetic.
    """

    seconds: float = 0.0
    samples: int = 0
    tokens: int = 0
    padded: int = 0
    flops: float = 0.0
    sampling: float = 0.0
    rows: int = 0
    passes: int = 0
    peak_bytes: int = 0
    like: Tensor | None = field(default=None, repr=False)

    def did(
        self,
        *,
        samples: int = 0,
        tokens: int = 0,
        padded: int = 0,
        flops: float = 0.0,
        passes: int = 0,
        like: Tensor | None = None,
    ) -> None:
        """Adds work; ``like`` says on which device and in which number format, unless that was said before."""
        self.like = self.like if like is None else like
        self.samples, self.tokens, self.padded = self.samples + samples, self.tokens + tokens, self.padded + padded
        self.flops, self.passes = self.flops + flops, self.passes + passes
        self.rows += tokens + padded

    @contextmanager
    def choosing(self) -> Iterator[None]:
        """Counts the block as sampling."""
        start = time.perf_counter()
        yield
        self.sampling += time.perf_counter() - start

    def held_by(self) -> str:
        """What took the most time apart from the arithmetic that the tokens need, as far as it is known."""
        causes = {
            "padding": self.padded / max(1, self.tokens + self.padded),
            "sampling": self.sampling / max(1e-9, self.seconds),
        }
        cause = max(causes, key=causes.__getitem__)
        if causes[cause] >= 0.1:
            return f"{cause} ({causes[cause]:.0%})"
        if self.passes and self.rows / self.passes < 64:
            return f"{self.rows / self.passes:.0f} tokens per pass: reading the weights"
        return "work that is no product with weights (attention, normalisation, Python)"


class Clock:
    """Sums up stages; a stage inside another stops the other's time."""

    def __init__(self) -> None:
        self.stages: dict[str, Stage] = {}
        self._open: list[Stage] = []
        self._start = self._mark = time.perf_counter()

    @contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        """Counts the block's time for the stage ``name``."""
        entry = self.stages.setdefault(name, Stage())
        self._tick()
        self._open.append(entry)
        try:
            yield entry
        finally:
            self._tick()
            self._open.pop()
            entry.peak_bytes = peak_memory(None if entry.like is None else entry.like.device)

    def _tick(self) -> None:
        now = time.perf_counter()
        if self._open:
            self._open[-1].seconds += now - self._mark
        self._mark = now

    @property
    def innermost(self) -> Stage:
        """The stage in progress; one that is thrown away if there is none."""
        return self._open[-1] if self._open else Stage()

    @property
    def rest(self) -> float:
        """Seconds since the clock was opened that no stage has counted."""
        return time.perf_counter() - self._start - sum(one.seconds for one in self.stages.values())


_clocks: list[Clock] = []


@contextmanager
def measuring() -> Iterator[Clock]:
    """Opens a clock for the block."""
    clock = Clock()
    _clocks.append(clock)
    try:
        yield clock
    finally:
        _clocks.remove(clock)


@contextmanager
def timed(name: str) -> Iterator[Stage]:
    """Counts the block for the stage ``name`` of the clock that was opened last, if there is one."""
    if not _clocks:
        yield Stage()
        return
    with _clocks[-1].stage(name) as entry:
        yield entry


def current() -> Stage:
    """The stage in progress; one that is thrown away if there is none."""
    return _clocks[-1].innermost if _clocks else Stage()


@dataclass(frozen=True)
class StageTime:
    """A file's record of one stage; what is not known, or was not counted, is left out.

    Attributes:
        stage: Name of the stage.
        seconds: On the wall, without stages inside it.
        samples: Texts, windows, completions.
        tokens: Real tokens that went through the model.
        peak_bytes: The most memory that the process has held until the stage's end.
        tokens_per_second: ``tokens`` divided by ``seconds``.
        share: Share of ``Timing.matrix_flops`` that was reached.
        held_by: Where the share is low, what took the time.
    """

    stage: str
    seconds: float
    samples: Count = omitted(0)
    tokens: Count = omitted(0)
    peak_bytes: Count = omitted(0)
    tokens_per_second: float | None = omitted()
    share: float | None = omitted()
    held_by: str | None = omitted()


@dataclass(frozen=True)
class Timing:
    """The time that a command took, by stage.

    Attributes:
        matrix_flops: Operations a second of the best matrix product measured on the device of the first stage that
            computed; None if none did.
        stages: The stages in the order in which they were begun; the last is what no stage has counted.
    """

    matrix_flops: float | None = None
    stages: list[StageTime] = field(default_factory=list)


def timing() -> Timing | None:
    """The time so far, for a result; None without a clock."""
    if not _clocks:
        return None
    clock = _clocks[-1]
    clock._tick()
    likes = [one.like for one in clock.stages.values() if one.like is not None]
    like = next((one for one in likes if one.device.type != "meta"), None)
    rate = None if like is None else _matrix_rate(like.device, like.dtype)
    stages = [_stage_time(name, one, rate) for name, one in clock.stages.items()]
    return Timing(rate, [*stages, StageTime("other", round(max(0.0, clock.rest), 3))])


def _stage_time(name: str, one: Stage, rate: float | None) -> StageTime:
    counts = (one.samples, one.tokens, one.peak_bytes)
    speed = round(one.tokens / one.seconds, 1) if one.tokens and one.seconds else None
    share = round(one.flops / one.seconds / rate, 4) if one.flops and one.seconds and rate else None
    held_by = one.held_by() if share is not None and share < HELD_BELOW else None
    return StageTime(name, round(one.seconds, 3), *counts, speed, share, held_by)


COLUMNS = ("stage", "seconds", "samples", "tokens", "tokens/s", "share", "peak GB", "held by")


def table_rows(stages: Sequence[StageTime]) -> list[tuple[str, ...]]:
    """The stages as text, under ``COLUMNS``."""

    def text(value: float | None, form: str) -> str:
        return form.format(value) if value else ""

    return [
        (
            one.stage,
            f"{one.seconds:.1f}",
            text(one.samples, "{:d}"),
            text(one.tokens, "{:d}"),
            text(one.tokens_per_second, "{:.0f}"),
            "" if one.share is None else f"{one.share:.0%}",
            text(one.peak_bytes / 1e9, "{:.2f}"),
            one.held_by or "",
        )
        for one in stages
    ]


def rows_of_results(results: Mapping[str, Timing | None]) -> list[StageTime]:
    """The stages of several results, each named after its result; a result without any is left out."""
    return [
        replace(stage, stage=f"{name}: {stage.stage}")
        for name, times in results.items()
        if times is not None
        for stage in times.stages
    ]


def table_text(times: Timing, title: str) -> str:
    """``timing()`` as a table of plain text."""
    rows = [COLUMNS, *table_rows(times.stages)]
    widths = [max(len(row[place]) for row in rows) for place in range(len(COLUMNS))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if place in (0, len(COLUMNS) - 1) else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    rate = times.matrix_flops
    note = "" if rate is None else f"; share: of {rate / 1e9:.0f} GFLOP/s, the matrix product measured here"
    return "\n".join([f"{title}{note}", *lines])


@functools.cache
def _matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of the best of a few square matrix products; takes less than half a second."""
    import torch

    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + 0.3
    for _ in range(12):
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
        if time.perf_counter() > end:
            break
    return 2 * size**3 / best
