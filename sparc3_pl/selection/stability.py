"""Would other samples have led to the same selection? Split halves, and a null contrast of general text with itself.

Scores are means over samples, so any part of the samples gives scores of its own. *Units* are disjoint parts of a set
of samples: the groups that a folder stores, or folders of unequal seeds. Two selections, each from one half of the
units, show how much of a selection is of the behaviour and how much of the draw. The measure is overlap: common
neurons over neurons chosen.

The null is a contrast between two parts of the general samples, which differ in nothing. Strong neurons vary most from
draw to draw, so null selections overlap far beyond chance; a behaviour's selection must overlap more than they do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from sparc3_pl.selection.contrast import Side, SideScores, Vector, contrast, protected
from sparc3_pl.selection.lowest import select_lowest

__all__ = [
    "SelectionSettings",
    "Unit",
    "WeighedContrast",
    "chosen",
    "mean_scores_of",
    "null_against_null",
    "null_against_selection",
    "overlap_of",
    "parts_of",
    "positions",
    "split_half_overlaps",
    "units_of",
]


WeighedContrast = Literal["difference", "normalized", "rank"]
"""Contrasts that two score vectors are enough for."""


@dataclass(frozen=True)
class Unit:
    """The mean scores of some samples.

    Attributes:
        scores: ``[n]``, all neurons of the model.
        weight: Their share in the mean of all units of a side, whatever the scale.
    """

    scores: Tensor
    weight: float


@dataclass(frozen=True)
class SelectionSettings:
    """How neurons are chosen.

    Attributes:
        kind: The contrast.
        num_neurons: How many.
        protect: Share of the strongest on general text that is left alone.
    """

    kind: WeighedContrast
    num_neurons: int
    protect: float = 0.0


def units_of(scores: SideScores) -> list[Unit]:
    """The groups of samples of every folder, or the folder itself if it has no groups.

    All folders have the same weight, and groups have weight by their number of samples: the mean of all units is that
    of ``scores``.
    """
    spans, units = {layer: slice(*scores.span(layer)) for layer in scores.layers}, []
    for folder in scores.folders:
        if not folder.manifest.groups:
            units.append(Unit(torch.cat([folder.load(layer)[rows] for layer, rows in spans.items()]), 1.0))
            continue
        groups = torch.cat([folder.load_groups(layer)[:, rows] for layer, rows in spans.items()], dim=1)
        sizes = folder.manifest.group_sizes
        units += [Unit(values, n / sum(sizes)) for values, n in zip(groups, sizes, strict=True) if n]
    return units


def mean_scores_of(units: Sequence[Unit]) -> Vector:
    """The weighted mean of ``units``, summed in float64 and kept in float32, as the mean of score folders is."""
    total = sum(unit.weight for unit in units)
    return Vector(torch.stack([unit.scores.double() * (unit.weight / total) for unit in units]).sum(0).float())


def chosen(general: Side, behaviour: Side, settings: SelectionSettings) -> dict[str, Tensor]:
    """Indices of the neurons that ``prune`` would choose, ascending, by layer."""
    values = protected(contrast(settings.kind, general, behaviour), general, settings.protect)
    return {layer: index for layer, (index, _) in select_lowest(values, settings.num_neurons).items()}


def positions(selection: dict[str, Tensor], side: Side) -> Tensor:
    """The selected indices as positions in the scores of all layers of ``side``, one after the other."""
    parts, before = [], 0
    for layer in side.layers:
        start, stop = side.span(layer)
        if layer in selection:
            parts.append(selection[layer] - start + before)
        before += stop - start
    return torch.cat(parts)


def overlap_of(one: Tensor, other: Tensor) -> float:
    """Common positions over the number chosen."""
    return float(torch.isin(one, other).float().mean())


def _select(general: Sequence[Unit], behaviour: Sequence[Unit], settings: SelectionSettings) -> Tensor:
    """Positions of the neurons chosen by the scores of some units."""
    sides = mean_scores_of(general), mean_scores_of(behaviour)
    return positions(chosen(*sides, settings), sides[0])


def split_half_overlaps(
    general: Sequence[Unit],
    behaviour: Sequence[Unit],
    settings: SelectionSettings,
    size: int | None = None,
    most: int = 20,
    seed: int = 0,
) -> list[float]:
    """Overlaps of the selections from two halves, for several ways to halve; empty where a side has one unit only.

    Args:
        general: Units of general text.
        behaviour: Units of the behaviour.
        settings: How to choose.
        size: Behaviour units of a half, to see what fewer samples would give; of general text the same share.
        most: Ways to halve at most.
        seed: Seed for the halves.
    """
    largest = len(behaviour) // 2
    size = largest if size is None else size
    general_size = max(1, round(len(general) // 2 * size / max(1, largest)))
    ways = zip(
        parts_of(general, 2, general_size, most, seed), parts_of(behaviour, 2, size, most, seed + 1), strict=False
    )
    return [overlap_of(*(_select(g, b, settings) for g, b in zip(*sides, strict=True))) for sides in ways]


def null_against_null(
    general: Sequence[Unit], settings: SelectionSettings, most: int = 20, seed: int = 0
) -> list[float]:
    """Overlaps of two null selections from four disjoint parts of general text; empty for fewer than four units."""
    ways = parts_of(general, 4, len(general) // 4, most, seed)
    return [overlap_of(_select(a, b, settings), _select(c, d, settings)) for a, b, c, d in ways]


def null_against_selection(
    general: Sequence[Unit], selection: Tensor, settings: SelectionSettings, most: int = 20, seed: int = 0
) -> list[float]:
    """Overlaps of a selection (positions) with null selections, from halves of general text in either order."""
    ways = parts_of(general, 2, len(general) // 2, most, seed)
    return [overlap_of(selection, _select(*sides, settings)) for a, b in ways for sides in ((a, b), (b, a))]


def parts_of(units: Sequence[Unit], count: int, size: int, most: int, seed: int) -> Iterator[list[list[Unit]]]:
    """Ways to deal shuffled units into ``count`` parts of ``size`` each; none if there are too few."""
    if size < 1 or size * count > len(units):
        return
    rng = np.random.default_rng(seed)
    for _ in range(1 if len(units) == count == 2 else most):
        order = rng.permutation(len(units))
        yield [[units[i] for i in order[part * size : (part + 1) * size]] for part in range(count)]
