"""Makes a model's logits of the decoder's output: its output head, and what the model does to logits after it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparc3_pl.model.structure import output_head

__all__ = ["OutputHead"]

_FACTORS = ("logit_scale", "lm_head_multiplier")
_DIVISORS = ("logits_scaling",)
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Names under which configurations keep what a model does to its logits: Cohere and Falcon-H1 multiply them, Granite
divides them, Gemma caps them softly."""


class OutputHead:
    """The output head of a model, with what the model itself does to the logits after it.

    Args:
        model: A causal language model.

    Attributes:
        linear: The linear map; called as ``head(hidden)`` it gives logits before any scaling or soft-cap.
        factor: The number by which the model multiplies them.
        cap: The model's soft-cap, c in c tanh(logits / c); None if it has none.
    """

    def __init__(self, model: nn.Module) -> None:
        self.name, self.linear = output_head(model)
        config = model.config.get_text_config()
        self.factor = 1.0
        for name in _FACTORS:
            self.factor *= getattr(config, name, None) or 1.0
        for name in _DIVISORS:
            self.factor /= getattr(config, name, None) or 1.0
        self.cap: float | None = next((cap for name in _CAPS if (cap := getattr(config, name, None))), None)

    def __call__(self, hidden: Tensor) -> Tensor:
        return self.linear(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """The model's own logits, float32 or better."""
        logits = self.uncapped(hidden)
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    def uncapped(self, hidden: Tensor) -> Tensor:
        """The model's logits before its soft-cap, float32 or better."""
        logits = self.linear(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits * self.factor if self.factor != 1.0 else logits

    @property
    def is_watched(self) -> bool:
        """Whether somebody sees what passes through the head, and so must see a sample's positions in one call."""
        return bool(self.linear._forward_hooks)
