"""The sections of a report, for a reader who took no part in the work."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch

from sparc3_pl.circuit.sections import circuit_blocks, circuit_story
from sparc3_pl.diagnosis.audit_sections import audit_sections, verdicts
from sparc3_pl.diagnosis.score_checks import Audit, num_bytes
from sparc3_pl.document.blocks import (
    NOTHING,
    Block,
    Checks,
    Code,
    Facts,
    Folded,
    Number,
    Picture,
    Section,
    Table,
    Text,
    count,
    interval,
    number,
    p_value,
    percent,
)
from sparc3_pl.document.verdicts import Check
from sparc3_pl.io.formats import to_json
from sparc3_pl.io.provenance import redacted
from sparc3_pl.model.identity import ModelRecord
from sparc3_pl.pruning.plan import PlanSummary, PrunePlan
from sparc3_pl.report.collect import Inputs, PlanWithScores
from sparc3_pl.report.curves import curve_sections
from sparc3_pl.report.effects import (
    Effect,
    by_experiment,
    completions,
    dose_pictures,
    effect_table,
    fluency_table,
    gains_table,
    headline,
    judge_table,
    measurement_table,
    neutral_table,
    title_of,
)
from sparc3_pl.runtime.timing import COLUMNS, rows_of_results, table_rows
from sparc3_pl.scores.folder import ScoreFolder
from sparc3_pl.selection.contrast import SideScores, contrast, named_in_plan
from sparc3_pl.selection.lowest import sample
from sparc3_pl.selection.stability import SelectionSettings, WeighedContrast
from sparc3_pl.statistics.paired import PairedChange

__all__ = ["report_sections"]

MOST_BINNED = 5_000_000
"""The histogram of more components than this is made of a random draw."""
MOST_READ = 100_000_000
"""Bytes of scores in a folder up to which a report reads them again, to verify them and to draw the contrast. Neuron
scores take some megabytes and are read in a second; weight scores of a model of 8 billion weights take 30 GB per
folder, which a report at the end of every experiment would read for minutes, though they were verified when used."""

WORDS = (
    (
        "relevance",
        "how much a component contributed to what was attributed (by AttnLRP: to the predicted token; for an edit "
        "within a budget: the derivative by the component's gain)",
    ),
    ("general samples", "ordinary text, on which the model should stay as it is"),
    ("behaviour samples", "text that brings out the behaviour to be corrected, such as toxic prompts"),
    (
        "contrast",
        "what ranks the components: by default relevance on general samples minus that on the behaviour's; for an edit "
        "within a budget, effect for cost",
    ),
    ("plan", "the neurons (or weights) that were chosen by the contrast, and what is done to them"),
    (
        "control",
        "an edit of the same size on components that do not belong to the behaviour: it should change nothing",
    ),
    ("toxicity", "the score that a judge, a classifier, gives to a completion: 0 harmless, 1 toxic"),
    ("circuit", "components of which a few do a task: kept alone, they keep most of it"),
    ("faithfulness", "the share of a task that a circuit keeps: 0 as much as nothing, 1 as much as the model"),
    ("perplexity", "how surprised the model is by ordinary text: lower is better, +1 % is hardly noticed"),
)


def report_sections(
    inputs: Inputs, audit: Audit | None, effects: Sequence[Effect], notes: Sequence[str]
) -> list[Section]:
    """All sections that have content."""
    best = [effect for group in by_experiment(effects).values() if (effect := headline(group))]
    sections = [Section("In short", tuple(_in_short(inputs, audit, effects)))]
    if effects or notes:
        sections.append(Section("What the edit did", tuple(_effects(effects, notes))))
    sections += curve_sections({name: summary.curves for name, summary in inputs.experiments.items()})
    if shown := [block for effect in best for block in completions(effect)]:
        sections.append(Section("Completions that changed most", tuple(shown)))
    if inputs.plans:
        names = _headline_plans(inputs.plans, best)
        sections.append(Section("What was chosen", tuple(_chosen(inputs, names))))
        sections += _enough_samples(inputs, names)
    for place, (name, results) in enumerate(inputs.circuits.items()):
        sections.append(Section(f"Circuits: {name}", tuple(circuit_blocks(results, str(place)))))
    if audit is not None:
        tables = [block for section in audit_sections(audit) if section.title != "Verdicts" for block in section.blocks]
        sections.append(Section("Scores", (*tables, *_relevance(audit))))
        sections.append(Section("Verdicts on the scores", verdicts(audit)))
    for kind, diagnoses in inputs.diagnoses.items():
        blocks = tuple(Checks(tuple(diagnosis.checks), name) for name, diagnosis in diagnoses.items())
        sections.append(Section(f"Result of {kind}", blocks))
    return [*sections, Section("How it was made", tuple(_provenance(inputs)))]


# --- in short ---------------------------------------------------------------------------------------------------------


def _in_short(inputs: Inputs, audit: Audit | None, effects: Sequence[Effect]) -> Iterator[Block]:
    experiments = by_experiment(effects)
    for name, group in experiments.items():
        best = headline(group)
        if best is not None:
            yield Text((f"Against {name}: " if len(experiments) > 1 else "") + _story(inputs, best))
            yield Facts(tuple(_facts(best)))
            if (disagreement := best.comparison.disagreement) is not None:
                yield Text(f"{disagreement[0].upper()}{disagreement[1:]}.")
            yield from map(Text, _control_story(group, best))
            yield from map(Text, _filter_story(group, best))
    if not experiments and inputs.plans:
        yield Text(f"{len(inputs.plans)} plans; their effects were not evaluated, or the evaluations were not given.")
    elif not experiments and audit is not None:
        yield Text(f"{len(audit.folders)} score folders; no plans and no evaluations were given.")
    for name, results in inputs.circuits.items():
        yield from map(Text, circuit_story(results, name))
    if audit is not None:
        checks = [check for part in (*audit.folders, *audit.seeds) for check in part.checks]
        others = [check for check in checks if check.status != "pass"]
        names = ", ".join(dict.fromkeys(f"{check.name} ({check.status})" for check in others))
        text = f"{len(checks) - len(others)} of {len(checks)} checks of the scores passed"
        yield Text(f"{text}; the others: {names}." if others else f"{text}.")
    yield Folded("What the words mean", (Table.of(("word", "meaning"), WORDS),))


def _story(inputs: Inputs, best: Effect) -> str:
    plan = best.plan
    model = Path(best.after.figures.model.pretrained or "").name if best.after else "the model"
    text = f"In {model}, {count(best.size)} {best.unit} were edited."
    if plan is not None:
        of = ""
        if plan.size and plan.num_candidates:
            of = f" of {plan.num_candidates:,} ({100 * plan.size / plan.num_candidates:.2g} %)"
        text = f"In {model}, {count(best.size)} {best.unit}{of} were {plan.participle()}: {_chosen_by(inputs, plan)}."
    bound = f"{100 * best.bound:g} %"
    rise = best.comparison.rise
    if rise is None:
        return f"{text} This is the largest edit; whether it keeps perplexity within {bound} was not measured."
    if rise <= best.bound:
        return f"{text} This is the largest edit that raises perplexity by at most {bound}."
    return f"{text} This is the edit that raises perplexity least; no edit keeps it within {bound}."


def _chosen_by(inputs: Inputs, plan: PlanSummary) -> str:
    """Which components were chosen, in words."""
    general, behaviour = _sources(inputs, plan)
    if plan.contrast == "expertise":
        return f"those that tell {behaviour} with the label from the others best, by AUROC"
    if plan.gains is not None:
        return f"the further, the more that changes what {behaviour} measure for what it costs on {general}"
    if plan.contrast == "general":
        return f"those with the lowest scores on {general}"
    return f"those for which the {plan.contrast} of relevance on {general} and on {behaviour} is lowest"


def _sources(inputs: Inputs, plan: PlanSummary) -> tuple[str, str]:
    """The general and the behaviour's samples in words, with their sources if the plan is among the inputs."""
    entry = next((e.plan for e in inputs.plans.values() if e.plan.summary().sha256 == plan.sha256), None)
    sides = []
    for side, default in (("general", "general text"), ("behaviour", "the behaviour's samples")):
        names = {str(s.get("source")) for s in (entry.scores.get(side) or ())} if entry is not None else set()
        sides.append(f"{default} ({', '.join(sorted(names))})" if names else default)
    return sides[0], sides[1]


