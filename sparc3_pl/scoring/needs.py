"""What a scoring run will take, before any weight is read: bytes of weights, sums, activations and outputs.

The activations that a backward pass keeps are counted at the run's own batch size and length, with fused attention and
the plain gradient; the rules of LRP keep a few more.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from sparc3_pl.document.needs import Need
from sparc3_pl.model.footprint import activation_bytes, num_layers, skeleton_in_dtype, weight_bytes
from sparc3_pl.model.source import ModelSource
from sparc3_pl.scoring.score_run import ScoreRequest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["needs_of"]

_SMALLER_BATCH = (
    "lower data.batch_size or data.seq_len, or set model.gradient_checkpointing, model.sums_on_host or "
    "model.device_map: auto"
)
_EXAMPLE = 128
"""Tokens of a sample for which activations are told where the settings do not bound its length."""
_FEWER_LAYERS = "score fewer layers at a time (model.targets)"
_ON_DISK = "give another --output, or score fewer layers (model.targets)"


def needs_of(request: ScoreRequest, source: ModelSource, batch_size: int, length: int | None) -> list[Need]:
    """What a process of a run takes; no weight is read.

    Args:
        request: What is scored.
        source: The model.
        batch_size: Samples in a batch.
        length: Tokens of the longest sample; None: not known before the samples are read.

    Raises:
        InputError: as ``load_skeleton`` and ``ScoreRequest.groups``.
    """
    skeleton = skeleton_in_dtype(source)
    weights, dtype = weight_bytes(skeleton), skeleton.dtype
    request_on_device = replace(request, options=replace(request.options, sums_on_host=False))
    scorer = request_on_device.scorer(skeleton)
    sums = sum(tensor.nbytes for layer in scorer.sums.values() for tensor in layer.values())
    options = request.options
    count = sum(math.prod(layer.group.shape) for layer in scorer.layers.values())
    scores = 4 * count * (1 + options.squares + options.groups)
    name, at = str(dtype).removeprefix("torch."), "host" if options.sums_on_host else "device"
    needs = [
        Need("weights", "device", weights, f"{weights // dtype.itemsize:,} parameters, {name}", _SMALLER_BATCH),
        Need("sums", at, sums, f"{len(scorer.layers)} layers", _FEWER_LAYERS if options.sums_on_host else ""),
    ]
    if request.method.object.needs_target:
        activations = _activations(skeleton, batch_size, length or _EXAMPLE, options.gradient_checkpointing)
        note = f"{batch_size} x {length or _EXAMPLE} tokens"
        if length is None and activations is not None:
            activations, note = None, f"{activations / 2**20:,.1f} MiB for {note}; samples may be shorter or longer"
        needs.append(Need("activations", "device", activations, note))
    return [*needs, Need("scores", "disk", scores, "float32", _ON_DISK)]


def _activations(skeleton: PreTrainedModel, batch_size: int, length: int, checkpointing: bool) -> int | None:
    """Bytes that a backward pass keeps of a batch; None if the model's family is not known."""
    activations = activation_bytes(skeleton, batch_size, length)
    if activations is not None and checkpointing:  # of one decoder layer, and what all layers read
        words = batch_size * length * skeleton.get_input_embeddings().weight.shape[1] * skeleton.dtype.itemsize
        activations = activations // num_layers(skeleton) + num_layers(skeleton) * words
    return activations
