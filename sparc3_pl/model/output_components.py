"""Outputs of linear layers as components: what a layer makes, before anything else is done to it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sparc3_pl.model.components import Component, Group, Part, check_range, linear_layer, rows_and_bias
from sparc3_pl.model.experts import is_routed
from sparc3_pl.model.structure import features, mlps, select_layers

__all__ = ["Output"]


class Output(Component):
    """One output of a linear layer: a row of its matrix, and its bias' entry. By default of the MLPs' layers.

    Unlike a neuron it is this one row, also in an up-projection: of a gated neuron the outputs of gate and up are two
    components, and an edit of the gate's acts before the activation function.
    """

    unit = "outputs"

    def groups(self, model: nn.Module, patterns: Sequence[str] | None = None) -> list[Group]:
        if patterns is None:
            patterns = [name for mlp in mlps(model) for name in (mlp.gate, mlp.up, mlp.down) if name is not None]
        sizes = {name: features(module)[0] for name, module in select_layers(model, patterns).items()}
        routed = {name: is_routed(model.get_submodule(name)) for name in sizes}
        return [Group(name, (size,), "out", size, routed=routed[name]) for name, size in sizes.items()]

    def parts(self, model: nn.Module, layer: str, index: Tensor) -> list[Part]:
        module = linear_layer(model, layer)
        check_range("output", layer, index, features(module)[0], "outputs")
        return rows_and_bias(layer, module, index, torch.arange(len(index)))
