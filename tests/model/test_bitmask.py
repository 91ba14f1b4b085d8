"""Bit masks against sets of Python integers."""

import random

import pytest
import torch

from sparc3_pl.model.bitmask import BitMask


@pytest.mark.parametrize("size", [1, 7, 8, 9, 1000])
def test_is_the_set_that_was_added_in_pieces(size):
    rng = random.Random(size)
    chosen = {i for i in range(size) if rng.random() < 0.4}
    mask, start = BitMask.empty(size), 0
    while start < size:  # pieces that begin anywhere in a byte
        stop = min(size, start + rng.randint(1, 13))
        mask.add(start, torch.tensor([i in chosen for i in range(start, stop)]))
        start = stop
    assert mask.problem is None
    assert mask.count == len(chosen)
    assert mask.index().tolist() == sorted(chosen)
    assert mask.bits.tolist() == [sum(1 << j for j in range(8) if 8 * b + j in chosen) for b in range(-(-size // 8))]
    for start, stop in ((0, size), (size // 3, size), (size // 2, size // 2)):
        assert mask.part(start, stop).tolist() == [i in chosen for i in range(start, stop)]
    assert mask == BitMask.of(torch.tensor([i in chosen for i in range(size)]))


@pytest.mark.parametrize(
    ("bits", "problem"),
    [
        (torch.zeros(1, dtype=torch.uint8), "1 bytes long where 2 belong"),
        (torch.zeros(2), "not a list of bytes"),
        (torch.tensor([0, 4], dtype=torch.uint8), "set beyond the last component"),
    ],
)
def test_says_what_is_wrong_with_the_bits_of_a_file(bits, problem):
    assert BitMask(bits, 10).problem == problem