def _facts(best: Effect) -> Iterator[tuple[str, str]]:
    if (t := best.toxicity) is not None:
        relative = "" if t.relative_change is None else f" ({100 * t.relative_change:+.0f} %)"
        yield f"{t.before:.3f} → {t.after:.3f}", f"mean toxicity of {t.num_pairs} completed prompts{relative}"
        verdict = "beyond chance" if t.p_value < 0.05 else "within chance"
        yield verdict, f"the change of toxicity: 95 % interval {_ends(t)}, p {p_value(t.p_value)}"
    for text, rise in best.comparison.rises.items():
        of = text or f"{best.comparison.perplexity.num_tokens:,} tokens of ordinary text"
        yield f"{100 * rise:+.2f} %", f"perplexity of {of}"
    if best.size:
        yield f"{best.size:,}", f"{best.unit} edited"


def _ends(change: PairedChange) -> str:
    return str(interval(change.low, change.high, change.num_pairs, "+.3f"))


def _control_story(effects: Sequence[Effect], best: Effect) -> Iterator[str]:
    for effect in effects:
        same = (effect.dose, effect.unit, effect.arm) == (best.dose, best.unit, best.arm)
        if effect.control and effect.toxicity and same:
            t = effect.toxicity
            change = f"{t.before:.3f} to {t.after:.3f}"
            text = f"The control {effect.control} of the same size changed toxicity from {change}"
            rise = effect.comparison.rise
            of_perplexity = "" if rise is None else f" and perplexity by {100 * rise:+.2f} %"
            yield f"{text} (95 % interval {_ends(t)}){of_perplexity}."


