"""A model shared out over the ranks by FSDP2, so that one larger than a GPU runs on several, data-parallel.

Each rank holds an equal part of the rows of every weight (a ``DTensor``). A decoder layer is put together on all ranks
for as long as it runs, forward and backward, and freed again; so every rank must take part in every pass.
"""

from __future__ import annotations

import signal
from contextlib import ExitStack

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from sparc3_pl.errors import InputError
from sparc3_pl.model.placement import input_device
from sparc3_pl.model.structure import decoder_layers
from sparc3_pl.runtime.collectives import sum_over_ranks
from sparc3_pl.runtime.processes import Stop, deferring_stop, stop_requested

__all__ = ["InStep", "run_one_token", "shard", "shard_over_all"]


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shards the frozen parameters of ``model`` over the ranks of ``mesh``, in place, in their own precision.

    A group for each decoder layer, and one for the rest: embeddings, last norm and output head (tied or not). The
    rest is put together by the model's own forward hooks, so passes must begin there (``as_forward``). One group at a
    time is moved to the mesh's device before it is cut, so the device never holds the whole model.

    Args:
        model: A causal language model, whole, on any device.
        mesh: One-dimensional; its ranks must all call this with the same model.

    Raises:
        InputError: if the model has no list of decoder layers.
    """
    for module in (*decoder_layers(model), model):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)


def shard_over_all(model: nn.Module) -> None:
    """Shards a model over all ranks, on their GPUs if they have any; each must call it with the same model, whole.

    Raises:
        InputError: as ``shard``.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shard(model.requires_grad_(False), init_device_mesh(device, (dist.get_world_size(),)))
    run_one_token(model)


@torch.no_grad()
def run_one_token(model: nn.Module) -> None:
    """Runs a forward pass that counts for nothing.

    FSDP2 keeps the tensors that the first pass is gathered into. Made under ``inference_mode`` they could not be
    written to outside of it, so the first pass of a model whose passes are of both kinds should be this one.
    """
    model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=input_device(model)), use_cache=False)


class InStep:
    """Keeps the ranks of a sharded model in step while each takes as many forward passes as its own work needs.

    Before every pass the ranks meet. One that has no work left runs a single token, which counts for nothing, until all
    have done theirs (``finish``). A request to stop, on whichever rank, stops all of them where they next meet.

    Args:
        model: Sharded; every rank must make one of these at the same point. Passes take no gradient: a pass backward
            would need the other ranks as well.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, self._undo = model, ExitStack()
        sum_over_ranks(torch.zeros(1))  # connects the hosts, where the ranks are connected by devices only
        run_one_token(model)
        self._undo.enter_context(deferring_stop())
        self._hook = model.register_forward_pre_hook(lambda *_: self._meet_for_pass(), prepend=True)

    def finish(self) -> None:
        """Runs along until no rank has a pass left."""
        self._hook.remove()
        with self._undo:
            while self._meet(0):
                run_one_token(self._model)

    def _meet_for_pass(self) -> None:
        if torch.is_grad_enabled():
            raise InputError(
                "a measurement takes gradients, which it cannot where trainer.strategy=ModelParallelStrategy shares "
                "the model out; measure it in one process (model.device_map: auto), or under torch.no_grad"
            )
        self._meet(1)

    def _meet(self, own: int) -> int:
        """The number of ranks that are about to take a pass of their own; if any is, all ranks then take one.

        Raises:
            Stop: if a rank was asked to stop.
        """
        stop = stop_requested()
        signals = (signal.SIGTERM, signal.SIGINT)
        requests = [int(stop is not None and stop.code == 128 + number) for number in signals]
        totals = torch.tensor([own, *requests])
        sum_over_ranks(totals)
        num_working, *requests = totals.tolist()
        if (number := next((n for n, count in zip(signals, requests, strict=True) if count), None)) is not None:
            raise Stop(number)
        return num_working
