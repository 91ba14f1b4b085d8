"""The arms of a run: each ranks the same components by its own scores, and is measured in the same way."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from sparc3_pl.attribution.methods import METHODS, Sums
from sparc3_pl.attribution.scorers import LayerScores, Scorer, layer_scores
from sparc3_pl.circuit.components import Candidates
from sparc3_pl.circuit.curves import num_kept
from sparc3_pl.data.batches import ReferenceBatch
from sparc3_pl.errors import InputError
from sparc3_pl.io.formats import Record
from sparc3_pl.model.components import COMPONENTS
from sparc3_pl.model.placement import matrix_of
from sparc3_pl.registry import Spec
from sparc3_pl.scores.manifest import ScoredSample
from sparc3_pl.scoring.score_run import ScoreRequest, ScoreRun

__all__ = [
    "Arm",
    "ArmScores",
    "Unit",
    "agreement",
    "arms_of",
    "kept_of",
    "order_of",
    "resampled_overlaps",
    "score_arm",
]


@dataclass(frozen=True)
class Arm:
    """A method that ranks components.

    Attributes:
        name: Name of the arm, in results and as part of folders' names.
        requests: The scoring request; for random scores, one for each draw.
    """

    name: str
    requests: tuple[ScoreRequest, ...]

    @property
    def request(self) -> ScoreRequest:
        """The first request; the others differ from it by their seed alone."""
        return self.requests[0]

    @property
    def is_random(self) -> bool:
        """Whether the scores are drawn, not measured."""
        return len(self.requests) > 1


@dataclass(frozen=True)
class Unit:
    """A part of the discovery samples, whose sums add to those of the others.

    Attributes:
        sums: The sums of each scored layer.
        num_samples: Samples in them.
        group: Number of the set of discovery samples that it is part of.
    """

    sums: Mapping[str, Sums]
    num_samples: int
    group: int


def arms_of(
    methods: Sequence[Spec],
    granularity: Spec | Sequence[Spec],
    target: Spec,
    layers: list[str] | None,
    signed: bool,
    draws: int,
    seed: int,
    nonfinite: str = "error",
) -> list[Arm]:
    """The arms that the settings name; options that a method ignores are left out of its request.

    Raises:
        InputError: if a method is unknown or named twice, cannot score one of the kinds, or needs (as may the target)
            what pairs do not have.
    """
    if not methods:
        raise InputError("model.methods is an empty list; name how components are scored, such as lrp")
    arms: dict[str, Arm] = {}
    granularity = [granularity] if isinstance(granularity, str | dict) else list(granularity)
    if not granularity:
        raise InputError("model.granularity is an empty list; name what circuits consist of, such as neuron")
    kinds = [COMPONENTS.choose(kind).object for kind in granularity]
    for spec in methods:
        method = METHODS.choose(spec)
        heeded = frozenset.intersection(*(method.object.heeds(kind) for kind in kinds))
        options = {
            name: value for name, value in (("signed", signed), ("nonfinite", nonfinite)) if name in heeded and value
        }
        seeds = range(seed, seed + draws) if "seed" in heeded else [None]
        requests = tuple(
            ScoreRequest.of(
                spec,
                granularity,
                target if method.object.needs_target else "predicted",
                layers,
                **options | ({} if one is None else {"seed": one}),
            )
            for one in seeds
        )
        _require_pair_fields(requests[0])
        name = method.name.rpartition(".")[2]
        if method.arguments:
            name += "-" + "-".join(f"{key}-{value}" for key, value in method.arguments.items())
        name = "".join(c if c.isalnum() or c in "-_." else "-" for c in name)
        if name in arms:
            raise InputError(f"model.methods: {name} is named twice; leave one of them out")
        arms[name] = Arm(name, requests)
    return list(arms.values())


_PAIR_FIELDS = ("answer", "foil", "counterfactual_ids")
"""The fields of a batch that pairs may have."""


def _require_pair_fields(request: ScoreRequest) -> None:
    for key, choice in (("methods", request.method), ("target", request.target)):
        for field in choice.object.needs:
            if field not in _PAIR_FIELDS:
                raise InputError(
                    f"model.{key}: {choice.name} needs samples with {field}, and the pairs of a circuit have none; "
                    f"leave {choice.name} out"
                )


@dataclass
class ArmScores:
    """The sums of one arm's request, by unit, and the scores made of them.

    Attributes:
        scorer: Holds method, layers and model; its own sums are empty.
        units: The units, in the order of the samples; none for a method without samples.
        samples: The scored samples of each set of discovery samples.
        account: Result of the method's check of itself on one sample.
    """

    scorer: Scorer
    units: list[Unit]
    samples: dict[int, list[ScoredSample]]
    account: Record | None = None

    @property
    def across_kinds(self) -> str:
        """How components of unlike kinds compete: by ``value``, by ``share`` or by ``row`` (see ``values``)."""
        method = self.scorer.method
        if any(layer.group.axis == "both" for layer in self.scorer.layers.values()):
            return "row" if method.needs_samples and not method.needs_target else "value"
        return "value" if self.scorer.options.signed and method.needs_target else "share"

    def of(self, times: Mapping[int, int] | None = None, group: int | None = None) -> dict[str, LayerScores]:
        """The scores of each layer, from some of the units.

        Args:
            times: How often each unit counts, by place; None: once.
            group: Only units of that set of discovery samples.
        """
        method, options = self.scorer.method, self.scorer.options
        chosen = [
            (unit, 1 if times is None else times.get(place, 0))
            for place, unit in enumerate(self.units)
            if group in (None, unit.group)
        ]
        number = sum(unit.num_samples * count for unit, count in chosen)
        scores = {}
        for name, layer in self.scorer.layers.items():
            sums = {key: torch.zeros_like(tensor) for key, tensor in layer.sums.items()}
            for unit, count in chosen:
                for key, tensor in unit.sums[name].items() if count else ():
                    sums[key] += count * tensor
            weight = matrix_of(layer.module) if method.needs_weights else None
            scores[name] = layer_scores(method, layer.group, sums, number, weight, options)
        return scores

    def values(
        self, candidates: Candidates, times: Mapping[int, int] | None = None, group: int | None = None
    ) -> Tensor:
        """The values that rank all N candidates, ``[N]`` float32; arguments as in ``of``.

        Scores of unlike kinds are compared as they are where they are shares of one target (signed scores of a method
        that attributes one). Otherwise their scales differ by kind: each kind is ranked by itself, and the value is
        the share of its kind that a component is at least as strong as. Single weights by Wanda's scores are compared
        within their row, as its authors do (Sun et al., ICLR 2024): the value is the share of the row.

        Raises:
            InputError: if a score is not finite.
        """
        scores = {name: layer.scores for name, layer in self.of(times, group).items()}
        values = candidates.flat(scores)
        if not values.isfinite().all():
            layer = next(name for name, one in scores.items() if not one.isfinite().all())
            raise InputError(f"layer {layer} has scores that are not finite; score in float32 (model.dtype)")
        if self.across_kinds == "row":
            for span in candidates.spans:
                rows_OI = values[span.own].view(span.group.shape)
                places_OI = rows_OI.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
                values[span.own] = (1 - places_OI / rows_OI.shape[1]).flatten()
            return values
        if len(candidates.kinds) == 1 or self.across_kinds == "value":
            return values
        for kind in candidates.kinds:
            own = torch.cat([torch.arange(s.own.start, s.own.stop) for s in candidates.spans if s.kind == kind])
            places = torch.empty(len(own))
            places[order_of(values[own])] = torch.arange(len(own), dtype=torch.float32)
            values[own] = 1 - places / len(own)
        return values


def score_arm(
    request: ScoreRequest,
    model: nn.Module,
    sets: Sequence[Sequence[ReferenceBatch]],
    progress: Callable[[int], None] = lambda done: None,
) -> ArmScores:
    """Scores sets of discovery samples; each batch is a unit. The sums of single weights are kept whole, and so are
    those of a method that compares all samples with each other: each set is a unit.

    Raises:
        InputError: as ``Scorer`` and its ``update``.
    """
    scorer = request.scorer(model)
    if not scorer.method.needs_samples:
        return ArmScores(scorer, [], {})
    first = sets[0][0]
    sample = first.input_ids[0][first.attention_mask[0].bool()].tolist()
    account = scorer.method.check(model, sample)
    scorer.target.check(model, sample)
    run = ScoreRun(scorer, None, None)
    in_parts = not (scorer.method.needs_all_samples or any(c.object.dims == 2 for c in request.components))
    units: list[Unit] = []
    samples: dict[int, list[ScoredSample]] = {}
    for number, batches in enumerate(sets):
        before = len(run.samples)
        for place, batch in enumerate(batches):
            run.add(batch)
            progress(len(batch.ids))
            if in_parts or place == len(batches) - 1:
                scorer.finish()
                own = {name: {k: tensor.clone() for k, tensor in sums.items()} for name, sums in scorer.sums.items()}
                num_new = len(run.samples) - before - sum(unit.num_samples for unit in units if unit.group == number)
                units.append(Unit(own, num_new, number))
                for sums in scorer.sums.values():
                    for tensor in sums.values():
                        tensor.zero_()
        samples[number] = run.samples[before:]
    return ArmScores(scorer, units, samples, account)


def order_of(values_N: Tensor) -> Tensor:
    """The candidates from the highest value down, ``[N]`` int64; equal values in the order of the model."""
    return values_N.argsort(descending=True, stable=True)


def kept_of(order_N: Tensor, number: int) -> Tensor:
    """The first ``number`` of an order, as a mask ``[N]`` bool."""
    kept_N = torch.zeros(len(order_N), dtype=torch.bool)
    kept_N[order_N[:number]] = True
    return kept_N


def agreement(one_N: Tensor, other_N: Tensor, number: int) -> float:
    """The Jaccard index of the first ``number`` of two orders; NaN for none."""
    one, other = kept_of(one_N, number), kept_of(other_N, number)
    union = int((one | other).sum())
    return int((one & other).sum()) / union if union else math.nan


def resampled_overlaps(
    scores: ArmScores, candidates: Candidates, fractions: Sequence[float], times: int = 20, seed: int = 0
) -> list[list[float]]:
    """The Jaccard indices, for each fraction, of the circuit with those that resampled discovery samples would give.

    Units are drawn with replacement, as many as there are; each draw gives one index. Empty for fewer than two units.
    """
    number = len(scores.units)
    if number < 2:
        return []
    whole = order_of(scores.values(candidates))
    rng = np.random.default_rng(seed)
    sizes = [num_kept(fraction, candidates.count) for fraction in fractions]
    by_size: list[list[float]] = [[] for _ in sizes]
    for _ in range(times):  # one order at a time: of single weights it is twice as large as their scores
        counts = np.bincount(rng.integers(number, size=number), minlength=number)
        order = order_of(scores.values(candidates, dict(enumerate(counts.tolist()))))
        for own, size in zip(by_size, sizes, strict=True):
            own.append(agreement(whole, order, size))
    return by_size
