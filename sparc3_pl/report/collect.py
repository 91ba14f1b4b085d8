"""What lies in the folders that a report is made from: recognised by content, not by name or place."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparc3_pl.errors import InputError
from sparc3_pl.evaluation.results import Evaluation
from sparc3_pl.io.files import read_json, sha256_of_file
from sparc3_pl.io.provenance import redacted
from sparc3_pl.pruning.plan import PrunePlan
from sparc3_pl.scores.folder import ScoreFolder

__all__ = ["Found", "Plan", "collect", "distinct_names"]

_KINDS = ("audit", "doctor", "evidence", "overlap")


@dataclass(frozen=True)
class Plan:
    """A plan and the score folders that it was made from, as far as they are here."""

    plan: PrunePlan
    general: tuple[ScoreFolder, ...]
    behaviour: tuple[ScoreFolder, ...]

    @property
    def is_complete(self) -> bool:
        """Whether all of the scores that it was made from are here."""
        counts = [len(self.plan.scores.get(side) or ()) for side in ("general", "behaviour")]
        return counts == [len(self.general), len(self.behaviour)] and counts[0] > 0


@dataclass
class Found:
    """By name, in the order of the folders and, within one, of the alphabet.

    Attributes:
        scores: Score folders.
        plans: Plans.
        evaluations: Evaluation folders.
        comparisons: What ``compare`` wrote.
        experiments: What ``run`` concluded: ``outcomes`` and the bound of perplexity, ``max_perplexity_increase``.
        results: By kind (audit, doctor, evidence, overlap), what these commands wrote.
        configs: Resolved configurations of the passes, and the stages of an experiment.
    """

    scores: dict[str, ScoreFolder] = field(default_factory=dict)
    plans: dict[str, Plan] = field(default_factory=dict)
    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    comparisons: dict[str, dict[str, Any]] = field(default_factory=dict)
    experiments: dict[str, dict[str, Any]] = field(default_factory=dict)
    results: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    configs: dict[str, str] = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to tell."""
        return not (self.scores or self.plans or self.evaluations or self.comparisons or self.results)


def collect(paths: Sequence[str | Path], leave_out: Path | None = None) -> Found:
    """Opens and verifies everything that is known among ``paths`` and below them.

    Args:
        paths: Score and evaluation folders, plans, results in JSON, or folders that hold such.
        leave_out: A folder that is passed over: the report's own, from an earlier time.

    Raises:
        InputError: if a path is missing, something in it is damaged, or nothing is known.
    """
    places = dict.fromkeys(place for path in paths for place in _places(Path(path), leave_out))
    opened: dict[str, dict[Path, Any]] = {}
    for place in places:
        for kind, thing in _opened(place):
            opened.setdefault(kind, {})[place] = thing
    named = {kind: {distinct_names(list(things))[p]: t for p, t in things.items()} for kind, things in opened.items()}
    found = Found(**{kind: things for kind, things in named.items() if kind not in _KINDS})
    found.results = {kind: named[kind] for kind in _KINDS if kind in named}
    if found.is_empty:
        raise InputError(f"{', '.join(map(str, paths))}: no scores, plans, evaluations or comparisons in there")
    _join_plans(found)
    return found


def _places(path: Path, leave_out: Path | None) -> Iterator[Path]:
    """The results at or below ``path``: score and evaluation folders, and files."""
    if not path.exists():
        raise InputError(f"{path}: there is no such folder or file; check the path")
    if path.is_file():
        yield path
        return
    for folder, below, files in os.walk(path):
        here = Path(folder)
        below[:] = sorted(name for name in below if not name.startswith(".") and here / name != leave_out)
        if "results.json" in files or _is_scores(here):
            below.clear()
            yield here
        else:
            yield from (here / name for name in sorted(files) if name.endswith((".json", ".yaml")))


def _is_scores(folder: Path) -> bool:
    return (folder / "manifest.json").is_file()


def _opened(place: Path) -> Iterator[tuple[str, Any]]:
    """What ``place`` holds: the name of a field of ``Found`` (or a kind of result), and the thing itself."""
    if place.is_dir():
        yield ("scores", ScoreFolder.open(place)) if _is_scores(place) else ("evaluations", Evaluation.open(place))
        if (place / "config.yaml").is_file():
            yield "configs", redacted((place / "config.yaml").read_text(encoding="utf-8"))
    elif place.suffix == ".yaml":
        if place.parent.name == "stages":
            yield "configs", redacted(place.read_text(encoding="utf-8"))
    else:
        yield from _opened_json(place)


def _opened_json(place: Path) -> Iterator[tuple[str, Any]]:
    """A JSON file of ours; others (a model's config, an experiment's summary) are passed over."""
    if not place.read_bytes().lstrip().startswith(b"{"):
        return
    data = read_json(place)
    if {"neurons", "format_version", "model"} <= data.keys():
        yield "plans", Plan(PrunePlan.load(place), (), ())
    elif {"before", "after", "perplexity", "toxicity"} <= data.keys():
        yield "comparisons", data
    elif {"outcomes", "max_perplexity_increase"} <= data.keys():
        yield "experiments", data
    elif data.get("kind") in _KINDS:
        yield data["kind"], data


def _join_plans(found: Found) -> None:
    """Finds each plan's scores by the digest of their manifest."""
    digests = {sha256_of_file(folder.path / "manifest.json"): folder for folder in found.scores.values()}
    for name, entry in found.plans.items():
        sides = (
            tuple(digests[s["sha256"]] for s in entry.plan.scores.get(side) or () if s.get("sha256") in digests)
            for side in ("general", "behaviour")
        )
        found.plans[name] = Plan(entry.plan, *sides)


def distinct_names(paths: Sequence[Path]) -> dict[Path, str]:
    """Short names: the last parts of each path, as many as it takes to tell them all apart."""
    parts = {path: path.with_suffix("").resolve().parts if path.is_file() else path.resolve().parts for path in paths}
    for length in range(1, max((len(p) for p in parts.values()), default=1) + 1):
        names = {path: "/".join(p[-length:]) for path, p in parts.items()}
        if len(set(names.values())) == len(names):
            return names
    return {path: str(path) for path in paths}  # a file and a folder may differ in the ending only
