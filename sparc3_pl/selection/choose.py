"""Chooses components by the scores in folders, and makes a plan of them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from sparc3_pl.errors import InputError
from sparc3_pl.io.formats import Record
from sparc3_pl.model.bitmask import BitMask
from sparc3_pl.pruning.edits import EDITS, Edit
from sparc3_pl.pruning.gains import Gains
from sparc3_pl.pruning.plan import Entries, PlannedNeuron, PrunePlan, entries_of
from sparc3_pl.registry import Spec
from sparc3_pl.scores.folder import ScoreFolder
from sparc3_pl.selection.budget import Fisher
from sparc3_pl.selection.budgets import BUDGETS, Budgets, FileBudgets, block_of, budgets_of
from sparc3_pl.selection.contrast import CONTRASTS, Contrast, SideScores, format_warnings, share_of_strongest
from sparc3_pl.selection.controls import CONTROLS, Control, Question, best_first
from sparc3_pl.selection.dose import Dose
from sparc3_pl.selection.lowest import Block, Selection
from sparc3_pl.selection.scope import SCOPES, Amount, Scope
from sparc3_pl.selection.sequential import check_sequential

__all__ = ["check_choice", "control_of", "make_dose", "make_plan"]

_STRONG = 0.05  # a choice is checked for how much of it lies in this share of the general set's strongest
_MANY = 0.3


def make_plan(
    general: Sequence[ScoreFolder],
    behaviour: Sequence[ScoreFolder] = (),
    *,
    num_neurons: int | None = None,
    num_weights: int | None = None,
    share: float | None = None,
    contrast: Spec | Contrast = "difference",
    scope: Spec | Scope = "model",
    layers: Sequence[str] | None = None,
    protect: float = 0.0,
    control: Spec | Control | None = None,
    seed: int = 0,
    edit: Spec | Edit = "zero",
    budgets: Spec | Budgets | None = None,
    scale: float | None = None,
) -> PrunePlan:
    """Chooses the components that the behaviour uses and general text does not.

    Args:
        general: Score folders of general text, one per seed.
        behaviour: Score folders of the behaviour's samples; not needed for ``contrast=general`` and the controls
            ``random``, ``top_general`` and ``null``.
        num_neurons: How many, over all layers together.
        num_weights: How many single weights, for folders of weight scores.
        share: A share of all instead, in (0, 1).
        contrast: How the sides are compared (``contrast.py``).
        scope: Among whom components compete (``scope.py``).
        layers: Globs of layer names to choose from (default: all that are scored).
        protect: Share of the general set's strongest that is never touched (but by ``control=top_general``).
        control: Draw a control of the same size instead (``controls.py``).
        seed: Seed for drawing the control.
        edit: What the plan does to what is chosen (``edits.py``).
        budgets: A share of its own for each layer: ``owl``, a file, or a class (``budgets.py``).
        scale: For ``edit=gains``: how far to go along the contrast's steps. ``make_dose`` leaves it open.

    With scope ``row`` or ``pattern``, or with ``budgets``, layers outside of the transformer blocks (the output head)
    are left out unless ``layers`` is given.

    Raises:
        InputError: naming the argument that is wrong.
    """
    kind, among, change = CONTRASTS.make(contrast), SCOPES.make(scope), EDITS.make(edit)
    steps = control_of(control, seed)
    amounts = {"num_neurons": num_neurons, "num_weights": num_weights, "share": share}
    has = {"has_general": bool(general), "has_behaviour": bool(behaviour)}
    check_choice(kind, among, change, steps, **has, **amounts, protect=protect, budgets=budgets, scale=scale)
    if isinstance(change, Gains):
        if scale is None:
            raise InputError(
                "edit=gains needs a scale, or a budget to find it by (make_dose and spend, or prune --budget)"
            )
        dose = make_dose(
            general, behaviour, num_neurons=num_neurons, share=share, contrast=kind, layers=layers, protect=protect,
            control=control, seed=seed, scope=among,
        )  # fmt: skip
        return dose.at(scale)
    own_general, general = general, general if kind.needs_general else behaviour  # which lists the components too
    general, behaviour = steps.sides(general, behaviour)
    if change.only_for is not None and (kinds := SideScores.of(general, layers).granularity) != change.only_for:
        raise InputError(f"edit={EDITS.name_of(change)} is for {change.only_for} scores, and these are of {kinds}s")
    left_out = _left_out(general, layers) if budgets is not None or not among.whole_model else []
    sides = SideScores.of(general, layers, left_out), SideScores.of(behaviour, layers, left_out) if behaviour else None
    if control is None:
        missing = [layer for layer in general[0].layers if block_of(layer) and layer not in sides[0].layers]
        check_sequential(
            general,
            scope=SCOPES.name_of(among),
            share=share,
            pattern=getattr(among, "pattern", None),
            contrast=CONTRASTS.name_of(kind),
            protect=protect,
            other=budgets is not None,
            missing=missing,
        )
    if kind.needs_amount or budgets is not None or (num_neurons, num_weights, share) != (None, None, None):
        amount, own_shares = _amount(sides[0], num_neurons, num_weights, share, budgets)
    else:
        amount, own_shares = Amount("num_neurons"), {}
    question = _with_amount(Question(*sides, kind, among, amount, protect))
    if sides[0].holds_weights and type(steps).exchanged is Control.exchanged:
        _refuse_factors(change, torch.zeros(1))
        entries = {layer: Entries.of_weights(mask) for layer, mask in question.masks(steps.values(question))}
    else:
        chosen = steps.exchanged(question, question.select(steps.values(question)))
        entries = _entries(chosen, sides[0], change)
    if not entries:
        raise InputError("nothing is chosen: the share of every layer is 0; raise one of the budgets")
    behaviour_used = behaviour if steps.uses_behaviour and kind.needs_behaviour else ()
    warnings = format_warnings(general, behaviour_used) if behaviour_used and kind.needs_general else []
    if control is None and kind.needs_behaviour and kind.needs_general and not sides[0].holds_weights:
        warnings += _strength_warnings(chosen, sides[0])
    scope_name, arguments = SCOPES.name_of(among), change.arguments()
    settings = {"protect": protect} | kind.settings()
    settings |= {"share": share, "layers": layers and list(layers), "per_layer": scope_name == "layer"}
    settings |= {} if scope_name in ("model", "layer") else {"scope": scope_name} | among.arguments()
    settings |= own_shares | ({"left_out": left_out} if left_out else {})
    if sides[0].holds_weights and not kind.needs_behaviour and not layers:
        warnings += _outside_warnings(sides[0])
    alpha = arguments.pop("alpha", None)
    general = general if own_general else ()
    plan = _plan(entries, sides[0], general, behaviour_used, kind, None if control is None else steps)
    return replace(
        plan,
        edit=EDITS.name_of(change),
        alpha=alpha,
        settings=settings | ({"edit": arguments} if arguments else {}),
        warnings=warnings + plan.warnings,
    )


def make_dose(
    general: Sequence[ScoreFolder],
    behaviour: Sequence[ScoreFolder],
    *,
    num_neurons: int | None = None,
    share: float | None = None,
    contrast: Spec | Contrast = "budget",
    layers: Sequence[str] | None = None,
    protect: float = 0.0,
    control: Spec | Control | None = None,
    seed: int = 0,
    scope: Spec | Scope = "model",
) -> Dose:
    """A plan of gains whose scale is still open; the arguments are those of ``make_plan``.

    Without ``num_neurons`` and ``share`` all components are turned that the contrast would turn.

    Raises:
        InputError: as ``make_plan``.
    """
    kind, among = CONTRASTS.make(contrast), SCOPES.make(scope)
    steps = control_of(control, seed)
    has = {"has_general": bool(general), "has_behaviour": bool(behaviour)}
    check_choice(kind, among, Gains(), steps, **has, num_neurons=num_neurons, share=share, protect=protect)
    scores = SideScores.of(general if kind.needs_general else behaviour, layers)
    sides = kind.sides(scores, SideScores.of(behaviour, layers, but=["plan"]))  # of rounds: the contrast checks it
    amount = Amount("num_neurons")
    if num_neurons is not None or share is not None:
        amount, _ = _amount(scores, num_neurons, None, share, None)
    question = _with_amount(Question(*sides, kind, among, amount, protect))
    values = steps.values(question)
    chosen = best_first(question.select(values))
    places = steps.counterparts(question, [entry[:2] for entry in chosen])
    neurons = [PlannedNeuron(*place, value) for place, (*_, value) in zip(places, chosen, strict=True)]
    plan = _plan(entries_of(neurons), scores, general, behaviour, kind, None if control is None else steps)
    settings = {"protect": protect} | kind.settings()
    settings |= {"share": share, "layers": layers and list(layers), "per_layer": SCOPES.name_of(among) == "layer"}
    plan = replace(plan, edit="gains", settings=settings, warnings=plan.warnings + _weight_warnings(behaviour))
    return _dose(plan, kind, question, chosen)


def check_choice(
    contrast: Contrast,
    scope: Scope,
    edit: Edit,
    control: Control,
    *,
    has_general: bool,
    has_behaviour: bool,
    num_neurons: int | None = None,
    num_weights: int | None = None,
    share: float | None = None,
    protect: float = 0.0,
    budgets: Spec | Budgets | None = None,
    scale: float | None = None,
) -> None:
    """Refuses what is wrong whatever the scores are: arguments of ``make_plan``, and whether each side has scores.

    Raises:
        InputError: naming the argument that is wrong.
    """
    _check_sides(contrast, control, protect, has_general, has_behaviour)
    if isinstance(edit, Gains):
        _check_gains(contrast, control, num_weights, budgets)
    elif scale is not None or contrast.for_gains_only:
        name = f"scale={scale}" if scale is not None else f"contrast={CONTRASTS.name_of(contrast)}"
        raise InputError(f"{name} is for edit=gains, and this is edit={EDITS.name_of(edit)}; give both or neither")
    Amount("num_neurons", num_neurons, share)
    Amount("num_weights", num_weights)
    if not 0 <= protect < 1:
        raise InputError(f"protect={protect} is not a share from 0 to below 1; e.g. 0.05 is 5 %")
    amounts = {"num_neurons": num_neurons, "num_weights": num_weights, "share": share}
    given = [f"{name}={value}" for name, value in amounts.items() if value is not None]
    name = SCOPES.name_of(scope)
    if budgets is not None:
        if not scope.takes_budgets:
            raise InputError(f"budgets give every layer a share of its own, but scope={name}; use scope=row or layer")
        if given and share is None:
            raise InputError(f"budgets are shares, but {given[0]} is a number; give share, or nothing besides a file")
        budgets_of(budgets)
    elif given and not scope.takes_amount:
        raise InputError(f"scope={name} says by itself how many are chosen; leave out {', '.join(given)}")
    if len(given) > 1:
        raise InputError(f"{', '.join(given)}: say in one way how many to choose; leave out the others")
    needs_amount = contrast.needs_amount and not isinstance(edit, Gains)
    if needs_amount and not given and budgets is None and scope.takes_amount:
        raise InputError("neither a number nor a share was given: give num_neurons (or num_weights), or share")


def _check_sides(contrast: Contrast, control: Control, protect: float, has_general: bool, has_behaviour: bool) -> None:
    name = CONTRASTS.name_of(contrast)
    if contrast.needs_general:
        if not has_general:
            raise InputError(f"contrast={name}: no score folder was given as general; give --general DIR")
        draws_behaviour = type(control).sides is not Control.sides
        if contrast.needs_behaviour and control.uses_behaviour and not (has_behaviour or draws_behaviour):
            raise InputError(f"contrast={name} needs behaviour scores; give --behaviour DIR, or --contrast general")
        return
    if has_general:
        raise InputError(f"contrast={name} reads the behaviour's scores alone; leave out general")
    if not has_behaviour:
        raise InputError(f"contrast={name} needs behaviour scores; give --behaviour DIR")
    if control.uses_general or protect:
        setting = f"protect={protect}" if protect else f"control={CONTROLS.name_of(control)}"
        raise InputError(f"{setting} goes by general scores, and contrast={name} reads none; leave it out")


def _check_gains(contrast: Contrast, control: Control, num_weights: int | None, budgets: Spec | Budgets | None) -> None:
    if num_weights is not None or budgets is not None:
        raise InputError("edit=gains is for neurons, heads and channels: leave out num_weights and budgets")
    if not contrast.gives_steps:
        raise InputError(
            f"contrast={CONTRASTS.name_of(contrast)} does not say how far to turn a component, as edit=gains needs it; "
            "use contrast=budget (or expertise), or another edit"
        )
    if not control.for_steps:
        name = CONTROLS.name_of(control)
        raise InputError(f"control={name} gives no factors for edit=gains; use permuted or random_matched")


def _plan(
    entries: dict[str, Entries],
    candidates: SideScores,
    general: Sequence[ScoreFolder],
    behaviour: Sequence[ScoreFolder],
    kind: Contrast,
    control: Control | None,
) -> PrunePlan:
    """What a plan says of the choice and where it comes from, without what is done to the chosen."""
    return PrunePlan(
        entries=entries,
        model=candidates.folders[0].manifest.model,
        granularity=candidates.granularity,
        components={layer: candidates.components[layer] for layer in entries} if "+" in candidates.granularity else {},
        num_candidates=candidates.count,
        contrast=CONTRASTS.name_of(kind),
        control=None if control is None else CONTROLS.name_of(control),
        seed=None if control is None else control.seed,
        shapes={layer: list(candidates.folders[0].shape(layer)) for layer in entries},
        scores={"general": _provenance(general), "behaviour": _provenance(behaviour)},
        behaviour_samples=_behaviour_ids(behaviour),
        warnings=_sample_warnings(general, behaviour) + _unreached_warnings(entries, general, behaviour),
    )


def _with_amount(question: Question) -> Question:
    """The question with an amount: where none was given, all that a contrast says by itself are to be chosen."""
    amount, kind = question.amount, question.contrast
    if (kind.needs_amount and not kind.gives_steps) or amount != Amount(amount.name) or not question.scope.takes_amount:
        return question
    allowed = sum(len(b.values) if b.allowed is None else int(b.allowed.sum()) for b in question.ranked()())
    if not allowed:
        settings = ", ".join(f"{name}={value}" for name, value in kind.arguments().items())
        raise InputError(f"contrast={CONTRASTS.name_of(kind)} allows no component ({settings}); widen what it allows")
    return replace(question, amount=replace(amount, number=allowed))


def _dose(plan: PrunePlan, kind: Contrast, question: Question, chosen: Sequence[tuple[str, int, float]]) -> Dose:
    """The plan with what decides the factors of its entries; ``chosen`` are those whose steps they get, in order."""
    general, behaviour = question.general, question.behaviour
    assert behaviour is not None
    steps = kind.steps(general, behaviour)
    start = {layer: general.span(layer)[0] for layer in general.layers}
    in_order = torch.tensor([float(steps[layer][index - start[layer]]) for layer, index, _ in chosen]).double()

    def at_entries(blocks: Mapping[str, Block]) -> dict[str, Tensor]:
        return {
            layer: blocks[layer].values[entries.index - start[layer]].double()
            for layer, entries in plan.entries.items()
        }

    rows = general.rows() if getattr(kind, "off_diagonal", 0) and isinstance(general, Fisher) else None
    return Dose(
        plan=plan,
        contrast=kind,
        steps={layer: in_order[entries.rank] for layer, entries in plan.entries.items()},
        derivatives=at_entries(behaviour.in_memory) if kind.from_derivatives else None,
        fisher=at_entries(general.in_memory) if getattr(kind, "fisher", False) else None,
        rows=None if rows is None else {name: rows[name][:, e.index - start[name]] for name, e in plan.entries.items()},
    )


def control_of(control: Spec | Control | None, seed: int) -> Control:
    """The control, or none; a name alone is given the seed."""
    if control is None:
        return Control(seed)
    return CONTROLS.make({"class_path": control, "init_args": {"seed": seed}} if isinstance(control, str) else control)


def _left_out(general: Sequence[ScoreFolder], layers: Sequence[str] | None) -> list[str]:
    """Layers outside of the transformer blocks, such as the output head, unless layers are named."""
    inside = [layer for layer in general[0].layers if block_of(layer) is not None] if general else []
    return [] if layers or not inside else [layer for layer in general[0].layers if layer not in inside]


def _amount(
    scores: SideScores,
    num_neurons: int | None,
    num_weights: int | None,
    share: float | None,
    budgets: Spec | Budgets | None,
) -> tuple[Amount, Record]:
    """How many to choose, if that fits the scores, and what the plan says of it besides."""
    own, other = ("num_weights", "num_neurons") if scores.holds_weights else ("num_neurons", "num_weights")
    amounts = {"num_neurons": num_neurons, "num_weights": num_weights}
    if amounts[other] is not None:
        raise InputError(f"these are {scores.granularity} scores: give {own} or share, not {other}={amounts[other]}")
    if budgets is None:
        return Amount(own, amounts[own], share), {}
    kind = budgets_of(budgets)
    shares = kind.shares(scores, share)
    arguments = {} if isinstance(kind, FileBudgets) else kind.arguments()
    return Amount(own, None, share, shares), {"budgets": BUDGETS.name_of(kind), **arguments, "shares": shares}


def _refuse_factors(edit: Edit, values: torch.Tensor) -> None:
    if edit.factors(values.double()) is not None:
        raise InputError(f"edit={EDITS.name_of(edit)} gives every component a factor: it is not for single weights")


def _entries(chosen: Selection, scores: SideScores, edit: Edit) -> dict[str, Entries]:
    """The selection as a plan holds it: single weights by their indices, everything else listed best first."""
    if scores.holds_weights:
        for _, values in chosen.values():
            _refuse_factors(edit, values[:1])
        masks = {layer: BitMask.of_index(index, scores.span(layer)[1]) for layer, (index, _) in chosen.items()}
        return {layer: Entries.of_weights(mask) for layer, mask in masks.items()}
    rows = best_first(chosen)
    factors = edit.factors(torch.tensor([value for *_, value in rows], dtype=torch.float64))
    each = [None] * len(rows) if factors is None else factors.tolist()
    return entries_of([PlannedNeuron(*entry, factor) for entry, factor in zip(rows, each, strict=True)])


# --- warnings ---------------------------------------------------------------------------------------------------------


def _strength_warnings(chosen: Selection, general: SideScores) -> list[str]:
    part = share_of_strongest({layer: index for layer, (index, _) in chosen.items()}, general, _STRONG)
    if part <= _MANY:
        return []
    return [
        f"{part:.0%} of the chosen are among the {_STRONG:.0%} that general text uses most: the edit will harm "
        f"the model; protect them (protect={_STRONG}) or use another contrast"
    ]


def _outside_warnings(general: SideScores) -> list[str]:
    """Warns of compression in which the output head, or another layer outside of the blocks, competes with the rest."""
    outside = [layer for layer in general.layers if block_of(layer) is None]
    if not outside or len(outside) == len(general.layers):
        return []
    return [
        f"{', '.join(outside)} competes with the rest, though papers leave the output head out when they compress; "
        "name the layers to choose from (layers), or use scope=row"
    ]


def _sample_warnings(general: Sequence[ScoreFolder], used: Sequence[ScoreFolder]) -> list[str]:
    warnings = []
    for name, folders in (("general", general), ("behaviour", used)):
        # completions of an edited model are others than those of the model as it was, under the same ids
        sets = [
            {(folder.manifest.plan, sample) for sample in folder.manifest.data.get("sample_ids") or ()}
            for folder in folders
        ]
        if len(set().union(*sets)) < sum(map(len, sets)):
            warnings.append(f"{name} folders share samples, so they are not independent; score with different seeds")
    if set(_sample_ids(general)) & set(_sample_ids(used)):
        warnings.append("general and behaviour folders share samples; score general text on other data")
    return warnings


def _unreached_warnings(
    chosen: Iterable[str], general: Sequence[ScoreFolder], used: Sequence[ScoreFolder]
) -> list[str]:
    """Warns of experts in the plan that no token of one side's samples reached."""
    warnings, chosen = [], set(chosen)
    for name, folders in (("general", general), ("behaviour", used)):
        every = [set(folder.manifest.unreached) for folder in folders]
        layers = sorted(set.intersection(*every) & chosen) if every else []
        if layers:
            warnings.append(
                f"no token of the {name} samples reached {len(layers)} of the chosen layers (first: {layers[0]}), so "
                "that their scores are 0 because nothing is known of them; score more samples"
            )
    return warnings


