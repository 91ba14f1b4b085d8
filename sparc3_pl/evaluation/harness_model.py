"""A model as the LM Evaluation Harness asks it. Imports ``lm_eval``: only ``tasks`` imports this, and late."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lm_eval.api.model import TemplateLM

from sparc3_pl.data.samples import pad_right
from sparc3_pl.model.likelihood import IGNORE, WindowScorer
from sparc3_pl.model.placement import input_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sparc3_pl.data.encoding import Encoder

__all__ = ["HarnessModel"]

log = logging.getLogger(__name__)


class HarnessModel(TemplateLM):
    """Log-likelihoods of continuations, of a model that stays where and as it is.

    Args:
        model: The model, in eval mode.
        encoder: The model's: what its tokenizer puts before a text stands before every context, and nothing after it.
        batch_size: Sequences of one forward pass.
    """

    backend = "causal"

    def __init__(self, model: PreTrainedModel, encoder: Encoder, batch_size: int) -> None:
        super().__init__()
        self._encoder, self._batch_size, self._scorer = encoder, batch_size, WindowScorer(model)
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self._context = min(n for n in (context, encoder.context, 1 << 30) if n is not None)
        self._device = input_device(model)
        self._num_cut = 0

    @property
    def eot_token_id(self) -> int:
        """What stands before a continuation without context."""
        return self._encoder.beginning()[-1]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: object) -> list[int]:
        return self._encoder.body(string) if add_special_tokens is False else self._encoder(string)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation in nats, and False: whether it is the greedy one is not computed."""
        values = [float("nan")] * len(requests)
        longest_first = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        for start in range(0, len(requests), self._batch_size):
            batch = longest_first[start : start + self._batch_size]
            nll_B = self._nll([requests[i][1:] for i in batch])
            for i, nll in zip(batch, nll_B, strict=True):
                values[i] = -nll
        return [(value, False) for value in values]

    def _nll(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[float]:
        rows = [[*context, *continuation][-self._context :] for context, continuation in pairs]
        num_cut = sum(len(row) < len(a) + len(b) for row, (a, b) in zip(rows, pairs, strict=True))
        if num_cut and not self._num_cut:
            log.warning(
                "a context is longer than the %d tokens that the model reads; its beginning is cut", self._context
            )
        self._num_cut += num_cut
        input_ids, mask = pad_right(rows, self._encoder.pad_id)
        labels = input_ids.new_full(input_ids.shape, IGNORE)
        for row, ids, (_, continuation) in zip(labels, rows, pairs, strict=True):
            place = slice(len(ids) - len(continuation), len(ids))
            row[place] = input_ids.new_tensor(ids[place])
        nll_B, count_B = self._scorer(*(tensor.to(self._device) for tensor in (input_ids, mask, labels)))
        whole = [len(continuation) for _, continuation in pairs]
        return [
            nll if count == length and count else float("nan")  # a choice that was not read whole has no likelihood
            for nll, count, length in zip(nll_B.tolist(), count_B.tolist(), whole, strict=True)
        ]

    def loglikelihood_rolling(self, requests: object, disable_tqdm: bool = False) -> list[float]:
        """Never called: multiple-choice tasks do not need it."""
        raise NotImplementedError

    def generate_until(self, requests: object, disable_tqdm: bool = False) -> list[str]:
        """Never called: multiple-choice tasks do not need it."""
        raise NotImplementedError
