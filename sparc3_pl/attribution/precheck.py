"""Before the first batch of a scoring pass by LRP: the relevance account of one short sample must balance.

A rule that is missing or wrong gives scores that look like any others. The account tells for about what one short
sample costs, so no run is without it, and the score folder keeps what it said.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence

import torch
from torch import nn

from sparc3_pl.attribution.account import self_check
from sparc3_pl.errors import InputError
from sparc3_pl.io.formats import Record
from sparc3_pl.model.placement import input_device
from sparc3_pl.runtime.collectives import from_rank_zero, is_sharded

__all__ = ["NUM_TOKENS", "checked_rules"]

log = logging.getLogger(__name__)

NUM_TOKENS = 16
"""Number of tokens to check: a missing rule shows in any sentence, and memory grows with the square of the length."""


def checked_rules(model: nn.Module, sample: Sequence[int], *, unlisted: bool = False) -> Record:
    """Draws up the relevance account of the beginning of one sample on rank 0; every rank judges it alike.

    Args:
        model: A causal language model in eval mode, whole. For one that has been sharded since it was checked, the
            earlier result is returned.
        sample: Token ids.
        unlisted: As in ``attn_lrp``.

    Returns:
        The manifest's ``relevance_account``: ``relative_residual`` and ``num_tokens``; or ``relative_residual`` None
        and the ``reason`` why nothing was measured.

    Raises:
        InputError: on every rank, if the account does not balance, or a module has no rule.
    """
    reason = None
    if not sample:
        reason = "there is no sample"
    elif any(parameter.is_meta for parameter in model.parameters()):
        reason = "part of the model is offloaded (model.device_map); run sparc3 doctor where it fits"
    if reason is not None:
        log.warning("the LRP rules were not checked by a relevance account: %s", reason)
        return {"relative_residual": None, "num_tokens": 0, "reason": reason}
    if any(map(is_sharded, model.parameters())):
        return dict(_accounts[model])
    input_ids = torch.tensor(sample[:NUM_TOKENS])[None]
    device = input_device(model)
    outcome = from_rank_zero(lambda: _outcome(model, input_ids.to(device), unlisted))
    if isinstance(outcome, str):
        raise InputError(outcome)
    _accounts[model] = {"relative_residual": outcome, "num_tokens": input_ids.shape[1]}
    return dict(_accounts[model])


_accounts: weakref.WeakKeyDictionary[nn.Module, Record] = weakref.WeakKeyDictionary()
"""The last result for each model."""


def _outcome(model: nn.Module, input_ids_1T: torch.Tensor, unlisted: bool) -> float | str:
    """The relative residual, or what is wrong, as text that can be sent to the other ranks."""
    try:
        return self_check(model, input_ids_1T, unlisted=unlisted)
    except InputError as error:
        return str(error)
