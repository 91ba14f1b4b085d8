"""AttnLRP in gradient form: rules that turn a backward pass into relevance propagation (R = value * gradient).

Achtibat et al., AttnLRP, ICML 2024, arXiv 2402.05602. One rule for each operation:

=========================  ===========================================================
linear, residual, rotary   plain gradient (the epsilon rule with epsilon 0)
normalisation              the standard deviation is a constant
element-wise activation    dy/dx := f(x)/x
gated product act(g) * u   gradient halved (uniform rule)
attention                  gradient of q and k times 1/4, of v times 1/2 (uniform rule at
                           both products, softmax by its own derivative)
soft-cap of attention      dy/dx := f(x)/x, as for any activation
sum of a token's experts   gradient halved: a half to each expert, a half to its routing
                           weight (uniform rule); the router by its own derivative
=========================  ===========================================================

Rules are put on one model's own modules, chosen by what a module computes and not by its class, and are taken off
again. Forward values do not change. The rules live in the graph: a backward pass may run after the block has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakSet

from torch import Tensor, nn

from sparc3_pl.attribution.activations import activation_kind, identity_rule
from sparc3_pl.attribution.attention import scale_gradient, scaled_qkv, soft_capped, softened
from sparc3_pl.attribution.norms import NormKind, forward_slot, norm_kind, std_constant_rule
from sparc3_pl.errors import InputError
from sparc3_pl.model.attention import AttentionFunction, attention_modules, has_soft_cap, wrapped_attention
from sparc3_pl.model.experts import experts_modules, open_experts, router_of
from sparc3_pl.model.patching import swapped
from sparc3_pl.model.structure import decoder, is_linear, mlps, module_name, output_head

__all__ = ["NO_RULE", "REASONS", "SUPPORTED", "Missing", "PreparedRules", "RuleSet", "attn_lrp", "rule_table"]

RuleSet = Literal["attn", "cp"]
"""``attn``: AttnLRP. ``cp``: CP-LRP (Ali et al., arXiv 2202.07304): attention weights are constants, all relevance
goes through the values; the input's relevance is then the logit, up to biases."""

Missing = Literal["refuse", "plain"]

NO_RULE = "none: its plain gradient"
"""The entry of ``rule_table`` for a module without a rule."""

SUPPORTED = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "opt", "gpt2", "gpt_neox", "phi3"),
    *("cohere2", "gemma", "glm4", "granite", "olmo2", "olmo3", "phi", "smollm3", "stablelm", "starcoder2"),
    *("gemma2", "vaultgemma", "qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text"),
    *("qwen3_moe", "mixtral", "olmoe", "granitemoe"),
)
"""transformers ``model_type`` of the families whose relevance account is known to balance."""

_NO_INTERFACE = "its attention does not go through transformers' attention interface"
REASONS = {
    "qwen2_moe": "the sigmoid gate of its shared expert has no rule",
    "gpt_oss": "its clamped expert gate and attention sinks have no rule",
    "llama4": "its sigmoid-weighted experts have no rule",
    "apertus": "its xIELU activation has no rule",
    "qwen3_next": "its gated delta-net layers have no rule",
    **dict.fromkeys(("gptj", "bloom", "falcon", "gpt_neo", "mpt", "codegen"), _NO_INTERFACE),
    **dict.fromkeys(("mamba", "mamba2", "rwkv"), "its recurrence has no rule"),
}
_TRY_IT = "ask sparc3 doctor, and set model.unlisted_family: true if its account balances; or"
_WAY_OUT = "use method gradient or wanda, or a model of " + ", ".join(SUPPORTED)
_FACTORS: dict[str, tuple[float, float]] = {"attn": (0.25, 0.5), "cp": (0.0, 1.0)}
_active: WeakSet[nn.Module] = WeakSet()


@dataclass(frozen=True)
class _Rule:
    """The rule that acts on a module: its name, and how it is put on (None: the plain gradient is the rule)."""

    name: str
    put_on: Callable[[], AbstractContextManager[Any]] | None = None


def attn_lrp(
    model: nn.Module,
    *,
    rules: RuleSet = "attn",
    unlisted: bool = False,
    softmax_temperature: float = 1.0,
    missing: Missing = "refuse",
) -> AbstractContextManager[nn.Module]:
    """Backward passes of graphs built inside the block propagate relevance; forward values do not change.

    Works for frozen and trainable parameters, any attention implementation, and graphs that begin at any layer.

    Args:
        model: A causal language model in eval mode. Not to be copied inside the block.
        rules: ``attn`` for AttnLRP, ``cp`` for its conservative variant.
        unlisted: Try a family that is not in ``SUPPORTED``; run ``account.self_check`` on it before believing it.
        softmax_temperature: Temperature at which attention's softmax passes gradients on (``attention.softened``); 1:
            its own.
        missing: What to do with a module without a rule: ``refuse`` the model, or take its ``plain`` gradient, which is
            wrong and only good for measuring by how much.

    Raises:
        InputError: if the temperature is not positive, or changes nothing; if the model is training, of a family not
            known good, or holds a module without a rule.
        RuntimeError: if the rules already act on this model.
    """
    prepared = PreparedRules(rules=rules, unlisted=unlisted, softmax_temperature=softmax_temperature, missing=missing)
    return prepared(model)


