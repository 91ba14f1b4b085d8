"""Among whom components compete: in the whole model, or within each layer.

A scope takes a number or a share to choose and the passes over the values, and returns the selection.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter

from sparc3_pl.errors import InputError
from sparc3_pl.registry import Registry
from sparc3_pl.selection.contrast import Side
from sparc3_pl.selection.lowest import Passes, Selection, TooFewCandidates, joined, select_lowest

__all__ = ["SCOPES", "Amount", "LayerScope", "ModelScope", "Scope"]


@dataclass(frozen=True)
class Amount:
    """How many components are to be chosen.

    Attributes:
        name: The argument's name in messages: ``num_neurons`` or ``num_weights``.
        number: How many over all layers together, or None for a share.
        share: A share of all instead, in (0, 1).

    Raises:
        InputError: if the number is below 1, or the share is no share.
    """

    name: str
    number: int | None = None
    share: float | None = None

    def __post_init__(self) -> None:
        if self.share is not None and not 0 < self.share < 1:
            raise InputError(f"share={self.share} is not a share between 0 and 1; e.g. 0.01 is 1 %")
        if self.number is not None and self.number < 1:
            raise InputError(f"{self.name}={self.number}: at least 1 must be chosen")

    def of(self, size: int) -> int:
        """How many of ``size`` components that is, at least 1."""
        return max(1, round(self.share * size)) if self.share is not None else self.number


class Scope(ABC):
    """Among whom components compete. Arguments are the fields of a dataclass."""

    @abstractmethod
    def select(self, passes: Passes, side: Side, amount: Amount) -> Selection:
        """The lowest candidates of ``passes``, as many as ``amount`` says of the components of ``side``.

        Raises:
            InputError: if so many cannot be chosen; ``TooFewCandidates`` if it is for want of candidates.
        """


@dataclass(frozen=True)
class ModelScope(Scope):
    """All components compete with all others."""

    def select(self, passes: Passes, side: Side, amount: Amount) -> Selection:
        count = amount.of(side.count)
        if count > side.count:
            raise InputError(
                f"{amount.name}={count}, but only {side.count} are scored; lower {amount.name} or widen layers"
            )
        return select_lowest(passes, count)


@dataclass(frozen=True)
class LayerScope(Scope):
    """Components compete within their layer: the same number is chosen in every layer, or the same share."""

    def select(self, passes: Passes, side: Side, amount: Amount) -> Selection:
        widths = {layer: stop - start for layer in side.layers for start, stop in [side.span(layer)]}
        depth, width = len(widths), min(widths.values())
        if amount.share is None and (amount.number % depth or amount.number >= width * depth):
            near = max(1, min(round(amount.number / depth), width - 1)) * depth
            raise InputError(
                f"{amount.name}={amount.number} is not the same number in each of {depth} layers; e.g. {near} is"
            )
        chosen: Selection = {}
        for layer, blocks in groupby(passes(), key=attrgetter("layer")):
            whole = joined(list(blocks))
            count = amount.of(widths[layer]) if amount.share is not None else amount.number // depth
            if count >= widths[layer]:
                raise InputError(f"share={amount.share} leaves nothing of layer {layer}; lower it or narrow layers")
            try:
                chosen |= select_lowest(lambda whole=whole: iter([whole]), count)
            except TooFewCandidates as error:
                raise TooFewCandidates(count, error.available, f"layer {layer}: ") from None
        return chosen


SCOPES: Registry[Scope] = Registry(
    "scope", Scope, {"model": f"{__name__}.ModelScope", "layer": f"{__name__}.LayerScope"}
)
