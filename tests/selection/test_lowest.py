"""Radix selection against numpy's stable sort."""

import itertools

import numpy as np
import pytest
import torch

from sparc3_pl.errors import InputError
from sparc3_pl.selection.lowest import Block, _value_of, collect, cut_lowest, order_keys, sample, select_lowest


def passes_over(layers: dict[str, torch.Tensor], block: int = 5, allowed: dict[str, torch.Tensor] | None = None):
    def passes():
        for name, values in layers.items():
            for start in range(0, len(values), block):
                mask = None if allowed is None else allowed[name][start : start + block]
                yield Block(name, start, values[start : start + block], mask)

    return passes


def by_sorting(layers: dict[str, torch.Tensor], k: int) -> set[tuple[str, int]]:
    """The road that this replaces: all values in one array, a stable sort."""
    places = [(name, i) for name, values in layers.items() for i in range(len(values))]
    values = np.concatenate([values.numpy() for values in layers.values()]).astype(np.float64)
    return {places[i] for i in np.argsort(values, kind="stable")[:k]}


def chosen(found) -> set[tuple[str, int]]:
    return {(name, i) for name, (index, _) in found.items() for i in index.tolist()}


VALUES = {
    "normal": lambda: torch.randn(40),
    "ties": lambda: torch.randint(-2, 3, (40,)).float(),
    "signed zeros": lambda: torch.where(torch.rand(40) < 0.5, 0.0, -0.0),
    "all equal": lambda: torch.full((40,), -3.5),
    "huge and tiny": lambda: torch.randn(40) * 10.0 ** torch.randint(-45, 38, (40,)),
    "close": lambda: 1 + torch.randint(0, 9, (40,)) * 2.0**-23,
}


@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize("k", [1, 2, 37, 60, 119, 120])
def test_equals_a_full_stable_sort(kind, k):
    layers = {name: VALUES[kind]() for name in ("c", "a", "b")}
    found = select_lowest(passes_over(layers), k)
    assert chosen(found) == by_sorting(layers, k)
    for name, (index, values) in found.items():
        assert index.tolist() == sorted(index.tolist())
        assert torch.equal(values, layers[name][index])


def test_keys_are_in_the_order_of_the_floats():
    values = torch.tensor([-torch.inf, -3e38, -1.0, -1e-45, -0.0, 0.0, 1e-45, 1.0, 3e38, torch.inf])
    keys = order_keys(values).tolist()
    assert keys == sorted(keys)
    assert keys[4] == keys[5]
    assert len(set(keys)) == 9
    assert 0 <= min(keys) <= max(keys) < 2**32
    assert [_value_of(key) for key in keys] == values.tolist()


def test_what_is_not_allowed_is_never_taken():
    """However low it is, and among equals too."""
    values = torch.tensor([5.0, -9.0, 1.0, 5.0, 5.0])
    passes = passes_over({"a": values}, 2, {"a": torch.tensor([True, False, True, False, True])})
    assert chosen(select_lowest(passes, 2)) == {("a", 0), ("a", 2)}
    assert chosen(select_lowest(passes, 3)) == {("a", 0), ("a", 2), ("a", 4)}
    with pytest.raises(InputError, match="4 are to be chosen, but there are only 3 candidates"):
        cut_lowest(passes, 4)


def test_a_sample_is_of_the_same_components_whatever_the_blocks():
    values = torch.arange(100.0)
    drawn = sample(passes_over({"a": values[:40], "b": values[40:]}, 7), 100, 20)
    assert len(drawn) == 20
    assert drawn.tolist() == sorted(drawn.tolist())
    assert torch.equal(drawn, sample(passes_over({"a": values}, 100), 100, 20))
    even = {"a": values % 2 == 0}
    assert sample(passes_over({"a": values}, 9, even), 100, 100).tolist() == values[::2].tolist()


def test_choices_of_growing_size_are_nested():
    layers = {"a": torch.randint(0, 5, (50,)).float()}
    sets = [chosen(select_lowest(passes_over(layers), k)) for k in range(1, 51)]
    assert all(small < large for small, large in itertools.pairwise(sets))


def test_block_size_does_not_matter():
    layers = {"a": torch.randint(0, 4, (31,)).float(), "b": torch.randint(0, 4, (17,)).float()}
    sets = [chosen(select_lowest(passes_over(layers, block), 20)) for block in (1, 3, 100)]
    assert sets[0] == sets[1] == sets[2]


def test_collect():
    layers = {"a": torch.randn(12), "b": torch.randn(3)}
    found = collect(passes_over(layers))
    assert all(block.offset == 0 and torch.equal(block.values, layers[name]) for name, block in found.items())
