"""Targets against slow loops over single samples: the plain model's logits, log-softmax, and autograd on weights."""

from contextlib import contextmanager, nullcontext

import pytest
import torch
from tiny_models import tiny

from sparc3_pl.attribution import accumulators, likelihood
from sparc3_pl.attribution.likelihood import drawn_tokens, require_known_logits, sample_uniforms
from sparc3_pl.attribution.methods import Options, group_of
from sparc3_pl.attribution.rules import attn_lrp
from sparc3_pl.attribution.scorers import Scorer
from sparc3_pl.attribution.targets import TARGETS, attribute
from sparc3_pl.data.batches import ReferenceBatch
from sparc3_pl.errors import InputError
from sparc3_pl.model.logits import OutputHead
from sparc3_pl.model.structure import features, linear_layers, mlps, output_head, weight_matrix
from sparc3_pl.scoring.score_run import ScoreRequest, require_fields

LENGTHS = (9, 4, 6, 2)
COMPLETIONS = (3, 1, 5, 1)
"""Tokens of the samples' completions."""
WEIGHTS = (0.5, -2.0, 1.0, 0.25)
ANSWERS, FOILS = (7, 8, 9, 10), (11, 12, -1, 13)
RULES = {"lrp": attn_lrp, "gradient": nullcontext}
DRAWN = {"class_path": "text", "init_args": {"labels": "model", "seed": 3}}
SPECS = {
    "completion": "completion",
    "warm": {"class_path": "completion", "init_args": {"temperature": 0.7}},
    "text": "text",
    "drawn": DRAWN,
    "answer": "answer",
}


def samples_of(lengths=LENGTHS) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 50, (length,), generator=generator) for length in lengths]


def batch_of(samples, side="right", rows=slice(None)) -> ReferenceBatch:
    """The samples with every field that a target may read."""
    own = list(zip(samples, COMPLETIONS, WEIGHTS, ANSWERS, FOILS, strict=True))[rows]
    shape = len(own), max(len(sample) for sample, *_ in own)
    ids, mask, completion = (torch.zeros(shape, dtype=kind) for kind in (torch.int64, torch.int64, torch.bool))
    for row, (sample, length, *_) in enumerate(own):
        place = slice(0, len(sample)) if side == "right" else slice(shape[1] - len(sample), shape[1])
        ids[row, place], mask[row, place] = sample, 1
        completion[row, place.stop - length : place.stop] = True
    _, _, weight, answer, foil = (
        torch.tensor(column) for column in list(zip(*[(0, *item[1:]) for item in own], strict=True))
    )
    fields = {"completion_mask": completion, "weight": weight.double(), "answer": answer, "foil": foil}
    return ReferenceBatch(ids, mask, fields=fields)


def drawn_one_by_one(logits_TV: torch.Tensor, sample: torch.Tensor) -> list[int]:
    """The first token whose cumulative probability exceeds the position's number."""
    numbers = sample_uniforms(sample[None], torch.ones_like(sample)[None], 3)[0]
    chosen = []
    for logits_V, number in zip(logits_TV.double(), numbers.tolist(), strict=True):
        token, total = 0, float(logits_V.softmax(0)[0])
        while total <= number:
            token += 1
            total += float(logits_V.softmax(0)[token])
        chosen.append(token)
    return chosen


def slow_value(kind: str, logits_TV: torch.Tensor, i: int, sample: torch.Tensor) -> torch.Tensor:
    """The target of sample i from the plain model's logits."""
    if kind == "answer":
        return logits_TV[-1, ANSWERS[i]] - (logits_TV[-1, FOILS[i]] if FOILS[i] >= 0 else 0.0)
    nats_TV = (logits_TV / (0.7 if kind == "warm" else 1.0)).log_softmax(-1)
    labels = drawn_one_by_one(logits_TV.detach(), sample) if kind == "drawn" else [*sample[1:].tolist(), -1]
    first = 1 if kind in ("text", "drawn") else len(sample) - COMPLETIONS[i]
    value = sum(nats_TV[place - 1, labels[place - 1]] for place in range(first, len(sample)))
    return value * (WEIGHTS[i] if kind in ("completion", "warm") else 1.0)


