"""The effects of edits: evaluations before and after an edit, paired, as tables, pictures and texts.

A comparison belongs to the two evaluations whose digests it names, whatever the place and name of their folders. Edits
that were measured against the same evaluation of the unedited model are one experiment.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from os.path import commonpath
from pathlib import Path
from typing import Literal, Protocol, TypeVar

from sparc3_pl.document.blocks import (
    Block,
    Cell,
    Folded,
    Number,
    Numbers,
    Picture,
    SideBySide,
    Table,
    Text,
    TextPair,
    better_worse,
    count,
    from_to,
    interval,
    p_value,
    with_relative,
)
from sparc3_pl.errors import InputError
from sparc3_pl.evaluation.compare import Comparison, changed_completions, compare_evaluations
from sparc3_pl.evaluation.figures import WordFilterFigures
from sparc3_pl.evaluation.measurement import TEXT, further_perplexities
from sparc3_pl.evaluation.results import Evaluation, main_label
from sparc3_pl.evaluation.rows import FLUENCY, CompletionRow
from sparc3_pl.pruning.plan import PlanSummary, PrunePlan
from sparc3_pl.report.collect import Inputs
from sparc3_pl.statistics.paired import LEAST_UNITS, PairedChange, RatioChange

__all__ = [
    "Effect",
    "by_experiment",
    "completions",
    "dose_pictures",
    "effect_table",
    "effects",
    "fluency_table",
    "gains_table",
    "headline",
    "judge_table",
    "largest_within",
    "measurement_table",
    "neutral_table",
    "scale_of",
    "title_of",
]

BOUND = 0.01
"""Rise of perplexity that counts as small where no experiment names a bound."""
WORD_FILTER = "word filter"
"""What stands for a control where a filter after generation was measured."""
MOST_PAIRS = 12
"""Number of completions to show per direction."""
_OFFENSIVE = "May be offensive."


class Edit(Protocol):
    """A measured edit, as ``largest_within`` needs it."""

    @property
    def control(self) -> str | None:
        """The name of the control if the edit is one, or None."""

    @property
    def dose(self) -> tuple[int, float]:
        """How far it goes, to compare with others: edited components, and of equally many the scale of their gains."""

    @property
    def comparison(self) -> Comparison:
        """The comparison with the unedited model."""


E = TypeVar("E", bound=Edit)


def largest_within(edits: Iterable[E], bound: float) -> E | None:
    """The largest edit (no control) that raises perplexity by at most ``bound``; None if there is none.

    An edit without a measured perplexity is within no bound.
    """
    rises = ((edit, edit.comparison.rise) for edit in edits if edit.control is None)
    within = [edit for edit, rise in rises if rise is not None and rise <= bound]
    return max(within, key=lambda edit: edit.dose, default=None)


def scale_of(plan: PrunePlan | PlanSummary | None) -> float:
    """How far along the steps the gains of a plan go; 0 for any other edit, or where no plan is known."""
    return 0.0 if plan is None or plan.gains is None else plan.gains.scale


@dataclass(frozen=True)
class Effect:
    """One edit, measured against the unedited model.

    Attributes:
        name: Name of the evaluation after the edit (or of the comparison).
        comparison: The comparison with the evaluation of the unedited model.
        plan: Summary of the plan, from the evaluation; None if the evaluation is not among the inputs, or names none.
        experiment: Name of the evaluation of the unedited model; edits with the same one belong together.
        bound: Rise of perplexity that the experiment calls small.
        arm: The arm of the experiment that it is of; None: its own settings, or no experiment says.
        before: The evaluation of the unedited model, if it is among the inputs.
        after: The evaluation of the edited model, likewise.
    """

    name: str
    comparison: Comparison
    plan: PlanSummary | None
    experiment: str
    bound: float = BOUND
    arm: str | None = None
    before: Evaluation | None = None
    after: Evaluation | None = None

    @property
    def control(self) -> str | None:
        """The name of the control if the edit is one, or None. A word filter after generation is none of our edits."""
        if self.word_filter is not None:
            return WORD_FILTER
        return None if self.plan is None else self.plan.control

    @property
    def word_filter(self) -> WordFilterFigures | None:
        """What a word filter after generation did, if that is all that was done."""
        return None if self.after is None or self.plan is not None else self.after.figures.word_filter

    @property
    def size(self) -> int | None:
        """Number of edited components; None if it is not known."""
        return None if self.plan is None else self.plan.size or None

    @property
    def dose(self) -> tuple[int, float]:
        """How far it goes: edited components, and the scale of gains, which are equally many for all budgets."""
        return self.size or 0, scale_of(self.plan)

    @property
    def label(self) -> str:
        """How large the edit is, to stand at its point: a number of components, or the budget or scale of gains."""
        if self.word_filter is not None:
            return WORD_FILTER
        gains = None if self.plan is None else self.plan.gains
        if gains is None:
            return str(count(self.size))
        return f"scale {gains.scale:.3g}" if gains.budget is None else f"{100 * gains.budget:g} %"

    @property
    def unit(self) -> str:
        """``neurons``, ``weights``, ``neurons and channels``."""
        granularity = "neuron" if self.plan is None else self.plan.granularity
        return " and ".join(f"{kind}s" for kind in granularity.split("+"))

    @property
    def toxicity(self) -> PairedChange | None:
        """The change of the mean score of the main label; None if completions were not compared."""
        labels = self.comparison.toxicity
        return labels[main_label(labels)]["mean"] if labels else None

    @property
    def further_texts(self) -> dict[str, PairedChange]:
        """The changes of the perplexity of further texts, by their names."""
        return further_perplexities(self.comparison.measurements)


def effects(inputs: Inputs) -> tuple[list[Effect], list[str]]:
    """All measured edits, and the reasons why some could not be compared.

    Experiments are in the order of the inputs; within one, the smallest edit is first and controls are last.
    """
    names = {ev.digest: name for name, ev in inputs.evaluations.items()}

    def effect(name: str, comparison: Comparison, before: Evaluation | None, after: Evaluation | None) -> Effect:
        experiment = comparison.before if before is None else names[before.digest]
        plan = None if after is None else after.figures.plan
        return Effect(name, comparison, plan, experiment, before=before, after=after)

    effects, notes = [], []
    pairs, digests = set(), set()
    for name, comparison in inputs.comparisons.items():
        before, after = (
            next((ev for ev in inputs.evaluations.values() if _is_of(ev, comparison, side)), None)
            for side in ("before", "after")
        )
        sides = ((comparison.before, before), (comparison.after, after))
        pair = tuple(place if ev is None else ev.digest for place, ev in sides)
        if pair not in pairs:  # a copy of the same comparison adds nothing
            pairs.add(pair)
            digests.add(pair[1])
            effects.append(effect(names.get(pair[1], name), comparison, before, after))
    for name, after in inputs.evaluations.items():
        if after.is_plain or after.digest in digests:
            continue
        try:
            before, comparison = _compared(inputs, after)
        except InputError as error:
            notes.append(f"{name}: {error}")
            continue
        digests.add(after.digest)
        effects.append(effect(name, comparison, before, after))
    bounds = {name: _bound(inputs, group) for name, group in by_experiment(effects).items()}
    effects = [replace(effect, bound=bounds[effect.experiment], arm=_arm(inputs, effect)) for effect in effects]
    order = {experiment: place for place, experiment in enumerate(dict.fromkeys(e.experiment for e in effects))}
    its_arms = [outcome.arm for summary in inputs.experiments.values() for outcome in summary.outcomes]
    arms = {arm: place for place, arm in enumerate(dict.fromkeys([None, *its_arms]))}
    effects.sort(key=lambda e: (order[e.experiment], arms[e.arm], e.control is not None, e.control or "", e.dose))
    return effects, notes


def by_experiment(all_effects: Sequence[Effect]) -> dict[str, list[Effect]]:
    """The edits of each experiment, by its name."""
    groups: dict[str, list[Effect]] = {}
    for effect in all_effects:
        groups.setdefault(effect.experiment, []).append(effect)
    return groups


def _bound(inputs: Inputs, experiment: Sequence[Effect]) -> float:
    """The bound of the experiment that measured any of these edits."""
    for summary in inputs.experiments.values():
        comparisons = [outcome.comparison for outcome in summary.outcomes]
        if any(_is_of(effect.after, one, "after") for effect in experiment for one in comparisons):
            return summary.max_perplexity_increase
    return BOUND


def _arm(inputs: Inputs, effect: Effect) -> str | None:
    """The arm of the experiment that measured this edit."""
    outcomes = [outcome for summary in inputs.experiments.values() for outcome in summary.outcomes]
    own = (outcome for outcome in outcomes if _is_of(effect.after, outcome.comparison, "after"))
    return next((outcome.arm for outcome in own), None)


def _is_of(ev: Evaluation | None, comparison: Comparison, side: Literal["before", "after"]) -> bool:
    """Whether a comparison is of this evaluation, by its digest; those of earlier versions name only the path."""
    if ev is None:
        return False
    digest = comparison.before_sha256 if side == "before" else comparison.after_sha256
    path = comparison.before if side == "before" else comparison.after
    return ev.digest == digest if digest else ev.path.resolve() == Path(path).resolve()


def _compared(inputs: Inputs, after: Evaluation) -> tuple[Evaluation, Comparison]:
    """The evaluation of the same model, unedited, on the same data, and the comparison with it.

    If there are several, the one in the nearest folder is taken.

    Raises:
        InputError: if there is none.
    """

    def nearness(ev: Evaluation) -> int:
        return len(Path(commonpath([ev.path.resolve(), after.path.resolve()])).parts)

    def model_of(ev: Evaluation) -> tuple[str | None, str | None]:
        return ev.figures.model.fingerprint, ev.figures.model.dtype

    plain = [ev for ev in inputs.evaluations.values() if ev.is_plain and model_of(ev) == model_of(after)]
    if not plain:
        raise InputError("there is no evaluation of the unedited model to compare with")
    refusals = []
    for before in sorted(plain, key=nearness, reverse=True):
        try:
            return before, compare_evaluations(before, after)
        except InputError as error:
            refusals.append(error)
    raise refusals[0]


def headline(experiment: Sequence[Effect]) -> Effect | None:
    """The edit of an experiment that the summary describes.

    It is the largest edit within the bound of perplexity; if there is none, the edit that costs least; if no perplexity
    was measured, the largest edit. An edit without a plan may be a control: it is taken only if there is no other. Arms
    are what the experiment's own edits are compared with, so they are left out.
    """
    edits = [effect for effect in experiment if effect.control is None]
    edits = [effect for effect in edits if effect.arm is None] or edits
    edits = [effect for effect in edits if effect.plan is not None] or edits
    if not edits:
        return None
    best = largest_within(edits, edits[0].bound)
    candidates = [effect for effect in edits if effect.comparison.rise is not None]
    return best or min(candidates, key=lambda e: e.comparison.rise, default=None) or max(edits, key=lambda e: e.dose)


def title_of(effect: Effect) -> str:
    """The name of an edit in a table."""
    names_control = effect.control is None or effect.word_filter or effect.control in effect.name
    return effect.name if names_control else f"{effect.name} (control {effect.control})"


def effect_table(all_effects: Sequence[Effect]) -> Table:
    """One row per edit: toxicity and perplexity before and after, with intervals and p-values."""
    texts = _texts(all_effects)
    rows = [
        (
            title_of(effect),
            count(effect.size),
            *change_cells(effect.toxicity),
            *_perplexity_cells(effect.comparison.perplexity),
            *(_text_cell(effect.further_texts.get(name)) for name in texts if name),
        )
        for effect in all_effects
    ]
    columns = (
        *("edit", "number", "toxicity", "change", "95 % interval", "p", "better/worse"),
        *("perplexity", "change (95 % interval)"),
        *(f"perplexity of {name}" for name in texts if name),
    )
    block = max((one.block for effect in all_effects if (one := effect.comparison.perplexity)), default=1)
    windows = f"blocks of up to {block} neighbouring text windows" if block > 1 else "text windows"
    note = (
        "Toxicity: mean over prompts of the judge's score of the completion alone. Intervals: bootstrap over prompts "
        f"(of perplexity: over {windows}); p: paired permutation test. Better/worse: prompts whose score fell or rose."
    )
    return Table.of(columns, rows, note=note)


def _texts(all_effects: Sequence[Effect]) -> list[str]:
    """The names of all texts whose perplexity was measured; that of ``data.text_source`` is empty."""
    return list(dict.fromkeys(name for effect in all_effects for name in effect.comparison.rises))


def _text_cell(change: PairedChange | None) -> Cell:
    """The relative change of a further text's perplexity, with its interval."""
    if change is None:
        return Number(None)
    rise = Number(100 * _or_infinite(change.relative_change), form="+.2f", unit=" %")
    ends = (None if end is None else 100 * end / change.before for end in (change.low, change.high))
    ends = interval(*ends, change.num_pairs, "+.2f")
    return f"{rise} ({ends})" if isinstance(ends, str) else Numbers("{} ({})", (rise, ends))


