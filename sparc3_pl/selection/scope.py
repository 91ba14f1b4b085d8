"""Among whom components compete: in the whole model, within a layer, a row, or a few neighbours of a row.

A scope takes a number or a share to choose and the passes over the values, and returns what is chosen: components with
their values, or, for single weights, masks.

| scope | who competes | how many |
|---|---|---|
| ``model`` | all with all | the number, or ``round(share * all)`` |
| ``layer`` | those of a layer | the same number in every layer, or ``round(share * layer)`` |
| ``row`` | the weights of an output row | ``int(share * inputs)`` of every row (Wanda: arXiv 2306.11695) |
| ``pattern`` | m consecutive weights of a row | ``n:m``: n of every m stay (Mishra et al., arXiv 2104.08378) |

The layer of a whole expert is the decoder layer, among whose experts its router chooses.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, is_dataclass
from itertools import groupby
from operator import attrgetter
from typing import ClassVar

from sparc3_pl.errors import InputError
from sparc3_pl.io.formats import Record
from sparc3_pl.model.bitmask import BitMask
from sparc3_pl.registry import Registry
from sparc3_pl.selection.budgets import block_of
from sparc3_pl.selection.contrast import Side
from sparc3_pl.selection.lowest import (
    Masks,
    Passes,
    Selection,
    TooFewCandidates,
    cut_lowest,
    cut_lowest_of_each,
    joined,
    lowest_in_groups,
    masks_below,
    select_lowest,
)

__all__ = ["SCOPES", "Amount", "LayerScope", "ModelScope", "PatternScope", "RowScope", "Scope", "places_of"]


@dataclass(frozen=True)
class Amount:
    """How many components are to be chosen.

    Attributes:
        name: The argument's name in messages: ``num_neurons`` or ``num_weights``.
        number: How many over all layers together, or None for a share.
        share: A share of all instead, in (0, 1).
        budgets: A share of its own for each layer instead, in [0, 1), by name.

    Raises:
        InputError: if the number is below 1, or the share is no share.
    """

    name: str
    number: int | None = None
    share: float | None = None
    budgets: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        if self.share is not None and not 0 < self.share < 1:
            raise InputError(f"share={self.share} is not a share between 0 and 1; e.g. 0.01 is 1 %")
        if self.number is not None and self.number < 1:
            raise InputError(f"{self.name}={self.number}: at least 1 must be chosen")

    def of(self, size: int) -> int:
        """How many of ``size`` components that is, at least 1."""
        return max(1, round(self.share * size)) if self.share is not None else self.number

    def share_of(self, layer: str) -> float | None:
        """The share of a layer; None if a number was asked for."""
        return self.share if self.budgets is None else self.budgets[layer]


class Scope(ABC):
    """Among whom components compete. Arguments are the fields of a dataclass."""

    takes_amount: ClassVar[bool] = True
    """Whether it must be told how many to choose."""
    takes_budgets: ClassVar[bool] = False
    """Whether each layer may have a share of its own."""
    whole_model: ClassVar[bool] = True
    """Whether all scored layers take part; else those of the transformer blocks do, unless layers are named."""

    @abstractmethod
    def select(self, passes: Passes, side: Side, amount: Amount) -> Selection:
        """The lowest candidates of ``passes``, as many as ``amount`` says of the components of ``side``.

        Raises:
            InputError: if so many cannot be chosen; ``TooFewCandidates`` if it is for want of candidates.
        """

    def masks(self, passes: Passes, side: Side, amount: Amount) -> Masks:
        """The lowest candidates as masks, for single weights: layer by layer, so that half of a large model can go.

        Raises:
            InputError: as ``select``.
        """
        for layer, (index, _) in self.select(passes, side, amount).items():
            yield layer, BitMask.of_index(index, _sizes(side)[layer])

    def arguments(self) -> Record:
        """Its arguments, by name."""
        return asdict(self) if is_dataclass(self) else {}


def _sizes(side: Side) -> dict[str, int]:
    """Number of components of every layer."""
    return {layer: stop - start for layer in side.layers for start, stop in [side.span(layer)]}


@dataclass(frozen=True)
class ModelScope(Scope):
    """All components compete with all others."""

    def select(self, passes: Passes, side: Side, amount: Amount) -> Selection:
        return select_lowest(passes, self._count(side, amount))

    def masks(self, passes: Passes, side: Side, amount: Amount) -> Masks:
        cut = cut_lowest(passes, self._count(side, amount))
        yield from masks_below(passes, dict.fromkeys(side.layers, cut), _sizes(side))

    def _count(self, side: Side, amount: Amount) -> int:
        count = amount.of(side.count)
        if count > side.count:
            raise InputError(
                f"{amount.name}={count}, but only {side.count} are scored; lower {amount.name} or widen layers"
            )
        return count


@dataclass(frozen=True)
class LayerScope(Scope):
    """Components compete within their layer: the same number is chosen in every layer, or the same share."""

    takes_budgets = True

    def select(self, passes: Passes, side: Side, amount: Amount) -> Selection:
        counts, places = self._counts(side, amount), places_of(side)
        chosen: Selection = {}
        for place, blocks in groupby(passes(), key=lambda block: places[block.layer]):
            of_layers = groupby(blocks, key=attrgetter("layer"))
            whole = [joined(list(of_layer)) for _, of_layer in of_layers]
            if place not in counts:
                continue
            try:
                chosen |= select_lowest(lambda whole=whole: iter(whole), counts[place])
            except TooFewCandidates as error:
                raise TooFewCandidates(counts[place], error.available, f"layer {place}: ") from None
        return chosen

    def masks(self, passes: Passes, side: Side, amount: Amount) -> Masks:
        cuts = cut_lowest_of_each(passes, self._counts(side, amount))
        yield from masks_below(passes, cuts, _sizes(side))

    def _counts(self, side: Side, amount: Amount) -> dict[str, int]:
        """How many of each layer, for the layers of which any are chosen."""
        places, sizes = places_of(side), _sizes(side)
        widths, amounts = dict.fromkeys(places.values(), 0), dict.fromkeys(places.values(), 0.0)
        for layer, size in sizes.items():
            widths[places[layer]] += size
            amounts[places[layer]] += 0 if amount.number is not None else amount.share_of(layer) * size
        depth, width = len(widths), min(widths.values())
        if amount.number is not None and (amount.number % depth or amount.number >= width * depth):
            near = max(1, min(round(amount.number / depth), width - 1)) * depth
            raise InputError(
                f"{amount.name}={amount.number} is not the same number in each of {depth} layers; e.g. {near} is"
            )
        if amount.number is not None:
            return dict.fromkeys(widths, amount.number // depth)
        counts = {layer: max(1, round(number)) for layer, number in amounts.items() if number}
        for layer, count in counts.items():
            if count >= widths[layer]:
                share = amounts[layer] / widths[layer]
                raise InputError(f"share={share:g} leaves nothing of layer {layer}; lower it or narrow layers")
        return counts


def places_of(side: Side) -> dict[str, str]:
    """The place within which the components of each layer compete: the layer itself.

    Whole experts, each of which has its score at a layer of its own, compete within their decoder layer.
    """
    sizes = _sizes(side)
    if any(size > 1 for size in sizes.values()):
        return {layer: layer for layer in sizes}
    blocks = {layer: block_of(layer) or layer for layer in sizes}
    return blocks if len(set(blocks.values())) < len(blocks) else {layer: layer for layer in sizes}


@dataclass(frozen=True)
class RowScope(Scope):
    """The weights of an output row compete: the same share of every row is chosen, rounded down as Wanda does."""

    takes_budgets = True
    whole_model = False

    def select(self, passes: Passes, side: Side, amount: Amount) -> Selection:
        raise _not_for_components(side)

    def masks(self, passes: Passes, side: Side, amount: Amount) -> Masks:
        if amount.number is not None:
            raise InputError(f"{amount.name}={amount.number} with scope=row: give a share of each row, e.g. share=0.5")
        widths = {layer: side.row_length(layer) for layer in side.layers}
        counts = {}
        for layer, width in widths.items():
            share = amount.share_of(layer)
            counts[layer] = int(width * share)
            if share and not counts[layer]:
                raise InputError(f"share={share} of the {width} inputs of {layer} is not one weight of a row; raise it")
        yield from lowest_in_groups(passes, widths, counts, _sizes(side))


@dataclass(frozen=True)
class PatternScope(Scope):
    """Chooses m - n of every m consecutive weights of a row, so that n stay.

    Args:
        pattern: ``n:m``, such as 2:4. (Where n is not half of m, mind that Wanda's authors' program takes the first
            number for those that are removed.)

    Raises:
        InputError: if it is no such pattern.
    """

    pattern: str = "2:4"

    takes_amount = False
    whole_model = False

    def __post_init__(self) -> None:
        count, _, of = str(self.pattern).partition(":")
        if not (count.isdecimal() and of.isdecimal() and 0 < int(count) < int(of)):
            raise InputError(f"pattern={self.pattern!r}: give n:m, n of every m weights stay, e.g. 2:4")

    def select(self, passes: Passes, side: Side, amount: Amount) -> Selection:
        raise _not_for_components(side)

    def masks(self, passes: Passes, side: Side, amount: Amount) -> Masks:
        kept_of_group, of = map(int, self.pattern.split(":"))
        for layer in side.layers:
            if side.row_length(layer) % of:
                raise InputError(
                    f"pattern={self.pattern}: the {side.row_length(layer)} inputs of {layer} are not a multiple of "
                    f"{of}; leave the layer out (layers), or use another pattern"
                )
        every = dict.fromkeys(side.layers, of)
        yield from lowest_in_groups(passes, every, dict.fromkeys(every, of - kept_of_group), _sizes(side))


def _not_for_components(side: Side) -> InputError:
    """The error that says why rows cannot compete."""
    try:
        side.row_length(side.layers[0])
    except InputError as error:
        return error
    raise AssertionError("weights are chosen by masks")


SCOPES: Registry[Scope] = Registry(
    "scope",
    Scope,
    {
        "model": f"{__name__}.ModelScope",
        "layer": f"{__name__}.LayerScope",
        "row": f"{__name__}.RowScope",
        "pattern": f"{__name__}.PatternScope",
    },
)