def _weight_warnings(behaviour: Sequence[ScoreFolder]) -> list[str]:
    """Warns of completions whose mean derivative, by their weights, is not that of an expected score."""
    data = [folder.manifest.data for folder in behaviour if folder.manifest.target == "completion"]
    if any(about.get("weight_field") is None for about in data):
        return [
            "the completions have no weights (data.weight_field): the edit makes all of them less likely, whatever a "
            "judge would say of them"
        ]
    if any(about.get("weight_baseline") == "none" for about in data):
        return ["the completions' weights are not centred (data.weight_baseline=none): the derivative is noisier"]
    return []


def _provenance(folders: Sequence[ScoreFolder]) -> list[Record]:
    """What a plan says of the scores that it came from: names, never paths."""
    return [
        {
            "name": folder.path.resolve().name,
            "sha256": folder.digest,
            "method": folder.manifest.method,
            "signed": folder.manifest.signed,
            "num_samples": folder.manifest.num_samples,
            "num_tokens": folder.manifest.num_tokens,
            "source": Path(str(folder.manifest.data.get("source"))).name,
            "seed": folder.manifest.data.get("seed"),
            "total_relevance": folder.manifest.total_relevance,
        }
        for folder in folders
    ]


def _sample_ids(folders: Sequence[ScoreFolder]) -> list[str]:
    return sorted({str(name) for folder in folders for name in folder.manifest.data.get("sample_ids") or ()})


def _behaviour_ids(folders: Sequence[ScoreFolder]) -> list[str]:
    """Ids of the samples, and of the texts that they were made from, which differ for packed or cut samples."""
    texts = {name for folder in folders for sample in folder.samples() for name in sample.text_ids}
    return sorted({*_sample_ids(folders), *texts})
