"""Controls: choices of the same size that know nothing, or something else, of the behaviour.

| control | what is chosen |
|---|---|
| ``random`` | at random among all candidates |
| ``random_matched`` | for every chosen neuron another of its layer with a similar general score |
| ``top_general`` | the strongest on general text |
| ``null`` | by the same contrast, of general folders against another general folder |
| ``permuted`` | of ``edit=gains``: the same factors, dealt at random to the components of the same layer |

The layer of a whole expert is its decoder layer. All are seeded. Larger choices of the same seed hold the smaller ones,
but for ``random_matched``, which follows (and avoids) the neurons that it is matched to.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from sparc3_pl.errors import InputError
from sparc3_pl.registry import Registry
from sparc3_pl.selection.contrast import Contrast, Side, contrast, protected, strongest
from sparc3_pl.selection.lowest import Block, Masks, Passes, Selection, TooFewCandidates, collect
from sparc3_pl.selection.scope import Amount, Scope, places_of

__all__ = [
    "CONTROLS",
    "Control",
    "ControlName",
    "Question",
    "best_first",
    "null_sides",
    "random_matched",
    "random_passes",
]

Components = Sequence[tuple[str, int]]
"""Layer and index of each."""

ControlName = Literal["random", "random_matched", "top_general", "null", "permuted"]
T = TypeVar("T")


@dataclass(frozen=True)
class Question:
    """What is to be chosen, from what.

    Attributes:
        general: Scores on general text.
        behaviour: Scores on the behaviour's samples, if there are any.
        contrast: What the choice is by.
        scope: Among whom components compete.
        amount: How many to choose.
        protect: Share of the general set's strongest that is left alone.
    """

    general: Side
    behaviour: Side | None
    contrast: Contrast
    scope: Scope
    amount: Amount
    protect: float = 0.0

    def ranked(self) -> Passes:
        """The contrast, without what is protected."""
        return self.without_protected(contrast(self.contrast, self.general, self.behaviour))

    def without_protected(self, passes: Passes) -> Passes:
        """``passes`` in which what is protected may not be chosen."""
        return protected(passes, self.general, self.protect)

    def select(self, passes: Passes) -> Selection:
        """The lowest of ``passes``.

        Raises:
            InputError: if there are not so many, saying what was left out.
        """
        try:
            return self.scope.select(passes, self.general, self.amount)
        except TooFewCandidates as error:
            raise self._too_few(error) from None

    def masks(self, passes: Passes) -> Masks:
        """The lowest of ``passes``, of single weights.

        Raises:
            InputError: as ``select``.
        """
        try:
            yield from self.scope.masks(passes, self.general, self.amount)
        except TooFewCandidates as error:
            raise self._too_few(error) from None

    def _too_few(self, error: TooFewCandidates) -> InputError:
        reasons = [f"{name}={value}" for name, value in self.contrast.arguments().items()]
        reasons += [f"protect={self.protect}"] if self.protect else []
        left_out = f" ({', '.join(reasons)})" if reasons else ""
        name, request = self.amount.name, f"{self.amount.name}={error.asked}"
        if error.among is not None:
            name, request = "the share", f"{error.asked} of {error.among} are to be chosen"
        return InputError(
            f"{error.where}{request}, but only {error.available} of {error.among or self.general.count} may be "
            f"chosen{left_out}; lower {name}"
        )


@dataclass(frozen=True)
class _Places:
    """Components by the place within which they are exchanged (``places_of``), and their positions there.

    Attributes:
        layers: The layers of each place, in order: the first and last + 1 index of their components.
        place: The place of each layer.
    """

    layers: dict[str, dict[str, tuple[int, int]]]
    place: dict[str, str]

    @classmethod
    def of(cls, side: Side) -> "_Places":
        place = places_of(side)
        layers: dict[str, dict[str, tuple[int, int]]] = {}
        for layer in side.layers:
            layers.setdefault(place[layer], {})[layer] = side.span(layer)
        return cls(layers, place)

    @property
    def sizes(self) -> dict[str, int]:
        """Number of components of each place."""
        return {name: sum(stop - start for start, stop in spans.values()) for name, spans in self.layers.items()}

    def at(self, layer: str, index: int) -> tuple[str, int]:
        """Place and position of a component."""
        before = 0
        for name, (start, stop) in self.layers[self.place[layer]].items():
            if name == layer:
                return self.place[layer], before + index - start
            before += stop - start
        raise AssertionError(f"{layer} is in its place")

    def component(self, place: str, position: int) -> tuple[str, int]:
        """Layer and index of the component at a position of a place."""
        for layer, (start, stop) in self.layers[place].items():
            if position < stop - start:
                return layer, start + position
            position -= stop - start
        raise AssertionError(f"{place} has no position {position} left")

    def joined(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The values of each place: those of its layers, one after the other."""
        return {name: torch.cat([values[layer] for layer in spans]) for name, spans in self.layers.items()}


