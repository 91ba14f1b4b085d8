"""Log-likelihoods of tokens, from the decoder's output, without the logits of all positions at a time."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparc3_pl.attribution.targets import last_hidden_state
from sparc3_pl.data.batches import ReferenceBatch
from sparc3_pl.errors import InputError
from sparc3_pl.model.drawing import inverse_cdf
from sparc3_pl.model.logits import OutputHead
from sparc3_pl.model.patching import as_forward
from sparc3_pl.model.placement import input_device
from sparc3_pl.model.structure import features

__all__ = [
    "BLOCK_ELEMENTS",
    "Drawn",
    "drawn_tokens",
    "log_likelihood",
    "next_tokens",
    "require_known_logits",
    "sample_uniforms",
]

BLOCK_ELEMENTS = {"cpu": 1 << 23, "cuda": 1 << 27}
"""Logits that are made at a time: 32 MiB of float32 on a CPU, 512 MiB on a GPU; their gradient takes as much again."""


_TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""How far logits that were computed twice may lie apart, relative to the largest."""


def next_tokens(batch: ReferenceBatch, tokens_BT: Tensor) -> tuple[Tensor, Tensor]:
    """The places at which some tokens of a batch are predicted: those before them.

    Args:
        batch: The samples.
        tokens_BT: The tokens that count, bool. A sample's first token has nothing before it and never counts.

    Returns:
        At every place the token that follows, ``[B, T]`` int64, and whether it counts, ``[B, T]`` bool.
    """
    labels_BT = batch.input_ids.roll(-1, 1)
    counted_BT = tokens_BT.to(labels_BT.device).roll(-1, 1) & batch.attention_mask.bool()
    counted_BT[:, -1] = False
    return labels_BT, counted_BT


@dataclass(frozen=True)
class Drawn:
    """Labels that are drawn from the model itself, see ``drawn_tokens``.

    Attributes:
        uniforms_BT: A number in [0, 1) for each position, float64.
    """

    uniforms_BT: Tensor


def log_likelihood(
    hidden_BTH: Tensor,
    head: OutputHead,
    labels_BT: Tensor | Drawn,
    counted_BT: Tensor,
    temperature: float = 1.0,
    weight_BT: Tensor | None = None,
) -> Tensor:
    """Sum over a sample's counted positions of log p(label | what precedes), ``[B]``, to be differentiated.

    The gradient at the hidden states of a block of positions is made together with its log-likelihoods, since it is as
    small as they are; logits are never kept, and the backward pass through the decoder finds all it needs. Only where
    the head itself is scored do all counted positions pass through it at once.

    Args:
        hidden_BTH: The decoder's output.
        head: What makes logits of it.
        labels_BT: The token that is judged at each position, int64: the next one of a text; or how it is drawn, of the
            logits that judge it.
        counted_BT: The positions whose log-likelihood counts, bool.
        temperature: Divides the logits.
        weight_BT: Multiplies each counted position's log-likelihood; None: 1.

    Returns:
        Nats, float32 (float64 for a float64 model).
    """
    counted_BT = counted_BT.to(hidden_BTH.device)
    if head.is_watched:
        if isinstance(labels_BT, Drawn):
            labels_BT = drawn_tokens(hidden_BTH, head, counted_BT, labels_BT.uniforms_BT, temperature)
        return _all_at_once(hidden_BTH, head, labels_BT.to(hidden_BTH.device), counted_BT, temperature, weight_BT)
    drawn = isinstance(labels_BT, Drawn)
    by_BT = (labels_BT.uniforms_BT if drawn else labels_BT).to(hidden_BTH.device)
    hidden_NH, by_N = hidden_BTH[counted_BT], by_BT[counted_BT]
    owner_N = counted_BT.nonzero()[:, 0]
    parts = [
        _block(hidden, head, by, drawn, temperature)
        for hidden, by in zip(*(_blocks(tensor, head) for tensor in (hidden_NH, by_N)), strict=True)
    ]
    values_N = torch.cat(parts)
    if weight_BT is not None:
        values_N = values_N * weight_BT.to(counted_BT.device)[counted_BT].to(values_N)
    return values_N.new_zeros(len(hidden_BTH)).index_add(0, owner_N.to(values_N.device), values_N)


