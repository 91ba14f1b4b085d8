"""Draws from distributions over a vocabulary by numbers in [0, 1), so that a draw depends on nothing but its number."""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["inverse_cdf"]

_RUN = 256
"""Weights that are added up before sums are cumulated, which takes ten times as long as adding."""


def inverse_cdf(weights_NW: Tensor, uniforms_N: Tensor) -> Tensor:
    """The first place at which the sum of weights exceeds the uniform number's share of their total, ``[N]`` int64.

    First the run of places in which it lies, then the place within the run; all sums are made in double precision. A
    place of weight 0 is never drawn.

    Args:
        weights_NW: Weights of at least 0, not all of them 0.
        uniforms_N: Numbers in [0, 1), float64.
    """
    width = weights_NW.shape[1]
    runs_NRK = F.pad(weights_NW, (0, -width % _RUN)).unflatten(1, (-1, _RUN)) if width > _RUN else weights_NW[:, None]
    sums_NR = runs_NRK.sum(2, dtype=torch.float64).cumsum(1)
    run_N1, rest_N1 = _place(sums_NR, uniforms_N[:, None].to(sums_NR.device) * sums_NR[:, -1:])
    within_NK = runs_NRK.take_along_dim(run_N1[..., None], 1)[:, 0].cumsum(1, dtype=torch.float64)
    place_N1, _ = _place(within_NK, rest_N1)
    return (run_N1 * runs_NRK.shape[2] + place_N1)[:, 0].clamp(max=width - 1)


def _place(sums_NK: Tensor, want_N1: Tensor) -> tuple[Tensor, Tensor]:
    """The first place at which rising sums exceed a number, and by how much the number exceeds the sum before it."""
    total_N1 = sums_NK[:, -1:]
    # A number just below 1 may round to the whole sum, which no place exceeds.
    want_N1 = want_N1.minimum(torch.nextafter(total_N1, torch.zeros_like(total_N1)))
    place_N1 = torch.searchsorted(sums_NK, want_N1, right=True).clamp(max=sums_NK.shape[1] - 1)
    before_N1 = sums_NK.gather(1, (place_N1 - 1).clamp(min=0)).where(place_N1 > 0, 0.0)
    return place_N1, want_N1 - before_N1
