"""A document as one self-contained HTML page, or a part of one in a notebook: no script, no network, light and dark."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sparc3_pl.document.blocks import Block, Section
from sparc3_pl.document.verdicts import Status
from sparc3_pl.io.files import FileKind

if TYPE_CHECKING:
    from jinja2 import Environment

__all__ = ["PAGE", "fragment", "page"]

_HERE = Path(__file__).parent


def _is_page(path: Path) -> bool:
    with path.open("rb") as stream:
        head = stream.read(4096)
    return b'name="generator" content="sparc3_pl"' in head or b"--pass-back" in head  # pages of earlier versions


PAGE = FileKind("a page of this program", _is_page)


def page(title: str, sections: Sequence[Section], subtitle: str = "", verdict: Status | None = None) -> str:
    """The source of the page. Everything is escaped, except the pictures, which this program draws.

    Args:
        title: Title of the page.
        sections: Content of the page.
        subtitle: A line under the title.
        verdict: Shown beside the title.
    """
    template = _environment().get_template("page.html")
    css = (_HERE / "page.css").read_text(encoding="utf-8")
    return template.render(title=title, subtitle=subtitle, sections=sections, css=css, verdict=verdict)


def fragment(blocks: Sequence[Block]) -> str:
    """The source of a part of somebody else's page, in the colours that it has: what a notebook shows.

    Args:
        blocks: Content of the part, which is escaped as in ``page``.
    """
    css = (_HERE / "fragment.css").read_text(encoding="utf-8")
    return _environment().get_template("fragment.html").render(blocks=blocks, css=css)


@functools.cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["kind"] = lambda block: type(block).__name__
    return environment
