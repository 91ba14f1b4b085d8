"""Target ``answer``: by how much the model prefers the right answer."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sparc3_pl.attribution.likelihood import require_known_logits
from sparc3_pl.attribution.targets import Attributed, Target, last_hidden
from sparc3_pl.data.batches import ReferenceBatch
from sparc3_pl.model.logits import OutputHead

__all__ = ["AnswerLogit"]


class AnswerLogit(Target):
    """The answer's logit less the foil's after the sample's last real token; the answer's alone where there is no foil.

    The logits are the model's own, with whatever scaling or soft-cap it has. The batch's fields are ``answer`` and
    ``foil`` (token ids; a foil of -1, or no such field: none).
    """

    needs = ("answer",)
    reads = frozenset(("answer", "foil"))

    def check(self, model: nn.Module, sample: Sequence[int]) -> None:
        require_known_logits(model, sample)

    def __call__(self, hidden_BTH: Tensor, head: OutputHead, batch: ReferenceBatch) -> Attributed:
        logits_BV = head.logits(last_hidden(hidden_BTH, batch.attention_mask))[:, 0]
        answer_B = batch.fields["answer"].to(logits_BV.device)
        foil_B = batch.fields.get("foil", torch.full_like(answer_B, -1)).to(logits_BV.device)
        answer_logit_B, foil_logit_B = (
            logits_BV.gather(1, token_B.clamp(min=0)[:, None])[:, 0] for token_B in (answer_B, foil_B)
        )
        value_B = answer_logit_B - foil_logit_B.where(foil_B >= 0, 0.0)
        records = {"logit": answer_logit_B, "difference": value_B}
        return Attributed(value_B, {name: values.detach().double() for name, values in records.items()})
