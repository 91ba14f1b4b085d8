"""The program around a command: logging, warnings, signals, exit codes.

Results go to stdout, the log to stderr. Exit codes: 0 done, 2 the input is wrong (one line says what), 143 stopped by
SIGTERM with everything saved, 1 anything else.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from functools import partial

from sparc3_pl.cli.commands import execute
from sparc3_pl.document.terminal import unfailing_output
from sparc3_pl.io.provenance import RedactingFilter
from sparc3_pl.runtime.processes import supervised

__all__ = ["main"]


def main(args: Sequence[str] | None = None) -> int:
    """The command line.

    Args:
        args: Stand for ``sys.argv[1:]``.

    Returns:
        The exit code.
    """
    with unfailing_output():
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
        for handler in logging.getLogger().handlers:
            handler.addFilter(REDACTING)
        for name in ("lightning.pytorch", "lightning.fabric"):
            logging.getLogger(name).setLevel(logging.WARNING)
        for noise in NOISE:
            warnings.filterwarnings("ignore", message=noise)
        if os.environ.get("LOCAL_RANK", "0") != "0":  # rank 0 speaks for all
            logging.getLogger().setLevel(logging.ERROR)
            warnings.simplefilter("ignore")
        return supervised(partial(execute, args))


REDACTING = RedactingFilter()
"""One object, so that a handler that has it already is not given it twice."""

NOISE = (
    ".*does not have many workers.*",
    ".*isinstance.treespec, LeafSpec.*",
    "predict returned None.*",
    "Total length of `DataLoader` across ranks is zero.*",
    "FSDP2-wrapped module .* returned a view tensor.*",  # OPT's layers do; nothing writes to them in place
)
"""Warnings of libraries about what is meant to be so."""
