"""What is said, apart from how it looks: sections of text, tables, checks and figures, for all three renderers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sparc3_pl.document.verdicts import Check

__all__ = [
    "Block",
    "Checks",
    "Code",
    "Facts",
    "Folded",
    "Picture",
    "Section",
    "SideBySide",
    "Table",
    "Text",
    "TextPair",
    "count",
    "is_figure",
    "number",
    "percent",
]

NOTHING = "–"
_NUMBER = r"[-+±<>≤≥~]?\s*(\d[\d,]*(\.\d+)?(e[-+]?\d+)?|inf|nan|–)\s*(%|×|s)?"
_FIGURE = re.compile(rf"({_NUMBER}([\s/(,)]|\.\.|\+-|of|to)*)*")
"""A figure, or several with what stands between them: ``1.2 .. 3.4``, ``0.25 (+3 %)``."""


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Table:
    """Cells are finished text; the first column names the rows."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    title: str = ""
    note: str = ""

    @classmethod
    def of(cls, columns: Sequence[str], rows: Iterable[Sequence[str]], title: str = "", note: str = "") -> Table:
        """From any sequences."""
        return cls(tuple(columns), tuple(map(tuple, rows)), title, note)

    @property
    def numeric(self) -> tuple[bool, ...]:
        """Which columns hold figures only, and are set flush right; never the first."""
        return tuple(
            place > 0 and all(is_figure(row[place]) for row in self.rows) for place in range(len(self.columns))
        )


@dataclass(frozen=True)
class Facts:
    """Key figures, each with what it means in a few words: (figure, meaning)."""

    items: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Checks:
    """Verdicts with their reasons; ``of`` says what was checked."""

    checks: tuple[Check, ...]
    of: str = ""


@dataclass(frozen=True)
class Picture:
    """A figure as SVG, and what it shows in words for whoever cannot see it."""

    svg: str
    alt: str
    caption: str = ""


@dataclass(frozen=True)
class Code:
    """Commands or configuration, word for word."""

    text: str
    title: str = ""


@dataclass(frozen=True)
class TextPair:
    """One prompt, completed before and after an edit."""

    prompt: str
    before: str
    after: str
    note: str = ""


@dataclass(frozen=True)
class SideBySide:
    """Texts made by models, which may hold anything."""

    pairs: tuple[TextPair, ...]
    before: str = "before"
    after: str = "after"


@dataclass(frozen=True)
class Folded:
    """Blocks that are shown on a click only."""

    summary: str
    blocks: tuple[Block, ...]
    warning: str = ""


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    title: str
    blocks: tuple[Block, ...]

    @property
    def anchor(self) -> str:
        """For links within the page."""
        return "".join(c if c.isascii() and c.isalnum() else "-" for c in self.title.lower()).strip("-")


Block = Text | Table | Facts | Checks | Picture | Code | SideBySide | Folded


def is_figure(text: str) -> bool:
    """Whether ``text`` is a figure, several of them, or nothing."""
    return _FIGURE.fullmatch(text) is not None


def number(value: float | None, digits: int = 4) -> str:
    """Rounded to ``digits`` significant digits; a dash where there is none."""
    if value is None or math.isnan(value):
        return NOTHING
    rounded = float(f"{value:.{digits}g}")
    return f"{rounded:,.12g}" if rounded == 0 or 1e-4 <= abs(rounded) < 1e9 else f"{value:.{digits}g}"


def count(value: float | None) -> str:
    """A whole number with separators."""
    return NOTHING if value is None else f"{value:,}"


def percent(value: float | None, digits: int = 1) -> str:
    """A share as per cent."""
    return NOTHING if value is None or math.isnan(value) else f"{100 * value:.{digits}f} %"
