r"""Running sums over samples of the scores of one linear layer.

With W ``[O, I]`` the weight, x ``[T, I]`` the input and delta ``[T, O]`` the gradient at the output for one sample,
G = delta^T x is that sample's weight gradient and W * G the relevance of its weights (SparC3, arXiv 2506.13727). The
sums here are over samples, never over tokens or batches first: the absolute value of a sum is smaller than the sum of
absolute values.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from sparc3_pl.attribution.fused import fused_relevance, fusible
from sparc3_pl.attribution.precision import exact
from sparc3_pl.attribution.recording import LayerPass
from sparc3_pl.errors import InputError
from sparc3_pl.model.components import Group
from sparc3_pl.runtime.collectives import is_sharded

__all__ = [
    "Counts",
    "add_sample_scores",
    "add_weight_scores",
    "component_scores",
    "drop_nonfinite",
    "no_counts",
    "no_sample_scores",
    "require_all",
    "require_finite",
    "require_once",
    "sum_of_layers",
    "token_relevance",
    "weight_relevance",
]

BLOCK_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 26}
"""Elements of W * G that are made at a time. On a CPU 2 MiB of float32, so that a block stays in the cache; on a GPU
256 MiB, so that a kernel's start costs nothing."""

Counts = dict[str, Tensor]
"""Numbers of NaN and infinite values by ``nan`` and ``inf``, int64 scalars; it may hold other sums beside them."""

Rows = slice | Tensor
Products = Iterable[tuple[int, Tensor]]
"""Each sample's number and its W * G in the rows at hand, in a buffer that the next sample overwrites."""


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
    dtype = exact(weight_OI.dtype)
    x_BTI, delta_BTO = (  # CUDA multiplies half precision into float32 by itself; a CPU gets float32 factors
        t if t.is_cuda and t.dtype in (torch.bfloat16, torch.float16) else t.to(dtype)
        for t in (layer.x_BTI, layer.delta_BTO)
    )
    num_out, num_in = weight_OI.shape
    size = min(num_out, _block_rows(weight_OI))
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
    """W * G of a layer with one position (the output head): a logit gives one row a gradient, a likelihood all."""
    dtype, size = exact(layer.weight_OI.dtype), _block_rows(layer.weight_OI)
    for b, (x_I, delta_O) in enumerate(zip(layer.x_BTI[:, 0], layer.delta_BTO[:, 0], strict=True)):
        for rows in delta_O.nonzero()[:, 0].split(size):
            yield rows, [(b, delta_O[rows, None].to(dtype) * x_I.to(dtype) * layer.weight_OI[rows])]


