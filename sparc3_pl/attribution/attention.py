"""The gradients of query, key and value in attention, scaled, softened or uncapped as a rule asks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparc3_pl.attribution.precision import exact
from sparc3_pl.errors import InputError
from sparc3_pl.model.attention import AttentionFunction

__all__ = ["capped", "scale_gradient", "scaled_qkv", "soft_capped", "softened"]

_AGREEMENT = {torch.float64: 1e-5, torch.float32: 1e-4}
"""Largest difference from an attention's own output, relative to its largest, by dtype (an eager softmax in a float64
model is float32); half precision 0.05."""


def scaled_qkv(base: AttentionFunction, query_key: float, value: float) -> AttentionFunction:
    """``base`` with the gradients of query and key times ``query_key``, that of value times ``value``."""

    def attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any):
        q, k = scale_gradient(q, query_key), scale_gradient(k, query_key)
        return base(module, q, k, scale_gradient(v, value), *args, **kwargs)

    return attend


def soft_capped(base: AttentionFunction) -> AttentionFunction:
    """``base``, an eager attention, whose soft-cap c tanh(s / c) of the scores s passes relevance on by the identity
    rule: dy/dx := y/x. Its outputs stay the same bit for bit; where the scores have no cap, nothing changes.
    """

    def attend(
        module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *args: Any, **kwargs: Any
    ):
        cap = kwargs.get("softcap")
        if cap is None:
            return base(module, q, k, v, mask, *args, **kwargs)
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        scaling = kwargs.get("scaling")
        scores = torch.matmul(q, k.transpose(2, 3)) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
        scores = _SoftCap.apply(scores, cap)
        if mask is not None:
            scores = scores + mask
        weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
        return torch.matmul(weights, v).transpose(1, 2).contiguous(), weights

    return attend


def capped(scores: Tensor, cap: float) -> Tensor:
    """The soft-cap c tanh(s / c), in the order of operations of the models that have it."""
    return torch.tanh(scores / cap) * cap


class _SoftCap(torch.autograd.Function):
    """``capped``, with the identity rule f(x)/x in place of the derivative."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, cap: float) -> Tensor:
        ctx.save_for_backward(scores)
        ctx.cap = cap
        return capped(scores, cap)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (scores,) = ctx.saved_tensors
        u = scores.to(exact(scores.dtype)) / ctx.cap
        ratio = (torch.tanh(u) / u).masked_fill(u == 0, 1.0)
        return (gradients[0] * ratio).to(scores.dtype), None


def softened(base: AttentionFunction, temperature: float) -> AttentionFunction:
    """``base``, whose softmax passes gradients on to query and key as if at another temperature (GIM, Edin et al.,
    arXiv 2505.17630, TSG).

    With p the softmax of the scores divided by the temperature and g the gradient at the attention weights, the
    gradient at the scores is ``p * (g - sum p g)``, not divided by the temperature. A softmax that is nearly one-hot
    has nearly no gradient of its own: two keys that stand in for each other then both seem to do nothing. Outputs and
    the values' gradients are those of ``base``, to the last bit. Takes memory for ``[B, H, T, T]``.

    Raises:
        InputError: if the attention is not softmax(q k^T * scaling + mask) v, so that its scores are unknown.
    """

    def attend(
        module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *args: Any, **kwargs: Any
    ):
        output, weights = base(module, q.detach(), k.detach(), v, mask, *args, **kwargs)
        scores, visible = _scores(q, k, mask, kwargs.get("scaling"))
        values = v.detach().repeat_interleave(q.shape[1] // v.shape[1], 1).to(scores.dtype)
        again = (_SoftenedSoftmax.apply(scores, temperature) @ values).transpose(1, 2)
        _require_agreement(module, output, again, visible)
        again = again.to(output.dtype)
        return output + (again - again.detach()), weights

    return attend


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, scaling: float | None) -> tuple[Tensor, Tensor]:
    """The softmax's input, ``[B, H, T, T]``, and whether a position sees any of it, broadcastable to ``[B, H, T]``."""
    dtype = exact(q.dtype)
    q, k = q.to(dtype), k.repeat_interleave(q.shape[1] // k.shape[1], 1).to(dtype)
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    mask = mask[..., : scores.shape[-1]]
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, torch.finfo(dtype).min), mask.any(-1)
    return scores + mask, (mask > torch.finfo(mask.dtype).min).any(-1)


def _require_agreement(module: nn.Module, output_BTHD: Tensor, again_BTHD: Tensor, seen_BHT: Tensor) -> None:
    output, again = output_BTHD.detach().to(again_BTHD.dtype), again_BTHD.detach()
    where = seen_BHT.transpose(-1, -2)[..., None] if seen_BHT.dim() > 1 else seen_BHT[:, None, None]
    far = (output - again).abs().where(where, 0).amax()
    if not far <= _AGREEMENT.get(output_BTHD.dtype, 0.05) * output.abs().where(where, 0).amax():
        raise InputError(
            f"softmax_temperature: the attention of this model's {type(module).__name__} is more than a softmax of "
            "scaled products (a soft cap, a sink), so its scores are unknown; leave softmax_temperature at 1"
        )


class _SoftenedSoftmax(torch.autograd.Function):
    """Softmax along the last axis; its derivative is taken at another temperature."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward(torch.softmax(scores / temperature, -1))
        return torch.softmax(scores, -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (weights,) = ctx.saved_tensors
        product = weights * gradients[0]
        return product - weights * product.sum(-1, keepdim=True), None


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