def _filter_story(effects: Sequence[Effect], best: Effect) -> Iterator[str]:
    for effect in effects:
        if (counts := effect.word_filter) and effect.toxicity and best.toxicity:
            t, edit = effect.toxicity, best.toxicity.after
            than = "lower than" if t.after < edit else "higher than" if t.after > edit else "the same as"
            yield (
                f"A filter that draws completions with a listed word again ({counts.num_redrawn:,} of "
                f"{len(effect.after.completions):,} were, {counts.num_left:,} still hold one) changed toxicity from "
                f"{t.before:.3f} to {t.after:.3f} (95 % interval {_ends(t)}), {than} the edit's {edit:.3f}."
            )


# --- what the edit did ------------------------------------------------------------------------------------------------


def _effects(effects: Sequence[Effect], notes: Sequence[str]) -> Iterator[Block]:
    experiments = by_experiment(effects)
    for place, (name, group) in enumerate(experiments.items()):
        if len(experiments) > 1:
            yield Text(f"Against {name}:")
        yield effect_table(group)
        for table_of in (judge_table, fluency_table, neutral_table, gains_table, measurement_table):
            if (table := table_of(group)) is not None:
                yield table
        yield from dose_pictures(group, f"dose{place or ''}")
    own_notes = []
    for effect in effects:
        texts = [*effect.comparison.notes, *filter(None, [effect.comparison.disagreement])]
        own_notes += [f"{title_of(effect)}: {note}" for note in texts]
    for text in dict.fromkeys([*notes, *own_notes]):
        yield Text(f"Note: {text}.")


# --- what was chosen --------------------------------------------------------------------------------------------------


def _chosen(inputs: Inputs, names: Sequence[str]) -> Iterator[Block]:
    yield _plan_table(inputs.plans)
    for place, name in enumerate(names):
        entry = inputs.plans[name]
        if entry.is_complete and entry.plan.contrast != "set_difference" and not entry.plan.control:
            if _is_large(entry):
                yield Text(
                    f"The distribution of the contrast behind {name} is not drawn: its scores are larger than "
                    f"{MOST_READ / 1e6:.0f} MB a folder and are not read again for a report."
                )
            else:
                yield _distribution(name, entry, f"contrast{place or ''}")
        yield _by_layer(_with_matched_control(inputs.plans, name), f"layers{place or ''}")
    warnings: dict[str, list[str]] = {}
    for name, entry in inputs.plans.items():
        for text in entry.plan.warnings:
            warnings.setdefault(text, []).append(name)
    if warnings:
        checks = (Check(", ".join(names), "warn", text) for text, names in warnings.items())
        yield Checks(tuple(checks), "Warnings")


