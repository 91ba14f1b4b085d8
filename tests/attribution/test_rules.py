import copy
import hashlib
from contextlib import suppress

import pytest
import torch
from tiny_models import EAGER_ONLY, FAMILIES, MORE_FAMILIES, VARIANTS, tiny, tokens, variant
from torch import nn

from sparc3_pl.attribution.rules import SUPPORTED, attn_lrp, rule_table
from sparc3_pl.errors import InputError
from sparc3_pl.model.attention import attention_modules
from sparc3_pl.model.structure import decoder, mlps

EVERYTHING = [*FAMILIES, *MORE_FAMILIES, *VARIANTS]


class Boom(Exception):
    pass


def fingerprint(model):
    """Everything that a context manager could leave behind."""
    state = {}
    for name, m in model.named_modules():
        hooks = [(key, len(value)) for key, value in vars(m).items() if "hook" in key and hasattr(value, "__len__")]
        own = {key: id(value) for key, value in vars(m).items() if not isinstance(value, dict | set)}
        config = str(m.config.__dict__) if hasattr(m, "config") else None
        state[name] = (hooks, own, config, m.training, str(m))
    for name, p in model.named_parameters():
        state[name, "p"] = (hashlib.sha256(p.detach().numpy().tobytes()).hexdigest(), p.requires_grad, p.grad is None)
    return state


def input_gradient(model, ids, **kwargs):
    """Logits and the gradient of the largest last logit at the token embeddings."""
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    with torch.enable_grad():
        logits = model(inputs_embeds=embeddings, use_cache=False, **kwargs).logits
        (gradient,) = torch.autograd.grad(logits[:, -1].amax(-1).sum(), embeddings)
    return logits.detach(), gradient


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", EVERYTHING)
def test_forward_is_bitwise_unchanged_and_gradients_are_not(name, implementation):
    model, ids = variant(name), tokens(2, 9)
    model.set_attn_implementation("eager" if name in EAGER_ONLY else implementation)
    plain, plain_gradient = input_gradient(model, ids)
    with torch.no_grad():
        no_grad = model(ids).logits
    with attn_lrp(model):
        with torch.no_grad():
            assert torch.equal(model(ids).logits, no_grad)
        logits, gradient = input_gradient(model, ids)
    assert torch.equal(logits, plain)
    assert not torch.allclose(gradient, plain_gradient, rtol=1e-2)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_forward_is_bitwise_unchanged_in_other_dtypes(dtype, tiny_model):
    model, ids = tiny_model.to(dtype), tokens(2, 9)
    plain, _ = input_gradient(model, ids)
    with attn_lrp(model):
        logits, gradient = input_gradient(model, ids)
    assert torch.equal(logits, plain)
    assert gradient.dtype == dtype
    assert gradient.isfinite().all()


@pytest.mark.parametrize("crash", [None, "inside", "in forward", "in backward"])
def test_leaves_no_trace(tiny_model, crash):
    def boom(*args):
        raise Boom

    tiny_model.requires_grad_(False)
    before, config = fingerprint(tiny_model), copy.deepcopy(tiny_model.config.to_dict())
    with suppress(Boom), attn_lrp(tiny_model):
        if crash == "inside":
            boom()
        if crash == "in forward":
            decoder(tiny_model)(inputs_embeds=Explosive(2))
        _, gradient = input_gradient(tiny_model, tokens(1, 4))
        if crash == "in backward":
            gradient.requires_grad_().register_hook(boom)
            gradient.sum().backward()
    assert fingerprint(tiny_model) == before
    assert tiny_model.config.to_dict() == config
    with attn_lrp(tiny_model):  # and it can be entered again
        pass


class Explosive:
    def __init__(self, n):
        self.shape = (1, n)

    def __getattr__(self, name):
        raise Boom


def test_nothing_is_changed_when_refused():
    model = tiny("llama", hidden_act="sigmoid")
    before = fingerprint(model)
    with pytest.raises(InputError), attn_lrp(model):
        pass
    assert fingerprint(model) == before


def test_backward_after_the_block_is_still_lrp(tiny_model):
    ids = tokens(1, 6)
    embeddings = tiny_model.get_input_embeddings()(ids).detach().requires_grad_()
    with attn_lrp(tiny_model):
        _, want = input_gradient(tiny_model, ids)
        logit = tiny_model(inputs_embeds=embeddings, use_cache=False).logits[:, -1].amax(-1).sum()
    assert torch.equal(torch.autograd.grad(logit, embeddings)[0], want)


