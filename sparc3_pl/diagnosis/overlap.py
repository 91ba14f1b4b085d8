"""The ``overlap`` command: the components that selections for several behaviours share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sparc3_pl.document.blocks import Picture, Section, Table, Text, count, number, p_value, percent
from sparc3_pl.document.publish import as_json, check_places, publish
from sparc3_pl.errors import InputError
from sparc3_pl.io.paths import distinct_names
from sparc3_pl.model.bitmask import BitMask
from sparc3_pl.pruning.plan import PrunePlan
from sparc3_pl.registry import Spec
from sparc3_pl.scores.folder import ScoreFolder
from sparc3_pl.selection.choose import make_plan
from sparc3_pl.selection.contrast import SideScores
from sparc3_pl.selection.contrast import contrast as contrast_of
from sparc3_pl.selection.intersections import (
    Ints,
    exclusive_intersections,
    exclusive_intersections_of_masks,
    expected_common,
    hypergeometric_p,
    matched_draws,
    pairs_and_all,
    permutation_p,
    quadrants,
    strata_by_rank,
)
from sparc3_pl.selection.lowest import collect
from sparc3_pl.statistics.agreement import rank_correlation

__all__ = ["Common", "Overlap", "measure_overlap", "overlap", "overlap_sections"]


@dataclass(frozen=True)
class Common:
    """The components that two or more selections share.

    Attributes:
        names: Names of the selections.
        common: Number of neurons that are in all of them.
        jaccard: ``common`` divided by the number of neurons that are in any of them.
        expected: Mean of ``common`` over random selections matched by layer and general relevance; None without general
            scores.
        p_value: Probability that such selections share as many, by permutation; likewise.
        expected_random: Mean of ``common`` over selections drawn uniformly from all neurons; None if the number of all
            neurons is unknown.
        p_hypergeometric: Probability that such selections share as many; None for more than two selections, likewise.
        correlation: Spearman's rank correlation of the two contrasts; None unless both are given as scores.
        quadrants: Shares of neurons by the signs of the two contrasts; likewise.
        cosine: Cosine of the changes of the gains, factor - 1; None unless two plans with ``edit=gains`` are compared.
    """

    names: tuple[str, ...]
    common: int
    jaccard: float
    expected: float | None
    p_value: float | None
    expected_random: float | None
    p_hypergeometric: float | None
    correlation: float | None = None
    quadrants: dict[str, float] | None = None
    cosine: float | None = None


@dataclass(frozen=True)
class Overlap:
    """The result of ``overlap``.

    Attributes:
        sizes: Size of each selection, by name.
        num_candidates: Number of neurons to choose from; None if neither a plan nor general scores tell it.
        groups: Every two selections, and all together.
        exclusive: Names of selections, and the number of neurons that are in exactly these.
        num_permutations: Number of draws for the p-values.
        stratum: Number of neurons per stratum.
        seed: Seed for the draws.
        unit: Word for the components: ``neurons``.
    """

    sizes: dict[str, int]
    num_candidates: int | None
    groups: tuple[Common, ...]
    exclusive: tuple[tuple[tuple[str, ...], int], ...]
    num_permutations: int
    stratum: int
    seed: int
    unit: str = "neurons"


def overlap(
    folders: list[str],
    general: list[str] | None = None,
    num_neurons: int = 100,
    contrast: Spec = "difference",
    protect: float = 0.0,
    num_permutations: int = 1000,
    stratum: int = 20,
    seed: int = 0,
    output: str | None = None,
    html: str | None = None,
    overwrite: bool = False,
) -> Overlap:
    """Compare the neurons chosen for several behaviours: what they share, and whether that is more than chance.

    Chance means random selections with the same number in each layer and the same general relevance: strong neurons
    are chosen for any behaviour. The hypergeometric p-value, which ignores that, stands beside it. Plans of weights are
    compared by their masks, without p-values.

    Args:
        folders: Plans, or score folders of behaviours (then give general too), two or more.
        general: Score folders of general text; several (seeds) are averaged.
        num_neurons: How many neurons to choose for a behaviour that is given as scores.
        contrast: How these are chosen (see prune).
        protect: Share of the general set's strongest that these leave alone.
        num_permutations: Random selections behind the matched p-values.
        stratum: Neurons that count as equally relevant: neighbours in a layer's ranking by general relevance.
        seed: Seed of the random selections.
        output: JSON file for the result.
        html: HTML page for the result, with the figure.
        overwrite: Replace earlier files at output and html.

    Raises:
        InputError: If fewer than two are given, they are not of one model, or an output is taken.
    """
    check_places("overlap", output, html, overwrite)
    if len(folders) < 2:
        raise InputError(f"overlap of {len(folders)} selection; give two or more plans or score folders")
    if num_permutations < 1 or stratum < 1:
        raise InputError(f"num_permutations={num_permutations}, stratum={stratum}: give at least 1")
    base = [ScoreFolder.open(path) for path in general or ()]
    names = distinct_names([Path(path) for path in folders])
    if len(names) < len(folders):
        raise InputError("a plan or score folder was given twice")
    plans: dict[str, PrunePlan] = {}
    contrasts: dict[str, Tensor] = {}
    for path, name in names.items():
        if path.is_dir():
            plans[name], contrasts[name] = _from_scores(path, base, num_neurons, contrast, protect)
        else:
            plans[name] = PrunePlan.load(path)
    sides = SideScores.of(base) if base else None
    options = {"num_permutations": num_permutations, "stratum": stratum, "seed": seed}
    result = measure_overlap(plans, sides, contrasts, **options)
    sections = overlap_sections(result)
    json = as_json("overlap", asdict(result))
    publish("Overlap of selections", sections, json=json, output=output, html=html, overwrite=overwrite)
    return result


def _from_scores(
    path: Path, general: Sequence[ScoreFolder], num_neurons: int, kind: Spec, protect: float
) -> tuple[PrunePlan, Tensor]:
    """The plan that ``prune`` would make of a behaviour's scores, and the contrast of all neurons, ``[n]``."""
    if not general:
        raise InputError(f"{path}: scores of a behaviour need general scores for a contrast; give --general DIR")
    behaviour = ScoreFolder.open(path)
    plan = make_plan(general, [behaviour], num_neurons=num_neurons, contrast=kind, protect=protect)
    values = contrast_of(kind, SideScores.of(general), SideScores.of([behaviour]))
    return plan, torch.cat([block.values for block in values()])


