"""Edits of a correction: of the experiment's own settings, and of its arms, which are other ways of choosing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from sparc3_pl.attribution.methods import METHODS, Options
from sparc3_pl.errors import InputError
from sparc3_pl.experiment.arms import check_arm, components_of, list_of_seeds
from sparc3_pl.experiment.stages import Settings
from sparc3_pl.pruning.edits import EDITS
from sparc3_pl.pruning.gains import Gains
from sparc3_pl.selection.command import idle_options
from sparc3_pl.selection.contrast import CONTRASTS
from sparc3_pl.selection.controls import CONTROLS

__all__ = ["CorrectionArm", "PlannedEdit", "correction_arms"]

_SECTIONS = ("general", "behaviour", "score", "behaviour_score", "general_score", "plan")
_LISTS = ("texts", "seeds", "counts", "budgets", "controls")
_OF_GAINS = (
    *("budget", "budget_text", "budget_field", "budget_filter", "budget_windows", "budget_length"),
    *("gains_range", "scale"),
)
"""Arguments of ``prune`` that are for ``edit=gains`` alone."""
_DEFAULT_CONTROLS = ("random_matched", "random", "permuted")
"""Of which the first is taken that a plan can have."""


@dataclass(frozen=True)
class PlannedEdit:
    """One edit of the experiment: the arguments of ``prune``, which control it is, and whose scale it has."""

    settings: Settings
    control: str | None = None
    scale_of: str | None = None


@dataclass(frozen=True)
class CorrectionArm:
    """A way to score and to choose, and its edits.

    Attributes:
        name: The name in tables and figures, and of its files; None: the experiment's own settings.
        behaviour: Keys of ``data`` of the behaviour's samples.
        general: Keys of ``data`` of the general samples.
        texts: Further kinds of general text, as the keys in which they differ from ``general``.
        scores: Keys of ``model`` of the scoring passes: of the behaviour's samples, and of general text.
        seeds: Seeds of the general samples; none if the contrast reads no general scores.
        edits: Its edits by name, which is also that of their files.
    """

    name: str | None
    behaviour: Settings
    general: Settings
    texts: Sequence[Settings]
    scores: tuple[Settings, Settings]
    seeds: Sequence[int]
    edits: Mapping[str, PlannedEdit] = field(default_factory=dict)

    def named(self, name: str) -> str:
        """The name of a file or stage of this arm."""
        return name if self.name is None else f"{self.name}-{name}"


def correction_arms(
    arms: Mapping[str, Settings | None] | None,
    sections: Mapping[str, Settings | None],
    *,
    texts: Sequence[Settings],
    seeds: Sequence[int],
    counts: Sequence[int] | None,
    budgets: Sequence[float] | None,
    controls: Sequence[str] | None,
) -> list[CorrectionArm]:
    """The experiment's own settings as an arm without a name, then its arms.

    An arm's sections add to the experiment's or take the place of their keys; null takes a key of ``score`` or
    ``plan`` away. What would not fit is not taken over: samples of a behaviour that has another ``source``, options
    that another method does not take, settings of gains for another edit, a budget where a scale is given. Counts,
    budgets and controls of the experiment are for the arms that can have them.

    Args:
        arms: The settings of each arm by its name, as in the configuration.
        sections: The experiment's ``general``, ``behaviour``, ``score``, ``behaviour_score``, ``general_score`` and
            ``plan``.
        texts: The experiment's further kinds of general text.
        seeds: Its seeds.
        counts: Its counts.
        budgets: Its budgets.
        controls: Its controls; None: the first of random_matched, random and permuted that each arm can have.

    Raises:
        InputError: naming the arm and the key that is wrong.
    """
    own: dict[str, Settings] = {key: sections.get(key) or {} for key in _SECTIONS}
    needs_general = CONTRASTS.make(own["plan"].get("contrast", "difference")).needs_general
    num_general = len(seeds) * (1 + len(texts)) if needs_general else 0
    own_controls = _fitting(None, own, num_general) if controls is None else controls
    edits = _edits(own["plan"], own["score"], counts, budgets, own_controls, num_general)
    scores = own["score"] | own["behaviour_score"], own["score"] | own["general_score"]
    result = [
        CorrectionArm(None, own["behaviour"], own["general"], texts, scores, seeds if needs_general else (), edits)
    ]
    shared: dict[str, Any] = {"counts": counts, "budgets": budgets, "controls": controls}
    for name, arm in (arms or {}).items():
        arm_keys = check_arm(name, arm, _SECTIONS, _LISTS)
        try:
            arm_sections = _merged(own, {key: arm_keys.get(key) or {} for key in _SECTIONS})
            contrast = CONTRASTS.make(arm_sections["plan"].get("contrast", "difference"))
            its_seeds = list_of_seeds(name, arm_keys, seeds) if contrast.needs_general else ()
            its_texts = texts if arm_keys.get("texts") is None else arm_keys["texts"]
            edits = _edits_of_arm(arm_sections, arm_keys, shared, len(its_seeds) * (1 + len(its_texts)))
        except InputError as error:
            raise InputError(f"arms.{name}: {error}") from None
        its_scores = tuple(arm_sections["score"] | arm_sections[f"{side}_score"] for side in ("behaviour", "general"))
        its_edits = {}
        for edit, one in edits.items():
            scale_of = None if one.scale_of is None else f"{name}-{one.scale_of}"
            its_edits[f"{name}-{edit}"] = PlannedEdit(one.settings, one.control, scale_of)
        result.append(
            CorrectionArm(
                name,
                arm_sections["behaviour"],
                arm_sections["general"],
                its_texts,
                its_scores,
                its_seeds,
                its_edits,
            )
        )
    return result


def _merged(base: Mapping[str, Settings], own: Mapping[str, Settings]) -> dict[str, Settings]:
    """An arm's sections, with what is taken over from the experiment's."""
    sections = {key: base[key] | own[key] for key in _SECTIONS}
    if "source" in own["behaviour"]:
        sections["behaviour"] = own["behaviour"]
    if {"method", "granularity"} & own["score"].keys():
        method = METHODS.make(sections["score"].get("method", "lrp"))
        heeded = frozenset.intersection(*map(method.heeds, components_of(sections["score"])))
        useless = {option.name for option in fields(Options)} - heeded - own["score"].keys()
        sections["score"] = {key: value for key, value in sections["score"].items() if key not in useless}
        if not method.needs_target:
            sections |= {key: own[key] for key in ("behaviour_score", "general_score")}
    plan, useless = own["plan"], set()
    if not _is_gains(sections["plan"]):
        useless |= set(_OF_GAINS)
    useless |= {"budget"} if "scale" in plan else set()
    useless |= {"scale"} if "budget" in plan else set()
    useless |= idle_options(sections["plan"].get("contrast") or "difference")
    sections["plan"] = {key: value for key, value in sections["plan"].items() if key in plan or key not in useless}
    for key in ("score", "behaviour_score", "general_score", "plan"):
        sections[key] = {name: value for name, value in sections[key].items() if value is not None}
    return sections


def _edits_of_arm(
    sections: Mapping[str, Settings], arm: Settings, shared: Mapping[str, Any], num_general: int
) -> dict[str, PlannedEdit]:
    """The edits of an arm, of its own counts, budgets and controls, or of the experiment's that it can have."""
    plan = sections["plan"]
    kind = "budgets" if _is_gains(plan) else "counts"
    lists = {key: arm.get(key) for key in ("counts", "budgets", "controls")}
    if lists[kind] is None and "scale" not in plan:
        lists[kind] = shared[kind]
    if lists["controls"] is None:
        lists["controls"] = _fitting(shared["controls"], sections, num_general)
    return _edits(plan, sections["score"], lists["counts"], lists["budgets"], lists["controls"], num_general)


