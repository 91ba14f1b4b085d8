"""Negative log-likelihoods of tokens in windows of text."""

import inspect

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparc3_pl.model.kernels import onednn_linears
from sparc3_pl.model.patching import as_forward
from sparc3_pl.model.structure import decoder, features, output_head

__all__ = ["IGNORE", "WindowScorer", "row_nll"]

IGNORE = -100
"""Label of a token that is not scored: padding, or already scored in an earlier window."""

_BLOCK = 1 << 23
"""Logits worked on at a time: 32 MB in float32, small beside a window's full logits and large enough to be fast."""


def row_nll(logits_NV: Tensor, targets_N: Tensor, rows: int | None = None) -> Tensor:
    """Negative log-likelihood of each row's target, in blocks of rows, so that no second full-size tensor is made.

    log(sum exp) less the target's logit. The library's fused cross-entropy takes half the time, but on the CPU in
    float32 its values are low by 8e-6 nats on average at a real model's logits (-31 to 42), which is as much as an
    edit's effect may be; these are right to 1e-7.

    Returns:
        ``[N]`` in nats, float32 (float64 for float64 logits).
    """
    rows = rows or max(1, _BLOCK // logits_NV.shape[-1])
    parts = []
    for logits, targets in zip(logits_NV.split(rows), targets_N.split(rows), strict=True):
        logits = logits if logits.dtype == torch.float64 else logits.float()
        parts.append(logits.logsumexp(-1) - logits.gather(-1, targets[:, None])[:, 0])
    return torch.cat(parts)


class WindowScorer:
    """Negative log-likelihoods of windows, the output head applied at scored positions only.

    Some families do more than ``head(hidden)`` (Gemma 2 caps its logits, Cohere scales them). Before a batch is
    scored the shortest useful piece of it is run both ways, once per scorer: unless the logits are equal bit for bit,
    the model's own forward is used, still only at the positions that some window of the batch scores.

    Args:
        model: A causal language model in eval mode; it stays where it is.
        ignore_index: Label of tokens that are not scored.
    """

    def __init__(self, model: nn.Module, ignore_index: int = IGNORE) -> None:
        self.model, self.ignore_index = model, ignore_index
        self.decoder, (_, self.head) = decoder(model), output_head(model)
        self.head_only: bool | None = None
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters

    @torch.inference_mode()
    def __call__(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Score a batch of windows.

        Args:
            input_ids: ``[B, T]``.
            attention_mask: ``[B, T]``, 0 at padding.
            labels: ``[B, T]``, the input ids at the tokens to be scored, ``ignore_index`` elsewhere.

        Returns:
            For each window the sum in nats (``[B]``, float64) and the number of scored tokens (``[B]``, int64).
        """
        with onednn_linears(self.model):
            if self.head_only is None:
                self.head_only = self._head_is_all(input_ids[:1, :8])
            want = F.pad(labels[:, 1:], (0, 1), value=self.ignore_index)  # want[t]: what position t predicts
            scored = want != self.ignore_index
            nll = self._nll(input_ids, None if _right_padded(attention_mask) else attention_mask, want, scored)
            total = torch.zeros(len(want), dtype=torch.float64, device=nll.device)
            return total.index_add_(0, scored.nonzero()[:, 0], nll.double()), scored.sum(1)

    def _nll(self, input_ids: Tensor, attention_mask: Tensor | None, want: Tensor, scored: Tensor) -> Tensor:
        """Negative log-likelihoods of the scored positions, in row-major order, ``[N]``."""
        if not self.head_only:
            logits, keep = self._own_logits(input_ids, attention_mask, scored)
            return row_nll(logits[scored[:, keep]], want[scored].to(logits.device)).to(want.device)

        def forward(_: nn.Module, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
            hidden_ND = self._hidden(input_ids, attention_mask)[scored]
            size = max(1, _BLOCK // features(self.head)[0])
            pairs = zip(hidden_ND.split(size), want[scored].split(size), strict=True)
            return torch.cat([self._head_nll(*pair) for pair in pairs])

        return as_forward(forward, self.model, input_ids, attention_mask)

    def _head_nll(self, hidden_ND: Tensor, want_N: Tensor) -> Tensor:
        logits = self.head(hidden_ND)
        return row_nll(logits, want_N.to(logits.device)).to(want_N.device)

    def _hidden(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        out = self.decoder(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        return out.last_hidden_state

    def _own_logits(self, input_ids: Tensor, attention_mask: Tensor | None, scored: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``[B, K, V]`` by the model's own forward, and the K positions they are at."""
        keep = scored.any(0).nonzero()[:, 0] if self._keeps else torch.arange(scored.shape[1], device=scored.device)
        kwargs = {"logits_to_keep": keep} if self._keeps else {}
        out = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **kwargs)
        return out.logits, keep

    def _head_is_all(self, input_ids: Tensor) -> bool:
        own = self.model(input_ids=input_ids, use_cache=False).logits
        apart = as_forward(lambda _, ids: self.head(self._hidden(ids)), self.model, input_ids)
        return torch.equal(own.float(), apart.float())


def _right_padded(attention_mask: Tensor) -> bool:
    """Whether padding stands on the right only: a causal model's real tokens never see it, and attention without a
    mask is faster.
    """
    return bool((attention_mask[:, 1:] <= attention_mask[:, :-1]).all())
