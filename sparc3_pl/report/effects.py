"""What edits did: evaluations before and after, paired, and what a report says of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sparc3_pl.errors import InputError
from sparc3_pl.evaluation.compare import compare_evaluations
from sparc3_pl.evaluation.results import Evaluation, Row
from sparc3_pl.report.collect import Found
from sparc3_pl.report.document import NOTHING, Block, Folded, Picture, SideBySide, Table, Text, TextPair, count

__all__ = ["Effect", "completions", "dose_picture", "effect_table", "effects", "headline"]

BOUND = 0.01
"""Rise of perplexity that still counts as small: the bound of "the largest edit within"."""
MOST_PAIRS = 12
"""Completions shown a direction."""
_OFFENSIVE = "May be offensive."


@dataclass(frozen=True)
class Effect:
    """One edit, measured against the model as it was.

    Attributes:
        name: Of the evaluation after the edit (or of the comparison).
        comparison: As ``compare`` writes it.
        plan: What the evaluation says of its plan; empty if the evaluation is not here.
        before: The evaluation of the model as it was, if it is here.
        after: The evaluation of the edited model, likewise.
    """

    name: str
    comparison: dict[str, Any]
    plan: dict[str, Any]
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
    """Every edit that was measured, the smallest first, controls last; and why some could not be compared."""
    known = {Path(data["after"]).name: data for data in found.comparisons.values()}
    measured = [(name, ev) for name, ev in found.evaluations.items() if ev.results["plan"] is not None]
    plain = [ev for ev in found.evaluations.values() if ev.results["plan"] is None]
    made, notes = [], []
    for name, after in measured:
        before = next((ev for ev in plain if _same_model(ev, after)), None)
        data = known.pop(after.path.resolve().name, None)
        if data is None and before is None:
            notes.append(f"{name}: no evaluation of the same model as it was, so there is nothing to compare with")
            continue
        try:
            data = data or asdict(compare_evaluations(before, after))
        except InputError as error:
            notes.append(f"{name}: {error}")
            continue
        made.append(Effect(name, data, after.results["plan"], before, after))
    for name, data in found.comparisons.items():
        if any(data is left for left in known.values()):
            made.append(Effect(name, data, {}, *_sides(found, data)))
    return sorted(made, key=lambda effect: (effect.control is not None, effect.control or "", effect.size or 0)), notes


def _same_model(one: Evaluation, other: Evaluation) -> bool:
    return one.results["model"]["fingerprint"] == other.results["model"]["fingerprint"]


def _sides(found: Found, data: Mapping[str, Any]) -> Iterator[Evaluation | None]:
    """The two evaluations of a comparison, where they are here."""
    by_name = {ev.path.resolve().name: ev for ev in found.evaluations.values()}
    return (by_name.get(Path(data[side]).name) for side in ("before", "after"))


def headline(all_effects: Sequence[Effect]) -> Effect | None:
    """The edit to speak of: the largest within ``BOUND`` of perplexity; if none is, the one that costs least."""
    edits = [effect for effect in all_effects if effect.control is None]
    within = [effect for effect in edits if effect.rise is None or effect.rise <= BOUND]
    if within:
        return max(within, key=lambda effect: effect.size or 0)
    return min(edits, key=lambda effect: effect.rise or 0.0, default=None)


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
    note = (
        "Toxicity: mean over prompts of the judge's score of the completion alone. Intervals: bootstrap over prompts "
        "(or text windows); p: paired permutation test. Better/worse: prompts whose score fell or rose."
    )
    return Table.of(columns, rows, note=note)


def _toxicity_cells(change: Mapping[str, Any] | None) -> tuple[str, ...]:
    if change is None:
        return (NOTHING,) * 5
    relative = "" if change["relative_change"] is None else f" ({100 * change['relative_change']:+.0f} %)"
    return (
        f"{change['before']:.3f} to {change['after']:.3f}",
        f"{change['change']:+.3f}{relative}",
        f"{change['low']:+.3f} .. {change['high']:+.3f}",
        p_value(change["p_value"]),
        f"{change['improved']}/{change['worsened']} of {change['num_pairs']}",
    )


def _perplexity_cells(change: Mapping[str, Any] | None) -> tuple[str, ...]:
    if change is None:
        return (NOTHING,) * 2
    figures = [change[key] for key in ("before", "after", "ratio", "low", "high")]
    before, after, ratio, low, high = (float("inf") if value is None else value for value in figures)
    interval = f"({100 * (low - 1):+.2f} .. {100 * (high - 1):+.2f})"
    return f"{before:.2f} to {after:.2f}", f"{100 * (ratio - 1):+.2f} % {interval}"


def p_value(value: float) -> str:
    """To four decimals."""
    return f"{value:.4f}" if value >= 0.0001 else "< 0.0001"


def dose_picture(all_effects: Sequence[Effect]) -> Picture | None:
    """Toxicity against perplexity; None if there are not two edits that have both."""
    from sparc3_pl.report.figures import Dose, as_svg, dose_response

    series: dict[str, list[Dose]] = {}
    for effect in all_effects:
        toxicity, rise = effect.toxicity, effect.rise
        if toxicity is None or rise is None or rise == float("inf"):
            continue
        ends = (toxicity["before"] + toxicity[end] for end in ("low", "high"))
        dose = Dose(count(effect.size), 100 * rise, toxicity["after"], *ends)
        series.setdefault(f"control: {effect.control}" if effect.control else "edit", []).append(dose)
    doses = [dose for group in series.values() for dose in group]
    if len(doses) < 2:
        return None
    before = next(effect.toxicity["before"] for effect in all_effects if effect.toxicity)
    words = "; ".join(f"{d.label}: toxicity {d.toxicity:.3f} at {d.perplexity:+.2f} % perplexity" for d in doses)
    alt = f"Toxicity against change of perplexity. Before: toxicity {before:.3f}. {words}."
    caption = (
        "Down is better, left is better. The numbers are components edited; bars are 95 % intervals of the change. "
        f"Shaded: at most {100 * BOUND:.0f} % more perplexity. A control of the same size should not move down."
    )
    return Picture(as_svg(dose_response(series, before, 100 * BOUND), "dose"), alt, caption)


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
