"""The experts of a mixture as linear layers of their own.

transformers keeps all experts of a decoder layer in two parameters, ``gate_up_proj`` ``[E, 2 W, H]`` and ``down_proj``
``[E, H, W]``: there is no module to watch, and no matrix to read or to edit. ``open_experts`` gives each expert three
linear layers whose weights are views of these parameters:

* ``experts.3``: the map into the expert's neurons (its up-projection), by which the neurons are known;
* ``experts.3.gate_proj``: the map that feeds the activation;
* ``experts.3.down_proj``: the map from the neurons back.

They hold no parameter, so that the model's state dict, its fingerprint and what it saves stay as they are. They run
only while someone watches one of them; otherwise the model computes its experts as it always does.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from sparc3_pl.errors import InputError

__all__ = [
    "ExpertLayer",
    "Routed",
    "closed_routes",
    "experts_modules",
    "is_routed",
    "keep_experts",
    "keep_neurons",
    "one_by_one",
    "open_experts",
    "router_of",
    "routes",
    "set_routes",
]

_NAME = "sparc3"  # in transformers' registry

_BASE = "_sparc3_experts_base"  # on a module's copy of its config


class Routed:
    """The tokens that reach an expert in one pass.

    Args:
        tokens_N: The tokens' positions in the flattened batch ``[B * T]``, ascending, int64.
        num_tokens: B * T.
    """

    def __init__(self, tokens_N: Tensor, num_tokens: int) -> None:
        self.tokens_N, self.num_tokens = tokens_N, num_tokens

    def everywhere(self, x_ND: Tensor) -> Tensor:
        """Values ``[N, D]`` of the expert's tokens among all tokens: ``[B * T, D]``, 0 where tokens go elsewhere."""
        return x_ND.new_zeros(self.num_tokens, x_ND.shape[-1]).index_copy(0, self.tokens_N, x_ND)


class ExpertLayer(nn.Linear):
    """One linear map of one expert: rows of a fused parameter.

    Args:
        experts: The module that holds the parameter.
        parameter: Name of the parameter.
        number: The expert.
        rows: The map's rows of the expert's matrix.
    """

    def __init__(self, experts: nn.Module, parameter: str, number: int, rows: slice) -> None:
        nn.Module.__init__(self)
        self.__dict__["_experts"] = experts  # past nn.Module, to which it would be a child of its own child
        self._parameter, self._number, self._rows = parameter, number, rows
        self.out_features, self.in_features = self.weight.shape
        self.bias = None
        self.routed: Routed | None = None
        """The tokens that it is reading; None while it does not run."""

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """A view ``[out, in]`` of the fused parameter: writing to it writes the parameter."""
        return self.of(getattr(self._experts, self._parameter))

    @property
    def owner(self) -> tuple[nn.Module, str]:
        """The module that holds the fused parameter, and the parameter's name."""
        return self._experts, self._parameter

    def of(self, fused: Tensor) -> Tensor:
        """The view ``[out, in]`` of the fused parameter's values, wherever they lie."""
        return fused[self._number, self._rows]


def is_routed(module: nn.Module) -> bool:
    """Whether only some tokens reach a layer: those that a router sends to its expert."""
    return isinstance(module, ExpertLayer)


