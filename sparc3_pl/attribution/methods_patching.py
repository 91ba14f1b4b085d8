"""Scores of components by the effect that a counterfactual's values in place of the sample's would have.

A sample has a counterfactual: as many tokens, another answer. A component's score is the sum over tokens of
(value - counterfactual value) * coefficient, an estimate of how far the target would fall if the component's value were
replaced by the counterfactual's: positive where the component helps the sample's own answer. Methods differ in the
coefficient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from sparc3_pl.attribution.accumulators import Counts, component_scores
from sparc3_pl.attribution.methods import Gradient, Lrp, Options, Sums
from sparc3_pl.attribution.precision import exact
from sparc3_pl.attribution.recording import LayerPass
from sparc3_pl.attribution.rules import RuleSet
from sparc3_pl.attribution.targets import Attributed, Predicted, Target, attribute
from sparc3_pl.data.batches import ReferenceBatch
from sparc3_pl.data.fields import FIELD_KEYS
from sparc3_pl.errors import InputError
from sparc3_pl.model.components import Component, Group, site_of
from sparc3_pl.model.patching import as_forward

__all__ = ["AttributionPatching", "IntegratedGradients", "RelevancePatching"]

COUNTERFACTUAL = "counterfactual_ids"
"""The field of a batch that holds the counterfactuals' tokens, ``[B, T]`` int64, padded as the samples are."""


class AttributionPatching(Gradient):
    """The coefficient is the gradient of the sample's target (Nanda, 2023; Syed et al., arXiv 2310.10348).

    Two forward passes and a backward pass. Scores are means over samples of the signed sums (``signed``), or of their
    absolute values.
    """

    needs_values = True
    needs = (COUNTERFACTUAL,)
    reads_experts = False  # the counterfactual's tokens may go to other experts

    def heeds(self, component: Component) -> frozenset[str]:
        return frozenset(("nonfinite", "gradient_checkpointing", "signed", "squares", "groups"))

    def at_values(self, target: Target, options: Options) -> bool:
        return True

    def sums(self, group: Group, weight_OI: Tensor, options: Options) -> Sums:
        return super().sums(site_of(group), weight_OI, options)

    def passes(
        self,
        model: nn.Module,
        batch: ReferenceBatch,
        target: Target,
        sites: Mapping[str, Group],
        take: Callable[[LayerPass], None],
    ) -> Attributed:
        other = _values(model, _counterfactual(batch), target, sites)

        def take_difference(layer: LayerPass) -> None:
            difference = replace(layer, x_BTI=layer.x_BTI - other[layer.name], z_BTO=None)
            take(difference.shown(layer.dx_BTI))

        return super().passes(model, batch, target, sites, take_difference)

    def sample_scores(self, layer: LayerPass, group: Group, options: Options, counts: Counts | None) -> Tensor:
        scores_BN = component_scores(layer, group, signed=True, counts=counts)
        return scores_BN if options.signed else scores_BN.abs_()


class RelevancePatching(AttributionPatching, Lrp):
    """RelP (Jafari et al., arXiv 2508.21258): the coefficient is that of LRP, the gradient under its rules.

    Two forward passes and a backward pass, as attribution patching.

    Args:
        rules: ``cp`` as published (attention weights are constants), or ``attn`` for AttnLRP.
        unlisted: As in ``Lrp``.
        softmax_temperature: As in ``Lrp``.
    """

    def __init__(self, rules: RuleSet = "cp", unlisted: bool = False, softmax_temperature: float = 1.0) -> None:
        super().__init__(rules, unlisted, softmax_temperature)


class IntegratedGradients(AttributionPatching):
    """The coefficient is the mean gradient on the way from the counterfactual's word embeddings to the sample's.

    The way has ``steps`` points, ``k / steps`` of it for k = 1 .. steps, as in EAP-IG (Hanna et al., arXiv 2403.17806,
    "inputs") and MIB; with one step it is attribution patching. Each costs a forward and a backward pass.

    Args:
        steps: Number of points.
    """

    def __init__(self, steps: int = 10) -> None:
        if steps < 1:
            raise InputError(f"method integrated_gradients: steps={steps}; give 1 or more")
        self.steps = steps

    def check_use(self, component: Component, target: Target) -> None:
        super().check_use(component, target)
        if isinstance(target, Predicted):
            raise InputError(
                "method integrated_gradients: model.target=predicted would mean another token at each step; name one "
                "that the sample fixes, such as answer"
            )

    def passes(
        self,
        model: nn.Module,
        batch: ReferenceBatch,
        target: Target,
        sites: Mapping[str, Group],
        take: Callable[[LayerPass], None],
    ) -> Attributed:
        counterfactual = _counterfactual(batch)
        other = _values(model, counterfactual, target, sites)
        with torch.no_grad():
            start_BTH = as_forward(lambda m, ids_BT: m.get_input_embeddings()(ids_BT), model, counterfactual.input_ids)
        mean: dict[str, Tensor] = {}

        def add(layer: LayerPass) -> None:
            delta_BTO = layer.delta_BTO.to(exact(layer.delta_BTO.dtype)) / self.steps
            mean[layer.name] = mean[layer.name] + delta_BTO if layer.name in mean else delta_BTO

        def finish(layer: LayerPass) -> None:
            """Takes in the last step, which is the sample itself."""
            add(layer)
            delta_BTO = mean.pop(layer.name).to(layer.delta_BTO.dtype)
            difference_BTI = layer.x_BTI - other[layer.name]
            take(replace(layer, x_BTI=difference_BTI, z_BTO=None, delta_BTO=delta_BTO))

        for step in range(1, self.steps + 1):
            with _on_the_way(model, start_BTH, step / self.steps):
                see = finish if step == self.steps else add
                attributed = Gradient.passes(self, model, batch, target, sites, see)
        return attributed


def _counterfactual(batch: ReferenceBatch) -> ReferenceBatch:
    if not batch.attention_mask.any():  # a stand-in
        return batch
    if COUNTERFACTUAL not in batch.fields:
        raise InputError(
            f"the samples have no counterfactuals (field {COUNTERFACTUAL}); give {FIELD_KEYS[COUNTERFACTUAL]}"
        )
    ids_BT = batch.fields[COUNTERFACTUAL]
    assert ids_BT.shape == batch.input_ids.shape, "counterfactuals are padded as the samples are"
    return replace(batch, input_ids=ids_BT)


@torch.no_grad()
def _values(model: nn.Module, batch: ReferenceBatch, target: Target, sites: Mapping[str, Group]) -> dict[str, Tensor]:
    """The inputs of the layers at ``sites``, ``[B, T, I]`` by name, in one forward pass to the target."""
    values: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(group.layer).register_forward_pre_hook(
            lambda _, args, name=name: values.__setitem__(name, args[0])
        )
        for name, group in sites.items()
    ]
    try:
        attribute(model, target, batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: x.reshape(len(batch.input_ids), -1, x.shape[-1]) for name, x in values.items()}


@contextmanager
def _on_the_way(model: nn.Module, start_BTH: Tensor, share: float) -> Iterator[None]:
    """Until the block ends, word embeddings stand ``share`` of the way from ``start_BTH`` to their own."""

    def move(_: nn.Module, args: object, words_BTH: Tensor) -> Tensor:
        return words_BTH if share == 1 else start_BTH + share * (words_BTH - start_BTH)

    handle = model.get_input_embeddings().register_forward_hook(move)
    try:
        yield
    finally:
        handle.remove()
