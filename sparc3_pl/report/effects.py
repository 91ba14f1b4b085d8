"""What edits did: evaluations before and after, paired, and what a report says of them.

A comparison belongs to the two evaluations whose digests it names, wherever their folders lie and whatever they are
called. Edits that were measured against the same evaluation of the model as it was make one experiment.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from os.path import commonpath
from pathlib import Path
from typing import Any, Protocol, TypeVar

from sparc3_pl.document.document import NOTHING, Block, Folded, Picture, SideBySide, Table, Text, TextPair, count
from sparc3_pl.errors import InputError
from sparc3_pl.evaluation.compare import Comparison, compare_evaluations, interval, p_value
from sparc3_pl.evaluation.results import Evaluation, Row
from sparc3_pl.report.collect import Found

__all__ = [
    "Effect",
    "by_experiment",
    "completions",
    "dose_picture",
    "effect_table",
    "effects",
    "headline",
    "largest_within",
]

BOUND = 0.01
"""Rise of perplexity that counts as small where no experiment says another."""
MOST_PAIRS = 12
"""Completions shown a direction."""
_OFFENSIVE = "May be offensive."


class Edit(Protocol):
    """An edit that was measured: what ``largest_within`` asks of it."""

    @property
    def control(self) -> str | None:
        """The control that the edit is, or None."""

    @property
    def size(self) -> int | None:
        """Components edited."""

    @property
    def rise(self) -> float | None:
        """Relative change of perplexity, 0.01 for 1 %; None where none was measured."""


E = TypeVar("E", bound=Edit)


def largest_within(edits: Iterable[E], bound: float) -> E | None:
    """The largest edit (no control) that raises perplexity by at most ``bound``; None if there is none.

    Of an edit without a perplexity it is not known, so it is not within any bound.
    """
    within = [e for e in edits if e.control is None and e.rise is not None and e.rise <= bound]
    return max(within, key=lambda edit: edit.size or 0, default=None)


@dataclass(frozen=True)
class Effect:
    """One edit, measured against the model as it was.

    Attributes:
        name: Of the evaluation after the edit (or of the comparison).
        comparison: As ``compare`` writes it.
        plan: What the evaluation says of its plan; empty if the evaluation is not here.
        experiment: Name of the evaluation that it is compared with: what is compared with the same belongs together.
        bound: Rise of perplexity that its experiment calls small.
        before: The evaluation of the model as it was, if it is here.
        after: The evaluation of the edited model, likewise.
    """

    name: str
    comparison: dict[str, Any]
    plan: dict[str, Any]
    experiment: str
    bound: float = BOUND
    before: Evaluation | None = None
    after: Evaluation | None = None

    @property
    def control(self) -> str | None:
        """The control that the edit is, or None."""
        return self.plan.get("control")

    @property
    def size(self) -> int | None:
        """Components edited."""
        return (self.plan.get("num_neurons") or 0) + (self.plan.get("num_weights") or 0) or None

    @property
    def unit(self) -> str:
        """``neurons`` or ``weights``."""
        return f"{self.plan.get('granularity', 'neuron')}s"

    @property
    def toxicity(self) -> dict[str, Any] | None:
        """The change of the main label's mean."""
        labels = self.comparison["toxicity"]
        if not labels:
            return None
        return labels["toxicity" if "toxicity" in labels else next(iter(labels))]["mean"]

    @property
    def perplexity(self) -> dict[str, Any] | None:
        """The change of perplexity."""
        return self.comparison["perplexity"]

    @property
    def rise(self) -> float | None:
        """Relative change of perplexity, 0.01 for 1 %; infinite for a ratio that JSON could not hold."""
        if self.perplexity is None:
            return None
        ratio = self.perplexity["ratio"]
        return float("inf") if ratio is None else ratio - 1


def effects(found: Found) -> tuple[list[Effect], list[str]]:
    """Every edit that was measured; and why some could not be compared.

    Experiments in the order in which they come up; within one the smallest edit first, controls last.
    """
    names = {ev.digest: name for name, ev in found.evaluations.items()}
    made, notes, told = [], [], set()
    for name, data in found.comparisons.items():
        before, after = (_named(found, data, side) for side in ("before", "after"))
        pair = tuple(ev.digest if ev else data[side] for side, ev in (("before", before), ("after", after)))
        if pair not in told:  # a copy of the same comparison tells nothing new
            told |= {pair, pair[1]}
            made.append(_effect(found, names.get(pair[1], name), data, before, after))
    for name, after in found.evaluations.items():
        if after.is_plain or after.digest in told:
            continue
        try:
            before, comparison = _compared(found, after)
        except InputError as error:
            notes.append(f"{name}: {error}")
            continue
        told.add(after.digest)
        made.append(_effect(found, name, asdict(comparison), before, after))
    bounds = {name: _bound(found, group) for name, group in by_experiment(made).items()}
    made = [replace(effect, bound=bounds[effect.experiment]) for effect in made]
    order = {experiment: place for place, experiment in enumerate(dict.fromkeys(e.experiment for e in made))}
    made.sort(key=lambda e: (order[e.experiment], e.control is not None, e.control or "", e.size or 0))
    return made, notes


