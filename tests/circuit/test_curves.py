"""Faithfulness, areas and intervals, against loops in plain Python and a plain bootstrap."""

import numpy as np
import pytest

from sparc3_pl.circuit.curves import (
    FRACTIONS,
    Ends,
    areas,
    checked_fractions,
    curve,
    levels,
    mean_areas,
    mean_curve,
    num_kept,
    smallest_faithful,
    trapezoids,
)
from sparc3_pl.circuit.measure import Predictions
from sparc3_pl.errors import InputError

P = 30


def predictions_around(mean, seed):
    rng = np.random.default_rng(seed)
    return Predictions(mean + rng.normal(size=P), rng.random(P) < 0.5)


def example(fractions=FRACTIONS):
    ends = Ends(predictions_around(5.0, 0), predictions_around(0.5, 1), seed=3)
    return ends, [predictions_around(5 * fraction**0.3 + 0.4, 10 + i) for i, fraction in enumerate(fractions)]


def plain_bootstrap(figure, seed, times=10_000):
    """The 95 % percentile interval of a function of the drawn pairs, one draw after the other."""
    rng = np.random.default_rng(seed)
    values = [figure(rng.integers(P, size=P)) for _ in range(times)]
    return np.quantile(values, (0.025, 0.975))


def faithfulness(ends, one, picked=range(P)):
    full, empty, own = (sum(o.difference_P[i] for i in picked) / len(picked) for o in (ends.full, ends.empty, one))
    return (own - empty) / (full - empty)


def area_by_loop(fractions, values):
    total = 0.0
    for i in range(len(fractions) - 1):
        total += (fractions[i + 1] - fractions[i]) * (values[i] + values[i + 1]) / 2
    return total


def test_points_are_means_and_their_ends_a_plain_bootstrap():
    ends, predictions = example()
    points = curve(FRACTIONS, range(10), predictions, ends)
    for point, one in zip(points, predictions, strict=True):
        assert point.logit_difference == pytest.approx(sum(one.difference_P) / P)
        assert point.accuracy == sum(d > 0 for d in one.difference_P) / P
        assert point.first == pytest.approx(sum(one.first_P) / P)
        assert point.faithfulness == pytest.approx(faithfulness(ends, one))
    ratio = plain_bootstrap(lambda picked: faithfulness(ends, predictions[4], picked), seed=3, times=3000)
    assert (points[4].low, points[4].high) == pytest.approx(tuple(ratio), rel=0.03)  # fewer draws of the same sequence
    right = plain_bootstrap(lambda picked: np.mean(predictions[0].difference_P[picked] > 0), seed=4, times=3000)
    assert (points[0].accuracy_low, points[0].accuracy_high) == pytest.approx(tuple(right), abs=0.04)
    full, empty = levels(ends)
    assert (full.logit_difference, empty.first) == pytest.approx(
        (ends.full.difference_P.mean(), ends.empty.first_P.mean())
    )


def test_areas_equal_a_loop():
    ends, predictions = example()
    shares = [faithfulness(ends, one) for one in predictions]
    found = areas(FRACTIONS, predictions, ends)
    assert found["cpr"].value == pytest.approx(area_by_loop(FRACTIONS, shares))
    assert found["cmd"].value == pytest.approx(area_by_loop(FRACTIONS, [abs(1 - share) for share in shares]))
    drawn = plain_bootstrap(
        lambda picked: area_by_loop(FRACTIONS, [faithfulness(ends, o, picked) for o in predictions]), 3, 500
    )
    assert (found["cpr"].low, found["cpr"].high) == pytest.approx(tuple(drawn), abs=0.01)
    drawn = plain_bootstrap(
        lambda picked: area_by_loop(FRACTIONS, [abs(1 - faithfulness(ends, o, picked)) for o in predictions]), 3, 500
    )
    assert (found["cmd"].low, found["cmd"].high) == pytest.approx(tuple(drawn), abs=0.01)


def test_a_perfect_circuit_has_the_area_that_mib_counts():
    ends, _ = example()
    found = areas(FRACTIONS, [ends.full] * 10, ends)
    assert found["cpr"].value == pytest.approx(0.999)
    assert found["cmd"].value == pytest.approx(0)
    assert trapezoids((0.0, 1.0), np.array([0.0, 1.0])) == 0.5


@pytest.mark.parametrize("gap", [0.0, -3.0, 0.05])
def test_no_share_of_a_gap_that_is_noise(gap):
    ends = Ends(predictions_around(1.0 + gap, 0), predictions_around(1.0, 1))
    points = curve(FRACTIONS, range(10), [predictions_around(1.0, i) for i in range(10)], ends)
    assert not ends.gap.is_clear
    assert {(p.faithfulness, p.low, p.high) for p in points} == {(None, None, None)}
    assert all(p.logit_difference_low < p.logit_difference < p.logit_difference_high for p in points)
    assert areas(FRACTIONS, [ends.full] * 10, ends)["cpr"].value is None
    assert mean_areas(FRACTIONS, [[ends.full] * 10] * 3, ends)["cmd"].value is None
    assert smallest_faithful(points) is None


def test_draws_become_their_mean_and_band():
    ends, _ = example()
    draws = [[predictions_around(fraction, 100 * d + i) for i, fraction in enumerate(FRACTIONS)] for d in range(20)]
    points = mean_curve(FRACTIONS, range(10), draws, ends)
    each = sorted(faithfulness(ends, draw[3]) for draw in draws)
    assert points[3].faithfulness == pytest.approx(sum(each) / 20)
    assert each[0] <= points[3].low <= each[1] and each[-2] <= points[3].high <= each[-1]
    found = mean_areas(FRACTIONS, draws, ends)["cmd"]
    all_areas = [area_by_loop(FRACTIONS, [abs(1 - faithfulness(ends, o)) for o in draw]) for draw in draws]
    assert found.value == pytest.approx(sum(all_areas) / 20)
    assert min(all_areas) <= found.low < found.high <= max(all_areas)


def test_the_smallest_circuit_is_the_first_that_is_faithful():
    ends, _ = example()
    shares = [0.1, 0.95, 0.7, 0.92, 1.0]
    predictions = [Predictions(ends.empty.difference_P + share * ends.whole_P, ends.full.first_P) for share in shares]
    points = curve((0.1, 0.2, 0.3, 0.5, 1.0), (1, 2, 3, 5, 10), predictions, ends)
    assert smallest_faithful(points).kept == 2


@pytest.mark.parametrize("fractions", [[], [0.5], [0.2, 0.1], [0.0, 1.0], [0.5, 1.5], [0.5, float("nan")]])
def test_fractions_that_make_no_curve(fractions):
    with pytest.raises(InputError, match="give at least two, ascending"):
        checked_fractions(fractions)


def test_fractions_are_rounded_down():
    assert [num_kept(f, 270) for f in FRACTIONS] == [0, 0, 1, 2, 5, 13, 27, 54, 135, 270]
    assert num_kept(0.1, 30) == 3 and num_kept(0.7, 10) == 7


def test_fractions_of_no_component_and_of_equally_many_keep_their_place():
    """As MIB's own loop over its percentages: 0 components at 0.1 and at 0.2, all of them from 0.5 on."""
    ends, _ = example()
    found = areas((0.1, 0.2, 0.5, 1.0), [ends.empty, ends.empty, ends.full, ends.full], ends)
    assert found["cpr"].value == pytest.approx(0.1 * 0 + 0.3 / 2 + 0.5)
    assert found["cmd"].value == pytest.approx(0.1 * 1 + 0.3 / 2 + 0)
