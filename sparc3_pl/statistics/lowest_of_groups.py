"""The lowest of each group of a few values: of a row of a weight matrix, or of every m weights of a row."""

import numpy as np
from numpy.typing import NDArray

__all__ = ["lowest_of_each_group"]

_NARROW = 16  # up to here, comparing every two members of a group is faster than a partial sort of each
_PIECE = 1 << 17  # values sorted at a time: 512 KB, which stay in a processor's own cache


def lowest_of_each_group(values: NDArray[np.float32], count: int) -> NDArray[np.bool_]:
    """A mask of the ``count`` lowest of each group ``[groups, width]``, of equal values the first; no value may be NaN.

    Infinity stands for what may not be taken: at least ``count`` of a group must be below it.
    """
    width = values.shape[1]
    if width > _NARROW:
        step = max(1, _PIECE // width)
        mask = np.empty(values.shape, dtype=bool)
        for start in range(0, len(values), step):
            mask[start : start + step] = _lowest_of_each_wide(values[start : start + step], count)
        return mask
    members = np.ascontiguousarray(values.T)  # [width, groups]
    ranks = np.zeros(members.shape, dtype=np.uint8)
    for one in range(width):
        for other in range(one + 1, width):
            is_first = (members[one] <= members[other]).view(np.uint8)
            ranks[other] += is_first
            ranks[one] += 1 - is_first
    return np.ascontiguousarray((ranks < count).T)


def _lowest_of_each_wide(values: NDArray[np.float32], count: int) -> NDArray[np.bool_]:
    last = np.partition(values, count - 1, axis=1)[:, count - 1 : count]
    mask = values <= last
    if np.count_nonzero(mask) == count * len(values):
        return mask
    surplus = np.flatnonzero(np.count_nonzero(mask, axis=1) > count)  # more than one value is equal to the last
    below, equal = values[surplus] < last[surplus], values[surplus] == last[surplus]
    room = count - np.count_nonzero(below, axis=1)
    mask[surplus] = below | (equal & (np.cumsum(equal, axis=1) <= room[:, None]))
    return mask
