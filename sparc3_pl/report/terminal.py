"""Results for the terminal, on stdout."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text as RichText

from sparc3_pl.report.document import Block, Checks, Code, Facts, Folded, Section, Table, Text
from sparc3_pl.scores import Manifest

__all__ = ["print_sections", "print_summary"]

_STYLES = {"pass": "green", "warn": "yellow", "fail": "bold red"}
_WIDTH = 160  # where no terminal says its width


def print_sections(sections: Sequence[Section]) -> None:
    """A document as text; figures are for the other renderers."""
    console = Console() if sys.stdout.isatty() else Console(width=_WIDTH)
    for section in sections:
        console.print(RichText(f"\n{section.title}", style="bold"))
        for block in section.blocks:
            _print_block(console, block)


def _print_block(console: Console, block: Block) -> None:
    match block:
        case Text(text) | Code(text):
            console.print(RichText(text), soft_wrap=True)
        case Table():
            console.print(_table(block))
        case Facts(items):
            console.print(_table(Table(("", ""), items)))
        case Checks():
            console.print(_checks(block))
        case Folded(_, blocks):
            for inner in blocks:
                _print_block(console, inner)


def _table(table: Table) -> RichTable:
    """Texts go in as rich Text: nothing in a name is read as markup."""
    made = RichTable(title=table.title or None, caption=table.note or None, box=box.SIMPLE_HEAD)
    made.title_justify = made.caption_justify = "left"
    for name, numeric in zip(table.columns, table.numeric, strict=True):
        made.add_column(RichText(name), justify="right" if numeric else "left", overflow="fold")
    for row in table.rows:
        made.add_row(*map(RichText, row))
    return made


def _checks(checks: Checks) -> RichTable:
    made = RichTable("verdict", "check", "reason", title=checks.of or None, box=box.SIMPLE_HEAD)
    made.title_justify = "left"
    made.columns[1].no_wrap = True
    for check in checks.checks:
        made.add_row(RichText(check.status, style=_STYLES[check.status]), RichText(check.name), RichText(check.reason))
    return made


def print_summary(manifest: Manifest, folder: Path, most: int = 5) -> None:
    """What was scored, and the layers that hold most of the relevance.

    Args:
        manifest: Of the scores.
        folder: Where they are.
        most: Number of layers to show.
    """
    console = Console()
    total = manifest.total_relevance
    kind = f"{'signed ' if manifest.signed else ''}{manifest.granularity} scores by {manifest.method}"
    console.print(
        f"{kind}: {len(manifest.layers)} layers of {manifest.model['pretrained']}, {manifest.num_samples} samples, "
        f"{manifest.num_tokens} tokens, total relevance {total:.6g}",
        soft_wrap=True,
    )
    table = RichTable("layer", "shape", "sum of scores", "share")
    largest = sorted(manifest.layers.items(), key=lambda item: -abs(item[1].sum))[:most]
    for name, layer in largest:
        share = f"{layer.sum / total:.1%}" if total else "-"
        table.add_row(name, " x ".join(map(str, layer.shape)), f"{layer.sum:.6g}", share)
    console.print(table)
    console.print(f"scores: {folder}", soft_wrap=True)
