"""The command line: ``python -m sparc3_pl.cli``, and ``sparc3`` for short. Importing it imports no torch."""

from sparc3_pl.cli.commands import COMMANDS, PASSES, execute
from sparc3_pl.cli.main import main

__all__ = ["COMMANDS", "PASSES", "execute", "main"]