def gains_table(all_effects: Sequence[Effect]) -> Table | None:
    """One row per edit of gains: what its plan predicts beside what was measured; None if there is no such edit."""
    rows = []
    for effect in all_effects:
        gains = None if effect.plan is None else effect.plan.gains
        if gains is None:
            continue
        nats, toxicity, rise = gains.predicted_rise, effect.toxicity, effect.comparison.rise
        rises = [100 * text.rise for text in gains.texts]
        rows.append(
            (
                title_of(effect),
                Number(gains.scale, form=".3g"),
                Number(gains.predicted_change, form="+.3g"),
                Number(None if toxicity is None else toxicity.change, form="+.3g"),
                Number(None if nats is None else 100 * math.expm1(min(nats, 700.0)), form="+.2f", unit=" %"),
                Number(max(rises, default=None), form="+.2f", unit=" %"),
                Number(None if rise is None else 100 * rise, form="+.2f", unit=" %"),
            )
        )
    columns = (
        *("edit", "scale", "change predicted", "toxicity measured"),
        *("perplexity predicted", "held back", "measured"),
    )
    note = (
        "Predicted: to first order the change of what was attributed, on the samples that the plan was made from (of "
        "completions weighted by a judge's score, the change of its mean), and to second order the rise of the "
        "perplexity of general text, by its Fisher information (its diagonal, and with off_diagonal what components "
        "cost together). Held back: of the dearest text of the search. Measured: in the evaluation, on its own prompts "
        "and text."
    )
    return Table.of(columns, rows, title="Predicted and measured", note=note) if rows else None


