"""Scores against slow explicit per-sample loops over parameter gradients, for every family."""

from contextlib import contextmanager, nullcontext

import pytest
import torch

from sparc3_pl.attribution.rules import attn_lrp
from sparc3_pl.errors import InputError
from sparc3_pl.families import linear_layers, output_head, select_layers, weight_matrix
from sparc3_pl.scoring import build_scorer

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
    return input_ids, mask


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
    scorer = build_scorer(layers, method, "weight")
    statistics = scorer.update(tiny_model, *padded(samples, side))
    expected = signed_relevance(tiny_model, linear_layers(tiny_model), samples, method)
    for name in layers:
        close(scorer.scores(name, len(samples)), expected[name].abs().mean(0))
    close(statistics.relevance.float(), sum(part.abs().sum((1, 2)) for part in expected.values()))


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("method", ["lrp", "gradient"])
def test_neuron_scores_and_squares(tiny_model, samples, method, signed):
    layers = select_layers(tiny_model, None)
    scorer = build_scorer(layers, method, "neuron", signed=signed, squares=True)
    for part in (samples[:1], samples[1:]):  # batches add up
        scorer.update(tiny_model, *padded(part))
    for name, relevance in signed_relevance(tiny_model, layers, samples, method).items():
        rows = (relevance if signed else relevance.abs()).sum(2)
        close(scorer.scores(name, len(samples)), rows.mean(0))
        close(scorer.squares(name, len(samples)), rows.square().mean(0))


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
    scorer = build_scorer(layers, "wanda", "weight")
    scorer.update(tiny_model, *padded(samples, side))
    neurons = build_scorer(layers, "wanda", "neuron")
    neurons.update(tiny_model, *padded(samples, side))
    for name, module in layers.items():
        expected = weight_matrix(module).abs() * torch.cat(seen[name]).norm(dim=0)
        close(scorer.scores(name, 4), expected)
        close(neurons.scores(name, 4), expected.sum(1))


def test_statistics_of_a_sample(tiny_model, samples):
    layers = select_layers(tiny_model, None)
    statistics = build_scorer(layers, "lrp", "neuron").update(tiny_model, *padded(samples))
    for row, (sample, record) in enumerate(zip(samples, statistics.records(), strict=True)):
        logits = tiny_model(sample[None]).logits[0, -1]
        assert record["target"] == int(logits.argmax())
        assert record["logit"] == pytest.approx(float(logits.max()), rel=1e-4)
        alone = build_scorer(layers, "lrp", "neuron").update(tiny_model, sample[None], torch.ones_like(sample[None]))
        assert record["first_token_share"] == pytest.approx(float(alone.first_token_share), rel=1e-4)
        assert 0 <= record["first_token_share"] < 1, row  # 0 where a sliding window hides the first token


@pytest.mark.parametrize("settings", [("lrp", "weight"), ("lrp", "neuron"), ("wanda", "weight")], ids=" ".join)
def test_a_row_without_a_real_token_counts_for_nothing(tiny_llama, settings):
    tiny_llama.requires_grad_(False)
    layers, samples = linear_layers(tiny_llama), [torch.arange(3, 3 + length) for length in LENGTHS]
    plain, more, nothing = (build_scorer(layers, *settings, zero_nonfinite=True) for _ in range(3))
    input_ids, mask = padded(samples)
    plain.update(tiny_llama, input_ids, mask)
    statistics = more.update(tiny_llama, *padded([*samples, samples[0][:0]]))
    assert statistics is None or len(statistics.records()) == len(samples)
    statistics = nothing.update(tiny_llama, input_ids, torch.zeros_like(mask))
    assert statistics is None or statistics.records() == []
    for name in layers:
        for key, tensor in plain.tensors[name].items():
            close(more.tensors[name][key], tensor)
            assert not nothing.tensors[name][key].any()


def test_parameters_stay_frozen_and_hooks_go(tiny_model, samples):
    build_scorer(linear_layers(tiny_model), "lrp", "weight").update(tiny_model, *padded(samples))
    assert all(p.grad is None and not p.requires_grad for p in tiny_model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in tiny_model.modules())


def test_baselines_need_no_sample(tiny_model):
    layers = select_layers(tiny_model, None)
    magnitude = build_scorer(layers, "magnitude", "neuron")
    first, again, other = (build_scorer(layers, "random", "weight", seed=seed) for seed in (0, 0, 1))
    for name, module in layers.items():
        close(magnitude.scores(name, 0), weight_matrix(module).abs().sum(1))
        assert first.scores(name, 0).shape == weight_matrix(module).shape
        assert torch.equal(first.scores(name, 0), again.scores(name, 0))
        assert not torch.equal(first.scores(name, 0), other.scores(name, 0))


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
        build_scorer(layers, method, granularity).update(tiny_model, *padded(samples[:1]))
    scorer = build_scorer(layers, method, granularity, zero_nonfinite=True)
    if method == "wanda":
        scorer.update(tiny_model, *padded(samples[:1]))
        assert int(scorer.tensors[name]["nan"]) == 1
        assert scorer.scores(name, 1).isfinite().all()
    handle.remove()


def test_a_layer_that_does_not_run_is_an_error(tiny_model, samples):
    stray = torch.nn.Linear(4, 4)
    scorer = build_scorer({**select_layers(tiny_model, None), "stray": stray}, "gradient", "neuron")
    with pytest.raises(InputError, match="stray takes no part"):
        scorer.update(tiny_model, *padded(samples))