@dataclass(frozen=True)
class Control:
    """A choice in three steps, of which a control replaces one. As it stands here, it is no control.

    Args:
        seed: Seed for drawing the control.
    """

    seed: int = 0
    uses_behaviour: ClassVar[bool] = True
    uses_general: ClassVar[bool] = False
    """Whether it is drawn by general scores, and not only from the components that these list."""
    fewest_general: ClassVar[int] = 0
    """How many sets of general scores it cannot do without."""
    for_weights: ClassVar[bool] = True
    """Whether it can be drawn among single weights."""
    draws_unchosen: ClassVar[bool] = False
    """Whether each chosen component is replaced by one that is not chosen: as many must be left."""
    for_steps: ClassVar[bool] = True
    """Whether it can be the control of an edit whose components have a step each."""

    def sides(self, general: Sequence[T], behaviour: Sequence[T]) -> tuple[Sequence[T], Sequence[T]]:
        """The score folders of the two sides."""
        return general, behaviour

    def values(self, question: Question) -> Passes:
        """The values whose lowest are chosen."""
        return question.ranked()

    def exchanged(self, question: Question, selection: Selection) -> Selection:
        """What is chosen in the end, in place of the lowest."""
        return selection

    def counterparts(self, question: Question, chosen: Components) -> Components:
        """The components that get the factors of the chosen ones, in the same order."""
        return chosen


@dataclass(frozen=True)
class RandomControl(Control):
    """Components drawn at random from all candidates."""

    uses_behaviour = False
    for_steps = False

    def values(self, question: Question) -> Passes:
        return question.without_protected(random_passes(question.general, self.seed))


@dataclass(frozen=True)
class TopGeneral(Control):
    """The strongest on general text, protected or not."""

    uses_behaviour = False
    uses_general = True
    for_steps = False

    def values(self, question: Question) -> Passes:
        return strongest(question.general)


@dataclass(frozen=True)
class Null(Control):
    """General text against general text."""

    uses_general = True
    fewest_general = 2
    for_steps = False

    def sides(self, general: Sequence[T], behaviour: Sequence[T]) -> tuple[Sequence[T], Sequence[T]]:
        return null_sides(general, self.seed)


@dataclass(frozen=True)
class RandomMatched(Control):
    """Another neuron in place of each chosen one: of the same layer, with a similar general score."""

    uses_general = True
    for_weights = False
    draws_unchosen = True

    def values(self, question: Question) -> Passes:
        if question.general.holds_weights:
            raise InputError("control=random_matched is not for weight scores; use random")
        return question.ranked()

    def exchanged(self, question: Question, selection: Selection) -> Selection:
        new_indices: dict[str, list[int]] = {}
        chosen = [(layer, index) for layer, index, _ in best_first(selection)]
        for layer, index in self.counterparts(question, chosen):
            new_indices.setdefault(layer, []).append(index)
        # The plain difference has a value for those, too, that the contrast leaves out.
        behaviour = question.behaviour
        values = collect(contrast("difference", question.general, behaviour) if behaviour else question.general)
        indices = {layer: torch.tensor(sorted(new_indices[layer])) for layer in values if layer in new_indices}
        return {layer: (at, values[layer].values[at - values[layer].offset]) for layer, at in indices.items()}

    def counterparts(self, question: Question, chosen: Components) -> Components:
        blocks = collect(question.without_protected(question.general))
        allowed = {
            layer: torch.ones(len(block.values), dtype=torch.bool) if block.allowed is None else block.allowed
            for layer, block in blocks.items()
        }
        places = _Places.of(question.general)
        general = places.joined({layer: block.values for layer, block in blocks.items()})
        matches = random_matched([places.at(*one) for one in chosen], general, places.joined(allowed), self.seed)
        return [places.component(*one) for one in matches]


