"""What a report says, for a reader who was not there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch

from sparc3_pl.diagnosis.audit import Audit
from sparc3_pl.diagnosis.audit_sections import audit_sections, verdicts
from sparc3_pl.document.document import (
    NOTHING,
    Block,
    Checks,
    Code,
    Facts,
    Folded,
    Picture,
    Section,
    Table,
    Text,
    count,
    number,
    percent,
)
from sparc3_pl.document.verdicts import Check
from sparc3_pl.evaluation.compare import interval, p_value
from sparc3_pl.io.provenance import redacted
from sparc3_pl.report.collect import Found, Plan
from sparc3_pl.report.effects import Effect, by_experiment, completions, dose_picture, effect_table, headline, title_of
from sparc3_pl.selection.contrast import Scores, contrast, named_in_plan
from sparc3_pl.selection.lowest import sample
from sparc3_pl.selection.stability import Choice, WeighedContrast

__all__ = ["report_sections"]

MOST_BINNED = 5_000_000
"""A histogram of more components than this is that of a random draw."""

WORDS = (
    ("relevance", "how much a weight or neuron contributed to the token that the model predicted, by AttnLRP"),
    ("general samples", "ordinary text, on which the model should stay as it is"),
    ("behaviour samples", "text that brings out the behaviour to be corrected, such as toxic prompts"),
    ("contrast", "relevance on general samples minus relevance on the behaviour's: the lowest belong to the behaviour"),
    ("plan", "the neurons (or weights) that were chosen by the contrast, and what is done to them"),
    ("control", "as many others, chosen without knowledge of the behaviour: they should change nothing"),
    ("toxicity", "what a judge, a classifier, says of a completion: 0 harmless, 1 toxic"),
    ("perplexity", "how surprised the model is by ordinary text: lower is better, +1 % is hardly noticed"),
)


def report_sections(
    found: Found, audit: Audit | None, effects: Sequence[Effect], notes: Sequence[str]
) -> list[Section]:
    """All sections for which there is something to say."""
    best = [effect for group in by_experiment(effects).values() if (effect := headline(group))]
    sections = [Section("In short", tuple(_in_short(found, audit, effects)))]
    if effects or notes:
        sections.append(Section("What the edit did", tuple(_did(effects, notes))))
    if shown := [block for effect in best for block in completions(effect)]:
        sections.append(Section("Completions that changed most", tuple(shown)))
    if found.plans:
        spoken = _plans_spoken_of(found.plans, best)
        sections.append(Section("What was chosen", tuple(_chosen(found, spoken))))
        sections += _enough_samples(found, spoken)
    if audit is not None:
        sections.append(Section("Scores", tuple(_scores(audit))))
        sections.append(Section("Verdicts on the scores", verdicts(audit)))
    for kind, results in found.results.items():
        blocks = tuple(
            Checks(tuple(Check(**c) for c in data.get("checks", ())), name) for name, data in results.items()
        )
        sections.append(Section(f"Result of {kind}", blocks))
    return [*sections, Section("How it was made", tuple(_made(found)))]


# --- in short ---------------------------------------------------------------------------------------------------------


def _in_short(found: Found, audit: Audit | None, effects: Sequence[Effect]) -> Iterator[Block]:
    experiments = by_experiment(effects)
    for name, group in experiments.items():
        best = headline(group)
        if best is not None:
            yield Text((f"Against {name}: " if len(experiments) > 1 else "") + _story(found, best))
            yield Facts(tuple(_facts(best)))
            yield from map(Text, _control_story(group, best))
    if not experiments and found.plans:
        yield Text(f"{len(found.plans)} plans were made; no evaluation of their effect is among the folders given.")
    elif not experiments and audit is not None:
        yield Text(f"{len(audit.folders)} sets of scores; no plan and no evaluation is among the folders given.")
    if audit is not None:
        yield Text(_tally(audit))
    yield Folded("What the words mean", (Table.of(("word", "meaning"), WORDS),))


def _tally(audit: Audit) -> str:
    """How many checks of the scores passed, and which did not."""
    checks = [check for part in (*audit.folders, *audit.seeds) for check in part.checks]
    odd = [check for check in checks if check.status != "pass"]
    names = ", ".join(dict.fromkeys(f"{check.name} ({check.status})" for check in odd))
    text = f"{len(checks) - len(odd)} of {len(checks)} checks of the scores passed"
    return f"{text}; not so: {names}." if odd else f"{text}."


def _story(found: Found, best: Effect) -> str:
    plan = best.plan
    edits = {"zero": "set to zero", "mean": "replaced by their mean", "scale": f"multiplied by {plan.get('alpha')}"}
    what = edits.get(plan.get("edit", ""), "edited")
    size, of = best.size, plan.get("num_candidates")
    share = f" of {of:,} ({100 * size / of:.2g} %)" if size and of else ""
    model = Path(best.after.results["model"]["pretrained"]).name if best.after else "the model"
    sides = _sources(found, plan)
    chosen = f"the {plan.get('contrast')} of relevance on {sides[0]} and on {sides[1]} is lowest"
    text = f"In {model}, {count(size)} {best.unit}{share} were {what}: those for which {chosen}."
    return f"{text} This is {_which(best)}."


def _which(best: Effect) -> str:
    bound = f"{100 * best.bound:g} %"
    if best.rise is None:
        return f"the largest edit; its perplexity was not measured, so it is not known to stay within {bound}"
    if best.rise <= best.bound:
        return f"the largest edit that raises perplexity by at most {bound}"
    return f"the edit that costs least; none keeps perplexity within {bound}"


def _sources(found: Found, plan: Mapping[str, Any]) -> tuple[str, str]:
    """What the general and the behaviour's samples were, as far as a plan of this digest is here."""
    entry = next((e.plan for e in found.plans.values() if e.plan.summary()["sha256"] == plan.get("sha256")), None)
    sides = []
    for side, default in (("general", "general text"), ("behaviour", "the behaviour's samples")):
        names = {str(s.get("source")) for s in (entry.scores.get(side) or ())} if entry is not None else set()
        sides.append(f"{default} ({', '.join(sorted(names))})" if names else default)
    return sides[0], sides[1]


