"""Scores of experts' neurons and weights, against slow loops over the fused parameters' own gradients."""

import json
from contextlib import ExitStack, contextmanager

import pytest
import torch
from tiny_models import MIXTURES, tiny, tokens

from sparc3_pl.attribution import rules
from sparc3_pl.attribution.account import relevance_account
from sparc3_pl.attribution.attention import scale_gradient
from sparc3_pl.attribution.methods import Options
from sparc3_pl.attribution.scorers import Scorer
from sparc3_pl.circuit.components import Candidates
from sparc3_pl.data.batches import ReferenceBatch
from sparc3_pl.errors import InputError
from sparc3_pl.model.components import Neuron
from sparc3_pl.model.experts import experts_modules
from sparc3_pl.model.structure import mlps
from sparc3_pl.scoring.score_run import Destination, ScoreRequest, ScoreRun

SAMPLES = [tokens(1, length, seed=length)[0] for length in (7, 3, 5)]


def batch(side="right"):
    ids, mask = torch.zeros(3, 7, dtype=torch.int64), torch.zeros(3, 7, dtype=torch.int64)
    for row, sample in enumerate(SAMPLES):
        place = slice(0, len(sample)) if side == "right" else slice(7 - len(sample), 7)
        ids[row, place], mask[row, place] = sample, 1
    return ReferenceBatch(ids, mask, ids=["a", "b", "c"], endings=[None] * 3)


def slow_relevance(model, lrp: bool):
    """W * G of each sample and each fused parameter, by autograd on the parameter: name -> ``[samples, E, O, I]``.

    With the rules, the experts run as the library runs them, with half the gradient at their input and at their output,
    which is what can be done without looking inside. The fused rows' own gradient then lacks the half of the gated
    product.
    """
    model.requires_grad_(True)
    fused = experts_modules(model)
    parameters = [p for m in fused.values() for p in (m.gate_up_proj, m.down_proj)]
    result = []
    for sample in SAMPLES:
        with from_outside(model, fused) if lrp else torch.enable_grad():
            logits = model(sample[None]).logits * getattr(model.config, "logits_scaling", 1.0)
            logits[0, -1].max().backward()
        result.append([(p * p.grad).detach() for p in parameters])
        model.zero_grad()
    model.requires_grad_(False)
    stacked = [torch.stack(parts) for parts in zip(*result, strict=True)]
    share = 0.5 if lrp else 1.0
    return {name: (share * stacked[2 * i], stacked[2 * i + 1]) for i, name in enumerate(fused)}


@contextmanager
def from_outside(model, fused):
    """AttnLRP whose rules for experts are two hooks on each module that holds them."""
    with pytest.MonkeyPatch.context() as patch, ExitStack() as undo:
        patch.setattr(rules, "_product_rules", lambda model: {})
        patch.setattr(rules, "_experts_rules", lambda *args: {})
        for experts in fused.values():
            halve_in = experts.register_forward_pre_hook(lambda m, args: (scale_gradient(args[0], 0.5), *args[1:]))
            undo.callback(halve_in.remove)
            undo.callback(experts.register_forward_hook(lambda m, args, y: scale_gradient(y, 0.5)).remove)
        with rules.attn_lrp(model):
            yield


def scored(model, method, granularity, layers=None, options=None, side="right", target="predicted"):
    scorer = Scorer(model, method, granularity, layers, target, options)
    scorer.update(batch(side))
    return scorer, {name: scorer.scores(name, 3) for name in scorer.layers}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("method", ["gradient", "lrp"])
@pytest.mark.parametrize("family", MIXTURES)
def test_neurons_and_weights_are_those_of_the_parameters(family, method, side):
    model = tiny(family, dtype=torch.float64)
    expected = slow_relevance(model, method == "lrp")
    _, neurons = scored(model, method, "neuron", side=side)
    _, weights = scored(model, method, "weight", ["*.experts.*"], side=side)
    assert len(neurons) == 8
    assert len(weights) == 24
    for name, (up, down) in expected.items():
        for e in range(4):
            close = {"rtol": 1e-4, "atol": 1e-6}
            torch.testing.assert_close(
                neurons[f"{name}.{e}"].scores, up[:, e, 12:].abs().sum(2).mean(0).float(), **close
            )
            torch.testing.assert_close(weights[f"{name}.{e}"].scores, up[:, e, 12:].abs().mean(0).float(), **close)
            torch.testing.assert_close(
                weights[f"{name}.{e}.gate_proj"].scores, up[:, e, :12].abs().mean(0).float(), **close
            )
            torch.testing.assert_close(
                weights[f"{name}.{e}.down_proj"].scores, down[:, e].abs().mean(0).float(), **close
            )


