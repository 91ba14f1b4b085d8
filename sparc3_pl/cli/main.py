"""The command line as a program."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from sparc3_pl.cli.commands import execute
from sparc3_pl.passes.program import program

__all__ = ["main"]


def main(args: Sequence[str] | None = None) -> int:
    """The command line.

    Args:
        args: The command's name and its options; None: ``sys.argv[1:]``.

    Returns:
        The exit code.
    """
    return program(partial(execute, args))
