"""Where the result of a looking command goes: stdout, and on request a JSON file and a page."""

from __future__ import annotations

import json as json_module
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparc3_pl.document.document import Section
from sparc3_pl.document.page import PAGE, page
from sparc3_pl.document.verdicts import Status
from sparc3_pl.errors import InputError
from sparc3_pl.io.files import FileKind, check_output, new_file, strict_json, write_text
from sparc3_pl.io.provenance import command_line, now, versions

__all__ = ["as_json", "check_places", "publish"]


def check_places(kind: str, output: str | None, html: str | None, overwrite: bool) -> None:
    """Refuses places that are taken before any work is done.

    Args:
        kind: Of the result: the command's name.
        output: Where its JSON goes.
        html: Where its page goes.
        overwrite: Whether an earlier result of this kind, and a page, may be replaced there.

    Raises:
        InputError: as ``check_output``, and if both are one place.
    """
    if output is not None:
        check_output(output, overwrite, _json_of(kind))
    if html is not None:
        check_output(html, overwrite, PAGE)
    if output is not None and html is not None and Path(output).resolve() == Path(html).resolve():
        raise InputError(f"output={output!r} and html={html!r} are one file; give each a name of its own")


def _json_of(kind: str) -> FileKind:
    return FileKind.json(f"a result of {kind}", lambda data: data.get("kind") == kind)


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
    """Writes ``json`` to ``output`` and the page to ``html`` where they are given, then prints the sections.

    Raises:
        InputError: if a file cannot be written.
    """
    from sparc3_pl.document.terminal import print_sections

    if output is not None:
        with new_file(output, overwrite, _json_of(json_module.loads(json)["kind"])) as path:
            write_text(path, json)
    if html is not None:
        with new_file(html, overwrite, PAGE) as path:
            write_text(path, page(title, sections, verdict=verdict))
    print_sections(sections)
