"""Applying a plan to a model, exactly, and taking it back, bit for bit.

Which entries of which weights belong to a component is the component's business (``components.py``), what becomes of
them the edit's (``edits.py``). Here the changes of a whole plan are put together, checked, written and taken back.
"""

import contextlib
import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sparc3_pl.errors import InputError
from sparc3_pl.model.bitmask import BitMask
from sparc3_pl.model.components import Group, Part
from sparc3_pl.model.experts import experts_modules, open_experts, routes
from sparc3_pl.model.identity import differing_config, fingerprint, model_config
from sparc3_pl.model.placement import is_offloaded, values_of
from sparc3_pl.model.structure import linear_layers
from sparc3_pl.pruning.edits import Change, Chosen
from sparc3_pl.pruning.plan import PrunePlan
from sparc3_pl.runtime.collectives import is_sharded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["AppliedPlan", "apply_plan", "planned_changes", "pruned", "revert"]


@dataclass
class AppliedPlan:
    """A plan that is in force in a model, and the values that it replaced (None if they were not to be kept)."""

    model: nn.Module
    plan: PrunePlan
    changes: list[Change]
    old_values: dict[str, Tensor] | None
    zeroed: list[Part]
    active: bool = field(default=True)

    def hold(self) -> None:
        """Puts the zeros of the edit back, as after an optimiser step."""
        for part in self.zeroed:
            part.write(self.model.get_submodule(part.layer), 0.0)

    def revert(self) -> None:
        """Puts the replaced values back, bit for bit; does nothing the second time.

        Raises:
            InputError: if they were not kept.
        """
        if self.active:
            if self.old_values is None:
                raise InputError(
                    "the replaced values were not kept; apply the plan with keep=True, or load the model again"
                )
            _restore(self.model, self.changes, self.old_values)
            self.active = False


def apply_plan(
    model: "PreTrainedModel", plan: PrunePlan, check_fingerprint: bool = True, keep: bool = True
) -> AppliedPlan:
    """Edits ``model`` in place as ``plan`` says.

    Args:
        model: The model that the plan was made for, on any device, in any floating-point type.
        plan: What to edit.
        check_fingerprint: Whether the weights must be those that were scored. Turn it off for a model that was
            trained since; names, shapes and indices are checked all the same.
        keep: Whether the values that are replaced are kept, so that they can be put back: half a model's for a plan
            that removes half of its weights. They are kept anyhow unless all become zero.

    Returns:
        The edit in force, with ``revert`` and ``hold``.

    Raises:
        InputError: if the plan does not fit the model, or a factor takes a weight beyond its number format; the model
            is then as it was.
    """
    changes = planned_changes(model, plan, check_fingerprint)
    zeros = [part for part in map(_zeroed, changes) if part.count]
    if not keep and all(not isinstance(c.factor, Tensor) and c.factor == 0 and c.added is None for c in changes):
        for part in zeros:
            part.write(model.get_submodule(part.layer), 0.0)
        return AppliedPlan(model, plan, changes, None, zeros)
    before = {c.part.key: c.part.read(model.get_submodule(c.part.layer)) for c in changes}  # before any is written
    applied = AppliedPlan(model, plan, changes, before, zeros)
    layers: set[str] = set()
    for change in changes:
        old, module = before[change.part.key], model.get_submodule(change.part.layer)
        if change.part.layer in layers:  # rows and columns of one matrix cross: there, both factors count
            old = change.part.read(module)
        layers.add(change.part.layer)
        new = _changed(old, change)
        if bool(old.isfinite().all()) and not bool(new.isfinite().all()):
            applied.revert()
            raise InputError(
                f"edit={plan.edit} takes weights of {change.part.layer} beyond the range of {old.dtype}; "
                "use a smaller factor"
            )
        change.part.write(module, new)
    return applied