def _scores_of(folders: Sequence[ScoreFolder], plan: PrunePlan) -> SideScores:
    """The scores that the plan was chosen from."""
    return SideScores.of(folders, plan.settings.get("layers"), plan.settings.get("left_out") or (), but=["plan"])


def _is_large(entry: PlanWithScores) -> bool:
    """Whether a report does not read the scores of a plan again, because of their size."""
    return any(num_bytes(folder) > MOST_READ for folder in (*entry.general, *entry.behaviour))


def _enough_samples(inputs: Inputs, names: Sequence[str]) -> Iterator[Section]:
    """The evidence section for these plans, as far as their scores are among the inputs and of neurons."""
    from sparc3_pl.diagnosis.evidence import evidence_sections, weigh
    from sparc3_pl.diagnosis.gains_evidence import gains_sections, weigh_gains
    from sparc3_pl.selection.budget import Budget

    blocks: list[Block] = []
    for name in names:
        entry = inputs.plans[name]
        plan = entry.plan
        if not entry.is_complete or not entry.behaviour or plan.control or _is_large(entry):
            continue
        contrast = named_in_plan(plan.contrast, plan.settings) if plan.contrast == "budget" else None
        if plan.holds_weights or not (isinstance(contrast, Budget) or plan.contrast in get_args(WeighedContrast)):
            continue
        sides = [_scores_of(side, plan) for side in (entry.general, entry.behaviour)]
        if isinstance(contrast, Budget):
            sections = gains_sections(weigh_gains(*sides, contrast))
        else:
            settings = SelectionSettings(plan.contrast, plan.num_neurons, plan.settings.get("protect") or 0.0)
            sections = evidence_sections(weigh(*sides, settings))
        blocks += [Text(f"Plan {name}:"), *(block for section in sections for block in section.blocks)]
    if blocks:
        yield Section("Enough samples?", tuple(blocks))


def _plan_table(plans: Mapping[str, PlanWithScores]) -> Table:
    rows = []
    for name, entry in plans.items():
        plan = entry.plan
        size = plan.num_neurons or plan.num_weights
        share = percent(size / plan.num_candidates if plan.num_candidates else None, 2)
        kind = f"control {plan.control}" if plan.control else plan.contrast
        edit = plan.edit if plan.alpha is None else f"{plan.edit} by {plan.alpha}"
        protect = percent(plan.settings.get("protect") or 0.0, 0)
        layers = Number(len(plan.counts()), form="d")
        rows.append((name, kind, edit, count(size), plan.unit, share, protect, layers))
    columns = ("plan", "chosen by", "edit", "number", "unit", "share of all", "protected", "layers touched")
    return Table.of(columns, rows)


def _headline_plans(plans: Mapping[str, PlanWithScores], best: Sequence[Effect]) -> list[str]:
    """The names of the plans behind the headline edits; if none of them is among the inputs, the largest plan."""
    by_digest = {entry.plan.summary().sha256: name for name, entry in plans.items()}
    names = [by_digest[plan.sha256] for effect in best if (plan := effect.plan) and plan.sha256 in by_digest]
    if names:
        return list(dict.fromkeys(names))
    sizes = {n: e.plan.num_neurons or e.plan.num_weights for n, e in plans.items() if not e.plan.control}
    return [max(sizes, key=sizes.__getitem__)] if sizes else []


def _with_matched_control(plans: Mapping[str, PlanWithScores], name: str) -> dict[str, PlanWithScores]:
    """The plan of that name and, if it is among the inputs, its matched control: of the same size and scores."""
    plan = plans[name].plan
    same = {
        other: entry
        for other, entry in plans.items()
        if entry.plan.control == "random_matched"
        and (entry.plan.num_neurons, entry.plan.scores) == (plan.num_neurons, plan.scores)
    }
    return {name: plans[name], **dict(list(same.items())[:1])}


