"""A choice among very many components, of one bit each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

__all__ = ["BitMask"]

_PIECE = 1 << 22  # components unpacked at a time, where no whole layer is needed: 4 MB
_ONES = torch.tensor([bin(byte).count("1") for byte in range(256)])


@dataclass(frozen=True, eq=False)
class BitMask:
    """A set of the components ``0 .. size - 1`` of one layer.

    Attributes:
        bits: ``[ceil(size / 8)]`` uint8; component ``i`` is bit ``i % 8`` (from the lowest) of byte ``i // 8``. Bits
            beyond ``size`` are 0.
        size: Number of components of the layer.
    """

    bits: Tensor
    size: int

    @classmethod
    def empty(cls, size: int) -> Self:
        """The empty set of ``size`` components."""
        return cls(torch.zeros(-(-size // 8), dtype=torch.uint8), size)

    @classmethod
    def of(cls, chosen: Tensor) -> Self:
        """The set that a bool tensor of any shape marks, flattened."""
        mask = cls.empty(chosen.numel())
        mask.add(0, chosen.flatten())
        return mask

    @classmethod
    def of_index(cls, index: Tensor, size: int) -> Self:
        """The set of the components ``index``, ``[n]`` integers."""
        flags = torch.zeros(size, dtype=torch.bool)
        flags[index.long()] = True
        return cls.of(flags)

    @property
    def problem(self) -> str | None:
        """The fault of the bits, which may come from a file that was written elsewhere; None if there is none."""
        if self.bits.dtype != torch.uint8 or self.bits.dim() != 1:
            return "not a list of bytes"
        if len(self.bits) != -(-self.size // 8):
            return f"{len(self.bits)} bytes long where {-(-self.size // 8)} belong"
        if self.size % 8 and int(self.bits[-1]) >> self.size % 8:
            return "set beyond the last component"
        return None

    @property
    def count(self) -> int:
        """How many components are in the set."""
        pieces = self.bits.split(_PIECE)
        return sum(int(torch.bincount(piece, minlength=256) @ _ONES) for piece in pieces if len(piece))

    def add(self, offset: int, chosen: Tensor) -> None:
        """Adds those of the components from ``offset`` on that ``chosen``, ``[n]`` bool, marks."""
        lead = offset % 8
        flags = np.zeros(lead + len(chosen), dtype=bool) if lead else chosen.numpy()
        if lead:
            flags[lead:] = chosen.numpy()
        new_bits = torch.from_numpy(np.packbits(flags, bitorder="little"))
        self.bits[offset // 8 : offset // 8 + len(new_bits)] |= new_bits

    def part(self, start: int, stop: int) -> Tensor:
        """Whether each of the components ``start .. stop - 1`` is in the set, ``[stop - start]`` bool."""
        first, last = start // 8, -(-stop // 8)
        flags = np.unpackbits(self.bits[first:last].numpy(), bitorder="little")
        return torch.from_numpy(flags[start - 8 * first : stop - 8 * first]).bool()

    def unpacked(self) -> Tensor:
        """Whether each component is in the set, ``[size]`` bool."""
        return self.part(0, self.size)

    def index(self) -> Tensor:
        """The components in the set, ascending, int64: each takes 64 times the memory that its bit does."""
        pieces = [self.part(start, stop).nonzero().flatten() + start for start, stop in self.pieces()]
        return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int64)

    def pieces(self) -> Iterator[tuple[int, int]]:
        """First component and last + 1 of each of the pieces that are small enough to be unpacked."""
        yield from ((start, min(start + _PIECE, self.size)) for start in range(0, self.size, _PIECE))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BitMask) and self.size == other.size and torch.equal(self.bits, other.bits)
