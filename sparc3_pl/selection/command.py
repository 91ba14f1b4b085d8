"""The ``prune`` command."""

import inspect
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from sparc3_pl.errors import InputError
from sparc3_pl.io.files import check_output
from sparc3_pl.model.source import SHARDED
from sparc3_pl.pruning.plan import KIND as PLAN
from sparc3_pl.pruning.plan import PrunePlan
from sparc3_pl.registry import Spec
from sparc3_pl.scores.folder import ScoreFolder
from sparc3_pl.selection.dose import BudgetSource, check_budget, check_windows, held_back, spend

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from sparc3_pl.data.encoding import Encoder
    from sparc3_pl.pruning.edits import Edit
    from sparc3_pl.pruning.push import HubPlace
    from sparc3_pl.pruning.save import SavedModel
    from sparc3_pl.selection.contrast import Contrast
    from sparc3_pl.selection.controls import Control
    from sparc3_pl.selection.scope import Scope

__all__ = ["Asked", "PruneResult", "idle_options", "prune"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PruneResult:
    """What ``prune`` wrote."""

    plan: PrunePlan
    path: Path
    saved: "SavedModel | None" = None
    pushed_to: str | None = None
    """Where on the hub the model is now."""


def prune(
    general: list[str] | None = None,
    behaviour: list[str] | None = None,
    output: str = "plan.json",
    num_neurons: int | None = None,
    num_weights: int | None = None,
    share: float | None = None,
    contrast: Spec = "difference",
    scope: Spec = "model",
    pattern: str | None = None,
    budgets: Spec | None = None,
    protect: float = 0.0,
    layers: list[str] | None = None,
    top_general: float = 0.05,
    top_behaviour: float = 0.05,
    control: Literal["none", "random", "random_matched", "top_general", "null", "permuted"] = "none",
    seed: int = 0,
    edit: Spec = "zero",
    alpha: float | None = None,
    budget: float | None = None,
    budget_text: list[str | dict[str, str | None]] | None = None,
    budget_field: str = "text",
    budget_filter: str | None = None,
    budget_windows: int = 16,
    budget_length: int | None = None,
    gains_range: list[float] = [0.0, 1.0],  # noqa: B006 (never changed; shown by --help)
    scale: float | None = None,
    save_model: str | None = None,
    push_to_hub: str | None = None,
    shrink: bool = False,
    keep_values: bool = False,
    pretrained: str | None = None,
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "auto",
    trust_remote_code: bool = False,
    device: str = "cpu",
    mean_source: str | None = None,
    mean_field: str = "text",
    mean_samples: int = 64,
    mean_seq_len: int = 128,
    overwrite: bool = False,
) -> PruneResult:
    """Choose what a behaviour uses and general text does not, or what general text uses least, as a plan.

    The plan is a JSON file that eval and the PruningCallback apply. With save_model, the pruned model is written too.

    Args:
        general: Score folders of general text; several (seeds) are averaged. None for contrast=expertise.
        behaviour: Score folders of the behaviour's samples. Not needed for contrast=general (compression) and for
            the controls random, top_general and null.
        output: The plan file to write.
        num_neurons: How many neurons to choose, over all layers together. With edit=gains all by default.
        num_weights: How many weights, for folders of weight scores.
        share: A share of all scored neurons (or weights) instead of a number: 0.01 is 1 %.
        contrast: difference (general - behaviour), normalized (each divided by its total first), rank, t (difference
            over its standard error; needs scores made with squares), set_difference (top_behaviour without
            top_general), general (the lowest general scores), budget (for edit=gains: the largest squared derivative of
            the behaviour per cost on general text), expertise (the largest AUROC of labelled samples, given as
            behaviour; scale=1 of edit=gains is AurA), or the class path of a Contrast.
        scope: Among whom components compete: model (all with all), layer (the same number, or share, in every layer),
            row (weights: the same share of every output row, rounded down), or the class path of a Scope. With row,
            pattern and budgets the output head is left out unless layers names it.
        pattern: For weights, instead of a share: n:m, n of every m consecutive inputs of a row stay, the others are
            chosen. 2:4 and 4:8 are half.
        budgets: A share of its own for each layer, for scope row or layer: a JSON or YAML file of shares by glob of
            layer names (share is for the rest), or owl: the share, less in blocks with many outliers (Yin et al. 2024).
            Not to be confused with budget, a bound on perplexity.
        protect: Share of the strongest neurons on general text that is never touched: 0.05 is 5 %.
        layers: Glob patterns of the layers to choose from. Default: all that are scored.
        top_general: For set_difference: the share of the highest general scores that is left out.
        top_behaviour: For set_difference: the share of the highest behaviour scores to choose from.
        control: Draw a control of the same size instead: random, random_matched (same layers, similar general score),
            top_general, null (general folders against another general folder), or permuted (of edit=gains: the same
            factors, dealt at random to the components of each layer). none: no control.
        seed: Seed for drawing the control, and the samples for edit=mean.
        edit: zero; scale (multiply by alpha); mean (replace by the mean activation; needs a bias in the next layer);
            remove (whole experts: the router chooses among the others); gains (multiply each by a factor of its own, by
            contrast=budget or expertise); or the class path of an Edit.
        alpha: Factor of edit=scale: any finite number. A negative one reverses the contribution.
        budget: For edit=gains: by how much the perplexity of held-back text may rise; 0.01 is 1 %. A search finds how
            far the edit may go; the text whose perplexity rises most decides. Not to be confused with budgets, shares
            by layer.
        budget_text: Held-back texts, as data.source: several kinds of text, none of them that of an evaluation. Texts
            that general scores were made from are left out. A hub data set may be given with its keys:
            {source: allenai/c4, subset: en, split: validation}, also field and filter.
        budget_field: Field of the text in budget_text.
        budget_filter: Condition on a record's fields in budget_text, as data.filter.
        budget_windows: Number of windows of each text.
        budget_length: Tokens in a window. Default: 1,024, at most the model's context.
        gains_range: Smallest and largest factor of edit=gains. By default components are only weakened.
        scale: For edit=gains: how far to go along the steps, in place of a search (as for a control of a plan whose
            scale is known).
        save_model: Folder to write the pruned model to, for transformers' from_pretrained.
        push_to_hub: ORG/NAME on the hub to upload the folder of save_model to, model card included; a new repository is
            private. Needs a token that may write: HF_TOKEN, `hf auth login`, or asked for on a terminal.
        shrink: Really remove the neurons, or whole experts with their rows of the routers (edit is then remove): the
            same number from each layer. The saved model is smaller.
        keep_values: Keep the removed values beside the plan, so that a saved model can be reverted.
        pretrained: The model (hub id, folder, FILE.gguf). Default: the one that was scored.
        dtype: Number format in which the model is loaded and saved; auto is the checkpoint's own.
        trust_remote_code: Run Python code that the checkpoint brings along.
        device: Device for edit=gains with budget_text: cpu, cuda, cuda:1, ...; auto spreads the model over GPUs, host
            and disk; sharded shares it out over processes that torchrun has started (FSDP2).
        mean_source: For edit=mean: text to measure the mean activations on, as data.source.
        mean_field: Field of the text in mean_source.
        mean_samples: Number of windows to measure on.
        mean_seq_len: Tokens in a window.
        overwrite: Replace an earlier plan and saved model.

    Raises:
        InputError: If an argument is wrong, scores cannot be compared, the plan does not fit the model, or the output
            is taken. Nothing is written then.
    """
    asked = Asked.of(locals())
    from sparc3_pl.pruning.edits import EDITS, Remove
    from sparc3_pl.selection.choose import make_dose, make_plan

    change, edit = asked.edit, EDITS.name_of(asked.edit)  # however it was given
    _check_places(output, save_model, overwrite)
    place = _hub_place(push_to_hub, overwrite)
    folders = [ScoreFolder.open(path) for path in general or ()]
    sides = folders, [ScoreFolder.open(path) for path in behaviour or ()]
    kinds = {folder.manifest.granularity for folder in sides[0] or sides[1]}
    if shrink and edit == "zero" and kinds <= {Remove.only_for}:
        change = Remove()  # a zeroed expert would still be chosen by its router, which a smaller model cannot do
    choice: dict[str, Any] = {"num_neurons": num_neurons, "share": share, "layers": layers, "protect": protect}
    choice |= {"contrast": asked.contrast, "scope": asked.scope, "seed": seed, "control": asked.control}
    model, encoder, saved = None, None, None
    if edit == "gains" and budget_text:
        from sparc3_pl.runtime.collectives import is_rank_zero, joined_ranks

        dose = make_dose(*sides, **choice)
        with joined_ranks("device=sharded") if device == SHARDED else nullcontext():
            model, encoder = _load(dose.plan, pretrained, dtype, trust_remote_code, device)
            texts = held_back(
                asked.held_texts, encoder, folders, num_windows=budget_windows, length=budget_length, seed=seed
            )
            plan = spend(dose, model, texts, budget, scale)
            if not is_rank_zero():
                return PruneResult(plan, Path(output))
        if device in (SHARDED, "auto"):
            model = None  # what is saved is loaded whole
    else:
        choice |= {"num_weights": num_weights, "budgets": budgets, "scale": scale}
        plan = make_plan(*sides, **choice, edit=change)
    if shrink:
        _check_shrinkable(plan)
    if save_model:
        from sparc3_pl.pruning.save import check_shape

        check_shape(plan, shrink)
    if keep_values and plan.edit == "remove":
        raise InputError("edit=remove replaces no value that could be kept; leave out keep_values")
    if save_model or keep_values or plan.edit == "mean":
        if model is None or encoder is None:
            model, encoder = _load(plan, pretrained, dtype, trust_remote_code)
        if plan.edit == "mean":
            batches = _windows(encoder, mean_source, mean_field, mean_samples, mean_seq_len, seed)
            plan = _with_means(plan, model, batches)
        plan = _with_kept_values(plan, model) if keep_values else plan
        if save_model:
            from sparc3_pl.pruning.save import save_pruned, save_shrunk

            save = save_shrunk if shrink else save_pruned
            saved = save(model, encoder.tokenizer, plan, save_model, overwrite)
    path = plan.save(output, overwrite)
    for warning in plan.warnings:
        log.warning("%s", warning)
    pushed_to = None if place is None or saved is None else place.push(saved.folder)
    _print(plan, path, saved, pushed_to)
    return PruneResult(plan, path, saved, pushed_to)


@dataclass(frozen=True)
class Asked:
    """What ``prune`` is asked for, as far as no scores are needed to see that it is right.

    Attributes:
        edit: What is done to what is chosen.
        contrast: How the sides are compared.
        scope: Among whom components compete.
        control: The control; None: none.
        held_texts: The sources of held-back text.
    """

    edit: "Edit"
    contrast: "Contrast"
    scope: "Scope"
    control: "Control | None"
    held_texts: list[BudgetSource]

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Self:
        """The objects that all arguments of ``prune`` stand for.

        Raises:
            InputError: if one of them is wrong.
        """
        from sparc3_pl.pruning.edits import EDITS
        from sparc3_pl.selection.choose import check_choice, control_of
        from sparc3_pl.selection.contrast import CONTRASTS
        from sparc3_pl.selection.scope import SCOPES

        edit, alpha = arguments["edit"], arguments["alpha"]
        if (edit == "scale") != (alpha is not None):
            raise InputError(
                f"edit={edit} with alpha={alpha}: a factor goes with edit=scale and only with it; e.g. 0.5"
            )
        change = EDITS.make({"class_path": "scale", "init_args": {"alpha": alpha}} if edit == "scale" else edit)
        name, budget_text = EDITS.name_of(change), arguments["budget_text"]
        check_budget(name, arguments["budget"], budget_text, arguments["scale"])
        check_windows(arguments["budget_windows"], arguments["budget_length"])
        of_text = arguments["budget_field"], arguments["budget_filter"]
        held_texts = [BudgetSource.of(text, *of_text) for text in budget_text or ()]
        _check_together(name, arguments)
        contrast = CONTRASTS.make(_with_options(arguments["contrast"], arguments))
        scope = SCOPES.make(_scope(arguments["scope"], arguments["pattern"], arguments["shrink"]))
        # "none", not None: on a command line "null" is the name of a control
        control = None if arguments["control"] == "none" else control_of(arguments["control"], arguments["seed"])
        check_choice(
            contrast,
            scope,
            change,
            control or control_of(None, arguments["seed"]),
            has_general=bool(arguments["general"]),
            has_behaviour=bool(arguments["behaviour"]),
            **{key: arguments[key] for key in ("num_neurons", "num_weights", "share", "protect", "budgets", "scale")},
        )
        return cls(change, contrast, scope, control, held_texts)


def _check_together(edit: str, arguments: Mapping[str, Any]) -> None:
    """Refuses options that do not go together."""
    save_model, shrink, budget_text = (arguments[key] for key in ("save_model", "shrink", "budget_text"))
    if shrink and budget_text:
        raise InputError("shrink removes whole neurons, and a budget weakens them in part; leave out one of the two")
    if shrink and save_model is None:
        raise InputError("shrink=true makes a smaller model, but there is no place for it; give --save_model DIR")
    if (place := arguments["push_to_hub"]) is not None and save_model is None:
        raise InputError(f"push_to_hub={place!r} needs the saved model; give --save_model DIR")
    if edit == "mean" and arguments["mean_source"] is None:
        raise InputError("edit=mean needs text to measure mean activations on; give --mean_source FILE (or demo)")
    if edit == "remove" and arguments["keep_values"]:
        raise InputError("edit=remove replaces no value that could be kept; leave out keep_values")
    if arguments["device"] == SHARDED and not (edit == "gains" and budget_text):
        raise InputError(
            "device=sharded shares a model out for the search of edit=gains with --budget_text, and none is asked for "
            "here; leave it out"
        )


_OPTIONS = {"top_general": "set_difference", "top_behaviour": "set_difference", "gains_range": "budget"}
"""Options of ``prune`` that are arguments of a contrast, and that contrast's name."""


def idle_options(contrast: Spec) -> set[str]:
    """Options of ``prune`` for arguments that this contrast does not take, or that its ``init_args`` give already."""
    from sparc3_pl.selection.contrast import CONTRASTS

    kind, own = CONTRASTS.class_of(contrast), CONTRASTS.arguments_of(contrast)
    return {
        option for option, name in _OPTIONS.items() if option in own or not issubclass(kind, CONTRASTS.class_of(name))
    }


def _with_options(contrast: Spec, arguments: Mapping[str, Any]) -> Spec:
    """The contrast with those of its arguments that were given by options.

    Raises:
        InputError: if an option is given that it does not take, or that it has been given already.
    """
    from sparc3_pl.selection.contrast import CONTRASTS

    parameters, idle, given = inspect.signature(prune).parameters, idle_options(contrast), {}
    for option, name in _OPTIONS.items():
        value = list(arguments[option]) if isinstance(arguments[option], tuple) else arguments[option]
        if value == parameters[option].default:
            continue
        if option in CONTRASTS.arguments_of(contrast):
            raise InputError(f"{option}={value}, but contrast has it too in init_args; give it once")
        if option in idle:
            raise InputError(f"{option}={value} is for contrast={name}; leave it out")
        given[option] = value
    return CONTRASTS.with_arguments(contrast, given) if given else contrast


def _scope(scope: Spec, pattern: str | None, shrink: bool) -> Spec:
    """The scope, which a pattern and ``shrink`` say by themselves."""
    if pattern is None:
        return "layer" if shrink else scope
    if shrink or scope not in ("model", "pattern"):
        setting = "shrink=true" if shrink else f"scope={scope}"
        raise InputError(f"pattern={pattern} says among whom weights compete, and so does {setting}; give one of them")
    return {"class_path": "pattern", "init_args": {"pattern": pattern}}


def _check_places(output: str, save_model: str | None, overwrite: bool) -> None:
    """Refuses outputs that are taken, or that lie in each other."""
    place = check_output(output, overwrite, PLAN)
    if save_model is not None:
        from sparc3_pl.pruning.save import KIND as MODEL

        if check_output(save_model, overwrite, MODEL) in (place, *place.parents):
            raise InputError(f"output={output!r} lies in save_model={save_model!r}, which holds a plan of its own")


def _hub_place(name: str | None, overwrite: bool) -> "HubPlace | None":
    """The place to upload to, once it is sure that this is allowed; None if nobody asked for one."""
    if name is None:
        return None
    from sparc3_pl.pruning.push import HubPlace

    return HubPlace.open(name, overwrite)


def _check_shrinkable(plan: PrunePlan) -> None:
    """Refuses, before the model is loaded, a plan that cannot make it smaller."""
    if plan.holds_weights:
        raise InputError("shrink removes whole neurons, but these are weight scores; give neuron scores")
    if len(widths := {math.prod(shape) for shape in plan.shapes.values()}) > 1:
        raise InputError(f"shrink needs layers of one width, but widths are {sorted(widths)}; narrow layers")


def _load(
    plan: PrunePlan, pretrained: str | None, dtype: str, trust_remote_code: bool, device: str = "cpu"
) -> tuple["PreTrainedModel", "Encoder"]:
    from sparc3_pl.data.encoding import load_encoder
    from sparc3_pl.model.loading import load_model
    from sparc3_pl.model.source import ModelSource

    scored_model, revision = plan.model.pretrained, plan.model.revision
    if pretrained is None and not isinstance(scored_model, str):
        raise InputError("the scores do not name their model; give --pretrained")
    name = pretrained or str(scored_model)
    spread = "auto" if device == "auto" else None
    revision, unpack = revision if name == scored_model else None, plan.model.dequantized is not None
    source = ModelSource(name, dtype, revision, spread, trust_remote_code, unpack)
    return _placed(load_model(source), device), load_encoder(source)


def _placed(model: "PreTrainedModel", device: str) -> "PreTrainedModel":
    if device in ("cpu", "auto"):
        return model
    if device == SHARDED:
        from sparc3_pl.model.fsdp import shard_over_all

        shard_over_all(model)
        return model
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"device={device!r}: {str(error).splitlines()[0]}; give cpu, or a device that is there"
        ) from None