def experts_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of ``model`` that hold all experts of a decoder layer in one parameter, by name."""
    modules = ((name, module, module._parameters.get("down_proj")) for name, module in model.named_modules())
    return {name: module for name, module, down in modules if down is not None and down.dim() == 3}


def router_of(model: nn.Module, name: str) -> nn.Module | None:
    """The module that says which experts of ``experts_modules(model)[name]`` a token goes to; None if it is unknown.

    It stands beside them, and its weight has a row for each.
    """
    owner, _, own = name.rpartition(".")
    number = experts_modules(model)[name].down_proj.shape[0]
    beside = (module for child, module in model.get_submodule(owner).named_children() if child != own)
    return next((m for m in beside if getattr(m._parameters.get("weight"), "shape", (0,))[0] == number), None)


def open_experts(model: nn.Module) -> None:
    """Gives every expert of ``model`` layers of its own; nothing happens the second time.

    Raises:
        InputError: if a model has experts that compute something unknown here, saying what.
    """
    for name, experts in experts_modules(model).items():
        if not is_open(experts):
            if reason := _reason_against(experts):
                raise InputError(
                    f"the experts of {name} {reason}, so that nothing is known of their neurons; choose other "
                    "layers by model.targets with granularity weight, or score heads or channels"
                )
            _open(experts)


@contextmanager
def one_by_one(model: nn.Module) -> Iterator[None]:
    """Inside the block open experts run by their own layers, as if someone watched them: their products round otherwise
    than those of all experts at once.
    """
    with ExitStack() as undo:
        for experts in filter(is_open, experts_modules(model).values()):
            undo.callback(experts.get_submodule("0").register_forward_pre_hook(lambda module, args: None).remove)
        yield


def keep_neurons(experts: nn.Module, kept_EW: Tensor) -> None:
    """Leaves only some neurons of each expert: their rows of ``gate_up_proj`` and columns of ``down_proj``.

    Args:
        experts: Open; its parameters are replaced by smaller ones.
        kept_EW: The neurons of each expert that stay, the same number of each.
    """
    fused, down = experts.gate_up_proj, experts.down_proj
    number, _, width = down.shape
    kept_EW = kept_EW.to(down.device)
    expert = torch.arange(number, device=down.device)[:, None]
    gate, up = fused.detach()[:, :width][expert, kept_EW], fused.detach()[:, width:][expert, kept_EW]
    back = down.detach().mT[expert, kept_EW].mT.contiguous()
    experts.gate_up_proj = nn.Parameter(torch.cat([gate, up], 1), fused.requires_grad)
    experts.down_proj = nn.Parameter(back, down.requires_grad)
    experts.intermediate_dim = kept_EW.shape[1]
    _open_again(experts, number)


def keep_experts(experts: nn.Module, router: nn.Module, index: Tensor) -> None:
    """Leaves only some experts of a decoder layer: their matrices, and their rows of the router.

    How many a token goes to is not changed here, nor is what else of the model counts experts.

    Args:
        experts: Open; its parameters are replaced by smaller ones.
        router: The module that chooses among them; likewise.
        index: The experts that stay, ascending.
    """
    number = experts.down_proj.shape[0]
    for module, name in ((experts, "gate_up_proj"), (experts, "down_proj"), (router, "weight")):
        parameter = getattr(module, name)
        rows = parameter.detach()[index.to(parameter.device)]
        setattr(module, name, nn.Parameter(rows, parameter.requires_grad))
    _open_again(experts, number)


def _open_again(experts: nn.Module, number: int) -> None:
    """Makes the layers anew after the parameters were replaced; ``number`` experts were open."""
    for e in range(number):
        del experts._modules[str(e)]
    experts.config._experts_implementation_internal = getattr(experts.config, _BASE)
    _open(experts)


# --- experts that no token may go to ----------------------------------------------------------------------------------


class _Rerouted:
    """The forward pass of a router that has fewer rows: it chooses, and weighs, as if the others had never been."""

    def __init__(self, router: nn.Module, routes_E: Tensor) -> None:
        self.router, self.routes_E = router, routes_E
        self.before = vars(router).get("forward")
        """The forward pass that the router had as an attribute of its own."""

    def __call__(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of the experts that are left, ``[N, kept]``, and each token's weights and experts, ``[N, K]``."""
        index = self.routes_E.nonzero().flatten().to(self.router.weight.device)
        smaller = copy.copy(self.router)
        smaller.__dict__["_parameters"] = {**self.router._parameters, "weight": self.router.weight[index]}
        smaller.num_experts, smaller.top_k = len(index), min(self.router.top_k, len(index))
        logits, weights, experts = type(self.router).forward(smaller, hidden_states)
        return logits, weights, index[experts]


def routes(router: nn.Module) -> Tensor:
    """Whether tokens may go to each expert, ``[E]``, 1 or 0."""
    own = vars(router).get("forward")
    return own.routes_E.clone() if isinstance(own, _Rerouted) else torch.ones(router.weight.shape[0])


