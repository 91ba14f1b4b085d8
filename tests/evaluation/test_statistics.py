"""Statistics against scipy, enumeration, closed forms and simulation."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats

from sparc3_pl.evaluation.statistics import (
    bootstrap_interval,
    paired_change,
    pairs_needed,
    ratio_change,
    sign_flip_p_value,
)

RNG = np.random.default_rng(7)
BEFORE = RNG.random(60)
AFTER = np.clip(BEFORE - 0.05 + 0.1 * RNG.standard_normal(60), 0, 1)


def test_interval_agrees_with_scipy():
    found = bootstrap_interval(AFTER - BEFORE, num_resamples=20_000)
    want = scipy.stats.bootstrap((AFTER - BEFORE,), np.mean, method="percentile", n_resamples=20_000, rng=1)
    assert found == pytest.approx(tuple(want.confidence_interval), abs=2e-3)


def test_interval_of_a_large_sample_is_the_normal_one():
    values = RNG.standard_normal(2000)
    half = 1.96 * values.std() / math.sqrt(2000)
    assert bootstrap_interval(values) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)


def test_weighted_interval_agrees_with_scipy():
    weights = RNG.integers(1, 9, 60).astype(float)
    found = bootstrap_interval(AFTER, weights, num_resamples=20_000)
    ratio = scipy.stats.bootstrap(
        (AFTER, weights),
        lambda a, w, axis: a.sum(axis) / w.sum(axis),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=20_000,
        rng=1,
    )
    assert found == pytest.approx(tuple(ratio.confidence_interval), rel=2e-2)


def test_p_value_of_few_pairs_is_exact():
    difference = np.array([0.3, -0.1, 0.2, 0.25, -0.05, 0.4])
    signs = list(itertools.product((1, -1), repeat=6))
    want = sum(abs(np.dot(s, difference)) >= difference.sum() - 1e-12 for s in signs) / 64
    assert sign_flip_p_value(difference) == want


def test_p_value_of_many_pairs_agrees_with_scipy():
    want = scipy.stats.permutation_test(
        (AFTER, BEFORE), lambda a, b, axis: (a - b).mean(axis), permutation_type="samples", n_resamples=20_000, rng=3
    ).pvalue
    assert sign_flip_p_value(AFTER - BEFORE, num_resamples=20_000) == pytest.approx(want, abs=5e-3)


def test_p_value_is_uniform_where_nothing_changes():
    values = [sign_flip_p_value(RNG.standard_normal(20), num_resamples=500, seed=i) for i in range(300)]
    assert np.mean(np.array(values) < 0.05) == pytest.approx(0.05, abs=0.035)


def test_no_change_at_all():
    found = paired_change(BEFORE, BEFORE.copy())
    assert (found.change, found.low, found.high, found.p_value) == (0, 0, 0, 1)
    assert (found.improved, found.worsened, found.unchanged) == (0, 0, 60)
    assert found.pairs_needed is None


def test_pairs_needed_has_the_power_it_promises():
    for change, deviation in ((-0.05, 0.2), (0.1, 0.15), (0.02, 0.3)):
        n = pairs_needed(change, deviation)
        effect, limit = abs(change) / deviation, scipy.stats.t.ppf(0.975, n - 1)
        power = scipy.stats.nct.sf(limit, n - 1, effect * math.sqrt(n))
        assert power == pytest.approx(0.8, abs=0.02)


def test_paired_change_counts_and_moments():
    found = paired_change(BEFORE, AFTER)
    difference = AFTER - BEFORE
    assert found.change == pytest.approx(AFTER.mean() - BEFORE.mean())
    assert found.relative_change == pytest.approx(AFTER.mean() / BEFORE.mean() - 1)
    assert (found.improved, found.worsened) == ((difference < 0).sum(), (difference > 0).sum())
    assert found.standard_deviation == pytest.approx(np.std(difference, ddof=1))
    assert found.low < found.change < found.high
    assert found == paired_change(BEFORE, AFTER)  # seeded


def test_one_pair_gives_no_p_value_below_one():
    found = paired_change(np.array([0.4]), np.array([0.1]))
    assert found.p_value == 1
    assert found.pairs_needed is None


def test_perplexity_ratio_and_its_interval():
    tokens = np.full(200, 50.0)
    before = 3.0 * tokens + RNG.standard_normal(200)
    after = before + 0.01 * tokens + 0.5 * RNG.standard_normal(200)
    found = ratio_change(before, after, tokens)
    assert found.before == pytest.approx(math.exp(before.sum() / tokens.sum()))
    assert found.ratio == pytest.approx(found.after / found.before)
    assert found.low < found.ratio < found.high
    half = 1.96 * (after - before).std() / 50 / math.sqrt(200)
    assert math.log(found.high) - math.log(found.ratio) == pytest.approx(half, rel=0.15)
    assert found.p_value < 0.001
    assert (found.num_windows, found.num_tokens) == (200, 10_000)


def test_a_ruined_model_gets_infinity_not_an_error():
    assert ratio_change(np.array([1.0, 1.0]), np.array([1e6, 1e6]), np.array([1.0, 1.0])).after == math.inf