@dataclass(frozen=True)
class Permuted(Control):
    """The factors of a layer, those that stay 1 among them, dealt at random to its components."""

    def values(self, question: Question) -> Passes:
        if not question.contrast.gives_steps:
            raise InputError("control=permuted deals out the factors of edit=gains; use random_matched")
        return question.ranked()

    def counterparts(self, question: Question, chosen: Components) -> Components:
        generator, places = torch.Generator().manual_seed(self.seed), _Places.of(question.general)
        orders = {name: torch.randperm(size, generator=generator).tolist() for name, size in places.sizes.items()}
        dealt = ((name, orders[name][position]) for name, position in (places.at(*one) for one in chosen))
        return [places.component(*one) for one in dealt]


CONTROLS: Registry[Control] = Registry(
    "control",
    Control,
    {
        "random": f"{__name__}.RandomControl",
        "random_matched": f"{__name__}.RandomMatched",
        "top_general": f"{__name__}.TopGeneral",
        "null": f"{__name__}.Null",
        "permuted": f"{__name__}.Permuted",
    },
)


def best_first(selection: Selection) -> list[tuple[str, int, float]]:
    """Layer, index and value of the selected, lowest value first; equal values by layer and index."""
    entries = [
        (layer, index, value)
        for layer, (indices, values) in selection.items()
        for index, value in zip(indices.tolist(), values.tolist(), strict=True)
    ]
    return sorted(entries, key=lambda entry: entry[2])


def random_passes(passes: Passes, seed: int) -> Passes:
    """Passes over the same components with seeded random values: their k lowest are k at random."""

    def drawn() -> Iterator[Block]:
        generator = torch.Generator().manual_seed(seed)
        for block in passes():
            yield Block(block.layer, block.offset, torch.rand(len(block.values), generator=generator))

    return drawn


def null_sides(folders: Sequence[T], seed: int) -> tuple[list[T], list[T]]:
    """Splits general folders: one, by ``seed``, plays the behaviour; the others stay general.

    Raises:
        InputError: if there is only one folder.
    """
    if len(folders) < 2:
        raise InputError(
            f"control=null contrasts general scores with other general scores, but {len(folders)} folder was given; "
            "give --general two folders of different seeds"
        )
    index = seed % len(folders)
    return [folder for i, folder in enumerate(folders) if i != index], [folders[index]]


def random_matched(
    chosen: Sequence[tuple[str, int]],
    general: Mapping[str, Tensor],
    allowed: Mapping[str, Tensor],
    seed: int,
    candidates: int = 10,
) -> list[tuple[str, int]]:
    """Draws another neuron for every chosen one: of the same layer, with a similar general score.

    One of the ``candidates`` free neurons that are nearest in the layer's ranking by general score is drawn.

    Args:
        chosen: (layer, position in the layer's vector), in the order of the choice.
        general: General scores ``[n]`` of each layer.
        allowed: Which neurons of each layer may be drawn, ``[n]``; the chosen ones never are.
        seed: Seed of the random draw.
        candidates: How many neighbours to draw from.

    Raises:
        InputError: if a layer has not enough other neurons.
    """
    generator = torch.Generator().manual_seed(seed)
    free = {layer: mask.clone() for layer, mask in allowed.items()}
    for layer, position in chosen:
        free[layer][position] = False
    ranks = {layer: general[layer].argsort(stable=True).argsort() for layer in {layer for layer, _ in chosen}}
    matches = []
    for layer, position in chosen:
        distance = (ranks[layer] - ranks[layer][position]).abs()
        near = distance.masked_fill(~free[layer], len(distance)).argsort(stable=True)[:candidates]
        near = near[free[layer][near]]
        if not len(near):
            raise InputError(
                f"control=random_matched: layer {layer} has nothing left to match with; lower num_neurons or protect, "
                "or take control=permuted for edit=gains"
            )
        match = int(near[torch.randint(len(near), (), generator=generator)])
        free[layer][match] = False
        matches.append((layer, match))
    return matches
