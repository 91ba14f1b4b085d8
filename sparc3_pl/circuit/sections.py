"""The tables and texts of a circuit run, for the terminal and for a report."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from sparc3_pl.circuit.curves import FAITHFUL, Point
from sparc3_pl.circuit.results import ArmResult, CircuitResults
from sparc3_pl.document.blocks import (
    Block,
    Number,
    Numbers,
    Picture,
    Section,
    Table,
    Text,
    count,
    number,
    p_value,
    percent,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["circuit_blocks", "circuit_sections", "circuit_story", "curves_figure"]

_SHOWN_OVERLAP = 0.05
"""Size of the circuits whose overlaps and stability are shown: the measured one that is nearest."""


def circuit_sections(results: CircuitResults) -> list[Section]:
    """The sections that the command prints."""
    return [
        Section("Task", tuple(_task(results))),
        Section("Circuits", tuple(_circuits(results))),
        Section("Agreement", tuple(_agreement(results))),
    ]


def circuit_blocks(results: CircuitResults, name: str) -> Iterator[Block]:
    """The blocks of a circuit run for a report; ``name`` tells its figures from others'."""
    from sparc3_pl.document.figures import as_svg

    yield from _task(results)
    yield from _circuits(results)
    if _has_shares(results):
        words = "; ".join(_in_words(arm, title) for title, arm in results.arms.items())
        alt = f"Faithfulness by size of the circuit, a line for each method. {words}."
        caption = "Left: only the circuit stays. Right: the circuit is removed. Bands: 95 % intervals."
        yield Picture(as_svg(curves_figure(results), f"circuit-{name}"), alt, caption)
    yield from _agreement(results)


def circuit_story(results: CircuitResults, name: str) -> Iterator[str]:
    """The summary for a reader in a hurry: the smallest circuit of each method, and the warnings."""
    if _has_shares(results):
        words = "; ".join(_in_words(arm, title) for title, arm in results.arms.items())
        yield f"Circuits of {name}, of {results.components.total:,} components, by faithfulness: {words}."
    yield from (f"{name}: {warning}." for warning in results.warnings)


def _has_shares(results: CircuitResults) -> bool:
    """Whether the faithfulness of every arm is known."""
    return all(arm.cpr is not None for arm in results.arms.values())


def _in_words(arm: ArmResult, name: str) -> str:
    if arm.smallest is None:
        return f"{name} reaches {FAITHFUL:g} at no measured size"
    return f"{name} reaches {FAITHFUL:g} at {arm.smallest.kept} components"


def _task(results: CircuitResults) -> Iterator[Block]:
    kinds = " and ".join(f"{total:,} of kind {kind}" for kind, total in results.components.counts.items())
    ablation = " ".join([results.ablation["kind"], *(f"{k}={v}" for k, v in results.ablation.items() if k != "kind")])
    tests, sets = results.pairs.test, results.pairs.discovery
    yield Text(
        f"{results.model.pretrained}, {tests['source']}: {len(tests['sample_ids'])} test pairs, {len(sets)} x "
        f"{len(sets[0]['sample_ids'])} discovery pairs; components: {kinds}; ablation: {ablation}."
    )
    rows = [
        (
            title,
            _with_ends(level.logit_difference, level.logit_difference_low, level.logit_difference_high, ".2f"),
            _with_ends(100 * level.accuracy, 100 * level.accuracy_low, 100 * level.accuracy_high, ".1f"),
            _with_ends(100 * level.first, 100 * level.first_low, 100 * level.first_high, ".1f"),
        )
        for title, level in (("model as it is", results.full), ("every component ablated", results.empty))
    ]
    columns = ("", "logit difference", "answer above foil, %", "answer first of all, %")
    yield Table.of(columns, rows, note="In brackets: 95 % intervals over test pairs.")
    yield from (Text(f"{warning[0].upper()}{warning[1:]}.") for warning in results.warnings)


def _with_ends(value: float | None, low: float | None, high: float | None, form: str) -> Number | Numbers:
    if value is None or low is None or high is None:
        return Number(None)
    return Numbers("{} ({} .. {})", tuple(Number(one, form=form) for one in (value, low, high)))