def slow_scores(model, samples, kind: str, method: str, names) -> dict[str, torch.Tensor]:
    """W * G of each sample by parameter gradients of the plain model: layer -> ``[N, O, I]``."""
    _, head = output_head(model)
    tied = head.weight
    head.weight = torch.nn.Parameter(tied.detach().clone())  # its gradient is that of its use as a head
    model.requires_grad_(True)
    modules = [model.get_submodule(name) for name in names]
    found = []
    for i, sample in enumerate(samples):
        with RULES[method](model):
            value = slow_value(kind, model(sample[None]).logits[0], i, sample)
            gradients = torch.autograd.grad(value, [module.weight for module in modules])
        parts = []
        for module, gradient in zip(modules, gradients, strict=True):
            gradient = gradient.T if hasattr(module, "nf") else gradient  # a Conv1D
            parts.append((weight_matrix(module) * gradient).detach())
        found.append(parts)
    head.weight = tied
    model.requires_grad_(False)
    return {name: torch.stack(parts) for name, parts in zip(names, zip(*found, strict=True), strict=True)}


def close(actual, expected, rtol=1e-4):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol / 10 * float(expected.detach().abs().max()))


@pytest.fixture(params=["llama", "gpt2", "granite", "gemma2"])
def model(request):
    own = {"gemma2": {"final_logit_softcapping": 2.0, "head_dim": 8, "query_pre_attn_scalar": 8}}
    return tiny(request.param, **own.get(request.param, {})).requires_grad_(False)


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", SPECS)
def test_values_are_those_of_the_plain_model(kind, side):
    for family in ("llama", "opt", "granite", "cohere2"):
        model, samples = tiny(family, dtype=torch.float64), samples_of()
        attributed = attribute(model, TARGETS.make(SPECS[kind]), batch_of(samples, side))
        slow = [slow_value(kind, model(sample[None]).logits[0], i, sample) for i, sample in enumerate(samples)]
        torch.testing.assert_close(attributed.value_B, torch.stack(slow), rtol=1e-6, atol=1e-8)
        if kind != "answer":
            counted = [length - 1 for length in LENGTHS] if kind in ("text", "drawn") else list(COMPLETIONS)
            assert attributed.records["num_target_tokens"].tolist() == counted
    if kind in ("completion", "warm"):
        values_B = attributed.records["log_likelihood"] * attributed.records["weight"]
        torch.testing.assert_close(values_B, attributed.value_B)


def test_without_a_weight_or_a_foil():
    model, batch = tiny("llama"), batch_of(samples_of())
    weighted = attribute(model, TARGETS.make("completion"), batch).value_B
    batch.fields = {name: batch.fields[name] for name in ("completion_mask", "answer")}
    plain = attribute(model, TARGETS.make("completion"), batch)
    close(plain.value_B * torch.tensor(WEIGHTS), weighted)
    assert "weight" not in plain.records
    logit_B = torch.stack(
        [model(sample[None]).logits[0, -1, a] for sample, a in zip(samples_of(), ANSWERS, strict=True)]
    )
    close(attribute(model, TARGETS.make("answer"), batch).value_B, logit_B)


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_weight_for_each_token(side):
    """The value, and the scores of a layer and of the output head (whose positions pass it together)."""
    model, samples = tiny("llama", dtype=torch.float64).requires_grad_(False), samples_of()
    batch = batch_of(samples, side)
    generator = torch.Generator().manual_seed(2)
    weight_BT = torch.randn(batch.input_ids.shape, generator=generator, dtype=torch.float64)
    weight_BT *= batch.fields["completion_mask"]
    batch.fields["token_weight"] = weight_BT
    head, up = output_head(model)[0], mlps(model)[0].up
    scorers = [Scorer(model, "gradient", "weight", names, "completion") for names in ([up], [up, head])]
    for scorer in scorers:
        scorer.update(batch)
    total = dict.fromkeys((up, head), 0.0)
    for i, sample in enumerate(samples):
        model.requires_grad_(True)
        nats_TV = model(sample[None]).logits[0].log_softmax(-1)
        own = weight_BT[i][batch.attention_mask[i].bool()]
        value = sum(own[t] * nats_TV[t - 1, sample[t]] for t in range(len(sample) - COMPLETIONS[i], len(sample)))
        close(attribute(model, TARGETS.make("completion"), batch).value_B[i], value)
        modules = [model.get_submodule(up), model.get_submodule(head)]
        gradients = torch.autograd.grad(value, [module.weight for module in modules])
        for name, module, gradient in zip(total, modules, gradients, strict=True):
            total[name] = total[name] + (module.weight * gradient).abs().detach()
        model.requires_grad_(False)
    close(scorers[0].scores(up, len(samples)).scores, (total[up] / len(samples)).float())
    if model.get_input_embeddings().weight is not model.get_submodule(head).weight:
        close(scorers[1].scores(head, len(samples)).scores, (total[head] / len(samples)).float())
    close(scorers[1].scores(up, len(samples)).scores, (total[up] / len(samples)).float())