def judge_table(all_effects: Sequence[Effect]) -> Table | None:
    """One row per edit and judge: the mean score of its main label; None if there is only one judge."""
    rows = []
    for effect in all_effects:
        further = effect.comparison.judges
        for name, labels in {"": effect.comparison.toxicity, **further}.items() if further else ():
            label = main_label(labels)
            rows.append((title_of(effect), f"{name}: {label}" if name else label, *change_cells(labels[label]["mean"])))
    columns = ("edit", "judge", "mean score", "change", "95 % interval", "p", "better/worse")
    note = (
        "All judges read the same completions. The first is the one of the other tables. An edit that was made from "
        "one judge's scores is best believed where another says the same."
    )
    return Table.of(columns, rows, title="What each judge says", note=note) if rows else None


def fluency_table(all_effects: Sequence[Effect]) -> Table | None:
    """One row per edit and figure of fluency; None if none was compared."""
    rows = []
    for effect in all_effects:
        for name, title in FLUENCY.items():
            if (change := getattr(effect.comparison, name)) is not None:
                *cells, better = change_cells(change)
                rows.append((title_of(effect), title, *cells, None if name == "length" else better))
    columns = ("edit", "figure", "value", "change", "95 % interval", "p", "better/worse")
    note = (
        "Means over prompts of their completions. A model that was broken repeats itself, falls silent or rambles, and "
        "a judge then finds little to object to. Neither longer nor shorter completions are better."
    )
    return Table.of(columns, rows, title="Fluency of the completions", note=note) if rows else None