def _fitting(controls: Sequence[str] | None, sections: Mapping[str, Settings], num_general: int) -> list[str]:
    """Controls that the plan can have; None: the first of the default ones."""
    fitting = [
        name
        for name in (_DEFAULT_CONTROLS if controls is None else controls)
        if _objection(sections["plan"], sections["score"], name, num_general) is None
    ]
    return fitting[:1] if controls is None else fitting


def _is_gains(plan: Settings) -> bool:
    return issubclass(EDITS.class_of(plan.get("edit") or "zero"), Gains)


def _objection(plan: Settings, score: Settings, control: str, num_general: int) -> str | None:
    """Why a control does not go with what is scored, or with the edit or contrast of a plan; None if it does."""
    kind = CONTROLS.make(control)
    if kind.uses_general and not num_general:
        contrast = plan.get("contrast")
        return f"controls: {control} goes by general scores, and contrast={contrast} reads none; use random"
    if num_general < kind.fewest_general:
        return (
            f"controls: {control} takes {kind.fewest_general} sets of general scores, and there is {num_general}; give "
            f"{kind.fewest_general} seeds, or leave it out"
        )
    if _holds_weights(score) and not kind.for_weights:
        return f"controls: {control} is not for weight scores; use random"
    if _is_gains(plan) and kind.draws_unchosen and plan.get("num_neurons") is None:
        return (
            f"controls: {control} replaces the chosen components by others, and of plan.edit=gains without "
            "plan.num_neurons about half of all are chosen; use permuted, or give plan.num_neurons"
        )
    if kind.for_steps if _is_gains(plan) else control != "permuted":
        return None
    others = "permuted or random_matched" if _is_gains(plan) else "random_matched"
    return f"controls: {control} is no control of plan.edit={plan.get('edit', 'zero')}; use {others}"


