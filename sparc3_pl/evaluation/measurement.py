"""What else is measured of a model before and after an edit: a measurement of the user's own.

A measurement has units (pairs, questions, sentences), measures a batch of them, and makes figures of what it measured.
The evaluation shares the units out over the ranks, writes rows and figures beside its own, and ``compare`` pairs the
rows of two evaluations by unit.
"""

from __future__ import annotations

import json
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from sparc3_pl.errors import InputError
from sparc3_pl.evaluation.figures import MeasurementRecord
from sparc3_pl.io.formats import Record
from sparc3_pl.io.provenance import is_secret_name
from sparc3_pl.registry import Choice, Registry, Spec
from sparc3_pl.statistics.paired import PairedChange, paired_change

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sparc3_pl.data.encoding import Encoder

__all__ = [
    "MEASUREMENTS",
    "TEXT",
    "TEXT_FIGURE",
    "Measured",
    "Measurement",
    "changes_of",
    "checked_rows",
    "chosen_measurements",
    "further_perplexities",
]

log = logging.getLogger(__name__)

Row = Record
"""What was measured of one unit: its id (``unit``), and values by name."""
T = TypeVar("T")

TEXT, TEXT_FIGURE = "text ", "perplexity"
"""Results name the measurement of a further text after the text, with this before its name, and its figure so."""
RESERVED = ("perplexity", "toxicity", "repetition", "completions")
"""Names of what every evaluation measures."""


class Measurement(ABC):
    """What is measured of a model. Arguments are the fields of a dataclass.

    Attributes:
        name: How results, tables and logs name it.
        unit: What its units are, in the plural.
        better: Which change is an improvement.
        batch_size: Units that ``measure`` is given at once.
        paired: Names of the values by which ``compare`` pairs the units of two evaluations; None: all numbers that
            every row has.
    """

    name: str
    unit: str = "units"
    better: Literal["lower", "higher"] = "lower"
    batch_size: int = 8
    paired: Sequence[str] | None = None

    @abstractmethod
    def units(self, encoder: Encoder) -> Sequence[Any]:
        """What is measured, in an order that does not change. Rank 0 alone is asked; the others are told.

        Args:
            encoder: Turns texts into the model's token ids.
        """

    @abstractmethod
    def measure(self, model: PreTrainedModel, encoder: Encoder, units: Sequence[Any]) -> list[Row]:
        """Measures a batch of units, without gradients unless it turns them on.

        Returns:
            A row for every unit: ``unit``, its id (a text or a whole number that no other unit has), and values by
            name: numbers, truth values, texts. The row of a unit that could not be measured says why: ``failed``.
        """

    def figures(self, rows: Sequence[Row]) -> dict[str, float]:
        """Figures by name, from the rows of all ranks, those of failed units left out; by default means over units."""
        return {name: math.fsum(row[name] for row in rows) / len(rows) for name in paired_names(self, rows)}

    def compare(
        self, before: Sequence[Row], after: Sequence[Row], *, seed: int, num_resamples: int
    ) -> Mapping[str, PairedChange]:
        """The changes of what was measured, by the names under which ``compare`` and ``report`` show them.

        By default the change of each paired value's mean over units, with a bootstrap interval and a permutation test.
        A measurement that is compared in another way says so here. ``compare`` then makes the object again, from the
        arguments that the evaluation was given.

        Args:
            before: Rows of the units that were measured on both sides.
            after: Rows of the same units in the same order.
            seed: Seed for resampling.
            num_resamples: How many resamples.
        """
        names, options = paired_names(self, before), {"seed": seed, "num_resamples": num_resamples}
        return _paired_changes(before, after, names, self.better, options)

    def describe(self) -> Record:
        """Its settings, which must be equal in evaluations that are compared."""
        return asdict(self) if is_dataclass(self) and not isinstance(self, type) else {}


