r"""Contrasts of general and behaviour scores: the lowest are the most specific to the behaviour.

| kind | value of component i |
|---|---|
| ``difference`` | R_general - R_behaviour (Hatefi et al., arXiv 2506.13727, Eq. 7) |
| ``normalized`` | R_general / T_general - R_behaviour / T_behaviour, T the sum of a set's absolute scores |
| ``rank`` | rank_general - rank_behaviour, ranks within the model from 1, equal scores sharing their mean rank |
| ``t`` | (R_general - R_behaviour) / sqrt(SE_general^2 + SE_behaviour^2) (Welch), SE over samples |
| ``set_difference`` | -R_behaviour for the top share of behaviour without the top share of general; others are out |
| ``general`` | R_general alone: the least used components go first (compression, no behaviour) |

Each side may be several folders (seeds), whose mean is taken. Everything is streamed: one layer of neuron scores, or
one block of a layer of weight scores, is in memory at a time (``rank`` and ``t`` are for neurons and hold those of the
whole model, which are few).
"""

import fnmatch
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from sparc3_pl.errors import InputError
from sparc3_pl.pruning.selection import Block, Passes, collect, cut_lowest
from sparc3_pl.scores import ScoreFolder, mean_blocks, require_comparable

__all__ = [
    "ContrastKind",
    "Scores",
    "average_ranks",
    "contrast",
    "format_warnings",
    "protected",
    "strongest",
    "welch_t",
]

ContrastKind = Literal["difference", "normalized", "rank", "t", "set_difference", "general"]

_LENGTH_RATIO = 1.5  # lengths further apart than this are reported
_ENDING_GAP = 0.2  # so are shares of samples that end with a full stop