def _distribution(name: str, entry: PlanWithScores, picture: str) -> Picture:
    from sparc3_pl.document.figures import as_svg, contrast_distribution

    plan = entry.plan
    sides = (_scores_of(entry.general, plan), _scores_of(entry.behaviour, plan) if entry.behaviour else None)
    passes = contrast(named_in_plan(plan.contrast, plan.settings), *sides)
    values = sample(passes, sides[0].count, MOST_BINNED)
    scores = torch.tensor([n.score for n in plan.neurons if n.score is not None])
    chosen = scores if len(scores) else values[:0]
    figure = contrast_distribution(values.numpy(), chosen.numpy(), plan.contrast)
    alt = (
        f"Histogram of the {plan.contrast} of {len(values):,} components, from {number(float(values.min()))} to "
        f"{number(float(values.max()))}, median {number(float(values.median()))}. "
    )
    alt += f"The {len(chosen)} chosen ones are at or below {number(float(chosen.max()))}." if len(chosen) else ""
    return Picture(as_svg(figure, picture), alt, f"Distribution of the contrast behind {name}.")


def _by_layer(plans: Mapping[str, PlanWithScores], picture: str) -> Picture:
    from sparc3_pl.document.figures import as_svg, chosen_by_layer

    first = next(iter(plans.values()))
    counts = [entry.plan.counts() for entry in plans.values()]
    layers = first.general[0].layers if first.general else sorted({layer for one in counts for layer in one})
    table = {layer: [one.get(layer, 0) for one in counts] for layer in layers}
    most = max(table, key=lambda layer: table[layer][0])
    alt = (
        f"Chosen components by layer, for {' and '.join(plans)}. "
        f"{next(iter(plans))} touches {len(counts[0])} of {len(layers)} layers, most in {most} ({table[most][0]})."
    )
    return Picture(as_svg(chosen_by_layer(table, list(plans)), picture), alt, "Chosen components by layer.")


# --- scores -----------------------------------------------------------------------------------------------------------


def _relevance(audit: Audit) -> Iterator[Picture]:
    """One picture per method and set of layers: only their scores can share an axis."""
    from sparc3_pl.document.figures import as_svg, relevance_of_sets

    groups: dict[tuple[Any, ...], dict[str, dict[str, float]]] = {}
    for folder in audit.folders:
        key = (folder.about.model, folder.about.method, folder.about.signed, tuple(folder.layer_sums))
        groups.setdefault(key, {})[folder.name] = folder.layer_sums
    for place, ((_, method, *_), sets) in enumerate(groups.items()):
        highest = {name: max(sums, key=lambda layer: sums[layer]) for name, sums in sets.items()}
        words = "; ".join(f"{name} is highest in {layer}" for name, layer in highest.items())
        alt = f"Relevance by layer ({method}), a line for each set of scores. {words}."
        yield Picture(as_svg(relevance_of_sets(sets), f"relevance{place}"), alt, f"Relevance by layer, {method}.")


# --- how it was made --------------------------------------------------------------------------------------------------


def _provenance(inputs: Inputs) -> Iterator[Block]:
    yield _models(inputs)
    if any(ev.figures.toxicity or ev.figures.perplexity for ev in inputs.evaluations.values()):
        yield _measured(inputs)
    yield _versions(inputs)
    if (times := _times(inputs)) is not None:
        yield times
    commands = dict.fromkeys(redacted(text) for text in _commands(inputs) if text)
    if commands:
        yield Code("\n".join(commands), "Commands")
    if inputs.configs:
        blocks = tuple(Code(text.strip(), name) for name, text in inputs.configs.items())
        yield Folded(f"Configurations ({len(blocks)})", blocks)


def _models(inputs: Inputs) -> Table:
    models: dict[str, ModelRecord] = {}
    for source in (
        *(folder.manifest.model for folder in inputs.scores.values()),
        *(ev.figures.model for ev in inputs.evaluations.values()),
        *(entry.plan.model for entry in inputs.plans.values()),
        *(results.model for results in inputs.circuits.values()),
    ):
        models.setdefault(f"{source.fingerprint} {source.dtype}", source)
    rows = [
        (
            *(str(one or NOTHING) for one in (model.pretrained, model.architecture, model.dtype, model.revision)),
            str(model.fingerprint)[:23],
        )
        for model in models.values()
    ]
    return Table.of(("model", "architecture", "dtype", "revision", "fingerprint"), rows)


