"""Intersections of selections: counts by hand, and permutations against exact sums."""

from itertools import combinations
from math import comb

import numpy as np
import pytest
import torch

from sparc3_pl.model.bitmask import BitMask
from sparc3_pl.selection.intersections import (
    exclusive_intersections,
    exclusive_intersections_of_masks,
    expected_common,
    hypergeometric_p,
    matched_draws,
    pairs_and_all,
    permutation_p,
    quadrants,
    strata_by_rank,
)


def test_exclusive_intersections_by_hand():
    found = exclusive_intersections({"a": {1, 2, 3}, "b": {2, 3, 4}, "c": {3, 9}})
    assert found == {
        frozenset("a"): 1,
        frozenset("ab"): 1,
        frozenset("abc"): 1,
        frozenset("b"): 1,
        frozenset("c"): 1,
    }


def test_strata_are_neighbours_of_one_layer():
    strata = strata_by_rank([np.array([5.0, 1, 4, 2, 3]), np.array([1.0, 2])], 2)
    assert strata.tolist() == [0, 2, 0, 1, 1, 3, 3]  # 5 and 4 together, 3 and 2, the weakest alone; the next layer


def test_draws_keep_every_stratum_and_are_random():
    rng = np.random.default_rng(0)
    strata = strata_by_rank([rng.random(60), rng.random(45)], 10)
    one, other = rng.choice(105, 20, replace=False), rng.choice(105, 7, replace=False)
    draws = list(matched_draws([one, other], strata, 4000))
    counts = np.zeros(105)
    for first, second in draws:
        assert np.bincount(strata[first], minlength=11).tolist() == np.bincount(strata[one], minlength=11).tolist()
        assert len(set(second)) == 7
        counts[first] += 1
    share = np.bincount(strata[one], minlength=11) / np.bincount(strata)
    assert np.abs(counts / 4000 - share[strata]).max() < 0.04  # each of a stratum as likely as the next


@pytest.mark.parametrize("number", [2, 3])
def test_expected_common_against_all_draws(number):
    """Two strata of 4 and 3; every possible draw, counted out."""
    strata = np.array([0, 0, 0, 0, 1, 1, 1])
    selections = [np.array([0, 1, 4]), np.array([1, 2, 5]), np.array([0, 3, 4])][:number]

    def every(chosen):
        parts = []
        for group in (0, 1):
            members = np.flatnonzero(strata == group)
            parts.append(list(combinations(members, int((strata[chosen] == group).sum()))))
        return [set(a) | set(b) for a in parts[0] for b in parts[1]]

    sizes = [
        len(set.intersection(*draw))
        for draw in np.array(np.meshgrid(*[every(c) for c in selections])).T.reshape(-1, number)
    ]
    assert expected_common(selections, strata) == pytest.approx(np.mean(sizes))
    drawn = [len(set.intersection(*map(set, draw))) for draw in matched_draws(selections, strata, 4000)]
    assert np.mean(drawn) == pytest.approx(np.mean(sizes), abs=0.05)


def test_permutation_p_against_the_hypergeometric_one():
    """With a single stratum the matched null is the blind one."""
    strata = np.zeros(50, dtype=np.int64)
    one, other = np.arange(10), np.arange(5, 17)
    drawn = [len(set(a) & set(b)) for a, b in matched_draws([one, other], strata, 4000)]
    exact = hypergeometric_p(5, 10, 12, 50)
    assert permutation_p(5, drawn) == pytest.approx(exact, abs=0.015)


def test_hypergeometric_p_by_counting():
    total = sum(comb(4, k) * comb(6, 3 - k) for k in (2, 3)) / comb(10, 3)
    assert hypergeometric_p(2, 4, 3, 10) == pytest.approx(total)
    assert permutation_p(3, [0, 1, 3, 5]) == 3 / 5


def test_quadrants_and_groups():
    found = quadrants(np.array([-1.0, -1, 1, 0]), np.array([-1.0, 1, -1, 0]))
    assert found == {"--": 0.25, "-+": 0.25, "+-": 0.25, "++": 0.25}
    assert pairs_and_all(["a", "b"]) == [("a", "b")]
    assert pairs_and_all(["a", "b", "c"]) == [("a", "b"), ("a", "c"), ("b", "c"), ("a", "b", "c")]


def test_exclusive_intersections_of_masks_are_those_of_sets():
    rng = np.random.default_rng(1)
    members = {name: {layer: rng.random(45) < 0.4 for layer in "pq"} for name in "abc"}
    del members["b"]["q"]  # a plan that leaves a layer alone
    masks = {
        name: {layer: BitMask.of(torch.from_numpy(flags)) for layer, flags in one.items()}
        for name, one in members.items()
    }
    sets = {
        name: {(layer, int(i)) for layer, flags in one.items() for i in np.flatnonzero(flags)}
        for name, one in members.items()
    }
    assert exclusive_intersections_of_masks(masks) == exclusive_intersections(sets)
