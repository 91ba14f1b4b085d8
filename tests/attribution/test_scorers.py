"""Scores against slow explicit per-sample loops over parameter gradients, for every family."""

from contextlib import contextmanager, nullcontext

import pytest
import torch

from sparc3_pl.attribution.methods import Options
from sparc3_pl.attribution.rules import attn_lrp
from sparc3_pl.attribution.scorers import Scorer
from sparc3_pl.data.batches import ReferenceBatch
from sparc3_pl.errors import InputError
from sparc3_pl.model.structure import decoder, linear_layers, output_head, select_layers, weight_matrix

LENGTHS = (9, 4, 6, 2)
RULES = {"lrp": attn_lrp, "gradient": nullcontext}


@pytest.fixture
def samples(tiny_model):
    """Four samples of unequal length, for a model whose parameters are frozen as `load_model` freezes them."""
    tiny_model.requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    vocabulary = tiny_model.get_input_embeddings().num_embeddings
    return [torch.randint(3, vocabulary, (length,), generator=generator) for length in LENGTHS]


def padded(samples, side="right"):
    input_ids = torch.zeros(len(samples), max(map(len, samples)), dtype=torch.int64)
    mask = torch.zeros_like(input_ids)
    for row, sample in enumerate(samples):
        place = slice(0, len(sample)) if side == "right" else slice(-len(sample), None)
        input_ids[row, place], mask[row, place] = sample, 1
    return ReferenceBatch(input_ids, mask)


@contextmanager
def trainable_untied(model):
    """Parameters that take gradients, and a head whose gradient is that of its use as a head."""
    _, head = output_head(model)
    tied = head.weight
    head.weight = torch.nn.Parameter(tied.detach().clone())
    model.requires_grad_(True)
    try:
        yield
    finally:
        model.zero_grad()
        head.weight = tied
        model.requires_grad_(False)


def signed_relevance(model, layers, samples, method):
    """W * G of every layer and sample, one at a time, by the parameters' own gradients: layer -> ``[N, O, I]``."""
    found = {name: [] for name in layers}
    for sample in samples:
        with trainable_untied(model):
            with RULES[method](model):
                model(sample[None]).logits[0, -1].max().backward()
            for name, module in layers.items():
                gradient = module.weight.grad
                if gradient.shape != weight_matrix(module).shape or type(module).__name__ == "Conv1D":
                    gradient = gradient.T
                found[name].append((gradient * weight_matrix(module)).detach().clone())
    return {name: torch.stack(parts) for name, parts in found.items()}


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("method", ["lrp", "gradient"])
def test_weight_scores_of_all_layers(tiny_model, samples, method, side):
    layers = select_layers(tiny_model, ["*"])
    scorer = Scorer(tiny_model, method, "weight", ["*"])
    figures = scorer.update(padded(samples, side))
    expected = signed_relevance(tiny_model, linear_layers(tiny_model), samples, method)
    for name in layers:
        close(scorer.scores(name, len(samples)).scores, expected[name].abs().mean(0))
    close(figures.relevance.float(), sum(part.abs().sum((1, 2)) for part in expected.values()))


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("method", ["lrp", "gradient"])
def test_neuron_scores_and_squares(tiny_model, samples, method, signed):
    layers = select_layers(tiny_model, None)
    scorer = Scorer(tiny_model, method, "neuron", options=Options(signed=signed, squares=True))
    for part in (samples[:1], samples[1:]):  # batches add up
        scorer.update(padded(part))
    for name, relevance in signed_relevance(tiny_model, layers, samples, method).items():
        rows = (relevance if signed else relevance.abs()).sum(2)
        close(scorer.scores(name, len(samples)).scores, rows.mean(0))
        close(scorer.scores(name, len(samples)).squares, rows.square().mean(0))


@pytest.mark.parametrize("side", ["right", "left"])
def test_wanda_is_one_norm_over_all_real_tokens(tiny_model, samples, side):
    layers = linear_layers(tiny_model)
    seen = {name: [] for name in layers}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0].flatten(0, -2)))
        for name, module in layers.items()
    ]
    for sample in samples:
        tiny_model(sample[None])
    for hook in hooks:
        hook.remove()
    scorer, neurons = (Scorer(tiny_model, "wanda", kind, ["*"]) for kind in ("weight", "neuron"))
    scorer.update(padded(samples, side))
    neurons.update(padded(samples, side))
    for name, module in layers.items():
        expected = weight_matrix(module).abs() * torch.cat(seen[name]).norm(dim=0)
        close(scorer.scores(name, 4).scores, expected)
        close(neurons.scores(name, 4).scores, expected.sum(1))


