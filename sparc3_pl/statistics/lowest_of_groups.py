"""The lowest of each group of a few values: of a row of a weight matrix, or of every m weights of a row."""

import numpy as np
from numpy.typing import NDArray

__all__ = ["lowest_of_each_group"]

_NARROW = 16  # up to here, comparing every two members of a group is faster than a partial sort of each


def lowest_of_each_group(values: NDArray[np.float32], count: int) -> NDArray[np.bool_]:
    """Which are the ``count`` lowest of each group ``[groups, width]``; of equal values the first. No NaN.

    Infinity stands for what may not be taken: at least ``count`` of a group must be below it.
    """
    width = values.shape[1]
    if width > _NARROW:
        last = np.partition(values, count - 1, axis=1)[:, count - 1 : count]
        taken, equal = values < last, values == last
        left = count - np.count_nonzero(taken, axis=1)
        more = np.flatnonzero(np.count_nonzero(equal, axis=1) > left)
        equal[more] &= np.cumsum(equal[more], axis=1) <= left[more, None]
        return taken | equal
    members = np.ascontiguousarray(values.T)  # [width, groups]
    ranks = np.zeros(members.shape, dtype=np.uint8)
    for one in range(width):
        for other in range(one + 1, width):
            is_first = (members[one] <= members[other]).view(np.uint8)
            ranks[other] += is_first
            ranks[one] += 1 - is_first
    return np.ascontiguousarray((ranks < count).T)
