"""The content of a document, for all three renderers: sections of text, tables, checks and pictures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sparc3_pl.document.verdicts import Check
from sparc3_pl.statistics.paired import LEAST_UNITS

__all__ = [
    "NOTHING",
    "Block",
    "Cell",
    "Checks",
    "Code",
    "Facts",
    "Folded",
    "Number",
    "Numbers",
    "Picture",
    "Section",
    "SideBySide",
    "Table",
    "Text",
    "TextPair",
    "better_worse",
    "count",
    "from_to",
    "interval",
    "number",
    "p_value",
    "percent",
    "with_relative",
]

NOTHING = "–"


@dataclass(frozen=True)
class Number:
    """A figure and its format; ``str`` writes it.

    Attributes:
        value: The figure; None or NaN is written as a dash.
        digits: Significant digits, unless ``form`` says otherwise.
        form: Format specification, such as ``+.2f``.
        unit: Written behind the figure.
    """

    value: float | None
    digits: int = 4
    form: str = ""
    unit: str = ""

    def __str__(self) -> str:
        if self.value is None or math.isnan(self.value):
            return NOTHING
        if self.form:
            return f"{self.value:{self.form}}{self.unit}"
        rounded = float(f"{self.value:.{self.digits}g}")
        plain = rounded == 0 or 1e-4 <= abs(rounded) < 1e9
        return (f"{rounded:,.12g}" if plain else f"{self.value:.{self.digits}g}") + self.unit


@dataclass(frozen=True)
class Numbers:
    """Several figures in one cell, such as ``0.997 to 0.520``; ``str`` writes them.

    Attributes:
        template: The text around the figures, with a ``{}`` for each.
        numbers: The figures.
    """

    template: str
    numbers: tuple[Number | Numbers, ...]

    def __str__(self) -> str:
        return self.template.format(*self.numbers)


Cell = Number | Numbers | str | None
"""The content of a table's cell: figures with their format, text, or None for an empty one."""


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Table:
    """Rows of cells; the first column names the rows."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    title: str = ""
    note: str = ""

    @classmethod
    def of(cls, columns: Sequence[str], rows: Iterable[Sequence[Cell]], title: str = "", note: str = "") -> Table:
        """A table from any sequences."""
        return cls(tuple(columns), tuple(map(tuple, rows)), title, note)

    @property
    def texts(self) -> tuple[tuple[str, ...], ...]:
        """The rows as they are written."""
        return tuple(tuple("" if cell is None else str(cell) for cell in row) for row in self.rows)

    @property
    def numeric(self) -> tuple[bool, ...]:
        """Whether each column holds figures and no text, so that it is aligned on the right; never the first."""
        return tuple(
            place > 0 and not any(isinstance(row[place], str) for row in self.rows)
            for place in range(len(self.columns))
        )


@dataclass(frozen=True)
class Facts:
    """Key figures, each with its meaning in a few words: (figure, meaning)."""

    items: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Checks:
    """Verdicts with their reasons; ``of`` names the thing that was checked."""

    checks: tuple[Check, ...]
    of: str = ""


@dataclass(frozen=True)
class Picture:
    """A drawing as SVG, and a description of it for readers who cannot see it."""

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
    """Texts written by models: they may hold anything."""

    pairs: tuple[TextPair, ...]
    before: str = "before"
    after: str = "after"


@dataclass(frozen=True)
class Folded:
    """Blocks that are hidden until the reader clicks."""

    summary: str
    blocks: tuple[Block, ...]
    warning: str = ""


@dataclass(frozen=True)
class Section:
    """A heading and the blocks under it."""

    title: str
    blocks: tuple[Block, ...]

    @property
    def anchor(self) -> str:
        """The id of the section, for links within the page."""
        return "".join(c if c.isascii() and c.isalnum() else "-" for c in self.title.lower()).strip("-")


Block = Text | Table | Facts | Checks | Picture | Code | SideBySide | Folded


# --- figures ----------------------------------------------------------------------------------------------------------


def number(value: float | None, digits: int = 4) -> Number:
    """A figure of ``digits`` significant digits."""
    return Number(value, digits)


def count(value: int | None) -> Number:
    """A whole number with separators."""
    return Number(value, form=",")


def percent(value: float | None, digits: int = 1) -> Number:
    """A share in per cent, with ``digits`` decimals."""
    return Number(None if value is None else 100 * value, form=f".{digits}f", unit=" %")


def p_value(value: float | None) -> Number | Numbers:
    """A p-value to four decimals; one that would be written as 0 is ``< 0.0001``."""
    if value is not None and value < 0.0001:
        return Numbers("< {}", (Number(0.0001, form=".4f"),))
    return Number(value, form=".4f")


def interval(low: float | None, high: float | None, units: int, form: str, unit: str = "") -> Numbers | str:
    """``LOW .. HIGH``; without an interval, how many independent units there are and how many one needs."""
    if low is None or high is None:
        return f"none: {units} of {LEAST_UNITS} needed"
    return Numbers("{} .. {}", (Number(low, form=form, unit=unit), Number(high, form=form, unit=unit)))


def from_to(before: float, after: float, form: str) -> Numbers:
    """``BEFORE to AFTER``."""
    return Numbers("{} to {}", (Number(before, form=form), Number(after, form=form)))


def with_relative(change: float, relative: float | None, form: str, relative_form: str) -> Number | Numbers:
    """A change, and in brackets the relative change in per cent where there is one."""
    absolute = Number(change, form=form)
    if relative is None:
        return absolute
    return Numbers("{} ({})", (absolute, Number(100 * relative, form=relative_form, unit=" %")))


def better_worse(improved: int, worsened: int, units: int) -> Numbers:
    """How many units of how many improved, and how many got worse."""
    return Numbers("{}/{} of {}", tuple(Number(value, form="d") for value in (improved, worsened, units)))
