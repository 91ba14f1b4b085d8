"""How well a model does a task with some of its components ablated: one forward pass per batch and set."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sparc3_pl.attribution.targets import last_hidden, last_hidden_state
from sparc3_pl.circuit.ablation import Replacement, ablated, masked_weights
from sparc3_pl.circuit.components import Candidates
from sparc3_pl.data.batches import ReferenceBatch
from sparc3_pl.errors import InputError
from sparc3_pl.model.kernels import onednn_linears
from sparc3_pl.model.logits import OutputHead
from sparc3_pl.model.patching import as_forward
from sparc3_pl.model.size import decoder_flops, head_flops
from sparc3_pl.runtime.timing import timed

__all__ = ["Predictions", "measure", "predictions_of_batch"]

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Predictions:
    """The predictions of a model for P pairs.

    Attributes:
        difference_P: Logit of the answer minus that of the foil, after the last token; float64.
        first_P: Whether the answer has the largest logit of the vocabulary; bool.
    """

    difference_P: NDArray[np.float64]
    first_P: NDArray[np.bool_]

    @property
    def right_P(self) -> NDArray[np.bool_]:
        """Whether the answer has a larger logit than the foil."""
        return self.difference_P > 0


def measure(
    model: nn.Module,
    candidates: Candidates,
    batches: Sequence[ReferenceBatch],
    kept: Mapping[K, Tensor],
    replacement: Replacement,
    progress: Callable[[int], None] = lambda done: None,
    compact: bool = False,
) -> dict[K, Predictions]:
    """The predictions with each set of components that stays, all others ablated.

    Args:
        model: A causal language model in eval mode.
        candidates: All N components.
        batches: The pairs, with ``answer`` and ``foil`` among their fields.
        kept: Which components stay, bool ``[N]``, by the name of the set.
        replacement: What is read in place of the others.
        progress: Told the number of pairs after each pass.
        compact: See ``ablated``; only where the replacement is 0 for every batch.

    Raises:
        InputError: if a logit is not finite.
    """
    parts: dict[K, list[tuple[Tensor, Tensor]]] = {key: [] for key in kept}
    body, head = decoder_flops(model), head_flops(model)

    def run(key: K, batch: ReferenceBatch) -> None:
        with timed("ablated passes") as now:
            parts[key].append(predictions_of_batch(model, batch))
            tokens, size = int(batch.attention_mask.sum()), len(batch.input_ids)
            now.did(
                samples=size,
                tokens=tokens,
                padded=batch.attention_mask.numel() - tokens,
                flops=body * tokens + head * size,
                passes=1,
                like=model.get_input_embeddings().weight,
            )
        progress(len(batch.input_ids))

    def in_force(kept_N: Tensor) -> AbstractContextManager[None]:
        """The ablation of all that is not kept, the same for every batch."""
        if candidates.are_weights:
            return masked_weights(model, candidates, kept_N)
        return ablated(model, candidates, kept_N, {}, compact)

    with torch.no_grad(), onednn_linears(model):
        if candidates.are_weights or compact:  # ablating a set costs as much as reading the weights: once
            for key, kept_N in kept.items():
                with in_force(kept_N):
                    for batch in batches:
                        run(key, batch)
        else:
            for batch in batches:  # values of the paired sentences: once, for all sets
                values = replacement(batch)
                for key, kept_N in kept.items():
                    with ablated(model, candidates, kept_N, values):
                        run(key, batch)
    return {
        key: Predictions(*(torch.cat(column).numpy() for column in zip(*rows, strict=True)))
        for key, rows in parts.items()
    }


def predictions_of_batch(model: nn.Module, batch: ReferenceBatch) -> tuple[Tensor, Tensor]:
    """The logit differences ``[B]`` float64 of a batch, and whether the answers come first, ``[B]`` bool; on the CPU.

    Raises:
        InputError: if a logit of an answer or a foil is not finite.
    """

    def forward(model: nn.Module, input_ids_BT: Tensor, attention_mask_BT: Tensor) -> Tensor:
        hidden_BTH = last_hidden_state(model, input_ids_BT, attention_mask_BT)
        return OutputHead(model).logits(last_hidden(hidden_BTH, attention_mask_BT))[:, 0]

    logits_BV = as_forward(forward, model, batch.input_ids, batch.attention_mask)
    answer_B, foil_B = (torch.as_tensor(batch.fields[name]).to(logits_BV.device) for name in ("answer", "foil"))
    both_B2 = logits_BV.gather(1, torch.stack([answer_B, foil_B], 1)).double()
    if not both_B2.isfinite().all():
        raise InputError("a logit of an answer is not finite: measure in float32 (model.dtype)")
    difference_B = (both_B2[:, 0] - both_B2[:, 1]).cpu()
    return difference_B, (logits_BV.argmax(1) == answer_B).cpu()
