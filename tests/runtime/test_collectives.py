"""Collectives between two forked processes, over backends that behave like those of GPUs."""

import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from sparc3_pl.runtime.collectives import after_rank_zero, from_rank_zero, sum_over_ranks


def on_two_ranks(folder: Path, backend: str, work: Callable[[int], None], timeout: float = 30.0) -> None:
    """Runs ``work`` with its rank on two forked processes that are connected by ``backend``."""
    children = []
    for rank in range(2):
        if not (child := os.fork()):
            code = 1
            try:
                store = dist.FileStore(str(folder / "store"), 2)
                dist.init_process_group(
                    backend, store=store, rank=rank, world_size=2, timeout=timedelta(seconds=timeout)
                )
                work(rank)
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]


def test_sums_on_the_host_where_the_backend_takes_tensors_of_devices_only(tmp_path):
    def work(rank: int) -> None:
        with pytest.raises(RuntimeError):  # as with NCCL
            dist.all_reduce(torch.ones(3))
        for value in (1.0, 10.0):
            tensor = torch.tensor([value, float(rank)])
            sum_over_ranks(tensor)
            assert tensor.tolist() == [2 * value, 1.0]

    on_two_ranks(tmp_path, "cuda:gloo", work)


def test_the_wait_for_rank_0_is_not_bounded_by_the_timeout(tmp_path):
    def slow() -> int:
        time.sleep(2)
        return 7

    def work(rank: int) -> None:
        assert from_rank_zero(slow) == 7
        if rank == 0:
            time.sleep(2)
        after_rank_zero()

    on_two_ranks(tmp_path, "gloo", work, timeout=1.0)
