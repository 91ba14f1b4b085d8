"""Scores a model's components: a method, a target and a kind of component put together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn

from sparc3_pl.attribution.methods import METHODS, BatchFigures, Layer, Method, Options, Sums
from sparc3_pl.attribution.targets import TARGETS, Predicted, Target
from sparc3_pl.data.batches import ReferenceBatch
from sparc3_pl.errors import InputError
from sparc3_pl.model.components import COMPONENTS, Component, Group
from sparc3_pl.model.experts import is_routed
from sparc3_pl.model.placement import input_device, is_offloaded, matrix_of, place_of
from sparc3_pl.model.structure import weight_matrix
from sparc3_pl.registry import Spec
from sparc3_pl.runtime.collectives import is_sharded, whole

__all__ = ["LayerScores", "Scorer", "groups_of", "layer_scores", "require_heeded"]


@dataclass(frozen=True)
class LayerScores:
    """The scores of one layer, as a score folder keeps them.

    Attributes:
        group: The layer's components.
        scores: Scores of shape ``group.shape``, float32.
        squares: Mean over samples of the squared scores, alike; None if they were not asked for.
        groups: Mean scores of each group of samples, ``[G, n]`` float32, and the groups' sizes; likewise.
        nan: Number of NaNs that were counted as 0.
        inf: Number of infinities, likewise.
        tokens: Number of real tokens that reached the layer of an expert; None for any other.
    """

    group: Group
    scores: Tensor
    squares: Tensor | None = None
    groups: tuple[Tensor, list[int]] | None = None
    nan: int = 0
    inf: int = 0
    tokens: int | None = None


class Scorer:
    """Accumulates a method's sums over batches of samples.

    Args:
        model: A causal language model in eval mode, its parameters frozen. The sums are made where its weights lie.
        method: A method, or how YAML names one.
        components: A kind of component, or how YAML names one; a list scores several in one pass.
        layers: Globs of layer names; None: the components' own choice.
        target: A target, or how YAML names one.
        options: Further options of the method.

    Raises:
        InputError: if the method ignores an option, a glob matches nothing, two components share a layer, or the layer
            is an expert's and the method cannot score that.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Spec | Method = "lrp",
        components: Spec | Component | Sequence[Spec | Component] = "neuron",
        layers: Sequence[str] | None = None,
        target: Spec | Target = "predicted",
        options: Options | None = None,
    ) -> None:
        self.model, self.options = model, options or Options()
        self.method, self.target = METHODS.make(method), TARGETS.make(target)
        kinds = [COMPONENTS.make(kind) for kind in (components if isinstance(components, list) else [components])]
        for kind in kinds:
            require_heeded(self.method, kind, self.target, self.options)
        self.layers: dict[str, Layer] = {}
        for group in groups_of(model, kinds, layers):
            if group.routed:
                self._check_expert(group)
            module = model.get_submodule(group.layer)
            like_OI = weight_matrix(module)
            if is_offloaded(module):  # the sums lie where it computes
                like_OI = torch.empty((), dtype=like_OI.dtype, device=place_of(module)).expand(like_OI.shape)
            sums = self.method.sums(group, like_OI, self.options)
            self.layers[group.layer] = Layer(group, module, sums)

    def _check_expert(self, group: Group) -> None:
        """Refuses what cannot be done with a layer that only some tokens reach."""
        where = f"{group.layer} is an expert's, which only some tokens reach"
        if not self.method.reads_experts:
            raise InputError(
                f"method {METHODS.name_of(self.method)} needs all tokens' values, but {where}; use lrp, gradient, "
                "wanda, magnitude or random, or choose other layers by model.targets"
            )
        if self.options.sequential is not None:
            raise InputError(f"model.sequential={self.options.sequential}: {where}; leave it out")
        if self.is_sharded:
            raise InputError(
                f"{where}: experts cannot be scored where trainer.strategy=ModelParallelStrategy shares their weights "
                "out; use model.device_map: auto"
            )

    @property
    def sums(self) -> Mapping[str, Sums]:
        """The tensors of each layer that add up over batches, ranks and parts; updated in place."""
        return {name: layer.sums for name, layer in self.layers.items()}

    @property
    def is_sharded(self) -> bool:
        """Whether every rank holds a part of each weight, so that all must take part in every pass."""
        return any(map(is_sharded, self.model.parameters()))

    def update(self, batch: ReferenceBatch) -> BatchFigures | None:
        """Takes in a batch of samples; a method without samples leaves it.

        Raises:
            InputError: as ``Method.take_in``.
        """
        if not self.method.needs_samples:
            return None
        device = input_device(self.model)
        is_stand_in = not batch.attention_mask.any()  # it knows nothing that a target may want to know
        target = Predicted() if is_stand_in else self.target
        return self.method.take_in(self.model, batch.to(device), self.layers, target, self.options)

    def finish(self) -> None:
        """Completes this rank's sums after its last batch; every rank must call it, see ``Method.finish``."""
        if self.method.needs_samples:
            self.method.finish(self.model, self.layers, self.options)

    def scores(self, name: str, num_samples: int) -> LayerScores:
        """A layer's scores, once the sums hold ``num_samples`` samples.

        Scores of a model that is shared out over the ranks are gathered: every rank must ask for them, layer by layer
        in the same order.
        """
        layer = self.layers[name]
        weight_OI = matrix_of(layer.module) if self.method.needs_weights else None
        sums = {key: whole(tensor) for key, tensor in layer.sums.items()}
        return layer_scores(self.method, layer.group, sums, num_samples, weight_OI, self.options)


