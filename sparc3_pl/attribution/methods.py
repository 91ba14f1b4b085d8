"""How components are scored: what a method sums over samples, and how the sums become scores.

A method is asked three things: which tensors it sums for a layer (``sums``; they simply add up, over batches, ranks and
parts of a run), to take in a batch (``take_in``), and to make scores of the sums (``scores``). Whoever scores, and
whoever merges parts, asks the same object.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from sparc3_pl.attribution.accumulators import (
    Counts,
    add_sample_scores,
    add_weight_scores,
    component_scores,
    drop_nonfinite,
    no_counts,
    no_sample_scores,
    require_all,
    require_finite,
    require_once,
    sum_of_layers,
    token_relevance,
)
from sparc3_pl.attribution.checkpointing import checkpointed
from sparc3_pl.attribution.recording import LayerPass, Places, inputs_shown, recording
from sparc3_pl.attribution.rules import PreparedRules, RuleSet
from sparc3_pl.attribution.sequential import Blocks, Sparsity
from sparc3_pl.attribution.targets import Attributed, Target, attribute
from sparc3_pl.data.batches import ReferenceBatch
from sparc3_pl.errors import InputError
from sparc3_pl.io.formats import Record
from sparc3_pl.model.components import Component, Group
from sparc3_pl.model.structure import weight_matrix
from sparc3_pl.registry import Registry
from sparc3_pl.runtime.collectives import is_rank_zero, is_sharded, sum_over_ranks

__all__ = [
    "METHODS",
    "BatchFigures",
    "Gradient",
    "Layer",
    "Lrp",
    "Magnitude",
    "Method",
    "Options",
    "Random",
    "Sums",
    "Wanda",
    "group_of",
]

Sums = dict[str, Tensor]
"""Tensors of one layer that simply add up. The keys ``squares`` (over samples, of a component's score), ``groups`` and
``group_sizes`` (scores of groups of samples), ``nan`` and ``inf`` (counts), and ``tokens`` (that reached an expert)
mean the same for every method."""


@dataclass(frozen=True)
class Options:
    """The options of a method; a method heeds some of them, and the others are refused (``Method.heeds``).

    Attributes:
        signed: Keep the sign of scores.
        squares: Sum the squared scores of a sample too, from which a standard error follows.
        groups: Sum the scores of this many groups of samples too (``group_of``), for split halves.
        nonfinite: ``zero`` counts NaN and infinite values and takes them for 0; ``error`` stops at them.
        seed: Seed of random scores.
        sums_on_host: Keep the sums of weight scores in the host's memory.
        gradient_checkpointing: Keep the activations of one decoder layer at a time, see ``checkpointed``.
        sequential: Prune decoder layers one after the other while scoring: a share of each row or a pattern, see
            ``Sparsity``.
    """

    signed: bool = False
    squares: bool = False
    groups: int = 0
    nonfinite: Literal["error", "zero"] = "error"
    seed: int = 0
    sums_on_host: bool = False
    gradient_checkpointing: bool = False
    sequential: str | None = None


@dataclass(frozen=True)
class Layer:
    """A layer that is scored."""

    group: Group
    module: nn.Module
    sums: Sums
    """Updated in place."""


@dataclass(frozen=True)
class BatchFigures:
    """The figures of each sample of a batch that a method gives besides the scores."""

    relevance: Tensor
    """Sum of the sample's scores over the components of all layers, ``[B]`` float64."""
    first_token_share: Tensor | None
    """Share of the first position in the sum over tokens, units and layers of |z * dz|, ``[B]`` float64; None where
    the only layer, the output head, sees one position, or nothing is differentiated."""
    target: dict[str, Tensor]
    """What the target records, ``[B]`` by name."""

    def rows(self) -> list[dict[str, float]]:
        """A dictionary for each sample."""
        own = {"relevance": self.relevance, "first_token_share": self.first_token_share}
        columns = {name: values.tolist() for name, values in (own | self.target).items() if values is not None}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


class Method(ABC):
    """A way to score components."""

    needs_samples: bool = True
    """Whether scores depend on samples."""
    needs_weights: bool = False
    """Whether ``scores`` reads the weights: ``merge`` must then load the model."""
    needs_target: bool = False
    """Whether a target is differentiated."""
    needs_values: bool = False
    """Whether components are scored by their values alone, so that each must be read by one layer (``Group.site``)."""
    needs_all_samples: bool = False
    """Whether sums are complete only when one run has seen all samples: there are no parts, and nothing to take up."""
    needs: ClassVar[tuple[str, ...]] = ()
    """The fields of a batch that the method cannot do without."""
    reads_experts: ClassVar[bool] = False
    """Whether layers that only some tokens reach (``Group.routed``) can be scored."""
    gives_derivatives: ClassVar[bool] = False
    """Whether signed scores, read where the components' values are read, are derivatives by the components' gains."""
    lists_families: ClassVar[bool] = False
    """Whether it scores only model families that it lists, but for one that its argument ``unlisted`` lets it try."""

    def heeds(self, component: Component) -> frozenset[str]:
        """The options that change what the method does for this kind of component; any other is refused."""
        return frozenset()

    def at_values(self, target: Target, options: Options) -> bool:
        """Whether components are scored where their values are read (``Group.site``), if there is such a place."""
        return False

    def check_use(self, component: Component, target: Target) -> None:
        """Refuses a component or a target that the method cannot do, before a model is loaded.

        Raises:
            InputError: saying which, and what to do.
        """
        if self.needs_values and component.dims == 2:
            raise InputError(
                f"model.granularity: a single one of the {component.unit} has no value of its own, so method "
                f"{METHODS.name_of(self)} cannot score it; score neuron, head, channel or mlp"
            )

    def check_samples(self, numbers: Sequence[Mapping[str, float]]) -> None:
        """Refuses samples that the method cannot score, before a model is loaded.

        Args:
            numbers: For each sample, the numbers that came with it, such as its ``label``.

        Raises:
            InputError: saying which are missing.
        """
        return None

    def prepare(self, model: nn.Module) -> None:
        """Looks at a model whose weights are whole; afterwards they may be shared out over processes."""
        return None

    def check(self, model: nn.Module, sample: Sequence[int]) -> Record | None:
        """Checks the method on one short sample before any batch; every rank must call it.

        Args:
            model: A causal language model in eval mode, its weights whole.
            sample: Token ids.

        Returns:
            What the manifest keeps as ``relevance_account``; None for a method without such a check.

        Raises:
            InputError: if the method is not right on this model.
        """
        return None

    def sums(self, group: Group, weight_OI: Tensor, options: Options) -> Sums:
        """The tensors that are summed for a layer: zeros, on the weight's device."""
        return {}

    def take_in(
        self, model: nn.Module, batch: ReferenceBatch, layers: Mapping[str, Layer], target: Target, options: Options
    ) -> BatchFigures | None:
        """Runs the passes that a batch needs, and adds to the layers' sums in place.

        Trailing all-padding rows are dummies: they run but are excluded from the sums. With them a rank that has no
        sample left takes part in the passes of a sharded model.

        Raises:
            InputError: if a layer's sums are not finite, or a layer takes no part in the model's forward pass.
        """
        return None

    def finish(self, model: nn.Module, layers: Mapping[str, Layer], options: Options) -> None:
        """Completes the layers' sums after the last batch, before those of the ranks are added up.

        Every rank calls it, also one that had no batch.
        """
        return None

    @abstractmethod
    def scores(self, sums: Sums, group: Group, num_samples: int, weight_OI: Tensor | None, options: Options) -> Tensor:
        """The layer's scores, of ``group.shape``, float32.

        Args:
            sums: The layer's sums, over all samples.
            group: The layer's components.
            num_samples: Samples in the sums.
            weight_OI: The layer's weights, if ``needs_weights``.
            options: The options that the sums were made with.
        """


class Gradient(Method):
    """Mean over samples of |W * G|, summed over each component; G is the gradient of one sample's target.

    A subclass that takes more than one backward pass overrides ``passes``; one that sums other things overrides
    ``sums``, ``add`` and ``scores``. If its scores are derivatives even so, it says so (``gives_derivatives``).
    """

    needs_target = True
    reads_experts = True
    gives_derivatives = True

    def __init_subclass__(cls, **more: object) -> None:
        super().__init_subclass__(**more)
        others = {"passes", "sums", "take_in", "add", "sample_scores", "scores"}
        if "gives_derivatives" not in vars(cls) and not others.isdisjoint(vars(cls)):
            cls.gives_derivatives = False  # what it scores instead may be anything

    def heeds(self, component: Component) -> frozenset[str]:
        kinds = ("sums_on_host",) if component.dims == 2 else ("signed", "squares", "groups")
        return frozenset(("nonfinite", "gradient_checkpointing", *kinds))

    def at_values(self, target: Target, options: Options) -> bool:
        return options.signed and target.at_values

    def rules(self, model: nn.Module) -> AbstractContextManager[object]:
        """The block in which a batch's backward passes run; for the plain gradient it does nothing."""
        return nullcontext()

    def sums(self, group: Group, weight_OI: Tensor, options: Options) -> Sums:
        device = weight_OI.device
        sums = no_counts(device) | _no_tokens(group, device)
        if group.axis == "both":
            sums["sum"] = (
                torch.zeros_like(weight_OI, dtype=torch.float32)
                if is_sharded(weight_OI)
                else (torch.zeros(weight_OI.shape, device="cpu" if options.sums_on_host else device))
            )
            return sums
        return sums | no_sample_scores(group, device, options.squares, options.groups)

    def take_in(
        self, model: nn.Module, batch: ReferenceBatch, layers: Mapping[str, Layer], target: Target, options: Options
    ) -> BatchFigures:
        num_samples = int(batch.attention_mask.any(1).sum())
        samples = batch.input_ids[:num_samples], batch.attention_mask[:num_samples]
        groups_B = group_of(*samples, options.groups) if options.groups else None
        relevance: dict[str, Tensor] = {}
        by_token: dict[str, Tensor] = {}
        sites = {name: layer.group for name, layer in layers.items()}
        if self.at_values(target, options):
            sites = {name: group.site or group for name, group in sites.items()}

        def take(layer: LayerPass) -> None:
            require_once(layer.name, relevance)
            name, layer = layer.name, layer.first(num_samples)
            relevance[name] = self.add(layers[name].sums, sites[name], layer, groups_B, options)
            by_token[name] = token_relevance(layer, sites[name])
            if layer.places is not None:
                by_token[name] = layer.places.at_tokens(by_token[name])
                layers[name].sums["tokens"] += layer.places.count(samples[1])

        checkpointing = checkpointed(model) if options.gradient_checkpointing else nullcontext()
        with torch.enable_grad(), self.rules(model), checkpointing:
            attributed = self.passes(model, batch, target, sites, take)
        for name in _unreached(layers, relevance):
            relevance[name] = torch.zeros(num_samples, dtype=torch.float64, device=batch.input_ids.device)
        require_all(layers, relevance)
        require_finite(relevance)
        return BatchFigures(
            relevance=sum_of_layers(relevance),
            first_token_share=_first_token_share(by_token, samples[1]),
            target={name: values[:num_samples] for name, values in attributed.records.items()},
        )

    def passes(
        self,
        model: nn.Module,
        batch: ReferenceBatch,
        target: Target,
        sites: Mapping[str, Group],
        take: Callable[[LayerPass], None],
    ) -> Attributed:
        """Runs the batch forward and backward, and shows every layer's pass to ``take``, each layer once.

        Args:
            model: A causal language model in eval mode.
            batch: The samples.
            target: The target to differentiate.
            sites: Where components are read, by the key of their scores: rows or columns of the scored layer itself, or
                of the layer that reads the components' values.
            take: Receives the passes, each named by its key.
        """
        modules = {name: model.get_submodule(group.layer) for name, group in sites.items()}
        columns = [name for name, group in sites.items() if group.axis == "in"]
        with recording(modules, tuple(batch.input_ids.shape), take, with_dx=columns):
            attributed = attribute(model, target, batch)
            if attributed.value_B.requires_grad:  # else no token reaches the experts that are scored
                attributed.value_B.sum().backward()
        return attributed

    def add(self, sums: Sums, group: Group, layer: LayerPass, groups_B: Tensor | None, options: Options) -> Tensor:
        """Adds a layer's pass to its sums; returns the sum of each sample's scores, ``[B]`` float64.

        Args:
            sums: The layer's sums; updated in place.
            group: The components, as rows or columns of the layer that ``layer`` is a pass of.
            layer: The pass.
            groups_B: The group of each sample (``group_of``), if sums of groups are kept.
            options: The options of the run.
        """
        counts = sums if options.nonfinite == "zero" else None
        if group.axis == "both":
            return add_weight_scores(sums["sum"], layer, counts)
        return add_sample_scores(sums, self.sample_scores(layer, group, options, counts), group, groups_B)

    def sample_scores(self, layer: LayerPass, group: Group, options: Options, counts: Counts | None) -> Tensor:
        """Each sample's scores of whole components, ``[B, n]`` float64; the arguments are those of ``add``."""
        return component_scores(layer, group, signed=options.signed, counts=counts)

    def scores(self, sums: Sums, group: Group, num_samples: int, weight_OI: Tensor | None, options: Options) -> Tensor:
        return (sums["sum"] / num_samples).float()


class Lrp(Gradient):
    """AttnLRP: ``Gradient`` with its backward passes under the rules of ``attn_lrp``.

    Args:
        rules: ``attn`` for AttnLRP, ``cp`` for its conservative variant.
        unlisted: Try a model family that was never checked; run ``doctor`` before you trust the scores.
        softmax_temperature: Temperature at which attention's softmax passes relevance on to query and key; 1: its own.
            GIM (arXiv 2505.17630) uses 2. Only with ``attn``.
    """

    lists_families = True

    def __init__(self, rules: RuleSet = "attn", unlisted: bool = False, softmax_temperature: float = 1.0) -> None:
        if rules not in get_args(RuleSet):
            raise InputError(
                f"method {METHODS.name_of(self)}: rules={rules!r} is unknown; give {' or '.join(get_args(RuleSet))}"
            )
        self._unlisted = unlisted
        self._rules = PreparedRules(rules=rules, unlisted=unlisted, softmax_temperature=softmax_temperature)

    def rules(self, model: nn.Module) -> AbstractContextManager[object]:
        return self._rules(model)

    def prepare(self, model: nn.Module) -> None:
        with self._rules(model):
            pass

    def check(self, model: nn.Module, sample: Sequence[int]) -> Record | None:
        from sparc3_pl.attribution.precheck import checked_rules

        return checked_rules(model, sample, unlisted=self._unlisted)


class Wanda(Method):
    r"""S_ij = |W_ij| * ||x_j||_2, the norm over all real tokens of all samples (Sun et al., ICLR 2024, Eq. 1).

    Memory: one float64 vector ``[I]`` for each layer, whatever the number of tokens. With ``Options.sequential``, which
    is how its authors prune, also the hidden states of all samples before one decoder layer (``sequential.py``).
    """

    needs_weights = True
    reads_experts = True

    def __init__(self) -> None:
        self._blocks: Blocks | None = None
        """The batches so far, if decoder layers are pruned one after the other."""

    def heeds(self, component: Component) -> frozenset[str]:
        return frozenset(("nonfinite", "sequential") if component.dims == 2 else ("nonfinite",))

    def sums(self, group: Group, weight_OI: Tensor, options: Options) -> Sums:
        norms = torch.zeros(weight_OI.shape[1], dtype=torch.float64, device=weight_OI.device)
        return {**no_counts(weight_OI.device), **_no_tokens(group, weight_OI.device), "sum": norms}

    @torch.no_grad()
    def take_in(
        self, model: nn.Module, batch: ReferenceBatch, layers: Mapping[str, Layer], target: Target, options: Options
    ) -> None:
        if options.sequential is not None:
            self._blocks_of(model, layers, options).hold(batch)
            return
        squares = _InputSquares(batch.attention_mask.bool(), options.nonfinite == "zero")
        energy: dict[str, Tensor] = {}

        def add(name: str, x: Tensor) -> None:
            sums = layers[name].sums
            squares_I, counts = squares.of(x)
            sums["sum"] += squares_I
            for kind, count in counts.items():
                sums[kind] += count
            energy[name] = squares_I.sum()

        def count(name: str, places: Places) -> None:
            layers[name].sums["tokens"] += places.count(batch.attention_mask)

        inputs_shown(model, batch, {name: layer.module for name, layer in layers.items()}, add, count)
        for name in _unreached(layers, energy):
            energy[name] = layers[name].sums["sum"].new_zeros(())
        require_all(layers, energy)
        require_finite(energy)

    def _blocks_of(self, model: nn.Module, layers: Mapping[str, Layer], options: Options) -> Blocks:
        if self._blocks is None:
            modules = {name: layer.module for name, layer in layers.items()}
            self._blocks = Blocks(model, modules, Sparsity.of(options.sequential))
        return self._blocks

    @torch.no_grad()
    def finish(self, model: nn.Module, layers: Mapping[str, Layer], options: Options) -> None:
        if options.sequential is None:
            return
        blocks, self._blocks = self._blocks_of(model, layers, options), None
        squares = [_InputSquares(batch.attention_mask.bool(), options.nonfinite == "zero") for batch in blocks.batches]
        totals: dict[str, Tensor] = {}

        def take(batch: int, name: str, x: Tensor) -> None:
            squares_I, counts = squares[batch].of(x)
            layers[name].sums["sum"] += squares_I
            for kind, count in counts.items():
                layers[name].sums[kind] += count
            totals[name] = layers[name].sums["sum"].sum()

        def scores_of(name: str) -> Tensor:
            if blocks.batches:
                require_all({name: layers[name]}, totals)
                require_finite({name: totals[name]})
            sums, group = layers[name].sums, layers[name].group
            for tensor in sums.values():
                sum_over_ranks(tensor)
            scores_OI = self.scores(sums, group, 1, weight_matrix(layers[name].module).detach(), options)
            if not is_rank_zero():  # the sums of all ranks are going to be added up
                for tensor in sums.values():
                    tensor.zero_()
            return scores_OI

        blocks.run(take, scores_of)

    def scores(self, sums: Sums, group: Group, num_samples: int, weight_OI: Tensor | None, options: Options) -> Tensor:
        return group.reduced(weight_OI.float().abs() * sums["sum"].sqrt().float()).float()


class _InputSquares:
    """Squares of a batch's inputs summed over its real tokens; layers that read the same tensor share one sum."""

    def __init__(self, mask_BT: Tensor, zero_nonfinite: bool) -> None:
        self._mask_BT, self._zero_nonfinite = mask_BT, zero_nonfinite
        self._padded = not bool(mask_BT.all())
        self._last: tuple[Tensor, Tensor, Sums] | None = None

    def of(self, x: Tensor) -> tuple[Tensor, Sums]:
        """The sum, ``[I]`` float64, and, where they count as 0, the numbers of NaN and infinite inputs."""
        if self._last is None or self._last[0] is not x:
            tokens_NI = x.reshape(*self._mask_BT.shape, -1)
            tokens_NI = tokens_NI[self._mask_BT.to(x.device)] if self._padded else tokens_NI.flatten(0, 1)
            counts: Sums = {}
            if self._zero_nonfinite:
                counts = no_counts(x.device)
                tokens_NI = drop_nonfinite(tokens_NI.clone(), counts)
            self._last = x, tokens_NI.float().square().sum(0).double(), counts
        return self._last[1:]


class Magnitude(Method):
    """S = |W|."""

    needs_samples = False
    needs_weights = True
    reads_experts = True

    def scores(self, sums: Sums, group: Group, num_samples: int, weight_OI: Tensor | None, options: Options) -> Tensor:
        return group.reduced(weight_OI.float().abs()).float()


class Random(Method):
    """Uniform numbers in [0, 1), a function of the seed and the layer's name alone."""

    needs_samples = False
    reads_experts = True

    def heeds(self, component: Component) -> frozenset[str]:
        return frozenset(("seed",))

    def scores(self, sums: Sums, group: Group, num_samples: int, weight_OI: Tensor | None, options: Options) -> Tensor:
        digest = hashlib.sha256(f"{options.seed}:{group.layer}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
        return torch.rand(group.shape, generator=generator)


METHODS: Registry[Method] = Registry(
    "model.method",
    Method,
    {kind.__name__.lower(): f"{__name__}.{kind.__name__}" for kind in (Lrp, Gradient, Wanda, Magnitude, Random)}
    | {
        "activation": "sparc3_pl.attribution.methods_activation.Activation",
        "expertise": "sparc3_pl.attribution.methods_expertise.Expertise",
        "attribution_patching": "sparc3_pl.attribution.methods_patching.AttributionPatching",
        "relevance_patching": "sparc3_pl.attribution.methods_patching.RelevancePatching",
        "integrated_gradients": "sparc3_pl.attribution.methods_patching.IntegratedGradients",
    },
)


def group_of(input_ids_BT: Tensor, attention_mask_BT: Tensor, num_groups: int) -> Tensor:
    """The group of each sample, ``[B]`` int64, by its tokens alone: it does not depend on how the work is split."""
    rows = [ids[mask.bool()].tolist() for ids, mask in zip(input_ids_BT, attention_mask_BT, strict=True)]
    digests = [hashlib.sha256(" ".join(map(str, row)).encode()).digest() for row in rows]
    return torch.tensor([int.from_bytes(digest[:8], "big") % num_groups for digest in digests], dtype=torch.int64)


def _no_tokens(group: Group, device: torch.device) -> Sums:
    return {"tokens": torch.zeros((), dtype=torch.int64, device=device)} if group.routed else {}


def _unreached(layers: Mapping[str, Layer], seen: Mapping[str, object]) -> list[str]:
    """The experts' layers that no token of a batch reached; the batch leaves their sums as they are."""
    return [name for name, layer in layers.items() if layer.group.routed and name not in seen]


def _first_token_share(by_token: Mapping[str, Tensor], attention_mask_BT: Tensor) -> Tensor | None:
    """The first position's share of all positions, ``[B]``. The output head, which sees one position, is left out."""
    every = {name: value for name, value in by_token.items() if value.shape == attention_mask_BT.shape}
    if not every:
        return None
    total_BT = sum_of_layers(every)
    first_B1 = attention_mask_BT.argmax(1, keepdim=True).to(total_BT.device)
    return total_BT.gather(1, first_B1)[:, 0] / total_BT.sum(1)
