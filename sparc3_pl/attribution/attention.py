"""The gradients of query, key and value, scaled as AttnLRP's rule for attention asks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparc3_pl.model.attention import AttentionFunction

__all__ = ["scale_gradient", "scaled_qkv"]


def scaled_qkv(base: AttentionFunction, query_key: float, value: float) -> AttentionFunction:
    """``base`` with the gradients of query and key times ``query_key``, that of value times ``value``."""

    def attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any):
        q, k = scale_gradient(q, query_key), scale_gradient(k, query_key)
        return base(module, q, k, scale_gradient(v, value), *args, **kwargs)

    return attend


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.factor, None


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """``x``, with its gradient multiplied by ``factor`` in the backward pass (0 cuts the graph)."""
    if factor == 0:
        return x.detach()
    return x if factor == 1 else _ScaleGradient.apply(x, factor)
