"""One addition of each kind, as a user would write it in a module of their own: nothing in the package knows of it."""

from dataclasses import dataclass

import torch

from sparc3_pl.attribution.accumulators import component_scores, no_counts
from sparc3_pl.attribution.methods import Gradient
from sparc3_pl.attribution.targets import Attributed, Target, last_logits
from sparc3_pl.evaluation.measurement import Measurement
from sparc3_pl.model.components import Component, Group, Part
from sparc3_pl.model.structure import features, mlps
from sparc3_pl.pruning.edits import Change, Edit, contributing


class Pair(Component):
    """Two neighbouring neurons of an MLP, taken together by the columns that read them."""

    unit = "pairs"

    def groups(self, model, patterns=None):
        widths = {mlp.down: features(model.get_submodule(mlp.down))[1] for mlp in mlps(model)}
        return [Group(down, (width // 2,), "in", width // 2, width=2) for down, width in widths.items()]

    def parts(self, model, layer, index):
        columns = (2 * index[:, None] + torch.arange(2)).flatten()
        return [Part(layer, "columns", columns, torch.arange(len(index)).repeat_interleave(2), "reads")]


class RootMeanSquare(Gradient):
    """The root of the mean square of the samples' scores instead of the mean of their magnitudes."""

    def heeds(self, component):
        return super().heeds(component) - {"signed", "squares", "groups"}

    def sums(self, group, weight_OI, options):
        return no_counts(weight_OI.device) | {"squares": torch.zeros(group.shape, dtype=torch.float64)}

    def add(self, sums, group, layer, groups_B, options):
        scores_BN = component_scores(layer, group, signed=False, counts=None)
        sums["squares"] += scores_BN.square().sum(0)
        return scores_BN.sum(1)

    def scores(self, sums, group, num_samples, weight_OI, options):
        return (sums["squares"] / num_samples).sqrt().float()


@dataclass(frozen=True)
class Runner(Target):
    """By how much the likeliest token is ahead of the next but ``rank``."""

    rank: int = 1

    def __call__(self, hidden_BTH, head, batch):
        top_BK = last_logits(hidden_BTH, head, batch.attention_mask).topk(self.rank + 1).values
        lead_B = top_BK[:, 0] - top_BK[:, -1]
        return Attributed(lead_B, {"lead": lead_B.detach().double()})


@dataclass(frozen=True)
class Fade(Edit):
    """Components keep ``first`` of their contribution, the next ones ``first`` squared, and so on."""

    first: float = 0.5

    def factors(self, score):
        return self.first ** torch.arange(1, len(score) + 1, dtype=torch.float64)

    def changes(self, model, chosen):
        return [Change(part, chosen.factor[part.owner]) for part in contributing(chosen.parts)]


@dataclass(frozen=True)
class Surprise(Measurement):
    """Entropy of the next token after each of some sentences, in nats."""

    name = "surprise"
    unit = "sentences"
    better = "lower"
    sentences: int = 7

    def units(self, encoder):
        return [f"The red fox number {i} crosses the" for i in range(self.sentences)]

    def measure(self, model, encoder, units):
        rows = []
        for text in units:
            logits_V = model(input_ids=torch.tensor([encoder.tokenizer(text).input_ids])).logits[0, -1]
            rows.append(
                {"unit": text, "nats": torch.distributions.Categorical(logits=logits_V.double()).entropy().item()}
            )
        return rows