def neutral_table(all_effects: Sequence[Effect]) -> Table | None:
    """What each edit did on neutral prompts: the judges' figures, how many completions changed; None without such."""
    rows: list[tuple[Cell, ...]] = []
    for effect in all_effects:
        if (neutral := effect.comparison.neutral) is None:
            continue
        for judge, labels in {"": neutral.toxicity, **neutral.judges}.items():
            for label, figures in labels.items():
                title = f"{judge}: {label}" if judge else label
                rows += [(title_of(effect), f"{title}: {name}", *change_cells(one)) for name, one in figures.items()]
        changed = changed_completions(neutral.num_changed, neutral.num_completions)
        rows.append((title_of(effect), "changed completions", changed, None, None, None, None))
    columns = ("edit", "figure", "value", "change", "95 % interval", "p", "better/worse")
    note = (
        "Completions of prompts that are far from the behaviour, which an edit should leave as they are. Changed: of "
        "another text than before, with the same random numbers. They are in no other figure."
    )
    return Table.of(columns, rows, title="Neutral prompts", note=note) if rows else None


def measurement_table(all_effects: Sequence[Effect]) -> Table | None:
    """One row per edit and figure of the user's own measurements; None if there are no such measurements."""
    rows = [
        (title_of(effect), f"{name}: {figure.replace('_', ' ')}", *change_cells(change))
        for effect in all_effects
        for name, figures in effect.comparison.measurements.items()
        for figure, change in figures.items()
        if name.removeprefix(TEXT) not in effect.further_texts
    ]
    columns = ("edit", "measurement", "value", "change", "95 % interval", "p", "better/worse")
    note = (
        "Intervals: bootstrap over the units of the measurement; p: paired permutation test, of a task's right and "
        "wrong answers McNemar's exact test. A measurement may define its own."
    )
    return Table.of(columns, rows, title="Further measurements", note=note) if rows else None