class PreparedRules:
    """``attn_lrp`` for many batches of one model, whose modules are examined once, at the first.

    Between the blocks the model must keep its modules; their weights may change.

    Args:
        rules: As in ``attn_lrp``.
        unlisted: As in ``attn_lrp``.
        softmax_temperature: As in ``attn_lrp``.
        missing: As in ``attn_lrp``.

    Raises:
        InputError: if the temperature is not positive, or changes nothing.
    """

    def __init__(
        self,
        *,
        rules: RuleSet = "attn",
        unlisted: bool = False,
        softmax_temperature: float = 1.0,
        missing: Missing = "refuse",
    ) -> None:
        if not 0 < softmax_temperature < float("inf"):
            raise InputError(f"softmax_temperature={softmax_temperature}; give a positive number such as 2")
        if rules == "cp" and softmax_temperature != 1:
            raise InputError(
                f"softmax_temperature={softmax_temperature} has no effect with rules=cp, which hold attention weights "
                "constant; leave it out, or give rules=attn"
            )
        self._rules, self._unlisted, self._temperature = rules, unlisted, softmax_temperature
        self._missing: Missing = missing
        self._plan_of: tuple[nn.Module, dict[str, _Rule]] | None = None

    @contextmanager
    def __call__(self, model: nn.Module) -> Iterator[nn.Module]:
        """The block of ``attn_lrp``; raises what that raises."""
        if model in _active:
            raise RuntimeError(f"attn_lrp already acts on this {type(model).__name__}; leave the first block first")
        name = next((name for name, module in model.named_modules() if module.training), None)
        if name is not None:
            raise InputError(f"LRP needs eval mode, but {name or 'the model'} is training; call model.eval()")
        if self._plan_of is None or self._plan_of[0] is not model:
            if self._missing == "refuse":
                _check_family(model, self._unlisted)
            self._plan_of = model, _plan(model, self._rules, self._temperature, self._missing)
        with ExitStack() as undo:
            _active.add(model)
            undo.callback(_active.discard, model)
            for rule in self._plan_of[1].values():
                if rule.put_on is not None:
                    undo.enter_context(rule.put_on())
            yield model


def rule_table(model: nn.Module, rules: RuleSet = "attn", missing: Missing = "refuse") -> dict[str, str]:
    """The rule that acts on each leaf module, attention and gated product of the model, by module name.

    Args:
        model: A causal language model of any family.
        rules: As in ``attn_lrp``.
        missing: With ``plain``, what has no rule is listed too, as ``NO_RULE``.

    Raises:
        InputError: if a module has no rule, unless ``missing`` is ``plain``.
    """
    return {name: rule.name for name, rule in _plan(model, rules, missing=missing).items()}


def _check_family(model: nn.Module, unlisted: bool) -> None:
    """Refuses a family that is not known good; ``unlisted`` admits one that was never checked, but none known bad."""
    family = decoder(model).config.model_type
    if family in REASONS or not (unlisted or family in SUPPORTED):
        way_out = _WAY_OUT if family in REASONS else f"{_TRY_IT} {_WAY_OUT}"
        raise InputError(f"no LRP rules for model type {family!r}: {REASONS.get(family, 'never checked')}; {way_out}")


def _plan(model: nn.Module, rules: RuleSet, temperature: float = 1.0, missing: Missing = "refuse") -> dict[str, _Rule]:
    """The rule of every module, in order of appearance. Everything is checked here, before anything is changed."""
    inside = decoder(model)
    prefix = module_name(model, inside)
    with suppress(InputError):  # said by _product_rules and _experts_rules
        open_experts(model)
    parts: list[Callable[[], dict[str, _Rule]]] = [
        lambda: _leaf_rules(inside, prefix, missing),
        lambda: _attention_rules(inside, prefix, rules, temperature),
        lambda: _product_rules(model),
        lambda: _experts_rules(model, inside, prefix, rules),
    ]
    plan: dict[str, _Rule] = {}
    for part in parts:
        with nullcontext() if missing == "refuse" else suppress(InputError):
            plan |= part()
    plan[output_head(model)[0]] = _Rule("linear: plain gradient")
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    return dict(sorted(plan.items(), key=lambda item: order.get(item[0].partition(" ")[0], len(order))))


def _leaf_rules(inside: nn.Module, prefix: str, missing: Missing) -> dict[str, _Rule]:
    modules = [(f"{prefix}.{name}", module) for name, module in inside.named_modules()]
    leaves = [(name, module) for name, module in modules if is_linear(module) or not module._modules]
    routers = {id(router_of(inside, name)) for name in experts_modules(inside)}
    return {
        name: _Rule("router: plain gradient") if id(module) in routers else _leaf_rule(name, module, missing)
        for name, module in leaves
        if not isinstance(module, nn.ModuleList)
    }