MEASUREMENTS: Registry[Measurement] = Registry(
    "model.measurements",
    Measurement,
    {
        "pairs": "sparc3_pl.evaluation.pairs.SentencePairs",
        "task": "sparc3_pl.evaluation.tasks.TaskAccuracy",
        "text": "sparc3_pl.evaluation.further_text.FurtherText",
    },
)


def chosen_measurements(specs: Sequence[Spec | Measurement]) -> tuple[Choice[Measurement], ...]:
    """The measurements that ``specs`` name.

    Raises:
        InputError: if one is not there or its arguments do not fit, has no name of its own, or takes no units.
    """
    choices = tuple(MEASUREMENTS.choose(spec) for spec in specs)
    names: list[str] = []
    for choice in choices:
        name, size = getattr(choice.object, "name", None), choice.object.batch_size
        if not isinstance(name, str) or not name:
            raise InputError(f"model.measurements: {choice.name} has no name; give the class an attribute `name`")
        if name in names or name in RESERVED:
            raise InputError(
                f"model.measurements: the name {name!r} of {choice.name} is taken; give it another, and "
                "name what is measured (in model.tasks, too) once"
            )
        if is_secret_name(name):
            raise InputError(f"model.measurements: {name!r} would be left out of results as a secret; rename it")
        if choice.object.better not in ("lower", "higher"):
            raise InputError(f"model.measurements: {name}.better={choice.object.better!r}; give 'lower' or 'higher'")
        if size < 1:
            raise InputError(f"model.measurements: {name}.batch_size={size}; give at least 1")
        try:
            json.dumps(settings_of(choice))
        except (TypeError, ValueError) as error:
            raise InputError(f"model.measurements: the settings of {name} are no JSON ({error})") from None
        names.append(name)
    return choices


def further_perplexities(measurements: Mapping[str, Mapping[str, T]]) -> dict[str, T]:
    """What is known of the perplexity of further texts (``data.further_texts``), by their names.

    Args:
        measurements: Values by measurement and figure, such as the changes of a comparison.
    """
    return {
        name.removeprefix(TEXT): figures[TEXT_FIGURE]
        for name, figures in measurements.items()
        if name.startswith(TEXT) and TEXT_FIGURE in figures
    }


def settings_of(choice: Choice[Measurement]) -> Record:
    """The measurement's settings, without its batch size, which changes nothing that it measures."""
    settings = choice.arguments | choice.object.describe()
    return {name: value for name, value in settings.items() if name != "batch_size"}


def checked_rows(measurement: Measurement, rows: Any, num_units: int) -> list[Row]:
    """The rows of one batch. One that holds a NaN or an infinity has failed: that is no measured value.

    Raises:
        InputError: if they are not one JSON object for each of ``num_units`` units, with the unit's id.
    """
    name = measurement.name
    if not isinstance(rows, Sequence) or len(rows) != num_units:
        count = len(rows) if isinstance(rows, Sequence) else type(rows).__name__
        raise InputError(
            f"measurement {name}: measure() returned {count} for {num_units} {measurement.unit}; it must return a list "
            "with one row for each"
        )
    result = []
    for row in rows:
        unit = row.get("unit") if isinstance(row, Mapping) else None
        if not isinstance(unit, str | int):
            raise InputError(f"measurement {name}: a row has no unit id ({row!r}); give each a text or a number: unit")
        if "measurement" in row:
            raise InputError(f"measurement {name}: the row of unit {unit!r} has a value `measurement`; rename it")
        try:
            row = json.loads(json.dumps(dict(row)))
        except (TypeError, ValueError) as error:
            raise InputError(f"measurement {name}: the row of unit {unit!r} is no JSON ({error})") from error
        odd = [key for key, value in row.items() if isinstance(value, float) and not math.isfinite(value)]
        if odd and row.get("failed") is None:
            row = {"unit": unit, "failed": f"{odd[0]} is {row[odd[0]]}"}
            log.warning("measurement %s: unit %r failed: %s", name, unit, row["failed"])
        result.append(row)
    return result


