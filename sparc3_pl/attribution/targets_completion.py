"""Target ``completion``: how likely the model finds a completion, its own or somebody else's, of a prompt."""

import math
from collections.abc import Sequence

from torch import Tensor, nn

from sparc3_pl.attribution.likelihood import log_likelihood, next_tokens, require_known_logits
from sparc3_pl.attribution.targets import Attributed, Target
from sparc3_pl.data.batches import ReferenceBatch
from sparc3_pl.errors import InputError
from sparc3_pl.model.logits import OutputHead

__all__ = ["CompletionLikelihood"]


class CompletionLikelihood(Target):
    """Log-likelihood of the completion's tokens given all before them, times the sample's weight.

    With a judge's score as weight, less its mean, the mean over the model's own completions is the derivative of the
    expected score (the score function, Williams 1992). A weight for each token does the same with less noise. The
    batch's fields are ``completion_mask``, and ``token_weight`` or ``weight`` (where there is neither, 1).

    Args:
        temperature: Divides the logits: the likelihood of drawing the completion at this temperature.
    """

    needs = ("completion_mask",)
    reads = frozenset(("completion_mask", "weight", "token_weight"))

    def __init__(self, temperature: float = 1.0) -> None:
        if not (math.isfinite(temperature) and temperature > 0):
            raise InputError(f"model.target=completion: temperature={temperature}; give a positive number")
        self.temperature = temperature

    def check(self, model: nn.Module, sample: Sequence[int]) -> None:
        require_known_logits(model, sample)

    def __call__(self, hidden_BTH: Tensor, head: OutputHead, batch: ReferenceBatch) -> Attributed:
        labels_BT, counted_BT = next_tokens(batch, batch.fields["completion_mask"])
        of_tokens = "token_weight" in batch.fields
        # A token's likelihood stands at the place before it; the first token has none, and is never counted.
        weight_BT = batch.fields["token_weight"].roll(-1, 1) if of_tokens else None
        nats_B = log_likelihood(hidden_BTH, head, labels_BT, counted_BT, self.temperature, weight_BT)
        records = {"num_target_tokens": counted_BT.sum(1)}
        if of_tokens:
            return Attributed(nats_B, {**records, "weight": batch.fields["weight"]})
        records["log_likelihood"] = nats_B.detach().double()
        if "weight" not in batch.fields:
            return Attributed(nats_B, records)
        weight_B = batch.fields["weight"].to(nats_B.device)
        return Attributed(nats_B * weight_B.to(nats_B.dtype), {**records, "weight": weight_B})
