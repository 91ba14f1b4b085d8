"""An edit, a contrast, a scope, methods and a component as a user would write them, in a module of their own."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sparc3_pl.attribution.accumulators import Counts
from sparc3_pl.attribution.methods import Gradient, Lrp, Options
from sparc3_pl.attribution.recording import LayerPass
from sparc3_pl.model.components import Component, Group, Part
from sparc3_pl.model.structure import features, linear_layers
from sparc3_pl.pruning.edits import Change, Chosen, Edit, contributing
from sparc3_pl.selection.contrast import Contrast, Side
from sparc3_pl.selection.lowest import Passes, Selection, select_lowest
from sparc3_pl.selection.scope import Amount, Scope


class InputChannel(Component):
    """One input of the attention's output projection: a column of it."""

    unit = "channels"

    def groups(self, model: nn.Module, patterns: Sequence[str] | None = None) -> list[Group]:
        layers = {name: layer for name, layer in linear_layers(model).items() if name.endswith("o_proj")}
        return [
            Group(name, (features(layer)[1],), "in", features(layer)[1])
            for name, layer in layers.items()
            if patterns is None or name in patterns
        ]

    def parts(self, model: nn.Module, layer: str, index: Tensor) -> list[Part]:
        return [Part(layer, "columns", index, torch.arange(len(index)), "reads")]


class Smoothed(Gradient):
    """A gradient as the mean of ``draws``."""

    def __init__(self, draws: int) -> None:
        self.draws = draws


class Squared(Gradient):
    """A gradient's square, which is no derivative."""

    def sample_scores(self, layer: LayerPass, group: Group, options: Options, counts: Counts | None) -> Tensor:
        return super().sample_scores(layer, group, options, counts).square()


class Composite(Lrp):
    """AttnLRP with other rules."""


@dataclass(frozen=True)
class Ratio(Contrast):
    """R_general / (R_behaviour + floor); what the behaviour does not use at all may not be chosen."""

    floor: float = 0.1

    def passes(self, general: Side, behaviour: Side) -> Passes:
        def passes():
            for g, b in zip(general(), behaviour(), strict=True):
                yield replace(g, values=g.values / (b.values + self.floor), allowed=b.values > 0)

        return passes


@dataclass(frozen=True)
class Gains(Edit):
    """Each component is multiplied by the value it was chosen by, times ``strength``."""

    strength: float = 1.0

    def factors(self, score: Tensor) -> Tensor:
        return self.strength * score

    def changes(self, model: nn.Module, chosen: Chosen) -> list[Change]:
        return [Change(part, chosen.factor[part.owner]) for part in contributing(chosen.parts)]


@dataclass(frozen=True)
class FirstLayer(Scope):
    """Only the first layer competes."""

    def select(self, passes: Passes, side: Side, amount: Amount) -> Selection:
        return select_lowest(lambda: (b for b in passes() if b.layer == side.layers[0]), amount.of(side.count))
