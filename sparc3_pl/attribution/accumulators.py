r"""Running sums over samples of the scores of one linear layer.

With W ``[O, I]`` the weight, x ``[T, I]`` the input and delta ``[T, O]`` the gradient at the output for one sample,
G = delta^T x is that sample's weight gradient and W * G the relevance of its weights (SparC3, arXiv 2506.13727). The
sums here are over samples, never over tokens or batches first: the absolute value of a sum is smaller than the sum of
absolute values.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from sparc3_pl.attribution.fused import fused_relevance, fusible
from sparc3_pl.attribution.recording import LayerPass

__all__ = [
    "Accumulator",
    "NeuronScores",
    "SignedNeuronScores",
    "WeightScores",
    "drop_nonfinite",
    "token_relevance",
    "weight_relevance",
]

BLOCK_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 26}
"""Elements of W * G that are made at a time. On a CPU 2 MiB of float32, so that a block stays in the cache; on a GPU
256 MiB, so that a kernel's start costs nothing."""

Rows = slice | Tensor
Products = Iterable[tuple[int, Tensor]]
"""Sample and its W * G in the rows at hand, in a buffer that the next sample overwrites."""


def weight_relevance(layer: LayerPass) -> Iterator[tuple[Rows, Products]]:
    """W * G of every sample of a batch in blocks of output rows, the samples of a block one after the other.

    Yields:
        The rows (a slice, or their indices) and each sample's relevance of them, ``[rows, I]`` float32 (float64 for a
        float64 model). Rows that get no gradient may be left out: their relevance is 0.
    """
    if layer.x_BTI.shape[1] == 1:
        yield from _one_position(layer)
        return
    weight_OI = layer.weight_OI
    dtype = _exact(weight_OI.dtype)
    x_BTI, delta_BTO = (_as_factor(tensor, dtype) for tensor in (layer.x_BTI, layer.delta_BTO))
    num_out, num_in = weight_OI.shape
    size = min(num_out, max(1, BLOCK_ELEMENTS.get(weight_OI.device.type, 1 << 26) // num_in))
    buffer = torch.empty(size, num_in, dtype=dtype, device=weight_OI.device)
    for start in range(0, num_out, size):
        rows = slice(start, min(start + size, num_out))
        yield rows, _products(x_BTI, delta_BTO[..., rows], weight_OI[rows], buffer[: rows.stop - start])


def _products(x_BTI: Tensor, delta_BTR: Tensor, weight_RI: Tensor, buffer_RI: Tensor) -> Products:
    for b, (x_TI, delta_TR) in enumerate(zip(x_BTI, delta_BTR, strict=True)):
        if x_TI.dtype == buffer_RI.dtype:
            torch.mm(delta_TR.t(), x_TI, out=buffer_RI)
        else:  # half precision goes in, float32 comes out: the sum over tokens is not rounded
            torch.mm(delta_TR.t(), x_TI, out_dtype=buffer_RI.dtype, out=buffer_RI)
        yield b, buffer_RI.mul_(weight_RI)


def _one_position(layer: LayerPass) -> Iterator[tuple[Rows, Products]]:
    """The output head at the target: one row of the vocabulary has a gradient."""
    dtype = _exact(layer.weight_OI.dtype)
    for b, (x_I, delta_O) in enumerate(zip(layer.x_BTI[:, 0], layer.delta_BTO[:, 0], strict=True)):
        rows = delta_O.nonzero()[:, 0]
        yield rows, [(b, delta_O[rows, None].to(dtype) * x_I.to(dtype) * layer.weight_OI[rows])]


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _as_factor(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """CUDA multiplies half precision into float32 by itself; a CPU gets float32 factors."""
    return tensor if tensor.is_cuda and tensor.dtype in (torch.bfloat16, torch.float16) else tensor.to(dtype)


def token_relevance(layer: LayerPass) -> Tensor:
    """Sum over the units of |z * dz| at every token, ``[B, T]`` float32 (float64 for a float64 model)."""
    return _unit_products(layer).abs_().sum(2)


def _unit_products(layer: LayerPass) -> Tensor:
    """Pre-activation times gradient, z * dz, ``[B, T, O]``."""
    return layer.z_BTO * layer.delta_BTO.to(_exact(layer.z_BTO.dtype))


def drop_nonfinite(values: Tensor, counts: dict[str, Tensor]) -> Tensor:
    """Sets NaN and infinite ``values`` to 0 in place and adds their numbers to ``counts["nan"]`` and ``["inf"]``."""
    counts["nan"] += values.isnan().sum()
    counts["inf"] += values.isinf().sum()
    return values.nan_to_num_(0.0, 0.0, 0.0)


class Accumulator(ABC):
    """A layer's running sums; ``tensors`` holds what ranks and shards add up.

    Args:
        weight_OI: The layer's weight, for its shape and device.
        zero_nonfinite: Count NaN and infinite relevances and take them for 0, instead of letting them through (the
            scorer stops at them).
    """

    def __init__(self, weight_OI: Tensor, zero_nonfinite: bool = False) -> None:
        self._zero_nonfinite = zero_nonfinite
        device = weight_OI.device
        self.tensors = {name: torch.zeros((), dtype=torch.int64, device=device) for name in ("nan", "inf")}

    @abstractmethod
    def add(self, layer: LayerPass, groups_B: Tensor | None = None) -> Tensor:
        """Adds a batch; returns each sample's total relevance in this layer, ``[B]`` float64.

        Args:
            layer: The batch's pass through the layer.
            groups_B: The group of each sample, where sums of groups are kept.
        """

    def _finite(self, values: Tensor) -> Tensor:
        return drop_nonfinite(values, self.tensors) if self._zero_nonfinite else values

    def _absolute(self, products: Products) -> Products:
        return ((b, self._finite(product).abs_()) for b, product in products)


class WeightScores(Accumulator):
    """Sum over samples of |W * G|: ``[O, I]`` float32.

    Args:
        weight_OI: See ``Accumulator``.
        zero_nonfinite: See ``Accumulator``.
        device: Where the sum is kept; by default with the weight. Elsewhere, a batch's sum is sent over block by
            block: the larger the batch, the fewer the transfers.
    """

    def __init__(
        self, weight_OI: Tensor, zero_nonfinite: bool = False, device: torch.device | str | None = None
    ) -> None:
        super().__init__(weight_OI, zero_nonfinite)
        self.tensors["sum"] = torch.zeros(weight_OI.shape, device=weight_OI.device if device is None else device)

    def add(self, layer: LayerPass, groups_B: Tensor | None = None) -> Tensor:
        return self._add_to(self.tensors["sum"], layer)

    def _add_to(self, total: Tensor, layer: LayerPass) -> Tensor:
        if not self._zero_nonfinite and fusible(layer, total):
            return fused_relevance(layer, total).sum(1)
        device = layer.weight_OI.device
        relevance_B = torch.zeros(len(layer.x_BTI), dtype=torch.float64, device=device)
        for rows, products in weight_relevance(layer):
            here = total.device == device and isinstance(rows, slice)
            part = total[rows] if here else torch.zeros_like(layer.weight_OI[rows], dtype=total.dtype)
            for b, product in self._absolute(products):
                part += product
                relevance_B[b] += product.sum()
            if not here:
                total[rows.to(total.device) if isinstance(rows, Tensor) else rows] += part.to(total.device)
        return relevance_B


class NeuronScores(Accumulator):
    """Sum over samples of the row sums of |W * G|: ``[O]`` float64.

    Args:
        weight_OI: See ``Accumulator``.
        zero_nonfinite: See ``Accumulator``.
        squares: Sum their squares too, ``[O]``.
        groups: G > 0: sum them by group of samples too, ``[G, O]``, and count the samples of each group, ``[G]``.
    """

    def __init__(self, weight_OI: Tensor, zero_nonfinite: bool = False, squares: bool = False, groups: int = 0) -> None:
        super().__init__(weight_OI, zero_nonfinite)
        device = weight_OI.device
        for name in ("sum", "squares") if squares else ("sum",):
            self.tensors[name] = torch.zeros(len(weight_OI), dtype=torch.float64, device=device)
        if groups:
            self.tensors["groups"] = torch.zeros(groups, len(weight_OI), dtype=torch.float64, device=device)
            self.tensors["group_sizes"] = torch.zeros(groups, dtype=torch.int64, device=device)

    def add(self, layer: LayerPass, groups_B: Tensor | None = None) -> Tensor:
        scores_BO = self._scores(layer)
        if groups_B is not None:
            groups_B = groups_B.to(scores_BO.device)
            self.tensors["groups"].index_add_(0, groups_B, scores_BO)
            self.tensors["group_sizes"].index_add_(0, groups_B, torch.ones_like(groups_B))
        self.tensors["sum"] += scores_BO.sum(0)
        if "squares" in self.tensors:
            self.tensors["squares"] += scores_BO.square().sum(0)
        return scores_BO.sum(1)

    def _scores(self, layer: LayerPass) -> Tensor:
        """Each sample's neuron scores, ``[B, O]`` float64."""
        if not self._zero_nonfinite and fusible(layer):
            return fused_relevance(layer)
        shape = len(layer.x_BTI), len(layer.weight_OI)
        scores_BO = torch.zeros(shape, dtype=torch.float64, device=layer.weight_OI.device)
        for rows, products in weight_relevance(layer):
            for b, product in self._absolute(products):
                scores_BO[b, rows] = product.sum(1).double()
        return scores_BO


class SignedNeuronScores(NeuronScores):
    """Sum over samples of the signed row sums of W * G: ``[O]`` float64.

    By the chain rule the row sum is the sum over tokens of z * dz, z = W x (SparC3, App. B): no weight gradient.
    """

    def _scores(self, layer: LayerPass) -> Tensor:
        return self._finite(_unit_products(layer).sum(1).double())
