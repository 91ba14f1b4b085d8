"""A measurement as a user would write it, in a module of its own."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sparc3_pl.evaluation.measurement import Measurement


@dataclass(frozen=True)
class LogitDifference(Measurement):
    """Logit of the token ``answer`` less that of the token ``foil`` after each prompt."""

    prompts: Sequence[str] = ()
    answer: int = 4
    foil: int = 5
    name = "logit_difference"
    unit = "pairs"
    better = "higher"
    batch_size = 3

    def units(self, encoder: Any) -> list[tuple[str, list[int]]]:
        return [(f"pair {number:02}", encoder(prompt)) for number, prompt in enumerate(self.prompts)]

    def measure(self, model: Any, encoder: Any, units: Sequence[tuple[str, list[int]]]) -> list[dict[str, Any]]:
        rows = []
        for unit, ids in units:
            logits = model(torch.tensor([ids], device=model.device)).logits[0, -1]
            difference = float(logits[self.answer] - logits[self.foil])
            rows.append({"unit": unit, "difference": difference, "correct": difference > 0, "num_tokens": len(ids)})
        return rows

    def figures(self, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
        return {**super().figures(rows), "least": min(row["difference"] for row in rows)}

    paired = ("difference", "correct")
