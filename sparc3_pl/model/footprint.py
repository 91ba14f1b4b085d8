"""The memory that a model takes, by its config: bytes of its weights, of its activations, of its keys and values.

Names and shapes come from a model without weights. What a pass keeps is counted on tensors without values, with fused
attention.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparc3_pl.errors import InputError
from sparc3_pl.io.hub import first_line
from sparc3_pl.model.attention import attention_modules, wrapped_attention
from sparc3_pl.model.experts import experts_modules
from sparc3_pl.model.loading import load_skeleton
from sparc3_pl.model.patching import swapped
from sparc3_pl.model.source import ModelSource
from sparc3_pl.model.structure import decoder

__all__ = [
    "activation_bytes",
    "key_value_bytes",
    "num_layers",
    "skeleton_in_dtype",
    "weight_bytes",
    "weight_bytes_by_device",
]

log = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def skeleton_in_dtype(source: ModelSource) -> nn.Module:
    """The model without weights, in eval mode, its parameters frozen and of the type in which it would be loaded.

    Raises:
        InputError: as ``load_skeleton``.
    """
    skeleton = load_skeleton(source).eval().requires_grad_(False)
    dtype = _DTYPES.get(source.dtype) or getattr(skeleton.config.get_text_config(), "dtype", None) or torch.float32
    return skeleton.to(dtype)


def weight_bytes(skeleton: nn.Module) -> int:
    """Bytes of all parameters; tied ones count once."""
    return sum(parameter.nbytes for parameter in skeleton.parameters())


def weight_bytes_by_device(skeleton: nn.Module, device_map: str | Mapping[str, Any]) -> dict[str, int]:
    """Bytes of the parameters by device, as transformers would spread them now: ``cuda:0``, ..., ``cpu``, ``disk``.

    Args:
        skeleton: The model without weights, in the type in which it would be loaded.
        device_map: ``auto`` and the like, one device, or a device for each module.

    Raises:
        InputError: if there is no such device map, or accelerate is missing.
    """
    from transformers.integrations.accelerate import _get_device_map, check_and_set_device_map

    devices = device_map
    try:
        if isinstance(device_map, str):
            devices = check_and_set_device_map(device_map)
        devices = _get_device_map(skeleton, devices, None, None)
    except ValueError as error:
        raise InputError(f"model.device_map={device_map!r}: {first_line(error)}") from error
    sizes: dict[str, int] = {}
    for name, parameter in skeleton.named_parameters():
        owners = (module for module in devices if not module or name == module or name.startswith(f"{module}."))
        device = devices[max(owners, key=len)]
        place = f"cuda:{device}" if isinstance(device, int) else str(device)
        sizes[place] = sizes.get(place, 0) + parameter.nbytes
    return sizes


def num_layers(skeleton: nn.Module) -> int:
    """The number of decoder layers in the model's config."""
    return getattr(skeleton.config.get_text_config(), "num_hidden_layers", 1)


def activation_bytes(skeleton: nn.Module, batch_size: int, length: int) -> int | None:
    """Bytes that a backward pass of a batch keeps of its forward pass, with the plain gradient.

    None if the model's code does something that tensors without values cannot.
    """
    storages: dict[int, Tensor] = {}
    own = {parameter.untyped_storage()._cdata for parameter in skeleton.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        if (storage := tensor.untyped_storage()._cdata) not in own:
            storages[storage] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        if not _pass_without_values(skeleton, batch_size, length, use_cache=False):
            return None
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


def key_value_bytes(skeleton: nn.Module) -> int | None:
    """Bytes that the cache keeps of one token; None as for ``activation_bytes``, and for a cache of another kind."""
    from transformers import DynamicCache

    cache = DynamicCache()
    if not _pass_without_values(skeleton, 1, 1, use_cache=True, past_key_values=cache):
        return None
    return sum((layer.keys.nbytes + layer.values.nbytes) for layer in cache.layers) or None


def _pass_without_values(skeleton: nn.Module, batch_size: int, length: int, **options: Any) -> bool:
    """Runs a batch forward on tensors without values; returns whether that worked."""
    hidden = skeleton.get_input_embeddings().weight.shape[1]
    words = torch.zeros(batch_size, length, hidden, dtype=skeleton.dtype, device="meta", requires_grad=True)
    mask = torch.ones(batch_size, 1, length, length, dtype=torch.bool, device="meta")  # one that nobody looks into
    try:
        with torch.enable_grad(), _without_values(skeleton):
            decoder(skeleton)(inputs_embeds=words, attention_mask=mask, **options)
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError) as error:
        log.warning("what a pass keeps cannot be counted without weights: %s", error)
        return False
    return True


@contextmanager
def _without_values(skeleton: nn.Module) -> Iterator[None]:
    """Inside the block attention and experts do not look into tensors."""
    with ExitStack() as undo:
        for module in attention_modules(skeleton).values():
            undo.enter_context(wrapped_attention(module, lambda base: _fused))
        for experts in experts_modules(skeleton).values():
            undo.enter_context(swapped(experts, "forward", partial(_evenly, experts)))
        yield


def _evenly(experts: nn.Module, hidden_NH: Tensor, chosen_NK: Tensor, weights_NK: Tensor) -> Tensor:
    """Runs the experts as if each got the same number of tokens: what is kept does not depend on which go where."""
    down = experts.down_proj[0]
    x = hidden_NH.repeat_interleave(chosen_NK.shape[1], 0)
    gate, up = (x @ part.mT for part in experts.gate_up_proj[0].chunk(2))
    y = ((experts.act_fn(gate) * up) @ down.mT).unflatten(0, chosen_NK.shape)
    return (y * weights_NK[..., None].to(y.dtype)).sum(1)


def _fused(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    return _Fused.apply(q, k, v), None


class _Fused(torch.autograd.Function):
    """Keeps what fused attention keeps: its inputs and its output, and no weights ``[T, T]``."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        output = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])
        ctx.save_for_backward(q, k, v, output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None]:
        return None, None, None
