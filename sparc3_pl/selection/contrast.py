r"""Contrasts of general and behaviour scores: the lowest are the most specific to the behaviour.

| name | value of component i |
|---|---|
| ``difference`` | R_general - R_behaviour (Hatefi et al., arXiv 2506.13727, Eq. 7) |
| ``normalized`` | R_general / T_general - R_behaviour / T_behaviour, T the sum of a set's absolute scores |
| ``rank`` | rank_general - rank_behaviour, ranks within the model from 1, equal scores sharing their mean rank |
| ``t`` | (R_general - R_behaviour) / sqrt(SE_general^2 + SE_behaviour^2) (Welch), SE over samples |
| ``set_difference`` | -R_behaviour for the top share of behaviour without the top share of general; others are out |
| ``general`` | R_general alone: the least used components go first (compression, no behaviour) |
| ``budget`` | -R_behaviour^2 / (F + ridge mean F), F the Fisher information of general text (``budget.py``) |
| ``expertise`` | -AUROC of labelled samples alone; others than experts are out (``expertise.py``) |

Each side may be several folders (seeds): their mean is taken, every folder counting the same whatever its number of
samples. Everything is streamed: one block of a layer is in memory at a time (``rank`` holds the ranks of the whole
model, and is for neurons, which are few).
"""

import fnmatch
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass, replace
from functools import cached_property
from statistics import mean
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparc3_pl.errors import InputError
from sparc3_pl.io.formats import Record
from sparc3_pl.registry import Registry, Spec
from sparc3_pl.scores.folder import ScoreFolder, mean_blocks, require_comparable
from sparc3_pl.selection.lowest import Block, Passes, all_finite, collect, cut_lowest

__all__ = [
    "CONTRASTS",
    "Contrast",
    "Side",
    "SideScores",
    "Vector",
    "average_ranks",
    "contrast",
    "format_warnings",
    "named_in_plan",
    "protected",
    "share_of_strongest",
    "strongest",
]

_LENGTH_RATIO = 1.5  # lengths further apart than this are reported
_ENDING_GAP = 0.2  # so are shares of samples that end with a full stop


# --- what is compared -------------------------------------------------------------------------------------------------


class Side(ABC):
    """One side of a contrast: a score for every component. Calling it makes one pass over them."""

    layers: tuple[str, ...]
    """The layers that are compared, in the model's order."""

    @abstractmethod
    def __call__(self) -> Iterator[Block]:
        """One pass over the scores."""

    @abstractmethod
    def span(self, layer: str) -> tuple[int, int]:
        """First and last + 1 index of a layer's components."""

    def row_length(self, layer: str) -> int:
        """How many weights a row of the layer has: its inputs.

        Raises:
            InputError: if the components are no weights.
        """
        raise InputError("there are no rows: these are no weight scores; score with --model.granularity weight")

    @abstractmethod
    def squared_error(self, layer: str) -> Tensor:
        """Squared standard error of the layer's scores, ``[out]`` float64.

        Raises:
            InputError: if it is not known.
        """

    @cached_property
    def in_memory(self) -> dict[str, Block]:
        """All scores, a block for each layer, read once: for those who need them several times, and not for weights."""
        assert not self.holds_weights, "single weights are too many to be held in memory"
        return collect(self)

    @property
    def count(self) -> int:
        """Number of components."""
        return sum(stop - start for start, stop in map(self.span, self.layers))

    @property
    def holds_weights(self) -> bool:
        """Whether the components are single weights, too many to be held in memory."""
        return False

    def total(self) -> float:
        """The sum of the absolute scores (for unsigned scores, the total relevance of these layers)."""
        return math.fsum(float(block.values.double().abs().sum()) for block in self())

    def require_comparable(self, other: "Side") -> None:
        """Refuses sides that must not be subtracted.

        Raises:
            InputError: naming what differs.
        """
        if (self.layers, self.count) != (other.layers, other.count):
            raise InputError("the two sides have different components; score them with the same settings")