def measure_overlap(
    plans: Mapping[str, PrunePlan],
    general: SideScores | None,
    contrasts: Mapping[str, Tensor],
    *,
    num_permutations: int = 1000,
    stratum: int = 20,
    seed: int = 0,
) -> Overlap:
    """The measurements of ``overlap``, without reading, writing and printing.

    Args:
        plans: Two or more plans, by name.
        general: General scores of the candidates; without them there is no matched null.
        contrasts: The contrast of all candidates, for the plans that were given as scores.
        num_permutations: Number of random selections.
        stratum: Number of neurons per stratum.
        seed: Seed for the draws.

    Raises:
        InputError: if the plans are not for components of one kind and model, or do not fit the general scores.
    """
    _check_plans(plans, general)
    of_weights = next(iter(plans.values())).holds_weights
    sets = {} if of_weights else {name: {(n.layer, n.index) for n in plan.neurons} for name, plan in plans.items()}
    numbers = [plan.num_candidates for plan in plans.values()]
    total = general.count if general else min(numbers) if all(numbers) else None
    groups = pairs_and_all(list(plans))
    null = _null(sets, general, groups, num_permutations, stratum, seed) if general and not of_weights else {}
    exclusive = _exclusive_weights(plans) if of_weights else exclusive_intersections(sets)
    common = [_common(group, exclusive, total, null.get(group), contrasts, of_weights) for group in groups]
    common = [
        replace(one, cosine=_cosine(*(plans[name] for name in one.names))) if len(one.names) == 2 else one
        for one in common
    ]
    return Overlap(
        sizes={name: sum(plan.counts().values()) for name, plan in plans.items()},
        num_candidates=total,
        groups=tuple(common),
        exclusive=tuple((tuple(name for name in plans if name in members), n) for members, n in exclusive.items()),
        num_permutations=num_permutations,
        stratum=stratum,
        seed=seed,
        unit=next(iter(plans.values())).unit,
    )