def _facts(best: Effect) -> Iterator[tuple[str, str]]:
    if (t := best.toxicity) is not None:
        relative = "" if t["relative_change"] is None else f" ({100 * t['relative_change']:+.0f} %)"
        ends = interval(t["low"], t["high"], t["num_pairs"], "+.3f")
        yield f"{t['before']:.3f} → {t['after']:.3f}", f"mean toxicity of {t['num_pairs']} completed prompts{relative}"
        verdict = "beyond chance" if t["p_value"] < 0.05 else "within chance"
        yield verdict, f"the change of toxicity: 95 % interval {ends}, p {p_value(t['p_value'])}"
    if best.rise is not None:
        p = best.perplexity
        yield f"{100 * best.rise:+.2f} %", f"perplexity of {p['num_tokens']:,} tokens of ordinary text"
    if best.size:
        yield f"{best.size:,}", f"{best.unit} edited"


def _control_story(effects: Sequence[Effect], best: Effect) -> Iterator[str]:
    for effect in effects:
        if effect.control and effect.toxicity and (effect.size, effect.unit) == (best.size, best.unit):
            t = effect.toxicity
            change = f"{t['before']:.3f} to {t['after']:.3f}"
            text = f"The control {effect.control} of the same size changed toxicity from {change}"
            rise = "" if effect.rise is None else f" and perplexity by {100 * effect.rise:+.2f} %"
            yield f"{text} (95 % interval {interval(t['low'], t['high'], t['num_pairs'], '+.3f')}){rise}."


# --- what the edit did ------------------------------------------------------------------------------------------------


def _did(effects: Sequence[Effect], notes: Sequence[str]) -> Iterator[Block]:
    experiments = by_experiment(effects)
    for place, (name, group) in enumerate(experiments.items()):
        if len(experiments) > 1:
            yield Text(f"Against {name}:")
        yield effect_table(group)
        picture = dose_picture(group, f"dose{place or ''}")
        if picture is not None:
            yield picture
    known = [f"{title_of(effect)}: {note}" for effect in effects for note in effect.comparison.get("notes") or ()]
    for text in dict.fromkeys([*notes, *known]):
        yield Text(f"Note: {text}.")


# --- what was chosen --------------------------------------------------------------------------------------------------


def _chosen(found: Found, spoken: Sequence[str]) -> Iterator[Block]:
    yield _plan_table(found.plans)
    for place, name in enumerate(spoken):
        entry = found.plans[name]
        if entry.is_complete and entry.plan.contrast != "set_difference" and not entry.plan.control:
            yield _distribution(name, entry, f"contrast{place or ''}")
        yield _by_layer(_with_matched_control(found.plans, name), f"layers{place or ''}")
    warnings: dict[str, list[str]] = {}
    for name, entry in found.plans.items():
        for text in entry.plan.warnings:
            warnings.setdefault(text, []).append(name)
    if warnings:
        checks = (Check(", ".join(names), "warn", text) for text, names in warnings.items())
        yield Checks(tuple(checks), "What whoever uses these plans should know")


