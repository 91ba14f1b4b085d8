"""Applying a plan to a model, exactly, and taking it back, bit for bit.

What a neuron of a plan stands for depends on its layer:

* the up-projection of an MLP (``up_proj``, ``fc1``, ``c_fc``; Phi-3's fused ``gate_up_proj``): the whole neuron.
  ``zero`` writes zeros to its row in up and gate (and the biases' entries) and to its column in down.
  ``scale`` multiplies the column in down by alpha, which scales what the neuron contributes, whatever its activation
  function. ``mean`` replaces the neuron by its mean activation: as ``zero``, and the mean times the column is added to
  down's bias;
* any other linear layer (``q_proj``, ``o_proj``, ``gate_proj``, ...): one output row and the bias' entry.

A weight plan multiplies single weights by 0 (or alpha).
"""

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from sparc3_pl.errors import InputError
from sparc3_pl.families import MLP, features, linear_layers, mlps, weight_matrix
from sparc3_pl.language_model import differing_config, fingerprint, model_config
from sparc3_pl.pruning.plan import PrunePlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["AppliedPlan", "apply_plan", "check_plan", "mean_activations", "pruned", "revert"]

Part = Literal["rows", "columns", "bias", "weights"]


@dataclass(frozen=True)
class Span:
    """Some entries of one linear layer: rows or columns of its ``[out, in]`` matrix, of its bias, or single weights."""

    layer: str
    part: Part
    index: Tensor

    @property
    def key(self) -> str:
        """Names the span in a file of kept values."""
        return f"{self.layer}.{self.part}"

    def read(self, module: nn.Module) -> Tensor:
        """A copy of the entries."""
        where, index = self._locate(module)
        return where[index].clone()

    @torch.no_grad()
    def write(self, module: nn.Module, values: Tensor | float) -> None:
        """Writes the entries in place."""
        where, index = self._locate(module)
        where[index] = values.to(where) if isinstance(values, Tensor) else values

    def _locate(self, module: nn.Module) -> tuple[Tensor, tuple[Tensor | slice, ...]]:
        if self.part == "bias":
            bias = module.bias.detach()
            return bias, (self.index.to(bias.device),)
        matrix = weight_matrix(module).detach()
        index = self.index.to(matrix.device)
        if self.part == "weights":
            return matrix, (index // matrix.shape[1], index % matrix.shape[1])
        return matrix, (index,) if self.part == "rows" else (slice(None), index)


Change = tuple[Span, float | Tensor]


@dataclass
class AppliedPlan:
    """A plan that is in force in a model, and the values that it replaced."""

    model: nn.Module
    plan: PrunePlan
    spans: list[Span]
    kept: dict[str, Tensor]
    zeroed: list[Span]
    active: bool = field(default=True)

    def hold(self) -> None:
        """Puts the zeros of the edit back, as after an optimiser step."""
        for span in self.zeroed:
            span.write(self.model.get_submodule(span.layer), 0.0)

    def revert(self) -> None:
        """Puts the replaced values back, bit for bit; does nothing the second time."""
        if self.active:
            _restore(self.model, self.spans, self.kept)
            self.active = False


def apply_plan(model: "PreTrainedModel", plan: PrunePlan, check_fingerprint: bool = True) -> AppliedPlan:
    """Edits ``model`` in place as ``plan`` says.

    Args:
        model: The model that the plan was made for, on any device, in any floating-point type.
        plan: What to edit.
        check_fingerprint: Whether the weights must be those that were scored. Turn it off for a model that was
            trained since; names, shapes and indices are checked all the same.

    Returns:
        The edit in force, with ``revert`` and ``hold``.

    Raises:
        InputError: before anything is changed, if the plan does not fit the model.
    """
    check_plan(model, plan, check_fingerprint)
    return _carry_out(model, plan, _changes(model, plan))


def _carry_out(model: nn.Module, plan: PrunePlan, changes: list[Change]) -> AppliedPlan:
    """Keeps all old values first, then writes: a factor multiplies them, a tensor is added to them."""
    spans = [span for span, _ in changes]
    kept = {span.key: span.read(model.get_submodule(span.layer)) for span in spans}
    for span, change in changes:
        old = kept[span.key]
        if isinstance(change, Tensor):
            new = (old.double() + change.to(old.device)).to(old.dtype)
        else:
            new = old * change if change else torch.zeros_like(old)  # 0 times infinity is not 0
        span.write(model.get_submodule(span.layer), new)
    zeroed = [span for span, change in changes if not isinstance(change, Tensor) and change == 0.0]
    return AppliedPlan(model, plan, spans, kept, zeroed)


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
    if fingerprint(model) != plan.model.get("pruned_fingerprint"):
        raise InputError("this model is not the one that this plan pruned; give the pruned model, unchanged")
    check_plan(model, plan, check_fingerprint=False)
    spans = [span for span, _ in _changes(model, plan)]
    shapes = {span.key: span.read(model.get_submodule(span.layer)).shape for span in spans}
    if shapes != {key: values.shape for key, values in plan.kept.items()}:
        raise InputError("the removed values beside the plan are not those of its neurons; make the plan again")
    _restore(model, spans, plan.kept)


def _restore(model: nn.Module, spans: list[Span], kept: Mapping[str, Tensor]) -> None:
    for span in spans:
        span.write(model.get_submodule(span.layer), kept[span.key])


# --- what changes -----------------------------------------------------------------------------------------------------


def _changes(model: nn.Module, plan: PrunePlan) -> list[Change]:
    """What the plan writes: a factor for the entries of a span, or a tensor that is added to them."""
    factor = plan.alpha if plan.edit == "scale" else 0.0
    if plan.granularity == "weight":
        return [(Span(layer, "weights", index.long()), factor) for layer, index in plan.weights.items()]
    owners, rows, columns = _owners(model), {}, {}
    for layer, indices in plan.by_layer().items():
        if (mlp := owners.get(layer)) is None:
            rows.setdefault(layer, set()).update(indices)
            continue
        columns[mlp.down] = neurons = {_neuron(mlp, index) for index in indices}
        if plan.edit != "scale":
            for name, row in (pair for neuron in neurons for pair in mlp.rows(neuron)):
                rows.setdefault(name, set()).add(row)
    changes: list[Change] = []
    for layer, chosen in rows.items():
        index = torch.tensor(sorted(chosen))
        changes.append((Span(layer, "rows", index), factor))
        if model.get_submodule(layer).bias is not None:
            changes.append((Span(layer, "bias", index), factor))
    changes += [(Span(layer, "columns", torch.tensor(sorted(chosen))), factor) for layer, chosen in columns.items()]
    return changes + (_folded_means(model, plan) if plan.edit == "mean" else [])


def _folded_means(model: nn.Module, plan: PrunePlan) -> list[Change]:
    """What the removed neurons add to the next layer on average: W_down[:, i] * mean_i, summed over i."""
    owners, changes = _owners(model), []
    for layer, indices in plan.by_layer().items():
        mlp = owners[layer]
        index = torch.tensor(sorted({_neuron(mlp, index) for index in indices}))
        columns = Span(mlp.down, "columns", index).read(model.get_submodule(mlp.down))  # [hidden, n]
        added = columns.double() @ plan.means[layer].to(columns.device, torch.float64)[index.to(columns.device)]
        changes.append((Span(mlp.down, "bias", torch.arange(len(added))), added))
    return changes


def _owners(model: nn.Module) -> dict[str, MLP]:
    """MLPs by the name of their up-projection; none for models whose MLPs are not recognised."""
    try:
        return {mlp.up: mlp for mlp in mlps(model)}
    except InputError:  # such a plan can only name rows of other layers or single weights
        return {}


def _neuron(mlp: MLP, row: int) -> int:
    """The neuron that an output row of the up-projection belongs to (a fused map has two rows for each)."""
    return row % mlp.width if mlp.fused else row


# --- checks -----------------------------------------------------------------------------------------------------------


def check_plan(model: nn.Module, plan: PrunePlan, check_fingerprint: bool = True) -> None:
    """Refuses a plan that does not fit ``model``; changes nothing.

    Raises:
        InputError: for a plan of another model, a missing layer, an index out of range, a layer that shares its
            weight with another, offloaded weights, or an edit that the architecture does not permit.
    """
    plan.check()
    if check_fingerprint:
        _check_fingerprint(model, plan)
    layers, owners = linear_layers(model), _owners(model)
    for layer, shape in {layer: plan.shapes.get(layer) for layer in plan.counts()}.items():
        if layer not in layers:
            near = ", ".join(difflib.get_close_matches(layer, layers, n=2, cutoff=0.5)) or "no layer of a similar name"
            raise InputError(f"the plan's layer {layer} is not in this {type(model).__name__} (nearest: {near})")
        _check_shape(layer, shape, layers[layer], owners.get(layer), plan)
        for name in _touched(layer, owners.get(layer)):
            _check_writable(model, name, layers[name])
    if plan.edit == "mean":
        _check_mean(model, plan, owners)


def _check_fingerprint(model: nn.Module, plan: PrunePlan) -> None:
    found = fingerprint(model)
    if found == plan.fingerprint:
        if (key := differing_config(plan.model.get("config") or {}, model_config(model))) is not None:
            raise InputError(f"the plan was made for these weights with another {key} in the config; make it again")
        return
    if found == plan.model.get("pruned_fingerprint"):
        raise InputError("the model is already pruned by this plan; give the original model, or leave out the plan")
    raise InputError(
        f"the plan was made for {plan.model.get('pretrained')} ({plan.fingerprint[:19]}...), but this model's weights "
        f"are {found[:19]}...; give that model, or make a plan for this one"
    )


def _check_shape(layer: str, shape: list[int] | None, module: nn.Module, mlp: MLP | None, plan: PrunePlan) -> None:
    out, inner = features(module)
    fitting = [[out, inner]] if plan.granularity == "weight" else [[out]] + ([[mlp.width]] if mlp else [])
    if shape is not None and shape not in fitting:
        raise InputError(f"the plan's layer {layer} has shape {shape}, but this model's has {fitting[0]}; wrong model")
    if plan.granularity == "weight":
        if int(plan.weights[layer][-1]) >= out * inner:
            raise InputError(f"the plan's weight {int(plan.weights[layer][-1])} of {layer} is beyond its {out * inner}")
        return
    indices = plan.by_layer()[layer]
    if max(indices) >= out:
        raise InputError(f"the plan's neuron {max(indices)} of {layer} is out of range: the layer has {out} rows")
    if mlp and len({_neuron(mlp, index) for index in indices}) < len(indices):
        raise InputError(f"the plan names a neuron of {layer} twice, by its gate row and its up row; make it again")


def _touched(layer: str, mlp: MLP | None) -> list[str]:
    return [layer] if mlp is None else [name for name in (mlp.up, mlp.gate, mlp.down) if name]


def _check_writable(model: nn.Module, name: str, module: nn.Module) -> None:
    if module.weight.is_meta:
        raise InputError(f"the weights of {name} are offloaded, so they cannot be edited; load the model whole")
    for other_name, other in model.named_modules():
        if other is not module and other._parameters.get("weight") is module.weight:
            raise InputError(f"{name} shares its weight with {other_name}, which would change too; leave {name} out")


def _check_mean(model: nn.Module, plan: PrunePlan, owners: Mapping[str, MLP]) -> None:
    for layer in plan.counts():
        mlp = owners.get(layer)
        if mlp is None:
            raise InputError(f"edit=mean is for MLP neurons, and {layer} is no up-projection; use zero or scale")
        if model.get_submodule(mlp.down).bias is None:
            raise InputError(
                f"edit=mean needs a bias to fold the mean into, but {mlp.down} has none; use zero or scale"
            )
        if layer not in plan.means or plan.means[layer].shape != (mlp.width,):
            raise InputError(f"edit=mean needs the mean activations of {layer}; make the plan with --mean_source")


# --- mean activations -------------------------------------------------------------------------------------------------


@torch.no_grad()
def mean_activations(
    model: "PreTrainedModel", batches: Iterable[tuple[Tensor, Tensor]], layers: Iterable[str] | None = None
) -> dict[str, Tensor]:
    """Mean activation of every MLP neuron (what the down-projection reads) over all real tokens.

    Args:
        model: In eval mode.
        batches: ``(input_ids, attention_mask)``, both ``[B, T]``.
        layers: Names of up-projections (default: of all MLPs).

    Returns:
        By up-projection: ``[neurons]`` float32, sums taken in float64.

    Raises:
        InputError: if the batches hold no token.
    """
    chosen = [mlp for mlp in mlps(model) if layers is None or mlp.up in set(layers)]
    sums = {mlp.up: torch.zeros(mlp.width, dtype=torch.float64) for mlp in chosen}
    count, real = 0, torch.empty(0)

    def add(up: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            flat = inputs[0].reshape(-1, inputs[0].shape[-1])  # [B*T, width]; OPT flattens by itself
            sums[up] += flat[real.to(flat.device)].double().sum(0).cpu()

        return hook

    with ExitStack() as hooks:
        for mlp in chosen:
            handle = model.get_submodule(mlp.down).register_forward_pre_hook(add(mlp.up))
            hooks.callback(handle.remove)
        device = model.get_input_embeddings().weight.device
        for input_ids, attention_mask in batches:
            real = attention_mask.bool().flatten()
            count += int(real.sum())
            model(input_ids=input_ids.to(device), attention_mask=attention_mask.to(device), use_cache=False)
    if not count:
        raise InputError("mean activations were asked for, but the samples hold no token; give other samples")
    return {up: (total / count).float() for up, total in sums.items()}