def paired_names(measurement: Measurement, rows: Sequence[Row]) -> list[str]:
    """Names of the values that every row has as a number, or those of them that the measurement says.

    Raises:
        InputError: if a value that the measurement says is no number in some row.
    """
    if not rows:
        return []
    values = [key for key in rows[0] if key not in ("unit", "failed")]
    common = [key for key in values if all(isinstance(row.get(key), int | float) for row in rows)]
    if measurement.paired is None:
        return common
    if absent := [key for key in measurement.paired if key not in common]:
        raise InputError(
            f"measurement {measurement.name}: {absent[0]!r} is no number in every row; leave it out of `paired`, or "
            "let the row of a unit that could not be measured say why: failed"
        )
    return list(measurement.paired)


def changes_of(
    settings: MeasurementRecord, before: Sequence[Row], after: Sequence[Row], *, seed: int, num_resamples: int
) -> Mapping[str, PairedChange]:
    """The changes of a measurement that ``results.json`` tells of; see ``Measurement.compare``.

    Args:
        settings: What ``Measured.settings`` has written. Only a measurement with a comparison of its own is made again.
        before: Rows of the units that were measured on both sides.
        after: Rows of the same units in the same order.
        seed: Seed for resampling.
        num_resamples: How many resamples.

    Raises:
        InputError: if the class must be asked but may not be imported, or does not keep to its contract.
    """
    options = {"seed": seed, "num_resamples": num_resamples}
    if (own := settings.compared_by) is None:
        return _paired_changes(before, after, settings.paired, settings.better, options)
    measurement = MEASUREMENTS.from_file(own["class_path"], own["init_args"])
    changes = measurement.compare(before, after, **options)
    if not isinstance(changes, Mapping) or not all(isinstance(change, PairedChange) for change in changes.values()):
        raise InputError(f"measurement {measurement.name}: compare() must return PairedChange by name")
    return changes


def _paired_changes(
    before: Sequence[Row], after: Sequence[Row], names: Sequence[str], better: str, options: Mapping[str, int]
) -> dict[str, PairedChange]:
    sides = [{name: np.array([row[name] for row in rows], np.float64) for name in names} for rows in (before, after)]
    return {
        name: paired_change(sides[0][name], sides[1][name], lower_is_better=better == "lower", **options)
        for name in names
    }


@dataclass(frozen=True)
class Measured:
    """What a measurement made of its units.

    Attributes:
        choice: The measurement.
        rows: One for each unit.
    """

    choice: Choice[Measurement]
    rows: list[Row]

    @classmethod
    def of(cls, choice: Choice[Measurement], rows: Sequence[Row]) -> Measured:
        """The rows of all ranks, in the order of their units' ids.

        Raises:
            InputError: if two units have the same id.
        """
        units = [row["unit"] for row in rows]
        if len(set(units)) != len(units):
            twice = next(unit for unit in units if units.count(unit) > 1)
            raise InputError(f"measurement {choice.object.name}: two rows are of unit {twice!r}; give each its own id")
        return cls(choice, sorted(rows, key=lambda row: (isinstance(row["unit"], str), row["unit"])))

    @property
    def measured(self) -> list[Row]:
        """The rows of units that did not fail."""
        return [row for row in self.rows if row.get("failed") is None]

    def figures(self) -> dict[str, float]:
        """The measurement's figures by name; empty if every unit failed."""
        return {k: float(v) for k, v in self.choice.object.figures(self.measured).items()} if self.measured else {}

    def settings(self) -> MeasurementRecord:
        """What ``results.json`` says of it besides its figures: which class, how set, and what ``compare`` needs."""
        measurement = self.choice.object
        own = {"class_path": self.choice.name, "init_args": self.choice.arguments or measurement.describe()}
        return MeasurementRecord(
            class_=self.choice.name,
            settings=settings_of(self.choice),
            unit=measurement.unit,
            better=measurement.better,
            paired=paired_names(measurement, self.measured),
            num_units=len(self.rows),
            num_failed=len(self.rows) - len(self.measured),
            compared_by=None if type(measurement).compare is Measurement.compare else own,
        )