def layer_scores(
    method: Method, group: Group, sums: Sums, num_samples: int, weight_OI: Tensor | None, options: Options
) -> LayerScores:
    """The scores of one layer, made from the sums over all samples (see ``Method.scores``)."""
    squares, groups = None, None
    if "squares" in sums:
        squares = (sums["squares"] / num_samples).float()
    if "groups" in sums:
        sizes_G = sums["group_sizes"]
        means_GN = (sums["groups"] / sizes_G.clamp(min=1)[:, None]).float()  # an empty group's mean is 0
        groups = means_GN, sizes_G.tolist()
    counts = {key: int(sums[key]) for key in ("nan", "inf", "tokens") if key in sums}
    return LayerScores(group, method.scores(sums, group, num_samples, weight_OI, options), squares, groups, **counts)


def groups_of(model: nn.Module, components: Sequence[Component], patterns: Sequence[str] | None = None) -> list[Group]:
    """The groups in which the components are scored, each layer once; with several kinds, each names its own.

    Raises:
        InputError: as ``Component.groups``, and if two kinds of component are scored at one layer.
    """
    groups: dict[str, Group] = {}
    for kind in components:
        for group in kind.groups(model, patterns):
            group = replace(group, routed=is_routed(model.get_submodule(group.layer)))
            if group.layer in groups:
                raise InputError(
                    f"model.granularity: two kinds of component are scored at layer {group.layer}; score them in two "
                    "runs, or choose other layers by model.targets"
                )
            groups[group.layer] = group if len(components) == 1 else replace(group, component=COMPONENTS.name_of(kind))
    return list(groups.values())


def require_heeded(method: Method, component: Component, target: Target, options: Options) -> None:
    """Refuses what the method cannot do, and an option that would change nothing.

    Raises:
        InputError: for the first of them.
    """
    method.check_use(component, target)
    name, unit, heeded = METHODS.name_of(method), component.unit, method.heeds(component)
    if options.groups < 0:
        raise InputError(f"model.groups={options.groups}; give 0 for none, or a number of groups such as 8")
    if not method.needs_target and type(target) is not Predicted:
        raise InputError(f"model.target={TARGETS.name_of(target)}: method {name} attributes no target; leave it out")
    for item in fields(options):
        value = getattr(options, item.name)
        if value != item.default and item.name not in heeded:
            text = str(value).lower() if isinstance(value, bool) else value
            raise InputError(
                f"model.{item.name}={text} has no effect on scores of {unit} by method {name}; leave it out, or "
                "change model.method or model.granularity"
            )
