"""What can be scored, chosen and edited: the only place that knows which rows and columns belong to a component.

A component kind says where in the model its scores are read (``groups``) and which entries of which weights an edit
touches (``parts``). Methods, contrasts, plans and edits work with these two answers and know no kind by name.
"""

from __future__ import annotations

import fnmatch
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from sparc3_pl.errors import InputError
from sparc3_pl.model.bitmask import BitMask
from sparc3_pl.model.experts import is_routed, routes, set_routes
from sparc3_pl.model.placement import put_values, values_of
from sparc3_pl.model.structure import MLP, features, is_linear, mlps, select_layers, weight_matrix
from sparc3_pl.registry import Registry

__all__ = [
    "COMPONENTS",
    "Component",
    "Group",
    "Neuron",
    "Part",
    "Weight",
    "WholeExpert",
    "WholeMLP",
    "check_range",
    "linear_layer",
    "mlp_by_up",
    "rows_and_bias",
    "site_of",
]


@dataclass(frozen=True)
class Group:
    """The components that are scored at one linear layer.

    Attributes:
        layer: Name of the layer, and key of its scores.
        shape: Shape of the scores: ``[out, in]`` for single weights, else ``[n]``.
        axis: ``out``: a component is ``width`` consecutive rows of the layer's ``[out, in]`` matrix; ``in``:
            ``width`` consecutive columns; ``both``: one weight.
        width: Rows or columns of one component.
        first: Index of the first score that belongs to a component. A fused map has the gates' rows before it.
        count: Number of components.
        component: Name of their kind where several kinds are scored in one run; None: the run has one kind.
        reader: For components along ``out``, the linear layer that reads their values: ``reader_width`` consecutive
            inputs for each, the first component's first. None: no layer reads just these.
        reader_width: Inputs of ``reader`` for one component.
        routed: Whether only some tokens reach the layer, as it belongs to an expert.
    """

    layer: str
    shape: tuple[int, ...]
    axis: Literal["out", "in", "both"]
    count: int
    width: int = 1
    first: int = 0
    component: str | None = None
    reader: str | None = None
    reader_width: int = 1
    routed: bool = False

    @property
    def site(self) -> Group | None:
        """The group where the components' values are read: the same components as consecutive inputs of a linear layer.

        A component's value is what an ablation replaces and a gain multiplies: a neuron's activation at the
        down-projection, a head's slice of the input of attention's output projection. Component c, from 0, is the
        inputs ``c * width`` to ``(c + 1) * width`` of ``site.layer``, and ``site.first + c`` is its score's index.
        None for components that are no inputs of one layer: single weights, rows of a layer that is no MLP's.
        """
        if self.axis == "in":
            return self
        if self.reader is None:
            return None
        return Group(
            self.reader, self.shape, "in", self.count, self.reader_width, self.first, self.component, routed=self.routed
        )

    @property
    def own(self) -> slice:
        """The scores along the first axis that belong to a component; what lies outside counts for nothing."""
        return slice(0, self.shape[0]) if self.axis == "both" else slice(self.first, self.first + self.count)

    @property
    def rows(self) -> slice:
        """The rows of the layer's matrix that belong to a component."""
        own = self.own
        return slice(own.start * self.width, own.stop * self.width) if self.axis == "out" else slice(None)

    def gathered(self, values: Tensor) -> Tensor:
        """Sums over the rows (or columns) of each component: ``[..., n]`` of one value for each, ``[..., n * width]``.

        The gates' rows of a fused map have their sums too, though nobody counts them; where its neurons' values are
        read there are none, and their sums are 0.
        """
        sums = values if self.width == 1 else values.unflatten(-1, (-1, self.width)).sum(-1)
        missing = self.shape[0] - sums.shape[-1] if self.axis == "in" else 0
        return sums if missing == 0 else nn.functional.pad(sums, (self.first, missing - self.first))

    def spread(self, values: Tensor) -> Tensor:
        """``[..., n]``, a value for each score, over the rows (or columns) of the components: ``[..., count * width]``.

        At ``site`` these factors multiply the layer's input.
        """
        return values[..., self.own].repeat_interleave(self.width, -1)

    def reduced(self, matrix_OI: Tensor) -> Tensor:
        """The sum over each component of a matrix ``[out, in]`` that has a value for every weight: of ``shape``."""
        if self.axis == "both":
            return matrix_OI
        return self.gathered(matrix_OI.sum(1 if self.axis == "out" else 0))


