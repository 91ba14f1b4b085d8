"""Prints results on stdout, for terminals of any width and encoding, and without ever raising."""

from __future__ import annotations

import io
import os
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text as RichText

from sparc3_pl.document.blocks import Block, Checks, Code, Facts, Folded, Number, Section, Table, Text

if TYPE_CHECKING:
    from sparc3_pl.scores.manifest import Manifest

__all__ = ["print_result", "print_sections", "print_summary", "printable", "summary", "text_of", "unfailing_output"]

_STYLES = {"pass": "green", "warn": "yellow", "fail": "bold red"}
_WIDTH = 160  # where no terminal says its width
_NARROWEST = 12
"""Smallest width that a column of text may be wrapped to; longer words are folded."""
_PLAIN = str.maketrans({"–": "-", "—": "-", "…": "...", "×": "x", "±": "+-", "≤": "<=", "≥": ">=", "’": "'"})
"""Replacements for a terminal whose encoding has no dash."""


def print_result(*parts: str | Table) -> None:
    """Prints lines and tables. Nothing in them acts as markup or on the terminal."""
    console = _console()
    for part in parts:
        if isinstance(part, str):
            _print_line(console, part)
        else:
            _print_table(console, part)


def text_of(blocks: Sequence[Block]) -> str:
    """Blocks as text, as wide as the terminal, without its colours."""
    text = io.StringIO()
    console = _Console(file=text, width=_console().width, force_jupyter=False)  # in a notebook it would show, not write
    for block in blocks:
        _print_block(console, block)
    return text.getvalue().strip("\n")


def print_sections(sections: Sequence[Section]) -> None:
    """Prints a document as text, without its pictures."""
    console = _console()
    for section in sections:
        _print_line(console, f"\n{section.title}", "bold")
        for block in section.blocks:
            _print_block(console, block)


def print_summary(manifest: Manifest, folder: Path) -> None:
    """Prints a summary of scores, and where they are."""
    about, table = summary(manifest)
    print_result(about, table, f"scores: {folder}")


def summary(manifest: Manifest, most: int = 5) -> tuple[str, Table]:
    """A line that says what was scored, and a table of the layers with most of the relevance.

    Args:
        manifest: Manifest of the scores.
        most: Number of layers to show.
    """
    total = manifest.total_relevance
    unit = manifest.granularity.replace("+", " and ")
    kind = f"{'signed ' if manifest.signed else ''}{unit} scores by {manifest.method}"
    largest = sorted(manifest.layers.items(), key=lambda item: -abs(item[1].sum))[:most]
    rows = [
        (
            name,
            " x ".join(map(str, layer.shape)),
            Number(layer.sum, form=".6g"),
            Number(layer.sum / total if total else None, form=".1%"),
        )
        for name, layer in largest
    ]
    note = f"the {most} layers with most of it; the manifest has all {len(manifest.layers)}"
    return (
        f"{kind}: {len(manifest.layers)} layers of {manifest.model.pretrained}, {manifest.num_samples} samples, "
        f"{manifest.num_tokens} tokens, total relevance {total:.6g}",
        Table.of(("layer", "shape", "sum of scores", "share"), rows, note=note if len(manifest.layers) > most else ""),
    )


def printable(text: str, encoding: str | None = "utf-8") -> str:
    """``text`` with escapes for characters that a terminal would obey, or cannot show in its encoding.

    These are control characters (except line ends and tabs), invisible characters that turn the direction of a line,
    bytes of a path that are not UTF-8, and letters that ``encoding`` lacks.
    """
    text = "".join(
        c if c in "\n\t" or unicodedata.category(c) not in _UNSEEN else c.encode("unicode_escape").decode()
        for c in text
    )
    encoding = encoding or "ascii"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.translate(_PLAIN).encode(encoding, "backslashreplace").decode(encoding)
    return text


_UNSEEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Prints nothing more; Rich would end the program."""
        self.quiet = True


def _console() -> Console:
    return _Console() if sys.stdout.isatty() else _Console(width=_WIDTH)


def _print_line(console: Console, text: str, style: str = "") -> None:
    console.print(RichText(printable(text, console.encoding), style=style), soft_wrap=True)


def _print_block(console: Console, block: Block) -> None:
    match block:
        case Text(text) if console.is_terminal:
            console.print(RichText(printable(text, console.encoding), overflow="fold"))
        case Text(text) | Code(text):
            _print_line(console, text)
        case Table():
            _print_table(console, block)
        case Facts(items):
            _print_table(console, Table(("", ""), items))
        case Checks(checks, of):
            rows = [(check.status, check.name, check.reason) for check in checks]
            _print_table(console, Table.of(("verdict", "check", "reason"), rows, of), _STYLES)
        case Folded(_, blocks):
            for inner in blocks:
                _print_block(console, inner)


def _print_table(console: Console, table: Table, styles: dict[str, str] | None = None) -> None:
    """Prints a table, or a list of its rows if it is wider than the terminal: no figure is ever cut or wrapped.

    Args:
        console: The console to print on.
        table: The table.
        styles: Style of a row by the text of its first cell.
    """
    columns = [printable(name, console.encoding) for name in table.columns]
    rows = [[printable(cell, console.encoding) for cell in row] for row in table.texts]
    if table.title:
        _print_line(console, table.title, "italic")
    is_text = [[isinstance(cell, str) for cell in row] for row in table.rows]
    available = console.width - 3 * len(columns) - 1  # a blank on either side, and between
    widths = _widths(columns, rows, is_text, available)
    if widths is None:
        for first, *others in rows:
            console.print(RichText(first, style=(styles or {}).get(first, "bold"), overflow="fold"))
            for name, cell in zip(columns[1:], others, strict=True):
                if cell:
                    console.print(RichText(f"  {name}: {cell}" if name else f"  {cell}", overflow="fold"))
    else:
        grid = RichTable(box=box.SIMPLE_HEAD, show_header=any(columns))
        for name, numeric, width in zip(columns, table.numeric, widths, strict=True):
            grid.add_column(RichText(name), justify="right" if numeric else "left", overflow="fold", width=width)
        for first, *others in rows:
            grid.add_row(RichText(first, style=(styles or {}).get(first, "")), *map(RichText, others))
        console.print(grid)
    if table.note:
        _print_line(console, table.note)


def _widths(
    columns: Sequence[str], rows: Sequence[Sequence[str]], is_text: Sequence[Sequence[bool]], available: int
) -> list[int] | None:
    """Widths of the columns that add up to ``available`` or less; None if a figure would have to be broken."""
    widths, least = [], []
    for place, name in enumerate(columns):
        cells = [row[place] for row in rows]
        widths.append(max((cell_len(line) for cell in (name, *cells) for line in cell.split("\n")), default=1) or 1)
        unbroken = [
            piece
            for cell, flags in zip(cells, is_text, strict=True)
            for piece in (filter(_is_digits, cell.split()) if flags[place] else [cell])
        ]
        least.append(max(min(widths[-1], _NARROWEST), *map(cell_len, unbroken), 1))
    while sum(widths) > available:
        shrinkable = [place for place in range(len(widths)) if widths[place] > least[place]]
        if not shrinkable:
            return None
        widths[max(shrinkable, key=widths.__getitem__)] -= 1
    return widths


def _is_digits(word: str) -> bool:
    """Whether a word of a text is a number, which must not be broken either."""
    return any(map(str.isdigit, word)) and not any(map(str.isalpha, word))


# --- what cannot be printed -----------------------------------------------------------------------------------------


class _Unfailing:
    """A text stream that drops what cannot be written: the reader is gone, the disk is full, the stream was closed."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._is_lost = stream, False

    def write(self, text: str) -> int:
        self._attempt(self._stream.write, text)
        return len(text)

    def writelines(self, lines: Sequence[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _attempt(self, action: Callable[..., Any], *args: str) -> None:
        if self._is_lost:
            return
        try:
            action(*args)
        except UnicodeEncodeError:  # a stream whose errors cannot be set
            action(*(printable(text, self._stream.encoding) for text in args))
        except (OSError, ValueError):
            self._is_lost = True
            _to_nowhere(self._stream)


def _to_nowhere(stream: TextIO) -> None:
    """Points the stream at nothing, so that what it still holds raises no error when Python flushes it at exit."""
    with suppress(OSError, ValueError):  # no file may be behind it
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


@contextmanager
def unfailing_output() -> Iterator[None]:
    """Inside the block nothing that is printed to stdout or stderr can raise, whatever they are connected to."""
    before, handlers = (sys.stdout, sys.stderr), []
    try:
        for name, stream in zip(("stdout", "stderr"), before, strict=True):
            stream = open(os.devnull, "w", encoding="utf-8") if stream is None else stream  # noqa: SIM115
            if isinstance(stream, io.TextIOWrapper):
                handlers.append((stream, stream.errors))
                with suppress(OSError, ValueError):
                    stream.reconfigure(errors="backslashreplace")
            setattr(sys, name, _Unfailing(stream))
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before
        for stream, errors in handlers:
            with suppress(OSError, ValueError):  # it is flushed first, or may be closed
                stream.reconfigure(errors=errors)
