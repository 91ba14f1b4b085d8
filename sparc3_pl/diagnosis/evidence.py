"""The ``evidence`` command, for use before pruning: it tells whether samples suffice and a contrast is a stable one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any, Literal

import torch
from torch import Tensor

from sparc3_pl.diagnosis.gains_evidence import GainsEvidence, gains_sections, weigh_gains
from sparc3_pl.document.blocks import Block, Checks, Numbers, Picture, Section, Table, Text, count, number, percent
from sparc3_pl.document.publish import as_json, check_places, publish
from sparc3_pl.document.verdicts import Check, Status, grade, worst
from sparc3_pl.errors import InputError
from sparc3_pl.io.formats import Record
from sparc3_pl.scores.folder import ScoreFolder, require_comparable
from sparc3_pl.selection.budget import Budget
from sparc3_pl.selection.contrast import CONTRASTS, SideScores, format_warnings, share_of_strongest
from sparc3_pl.selection.contrast import contrast as contrast_of
from sparc3_pl.selection.stability import (
    SelectionSettings,
    WeighedContrast,
    chosen,
    null_against_null,
    null_against_selection,
    positions,
    split_half_overlaps,
    units_of,
)
from sparc3_pl.statistics.agreement import rank_correlation

__all__ = ["Evidence", "Significance", "Stability", "Strongest", "evidence", "evidence_sections", "weigh"]

STRONG_WARN, STRONG_FAIL = 0.2, 0.5
"""Share of the selection among the 5 % that general text uses most (by chance 5 %). A share of a half is the failure
that raised the perplexity of a published experiment 139-fold."""
TOTAL_WARN = 0.1
"""Difference of total relevance beyond which a raw difference is mostly one of scale."""
STABLE_WARN, STABLE_FAIL = 0.5, 0.2
"""Overlap of the selections from two halves of the samples."""
MARGIN_WARN, MARGIN_FAIL = 0.2, 0.05
"""Margin by which that overlap must exceed the overlap of null selections."""
SIGNIFICANT = 2.0
"""Size of a t-statistic that chance reaches for one neuron in twenty."""
EACH_WARN, EACH_FAIL = 0.8, 0.5
"""Share of the selection whose own t-statistic reaches it."""
_MORE = "score with more samples"
_GROUPS = "score with model.groups: 8"


@dataclass(frozen=True)
class Strongest:
    """Shares of a selection among the neurons that general text uses most.

    Attributes:
        top_1: Share of the selection among the strongest 1 %.
        top_5: Share of the selection among the strongest 5 %.
    """

    top_1: float
    top_5: float


@dataclass(frozen=True)
class Significance:
    """The t-statistics of the selected neurons, negative where the behaviour uses a neuron more.

    Attributes:
        median: Median.
        share: Share of the selection at or below -``SIGNIFICANT``.
    """

    median: float
    share: float


@dataclass(frozen=True)
class Stability:
    """Overlaps of selections from disjoint parts of the samples; None where there are too few folders to measure.

    Attributes:
        samples: Growing numbers of samples of one half of the behaviour set.
        halves: Mean overlap of the selections from two halves, for each of these numbers.
        spread: Standard deviation of the last overlap over ways to halve the samples.
        null: Mean overlap of two null selections.
        null_with_selection: Mean overlap of the selection with null selections.
        chance: Overlap of two draws from all neurons alike.
    """

    samples: tuple[float, ...]
    halves: tuple[float, ...]
    spread: float | None
    null: float | None
    null_with_selection: float | None
    chance: float


@dataclass(frozen=True)
class Evidence:
    """The result of ``evidence``.

    Attributes:
        num_neurons: Size of the selection.
        num_candidates: Number of neurons to choose from.
        contrast: Name of the contrast.
        totals: Total relevance on the general and on the behaviour's samples.
        total_t: Welch's t of the two totals over samples; None if the totals of the samples are unknown.
        correlation: Rank correlation of the contrast with general relevance; near -1, the contrast measures strength
            only.
        strongest: Share of the selection among the strongest neurons of the general set.
        relevance_share: Share of all general relevance that the selection holds.
        t: The t-statistics of the selected neurons; None without squares.
        stability: Overlaps of split halves and null selections.
        checks: The verdicts.
    """

    num_neurons: int
    num_candidates: int
    contrast: str
    totals: tuple[float, float]
    total_t: float | None
    correlation: float
    strongest: Strongest
    relevance_share: float
    t: Significance | None
    stability: Stability
    checks: tuple[Check, ...]

    @property
    def verdict(self) -> Status:
        """The worst of all checks."""
        return worst(self.checks)

    def to_json(self) -> Record:
        """The content of the JSON file."""
        strongest = {"0.01": self.strongest.top_1, "0.05": self.strongest.top_5}
        t = None if self.t is None else [self.t.median, self.t.share]
        return {"verdict": self.verdict} | asdict(self) | {"strongest": strongest, "t": t}


def evidence(
    general: list[str],
    behaviour: list[str],
    num_neurons: int | None = None,
    contrast: WeighedContrast | Literal["budget"] | dict[str, Any] = "difference",
    protect: float = 0.0,
    layers: list[str] | None = None,
    seed: int = 0,
    output: str | None = None,
    html: str | None = None,
    overwrite: bool = False,
) -> Evidence | GainsEvidence:
    """Check a contrast before pruning by it: enough samples, a stable selection, not just the strongest neurons.

    Takes the same arguments as prune. Score with --model.groups 8, so that selections from parts of the samples can be
    compared (or give several folders per side: two for split halves, four for the null), and with --model.squares true
    for t-statistics.

    Args:
        general: Score folders of general text, one per seed.
        behaviour: Score folders of the behaviour's samples, one per seed.
        num_neurons: Number of components that prune would choose; unset: 100 neurons, or of other components 10 % of
            those scored, at most 100.
        contrast: Contrast that prune would choose by. For budget, alone or with its arguments as
            "{class_path: budget, init_args: {off_diagonal: 0.5}}", the derivative itself is examined: whether more
            components than by chance have one, and whether two halves of the samples give the same edit.
        protect: Share of the strongest on general text that prune would leave alone.
        layers: Glob patterns of the layers to choose from.
        seed: Seed for the split halves.
        output: JSON file for the result.
        html: HTML page for the result.
        overwrite: Replace earlier files at output and html.

    Raises:
        InputError: If the scores cannot be compared or are not of neurons, or an output is taken.
    """
    check_places("evidence", output, html, overwrite)
    budget = CONTRASTS.make(contrast) if contrast == "budget" or isinstance(contrast, dict) else None
    if isinstance(contrast, dict) and not isinstance(budget, Budget):
        raise InputError(f"contrast={contrast}: arguments are for budget only; give the name alone")
    if budget is not None and (num_neurons is not None or protect):
        name = f"protect={protect}" if num_neurons is None else f"num_neurons={num_neurons}"
        raise InputError(f"{name} with contrast=budget: the derivative of every component is looked at; leave it out")
    sides = [[ScoreFolder.open(path) for path in paths] for paths in (general, behaviour)]
    scores = [SideScores.of(side, layers, but=["plan"]) for side in sides]  # weigh_gains and what follows check it
    result: Evidence | GainsEvidence
    if isinstance(budget, Budget):
        result = weigh_gains(*scores, budget, seed=seed)
        sections = gains_sections(result)
    else:
        assert not isinstance(contrast, dict)
        require_comparable([folder for side in sides for folder in side])
        size = usual_size(scores[0]) if num_neurons is None else num_neurons
        result = weigh(*scores, SelectionSettings(contrast, size, protect), seed=seed)
        sections = evidence_sections(result)
    json = as_json("evidence", result.to_json())
    title = "Evidence before pruning"
    publish(title, sections, json=json, output=output, html=html, overwrite=overwrite, verdict=result.verdict)
    return result


def usual_size(scores: SideScores) -> int:
    """Size of the selection if none is given. A model has thousands of neurons but few heads: not all may be chosen."""
    manifest = scores.folders[0].manifest
    names = scores.granularity.split("+")
    kinds = [
        kind for name, kind in zip(manifest.granularity.split("+"), manifest.components(), strict=True) if name in names
    ]
    usual = kinds[0].usual_selection if len(kinds) == 1 else None
    return usual or min(100, max(1, scores.count // 10))


def weigh(general: SideScores, behaviour: SideScores, settings: SelectionSettings, *, seed: int = 0) -> Evidence:
    """The measurements and verdicts of ``evidence``, without opening, writing and printing.

    Raises:
        InputError: if the scores are of weights, or there are too few neurons.
    """
    if general.holds_weights:
        raise InputError("evidence is for neuron scores; for weight scores see the warnings of prune")
    if not 0 < settings.num_neurons < general.count:
        raise InputError(f"num_neurons={settings.num_neurons}: give 1 or more, less than the {general.count} scored")
    by_layer = chosen(general, behaviour, settings)
    selection = positions(by_layer, general)
    g, b = (torch.cat([block.values.double() for block in side()]) for side in (general, behaviour))
    strongest = Strongest(*(share_of_strongest(by_layer, general, share) for share in (0.01, 0.05)))
    totals = (float(g.sum()), float(b.sum()))
    t = _t_of(general, behaviour, selection)
    stability = _stability(general, behaviour, selection, settings, seed)
    format_checks = [Check("format", "warn", text) for text in format_warnings(general.folders, behaviour.folders)]
    checks = (
        _strong_check(strongest),
        _total_check(totals, settings),
        *(format_checks or [Check("format", "pass", "samples of both sides have similar lengths and endings")]),
        _t_check(t),
        *_stability_checks(stability),
    )
    return Evidence(
        num_neurons=settings.num_neurons,
        num_candidates=general.count,
        contrast=settings.kind,
        totals=totals,
        total_t=_total_t(general.folders, behaviour.folders),
        correlation=rank_correlation(g - b, g),
        strongest=strongest,
        relevance_share=float(g[selection].abs().sum() / g.abs().sum()),
        t=t,
        stability=stability,
        checks=checks,
    )


def _total_t(general: Sequence[ScoreFolder], behaviour: Sequence[ScoreFolder]) -> float | None:
    """Welch's t of the samples' total relevance, general minus behaviour."""
    sides = [
        [sample.relevance for folder in folders for sample in folder.samples() if sample.relevance]
        for folders in (general, behaviour)
    ]
    if min(map(len, sides)) < 2:
        return None
    error = math.sqrt(sum(stdev(side) ** 2 / len(side) for side in sides))
    return (fmean(sides[0]) - fmean(sides[1])) / error if error else None


def _t_of(general: SideScores, behaviour: SideScores, selection: Tensor) -> Significance | None:
    """The significance of the selection's t-statistics; None without squares."""
    folders = (*general.folders, *behaviour.folders)
    if not all(folder.manifest.squares and folder.manifest.num_samples > 1 for folder in folders):
        return None
    t = torch.cat([block.values for block in contrast_of("t", general, behaviour)()])[selection].double()
    return Significance(float(t.median()), float((t <= -SIGNIFICANT).double().mean()))


