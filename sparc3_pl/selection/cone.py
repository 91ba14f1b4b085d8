"""The best change, free or within a cone, for a quadratic cost whose matrix is a diagonal and a few rows."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sparc3_pl.errors import InputError

__all__ = ["lowest_anywhere", "lowest_in_cone"]

_TOLERANCE = 1e-4
_MOST = 2_000


def lowest_anywhere(diagonal_N: Tensor, rows_RN: Tensor) -> Callable[[Tensor], Tensor]:
    """What gives, for a derivative a, the d that makes a . d + 1/2 d' H d smallest, H = diag(diagonal) + rows' rows.

    By the Woodbury identity, which leaves one matrix of ``[R, R]`` to be factorised, for all derivatives.

    Args:
        diagonal_N: Above 0 everywhere.
        rows_RN: The rows; products are taken in float64.

    Returns:
        Derivative ``[N]`` to change ``[N]``, both float64.
    """
    diagonal_N, rows_RN = diagonal_N.double(), rows_RN.double()
    inner_RR = torch.eye(len(rows_RN), dtype=torch.float64) + (rows_RN / diagonal_N) @ rows_RN.T
    factor_RR = torch.linalg.cholesky(inner_RR)

    def lowest(derivative_N: Tensor) -> Tensor:
        alone_N = derivative_N.double() / diagonal_N
        together_R = torch.cholesky_solve((rows_RN @ alone_N)[:, None], factor_RR)[:, 0]
        return (rows_RN.T @ together_R) / diagonal_N - alone_N

    return lowest


def lowest_in_cone(
    derivative_N: Tensor, diagonal_N: Tensor, rows_RN: Tensor, *, down: bool = True, up: bool = True
) -> Tensor:
    """The d that makes a . d + 1/2 d' H d smallest, H = diag(diagonal) + rows' rows, ``[N]`` float64.

    H is never formed: with R rows a step takes 2 R N multiplications. The method is projected gradient descent with
    momentum (Beck and Teboulle, 2009, FISTA) that begins anew whenever the momentum points uphill (O'Donoghue and
    Candes, 2015), in coordinates in which H has a diagonal of ones. It ends when a step of it would change d by less
    than a ten-thousandth of its length, in these coordinates.

    Args:
        derivative_N: a.
        diagonal_N: Above 0 everywhere.
        rows_RN: The rows, float32 or float64; products are taken in that type.
        down: Whether d may be below 0.
        up: Whether d may be above 0.

    Raises:
        InputError: if it does not settle.
    """
    scale_N = (diagonal_N.double() + rows_RN.double().square().sum(0)).rsqrt()
    slope_N, own_N = derivative_N.double() * scale_N, diagonal_N.double() * scale_N**2
    rows_RN = rows_RN * scale_N.to(rows_RN.dtype)
    low, high = -math.inf if down else 0.0, math.inf if up else 0.0

    def product(x_N: Tensor) -> Tensor:
        return own_N * x_N + (rows_RN.T @ (rows_RN @ x_N.to(rows_RN.dtype))).double()

    # the largest eigenvalue bounds the steps: power iteration gives it from below, so a step that was too long is
    # taken again with half the length
    v_N = torch.ones_like(slope_N)
    for _ in range(20):
        v_N = product(v_N / v_N.norm())
    length = 1 / float(v_N.norm())
    x_N = y_N = of_x_N = of_y_N = torch.zeros_like(slope_N)  # H x and H y: H is applied once a step, to the new point
    momentum = 1.0
    for _ in range(_MOST):
        new_N = (y_N - length * (slope_N + of_y_N)).clamp(low, high)
        of_new_N, change_N = product(new_N), new_N - y_N
        bound = float(change_N @ change_N) / length * (1 + 1e-3)
        # differences of products are rough near the end: a step is found too long by the product of the difference
        if float(change_N @ (of_new_N - of_y_N)) > bound and float(change_N @ product(change_N)) > bound:
            length /= 2
            continue
        if change_N.norm() <= _TOLERANCE * length * new_N.norm():
            return new_N * scale_N
        if float((y_N - new_N) @ (new_N - x_N)) > 0:
            momentum, y_N, of_y_N = 1.0, new_N, of_new_N
        else:
            following = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
            ahead = (momentum - 1) / following
            y_N, of_y_N = new_N + ahead * (new_N - x_N), of_new_N + ahead * (of_new_N - of_x_N)
            momentum = following
        x_N, of_x_N = new_N, of_new_N
    raise InputError(
        f"contrast=budget: the change of least cost did not settle in {_MOST:,} steps; lower off_diagonal, or raise "
        "the ridge"
    )
