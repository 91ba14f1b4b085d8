"""A document as Markdown, for an issue, a wiki or a paper's appendix."""

from __future__ import annotations

import re
from collections.abc import Sequence

from sparc3_pl.document.blocks import (
    Block,
    Checks,
    Code,
    Facts,
    Folded,
    Picture,
    Section,
    SideBySide,
    Table,
    Text,
)

__all__ = ["markdown"]


def markdown(title: str, sections: Sequence[Section], subtitle: str = "") -> str:
    """The Markdown text: pictures become their descriptions; texts of models are quoted and cannot act as markup."""
    parts = [f"# {_plain(title)}", _plain(subtitle)]
    for section in sections:
        parts += [f"## {_plain(section.title)}", *(_block(block) for block in section.blocks)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _block(block: Block) -> str:
    match block:
        case Text(text):
            return _plain(text)
        case Table(columns, _, title, note):
            return _join(_bold(title), _table(columns, block.texts, block.numeric), _plain(note))
        case Facts(items):
            return "\n".join(f"- {_plain(meaning)}: **{_plain(figure)}**" for figure, meaning in items)
        case Checks(checks, of):
            rows = [(f"{check.status}", check.name, check.reason) for check in checks]
            return _join(_bold(of), _table(("verdict", "check", "reason"), rows, (False,) * 3))
        case Picture(_, alt, caption):
            return _join(f"*Figure: {_plain(alt)}*", _plain(caption))
        case Code(text, title):
            return _join(_bold(title), _fenced(text))
        case SideBySide():
            texts = (
                f"{pair.prompt}\n--- {block.before}\n{pair.before}\n--- {block.after}\n{pair.after}"
                for pair in block.pairs
            )
            notes = (_plain(pair.note) for pair in block.pairs)
            return "\n\n".join(map(_join, map(_fenced, texts), notes))
        case Folded(summary, blocks, warning):
            inner = "\n\n".join(_block(one) for one in blocks)
            return f"<details><summary>{_plain(f'{summary} {warning}'.strip())}</summary>\n\n{inner}\n\n</details>"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[bool]) -> str:
    head = [_row(columns), _row(["---:" if flush_right else "---" for flush_right in numeric], plain=False)]
    return "\n".join([*head, *(_row(row) for row in rows)])


def _row(cells: Sequence[str], plain: bool = True) -> str:
    return "| " + " | ".join(_plain(cell) if plain else cell for cell in cells) + " |"


def _fenced(text: str) -> str:
    """A code block whose fence is longer than any in ``text``."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def _plain(text: str) -> str:
    """One line in which no character acts as Markdown or HTML."""
    text = re.sub(r"([\\`*_\[\]|#])", r"\\\1", " ".join(text.split()))
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _bold(text: str) -> str:
    return f"**{_plain(text)}**" if text else ""


def _join(*parts: str) -> str:
    return "\n\n".join(part for part in parts if part)