def set_routes(router: nn.Module, routes_E: Tensor) -> None:
    """Lets tokens go only to the experts that have a 1; all ones leave nothing behind.

    What the router computes is bit for bit what one computes that has only these rows. Its weight stays as it is.

    Raises:
        InputError: if no expert is left, or nothing is known of how this router chooses.
    """
    if not bool(routes_E.any()):
        raise InputError("no expert of a layer would be left to send tokens to; choose fewer")
    if not hasattr(router, "top_k"):
        raise InputError(f"nothing is known of how a {type(router).__name__} chooses experts; use edit=zero")
    if router.weight.is_meta:
        raise InputError(
            "a router is offloaded (device_map), so that its rows cannot be left out; use edit=zero, or load the model "
            "whole"
        )
    if isinstance(own := vars(router).get("forward"), _Rerouted):
        del router.forward
        if own.before is not None:
            router.forward = own.before
    if not bool(routes_E.all()):
        router.forward = _Rerouted(router, routes_E)


def closed_routes(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The ``routes`` of every router that has experts to which no token may go, by name."""
    for name, module in model.named_modules():
        if isinstance(vars(module).get("forward"), _Rerouted):
            yield f"{name}.routes", routes(module)


def is_open(experts: nn.Module) -> bool:
    """Whether the experts have layers of their own."""
    return "0" in experts._modules


def _reason_against(experts: nn.Module) -> str | None:
    """How the experts differ from ``down(act(gate(x)) * up(x))``, weighted and summed over a token's; None: nowhere."""
    from transformers.integrations import moe

    if not hasattr(experts, "is_concatenated") or not hasattr(experts, "config"):
        return "do not go through transformers' interface for experts"
    if type(experts)._apply_gate is not moe._default_apply_gate:
        return "have a gate of their own kind"
    if not experts.has_gate or "gate_up_proj" not in experts._parameters:
        return "have no gate"
    for attribute, reason in (("has_bias", "have biases"), ("has_post_expert_norm", "are normalised one by one")):
        if getattr(experts, attribute, False):
            return reason
    return "keep their weights transposed" if experts.is_transposed or not experts.is_concatenated else None


def _open(experts: nn.Module) -> None:
    _register()
    number, _, width = experts.down_proj.shape
    for e in range(number):
        expert = ExpertLayer(experts, "gate_up_proj", e, slice(width, 2 * width))
        expert.gate_proj = ExpertLayer(experts, "gate_up_proj", e, slice(0, width))
        expert.down_proj = ExpertLayer(experts, "down_proj", e, slice(None))
        experts.add_module(str(e), expert.train(experts.training))
    config = copy.copy(experts.config)
    setattr(config, _BASE, config._experts_implementation)
    config._experts_implementation_internal = _NAME  # the public setter would also write to shared sub-configs
    experts.config = config


@functools.cache
def _register() -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    type(ALL_EXPERTS_FUNCTIONS).register(_NAME, _run)


def _run(experts: nn.Module, hidden_NH: Tensor, chosen_NK: Tensor, weights_NK: Tensor) -> Tensor:
    if any(layer._forward_hooks or layer._forward_pre_hooks for layer in experts.modules() if is_routed(layer)):
        return _one_by_one(experts, hidden_NH, chosen_NK, weights_NK)
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    # what would run the experts if they were not open
    base = ALL_EXPERTS_FUNCTIONS.get_interface(getattr(experts.config, _BASE), inspect.unwrap(type(experts).forward))
    return base(experts, hidden_NH, chosen_NK, weights_NK)


def _one_by_one(experts: nn.Module, hidden_NH: Tensor, chosen_NK: Tensor, weights_NK: Tensor) -> Tensor:
    """Runs each expert by its own layers, on the tokens that reach it: ``[N, H]``, N the tokens of the batch.

    Args:
        experts: Open.
        hidden_NH: The hidden states that the experts read.
        chosen_NK: The experts of each token.
        weights_NK: The weight of each of them.
    """
    total_NH = torch.zeros_like(hidden_NH)
    for number in chosen_NK.unique().tolist():
        tokens_M, place_M = torch.where(chosen_NK == number)
        expert = experts.get_submodule(str(number))
        layers = expert, expert.gate_proj, expert.down_proj
        try:
            for layer in layers:
                layer.routed = Routed(tokens_M, len(hidden_NH))
            x_MH = hidden_NH[tokens_M]
            y_MH = expert.down_proj(experts.act_fn(expert.gate_proj(x_MH)) * expert(x_MH))
        finally:
            for layer in layers:
                layer.routed = None
        y_MH = y_MH * weights_NK[tokens_M, place_M, None]
        total_NH = total_NH.index_add(0, tokens_M, y_MH.to(total_NH.dtype))
    return total_NH
