r"""How much of a task a circuit keeps, as a function of its size. Pure functions of what was measured.

With m a mean over pairs of the logit difference, C_k the model that keeps the fraction k of its components, ``full``
the model as it is and ``empty`` the model that keeps none, faithfulness is

    f(k) = (m(C_k) - m(empty)) / (m(full) - m(empty)),

and over it CPR = \int f dk and CMD = \int |1 - f| dk, by trapezoids between the measured fractions (MIB: Mueller et
al., ICML 2025, section 3). Below the smallest fraction nothing is counted, so at MIB's fractions the best CPR of a
circuit that does no better than the model is 0.999.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from sparc3_pl.circuit.measure import Predictions
from sparc3_pl.errors import InputError
from sparc3_pl.statistics.paired import bootstrap_interval, bootstrap_ratios

__all__ = [
    "FAITHFUL",
    "FRACTIONS",
    "Area",
    "Ends",
    "Gap",
    "Level",
    "Point",
    "areas",
    "checked_fractions",
    "curve",
    "levels",
    "mean_areas",
    "mean_curve",
    "num_kept",
    "smallest_faithful",
    "trapezoids",
]

FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""The fractions at which MIB measures."""
FAITHFUL = 0.9
"""Faithfulness from which on a circuit counts as one that does the task."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Level:
    """How the model as it is, or with every component ablated, does the task; intervals are of 95 %, over pairs.

    Attributes:
        logit_difference: Mean logit difference.
        logit_difference_low: Lower end of its interval.
        logit_difference_high: Upper end.
        accuracy: Share of pairs whose answer has a larger logit than the foil.
        accuracy_low: Lower end of its interval.
        accuracy_high: Upper end.
        first: Share of pairs whose answer has the largest logit of the vocabulary.
        first_low: Lower end of its interval.
        first_high: Upper end.
    """

    logit_difference: float
    logit_difference_low: float
    logit_difference_high: float
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    first: float
    first_low: float
    first_high: float


@dataclass(frozen=True)
class Point(Level):
    """A point of a curve. Of random components the figures are means over the draws, and the ends quantiles of them.

    Attributes:
        fraction: Share of the components that are in the circuit.
        kept: Components that the measured model keeps.
        faithfulness: f of the measured model; None where the task's logit difference does not depend on the
            components (see ``Gap``).
        low: Lower end of its interval.
        high: Upper end.
    """

    fraction: float
    kept: int
    faithfulness: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Area:
    """An area over a curve, with its interval; None as for ``Point.faithfulness``."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Gap:
    """The difference of which faithfulness is a share: m(full) - m(empty).

    Attributes:
        value: The mean of the pairs' gaps.
        low: Lower end of its 95 % interval.
        high: Upper end.
    """

    value: float
    low: float
    high: float

    @property
    def is_clear(self) -> bool:
        """Whether the gap is above 0 beyond the pairs' noise. A share of anything else says nothing."""
        return self.low > 0


def checked_fractions(fractions: Sequence[float]) -> tuple[float, ...]:
    """The fractions, if a curve can be drawn over them.

    Raises:
        InputError: if they are not at least two, ascending, in (0, 1].
    """
    values = tuple(float(value) for value in fractions)
    in_order = all(one < two for one, two in itertools.pairwise(values))
    if len(values) < 2 or not in_order or not 0 < values[0] <= values[-1] <= 1:
        raise InputError(f"fractions={list(fractions)}: give at least two, ascending, above 0 and up to 1")
    return values


def num_kept(fraction: float, count: int) -> int:
    """How many of ``count`` components a fraction is, rounded down as MIB does (1e-9 of one apart)."""
    return int(fraction * count + 1e-9)


def trapezoids(fractions: Sequence[float], values: Floats) -> Floats:
    """The area under straight lines between points: over the last axis of ``[..., J]``."""
    x = np.asarray(fractions, dtype=np.float64)
    return ((values[..., 1:] + values[..., :-1]) / 2 * np.diff(x)).sum(-1)


@dataclass(frozen=True)
class Ends:
    """The two models that faithfulness is measured between.

    Attributes:
        full: Predictions of the model as it is.
        empty: Predictions with every component ablated.
        seed: Seed of all resampling of pairs.
    """

    full: Predictions
    empty: Predictions
    seed: int = 0

    @cached_property
    def gap(self) -> Gap:
        """m(full) - m(empty), with its interval."""
        gaps_P = self.whole_P
        return Gap(float(gaps_P.mean()), *bootstrap_interval(gaps_P, seed=self.seed))

    @property
    def whole_P(self) -> Floats:
        """Each pair's gap."""
        return self.full.difference_P - self.empty.difference_P


_FIGURES = ("logit_difference", "accuracy", "first", "faithfulness")


def _sums(predictions: Sequence[Predictions], ends: Ends) -> tuple[Floats, Floats]:
    """Values and weights of every pair, ``[P, 4, J]``: a figure is the sum of the values over that of the weights."""
    difference_PJ = np.stack([own.difference_P for own in predictions], 1)
    right_PJ, first_PJ = (np.stack([getattr(own, name) for own in predictions], 1) for name in ("right_P", "first_P"))
    values = np.stack([difference_PJ, right_PJ, first_PJ, difference_PJ - ends.empty.difference_P[:, None]], 1)
    weights = np.ones_like(values)
    if ends.gap.is_clear:
        weights[:, 3] = ends.whole_P[:, None]
    return values, weights


