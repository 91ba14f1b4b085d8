from contextlib import ExitStack

import pytest
import torch
from tiny_models import FAMILIES, tiny, tokens

from sparc3_pl.attribution import attention
from sparc3_pl.attribution.attention import scale_gradient, scaled_qkv, soft_capped, softened
from sparc3_pl.attribution.rules import attn_lrp
from sparc3_pl.errors import InputError
from sparc3_pl.model.attention import attention_modules, base_function, wrapped_attention


def attend(module, q, k, v):
    """Causal attention, written out."""
    scores = q @ k.transpose(-1, -2)
    blocked = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(blocked, -torch.inf).softmax(-1) @ v, None


def test_uniform_rule_at_both_products():
    """Relevance (value times gradient) through the two products and the softmax, step by step, by explicit formulas."""
    torch.manual_seed(0)
    q, k, v, upstream = (torch.randn(1, 1, 3, 2, dtype=torch.float64) for _ in range(4))
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    output, _ = scaled_qkv(attend, 0.25, 0.5)(None, *leaves)
    got = [t * g for t, g in zip((q, k, v), torch.autograd.grad(output, leaves, upstream), strict=True)]

    q, k, v, upstream = (t[0, 0] for t in (q, k, v, upstream))
    want_q, want_k, want_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for t in range(3):
        s = torch.stack([q[t] @ k[j] for j in range(t + 1)])
        p = s.exp() / s.exp().sum()
        # O_td = sum_j p_j v_jd: each term's relevance p_j v_jd G_td goes half to p_j, half to v_jd
        shares = torch.stack([p[j] * v[j] * upstream[t] for j in range(t + 1)])
        want_v[: t + 1] += shares / 2
        r_p = shares.sum(-1) / 2
        # softmax, Taylor at s (AttnLRP proposition 3.1): R_sj = s_j (R_pj - p_j sum R_p)
        r_s = s * (r_p - p * r_p.sum())
        # s_j = sum_d q_td k_jd: each term's share of R_sj, half to q, half to k
        terms = torch.stack([q[t] * k[j] for j in range(t + 1)]) / s[:, None] * r_s[:, None]
        want_q[t] += terms.sum(0) / 2
        want_k[: t + 1] += terms / 2
    for have, want in zip(got, (want_q, want_k, want_v), strict=True):
        torch.testing.assert_close(have[0, 0], want)


def test_scale_gradient():
    x = torch.randn(3, requires_grad=True)
    assert torch.equal(scale_gradient(x, 0.25), x)
    assert torch.autograd.grad(scale_gradient(x, 0.25).sum(), x)[0].tolist() == [0.25] * 3
    assert scale_gradient(x, 1) is x
    assert not scale_gradient(x, 0).requires_grad


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_wrapped_attention_is_called_and_gone_afterwards(tiny_model, implementation):
    tiny_model.set_attn_implementation(implementation)
    calls = []

    def noted(mark):
        def wrap(base):
            def function(*args, **kwargs):
                calls.append(mark)
                return base(*args, **kwargs)

            return function

        return wrap

    ids, modules = tokens(2, 5), attention_modules(tiny_model)
    assert len(modules) == 2
    with torch.no_grad():
        want = tiny_model(ids).logits
        module = next(iter(modules.values()))
        config = module.config
        with wrapped_attention(module, noted("inner")), wrapped_attention(module, noted("outer")):
            assert tiny_model.config._attn_implementation == implementation
            assert torch.equal(tiny_model(ids).logits, want)
        assert calls == ["outer", "inner"]
        assert module.config is config
        tiny_model(ids)
    assert calls == ["outer", "inner"]


@pytest.mark.parametrize("family", FAMILIES)
def test_other_models_are_left_alone(family):
    one, other = tiny(family), tiny(family)
    with wrapped_attention(next(iter(attention_modules(one).values())), lambda base: None), torch.no_grad():
        other(tokens(1, 4))


# --- the softmax's temperature ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_softened_softmax(temperature):
    """Gradients of query and key by explicit formulas, one position after the other; those of value by autograd."""
    torch.manual_seed(0)
    q, k, v, upstream = (torch.randn(1, 1, 4, 2, dtype=torch.float64) for _ in range(4))
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]

    def base(module, q, k, v, mask=None, **kwargs):
        output, weights = attend(module, q, k, v)
        return output.transpose(1, 2), weights

    output, _ = softened(base, temperature)(None, *leaves, scaling=1.0)
    got = torch.autograd.grad(output, leaves, upstream.transpose(1, 2))
    assert torch.equal(output, base(None, q, k, v)[0])

    q, k, v, upstream = (t[0, 0] for t in (q, k, v, upstream))
    want_q, want_k, want_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for t in range(4):
        exponents = [float(q[t] @ k[j]) for j in range(t + 1)]
        plain, soft = (torch.tensor([s / T for s in exponents]).double().exp() for T in (1.0, temperature))
        plain, soft = plain / plain.sum(), soft / soft.sum()
        g = torch.stack([v[j] @ upstream[t] for j in range(t + 1)])
        for j in range(t + 1):
            at_score = soft[j] * (g[j] - sum(soft[i] * g[i] for i in range(t + 1)))
            want_q[t] += at_score * k[j]
            want_k[j] += at_score * q[t]
            want_v[j] += plain[j] * upstream[t]
    for have, want in zip(got, (want_q, want_k, want_v), strict=True):
        torch.testing.assert_close(have[0, 0], want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "gemma3_text", "phi3"])
