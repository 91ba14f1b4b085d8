"""Signed scores where values are read, against the derivative by gains that a hook puts on them, in float64."""

import pytest
import torch
from tiny_models import tiny, tokens

from sparc3_pl.attribution.methods import Options
from sparc3_pl.attribution.scorers import Scorer
from sparc3_pl.attribution.soundness import padded
from sparc3_pl.attribution.targets import Attributed, Predicted, Target, last_logits
from sparc3_pl.data.batches import ReferenceBatch
from sparc3_pl.model.components import COMPONENTS

SAMPLES = [tokens(1, length, seed=length)[0] for length in (7, 3)]
ANSWERS = torch.tensor([[5, 9], [11, 4]])


class Lead(Target):
    """By how much the answer's logit is ahead of the foil's."""

    def __call__(self, hidden_BTH, head, batch):
        logits_BV = last_logits(hidden_BTH, head, batch.attention_mask)
        pair_B2 = logits_BV.gather(1, ANSWERS[: len(logits_BV)])
        return Attributed(pair_B2[:, 0] - pair_B2[:, 1], {})


def by_gains(model, group, sample, answer, foil):
    """The derivative of one sample's lead by the gain of every component of ``group``, by autograd, ``[count]``."""
    gains = torch.ones(group.count, dtype=torch.float64, requires_grad=True)
    site = group.site

    def weaken(module, args):
        return (args[0] * gains.repeat_interleave(site.width), *args[1:])

    handle = model.get_submodule(site.layer).register_forward_pre_hook(weaken)
    logits_V = model(sample[None]).logits[0, -1]
    (logits_V[answer] - logits_V[foil]).backward()
    handle.remove()
    return gains.grad


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "opt", "phi3", "gpt_neox"])
def test_signed_scores_are_the_derivative_by_the_gain(family):
    """GELU, ReLU and SiLU; gated, ungated and fused maps; shared key and value heads; biases and post-norms."""
    model = tiny(family, dtype=torch.float64).requires_grad_(False)
    scale = getattr(model.config, "logits_scaling", 1)
    scorer = Scorer(model, "gradient", ["neuron", "head", "mlp"], None, Lead(), Options(signed=True, squares=True))
    channels = Scorer(model, "gradient", "channel", None, Lead(), Options(signed=True, squares=True))
    for each in (scorer, channels):
        figures = each.update(ReferenceBatch(*padded(SAMPLES)))
        total = torch.zeros(2, dtype=torch.float64)
        for name, layer in each.layers.items():
            pairs = zip(SAMPLES, ANSWERS.tolist(), strict=True)
            wanted = torch.stack([by_gains(model, layer.group, sample, *pair) / scale for sample, pair in pairs])
            scores = each.scores(name, 2)
            torch.testing.assert_close(scores.scores[layer.group.own].double(), wanted.mean(0), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(
                scores.squares[layer.group.own].double(), wanted.square().mean(0), rtol=1e-5, atol=1e-6
            )
            gates = scores.scores.clone()
            gates[layer.group.own] = 0
            assert not gates.any(), "what is no neuron has a score"
            total += wanted.sum(1)
        torch.testing.assert_close(figures.relevance, total)


def test_a_neurons_score_at_the_rows_is_another_where_the_activation_is_not_linear():
    """Otherwise the test above would prove nothing."""
    model = tiny("gpt2", dtype=torch.float64).requires_grad_(False)

    class AtRows(Lead):
        at_values = False

    values = []
    for target in (Lead(), AtRows()):
        scorer = Scorer(model, "gradient", "neuron", None, target, Options(signed=True))
        scorer.update(ReferenceBatch(*padded(SAMPLES)))
        values.append(scorer.scores("transformer.h.0.mlp.c_fc", 2).scores)
    assert not torch.allclose(*values, rtol=0.1)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_predicted_is_read_at_the_rows(family, signed):
    """Row sums of W * G by parameter gradients: what these scores always were."""
    model = tiny(family, dtype=torch.float64)
    scorer = Scorer(model, "gradient", "neuron", None, Predicted(), Options(signed=signed))
    scorer.update(ReferenceBatch(*padded(SAMPLES)))
    for name in scorer.layers:
        weight, total = model.get_submodule(name).weight, 0
        for sample in SAMPLES:
            (gradient,) = torch.autograd.grad(model(sample[None]).logits[0, -1].max(), weight)
            products = (weight * gradient).detach()
            products = products.T if family == "gpt2" else products
            total = total + (products if signed else products.abs()).sum(1)
        torch.testing.assert_close(scorer.scores(name, 2).scores.double(), total / 2, rtol=1e-5, atol=1e-6)


def test_unsigned_scores_of_any_target_are_sums_of_weight_scores():
    model = tiny("gpt2").requires_grad_(False)
    neurons, weights = (Scorer(model, "gradient", kind, None, Lead()) for kind in ("neuron", "weight"))
    for scorer in (neurons, weights):
        scorer.update(ReferenceBatch(*padded(SAMPLES)))
    for name in neurons.layers:
        torch.testing.assert_close(neurons.scores(name, 2).scores, weights.scores(name, 2).scores.sum(1))


@pytest.mark.parametrize("kind", ["neuron", "head", "channel", "mlp"])
@pytest.mark.parametrize("family", ["llama", "opt", "phi3"])
def test_to_take_the_value_away_is_to_take_the_parameters_away(family, kind):
    """A hook that multiplies the inputs at the site by 0 against ``parts`` at 0."""
    model, component = tiny(family), COMPONENTS.make(kind)
    group = component.groups(model)[0]
    component_index = torch.tensor([min(2, group.count - 1)])
    keep = torch.ones(group.shape)
    keep[group.first + component_index] = 0
    handle = model.get_submodule(group.site.layer).register_forward_pre_hook(
        lambda _, args: (args[0] * group.site.spread(keep), *args[1:])
    )
    with torch.no_grad():
        expected = model(SAMPLES[0][None]).logits
        handle.remove()
        full = model(SAMPLES[0][None]).logits
        for part in component.parts(model, group.layer, group.first + component_index):
            part.write(model.get_submodule(part.layer), 0.0)
        edited = model(SAMPLES[0][None]).logits
    torch.testing.assert_close(edited, expected)
    assert not torch.allclose(full, expected)
