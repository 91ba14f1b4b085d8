"""Weight scores of a model whose weights are shared out over the ranks."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial

from sparc3_pl.attribution.accumulators import Accumulator, WeightScores
from sparc3_pl.attribution.recording import LayerPass

__all__ = ["ShardedWeightScores"]


class ShardedWeightScores(WeightScores):
    """Sum over the samples of all ranks of |W * G|: ``[O, I]`` float32, sharded as the weight is.

    ``add`` is collective, one reduce-scatter whatever the batch holds: every rank must call it for every pass. Its
    memory besides the rank's own part: the batch's sum of this one layer, whole.

    Args:
        weight_OI: The sharded weight, for its shape, device and sharding.
        zero_nonfinite: See ``Accumulator``.
    """

    def __init__(self, weight_OI: DTensor, zero_nonfinite: bool = False) -> None:
        Accumulator.__init__(self, weight_OI, zero_nonfinite)  # that of WeightScores would make a whole sum
        self.tensors["sum"] = torch.zeros_like(weight_OI, dtype=torch.float32)

    def add(self, layer: LayerPass, groups_B: Tensor | None = None) -> Tensor:
        total = self.tensors["sum"]
        batch_sum = torch.zeros(layer.weight_OI.shape, dtype=total.dtype, device=layer.weight_OI.device)
        relevance_B = self._add_to(batch_sum, layer)
        parts = DTensor.from_local(batch_sum, total.device_mesh, [Partial()], run_check=False)
        total += parts.redistribute(placements=total.placements)
        return relevance_B
