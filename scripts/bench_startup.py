"""How long commands take before they do any work of their own, against importing torch or LightningCLI alone.

Each command runs in a fresh process and is stopped by ``--help``, in turns with its yardstick. What counts is the
processor time of the process, which a busy machine changes less than the time on the wall. Exits with 1 if a ratio is
above its bound.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

TORCH, LIGHTNING = "import torch", "import lightning.pytorch.cli"
PLAIN = ("prune", "elicit", "circuit", "compare", "audit", "evidence", "overlap", "report", "merge", "doctor", "run")
"""Commands without a Trainer: they need torch at most before their own work begins."""


@dataclass(frozen=True)
class Startup:
    """Processor seconds of a command and of its yardstick, the fastest run of each, and the bound of their ratio."""

    command: str
    yardstick: str
    seconds: float
    yardstick_seconds: float
    bound: float

    @property
    def ratio(self) -> float:
        """Command over yardstick."""
        return self.seconds / self.yardstick_seconds


def processor_seconds(words: list[str]) -> float:
    """User and system time of a fresh Python process with these arguments.

    Raises:
        CalledProcessError: if it fails.
    """
    before = os.times()
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def measure(command: list[str], yardstick: str, bound: float, repeats: int) -> Startup:
    """Runs both ``repeats`` times in turns, once more before that to fill the disk's cache.

    Other work on the machine only adds, so the fastest runs count; a ratio above its bound is measured on, up to three
    times as often, since a slow spell of the machine can be longer than all runs of one command.
    """
    runs = (["-m", "sparc3_pl.cli", *command, "--help"], ["-c", yardstick])
    for words in runs:
        processor_seconds(words)
    seconds: list[list[float]] = []
    for _ in range(3):
        seconds += [[processor_seconds(words) for words in runs] for _ in range(repeats)]
        ours, theirs = (min(column) for column in zip(*seconds, strict=True))
        row = Startup(" ".join([*command, "--help"]), yardstick, ours, theirs, bound)
        if row.ratio <= bound:
            break
    return row


def main(words: list[str] | None = None) -> int:
    """Prints a row for each command; 1 if one of them is slower than its bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="counted runs of each command (3)")
    parser.add_argument("--commands", nargs="+", default=["", *PLAIN, "score", "eval"], help="default: all; '': --help")
    parser.add_argument("--json", type=Path, help="keep the figures in this file")
    args = parser.parse_args(words)
    rows = []
    print(f"{'command':<18} {'seconds':>8}  {'against':<28} {'seconds':>8} {'ratio':>6} {'bound':>6}")
    for name in args.commands:
        yardstick, bound = (LIGHTNING, 1.2) if name in ("score", "eval") else (TORCH, 1.5)
        row = measure([name] if name else [], yardstick, bound, args.repeats)
        rows.append(row)
        print(
            f"{row.command:<18} {row.seconds:>8.2f}  {row.yardstick:<28} {row.yardstick_seconds:>8.2f} "
            f"{row.ratio:>6.2f} {row.bound:>6.2f}",
            flush=True,
        )
    if args.json is not None:
        args.json.write_text(json.dumps([asdict(row) | {"ratio": row.ratio} for row in rows], indent=1) + "\n")
    return int(any(row.ratio > row.bound for row in rows))


if __name__ == "__main__":
    sys.exit(main())
