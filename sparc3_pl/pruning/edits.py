"""What is done to the components of a plan: each edit says which entries of which weights become what.

An edit is given the parts of a layer's chosen components (``components.py``) and knows nothing else of what they are:

* ``zero``: all entries of a component become 0;
* ``scale``: the entries that read the component are multiplied by alpha, which scales its contribution whatever its
  activation function. Where nothing reads it (a row of any other layer, a single weight), its own entries are;
* ``mean``: as ``zero``, and the component's mean activation times what reads it is added to the reader's bias;
* ``gains``: as ``scale``, with a factor for each component (``gains.py``);
* ``remove``: whole experts of a mixture are taken out of the routing: the router chooses among the others.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, is_dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from sparc3_pl.errors import InputError
from sparc3_pl.io.formats import Record
from sparc3_pl.model.components import Part
from sparc3_pl.model.experts import is_routed, router_of
from sparc3_pl.model.placement import input_device
from sparc3_pl.model.structure import features, mlps, module_name
from sparc3_pl.registry import Registry

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["EDITS", "Change", "Chosen", "Edit", "Mean", "Remove", "Scale", "Zero", "mean_activations"]


@dataclass(frozen=True)
class Change:
    """What becomes of the entries of a part: they are multiplied, or something is added to them.

    Attributes:
        part: The entries.
        factor: One factor for all entries, or ``[n]``, one for each. 0 writes zeros, whatever was there.
        added: What is added to the entries, ``[n]`` float64, in place of a factor.
    """

    part: Part
    factor: float | Tensor = 1.0
    added: Tensor | None = None


@dataclass(frozen=True)
class Chosen:
    """The chosen components of one layer.

    Attributes:
        layer: Name of the layer.
        parts: Their entries. A part's ``owner`` is a position in the other lists.
        score: The values that they were chosen by, ``[n]`` float64; None where the plan does not keep them.
        factor: A factor for each of them, ``[n]`` float64, if the plan has any.
        means: Mean activations of everything that the layer's reader reads, ``[in]``, if the plan has them.
    """

    layer: str
    parts: Sequence[Part]
    score: Tensor | None = None
    factor: Tensor | None = None
    means: Tensor | None = None


class Edit(ABC):
    """A kind of edit. Arguments are the fields of a dataclass."""

    only_for: ClassVar[str | None] = None
    """The one kind of component that it is for; None: any."""

    @abstractmethod
    def changes(self, model: nn.Module, chosen: Chosen) -> list[Change]:
        """What is to be written for the chosen components of one layer; changes nothing by itself.

        Raises:
            InputError: if the model does not permit it.
        """

    def factors(self, score: Tensor) -> Tensor | None:
        """A factor for each component, to be kept in the plan, from the ``[n]`` float64 values they were chosen by."""
        return None

    def participle(self) -> str:
        """What was done to the components, to follow their name: ``set to zero``."""
        return f"edited by {EDITS.name_of(self)}"

    def arguments(self) -> Record:
        """Its arguments, by name."""
        return asdict(self) if is_dataclass(self) else {}


@dataclass(frozen=True)
class Zero(Edit):
    """The components are silenced."""

    def changes(self, model: nn.Module, chosen: Chosen) -> list[Change]:
        return [Change(part, 0.0) for part in chosen.parts]

    def participle(self) -> str:
        return "set to zero"


@dataclass(frozen=True)
class Scale(Edit):
    """The components' contribution is multiplied.

    Args:
        alpha: The factor. A negative one reverses the contribution; one above 1 amplifies it.

    Raises:
        InputError: if the factor is missing or not finite.
    """

    alpha: float | None = None

    def __post_init__(self) -> None:
        if self.alpha is None or isinstance(self.alpha, bool) or not math.isfinite(self.alpha):
            raise InputError(f"edit=scale needs a finite alpha, but alpha={self.alpha}; give a number, e.g. 0.5")

    def changes(self, model: nn.Module, chosen: Chosen) -> list[Change]:
        return [Change(part, self.alpha) for part in contributing(chosen.parts)]

    def participle(self) -> str:
        return f"multiplied by {self.alpha:g}"


@dataclass(frozen=True)
class Mean(Edit):
    """The components give their mean activation, whatever the input."""

    def changes(self, model: nn.Module, chosen: Chosen) -> list[Change]:
        readers = [part for part in chosen.parts if part.role == "reads"]
        if not readers:
            raise InputError(f"edit=mean is for MLP neurons, and {chosen.layer} is no up-projection; use zero or scale")
        return [*Zero().changes(model, chosen), *(self._folded(model, chosen, part) for part in readers)]

    def participle(self) -> str:
        return "replaced by their mean activation"

    def _folded(self, model: nn.Module, chosen: Chosen, part: Part) -> Change:
        """What the components add to the reader's output on average: W[:, i] * mean_i, summed over i."""
        reader = model.get_submodule(part.layer)
        if reader.bias is None:
            raise InputError(
                f"edit=mean needs a bias to fold the mean into, but {part.layer} has none; use zero or scale"
            )
        order = part.index.argsort()
        columns = part.read(reader)
        columns = columns[:, order.to(columns.device)]  # [hidden, n]
        index = part.index[order]
        if chosen.means is None or chosen.means.dim() != 1 or len(chosen.means) <= int(index[-1]):
            raise InputError(
                f"edit=mean needs the mean activations of {chosen.layer}; make the plan with --mean_source"
            )
        shift = columns.double() @ chosen.means[index].to(columns.device, torch.float64)
        every = torch.arange(len(shift))
        return Change(Part(part.layer, "bias", every, torch.zeros_like(every), "reads"), added=shift)


