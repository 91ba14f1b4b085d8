"""How long choosing half of the weights takes, and how much memory, on a folder of random scores.

Each scope is timed in a fresh process, against a process that only reads and verifies the scores. What counts is the
time on the wall, since rows are sorted while the next ones are read, and the largest resident set of the process,
libraries included: run it on a quiet machine with two processors or more. Exits with 1 if rows take more than twice as
long as reading, or a process needs more memory than it may.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from sparc3_pl.io.provenance import command_line, hardware, now, versions
from sparc3_pl.scores.writer import ScoreWriter

SCOPES = {
    "read": [],
    "row": ["--scope", "row", "--share", "0.5"],
    "2:4": ["--pattern", "2:4"],
    "layer": ["--scope", "layer", "--share", "0.5"],
    "model": ["--scope", "model", "--share", "0.5"],
    "row, owl": ["--scope", "row", "--share", "0.5", "--budgets", "owl"],
}
# Reading alone imports what the command does, so that both processes hold the same libraries.
_CHILD = """
import json, sys, time
import torch
torch.set_num_threads(1)
from sparc3_pl.scores.folder import ScoreFolder
from sparc3_pl.selection.command import prune
import sparc3_pl.selection.choose
from sparc3_pl.cli import main
folder, words = sys.argv[1], sys.argv[2:]
start, wall = time.process_time(), time.perf_counter()
if words:
    assert main(["prune", "--general", folder, "--contrast", "general", *words]) == 0
else:
    scores = ScoreFolder.open(folder)
    for layer in scores.layers:
        for block in scores.blocks(layer):
            pass
seconds = {"processor": time.process_time() - start, "wall": time.perf_counter() - wall}
status = open("/proc/self/status").read().splitlines()  # getrusage would tell the parent's peak
peak = 1024 * int(next(line for line in status if line.startswith("VmHWM")).split()[1])
print(json.dumps(seconds | {"peak_bytes": peak}), file=sys.stderr)
"""


def make_folder(folder: Path, layers: int, rows: int, columns: int) -> None:
    """Scores of ``layers`` linear layers ``[rows, columns]``, uniform in [0, 1)."""
    generator = torch.Generator().manual_seed(0)
    with ScoreWriter(folder) as writer:
        for layer in range(layers):
            writer.add_layer(f"model.layers.{layer}.mlp.up_proj", torch.rand(rows, columns, generator=generator))
        writer.finish(
            method="magnitude",
            granularity="weight",
            num_samples=1,
            num_tokens=1,
            model={"pretrained": "random", "revision": None, "fingerprint": "sha256:00", "dtype": "float32"},
            data={"source": "none", "seed": 0, "sample_ids": ["none"]},
        )


def measure(folder: Path, words: list[str]) -> dict[str, float]:
    """Seconds and peak of a fresh process that prunes with ``words``, or only reads."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as place:
        output = ["--output", str(Path(place) / "plan.json")] if words else []
        child = [sys.executable, "-c", _CHILD, str(folder), *words, *output]
        run = subprocess.run(child, check=True, capture_output=True, text=True)
        plan = sum(path.stat().st_size for path in Path(place).iterdir())
    return json.loads(run.stderr.splitlines()[-1]) | {"plan_bytes": plan}


def main(words: list[str] | None = None) -> int:
    """Prints a row for each scope; 1 if a bound is not kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--scopes", nargs="+", choices=list(SCOPES), default=list(SCOPES))
    parser.add_argument("--repeats", type=int, default=3, help="the fastest counts (3)")
    parser.add_argument("--most-megabytes", type=float, default=700, help="bound of the resident set (700)")
    parser.add_argument("--folder", type=Path, help="where to put the scores (the default: the temporary folder)")
    parser.add_argument("--json", type=Path, help="keep the figures in this file")
    args = parser.parse_args(words)
    names = list(dict.fromkeys(["read", *args.scopes]))
    with tempfile.TemporaryDirectory(dir=args.folder) as place:
        folder = Path(place) / "scores"
        make_folder(folder, args.layers, args.rows, args.columns)
        size = sum(path.stat().st_size for path in folder.iterdir())
        runs = {name: [measure(folder, SCOPES[name]) for _ in range(args.repeats)] for name in names}
    best = {name: min(each, key=lambda run: run["wall"]) for name, each in runs.items()}
    peaks = {name: max(run["peak_bytes"] for run in each) for name, each in runs.items()}
    table = Table("scope", "wall s", "of reading", "processor s", "peak MB", "plan MB")
    for name, run in best.items():
        ratio = run["wall"] / best["read"]["wall"]
        cells = (run["wall"], ratio, run["processor"], peaks[name] / 1e6, run["plan_bytes"] / 1e6)
        table.add_row(name, *map("{:.2f}".format, cells))
    Console().print(table)
    facts = {
        "scores": f"{args.layers} x [{args.rows}, {args.columns}], {size / 1e9:.2f} GB",
        "hardware": hardware(),
        "load_average": round(os.getloadavg()[0], 2),
        "versions": versions(),
        "command": command_line(),
        "date": now(),
    }
    Console().print(*(f"{name}: {value}" for name, value in facts.items()), sep="\n")
    if args.json is not None:
        args.json.write_text(json.dumps(facts | {"results": runs}, indent=1) + "\n")
    is_slow = "row" in best and best["row"]["wall"] > 2 * best["read"]["wall"]
    return int(is_slow or max(peaks.values()) > 1e6 * args.most_megabytes)


if __name__ == "__main__":
    sys.exit(main())