@dataclass(frozen=True)
class SideScores(Side):
    """The mean of several comparable score folders, restricted to some layers.

    Args:
        folders: Seeds of the same scores.
        layers: The layers to look at, in the model's order.
    """

    folders: tuple[ScoreFolder, ...]
    layers: tuple[str, ...]

    @classmethod
    def of(
        cls,
        folders: Sequence[ScoreFolder],
        patterns: Sequence[str] | None = None,
        without: Sequence[str] = (),
        but: Sequence[str] = (),
    ) -> "SideScores":
        """The scores of ``folders`` in the layers that match the glob ``patterns`` (None: all), ``without`` some.

        Keys of the manifest in ``but`` may differ between the folders.

        Raises:
            InputError: if the folders cannot be compared, or a pattern matches no layer.
        """
        require_comparable(folders, but)
        names = folders[0].layers
        for pattern in patterns or ():
            if not fnmatch.filter(names, pattern):
                raise InputError(f"layers: {pattern!r} matches no scored layer; scored are {', '.join(names[:3])}, ...")
        matches = [name for name in names if any(fnmatch.fnmatchcase(name, p) for p in patterns or ("*",))]
        return cls(tuple(folders), tuple(name for name in matches if name not in without))

    @property
    def granularity(self) -> str:
        """The kind of component, as the folders name it; several, where these layers have several, joined by ``+``."""
        return "+".join(dict.fromkeys(self.components.values()))

    @property
    def components(self) -> dict[str, str]:
        """The kind of component that is scored in each layer, by name.

        Raises:
            InputError: if the folders have several kinds and none says which layer is of which.
        """
        return {layer: self.folders[0].component(layer) for layer in self.layers}

    @property
    def holds_weights(self) -> bool:
        return self.folders[0].holds_weights

    def row_length(self, layer: str) -> int:
        shape = self.folders[0].shape(layer)
        if len(shape) < 2:
            raise InputError(
                f"{self.folders[0].path}: rows and patterns are for weight scores, but these are of "
                f"{self.granularity}s; score with --model.granularity weight, or use scope=layer"
            )
        return shape[1]

    def span(self, layer: str) -> tuple[int, int]:
        """First and last + 1 index of a layer's components: all its rows (or weights), unless it is a fused map that
        holds gate and up together, where the manifest's ``neuron_rows`` says which rows are the neurons.
        """
        rows = self.folders[0].manifest.neuron_rows
        return tuple(rows[layer]) if layer in rows else (0, math.prod(self.folders[0].shape(layer)))

    def __call__(self) -> Iterator[Block]:
        """One pass over the mean scores.

        Raises:
            InputError: if a score is not finite.
        """
        for layer in self.layers:
            start, stop = self.span(layer)
            offset = 0
            for block in mean_blocks(self.folders, layer):
                if not all_finite(block):
                    where = ", ".join(str(folder.path) for folder in self.folders)
                    raise InputError(f"{where}: layer {layer} has scores that are not finite; score again in float32")
                part = block[max(start - offset, 0) : max(stop - offset, 0)]
                if len(part):
                    yield Block(layer, max(offset, start), part)
                offset += len(block)

    def squared_error(self, layer: str) -> Tensor:
        """The squared standard error of the mean over folders, ``[out]`` float64.

        For F folders with n_f samples each it is (1/F^2) * sum_f s_f^2 / n_f with the unbiased variance
        s_f^2 = (m2 - m^2) * n_f / (n_f - 1), m the mean and m2 the mean of squares.

        Raises:
            InputError: if squares were not stored, or a folder has fewer than two samples.
        """
        return sum(_squared_error(folder, layer) for folder in self.folders) / len(self.folders) ** 2

    def require_comparable(self, other: Side) -> None:
        if isinstance(other, SideScores):
            require_comparable([*self.folders, *other.folders])
        super().require_comparable(other)


def _squared_error(folder: ScoreFolder, layer: str) -> Tensor:
    n = folder.manifest.num_samples
    if n < 2:
        raise InputError(f"{folder.path}: contrast=t needs at least 2 samples, but it has {n}; score more samples")
    squares, square_of_mean = folder.load_squares(layer).double(), folder.load(layer).double().square()
    # The stored float32 means know m^2 to about 2^-23 only: a smaller variance is rounding, not evidence.
    return (squares - square_of_mean).clamp(min=square_of_mean * 2**-22) / (n - 1)