def _check_plans(plans: Mapping[str, PrunePlan], general: SideScores | None) -> None:
    (first, one), *others = plans.items()
    for name, plan in others:
        if plan.fingerprint != one.fingerprint:
            raise InputError(f"{first} and {name} are plans for different models, so their neurons cannot be compared")
        if plan.granularity != one.granularity:
            raise InputError(f"{first} is a plan of {one.unit} and {name} of {plan.unit}; compare plans of one kind")
    if general is None:
        return
    manifest = general.folders[0].manifest
    kinds = {layer: plan.component(layer) for plan in plans.values() for layer in plan.entries}
    other = next((kind for layer, kind in kinds.items() if general.components.get(layer, kind) != kind), None)
    if other or manifest.model.fingerprint != one.fingerprint:
        raise InputError(
            f"{general.folders[0].path}: not {one.granularity} scores of the plans' model; give the right --general"
        )
    missing = sorted({layer for plan in plans.values() for layer in plan.entries} - set(general.layers))
    if missing:
        raise InputError(f"layer {missing[0]} of a plan is not in the general scores; give those of the plan itself")


def _cosine(one: PrunePlan, other: PrunePlan) -> float | None:
    """Cosine of two plans' changes of the gains, factor - 1, over all components; None unless both have factors."""
    changes = [_changes(plan) for plan in (one, other)]
    lengths = [math.sqrt(math.fsum(value**2 for value in own.values())) for own in changes]
    if not all(lengths):
        return None
    return math.fsum(value * changes[1].get(key, 0.0) for key, value in changes[0].items()) / math.prod(lengths)


def _changes(plan: PrunePlan) -> dict[tuple[str, int], float]:
    return {
        (layer, index): factor - 1
        for layer, entries in plan.entries.items()
        if entries.factor is not None
        for index, factor in zip(entries.index.tolist(), entries.factor.tolist(), strict=True)
    }


def _exclusive_weights(plans: Mapping[str, PrunePlan]) -> dict[frozenset[str], int]:
    """The number of weights that are in exactly these plans and in no other, by the plans' names."""
    masks: dict[str, dict[str, BitMask]] = {}
    for name, plan in plans.items():
        sizes = {layer: math.prod(shape) for layer, shape in plan.shapes.items()}
        masks[name] = {
            layer: entries.mask or BitMask.of_index(entries.index, sizes[layer])
            for layer, entries in plan.entries.items()
        }
    return exclusive_intersections_of_masks(masks)


def _null(
    sets: Mapping[str, set[tuple[str, int]]],
    general: SideScores,
    groups: Sequence[tuple[str, ...]],
    num_permutations: int,
    stratum: int,
    seed: int,
) -> dict[tuple[str, ...], tuple[float, list[int]]]:
    """The matched null of every group: the exact mean of the intersection's size, and its sizes in random draws."""
    layers = collect(general)
    strata = strata_by_rank([block.values.abs().numpy() for block in layers.values()], stratum)
    starts = dict(zip(layers, np.cumsum([0, *(len(block.values) for block in layers.values())]), strict=False))
    positions: dict[str, Ints] = {
        name: np.array([starts[layer] + index - layers[layer].offset for layer, index in sorted(members)])
        for name, members in sets.items()
    }
    sizes: dict[tuple[str, ...], list[int]] = {group: [] for group in groups}
    for draw in matched_draws(list(positions.values()), strata, num_permutations, seed):
        selections = dict(zip(positions, map(set, (selection.tolist() for selection in draw)), strict=True))
        for group in groups:
            sizes[group].append(len(set.intersection(*(selections[name] for name in group))))
    return {group: (expected_common([positions[name] for name in group], strata), sizes[group]) for group in groups}


