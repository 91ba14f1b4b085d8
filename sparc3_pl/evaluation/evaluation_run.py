"""One evaluation of one model: takes in batches, and makes the results and the folder. Plain torch, no Trainer."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sparc3_pl.data.evaluation_data import PromptBatch, UnitBatch, WindowBatch, WindowSize
from sparc3_pl.errors import InputError
from sparc3_pl.evaluation.completion_run import NO_COMPLETIONS, CompletionRun
from sparc3_pl.evaluation.measurement import Measured, Measurement, checked_rows
from sparc3_pl.evaluation.perplexity import Perplexity, WindowScorer
from sparc3_pl.evaluation.results import Row, write_evaluation
from sparc3_pl.registry import Choice
from sparc3_pl.runtime.collectives import gather_lists, is_rank_zero

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sparc3_pl.data.encoding import Encoder
    from sparc3_pl.pruning.plan import PrunePlan

__all__ = ["EvaluatedModel", "EvaluationRun", "input_device"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluatedModel:
    """Which model is evaluated.

    Attributes:
        loaded: The model as it was loaded (as a manifest says it).
        fingerprint: Of the weights that are evaluated.
        plan: The plan by which they were edited, if one is known.
        known_prompts: Ids of the evaluation's prompts from which the plan was made.
    """

    loaded: dict[str, Any]
    fingerprint: str
    plan: PrunePlan | None = None
    known_prompts: frozenset[str] = frozenset()

    @property
    def is_edited_unknown(self) -> bool:
        """Whether the weights are not those that were loaded, and no plan says why."""
        return self.plan is None and self.fingerprint != self.loaded["fingerprint"]

    def prompts_of_plan(self, prompt_ids: Iterable[str]) -> set[str]:
        """Those prompts from which the plan was made."""
        return set(self.known_prompts.intersection(prompt_ids))

    def figures(self, prompt_ids: Iterable[str]) -> dict[str, Any]:
        """What ``results.json`` says of it. ``overlap`` is ``unknown`` where nobody knows of an edit's prompts."""
        overlap = self.prompts_of_plan(prompt_ids)
        unknown = self.is_edited_unknown
        return {
            "overlap": "unknown" if unknown else "allowed" if overlap else "none",
            "num_overlapping_prompts": None if unknown else len(overlap),
            "model": self.loaded | {"evaluated_fingerprint": self.fingerprint},
            "plan": None if self.plan is None else self.plan.summary(),
        }


