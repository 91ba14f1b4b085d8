"""Finds the inputs of a report in folders, by their content, not by name or place."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparc3_pl.circuit.results import KIND as CIRCUIT
from sparc3_pl.circuit.results import CircuitResults, is_circuit, open_circuit
from sparc3_pl.document.publish import result_kind
from sparc3_pl.document.verdicts import Check
from sparc3_pl.errors import InputError
from sparc3_pl.evaluation.compare import KIND as COMPARISON
from sparc3_pl.evaluation.compare import Comparison, ComparisonFile
from sparc3_pl.evaluation.results import KIND as EVALUATION
from sparc3_pl.evaluation.results import Evaluation
from sparc3_pl.io.files import FileKind, FolderKind, read_json, sha256_of_file
from sparc3_pl.io.formats import typed
from sparc3_pl.io.paths import distinct_names
from sparc3_pl.io.provenance import redacted
from sparc3_pl.pruning.plan import KIND as PLAN
from sparc3_pl.pruning.plan import PrunePlan
from sparc3_pl.report.curves import Curve
from sparc3_pl.scores.folder import ScoreFolder
from sparc3_pl.scores.manifest import KIND as SCORES

__all__ = ["EXPERIMENT", "Diagnosis", "ExperimentSummary", "Inputs", "MeasuredEdit", "PlanWithScores", "collect"]

EXPERIMENT = FileKind.json(
    "an experiment's summary", lambda data: {"outcomes", "max_perplexity_increase"} <= data.keys()
)
_DIAGNOSES = ("audit", "doctor", "evidence", "overlap")
"""The commands whose results are named by their kind."""
_FOLDERS: dict[str, tuple[FolderKind, Callable[[Path], Any]]] = {
    "scores": (SCORES, ScoreFolder.open),
    "circuits": (CIRCUIT, open_circuit),
    "evaluations": (EVALUATION, Evaluation.open),
}
"""The kind of folder behind each field of ``Inputs``, and how to open one."""
_FILES: dict[str, FileKind] = {
    "plans": PLAN,
    "comparisons": COMPARISON,
    "experiments": EXPERIMENT,
    **{name: result_kind(name) for name in _DIAGNOSES},
}
"""The kind of JSON file behind each field of ``Inputs`` or kind of diagnosis."""


@dataclass(frozen=True)
class PlanWithScores:
    """A plan and those of the score folders it was made from that are among the inputs."""

    plan: PrunePlan
    general: tuple[ScoreFolder, ...]
    behaviour: tuple[ScoreFolder, ...]

    @property
    def is_complete(self) -> bool:
        """Whether all scores that the plan was made from are among the inputs."""
        counts = [len(self.plan.scores.get(side) or ()) for side in ("general", "behaviour")]
        return counts == [len(self.general), len(self.behaviour)] and counts[0] > 0


@dataclass(frozen=True)
class MeasuredEdit:
    """An edit that an experiment has measured.

    Attributes:
        comparison: The comparison with the model as it was.
        arm: The arm that it belongs to; None: the experiment's own settings.
    """

    comparison: Comparison
    arm: str | None = None


@dataclass(frozen=True)
class ExperimentSummary:
    """What ``run`` says at its end, as far as a report tells it.

    Attributes:
        outcomes: The edits, in the order of the experiment.
        max_perplexity_increase: The rise of perplexity that it calls small: 0.01 is 1 %.
        curves: For compression, every figure against the share removed.
    """

    outcomes: list[MeasuredEdit]
    max_perplexity_increase: float
    curves: list[Curve] = field(default_factory=list)


@dataclass(frozen=True)
class Diagnosis:
    """What a diagnostic command says, as far as a report tells it."""

    checks: list[Check] = field(default_factory=list)


@dataclass
class Inputs:
    """The inputs of a report, by name, in the order of the folders and, within one, of the alphabet.

    Attributes:
        scores: Score folders.
        plans: Plans.
        evaluations: Evaluation folders.
        circuits: Circuit folders; scores and plans in them are theirs, and not listed.
        comparisons: Results of ``compare``.
        experiments: Summaries of ``run``.
        diagnoses: Verdicts of diagnostic commands, by kind (audit, doctor, evidence, overlap).
        configs: Resolved configurations of the passes, and the stages of an experiment.
    """

    scores: dict[str, ScoreFolder] = field(default_factory=dict)
    plans: dict[str, PlanWithScores] = field(default_factory=dict)
    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    circuits: dict[str, CircuitResults] = field(default_factory=dict)
    comparisons: dict[str, ComparisonFile] = field(default_factory=dict)
    experiments: dict[str, ExperimentSummary] = field(default_factory=dict)
    diagnoses: dict[str, dict[str, Diagnosis]] = field(default_factory=dict)
    configs: dict[str, str] = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to report."""
        kinds = (self.scores, self.plans, self.evaluations, self.circuits, self.comparisons, self.diagnoses)
        return not any(kinds)