def test_temperature_one_is_the_attentions_own_gradient(family, implementation):
    """Shared heads, sliding windows, scales of their own, padding: the scores are those that the attention has."""
    model = tiny(family, dtype=torch.float64).requires_grad_(False)
    model.set_attn_implementation(implementation)
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.int64)
    mask[1, 6:] = 0
    gradients, outputs = [], []
    for wrap in (lambda base: base, lambda base: softened(base, 1.0)):
        words = model.get_input_embeddings()(ids).detach().requires_grad_()
        with ExitStack() as undo:
            for module in attention_modules(model).values():
                undo.enter_context(wrapped_attention(module, wrap))
            logits = model(inputs_embeds=words, attention_mask=mask).logits
        (logits[0, -1, 5] + logits[1, 5, 7]).backward()
        gradients.append(words.grad)
        outputs.append(logits.detach())
    assert torch.equal(*outputs)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


def test_the_temperature_is_a_setting_of_the_rules():
    model = tiny("llama", dtype=torch.float64).requires_grad_(False)
    gradients = []
    for temperature in (1.0, 2.0):
        words = model.get_input_embeddings()(tokens(1, 6)).detach().requires_grad_()
        with attn_lrp(model, softmax_temperature=temperature):
            model(inputs_embeds=words).logits[0, -1].max().backward()
        gradients.append(words.grad)
    assert not torch.allclose(*gradients, rtol=0.01)


@pytest.mark.parametrize(("rules", "temperature"), [("cp", 2.0), ("attn", 0.0), ("attn", float("nan"))])
def test_a_temperature_that_cannot_be(rules, temperature):
    with pytest.raises(InputError, match="softmax_temperature="):
        attn_lrp(tiny("llama"), rules=rules, softmax_temperature=temperature)


def test_an_attention_with_a_sink_is_refused():
    """Its weights do not add up to 1: nothing that is made of query, key and mask gives its output."""

    def with_sink(base):
        def function(*args, **kwargs):
            output, weights = base(*args, **kwargs)
            return output * 0.9, weights

        return function

    model = tiny("llama").requires_grad_(False)
    with ExitStack() as undo:
        for module in attention_modules(model).values():
            undo.enter_context(wrapped_attention(module, with_sink))
        with (
            pytest.raises(InputError, match="more than a softmax of scaled products"),
            attn_lrp(model, softmax_temperature=2.0),
        ):
            model(tokens(1, 4))


def test_soft_cap_by_the_identity_rule():
    """Scores below a cap get the gradient at the capped scores times c tanh(s/c) / s, by explicit loops."""
    torch.manual_seed(0)
    q, k, v, up = (torch.randn(1, n, 5, 3, dtype=torch.float64) for n in (2, 1, 1, 2))
    q, k, v = (3 * q).requires_grad_(), k.requires_grad_(), v.requires_grad_()
    mask = torch.full((5, 5), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    options = {"scaling": 0.7, "softcap": 1.5}
    module = tiny("gemma2").model.layers[0].self_attn
    out, _ = soft_capped(base_function(module))(module, q, k, v, mask, **options)
    want, _ = base_function(module)(module, q, k, v, mask, **options)
    assert torch.equal(out, want)
    got = torch.autograd.grad((out * up.transpose(1, 2)).sum(), (q, k, v))
    slow = [torch.zeros_like(t) for t in (q, k, v)]
    for h in range(2):
        for t in range(5):
            s = torch.stack([0.7 * q[0, h, t] @ k[0, 0, j] for j in range(t + 1)]).detach()
            capped = (1.5 * torch.tanh(s / 1.5)).requires_grad_()
            p = capped.softmax(0)
            (grad,) = torch.autograd.grad(sum(p[j] * (v[0, 0, j] @ up[0, h, t]).detach() for j in range(t + 1)), capped)
            grad = grad * capped.detach() / s
            for j in range(t + 1):
                slow[0][0, h, t] += 0.7 * grad[j] * k[0, 0, j].detach()
                slow[1][0, 0, j] += 0.7 * grad[j] * q[0, h, t].detach()
                slow[2][0, 0, j] += p[j].detach() * up[0, h, t]
    for one, other in zip(got, slow, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)  # the models' softmax is float32


def test_soft_cap_of_nothing_passes_everything():
    x = torch.zeros(3, requires_grad=True)
    attention._SoftCap.apply(x, 2.0).sum().backward()
    assert x.grad.tolist() == [1, 1, 1]