@dataclass(frozen=True)
class Scores:
    """One side of a contrast: the mean of several comparable score folders, restricted to some layers.

    Args:
        folders: Seeds of the same scores.
        layers: The layers to look at, in the model's order.
    """

    folders: tuple[ScoreFolder, ...]
    layers: tuple[str, ...]

    @classmethod
    def of(cls, folders: Sequence[ScoreFolder], patterns: Sequence[str] | None = None) -> "Scores":
        """The scores of ``folders`` in the layers that match the glob ``patterns`` (None: all).

        Raises:
            InputError: if the folders cannot be compared, or a pattern matches no layer.
        """
        require_comparable(folders)
        names = folders[0].layers
        for pattern in patterns or ():
            if not fnmatch.filter(names, pattern):
                raise InputError(f"layers: {pattern!r} matches no scored layer; scored are {', '.join(names[:3])}, ...")
        kept = [name for name in names if any(fnmatch.fnmatchcase(name, p) for p in patterns or ("*",))]
        return cls(tuple(folders), tuple(kept))

    @property
    def granularity(self) -> str:
        """``neuron`` or ``weight``."""
        return self.folders[0].manifest.granularity

    @property
    def count(self) -> int:
        """Number of components."""
        return sum(stop - start for start, stop in map(self.span, self.layers))

    def span(self, layer: str) -> tuple[int, int]:
        """First and last + 1 index of a layer's components.

        All rows (or weights), but for a fused map that holds gate and up together: there the manifest's
        ``neuron_rows`` says which rows are the neurons.
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
                if not block.isfinite().all():
                    where = ", ".join(str(folder.path) for folder in self.folders)
                    raise InputError(f"{where}: layer {layer} has scores that are not finite; score again in float32")
                part = block[max(start - offset, 0) : max(stop - offset, 0)]
                if len(part):
                    yield layer, max(offset, start), part
                offset += len(block)

    def total(self) -> float:
        """The sum of the absolute scores (for unsigned scores, the total relevance of these layers)."""
        return math.fsum(float(values.double().abs().sum()) for _, _, values in self())

    def squared_error(self, layer: str) -> Tensor:
        """Squared standard error of the layer's mean scores, ``[out]`` float64.

        For F folders with n_f samples each, (1/F^2) * sum_f s_f^2 / n_f with the unbiased variance
        s_f^2 = (m2 - m^2) * n_f / (n_f - 1), m the mean and m2 the mean of squares.

        Raises:
            InputError: if squares were not stored, or a folder has fewer than two samples.
        """
        return sum(_squared_error(folder, layer) for folder in self.folders) / len(self.folders) ** 2


def _squared_error(folder: ScoreFolder, layer: str) -> Tensor:
    n = folder.manifest.num_samples
    if n < 2:
        raise InputError(f"{folder.path}: contrast=t needs at least 2 samples, but it has {n}; score more samples")
    squares, square_of_mean = folder.load_squares(layer).double(), folder.load(layer).double().square()
    # The stored float32 means know m^2 to about 2^-23 only: a smaller variance is rounding, not evidence.
    return (squares - square_of_mean).clamp(min=square_of_mean * 2**-22) / (n - 1)


def contrast(
    kind: ContrastKind,
    general: Scores,
    behaviour: Scores | None,
    top_general: float = 0.05,
    top_behaviour: float = 0.05,
) -> Passes:
    """The contrast as passes over all components; lowest first is most specific to the behaviour.

    Args:
        kind: One of the module's table.
        general: Scores on general text.
        behaviour: Scores on the behaviour's samples; not for ``general``.
        top_general: For ``set_difference``: the share of the general set's highest that is left out.
        top_behaviour: For ``set_difference``: the share of the behaviour set's highest that is considered.

    Raises:
        InputError: if the kind is unknown, a side is missing, the sides cannot be compared, or the kind is not for
            this granularity.
    """
    if kind not in get_args(ContrastKind):
        raise InputError(f"contrast={kind!r} is unknown; known are {', '.join(get_args(ContrastKind))}")
    if kind == "general":
        return general
    if behaviour is None:
        raise InputError(f"contrast={kind} needs behaviour scores; give --behaviour DIR, or --contrast general")
    require_comparable([*general.folders, *behaviour.folders])
    if kind in ("rank", "t") and general.granularity == "weight":
        raise InputError(f"contrast={kind} is for neuron scores; use difference or normalized for weight scores")
    if kind == "rank":
        return _in_memory(_rank_contrast(general, behaviour), general)
    if kind == "t":
        return _in_memory(_t_contrast(general, behaviour), general)
    if kind == "set_difference":
        return _set_difference(general, behaviour, top_general, top_behaviour)
    scales = (1.0, 1.0) if kind == "difference" else (_total(general), _total(behaviour))
    return _difference(general, behaviour, scales)


def _total(scores: Scores) -> float:
    total = scores.total()
    if not total:
        names = ", ".join(str(folder.path) for folder in scores.folders)
        raise InputError(f"{names}: all scores are zero, so contrast=normalized is undefined; use difference")
    return total


def _difference(general: Scores, behaviour: Scores, scales: tuple[float, float]) -> Passes:
    def passes() -> Iterator[Block]:
        for (layer, offset, g), (_, _, b) in zip(general(), behaviour(), strict=True):
            yield layer, offset, g / scales[0] - b / scales[1]

    return passes


def _in_memory(values: dict[str, Tensor], scores: Scores) -> Passes:
    def passes() -> Iterator[Block]:
        for layer in scores.layers:
            yield layer, scores.span(layer)[0], values[layer]

    return passes


def average_ranks(values: Tensor) -> Tensor:
    """Ranks from 1, ascending; equal values share the mean of their ranks. ``[n]`` to float64 ``[n]``."""
    _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[inverse]


def _rank_contrast(general: Scores, behaviour: Scores) -> dict[str, Tensor]:
    sides = [[values for _, values in collect(scores).values()] for scores in (general, behaviour)]
    ranks = [average_ranks(torch.cat(side)) for side in sides]
    parts = (ranks[0] - ranks[1]).float().split([len(values) for values in sides[0]])
    return dict(zip(general.layers, parts, strict=True))


def welch_t(difference: Tensor, squared_error: Tensor) -> Tensor:
    """``difference / sqrt(squared_error)``, and 0 where both are 0 (a unit that never fires)."""
    return torch.where(difference == 0, 0.0, difference / squared_error.sqrt())


def _t_contrast(general: Scores, behaviour: Scores) -> dict[str, Tensor]:
    values = {}
    for (layer, start, g), (_, _, b) in zip(general(), behaviour(), strict=True):
        error = (general.squared_error(layer) + behaviour.squared_error(layer))[start : start + len(g)]
        values[layer] = welch_t(g.double() - b.double(), error).float()
    return values


def strongest(scores: Scores, by_magnitude: bool = True) -> Passes:
    """Passes whose lowest are the strongest scores: by magnitude, or by value."""

    def passes() -> Iterator[Block]:
        for layer, offset, values in scores():
            yield layer, offset, -(values.abs() if by_magnitude else values)

    return passes


def _top(scores: Scores, share: float, name: str, by_magnitude: bool) -> tuple[Passes, Any]:
    """Passes over the strongest, and the cut that holds the top ``share`` of them."""
    if not 0 < share < 1:
        raise InputError(f"{name}={share} is not a share between 0 and 1; e.g. 0.05 is 5 %")
    ordered = strongest(scores, by_magnitude)
    return ordered, cut_lowest(ordered, max(1, round(share * scores.count)))


def _set_difference(general: Scores, behaviour: Scores, top_general: float, top_behaviour: float) -> Passes:
    """Wei et al. (ICML 2024, arXiv 2402.05162), their set difference of two top shares."""
    sides = [(general, top_general, "top_general"), (behaviour, top_behaviour, "top_behaviour")]
    (g_passes, g_cut), (b_passes, b_cut) = (_top(*side, by_magnitude=False) for side in sides)

    def passes() -> Iterator[Block]:
        g_taken, b_taken = g_cut.rewound(), b_cut.rewound()
        for (layer, offset, g), (_, _, b) in zip(g_passes(), b_passes(), strict=True):
            member = b_taken.take(b) & ~g_taken.take(g)
            yield layer, offset, torch.where(member, b, torch.inf)

    return passes


def protected(passes: Passes, general: Scores, share: float) -> Passes:
    """``passes`` without the general set's strongest ``share`` (by magnitude), which becomes infinite: never taken.

    Raises:
        InputError: if ``share`` is not in [0, 1).
    """
    if share == 0:
        return passes
    ordered, cut = _top(general, share, "protect", by_magnitude=True)

    def masked() -> Iterator[Block]:
        taken = cut.rewound()
        for (layer, offset, values), (_, _, strength) in zip(passes(), ordered(), strict=True):
            yield layer, offset, torch.where(taken.take(strength), torch.inf, values)

    return masked


def format_warnings(general: Sequence[ScoreFolder], behaviour: Sequence[ScoreFolder]) -> list[str]:
    """What differs between two sets of samples besides their topic, a line each; empty if nothing much does.

    A sample's length and its ending (full stop or cut) move the scores more than its topic: a contrast of unlike
    formats compares formats.
    """
    sides = [[sample for folder in folders for sample in folder.samples()] for folders in (general, behaviour)]
    advice = "the contrast compares formats as well as behaviours; score general samples matched by data.match: FILE"
    found = []
    lengths = [[s["num_tokens"] for s in side if s.get("num_tokens")] for side in sides]
    if all(lengths):
        g, b = (mean(side) for side in lengths)
        if max(g, b) > _LENGTH_RATIO * min(g, b):
            found.append(f"general samples have {g:.1f} tokens on average, behaviour samples {b:.1f}: {advice}")
    endings = [[s["ending"] == "stop" for s in side if s.get("ending")] for side in sides]
    if all(endings):
        g, b = (mean(map(float, side)) for side in endings)
        if abs(g - b) > _ENDING_GAP:
            found.append(f"{g:.0%} of general samples end with a full stop, of behaviour samples {b:.0%}: {advice}")
    return found
