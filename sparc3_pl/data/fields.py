"""What a record holds beside its text, for a target or a method: a completion, a weight, a label, a pair."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import numpy as np

from sparc3_pl.data.local_files import Cell
from sparc3_pl.data.sources import get_field, text_id
from sparc3_pl.errors import InputError
from sparc3_pl.statistics.advantages import others_mean

__all__ = [
    "FIELD_KEYS",
    "Baseline",
    "RecordFields",
    "TextRecord",
    "Unequal",
    "Values",
    "check_unequal",
    "checked_text",
    "less_baseline",
]

Baseline = Literal["mean", "prompt", "prefix", "none"]
Unequal = Literal["drop", "error"]
"""What to do with a record whose text and counterfactual, or answer and foil, cannot be compared."""

FIELD_KEYS = {
    "completion_mask": "data.completion_field",
    "weight": "data.weight_field",
    "token_weight": "data.prefix_field",
    "label": "data.label_field",
    "answer": "data.answer_field",
    "foil": "data.foil_field",
    "counterfactual_ids": "data.counterfactual_field",
}
"""The configuration key that each field of a batch comes from."""


@dataclass(frozen=True)
class Values:
    """The values that a record holds beside its text; None where no field was asked for.

    Attributes:
        completion: What follows the text; a text or token ids.
        weight: Weight of the record, such as a judge's score of the completion.
        prefix: The weights that the completion would have if it were cut after each of its tokens.
        label: The text's label, a number.
        answer: What the model should say next: a text, of which the first token counts, or a token id.
        foil: What it should not say, likewise.
        counterfactual: The text with the decisive words exchanged.
    """

    completion: str | list[int] | None = None
    weight: float | None = None
    prefix: list[float] | None = None
    label: float | None = None
    answer: str | int | None = None
    foil: str | int | None = None
    counterfactual: str | list[int] | None = None

    def identity(self, text: str | list[int]) -> str:
        """The identity of a text with these values; of a text without any, its ``text_id``."""
        values = {name: value for name, value in vars(self).items() if value is not None}
        return text_id(repr((text, sorted(values.items())))) if values else text_id(text)


@dataclass(frozen=True)
class TextRecord:
    """A text, or the token ids of one, and what its record holds beside it.

    Attributes:
        text: The text or its token ids.
        values: What the record holds beside it.
        half_of: The text that decides the half of the record; None: ``text``.
    """

    text: str | list[int]
    values: Values
    half_of: str | list[int] | None = None


@dataclass(frozen=True)
class RecordFields:
    """The fields of a record that hold the values, dots for nesting; the attributes are those of ``Values``."""

    completion: str | None = None
    weight: str | None = None
    prefix: str | None = None
    label: str | None = None
    answer: str | None = None
    foil: str | None = None
    counterfactual: str | None = None

    @property
    def given(self) -> dict[str, str]:
        """The fields that are read, by configuration key (without ``data.``)."""
        return {f"{name}_field": value for name, value in vars(self).items() if value is not None}

    def values(self, record: dict[str, Any]) -> Values | None:
        """The values of a record; None if any of them is null.

        Raises:
            MissingField: If there is no such field.
            InputError: If a value is not of the kind that belongs there.
        """
        values: dict[str, Any] = {}
        for item in fields(self):
            field = getattr(self, item.name)
            if field is None:
                continue
            key = f"data.{item.name}_field"
            value = get_field(record, field, key)
            values[item.name] = None if value is None else _KINDS[item.name](value, f"{key}: {field!r}")
        return None if None in values.values() else Values(**values)


def check_unequal(unequal: str) -> None:
    """Refuses any word but ``drop`` and ``error``.

    Raises:
        InputError: If it is another one.
    """
    if unequal not in get_args(Unequal):
        raise InputError(f"data.unequal={unequal!r} is not known; use {' or '.join(get_args(Unequal))}")


def checked_text(value: Any, where: str) -> str | list[int]:
    """A text, or a list of token ids.

    Raises:
        InputError: If it is neither; ``where`` says what it is the value of.
    """
    if isinstance(value, str):
        return str(value)  # of a subclass, too
    if not isinstance(value, list):
        raise InputError(f"{where} holds {type(value).__name__}, not text; name another field")
    if not all(type(token) is int and token >= 0 for token in value):
        raise InputError(f"{where} holds a list that is not one of token ids (integers from 0 on); name another field")
    return value


def _number(value: Any, where: str) -> float | None:
    if isinstance(value, Cell):
        value = value.like(0.0)
        if value is None:
            return None
    if isinstance(value, bool | int | float) and math.isfinite(value):
        return float(value)
    raise InputError(f"{where} holds {str(value)[:60]!r}, not a finite number; name another field")


def _numbers(value: Any, where: str) -> list[float]:
    if isinstance(value, list) and all(type(one) in (int, float) and math.isfinite(one) for one in value):
        return [float(one) for one in value]
    raise InputError(f"{where} holds {str(value)[:60]!r}, not a list of finite numbers; name another field")


def _answer(value: Any, where: str) -> str | int:
    if isinstance(value, str) and value:
        return str(value)
    if type(value) is int and value >= 0:
        return value
    raise InputError(f"{where} holds {str(value)[:60]!r}, neither text nor a token id; name another field")


_KINDS: dict[str, Callable[[Any, str], Any]] = {
    "completion": checked_text,
    "weight": _number,
    "prefix": _numbers,
    "label": _number,
    "answer": _answer,
    "foil": _answer,
    "counterfactual": checked_text,
}


def less_baseline(weights: Sequence[float], prompts: Sequence[str], baseline: Baseline) -> list[float | None]:
    """Weights less what is expected of them, so that only what is better or worse than that counts.

    Args:
        weights: The weight of each completion.
        prompts: The prompt that each completes.
        baseline: ``mean`` takes off the mean of all weights, ``prompt`` the mean of the prompt's *other* completions,
            ``none`` nothing. (``prefix`` takes something else off for each token: see ``token_advantages``.)

    Returns:
        The weights; None for the only completion of a prompt where ``prompt`` asks for others.

    Raises:
        InputError: If the baseline is unknown.
    """
    if baseline not in get_args(Baseline):
        raise InputError(f"data.weight_baseline={baseline!r} is unknown; give {', '.join(get_args(Baseline))}")
    if baseline in ("none", "prefix"):
        return list(weights)
    if baseline == "mean":
        mean = math.fsum(weights) / max(1, len(weights))
        return [weight - mean for weight in weights]
    counts = Counter(prompts)
    others = others_mean(np.asarray(weights, dtype=np.float64), prompts).tolist() if weights else []
    return [
        weight - other if counts[prompt] > 1 else None
        for weight, other, prompt in zip(weights, others, prompts, strict=True)
    ]