def _leaf_rule(name: str, module: nn.Module, missing: Missing) -> _Rule:
    if is_linear(module):
        return _Rule("linear: plain gradient")
    if isinstance(module, nn.Embedding):
        return _Rule("embedding: where relevance arrives")
    if isinstance(module, nn.Dropout | nn.Identity):
        return _Rule("none needed: off in eval mode")
    if any("inv_freq" in buffer for buffer in module._buffers):
        return _Rule("rotary angles: constants")
    if (norm := norm_kind(module)) is not None:
        return _Rule(f"{norm.name}: standard deviation constant", lambda: _norm_rule(module, norm))
    if (act := activation_kind(module)) is not None:
        return _Rule(f"{act}: f(x)/x", lambda: _activation_rule(module, act))
    if missing == "plain":
        return _Rule(f"{NO_RULE} ({type(module).__name__})")
    raise InputError(f"no LRP rule for {name} ({type(module).__name__}); {_WAY_OUT}")


def _attention_rules(inside: nn.Module, prefix: str, rules: RuleSet, temperature: float) -> dict[str, _Rule]:
    modules = attention_modules(inside)
    if not modules:
        raise InputError(f"no LRP rules for this {type(inside).__name__}: {_NO_INTERFACE}; {_WAY_OUT}")
    for name, module in modules.items():
        if getattr(module, "reorder_and_upcast_attn", False) and module.config._attn_implementation == "eager":
            raise InputError(f"{name}: reorder_and_upcast_attn with eager attention has no rule; load it with sdpa")
        if has_soft_cap(module) and module.config._attn_implementation != "eager":
            raise InputError(
                f"{name}: the rule for its soft-cap is for eager attention, but it uses "
                f"{module.config._attn_implementation}; load it with attn_implementation eager"
            )
    qk, v = _FACTORS[rules]
    text = f"attention: gradient of q, k times {qk}, of v times {v}"
    if temperature != 1:
        text += f", softmax's at temperature {temperature:g}"
    return {
        f"{prefix}.{name}": _Rule(
            text + (", its soft-cap f(x)/x" if has_soft_cap(module) else ""),
            _attention_rule(module, qk, v, temperature),
        )
        for name, module in modules.items()
    }


def _product_rules(model: nn.Module) -> dict[str, _Rule]:
    """Gated products have no module of their own: they are listed by the down-projection that reads them."""
    downs = [mlp.down for mlp in mlps(model) if mlp.gated]
    return {
        f"{down} (input)": _Rule("gated product: gradient halved", _product_rule(model.get_submodule(down)))
        for down in downs
    }


def _experts_rules(model: nn.Module, inside: nn.Module, prefix: str, rules: RuleSet) -> dict[str, _Rule]:
    """The rules for the product of an expert's output and its routing weight, which act at the experts' sum.

    Under ``cp`` routing weights are constants, as attention weights are.
    """
    open_experts(model)
    text = "sum of experts: gradient halved" if rules == "attn" else "sum of experts: routing weights constant"
    return {
        f"{prefix}.{name}": _Rule(text, _experts_rule(experts, rules))
        for name, experts in experts_modules(inside).items()
    }


@contextmanager
def _norm_rule(module: nn.Module, kind: NormKind) -> Iterator[None]:
    slot = forward_slot(module)
    function = getattr(module, slot)
    with swapped(module, slot, lambda x: std_constant_rule(x, module, function, kind)):
        yield


@contextmanager
def _activation_rule(module: nn.Module, kind: str) -> Iterator[None]:
    slot = forward_slot(module)
    function = getattr(module, slot)
    with swapped(module, slot, lambda x: identity_rule(x, function, kind)):
        yield


def _attention_rule(
    module: nn.Module, qk: float, v: float, temperature: float
) -> Callable[[], AbstractContextManager[None]]:
    def wrap(base: AttentionFunction) -> AttentionFunction:
        base = soft_capped(base) if has_soft_cap(module) else base
        return scaled_qkv(base if temperature == 1 else softened(base, temperature), qk, v)

    return lambda: wrapped_attention(module, wrap)


def _experts_rule(experts: nn.Module, rules: RuleSet) -> Callable[[], AbstractContextManager[None]]:
    def halve(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        return scale_gradient(output, 0.5)

    def hold(_: nn.Module, args: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        hidden_NH, chosen_NK, weights_NK = args
        return hidden_NH, chosen_NK, weights_NK.detach()

    @contextmanager
    def put_on() -> Iterator[None]:
        handle = experts.register_forward_hook(halve) if rules == "attn" else experts.register_forward_pre_hook(hold)
        try:
            yield
        finally:
            handle.remove()

    return put_on


def _product_rule(down: nn.Module) -> Callable[[], AbstractContextManager[None]]:
    @contextmanager
    def put_on() -> Iterator[None]:
        handle = down.register_forward_pre_hook(_halve_input)
        try:
            yield
        finally:
            handle.remove()

    return put_on


def _halve_input(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The product is read by nothing but the down-projection: halving its gradient there halves both branches."""
    return (scale_gradient(args[0], 0.5), *args[1:])
