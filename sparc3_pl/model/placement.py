"""Weights wherever their values lie: in the module, shared out over ranks (FSDP2), or offloaded to the host or a disk.

``accelerate`` puts an offloaded weight into its module for as long as that runs; at any other time the module holds a
tensor on the ``meta`` device, without values. Writing to that one would be lost without a word.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparc3_pl.errors import InputError
from sparc3_pl.model.experts import ExpertLayer
from sparc3_pl.model.structure import weight_matrix
from sparc3_pl.runtime.collectives import is_sharded, whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["input_device", "is_offloaded", "matrix_of", "place_of", "put_values", "values_of"]


def is_offloaded(module: nn.Module, name: str = "weight") -> bool:
    """Whether a parameter's values are not in the module, but where ``accelerate`` fetches them from."""
    tensor = getattr(module, name)
    return tensor is not None and tensor.is_meta


def place_of(module: nn.Module, name: str = "weight") -> torch.device:
    """The device on which a module computes with a parameter; for an offloaded one, where it is put for that."""
    device = getattr(module, name).device
    if device.type != "meta":
        return device
    owner = module.owner[0] if isinstance(module, ExpertLayer) else module
    device = getattr(getattr(owner, "_hf_hook", None), "execution_device", None)
    return torch.device("cpu" if device is None else device)


def input_device(model: PreTrainedModel) -> torch.device:
    """The device on which the model wants its inputs, which is that of its word embeddings."""
    return place_of(model.get_input_embeddings())


def matrix_of(layer: nn.Module) -> Tensor:
    """A linear layer's matrix ``[out, in]`` in one piece, where it computes; all ranks must ask for a sharded one.

    Raises:
        InputError: as ``weight_matrix`` and ``values_of``.
    """
    return weight_matrix(layer, values_of(layer)).to(place_of(layer))


def values_of(module: nn.Module, name: str = "weight") -> Tensor:
    """The values of a parameter in one piece: the parameter itself if they lie in it, otherwise a copy.

    A sharded parameter is gathered, which all ranks must ask for; an offloaded one is fetched to the host.

    Raises:
        InputError: if nobody knows where the values are.
    """
    tensor = getattr(module, name).detach()
    if not tensor.is_meta:
        return whole(tensor)
    if isinstance(module, ExpertLayer):
        return module.of(values_of(*module.owner))
    return _weights_map(module, name)[name].detach().clone()


def put_values(module: nn.Module, name: str, values: Tensor) -> None:
    """Makes ``values`` those of a parameter: what ``values_of`` gave and the caller has changed, or a copy of it.

    Each rank keeps its part of a sharded parameter. Values of an offloaded one stay in the host's memory from now on,
    also if the others lie on a disk: the files there are the checkpoint itself.

    Raises:
        InputError: as ``values_of``.
    """
    tensor = getattr(module, name).detach()
    if is_sharded(tensor):
        from torch.distributed.tensor import distribute_tensor

        own = distribute_tensor(values, tensor.device_mesh, tensor.placements, src_data_rank=None)  # nothing is sent
        tensor.to_local().copy_(own.to_local())
    elif tensor.is_meta and isinstance(module, ExpertLayer):
        fused = values_of(*module.owner)
        module.of(fused).copy_(values)
        put_values(*module.owner, fused)
    elif tensor.is_meta:
        places, key = _weights_map(module, name), name
        while not isinstance(places, dict):  # a view by prefix, or the loader of files, whose dictionary goes first
            key = getattr(places, "prefix", "") + key
            places = places.state_dict if hasattr(places, "state_dict") else places.dataset
        places[key] = values
    elif values.data_ptr() != tensor.data_ptr():
        tensor.copy_(values)


def _weights_map(module: nn.Module, name: str) -> Any:
    """The map from which ``accelerate`` fetches a module's own parameters, by their names in the module."""
    hook = getattr(module, "_hf_hook", None)
    places = getattr(hook, "weights_map", None)
    if places is None or name not in places:
        raise InputError(
            f"the {name} of a {type(module).__name__} is offloaded in a way that is not known here, so that its values "
            "can neither be read nor edited; load the model whole, or with model.device_map: auto"
        )
    return places