@dataclass(frozen=True)
class Vector(Side):
    """Scores of all components in memory, ``[n]`` float32, as one layer without a name."""

    scores: Tensor
    layers: tuple[str, ...] = ("",)

    def span(self, layer: str) -> tuple[int, int]:
        return 0, len(self.scores)

    def __call__(self) -> Iterator[Block]:
        yield Block("", 0, self.scores)

    def squared_error(self, layer: str) -> Tensor:
        raise InputError("contrast=t is not for parts of the samples, whose standard errors are not known")


# --- contrasts --------------------------------------------------------------------------------------------------------


class Contrast(ABC):
    """Gives every component a value; the lowest are chosen first. Arguments are the fields of a dataclass."""

    needs_behaviour: ClassVar[bool] = True
    needs_general: ClassVar[bool] = True
    """Whether it reads general scores; if not, none are to be given."""
    needs_amount: ClassVar[bool] = True
    """Whether somebody must say how many to choose; if not, all that it allows are chosen by default."""
    for_weights: ClassVar[bool] = True
    """Whether it works block by block, so that it can be used with scores of single weights."""
    gives_steps: ClassVar[bool] = False
    """Whether it says how far to turn each component (``steps``), which is what ``edit=gains`` does."""
    for_gains_only: ClassVar[bool] = False
    """Whether ``edit=gains`` is the only edit that it is for."""
    from_derivatives: ClassVar[bool] = True
    """Whether its steps are made of derivatives by the gains, so that what they do can be predicted."""

    @abstractmethod
    def passes(self, general: Side, behaviour: Side) -> Passes:
        """The values, and which components may be chosen, as passes over all components.

        Args:
            general: Scores on general text.
            behaviour: Scores of the same components on the behaviour's samples; ``general`` again for a contrast that
                needs none.

        Raises:
            InputError: if the scores do not permit this contrast.
        """

    def sides(self, general: Side, behaviour: Side) -> tuple[Side, Side]:
        """What it reads of the sides: to controls and ``protect``, how much general text uses a component."""
        return general, behaviour

    def require_comparable(self, general: Side, behaviour: Side) -> None:
        """Refuses sides that do not go together.

        Raises:
            InputError: naming what differs.
        """
        general.require_comparable(behaviour)

    def steps(self, general: Side, behaviour: Side) -> dict[str, Tensor]:
        """The change of every component's gain at scale 1, ``[n]`` float64 by layer; if ``gives_steps``."""
        raise NotImplementedError

    def factors(self, step: Tensor, scale: float) -> Tensor:
        """The factors of components with these steps; if ``gives_steps``."""
        raise NotImplementedError

    def arguments(self) -> Record:
        """Its arguments, by name."""
        return asdict(self) if is_dataclass(self) else {}

    def settings(self) -> Record:
        """Its arguments as ``named_in_plan`` finds them in a plan's settings: a user's own under one key."""
        arguments = self.arguments()
        return arguments if CONTRASTS.name_of(self) in CONTRASTS or not arguments else {"contrast": arguments}


@dataclass(frozen=True)
class Difference(Contrast):
    """R_general - R_behaviour."""

    def passes(self, general: Side, behaviour: Side) -> Passes:
        return _difference(general, behaviour, 1.0, 1.0)


@dataclass(frozen=True)
class Normalized(Contrast):
    """The difference of the shares of the sum of all absolute scores."""

    def passes(self, general: Side, behaviour: Side) -> Passes:
        return _difference(general, behaviour, self._total(general), self._total(behaviour))

    def _total(self, side: Side) -> float:
        total = side.total()
        if not total:
            names = ", ".join(str(folder.path) for folder in getattr(side, "folders", ()))
            raise InputError(f"{names}: all scores are zero, so contrast=normalized is undefined; use difference")
        return total


def _difference(general: Side, behaviour: Side, general_scale: float, behaviour_scale: float) -> Passes:
    def passes() -> Iterator[Block]:
        for g, b in zip(general(), behaviour(), strict=True):
            yield replace(g, values=g.values / general_scale - b.values / behaviour_scale)

    return passes


