"""The few collectives that the passes need; with one process they do nothing."""

import sys
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor

__all__ = ["barrier", "from_rank_zero", "gather_lists", "is_rank_zero", "is_sharded", "sum_over_ranks", "whole"]


def _many() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_sharded(tensor: Tensor) -> bool:
    """Whether every rank holds only a part of ``tensor``: whether it is a ``DTensor``."""
    tensors = sys.modules.get("torch.distributed.tensor")  # whoever has made one has imported it; it takes a second
    return tensors is not None and isinstance(tensor, tensors.DTensor)


def is_rank_zero() -> bool:
    """Whether this process writes what all ranks have made."""
    return not _many() or dist.get_rank() == 0


def sum_over_ranks(tensor: Tensor) -> None:
    """Replaces ``tensor`` on every rank by the sum over ranks, in place: no second copy of a large one.

    A sharded tensor (``DTensor``) is that sum already: it is one tensor, of which every rank holds a part.
    """
    if _many() and not is_sharded(tensor):
        dist.all_reduce(tensor)


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered on every rank, which all must ask for; any other tensor as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def gather_lists(items: list[Any]) -> list[Any]:
    """All ranks' items on every rank, in the order of the ranks; a rank may bring none."""
    if not _many():
        return list(items)
    parts: list[list[Any]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def from_rank_zero(make: Callable[[], Any]) -> Any:
    """What ``make`` gives on rank 0, on every rank; the others do not call it."""
    if not _many():
        return make()
    box = [make() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box)
    return box[0]


def barrier() -> None:
    """Waits until every rank is here."""
    if _many():
        dist.barrier()
