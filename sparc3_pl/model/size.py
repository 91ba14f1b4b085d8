"""How many operations a model's matrix products take."""

from __future__ import annotations

from torch import nn

from sparc3_pl.model.structure import decoder, output_head

__all__ = ["decoder_flops", "head_flops"]


def decoder_flops(model: nn.Module) -> float:
    """Operations per token of a forward pass through the decoder layers: 2 per parameter that is no embedding.

    Attention's own products are not counted; of a mixture of experts all experts are.
    """
    parts = decoder(model)
    looked_up = {id(module.weight) for module in parts.modules() if isinstance(module, nn.Embedding)}
    return 2.0 * sum(weight.numel() for weight in parts.parameters() if id(weight) not in looked_up)


def head_flops(model: nn.Module) -> float:
    """Operations of the output head at one position."""
    return 2.0 * output_head(model)[1].weight.numel()
