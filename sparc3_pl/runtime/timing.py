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
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sparc3_pl.runtime.memory import peak_memory

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = [
    "COLUMNS",
    "Clock",
    "Stage",
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
    """What one stage has done.

    Attributes:
        seconds: On the wall, without stages inside it.
        samples: Texts, windows, completions.
        tokens: Real ones that went through the model, each counted once.
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

    def did(self, *, samples: int = 0, tokens: int = 0, padded: int = 0, flops: float = 0.0, passes: int = 0) -> None:
        """Adds work."""
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
        """What took the most that is no arithmetic the tokens need, as far as it is known."""
        causes = {
            "padding": self.padded / max(1, self.tokens + self.padded),
            "sampling": self.sampling / max(1e-9, self.seconds),
        }
        cause = max(causes, key=causes.__getitem__)
        if causes[cause] >= 0.1:
            return f"{cause} ({causes[cause]:.0%})"
        if self.passes and self.rows / self.passes < 64:
            return f"{self.rows / self.passes:.0f} tokens a pass: reading the weights"
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
        """The stage that goes on; one that is thrown away if there is none."""
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
    """The stage that goes on; one that is thrown away if there is none."""
    return _clocks[-1].innermost if _clocks else Stage()


def timing() -> dict[str, Any] | None:
    """What a result says of the time so far, by stage; None without a clock.

    ``matrix_flops``: operations a second of the best matrix product measured on the device of the first stage that
    computed; ``share``: of that rate.
    """
    if not _clocks:
        return None
    clock = _clocks[-1]
    clock._tick()
    likes = [one.like for one in clock.stages.values() if one.like is not None]
    like = next((one for one in likes if one.device.type != "meta"), None)
    rate = None if like is None else _matrix_rate(like.device, like.dtype)
    rows = [_row(name, one, rate) for name, one in clock.stages.items()]
    rows.append({"stage": "other", "seconds": round(max(0.0, clock.rest), 3)})
    return {"matrix_flops": rate, "stages": rows}


def _row(name: str, one: Stage, rate: float | None) -> dict[str, Any]:
    row: dict[str, Any] = {"stage": name, "seconds": round(one.seconds, 3)}
    row |= {key: value for key in ("samples", "tokens", "peak_bytes") if (value := getattr(one, key))}
    if one.tokens and one.seconds:
        row["tokens_per_second"] = round(one.tokens / one.seconds, 1)
    if one.flops and one.seconds and rate:
        row["share"] = round(one.flops / one.seconds / rate, 4)
        if row["share"] < HELD_BELOW:
            row["held_by"] = one.held_by()
    return row


COLUMNS = ("stage", "seconds", "samples", "tokens", "tokens/s", "share", "peak GB", "held by")


def table_rows(stages: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """The rows of ``timing()`` as text, under ``COLUMNS``."""
    forms = {
        "seconds": "{:.1f}", "samples": "{:d}", "tokens": "{:d}", "tokens_per_second": "{:.0f}", "share": "{:.0%}",
    }  # fmt: skip
    return [
        (
            str(row["stage"]),
            *(form.format(row[key]) if key in row else "" for key, form in forms.items()),
            f"{row['peak_bytes'] / 1e9:.2f}" if "peak_bytes" in row else "",
            row.get("held_by", ""),
        )
        for row in stages
    ]


def rows_of_results(results: Mapping[str, Mapping[str, Any] | None]) -> list[dict[str, Any]]:
    """The stages of several results' ``timing``, each named after its result; a result without any is left out."""
    return [
        dict(row) | {"stage": f"{name}: {row['stage']}"}
        for name, measured in results.items()
        for row in (measured or {}).get("stages", ())
    ]


def table_text(measured: dict[str, Any], title: str) -> str:
    """``timing()`` as a table of plain text."""
    rows = [COLUMNS, *table_rows(measured["stages"])]
    widths = [max(len(row[place]) for row in rows) for place in range(len(COLUMNS))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if place in (0, len(COLUMNS) - 1) else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    rate = measured["matrix_flops"]
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
