"""Perplexity: exp of the mean negative log-likelihood of the scored tokens."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from sparc3_pl.model.likelihood import IGNORE, row_nll

__all__ = ["Perplexity", "token_nll"]


def token_nll(logits_BTV: Tensor, labels_BT: Tensor, ignore_index: int = IGNORE) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of every next token, summed.

    The logits at position t predict the label at t + 1, as in transformers: labels are the input ids, with
    ``ignore_index`` where a token is not to be scored. The label of the first position is never scored.

    Returns:
        The sum in nats (float64 scalar) and the number of tokens in it (int64 scalar).

    Raises:
        ValueError: if the first two sizes of ``logits_BTV`` differ from ``labels_BT``.
    """
    if labels_BT.shape != logits_BTV.shape[:2]:
        raise ValueError(f"labels {tuple(labels_BT.shape)} do not fit logits {tuple(logits_BTV.shape)}")
    total = torch.zeros((), dtype=torch.float64, device=logits_BTV.device)
    count = torch.zeros((), dtype=torch.int64, device=logits_BTV.device)
    for logits_TV, labels_T in zip(logits_BTV, labels_BT, strict=True):  # window by window: each a view, not a copy
        want = labels_T[1:]
        is_scored = want != ignore_index
        nll = row_nll(logits_TV[:-1], want.where(is_scored, 0))
        total, count = total + nll.double()[is_scored].sum(), count + is_scored.sum()
    return total, count


class Perplexity(Metric):
    """exp(sum of negative log-likelihoods / number of scored tokens).

    States: ``nll`` (float64, nats) and ``num_tokens`` (int64), both reduced over processes by their sum, so that a
    process without any window takes part like the others. With no token scored the value is NaN.
    """

    full_state_update = False
    higher_is_better = False
    is_differentiable = False

    def __init__(self, ignore_index: int = IGNORE, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.ignore_index = ignore_index
        self.add_state("nll", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("num_tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(
        self,
        logits_BTV: Tensor | None = None,
        labels_BT: Tensor | None = None,
        *,
        nll: Tensor | None = None,
        num_tokens: Tensor | None = None,
    ) -> None:
        """Count a batch: either its logits and labels (see ``token_nll``), or sums that ``WindowScorer`` has made."""
        if logits_BTV is not None:
            nll, num_tokens = token_nll(logits_BTV, labels_BT, self.ignore_index)
        self.nll = self.nll + nll.double().sum()
        self.num_tokens = self.num_tokens + num_tokens.sum()

    def compute(self) -> Tensor:
        """The perplexity, a float64 scalar."""
        return (self.nll / self.num_tokens).exp()

    def totals(self) -> tuple[float, int]:
        """Sum of negative log-likelihoods (nats) and number of tokens over all processes; every process must call."""
        with self.sync_context():
            return float(self.nll), int(self.num_tokens)