def by_experiment(all_effects: Sequence[Effect]) -> dict[str, list[Effect]]:
    """The edits of each experiment, by its name."""
    groups: dict[str, list[Effect]] = {}
    for effect in all_effects:
        groups.setdefault(effect.experiment, []).append(effect)
    return groups


def _effect(
    found: Found, name: str, data: dict[str, Any], before: Evaluation | None, after: Evaluation | None
) -> Effect:
    names = {ev.digest: name for name, ev in found.evaluations.items()}
    experiment = names[before.digest] if before is not None else str(data["before"])
    plan = (after.results.get("plan") or {}) if after is not None else {}
    return Effect(name, data, plan, experiment, BOUND, before, after)


def _bound(found: Found, experiment: Sequence[Effect]) -> float:
    """The bound of the experiment that has measured any of these edits."""
    for summary in found.experiments.values():
        comparisons = [outcome["comparison"] for outcome in summary["outcomes"]]
        if any(_is_of(effect.after, data, "after") for effect in experiment for data in comparisons):
            return summary["max_perplexity_increase"]
    return BOUND


def _named(found: Found, data: Mapping[str, Any], side: str) -> Evaluation | None:
    """The evaluation that a comparison names as ``before`` or ``after``, if it is here."""
    return next((ev for ev in found.evaluations.values() if _is_of(ev, data, side)), None)


def _is_of(ev: Evaluation | None, data: Mapping[str, Any], side: str) -> bool:
    """Whether a comparison is of this evaluation. Those of earlier versions name no digest: the path must be right."""
    if ev is None:
        return False
    digest = data.get(f"{side}_sha256")
    return ev.digest == digest if digest else ev.path.resolve() == Path(data[side]).resolve()


def _compared(found: Found, after: Evaluation) -> tuple[Evaluation, Comparison]:
    """The evaluation of the same model, unedited, on the same data, and the comparison with it.

    Of several, it is the one whose folder is nearest.

    Raises:
        InputError: if there is none.
    """

    def nearness(ev: Evaluation) -> int:
        return len(Path(commonpath([ev.path.resolve(), after.path.resolve()])).parts)

    plain = [ev for ev in found.evaluations.values() if ev.is_plain and _same_model(ev, after)]
    if not plain:
        raise InputError("no evaluation of the same model as it was, so there is nothing to compare with")
    refusals = []
    for before in sorted(plain, key=nearness, reverse=True):
        try:
            return before, compare_evaluations(before, after)
        except InputError as error:
            refusals.append(error)
    raise refusals[0]


def _same_model(one: Evaluation, other: Evaluation) -> bool:
    models = [ev.results["model"] for ev in (one, other)]
    return all(models[0].get(key) == models[1].get(key) for key in ("fingerprint", "dtype"))


def headline(experiment: Sequence[Effect]) -> Effect | None:
    """The edit of an experiment to speak of.

    It is the largest within the bound of perplexity; if none is, the one that costs least; if no perplexity was
    measured, the largest. Edits whose plan is not here may be controls: they are spoken of only if there are no others.
    """
    edits = [effect for effect in experiment if effect.control is None]
    edits = [effect for effect in edits if effect.plan] or edits
    if not edits:
        return None
    best = largest_within(edits, edits[0].bound)
    measured = [effect for effect in edits if effect.rise is not None]
    return best or min(measured, key=lambda e: e.rise, default=None) or max(edits, key=lambda e: e.size or 0)


def title_of(effect: Effect) -> str:
    """How a table calls an edit."""
    is_told = effect.control is None or effect.control in effect.name
    return effect.name if is_told else f"{effect.name} (control {effect.control})"


def effect_table(all_effects: Sequence[Effect]) -> Table:
    """A line an edit: toxicity and perplexity before and after, with intervals and p-values."""
    rows = [
        (
            title_of(effect),
            count(effect.size),
            *_toxicity_cells(effect.toxicity),
            *_perplexity_cells(effect.perplexity),
        )
        for effect in all_effects
    ]
    columns = (
        *("edit", "number", "toxicity", "change", "95 % interval", "p", "better/worse"),
        *("perplexity", "change (95 % interval)"),
    )
    block = max((effect.perplexity.get("block") or 1 for effect in all_effects if effect.perplexity), default=1)
    windows = f"blocks of up to {block} neighbouring text windows" if block > 1 else "text windows"
    note = (
        "Toxicity: mean over prompts of the judge's score of the completion alone. Intervals: bootstrap over prompts "
        f"(of perplexity: over {windows}); p: paired permutation test. Better/worse: prompts whose score fell or rose."
    )
    return Table.of(columns, rows, note=note)


