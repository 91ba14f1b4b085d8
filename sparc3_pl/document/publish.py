"""Publishes the result of a diagnostic command: on stdout, and on request as a JSON file and a page."""

from __future__ import annotations

import json as json_module
from collections.abc import Sequence
from pathlib import Path

from sparc3_pl.document.blocks import Section
from sparc3_pl.document.page import PAGE, page
from sparc3_pl.document.verdicts import Status
from sparc3_pl.errors import InputError
from sparc3_pl.io.files import FileKind, check_output, new_file, strict_json, write_text
from sparc3_pl.io.formats import Record
from sparc3_pl.io.provenance import command_line, now, versions

__all__ = ["as_json", "check_places", "publish", "result_kind"]


def check_places(kind: str, output: str | None, html: str | None, overwrite: bool) -> None:
    """Checks the places of the results before any work is done.

    Args:
        kind: The command's name.
        output: The JSON file.
        html: The page.
        overwrite: Whether an earlier result of this kind, and an earlier page, may be replaced there.

    Raises:
        InputError: as ``check_output``, and if both are the same file.
    """
    if output is not None:
        check_output(output, overwrite, result_kind(kind))
    if html is not None:
        check_output(html, overwrite, PAGE)
    if output is not None and html is not None and Path(output).resolve() == Path(html).resolve():
        raise InputError(f"output={output!r} and html={html!r} are one file; give each a name of its own")


def result_kind(kind: str) -> FileKind:
    """The kind of file that holds the result of a diagnostic command."""
    return FileKind.json(f"a result of {kind}", lambda data: data.get("kind") == kind)


def as_json(kind: str, content: Record) -> str:
    """``content`` as JSON, with its kind, by which ``report`` recognises it, and the versions and command that made it.

    A figure that is not finite becomes null.
    """
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
        with new_file(output, overwrite, result_kind(json_module.loads(json)["kind"])) as path:
            write_text(path, json)
    if html is not None:
        with new_file(html, overwrite, PAGE) as path:
            write_text(path, page(title, sections, verdict=verdict))
    print_sections(sections)
