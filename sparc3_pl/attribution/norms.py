"""The identity rule for normalisation layers: the standard deviation is a constant (AttnLRP, arXiv 2402.05602, eq. 9).

y = (x - m) * r * s + b with r = 1 / std(x), s the scale, m the mean (LayerNorm) or 0 (RMSNorm). With r constant,
h = G_y s gives G_x = h r (RMSNorm) or (h - mean h) r (LayerNorm).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparc3_pl.attribution.precision import exact
from sparc3_pl.model.patching import swapped

__all__ = ["NormKind", "forward_slot", "norm_kind", "normalised", "std_constant_rule"]

_EPS_NAMES = ("variance_epsilon", "eps", "epsilon")
_TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 4e-3}


@dataclass(frozen=True)
class NormKind:
    """The function that a normalisation layer computes over the last dimension.

    Attributes:
        centred: True if the mean is subtracted (LayerNorm), False if not (RMSNorm).
        offset: Added to the weight to give the scale: 1 in Gemma, else 0.
        eps: Added to the mean square before the root.
    """

    centred: bool
    offset: float
    eps: float

    @property
    def name(self) -> str:
        """``LayerNorm`` or ``RMSNorm``, with the scale if it is not simply the weight."""
        return ("LayerNorm" if self.centred else "RMSNorm") + (" (1 + weight)" if self.offset else "")


def forward_slot(module: nn.Module) -> str:
    """The attribute to replace to change what ``module`` computes.

    Modules that ``accelerate`` offloads hold their real weights only while their inner ``_old_forward`` runs.
    """
    return "_old_forward" if hasattr(module, "_hf_hook") and hasattr(module, "_old_forward") else "forward"


def norm_kind(module: nn.Module) -> NormKind | None:
    """The kind of a normalisation layer, recognised by its values on a few rows; None for any other module."""
    eps = next((getattr(module, name) for name in _EPS_NAMES if hasattr(module, name)), None)
    size = _size(module)
    if eps is None or size is None:
        return None
    x, y, weight, bias = _try(module, size)
    for centred in (False, True):
        for offset in (0.0, 1.0) if weight is not None else (0.0,):
            kind = NormKind(centred, offset, float(eps))
            want = normalised(x, weight, bias, kind)
            if (y - want).abs().max() <= _TOLERANCE.get(x.dtype, 1e-4) * want.abs().max():
                return kind
    return None


def normalised(x: Tensor, weight: Tensor | None, bias: Tensor | None, kind: NormKind) -> Tensor:
    """The normalisation layer itself, by its formula, in float32 or better.

    Args:
        x: ``[..., D]``.
        weight: ``[D]`` or None.
        bias: ``[D]`` or None.
        kind: The normalisation to compute.
    """
    x = x.to(exact(x.dtype))
    x = x - x.mean(-1, keepdim=True) if kind.centred else x
    y = x * _inverse_std(x, kind.eps)
    y = y if weight is None else y * (weight.to(y.dtype) + kind.offset)
    return y if bias is None else y + bias.to(y.dtype)


class _StdConstantRule(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, function: Callable[[Tensor], Tensor], kind: NormKind
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.kind = kind
        return function(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        x, weight = ctx.saved_tensors
        kind: NormKind = ctx.kind
        h, rows = gradients[0].to(exact(x.dtype)), x.to(exact(x.dtype))
        h = h if weight is None else h * (weight.to(h.dtype) + kind.offset)
        if kind.centred:
            h, rows = h - h.mean(-1, keepdim=True), rows - rows.mean(-1, keepdim=True)
        return (h * _inverse_std(rows, kind.eps)).to(x.dtype), None, None, None


def std_constant_rule(x: Tensor, module: nn.Module, function: Callable[[Tensor], Tensor], kind: NormKind) -> Tensor:
    """``function(x)``, whose backward pass takes the standard deviation for a constant.

    Args:
        x: ``[..., D]``.
        module: The normalisation layer, for its weight.
        function: Computes the forward value.
        kind: The normalisation that it computes.
    """
    weight = getattr(module, "weight", None)
    return _StdConstantRule.apply(x, None if weight is None else weight.detach(), function, kind)


def _inverse_std(centred: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps)


def _size(module: nn.Module) -> int | None:
    """D of a layer without children whose only parameters are a weight and a bias ``[D]``; else None."""
    if module._modules or not set(module._parameters) <= {"weight", "bias"}:
        return None
    weight, shape = getattr(module, "weight", None), getattr(module, "normalized_shape", None)
    if weight is not None:
        return weight.numel() if weight.dim() == 1 else None
    return shape[0] if isinstance(shape, tuple) and len(shape) == 1 else None


@torch.no_grad()
def _try(module: nn.Module, size: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Input, output, weight and bias of ``module`` on rows of three magnitudes (small ones show the epsilon)."""
    values: list[Any] = []
    slot = forward_slot(module)
    inner = getattr(module, slot)

    def look(x: Tensor) -> Tensor:
        values.extend([x, inner(x), getattr(module, "weight", None), getattr(module, "bias", None)])
        return values[1]

    weight = getattr(module, "weight", None)
    place = {} if weight is None else {"dtype": weight.dtype, "device": weight.device}
    if weight is not None and weight.is_meta:  # offloaded: accelerate moves the input to where the weight will be
        place["device"] = torch.device("cpu")
    rows = torch.randn(6, size, generator=torch.Generator().manual_seed(0)) + 0.5
    rows *= torch.tensor([1.0, 1.0, 30.0, 30.0, 1e-3, 1e-3])[:, None]
    with swapped(module, slot, look):
        module(rows.to(**place))
    return tuple(values)
