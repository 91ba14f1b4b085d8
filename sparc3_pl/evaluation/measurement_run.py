"""What each measurement does during an evaluation: it takes in batches, and makes its part of the results."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from sparc3_pl.data.evaluation_data import UnitBatch, Units
from sparc3_pl.evaluation.measurement import Measured, Measurement, Row, checked_rows
from sparc3_pl.evaluation.rows import CompletionRow, WindowRow
from sparc3_pl.io.formats import Record
from sparc3_pl.registry import Choice
from sparc3_pl.runtime.collectives import from_rank_zero, gather_lists
from sparc3_pl.runtime.progress import Done
from sparc3_pl.runtime.timing import timed

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from sparc3_pl.data.encoding import Encoder
    from sparc3_pl.data.evaluation_data import EvaluationData, WindowSize
    from sparc3_pl.evaluation.settings import EvaluationSettings

__all__ = ["MeasurementRun", "Outcome", "Subject", "UnitRun", "units_of"]


@dataclass(frozen=True)
class Subject:
    """What is measured: a loaded model, on what, and how.

    Attributes:
        model: The model in eval mode, edited if it is to be.
        encoder: Turns texts into the model's token ids.
        settings: How text is read, and how completions are drawn and judged.
        data: Text and prompts; they have been read.
        window: Size of the text's windows; None without text.
        measurements: The user's own.
        device: Device of the sums that the ranks add up; None: the model's.
    """

    model: PreTrainedModel
    encoder: Encoder
    settings: EvaluationSettings
    data: EvaluationData
    window: WindowSize | None = None
    measurements: tuple[Choice[Measurement], ...] = ()
    device: torch.device | None = None


@dataclass(frozen=True)
class Outcome:
    """What a measurement has made, over all ranks.

    Attributes:
        results: Its fields of ``Results``.
        completions: Lines of ``completions.jsonl``.
        windows: Lines of ``windows.jsonl``.
        measurements: Lines of ``measurements.jsonl``.
        neutral: Lines of ``neutral.jsonl``.
    """

    results: dict[str, Any]
    completions: list[CompletionRow] = field(default_factory=list)
    windows: list[WindowRow] = field(default_factory=list)
    measurements: list[Row] = field(default_factory=list)
    neutral: list[CompletionRow] = field(default_factory=list)


class MeasurementRun(ABC):
    """One measurement in one evaluation, on one rank; every rank makes one, also one that will get no batch.

    A user's ``Measurement`` is a pure function of its rows, and ``UnitRun`` runs it. Perplexity and completions have
    runs of their own. The figures of both are sums that grow batch by batch and are then added up over the ranks:
    made of gathered rows, they would differ in their last bits. Completions are moreover several for each prompt,
    judged, and kept during the run.

    Attributes:
        takes: The batches that are its own.
    """

    takes: type

    @classmethod
    @abstractmethod
    def of(cls, subject: Subject) -> Self | None:
        """The run on a subject; None if the subject has nothing for it, which is so on all ranks or on none."""

    def keep(self, output: str | Path, about: Mapping[str, Any], rank: int) -> None:  # noqa: B027 (most keep nothing)
        """Keeps beside ``output`` what would be lost if the run were interrupted, until ``remove_kept``.

        All ranks must call it. What an earlier run has left there is taken up.

        Args:
            output: The evaluation folder to be.
            about: What the results depend on besides the settings: the weights and their precision.
            rank: Rank of this process.
        """

    @abstractmethod
    def add(self, batch: Any) -> None:
        """Takes in one batch."""

    @abstractmethod
    def finish(self, data: Record) -> Outcome:
        """Gathers the ranks, all of which must call it.

        Args:
            data: What was read, as ``EvaluationData.describe()`` says it.
        """

    @abstractmethod
    def done(self) -> Done:
        """What this rank has done, after a batch."""

    def status(self) -> dict[str, float]:
        """Figures of this rank so far; nothing before it has begun."""
        return {}

    def remove_kept(self) -> None:  # noqa: B027 (most keep nothing)
        """Deletes what was kept in case the run is interrupted: the results are written."""


class UnitRun(MeasurementRun):
    """Runs the user's own measurements, unit by unit.

    Args:
        model: The model in eval mode, edited if it is to be.
        encoder: Turns texts into the model's token ids.
        measurements: The user's own.
    """

    takes = UnitBatch

    def __init__(self, model: PreTrainedModel, encoder: Encoder, measurements: Iterable[Choice[Measurement]]) -> None:
        self.model, self.encoder = model, encoder
        self.measurements = {choice.object.name: choice for choice in measurements}
        self.rows: dict[str, list[Row]] = {name: [] for name in self.measurements}
        """One row for each unit of this rank, by measurement."""
        self._current = ""

    @classmethod
    def of(cls, subject: Subject) -> Self | None:
        return cls(subject.model, subject.encoder, subject.measurements) if subject.measurements else None

    def add(self, batch: UnitBatch) -> None:
        """Measures one batch of units.

        Raises:
            InputError: if the measurement does not keep to its contract.
        """
        choice = self.measurements[batch.measurement]
        with timed(batch.measurement) as now:
            rows = choice.object.measure(self.model, self.encoder, batch.items)
            now.did(samples=len(batch.items))
        rows = checked_rows(choice.object, rows, len(batch.items))
        of_batch = Measured.of(choice, rows)
        of_batch.figures()  # what cannot be made of rows is said now, not hours later
        of_batch.settings()
        self.rows[batch.measurement] += rows
        self._current = batch.measurement

    def done(self) -> Done:
        return Done(f"units of {self._current}", len(self.rows[self._current]))

    def finish(self, data: Record) -> Outcome:
        """Figures, settings and rows of all measurements."""
        measured = [Measured.of(choice, gather_lists(self.rows[name])) for name, choice in self.measurements.items()]
        results = {
            "measurements": {one.choice.object.name: one.figures() for one in measured},
            "measurement_settings": {one.choice.object.name: one.settings() for one in measured},
        }
        rows = [{"measurement": one.choice.object.name, **row} for one in measured for row in one.rows]
        return Outcome(results if measured else {}, measurements=rows)


def units_of(measurements: Iterable[Choice[Measurement]], encoder: Encoder) -> list[Units]:
    """The units of measurements, which rank 0 reads for all ranks.

    Args:
        measurements: The user's own.
        encoder: Turns texts into the model's token ids.
    """
    return [
        Units(one.name, from_rank_zero(lambda one=one: list(one.units(encoder))), one.batch_size)
        for one in (choice.object for choice in measurements)
    ]