def _circuits(results: CircuitResults) -> Iterator[Block]:
    if _has_shares(results):
        yield _areas(results)
    for title, kind, figure, form in (
        ("Only the circuit stays: faithfulness", "curve", "faithfulness", ".3f"),
        ("The same, circuits ranked by absolute score", "curve_absolute", "faithfulness", ".3f"),
        ("Only the circuit stays: logit difference", "curve", "logit_difference", ".2f"),
        ("Only the circuit stays: answer above foil, %", "curve", "accuracy", ".1f"),
        ("The circuit is removed: logit difference", "necessity", "logit_difference", ".2f"),
        ("The circuit is removed: answer above foil, %", "necessity", "accuracy", ".1f"),
    ):
        if figure == "faithfulness" and not _has_shares(results):
            continue
        curves: dict[str, list[Point]] = {
            _title(name, arm): points for name, arm in results.arms.items() if (points := getattr(arm, kind))
        }
        if not curves:
            continue
        scale = 100 if figure == "accuracy" else 1
        rows = [
            (name, *(Number(scale * getattr(point, figure), form=form) for point in points))
            for name, points in curves.items()
        ]
        fractions = [f"{point.fraction:g}" for point in next(iter(curves.values()))]
        yield Table.of(("method", *fractions), rows, title=title)


def _areas(results: CircuitResults) -> Table:
    rows = []
    for name, arm in results.arms.items():
        smallest, size = arm.smallest, Numbers("none measured", ())
        if smallest is not None:
            size = Numbers("{} ({})", (count(smallest.kept), percent(smallest.fraction)))
        cpr = _with_ends(arm.cpr, arm.cpr_low, arm.cpr_high, ".3f")
        rows.append((_title(name, arm), cpr, _with_ends(arm.cmd, arm.cmd_low, arm.cmd_high, ".3f"), size))
    columns = ("method", "CPR (higher is better)", "CMD (lower is better)", f"smallest with {FAITHFUL:g}")
    note = "Smallest: components of the smallest measured circuit with that faithfulness."
    if any(arm.draws for arm in results.arms.values()):
        note += " Random: mean and 95 % range over draws."
    return Table.of(columns, rows, note=note)


def _title(name: str, arm: ArmResult) -> str:
    return f"{name} ({arm.draws} draws)" if arm.draws else name


def _agreement(results: CircuitResults) -> Iterator[Block]:
    fractions = [point.fraction for point in next(iter(results.arms.values())).curve]
    fraction_shown = min(fractions, key=lambda fraction: abs(fraction - _SHOWN_OVERLAP))
    rows = []
    for name, arm in results.arms.items():
        for one in arm.stability:
            if one.fraction == fraction_shown and (one.resamples is not None or one.sets is not None):
                ends = _with_ends(one.resamples, one.resamples_low, one.resamples_high, ".2f")
                rows.append((name, ends, Number(one.sets, form=".2f")))
    if rows:
        yield Table.of(
            ("method", "resampled discovery pairs", "other sets of pairs"), rows,
            title=f"Jaccard index of the circuit of {fraction_shown:g} with those of other discovery pairs",
        )  # fmt: skip
    overlaps = [one for one in results.overlaps if one.fraction == fraction_shown]
    if overlaps:
        rows = [
            (" & ".join(o.arms), count(o.common), number(o.jaccard, 3), number(o.expected, 3), p_value(o.p_value))
            for o in overlaps
        ]
        yield Table.of(
            ("circuits", "common", "Jaccard", "matched null", "p"), rows, title=f"Circuits of {fraction_shown:g}",
            note="Matched null: mean over random circuits with as many components of each layer and strength.",
        )  # fmt: skip


def curves_figure(results: CircuitResults) -> Figure:
    """Faithfulness by size, of the circuit alone and of the model without it; logit differences where it is unknown."""
    from sparc3_pl.document.figures import Band, banded_curves

    is_known = all(point.faithfulness is not None for arm in results.arms.values() for point in arm.curve)

    def band(point: Point) -> Band:
        if is_known:
            return Band(point.fraction, point.faithfulness, point.low, point.high)  # type: ignore[arg-type]
        return Band(point.fraction, point.logit_difference, point.logit_difference_low, point.logit_difference_high)

    panels: dict[str, dict[str, Any]] = {
        "only the circuit stays": {name: [band(p) for p in arm.curve] for name, arm in results.arms.items()},
        "the circuit is removed": {name: [band(p) for p in arm.necessity] for name, arm in results.arms.items()},
    }
    marks = (0.0, 1.0) if is_known else (0.0,)
    return banded_curves(panels, "share of components", "faithfulness" if is_known else "logit difference", marks)