_HELD_OUT = {"none": "yes", "unknown": "unknown: the model was edited, but by no known plan"}


def _measured(inputs: Inputs) -> Table:
    rows = []
    for name, ev in inputs.evaluations.items():
        figures, text, completions_text = ev.figures, NOTHING, NOTHING
        if (perplexity := figures.perplexity) is not None:
            text = f"{perplexity.source}, window {perplexity.max_length}, stride {perplexity.stride}"
            if perplexity.windows == "published":
                text += f", {perplexity.num_windows} whole windows as papers print it"
        if (toxicity := figures.toxicity) is not None:
            number_of = f"{toxicity.num_completions} of {toxicity.num_prompts} prompts"
            completions_text = f"{number_of}, {_settings(to_json(figures.generation))}"
            completions_text += f", judge {_settings(figures.judge)}"
            for judge, of_judge in figures.judges.items():
                completions_text += f"; judge {judge}: {_settings(of_judge.judge)}"
            if figures.word_filter is not None:
                completions_text += f"; word filter {_settings(to_json(figures.word_filter))}"
        hints = {
            "some prompts were used to make the plan": figures.num_overlapping_prompts,
            "some of the text held its budget": figures.overlapping_text,
            "some pairs were used to make it": figures.num_overlapping_pairs,
        }
        hint = " and ".join(words for words, number_of in hints.items() if number_of)
        held_out = _HELD_OUT.get(figures.overlap, f"no: {hint or 'prompts were used to make the plan'}")
        rows.append((name, text, completions_text, held_out))
    return Table.of(("evaluation", "perplexity", "completions", "held out"), rows)


def _times(inputs: Inputs) -> Table | None:
    """A table of where the time went; None if no result says."""
    results = {name: folder.manifest.timing for name, folder in inputs.scores.items()}
    results |= {name: ev.figures.timing for name, ev in inputs.evaluations.items()}
    results |= {name: circuit.timing for name, circuit in inputs.circuits.items()}
    rows = table_rows(rows_of_results(results))
    note = "The share is that of the best matrix product measured on the machine in the same run; times of one process."
    return Table.of(COLUMNS, rows, title="Where the time went", note=note) if rows else None


def _settings(values: Mapping[str, Any] | None) -> str:
    """The short settings as ``key=value``; long and nested ones are in the configuration."""
    content = redacted(values or {})
    plain = {k: v for k, v in content.items() if isinstance(v, str | int | float) and len(str(v)) < 40}
    return " ".join(f"{key}={value}" for key, value in plain.items())


def _versions(inputs: Inputs) -> Table:
    every = [
        *(folder.manifest.versions for folder in inputs.scores.values()),
        *(ev.figures.versions for ev in inputs.evaluations.values()),
        *(entry.plan.versions for entry in inputs.plans.values()),
        *(results.versions for results in inputs.circuits.values()),
    ]
    names = dict.fromkeys(name for one in every for name in one)
    rows = [(name, ", ".join(sorted({str(one[name]) for one in every if name in one}))) for name in names]
    machines = [folder.manifest.hardware for folder in inputs.scores.values()]
    machines += [ev.figures.hardware for ev in inputs.evaluations.values()]
    machines += [results.hardware for results in inputs.circuits.values()]
    if any(machines):
        rows.append(("hardware", "; ".join(dict.fromkeys(filter(None, machines)))))
    several = any(", " in row[1] for row in rows)
    note = "Where two are named, parts of the work were done with different ones." if several else ""
    return Table.of(("package", "version"), rows, note=note)


def _commands(inputs: Inputs) -> Iterator[str]:
    for folder in inputs.scores.values():
        yield folder.manifest.command
    for entry in inputs.plans.values():
        yield entry.plan.command
    for ev in inputs.evaluations.values():
        yield ev.figures.command or ""
    for results in inputs.circuits.values():
        yield results.command or ""
    for comparison in inputs.comparisons.values():
        yield comparison.command or ""
