import pytest
import torch
from tiny_models import FAMILIES, tiny, tokens

from sparc3_pl.attribution.attention import scale_gradient, scaled_qkv
from sparc3_pl.model.attention import attention_modules, wrapped_attention


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