def _holds_weights(score: Settings) -> bool:
    return any(component.dims == 2 for component in components_of(score))


def _edits(
    plan: Settings,
    score: Settings,
    counts: Sequence[int] | None,
    budgets: Sequence[float] | None,
    controls: Sequence[str],
    num_general: int,
) -> dict[str, PlannedEdit]:
    """The edits by name: of growing size, or budget, and their controls."""
    for control in controls:
        if (objection := _objection(plan, score, control, num_general)) is not None:
            raise InputError(objection)
    if not _is_gains(plan):
        if budgets:
            raise InputError(f"budgets={list(budgets)} are for plan.edit=gains; give counts, or leave them out")
        size = _size_key(plan, score)
        sizes = sorted({plan[size], *(counts or [])})
        edits = {f"prune-{count}": PlannedEdit({**plan, size: count, "control": None}) for count in sizes}
        return edits | {f"control-{one}": PlannedEdit({**plan, "control": one}, one) for one in controls}
    if isinstance(scale := plan.get("scale"), float | int) and plan.get("budget") is None:
        if counts or budgets:
            raise InputError(f"with plan.scale={scale} there is one edit; leave out counts and budgets")
        edits = {f"scale-{scale:g}": PlannedEdit({**plan, "control": None})}
        return edits | {f"control-{one}-{scale:g}": PlannedEdit({**plan, "control": one}, one) for one in controls}
    if counts or not isinstance(plan.get("budget"), float):
        raise InputError("with plan.edit=gains give plan.budget, such as 0.01, and budgets in place of counts")
    edits = {}
    for budget in sorted({plan["budget"], *(budgets or [])}):
        name = f"budget-{budget:g}"
        edits[name] = PlannedEdit({**plan, "budget": budget, "control": None})
        rest = {key: value for key, value in plan.items() if key != "budget"}
        for control in controls:
            edits[f"control-{control}-{budget:g}"] = PlannedEdit({**rest, "control": control}, control, name)
    return edits


def _size_key(plan: Settings, score: Settings) -> str:
    """The key of ``plan`` that says how many.

    Raises:
        InputError: if there is none.
    """
    key = "num_weights" if _holds_weights(score) else "num_neurons"
    if not isinstance(plan.get(key), int):
        raise InputError(f"plan.{key}={plan.get(key)!r}: say how many to choose; give a whole number")
    return key
