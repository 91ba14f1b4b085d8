r"""Contrast ``expertise``: the units that tell labelled samples from the others best (AurA and its kin).

With A_i the AUROC of unit i as a detector of the label (method ``expertise``), the published edits (Suau et al.,
"Whispering Experts", ICML 2024, arXiv 2407.12824) multiply what a unit says by a factor g_i, where A_i > 0.5:

| name | factor | here |
|---|---|---|
| AurA | 1 - 2 (A_i - 0.5) | ``edit=gains``, ``scale=1`` |
| Damp | the same constant for the best k | ``edit=scale``, ``alpha``, ``num_neurons`` |
| Det-zero | 0 for the best k | ``edit=zero``, ``num_neurons`` |

At another scale c, or within a budget of perplexity, AurA's factor is 1 + c (g_i - 1), not below 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from sparc3_pl.errors import InputError
from sparc3_pl.selection.contrast import Contrast, Side, SideScores
from sparc3_pl.selection.lowest import Block, Passes

__all__ = ["Expertise", "aura_steps"]


def aura_steps(auroc_N: Tensor) -> Tensor:
    """What AurA takes off every unit's gain: -2 (AUROC - 0.5) where that is above 0.5, else 0. ``[N]`` float64."""
    return -2 * (auroc_N.double() - 0.5).clamp(min=0)


@dataclass(frozen=True)
class Expertise(Contrast):
    """-AUROC: the best detectors of the label are chosen first, and none that is not above the threshold.

    It reads the scores of the labelled samples alone, which stand on the behaviour's side.

    Args:
        threshold: Units of a higher AUROC than this may be chosen. 0.5 says nothing of the label.

    Raises:
        InputError: if the threshold is not from 0.5 to below 1.
    """

    for_weights: ClassVar[bool] = False
    gives_steps: ClassVar[bool] = True
    for_gains_only: ClassVar[bool] = False
    from_derivatives: ClassVar[bool] = False
    needs_general: ClassVar[bool] = False
    needs_amount: ClassVar[bool] = False

    threshold: float = 0.5

    def __post_init__(self) -> None:
        if not (isinstance(self.threshold, int | float) and 0.5 <= self.threshold < 1):
            raise InputError(f"contrast=expertise: threshold={self.threshold!r} is not from 0.5 to below 1; e.g. 0.5")

    def sides(self, general: Side, behaviour: Side) -> tuple[Side, Side]:
        if isinstance(behaviour, SideScores):
            for folder in behaviour.folders:
                if folder.manifest.method != "expertise":
                    raise InputError(
                        f"{folder.path}: contrast=expertise needs scores by method expertise, not by "
                        f"{folder.manifest.method}; score labelled samples with --model.method expertise"
                    )
        return general, behaviour

    def passes(self, general: Side, behaviour: Side) -> Passes:
        self.sides(general, behaviour)

        def passes() -> Iterator[Block]:
            for block in behaviour.in_memory.values():
                yield replace(block, values=-block.values, allowed=block.values > self.threshold)

        return passes

    def steps(self, general: Side, behaviour: Side) -> dict[str, Tensor]:
        self.sides(general, behaviour)
        return {layer: aura_steps(block.values) for layer, block in behaviour.in_memory.items()}

    def factors(self, step: Tensor, scale: float) -> Tensor:
        return torch.clamp(1 + scale * step, min=0.0)