def _toxicity_cells(change: Mapping[str, Any] | None) -> tuple[str, ...]:
    if change is None:
        return (NOTHING,) * 5
    relative = "" if change["relative_change"] is None else f" ({100 * change['relative_change']:+.0f} %)"
    return (
        f"{change['before']:.3f} to {change['after']:.3f}",
        f"{change['change']:+.3f}{relative}",
        interval(change["low"], change["high"], change["num_pairs"], "+.3f"),
        p_value(change["p_value"]),
        f"{change['improved']}/{change['worsened']} of {change['num_pairs']}",
    )


def _perplexity_cells(change: Mapping[str, Any] | None) -> tuple[str, ...]:
    if change is None:
        return (NOTHING,) * 2
    before, after, ratio = (_or_infinite(change[key]) for key in ("before", "after", "ratio"))
    return f"{before:.2f} to {after:.2f}", f"{100 * (ratio - 1):+.2f} % ({_perplexity_interval(change)})"


def _perplexity_interval(change: Mapping[str, Any]) -> str:
    """In per cent. In JSON an end that is infinite and one that there is not are both null; the ratio tells."""
    blocks = change["num_windows"] // (change.get("block") or 1)
    if change["low"] is None and change["ratio"] is not None:
        return interval(None, None, blocks, "+.2f")
    low, high = (100 * (_or_infinite(change[end]) - 1) for end in ("low", "high"))
    return interval(low, high, blocks, "+.2f")


def _or_infinite(value: float | None) -> float:
    return float("inf") if value is None else value


def dose_picture(experiment: Sequence[Effect], name: str = "dose") -> Picture | None:
    """Toxicity against perplexity, of one experiment; None if there are not two edits that have both.

    Args:
        experiment: Its edits.
        name: Of the picture in the page; each needs its own.
    """
    from sparc3_pl.document.figures import Dose, as_svg, dose_response

    series: dict[str, list[Dose]] = {}
    for effect in experiment:
        toxicity, rise = effect.toxicity, effect.rise
        if toxicity is None or rise is None or rise == float("inf"):
            continue
        changes = (toxicity["change"] if toxicity[end] is None else toxicity[end] for end in ("low", "high"))
        ends = (toxicity["before"] + change for change in changes)  # without an interval: no bar
        dose = Dose(count(effect.size), 100 * rise, toxicity["after"], *ends)
        series.setdefault(f"control: {effect.control}" if effect.control else "edit", []).append(dose)
    doses = [dose for group in series.values() for dose in group]
    if len(doses) < 2:
        return None
    before = next(effect.toxicity["before"] for effect in experiment if effect.toxicity)
    bound = 100 * experiment[0].bound
    words = "; ".join(f"{d.label}: toxicity {d.toxicity:.3f} at {d.perplexity:+.2f} % perplexity" for d in doses)
    alt = f"Toxicity against change of perplexity. Before: toxicity {before:.3f}. {words}."
    caption = (
        "Down is better, left is better. The numbers are components edited; bars are 95 % intervals of the change. "
        f"Shaded: at most {bound:g} % more perplexity. A control of the same size should not move down."
    )
    return Picture(as_svg(dose_response(series, before, bound), name), alt, caption)


# --- completions ------------------------------------------------------------------------------------------------------


def completions(effect: Effect) -> list[Block]:
    """The most changed completions, folded away with a warning; nothing if the evaluations are not here."""
    if effect.before is None or effect.after is None or effect.toxicity is None:
        return []
    pairs = sorted(_scored_pairs(effect.before, effect.after), key=lambda pair: pair[0])
    better = [pair for pair in pairs if pair[0] < 0][:MOST_PAIRS]
    worse = [pair for pair in reversed(pairs) if pair[0] > 0][:MOST_PAIRS]
    text = f"{len(pairs)} completions were scored before and after {title_of(effect)}."
    blocks: list[Block] = [Text(text)]
    for words, group in (("less", better), ("more", worse)):
        if group:
            shown = SideBySide(tuple(_text_pair(*pair) for pair in group))
            blocks.append(Folded(f"{len(group)} that became {words} toxic the most", (shown,), _OFFENSIVE))
    return blocks


def _scored_pairs(before: Evaluation, after: Evaluation) -> Iterator[tuple[float, str, Row, Row]]:
    """(change of the main label's score, the label, row before, row after) where both were scored."""
    label = before.results["toxicity"]["label"]
    earlier = {(row["id"], row["k"]): row for row in before.completions}
    for row in after.completions:
        other = earlier.get((row["id"], row["k"]))
        if other is not None and row["failed"] is None and other["failed"] is None:
            yield row["scores"][label] - other["scores"][label], label, other, row


def _text_pair(change: float, label: str, before: Row, after: Row) -> TextPair:
    note = f"{label} {before['scores'][label]:.3f} to {after['scores'][label]:.3f}"
    return TextPair(before["prompt"], before["completion"], after["completion"], note)
