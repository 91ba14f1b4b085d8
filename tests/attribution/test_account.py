import math
from contextlib import ExitStack, contextmanager, nullcontext

import pytest
import torch
from tiny_models import EAGER_ONLY, FAMILIES, MIXTURES, MORE_FAMILIES, VARIANTS, tiny, tokens, variant

from sparc3_pl.attribution import norms, rules
from sparc3_pl.attribution.account import relevance_account, self_check, softmax_retention
from sparc3_pl.errors import InputError
from sparc3_pl.model.patching import swapped

EVERYTHING = [*FAMILIES, *MORE_FAMILIES, *VARIANTS, *MIXTURES]
IDS = tokens(1, 11)


@contextmanager
def float64_norms(model):
    """Take the float32 casts out of the model's own normalisation layers."""
    with ExitStack() as undo:
        for module in model.modules():
            if (kind := norms.norm_kind(module)) is not None:
                weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
                forward = lambda x, w=weight, b=bias, k=kind: norms.normalised(x, w, b, k)  # noqa: E731
                undo.enter_context(swapped(module, "forward", forward))
        yield


def soft_cap(model, logit):
    """What the model's own soft-cap, if it has one, makes of a logit."""
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logit if cap is None else cap * math.tanh(logit / cap)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("rule_set", ["attn", "cp"])
@pytest.mark.parametrize("name", EVERYTHING)
def test_account_balances(name, rule_set, attention):
    model = variant(name, dtype=torch.float64)
    model.set_attn_implementation("eager" if name in EAGER_ONLY else attention)
    account = relevance_account(model, IDS, rules=rule_set)
    assert abs(account.residual) <= 1e-6 * abs(account.logit)
    assert account.relative_residual <= 1e-6
    assert (account.softmax != 0) == (rule_set == "attn")
    with torch.no_grad():
        logits = model(IDS).logits[0, -1]
    assert account.target == int(logits.argmax())
    assert soft_cap(model, account.logit) == pytest.approx(float(logits.max()), rel=1e-6)


@pytest.mark.parametrize("name", EVERYTHING)
def test_account_is_exact_without_the_models_float32_casts(name):
    model = variant(name, dtype=torch.float64)
    with float64_norms(model):
        account = relevance_account(model, IDS)
    # Cohere 2 also rotates in float32; eager attention and routers take their softmax in it.
    limit = 1e-6 if name in ("cohere2", *EAGER_ONLY, *MIXTURES) else 1e-12
    assert abs(account.residual) <= limit * abs(account.logit)


def test_cp_conserves_where_no_bias_can_absorb():
    account = relevance_account(tiny("mistral", dtype=torch.float64), IDS, rules="cp")
    assert account.input == pytest.approx(account.logit, rel=1e-6)
    assert (account.linear_bias, account.norm_bias, account.softmax, account.position) == (0, 0, 0, 0)


def test_account_touches_no_parameter_gradient(tiny_llama):
    relevance_account(tiny_llama, IDS)
    assert all(p.grad is None for p in tiny_llama.parameters())
    tiny_llama.requires_grad_(False)
    assert relevance_account(tiny_llama, IDS).relative_residual < 1e-5


def test_account_wants_one_sample(tiny_llama):
    with pytest.raises(InputError, match="one sample"):
        relevance_account(tiny_llama, tokens(2, 5))


@pytest.mark.parametrize("scale", [0.3, 1.0])
@pytest.mark.parametrize("mask_kind", ["causal", "bool", "float"])
def test_softmax_retention_by_loops(scale, mask_kind):
    torch.set_default_dtype(torch.float64)
    try:
        q, gradient = torch.randn(1, 2, 4, 3), torch.randn(1, 2, 4, 3)
        k, v = torch.randn(1, 1, 4, 3), torch.randn(1, 1, 4, 3)
        allowed = torch.ones(4, 4, dtype=torch.bool).tril()
        if mask_kind == "bool":
            allowed[3, 1] = False
        mask = {"causal": None, "bool": allowed}.get(mask_kind, torch.where(allowed, 0.0, -1e300))
        got = softmax_retention(q, k, v, mask, gradient, scale)
    finally:
        torch.set_default_dtype(torch.float32)
    for h in range(2):
        for t in range(4):
            keys = [j for j in range(4) if allowed[t, j]]
            s = torch.stack([scale * q[0, h, t] @ k[0, 0, j] for j in keys]).requires_grad_()
            p = s.softmax(0)
            upstream = torch.stack([gradient[0, h, t] @ v[0, 0, j] / 2 for j in keys])
            (grad_s,) = torch.autograd.grad(p, s, upstream)
            assert float(got[0, h, t]) == pytest.approx(((p * upstream).sum() - (s * grad_s).sum()).item(), rel=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_self_check_passes_in_float32_and_bfloat16(family):
    assert self_check(tiny(family), IDS) <= 1e-5
    assert self_check(tiny(family, dtype=torch.bfloat16), IDS) <= 0.1


MISSING = {
    "gate": ("_product_rule", "llama"),
    "fused gate": ("_product_rule", "phi3"),
    "norms": ("_norm_rule", "llama"),
    "layer norms": ("_norm_rule", "gpt2"),
    "q and k norms": ("_norm_rule", "qwen3"),
    "activation": ("_activation_rule", "gpt_neox"),
    "gate activation": ("_activation_rule", "gemma3_text"),
    "attention": ("_attention_rule", "opt"),
}


@pytest.mark.parametrize("case", MISSING)
def test_self_check_catches_a_missing_rule(case, monkeypatch):
    name, family = MISSING[case]
    original = getattr(rules, name)

    def without(module, *args):
        if case == "q and k norms" and module.weight.numel() != 8:
            return original(module, *args)
        plain = name in ("_product_rule", "_attention_rule")  # these return how a rule is put on
        return nullcontext if plain else nullcontext()

    monkeypatch.setattr(rules, name, without)
    with pytest.raises(InputError, match="unexplained"):
        self_check(tiny(family), IDS)


@pytest.mark.parametrize("factors", [(0.25, 1.0), (0.5, 0.5), (1.0, 0.5), (0.0, 0.5)])
def test_self_check_catches_wrong_attention_factors(factors, monkeypatch):
    monkeypatch.setitem(rules._FACTORS, "attn", factors)
    with pytest.raises(InputError, match="unexplained"):
        self_check(tiny("llama"), IDS)


def test_self_check_refuses_nan(tiny_llama):
    with torch.no_grad():
        tiny_llama.lm_head.weight.fill_(float("nan"))
    with pytest.raises(InputError, match="unexplained"):
        self_check(tiny_llama, IDS)


def test_the_plain_derivative_of_a_soft_cap_leaves_a_part_unexplained(monkeypatch):
    """Why attention's cap has the identity rule: relevance that a saturated tanh swallows has no owner."""
    model = tiny("gemma2", dtype=torch.float64)
    assert relevance_account(model, IDS).relative_residual < 1e-6
    monkeypatch.setattr(rules, "soft_capped", lambda base: base)
    assert relevance_account(model, IDS).relative_residual > 1e-2


def test_the_account_begins_before_the_final_soft_cap():
    model = tiny("gemma2", dtype=torch.float64)
    with torch.no_grad():
        capped = model(IDS).logits[0, -1].max()
    account = relevance_account(model, IDS)
    assert soft_cap(model, account.logit) == pytest.approx(float(capped), rel=1e-6)
    assert account.logit > float(capped) + 0.1
