"""One evaluation of one model: takes in batches, and makes the results and the folder. Plain torch, no Trainer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch

from sparc3_pl.data.evaluation_data import NeutralBatch, PromptBatch, UnitBatch, Units, WindowBatch
from sparc3_pl.errors import InputError
from sparc3_pl.evaluation.completion_run import CompletionRun, NeutralRun
from sparc3_pl.evaluation.figures import Results
from sparc3_pl.evaluation.further_text import FurtherText
from sparc3_pl.evaluation.measurement_run import MeasurementRun, Subject, UnitRun
from sparc3_pl.evaluation.pairs import SentencePair
from sparc3_pl.evaluation.perplexity_run import PerplexityRun
from sparc3_pl.evaluation.results import FORMAT, Evaluation
from sparc3_pl.evaluation.rows import CompletionRow
from sparc3_pl.io.formats import Record
from sparc3_pl.model.identity import ModelRecord
from sparc3_pl.runtime.collectives import is_rank_zero
from sparc3_pl.runtime.progress import Done
from sparc3_pl.runtime.timing import timed, timing

if TYPE_CHECKING:
    from sparc3_pl.pruning.plan import PrunePlan

__all__ = ["EvaluatedModel", "EvaluationRun"]

RUNS: tuple[type[MeasurementRun], ...] = (PerplexityRun, CompletionRun, NeutralRun, UnitRun)
"""What is measured, in this order on every rank."""

MOST_KNOWN_TEXT = 0.01
"""Share of a text that may be known from elsewhere: lines such as headings are in many texts."""


@dataclass(frozen=True)
class EvaluatedModel:
    """Which model is evaluated.

    Attributes:
        loaded: The model as it was loaded (as a manifest says it).
        fingerprint: Fingerprint of the weights that are evaluated.
        plan: The plan by which they were edited, if one is known.
        known_prompts: Ids of the evaluation's prompts from which the plan was made.
        known_text: Share of the evaluation's text by which the plan's budget was held; of several texts the largest.
        text_key: The configuration key of that text.
        known_pairs: How many pairs of sentences hold one from which the plan was made.
    """

    loaded: ModelRecord
    fingerprint: str
    plan: PrunePlan | None = None
    known_prompts: frozenset[str] = frozenset()
    known_text: float = 0.0
    text_key: str = "data.text_source"
    known_pairs: int = 0

    @classmethod
    def of(
        cls,
        loaded: ModelRecord,
        fingerprint: str,
        plan: PrunePlan | None,
        subject: Subject,
        units: Sequence[Units] = (),
    ) -> Self:
        """The model, with what of the evaluation's own data its plan was made from.

        Args:
            loaded: The model as it was loaded.
            fingerprint: Fingerprint of the weights that are evaluated.
            plan: The plan by which they were edited, if one is known.
            subject: What is measured; further texts among its measurements are read.
            units: The units of its measurements.
        """
        if plan is None:
            return cls(loaded, fingerprint)
        behaviour, held_back = set(plan.behaviour_samples), set(plan.budget_samples)
        data = subject.data
        shares = {cls.text_key: data.known_text(held_back)}
        measurements = (choice.object for choice in subject.measurements) if held_back else ()
        for text in (one.text for one in measurements if isinstance(one, FurtherText)):
            text.read()
            shares[text.key] = text.known(held_back, data.encoder)
        key = max(shares, key=lambda key: shares[key])
        pairs = (unit for one in units for unit in one.items if isinstance(unit, SentencePair))
        known_pairs = sum(not behaviour.isdisjoint(pair.text_ids) for pair in pairs)
        known_prompts = frozenset(data.known_prompts(plan.behaviour_samples))
        return cls(loaded, fingerprint, plan, known_prompts, shares[key], key, known_pairs)

    @property
    def is_edited_unknown(self) -> bool:
        """Whether the weights are not those that were loaded, and no plan says why."""
        return self.plan is None and self.fingerprint != self.loaded.fingerprint

    def prompts_of_plan(self, prompt_ids: Iterable[str]) -> set[str]:
        """The ids among ``prompt_ids`` of prompts from which the plan was made."""
        return set(self.known_prompts.intersection(prompt_ids))

    def require_held_out(self, prompt_ids: Sequence[str]) -> None:
        """Refuses prompts and pairs that the plan was made from, and text by which its budget was held.

        Raises:
            InputError: for the first of them.
        """
        if overlap := self.prompts_of_plan(prompt_ids):
            raise InputError(
                f"{len(overlap)} of {len(set(prompt_ids))} prompts were used to make the plan (first id: "
                f"{min(overlap)}), so the result would not be held out; choose other prompts (data.partition: "
                "evaluation) or give --allow_overlap"
            )
        if self.known_text > MOST_KNOWN_TEXT:
            raise InputError(
                f"{self.known_text:.0%} of {self.text_key} is text by which the plan's budget was held "
                "(budget_text), so the perplexity would not be held out; give other text or --allow_overlap"
            )

        if self.known_pairs:
            raise InputError(
                f"{self.known_pairs} pairs hold a sentence from which the plan was made, so the figures of pairs would "
                "not be held out; measure the other half (data.pairs_partition: evaluation) or give --allow_overlap"
            )

    def results(self, prompt_ids: Iterable[str], data: Record) -> Results:
        """What ``results.json`` says before anything is measured.

        Args:
            prompt_ids: IDs of all prompts. Nobody knows which of them an unknown edit was made from: ``overlap`` is
                then ``unknown``.
            data: What was read.
        """
        overlap = self.prompts_of_plan(prompt_ids)
        unknown = self.is_edited_unknown
        text = self.known_text if self.known_text > MOST_KNOWN_TEXT else 0.0
        return Results(
            perplexity=None,
            toxicity=None,
            overlap="unknown" if unknown else "allowed" if overlap or text or self.known_pairs else "none",
            num_overlapping_prompts=None if unknown else len(overlap),
            overlapping_text=text,
            num_overlapping_pairs=self.known_pairs,
            model=ModelRecord(**self.loaded, evaluated_fingerprint=self.fingerprint),
            plan=None if self.plan is None else self.plan.summary(),
            data=data,
        )


class EvaluationRun:
    """Measures a model batch by batch, and makes the results and the folder.

    Args:
        evaluated: What the results say of the model.
        measurements: What is measured; the same on every rank.
    """

    def __init__(self, evaluated: EvaluatedModel, measurements: Iterable[MeasurementRun]) -> None:
        self.evaluated, self.measurements = evaluated, tuple(measurements)
        self.evaluation: Evaluation | None = None
        """Results and rows, not yet sealed; on rank 0, once the run is finished."""
        self.written_to: Path | None = None

    @classmethod
    def of(
        cls, evaluated: EvaluatedModel, subject: Subject, output: str | Path | None = None, rank: int = 0
    ) -> EvaluationRun:
        """A run of all that there is to measure; every rank must call this.

        Args:
            evaluated: What the results say of the model.
            subject: What is measured.
            output: The evaluation folder to be, beside which completions are kept during the run; None: nowhere.
            rank: Rank of this process.

        Raises:
            InputError: if a judge fails on a trial sentence.
        """
        runs = [run for kind in RUNS if (run := kind.of(subject)) is not None]
        if output is not None:
            about = {"model": evaluated.fingerprint, "dtype": str(subject.model.dtype)}
            for run in runs:
                run.keep(output, about, rank)
        return cls(evaluated, runs)

    @torch.no_grad()
    def add(self, batch: WindowBatch | PromptBatch | NeutralBatch | UnitBatch) -> Done:
        """Gives one batch to the measurement that it is for.

        Returns:
            What that measurement has done so far on this rank.

        Raises:
            InputError: if a judge or a measurement does not keep to its contract.
        """
        measurement = next(one for one in self.measurements if isinstance(batch, one.takes))
        measurement.add(batch)
        return measurement.done()

    def status(self) -> dict[str, float]:
        """Figures of this rank so far; what has not begun is left out."""
        return {name: value for one in self.measurements for name, value in one.status().items()}

    def finish(
        self,
        data: Record,
        output: str | Path | None = None,
        config: str | None = None,
        overwrite: bool = False,
    ) -> list[CompletionRow]:
        """Gathers the ranks, all of which must call it; rank 0 makes ``evaluation`` and writes it.

        Args:
            data: What was read.
            output: The evaluation folder; None: nothing is written.
            config: The resolved configuration as YAML, to be kept beside the results.
            overwrite: Replace an earlier evaluation there.

        Returns:
            The completions of all ranks.

        Raises:
            InputError: if there was nothing to evaluate, or the folder cannot be written.
        """
        outcomes = [one.finish(data) for one in self.measurements]
        completions = [row for outcome in outcomes for row in outcome.completions]
        windows = [row for outcome in outcomes for row in outcome.windows]
        measurements = [row for outcome in outcomes for row in outcome.measurements]
        neutral = [row for outcome in outcomes for row in outcome.neutral]
        if not (completions or windows or measurements):
            raise InputError("nothing was evaluated; give data.text_source, data.prompts_source or model.measurements")
        if is_rank_zero():
            sections = {name: section for outcome in outcomes for name, section in outcome.results.items()}
            about = self.evaluated.results((row.id for row in (*completions, *neutral)), data)
            results = FORMAT.content(replace(about, **sections, timing=timing()))
            rows = (completions, windows, measurements, neutral)
            self.evaluation = Evaluation(Path(output or "evaluation"), results, *rows)
            if output is not None:
                with timed("writing"):
                    self.written_to = self.evaluation.sealed(config).save(output, overwrite, config=config)
                for one in self.measurements:
                    one.remove_kept()
        return completions