# --- scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("method", ["lrp", "gradient"])
def test_weight_scores_of_all_layers(model, method, kind):
    samples, names = samples_of(), list(linear_layers(model))
    scorer = Scorer(model, method, "weight", ["*"], SPECS[kind])
    side = "left" if kind in ("completion", "answer") else "right"
    figures = scorer.update(batch_of(samples, side))
    expected = slow_scores(model, samples, kind, method, names)
    for name in names:  # the output head with them
        close(scorer.scores(name, len(samples)).scores, expected[name].abs().mean(0))
    close(figures.relevance.float(), sum(part.abs().sum((1, 2)) for part in expected.values()))


@pytest.mark.parametrize("kind", ["completion", "drawn"])
def test_neurons_heads_and_channels(model, kind, monkeypatch):
    samples = samples_of()
    ups = [mlp.up for mlp in mlps(model)]
    expected = slow_scores(model, samples, kind, "gradient", ups)
    monkeypatch.setitem(likelihood.BLOCK_ELEMENTS, "cpu", 100)  # two positions at a time
    for options in (Options(squares=True, groups=2), Options(squares=True, groups=2, gradient_checkpointing=True)):
        scorer = Scorer(model, "gradient", "neuron", None, SPECS[kind], options)
        for rows in (slice(0, 1), slice(1, None)):  # batches add up
            scorer.update(batch_of(samples, rows=rows))
        batch = batch_of(samples)
        groups = group_of(batch.input_ids, batch.attention_mask, 2)
        for name in ups:
            scores, rows_NO = scorer.scores(name, len(samples)), expected[name].abs().sum(2).double()
            close(scores.scores, rows_NO.mean(0).float())
            close(scores.squares, rows_NO.square().mean(0).float())
            by_group = torch.stack(
                [rows_NO[groups == g].mean(0) if (groups == g).any() else rows_NO[0] * 0 for g in range(2)]
            )
            close(scores.groups[0], by_group.float())


def test_the_head_sees_all_positions_of_a_sample_at_once(monkeypatch):
    """Scores of the head beside those of a lower layer are those of each alone, whatever the blocks."""
    monkeypatch.setitem(likelihood.BLOCK_ELEMENTS, "cpu", 60)
    model, samples = tiny("llama").requires_grad_(False), samples_of()
    head, up = output_head(model)[0], mlps(model)[1].up
    both = Scorer(model, "gradient", "weight", [head, up], "completion")
    alone = [Scorer(model, "gradient", "weight", [name], "completion") for name in (head, up)]
    for scorer in (both, *alone):
        scorer.update(batch_of(samples))
    expected = slow_scores(model, samples, "completion", "gradient", [head, up])
    for name, scorer in zip((head, up), alone, strict=True):
        close(both.scores(name, 4).scores, expected[name].abs().mean(0))
        close(scorer.scores(name, 4).scores, expected[name].abs().mean(0))


def test_the_head_at_one_position_has_a_gradient_in_every_row(monkeypatch):
    monkeypatch.setitem(accumulators.BLOCK_ELEMENTS, "cpu", 70)  # two rows at a time
    model, samples = tiny("llama").requires_grad_(False), samples_of()
    head = output_head(model)[0]
    scorer = Scorer(model, "gradient", "weight", [head], "completion")
    scorer.update(batch_of(samples, rows=slice(1, 2)))
    expected = slow_scores(model, samples, "completion", "gradient", [head])[head][1].abs()
    assert int((expected.sum(1) > 0).sum()) == 50
    close(scorer.scores(head, 1).scores, expected)