def collect(paths: Sequence[str | Path], leave_out: Path | None = None) -> Inputs:
    """Opens and verifies all results at ``paths`` and below them.

    The bytes of score tensors are verified later, by whoever reads them.

    Args:
        paths: Score, evaluation and circuit folders, plans, results in JSON, or folders that hold such.
        leave_out: A folder that is passed over: that of an earlier report.

    Raises:
        InputError: if a path is missing, something in it is damaged, or it holds no results.
    """
    places = dict.fromkeys(place for path in paths for place in _places(Path(path), leave_out))
    contents: dict[str, dict[Path, Any]] = {}
    for place in places:
        for kind, content in _opened(place):
            contents.setdefault(kind, {})[place] = content
    by_name = {kind: {distinct_names(list(items))[p]: c for p, c in items.items()} for kind, items in contents.items()}
    diagnoses = {kind: by_name.pop(kind) for kind in _DIAGNOSES if kind in by_name}
    inputs = Inputs(**by_name, diagnoses=diagnoses)
    if inputs.is_empty:
        raise InputError(f"{', '.join(map(str, paths))}: no scores, plans, evaluations, circuits or comparisons there")
    _join_plans(inputs)
    return inputs


def _places(path: Path, leave_out: Path | None) -> Iterator[Path]:
    """The results at or below ``path``: score, evaluation and circuit folders, and files."""
    if not path.exists():
        raise InputError(f"{path}: there is no such folder or file; check the path")
    if path.is_file():
        yield path
        return
    for folder, below, files in os.walk(path):
        here = Path(folder)
        below[:] = sorted(name for name in below if not name.startswith(".") and here / name != leave_out)
        if any(kind.marker in files for kind, _ in _FOLDERS.values()):
            below.clear()
            yield here
        else:
            yield from (here / name for name in sorted(files) if name.endswith((".json", ".yaml")))


def _opened(place: Path) -> Iterator[tuple[str, Any]]:
    """The results in ``place``: for each the field of ``Inputs`` (or the kind of diagnosis), and its content.

    JSON files of other programs are passed over.
    """
    if place.is_dir():
        kind, open_folder = next(
            (name, opener)
            for name, (kind, opener) in _FOLDERS.items()
            if (place / kind.marker).is_file() and (kind is not CIRCUIT or is_circuit(place / kind.marker))
        )
        yield kind, open_folder(place)
        if (place / "config.yaml").is_file():
            yield "configs", redacted((place / "config.yaml").read_text(encoding="utf-8"))
    elif place.suffix == ".yaml":
        if place.parent.name == "stages":
            yield "configs", redacted(place.read_text(encoding="utf-8"))
    elif place.read_bytes().lstrip().startswith(b"{"):
        data = read_json(place)
        kind = next((name for name, kind in _FILES.items() if kind.is_content(data)), None)
        if kind == "plans":
            yield kind, PlanWithScores(PrunePlan.load(place), (), ())
        elif kind == "comparisons":
            yield kind, Comparison.read(data, place)
        elif kind == "experiments":
            yield kind, typed(ExperimentSummary, data, place, "run again")
        elif kind is not None:
            yield kind, typed(Diagnosis, data, place, f"{kind} again")


def _join_plans(inputs: Inputs) -> None:
    """Finds the scores of each plan by the digest of their manifest."""
    folders = {sha256_of_file(folder.path / SCORES.marker): folder for folder in inputs.scores.values()}
    for name, entry in inputs.plans.items():
        sides = (
            tuple(folders[s["sha256"]] for s in entry.plan.scores.get(side) or () if s.get("sha256") in folders)
            for side in ("general", "behaviour")
        )
        inputs.plans[name] = PlanWithScores(entry.plan, *sides)
