"""Compare two evaluations of the same prompts and text: what changed, by how much, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from sparc3_pl.document.blocks import Cell, Number, Numbers, better_worse, interval, p_value, with_relative
from sparc3_pl.document.shown import Shown, data_frame
from sparc3_pl.errors import InputError
from sparc3_pl.evaluation.measurement import changes_of, further_perplexities
from sparc3_pl.evaluation.results import THRESHOLD, Evaluation, main_label
from sparc3_pl.evaluation.rows import FLUENCY, CompletionRow, is_empty
from sparc3_pl.io.files import FileKind, check_output, new_file, strict_json, write_text
from sparc3_pl.io.formats import typed
from sparc3_pl.io.provenance import command_line, now, versions
from sparc3_pl.model.identity import differing_config
from sparc3_pl.statistics.paired import (
    NUM_RESAMPLES,
    Floats,
    PairedChange,
    RatioChange,
    paired_change,
    ratio_change,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

    from sparc3_pl.document.blocks import Block

__all__ = [
    "Comparison",
    "ComparisonFile",
    "NeutralChanges",
    "changed_completions",
    "compare",
    "compare_evaluations",
    "p_value",
    "write_comparison",
]

KIND = FileKind.json("a comparison", lambda data: {"before", "after", "perplexity", "toxicity"} <= data.keys())

_OF_PROMPTS: dict[str, Callable[[list[float]], float]] = {
    "mean": np.mean,
    "expected_maximum": np.max,
    "probability": lambda s: float(np.max(s) >= THRESHOLD),
    "share": lambda s: float(np.mean(np.array(s) >= THRESHOLD)),
}
"""How a prompt's K scores become the one value that is paired; their mean over prompts is the figure of ``eval``."""