@pytest.mark.parametrize("rules", ["attn", "cp"])
def test_frozen_parameters_give_the_same(tiny_model, rules):
    ids = tokens(2, 6)
    with attn_lrp(tiny_model, rules=rules):
        _, want = input_gradient(tiny_model, ids)
        tiny_model.requires_grad_(False)
        _, got = input_gradient(tiny_model, ids)
    assert torch.equal(got, want)


def test_entering_twice_is_an_error(tiny_llama):
    other = tiny("llama")
    with attn_lrp(tiny_llama):
        with pytest.raises(RuntimeError, match="already"), attn_lrp(tiny_llama):
            pass
        with attn_lrp(other):
            pass
        assert not torch.equal(input_gradient(tiny_llama, tokens(1, 4))[1], _plain_gradient(tokens(1, 4)))


def _plain_gradient(ids):
    return input_gradient(tiny("llama"), ids)[1]


def test_training_mode_is_refused(tiny_llama):
    tiny_llama.model.layers[1].mlp.train()
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp is training; call model\.eval"), attn_lrp(tiny_llama):
        pass


@pytest.mark.parametrize("name", EVERYTHING)
def test_graph_may_begin_at_any_layer(name):
    """Gradients at the last up-projection do not depend on where the graph begins."""
    model, ids, got = variant(name), tokens(2, 7), {}
    model.requires_grad_(False)
    first, last = mlps(model)[0].up, mlps(model)[-1].up
    for begin in ("embedding", first, last):
        leaf = model.get_input_embeddings() if begin == "embedding" else model.get_submodule(begin)
        with attn_lrp(model):
            got[begin] = _gradients(model, ids, leaf, [first, last])
    torch.testing.assert_close(got[first][last], got["embedding"][last], rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(got[last][last], got["embedding"][last], rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(got[first][first], got["embedding"][first], rtol=1e-5, atol=1e-8)
    assert first not in got[last]


def _gradients(model, ids, leaf, names, **kwargs):
    """Gradient of the summed targets at the outputs of layers ``names``, the graph beginning at ``leaf``'s output."""
    found, hooks = {}, []

    def watch(name):
        def hook(module, args, output):
            if output.requires_grad:
                output.register_hook(lambda g: found.__setitem__(name, g))

        return hook

    hooks.append(leaf.register_forward_hook(lambda m, a, out: out.detach().requires_grad_()))
    hooks += [model.get_submodule(name).register_forward_hook(watch(name)) for name in names]
    with torch.enable_grad():
        last = kwargs.pop("last", torch.full((len(ids),), ids.shape[1] - 1))
        logits = model(ids, use_cache=False, **kwargs).logits
        logits[torch.arange(len(ids)), last].amax(-1).sum().backward()
    for handle in hooks:
        handle.remove()
    return found


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", [*FAMILIES, *MORE_FAMILIES])
def test_padded_batch_equals_single_runs(name, side, implementation):
    model, lengths, total = tiny(name), (9, 5, 7), 9
    model.set_attn_implementation("eager" if name in EAGER_ONLY else implementation)
    model.requires_grad_(False)
    up, words = mlps(model)[0].up, model.get_input_embeddings()
    singles = [tokens(1, n, seed=n) for n in lengths]
    ids, mask = torch.zeros(3, total, dtype=torch.long), torch.zeros(3, total, dtype=torch.long)
    spans = [slice(total - n, total) if side == "left" else slice(0, n) for n in lengths]
    for row, (single, span) in enumerate(zip(singles, spans, strict=True)):
        ids[row, span], mask[row, span] = single[0], 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    last = torch.tensor([span.stop - 1 for span in spans])
    with attn_lrp(model):
        batch = _gradients(model, ids, words, [up], attention_mask=mask, position_ids=positions, last=last)[up]
        batch = batch.reshape(3, total, -1)
        for row, (single, span) in enumerate(zip(singles, spans, strict=True)):
            want = _gradients(model, single, words, [up])[up].reshape(single.shape[1], -1)
            assert (batch[row, span] - want).abs().max() <= 1e-5 * want.abs().max()
            assert (batch[row][mask[row] == 0] == 0).all()


REFUSED = {
    "bloom": ("attention interface", {"n_layer": 1, "n_head": 4}),
    "gptj": ("attention interface", {"n_embd": 32, "n_layer": 1, "n_head": 4, "rotary_dim": 4}),
    "qwen2_moe": ("sigmoid gate", {"num_experts": 2, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}),
    "gpt_oss": ("attention sinks", {"num_local_experts": 2, "head_dim": 8}),
}


@pytest.mark.parametrize("family", REFUSED)
def test_families_not_known_good_are_refused_with_the_reason(family):
    reason, overrides = REFUSED[family]
    model = tiny(family, **overrides)
    with pytest.raises(InputError, match=f"{family}.*{reason}.*gradient or wanda"), attn_lrp(model):
        pass
    with pytest.raises(InputError, match=r"no LRP rule"), attn_lrp(model, unlisted=True):
        pass


@pytest.mark.parametrize(
    ("family", "overrides", "reason"),
    [
        ("llama", {"hidden_act": "sigmoid"}, r"model\.layers\.0\.mlp\.act_fn \(Sigmoid\)"),
        ("gpt2", {"activation_function": "tanh"}, r"transformer\.h\.0\.mlp\.act \(Tanh\)"),
        ("gpt2", {"reorder_and_upcast_attn": True, "attn_implementation": "eager"}, "load it with sdpa"),
    ],
)
def test_operations_without_a_rule_are_refused(family, overrides, reason):
    with pytest.raises(InputError, match=reason), attn_lrp(tiny(family, **overrides)):
        pass


def test_a_soft_cap_has_a_rule_in_eager_attention_only():
    model = tiny("gemma2")
    for module in attention_modules(model).values():
        module.config = copy.copy(module.config)
        module.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(InputError, match="load it with attn_implementation eager"), attn_lrp(model):
        pass
    with attn_lrp(tiny("gemma3_text", attn_logit_softcapping=50.0)):  # a cap that its code does not use
        pass


def test_unlisted_family_can_be_tried():
    model = tiny("seed_oss")
    assert "seed_oss" not in SUPPORTED
    with attn_lrp(model, unlisted=True):
        input_gradient(model, tokens(1, 4))


@pytest.mark.parametrize("name", EVERYTHING)
def test_rule_table_lists_every_leaf(name):
    model = variant(name)
    table = rule_table(model)
    leaves = {n for n, m in model.named_modules() if not m._modules and not isinstance(m, nn.ModuleList)}
    assert leaves <= set(table)
    assert sum("attention" in rule for rule in table.values()) == 2
    assert sum("halved" in rule for rule in table.values()) == (2 if mlps(model)[0].gated else 0)
    assert all(table.values())


def test_rule_table_of_a_llama_layer(tiny_llama):
    table = {n.removeprefix("model.layers.0."): r for n, r in rule_table(tiny_llama).items() if ".layers.0." in n}
    assert table == {
        "self_attn": "attention: gradient of q, k times 0.25, of v times 0.5",
        **{f"self_attn.{x}_proj": "linear: plain gradient" for x in "qkvo"},
        **{f"mlp.{x}_proj": "linear: plain gradient" for x in ("gate", "up", "down")},
        "mlp.down_proj (input)": "gated product: gradient halved",
        "mlp.act_fn": "silu: f(x)/x",
        "input_layernorm": "RMSNorm: standard deviation constant",
        "post_attention_layernorm": "RMSNorm: standard deviation constant",
    }


def test_gated_product_shares_relevance_equally():
    """One Llama MLP by hand: R at act(g) equals R at u equals half of R at the product; R at g equals R at act(g)."""
    model = tiny("llama", dtype=torch.float64)
    mlp = model.model.layers[0].mlp
    g, u, seen = {}, {}, []
    mlp.gate_proj.register_forward_hook(lambda m, a, out: (g.update(value=out), out.retain_grad())[0])
    mlp.up_proj.register_forward_hook(lambda m, a, out: (u.update(value=out), out.retain_grad())[0])
    mlp.down_proj.register_forward_hook(lambda m, a, out: out.register_hook(seen.append) and None)
    with attn_lrp(model):
        model(tokens(1, 4), use_cache=False).logits[0, -1].max().backward()
    product = torch.nn.functional.silu(g["value"]) * u["value"]
    relevance = (product * (seen[0] @ mlp.down_proj.weight)).detach()
    torch.testing.assert_close((u["value"] * u["value"].grad).detach(), relevance / 2)
    torch.testing.assert_close((g["value"] * g["value"].grad).detach(), relevance / 2)


def test_offloaded_model_gets_the_same_gradients():
    """Accelerate holds the weights elsewhere and fetches them layer by layer."""
    accelerate = pytest.importorskip("accelerate")
    model, ids = tiny("qwen3").requires_grad_(False), tokens(1, 6)
    with attn_lrp(model):
        logits, want = input_gradient(model, ids)
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    accelerate.cpu_offload(model, execution_device="cpu")
    with attn_lrp(model):
        offloaded = model(inputs_embeds=embeddings, use_cache=False).logits
        (got,) = torch.autograd.grad(offloaded[:, -1].amax(-1).sum(), embeddings)
    assert torch.equal(offloaded, logits)
    torch.testing.assert_close(got, want)