@dataclass(frozen=True)
class Rank(Contrast):
    """The difference of ranks within the model."""

    for_weights = False

    def passes(self, general: Side, behaviour: Side) -> Passes:
        layers = collect(general)
        ranks = [average_ranks(torch.cat([b.values for b in collect(s).values()])) for s in (general, behaviour)]
        parts = (ranks[0] - ranks[1]).float().split([len(block.values) for block in layers.values()])
        blocks = [replace(block, values=part) for block, part in zip(layers.values(), parts, strict=True)]
        return lambda: iter(blocks)


def average_ranks(values: Tensor) -> Tensor:
    """Ranks from 1, ascending; equal values share the mean of their ranks. ``[n]`` to float64 ``[n]``."""
    _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[inverse]


@dataclass(frozen=True)
class WelchT(Contrast):
    """The difference over its standard error; 0 where both are 0 (a neuron that never fires)."""

    for_weights = False

    def passes(self, general: Side, behaviour: Side) -> Passes:
        for side in (general, behaviour):
            side.squared_error(side.layers[0])  # scores without squares are refused before anything is chosen

        def passes() -> Iterator[Block]:
            layer, error = None, torch.empty(0)
            for g, b in zip(general(), behaviour(), strict=True):
                if g.layer != layer:
                    layer, error = g.layer, general.squared_error(g.layer) + behaviour.squared_error(g.layer)
                difference = g.values.double() - b.values.double()
                t = difference / error[g.offset : g.offset + len(g.values)].sqrt()
                yield replace(g, values=torch.where(difference == 0, 0.0, t).float())

        return passes


@dataclass(frozen=True)
class SetDifference(Contrast):
    """Wei et al. (ICML 2024, arXiv 2402.05162): the behaviour's top share without general text's.

    Args:
        top_general: The share of the general set's highest that is left out.
        top_behaviour: The share of the behaviour set's highest that is considered.
    """

    top_general: float = 0.05
    top_behaviour: float = 0.05

    def passes(self, general: Side, behaviour: Side) -> Passes:
        g_passes, b_passes = (strongest(side, by_magnitude=False) for side in (general, behaviour))
        g_cut = cut_lowest(g_passes, _size(self.top_general, general.count, "top_general"))
        b_cut = cut_lowest(b_passes, _size(self.top_behaviour, behaviour.count, "top_behaviour"))

        def passes() -> Iterator[Block]:
            g_top, b_top = g_cut.rewound(), b_cut.rewound()
            for g, b in zip(g_passes(), b_passes(), strict=True):
                yield replace(b, allowed=b_top.take(b) & ~g_top.take(g))

        return passes


@dataclass(frozen=True)
class General(Contrast):
    """R_general alone."""

    needs_behaviour = False

    def passes(self, general: Side, behaviour: Side) -> Passes:
        return general


CONTRASTS: Registry[Contrast] = Registry(
    "contrast",
    Contrast,
    {
        "difference": f"{__name__}.Difference",
        "normalized": f"{__name__}.Normalized",
        "rank": f"{__name__}.Rank",
        "t": f"{__name__}.WelchT",
        "set_difference": f"{__name__}.SetDifference",
        "general": f"{__name__}.General",
        "budget": "sparc3_pl.selection.budget.Budget",
        "expertise": "sparc3_pl.selection.expertise.Expertise",
    },
)


def contrast(spec: Spec | Contrast, general: Side, behaviour: Side | None) -> Passes:
    """The contrast as passes over all components; lowest first is most specific to the behaviour.

    Args:
        spec: One of the module's table, a class path, or a contrast.
        general: Scores on general text.
        behaviour: Scores on the behaviour's samples; not for ``general``.

    Raises:
        InputError: if the contrast is unknown, a side is missing, the sides cannot be compared, or the contrast is not
            for these scores; while passing, if a value is not finite.
    """
    kind = CONTRASTS.make(spec)
    name = CONTRASTS.name_of(kind)
    if behaviour is None and kind.needs_behaviour:
        raise InputError(f"contrast={name} needs behaviour scores; give --behaviour DIR, or --contrast general")
    if behaviour is not None and kind.needs_behaviour:
        kind.require_comparable(general, behaviour)
    if general.holds_weights and not kind.for_weights:
        raise InputError(f"contrast={name} is not for weight scores; use difference or normalized")
    passes = kind.passes(general, general if behaviour is None else behaviour)
    if passes is general and isinstance(general, SideScores):
        return passes  # which looks at every value itself

    def checked() -> Iterator[Block]:
        for block in passes():
            values = block.values
            if not all_finite(values) and (block.allowed is None or not all_finite(values[block.allowed])):
                raise InputError(f"contrast={name}: layer {block.layer} has values that are not finite; use another")
            yield block

    return checked


