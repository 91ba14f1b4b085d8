"""The few collectives that the passes need; with one process they do nothing.

Ranks wait for each other's batches no longer than ``trainer.rank_timeout``, but for what rank 0 alone does (it writes
the scores, it folds earlier sums) they wait as long as that takes: a slow disk is no dead rank. A rank that has died
is noticed by those that started the ranks, and by the connection that it held.
"""

import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sparc3_pl.errors import InputError

__all__ = [
    "after_rank_zero", "from_rank_zero", "gather_lists", "is_rank_zero", "is_sharded", "joined_ranks", "sum_over_ranks",
    "whole",
]  # fmt: skip

POLL_SECONDS = 0.1
_host_groups: dict[dist.ProcessGroup, dist.ProcessGroup] = {}
"""The group that carries tensors of the host, by the group of all ranks, where that group cannot carry them."""
_waits = itertools.count()
"""Numbers the waits for rank 0, alike on every rank."""


def _many() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@contextmanager
def joined_ranks(setting: str) -> Iterator[None]:
    """Inside the block the processes that ``torchrun`` has started are ranks of one group, on GPUs if there are any.

    Args:
        setting: The setting that asks for it, for the message.

    Raises:
        InputError: if this process was started alone.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ:
        raise InputError(
            f"{setting} shares the model out over several processes, but this one was started alone; start them with "
            "torchrun --nproc-per-node 2 -m sparc3_pl.cli, or give auto"
        )
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def is_sharded(tensor: Tensor) -> bool:
    """Whether every rank holds only a part of ``tensor``, that is, whether it is a ``DTensor``."""
    tensors = sys.modules.get("torch.distributed.tensor")  # importing it takes a second
    return tensors is not None and isinstance(tensor, tensors.DTensor)


def is_rank_zero() -> bool:
    """Whether this process writes what all ranks have made."""
    return not _many() or dist.get_rank() == 0


def sum_over_ranks(tensor: Tensor) -> None:
    """Replaces ``tensor`` on every rank by the sum over ranks, in place: no second copy of a large one.

    A sharded tensor (``DTensor``) is that sum already: it is one tensor, of which every rank holds a part. A tensor of
    the host goes through gloo where the ranks are connected by a backend for devices only, such as NCCL.
    """
    if _many() and not is_sharded(tensor):
        dist.all_reduce(tensor, group=_host_group() if tensor.device.type == "cpu" else None)


def _host_group() -> dist.ProcessGroup | None:
    """The group that carries tensors of the host; None: the group of all ranks does."""
    if any(entry.startswith("cpu:") for entry in dist.get_backend_config().split(",")):
        return None
    everyone = dist.group.WORLD
    if everyone not in _host_groups:
        _host_groups.clear()  # those of groups that are gone
        _host_groups[everyone] = dist.new_group(backend="gloo")
    return _host_groups[everyone]


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
    """The result of ``make`` on rank 0, on every rank; the others do not call it, and wait as long as it takes."""
    if not _many():
        return make()
    box = [make() if dist.get_rank() == 0 else None]
    after_rank_zero()
    dist.broadcast_object_list(box)
    return box[0]


def after_rank_zero() -> None:
    """Waits until rank 0 is here, however long that takes; if rank 0 dies or fails first, the others fail too.

    Raises:
        torch.distributed.DistError: if the connection to rank 0 is lost.
    """
    if not _many():
        return
    store, key = dist.group.WORLD.get_group_store(), f"sparc3-after-rank-0-{next(_waits)}"
    if dist.get_rank() == 0:
        store.set(key, "here")
    while not store.check([key]):
        time.sleep(POLL_SECONDS)
    dist.barrier()  # rank 0 may keep the store: it stays until the others have read