def _stability(
    general: SideScores, behaviour: SideScores, selection: Tensor, settings: SelectionSettings, seed: int
) -> Stability:
    units, units_behaviour = units_of(general), units_of(behaviour)
    sizes = range(1, len(units_behaviour) // 2 + 1) if len(units) > 1 else ()
    each = sum(max(1, folder.manifest.num_samples) for folder in behaviour.folders) / len(units_behaviour)
    overlaps = [split_half_overlaps(units, units_behaviour, settings, size, seed=seed) for size in sizes]
    null = null_against_null(units, settings, seed=seed)
    null_with_selection = null_against_selection(units, selection, settings, seed=seed)
    return Stability(
        samples=tuple(size * each for size in sizes),
        halves=tuple(map(fmean, overlaps)),
        spread=stdev(overlaps[-1]) if overlaps and len(overlaps[-1]) > 1 else None,
        null=fmean(null) if null else None,
        null_with_selection=fmean(null_with_selection) if null_with_selection else None,
        chance=settings.num_neurons / general.count,
    )


# --- verdicts ---------------------------------------------------------------------------------------------------------


def _strong_check(strongest: Strongest) -> Check:
    status = grade(strongest.top_5, STRONG_WARN, STRONG_FAIL)
    text = (
        f"{percent(strongest.top_5, 0)} of the selection is among the 5 % that general text uses most, "
        f"{percent(strongest.top_1, 0)} among the 1 % (chance: 5 and 1 %)"
    )
    advice = "" if status == "pass" else "; the edit would harm the model: give protect=0.05, or contrast=rank"
    return Check("strongest neurons", status, text + advice)


def _total_check(totals: tuple[float, float], settings: SelectionSettings) -> Check:
    change = (totals[1] - totals[0]) / abs(totals[0]) if totals[0] else math.nan
    text = f"the behaviour's total relevance differs by {100 * change:+.1f} % from general text's"
    if settings.kind == "difference" and not abs(change) <= TOTAL_WARN:
        return Check("totals", "warn", f"{text}: a raw difference measures this too; try contrast=normalized")
    return Check("totals", "pass", text)


def _t_check(t: Significance | None) -> Check:
    name = "each neuron's t"
    if t is None:
        return Check(name, "warn", "not measured: score with model.squares: true and two or more samples")
    status = grade(t.share, EACH_WARN, EACH_FAIL)
    text = f"{percent(t.share, 0)} of the selection has t <= -{SIGNIFICANT:g}, the median is {t.median:.1f}"
    return Check(name, status, text if status == "pass" else f"{text}; {_MORE}, or choose by contrast=t")


def _stability_checks(result: Stability) -> Iterator[Check]:
    if not result.halves:
        yield Check("split halves", "warn", f"not measured: {_GROUPS}, or give two folders per side")
    else:
        status = grade(result.halves[-1], STABLE_WARN, STABLE_FAIL)
        text = f"{percent(result.halves[-1], 0)} of a selection is chosen again from the other half of the samples"
        yield Check("split halves", status, text if status == "pass" else f"{text}; {_MORE}")
    if result.null is None:
        yield Check("null contrast", "warn", f"not measured: {_GROUPS}, or give four general folders")
    elif result.halves:
        margin = result.halves[-1] - result.null
        status = grade(margin, MARGIN_WARN, MARGIN_FAIL)
        text = f"two null selections (general against general) share {percent(result.null, 0)}, {100 * margin:.0f} less"
        text = f"{text} than two of the behaviour"
        yield Check("null contrast", status, text if status == "pass" else f"{text}; {_MORE}, or another contrast")
    if result.null_with_selection is not None:
        share = result.null_with_selection
        status = grade(share, 0.2, 0.5)
        chance = percent(result.chance, 1)
        text = f"a null contrast would choose {percent(share, 0)} of the selection too (chance {chance})"
        yield Check("selection against null", status, text)


# --- sections ---------------------------------------------------------------------------------------------------------


def evidence_sections(result: Evidence) -> list[Section]:
    """The sections on the contrast, the stability of the selection, and the verdicts."""
    general, behaviour = result.totals
    rows = [
        ("neurons to choose", Numbers("{} of {}", (count(result.num_neurons), count(result.num_candidates)))),
        ("total relevance, general text", number(general, 6)),
        ("total relevance, behaviour", number(behaviour, 6)),
        ("t of the totals", number(result.total_t, 3)),
        ("rank correlation of the difference with general relevance", number(result.correlation, 3)),
        ("share of the selection in the strongest 1 %", percent(result.strongest.top_1)),
        ("share of the selection in the strongest 5 %", percent(result.strongest.top_5)),
        ("general relevance that the selection holds", percent(result.relevance_share, 2)),
        ("median t of the selection", number(None if result.t is None else result.t.median, 3)),
    ]
    sections = [Section("Contrast", (Table.of(("", result.contrast), rows),))]
    stability = tuple(_stability_blocks(result.stability))
    if stability:
        sections.append(Section("Stability of the selection", stability))
    return [*sections, Section("Verdicts", (Checks(result.checks),))]


def _stability_blocks(result: Stability) -> Iterator[Block]:
    rows = [(f"{n:.0f} samples per half", percent(v)) for n, v in zip(result.samples, result.halves, strict=True)]
    rows += [("two null selections", percent(result.null)), ("null and selection", percent(result.null_with_selection))]
    rows += [("any two draws", percent(result.chance))]
    yield Table.of(("selections from", "overlap"), rows)
    if len(result.halves) > 1:
        from sparc3_pl.document.figures import as_svg, curves

        lines = {"two halves": result.halves, "chance": (result.chance,)}
        lines |= {"null": (result.null,)} if result.null is not None else {}
        figure = curves(result.samples, lines, "behaviour samples of one half", "overlap of two selections")
        words = ", ".join(f"{percent(v, 0)} at {n:.0f}" for n, v in zip(result.samples, result.halves, strict=True))
        alt = f"Overlap of selections from two halves, by samples of a half: {words}; null {percent(result.null, 0)}."
        yield Picture(as_svg(figure, "stability"), alt, "If the curve still rises, more samples would help.")
    elif not result.halves:
        yield Text(f"To measure split halves, {_GROUPS}, or give two folders with different seeds per side.")
