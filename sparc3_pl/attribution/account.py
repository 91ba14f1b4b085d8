"""The balance sheet of a sample's relevance: where the target logit's relevance ends up.

Under AttnLRP the input's relevance is *not* the logit: biases and the softmax keep a part. The account measures each
part on its own, so that a missing or a wrong rule shows as a residual.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparc3_pl.attribution.attention import capped
from sparc3_pl.attribution.rules import Missing, RuleSet, attn_lrp
from sparc3_pl.attribution.targets import last_hidden_state
from sparc3_pl.errors import InputError
from sparc3_pl.model.attention import AttentionFunction, attention_modules, wrapped_attention
from sparc3_pl.model.experts import experts_modules, router_of
from sparc3_pl.model.logits import OutputHead
from sparc3_pl.model.placement import values_of
from sparc3_pl.model.structure import decoder, is_linear, output_head

__all__ = ["RelevanceAccount", "relevance_account", "self_check"]

TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Largest relative residual of right rules by dtype (float64 meets float32 casts inside the models' own norms).

The largest residual that rounding left: float32 9e-7 (72 samples of 8 to 64 tokens of the demo model, 24 of
SmolLM2-135M); bfloat16 1.1e-2 (72 and 8 samples); float16 1e-3 (72 samples of the demo model). Half precision, whose
last place is 2**-8 or 2**-11 of a number, is allowed ten times as much, since deeper models round more often. A missing
gate rule can be as small as 0.005, which only float32 tells from rounding: ``doctor`` checks in float32.
"""


@dataclass(frozen=True)
class RelevanceAccount:
    """Relevance in units of the logit. ``logit = input + position + ... + softmax + residual``.

    Attributes:
        target: Token id whose logit is explained.
        logit: Logit of ``target`` at the last position; before the final soft-cap of a model that has one.
        input: Relevance that arrives at the token embeddings.
        position: Relevance that arrives at learned position embeddings.
        linear_bias: Kept by the biases of linear layers.
        norm_bias: Kept by the biases of normalisation layers.
        softmax: Kept by the softmax of all attentions (0 under CP-LRP).
        router: Kept by the routers of a mixture of experts: what reaches the routing weights, less what goes on to
            the hidden states that the routers read (0 under CP-LRP).
    """

    target: int
    logit: float
    input: float
    position: float
    linear_bias: float
    norm_bias: float
    softmax: float
    router: float = 0.0

    @property
    def residual(self) -> float:
        """The part of the logit that no entry explains; 0 up to rounding if the rules are right."""
        return self.logit - math.fsum(self._entries())

    @property
    def relative_residual(self) -> float:
        """The residual's size against the largest entry's."""
        return abs(self.residual) / max(abs(self.logit), *map(abs, self._entries()))

    def _entries(self) -> tuple[float, ...]:
        return tuple(getattr(self, name) for name in _ENTRIES)


def relevance_account(
    model: nn.Module,
    input_ids: Tensor,
    *,
    rules: RuleSet = "attn",
    unlisted: bool = False,
    missing: Missing = "refuse",
) -> RelevanceAccount:
    """Draw up the account of the predicted token's logit for one unpadded sample.

    Args:
        model: A causal language model in eval mode.
        input_ids: ``[1, T]``. Memory grows with T squared.
        rules: As in ``attn_lrp``.
        unlisted: As in ``attn_lrp``.
        missing: As in ``attn_lrp``.

    Raises:
        InputError: as ``attn_lrp`` does, or if ``input_ids`` is not one sample.
    """
    if input_ids.dim() != 2 or input_ids.shape[0] != 1:
        raise InputError(f"a relevance account is for one sample [1, T], got {tuple(input_ids.shape)}")
    amounts: defaultdict[str, float] = defaultdict(float)
    leaves: list[Tensor] = []
    lrp = attn_lrp(model, rules=rules, unlisted=unlisted, missing=missing)
    with torch.enable_grad(), lrp, _bookkeeping(model, amounts, leaves, rules):
        logits = _logits(model, input_ids)[0, -1]
        target = int(logits.argmax())
        torch.autograd.grad(logits[target], leaves)  # the hooks do the sums; no parameter gets a .grad
    return RelevanceAccount(target, logits[target].item(), **{name: amounts[name] for name in _ENTRIES})


def _logits(model: nn.Module, input_ids_1T: Tensor) -> Tensor:
    """The model's logits, ``[1, T, V]``, without its final soft-cap, which belongs to what a target makes of them."""
    head = OutputHead(model)
    if head.cap is None:
        return model(input_ids=input_ids_1T, use_cache=False).logits
    return head.uncapped(last_hidden_state(model, input_ids_1T, torch.ones_like(input_ids_1T)))


