"""The circuit folder: what each arm's circuits keep of a task, with the scores, figures and plans behind it.

```
circuit/
  results.json          the figures, where they come from, and the sha256 of every other file
  curve.csv             all curves in one table
  curves.svg            the figure
  config.yaml           the settings
  scores/ARM/           a score folder for each arm (ARM-0, ARM-1, ... for several sets of discovery pairs)
  importances/ARM/      importances.json: scores of heads and MLPs in the form that MIB's circuit track reads
  plans/                on request: circuits as plans
  tensorboard/          on request: the curves as events
```
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sparc3_pl.circuit.curves import Gap, Level, Point
from sparc3_pl.errors import InputError
from sparc3_pl.io.files import FolderKind, inside, read_json, sha256_of_file
from sparc3_pl.io.formats import Count, Format, Record
from sparc3_pl.model.identity import ModelRecord
from sparc3_pl.runtime.timing import Timing

__all__ = [
    "FORMAT",
    "KIND",
    "MARKER",
    "ArmResult",
    "CircuitResults",
    "ComponentCounts",
    "Overlap",
    "PairRecords",
    "Smallest",
    "Stability",
    "is_circuit",
    "open_circuit",
]

FORMAT_VERSION = 1
MARKER = "results.json"


@dataclass(frozen=True)
class Smallest:
    """The smallest circuit of a curve with a faithfulness of at least 0.9."""

    fraction: float
    kept: Count
    faithfulness: float


@dataclass(frozen=True)
class Stability:
    """How far circuits of one size agree when other discovery pairs choose them: Jaccard indices.

    Attributes:
        fraction: Size of the circuits.
        kept: Number of their components.
        resamples: Mean over bootstrap resamples of the discovery pairs, each against the circuit of all of them; None
            where it was not measured (single weights, one batch, a method without samples).
        resamples_low: The 2.5 % quantile of the resamples.
        resamples_high: The 97.5 % quantile.
        sets: Mean over every two sets of discovery pairs; None for one set.
    """

    fraction: float
    kept: Count
    resamples: float | None
    resamples_low: float | None
    resamples_high: float | None
    sets: float | None


@dataclass(frozen=True)
class ArmResult:
    """What the circuits of one method keep of the task.

    Attributes:
        method: Name or class path of the method.
        method_args: Arguments of the method.
        signed: Whether its scores have a sign.
        draws: Random circuits behind each figure; the ends of intervals are then quantiles over them. None: one
            ranking, and intervals over pairs.
        across_kinds: How unlike components compete: ``value`` (by their scores), ``share`` (by rank within their kind),
            ``row`` (single weights, by rank within their row).
        curve: The top k stay, ranked by score, and all others are ablated (sufficiency).
        curve_absolute: As ``curve``, ranked by the score's absolute value; None for scores without a sign, for which
            the two are the same.
        necessity: The top k, ranked by score, are ablated, and all others stay.
        cpr: Area under the faithfulness of ``curve``; None if faithfulness is not known.
        cpr_low: Lower end of its interval.
        cpr_high: Upper end.
        cmd: Area between 1 and the faithfulness of ``curve_absolute``, likewise.
        cmd_low: Lower end of its interval.
        cmd_high: Upper end.
        smallest: The smallest measured circuit that keeps 0.9 of the task.
        stability: One for each fraction.
    """

    method: str
    method_args: Record
    signed: bool
    draws: int | None
    across_kinds: str
    curve: list[Point]
    curve_absolute: list[Point] | None
    necessity: list[Point]
    cpr: float | None
    cpr_low: float | None
    cpr_high: float | None
    cmd: float | None
    cmd_low: float | None
    cmd_high: float | None
    smallest: Smallest | None
    stability: list[Stability]


@dataclass(frozen=True)
class Overlap:
    """What the circuits of two arms share.

    Attributes:
        arms: Names of the two arms.
        fraction: Size of the circuits.
        common: Components that are in both.
        jaccard: ``common`` over the number in either.
        expected: Mean of ``common`` over random circuits with as many components of each stratum.
        p_value: Probability that such circuits share as many, by permutation.
    """

    arms: list[str]
    fraction: float
    common: Count
    jaccard: float
    expected: float
    p_value: float


@dataclass(frozen=True)
class ComponentCounts:
    """The components that circuits are chosen from.

    Attributes:
        granularity: Names of the kinds.
        counts: Number of components of each kind.
        total: Number of all components.
        targets: Globs of their layers; None: the kinds' own choice.
        target: Name of the target.
    """

    granularity: list[str]
    counts: dict[str, Count]
    total: Count
    targets: list[str] | None
    target: str


@dataclass(frozen=True)
class PairRecords:
    """The sources and numbers of the pairs, as ``data`` in the manifest of a score folder.

    Attributes:
        discovery: A record of each set of discovery pairs.
        test: The record of the test pairs.
    """

    discovery: list[Record]
    test: Record


@dataclass(frozen=True)
class CircuitResults:
    """The content of ``results.json``.

    Attributes:
        arms: The arms by name.
        full: How the model does the task as it is.
        empty: How it does with every component ablated.
        gap: m(full) - m(empty): faithfulness is a share of it.
        warnings: What a reader of the figures must know.
        ablation: ``kind`` and its arguments.
        components: The components that circuits are chosen from.
        pairs: The pairs that circuits were chosen by and tested on.
        model: The model, as in a score folder's manifest.
        overlaps: What every two arms' circuits share, at each fraction.
        files: sha256 of the other files, by name.
        seconds: Seconds that the parts of the run took.
        timing: Where the time went until it was written, by what was done.
    """

    arms: dict[str, ArmResult]
    full: Level
    empty: Level
    gap: Gap
    warnings: list[str]
    ablation: Record
    components: ComponentCounts
    pairs: PairRecords
    model: ModelRecord
    overlaps: list[Overlap] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    timing: Timing = field(default_factory=Timing)
    versions: dict[str, str] = field(default_factory=dict)
    hardware: str | None = None
    command: str | None = None
    created: str | None = None


FORMAT = Format(CircuitResults, "a circuit's results", FORMAT_VERSION, "measure it again with `circuit`", sealed=True)


def is_circuit(marker: Path) -> bool:
    """Whether a file is the marker of a circuit folder; an evaluation's marker has the same name."""
    try:
        return {"format_version", "arms"} <= read_json(marker).keys()
    except InputError:
        return False


KIND = FolderKind("a circuit", MARKER, (), lambda results: results["files"], is_marker=is_circuit)


def open_circuit(path: str | Path) -> CircuitResults:
    """Reads a circuit folder and verifies its files.

    Raises:
        InputError: if it is not one, is of another version, or a file is missing or was changed.
    """
    path = Path(path)
    if not (path / MARKER).is_file():
        raise InputError(f"{path}: holds no {MARKER}; give a folder that `circuit` has written")
    results = FORMAT.read(path / MARKER)
    for name, digest in results.files.items():
        file = inside(path, name)
        if not file.is_file() or sha256_of_file(file) != digest:
            raise InputError(f"{file}: is missing or was changed; measure it again with `circuit`")
    return results


def rows_of(results: CircuitResults) -> list[Record]:
    """All curves as rows of one table: arm, curve, and the attributes of each point."""
    rows = []
    for name, arm in results.arms.items():
        curves: Mapping[str, list[Point] | None] = {
            "sufficiency": arm.curve,
            "sufficiency, by absolute score": arm.curve_absolute,
            "necessity": arm.necessity,
        }
        for kind, points in curves.items():
            rows += [{"arm": name, "curve": kind} | vars(point) for point in points or ()]
    return rows