def _blocks(tensor_N: Tensor, head: OutputHead) -> tuple[Tensor, ...]:
    elements = BLOCK_ELEMENTS.get(tensor_N.device.type, BLOCK_ELEMENTS["cuda"])
    return tensor_N.split(max(1, elements // features(head.linear)[0]))


def _block(hidden_NH: Tensor, head: OutputHead, by_N: Tensor, drawn: bool, temperature: float) -> Tensor:
    """Log-likelihoods of the labels ``by_N``, or of those that are drawn by these numbers, ``[N]``."""
    if not (torch.is_grad_enabled() and hidden_NH.requires_grad):
        logits_NV = head.logits(hidden_NH)
        labels_N = _drawn(logits_NV, by_N, temperature) if drawn else by_N
        return _of_labels(logits_NV, labels_N, temperature)
    with torch.enable_grad():
        leaf_NH = hidden_NH.detach().requires_grad_()
        logits_NV = head.logits(leaf_NH)
    # The gradient of log p(label) at the logits is onehot - softmax. Made in the logits' own memory, which no backward
    # pass needs, it is autograd's to the bit and takes less memory and time.
    scratch_NV, by_N = logits_NV.detach(), by_N.to(logits_NV.device)
    if temperature != 1.0:
        scratch_NV /= temperature
    sums_N = scratch_NV.logsumexp(1)
    if drawn:
        probs_NV = scratch_NV.sub_(sums_N[:, None]).exp_()
        labels_N1 = inverse_cdf(probs_NV, by_N)[:, None]
        values_N = probs_NV.gather(1, labels_N1)[:, 0].log()  # what is drawn has a probability above 0
    else:
        labels_N1 = by_N[:, None]
        values_N = scratch_NV.gather(1, labels_N1)[:, 0] - sums_N
        probs_NV = scratch_NV.sub_(sums_N[:, None]).exp_()
    probs_NV.neg_().scatter_add_(1, labels_N1, torch.ones_like(labels_N1, dtype=probs_NV.dtype))
    if temperature != 1.0:
        probs_NV /= temperature
    # Positions are independent: the gradient of the sum holds that of each position's value.
    (gradient_NH,) = torch.autograd.grad(logits_NV, leaf_NH, probs_NV)
    return _WithGradient.apply(hidden_NH, values_N, gradient_NH)


def _of_labels(logits_NV: Tensor, labels_N: Tensor, temperature: float) -> Tensor:
    logits_NV = logits_NV / temperature if temperature != 1.0 else logits_NV
    return logits_NV.gather(1, labels_N[:, None].to(logits_NV.device))[:, 0] - logits_NV.logsumexp(1)


class _WithGradient(torch.autograd.Function):
    """Values of each position whose gradient at its hidden state is known already."""

    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, values_N: Tensor, gradient_NH: Tensor) -> Tensor:
        ctx.save_for_backward(gradient_NH)
        return values_N.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient_NH,) = ctx.saved_tensors
        return (gradients[0].to(gradient_NH.device)[:, None] * gradient_NH).to(gradient_NH.dtype), None, None


def _all_at_once(
    hidden_BTH: Tensor,
    head: OutputHead,
    labels_BT: Tensor,
    counted_BT: Tensor,
    temperature: float,
    weight_BT: Tensor | None,
) -> Tensor:
    """``log_likelihood`` by one call of the head on ``[B, N]`` positions, N the most of any sample; the rest add 0."""
    num_B = counted_BT.sum(1)
    most = max(1, int(num_B.max()))
    place_BN = counted_BT.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]
    real_BN = torch.arange(most, device=num_B.device) < num_B[:, None]
    hidden_BNH = hidden_BTH.gather(1, place_BN[..., None].expand(-1, -1, hidden_BTH.shape[2]))
    logits_BNV = head.logits(hidden_BNH)
    values_BN = _of_labels(logits_BNV.flatten(0, 1), labels_BT.gather(1, place_BN).flatten(), temperature)
    values_BN = values_BN.view(place_BN.shape)
    if weight_BT is not None:
        values_BN = values_BN * weight_BT.to(place_BN.device).gather(1, place_BN).to(values_BN)
    return values_BN.where(real_BN.to(values_BN.device), 0).sum(1)


