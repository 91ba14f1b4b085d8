"""Results that show themselves: as text where they are printed, as a table in a notebook, as a data frame."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sparc3_pl.errors import InputError

if TYPE_CHECKING:
    from pandas import DataFrame

    from sparc3_pl.document.blocks import Block

__all__ = ["Shown", "data_frame"]


class Shown(ABC):
    """Something that is shown as blocks of a document."""

    def __init_subclass__(cls) -> None:
        cls._repr_pretty_ = Shown._repr_pretty_  # IPython takes a class's own ``__repr__``, as dataclasses have, first

    @abstractmethod
    def blocks(self) -> Sequence[Block]:
        """The blocks to show: the tables that the command prints, and notes."""

    def __str__(self) -> str:
        from sparc3_pl.document.terminal import text_of

        return text_of(self.blocks())

    def _repr_html_(self) -> str:
        """The blocks as HTML, for notebooks."""
        from sparc3_pl.document.page import fragment

        return fragment(self.blocks())

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Writes the blocks as text, for IPython on a terminal."""
        printer.text(str(self))


def data_frame(rows: Iterable[Mapping[str, Any]]) -> DataFrame:
    """Rows as a pandas data frame.

    Raises:
        InputError: if pandas is not installed.
    """
    try:
        from pandas import DataFrame
    except ImportError as error:
        raise InputError("to_pandas needs pandas: pip install pandas") from error
    return DataFrame([dict(row) for row in rows])
