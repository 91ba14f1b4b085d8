"""Where the result of a looking command goes: stdout, and on request a JSON file and a page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparc3_pl.files import check_output, new_file, strict_json, write_text
from sparc3_pl.provenance import command_line, now, versions
from sparc3_pl.report.document import Section
from sparc3_pl.verdicts import Status

__all__ = ["as_json", "check_places", "publish"]


def check_places(output: str | None, html: str | None, overwrite: bool) -> None:
    """Refuses places that are taken before any work is done.

    Raises:
        InputError: as ``check_output``.
    """
    for path in (output, html):
        if path is not None:
            check_output(path, overwrite)


def as_json(kind: str, content: dict[str, Any]) -> str:
    """``content`` with what made it, by which ``report`` knows it again; a figure that is not finite is null."""
    about = {"versions": versions(), "command": command_line(), "created": now()}
    return strict_json({"kind": kind, **content, **about}, indent=1) + "\n"


def publish(
    title: str,
    sections: Sequence[Section],
    *,
    json: str,
    output: str | None,
    html: str | None,
    overwrite: bool,
    verdict: Status | None = None,
) -> None:
    """Prints the sections, and writes ``json`` to ``output`` and the page to ``html`` where they are given.

    Raises:
        InputError: if a file cannot be written.
    """
    from sparc3_pl.report.html import page
    from sparc3_pl.report.terminal import print_sections

    print_sections(sections)
    if output is not None:
        with new_file(output, overwrite) as path:
            write_text(path, json)
    if html is not None:
        with new_file(html, overwrite) as path:
            write_text(path, page(title, sections, verdict=verdict))
