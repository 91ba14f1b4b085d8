"""Statistics against scipy, enumeration, closed forms and simulation."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats

from sparc3_pl.statistics.paired import (
    block_length,
    bootstrap_interval,
    mcnemar_p_value,
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


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (0, 1), (1, 7), (5, 5), (6, 5), (40, 21), (700, 610)])
def test_mcnemar_agrees_with_scipys_binomial_test(lost, won):
    before = np.array([1.0] * lost + [0.0] * won + [1.0] * 9 + [0.0] * 4)
    after = np.array([0.0] * lost + [1.0] * won + [1.0] * 9 + [0.0] * 4)
    want = scipy.stats.binomtest(lost, lost + won, 0.5).pvalue if lost + won else 1.0
    assert mcnemar_p_value(before, after) == pytest.approx(want, rel=1e-9)
    if 0 < lost + won <= 13:  # the sign-flip test counts all patterns then
        changed = (after - before)[: lost + won]
        assert sign_flip_p_value(changed) == pytest.approx(want)


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


def test_too_few_pairs_give_no_interval():
    for n in range(1, 12):
        found = paired_change(BEFORE[:n], AFTER[:n])
        assert (found.low is None, found.high is None) == (n < 6, n < 6)
        # what the interval could claim, the exact test can show: the smallest of its p-values is 2^(1 - n)
        assert (n >= 6) == (sign_flip_p_value(np.ones(n)) < 0.05)
        windows = ratio_change(BEFORE[:n], AFTER[:n], np.ones(n))
        assert (windows.low is None) == (n < 6)


def autoregressive(n, correlation, rng):
    values = np.zeros(n + 100)
    for t in range(1, n + 100):
        values[t] = correlation * values[t - 1] + rng.standard_normal()
    return values[100:]


def test_blocks_keep_the_dependence_of_neighbouring_windows():
    """The variance of a mean of n values of an AR(1) process is 1 / (1 - correlation)^2 / n, by its spectrum at 0."""
    rng, n, correlation = np.random.default_rng(1), 400, 0.6
    want = 2 * 1.96 / (1 - correlation) / math.sqrt(n)
    widths = {"blocks": [], "windows": []}
    for seed in range(20):
        difference = autoregressive(n, correlation, rng)
        found = ratio_change(np.zeros(n), difference, np.ones(n), num_resamples=1000, seed=seed)
        widths["blocks"].append(math.log(found.high) - math.log(found.low))
        low, high = bootstrap_interval(difference, num_resamples=1000, seed=seed)
        widths["windows"].append(high - low)
    assert np.mean(widths["blocks"]) == pytest.approx(want, rel=0.15)
    assert np.mean(widths["windows"]) < 0.6 * want


def test_p_values_of_dependent_windows_are_not_too_small():
    rng, wrong = np.random.default_rng(2), {"blocks": 0, "windows": 0}
    for _ in range(100):
        difference = autoregressive(120, 0.6, rng)
        found = ratio_change(np.zeros(120), difference, np.ones(120), num_resamples=300)
        wrong["blocks"] += found.p_value < 0.05
        wrong["windows"] += sign_flip_p_value(difference, num_resamples=300) < 0.05
    assert wrong["blocks"] <= 15 < 25 <= wrong["windows"]


def test_independent_windows_are_resampled_one_by_one():
    values = RNG.standard_normal(300)
    assert block_length(values) == 1
    found = ratio_change(np.zeros(300), values, np.ones(300))
    assert (math.log(found.low), math.log(found.high)) == pytest.approx(bootstrap_interval(values))
    assert (found.block, found.num_blocks) == (1, 300)


def test_blocks_are_as_long_as_windows_overlap():
    values = RNG.standard_normal(30)
    assert ratio_change(np.zeros(30), values, np.ones(30), overlap=4).block == 4
    few = ratio_change(np.zeros(30), values, np.ones(30), overlap=6)  # 5 blocks
    assert (few.low, few.high, few.num_blocks) == (None, None, 5)
    assert few.ratio == pytest.approx(math.exp(values.mean()))
    # every block's sum may have either sign: 2^5 patterns
    sums = values.reshape(5, 6).sum(1)
    signs = np.array(list(itertools.product((1, -1), repeat=5)))
    assert few.p_value == (np.abs(signs @ sums) >= abs(sums.sum()) - 1e-12).mean()


def test_a_block_of_all_windows_gives_the_mean_itself():
    values = RNG.standard_normal(8)
    assert bootstrap_interval(values, block=8) == pytest.approx((values.mean(), values.mean()))
