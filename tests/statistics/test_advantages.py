"""Token advantages against loops over single completions, and against what they must add up to."""

import numpy as np
import pytest

from sparc3_pl.statistics.advantages import FEWEST, expected_scores, others_mean, token_advantages


def completions(number=80, seed=0, longest=7):
    """Scores that grow out of the prefixes, three completions per prompt."""
    rng = np.random.default_rng(seed)
    prompts = [f"p{n // 3}" for n in range(number)]
    prefixes = [np.cumsum(rng.normal(0, 0.1, rng.integers(1, longest + 1))).tolist() for _ in range(number)]
    return np.array([prefix[-1] for prefix in prefixes]), prefixes, prompts


def test_mean_of_the_others():
    scores, prompts = np.array([1.0, 2.0, 6.0, 5.0]), ["a", "b", "a", "a"]
    assert others_mean(scores, prompts).tolist() == [5.5, 3.5, 3.0, 3.5]  # "b" has no other: the mean of all


def test_expected_scores_are_those_of_the_normal_equations():
    scores, prefixes, prompts = completions()
    expected = expected_scores(scores, prefixes, prompts)
    for place in range(4):
        here = [n for n, prefix in enumerate(prefixes) if len(prefix) > place]
        assert len(here) >= FEWEST
        rows = []
        for n in here:
            others = [scores[m] for m in range(len(scores)) if m != n and prompts[m] == prompts[n]]
            mean = sum(others) / len(others) if others else scores.mean()
            rows.append([1.0, mean] + ([prefixes[n][place - 1]] if place else []))
        design, own = np.array(rows), scores[here]
        weights = np.linalg.inv(design.T @ design) @ design.T @ own
        np.testing.assert_allclose([expected[n][place] for n in here], design @ weights, rtol=1e-9, atol=1e-12)


def test_places_that_few_reach_take_the_coefficients_before_them():
    scores, prefixes, prompts = completions(40)
    prefixes[0] = np.linspace(0, 1, 9).tolist()  # the only one with so many tokens
    expected = expected_scores(scores, prefixes, prompts)[0]
    slope = np.diff(expected)[-1] / (prefixes[0][-2] - prefixes[0][-3])
    assert np.diff(expected)[-2] == pytest.approx(slope * (prefixes[0][-3] - prefixes[0][-4]))
    assert not np.allclose(expected, scores[0])  # a fit of its own would have met the score


@pytest.mark.parametrize("gae_lambda", [0.0, 0.6, 1.0])
def test_advantages_add_up_as_their_sum_says(gae_lambda):
    scores, prefixes, prompts = completions()
    expected = expected_scores(scores, prefixes, prompts)
    for n, own in enumerate(token_advantages(scores, prefixes, prompts, gae_lambda)):
        values = [*expected[n], scores[n]]
        slow = [
            sum(gae_lambda**k * (values[t + k + 1] - values[t + k]) for k in range(len(own) - t))
            for t in range(len(own))
        ]
        np.testing.assert_allclose(own, slow, rtol=1e-9, atol=1e-12)
        if gae_lambda == 1:
            np.testing.assert_allclose(own, scores[n] - expected[n], rtol=1e-9, atol=1e-12)


def test_too_few_completions():
    scores, prefixes, prompts = completions(FEWEST - 1)
    with pytest.raises(ValueError, match=f"{FEWEST - 1} completions are too few"):
        token_advantages(scores, prefixes, prompts)
