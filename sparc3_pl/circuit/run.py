"""A circuit run on a loaded model: arms are scored on discovery pairs, and their circuits measured on test pairs.

Plain Python, no Trainer: one process, one device (or several by ``device_map``). Processes that share a model out all
do the same.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from sparc3_pl.circuit.ablation import Ablation, Replacement, allows_compact
from sparc3_pl.circuit.arms import Arm, ArmScores, agreement, kept_of, order_of, resampled_overlaps, score_arm
from sparc3_pl.circuit.components import Candidates
from sparc3_pl.circuit.curves import (
    Ends,
    areas,
    curve,
    mean_areas,
    mean_curve,
    num_kept,
    smallest_faithful,
)
from sparc3_pl.circuit.measure import Predictions, measure
from sparc3_pl.circuit.results import ArmResult, Overlap, Smallest, Stability
from sparc3_pl.data.batches import ReferenceBatch
from sparc3_pl.scoring.score_run import ScoreRequest
from sparc3_pl.selection.intersections import expected_common, matched_draws, permutation_p, strata_by_rank

__all__ = ["Bench", "Measured", "measure_arm", "overlaps_of_arms"]

log = logging.getLogger(__name__)

Progress = Callable[[int], None]

STRATUM = 20
"""Components that count as equally strong, as in ``overlap``."""


@dataclass(frozen=True)
class Cutoff:
    """The first ``number`` of an order, or all but them."""

    order_N: Tensor
    number: int
    is_removed: bool = False

    @property
    def kept_N(self) -> Tensor:
        """Whether each component stays, ``[N]`` bool."""
        first = kept_of(self.order_N, self.number)
        return ~first if self.is_removed else first

    @property
    def num_kept(self) -> int:
        """How many components stay."""
        return len(self.order_N) - self.number if self.is_removed else self.number


@dataclass
class Bench:
    """The test that every circuit of a run takes.

    Attributes:
        model: A causal language model in eval mode.
        candidates: The components that circuits are chosen from.
        tests: The test pairs.
        replacement: What is read in place of ablated components.
        fractions: Sizes of the circuits.
        seed: Seed of all resampling.
        progress: Told the number of pairs after each pass over the model as it is and empty.
        ends: The model as it is, and with every component ablated.
        compact: Whether neurons that are read as 0 need not be made.
    """

    model: nn.Module
    candidates: Candidates
    tests: Sequence[ReferenceBatch]
    replacement: Replacement
    fractions: Sequence[float]
    seed: int = 0
    progress: Progress = lambda done: None
    ends: Ends = field(init=False)
    compact: bool = field(init=False)

    def __post_init__(self) -> None:
        is_zero = not self.replacement(self.tests[0])
        self.compact = is_zero and allows_compact(self.model, self.candidates, self.tests[0])
        every_N = torch.ones(self.candidates.count, dtype=torch.bool)
        kept = {"full": every_N, "empty": ~every_N}
        both = self._measure(kept, self.progress)
        self.ends = Ends(both["full"], both["empty"], self.seed)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        candidates: Candidates,
        ablation: Ablation,
        sets: Sequence[Sequence[ReferenceBatch]],
        tests: Sequence[ReferenceBatch],
        fractions: Sequence[float],
        seed: int = 0,
        progress: Progress = lambda done: None,
    ) -> Bench:
        """The bench for a kind of ablation; ``sets`` are the discovery pairs, of which it may take means."""
        discovery = [batch for batches in sets for batch in batches]
        replacement = ablation.replacement(model, list(candidates.readers), discovery)
        return cls(model, candidates, tests, replacement, fractions, seed, progress)

    def _measure(self, kept: Mapping[str, Tensor], progress: Progress) -> dict[str, Predictions]:
        return measure(self.model, self.candidates, self.tests, kept, self.replacement, progress, self.compact)

    @property
    def sizes(self) -> list[int]:
        """The number of components that each fraction is."""
        return [num_kept(fraction, self.candidates.count) for fraction in self.fractions]

    def predictions(self, cutoffs: Mapping[str, Cutoff], progress: Progress) -> dict[str, Predictions]:
        """The predictions at every cutoff; equal ones, and those that keep all or nothing, are measured once."""
        predictions: dict[str, Predictions] = {}
        same: dict[bytes, list[str]] = {}
        for name, cutoff in cutoffs.items():
            if cutoff.num_kept in (0, self.candidates.count):
                predictions[name] = self.ends.full if cutoff.num_kept else self.ends.empty
            elif self.candidates.are_weights:  # masks of millions: one at a time
                predictions |= self._measure({name: cutoff.kept_N}, progress)
            else:
                same.setdefault(np.packbits(cutoff.kept_N.numpy()).tobytes(), []).append(name)
        kept = {names[0]: cutoffs[names[0]].kept_N for names in same.values()}
        if kept:
            once = self._measure(kept, progress)
            predictions |= {name: once[names[0]] for names in same.values() for name in names}
        return predictions


@dataclass(frozen=True)
class Measured:
    """An arm that was measured.

    Attributes:
        result: The arm's figures.
        scores: The scores of each draw, or the only ones.
        order_N: The ranking by score, of the first draw.
        values_N: The values that it ranks by.
    """

    result: ArmResult
    scores: list[ArmScores]
    order_N: Tensor
    values_N: Tensor


def measure_arm(
    arm: Arm,
    bench: Bench,
    sets: Sequence[Sequence[ReferenceBatch]],
    resamples: int = 20,
    progress: Progress = lambda done: None,
) -> Measured:
    """Scores an arm's components, and measures its circuits.

    Args:
        arm: The arm.
        bench: The test that its circuits take.
        sets: Sets of discovery pairs, in batches.
        resamples: Bootstrap resamples of the discovery pairs behind the stability.
        progress: Told the number of pairs after each pass.

    Raises:
        InputError: if scores or logits are not finite.
    """
    start = time.perf_counter()
    scores = [score_arm(request, bench.model, sets, progress) for request in arm.requests]
    values = [
        torch.stack([one.values(bench.candidates, group=number) for number in range(len(sets))]).mean(0)
        if one.units and len(sets) > 1  # as prune averages seeds
        else one.values(bench.candidates)
        for one in scores
    ]
    orders = [order_of(one) for one in values]
    middle = time.perf_counter()
    is_signed = any(bool((one < 0).any()) for one in values)
    cutoffs: dict[str, Cutoff] = {}
    for draw, order in enumerate(orders):
        for place, size in enumerate(bench.sizes):
            cutoffs[f"curve {draw} {place}"] = Cutoff(order, size)
            cutoffs[f"necessity {draw} {place}"] = Cutoff(order, size, is_removed=True)
    for draw, one in enumerate(values if is_signed else ()):
        by_size = order_of(one.abs())
        cutoffs |= {f"absolute {draw} {place}": Cutoff(by_size, size) for place, size in enumerate(bench.sizes)}
    predictions = bench.predictions(cutoffs, progress)

    def predictions_of(kind: str) -> list[list[Predictions]]:
        places = range(len(bench.sizes))
        return [[predictions[f"{kind} {draw} {place}"] for place in places] for draw in range(len(orders))]

    def points(kind: str):
        kept = [cutoffs[f"{kind} 0 {place}"].num_kept for place in range(len(bench.sizes))]
        if len(orders) > 1:
            return mean_curve(bench.fractions, kept, predictions_of(kind), bench.ends)
        return curve(bench.fractions, kept, predictions_of(kind)[0], bench.ends)

    def area(kind: str, name: str) -> dict[str, float | None]:
        own = predictions_of(kind)
        every = mean_areas if len(own) > 1 else areas
        area_of_curve = every(bench.fractions, own if len(own) > 1 else own[0], bench.ends)[name]
        return {name: area_of_curve.value, f"{name}_low": area_of_curve.low, f"{name}_high": area_of_curve.high}

    sufficiency = points("curve")
    smallest = smallest_faithful(sufficiency)
    result = ArmResult(
        method=arm.request.method.name,
        method_args=arm.request.method.arguments,
        signed=is_signed,
        draws=len(orders) if len(orders) > 1 else None,
        across_kinds=scores[0].across_kinds,
        curve=sufficiency,
        curve_absolute=points("absolute") if is_signed else None,
        necessity=points("necessity"),
        **area("curve", "cpr"),
        **area("absolute" if is_signed else "curve", "cmd"),
        smallest=smallest and Smallest(smallest.fraction, smallest.kept, smallest.faithfulness),
        stability=_stability(scores[0], bench, len(sets), resamples) if len(orders) == 1 else [],
    )
    log.info(
        "%s: scored in %.1f s, %d circuits measured in %.1f s",
        arm.name, middle - start, len(cutoffs), time.perf_counter() - middle,
    )  # fmt: skip
    return Measured(result, scores, orders[0], values[0])


def _stability(scores: ArmScores, bench: Bench, num_sets: int, resamples: int) -> list[Stability]:
    candidates = bench.candidates
    jaccards = resampled_overlaps(scores, candidates, bench.fractions, resamples, bench.seed) if resamples else []
    orders = []
    if num_sets > 1 and scores.units:
        orders = [order_of(scores.values(candidates, group=number)) for number in range(num_sets)]
    rows = []
    for place, (fraction, size) in enumerate(zip(bench.fractions, bench.sizes, strict=True)):
        own = jaccards[place] if jaccards else []
        between = [agreement(one, other, size) for one, other in itertools.combinations(orders, 2)]
        low, high = np.quantile(own, (0.025, 0.975)).tolist() if own else (None, None)
        mean, sets = (float(np.mean(row)) if row else None for row in (own, between))
        rows.append(Stability(fraction, size, mean, low, high, sets))
    return rows


def overlaps_of_arms(
    orders: Mapping[str, Tensor], strength: ArmScores, bench: Bench, permutations: int = 200
) -> list[Overlap]:
    """What the circuits of every two arms share, against random circuits that are as strong in every layer.

    Args:
        orders: The arms' rankings.
        strength: Scores that say how strong components are whatever the task (Wanda's): strata are neighbours in a
            layer's ranking by them.
        bench: The bench, for its candidates and sizes.
        permutations: Random circuits behind a p-value.
    """
    scores = strength.of()
    layers = [scores[s.group.layer].scores[s.group.own].flatten().cpu().numpy() for s in bench.candidates.spans]
    strata = strata_by_rank(layers, STRATUM)
    result = []
    for fraction, size in zip(bench.fractions, bench.sizes, strict=True):
        if not 0 < size < bench.candidates.count:
            continue
        circuits = {name: order[:size].sort().values.numpy() for name, order in orders.items()}
        pairs = list(itertools.combinations(circuits, 2))
        null_counts: dict[tuple[str, str], list[int]] = {pair: [] for pair in pairs}
        for draw in matched_draws(list(circuits.values()), strata, permutations, bench.seed) if pairs else ():
            random_circuits = dict(zip(circuits, draw, strict=True))
            for one, other in pairs:
                in_both = np.intersect1d(random_circuits[one], random_circuits[other], assume_unique=True)
                null_counts[one, other].append(len(in_both))
        for one, other in pairs:
            common = len(np.intersect1d(circuits[one], circuits[other], assume_unique=True))
            result.append(
                Overlap(
                    [one, other],
                    fraction,
                    common,
                    common / (2 * size - common),
                    expected_common([circuits[one], circuits[other]], strata),
                    permutation_p(common, null_counts[one, other]),
                )
            )
    return result


def strength_request(arm: Arm, nonfinite: str = "error") -> ScoreRequest:
    """The request for scores of how strong an arm's components are, whatever the task: Wanda's scores."""
    plain = arm.request
    kinds = [choice.object for choice in plain.components]
    return ScoreRequest.of("wanda", kinds, layers=plain.layers, nonfinite=nonfinite)
