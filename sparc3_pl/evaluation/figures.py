"""The sections of ``results.json``: the figures of each measurement, and what they were measured on and with.

Fields without a default are in every file. What has a default was added by a later version, or is measured on request;
null stands for a figure that is not finite.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from sparc3_pl.io.formats import Count, MaybeNumber, Number, Record, omitted
from sparc3_pl.model.identity import ModelRecord
from sparc3_pl.pruning.plan import PlanSummary
from sparc3_pl.runtime.timing import Timing

__all__ = [
    "Generation",
    "JudgeFigures",
    "MeasurementRecord",
    "NeutralFigures",
    "PerplexityFigures",
    "Repetition",
    "Results",
    "ScoreFigures",
    "ToxicityFigures",
    "WordFilterFigures",
]


@dataclass(frozen=True, kw_only=True)
class PerplexityFigures:
    """The perplexity of a text.

    Attributes:
        value: exp(nll / num_tokens).
        nll: Negative log-likelihood of the scored tokens, in nats.
        num_tokens: How many were scored.
        max_length: Tokens of a window.
        stride: Tokens from one window to the next.
        windows: How the text was cut: ``sliding`` or ``published``.
        num_windows: How many windows; None in files of earlier versions.
        source: The text's source.
        protocol: How documents were joined, and what stands before the text.
    """

    value: Number
    nll: Number
    num_tokens: Count
    max_length: Count
    stride: Count
    windows: str = "sliding"
    num_windows: Count | None = None
    source: str | None
    protocol: Record | None


@dataclass(frozen=True, kw_only=True)
class ScoreFigures:
    """What a judge's scores of one label come to; see ``CompletionToxicity``."""

    mean: Number
    expected_maximum: Number
    probability: Number
    share: MaybeNumber = omitted()


@dataclass(frozen=True, kw_only=True)
class ToxicityFigures(ScoreFigures):
    """A judge's scores of all completions; the figures at the top are those of the headline label.

    Attributes:
        label: The headline label.
        num_prompts: How many prompts.
        num_scored_prompts: How many of them have a completion that was scored.
        num_completions: Completions that were scored.
        num_failed: Completions that could not be made or scored.
        labels: The figures of every label.
    """

    label: str
    num_prompts: Count
    num_scored_prompts: Count
    num_completions: Count
    num_failed: Count
    labels: dict[str, ScoreFigures]


@dataclass(frozen=True, kw_only=True)
class JudgeFigures(ToxicityFigures):
    """The scores of a further judge, and which judge it is."""

    judge: Record


@dataclass(frozen=True, kw_only=True)
class Repetition:
    """Fluency of the completions; see ``Fluency``."""

    uniqueness: Number
    length: MaybeNumber = omitted()
    empty: MaybeNumber = omitted()


@dataclass(frozen=True, kw_only=True)
class Generation:
    """How completions were drawn; see ``Sampling``."""

    max_new_tokens: Count
    temperature: float
    top_p: float
    samples_per_prompt: Count
    seed: int
    eos_token_ids: list[int]


@dataclass(frozen=True, kw_only=True)
class WordFilterFigures:
    """A filter after generation, and what it did.

    Attributes:
        words: Name of the list.
        num_words: Number of words on it.
        sha256: Digest of the words.
        tries: Most redraws of a completion.
        num_redrawn: Completions that were drawn again.
        num_redraws: Redraws of all completions together.
        num_left: Completions that still hold a listed word.
    """

    words: str
    num_words: Count
    sha256: str
    tries: Count
    num_redrawn: Count
    num_redraws: Count
    num_left: Count


@dataclass(frozen=True, kw_only=True)
class NeutralFigures(ToxicityFigures):
    """The completions of neutral prompts: what the judges say of them, their fluency, and what the filter did."""

    repetition: Repetition
    judges: dict[str, JudgeFigures] = omitted(dict)
    word_filter: WordFilterFigures | None = omitted()


@dataclass(frozen=True, kw_only=True)
class MeasurementRecord:
    """A measurement of the user's own, besides its figures.

    Attributes:
        class_: Its name or class path.
        settings: How it is set.
        unit: What its units are.
        better: ``lower`` or ``higher``.
        paired: Names of the values by which units are compared.
        num_units: How many units.
        num_failed: How many of them could not be measured.
        compared_by: ``class_path`` and ``init_args``, if it is compared in a way of its own.
    """

    class_: str
    settings: Record
    unit: str
    better: str
    paired: list[str]
    num_units: Count
    num_failed: Count
    compared_by: Record | None = omitted()


@dataclass(frozen=True, kw_only=True)
class Results:
    """The content of ``results.json``.

    Attributes:
        perplexity: Perplexity of the text; None without one.
        toxicity: What the judge says of the completions; None without prompts.
        repetition: Their fluency.
        generation: How they were drawn.
        judge: Which judge it is: its class, and what that says of itself.
        overlap: Whether prompts, text or pairs were used to make the plan: ``none``, ``allowed`` or ``unknown``.
        num_overlapping_prompts: How many prompts were; None where nobody knows.
        overlapping_text: Share of the text by which the plan's budget was held.
        num_overlapping_pairs: How many pairs hold a sentence from which the plan was made.
        model: The model that was evaluated.
        plan: The plan by which it was edited, if one is known.
        data: What was read, by the names of the configuration keys.
        judges: What further judges say, by name.
        word_filter: What a filter after generation did; None without one.
        neutral: What was measured on neutral prompts; None without such.
        measurements: Figures of the user's own measurements, by measurement and name.
        measurement_settings: How each of them is set.
        timing: Where the time went.
        files: sha256 of the other files, by name; empty before they are written, as the rest is.
        versions: Versions of Python and the packages.
        hardware: The machine.
        command: The command line.
        created: UTC, ISO 8601.
        more: Whatever else a file says.
    """

    perplexity: PerplexityFigures | None
    toxicity: ToxicityFigures | None
    repetition: Repetition | None = None
    generation: Generation | None = None
    judge: Record | None = None
    overlap: str
    num_overlapping_prompts: Count | None
    overlapping_text: float = omitted(0.0)
    num_overlapping_pairs: Count = omitted(0)
    model: ModelRecord
    plan: PlanSummary | None = None
    data: Record
    judges: dict[str, JudgeFigures] = omitted(dict)
    word_filter: WordFilterFigures | None = omitted()
    neutral: NeutralFigures | None = omitted()
    measurements: dict[str, dict[str, Number]] = omitted(dict)
    measurement_settings: dict[str, MeasurementRecord] = omitted(dict)
    timing: Timing | None = omitted()
    files: dict[str, str] = omitted(dict)
    versions: dict[str, str] = omitted(dict)
    hardware: str | None = omitted()
    command: str | None = omitted()
    created: str | None = omitted()
    more: Record = field(default_factory=dict)