@dataclass(frozen=True)
class Remove(Edit):
    """Experts are taken out of the routing: tokens go to the others, whose weights the router sets as if these had
    never been. ``zero`` leaves them to be chosen, and then they add nothing.
    """

    only_for = "expert"

    def changes(self, model: nn.Module, chosen: Chosen) -> list[Change]:
        block, _, number = chosen.layer.removesuffix(".down_proj").rpartition(".")
        reads = next((part for part in chosen.parts if part.role == "reads"), None)
        layer = model.get_submodule(chosen.layer)
        if reads is None or not is_routed(layer) or reads.layer != chosen.layer or reads.count != features(layer)[1]:
            raise InputError(f"edit=remove is for whole experts, and {chosen.layer} is none; use zero or scale")
        if (router := router_of(model, block)) is None:
            raise InputError(f"edit=remove: the router of {block} is unknown; use edit=zero")
        expert = torch.tensor([int(number)])
        return [Change(Part(module_name(model, router), "routes", expert, torch.zeros_like(expert)), 0.0)]

    def participle(self) -> str:
        return "taken out of the routing"


def contributing(parts: Sequence[Part]) -> list[Part]:
    """The entries that carry what components contribute: those that read them, or their own if nothing does."""
    return [part for part in parts if part.role == "reads"] or list(parts)


EDITS: Registry[Edit] = Registry(
    "edit",
    Edit,
    {
        "zero": f"{__name__}.Zero",
        "scale": f"{__name__}.Scale",
        "mean": f"{__name__}.Mean",
        "remove": f"{__name__}.Remove",
        "gains": "sparc3_pl.pruning.gains.Gains",
    },
)


@torch.no_grad()
def mean_activations(
    model: "PreTrainedModel", batches: Iterable[tuple[Tensor, Tensor]], layers: Iterable[str] | None = None
) -> dict[str, Tensor]:
    """Mean activation of every MLP neuron (what the down-projection reads) over all real tokens.

    Args:
        model: The model, in eval mode.
        batches: ``(input_ids, attention_mask)``, both ``[B, T]``.
        layers: Names of up-projections (default: of all MLPs).

    Returns:
        By up-projection: ``[neurons]`` float32, sums taken in float64.

    Raises:
        InputError: if the batches hold no token, or a layer is an expert's.
    """
    chosen = [mlp for mlp in mlps(model) if layers is None or mlp.up in set(layers)]
    if expert := next((mlp.up for mlp in chosen if is_routed(model.get_submodule(mlp.up))), None):
        raise InputError(f"edit=mean: only some tokens reach {expert}, so there is no mean over all; use zero or scale")
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
        device = input_device(model)
        for input_ids, attention_mask in batches:
            real = attention_mask.bool().flatten()
            count += int(real.sum())
            model(input_ids=input_ids.to(device), attention_mask=attention_mask.to(device), use_cache=False)
    if not count:
        raise InputError("mean activations were asked for, but the samples hold no token; give other samples")
    return {up: (total / count).float() for up, total in sums.items()}