def _changed(old: Tensor, change: Change) -> Tensor:
    """The entries ``old``, as ``Part.read`` gave them, after the change; computed where they are."""
    if change.added is not None:
        return (old.double() + change.added.to(old.device)).to(old.dtype)
    if isinstance(change.factor, Tensor):
        factor = change.part.spread(change.factor.to(old.device, torch.float64), old)
        return torch.where(factor == 0, 0.0, old.double() * factor).to(old.dtype)
    return old * change.factor if change.factor else torch.zeros_like(old)  # 0 times infinity is not 0


def _zeroed(change: Change) -> Part:
    """The entries that the change makes zero."""
    part, factor = change.part, change.factor
    if change.added is not None:
        factor = 1.0
    if part.mask is not None:
        return part if factor == 0 else replace(part, mask=BitMask.empty(part.mask.size))
    zero = factor == 0 if isinstance(factor, Tensor) else torch.full_like(part.index, factor == 0, dtype=torch.bool)
    return replace(part, index=part.index[zero], owner=part.owner[zero])


@contextmanager
def pruned(model: "PreTrainedModel", plan: PrunePlan, check_fingerprint: bool = True) -> Iterator[AppliedPlan]:
    """The plan is in force inside the block; afterwards, an exception included, the model is as it was, bit for bit.

    Raises:
        InputError: as ``apply_plan``.
    """
    applied = apply_plan(model, plan, check_fingerprint)
    try:
        yield applied
    finally:
        applied.revert()


def revert(model: "PreTrainedModel", plan: PrunePlan) -> None:
    """Gives a pruned model (such as one that was saved and loaded) the values back that the plan's file kept.

    Raises:
        InputError: before anything is changed, if no values were kept, or ``model`` is not the pruned model.
    """
    if not plan.kept:
        raise InputError("the plan holds no removed values to put back; make it with --keep_values")
    if fingerprint(model) != plan.model.pruned_fingerprint:
        raise InputError("this model is not the one that this plan pruned; give the pruned model, unchanged")
    changes = planned_changes(model, plan, check_fingerprint=False)
    shapes = {c.part.key: c.part.read(model.get_submodule(c.part.layer)).shape for c in changes}
    if shapes != {key: values.shape for key, values in plan.kept.items()}:
        raise InputError("the removed values beside the plan are not those of its neurons; make the plan again")
    _restore(model, changes, plan.kept)


def _restore(model: nn.Module, changes: Sequence[Change], old_values: Mapping[str, Tensor]) -> None:
    for change in changes:
        change.part.write(model.get_submodule(change.part.layer), old_values[change.part.key])


def planned_changes(model: nn.Module, plan: PrunePlan, check_fingerprint: bool = True) -> list[Change]:
    """What ``plan`` writes into ``model``, each entry once; changes nothing.

    Raises:
        InputError: for a plan of another model, a missing layer, an index out of range, a layer that shares its
            weight with another, offloaded weights, or an edit that the architecture does not permit.
    """
    plan.check()
    if check_fingerprint:
        _check_fingerprint(model, plan)
    if any(map(is_sharded, model.parameters())):
        for experts in experts_modules(model):
            if layer := next((layer for layer in plan.counts() if layer.startswith(f"{experts}.")), None):
                raise InputError(
                    f"the plan edits {layer}, an expert's: experts cannot be edited where their weights are shared out "
                    "over processes; use model.device_map: auto"
                )
    else:
        with contextlib.suppress(InputError):  # a plan for layers that are no experts does not need them
            open_experts(model)
    modules = dict(model.named_modules())
    for layer in plan.counts():
        if layer not in modules:
            near = difflib.get_close_matches(layer, linear_layers(model), n=2, cutoff=0.5)
            names = ", ".join(near) or "no layer of a similar name"
            raise InputError(f"the plan's layer {layer} is not in this {type(model).__name__} (nearest: {names})")
    components, edit, changes = plan.load_components(), plan.load_edit(), []
    groups: dict[str, Group] = {}
    for component in dict.fromkeys(components.values()):
        own = [layer for layer, kind in components.items() if kind is component]
        groups |= {group.layer: group for group in component.groups(model, own)}
    for layer, component in components.items():
        shape, entries = plan.shapes.get(layer), plan.entries[layer]
        if layer in groups and shape not in (None, list(groups[layer].shape), [groups[layer].count]):
            right = list(groups[layer].shape)
            raise InputError(f"the plan's layer {layer} has shape {shape}, but this model's has {right}; wrong model")
        if entries.mask is None:
            parts = component.parts(model, layer, entries.index.long())
        else:
            parts = component.masked_parts(model, layer, entries.mask)
        for name in dict.fromkeys(part.layer for part in parts):
            _check_writable(modules, name)
        chosen = Chosen(layer, parts, entries.score, entries.factor, plan.means.get(layer))
        changes += edit.changes(model, chosen)
    changes = _each_entry_once(changes)
    for part in (change.part for change in changes if change.part.where == "routes"):
        _check_writable(modules, part.layer)
        if part.count == len(routes(modules[part.layer])):
            raise InputError(
                f"the plan takes all {part.count} experts of {part.layer} out of the routing; choose fewer"
            )
    return changes


