"""Activation checkpointing for models in eval mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from sparc3_pl.attribution.norms import forward_slot
from sparc3_pl.errors import InputError
from sparc3_pl.model.patching import swapped
from sparc3_pl.model.structure import decoder

__all__ = ["checkpointed"]


@contextmanager
def checkpointed(model: nn.Module) -> Iterator[None]:
    """Inside the block every decoder layer keeps only its input, and runs again in the backward pass.

    It takes about a third more time, and the memory for one layer's activations instead of all layers'. The backward
    pass must run inside the block too. transformers' own switch does nothing in eval mode, and training mode would
    turn dropout on.

    Raises:
        InputError: if the model has no decoder layers that can be run again.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in decoder(model).modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise InputError(
            f"model.gradient_checkpointing: {type(model).__name__} has no layers that can be run again; leave it off"
        )
    with ExitStack() as undo:
        for layer in layers:
            slot = forward_slot(layer)
            again = partial(checkpoint, getattr(layer, slot), use_reentrant=False, preserve_rng_state=False)
            undo.enter_context(swapped(layer, slot, again))
        yield
