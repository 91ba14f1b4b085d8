"""Methods that read values, against loops over single samples in float64 and against patches that are really made."""

from contextlib import nullcontext

import pytest
import torch
from tiny_models import tiny, tokens
from torch import nn

from sparc3_pl.attribution.methods import Options
from sparc3_pl.attribution.methods_patching import COUNTERFACTUAL
from sparc3_pl.attribution.rules import attn_lrp
from sparc3_pl.attribution.scorers import Scorer
from sparc3_pl.attribution.soundness import padded
from sparc3_pl.attribution.targets import Attributed, Target, last_logits
from sparc3_pl.data.batches import ReferenceBatch
from sparc3_pl.errors import InputError

CLEAN = [tokens(1, length, seed=length)[0] for length in (7, 3, 5)]
OTHER = [tokens(1, length, seed=length + 100)[0] for length in (7, 3, 5)]
ANSWERS = [(5, 9), (11, 4), (30, 8)]


class Lead(Target):
    """By how much the answer's logit is ahead of the foil's."""

    def __call__(self, hidden_BTH, head, batch):
        logits_BV = last_logits(hidden_BTH, head, batch.attention_mask)
        pair_B2 = logits_BV.gather(1, batch.fields["pair"])
        return Attributed(pair_B2[:, 0] - pair_B2[:, 1], {})


def batch_of(choice=slice(None), **fields):
    fields = {COUNTERFACTUAL: padded(OTHER[choice])[0], "pair": torch.tensor(ANSWERS[choice])} | fields
    return ReferenceBatch(*padded(CLEAN[choice]), fields=fields)


def lead(model, pair, **inputs):
    logits_V = model(**inputs).logits[0, -1]
    return logits_V[pair[0]] - logits_V[pair[1]]


def value_and_gradient(model, site, pair, **inputs):
    """One sample's input of the site and the gradient there, ``[T, I]``, by a zero that is added to it."""
    seen = {}

    def add_zero(_, args):
        seen["value"] = args[0].detach().reshape(-1, args[0].shape[-1])
        seen["zero"] = torch.zeros_like(args[0], requires_grad=True)
        return (args[0] + seen["zero"], *args[1:])

    handle = model.get_submodule(site).register_forward_pre_hook(add_zero)
    lead(model, pair, **inputs).backward()
    handle.remove()
    return seen["value"], seen["zero"].grad.reshape(seen["value"].shape)


def by_loops(model, site, steps=0):
    """Signed scores of every sample, ``[B, count]``; of ``steps`` points on the way, or 0 for the sample's gradient."""
    scores = []
    for clean, other, pair in zip(CLEAN, OTHER, ANSWERS, strict=True):
        value, gradient = value_and_gradient(model, site.layer, pair, input_ids=clean[None])
        before, _ = value_and_gradient(model, site.layer, pair, input_ids=other[None])
        if steps:
            words = model.get_input_embeddings()
            start, end = words(other[None]), words(clean[None])
            points = [start + k / steps * (end - start) for k in range(1, steps + 1)]
            gradient = sum(
                value_and_gradient(model, site.layer, pair, inputs_embeds=point.detach())[1] for point in points
            )
            gradient = gradient / steps
        products = [
            float(((value - before) * gradient)[:, c * site.width : (c + 1) * site.width].sum())
            for c in range(site.count)
        ]
        scores.append(products)
    return torch.tensor(scores, dtype=torch.float64)


