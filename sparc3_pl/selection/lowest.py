"""The k lowest of billions of values, exactly, in the memory of one block.

Values come as *passes*: a function that, each time it is called, goes once through all components in the model's order,
block by block. A block says which of its components are candidates. The choice is by value, ascending; equal values by
layer, then index.

Method: radix selection. A float's bits, the sign aside, are in the order of its magnitude, so they make a 32-bit key in
the order of the floats. One pass counts the upper 16 bits, a second the lower 16 bits within the upper half that
holds the k-th smallest, and a third collects. No sorting, no copy of the values, and the same answer as a stable sort.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparc3_pl.errors import InputError
from sparc3_pl.statistics.agreement import spread_positions

__all__ = [
    "Block",
    "Cut",
    "Passes",
    "Selection",
    "TooFewCandidates",
    "collect",
    "cut_lowest",
    "joined",
    "order_keys",
    "sample",
    "select_lowest",
]


@dataclass(frozen=True)
class Block:
    """Values of consecutive components of one layer.

    Attributes:
        layer: Name of the layer.
        offset: Index of the first component.
        values: ``[n]`` float32, finite wherever a component may be chosen.
        allowed: ``[n]`` bool: which components may be chosen; None: all of them.
    """

    layer: str
    offset: int
    values: Tensor
    allowed: Tensor | None = None


class TooFewCandidates(InputError):
    """More are to be chosen than may be.

    Attributes:
        asked: How many are to be chosen.
        available: How many candidates there are.
        where: Where that is, to begin a message with; empty for the whole model.
    """

    def __init__(self, asked: int, available: int, where: str = "") -> None:
        self.asked, self.available, self.where = asked, available, where
        super().__init__(f"{where}{asked} are to be chosen, but there are only {available} candidates; choose fewer")


Passes = Callable[[], Iterator[Block]]
Selection = dict[str, tuple[Tensor, Tensor]]
"""By layer, for the layers that have any: indices (int64, ascending) and their values (float32)."""

_HALF = 1 << 16


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

    ``take`` must be given the blocks in the order of a pass; ``rewound()`` begins another pass.
    """

    value: float
    ties: int
    _left: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._left = self.ties

    def rewound(self) -> "Cut":
        """The same cut at the beginning of a pass."""
        return Cut(self.value, self.ties)

    def take(self, block: Block) -> Tensor:
        """Which components of the next ``block`` are among the k lowest, as a mask."""
        allowed = block.allowed
        taken = block.values < self.value
        if allowed is not None:
            taken &= allowed
        if self._left:
            equal = block.values == self.value
            tied = (equal if allowed is None else equal & allowed).nonzero().flatten()[: self._left]
            taken[tied] = True
            self._left -= len(tied)
        return taken


def cut_lowest(passes: Passes, k: int) -> Cut:
    """Finds the cut below which ``k`` candidates lie; two passes.

    Args:
        passes: The components to choose from.
        k: How many to take, at least 1.

    Raises:
        TooFewCandidates: if there are fewer than ``k`` candidates.
    """
    raw = torch.zeros(_HALF + 1, dtype=torch.int64)  # one bucket more for what may not be chosen
    for block in passes():
        halves = _upper_halves(block.values)
        if block.allowed is not None:
            halves.masked_fill_(~block.allowed, _HALF)
        raw += torch.bincount(halves, minlength=_HALF + 1)
    # Negative numbers have the upper half of all halves, in falling order: they come first.
    negative, positive = raw[_HALF // 2 : _HALF], raw[: _HALF // 2]
    upper = torch.cat([negative.flip(0), positive])
    if k > (total := int(upper.sum())):
        raise TooFewCandidates(k, total)
    high, below = _bucket(upper, k)
    half = high - _HALF // 2 if high >= _HALF // 2 else _HALF - 1 - high
    lower = torch.zeros(_HALF, dtype=torch.int64)
    for block in passes():
        within = _upper_halves(block.values) == half
        keys = order_keys(block.values[within if block.allowed is None else within & block.allowed])
        lower += torch.bincount(keys & (_HALF - 1), minlength=_HALF)
    low, below_low = _bucket(lower, k - below)
    return Cut(_value_of((high << 16) + low), k - below - below_low)


def _bucket(counts: Tensor, k: int) -> tuple[int, int]:
    """The bucket that holds the k-th smallest (k from 1), and how many lie in the buckets before it."""
    running = counts.cumsum(0)
    bucket = int(torch.searchsorted(running, k))
    return bucket, int(running[bucket] - counts[bucket])


def select_lowest(passes: Passes, k: int) -> Selection:
    """The ``k`` lowest candidates, over all layers together.

    Raises:
        TooFewCandidates: if there are fewer than ``k`` candidates.
    """
    cut = cut_lowest(passes, k)
    # Room for the answer at once: small pieces kept from every block would scatter the heap that blocks are made in.
    indices, chosen, filled = torch.empty(k, dtype=torch.int64), torch.empty(k), 0
    ends: dict[str, int] = {}
    for block in passes():
        taken = cut.take(block).nonzero().flatten()
        if len(taken):
            into = slice(filled, filled + len(taken))
            torch.add(taken, block.offset, out=indices[into])
            torch.index_select(block.values, 0, taken, out=chosen[into])
            ends[block.layer] = filled = into.stop
    starts = dict(zip(ends, [0, *ends.values()], strict=False))
    return {layer: (indices[starts[layer] : end], chosen[starts[layer] : end]) for layer, end in ends.items()}


def collect(passes: Passes) -> dict[str, Block]:
    """One pass in memory: a single block for each layer. For neurons, which are few."""
    blocks: dict[str, list[Block]] = {}
    for block in passes():
        blocks.setdefault(block.layer, []).append(block)
    return {layer: joined(pieces) for layer, pieces in blocks.items()}


def joined(blocks: Sequence[Block]) -> Block:
    """Consecutive blocks of one layer as a single one."""
    values, allowed = torch.cat([block.values for block in blocks]), None
    if any(block.allowed is not None for block in blocks):
        every = [torch.ones(len(b.values), dtype=torch.bool) if b.allowed is None else b.allowed for b in blocks]
        allowed = torch.cat(every)
    return Block(blocks[0].layer, blocks[0].offset, values, allowed)


def sample(passes: Passes, count: int, most: int) -> Tensor:
    """The values of all ``count`` components that may be chosen, or of those among ``most`` of them.

    Which ones depends on ``count`` only, so that two sets of scores are sampled at the same components.
    """
    positions = spread_positions(count, most)
    parts, start = [], 0
    for block in passes():
        first, last = torch.searchsorted(positions, torch.tensor([start, start + len(block.values)])).tolist()
        index = positions[first:last] - start
        if block.allowed is not None:
            index = index[block.allowed[index]]
        parts.append(block.values[index])
        start += len(block.values)
    return torch.cat(parts)
