"""``evidence`` for ``contrast=budget``: how well the derivative by the gains is known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev

import torch

from sparc3_pl.document.blocks import Checks, Section, Table, count, number, percent
from sparc3_pl.document.verdicts import Check, Status, grade, worst
from sparc3_pl.io.formats import Record
from sparc3_pl.selection.budget import Budget
from sparc3_pl.selection.contrast import SideScores
from sparc3_pl.selection.lowest import collect
from sparc3_pl.selection.stability import Unit, mean_scores_of, parts_of, units_of

__all__ = ["GainsEvidence", "KindEvidence", "gains_sections", "weigh_gains"]

FAR = 3.0
"""Size of a t-statistic that chance reaches for 27 components in ten thousand."""
CHANCE = math.erfc(FAR / math.sqrt(2))
ENOUGH_WARN, ENOUGH_FAIL = 3.0, 1.5
"""Ratio of the components with such a t to those that would have one by chance."""
HALVES_WARN, HALVES_FAIL = 0.1, 0.02
"""Cosine of the steps from two halves of the behaviour's samples; 0 by chance."""
_MORE = "score more completions"


@dataclass(frozen=True)
class KindEvidence:
    """How well the derivative by the gains is known for one kind of component.

    Attributes:
        components: Number of components.
        far: How many have a t of size 3 or more; None without squares of the behaviour's scores.
        expected: How many would have one by chance.
    """

    components: int
    far: int | None
    expected: float


@dataclass(frozen=True)
class GainsEvidence:
    """The result of ``evidence --contrast budget``.

    Attributes:
        kinds: The evidence on each kind of component, by its name.
        halves: Mean cosine of the steps from two halves of the behaviour's samples; None if there are no groups.
        spread: Standard deviation of that cosine over ways to halve the samples.
        whole: Cosine with the true step that all samples would then have, sqrt(2 r / (1 + r)) (Spearman-Brown).
        num_samples: Number of the behaviour's samples.
        checks: The verdicts.
    """

    kinds: dict[str, KindEvidence]
    halves: float | None
    spread: float | None
    whole: float | None
    num_samples: int
    checks: tuple[Check, ...]

    @property
    def verdict(self) -> Status:
        """The worst of all checks."""
        return worst(self.checks)

    def to_json(self) -> Record:
        """The content of the JSON file."""
        return {"verdict": self.verdict, "contrast": "budget"} | asdict(self)


def weigh_gains(
    general: SideScores, behaviour: SideScores, contrast: Budget | None = None, *, seed: int = 0
) -> GainsEvidence:
    """The measurements and verdicts, without opening, writing and printing.

    The steps of halves are taken before ``gains_range`` cuts them: so their cosine is 0 by chance.

    Args:
        general: Scores of general text.
        behaviour: The derivative by the gains.
        contrast: Its ridge, weights and ``off_diagonal`` count; None: the default.
        seed: Seed for the split halves.

    Raises:
        InputError: if the scores are not what ``contrast=budget`` needs.
    """
    contrast = contrast or Budget()
    contrast.require_comparable(general, behaviour)
    kinds = _kinds(behaviour)
    cosines = _halves(contrast, general, behaviour, seed)
    halves = fmean(cosines) if cosines else None
    checks = (_t_check(kinds), _halves_check(halves))
    return GainsEvidence(
        kinds=kinds,
        halves=halves,
        spread=stdev(cosines) if len(cosines) > 1 else None,
        whole=None if halves is None else math.sqrt(2 * halves / (1 + halves)) if halves > 0 else 0.0,
        num_samples=sum(folder.manifest.num_samples for folder in behaviour.folders),
        checks=checks,
    )


def _kinds(behaviour: SideScores) -> dict[str, KindEvidence]:
    has_squares = all(folder.manifest.squares and folder.manifest.num_samples > 1 for folder in behaviour.folders)
    blocks = collect(behaviour)
    result: dict[str, KindEvidence] = {}
    for layer, kind in behaviour.components.items():
        before = result.get(kind, KindEvidence(0, 0 if has_squares else None, 0.0))
        far = before.far
        if far is not None:
            start, stop = behaviour.span(layer)
            error = behaviour.squared_error(layer)[start:stop].sqrt()
            value = blocks[layer].values.double()
            far += int(((value.abs() >= FAR * error) & (value != 0)).sum())
        number_of = before.components + len(blocks[layer].values)
        result[kind] = KindEvidence(number_of, far, CHANCE * number_of)
    return result


def _halves(contrast: Budget, general: SideScores, behaviour: SideScores, seed: int) -> list[float]:
    """Cosines of the steps from two halves of the behaviour's samples, for several ways to halve them."""
    units = units_of(behaviour)
    pairs = parts_of(units, 2, len(units) // 2, 20, seed)
    step = contrast.free_steps(general, behaviour)

    def cosine(*halves: Sequence[Unit]) -> float:
        one, other = (step(mean_scores_of(half).scores) for half in halves)
        return float(torch.cosine_similarity(one, other, dim=0))

    return [cosine(one, other) for one, other in pairs]


def _t_check(kinds: dict[str, KindEvidence]) -> Check:
    name = "t of the derivatives"
    far = [one.far for one in kinds.values()]
    if any(value is None for value in far):
        return Check(name, "warn", "not measured: score the behaviour with model.squares: true and two or more samples")
    ratio = sum(far) / sum(one.expected for one in kinds.values())  # type: ignore[arg-type]
    status = grade(ratio, ENOUGH_WARN, ENOUGH_FAIL)
    text = f"{ratio:.1f} times as many components as by chance have |t| >= {FAR:g}"
    return Check(name, status, text if status == "pass" else f"{text}; {_MORE}, or kinds of component that say more")


def _halves_check(halves: float | None) -> Check:
    name = "split halves of the edit"
    if halves is None:
        return Check(name, "warn", "not measured: score the behaviour with model.groups: 8")
    status = grade(halves, HALVES_WARN, HALVES_FAIL)
    text = f"the steps from two halves of the samples have a cosine of {halves:.2f} (chance: 0)"
    return Check(name, status, text if status == "pass" else f"{text}; {_MORE}")


def gains_sections(result: GainsEvidence) -> list[Section]:
    """The tables and the verdicts."""
    rows = [
        (
            kind,
            count(one.components),
            count(one.far),
            number(one.expected, 3),
            percent(None if one.far is None else one.far / one.components, 2),
        )
        for kind, one in result.kinds.items()
    ]
    columns = ("kind", "components", f"|t| >= {FAR:g}", "by chance", "share")
    halves = [
        ("samples of the behaviour", count(result.num_samples)),
        ("cosine of the steps from two halves", number(result.halves, 3)),
        ("its standard deviation over ways to halve", number(result.spread, 2)),
        ("cosine of all samples' step with the true one, by that", number(result.whole, 3)),
    ]
    return [
        Section("Derivatives by the gains", (Table.of(columns, rows),)),
        Section("Stability of the edit", (Table.of(("", "budget"), halves),)),
        Section("Verdicts", (Checks(result.checks),)),
    ]
