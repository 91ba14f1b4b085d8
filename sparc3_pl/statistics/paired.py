"""Paired comparison of two evaluations: intervals, p-values and the sample size an effect needs.

Every function is pure and seeded; n is the number of pairs (prompts, or text windows). Prompts are independent of each
other. Windows of a running text are not: they overlap, and one document spans several. Windows are therefore resampled,
and their signs flipped, in blocks of neighbours.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sparc3_pl.io.formats import Number, Unbounded

__all__ = [
    "LEAST_UNITS",
    "PairedChange",
    "RatioChange",
    "block_length",
    "bootstrap_interval",
    "bootstrap_ratios",
    "mcnemar_p_value",
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
LEAST_UNITS = 6
"""Independent units (prompts, or blocks of windows) from which an interval is given.

The smallest two-sided p-value of n pairs is 2^(1-n), so with five or fewer no result can reach p < 0.05, and an
interval that leaves out 0 would claim what the test beside it cannot show. (That of one pair would have no width.)
"""


@dataclass(frozen=True)
class PairedChange:
    """How a mean changed between two measurements of the same n units.

    Attributes:
        before: Mean before.
        after: Mean after.
        change: after - before.
        relative_change: change / before; None if before is 0.
        low: Lower end of the 95 % bootstrap interval of ``change``; None below ``LEAST_UNITS`` pairs.
        high: Upper end, likewise.
        p_value: Two-sided sign-flip permutation test of "no change"; of answers that are right or wrong, McNemar's
            exact test, which is the same test with all patterns counted.
        improved: Units with a better value after.
        worsened: Units with a worse value after.
        unchanged: Units with equal values.
        num_pairs: n.
        standard_deviation: Sample standard deviation of the n differences (n - 1 in the denominator).
        pairs_needed: Pairs with which a change of this size would be found with 80 % power; None for no change.
    """

    before: Number
    after: Number
    change: Number
    relative_change: float | None
    low: float | None
    high: float | None
    p_value: Number
    improved: int
    worsened: int
    unchanged: int
    num_pairs: int
    standard_deviation: Number
    pairs_needed: int | None


@dataclass(frozen=True)
class RatioChange:
    """How perplexity changed on the same windows.

    Attributes:
        before: Perplexity before.
        after: Perplexity after.
        ratio: after / before.
        low: Lower end of the 95 % bootstrap interval of ``ratio``, blocks of windows resampled; None if there are fewer
            than ``LEAST_UNITS`` blocks.
        high: Upper end, likewise.
        p_value: Two-sided sign-flip permutation test on the blocks' changes of negative log-likelihood.
        num_windows: Number of windows.
        num_tokens: Number of scored tokens.
        block: Consecutive windows that are resampled together; 1 where windows look independent.
    """

    before: Unbounded
    after: Unbounded
    ratio: Unbounded
    low: float | None
    high: float | None
    p_value: Number
    num_windows: int
    num_tokens: int
    block: int = 1

    @property
    def num_blocks(self) -> int:
        """Whole blocks of windows: the number of independent units behind the interval."""
        return self.num_windows // self.block


def _chunks(total: int, width: int) -> Iterator[int]:
    """Split ``total`` resamples of ``width`` values into pieces that fit in memory."""
    size = max(1, _CELLS // max(1, width))
    yield from (min(size, total - start) for start in range(0, total, size))


def bootstrap_interval(
    values: Floats,
    weights: Floats | None = None,
    *,
    block: int = 1,
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
) -> tuple[float, float]:
    """95 % percentile bootstrap interval of sum(values) / sum(weights), units resampled with replacement.

    With weights of 1 (the default) this is the interval of the mean. Efron & Tibshirani 1993, section 13.3. Units that
    depend on their neighbours are resampled in blocks of ``block`` consecutive ones (the last is followed by the first:
    the circular block bootstrap of Politis & Romano 1992).
    """
    rng = np.random.default_rng(seed)
    weights = np.ones_like(values) if weights is None else weights
    n = len(values)
    means = []
    for size in _chunks(num_resamples, n):
        starts = rng.integers(n, size=(size, -(-n // block)))
        draws = ((starts[:, :, None] + np.arange(block)) % n).reshape(size, -1)[:, :n] if block > 1 else starts
        means.append(values[draws].sum(1) / weights[draws].sum(1))
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
    return float(low), float(high)


def bootstrap_ratios(
    values_PJ: Floats, weights_PJ: Floats, *, seed: int = 0, num_resamples: int = NUM_RESAMPLES
) -> Floats:
    """J figures, each sum(values) / sum(weights) over P units, for every bootstrap resample: ``[R, J]``.

    A resample draws the same units for all figures, and the units that ``bootstrap_interval`` draws with the same seed.
    """
    rng = np.random.default_rng(seed)
    n = len(values_PJ)
    ratios = []
    for size in _chunks(num_resamples, n):
        draws = rng.integers(n, size=(size, n)) + n * np.arange(size)[:, None]
        times = np.bincount(draws.ravel(), minlength=size * n).reshape(size, n).astype(np.float64)
        ratios.append((times @ values_PJ) / (times @ weights_PJ))
    return np.concatenate(ratios)


def block_length(values: Floats) -> int:
    """How many consecutive values to resample together so that their dependence on each other is kept.

    The automatic choice of Politis & White (2004, corrected by Patton, Politis & White 2009) for the circular block
    bootstrap: (2 G^2 / D)^(1/3) n^(1/3), rounded up, from autocovariances under a flat-top window that ends where
    the autocorrelations become insignificant. 1 where none is significant, and where there are too few values for two
    of them to share a block (``2 * LEAST_UNITS``).
    """
    n = len(values)
    centred = values - values.mean()
    variance = float(centred @ centred) / n
    if n < 2 * LEAST_UNITS or not math.isfinite(variance) or variance == 0:
        return 1
    run = max(5, math.ceil(math.sqrt(math.log10(n))))
    lags = min(math.ceil(math.sqrt(n)) + run, n - 1)
    covariance = np.array([centred[: n - k] @ centred[k:] for k in range(lags + 1)]) / n
    small = np.abs(covariance[1:] / variance) < 2 * math.sqrt(math.log10(n) / n)
    last = next((m for m in range(lags) if small[m : m + run].all()), lags)
    if last == 0:
        return 1
    k = np.arange(1, min(2 * last, lags) + 1)
    taper = np.minimum(1.0, 2 * (1 - k / (2 * last)))
    density = variance + 2 * float(taper @ covariance[k])
    slope = 2 * float((taper * k) @ covariance[k])
    if density <= 0 or slope <= 0:  # neighbours that cancel out: single units overstate the spread, if anything
        return 1
    best = (2 * slope**2 / (4 / 3 * density**2)) ** (1 / 3) * n ** (1 / 3)
    return max(1, math.ceil(min(best, 3 * math.sqrt(n), n / 3)))


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


def mcnemar_p_value(before: Floats, after: Floats) -> float:
    """Two-sided exact p-value of McNemar's test that right answers turn wrong as often as wrong ones turn right.

    Of n items whose answer changed, k one way and n - k the other: 2 P(X <= min(k, n - k)), at most 1, X binomial with
    n trials of probability 1/2 (McNemar 1947). It is the sign-flip test of the differences, all patterns counted.

    Args:
        before: ``[n]``, 1 for right, 0 for wrong.
        after: ``[n]``, in the same order.
    """
    assert np.isin(before, (0, 1)).all() and np.isin(after, (0, 1)).all(), "1 for right, 0 for wrong"
    lost, won = int((before > after).sum()), int((before < after).sum())
    n = lost + won
    tail = sum(math.comb(n, k) for k in range(min(lost, won) + 1))  # whole numbers: nothing is rounded
    return min(1.0, 2 * tail / 2**n)


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
        before: ``[n]``, one value per unit.
        after: ``[n]``, in the same order.
        seed: Seed of the resampling.
        num_resamples: Resamples of the interval and of the test.
        lower_is_better: Which direction counts as improved.
    """
    assert before.shape == after.shape == (max(1, before.size),), "one value per unit on both sides"
    difference = after - before
    low, high = None, None
    if len(difference) >= LEAST_UNITS:
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
    before: Floats,
    after: Floats,
    num_tokens: Floats,
    *,
    overlap: int = 1,
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
) -> RatioChange:
    """Compare two perplexities on the same windows: after / before = exp(sum(after - before) / sum(tokens)).

    Args:
        before: Negative log-likelihood of each window before, nats, ``[n]``, in the order of the text.
        after: Those after, likewise.
        num_tokens: Scored tokens of each window, ``[n]``.
        overlap: Consecutive windows that read a common token (window / stride, rounded up); blocks are never shorter.
        seed: Seed of the resampling.
        num_resamples: Resamples of the interval and of the test.
    """
    assert before.shape == after.shape == num_tokens.shape, "the same windows on both sides"
    difference, total = after - before, num_tokens.sum()
    excess = difference - difference.sum() / total * num_tokens  # what each window adds to the change of the ratio
    block = min(max(overlap, block_length(excess)), len(before))
    low, high = None, None
    if len(before) // block >= LEAST_UNITS:
        ends = bootstrap_interval(difference, num_tokens, block=block, seed=seed, num_resamples=num_resamples)
        low, high = map(_exp, ends)
    blocks = np.add.reduceat(difference, np.arange(0, len(difference), block)) if block > 1 else difference
    return RatioChange(
        before=_exp(before.sum() / total),
        after=_exp(after.sum() / total),
        ratio=_exp(difference.sum() / total),
        low=low,
        high=high,
        p_value=sign_flip_p_value(blocks, seed=seed, num_resamples=num_resamples),
        num_windows=len(before),
        num_tokens=int(total),
        block=block,
    )