def test_signed_scores_at_values_are_derivatives_by_gains():
    """With a target other than the predicted token: finite differences of each neuron's gain, by hand."""
    model = tiny("qwen3_moe", dtype=torch.float64)
    _, scores = scored(model, "gradient", "neuron", options=Options(signed=True), target="text")
    down = model.model.layers[1].mlp.experts.down_proj

    def value():
        total = 0.0
        for sample in SAMPLES:
            with torch.no_grad():
                nats = model(sample[None]).logits[0].log_softmax(-1)
            total += float(nats[range(len(sample) - 1), sample[1:]].sum())
        return total / 3

    for e in range(4):
        expected = scores[f"model.layers.1.mlp.experts.{e}"].scores
        i = int(expected.abs().argmax())  # norms and routers are float32: small slopes drown in their rounding
        before, ends = down.data[e, :, i].clone(), []
        for step in (1e-3, -1e-3):
            down.data[e, :, i] = before * (1 + step)
            ends.append(value())
        down.data[e, :, i] = before
        assert float(expected[i]) == pytest.approx((ends[0] - ends[1]) / 2e-3, rel=1e-2)


@pytest.mark.parametrize("side", ["right", "left"])
def test_wanda_is_over_the_experts_own_tokens(side):
    """Against the inputs that a plain pass gives each expert, collected by the router's own choice."""
    model = tiny("mixtral", dtype=torch.float64)
    _, scores = scored(model, "wanda", "weight", ["*.experts.*"], side=side)
    _, neurons = scored(model, "wanda", "neuron", side=side)
    for i, layer in enumerate(model.model.layers):
        squares, inner, counts = (
            torch.zeros(4, 32, dtype=torch.float64),
            torch.zeros(4, 12, dtype=torch.float64),
            [0] * 4,
        )
        for sample in SAMPLES:
            seen = []
            handle = layer.mlp.gate.register_forward_hook(lambda m, args, out: seen.append((args[0], out[2])))  # noqa: B023
            with torch.no_grad():
                model(sample[None])
            handle.remove()
            ((hidden, chosen),) = seen
            for t in range(len(sample)):
                for e in chosen[t].tolist():
                    gate, up = (layer.mlp.experts.gate_up_proj[e].detach() @ hidden[t]).chunk(2)
                    squares[e] += hidden[t].square()
                    inner[e] += (torch.nn.functional.silu(gate) * up).square()
                    counts[e] += 1
        for e in range(4):
            name = f"model.layers.{i}.mlp.experts.{e}"
            up = layer.mlp.experts.gate_up_proj[e, 12:].detach().abs() * squares[e].sqrt()
            down = layer.mlp.experts.down_proj[e].detach().abs() * inner[e].sqrt()
            torch.testing.assert_close(scores[name].scores, up.float(), rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(neurons[name].scores, up.sum(1).float(), rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(scores[f"{name}.down_proj"].scores, down.float(), rtol=1e-5, atol=1e-7)
            assert scores[name].tokens == neurons[name].tokens == counts[e]


@pytest.mark.parametrize("method", ["gradient", "lrp"])
@pytest.mark.parametrize("family", MIXTURES)
def test_whole_experts_by_their_own_loop(family, method):
    """Of three samples of unequal length in one batch."""
    model = tiny(family, dtype=torch.float64)
    expected = slow_relevance(model, lrp=method == "lrp")
    _, scores = scored(model, method, "expert")
    assert len(scores) == 8
    with pytest.raises(InputError, match="not a mixture of experts"):
        Scorer(tiny("llama"), "gradient", "expert")
    for name, (_, down) in expected.items():
        for e in range(4):
            want = down[:, e].abs().sum((1, 2)).mean(0)
            assert float(scores[f"{name}.{e}.down_proj"].scores) == pytest.approx(float(want), rel=1e-4)


class Expert(torch.nn.Module):
    def __init__(self, gate_up, down):
        super().__init__()
        self.act_fn = torch.nn.SiLU()
        for name, weight in (("gate_proj", gate_up[:12]), ("up_proj", gate_up[12:]), ("down_proj", down)):
            layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
            layer.weight = torch.nn.Parameter(weight.detach().clone(), False)
            self.add_module(name, layer)

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Apart(torch.nn.Module):
    """Experts that are modules of their own, each given its tokens, as code from outside of the library has them."""

    def __init__(self, fused):
        super().__init__()
        self.experts = torch.nn.ModuleList(map(Expert, fused.gate_up_proj, fused.down_proj)).eval()

    def forward(self, hidden, chosen, weights):
        total = torch.zeros_like(hidden)
        for number, expert in enumerate(self.experts):
            tokens, place = torch.where(chosen == number)
            total = total.index_add(0, tokens, expert(hidden[tokens]) * weights[tokens, place, None])
        return total


@pytest.mark.parametrize("granularity", ["neuron", "weight"])
def test_experts_that_are_modules_of_their_own_never_mix_samples(granularity):
    """A batch of one is right; of more, an expert's rows cannot be told apart, and they must not be shared out."""
    fused = tiny("mixtral", dtype=torch.float64).requires_grad_(False)
    apart = tiny("mixtral", dtype=torch.float64).requires_grad_(False)
    for layer in apart.model.layers:
        layer.mlp.experts = Apart(layer.mlp.experts)
    up = ["*.0.mlp.experts.experts.*.up_proj"]
    for rows in ([0, 1], [0, 1, 2]):
        some = ReferenceBatch(
            *(t[rows] for t in (batch().input_ids, batch().attention_mask)), [*map(str, rows)], [None] * 3
        )
        for method in ("gradient", "wanda"):
            with pytest.raises(
                InputError, match=r"experts\.\d\.up_proj reads \d+ tokens of a batch of . x 7.*model.targets"
            ):
                Scorer(apart, method, granularity, up).update(some)
    ids = tokens(1, 24)
    one = ReferenceBatch(ids, torch.ones_like(ids), ids=["a"], endings=[None])
    scorers = [
        Scorer(fused, "gradient", granularity, ["model.layers.0.mlp.experts.?"]),
        Scorer(apart, "gradient", granularity, up),
    ]
    for scorer in scorers:
        scorer.update(one)
    for e in range(4):
        expected = scorers[0].scores(f"model.layers.0.mlp.experts.{e}", 1)
        actual = scorers[1].scores(f"model.layers.0.mlp.experts.experts.{e}.up_proj", 1)
        torch.testing.assert_close(actual.scores, expected.scores)


def test_gradient_checkpointing_gives_the_same():
    model = tiny("qwen3_moe", dtype=torch.float64).requires_grad_(False)
    _, plain = scored(model, "lrp", "neuron")
    _, again = scored(model, "lrp", "neuron", options=Options(gradient_checkpointing=True))
    for name, layer in plain.items():
        torch.testing.assert_close(again[name].scores, layer.scores)
        assert again[name].tokens == layer.tokens


def unreachable(model, expert=2):
    """No token goes to an expert of the first layer: its router's row points away from what all tokens have."""
    gate = model.model.layers[0].mlp.gate
    seen = []
    handle = gate.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad():
        for sample in SAMPLES:
            model(sample[None])
    handle.remove()
    hidden = torch.cat(seen)
    with torch.no_grad():
        gate.weight[expert] = torch.linalg.lstsq(hidden, hidden.new_full((len(hidden), 1), -1e4)).solution[:, 0]
    return f"model.layers.0.mlp.experts.{expert}"


@pytest.mark.parametrize("method", ["gradient", "wanda"])
def test_experts_that_no_token_reaches_are_named(method, tmp_path, caplog):
    model = tiny("qwen3_moe").requires_grad_(False)
    name = unreachable(model)
    request = ScoreRequest.of(method, "neuron")
    model_entry = {"pretrained": "tiny", "fingerprint": "sha256:0", "dtype": "float32", "revision": None}
    about = request.about(model_entry, {"source": "here", "sample_ids": ["a", "b", "c"]})
    run = ScoreRun(request.scorer(model), about, Destination(tmp_path / "scores"))
    run.add(batch())
    run.finish()
    manifest = json.loads((tmp_path / "scores" / "manifest.json").read_text())
    assert manifest["unreached"] == [name]
    assert manifest["layers"][name]["tokens"] == 0
    assert name in caplog.text
    counts = [layer["tokens"] for key, layer in manifest["layers"].items() if key.startswith("model.layers.0.")]
    assert sum(counts) == 2 * sum(map(len, SAMPLES))


def test_only_an_unreached_expert_can_be_asked_for():
    model = tiny("qwen3_moe").requires_grad_(False)
    name = unreachable(model)
    _, scores = scored(model, "gradient", "neuron", [name])
    assert scores[name].tokens == 0
    assert not scores[name].scores.any()


@pytest.mark.parametrize("family", MIXTURES)
def test_routers_keep_a_part_of_the_logit(family):
    account = relevance_account(tiny(family, dtype=torch.float64), tokens(1, 11))
    assert abs(account.router) > 1e-4 * abs(account.logit)
    assert relevance_account(tiny(family, dtype=torch.float64), tokens(1, 11), rules="cp").router == 0


@pytest.mark.parametrize("method", ["activation", "expertise", "attribution_patching"])
def test_methods_that_need_every_token_are_refused(method):
    with pytest.raises(InputError, match="only some tokens reach"):
        Scorer(tiny("mixtral"), method, "neuron")
    Scorer(tiny("mixtral"), method, "channel")  # attention is as it is anywhere


def test_circuits_of_experts_are_refused():
    model = tiny("mixtral")
    with pytest.raises(InputError, match="no ablation is known"):
        Candidates.of(model, {"neuron": Neuron()})
    assert mlps(model)