@dataclass(frozen=True)
class NeutralChanges:
    """What an edit did to the completions of neutral prompts, which it should leave as they are.

    Attributes:
        toxicity: Changes over prompts, by label and figure (``mean``, ``share``).
        num_changed: Completions whose text differs.
        num_completions: Completions that were made and scored on both sides.
        num_dropped: Prompts without such a completion.
        judges: Changes of further judges' scores, by judge, label and figure.
    """

    toxicity: dict[str, dict[str, PairedChange]]
    num_changed: int
    num_completions: int
    num_dropped: int
    judges: dict[str, dict[str, dict[str, PairedChange]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison(Shown):
    """What changed between two evaluations.

    Attributes:
        before: Folder of the first evaluation.
        after: Folder of the second.
        perplexity: Change of perplexity; None if the evaluations have none.
        toxicity: Changes over prompts, by label and figure (``mean``, ``expected_maximum``, ``probability``,
            ``share``).
        uniqueness: Change of the response uniqueness ratio; higher is better.
        num_dropped: Prompts without a completion that was scored on both sides.
        notes: What a reader should know: different weights, prompts that were not held out, figures on one side only.
        before_sha256: Digest of the first evaluation's results: whose figures these are, wherever the folder lies.
            Earlier versions did not write it.
        after_sha256: Digest of the second evaluation's results, likewise.
        measurements: Changes over the units of the user's own measurements, by measurement and figure.
        judges: Changes over prompts of further judges' scores, by judge, label and figure.
        length: Change of the number of new tokens; neither direction is better.
        empty: Change of the share of empty completions; lower is better.
        neutral: What happened to neutral prompts; None if they were not measured on both sides.
        disagreement: How the judges contradict each other about the change of the mean score; None if they do not.
    """

    before: str
    after: str
    perplexity: RatioChange | None
    toxicity: dict[str, dict[str, PairedChange]]
    uniqueness: PairedChange | None
    num_dropped: int
    notes: tuple[str, ...]
    before_sha256: str = ""
    after_sha256: str = ""
    measurements: dict[str, dict[str, PairedChange]] = field(default_factory=dict)
    judges: dict[str, dict[str, dict[str, PairedChange]]] = field(default_factory=dict)
    disagreement: str | None = None
    length: PairedChange | None = None
    empty: PairedChange | None = None
    neutral: NeutralChanges | None = None

    @property
    def rises(self) -> dict[str, float]:
        """Relative change of perplexity by text, 0.01 for 1 %: of ``data.text_source`` ("") and of further texts by
        their names; infinite where JSON could not hold it.
        """
        own = {} if self.perplexity is None else {"": self.perplexity.ratio - 1}
        further = further_perplexities(self.measurements).items()
        return own | {
            name: math.inf if change.relative_change is None else change.after / change.before - 1
            for name, change in further
        }

    @property
    def rise(self) -> float | None:
        """Relative change of the perplexity that rises most among all texts; None where none was measured."""
        return max(self.rises.values(), default=None)

    @classmethod
    def read(cls, data: Mapping[str, Any], where: str | Path) -> ComparisonFile:
        """The comparison that a file holds.

        Raises:
            InputError: for a missing key or a value of the wrong type.
        """
        return typed(ComparisonFile, dict(data), where, "compare again")

    def blocks(self) -> list[Block]:
        """The changes, and what a reader should know of them."""
        from sparc3_pl.document.blocks import Table, Text

        columns = ("figure", "before", "after", "change", "95 % interval", "p", "better/worse", "needed for 80 %")
        lines = [f"note: {note}" for note in self.notes]
        if self.disagreement is not None:
            lines.append(f"note: {self.disagreement}")
        if (p := self.perplexity) is not None and p.block > 1:
            lines.append(
                f"note: neighbouring windows are not independent: {p.num_windows} windows were resampled in "
                f"{p.num_blocks} blocks of {p.block}"
            )
        if self.num_dropped:
            lines.append(f"note: {self.num_dropped} prompts had no completion scored on both sides and are left out")
        if self.neutral is not None and (num_dropped := self.neutral.num_dropped):
            lines.append(f"note: {num_dropped} neutral prompts had no completion scored on both sides and are left out")
        return [Table.of(columns, _rows(self), title="After against before"), *map(Text, lines)]

    def changes(self) -> dict[str, PairedChange]:
        """Every change but that of perplexity, which is a ratio, by the name under which it is shown."""
        return self.changes_of_prompts() | self.changes_of_units()

    def changes_of_prompts(self) -> dict[str, PairedChange]:
        """Changes over prompts: the judges' scores and fluency of completions, the judges' scores of neutral ones."""
        by_title = _by_title(self.toxicity, self.judges)
        fluency = {title: getattr(self, name) for name, title in FLUENCY.items()}
        by_title |= {title: change for title, change in fluency.items() if change is not None}
        if (neutral := self.neutral) is not None:
            changes = _by_title(neutral.toxicity, neutral.judges)
            by_title |= {f"neutral prompts: {title}": change for title, change in changes.items()}
        return by_title

    def changes_of_units(self) -> dict[str, PairedChange]:
        """Changes over the units of the user's own measurements."""
        return {
            f"{name}: {value.replace('_', ' ')}": change
            for name, by_value in self.measurements.items()
            for value, change in by_value.items()
        }

    def to_pandas(self) -> DataFrame:
        """A row for each figure: ``figure``, ``before``, ``after``, ``change``, ``low``, ``high``, ``p_value``.

        The change of perplexity, and its interval, are those of the difference: before * (ratio - 1).

        Raises:
            InputError: without pandas.
        """
        names = ("before", "after", "change", "low", "high", "p_value")
        rows = [{"figure": f} | {name: getattr(c, name) for name in names} for f, c in self.changes().items()]
        if (p := self.perplexity) is not None:
            change, low, high = (None if r is None else p.before * (r - 1) for r in (p.ratio, p.low, p.high))
            own = dict(zip(names, (p.before, p.after, change, low, high, p.p_value), strict=True))
            rows.insert(0, {"figure": "perplexity"} | own)
        return data_frame(rows)

    def plot(self) -> Figure:
        """Each change with its interval, in per cent of what was before; figures that were 0 are left out."""
        from sparc3_pl.document import figures

        relative = {}
        if (p := self.perplexity) is not None:
            relative["perplexity"] = tuple(None if r is None else 100 * (r - 1) for r in (p.ratio, p.low, p.high))
        for name, c in self.changes().items():
            if c.before:
                ends = (c.change, c.low, c.high)
                relative[name] = tuple(None if end is None else 100 * end / c.before for end in ends)
        return figures.for_notebook(figures.changes(list(relative), list(relative.values())))


def _by_title(
    toxicity: Mapping[str, Mapping[str, PairedChange]], judges: Mapping[str, Mapping[str, Mapping[str, PairedChange]]]
) -> dict[str, PairedChange]:
    """The judges' changes by ``LABEL: FIGURE``, those of further judges by ``NAME: LABEL: FIGURE``."""
    return {
        f"{f'{judge}: {label}' if judge else label}: {name.replace('_', ' ')}": change
        for judge, by_label in {"": toxicity, **judges}.items()
        for label, by_figure in by_label.items()
        for name, change in by_figure.items()
    }


@dataclass(frozen=True, kw_only=True)
class ComparisonFile(Comparison):
    """A comparison that was read from a file, and the command that made it."""

    command: str | None = None


def compare(
    before: str,
    after: str,
    output: str | None = None,
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
    overwrite: bool = False,
) -> Comparison:
    """Compare two evaluations of the same prompts and text, before and after an edit.

    Prints changes with 95 % bootstrap intervals, permutation p-values, and the number of prompts that an effect of
    this size needs for 80 % power.

    Args:
        before: Evaluation folder of the model as it was.
        after: Evaluation folder of the edited model.
        output: JSON file for the result.
        seed: Seed of the resampling.
        num_resamples: Resamples of every interval and test.
        overwrite: Replace an earlier file at ``output``.

    Raises:
        InputError: if a folder is damaged, or the two differ in prompts, text, settings or judge.
    """
    if output is not None:
        check_output(output, overwrite, KIND)
    sides = [Evaluation.open(path) for path in (before, after)]
    comparison = compare_evaluations(*sides, seed=seed, num_resamples=num_resamples)
    if output is not None:
        write_comparison(output, comparison, seed=seed, num_resamples=num_resamples, overwrite=overwrite)
    from sparc3_pl.document.terminal import print_result

    table, *lines = comparison.blocks()
    place = [] if output is None else [f"comparison: {Path(output)}"]
    print_result(table, *(line.text for line in lines), *place)
    return comparison


def write_comparison(
    path: str | Path,
    comparison: Comparison,
    *,
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
    overwrite: bool = False,
) -> None:
    """Write a comparison, and how it was made, as JSON.

    Raises:
        InputError: if the place is taken or cannot be written.
    """
    about = {"seed": seed, "num_resamples": num_resamples, "versions": versions(), "command": command_line()}
    with new_file(path, overwrite, KIND) as file:
        write_text(file, strict_json({**asdict(comparison), **about, "created": now()}, indent=2) + "\n")


def compare_evaluations(
    before: Evaluation, after: Evaluation, *, seed: int = 0, num_resamples: int = NUM_RESAMPLES
) -> Comparison:
    """Compare two evaluations in memory, as ``compare`` does with folders; nothing is written or printed.

    Raises:
        InputError: if the two do not measure the same.
    """
    if num_resamples < 100:
        raise InputError(f"num_resamples={num_resamples}: too few for a 95 % interval; give at least 100")
    one, other = before.figures, after.figures
    common = [part for part in ("perplexity", "toxicity") if getattr(one, part) and getattr(other, part)]
    measurements = [name for name in one.measurements if name in other.measurements]
    if not common and not measurements:
        raise InputError(f"{before.path} and {after.path} have no figure in common; evaluate both on the same data")
    options = {"seed": seed, "num_resamples": num_resamples}
    if "toxicity" in common:
        _same(before, after, ("generation",), besides=("eos_token_ids",))
        _same(before, after, ("judge",), besides=_unknown_digests(one.judge, other.judge))
    pairs = _completion_pairs(before, after, "completions") if "toxicity" in common else {}
    usable = {i: rows for i, rows in pairs.items() if rows}
    if pairs and not usable:
        raise InputError(f"{before.path} and {after.path}: no prompt has a completion scored on both sides")
    notes = _notes(before, after)
    changes = {name: _measurement_changes(before, after, name, options, notes) for name in measurements}
    for better in ("lower", "higher"):
        names = [name for name in measurements if one.measurement_settings[name].better == better]
        notes += [f"better is a {better} value of {', '.join(names)}"] if names else []
    toxicity = _toxicity_changes(list(usable.values()), lambda row: row.scores, options) if usable else {}
    judges = _changes_by_judge(before, after, list(usable.values()), options)
    return Comparison(
        before=str(before.path),
        after=str(after.path),
        perplexity=_perplexity_change(before, after, options) if "perplexity" in common else None,
        toxicity=toxicity,
        num_dropped=len(pairs) - len(usable),
        notes=tuple(notes),
        before_sha256=before.digest,
        after_sha256=after.digest,
        measurements=changes,
        judges=judges,
        disagreement=_disagreement(toxicity, judges),
        neutral=_neutral_changes(before, after, options) if before.neutral and after.neutral else None,
        **_fluency_changes(list(usable.values()), options),
    )


# --- perplexity -------------------------------------------------------------------------------------------------------


def _perplexity_change(before: Evaluation, after: Evaluation, options: dict[str, int]) -> RatioChange:
    settings = before.figures.perplexity
    ways = [side.figures.perplexity.windows for side in (before, after)]
    if ways[0] != ways[1]:
        raise InputError(
            f"perplexity.windows is {ways[0]!r} in {before.path} and {ways[1]!r} in {after.path}; evaluate both with "
            "the same model.windows"
        )
    for key in ("max_length", "stride", "source", "protocol", "num_tokens"):
        _same(before, after, ("perplexity", key))
    places = [[(row.index, row.num_tokens) for row in side.windows] for side in (before, after)]
    if places[0] != places[1] or not places[0]:
        raise InputError(f"{before.path} and {after.path}: their text windows differ; evaluate both on the same text")
    nll = [_floats(row.nll for row in side.windows) for side in (before, after)]
    overlap = math.ceil(settings.max_length / settings.stride)
    return ratio_change(*nll, _floats(row.num_tokens for row in before.windows), overlap=overlap, **options)


# --- completions ------------------------------------------------------------------------------------------------------

Pair = tuple[CompletionRow, CompletionRow]
"""The same completion before and after."""


def _completion_pairs(
    before: Evaluation, after: Evaluation, kind: Literal["completions", "neutral"]
) -> dict[str, list[Pair]]:
    """Pairs (before, after) of each prompt's rows of the same k, scored on both sides, by prompt; a list may be empty.

    Raises:
        InputError: if a completion is in one of the evaluations only.
    """
    sides = [{(row.id, row.k): row for row in getattr(side, kind)} for side in (before, after)]
    odd = sides[0].keys() ^ sides[1].keys()
    if odd:
        count = f"{len({i for i, _ in odd})} {'neutral ' if kind == 'neutral' else ''}prompts"
        raise InputError(
            f"{before.path} and {after.path}: {count} are in one of them only (first id: {min(odd)[0]}); "
            "evaluate both on the same prompts"
        )
    pairs: dict[str, list[Pair]] = {}
    for key, row in sides[0].items():
        both_scored = row.failed is None and sides[1][key].failed is None
        pairs.setdefault(key[0], []).extend([(row, sides[1][key])] if both_scored else [])
    return pairs


def _neutral_changes(before: Evaluation, after: Evaluation, options: dict[str, int]) -> NeutralChanges:
    pairs = _completion_pairs(before, after, "neutral")
    usable = [rows for rows in pairs.values() if rows]
    figures = {name: _OF_PROMPTS[name] for name in ("mean", "share")}
    judges = _changes_by_judge(before, after, usable, options, figures)
    texts = [(one.completion, other.completion) for rows in usable for one, other in rows]
    return NeutralChanges(
        toxicity=_toxicity_changes(usable, lambda row: row.scores, options, figures) if usable else {},
        num_changed=sum(one != other for one, other in texts),
        num_completions=len(texts),
        num_dropped=len(pairs) - len(usable),
        judges=judges,
    )


def _changes_by_judge(
    before: Evaluation,
    after: Evaluation,
    prompts: Sequence[list[Pair]],
    options: dict[str, int],
    figures: Mapping[str, Callable[[list[float]], float]] = _OF_PROMPTS,
) -> dict[str, dict[str, dict[str, PairedChange]]]:
    """Changes of the figures of each further judge whose scores both evaluations have, by its name.

    Raises:
        InputError: if a name stands for different judges.
    """
    if not prompts:
        return {}
    sides = [side.figures.judges for side in (before, after)]
    names = [name for name in sides[0] if name in sides[1]]
    for name in names:
        unknown = _unknown_digests(*(side[name].judge for side in sides))
        _same(before, after, ("judges", name, "judge"), besides=unknown)
    return {
        name: _toxicity_changes(prompts, lambda row, name=name: row.judges[name], options, figures) for name in names
    }


def _toxicity_changes(
    prompts: Sequence[list[Pair]],
    scores: Callable[[CompletionRow], dict[str, float]],
    options: dict[str, int],
    figures: Mapping[str, Callable[[list[float]], float]] = _OF_PROMPTS,
) -> dict[str, dict[str, PairedChange]]:
    """How one judge's figures changed; ``scores`` reads its scores of a completion."""

    def values(side: int, label: str, figure: Callable[[list[float]], float]) -> Floats:
        return _floats(figure([scores(pair[side])[label] for pair in rows]) for rows in prompts)

    labels = list(scores(prompts[0][0][0]))
    return {
        label: {
            name: paired_change(values(0, label, figure), values(1, label, figure), **options)
            for name, figure in figures.items()
        }
        for label in labels
    }


def _disagreement(
    toxicity: Mapping[str, Mapping[str, PairedChange]], judges: Mapping[str, Mapping[str, Mapping[str, PairedChange]]]
) -> str | None:
    """A sentence on how the judges disagree about the change of their main labels' mean scores; None if they agree."""
    if not judges:
        return None
    changes = {}
    for name, by_label in {"": toxicity, **judges}.items():
        label = main_label(by_label)
        changes[f"{name}: {label}" if name else label] = by_label[label]["mean"]
    signs = {np.sign(change.change) for change in changes.values()}
    holds_zero = {c.low <= 0 <= c.high for c in changes.values() if c.low is not None and c.high is not None}
    if {-1.0, 1.0} <= signs:
        what = "in the direction of the change" + (", though each interval holds zero" if holds_zero == {True} else "")
    elif len(holds_zero) == 2:
        what = "on whether there is a change: the interval of one holds zero, that of another does not"
    else:
        return None
    parts = [f"{name} {c.change:+.4f} ({interval(c.low, c.high, c.num_pairs, '+.4f')})" for name, c in changes.items()]
    return f"the judges disagree {what}: {', '.join(parts)}"


def _fluency_changes(prompts: Sequence[list[Pair]], options: dict[str, int]) -> dict[str, PairedChange | None]:
    """Changes over prompts of each figure of fluency; None for a figure that either side does not know."""
    values: dict[str, Callable[[CompletionRow], float | None]] = {
        "uniqueness": lambda row: row.uniqueness,
        "length": lambda row: row.num_tokens,
        "empty": lambda row: None if row.completion is None else float(is_empty(row.completion)),
    }
    changes: dict[str, PairedChange | None] = {}
    for name, of_row in values.items():
        sides = [[[of_row(pair[side]) for pair in rows] for rows in prompts] for side in (0, 1)]
        is_known = prompts and not any(None in rows for side in sides for rows in side)
        means = (_floats(np.mean(rows) for rows in side) for side in sides)
        changes[name] = paired_change(*means, lower_is_better=name == "empty", **options) if is_known else None
    return changes


# --- measurements of the user's own ----------------------------------------------------------------------------------


def _measurement_changes(
    before: Evaluation, after: Evaluation, name: str, options: dict[str, int], notes: list[str]
) -> dict[str, PairedChange]:
    """How a measurement's values changed over the units that were measured on both sides."""
    for key in ("class", "settings", "unit", "better", "paired"):
        _same(before, after, ("measurement_settings", name, key))
    about = before.figures.measurement_settings[name]
    sides = [{row["unit"]: row for row in side.measurements if row["measurement"] == name} for side in (before, after)]
    if odd := sides[0].keys() ^ sides[1].keys():
        raise InputError(
            f"{before.path} and {after.path}: {len(odd)} {about.unit} of {name} are in one of them only (first id: "
            f"{min(map(str, odd))}); evaluate both on the same ones"
        )
    units = [unit for unit in sides[0] if all(side[unit].get("failed") is None for side in sides)]
    if not units:
        raise InputError(f"{before.path} and {after.path}: no {about.unit} of {name} were measured on both sides")
    if num_dropped := len(sides[0]) - len(units):
        notes.append(f"{name}: {num_dropped} {about.unit} were not measured on both sides and are left out")
    return dict(changes_of(about, *([side[unit] for unit in units] for side in sides), **options))


def _floats(values: Any) -> Floats:
    return np.array(list(values), dtype=np.float64)


# --- what must be equal, and what should be known ---------------------------------------------------------------------


def _same(before: Evaluation, after: Evaluation, path: tuple[str, ...], besides: tuple[str, ...] = ()) -> None:
    """Refuse two evaluations that differ at ``path`` of their ``results.json``, also in what no section names."""
    values = []
    for side in (before, after):
        value: Any = side.results
        for key in path:
            value = value[key]
        values.append({k: v for k, v in value.items() if k not in besides} if isinstance(value, dict) else value)
    if values[0] == values[1]:
        return
    one, two, name = *values, ".".join(path)
    if isinstance(one, dict) and isinstance(two, dict):
        key = next(k for k in [*one, *two] if one.get(k) != two.get(k))
        one, two, name = one.get(key), two.get(key), f"{name}.{key}"
    raise InputError(
        f"{name} is {one!r} in {before.path} and {two!r} in {after.path}; evaluate both with the same settings"
    )


_JUDGES_DIGESTS = ("sha256", "fingerprint")
"""What a result says of its judge's weights; earlier versions did not say it of every judge."""


def _unknown_digests(one: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[str, ...]:
    """Digests that only one of two records of a judge names."""
    return tuple(key for key in _JUDGES_DIGESTS if bool(one.get(key)) != bool(other.get(key)))


def _notes(before: Evaluation, after: Evaluation) -> list[str]:
    notes = []
    sides = ((before.path, before.figures), (after.path, after.figures))
    one, other = before.figures, after.figures
    is_judged = one.toxicity is not None and other.toxicity is not None
    if is_judged and _unknown_digests(one.judge, other.judge):
        notes.append("only one of the two names the digest of its judge's weights: they may differ")
    for part, what, verb in (
        *((p, p, "is") for p in ("perplexity", "toxicity")),
        ("neutral", "neutral prompts", "are"),
    ):
        for (path, figures), (_, opposite) in (sides, sides[::-1]):
            if getattr(figures, part) and not getattr(opposite, part):
                notes.append(f"{what} {verb} in {path} only and {verb} not compared")
    for (path, figures), (_, opposite) in (sides, sides[::-1]) if is_judged else ():
        odd = sorted(figures.judges.keys() - opposite.judges.keys())
        notes += [f"the judge {name} is in {path} only and is not compared" for name in odd]
    for (path, figures), (_, opposite) in (sides, sides[::-1]):
        odd = sorted(figures.measurements.keys() - opposite.measurements.keys())
        notes += [f"{name} is in {path} only and is not compared" for name in odd]
    models = [one.model, other.model]
    if models[0].fingerprint != models[1].fingerprint:
        notes.append(f"the models were loaded with different weights: {models[0].pretrained}, {models[1].pretrained}")
    elif key := differing_config(models[0].config, models[1].config):
        notes.append(f"the models have the same weights, but their configs differ in {key}")
    elif models[0].evaluated_fingerprint == models[1].evaluated_fingerprint:
        notes.append("both evaluations are of the same weights")
    if models[0].dtype != models[1].dtype:
        notes.append(f"the models differ in dtype: {models[0].dtype}, {models[1].dtype}")
    for side in (before, after):
        figures = side.figures
        if figures.plan is None and not side.is_unedited and figures.model.evaluated_fingerprint:
            notes.append(f"{side.path}: the weights were changed after loading, by no plan that is known")
        if (word_filter := figures.word_filter) is not None:
            counts = f"{word_filter.num_redrawn} of {len(side.completions)} completions were drawn again"
            rest = f"{word_filter.num_left} still hold a listed word after {word_filter.tries} tries"
            notes.append(f"{side.path}: a word filter ({word_filter.words}): {counts}, {rest}")
        if count := figures.num_overlapping_prompts:
            notes.append(f"{side.path}: {count} prompts were used to make the plan, so this is not held out")
        if share := figures.overlapping_text:
            notes.append(f"{side.path}: {share:.0%} of the text held the plan's budget, so perplexity is not held out")
        if pairs := figures.num_overlapping_pairs:
            notes.append(f"{side.path}: {pairs} pairs were used to make the plan, so their figures are not held out")
    return notes


# --- the table --------------------------------------------------------------------------------------------------------


def _rows(comparison: Comparison) -> list[tuple[Cell, ...]]:
    rows = []
    if (p := comparison.perplexity) is not None:
        ends = [None if end is None else 100 * (end - 1) for end in (p.low, p.high)]
        change = Number(100 * (p.ratio - 1), form="+.2f", unit=" %")
        cells = (change, interval(*ends, p.num_blocks, "+.2f", unit=" %"), p_value(p.p_value), None, None)
        rows.append(("perplexity", Number(p.before, form=".4f"), Number(p.after, form=".4f"), *cells))
    for name, change in comparison.changes_of_prompts().items():
        row = _row(name, change)
        rows.append((*row[:6], None, row[7]) if name == FLUENCY["length"] else row)
    if (neutral := comparison.neutral) is not None:
        changed = changed_completions(neutral.num_changed, neutral.num_completions)
        rows.append(("neutral prompts: changed completions", None, None, changed, None, None, None, None))
    return rows + [_row(name, change, "units") for name, change in comparison.changes_of_units().items()]


def changed_completions(num_changed: int, num_completions: int) -> Cell:
    """``N of M (P %)``."""
    numbers = (Number(num_changed, form="d"), Number(num_completions, form="d"))
    if not num_completions:
        return Numbers("{} of {}", numbers)
    return Numbers("{} of {} ({})", (*numbers, Number(100 * num_changed / num_completions, form=".1f", unit=" %")))


def _row(name: str, c: PairedChange, unit: str = "prompts") -> tuple[Cell, ...]:
    return (
        name,
        Number(c.before, form=".4f"),
        Number(c.after, form=".4f"),
        with_relative(c.change, c.relative_change, "+.4f", "+.1f"),
        interval(c.low, c.high, c.num_pairs, "+.4f"),
        p_value(c.p_value),
        better_worse(c.improved, c.worsened, c.num_pairs),
        "" if c.pairs_needed is None else f"{c.pairs_needed} {unit}",
    )
