"""How much selections for several behaviours have in common, against what chance and sheer strength would give.

Selections crowd in the same layers and among the strongest neurons whatever the behaviour. So the null is not a draw
from all neurons (the hypergeometric one) but one that keeps, for each selection, how many it takes of every *stratum*:
of neighbours in one layer's ranking by general relevance. Within a stratum the draw is at random.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from sparc3_pl.errors import InputError
from sparc3_pl.model.bitmask import BitMask

__all__ = [
    "exclusive_intersections",
    "exclusive_intersections_of_masks",
    "expected_common",
    "hypergeometric_p",
    "matched_draws",
    "permutation_p",
    "quadrants",
    "strata_by_rank",
]

Ints = NDArray[np.int64]


def exclusive_intersections(sets: Mapping[str, Collection[object]]) -> dict[frozenset[str], int]:
    """The number of elements in all sets of a combination and in no other set, for every combination of names."""
    counts: dict[frozenset[str], int] = {}
    for element in set().union(*sets.values()):
        members = frozenset(name for name, one in sets.items() if element in one)
        counts[members] = counts.get(members, 0) + 1
    return counts


def exclusive_intersections_of_masks(masks: Mapping[str, Mapping[str, BitMask]]) -> dict[frozenset[str], int]:
    """The numbers that ``exclusive_intersections`` gives, for sets of very many weights, held as masks.

    Args:
        masks: The weights in each set, by name and layer. A layer that a name lacks holds none.

    Raises:
        InputError: for masks of unlike size, or more sets than can be counted together.
    """
    names, most = list(masks), 16
    if len(names) > most:
        raise InputError(f"{len(names)} plans of weights; compare at most {most} at a time")
    totals = np.zeros(1 << len(names), dtype=np.int64)
    for layer in dict.fromkeys(layer for one in masks.values() for layer in one):
        own = {place: masks[name][layer] for place, name in enumerate(names) if layer in masks[name]}
        first = next(iter(own.values()))
        if any(mask.size != first.size for mask in own.values()):
            raise InputError(f"plans of different sizes for layer {layer} cannot be compared; make them for one model")
        for start, stop in first.pieces():
            codes = np.zeros(stop - start, dtype=np.int32)  # bit p: in the set of place p
            for place, mask in own.items():
                codes |= mask.part(start, stop).numpy().astype(np.int32) << place
            totals += np.bincount(codes, minlength=len(totals))
    members = (frozenset(name for place, name in enumerate(names) if code >> place & 1) for code in range(len(totals)))
    return {group: int(total) for group, total in zip(members, totals, strict=True) if group and total}


def strata_by_rank(layers: Sequence[NDArray[np.floating]], size: int) -> Ints:
    """The stratum of every neuron: ``size`` neighbours in its layer's ranking by general relevance.

    Args:
        layers: General scores of each layer.
        size: Neurons of a stratum; the last of a layer may have fewer.

    Returns:
        Stratum numbers of all layers' neurons in one vector, all different between layers.
    """
    parts, first = [], 0
    for scores in layers:
        rank = np.empty(len(scores), dtype=np.int64)
        rank[np.argsort(-scores, kind="stable")] = np.arange(len(scores))  # the strongest are together, never a rest
        parts.append(first + rank // size)
        first += -(-len(scores) // size)
    return np.concatenate(parts)


def matched_draws(selections: Sequence[Ints], strata: Ints, count: int, seed: int = 0) -> Iterator[list[Ints]]:
    """Random selections, each with as many of every stratum as the one that it stands for.

    Args:
        selections: Positions of the chosen neurons.
        strata: The stratum of every neuron.
        count: How often to draw.
        seed: Seed of the random draws.

    Yields:
        One random counterpart for every selection.
    """
    rng = np.random.default_rng(seed)
    members = np.flatnonzero(np.isin(strata, strata[np.concatenate(selections)]))
    members = members[np.argsort(strata[members], kind="stable")]
    groups, start, size = np.unique(strata[members], return_index=True, return_counts=True)
    place = np.arange(len(members)) - np.repeat(start, size)
    positions = [np.searchsorted(groups, strata[chosen]) for chosen in selections]
    quotas = [np.repeat(np.bincount(rows, minlength=len(groups)), size) for rows in positions]
    group = np.repeat(np.arange(len(groups)), size)
    for _ in range(count):
        # Random keys sorted within each stratum: the first so many of a stratum are a random draw from it.
        yield [members[np.lexsort((rng.random(len(members)), group))][place < quota] for quota in quotas]


def expected_common(selections: Sequence[Ints], strata: Ints) -> float:
    """The mean size of the joint intersection of matched random draws: sum over strata of n * prod(a_i / n)."""
    size = np.bincount(strata).astype(np.float64)
    shares = [np.bincount(strata[chosen], minlength=len(size)) / size for chosen in selections]
    return float((size * np.prod(shares, axis=0)).sum())


def permutation_p(observed: int, drawn: Sequence[int]) -> float:
    """One-sided p-value: (1 + draws with >= ``observed`` in common) / (1 + draws), never 0 (Phipson & Smyth 2010)."""
    return (1 + sum(value >= observed for value in drawn)) / (1 + len(drawn))


def hypergeometric_p(common: int, one: int, other: int, total: int) -> float:
    """Chance that two independent draws of ``one`` and ``other`` out of ``total`` have ``common`` or more in common."""
    from scipy.stats import hypergeom

    return float(hypergeom.sf(common - 1, total, one, other))


def quadrants(one: NDArray[np.floating], other: NDArray[np.floating]) -> dict[str, float]:
    """Shares of components by the signs of two contrasts, ``-`` meaning that the behaviour uses it more.

    Returns:
        ``--``, ``-+``, ``+-``, ``++``: of the first and of the second contrast; zeros count as ``+``.
    """
    first, second = one < 0, other < 0
    shares = {"--": first & second, "-+": first & ~second, "+-": ~first & second, "++": ~first & ~second}
    return {signs: float(members.mean()) for signs, members in shares.items()}


def pairs_and_all(names: Sequence[str]) -> list[tuple[str, ...]]:
    """Every two of ``names``, and all together if they are more than two."""
    return [*combinations(names, 2), *([tuple(names)] if len(names) > 2 else [])]
