"""What a command imports before its own work begins, and how long that takes against ``import torch``."""

import json
import subprocess
import sys

from bench_startup import PLAIN, TORCH, processor_seconds
from ranks import environment

from sparc3_pl.cli import COMMANDS, PASSES

IMPORTS = """
import contextlib, io, json, sys
from sparc3_pl.cli import execute

def imported(*words):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        execute([*words, "--help"])
    assert "usage" in out.getvalue()
    return [name for name in ("torch", "lightning", "transformers", "torchmetrics", "datasets") if name in sys.modules]

print(json.dumps([imported(), {name: imported(name) for name in sys.argv[1:]}]))
"""


def test_commands_import_nothing_that_only_their_work_needs():
    words = [sys.executable, "-c", IMPORTS, *COMMANDS]
    made = subprocess.run(words, check=True, capture_output=True, text=True, env=environment())
    overview, commands = json.loads(made.stdout)
    assert overview == []
    assert commands == {name: ["torch"] for name in COMMANDS}


def test_the_benchmark_knows_every_command():
    assert set(PLAIN) == set(COMMANDS)


def test_help_takes_no_longer_than_the_bound():
    runs = {"torch": ["-c", TORCH]} | {name: ["-m", "sparc3_pl.cli", *name.split(), "--help"] for name in ("", "prune")}
    seconds = {name: [] for name in runs}
    for _ in range(3):  # again only where something else kept the processor busy
        for name, words in runs.items():
            seconds[name].append(processor_seconds(words))
        least = {name: min(values) for name, values in seconds.items()}
        if max(least["prune"], least[""]) <= 1.5 * least["torch"]:
            return
    raise AssertionError(f"processor seconds {least}: --help takes more than 1.5 times as long as {TORCH}")


def test_descriptions_are_those_of_the_functions():
    from sparc3_pl.runtime.trainer import Trainer

    functions = {name: getattr(Trainer, name) for name in PASSES}
    functions |= {name: command.function(name) for name, command in COMMANDS.items()}
    abouts = PASSES | {name: command.about for name, command in COMMANDS.items()}
    assert abouts == {name: function.__doc__.partition("\n")[0] for name, function in functions.items()}
