"""Faster matrix products on the CPU, for the length of a ``with`` block."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparc3_pl.model.patching import swapped
from sparc3_pl.runtime.memory import free_memory

__all__ = ["onednn_linears", "repacked_linears"]

FEWEST_ROWS = 32
"""Rows below which a product is bound by reading the weight, so that the usual kernel is as fast or faster."""


@contextmanager
def onednn_linears(model: nn.Module) -> Iterator[None]:
    """Inside the block the model's float32 linear layers on the CPU multiply by oneDNN instead of torch's default BLAS.

    On AMD processors MKL leaves some of the AVX-512 units idle: there this gives 10 to 15 % more multiplications a
    second; elsewhere it is about as fast. Values agree to the last bits (both are float32 throughout). No weight is
    copied. For inference only: the operator has no derivative. Layers that are not plain ``nn.Linear``, not float32
    or not on the CPU are left as they are, and nothing happens where torch was built without oneDNN.
    """
    with ExitStack() as undo:
        if torch.backends.mkldnn.is_available():
            for layer in model.modules():
                if type(layer) is nn.Linear and "forward" not in vars(layer):
                    undo.enter_context(swapped(layer, "forward", _forward_of(layer)))
        yield


def _forward_of(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        plain = x.dtype == layer.weight.dtype == torch.float32 and x.device.type == layer.weight.device.type == "cpu"
        if not plain or torch.is_grad_enabled() or x.numel() < FEWEST_ROWS * x.shape[-1]:
            return F.linear(x, layer.weight, layer.bias)
        return torch.ops.mkldnn._linear_pointwise(x, layer.weight, layer.bias, "none", [], "")

    return forward


_COLUMNS = 512
"""Outputs of a block, whose products with a few dozen rows run at the rate of large ones."""

_FEWEST_ROWS_OF_BLOCKS = 16
"""Rows below which blocks are no faster than the weight as it lies."""


@contextmanager
def repacked_linears(model: nn.Module) -> Iterator[None]:
    """Inside the block the model's float32 linear layers on the CPU multiply by copies of their weights that suit a few
    dozen rows.

    A weight lies row by row, ``[out, in]``, and each product with it first brings it into another order, which costs as
    much as multiplying a few dozen rows. The copies are in that order: contiguous ``[in, 512]``. Products of 24 to 93
    rows are 1.2 to 1.7 times as fast, those of 256 and more equally. Values agree to the last bits.

    A copy is made of every such weight, which takes about the time of drawing 700 tokens; where less than four times
    their size is free, no copy is made and ``onednn_linears`` is entered instead. For inference only; a change to a
    weight inside the block is not seen.
    """
    layers = [layer for layer in model.modules() if _is_plain(layer)]
    if 4 * sum(layer.weight.nbytes for layer in layers) > free_memory(torch.device("cpu")):
        with onednn_linears(model):
            yield
        return
    with ExitStack() as undo:
        for layer in layers:
            undo.enter_context(swapped(layer, "forward", _forward_by_blocks(layer)))
        yield


def _is_plain(layer: nn.Module) -> bool:
    if type(layer) is not nn.Linear or type(layer.weight) is not nn.Parameter or "forward" in vars(layer):
        return False  # a weight that is shared out over processes is no plain parameter
    return layer.weight.dtype == torch.float32 and layer.weight.device.type == "cpu"


def _forward_by_blocks(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    with torch.no_grad():
        parts = layer.weight.tensor_split(max(1, round(layer.out_features / _COLUMNS)))
        blocks = [part.t().contiguous() for part in parts]
    widths = [block.shape[1] for block in blocks]

    def forward(x: Tensor) -> Tensor:
        num_rows = math.prod(x.shape[:-1])
        if x.dtype != torch.float32 or torch.is_grad_enabled() or num_rows < _FEWEST_ROWS_OF_BLOCKS:
            return F.linear(x, layer.weight, layer.bias)
        rows = x.reshape(num_rows, x.shape[-1])
        out = rows.new_empty(num_rows, layer.out_features)
        for block, columns in zip(blocks, out.split(widths, dim=1), strict=True):
            torch.mm(rows, block, out=columns)
        if layer.bias is not None:
            out += layer.bias
        return out.view(*x.shape[:-1], layer.out_features)

    return forward
