"""The k lowest of billions of values, exactly, in the memory of one block.

Values come as *passes*: a function that, each time it is called, goes once through all candidates in the model's order
and yields ``(layer, offset, values)``: float32 values of one layer, flattened, beginning at ``offset``. Plus infinity
marks a candidate that must not be taken. The choice is by value, ascending; equal values by layer, then index.

Method: radix selection. A float's bits, the sign aside, are in the order of its magnitude, so they make a 32-bit key in
the order of the floats. One pass counts the upper 16 bits, a second the lower 16 bits within the upper half that
holds the k-th smallest, and a third collects. No sorting, no copy of the values, and the same answer as a stable sort.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparc3_pl.errors import InputError

__all__ = ["Block", "Cut", "Passes", "collect", "cut_lowest", "order_keys", "select_lowest"]

Block = tuple[str, int, Tensor]
Passes = Callable[[], Iterator[Block]]

_HALF = 1 << 16
_NOT_FINITE = 0x7F80  # upper halves (sign aside) from here on are infinities and NaNs


def order_keys(values: Tensor) -> Tensor:
    """Integers in ``[0, 2**32)`` of the same order as the float32 ``values``; 0.0 and -0.0 get the same.

    A float's bits grow with it if it is positive and fall if it is negative: the first kind is shifted up, the
    second is mirrored.
    """
    bits = (values + 0.0).view(torch.int32).long()  # -0.0 + 0.0 is 0.0
    return torch.where(bits < 0, ~bits, bits + (1 << 31))


def _value_of(key: int) -> float:
    """The float32 of an order key."""
    bits = key - (1 << 31) if key >= 1 << 31 else ~key
    return float(torch.tensor(bits, dtype=torch.int32).view(torch.float32))


def _upper_halves(values: Tensor) -> Tensor:
    """The upper 16 bits of every float32, from 0 to 65535, as they lie in memory (little-endian): int32."""
    return (values + 0.0).view(torch.int16)[1::2].int() & (_HALF - 1)


@dataclass
class Cut:
    """Where the k lowest end: all candidates below ``value``, and the first ``ties`` of those equal to it.

    ``take`` must be given the values in the order of a pass; ``rewound()`` begins another pass.
    """

    value: float
    ties: int
    _left: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._left = self.ties

    def rewound(self) -> "Cut":
        """The same cut at the beginning of a pass."""
        return Cut(self.value, self.ties)

    def take(self, values: Tensor) -> Tensor:
        """Which of the next ``values`` are among the k lowest, as a mask."""
        taken = values < self.value
        if self._left and (equal := (values == self.value).nonzero().flatten()[: self._left]).numel():
            taken[equal] = True
            self._left -= len(equal)
        return taken


def cut_lowest(passes: Passes, k: int, refusal: str = "k={k}, but there are only {n} candidates") -> Cut:
    """Finds the cut below which ``k`` candidates lie; two passes.

    Args:
        passes: The candidates; infinite ones are left out.
        k: How many to take, at least 1.
        refusal: The error's text; ``{k}`` and ``{n}`` are filled in.

    Raises:
        InputError: if there are fewer than ``k`` candidates.
    """
    raw = torch.zeros(_HALF, dtype=torch.int64)
    for _, _, values in passes():
        raw += torch.bincount(_upper_halves(values), minlength=_HALF)
    # Negative numbers have the upper half of all halves, in falling order: they come first.
    negative, positive = raw[_HALF // 2 :], raw[: _HALF // 2]
    negative[_NOT_FINITE:] = positive[_NOT_FINITE:] = 0
    upper = torch.cat([negative.flip(0), positive])
    if k > (total := int(upper.sum())):
        raise InputError(refusal.format(k=k, n=total))
    high, below = _bucket(upper, k)
    wanted = high - _HALF // 2 if high >= _HALF // 2 else _HALF - 1 - high
    lower = torch.zeros(_HALF, dtype=torch.int64)
    for _, _, values in passes():
        keys = order_keys(values[_upper_halves(values) == wanted])
        lower += torch.bincount(keys & (_HALF - 1), minlength=_HALF)
    low, below_low = _bucket(lower, k - below)
    return Cut(_value_of((high << 16) + low), k - below - below_low)


def _bucket(counts: Tensor, k: int) -> tuple[int, int]:
    """The bucket that holds the k-th smallest (k from 1), and how many lie in the buckets before it."""
    running = counts.cumsum(0)
    bucket = int(torch.searchsorted(running, k))
    return bucket, int(running[bucket] - counts[bucket])


def select_lowest(
    passes: Passes, k: int, refusal: str = "k={k}, but there are only {n} candidates"
) -> dict[str, tuple[Tensor, Tensor]]:
    """The ``k`` lowest candidates, over all layers together.

    Returns:
        By layer, for the layers that have any: indices (int64, ascending) and their values (float32).

    Raises:
        InputError: if there are fewer than ``k`` candidates.
    """
    cut = cut_lowest(passes, k, refusal)
    # Room for the answer at once: small pieces kept from every block would scatter the heap that blocks are made in.
    indices, chosen, filled = torch.empty(k, dtype=torch.int64), torch.empty(k), 0
    ends: dict[str, int] = {}
    for layer, offset, values in passes():
        found = cut.take(values).nonzero().flatten()
        if len(found):
            into = slice(filled, filled + len(found))
            torch.add(found, offset, out=indices[into])
            torch.index_select(values, 0, found, out=chosen[into])
            ends[layer] = filled = into.stop
    starts = dict(zip(ends, [0, *ends.values()], strict=False))
    return {layer: (indices[starts[layer] : end], chosen[starts[layer] : end]) for layer, end in ends.items()}


def collect(passes: Passes) -> dict[str, tuple[int, Tensor]]:
    """One pass in memory: by layer, the offset of the first candidate and all values. For neurons, which are few."""
    parts: dict[str, list[tuple[int, Tensor]]] = {}
    for layer, offset, values in passes():
        parts.setdefault(layer, []).append((offset, values))
    return {layer: (found[0][0], torch.cat([values for _, values in found])) for layer, found in parts.items()}