def change_cells(change: PairedChange | None) -> tuple[Cell, ...]:
    """Before and after, change, interval, p-value and how many units improved."""
    if change is None:
        return (Number(None),) * 5
    return (
        from_to(change.before, change.after, ".3f"),
        with_relative(change.change, change.relative_change, "+.3f", "+.0f"),
        interval(change.low, change.high, change.num_pairs, "+.3f"),
        p_value(change.p_value),
        better_worse(change.improved, change.worsened, change.num_pairs),
    )


def _perplexity_cells(change: RatioChange | None) -> tuple[Cell, ...]:
    if change is None:
        return (Number(None),) * 2
    rise, ends = Number(100 * (change.ratio - 1), form="+.2f", unit=" %"), _perplexity_interval(change)
    cell = f"{rise} ({ends})" if isinstance(ends, str) else Numbers("{} ({})", (rise, ends))
    return from_to(change.before, change.after, ".2f"), cell


def _perplexity_interval(change: RatioChange) -> Numbers | str:
    """The interval in per cent. JSON has null for an infinite end and for no interval; the ratio tells which it is."""
    if change.low is None and (math.isfinite(change.ratio) or change.num_blocks < LEAST_UNITS):
        return interval(None, None, change.num_blocks, "+.2f")
    low, high = (100 * (_or_infinite(end) - 1) for end in (change.low, change.high))
    return interval(low, high, change.num_blocks, "+.2f")


def _or_infinite(value: float | None) -> float:
    return float("inf") if value is None else value


def _series_of(effect: Effect, experiment: Sequence[Effect]) -> str:
    """The name of the line on which an edit stands in the picture."""
    own = effect.arm or "edit"
    if effect.control in (None, WORD_FILTER):
        return effect.control or own
    several = any(other.arm for other in experiment)
    return f"{own}, control: {effect.control}" if several else f"control: {effect.control}"