# --- labels drawn from the model --------------------------------------------------------------------------------------


@torch.no_grad()
def drawn_tokens(
    hidden_BTH: Tensor, head: OutputHead, counted_BT: Tensor, uniforms_BT: Tensor, temperature: float = 1.0
) -> Tensor:
    """A token drawn from the model's own distribution at each counted position, ``[B, T]`` int64; 0 elsewhere.

    By inverse CDF: a position's number in [0, 1) alone picks its token, whatever else is in the batch.

    Args:
        hidden_BTH: The decoder's output.
        head: What makes logits of it.
        counted_BT: Where to draw.
        uniforms_BT: A number in [0, 1) for each position, float64.
        temperature: Divides the logits.
    """
    counted_BT, uniforms_BT = (tensor.to(hidden_BTH.device) for tensor in (counted_BT, uniforms_BT))
    hidden_NH, uniforms_N = hidden_BTH.detach()[counted_BT], uniforms_BT[counted_BT]
    drawn_BT = torch.zeros(counted_BT.shape, dtype=torch.int64, device=hidden_BTH.device)
    parts = [
        _drawn(head.logits(hidden), uniforms, temperature)
        for hidden, uniforms in zip(*(_blocks(tensor, head) for tensor in (hidden_NH, uniforms_N)), strict=True)
    ]
    drawn_BT[counted_BT] = torch.cat(parts).to(drawn_BT.device)
    return drawn_BT


def _drawn(logits_NV: Tensor, uniforms_N: Tensor, temperature: float) -> Tensor:
    return inverse_cdf((logits_NV / temperature).softmax(1), uniforms_N)


def sample_uniforms(input_ids_BT: Tensor, attention_mask_BT: Tensor, seed: int) -> Tensor:
    """A number in [0, 1) for each real token, ``[B, T]`` float64; 0 for padding.

    A sample's numbers depend on the seed and on its tokens alone: not on its batch, its padding or its process.
    """
    uniforms_BT = np.zeros(input_ids_BT.shape)
    for row, ids_T, mask_T in zip(uniforms_BT, input_ids_BT.cpu(), attention_mask_BT.cpu().bool(), strict=True):
        tokens = ids_T[mask_T].tolist()
        digest = hashlib.sha256(f"{seed} {' '.join(map(str, tokens))}".encode()).digest()
        generator = np.random.Generator(np.random.Philox(int.from_bytes(digest[:8], "big")))
        row[mask_T.numpy()] = generator.random(len(tokens))
    return torch.from_numpy(uniforms_BT).to(input_ids_BT.device)


# --- what a model does to its logits ----------------------------------------------------------------------------------

NUM_TOKENS = 16
"""Tokens of a sample on which the logits are compared."""


@torch.no_grad()
def require_known_logits(model: nn.Module, sample: Sequence[int]) -> None:
    """Compares a model's logits with what ``OutputHead`` makes of the decoder's output, on the beginning of a sample.

    Raises:
        InputError: if the model does something to its logits that is not known here.
    """
    if not len(sample):
        return
    input_ids = torch.tensor([list(sample[:NUM_TOKENS])], device=input_device(model))
    expected = model(input_ids=input_ids, use_cache=False).logits

    def apart(model: nn.Module, input_ids: Tensor) -> Tensor:
        return OutputHead(model).logits(last_hidden_state(model, input_ids, torch.ones_like(input_ids)))

    logits = as_forward(apart, model, input_ids)
    far, largest = (float(t.abs().max()) for t in (logits - expected.to(logits.device), expected))
    if not far <= _TOLERANCE.get(expected.dtype, 1e-4) * largest:
        error = far / largest if largest else math.inf
        raise InputError(
            f"{type(model).__name__} does something to its logits after the output head that is not known here (they "
            f"differ by {error:.1%}), so they cannot be attributed; use model.target: predicted"
        )