def self_check(model: nn.Module, input_ids: Tensor, *, unlisted: bool = False, tolerance: float | None = None) -> float:
    """Check by one sample that no rule is missing.

    Args:
        model: A causal language model in eval mode.
        input_ids: ``[1, T]``; a few dozen tokens are enough.
        unlisted: As in ``attn_lrp``.
        tolerance: Largest relative residual to pass; by default ``TOLERANCE`` for the model's dtype.

    Returns:
        The relative residual of the account.

    Raises:
        InputError: if the account does not balance.
    """
    account = relevance_account(model, input_ids, unlisted=unlisted)
    limit = TOLERANCE[output_head(model)[1].weight.dtype] if tolerance is None else tolerance
    if not account.relative_residual <= limit:  # also for NaN
        raise InputError(
            f"LRP on this {type(model).__name__} leaves {account.residual:.3g} of the logit {account.logit:.3g} "
            f"unexplained (relative {account.relative_residual:.2g}, allowed {limit:g}): an operation has no rule or a "
            "wrong one; use method gradient or wanda"
        )
    return account.relative_residual


_ENTRIES = ("input", "position", "linear_bias", "norm_bias", "softmax", "router")


@contextmanager
def _bookkeeping(model: nn.Module, amounts: dict[str, float], leaves: list[Tensor], rules: RuleSet) -> Iterator[None]:
    """Watch all places where relevance can end; a backward pass to ``leaves`` counts what arrives there."""
    words = model.get_input_embeddings()
    inside = decoder(model)
    with ExitStack() as undo:
        for module in [*inside.modules(), output_head(model)[1]]:
            if isinstance(module, nn.Embedding):
                hook = _embedding_hook("input" if module is words else "position", amounts, leaves)
            elif module._parameters.get("bias") is not None:
                hook = _bias_hook("linear_bias" if is_linear(module) else "norm_bias", amounts)
            else:
                continue
            undo.callback(module.register_forward_hook(hook).remove)
        for name, experts in experts_modules(inside).items():
            undo.callback(experts.register_forward_pre_hook(partial(_weights_read, amounts)).remove)
            if (router := router_of(inside, name)) is not None:
                undo.callback(router.register_forward_pre_hook(partial(_router_read, amounts)).remove)
        if rules == "attn":
            for module in attention_modules(inside).values():
                undo.enter_context(wrapped_attention(module, lambda base: _softmax_watched(base, amounts)))
        yield


def _embedding_hook(entry: str, amounts: dict[str, float], leaves: list[Tensor]) -> Callable[..., Tensor]:
    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        leaf = output.detach().requires_grad_()
        leaves.append(leaf)
        leaf.register_hook(lambda g: _add(amounts, entry, leaf, g))
        return leaf

    return hook


def _bias_hook(entry: str, amounts: dict[str, float]) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        bias = values_of(module, "bias").to(output.device)
        output.register_hook(lambda g: _add(amounts, entry, bias, g))

    return hook


def _router_read(amounts: dict[str, float], _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Gives the router a view of its own of the hidden states, whose gradient is the router's part alone."""
    hidden = args[0].view_as(args[0])
    if hidden.requires_grad:
        value = hidden.detach()
        hidden.register_hook(lambda g: _add(amounts, "router", -value, g))
    return hidden, *args[1:]


def _weights_read(amounts: dict[str, float], _: nn.Module, args: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Counts what reaches the routing weights, the third thing that experts read."""
    hidden, experts, weights = args[0], args[1], args[2].view_as(args[2])
    if weights.requires_grad:
        value = weights.detach()
        weights.register_hook(lambda g: _add(amounts, "router", value, g))
    return hidden, experts, weights


def _add(amounts: dict[str, float], entry: str, value: Tensor, gradient: Tensor) -> None:
    amounts[entry] += float((value.double() * gradient.double()).sum())


def _softmax_watched(base: AttentionFunction, amounts: dict[str, float]) -> AttentionFunction:
    def attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *args: Any, **kwargs: Any):
        output, weights = base(module, q, k, v, mask, *args, **kwargs)
        qkv = [t.detach().double() for t in (q, k, v)]
        scale = kwargs.get("scaling") or q.shape[-1] ** -0.5
        cap = kwargs.get("softcap")

        def hook(gradient: Tensor) -> None:
            gradient = gradient.double().transpose(1, 2)
            amounts["softmax"] += float(softmax_retention(*qkv, mask, gradient, scale, cap).sum())

        output.register_hook(hook)
        return output, weights

    return attend


def softmax_retention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, gradient: Tensor, scale: float, cap: float | None = None
) -> Tensor:
    """Relevance that a causal attention's softmax keeps: sum of P G_P - S G_S, with P = softmax(S), S = scale q k^T.

    A soft-cap of S keeps nothing under the identity rule: S stands for the capped scores then.

    The uniform rule at P v halves the gradient before it reaches P.

    Args:
        q: ``[B, H, T, D]``.
        k: ``[B, H / n, T, D]``.
        v: ``[B, H / n, T, D]``.
        mask: None (causal), bool (True: attends) or added to S; broadcast to ``[B, H, T, T]``.
        gradient: Gradient at the output P v, ``[B, H, T, D]``.
        scale: Factor by which the scores are multiplied before the softmax.
        cap: c of the scores' soft-cap c tanh(S / c); None if they have none.

    Returns:
        ``[B, H, T]``, one value per query.
    """
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    scores = scale * q @ k.transpose(-1, -2)
    if cap is not None:
        scores = capped(scores, cap)
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    masked = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    p = masked.softmax(-1)
    g = gradient @ v.transpose(-1, -2) / 2
    mean = (p * g).sum(-1)
    return mean - (scores * p * (g - mean[..., None])).sum(-1)
