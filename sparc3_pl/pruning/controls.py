"""Controls: choices of the same size that know nothing, or something else, of the behaviour.

| control | what is chosen |
|---|---|
| ``random`` | at random among all candidates |
| ``random_matched`` | for every chosen neuron another of its layer with a similar general score |
| ``top_general`` | the strongest on general text |
| ``null`` | by the same contrast, of general folders against another general folder |

All are seeded. Larger choices of the same seed hold the smaller ones, but for ``random_matched``, which follows (and
avoids) the neurons that it is matched to.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, TypeVar

import torch
from torch import Tensor

from sparc3_pl.errors import InputError
from sparc3_pl.pruning.selection import Block, Passes

__all__ = ["Control", "null_sides", "random_matched", "random_passes"]

Control = Literal["random", "random_matched", "top_general", "null"]
T = TypeVar("T")


def random_passes(passes: Passes, seed: int) -> Passes:
    """Passes over the same components with seeded random values: their k lowest are k at random."""

    def drawn() -> Iterator[Block]:
        generator = torch.Generator().manual_seed(seed)
        for layer, offset, values in passes():
            yield layer, offset, torch.rand(len(values), generator=generator)

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
    played = seed % len(folders)
    return [folder for i, folder in enumerate(folders) if i != played], [folders[played]]


def random_matched(
    chosen: Sequence[tuple[str, int]],
    general: Mapping[str, Tensor],
    allowed: Mapping[str, Tensor],
    seed: int,
    candidates: int = 10,
) -> list[tuple[str, int]]:
    """For every chosen neuron, another one of the same layer with a similar general score.

    One of the ``candidates`` free neurons that are nearest in the layer's ranking by general score is drawn.

    Args:
        chosen: (layer, position in the layer's vector), in the order of the choice.
        general: By layer, general scores ``[n]``.
        allowed: By layer, which neurons may be drawn ``[n]``; the chosen ones never are.
        seed: Of the draw.
        candidates: How many neighbours to draw from.

    Raises:
        InputError: if a layer has not enough other neurons.
    """
    generator = torch.Generator().manual_seed(seed)
    free = {layer: mask.clone() for layer, mask in allowed.items()}
    for layer, position in chosen:
        free[layer][position] = False
    ranks = {layer: general[layer].argsort(stable=True).argsort() for layer in {layer for layer, _ in chosen}}
    drawn = []
    for layer, position in chosen:
        distance = (ranks[layer] - ranks[layer][position]).abs()
        near = distance.masked_fill(~free[layer], len(distance)).argsort(stable=True)[:candidates]
        near = near[free[layer][near]]
        if not len(near):
            raise InputError(
                f"control=random_matched: layer {layer} has no neuron left to match with; lower num_neurons or protect"
            )
        match = int(near[torch.randint(len(near), (), generator=generator)])
        free[layer][match] = False
        drawn.append((layer, match))
    return drawn
