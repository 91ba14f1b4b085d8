"""Paired comparison of two evaluations: intervals, p-values and the sample size an effect needs.

Every function is pure and seeded; n is the number of pairs (prompts, or text windows).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "PairedChange",
    "RatioChange",
    "bootstrap_interval",
    "paired_change",
    "pairs_needed",
    "ratio_change",
    "sign_flip_p_value",
]

Floats = NDArray[np.float64]

NUM_RESAMPLES = 10_000
_EXACT_PAIRS = 13
"""Up to this many pairs all 2^n sign patterns (8192) are tried, so that the p-value is exact."""
_CELLS = 1 << 22
"""Resampled values held at a time (32 MB)."""


@dataclass(frozen=True)
class PairedChange:
    """How a mean changed between two measurements of the same n units.

    Attributes:
        before: Mean before.
        after: Mean after.
        change: after - before.
        relative_change: change / before; None if before is 0.
        low: Lower end of the 95 % bootstrap interval of ``change``.
        high: Upper end.
        p_value: Two-sided sign-flip permutation test of "no change".
        improved: Units with a better value after.
        worsened: Units with a worse value after.
        unchanged: Units with equal values.
        num_pairs: n.
        standard_deviation: Of the n differences (n - 1 in the denominator).
        pairs_needed: Pairs with which a change of this size would be found with 80 % power; None for no change.
    """

    before: float
    after: float
    change: float
    relative_change: float | None
    low: float
    high: float
    p_value: float
    improved: int
    worsened: int
    unchanged: int
    num_pairs: int
    standard_deviation: float
    pairs_needed: int | None


@dataclass(frozen=True)
class RatioChange:
    """How perplexity changed on the same windows.

    Attributes:
        before: Perplexity before.
        after: Perplexity after.
        ratio: after / before.
        low: Lower end of the 95 % bootstrap interval of ``ratio``, windows resampled.
        high: Upper end.
        p_value: Two-sided sign-flip permutation test on the windows' changes of negative log-likelihood.
        num_windows: Number of windows.
        num_tokens: Number of scored tokens.
    """

    before: float
    after: float
    ratio: float
    low: float
    high: float
    p_value: float
    num_windows: int
    num_tokens: int


def _chunks(total: int, width: int) -> Iterator[int]:
    """Split ``total`` resamples of ``width`` values into pieces that fit in memory."""
    size = max(1, _CELLS // max(1, width))
    yield from (min(size, total - start) for start in range(0, total, size))


def bootstrap_interval(
    values: Floats, weights: Floats | None = None, *, seed: int = 0, num_resamples: int = NUM_RESAMPLES
) -> tuple[float, float]:
    """95 % percentile bootstrap interval of sum(values) / sum(weights), units resampled with replacement.

    With weights of 1 (the default) this is the interval of the mean. Efron & Tibshirani 1993, section 13.3.
    """
    rng = np.random.default_rng(seed)
    weights = np.ones_like(values) if weights is None else weights
    n = len(values)
    means = []
    for size in _chunks(num_resamples, n):
        picked = rng.integers(n, size=(size, n))
        means.append(values[picked].sum(1) / weights[picked].sum(1))
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
    return float(low), float(high)


def sign_flip_p_value(differences: Floats, *, seed: int = 0, num_resamples: int = NUM_RESAMPLES) -> float:
    """Two-sided p-value of the paired permutation test: under "no change" each difference may have either sign.

    Exact (all 2^n patterns) for n <= 13; otherwise (1 + b) / (1 + m) with b of m random patterns at least as extreme
    (Phipson & Smyth 2010), so that it is never 0.
    """
    n = len(differences)
    observed = abs(differences.sum()) * (1 - 1e-12)  # rounding must not make equal sums unequal
    if n <= _EXACT_PAIRS:
        signs = 1.0 - 2.0 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
        return float((np.abs(signs @ differences) >= observed).mean())
    rng = np.random.default_rng(seed)
    extreme = 0
    for size in _chunks(num_resamples, n):
        signs = rng.integers(0, 2, size=(size, n), dtype=np.int8) * 2.0 - 1.0
        extreme += int((np.abs(signs @ differences) >= observed).sum())
    return (1 + extreme) / (1 + num_resamples)


def pairs_needed(change: float, standard_deviation: float, *, power: float = 0.8, alpha: float = 0.05) -> int | None:
    """Pairs needed to find a mean change with a two-sided paired t test.

    n = ((z_(1-alpha/2) + z_power) / d)^2 + z_(1-alpha/2)^2 / 2 with d = |change| / standard deviation (Guenther 1981:
    the normal formula with the correction for an estimated deviation), at least 2. None if there is no change.
    """
    from scipy.stats import norm

    if change == 0 or not math.isfinite(change) or not math.isfinite(standard_deviation):
        return None
    z_alpha, z_power = norm.ppf(1 - alpha / 2), norm.ppf(power)
    effect = abs(change) / standard_deviation if standard_deviation > 0 else math.inf
    return max(2, math.ceil(((z_alpha + z_power) / effect) ** 2 + z_alpha**2 / 2))


def _exp(value: float) -> float:
    """``exp`` that overflows to infinity: a model that is badly broken still gets its figures."""
    return math.exp(value) if value < 709 else math.inf


def paired_change(
    before: Floats,
    after: Floats,
    *,
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
    lower_is_better: bool = True,
) -> PairedChange:
    """Compare two measurements of the same units.

    Args:
        before: ``[n]``, one value a unit.
        after: ``[n]``, in the same order.
        seed: Of the resampling.
        num_resamples: Resamples of the interval and of the test.
        lower_is_better: Which direction counts as improved.
    """
    assert before.shape == after.shape == (max(1, before.size),), "one value a unit on both sides"
    difference = after - before
    low, high = bootstrap_interval(difference, seed=seed, num_resamples=num_resamples)
    change, mean = float(difference.mean()), float(before.mean())
    fewer, more = int((difference < 0).sum()), int((difference > 0).sum())
    deviation = float(difference.std(ddof=1)) if len(difference) > 1 else math.nan
    return PairedChange(
        before=mean,
        after=float(after.mean()),
        change=change,
        relative_change=change / mean if mean else None,
        low=low,
        high=high,
        p_value=sign_flip_p_value(difference, seed=seed, num_resamples=num_resamples),
        improved=fewer if lower_is_better else more,
        worsened=more if lower_is_better else fewer,
        unchanged=int((difference == 0).sum()),
        num_pairs=len(difference),
        standard_deviation=deviation,
        pairs_needed=pairs_needed(change, deviation),
    )


def ratio_change(
    before: Floats, after: Floats, num_tokens: Floats, *, seed: int = 0, num_resamples: int = NUM_RESAMPLES
) -> RatioChange:
    """Compare two perplexities on the same windows: after / before = exp(sum(after - before) / sum(tokens)).

    Args:
        before: Negative log-likelihood of each window before, nats, ``[n]``.
        after: The same after.
        num_tokens: Scored tokens of each window, ``[n]``.
        seed: Of the resampling.
        num_resamples: Resamples of the interval and of the test.
    """
    assert before.shape == after.shape == num_tokens.shape, "the same windows on both sides"
    total = num_tokens.sum()
    low, high = bootstrap_interval(after - before, num_tokens, seed=seed, num_resamples=num_resamples)
    return RatioChange(
        before=_exp(before.sum() / total),
        after=_exp(after.sum() / total),
        ratio=_exp((after - before).sum() / total),
        low=_exp(low),
        high=_exp(high),
        p_value=sign_flip_p_value(after - before, seed=seed, num_resamples=num_resamples),
        num_windows=len(before),
        num_tokens=int(total),
    )