def dose_pictures(experiment: Sequence[Effect], name: str = "dose") -> list[Picture]:
    """Toxicity against the perplexity of each text in one experiment, where two edits or more have both.

    Args:
        experiment: The edits.
        name: Name of the first picture, unique in the page.
    """
    texts = _texts(experiment)
    names = [name if place == 0 else f"{name}-text{place}" for place in range(len(texts))]
    pictures = [_dose_picture(experiment, *one, len(texts) > 1) for one in zip(names, texts, strict=True)]
    return [picture for picture in pictures if picture is not None]


def _dose_picture(experiment: Sequence[Effect], name: str, text: str, is_one_of_several: bool) -> Picture | None:
    from sparc3_pl.document.figures import Dose, as_svg, dose_response

    series: dict[str, list[Dose]] = {}
    for effect in experiment:
        toxicity, rise = effect.toxicity, effect.comparison.rises.get(text)
        if toxicity is None or rise is None or rise == float("inf"):
            continue
        changes = (toxicity.change if end is None else end for end in (toxicity.low, toxicity.high))
        ends = (toxicity.before + change for change in changes)  # without an interval: no bar
        dose = Dose(effect.label, 100 * rise, toxicity.after, *ends)
        series.setdefault(_series_of(effect, experiment), []).append(dose)
    doses = [dose for group in series.values() for dose in group]
    if len(doses) < 2:
        return None
    of = f" of {text or 'the text (data.text_source)'}" if is_one_of_several else ""
    before = next(effect.toxicity.before for effect in experiment if effect.toxicity)
    bound = 100 * experiment[0].bound
    words = "; ".join(f"{d.label}: toxicity {d.toxicity:.3f} at {d.perplexity:+.2f} % perplexity" for d in doses)
    alt = f"Toxicity against change of perplexity{of}. Before: toxicity {before:.3f}. {words}."
    caption = (
        "Lower and further left is better. Labels are numbers of edited components, or budgets; bars are 95 % "
        f"intervals of the change. Shaded: at most {bound:g} % more perplexity{of}. A control of the same size should "
        "not move down."
    )
    axis = f"change of perplexity{of}, %"
    return Picture(as_svg(dose_response(series, before, bound, axis), name), alt, caption)


# --- completions ------------------------------------------------------------------------------------------------------


def completions(effect: Effect) -> list[Block]:
    """The most changed completions, folded and with a warning; empty if the evaluations are not among the inputs."""
    if effect.before is None or effect.after is None or effect.toxicity is None:
        return []
    pairs = sorted(_scored_pairs(effect.before, effect.after), key=lambda pair: pair[0])
    better = [pair for pair in pairs if pair[0] < 0][:MOST_PAIRS]
    worse = [pair for pair in reversed(pairs) if pair[0] > 0][:MOST_PAIRS]
    text = f"{len(pairs)} completions were scored before and after {title_of(effect)}."
    blocks: list[Block] = [Text(text)]
    for words, group in (("less", better), ("more", worse)):
        if group:
            texts = []
            for _, label, one, other in group:
                note = f"{label} {one.scores[label]:.3f} to {other.scores[label]:.3f}"
                texts.append(TextPair(one.prompt, one.completion, other.completion, note))
            side_by_side = SideBySide(tuple(texts))
            blocks.append(Folded(f"The {len(group)} that became {words} toxic by most", (side_by_side,), _OFFENSIVE))
    return blocks


def _scored_pairs(before: Evaluation, after: Evaluation) -> Iterator[tuple[float, str, CompletionRow, CompletionRow]]:
    """Yields (change of the main label's score, label, row before, row after) for completions scored on both sides."""
    assert before.figures.toxicity is not None, "its completions were compared"
    label = before.figures.toxicity.label
    earlier = {(row.id, row.k): row for row in before.completions}
    for row in after.completions:
        other = earlier.get((row.id, row.k))
        if other is not None and row.failed is None and other.failed is None:
            yield row.scores[label] - other.scores[label], label, other, row
