"""The neurons, MLPs and output head of a given language model.

Roles are read off the structure (the shapes of linear maps, the module that owns an activation, and who feeds whom),
never off class names, so that a new model family needs no code here as long as its MLPs are built from linear
layers around an activation module.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import fnmatch
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparc3_pl.errors import InputError
from sparc3_pl.model.experts import ExpertLayer, is_routed, open_experts
from sparc3_pl.model.remembered import by_structure

__all__ = [
    "MLP",
    "decoder",
    "decoder_layers",
    "features",
    "is_activation",
    "is_linear",
    "linear_layers",
    "mlps",
    "module_name",
    "output_head",
    "select_layers",
    "weight_matrix",
]


_NOT_ACTIVATIONS = (nn.Dropout, nn.Identity, nn.Softmax, nn.LogSoftmax, nn.ModuleList, nn.ModuleDict, nn.Sequential)


@dataclass(frozen=True)
class MLP:
    """The feed-forward block of one decoder layer.

    Attributes:
        name: The module that owns the block's linear layers (OPT: the decoder layer itself).
        up: The map into the neurons. With a gate: the branch that does not pass through the activation.
            Fused (Phi-3's ``gate_up_proj``): the one map that holds both, gate rows first.
        down: The map from the neurons back to the hidden states.
        gate: The map that feeds the activation of a gated block; None for ungated and fused blocks.
        fused: True if ``up`` holds gate and up in one ``[2 * width, hidden]`` matrix.
        width: Number of neurons.
    """

    name: str
    up: str
    down: str
    gate: str | None
    fused: bool
    width: int

    @property
    def gated(self) -> bool:
        """True if the neurons are a product ``act(gate) * up``."""
        return self.fused or self.gate is not None

    @property
    def up_rows(self) -> slice:
        """The rows of the ``up`` layer (and entries of its score vector) that are the neurons, in their order."""
        return slice(self.width, 2 * self.width) if self.fused else slice(0, self.width)

    def rows(self, index: int) -> list[tuple[str, int]]:
        """All (layer name, row) that write neuron ``index``: rows to silence together.

        Raises:
            InputError: if there is no such neuron.
        """
        self._check(index)
        if self.fused:
            return [(self.up, index), (self.up, self.width + index)]
        return [(self.up, index)] if self.gate is None else [(self.up, index), (self.gate, index)]

    def column(self, index: int) -> tuple[str, int]:
        """The (layer name, column) of the down-projection that reads neuron ``index``.

        Raises:
            InputError: if there is no such neuron.
        """
        self._check(index)
        return self.down, index

    def _check(self, index: int) -> None:
        if not 0 <= index < self.width:
            raise InputError(
                f"neuron {index} of {self.name}: it has {self.width}; use an index from 0 to {self.width - 1}"
            )


def is_linear(module: nn.Module) -> bool:
    """Whether ``module`` is a linear map with a weight matrix (``nn.Linear``, or GPT-2's ``Conv1D``)."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


def features(layer: nn.Module) -> tuple[int, int]:
    """Sizes ``(out, in)`` of a linear layer, read from its attributes (also right for offloaded weights)."""
    return (layer.out_features, layer.in_features) if isinstance(layer, nn.Linear) else (layer.nf, layer.nx)


def weight_matrix(layer: nn.Module, weight: Tensor | None = None) -> Tensor:
    """A view ``[out, in]`` of a linear layer's weight (Conv1D keeps ``[in, out]``); writing to it writes the weight.

    Args:
        layer: The layer.
        weight: Its weight's values, where they do not lie in the layer (``placement.py``).

    Raises:
        InputError: if the weight is not a plain floating-point matrix (a quantised layer).
    """
    weight = layer.weight if weight is None else weight
    weight = weight if isinstance(layer, nn.Linear) else weight.T
    if not weight.is_floating_point() or tuple(weight.shape) != features(layer):
        raise InputError(
            f"a {type(layer).__name__} holds {tuple(weight.shape)} {weight.dtype} values, not a float matrix "
            f"{features(layer)}; load the model unquantised"
        )
    return weight


def is_activation(module: nn.Module) -> bool:
    """Whether ``module`` looks like an element-wise function: no children, no parameters, no buffers, no dropout."""
    if isinstance(module, _NOT_ACTIVATIONS) or is_linear(module):
        return False
    is_activation = type(module).__module__ in ("transformers.activations", "torch.nn.modules.activation")
    return is_activation or not (module._modules or module._parameters or module._buffers)


def module_name(model: nn.Module, module: nn.Module) -> str:
    """The name under which ``model.named_modules()`` lists ``module``."""
    return next(name for name, other in model.named_modules() if other is module)


def decoder(model: nn.Module) -> nn.Module:
    """The model without its output head: called with ``input_ids``, it gives ``last_hidden_state`` ``[B, T, D]``.

    Raises:
        InputError: if ``model`` is not a language model with a decoder.
    """
    inner = model.get_decoder() if hasattr(model, "get_decoder") else None
    if inner is None or inner is model:
        inner = getattr(model, "base_model", model)
    if inner is model:
        raise InputError(
            f"{type(model).__name__} has no decoder apart from an output head; use a causal language model"
        )
    return inner


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that the decoder runs one after the other: the members of its first list of modules.

    Raises:
        InputError: if it has none.
    """
    lists = (module for module in decoder(model).modules() if isinstance(module, nn.ModuleList))
    layers = next((part for part in lists if any(map(is_linear, part.modules()))), None)
    if layers is None:
        raise InputError(
            f"{type(model).__name__} has no list of decoder layers to share out over processes; spread it over the "
            "devices of one process instead (model.device_map: auto)"
        )
    return list(layers)


def output_head(model: nn.Module) -> tuple[str, nn.Module]:
    """Name and module of the map from hidden states to logits (its weight may be tied to the embedding).

    Raises:
        InputError: if there is none.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None or not is_linear(head):
        raise InputError(
            f"{type(model).__name__} has no linear output head; use a causal language model (...ForCausalLM)"
        )
    return module_name(model, head), head


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer of the decoder in order of appearance, then the output head, by ``named_modules()`` name.

    Those of experts are views of fused parameters (``experts.py``).
    """
    with contextlib.suppress(InputError):  # experts that stay closed are no layers
        open_experts(model)
    head_name, head = output_head(model)
    inside = {id(module) for module in decoder(model).modules()}
    layers = {n: m for n, m in model.named_modules() if is_linear(m) and id(m) in inside and m is not head}
    return {**layers, head_name: head}


@by_structure
def mlps(model: nn.Module) -> list[MLP]:
    """The MLPs of ``model`` in layer order.

    An MLP is a module that owns an activation and two linear layers (h to i, i to h; or fused, h to 2i, i to h) or
    three (two h to i, one i to h). An expert of a mixture is one too.

    Raises:
        InputError: if there is none, or the model has experts of an unknown kind.
    """
    open_experts(model)
    inside = {id(module) for module in decoder(model).modules()}
    owners = [(name, module) for name, module in model.named_modules() if id(module) in inside]
    blocks = [mlp for name, owner in owners if (mlp := _as_mlp(name, owner)) is not None]
    if not blocks:
        raise InputError(
            f"no MLP found in {type(model).__name__}: no module owns an activation and linear layers h->i, i->h; "
            "name linear layers by model.targets, with granularity weight"
        )
    return blocks


def select_layers(model: nn.Module, patterns: Sequence[str] | None) -> dict[str, nn.Module]:
    """The linear layers whose names match one of the glob ``patterns``, in order of appearance.

    Args:
        model: A causal language model.
        patterns: Globs such as ``*.up_proj`` (``*`` also spans dots), or None for the up-projections of all MLPs.

    Raises:
        InputError: if a pattern matches nothing; it names the nearest layers.
    """
    layers = linear_layers(model)
    if patterns is None:
        return {mlp.up: layers[mlp.up] for mlp in mlps(model)}
    if not patterns:
        raise InputError("targets is an empty list; name linear layers, e.g. ['*.up_proj'], or leave it unset")
    for pattern in patterns:
        if not fnmatch.filter(layers, pattern):
            raise InputError(
                f"targets: {pattern!r} matches no linear layer; nearest: {', '.join(_nearest(pattern, layers))}"
            )
    return {n: m for n, m in layers.items() if any(fnmatch.fnmatchcase(n, pattern) for pattern in patterns)}


def _as_mlp(name: str, owner: nn.Module) -> MLP | None:
    """Read ``owner`` as an MLP by its direct children, or None if it is none."""
    if isinstance(owner, ExpertLayer) and len(owner._modules):
        down = owner.get_submodule("down_proj")
        return MLP(name, name, f"{name}.down_proj", f"{name}.gate_proj", fused=False, width=features(down)[1])
    if any(map(is_routed, owner.children())):
        return None
    linears = {n: m for n, m in owner.named_children() if is_linear(m)}
    acts = [m for m in owner.children() if is_activation(m)]
    if len(acts) != 1 or len(linears) not in (2, 3):
        return None
    if len(linears) == 3:
        return _gated(name, owner, linears, acts[0])
    return _ungated_or_fused(name, linears)


def _ungated_or_fused(name: str, linears: dict[str, nn.Module]) -> MLP | None:
    """An MLP of two maps. If hidden and intermediate sizes are equal, the map that is defined first is used first."""
    for first, second in (tuple(linears), tuple(linears)[::-1]):
        (out, hidden), (back, width) = features(linears[first]), features(linears[second])
        if hidden == back and out in (width, 2 * width):
            up, down = _join(name, first), _join(name, second)
            return MLP(name, up, down, gate=None, fused=out == 2 * width, width=width)
    return None


def _gated(name: str, owner: nn.Module, linears: dict[str, nn.Module], act: nn.Module) -> MLP | None:
    """An MLP of three maps: the one that feeds the activation is the gate, the one that reads the product is down."""
    shapes = [features(layer) for layer in linears.values()]
    if not any(shapes.count(s) >= 2 and s[::-1] in shapes for s in shapes):
        return None
    gate, down = _gate_and_down(owner, linears, act)
    (up,) = linears.keys() - {gate, down}
    parts = {role: _join(name, part) for role, part in (("up", up), ("down", down), ("gate", gate))}
    return MLP(name, **parts, fused=False, width=features(linears[up])[0])


def _gate_and_down(owner: nn.Module, linears: dict[str, nn.Module], act: nn.Module) -> tuple[str, str]:
    """Names of gate and down: who feeds whom is seen on one zero token, in a stand-in whose children only make zeros.

    It costs nothing whatever the model's size, and no hook, weight or attribute of the model is touched.
    """
    outputs: list[tuple[str, Tensor]] = []
    read_by_act: list[Tensor] = []

    def linear(name: str, x: Tensor) -> Tensor:
        outputs.append((name, x.new_zeros(*x.shape[:-1], features(linears[name])[0])))
        return outputs[-1][1]

    def activation(x: Tensor) -> Tensor:
        read_by_act.append(x)
        return x.clone()

    children = {name: functools.partial(linear, name) if name in linears else m for name, m in owner.named_children()}
    stand_in = copy.copy(owner)
    stand_in.__dict__["_modules"] = {name: activation if m is act else m for name, m in children.items()}
    sizes = [features(layer)[1] for layer in linears.values()]
    hidden = max(sizes, key=sizes.count)  # the input size that two of the three maps share
    with torch.no_grad():
        type(owner).forward(stand_in, torch.zeros(1, 1, hidden, device="cpu"))
    gate = next(name for name, out in outputs if out is read_by_act[0])
    return gate, outputs[-1][0]


def _join(owner: str, child: str) -> str:
    return f"{owner}.{child}" if owner else child


def _nearest(pattern: str, names: dict[str, nn.Module]) -> list[str]:
    """Up to three layer names close to ``pattern``, or one of every kind if nothing is close."""
    kinds = {name.rpartition(".")[2]: "*." if "." in name else "" for name in reversed(names)}
    close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.6)
    if not close:
        leaf = pattern.rpartition(".")[2]
        close = [kinds[kind] + kind for kind in difflib.get_close_matches(leaf, kinds, n=3, cutoff=0.8)]
    return close or [kinds[kind] + kind for kind in reversed(kinds)]
