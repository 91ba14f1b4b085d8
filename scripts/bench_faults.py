"""What each fault costs: seconds until every process has ended, what is lost, seconds until the run is whole again.

    python scripts/bench_faults.py [--samples 24]

Prints the table of docs/faults.md. Runs the embedded demo on the CPU, on forked processes (``tests/ranks.py``), every
batch slowed down by 0.2 s; times hold without the start of Python, which the first column of numbers names.
"""

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from ranks import Rank, Ranks

from sparc3_pl.io.provenance import hardware, now, versions
from sparc3_pl.scores.folder import ScoreFolder
from sparc3_pl.scores.partial import partial_folder
from sparc3_pl.scores.sums import SumsFile

SLOW = 0.2
STEP = "sparc3_pl.scoring.module:ScoringModule.predict_step"
FINISH = "sparc3_pl.scores.writer:ScoreWriter.finish"
PUBLISH = "sparc3_pl.scores.partial:put_in_place"


@dataclass
class Fault:
    """A fault to try: ``plant`` by rank (see ``ranks.inject``) or ``strike``, once some samples are saved."""

    name: str
    world: int
    every: int = 1
    plant: dict[int, str] | None = None
    strike: Callable[[Rank], None] | None = None


def family(signum: int) -> Callable[[Rank], None]:
    """Sends the signal to every rank, as Slurm does."""

    def strike(rank: Rank) -> None:
        for pid in rank.family():
            Rank(pid, rank.out).kill(signum)

    return strike


FAULTS = [
    Fault("`kill -9` of every process", 1, strike=family(signal.SIGKILL)),
    Fault("`kill -9` of every process", 4, strike=family(signal.SIGKILL)),
    Fault("`kill -9` of rank 0", 2, strike=lambda rank: rank.kill()),
    Fault("`kill -9` of rank 1", 2, strike=lambda rank: Rank(rank.family()[1], rank.out).kill()),
    Fault("SIGTERM to rank 0", 2, every=1000, strike=lambda rank: rank.kill(signal.SIGTERM)),
    Fault("SIGTERM to every process", 2, every=1000, strike=family(signal.SIGTERM)),
    Fault("rank 1 raises an exception", 2, plant={1: f"raise 3 {STEP}"}),
    Fault("rank 0 killed before its file of sums gets its name", 2, plant={0: f"kill 4 {PUBLISH}"}),
    Fault("rank 0 killed while the scores are written", 2, plant={0: f"kill 1 {FINISH}"}),
]


def words(output: Path, fault: Fault, samples: int) -> list[object]:
    """The command."""
    data = ["--data.num_samples", samples, "--data.seq_len", 32, "--trainer.devices", fault.world]
    quiet = ["--trainer.accelerator", "cpu", "--trainer.logger", "false", "--trainer.enable_progress_bar", "false"]
    return ["score", *data, *quiet, "--checkpoint_every", fault.every, "--output", output]


def saved(output: Path) -> int:
    """Samples whose sums are on the disk."""
    return sum(len(SumsFile(path).ids) for path in partial_folder(output).glob("*.safetensors"))


def alive(pid: int) -> bool:
    """Whether a process runs."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except FileNotFoundError:
        return False


def measure(ranks: Ranks, fault: Fault, folder: Path, whole: Path, samples: int) -> str:
    """A row of the table."""
    output = folder / f"{FAULTS.index(fault)}"
    plant = dict.fromkeys(range(fault.world), f"slow {SLOW}") if fault.strike else fault.plant
    (rank,) = ranks.start(words(output, fault, samples), fault.world, faults=plant, launcher=True)
    if fault.strike:
        while not (partial_folder(output) / "settings.json").exists() or (fault.every == 1 and saved(output) < 6):
            time.sleep(0.005)
        time.sleep(1.0)
        struck = time.time()
        fault.strike(rank)
    rank.wait()
    while any(alive(pid) for pid in rank.family()):
        time.sleep(0.005)
    ended = time.time() - (struck if fault.strike else rank.out.with_suffix(".fault").stat().st_mtime)
    assert not output.exists()
    kept, start = saved(output), time.monotonic()
    (again,) = ranks.run(words(output, fault, samples), 1)
    recovery = time.monotonic() - start
    assert again.code == 0, again.text()
    one, other = ScoreFolder.open(output), ScoreFolder.open(whole)
    assert one.manifest.data["sample_ids"] == other.manifest.data["sample_ids"]
    error = max(float(((one.load(n) - other.load(n)).abs() / other.load(n)).max()) for n in one.layers)
    cells = (
        fault.name,
        fault.world,
        rank.code,
        f"{ended:.1f}",
        f"{kept} of {samples}",
        f"{recovery:.1f}",
        f"{error:.0e}",
    )
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=24)
    samples = parser.parse_args().samples
    with tempfile.TemporaryDirectory() as name, Ranks(Path(name)) as ranks:
        folder = Path(name)
        start = time.monotonic()
        (first,) = ranks.run(words(folder / "whole", FAULTS[0], samples), 1)
        assert first.code == 0, first.text()
        print(f"{now()}, {hardware()}, torch {versions()['torch']}; first run {time.monotonic() - start:.1f} s\n")
        print("| fault | processes | exit code | all ended after (s) | kept | the rest took (s) | difference |")
        print("|---|---|---|---|---|---|---|")
        for fault in FAULTS:
            print(measure(ranks, fault, folder, folder / "whole", samples), flush=True)


if __name__ == "__main__":
    main()