def _windows(
    encoder: "Encoder", source: str | None, field: str, count: int, seq_len: int, seed: int
) -> Iterator[tuple["torch.Tensor", "torch.Tensor"]]:
    """Windows of text, one at a time, with their masks, each ``[1, T]``."""
    import torch

    from sparc3_pl.data.samples import pack_windows
    from sparc3_pl.data.sources import get_field, read_records

    assert source is not None
    records = read_records(source, seed=seed, key="mean_source")
    texts = (text for record in records if (text := get_field(record, field)))
    for window in pack_windows(texts, encoder, seq_len, count, source):
        ids = torch.tensor([window.input_ids])
        yield ids, torch.ones_like(ids)


def _with_means(plan: PrunePlan, model: "PreTrainedModel", batches: Iterator) -> PrunePlan:
    from sparc3_pl.pruning.edit import planned_changes
    from sparc3_pl.pruning.edits import mean_activations

    plan = replace(plan, means=mean_activations(model, batches, plan.counts()))
    planned_changes(model, plan)  # a plan that this model does not permit is refused here, not when it is applied
    return plan


def _with_kept_values(plan: PrunePlan, model: "PreTrainedModel") -> PrunePlan:
    """The plan with the values that it replaces, and the fingerprint of the pruned model to which they belong."""
    from sparc3_pl.model.identity import ModelRecord, fingerprint
    from sparc3_pl.pruning.edit import pruned

    with pruned(model, plan) as applied:
        about = ModelRecord(plan.model | {"pruned_fingerprint": fingerprint(model)})
        return replace(plan, kept=applied.old_values, model=about)


def _print(plan: PrunePlan, path: Path, saved: "SavedModel | None", pushed_to: str | None) -> None:
    """Prints the result on stdout."""
    from sparc3_pl.document.terminal import print_result

    table, *lines = plan.blocks()
    model = [] if saved is None else [f"model: {saved}"]
    model += [] if pushed_to is None else [f"on the hub: {pushed_to}"]
    print_result(table, *(line.text for line in lines), f"plan: {path}", *model)
