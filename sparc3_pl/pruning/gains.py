"""The edit ``gains``: every component's contribution is multiplied by a factor of its own."""

from dataclasses import dataclass

from torch import nn

from sparc3_pl.errors import InputError
from sparc3_pl.pruning.edits import Change, Chosen, Edit, contributing

__all__ = ["Gains"]


@dataclass(frozen=True)
class Gains(Edit):
    """The entries that read a component are multiplied by its factor, which the plan holds.

    A neuron's column of the down-projection, a channel's column of attention's output projection: what the component
    contributes is scaled exactly, whatever its activation function.
    """

    def changes(self, model: nn.Module, chosen: Chosen) -> list[Change]:
        if chosen.factor is None:
            raise InputError(
                f"edit=gains needs a factor for each component, but {chosen.layer} has none; make it again"
            )
        return [Change(part, chosen.factor[part.owner]) for part in contributing(chosen.parts)]

    def participle(self) -> str:
        return "multiplied, each by a factor of its own"