METHODS = {  # arguments, the rules that act on the loop, steps of the loop
    "attribution_patching": ({}, None, 0),
    "integrated_gradients": ({"steps": 3}, None, 3),
    "relevance_patching": ({}, "cp", 0),
    "relevance_patching, attn": ({"rules": "attn"}, "attn", 0),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_against_loops(family, name):
    """Gated, ungated and fused maps; shared key and value heads; samples of several lengths in one padded batch."""
    model = tiny(family, dtype=torch.float64).requires_grad_(False)
    arguments, rules, steps = METHODS[name]
    method = {"class_path": name.partition(",")[0], "init_args": arguments}
    scorers = {
        signed: Scorer(model, method, ["neuron", "head", "mlp"], None, Lead(), Options(signed=signed, squares=True))
        for signed in (True, False)
    }
    total = torch.zeros(len(CLEAN), dtype=torch.float64)
    figures = {signed: scorer.update(batch_of()) for signed, scorer in scorers.items()}
    for layer, entry in scorers[True].layers.items():
        with attn_lrp(model, rules=rules) if rules else nullcontext():
            wanted = by_loops(model, entry.group.site, steps)
        for signed, scorer in scorers.items():
            scores, own = scorer.scores(layer, len(CLEAN)), entry.group.own
            mean = (wanted if signed else wanted.abs()).mean(0)
            torch.testing.assert_close(scores.scores[own].double(), mean, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(scores.squares[own].double(), wanted.square().mean(0), rtol=1e-5, atol=1e-6)
        total += wanted.sum(1)
    torch.testing.assert_close(figures[True].relevance, total)


def test_activation_against_loops():
    for family in ("llama", "opt", "phi3"):
        model = tiny(family, dtype=torch.float64).requires_grad_(False)
        scorer = Scorer(model, "activation", ["neuron", "head", "mlp"], options=Options(squares=True))
        for choice in (slice(0, 2), slice(2, 3)):
            scorer.update(batch_of(choice))
        for layer, entry in scorer.layers.items():
            site, sizes = entry.group.site, []
            for sample, pair in zip(CLEAN, ANSWERS, strict=True):
                value, _ = value_and_gradient(model, site.layer, pair, input_ids=sample[None])
                sizes.append(
                    [float(value[:, c * site.width : (c + 1) * site.width].abs().sum()) for c in range(site.count)]
                )
            wanted = torch.tensor(sizes, dtype=torch.float64)
            scores, own = scorer.scores(layer, len(CLEAN)), entry.group.own
            torch.testing.assert_close(scores.scores[own].double(), wanted.mean(0), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(scores.squares[own].double(), wanted.square().mean(0), rtol=1e-5, atol=1e-6)
            assert not scores.scores.sum().isclose(torch.tensor(0.0))


def linear_after_the_embeddings():
    """An OPT without norms, with uniform attention and ReLUs that are always on: logits are linear in its words."""
    model = tiny("opt", dtype=torch.float64, word_embed_proj_dim=32).requires_grad_(False)
    model.model.decoder.final_layer_norm = nn.Identity()
    for layer in model.model.decoder.layers:
        layer.self_attn_layer_norm, layer.final_layer_norm = nn.Identity(), nn.Identity()
        layer.self_attn.q_proj.weight.zero_()
        layer.self_attn.q_proj.bias.zero_()
        layer.fc1.bias.fill_(1e3)
    return model.eval()


@pytest.mark.parametrize("method", ["attribution_patching", "relevance_patching", "integrated_gradients"])
def test_on_a_linear_model_scores_are_the_effects_of_the_patches(method):
    """Value by value, the counterfactual's is put in its place: the lead falls by the score."""
    model = linear_after_the_embeddings()
    scorer = Scorer(model, method, ["neuron", "head", "mlp"], None, Lead(), Options(signed=True))
    scorer.update(batch_of(slice(0, 1)))
    clean, other, pair = CLEAN[0], OTHER[0], ANSWERS[0]
    full = float(lead(model, pair, input_ids=clean[None]))
    for name, entry in scorer.layers.items():
        site = entry.group.site
        before, _ = value_and_gradient(model, site.layer, pair, input_ids=other[None])
        for c in range(0, site.count, 5):

            def patch(_, args, c=c, site=site, before=before):
                x = args[0].clone()
                x.reshape(-1, x.shape[-1])[:, c * site.width : (c + 1) * site.width] = before[
                    :, c * site.width : (c + 1) * site.width
                ]
                return (x, *args[1:])

            handle = model.get_submodule(site.layer).register_forward_pre_hook(patch)
            fall = full - float(lead(model, pair, input_ids=clean[None]))
            handle.remove()
            score = float(scorer.scores(name, 1).scores[entry.group.first + c])
            assert score == pytest.approx(fall, rel=1e-4, abs=1e-6)


def test_integrated_gradients_are_complete():
    """Where the lead depends on the words through attention alone, and is of second order in them.

    Words have no part in the logits and in the MLP, attention is uniform, and nothing is normalised. The gradient at
    the heads is then A + B * share, so that n steps give the whole fall of the lead and B / 2n more.
    """
    model = tiny("llama", num_hidden_layers=1, hidden_size=32, dtype=torch.float64).requires_grad_(False)
    layer, words = model.model.layers[0], slice(0, 16)
    model.model.norm, layer.input_layernorm, layer.post_attention_layernorm = (nn.Identity() for _ in range(3))
    layer.mlp.act_fn = nn.ReLU()
    layer.self_attn.q_proj.weight.zero_()
    layer.self_attn.q_proj.bias.zero_()
    model.model.embed_tokens.weight[:, 16:] = 0
    layer.self_attn.o_proj.weight[words] = 0
    layer.self_attn.o_proj.bias[words] = 0
    for reader in (layer.mlp.gate_proj, layer.mlp.up_proj, model.lm_head):
        reader.weight[:, words] = 0
    layer.mlp.gate_proj.bias += 100  # the ReLU is on: the product is of second order
    pairs = list(zip(CLEAN, OTHER, ANSWERS, strict=True))
    fall = torch.stack(
        [lead(model, pair, input_ids=a[None]) - lead(model, pair, input_ids=b[None]) for a, b, pair in pairs]
    )
    assert fall.abs().min() > 0.1
    excess = {}
    for steps in (1, 4, 10):
        method = {"class_path": "integrated_gradients", "init_args": {"steps": steps}}
        relevance = Scorer(model, method, "head", None, Lead(), Options(signed=True)).update(batch_of()).relevance
        excess[steps] = relevance - fall
    assert excess[1].abs().min() > 1e-3, "the model is linear, and the test says nothing"
    torch.testing.assert_close(excess[4] * 4, excess[1])
    torch.testing.assert_close(excess[10] * 10, excess[1])


def test_one_step_is_attribution_patching():
    model = tiny("llama").requires_grad_(False)
    one = {"class_path": "integrated_gradients", "init_args": {"steps": 1}}
    scores = [
        Scorer(model, method, "neuron", None, Lead(), Options(signed=True)) for method in (one, "attribution_patching")
    ]
    relevance = [scorer.update(batch_of()).relevance for scorer in scores]
    torch.testing.assert_close(*relevance)


@pytest.mark.parametrize("method", ["attribution_patching", "relevance_patching", "integrated_gradients"])
def test_checkpoints_change_nothing(method):
    model = tiny("llama").requires_grad_(False)
    options = [Options(signed=True), Options(signed=True, gradient_checkpointing=True)]
    both = [Scorer(model, method, ["neuron", "head"], None, Lead(), each) for each in options]
    for scorer in both:
        scorer.update(batch_of())
    for name in both[0].layers:
        torch.testing.assert_close(*(scorer.scores(name, 3).scores for scorer in both))


@pytest.mark.parametrize("method", ["activation", "attribution_patching"])
def test_groups_add_up(method):
    model = tiny("llama").requires_grad_(False)
    target = "predicted" if method == "activation" else Lead()
    scorer = Scorer(model, method, "neuron", None, target, Options(groups=2))
    for choice in (slice(0, 1), slice(1, 3)):
        scorer.update(batch_of(choice))
    for name in scorer.layers:
        scores = scorer.scores(name, 3)
        means, sizes = scores.groups
        assert sum(sizes) == 3
        torch.testing.assert_close((means * torch.tensor(sizes)[:, None]).sum(0) / 3, scores.scores)


def test_nothing_is_left_behind():
    model = tiny("llama").requires_grad_(False)

    def hooks():
        return [(n, len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()]

    before = hooks()
    for method in ("integrated_gradients", "relevance_patching", "activation"):
        Scorer(model, method, "head", None, "predicted" if method == "activation" else Lead()).update(batch_of())
        broken = batch_of(pair=torch.tensor([[0, 99999]] * 3))
        if method != "activation":
            with pytest.raises(RuntimeError):
                Scorer(model, method, "head", None, Lead()).update(broken)
    assert hooks() == before


# --- what cannot be done ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["activation", "attribution_patching", "relevance_patching", "integrated_gradients"])
def test_single_weights_have_no_value(method):
    with pytest.raises(InputError, match=f"weights has no value of its own, so method {method} cannot score it"):
        Scorer(tiny("llama"), method, "weight", None, "predicted")


def test_rows_of_other_layers_have_no_value():
    with pytest.raises(InputError, match=r"the components of model\.layers\.0\.self_attn\.q_proj have no value"):
        Scorer(tiny("llama"), "activation", "neuron", ["*.0.self_attn.q_proj"])


def test_without_counterfactuals():
    batch = batch_of()
    del batch.fields[COUNTERFACTUAL]
    with pytest.raises(InputError, match=r"give data\.counterfactual_field"):
        Scorer(tiny("llama"), "attribution_patching", "head", None, Lead()).update(batch)


def test_the_predicted_token_changes_on_the_way():
    with pytest.raises(InputError, match=r"model\.target=predicted would mean another token at each step"):
        Scorer(tiny("llama"), "integrated_gradients", "head")


def test_no_steps():
    with pytest.raises(InputError, match="steps=0; give 1 or more"):
        Scorer(tiny("llama"), {"class_path": "integrated_gradients", "init_args": {"steps": 0}}, "head", None, Lead())
