"""Scores of single units by how well their responses tell labelled samples from the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from sparc3_pl.attribution.accumulators import drop_nonfinite, no_counts, require_all, require_finite, require_once
from sparc3_pl.attribution.methods import Layer, Method, Options, Sums
from sparc3_pl.attribution.recording import check_tokens, inputs_shown
from sparc3_pl.attribution.targets import Target
from sparc3_pl.data.batches import ReferenceBatch
from sparc3_pl.errors import InputError
from sparc3_pl.model.components import Component, Group, site_of
from sparc3_pl.runtime.collectives import gather_lists, is_rank_zero

__all__ = ["Expertise", "pairs_in_order"]

At = Literal["values", "outputs"]


@dataclass
class _Responses:
    """The labels and responses of one run. It holds the run's layers, so that no other run can be taken for it."""

    layers: Mapping[str, Layer]
    labels: list[Tensor] = field(default_factory=list)
    """Each batch's labels, ``[B]`` bool."""
    by_layer: dict[str, list[Tensor]] = field(default_factory=dict)
    """Each batch's responses at a layer, ``[B, n]``, in the host's memory."""


class Expertise(Method):
    """AUROC of a unit's response as a detector of the samples' label (AurA, Suau et al., ICML 2024, arXiv 2407.12824).

    The response is the unit's maximum over the sample's real tokens. The score is the share of pairs of a labelled and
    another sample in which the labelled one has the larger response, equal ones (up to rounding) counting half: 0.5
    says nothing, 1 is an expert. No histogram: all responses are kept (in the host's memory, ``[samples, units]``) and
    compared after the last batch. So a run cannot be split into parts, nor resumed after a crash.

    Args:
        at: ``values``: a neuron responds with its hidden activation, a channel with its input of the output projection.
            ``outputs``: a row of any layer with what the layer makes of it, as published (up, gate and down).
        threshold: A sample is labelled if its label is at least this.
    """

    needs = ("label",)
    needs_all_samples = True

    def __init__(self, at: At = "values", threshold: float = 0.5) -> None:
        if at not in get_args(At):
            raise InputError(f"method expertise: at={at!r} is unknown; give {' or '.join(get_args(At))}")
        self.at, self.threshold = at, threshold
        self.needs_values = at == "values"
        self._runs: dict[int, _Responses] = {}

    def heeds(self, component: Component) -> frozenset[str]:
        return frozenset(("nonfinite",))

    def at_values(self, target: Target, options: Options) -> bool:
        return self.needs_values

    def check_use(self, component: Component, target: Target) -> None:
        super().check_use(component, target)
        if component.dims == 2:
            raise InputError("method expertise: single weights have no response; score neuron or channel")

    def check_samples(self, numbers: Sequence[Mapping[str, float]]) -> None:
        if len({one["label"] >= self.threshold for one in numbers}) < 2:
            raise self._no_pairs()

    def _no_pairs(self) -> InputError:
        return InputError(
            "method expertise: the samples are all labelled, or none is (data.label_field, and the method's "
            f"threshold={self.threshold}); give samples of both kinds"
        )

    def sums(self, group: Group, weight_OI: Tensor, options: Options) -> Sums:
        site = site_of(group) if self.needs_values else group
        if site.width != 1 or (not self.needs_values and site.axis != "out"):
            raise InputError(
                f"method expertise: the components of {group.layer} are not single units; score neuron, or channel "
                "with at=values"
            )
        zeros = torch.zeros(group.shape, dtype=torch.float64, device=weight_OI.device)
        return no_counts(weight_OI.device) | {"sum": zeros, "pairs": zeros.new_zeros(())}

    def take_in(
        self, model: nn.Module, batch: ReferenceBatch, layers: Mapping[str, Layer], target: Target, options: Options
    ) -> None:
        num_samples = int(batch.attention_mask.any(1).sum())
        mask_BT1 = batch.attention_mask[:num_samples, :, None].bool()
        run = self._runs.setdefault(id(layers), _Responses(layers))
        totals: dict[str, Tensor] = {}

        def add(name: str, x: Tensor) -> None:
            require_once(name, totals)
            check_tokens(name, x, *batch.input_ids.shape, single=False)
            layer = layers[name]
            x_BTN = x.detach().reshape(*batch.attention_mask.shape, -1)[:num_samples]
            x_BTN = x_BTN.masked_fill(~mask_BT1.to(x.device), -torch.inf)
            if options.nonfinite == "zero":
                padding = ~mask_BT1.to(x.device).expand_as(x_BTN)
                x_BTN = drop_nonfinite(x_BTN.masked_fill(padding, 0), layer.sums).masked_fill(padding, -torch.inf)
            response_BN = x_BTN.amax(1) if num_samples else x_BTN[:, 0]
            if self.needs_values:
                response_BN = site_of(layer.group).gathered(response_BN)
            totals[name] = response_BN.sum()
            run.by_layer.setdefault(name, []).append(response_BN.cpu())

        if self.needs_values:
            modules = {name: model.get_submodule(site_of(layer.group).layer) for name, layer in layers.items()}
            inputs_shown(model, batch, modules, add)
        else:
            handles = [
                layer.module.register_forward_hook(lambda _, args, y, name=name: add(name, y))
                for name, layer in layers.items()
            ]
            try:
                inputs_shown(model, batch, {}, add)
            finally:
                for handle in handles:
                    handle.remove()
        if num_samples:
            run.labels.append(torch.as_tensor(batch.fields["label"])[:num_samples].cpu() >= self.threshold)
        require_all(layers, totals)
        require_finite(totals)

    def finish(self, model: nn.Module, layers: Mapping[str, Layer], options: Options) -> None:
        run = self._runs.pop(id(layers), _Responses(layers))
        labels_N = torch.cat([torch.zeros(0, dtype=torch.bool), *gather_lists(run.labels)])
        for name, layer in layers.items():
            parts = gather_lists([part for part in run.by_layer.get(name, []) if len(part)])
            if not is_rank_zero() or not parts:
                continue  # the sums of the other ranks stay 0
            responses_NU = torch.cat(parts)
            layer.sums["sum"] += pairs_in_order(responses_NU[labels_N], responses_NU[~labels_N]).to(
                layer.sums["sum"].device
            )
            layer.sums["pairs"] += labels_N.sum() * (~labels_N).sum()

    def scores(self, sums: Sums, group: Group, num_samples: int, weight_OI: Tensor | None, options: Options) -> Tensor:
        if not sums["pairs"]:
            raise self._no_pairs()
        return (sums["sum"] / sums["pairs"]).float()


def pairs_in_order(with_PU: Tensor, without_QU: Tensor) -> Tensor:
    """The number of the P * Q pairs whose first is larger, equal ones counting half (Mann-Whitney): ``[U]`` float64.

    Two responses are equal if they differ by rounding: many a unit responds most to the token that all texts begin
    with, and which batch a sample is in would else decide the order.
    """
    first_UP, other_UQ = with_PU.T.double(), without_QU.T.double()
    scale_U1 = torch.cat([first_UP, other_UQ], 1).abs().amax(1, keepdim=True)
    slack_U1 = scale_U1 * _ROUNDING.get(with_PU.dtype, 1e-5)
    ordered_UQ = other_UQ.sort(1).values.contiguous()
    below = torch.searchsorted(ordered_UQ, (first_UP - slack_U1).contiguous())
    not_above = torch.searchsorted(ordered_UQ, (first_UP + slack_U1).contiguous(), right=True)
    return (below + not_above).sum(1).double() / 2


_ROUNDING = {torch.bfloat16: 0.02, torch.float16: 0.003}
"""Largest difference of equal responses, relative to the unit's largest; 1e-5 in float32 and float64."""