def _named(means_FJ: Floats, low_FJ: Floats, high_FJ: Floats, is_clear: bool) -> list[dict[str, float | None]]:
    """The figures of each of J models by the names that ``Point`` gives them."""
    rows = []
    for place in range(means_FJ.shape[1]):
        row: dict[str, float | None] = {}
        for number, name in enumerate(_FIGURES):
            ends = ("low", "high") if name == "faithfulness" else (f"{name}_low", f"{name}_high")
            values = (float(array[number, place]) for array in (means_FJ, low_FJ, high_FJ))
            is_known = name != "faithfulness" or is_clear
            row |= {key: value if is_known else None for key, value in zip((name, *ends), values, strict=True)}
        rows.append(row)
    return rows


def _measured(predictions: Sequence[Predictions], ends: Ends) -> list[dict[str, float | None]]:
    """The figures of each model, with 95 % intervals over pairs."""
    values, weights = _sums(predictions, ends)
    flat = (array.reshape(len(array), -1) for array in (values, weights))
    resamples = bootstrap_ratios(*flat, seed=ends.seed).reshape(-1, *values.shape[1:])
    return _named(values.sum(0) / weights.sum(0), *np.quantile(resamples, (0.025, 0.975), axis=0), ends.gap.is_clear)


def levels(ends: Ends) -> tuple[Level, Level]:
    """How the model does the task as it is, and with every component ablated."""
    names = {item.name for item in fields(Level)}
    rows = _measured([ends.full, ends.empty], ends)
    full, empty = (Level(**{name: value for name, value in row.items() if name in names}) for row in rows)
    return full, empty


def curve(
    fractions: Sequence[float], kept: Sequence[int], predictions: Sequence[Predictions], ends: Ends
) -> list[Point]:
    """The points of a curve. The interval of a faithfulness draws pairs for numerator and denominator together.

    Args:
        fractions: The J fractions.
        kept: Components that each measured model keeps.
        predictions: The predictions of each of them.
        ends: What faithfulness is measured between.
    """
    rows = _measured(predictions, ends)
    return [Point(fraction=f, kept=k, **row) for f, k, row in zip(fractions, kept, rows, strict=True)]


def mean_curve(
    fractions: Sequence[float], kept: Sequence[int], draws: Sequence[Sequence[Predictions]], ends: Ends
) -> list[Point]:
    """Several curves as one: the mean of each figure over the draws, and the 2.5 % and 97.5 % quantiles of them."""
    figures = []
    for predictions in draws:
        values, weights = _sums(predictions, ends)
        figures.append(values.sum(0) / weights.sum(0))
    rows = _named(np.mean(figures, 0), *np.quantile(figures, (0.025, 0.975), axis=0), ends.gap.is_clear)
    return [Point(fraction=f, kept=k, **row) for f, k, row in zip(fractions, kept, rows, strict=True)]


def areas(fractions: Sequence[float], predictions: Sequence[Predictions], ends: Ends) -> dict[str, Area]:
    """``cpr`` and ``cmd`` of a curve, with 95 % intervals over pairs: each resample draws a whole curve."""
    if not ends.gap.is_clear:
        return dict.fromkeys(_DISTANCES, Area(None, None, None))
    own_PJ, whole_PJ = (array[:, 3] for array in _sums(predictions, ends))
    draws_RJ, shares_J = bootstrap_ratios(own_PJ, whole_PJ, seed=ends.seed), own_PJ.sum(0) / whole_PJ.sum(0)
    result = {}
    for name, integrand in _DISTANCES.items():
        low, high = np.quantile(trapezoids(fractions, integrand(draws_RJ)), (0.025, 0.975))
        result[name] = Area(float(trapezoids(fractions, integrand(shares_J))), float(low), float(high))
    return result


def mean_areas(fractions: Sequence[float], draws: Sequence[Sequence[Predictions]], ends: Ends) -> dict[str, Area]:
    """The mean of the draws' areas, and their 2.5 % and 97.5 % quantiles."""
    if not ends.gap.is_clear:
        return dict.fromkeys(_DISTANCES, Area(None, None, None))
    sums = [_sums(predictions, ends) for predictions in draws]
    shares_DJ = np.stack([values[:, 3].sum(0) / weights[:, 3].sum(0) for values, weights in sums])
    each = {name: trapezoids(fractions, integrand(shares_DJ)) for name, integrand in _DISTANCES.items()}
    return {name: Area(float(v.mean()), *map(float, np.quantile(v, (0.025, 0.975)))) for name, v in each.items()}


_DISTANCES: dict[str, Callable[[Floats], Floats]] = {"cpr": lambda share: share, "cmd": lambda share: np.abs(1 - share)}


def smallest_faithful(points: Sequence[Point], least: float = FAITHFUL) -> Point | None:
    """The point of the smallest circuit, among those measured, that reaches a faithfulness; None: none does."""
    return next((p for p in points if p.faithfulness is not None and p.faithfulness >= least), None)