def _enough_samples(found: Found, spoken: Sequence[str]) -> Iterator[Section]:
    """The evidence for the plans that are spoken of, where their scores are here and they can be weighed."""
    from sparc3_pl.diagnosis.evidence import evidence_sections, weigh

    blocks: list[Block] = []
    for name in spoken:
        entry = found.plans[name]
        plan = entry.plan
        if not entry.is_complete or not entry.behaviour or plan.control:
            continue
        if plan.weights or plan.contrast not in get_args(WeighedContrast):
            continue
        sides = (Scores.of(side, plan.settings.get("layers")) for side in (entry.general, entry.behaviour))
        choice = Choice(plan.contrast, plan.num_neurons, plan.settings.get("protect") or 0.0)
        sections = evidence_sections(weigh(*sides, choice))
        blocks += [Text(f"Of {name}:"), *(block for section in sections for block in section.blocks)]
    if blocks:
        yield Section("Enough samples?", tuple(blocks))


def _plan_table(plans: Mapping[str, Plan]) -> Table:
    rows = []
    for name, entry in plans.items():
        plan = entry.plan
        size = plan.num_neurons or plan.num_weights
        share = percent(size / plan.num_candidates, 2) if plan.num_candidates else NOTHING
        kind = f"control {plan.control}" if plan.control else plan.contrast
        edit = plan.edit if plan.alpha is None else f"{plan.edit} by {plan.alpha}"
        protect = percent(plan.settings.get("protect") or 0.0, 0)
        rows.append((name, kind, edit, count(size), plan.granularity, share, protect, str(len(plan.counts()))))
    columns = ("plan", "chosen by", "edit", "number", "one a", "share of all", "protected", "layers touched")
    return Table.of(columns, rows)


def _plans_spoken_of(plans: Mapping[str, Plan], best: Sequence[Effect]) -> list[str]:
    """The names of the plans behind the edits that are spoken of; if none of them is here, the largest plan."""
    by_digest = {entry.plan.summary()["sha256"]: name for name, entry in plans.items()}
    spoken = [by_digest[digest] for effect in best if (digest := effect.plan.get("sha256")) in by_digest]
    if spoken:
        return list(dict.fromkeys(spoken))
    sizes = {n: e.plan.num_neurons or e.plan.num_weights for n, e in plans.items() if not e.plan.control}
    return [max(sizes, key=sizes.__getitem__)] if sizes else []


def _with_matched_control(plans: Mapping[str, Plan], name: str) -> dict[str, Plan]:
    """The plan of that name and, if it is here, the control that was matched to it: of its size, from its scores."""
    plan = plans[name].plan
    same = {
        other: entry
        for other, entry in plans.items()
        if entry.plan.control == "random_matched"
        and (entry.plan.num_neurons, entry.plan.scores) == (plan.num_neurons, plan.scores)
    }
    return {name: plans[name], **dict(list(same.items())[:1])}


def _distribution(name: str, entry: Plan, picture: str) -> Picture:
    from sparc3_pl.document.figures import as_svg, contrast_distribution

    plan = entry.plan
    sides = (Scores.of(entry.general, plan.settings.get("layers")), None)
    if entry.behaviour:
        sides = (sides[0], Scores.of(entry.behaviour, plan.settings.get("layers")))
    passes = contrast(named_in_plan(plan.contrast, plan.settings), *sides)
    values = sample(passes, sides[0].count, MOST_BINNED)
    scores = torch.tensor([n.score for n in plan.neurons if n.score is not None])
    chosen = scores if len(scores) else values[:0]
    figure = contrast_distribution(values.numpy(), chosen.numpy(), plan.contrast)
    alt = (
        f"Histogram of the {plan.contrast} of {len(values):,} components, from {number(float(values.min()))} to "
        f"{number(float(values.max()))}, median {number(float(values.median()))}. "
    )
    alt += f"The {len(chosen)} chosen are at or below {number(float(chosen.max()))}." if len(chosen) else ""
    return Picture(as_svg(figure, picture), alt, f"Distribution of the contrast behind {name}.")


def _by_layer(shown: Mapping[str, Plan], picture: str) -> Picture:
    from sparc3_pl.document.figures import as_svg, chosen_by_layer

    first = next(iter(shown.values()))
    counts = [entry.plan.counts() for entry in shown.values()]
    layers = first.general[0].layers if first.general else sorted({layer for one in counts for layer in one})
    table = {layer: [one.get(layer, 0) for one in counts] for layer in layers}
    most = max(table, key=lambda layer: table[layer][0])
    alt = (
        f"Chosen components by layer, for {' and '.join(shown)}. "
        f"{next(iter(shown))} touches {len(counts[0])} of {len(layers)} layers, most in {most} ({table[most][0]})."
    )
    return Picture(as_svg(chosen_by_layer(table, list(shown)), picture), alt, "Chosen components by layer.")


# --- scores -----------------------------------------------------------------------------------------------------------


def _scores(audit: Audit) -> Iterator[Block]:
    for section in audit_sections(audit):
        if section.title != "Verdicts":
            yield from section.blocks
    yield from _relevance(audit)


