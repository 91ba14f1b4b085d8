"""Scores of components by the size of their values."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from sparc3_pl.attribution.accumulators import (
    add_sample_scores,
    drop_nonfinite,
    no_counts,
    no_sample_scores,
    require_all,
    require_finite,
    require_once,
    sum_of_layers,
)
from sparc3_pl.attribution.methods import BatchFigures, Layer, Method, Options, Sums, group_of
from sparc3_pl.attribution.precision import exact
from sparc3_pl.attribution.recording import inputs_shown
from sparc3_pl.attribution.targets import Target
from sparc3_pl.data.batches import ReferenceBatch
from sparc3_pl.model.components import Component, Group, site_of

__all__ = ["Activation"]


class Activation(Method):
    """Mean over samples of |value|, summed over the sample's tokens and the component's inputs where it is read.

    A neuron's value is the hidden activation, a head's its slice of the input of the output projection. One forward
    pass, no target: what is large is not what matters, which makes it the baseline of circuit discovery.
    """

    needs_values = True

    def heeds(self, component: Component) -> frozenset[str]:
        return frozenset(("nonfinite", "squares", "groups"))

    def at_values(self, target: Target, options: Options) -> bool:
        return True

    def sums(self, group: Group, weight_OI: Tensor, options: Options) -> Sums:
        return no_counts(weight_OI.device) | no_sample_scores(
            site_of(group), weight_OI.device, options.squares, options.groups
        )

    def take_in(
        self, model: nn.Module, batch: ReferenceBatch, layers: Mapping[str, Layer], target: Target, options: Options
    ) -> BatchFigures:
        num_samples = int(batch.attention_mask.any(1).sum())
        mask_BT1 = batch.attention_mask[:num_samples, :, None].bool()
        groups_B = group_of(batch.input_ids[:num_samples], mask_BT1[..., 0], options.groups) if options.groups else None
        relevance: dict[str, Tensor] = {}

        def add(name: str, x: Tensor) -> None:
            require_once(name, relevance)
            sums, site = layers[name].sums, site_of(layers[name].group)
            x_BTI = x.reshape(*batch.attention_mask.shape, -1)[:num_samples]
            sizes_BTI = x_BTI.to(exact(x.dtype)).abs().where(mask_BT1.to(x.device), 0)
            if options.nonfinite == "zero":
                drop_nonfinite(sizes_BTI, sums)
            relevance[name] = add_sample_scores(sums, site.gathered(sizes_BTI.sum(1).double()), site, groups_B)

        modules = {name: model.get_submodule(site_of(layer.group).layer) for name, layer in layers.items()}
        inputs_shown(model, batch, modules, add)
        require_all(layers, relevance)
        require_finite(relevance)
        return BatchFigures(sum_of_layers(relevance), first_token_share=None, target={})

    def scores(self, sums: Sums, group: Group, num_samples: int, weight_OI: Tensor | None, options: Options) -> Tensor:
        return (sums["sum"] / num_samples).float()