def named_in_plan(name: str, settings: Mapping[str, Any]) -> Contrast:
    """The contrast that a plan names, with the arguments that its settings hold.

    Raises:
        InputError: if there is no such contrast, or the user has not allowed its module to be imported.
    """
    if name not in CONTRASTS:
        return CONTRASTS.from_file(name, settings.get("contrast"))
    own = CONTRASTS.from_file(name).arguments()
    return CONTRASTS.from_file(name, {key: settings[key] for key in own if key in settings})


# --- the strongest on general text ------------------------------------------------------------------------------------


def strongest(scores: Passes, by_magnitude: bool = True) -> Passes:
    """Passes whose lowest are the strongest scores: by magnitude, or by value."""

    def passes() -> Iterator[Block]:
        for block in scores():
            yield replace(block, values=-(block.values.abs() if by_magnitude else block.values))

    return passes


def _size(share: float, count: int, name: str) -> int:
    """How many of ``count`` are a share of them, at least 1."""
    if not 0 < share < 1:
        raise InputError(f"{name}={share} is not a share between 0 and 1; e.g. 0.05 is 5 %")
    return max(1, round(share * count))


def protected(passes: Passes, general: Side, share: float) -> Passes:
    """``passes`` in which the general set's strongest ``share`` (by magnitude) may not be chosen.

    Raises:
        InputError: if ``share`` is not in [0, 1).
    """
    if share == 0:
        return passes
    by_strength = strongest(general)
    cut = cut_lowest(by_strength, _size(share, general.count, "protect"))

    def masked() -> Iterator[Block]:
        top = cut.rewound()
        for block, strength in zip(passes(), by_strength(), strict=True):
            weak = ~top.take(strength)
            yield replace(block, allowed=weak if block.allowed is None else weak & block.allowed)

    return masked


def share_of_strongest(indices: Mapping[str, Tensor], general: Side, share: float) -> float:
    """How much of a selection (indices by layer) lies in the ``share`` of components strongest on general text."""
    by_strength = strongest(general)
    cut = cut_lowest(by_strength, _size(share, general.count, "share"))
    hits = total = 0
    for block in by_strength():
        top = cut.take(block)
        index = indices.get(block.layer, torch.empty(0, dtype=torch.int64)) - block.offset
        inside = index[(index >= 0) & (index < len(top))]
        hits, total = hits + int(top[inside].sum()), total + len(inside)
    return hits / total


# --- samples of unlike format -----------------------------------------------------------------------------------------


def format_warnings(general: Sequence[ScoreFolder], behaviour: Sequence[ScoreFolder]) -> list[str]:
    """What differs between two sets of samples besides their topic, a line each; empty if nothing much does.

    A sample's length and its ending (full stop or cut) move the scores more than its topic: a contrast of unlike
    formats compares formats.
    """
    sides = [[sample for folder in folders for sample in folder.samples()] for folders in (general, behaviour)]
    advice = "the contrast compares formats as well as behaviours; score general samples matched by data.match: FILE"
    warnings = []
    lengths = [[sample.num_tokens for sample in side if sample.num_tokens] for side in sides]
    if all(lengths):
        g, b = (mean(side) for side in lengths)
        if max(g, b) > _LENGTH_RATIO * min(g, b):
            warnings.append(f"general samples have {g:.1f} tokens on average, behaviour samples {b:.1f}: {advice}")
    endings = [[sample.ending == "stop" for sample in side if sample.ending] for side in sides]
    if all(endings):
        g, b = (mean(map(float, side)) for side in endings)
        if abs(g - b) > _ENDING_GAP:
            warnings.append(f"{g:.0%} of general samples end with a full stop, of behaviour samples {b:.0%}: {advice}")
    return warnings
