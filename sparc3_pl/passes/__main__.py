"""``python -m sparc3_pl.passes score`` (or ``eval``): a pass of an experiment, where it needs processes of its own."""

import sys

from sparc3_pl.passes.program import program


def _run() -> None:
    from sparc3_pl.passes.run import run_pass  # Lightning

    run_pass(sys.argv[1], sys.argv[2:])


sys.exit(program(_run))
