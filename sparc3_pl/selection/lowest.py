"""The k lowest of billions of values, of all or of each row, exactly, in the memory of one block.

Values come as *passes*: a function that, each time it is called, goes once through all components in the model's order,
block by block. A block says which of its components are candidates. The choice is by value, ascending; equal values by
layer, then index.

Method: radix selection. A float's bits, the sign aside, are in the order of its magnitude, so they make a 32-bit key in
the order of the floats. One pass counts the upper 16 bits, a second the lower 16 bits within the upper half that
holds the k-th smallest, and a third collects. No sorting, no copy of the values, and the same answer as a stable sort.
Within rows, or groups of a row, one pass is enough: a block is cut so that it holds whole ones.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from operator import attrgetter

import numpy as np
import torch
from torch import Tensor

from sparc3_pl.errors import InputError
from sparc3_pl.io.read_ahead import read_ahead
from sparc3_pl.model.bitmask import BitMask
from sparc3_pl.statistics.agreement import spread_positions
from sparc3_pl.statistics.lowest_of_groups import lowest_of_each_group

__all__ = [
    "Block",
    "Cut",
    "Masks",
    "Passes",
    "Selection",
    "TooFewCandidates",
    "all_finite",
    "collect",
    "cut_lowest",
    "cut_lowest_of_each",
    "joined",
    "lowest_in_groups",
    "masks_below",
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
    """More components are to be chosen than may be.

    Attributes:
        asked: How many are to be chosen.
        available: How many candidates there are.
        where: The place, as the beginning of a message; empty for the whole model.
        among: How many components there are in that place; None for the whole model or layer.
    """

    def __init__(self, asked: int, available: int, where: str = "", among: int | None = None) -> None:
        self.asked, self.available, self.where, self.among = asked, available, where, among
        super().__init__(f"{where}{asked} are to be chosen, but there are only {available} candidates; choose fewer")


Passes = Callable[[], Iterator[Block]]
Selection = dict[str, tuple[Tensor, Tensor]]
"""Indices (int64, ascending) and values (float32) of the chosen, for each layer that has any."""

Masks = Iterator[tuple[str, BitMask]]
"""Layers that have chosen weights, one after the other, each with a mask of the chosen."""

_HALF = 1 << 16


def all_finite(values: Tensor) -> bool:
    """Whether no value is infinite or NaN. Either would carry over into the sum, which takes a fraction of the time."""
    return math.isfinite(values.sum().item()) or bool(values.isfinite().all())


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
    """The k lowest: all candidates below ``value``, and the first ``ties`` of those equal to it.

    ``take`` must be given the blocks in the order of a pass; ``rewound()`` begins another pass.
    """

    value: float
    ties: int
    _left: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._left = self.ties

    def rewound(self) -> "Cut":
        """A copy of this cut, for the beginning of a pass."""
        return Cut(self.value, self.ties)

    def take(self, block: Block) -> Tensor:
        """Which components of the next ``block`` are among the k lowest, as a mask."""
        allowed = block.allowed
        mask = block.values < self.value
        if allowed is not None:
            mask &= allowed
        if self._left:
            equal = block.values == self.value
            ties = (equal if allowed is None else equal & allowed).nonzero().flatten()[: self._left]
            mask[ties] = True
            self._left -= len(ties)
        return mask


def cut_lowest(passes: Passes, k: int) -> Cut:
    """Finds the cut below which ``k`` candidates lie; two passes.

    Args:
        passes: The components to choose from.
        k: How many to take, at least 1.

    Raises:
        TooFewCandidates: if there are fewer than ``k`` candidates.
    """
    return cut_lowest_of_each(lambda: (replace(block, layer="") for block in passes()), {"": k})[""]


def cut_lowest_of_each(passes: Passes, counts: Mapping[str, int]) -> dict[str, Cut]:
    """Finds, for every layer, the cut below which so many of its candidates lie; two passes in all.

    Args:
        passes: The components to choose from. Layers that ``counts`` does not name are passed over.
        counts: How many to take of each layer, at least 1.

    Raises:
        TooFewCandidates: if a layer has fewer candidates.
    """
    raw = {layer: torch.zeros(_HALF + 1, dtype=torch.int64) for layer in counts}  # the last: what may not be chosen
    for block in passes():
        if block.layer not in counts:
            continue
        halves = _upper_halves(block.values)
        if block.allowed is not None:
            halves.masked_fill_(~block.allowed, _HALF)
        raw[block.layer] += torch.bincount(halves, minlength=_HALF + 1)
    places = {layer: _place_of(raw.pop(layer), k, layer) for layer, k in counts.items()}
    lower = {layer: torch.zeros(_HALF, dtype=torch.int64) for layer in counts}
    for block in passes():
        if block.layer not in counts:
            continue
        high, _ = places[block.layer]
        half = high - _HALF // 2 if high >= _HALF // 2 else _HALF - 1 - high
        within = _upper_halves(block.values) == half
        keys = order_keys(block.values[within if block.allowed is None else within & block.allowed])
        lower[block.layer] += torch.bincount(keys & (_HALF - 1), minlength=_HALF)
    cuts = {}
    for layer, (high, below) in places.items():
        low, below_low = _bucket(lower[layer], counts[layer] - below)
        cuts[layer] = Cut(_value_of((high << 16) + low), counts[layer] - below - below_low)
    return cuts


def _place_of(raw: Tensor, k: int, layer: str) -> tuple[int, int]:
    """The bucket of upper halves, in rising order, that holds the k-th smallest, and how many lie before it."""
    # Negative numbers have the upper half of all halves, in falling order: they come first.
    negative, positive = raw[_HALF // 2 : _HALF], raw[: _HALF // 2]
    upper = torch.cat([negative.flip(0), positive])
    if k > (total := int(upper.sum())):
        raise TooFewCandidates(k, total, f"layer {layer}: " if layer else "")
    return _bucket(upper, k)


def _bucket(counts: Tensor, k: int) -> tuple[int, int]:
    """The bucket that holds the k-th smallest (k from 1), and how many lie in the buckets before it."""
    totals = counts.cumsum(0)
    bucket = int(torch.searchsorted(totals, k))
    return bucket, int(totals[bucket] - counts[bucket])


def select_lowest(passes: Passes, k: int) -> Selection:
    """The ``k`` lowest candidates, over all layers together.

    Raises:
        TooFewCandidates: if there are fewer than ``k`` candidates.
    """
    cut = cut_lowest(passes, k)
    # Room for the answer at once: small pieces kept from every block would scatter the heap that blocks are made in.
    indices, values, count = torch.empty(k, dtype=torch.int64), torch.empty(k), 0
    ends: dict[str, int] = {}
    for block in passes():
        places = cut.take(block).nonzero().flatten()
        if len(places):
            into = slice(count, count + len(places))
            torch.add(places, block.offset, out=indices[into])
            torch.index_select(block.values, 0, places, out=values[into])
            ends[block.layer] = count = into.stop
    starts = dict(zip(ends, [0, *ends.values()], strict=False))
    return {layer: (indices[starts[layer] : end], values[starts[layer] : end]) for layer, end in ends.items()}


def masks_below(passes: Passes, cuts: Mapping[str, Cut], sizes: Mapping[str, int]) -> Masks:
    """Which weights lie below their layer's cut; one pass.

    Args:
        passes: The weights to choose from.
        cuts: The cut of each layer; one and the same ``Cut`` under all names is a cut through the whole model. Layers
            without one are passed over.
        sizes: Number of weights of each layer.
    """
    for layer, blocks in groupby(passes(), key=attrgetter("layer")):
        if layer not in cuts:
            continue
        mask = BitMask.empty(sizes[layer])
        for block in blocks:
            mask.add(block.offset, cuts[layer].take(block))
        if mask.count:
            yield layer, mask


def lowest_in_groups(
    passes: Passes, widths: Mapping[str, int], counts: Mapping[str, int], sizes: Mapping[str, int]
) -> Masks:
    """The lowest of every group of consecutive weights: of every row, or of every m weights of a row; one pass.

    Args:
        passes: The weights to choose from.
        widths: Weights in a group, by layer; a layer's weights are a multiple of it.
        counts: How many of each group are taken, by layer; layers with 0 are passed over.
        sizes: Number of weights of each layer.

    Raises:
        TooFewCandidates: if fewer weights of a group may be chosen than are to be.
    """
    for layer, blocks in groupby(read_ahead(passes()), key=attrgetter("layer")):
        width, count = widths[layer], counts[layer]
        if not count:
            continue
        mask = BitMask.empty(sizes[layer])
        for block in _of_whole_groups(blocks, width):
            values = block.values.view(-1, width).numpy()
            if block.allowed is not None:
                allowed = block.allowed.view(-1, width).numpy()
                few = np.flatnonzero(np.count_nonzero(allowed, axis=1) < count)
                if len(few):
                    where = f"weights {block.offset + int(few[0]) * width} and on of layer {layer}: "
                    raise TooFewCandidates(count, int(np.count_nonzero(allowed[few[0]])), where, width)
                values = np.where(allowed, values, np.float32(np.inf))
            is_lowest = torch.from_numpy(lowest_of_each_group(values, count))
            mask.add(block.offset, is_lowest.flatten())
        yield layer, mask


def _of_whole_groups(blocks: Iterable[Block], width: int) -> Iterator[Block]:
    """The blocks of one layer, cut anew so that each holds whole groups of ``width``."""
    rest: Block | None = None
    for block in blocks:
        block = block if rest is None else joined([rest, block])
        whole = len(block.values) // width * width
        ahead, behind = (
            Block(
                block.layer,
                block.offset + piece.start,
                block.values[piece],
                None if block.allowed is None else block.allowed[piece],
            )
            for piece in (slice(0, whole), slice(whole, len(block.values)))
        )
        if whole:
            yield ahead
        rest = behind if len(behind.values) else None
    assert rest is None, f"{len(rest.values)} values of layer {rest.layer} are no whole group of {width}"


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