def _block_rows(weight_OI: Tensor) -> int:
    return max(1, BLOCK_ELEMENTS.get(weight_OI.device.type, 1 << 26) // weight_OI.shape[1])


def no_counts(device: torch.device) -> Counts:
    """Counts of 0 on ``device``."""
    return {name: torch.zeros((), dtype=torch.int64, device=device) for name in ("nan", "inf")}


def drop_nonfinite(values: Tensor, counts: Counts) -> Tensor:
    """Sets NaN and infinite ``values`` to 0 in place and adds their numbers to ``counts``."""
    counts["nan"] += values.isnan().sum()
    counts["inf"] += values.isinf().sum()
    return values.nan_to_num_(0.0, 0.0, 0.0)


def _absolute(products: Products, counts: Counts | None) -> Products:
    return ((b, (product if counts is None else drop_nonfinite(product, counts)).abs_()) for b, product in products)


def add_weight_scores(total_OI: Tensor, layer: LayerPass, counts: Counts | None = None) -> Tensor:
    """Adds a batch's sum over samples of |W * G| to ``total_OI``, in place.

    Args:
        total_OI: ``[O, I]`` float32. It may lie on another device than the layer: a batch's sum is then sent over
            block by block, so the larger the batch, the fewer the transfers. It may be shared out over the ranks as
            the weight is (a ``DTensor``): then the sum is over the samples of all ranks, and every rank must call this
            for every pass; it takes one reduce-scatter, and memory for the batch's sum of this one layer, whole.
        layer: The batch's pass through the layer.
        counts: Where NaN and infinite relevances are counted; they then add 0. None: they are added as they are.

    Returns:
        Each sample's total, ``[B]`` float64.
    """
    if is_sharded(total_OI):
        from torch.distributed.tensor import DTensor, Partial

        batch_sum = torch.zeros(layer.weight_OI.shape, dtype=total_OI.dtype, device=layer.weight_OI.device)
        relevance_B = add_weight_scores(batch_sum, layer, counts)
        parts = DTensor.from_local(batch_sum, total_OI.device_mesh, [Partial()], run_check=False)
        total_OI += parts.redistribute(placements=total_OI.placements)
        return relevance_B
    if counts is None and fusible(layer, total_OI):
        return fused_relevance(layer, total_OI).sum(1)
    device = layer.weight_OI.device
    relevance_B = torch.zeros(len(layer.x_BTI), dtype=torch.float64, device=device)
    for rows, products in weight_relevance(layer):
        here = total_OI.device == device and isinstance(rows, slice)
        part = total_OI[rows] if here else torch.zeros_like(layer.weight_OI[rows], dtype=total_OI.dtype)
        for b, product in _absolute(products, counts):
            part += product
            relevance_B[b] += product.sum()
        if not here:
            total_OI[rows.to(total_OI.device) if isinstance(rows, Tensor) else rows] += part.to(total_OI.device)
    return relevance_B


def component_scores(layer: LayerPass, group: Group, *, signed: bool = False, counts: Counts | None = None) -> Tensor:
    """Each sample's sums of |W * G| over the rows (or columns) of every component, ``[B, n]`` float64.

    Signed, they are sums of W * G. By the chain rule the sum of a row is the sum over tokens of z * dz, z = W x
    (SparC3, App. B), and that of a column the sum over tokens of x * dx: no weight gradient is needed.

    Args:
        layer: The batch's pass through the layer.
        group: The layer's components; n is the length of their scores.
        signed: Keep the sign.
        counts: Where NaN and infinite relevances are counted; they then add 0. None: they are added as they are.
    """
    assert group.axis != "both", f"{group.layer}: single weights are summed by add_weight_scores"
    along = layer if group.axis == "out" else layer.transposed()
    if not signed:
        return group.gathered(_absolute_rows(along, counts))
    rows_BO = _unit_products(along).sum(1).double()
    return group.gathered(rows_BO if counts is None else drop_nonfinite(rows_BO, counts))


def _absolute_rows(layer: LayerPass, counts: Counts | None) -> Tensor:
    if counts is None and fusible(layer):
        return fused_relevance(layer)
    shape = len(layer.x_BTI), len(layer.weight_OI)
    rows_BO = torch.zeros(shape, dtype=torch.float64, device=layer.weight_OI.device)
    for rows, products in weight_relevance(layer):
        for b, product in _absolute(products, counts):
            rows_BO[b, rows] = product.sum(1).double()
    return rows_BO


def token_relevance(layer: LayerPass, group: Group) -> Tensor:
    """Sum over the components' units of |z * dz| at every token, ``[B, T]`` float32 (float64 for a float64 model)."""
    return _unit_products(layer)[..., group.rows].abs_().sum(2)


def _unit_products(layer: LayerPass) -> Tensor:
    """Pre-activation times gradient, z * dz, ``[B, T, O]``."""
    units_BTO = layer.units_BTO
    return units_BTO * layer.delta_BTO.to(exact(units_BTO.dtype))


def no_sample_scores(group: Group, device: torch.device, squares: bool, groups: int) -> dict[str, Tensor]:
    """Sums of 0 for ``add_sample_scores``: of scores, of their ``squares`` if asked for, and of ``groups`` groups."""
    sums = {"sum": torch.zeros(group.shape, dtype=torch.float64, device=device)}
    if squares:
        sums["squares"] = torch.zeros_like(sums["sum"])
    if groups:
        sums["groups"] = torch.zeros(groups, *group.shape, dtype=torch.float64, device=device)
        sums["group_sizes"] = torch.zeros(groups, dtype=torch.int64, device=device)
    return sums


def add_sample_scores(
    sums: dict[str, Tensor], scores_BN: Tensor, group: Group, groups_B: Tensor | None = None
) -> Tensor:
    """Adds each sample's scores of a layer's components to ``sums``, and to its squares and groups if there are any.

    Args:
        sums: Updated in place.
        scores_BN: ``[B, n]`` float64.
        group: The components.
        groups_B: The samples' groups, if sums of groups are kept.

    Returns:
        The sum of each sample's scores, ``[B]``: NaN where one of them is not finite, also one that counts for nothing.
    """
    if groups_B is not None:
        groups_B = groups_B.to(scores_BN.device)
        sums["groups"].index_add_(0, groups_B, scores_BN)
        sums["group_sizes"].index_add_(0, groups_B, torch.ones_like(groups_B))
    sums["sum"] += scores_BN.sum(0)
    if "squares" in sums:
        sums["squares"] += scores_BN.square().sum(0)
    relevance_B = scores_BN[:, group.own].sum(1)
    if group.count < scores_BN.shape[1]:  # what is not finite is seen wherever it stands
        relevance_B = relevance_B.where(scores_BN.isfinite().all(1), torch.nan)
    return relevance_B


def require_all(layers: Mapping[str, object], seen: Mapping[str, object]) -> None:
    """Refuses layers that a pass has not met.

    Raises:
        InputError: naming the first of them.
    """
    missing = [name for name in layers if name not in seen]
    if missing:
        raise InputError(f"layer {missing[0]} takes no part in the model's pass: leave it out of model.targets")


def require_once(name: str, seen: Collection[str]) -> None:
    """Refuses a layer that a pass has met already, so that its components have no one value.

    Raises:
        InputError: naming it.
    """
    if name in seen:
        raise InputError(f"layer {name} runs twice in one pass: leave it out of model.targets")


def require_finite(values: Mapping[str, Tensor]) -> None:
    """Refuses values by layer that are not finite, with one device synchronisation for all of them.

    Args:
        values: Values by layer, in the order in which the pass met the layers.

    Raises:
        InputError: naming the first layer.
    """
    first = next(iter(values.values()))
    finite = torch.stack([value.isfinite().all().to(first.device) for value in values.values()])
    if not finite.all():
        name = list(values)[int(finite.logical_not().nonzero()[0, 0])]
        raise InputError(
            f"layer {name}: NaN or infinite values in its scores; load the model in float32 (model.dtype), "
            "or replace them by 0 and count them (model.nonfinite: zero)"
        )


def sum_of_layers(values: Mapping[str, Tensor]) -> Tensor:
    """The sum over layers, which may lie on several devices, in float64."""
    first = next(iter(values.values()))
    return torch.stack([value.to(first.device) for value in values.values()]).sum(0, dtype=torch.float64)
