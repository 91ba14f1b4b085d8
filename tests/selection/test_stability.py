"""Split halves and the null: by hand on small vectors, and on made-up populations whose truth is known."""

import pytest
import torch

from sparc3_pl.selection.contrast import Vector, share_of_strongest
from sparc3_pl.selection.stability import (
    SelectionSettings,
    Unit,
    chosen,
    mean_scores_of,
    null_against_null,
    null_against_selection,
    overlap_of,
    positions,
    split_half_overlaps,
)


def population(mean, noise, units, seed):
    """Units of samples around ``mean``; each neuron's noise has its own size."""
    generator = torch.Generator().manual_seed(seed)
    return [Unit(mean + noise * torch.randn(len(mean), generator=generator), 1.0) for _ in range(units)]


def test_units_weigh_as_they_say():
    mean = mean_scores_of([Unit(torch.tensor([1.0, 0.0]), 1), Unit(torch.tensor([5.0, 4.0]), 3)])
    assert mean.scores.tolist() == [4.0, 3.0]


@pytest.mark.parametrize(
    ("kind", "protect", "expected"),
    [
        ("difference", 0.0, [3, 2]),  # 10-19, 4-7
        ("difference", 0.2, [2, 0]),  # without the strongest
        ("normalized", 0.0, [0, 2]),
        ("rank", 0.0, [2, 0]),  # by hand below
    ],
)
def test_chosen_by_hand(kind, protect, expected):
    general, behaviour = (
        Vector(torch.tensor([1.0, 3.0, 4.0, 10.0, 5.0])),
        Vector(torch.tensor([3.0, 2.0, 7.0, 19.0, 4.0])),
    )
    if kind == "rank":  # ranks 1 2 3 5 4 and 2 1 4 5 3: differences -1 1 -1 0 1
        expected = [0, 2]
    if kind == "normalized":  # 1/23-3/35 = -.042, 4/23-7/35 = -.026, 10/23-19/35 = -.108
        expected = [3, 0]
    assert positions(chosen(general, behaviour, SelectionSettings(kind, 2, protect)), general).tolist() == sorted(
        expected
    )


def test_overlap_and_strength():
    assert overlap_of(torch.tensor([1, 2, 3, 4]), torch.tensor([4, 9, 2, 7])) == 0.5
    general = Vector(torch.tensor([9.0, 1, 1, 1, 1, 1, 1, 1, 1, 1]))
    assert share_of_strongest({"": torch.tensor([0, 5])}, general, 0.1) == 0.5


def test_a_real_behaviour_is_found_in_both_halves_and_beats_the_null():
    generator = torch.Generator().manual_seed(0)
    mean = torch.rand(2000, generator=generator)
    used = mean.clone()
    used[:50] += 1
    general, behaviour = population(mean, 0.1, 8, 1), population(used, 0.1, 8, 2)
    settings = SelectionSettings("difference", 50)
    halves = split_half_overlaps(general, behaviour, settings)
    assert len(halves) == 20
    assert min(halves) == 1.0
    assert max(null_against_null(general, settings)) < 0.2
    assert max(null_against_selection(general, torch.arange(50), settings)) < 0.2


def test_noise_in_the_strongest_makes_nulls_overlap_far_beyond_chance():
    """What the issue warns of: no behaviour at all, and still a third in common."""
    mean = torch.ones(5000)
    noise = torch.full((5000,), 0.01)
    noise[:200] = 5.0  # the strong vary the most
    general, same = population(mean, noise, 8, 3), population(mean, noise, 8, 4)
    settings = SelectionSettings("difference", 100)
    chance = 100 / 5000
    null = null_against_null(general, settings)
    halves = split_half_overlaps(general, same, settings)
    assert sum(null) / len(null) > 10 * chance
    assert sum(halves) / len(halves) == pytest.approx(sum(null) / len(null), abs=0.1)  # and no more than the null


def test_too_few_units_measure_nothing():
    units = population(torch.rand(20), 0.1, 3, 0)
    settings = SelectionSettings("difference", 5)
    assert split_half_overlaps(units, units[:1], settings) == []
    assert null_against_null(units, settings) == []
    assert len(split_half_overlaps(units[:2], units[:2], settings)) == 1
    assert null_against_selection(units[:1], torch.arange(5), settings) == []


def test_fewer_samples_give_less_agreement():
    mean = torch.rand(2000, generator=torch.Generator().manual_seed(5))
    used = mean.clone()
    used[:50] += 0.3
    general, behaviour = population(mean, 0.25, 16, 6), population(used, 0.25, 16, 7)
    sizes = [split_half_overlaps(general, behaviour, SelectionSettings("difference", 50), size) for size in (1, 8)]
    few, many = (sum(overlaps) / len(overlaps) for overlaps in sizes)
    assert few < many - 0.1
