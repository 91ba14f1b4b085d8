"""How well two sets of scores, or two selections, agree."""

from collections.abc import Collection

import numpy as np
import torch
from torch import Tensor

__all__ = ["jaccard", "rank_correlation", "spread_positions"]


def rank_correlation(one: Tensor, other: Tensor) -> float:
    """Spearman's rank correlation of two ``[n]`` tensors; NaN if one of them is constant."""
    from scipy.stats import spearmanr

    first, second = (values.double().numpy() for values in (one, other))
    if len(first) < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return float("nan")
    return float(spearmanr(first, second).statistic)


def jaccard(one: Collection[object], other: Collection[object]) -> float:
    """Size of the intersection over size of the union; NaN for two empty sets."""
    first, second = set(one), set(other)
    union = len(first | second)
    return len(first & second) / union if union else float("nan")


def spread_positions(count: int, most: int, seed: int = 0) -> Tensor:
    """Some of the positions ``0 .. count-1``, at most ``most``, ascending: one at random from each of equal stretches.

    Not evenly spaced: a stride that divides a matrix's width would always meet the same columns.
    """
    if count <= most:
        return torch.arange(count)
    generator = torch.Generator().manual_seed(seed)
    jitter = torch.rand(most, generator=generator, dtype=torch.float64)
    return ((torch.arange(most) + jitter) * (count / most)).long().clamp(max=count - 1)
