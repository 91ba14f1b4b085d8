r"""Sums of |W * G| on a GPU without writing G: one kernel from the factors to the sums.

Written out, the gradient of a ``[14336, 4096]`` weight is 235 MB of float32 per sample, which the plain path
(``accumulators.weight_relevance``) moves through memory several times. Here a tile of it lives in registers.

Nothing is atomic and the tiles are fixed, not tuned at run time: the same card gives the same bits again.
"""

import logging
import os
from functools import lru_cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparc3_pl.attribution.recording import LayerPass

__all__ = ["fused_relevance", "fusible"]

log = logging.getLogger(__name__)

DTYPES: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)
"""Number formats that go through the kernel. It takes float32 too, but exact float32 has no tensor cores: there the
product is nearly all of the time, and torch.mm knows how to make it."""

SELF_CHECK_TOLERANCE = 1e-4
"""Largest error of the kernel's first sums on a card, relative to the largest of them; float32 sums keep to 1e-6."""


class Tile(NamedTuple):
    """The tile that one program of the kernel makes, and how it is launched."""

    num_out: int
    num_in: int
    num_tokens: int
    """Tokens that are read at a time."""
    warps: int
    stages: int
    """Reads that are under way at a time."""


def fusible(layer: LayerPass, total_OI: Tensor | None = None) -> bool:
    """Whether ``fused_relevance`` can take this batch: half precision, several positions, all on one supported card.

    It shows no product by itself, so whoever counts non-finite values takes the plain path without asking.
    """
    x, delta, weight = layer.x_BTI, layer.delta_BTO, layer.weight_OI
    tensors = (x, delta, weight) if total_OI is None else (x, delta, weight, total_OI)
    return (
        x.shape[1] > 1
        and x.dtype == delta.dtype
        and x.dtype in DTYPES
        and weight.dtype in (torch.float32, *DTYPES)
        and (total_OI is None or (total_OI.dtype == torch.float32 and total_OI.is_contiguous()))
        and all(type(tensor) in (Tensor, nn.Parameter) and tensor.device == x.device for tensor in tensors)
        and _usable(x.device, x.dtype, total_OI is not None)
    )


def fused_relevance(layer: LayerPass, total_OI: Tensor | None = None) -> Tensor:
    """Each sample's row sums of |W * G|, ``[B, O]`` float64.

    Args:
        layer: The batch's pass; x and delta float32, bfloat16 or float16, alike, with any strides.
        total_OI: Float32, contiguous, on the layer's device; the sum over samples of |W * G| is added to it in place.
    """
    from sparc3_pl.attribution.fused_kernel import relevance_kernel

    x_BTI, delta_BTO, weight_OI = layer.x_BTI, layer.delta_BTO, layer.weight_OI
    assert x_BTI.dtype == delta_BTO.dtype != torch.float64, (x_BTI.dtype, delta_BTO.dtype)
    assert total_OI is None or (total_OI.is_contiguous() and total_OI.dtype == torch.float32)
    (num_B, num_T, num_I), num_O = x_BTI.shape, len(weight_OI)
    tile = _tile(x_BTI.dtype, _capability(x_BTI.device), total_OI is not None and num_B > 1)
    blocks_O, blocks_I = -(-num_O // tile.num_out), -(-num_I // tile.num_in)
    rows_BCO = torch.empty(num_B, blocks_I, num_O, device=x_BTI.device)  # float32, C the block of columns
    with torch.cuda.device_of(x_BTI):  # a model may lie on several cards
        relevance_kernel[(blocks_O * blocks_I,)](
            x_BTI, delta_BTO, weight_OI, rows_BCO if total_OI is None else total_OI, rows_BCO,
            num_B, num_T, num_O, num_I, *x_BTI.stride(), *delta_BTO.stride(), *weight_OI.stride(),
            ADD=total_OI is not None, WIDEN=not x_BTI.is_cuda, GROUP=8,
            BLOCK_O=tile.num_out, BLOCK_I=tile.num_in, BLOCK_T=tile.num_tokens,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return rows_BCO.sum(1, dtype=torch.float64)


def _tile(dtype: torch.dtype, capability: tuple[int, int], sums_batch: bool) -> Tile:
    """A tile that fits the registers, with a second one for sums over the batch, and the card's shared memory."""
    if dtype == torch.float32:
        return Tile(64, 64, 32, warps=4, stages=2)
    if capability[0] in (9, 10):  # 228 KiB of shared memory; 99 KiB is all that the smallest of the others has
        return Tile(128, 128 if sums_batch else 256, 64, warps=8, stages=3)
    return Tile(128, 128, 32, warps=8, stages=3)


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


@lru_cache
def _usable(device: torch.device, dtype: torch.dtype, adds: bool) -> bool:
    return _supported(device) and _agrees(device, dtype, adds)


def _supported(device: torch.device) -> bool:
    """Whether it is an NVIDIA card of compute capability 8.0 or more, with Triton; SPARC3_FUSED=0 switches it off."""
    if device.type != "cuda" or torch.version.hip or os.environ.get("SPARC3_FUSED") == "0":
        return False
    return find_spec("triton") is not None and _capability(device) >= (8, 0)


def _agrees(device: torch.device, dtype: torch.dtype, adds: bool) -> bool:
    """Whether the kernel is right on a small layer: a card or compiler on which it fails costs time, not the run."""
    try:
        error = _self_check_error(device, dtype, adds)
    except Exception as failure:  # whatever Triton, its C compiler or the driver raises, the plain path is there
        log.warning("the fused kernel does not run on %s, plain torch does its work: %r", device, failure)
        return False
    if not error < SELF_CHECK_TOLERANCE:
        log.warning("the fused kernel is wrong on %s (by %.1e), plain torch does its work", device, error)
        return False
    return True


def _self_check_error(device: torch.device, dtype: torch.dtype, adds: bool) -> float:
    """Largest error against float64, relative to the largest sum; batches of one and of two are compiled separately."""
    generator = torch.Generator().manual_seed(0)  # its own: the run's random numbers stay as they are
    shapes = (2, 80, 272), (2, 80, 144), (144, 272)
    x, delta, weight = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    relevance_BOI = (weight.double() * (delta.double().mT @ x.double())).abs()
    errors = []
    for size in (1, 2):
        total_OI = torch.ones(weight.shape, device=device) if adds else None
        rows_BO = fused_relevance(LayerPass("", x[:size], delta[:size], delta[:size], weight), total_OI)
        pairs = [(rows_BO, relevance_BOI[:size].sum(2))]
        if total_OI is not None:
            pairs.append((total_OI.double(), 1 + relevance_BOI[:size].sum(0)))
        errors += [(actual - want).abs().max() / want.max() for actual, want in pairs]
    return float(torch.stack(errors).max())
