import math

import pytest

from sparc3_pl.evaluation.repetition import Repetition, uniqueness


@pytest.mark.parametrize(("tokens", "ratio"), [([], 0.0), ([4], 1.0), ([4, 4, 4, 4], 0.25), ((1, 2, 1), 2 / 3)])
def test_uniqueness(tokens, ratio):
    assert uniqueness(tokens) == ratio


def test_mean_over_responses_the_empty_one_included():
    metric, other = Repetition(), Repetition()
    metric.update([[4, 4], []])
    other.update([[1, 2, 3]])
    metric.merge_state(other)
    assert float(metric.compute()) == pytest.approx((0.5 + 0 + 1) / 3)


def test_nothing_is_nan():
    metric = Repetition()
    metric.update([])
    assert math.isnan(float(metric.compute()))
