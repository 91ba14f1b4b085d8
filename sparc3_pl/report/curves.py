"""What is left of a model against the share that was removed: one line for each way to choose."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from sparc3_pl.document.blocks import NOTHING, Number, Numbers, Picture, Section, Table
from sparc3_pl.io.formats import Record, Unbounded

__all__ = ["Curve", "CurvePoint", "curve_sections", "curve_table"]


@dataclass(frozen=True)
class CurvePoint:
    """What was measured at one share.

    Attributes:
        share: Share of the weights (or neurons) that was removed, as asked for.
        values: One measured value for each calibration seed; infinity for a perplexity beyond any number.
    """

    share: float
    values: tuple[Unbounded, ...]

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return math.fsum(self.values) / len(self.values)

    @property
    def deviation(self) -> float | None:
        """Standard deviation over the seeds (n - 1); None for one seed, or where it is not finite."""
        if len(self.values) < 2 or not all(map(math.isfinite, self.values)):
            return None
        return statistics.stdev(self.values)


@dataclass(frozen=True)
class Curve:
    """One figure of an experiment against the share removed.

    Attributes:
        figure: What it is: ``perplexity``, or the name of a measurement and of its figure.
        dense: Its value for the model as it was.
        arms: The points of each arm with rising share, by its name.
    """

    figure: str
    dense: Unbounded
    arms: Mapping[str, tuple[CurvePoint, ...]]

    @property
    def shares(self) -> tuple[float, ...]:
        """All shares that occur, rising."""
        return tuple(sorted({point.share for points in self.arms.values() for point in points}))

    def to_json(self) -> Record:
        """The JSON object that an experiment's summary keeps: mean and deviation beside the values."""
        arms = {
            name: [
                {"share": p.share, "mean": p.mean, "deviation": p.deviation, "values": list(p.values)} for p in points
            ]
            for name, points in self.arms.items()
        }
        return {"figure": self.figure, "dense": self.dense, "arms": arms}


def curve_table(curve: Curve) -> Table:
    """A row for each arm, a column for each share: the mean over seeds and, of several, their deviation."""
    form = ".2f" if curve.figure == "perplexity" else ".3f"
    rows = [("dense", Number(curve.dense, form=form), *[None] * len(curve.shares), "")]
    seeds = 1
    for name, points in curve.arms.items():
        cells = {}
        for point in points:
            mean, deviation = Number(point.mean, form=form), point.deviation
            cells[point.share] = mean if deviation is None else Numbers("{} ± {}", (mean, Number(deviation, form=form)))
        count = max(len(point.values) for point in points)
        rows.append((name, None, *(cells.get(share) for share in curve.shares), str(count)))
        seeds = max(seeds, count)
    columns = ("arm", "0 %", *(f"{share:.3g}" if share < 0.001 else f"{100 * share:g} %" for share in curve.shares))
    note = "Columns: share removed." + (" ±: standard deviation over calibration seeds." if seeds > 1 else "")
    return Table.of((*columns, "seeds"), rows, title=curve.figure.replace("_", " "), note=note)


def curve_sections(experiments: Mapping[str, Sequence[Curve]]) -> Iterator[Section]:
    """A section for each experiment that removed growing shares: a figure and a table of everything measured."""
    for place, (name, curves) in enumerate(experiments.items()):
        blocks = []
        for number, curve in enumerate(curves):
            blocks += [_picture(curve, f"curve{place}-{number}"), curve_table(curve)]
        if blocks:
            title = "Against the share removed" + (f": {name}" if len(experiments) > 1 else "")
            yield Section(title, tuple(blocks))


def _picture(curve: Curve, picture: str) -> Picture:
    from sparc3_pl.document.figures import as_svg, sparsity_curves

    series = {
        name: [(p.share, p.mean, p.deviation) for p in points if math.isfinite(p.mean)]
        for name, points in curve.arms.items()
    }
    figure = curve.figure.replace("_", " ")
    figure_of_curves = sparsity_curves(series, curve.dense, figure, is_logarithmic=curve.figure == "perplexity")
    ends = [
        f"{name}: {points[-1].mean:.4g} at {points[-1].share:.0%}" if points else f"{name}: {NOTHING}"
        for name, points in curve.arms.items()
    ]
    alt = f"{figure} against the share removed. Dense: {curve.dense:.4g}. {'; '.join(ends)}."
    caption = f"{figure[:1].upper()}{figure[1:]} against the share removed; bars: deviation over calibration seeds."
    return Picture(as_svg(figure_of_curves, picture), alt, caption)
