"""The outcome of a check: pass, warn or fail, with the reason."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

__all__ = ["Check", "Status", "grade", "worst"]

Status = Literal["pass", "warn", "fail"]
_ORDER: tuple[Status, ...] = ("pass", "warn", "fail")


@dataclass(frozen=True)
class Check:
    """One question and its answer.

    Attributes:
        name: Name of the checked property.
        status: ``pass``; ``warn``: take note before you continue, or it could not be checked; ``fail``: stop here.
        reason: The figures behind the status, and a remedy unless it is ``pass``.
    """

    name: str
    status: Status
    reason: str


def worst(checks: Iterable[Check]) -> Status:
    """The worst status of ``checks``; ``pass`` if there is none."""
    return max((check.status for check in checks), key=_ORDER.index, default="pass")


def grade(value: float, warn: float, fail: float) -> Status:
    """``pass`` up to ``warn``, ``fail`` beyond ``fail``, ``warn`` in between; NaN fails.

    Large values are bad if ``warn < fail``, small values if ``warn > fail``.
    """
    sign = 1 if warn <= fail else -1
    if not sign * value <= sign * fail:  # also for NaN
        return "fail"
    return "pass" if sign * value <= sign * warn else "warn"