class EvaluationRun:
    """Measures a model batch by batch: windows of text, prompts, and units of the user's own measurements.

    Args:
        model: In eval mode, edited if it is to be.
        encoder: Turns texts into the model's token ids.
        evaluated: What the results say of the model.
        window: Size of the text's windows; None if there is no text.
        completions: What completes and judges prompts; None if there are none. The same on every rank.
        measurements: Of the user's own.
        device: Of the sums that the ranks add up.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        encoder: Encoder,
        evaluated: EvaluatedModel,
        *,
        window: WindowSize | None = None,
        completions: CompletionRun | None = None,
        measurements: Iterable[Choice[Measurement]] = (),
        device: torch.device | None = None,
    ) -> None:
        self.model, self.encoder, self.evaluated = model, encoder, evaluated
        self.window, self.completions = window, completions
        self.measurements = {choice.made.name: choice for choice in measurements}
        self.windows: list[Row] = []
        """One for each text window of this rank."""
        self.measured: dict[str, list[Row]] = {name: [] for name in self.measurements}
        """By measurement one for each unit of this rank."""
        self._device, self._scorer = input_device(model), WindowScorer(model)
        self.perplexity = Perplexity().to(device or self._device)
        nothing = torch.zeros(0, dtype=torch.int64, device=self.perplexity.device)
        self.perplexity.update(nll=nothing, num_tokens=nothing)  # a rank without windows takes part like the others
        self.results: dict[str, Any] | None = None
        """On rank 0, once it is finished."""
        self.written_to: Path | None = None

    @torch.no_grad()
    def add(self, batch: WindowBatch | PromptBatch | UnitBatch) -> None:
        """Takes in one batch.

        Raises:
            InputError: if a judge or a measurement does not keep to its contract.
        """
        if isinstance(batch, UnitBatch):
            self._measure(batch)
        elif isinstance(batch, PromptBatch):
            assert self.completions is not None, "there are prompts, but nothing completes them"
            self.completions.add(batch)
        else:
            self._score_windows(batch)

    def _score_windows(self, batch: WindowBatch) -> None:
        tensors = (t.to(self._device) for t in (batch.input_ids, batch.attention_mask, batch.labels))
        nll, num_tokens = self._scorer(*tensors)
        self.perplexity.update(nll=nll, num_tokens=num_tokens)
        for index, value, count in zip(batch.index, nll.tolist(), num_tokens.tolist(), strict=True):
            self.windows.append({"index": index, "nll": value, "num_tokens": count})

    def _measure(self, batch: UnitBatch) -> None:
        choice = self.measurements[batch.measurement]
        rows = choice.made.measure(self.model, self.encoder, batch.items)
        rows = checked_rows(choice.made, rows, len(batch.items))
        of_batch = Measured.of(choice, rows)
        of_batch.figures()  # what cannot be made of rows is said now, not hours later
        of_batch.settings()
        self.measured[batch.measurement] += rows

    def status(self) -> dict[str, float]:
        """Figures of this rank so far; what has not begun is left out."""
        status = {}
        if count := int(self.perplexity.num_tokens):
            mean = float(self.perplexity.nll) / count
            status["perplexity"] = math.exp(mean) if mean < 709 else math.inf
        return status | ({} if self.completions is None else self.completions.status())

    def finish(
        self,
        data: dict[str, Any],
        output: str | Path | None = None,
        config: str | None = None,
        overwrite: bool = False,
    ) -> list[Row]:
        """Gathers the ranks, all of which must call it; rank 0 makes ``results`` and writes them.

        Args:
            data: What was read.
            output: The evaluation folder; None: nothing is written.
            config: The resolved configuration as YAML, to be kept beside the results.
            overwrite: Replace an earlier evaluation there.

        Returns:
            The completions of all ranks, without their token ids.

        Raises:
            InputError: if there was nothing to evaluate, or the folder cannot be written.
        """
        completions = [] if self.completions is None else self.completions.gathered()
        windows = sorted(gather_lists(self.windows), key=lambda row: row["index"])
        measured = [Measured.of(choice, gather_lists(self.measured[n])) for n, choice in self.measurements.items()]
        if not completions and not windows and not any(one.rows for one in measured):
            raise InputError("nothing was evaluated; give data.text_source, data.prompts_source or model.measurements")
        results = {  # metrics are summed over ranks: on every rank
            "perplexity": self._perplexity_figures(data) if windows else None,
            **(NO_COMPLETIONS if self.completions is None else self.completions.figures()),
            **self.evaluated.figures(row["id"] for row in completions),
            "data": data,
        }
        rows = [{key: value for key, value in row.items() if key != "tokens"} for row in completions]
        if is_rank_zero():
            self.results = results | (_measurement_entries(measured) if measured else {})
            if output is not None:
                self.written_to = write_evaluation(
                    output,
                    self.results,
                    completions=rows,
                    windows=windows,
                    measurements=[{"measurement": m.choice.made.name, **row} for m in measured for row in m.rows],
                    config=config,
                    overwrite=overwrite,
                )
                if self.completions is not None:
                    self.completions.remove_kept()
        return rows

    def _perplexity_figures(self, data: dict[str, Any]) -> dict[str, Any]:
        assert self.window is not None
        nll, num_tokens = self.perplexity.totals()
        return {
            "value": float(self.perplexity.compute()),
            "nll": nll,
            "num_tokens": num_tokens,
            "max_length": self.window.max_length,
            "stride": self.window.stride,
            "source": data["text_source"],
            "protocol": data["protocol"],
        }


def _measurement_entries(measured: list[Measured]) -> dict[str, Any]:
    return {
        "measurements": {one.choice.made.name: one.figures() for one in measured},
        "measurement_settings": {one.choice.made.name: one.settings() for one in measured},
    }


def input_device(model: PreTrainedModel) -> torch.device:
    """Where the model wants its inputs."""
    device = model.get_input_embeddings().weight.device
    return model.device if device.type == "meta" else device
