"""A model shared out over the ranks by FSDP2, so that one larger than a GPU is scored on several, data-parallel.

Each rank holds an equal part of the rows of every weight (a ``DTensor``). A decoder layer is put together on all ranks
for as long as it runs, forward and backward, and freed again; so every rank must take part in every pass.
"""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from sparc3_pl.model.structure import decoder_layers

__all__ = ["shard"]


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
