"""Arms of a compression experiment: ways to score and to choose, each pruned to the same shares."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparc3_pl.attribution.methods import METHODS
from sparc3_pl.attribution.sequential import Sparsity
from sparc3_pl.errors import InputError
from sparc3_pl.evaluation.compare import Comparison
from sparc3_pl.experiment.stages import Settings
from sparc3_pl.model.components import COMPONENTS, Component
from sparc3_pl.report.curves import Curve, CurvePoint
from sparc3_pl.selection.command import idle_options
from sparc3_pl.selection.scope import PatternScope

__all__ = ["Arm", "Cut", "arms_of", "check_arm", "components_of", "curves_of", "list_of_seeds"]

_SECTIONS = ("general", "plan", "score")


@dataclass(frozen=True)
class Cut:
    """One plan of an arm.

    Attributes:
        arm: Name of the arm.
        seed: Seed of its calibration samples.
        share: Share that is removed.
        settings: Arguments of prune.
    """

    arm: str
    seed: int
    share: float
    settings: Settings

    @property
    def name(self) -> str:
        """The name of its files."""
        return f"{self.arm}-seed{self.seed}-{self.share:g}"


@dataclass(frozen=True)
class Arm:
    """A way to score and to choose.

    Attributes:
        name: Name of its files, and in tables.
        score: Keys of ``model`` of the scoring pass.
        general: Keys of ``data`` of the calibration samples.
        plan: Arguments of prune.
        seeds: Seeds of the calibration samples: each has scores and plans of its own.
        shares: The shares that it is pruned to.
    """

    name: str
    score: Settings
    general: Settings
    plan: Settings
    seeds: tuple[int, ...]
    shares: tuple[float, ...] = ()

    def scoring(self, seed: int) -> tuple[Settings, Settings]:
        """Keys of ``model`` and of ``data`` of the scoring pass with that seed."""
        method = METHODS.make(self.score.get("method") or "lrp")
        is_seeded = any("seed" in method.heeds(component) for component in components_of(self.score))
        return self.score | ({"seed": seed} if is_seeded else {}), self.general | {"seed": seed}

    def cuts(self) -> list[Cut]:
        """Its plans; an n:m pattern has one share, its own."""
        pattern = self.plan.get("pattern")
        if pattern is None:
            each = [(share, {"share": share}) for share in self.shares]
        else:
            num_kept, of = map(int, PatternScope(pattern).pattern.split(":"))
            each = [(1 - num_kept / of, {})]
        base = {"contrast": "general"} | self.plan
        return [Cut(self.name, seed, share, base | own) for seed in self.seeds for share, own in each]


def arms_of(
    arms: Mapping[str, Settings | None] | None,
    score: Settings,
    general: Settings,
    plan: Settings,
    seeds: Sequence[int],
    shares: Sequence[float],
) -> list[Arm]:
    """The arms; each section of an arm adds to the experiment's, or takes the place of its keys.

    Raises:
        InputError: naming the arm and the key that is wrong.
    """
    by_name = {str(score.get("method", "lrp")): {}} if arms is None else arms
    if not by_name:
        raise InputError("arms is empty; name at least one, e.g. {wanda: {score: {method: wanda}}}, or leave it out")
    result = []
    for name, own in by_name.items():
        own = check_arm(name, own, _SECTIONS, ("seeds", "shares"))
        sections: dict[str, Settings] = {key: own.get(key) or {} for key in _SECTIONS}
        own_seeds = list_of_seeds(name, own, seeds)
        # A pattern says by itself among whom weights compete and how many go; another contrast has other arguments.
        useless = {"scope", "budgets"} if "pattern" in sections["plan"] else set()
        useless |= idle_options((plan | sections["plan"]).get("contrast") or "difference")
        shared = {key: value for key, value in plan.items() if key not in useless}
        if set(plan | sections["plan"]) & {"share", "num_neurons", "num_weights"}:
            raise InputError(f"arms.{name}: shares says how much is removed; leave share and numbers out of plan")
        arm = Arm(
            name,
            score | sections["score"],
            general | sections["general"],
            shared | sections["plan"],
            tuple(dict.fromkeys(own_seeds)),
            _checked_shares(shares if own.get("shares") is None else own["shares"]),
        )
        _check_sequential(arm)
        result.append(arm)
    return result


def check_arm(name: str, own: Settings | None, sections: Sequence[str], others: Sequence[str]) -> Mapping[str, Any]:
    """What an arm gives, once its name and its keys are known to be right.

    Args:
        name: Name of the arm.
        own: Its settings, as in the configuration.
        sections: Keys that hold settings by name.
        others: Its other keys.

    Raises:
        InputError: naming the arm and the key that is wrong.
    """
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise InputError(f"arms: {name!r} also names files; use letters, digits, _, -, + and full stops")
    own = own or {}
    if not isinstance(own, Mapping) or (wrong := sorted(own.keys() - {*sections, *others})):
        key = wrong[0] if isinstance(own, Mapping) else repr(own)
        raise InputError(f"arms.{name}: {key} is none of its keys; they are {', '.join([*sections, *others])}")
    for key in sections:
        if not isinstance(own.get(key) or {}, Mapping):
            raise InputError(f"arms.{name}.{key}={own[key]!r}: give keys with values")
    return own


def list_of_seeds(name: str, own: Mapping[str, Any], seeds: Sequence[int]) -> Sequence[int]:
    """The seeds of an arm: its own, or the experiment's.

    Raises:
        InputError: if they are no list of whole numbers.
    """
    own_seeds = seeds if own.get("seeds") is None else own["seeds"]
    if not isinstance(own_seeds, Sequence) or not own_seeds or not all(type(seed) is int for seed in own_seeds):
        raise InputError(f"arms.{name}.seeds={own_seeds!r}: give a list of whole numbers, e.g. [0, 1]")
    return own_seeds


def components_of(score: Settings) -> list[Component]:
    """The kinds of component that these keys of ``model`` score.

    Raises:
        InputError: if there is no such kind.
    """
    kinds = score.get("granularity") or "neuron"
    return [COMPONENTS.make(spec) for spec in (kinds if isinstance(kinds, list) else [kinds])]


def _check_sequential(arm: Arm) -> None:
    """Refuses cuts that scores with ``model.sequential`` do not hold for, before they are made.

    Raises:
        InputError: naming the arm.
    """
    if (value := arm.score.get("sequential")) is None:
        return
    sparsity, plan = Sparsity.of(value), arm.plan
    if sparsity.pattern is not None:
        same, how = plan.get("pattern") == sparsity.text, f'plan: {{pattern: "{sparsity.text}"}}'
    else:
        same = plan.get("pattern") is None and plan.get("scope") == "row" and arm.shares == (sparsity.share,)
        how = f"plan: {{scope: row}} and shares: [{sparsity.text}]"
    others = [key for key in ("budgets", "protect", "layers") if plan.get(key)]
    if not same or others:
        raise InputError(
            f"arms.{arm.name}: with score.sequential={sparsity.text} layers are pruned so while they are scored, and "
            f"the scores hold for that alone; give the arm {how}" + (f", and leave out {others[0]}" if others else "")
        )


def _checked_shares(shares: Sequence[float]) -> tuple[float, ...]:
    """The shares, rising.

    Raises:
        InputError: if there are none, or one is no share.
    """
    if not isinstance(shares, Sequence) or not shares or not all(type(s) is float and 0 < s < 1 for s in shares):
        raise InputError(f"shares={shares}: give shares between 0 and 1, e.g. [0.1, 0.3, 0.5]")
    return tuple(sorted(set(shares)))


def curves_of(comparisons: Sequence[tuple[Cut, Comparison]]) -> list[Curve]:
    """Perplexity and every figure of the measurements against the share removed."""
    values: dict[str, tuple[float, dict[str, dict[float, list[float]]]]] = {}
    for cut, comparison in comparisons:
        for figure, (before, after) in _figures(comparison).items():
            _, arms = values.setdefault(figure, (before, {}))
            arms.setdefault(cut.arm, {}).setdefault(cut.share, []).append(after)
    return [
        Curve(
            figure,
            dense,
            {arm: tuple(CurvePoint(s, tuple(each)) for s, each in sorted(at.items())) for arm, at in arms.items()},
        )
        for figure, (dense, arms) in values.items()
    ]


def _figures(comparison: Comparison) -> dict[str, tuple[float, float]]:
    """The values before and after of everything that was compared, by name."""
    figures = {}
    if comparison.perplexity is not None:
        figures["perplexity"] = (comparison.perplexity.before, comparison.perplexity.after)
    for name, changes in comparison.measurements.items():
        figures |= {f"{name}: {figure}": (change.before, change.after) for figure, change in changes.items()}
    return figures
