import math

import pytest

from sparc3_pl.evaluation.fluency import Fluency
from sparc3_pl.evaluation.repetition import uniqueness


@pytest.mark.parametrize(("tokens", "ratio"), [([], 0.0), ([4], 1.0), ([4, 4, 4, 4], 0.25), ((1, 2, 1), 2 / 3)])
def test_uniqueness(tokens, ratio):
    assert uniqueness(tokens) == ratio


def test_means_over_completions_the_empty_ones_included():
    metric, other = Fluency(), Fluency()
    metric.update([[4, 4], [], [7]], ["w w", "", " \n"])
    other.update([[1, 2, 3]], ["a b c"])
    metric.merge_state(other)
    want = {"uniqueness": (0.5 + 0 + 1 + 1) / 4, "length": (2 + 0 + 1 + 3) / 4, "empty": 2 / 4}
    assert metric.compute() == pytest.approx(want)


def test_nothing_is_nan():
    metric = Fluency()
    metric.update([], [])
    assert all(math.isnan(value) for value in metric.compute().values())
