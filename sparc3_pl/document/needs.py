"""The memory and disk that a run will take, as a table, and the refusal of a run that takes more than is free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparc3_pl.document.blocks import Table
from sparc3_pl.errors import InputError

__all__ = ["Need", "refuse_what_cannot_fit", "table_of", "table_of_stages"]


@dataclass(frozen=True)
class Need:
    """Bytes that one process takes.

    Attributes:
        what: ``weights``, ``sums``, ``activations``, ``completions``, ``judge``, ``scores``, ...
        where: ``device`` (of the model), ``host`` or ``disk``.
        bytes: Number of bytes; None: unknown.
        note: How they were counted.
        way_out: What to change where there is no room for them.
    """

    what: str
    where: str
    bytes: int | None
    note: str = ""
    way_out: str = ""


def refuse_what_cannot_fit(needs: Sequence[Need], free: Mapping[str, int | None]) -> None:
    """Compares what a process takes with what is free.

    Args:
        needs: The needs of one process.
        free: Bytes by place; None: unknown. Without an entry for ``device`` the model is on the host.

    Raises:
        InputError: naming the place and both numbers.
    """
    for where, available in free.items():
        parts = [need for need in needs if _place(need, free) == where and need.bytes is not None]
        total = sum(need.bytes for need in parts)
        if available is not None and total > available:
            items = ", ".join(f"{need.what} {_size(need.bytes)}" for need in parts)
            ways = dict.fromkeys(need.way_out for need in parts if need.way_out)
            raise InputError(
                f"the run does not fit: {items} add up to {_size(total)} on the {where}, but {_size(available)} are "
                "free; " + ("; or ".join(ways) or "make room there")
            )


def _place(need: Need, free: Mapping[str, int | None]) -> str:
    return "host" if need.where == "device" and "device" not in free else need.where


def table_of(needs: Sequence[Need], free: Mapping[str, int | None]) -> Table:
    """The needs of one pass as a table, with what is free in each place."""
    rows: list[tuple[Any, ...]] = [(need.what, _place(need, free), _size(need.bytes), need.note) for need in needs]
    rows += [("free", where, _size(available), "") for where, available in free.items()]
    return Table.of(("what", "where", "size", "how"), rows, note="For each process; nothing was loaded.")


def table_of_stages(stages: Mapping[str, Sequence[Need]], free: Mapping[str, int | None]) -> Table:
    """The needs of several passes, one after the other, as a table; passes that take the same share a line."""
    alike: dict[tuple[Need, ...], list[str]] = {}
    for name, needs in stages.items():
        alike.setdefault(tuple(needs), []).append(name)
    rows: list[tuple[Any, ...]] = []
    for needs, names in alike.items():
        stage = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} like it"
        rows += [(stage, need.what, _place(need, free), _size(need.bytes), need.note) for need in needs]
    on_disk = [need.bytes for needs in stages.values() for need in needs if need.where == "disk"]
    rows.append(("all", "results", "disk", _size(sum(size or 0 for size in on_disk)), "known ones"))
    rows += [("free", "", where, _size(available), "") for where, available in free.items()]
    note = "For each process of a pass; nothing was loaded. Plans, comparisons and the report come on top."
    return Table.of(("stage", "what", "where", "size", "how"), rows, note=note)


def _size(number: int | None) -> str:
    return "unknown" if number is None else f"{number / 2**20:,.1f} MiB"