def _check_fingerprint(model: nn.Module, plan: PrunePlan) -> None:
    own = fingerprint(model)
    if own == plan.fingerprint:
        if (key := differing_config(plan.model.config, model_config(model))) is not None:
            raise InputError(f"the plan was made for these weights with another {key} in the config; make it again")
        return
    if own == plan.model.pruned_fingerprint:
        raise InputError("the model is already pruned by this plan; give the original model, or leave out the plan")
    raise InputError(
        f"the plan was made for {plan.model.pretrained} ({plan.fingerprint[:19]}...), but this model's weights "
        f"are {own[:19]}...; give that model, or make a plan for this one"
    )


def _check_writable(modules: Mapping[str, nn.Module], name: str) -> None:
    module = modules[name]
    if is_offloaded(module):
        values_of(module)  # refused here, before anything is changed
    others = [n for n, other in modules.items() if other is not module and other._parameters.get("weight") is not None]
    ties = getattr(modules[""], "all_tied_weights_keys", {})  # an offloaded weight is another object in each module
    for other_name in others:
        pair = {f"{name}.weight", f"{other_name}.weight"}
        if modules[other_name].weight is module.weight or any(pair == {one, two} for one, two in ties.items()):
            raise InputError(f"{name} shares its weight with {other_name}, which would change too; leave {name} out")


def _each_entry_once(changes: Sequence[Change]) -> list[Change]:
    """One change for each part of a layer, its entries ascending: the order in which kept values lie in their file.

    Two of a plan's layers may touch the same entries: a row of the gate as such, and as part of a neuron.
    """
    together: dict[str, list[Change]] = {}
    for change in changes:
        together.setdefault(change.part.key, []).append(change)
    return [_united(group) for group in together.values()]


def _united(group: Sequence[Change]) -> Change:
    first = group[0]
    if first.part.mask is not None and len(group) == 1:
        return first
    index, owner = torch.cat([c.part.index for c in group]), torch.cat([c.part.owner for c in group])
    if (index[1:] > index[:-1]).all() and len(group) == 1:
        return first
    order = index.argsort(stable=True)
    index, owner = index[order], owner[order]
    again = torch.cat([torch.zeros(1, dtype=torch.bool), index[1:] == index[:-1]])
    part = replace(first.part, index=index[~again], owner=owner[~again])
    if any(c.added is not None for c in group):
        if len(group) > 1 or again.any():
            raise InputError(f"the plan changes the same entries of {part.key} in two ways; make it again")
        return replace(first, part=part, added=first.added[order])
    if all(not isinstance(c.factor, Tensor) and c.factor == first.factor for c in group):
        return replace(first, part=part)
    each = [torch.as_tensor(c.factor, dtype=torch.float64).expand(len(c.part.index)) for c in group]
    factor = torch.cat(each)[order]
    if (factor[1:] != factor[:-1])[again[1:]].any():
        raise InputError(f"the plan gives the same entries of {part.key} two factors; make it again")
    return replace(first, part=part, factor=factor[~again])
