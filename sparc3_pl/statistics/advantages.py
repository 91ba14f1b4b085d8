"""How much each token of a completion raised its expected score: what a token is credited with, instead of the whole.

The derivative of an expected score is the mean of score times the gradient of log-likelihood (Williams 1992). Any
function of what stands *before* a token may be taken off the score that the token is credited with: the mean stays, the
noise falls by as much as that function foresees the score.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["FEWEST", "expected_scores", "others_mean", "token_advantages"]

Floats = NDArray[np.float64]

FEWEST = 30
"""Completions that a regression of three coefficients needs: with fewer it would follow their noise. Later places,
which fewer completions reach, take the coefficients of the last that has as many."""


def others_mean(scores_N: Floats, prompts: Sequence[str]) -> Floats:
    """The mean score of the *other* completions of each one's prompt; the mean of all where there is no other."""
    _, prompt_N, count_P = np.unique(np.asarray(prompts), return_inverse=True, return_counts=True)
    others_N = count_P[prompt_N] - 1
    sums_N = np.bincount(prompt_N, scores_N)[prompt_N] - scores_N
    return np.where(others_N > 0, sums_N / np.maximum(others_N, 1), scores_N.mean())


def expected_scores(scores_N: Floats, prefixes: Sequence[Sequence[float]], prompts: Sequence[str]) -> list[Floats]:
    """The final score that is to be expected before each token of N completions.

    For each place a least-squares fit of the final score by the mean score of the prompt's other completions and, from
    the second token on, the score of the completion so far.

    Args:
        scores_N: Final scores.
        prefixes: The scores of each completion's text cut after each of its tokens.
        prompts: The prompt that each completes.

    Returns:
        An array for each completion, as long as it has tokens.

    Raises:
        ValueError: if there are fewer than ``FEWEST`` completions.
    """
    if len(scores_N) < FEWEST:
        raise ValueError(f"{len(scores_N)} completions are too few for an expected score; {FEWEST} are needed")
    others_N = others_mean(scores_N, prompts)
    lengths_N = np.array([len(prefix) for prefix in prefixes])
    result = [np.empty(length) for length in lengths_N]
    weights = np.zeros(0)
    for place in range(int(lengths_N.max(initial=0))):
        here = np.flatnonzero(lengths_N > place)
        columns = [np.ones(len(here)), others_N[here]]
        if place:
            columns.append(np.array([prefixes[n][place - 1] for n in here]))
        design = np.stack(columns, 1)
        if len(here) >= FEWEST or len(weights) != design.shape[1]:
            weights = np.linalg.lstsq(design, scores_N[here], rcond=None)[0]
        for n, value in zip(here, design @ weights, strict=True):
            result[n][place] = value
    return result


def token_advantages(
    scores_N: Floats, prefixes: Sequence[Sequence[float]], prompts: Sequence[str], gae_lambda: float = 1.0
) -> list[Floats]:
    r"""What each token of N completions is credited with: :math:`A_t = \sum_n \lambda^n (V_{t+n+1} - V_{t+n})`.

    V_t is the score expected before token t, and after the last token the score itself (generalised advantage
    estimation: Schulman et al., ICLR 2016, equation 16, undiscounted). At :math:`\lambda = 1` it is the score less V_t:
    without bias. A smaller one credits a token with what becomes of the expected score soon after it: less noise, but
    as wrong as V is.

    Args: as ``expected_scores``, and
        gae_lambda: How far ahead a token's credit looks, from 0 (to the next token) to 1 (to the end).

    Raises:
        ValueError: as ``expected_scores``.
    """
    advantages = []
    for score, values in zip(scores_N, expected_scores(scores_N, prefixes, prompts), strict=True):
        steps = np.diff(np.append(values, score))
        credit, total = np.empty_like(steps), 0.0
        for place in range(len(steps) - 1, -1, -1):
            total = steps[place] + gae_lambda * total
            credit[place] = total
        advantages.append(credit)
    return advantages
