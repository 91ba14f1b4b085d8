"""Target ``text``: how likely the model finds a text, or what it would say itself at every place of it."""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from sparc3_pl.attribution.likelihood import (
    Drawn,
    log_likelihood,
    next_tokens,
    require_known_logits,
    sample_uniforms,
)
from sparc3_pl.attribution.targets import Attributed, Target
from sparc3_pl.data.batches import ReferenceBatch
from sparc3_pl.errors import InputError
from sparc3_pl.model.logits import OutputHead

__all__ = ["TextLikelihood"]


class TextLikelihood(Target):
    """Log-likelihood of every token of a text after its first, given the text before it.

    With labels drawn from the model, the mean over samples of a squared derivative, divided by the mean number of
    tokens (``num_target_tokens`` of the samples' records), is the diagonal of the Fisher information per token.

    Args:
        labels: ``data``: the text's own tokens. ``model``: at every place a token that is drawn from the model's
            distribution there; the text itself stays what it is.
        seed: Decides, together with a sample's tokens, what is drawn.
    """

    reads = frozenset()

    def __init__(self, labels: Literal["data", "model"] = "data", seed: int = 0) -> None:
        if labels not in ("data", "model"):
            raise InputError(f"model.labels={labels!r} is unknown; give data or model")
        self.labels, self.seed = labels, seed

    def check(self, model: nn.Module, sample: Sequence[int]) -> None:
        require_known_logits(model, sample)

    def __call__(self, hidden_BTH: Tensor, head: OutputHead, batch: ReferenceBatch) -> Attributed:
        labels_BT: Tensor | Drawn
        labels_BT, counted_BT = next_tokens(batch, batch.attention_mask.bool())
        if self.labels == "model":
            labels_BT = Drawn(sample_uniforms(batch.input_ids, batch.attention_mask, self.seed))
        nats_B = log_likelihood(hidden_BTH, head, labels_BT, counted_BT)
        return Attributed(nats_B, {"log_likelihood": nats_B.detach().double(), "num_target_tokens": counted_BT.sum(1)})