def test_logits_are_made_a_few_positions_at_a_time(monkeypatch):
    sizes, make = [], OutputHead.logits
    monkeypatch.setattr(OutputHead, "logits", lambda self, hidden: sizes.append(len(hidden)) or make(self, hidden))
    monkeypatch.setitem(likelihood.BLOCK_ELEMENTS, "cpu", 4 * 50)
    model = tiny("llama").requires_grad_(False)
    Scorer(model, "gradient", "neuron", None, "completion").update(batch_of(samples_of()))
    assert sizes == [4, 4, 2]  # ten tokens of completions, each position once: none is made again for the gradient


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("settings", [{}, {"logit_scale": 0.5}, {"final_logit_softcapping": 2.0}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_a_likelihood_is_autograds_to_the_bit(settings, temperature, dtype):
    model = tiny("llama", dtype=dtype).requires_grad_(False)
    vars(model.config).update(settings)
    head = OutputHead(model)
    hidden_NH = torch.randn(6, features(head.linear)[1], dtype=dtype, requires_grad=True)
    labels_N = torch.tensor([0, 3, 3, 49, 7, 1])
    log_p_NV = (head.logits(hidden_NH) / temperature).log_softmax(1)
    logits_NV = head.logits(hidden_NH) / temperature
    plain_N = logits_NV.gather(1, labels_N[:, None])[:, 0] - logits_NV.logsumexp(1)
    (plain_NH,) = torch.autograd.grad(plain_N.sum(), hidden_NH)
    counted = torch.ones(1, 6, dtype=torch.bool)
    values = likelihood.log_likelihood(hidden_NH[None], head, labels_N[None], counted, temperature)
    (gradient_NH,) = torch.autograd.grad(values.sum(), hidden_NH)
    assert torch.equal(gradient_NH, plain_NH)
    assert torch.equal(values, plain_N.new_zeros(1).index_add(0, torch.zeros(6, dtype=torch.int64), plain_N))
    close(values[0], log_p_NV[torch.arange(6), labels_N].sum())


@contextmanager
def gain(model, group, component, factor):
    """Multiplies what one component sends to the layer that reads it."""
    site = group.site

    def louder(module, args):
        factors = torch.ones(features(module)[1], dtype=torch.float64)
        factors[component * site.width : (component + 1) * site.width] = factor
        return (args[0] * factors,)

    hook = model.get_submodule(site.layer).register_forward_pre_hook(louder)
    yield
    hook.remove()


FAMILIES = ("llama", "qwen2", "phi3", "granite", "gpt2", "opt", "gpt_neox")


@pytest.mark.parametrize(
    ("family", "kind"), [*((family, "completion") for family in FAMILIES), ("gpt2", "text"), ("llama", "answer")]
)
def test_signed_scores_are_derivatives_by_a_gain(family, kind, monkeypatch):
    """Against central differences of the plain model's log-likelihood, biases and any activation included."""
    monkeypatch.setattr(torch, "float32", torch.float64)  # norms of these models go down to float32 by themselves
    model, samples, step = tiny(family, dtype=torch.float64).requires_grad_(False), samples_of(), 1e-5

    def value():
        logits = [model(sample[None]).logits[0] for sample in samples]
        return float(sum(slow_value(kind, logits[i], i, sample) for i, sample in enumerate(samples))) / len(samples)

    for unit, components in (("neuron", (0, 23)), ("channel", (30,)), ("head", (1,))):
        scorer = Scorer(model, "gradient", unit, None, SPECS[kind], Options(signed=True))
        for rows in (slice(0, 2), slice(2, None)):
            scorer.update(batch_of(samples, rows=rows))
        layer = list(scorer.layers.values())[-1 if unit == "head" else 0]
        for component in components:
            values = []
            for factor in (1 + step, 1 - step):
                with gain(model, layer.group, component, factor):
                    values.append(value())
            score = float(layer.sums["sum"][layer.group.first + component]) / len(samples)
            assert score == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-5, abs=1e-8), (unit, component)


# --- labels drawn from the model --------------------------------------------------------------------------------------


def test_labels_do_not_depend_on_the_batch():
    model, samples, target = tiny("llama"), samples_of(), TARGETS.make(DRAWN)
    together = attribute(model, target, batch_of(samples, "left")).value_B
    alone = torch.cat([attribute(model, target, batch_of(samples, rows=slice(i, i + 1))).value_B for i in range(4)])
    close(together, alone)
    other = {"class_path": "text", "init_args": {"labels": "model", "seed": 4}}
    assert not torch.allclose(attribute(model, TARGETS.make(other), batch_of(samples)).value_B, alone)


def test_labels_are_drawn_from_the_models_distribution():
    """Numbers on a grid must give every token as often as its probability says, to one place of the grid."""
    torch.manual_seed(0)
    model, count = tiny("granite", dtype=torch.float64), 4000
    hidden_TH = model.model(samples_of((3,))[0][None]).last_hidden_state[0, -1].expand(1, count, -1)
    grid = ((torch.arange(count) + 0.5) / count)[None].double()
    drawn = drawn_tokens(hidden_TH, OutputHead(model), torch.ones(1, count, dtype=torch.bool), grid)
    probabilities = model(samples_of((3,))[0][None]).logits[0, -1].softmax(0)
    shares = drawn.flatten().bincount(minlength=50) / count
    assert float((shares - probabilities).abs().max()) <= 1.01 / count
    assert float(probabilities.max()) < 0.9  # or the test would say little


def test_numbers_of_a_sample():
    ids, mask = (
        torch.tensor([[5, 6, 7, 0], [0, 5, 6, 7], [5, 6, 8, 9]]),
        torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1], [1] * 4]),
    )
    numbers = sample_uniforms(ids, mask, 0)
    assert numbers[0, :3].tolist() == numbers[1, 1:].tolist()
    assert not set(numbers[2].tolist()) & set(numbers[0].tolist())
    many = sample_uniforms(torch.arange(20000).view(10, 2000), torch.ones(10, 2000, dtype=torch.int64), 0)
    assert float(many.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(many.var()) == pytest.approx(1 / 12, abs=0.002)


def test_mean_squares_are_the_fisher_information(monkeypatch):
    """Over labels on a grid of numbers: the sum over all tokens of probability times the label's squared score."""
    model, sample, count = tiny("llama").requires_grad_(False), samples_of((2,))[0], 1000
    name = mlps(model)[0].up
    module = model.get_submodule(name)
    module.weight.requires_grad_(True)
    nats_V = model(sample[None]).logits[0, 0].log_softmax(0)
    exact_O = 0.0
    for nats in nats_V:
        (gradient,) = torch.autograd.grad(nats, module.weight, retain_graph=True)
        exact_O = exact_O + nats.exp().detach() * (module.weight * gradient).detach().abs().sum(1).square()
    module.weight.requires_grad_(False)
    grid = ((torch.arange(count) + 0.5) / count)[:, None].expand(-1, 2).double()
    monkeypatch.setattr("sparc3_pl.attribution.targets_text.sample_uniforms", lambda *_: grid)
    scorer = Scorer(model, "gradient", "neuron", [name], DRAWN, Options(squares=True))
    scorer.update(ReferenceBatch(sample.expand(count, -1), torch.ones(count, 2, dtype=torch.int64)))
    close(scorer.scores(name, count).squares, exact_O, rtol=2e-2)


# --- what cannot be ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "granite", "cohere2", "opt"])
def test_logits_that_are_known(family):
    require_known_logits(tiny(family), list(range(3, 12)))


def test_logits_that_are_all_zero_are_known():
    model = tiny("llama").requires_grad_(False)
    output_head(model)[1].weight.zero_()
    require_known_logits(model, list(range(3, 12)))


def test_logits_that_are_not_known():
    model = tiny("llama")
    forward = model.forward

    def louder(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits * 1.5
        return output

    model.forward = louder
    with pytest.raises(InputError, match=r"LlamaForCausalLM does something to its logits .*33"):
        require_known_logits(model, list(range(3, 12)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": {"class_path": "completion", "init_args": {"temperature": 0}}}, r"temperature=0; give a positive"),
        ({"target": {"class_path": "text", "init_args": {"labels": "mine"}}}, r"model\.labels='mine' is unknown"),
        ({"labels": "model"}, r"model\.labels=model is for model\.target: text"),
        ({"labels": "model", "target": "completion"}, r"model\.labels=model is for model\.target: text"),
        ({"labels": "model", "target": DRAWN}, r"model\.labels=model .*given once"),
        ({"method": "wanda", "target": "completion"}, r"method wanda attributes no target"),
    ],
)
def test_settings_that_do_not_go_together(settings, message):
    with pytest.raises(InputError, match=message):
        ScoreRequest.of(**settings)


def test_labels_go_to_the_target_with_the_runs_seed():
    request = ScoreRequest.of("gradient", target="text", labels="model", seed=5, squares=True)
    assert (request.target.object.labels, request.target.object.seed, request.options.seed) == ("model", 5, 0)
    assert request.target.arguments == {"labels": "model", "seed": 5}


@pytest.mark.parametrize(
    ("settings", "fields", "message"),
    [
        ({"target": "completion"}, [], r"model\.target=completion needs data\.completion_field"),
        ({"target": "answer"}, ["label"], r"model\.target=answer needs data\.answer_field"),
        ({}, ["completion_mask", "weight"], r"data\.completion_field: model\.target=predicted ignores it"),
        ({"target": "text"}, ["weight"], r"data\.weight_field: model\.target=text ignores it"),
        ({"method": "wanda"}, ["weight"], r"data\.weight_field: model\.method=wanda ignores it"),
    ],
)
def test_fields_that_do_not_fit_the_target(settings, fields, message):
    with pytest.raises(InputError, match=message):
        require_fields(ScoreRequest.of(**settings), fields)


def test_fields_that_fit():
    require_fields(ScoreRequest.of(target="completion"), ["completion_mask", "weight"])
    require_fields(ScoreRequest.of(method="wanda"), ["completion_mask", "label"])
    require_fields(ScoreRequest.of(), ["answer", "foil", "counterfactual_ids"])