def _common(
    group: tuple[str, ...],
    exclusive: Mapping[frozenset[str], int],
    total: int | None,
    null: tuple[float, list[int]] | None,
    contrasts: Mapping[str, Tensor],
    of_weights: bool,
) -> Common:
    common = sum(number for names, number in exclusive.items() if names.issuperset(group))
    in_any = sum(number for names, number in exclusive.items() if not names.isdisjoint(group))
    sizes = [sum(number for names, number in exclusive.items() if name in names) for name in group]
    pair = len(group) == 2
    # No two selections of millions of weights are independent: that p-value would be a long sum that says 0 or 1.
    has_expectation = pair and total is not None and not of_weights
    has_contrasts = pair and all(name in contrasts for name in group)
    return Common(
        names=group,
        common=common,
        jaccard=common / in_any,
        expected=null and null[0],
        p_value=null and permutation_p(common, null[1]),
        expected_random=None if total is None else total * float(np.prod([size / total for size in sizes])),
        p_hypergeometric=hypergeometric_p(common, *sizes, total) if has_expectation else None,
        correlation=rank_correlation(*(contrasts[name] for name in group)) if has_contrasts else None,
        quadrants=quadrants(*(contrasts[name].numpy() for name in group)) if has_contrasts else None,
    )


# --- sections ---------------------------------------------------------------------------------------------------------


def overlap_sections(result: Overlap) -> list[Section]:
    """The sections on intersections, with the figure, and on correlations of contrasts."""
    sizes = ", ".join(f"{name} {size}" for name, size in result.sizes.items())
    total = "" if result.num_candidates is None else f" from {result.num_candidates:,} {result.unit}"
    intro = Text(f"Sizes of the selections{total}: {sizes}.")
    sections = [Section("Intersections", (intro, _intersections(result), _picture(result)))]
    pairs = [group for group in result.groups if group.quadrants]
    if pairs:
        sections.append(Section("Contrasts", (_correlations(pairs),)))
    return sections


def _intersections(result: Overlap) -> Table:
    of_gains = any(group.cosine is not None for group in result.groups)
    rows = [
        (
            " & ".join(group.names),
            count(group.common),
            number(group.jaccard, 3),
            number(group.expected, 3),
            p_value(group.p_value),
            number(group.expected_random, 3),
            p_value(group.p_hypergeometric),
            *([number(group.cosine, 3)] if of_gains else []),
        )
        for group in result.groups
    ]
    columns = ("selections", "common", "Jaccard", "matched null", "p", "blind null", "p, hypergeometric")
    columns += ("cosine of the gains",) if of_gains else ()
    note = (
        f"Matched null: mean over random selections with the same number of {result.unit} in every layer and the same "
        f"general relevance (strata of {result.stratum}); p by {result.num_permutations:,} permutations."
    )
    if result.groups[0].expected is None:
        reason = "it is for components that can be listed" if result.unit == "weights" else "it needs --general"
        note = f"Matched null: not measured, {reason}."
    note += f" Blind null: all {result.unit} are equally likely."
    if of_gains:
        note += " Plans of gains may list every component: what they share is told by the cosine of factor - 1."
    return Table.of(columns, rows, note=note)


def _correlations(groups: Sequence[Common]) -> Table:
    rows = [
        (
            " & ".join(g.names),
            number(g.correlation, 3),
            *(percent(g.quadrants[signs]) for signs in ("--", "-+", "+-", "++")),
        )
        for g in groups
        if g.quadrants
    ]
    columns = ("contrasts", "rank correlation", "both use it more", "first only", "second only", "neither")
    note = "Both contrasts contain the general scores, whose noise makes them correlate: compare with a null contrast."
    return Table.of(columns, rows, note=note)


def _picture(result: Overlap) -> Picture:
    from sparc3_pl.document.figures import as_svg, upset

    exclusive = {frozenset(names): size for names, size in result.exclusive}
    largest = sorted(result.exclusive, key=lambda item: -item[1])[:8]
    words = "; ".join(f"{size} in {' and '.join(names)} only" for names, size in largest)
    caption = f"Each column counts the {result.unit} that are in exactly the selections marked below it."
    return Picture(as_svg(upset(result.sizes, exclusive), "upset"), f"UpSet plot. {words}.", caption)
