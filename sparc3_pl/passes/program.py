"""The program around a command: logging, warnings, signals, exit codes.

Results go to stdout, the log to stderr. Exit codes: 0 done, 2 the input is wrong (one line says what), 143 stopped by
SIGTERM with everything saved, 1 anything else.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable

from sparc3_pl.document.terminal import unfailing_output
from sparc3_pl.io.provenance import RedactingFilter
from sparc3_pl.runtime.noise import quiet
from sparc3_pl.runtime.processes import supervised

__all__ = ["program"]


def program(work: Callable[[], None]) -> int:
    """Does the work of this process's command; returns its exit code."""
    with unfailing_output():
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
        for handler in logging.getLogger().handlers:
            handler.addFilter(REDACTING)
        quiet()
        return supervised(work)


REDACTING = RedactingFilter()
"""One object, so that a handler that has it already is not given it twice."""