def test_statistics_of_a_sample(tiny_model, samples):
    figures = Scorer(tiny_model).update(padded(samples))
    for row, (sample, record) in enumerate(zip(samples, figures.rows(), strict=True)):
        logits = tiny_model(sample[None]).logits[0, -1]
        assert record["target"] == int(logits.argmax())
        assert record["logit"] == pytest.approx(float(logits.max()), rel=1e-4)
        alone = Scorer(tiny_model).update(padded([sample]))
        assert record["first_token_share"] == pytest.approx(float(alone.first_token_share), rel=1e-4)
        assert 0 <= record["first_token_share"] < 1, row  # 0 where a sliding window hides the first token


@pytest.mark.parametrize("settings", [("lrp", "weight"), ("lrp", "neuron"), ("wanda", "weight")], ids=" ".join)
def test_a_row_without_a_real_token_counts_for_nothing(tiny_llama, settings):
    tiny_llama.requires_grad_(False)
    samples = [torch.arange(3, 3 + length) for length in LENGTHS]
    plain, more, nothing = (Scorer(tiny_llama, *settings, ["*"], options=Options(nonfinite="zero")) for _ in range(3))
    batch = padded(samples)
    plain.update(batch)
    figures = more.update(padded([*samples, samples[0][:0]]))
    assert figures is None or len(figures.rows()) == len(samples)
    figures = nothing.update(ReferenceBatch(batch.input_ids, torch.zeros_like(batch.attention_mask)))
    assert figures is None or figures.rows() == []
    for name, sums in plain.sums.items():
        for key, tensor in sums.items():
            close(more.sums[name][key], tensor)
            assert not nothing.sums[name][key].any()


def test_parameters_stay_frozen_and_hooks_go(tiny_model, samples):
    Scorer(tiny_model, "lrp", "weight", ["*"]).update(padded(samples))
    assert all(p.grad is None and not p.requires_grad for p in tiny_model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in tiny_model.modules())


def test_baselines_need_no_sample(tiny_model):
    magnitude = Scorer(tiny_model, "magnitude", "neuron")
    scorers = [Scorer(tiny_model, "random", "weight", options=Options(seed=seed)) for seed in (0, 0, 1)]
    for name, module in select_layers(tiny_model, None).items():
        close(magnitude.scores(name, 0).scores, weight_matrix(module).abs().sum(1))
        first, again, other = (scorer.scores(name, 0).scores for scorer in scorers)
        assert first.shape == weight_matrix(module).shape
        assert torch.equal(first, again)
        assert not torch.equal(first, other)


@pytest.mark.parametrize(("method", "granularity"), [("gradient", "weight"), ("lrp", "neuron"), ("wanda", "weight")])
def test_nonfinite_values_stop_or_are_counted(tiny_model, samples, method, granularity):
    layers = select_layers(tiny_model, None)
    name = list(layers)[-1]

    def poison(module, args):
        x = args[0].clone()
        x.view(-1, x.shape[-1])[0, 0] = torch.nan
        return (x, *args[1:])

    handle = layers[name].register_forward_pre_hook(poison)
    with pytest.raises(InputError, match=r"NaN or infinite.*nonfinite: zero"):
        Scorer(tiny_model, method, granularity).update(padded(samples[:1]))
    scorer = Scorer(tiny_model, method, granularity, options=Options(nonfinite="zero"))
    if method == "wanda":
        scorer.update(padded(samples[:1]))
        assert scorer.scores(name, 1).nan == 1
        assert scorer.scores(name, 1).scores.isfinite().all()
    handle.remove()


def test_a_layer_that_does_not_run_is_an_error(tiny_model, samples):
    decoder(tiny_model).stray = torch.nn.Linear(4, 4)
    scorer = Scorer(tiny_model, "gradient", "neuron", ["*"])
    with pytest.raises(InputError, match="stray takes no part"):
        scorer.update(padded(samples))