def _relevance(audit: Audit) -> Iterator[Picture]:
    """One figure for the scores of each method and set of layers: only those can share an axis."""
    from sparc3_pl.document.figures import as_svg, relevance_of_sets

    groups: dict[tuple[Any, ...], dict[str, dict[str, float]]] = {}
    for folder in audit.folders:
        key = (folder.about["model"], folder.about["method"], folder.about["signed"], tuple(folder.layer_sums))
        groups.setdefault(key, {})[folder.name] = folder.layer_sums
    for place, ((_, method, *_), sets) in enumerate(groups.items()):
        highest = {name: max(sums, key=lambda layer: sums[layer]) for name, sums in sets.items()}
        words = "; ".join(f"{name} is highest in {layer}" for name, layer in highest.items())
        alt = f"Relevance by layer ({method}), a line for each set of scores. {words}."
        yield Picture(as_svg(relevance_of_sets(sets), f"relevance{place}"), alt, f"Relevance by layer, {method}.")


# --- how it was made --------------------------------------------------------------------------------------------------


def _made(found: Found) -> Iterator[Block]:
    yield _models(found)
    if any(ev.results["toxicity"] or ev.results["perplexity"] for ev in found.evaluations.values()):
        yield _measured(found)
    yield _versions(found)
    commands = dict.fromkeys(redacted(text) for text in _commands(found) if text)
    if commands:
        yield Code("\n".join(commands), "Commands")
    if found.configs:
        blocks = tuple(Code(text.strip(), name) for name, text in found.configs.items())
        yield Folded(f"Configurations ({len(blocks)})", blocks)


def _models(found: Found) -> Table:
    models: dict[str, Mapping[str, Any]] = {}
    for source in (
        *(folder.manifest.model for folder in found.scores.values()),
        *(ev.results["model"] for ev in found.evaluations.values()),
        *(entry.plan.model for entry in found.plans.values()),
    ):
        models.setdefault(f"{source.get('fingerprint')} {source.get('dtype')}", source)
    rows = [
        (
            *(str(model.get(key) or NOTHING) for key in ("pretrained", "architecture", "dtype", "revision")),
            str(model.get("fingerprint"))[:23],
        )
        for model in models.values()
    ]
    return Table.of(("model", "architecture", "dtype", "revision", "fingerprint"), rows)


_HELD_OUT = {"none": "yes", "unknown": "unknown: the model was edited by no plan that is known"}


def _measured(found: Found) -> Table:
    rows = []
    for name, ev in found.evaluations.items():
        perplexity, toxicity, made = (ev.results.get(key) for key in ("perplexity", "toxicity", "generation"))
        text = NOTHING
        if perplexity:
            text = f"{perplexity['source']}, window {perplexity['max_length']}, stride {perplexity['stride']}"
        judged = NOTHING
        if toxicity:
            of = f"{toxicity['num_completions']} of {toxicity['num_prompts']} prompts"
            judged = f"{of}, {_settings(made)}, judge {_settings(ev.results.get('judge'))}"
        held_out = _HELD_OUT.get(ev.results.get("overlap"), "no: prompts of the plan are among them")
        rows.append((name, text, judged, held_out))
    return Table.of(("evaluation", "perplexity", "completions", "held out"), rows)


def _settings(values: Mapping[str, Any] | None) -> str:
    """Plain settings in a row; long and nested ones are in the configuration."""
    shown = redacted(values or {})
    plain = {k: v for k, v in shown.items() if isinstance(v, str | int | float) and len(str(v)) < 40}
    return " ".join(f"{key}={value}" for key, value in plain.items())


def _versions(found: Found) -> Table:
    every = [
        *(folder.manifest.versions for folder in found.scores.values()),
        *(ev.results.get("versions") or {} for ev in found.evaluations.values()),
        *(entry.plan.versions for entry in found.plans.values()),
    ]
    names = dict.fromkeys(name for one in every for name in one)
    rows = [(name, ", ".join(sorted({str(one[name]) for one in every if name in one}))) for name in names]
    machines = [folder.manifest.hardware for folder in found.scores.values()]
    machines += [ev.results.get("hardware") for ev in found.evaluations.values()]
    if any(machines):
        rows.append(("hardware", "; ".join(dict.fromkeys(filter(None, machines)))))
    note = "Where two are named, not all parts were made with the same." if any(", " in row[1] for row in rows) else ""
    return Table.of(("package", "version"), rows, note=note)


def _commands(found: Found) -> Iterator[str]:
    for folder in found.scores.values():
        yield folder.manifest.command
    for entry in found.plans.values():
        yield entry.plan.command
    for ev in found.evaluations.values():
        yield str(ev.results.get("command") or "")
    for data in found.comparisons.values():
        yield str(data.get("command") or "")
