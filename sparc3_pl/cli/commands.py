"""The commands by name. Nothing of a command is imported before it is asked for."""

from __future__ import annotations

import difflib
import importlib
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sparc3_pl import __version__
from sparc3_pl.io.provenance import redacted
from sparc3_pl.io.shipped import with_shipped_configs

__all__ = ["COMMANDS", "PASSES", "Command", "execute"]


@dataclass(frozen=True)
class Command:
    """A command that is a plain function: its arguments are the options, its docstring makes ``--help``."""

    module: str
    """Where the function is; it has the command's name."""
    about: str
    """The first line of its docstring, kept here because ``sparc3 --help`` imports no command; a test compares both."""

    def function(self, name: str) -> Callable[..., Any]:
        """The function of the command called ``name``."""
        return getattr(importlib.import_module(self.module), name)


PASSES = {
    "score": "Score a model's components (neurons, heads, single weights, ...) on reference samples.",
    "eval": "Measure a model as it is or with a plan applied: perplexity, judged completions, sentence pairs, tasks.",
}
"""Commands that run the Trainer's method of that name."""

COMMANDS = {
    "prune": Command(
        "sparc3_pl.selection.command",
        "Choose what a behaviour uses and general text does not, or what general text uses least, as a plan.",
    ),
    "elicit": Command(
        "sparc3_pl.experiment.elicit",
        "Let a model complete prompts, and keep what shows a behaviour as samples for score and eval.",
    ),
    "circuit": Command(
        "sparc3_pl.circuit.command",
        "Find the circuits of a task by several methods, and measure how much of the task they keep.",
    ),
    "compare": Command(
        "sparc3_pl.evaluation.compare",
        "Compare two evaluations of the same prompts and text, before and after an edit.",
    ),
    "run": Command(
        "sparc3_pl.experiment.run",
        "Run a whole experiment from one YAML; what is done already is not done again.",
    ),
    "audit": Command(
        "sparc3_pl.diagnosis.audit",
        "Check score folders: numbers, architecture, samples, agreement of seeds; a verdict for each.",
    ),
    "evidence": Command(
        "sparc3_pl.diagnosis.evidence",
        "Check a contrast before pruning by it: enough samples, a stable selection, not just the strongest neurons.",
    ),
    "doctor": Command(
        "sparc3_pl.diagnosis.doctor",
        "Check that the AttnLRP attribution of a model is right, on a few samples.",
    ),
    "overlap": Command(
        "sparc3_pl.diagnosis.overlap",
        "Compare the neurons chosen for several behaviours: what they share, and whether that is more than chance.",
    ),
    "report": Command(
        "sparc3_pl.report.command",
        "Write a report on scores, plans, evaluations and circuits, as one HTML page and as Markdown.",
    ),
    "merge": Command(
        "sparc3_pl.scoring.merge",
        "Join the parts of one scoring run (score --part i/n) into the score folder of the whole run.",
    ),
}


def execute(args: Sequence[str] | None = None) -> None:
    """Runs one command in this process.

    Args:
        args: The command's name and its options; None: ``sys.argv[1:]``.

    Raises:
        InputError: if what the user gave is wrong.
        SystemExit: if the words cannot be parsed, or ask for ``--help`` or ``--version``.
    """
    words = with_shipped_configs(sys.argv[1:] if args is None else args)
    name = words[0] if words else None
    if name in ("-h", "--help"):
        print(overview())
        raise SystemExit(0)
    if name == "--version":
        print(f"sparc3 {__version__}")
        raise SystemExit(0)
    if name in PASSES:
        from sparc3_pl.passes.run import run_pass

        run_pass(name, words[1:])
    elif name in COMMANDS:
        _run_function(COMMANDS[name].function(name), name, words[1:])
    else:
        names = [*PASSES, *COMMANDS]
        close = difflib.get_close_matches(name or "", names, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        problem = "no command is given" if name is None else f"unknown command {redacted(name)!r}"
        sys.stderr.write(f"error: {problem}; give one of {', '.join(names)}{hint} (see --help)\n")
        raise SystemExit(2)


def _run_function(function: Callable[..., Any], name: str, words: Sequence[str]) -> None:
    from sparc3_pl.passes.parser import function_parser

    parser = function_parser(function, f"sparc3 {name}")
    arguments = vars(parser.instantiate(parser.parse_args(words)))
    arguments.pop("config", None)
    function(**arguments)


def overview() -> str:
    """The text of ``sparc3 --help``."""
    abouts = PASSES | {name: command.about for name, command in COMMANDS.items()}
    width = min(shutil.get_terminal_size().columns, 120)
    rows = [
        textwrap.fill(about, width, initial_indent=f"    {name:<9} ", subsequent_indent=" " * 14)
        for name, about in abouts.items()
    ]
    return "\n".join(
        [
            "usage: sparc3 COMMAND [options], or sparc3 --version",
            "",
            "Attribution-guided pruning of language models.",
            "",
            "commands (sparc3 COMMAND --help shows the options of one):",
            *rows,
        ]
    )
