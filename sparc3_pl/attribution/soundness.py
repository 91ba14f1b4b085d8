"""Whether the attribution of a model is right: measurements on a few samples, which the ``doctor`` command judges."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from sparc3_pl.attribution.methods import Lrp, Options
from sparc3_pl.attribution.rules import attn_lrp
from sparc3_pl.attribution.scorers import Scorer
from sparc3_pl.attribution.targets import last_hidden_state, last_logits
from sparc3_pl.data.batches import ReferenceBatch
from sparc3_pl.model.experts import one_by_one
from sparc3_pl.model.placement import input_device
from sparc3_pl.model.structure import output_head
from sparc3_pl.statistics.agreement import jaccard, rank_correlation

__all__ = [
    "PrecisionAgreement",
    "forward_change",
    "neuron_scores",
    "padded",
    "padding_error",
    "parameters_as",
    "precision_agreement",
]


@dataclass(frozen=True)
class NeuronScores:
    """AttnLRP scores of all MLP neurons.

    Attributes:
        scores: The scores of each layer, ``[width]`` float32.
        nonfinite: Number of NaN and infinite relevances (counted as 0) by layer; only layers that have any.
    """

    scores: dict[str, Tensor]
    nonfinite: dict[str, int]

    @property
    def flat(self) -> Tensor:
        """All layers' scores in one vector."""
        return torch.cat(list(self.scores.values()))


@dataclass(frozen=True)
class PrecisionAgreement:
    """How neuron scores of a half-precision model agree with those of the same model in float32.

    Attributes:
        rank_correlation: Spearman's, over all neurons.
        top: Number of strongest neurons that are compared.
        jaccard: Jaccard index of the ``top`` strongest.
        total_change: Relative change of the sum of all scores.
    """

    rank_correlation: float
    top: int
    jaccard: float
    total_change: float


def padded(samples: Sequence[Tensor], side: Literal["left", "right"] = "right") -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, each ``[B, T]``, of samples ``[T_b]``; pads are token 0."""
    longest = max(map(len, samples))
    input_ids, mask = (torch.zeros(len(samples), longest, dtype=torch.int64) for _ in range(2))
    for row, sample in enumerate(samples):
        place = slice(0, len(sample)) if side == "right" else slice(longest - len(sample), None)
        input_ids[row, place], mask[row, place] = sample, 1
    return input_ids, mask


def neuron_scores(
    model: nn.Module, input_ids_BT: Tensor, attention_mask_BT: Tensor, unlisted: bool = False
) -> NeuronScores:
    """Unsigned AttnLRP scores of the up-projections' rows, the mean over one batch; ``unlisted`` as in ``attn_lrp``.

    Raises:
        InputError: if the model has no MLPs, or a module without a rule.
    """
    scorer = Scorer(model, Lrp(unlisted=unlisted), "neuron", options=Options(nonfinite="zero"))
    scorer.update(ReferenceBatch(input_ids_BT, attention_mask_BT))
    layers = {name: scorer.scores(name, len(input_ids_BT)) for name in scorer.layers}
    counts = {name: layer.nan + layer.inf for name, layer in layers.items()}
    scores = {name: layer.scores[layer.group.own].cpu() for name, layer in layers.items()}
    return NeuronScores(scores, {name: count for name, count in counts.items() if count})


@torch.no_grad()
def forward_change(model: nn.Module, input_ids_BT: Tensor, attention_mask_BT: Tensor, unlisted: bool = False) -> float:
    """The largest change of a logit under the rules, relative to the largest logit; 0 if the rules are right."""
    device, (_, head) = input_device(model), output_head(model)
    input_ids_BT, attention_mask_BT = input_ids_BT.to(device), attention_mask_BT.to(device)

    def logits() -> Tensor:
        return last_logits(last_hidden_state(model, input_ids_BT, attention_mask_BT), head, attention_mask_BT)

    with one_by_one(model):
        plain = logits()
        with attn_lrp(model, unlisted=unlisted):
            ruled = logits()
    return float((ruled - plain).abs().max() / plain.abs().max())


def padding_error(
    model: nn.Module, samples: Sequence[Tensor], side: Literal["left", "right"], unlisted: bool = False
) -> float:
    """The largest difference between a padded batch's scores and single samples', relative to the largest score."""
    each = (neuron_scores(model, *padded([sample]), unlisted).flat.double() for sample in samples)
    single = sum(each) / len(samples)
    batch = neuron_scores(model, *padded(samples, side), unlisted).flat.double()
    return float((batch - single).abs().max() / single.abs().max())


def precision_agreement(exact: Tensor, rough: Tensor, top: int = 100) -> PrecisionAgreement:
    """Compares two score vectors ``[n]``; of fewer than ``4 * top`` neurons a quarter counts as the strongest."""
    top = max(1, min(top, len(exact) // 4))
    strongest = [set(scores.topk(top).indices.tolist()) for scores in (exact, rough)]
    totals = [float(scores.double().sum()) for scores in (exact, rough)]
    change = (totals[1] - totals[0]) / totals[0] if totals[0] else math.nan
    return PrecisionAgreement(rank_correlation(exact, rough), top, jaccard(*strongest), change)


@contextmanager
def parameters_as(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Until the block ends, the model's parameters are of ``dtype``, as if it had been loaded so.

    Buffers keep their own: rotary frequencies are float32 in a model of any precision.
    """
    before = [(parameter, parameter.data) for parameter in model.parameters()]
    try:
        for parameter, data in before:
            parameter.data = data.to(dtype)
        yield
    finally:
        for parameter, data in before:
            parameter.data = data
