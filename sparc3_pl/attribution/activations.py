"""The identity rule for element-wise functions: G_x = G_y f(x)/x (AttnLRP, arXiv 2402.05602, section 3.3).

The quotient is taken in closed form: as y / (x + eps) it would be wrong at 0 and infinite at -eps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparc3_pl.attribution.precision import exact
from sparc3_pl.model.structure import is_activation

__all__ = ["RATIOS", "activation_kind", "identity_rule"]

_TANH_SCALE = 2 * math.sqrt(2 / math.pi)

RATIOS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": torch.sigmoid,
    "gelu": lambda x: torch.special.erfc(-x / math.sqrt(2)) / 2,
    "gelu_tanh": lambda x: torch.sigmoid(_TANH_SCALE * (x + 0.044715 * x**3)),
    "quick_gelu": lambda x: torch.sigmoid(1.702 * x),
    "relu": lambda x: (x > 0).to(x.dtype),
    "relu_squared": F.relu,
    "mish": lambda x: torch.tanh(F.softplus(x)),
    "linear": torch.ones_like,
}
"""f(x)/x of every known element-wise function f."""


def activation_kind(module: nn.Module) -> str | None:
    """The name in ``RATIOS`` of the function that ``module`` computes, or None; recognised by its values."""
    if not is_activation(module):
        return None
    x = torch.linspace(-20, 20, 401, dtype=torch.float64, device="cpu")
    try:
        with torch.no_grad():
            y = type(module).forward(module, x.clone())
    except (TypeError, ValueError, IndexError, RuntimeError):  # it needs something other than a vector of any length
        return None
    if not isinstance(y, Tensor) or y.shape != x.shape:
        return None
    return next((kind for kind, ratio in RATIOS.items() if torch.allclose(y, x * ratio(x), rtol=1e-8, atol=1e-9)), None)


class _IdentityRule(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor], ratio: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.ratio = ratio
        return function(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        return (gradients[0] * ctx.ratio(x.to(exact(x.dtype)))).to(x.dtype), None, None


def identity_rule(x: Tensor, function: Callable[[Tensor], Tensor], kind: str) -> Tensor:
    """``function(x)``, whose backward pass multiplies by f(x)/x instead of f'(x).

    Args:
        x: Any shape.
        function: Computes the forward value.
        kind: Its name in ``RATIOS``.
    """
    return _IdentityRule.apply(x, function, RATIOS[kind])