@dataclass(frozen=True)
class Part:
    """Entries of one linear layer that belong to chosen components.

    Attributes:
        layer: Name of the layer.
        where: ``rows`` or ``columns`` of its ``[out, in]`` matrix, entries of its ``bias``, or single ``weights``. Of a
            router its ``routes``: whether tokens may go to an expert, 1 or 0, which no weight of it says.
        index: The entries, ``[n]`` int64: rows, columns, or flat indices into ``[out, in]``.
        owner: Position of each entry's component in the list of the chosen, ``[n]`` int64.
        role: ``writes``: the entries make the component's value; ``reads``: they pass it on to the next layer.
        mask: Single weights as a mask, in place of ``index`` and ``owner`` (then empty), where they are too many to be
            listed. ``read`` and ``write`` go through them in the order of their flat indices.
    """

    layer: str
    where: Literal["rows", "columns", "bias", "weights", "routes"]
    index: Tensor
    owner: Tensor
    role: Literal["writes", "reads"] = "writes"
    mask: BitMask | None = None

    @classmethod
    def masked(cls, layer: str, mask: BitMask) -> Part:
        """The single weights that a mask shows."""
        none = torch.empty(0, dtype=torch.int64)
        return cls(layer, "weights", none, none, mask=mask)

    @property
    def count(self) -> int:
        """The number of entries, rows or columns."""
        return len(self.index) if self.mask is None else self.mask.count

    @property
    def key(self) -> str:
        """The name of the part in a file of kept values."""
        return f"{self.layer}.{self.where}"

    def read(self, module: nn.Module) -> Tensor:
        """A copy of the entries; if the weight is shared out over ranks, all ranks must ask for it."""
        if self.where == "routes":
            return routes(module)[self.index]
        values, index = self._locate(module, values_of(module, self._parameter))
        return values[index].clone() if self.mask is None else values[index]

    @torch.no_grad()
    def write(self, module: nn.Module, values: Tensor | float) -> None:
        """Writes the entries in place, wherever the weight lies (as ``read``)."""
        if self.where == "routes":
            set_routes(module, routes(module).index_copy(0, self.index, torch.as_tensor(values).expand(self.count)))
            return
        parameter = values_of(module, self._parameter)
        where, index = self._locate(module, parameter)
        if self.mask is None:
            where[index] = values.to(where) if isinstance(values, Tensor) else values
        elif isinstance(values, Tensor):
            where.masked_scatter_(index, values.to(where))
        else:
            where.masked_fill_(index, values)
        put_values(module, self._parameter, parameter)

    def spread(self, values: Tensor, entries: Tensor) -> Tensor:
        """``[n]`` values, one for each of ``index``, in a shape that multiplies the ``entries`` that ``read`` gives."""
        return values if self.where == "columns" else values.view(-1, *[1] * (entries.dim() - 1))

    @property
    def _parameter(self) -> str:
        return "bias" if self.where == "bias" else "weight"

    def _locate(self, module: nn.Module, parameter: Tensor) -> tuple[Tensor, tuple[Tensor | slice, ...] | Tensor]:
        if self.where == "bias":
            return parameter, (self.index.to(parameter.device),)
        matrix = weight_matrix(module, parameter)
        if self.mask is not None:
            return matrix, self.mask.unpacked().view(matrix.shape).to(matrix.device)
        index = self.index.to(matrix.device)
        if self.where == "weights":
            return matrix, (index // matrix.shape[1], index % matrix.shape[1])
        return matrix, (index,) if self.where == "rows" else (slice(None), index)


class Component(ABC):
    """A kind of component."""

    unit: str
    """The word for several of them in tables and messages: ``neurons``."""
    dims: int = 1
    """Dimensions of a layer's scores: 1, or 2 where every weight has a score of its own."""
    usual_selection: ClassVar[int | None] = None
    """How many an edit usually takes, where a model has thousands; None: a tenth of them, as a model may have few."""

    @abstractmethod
    def groups(self, model: nn.Module, patterns: Sequence[str] | None = None) -> list[Group]:
        """The groups in which the components of ``model`` are scored, in the model's order.

        Args:
            model: A causal language model.
            patterns: Globs of layer names, or None for the kind's own choice.

        Raises:
            InputError: if a pattern matches nothing, or the model has no such component.
        """

    @abstractmethod
    def parts(self, model: nn.Module, layer: str, index: Tensor) -> list[Part]:
        """The entries that belong to components ``index`` (``[n]`` int64) of ``layer``: what an edit may touch.

        Raises:
            InputError: if an index is out of range, or two of them are one component.
        """

    def masked_parts(self, model: nn.Module, layer: str, mask: BitMask) -> list[Part]:
        """The entries that belong to the components of a mask, which shows those that are too many to be listed.

        Raises:
            InputError: for a kind that is always listed, or a mask that does not fit the layer.
        """
        raise InputError(f"{layer}: {self.unit} are given as a mask, which is for weights; make the plan again")


class Neuron(Component):
    """One output row of a linear layer; of an MLP's up-projection, the whole neuron.

    A neuron of an MLP is written by its rows of the up and gate projections (and their biases' entries) and read by
    its column of the down-projection. A row of any other layer stands for itself.
    """

    unit = "neurons"
    usual_selection = 100

    def groups(self, model: nn.Module, patterns: Sequence[str] | None = None) -> list[Group]:
        blocks, result = mlp_by_up(model), []
        for name, module in select_layers(model, patterns).items():
            rows, routed = features(module)[0], is_routed(module)
            if (mlp := blocks.get(name)) is None:
                result.append(Group(name, (rows,), "out", rows, routed=routed))
            else:
                first, reader = mlp.up_rows.start, mlp.down
                result.append(Group(name, (rows,), "out", mlp.width, first=first, reader=reader, routed=routed))
        return result

    def parts(self, model: nn.Module, layer: str, index: Tensor) -> list[Part]:
        module, mlp = linear_layer(model, layer), mlp_by_up(model).get(layer)
        check_range("neuron", layer, index, features(module)[0], "rows")
        owner = torch.arange(len(index))
        if mlp is None:
            return rows_and_bias(layer, module, index, owner)
        neuron = index % mlp.width  # a fused map has two rows for each neuron
        if len(neuron.unique()) < len(neuron):
            raise InputError(f"a neuron of {layer} is named twice, by its gate row and its up row")
        parts = []
        for name in (name for name in (mlp.up, mlp.gate) if name is not None):
            own = torch.cat([neuron, neuron + mlp.width]) if mlp.fused else neuron
            parts += rows_and_bias(name, model.get_submodule(name), own, owner.repeat(len(own) // max(1, len(neuron))))
        return [*parts, Part(mlp.down, "columns", neuron, owner, "reads")]


class WholeMLP(Component):
    """The MLP of one decoder layer, whole. Its one score lies at the down-projection, ``[1]``.

    Its value is what the down-projection makes of the neurons: all its columns together. The down-projection's bias
    stays when the MLP is taken away, as it does when all its neurons are.
    """

    unit = "MLPs"

    def blocks(self, model: nn.Module) -> list[MLP]:
        """The MLPs that are components."""
        return mlps(model)

    def groups(self, model: nn.Module, patterns: Sequence[str] | None = None) -> list[Group]:
        blocks = self.blocks(model)
        for pattern in patterns or ():
            if not fnmatch.filter([mlp.down for mlp in blocks], pattern):
                raise InputError(f"targets: {pattern!r} matches no down-projection; they are {blocks[0].down}, ...")
        selection = [m for m in blocks if patterns is None or any(fnmatch.fnmatchcase(m.down, p) for p in patterns)]
        return [
            Group(mlp.down, (1,), "in", 1, width=mlp.width, routed=is_routed(model.get_submodule(mlp.down)))
            for mlp in selection
        ]

    def parts(self, model: nn.Module, layer: str, index: Tensor) -> list[Part]:
        mlp = next((mlp for mlp in mlps(model) if mlp.down == layer), None)
        if mlp is None:
            raise InputError(f"{layer} is not the down-projection of an MLP of this model")
        check_range("MLP", layer, index, 1, "MLP")
        if len(index) > 1:
            raise InputError(f"the MLP of {layer} is named twice")
        parts = Neuron().parts(model, mlp.up, torch.arange(mlp.width * len(index)))
        return [replace(part, owner=torch.zeros_like(part.owner)) for part in parts]


class WholeExpert(WholeMLP):
    """An expert of a mixture, whole: an MLP that only the tokens go through that its router sends there."""

    unit = "experts"

    def blocks(self, model: nn.Module) -> list[MLP]:
        experts = [mlp for mlp in mlps(model) if is_routed(model.get_submodule(mlp.down))]
        if not experts:
            raise InputError(f"{type(model).__name__} is not a mixture of experts; score whole MLPs (granularity mlp)")
        return experts


class Weight(Component):
    """One entry of a linear layer's matrix."""

    unit = "weights"
    dims = 2

    def groups(self, model: nn.Module, patterns: Sequence[str] | None = None) -> list[Group]:
        return [
            Group(name, features(module), "both", features(module)[0] * features(module)[1], routed=is_routed(module))
            for name, module in select_layers(model, patterns).items()
        ]

    def parts(self, model: nn.Module, layer: str, index: Tensor) -> list[Part]:
        out, inner = features(linear_layer(model, layer))
        check_range("weight", layer, index, out * inner, "weights")
        return [Part(layer, "weights", index, torch.arange(len(index)))]

    def masked_parts(self, model: nn.Module, layer: str, mask: BitMask) -> list[Part]:
        out, inner = features(linear_layer(model, layer))
        if mask.size != out * inner:
            raise InputError(f"the mask of {layer} is of {mask.size} weights, but the layer has {out * inner}")
        return [Part.masked(layer, mask)]


COMPONENTS: Registry[Component] = Registry(
    "model.granularity",
    Component,
    {
        "neuron": "sparc3_pl.model.components.Neuron",
        "weight": "sparc3_pl.model.components.Weight",
        "mlp": "sparc3_pl.model.components.WholeMLP",
        "expert": "sparc3_pl.model.components.WholeExpert",
        "head": "sparc3_pl.model.attention_components.Head",
        "channel": "sparc3_pl.model.attention_components.Channel",
        "output": "sparc3_pl.model.output_components.Output",
    },
)


def mlp_by_up(model: nn.Module) -> dict[str, MLP]:
    """MLPs by the name of their up-projection; none for a model whose MLPs are not recognised."""
    try:
        return {mlp.up: mlp for mlp in mlps(model)}
    except InputError:  # components of such a model are rows of named layers, or single weights
        return {}


def site_of(group: Group) -> Group:
    """``group.site``, for callers that cannot do without it.

    Raises:
        InputError: if no one layer reads the components' values.
    """
    if group.site is None:
        raise InputError(
            f"the components of {group.layer} have no value that one layer reads; score an MLP's up-projection, or "
            "heads, channels or whole MLPs"
        )
    return group.site


def linear_layer(model: nn.Module, layer: str) -> nn.Module:
    """The linear layer of that name.

    Raises:
        InputError: if it is a module of another kind.
    """
    module = model.get_submodule(layer)
    if not is_linear(module):
        raise InputError(f"{layer} is a {type(module).__name__}, not a linear layer; name one that is")
    return module


def check_range(kind: str, layer: str, index: Tensor, size: int, unit: str) -> None:
    """Refuses indices outside of ``0 .. size - 1``; the largest is named, or the smallest if that is the wrong one."""
    if len(index) and not 0 <= int(index.min()) <= int(index.max()) < size:
        wrong = int(index.max()) if int(index.max()) >= size else int(index.min())
        raise InputError(f"{kind} {wrong} of {layer} is out of range: the layer has {size} {unit}")


def rows_and_bias(layer: str, module: nn.Module, index: Tensor, owner: Tensor) -> list[Part]:
    """Output rows of a linear layer and, where it has a bias, its entries."""
    parts = [Part(layer, "rows", index, owner)]
    return parts if module.bias is None else [*parts, Part(layer, "bias", index, owner)]
