r"""Contrast ``budget``: how far to turn each component, for the largest effect on a behaviour at a given cost.

With alpha_i the gain of component i (the factor on what it contributes, 1 as it is):

* a_i, the mean score of the behaviour's samples, is the derivative by alpha_i of what was attributed. With target
  ``completion``, the model's own completions y of prompts, and a judge's score s(y) less its mean as their weight, that
  is the derivative of the expected score: the mean of (s(y) - mean s) d log p(y | prompt) / d alpha_i (the
  score-function estimator of Williams, 1992).
* F_i, the Fisher information of general text by alpha_i, per token: to second order a change d costs
  1/2 sum_ij F_ij d_i d_j nats per token; its diagonal is kept. With labels drawn from the model at every position of a
  text, the derivatives of two positions' log-likelihoods are uncorrelated, each with mean 0. So the mean square of a
  sample's *summed* derivative, which the score folder holds, is the sum over its positions of their Fisher information,
  and F_i is the mean square divided by the mean number of tokens that are predicted.

Among all changes of one cost 1/2 sum_i (F_i + ridge * mean F) d_i^2, the one that lowers a . d most is
d_i = -c a_i / (F_i + ridge * mean F): one step of the natural policy gradient (Kakade, 2001), restricted to gains, with
the Fisher information of general text as the metric. The scale c is found by a line search (``dose.py``).

Components that act together cost more together than one by one. With ``off_diagonal`` w > 0 the cost of a change is
1/2 d' H d, H = ridge * mean F + (1 - w) diag(F) + w F'. F' is the whole matrix as the groups of the general samples
show it: the sum over groups of s s' by the number of tokens that are predicted, s the group's summed derivatives
(whose mean square is their Fisher information, as above). H shrinks it towards its diagonal, which is known better
(Ledoit and Wolf, 2004), and d is the best change in which each gain goes only where its range lets it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from sparc3_pl.attribution.methods import METHODS
from sparc3_pl.errors import InputError
from sparc3_pl.scores.folder import BLOCK, ScoreFolder, require_comparable
from sparc3_pl.selection.cone import lowest_anywhere, lowest_in_cone
from sparc3_pl.selection.contrast import Contrast, Side, SideScores
from sparc3_pl.selection.lowest import Block, Passes

__all__ = ["Budget", "Fisher", "budget_steps", "fisher_per_token"]

_NOT_OF_A_BEHAVIOUR = ("predicted", "text")


def budget_steps(derivative_N: Tensor, fisher_N: Tensor, ridge: float) -> Tensor:
    """The change of every gain at scale 1: -a / (F + ridge * mean F), ``[N]`` float64.

    Args:
        derivative_N: Derivative by each gain of what is to be lowered.
        fisher_N: Fisher information of each gain, per token, >= 0 and not all 0.
        ridge: Share of the mean Fisher information that is added to each: components that general text seems not to
            use at all are not turned without limit.
    """
    return -derivative_N.double() / (fisher_N.double() + ridge * fisher_N.double().mean())


def fisher_per_token(folder: ScoreFolder, layer: str) -> Tensor:
    """Diagonal Fisher information per predicted token of a layer's gains, ``[n]`` float64.

    Raises:
        InputError: if the folder has no squares or no token was predicted.
    """
    return folder.load_squares(layer).double() * (folder.manifest.num_samples / _num_predicted(folder))


def _num_predicted(folder: ScoreFolder) -> int:
    """How many tokens' log-likelihoods were attributed, as the samples say; else all but the first of each sample."""
    numbers = [sample.more.get("num_target_tokens") for sample in folder.samples()]
    count = folder.manifest.num_tokens - folder.manifest.num_samples if None in numbers or not numbers else sum(numbers)
    if count < 1:
        raise InputError(f"{folder.path}: no sample has a second token, so no token was predicted; score longer texts")
    return count


@dataclass(frozen=True)
class Fisher(Side):
    """The diagonal Fisher information per token as a side: the mean over folders, each a kind of text.

    Args:
        scores: The folders, and the layers to look at.
        weights: Weights of the folders in the mean, summing to 1; None: all the same.
    """

    scores: SideScores
    weights: tuple[float, ...] | None = None

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers, in the model's order."""
        return self.scores.layers

    def span(self, layer: str) -> tuple[int, int]:
        return self.scores.span(layer)

    def __call__(self) -> Iterator[Block]:
        for layer in self.layers:
            start, stop = self.span(layer)
            each = [fisher_per_token(folder, layer) for folder in self.scores.folders]
            if self.weights is None:
                mean = (sum(each) / len(each)).float()
            else:
                mean = sum(w * one for w, one in zip(self.weights, each, strict=True)).float()
            if not mean.isfinite().all():
                raise InputError(f"{self.scores.folders[0].path}: layer {layer} has squares that are not finite")
            for offset in range(start, stop, BLOCK):
                yield Block(layer, offset, mean[offset : min(offset + BLOCK, stop)])

    def rows(self) -> dict[str, Tensor]:
        """Rows of each layer, ``[groups of all folders, n]`` float32, whose products are the whole matrix per token.

        Raises:
            InputError: if a folder has no groups.
        """
        folders = self.scores.folders
        weights = self.weights or (1 / len(folders),) * len(folders)
        parts: dict[str, list[Tensor]] = {layer: [] for layer in self.layers}
        for folder, weight in zip(folders, weights, strict=True):
            if not folder.manifest.groups:
                raise InputError(
                    f"{folder.path}: contrast=budget with off_diagonal needs groups of the general samples, the more "
                    "the better; score again with --model.groups as large as data.num_samples"
                )
            factors_G1 = torch.tensor(folder.manifest.group_sizes)[:, None] * math.sqrt(weight / _num_predicted(folder))
            for layer in self.layers:
                start, stop = self.span(layer)
                parts[layer].append(folder.load_groups(layer)[:, start:stop] * factors_G1)
        return {layer: torch.cat(rows) for layer, rows in parts.items()}

    def squared_error(self, layer: str) -> Tensor:
        raise InputError("the standard error of a Fisher information is not known")


@dataclass(frozen=True)
class _Even(Fisher):
    """A stand-in for the Fisher information: 1 for every component."""

    def __call__(self) -> Iterator[Block]:
        for layer in self.layers:
            start, stop = self.span(layer)
            for offset in range(start, stop, BLOCK):
                yield Block(layer, offset, torch.ones(min(offset + BLOCK, stop) - offset))


@dataclass(frozen=True)
class Budget(Contrast):
    """-a^2 / (F + ridge * mean F): components that lower the behaviour most for what they cost are chosen first.

    Args:
        ridge: Share of the mean Fisher information that is added to each.
        fisher: Whether costs count. Without, the steps follow the gradient alone: the arm that shows what they do.
        gains_range: Smallest and largest factor that an edit may give. By default components are only weakened.
        weights: How much each general folder counts in F, or each of equally many in a row (the seeds of one text).
            They need not sum to 1. None: all the same.
        off_diagonal: How much of the Fisher information of two components together counts, from 0 (none, so that each
            component costs what it costs alone) to 1. The groups of the general scores tell it; have as many of them as
            samples, and some hundred.

    Raises:
        InputError: if the ridge is not above 0, the range does not hold 1 or is empty, the weights are no weights or
            off_diagonal no share.
    """

    needs_behaviour: ClassVar[bool] = True
    for_weights: ClassVar[bool] = False
    gives_steps: ClassVar[bool] = True
    for_gains_only: ClassVar[bool] = True

    ridge: float = 0.1
    fisher: bool = True
    gains_range: list[float] = field(default_factory=lambda: [0.0, 1.0])
    weights: list[float] | None = None
    off_diagonal: float = 0.0

    def __post_init__(self) -> None:
        if not (isinstance(self.off_diagonal, int | float) and 0 <= self.off_diagonal <= 1):
            raise InputError(f"contrast=budget: off_diagonal={self.off_diagonal!r} is not a share from 0 to 1")
        if self.off_diagonal and not self.fisher:
            raise InputError(
                f"contrast=budget: off_diagonal={self.off_diagonal} is about costs, which fisher=false leaves out; "
                "give only one of them"
            )
        weights = self.weights
        if weights is not None:
            if not self.fisher:
                raise InputError(
                    f"contrast=budget: weights={weights} are about costs, which fisher=false leaves out; give only one "
                    "of them"
                )
            numbers = isinstance(weights, list) and all(type(w) in (int, float) and 0 <= w < math.inf for w in weights)
            if not numbers or not sum(weights) > 0:
                raise InputError(f"contrast=budget: weights={weights}: give a number from 0 on for each general text")
        if not (isinstance(self.ridge, int | float) and 0 < self.ridge < math.inf):
            raise InputError(f"contrast=budget: ridge={self.ridge!r} is not a number above 0; e.g. 0.1")
        low, high = self._range()
        if not (low <= 1 <= high and low < high and math.isfinite(low) and math.isfinite(high)):
            raise InputError(
                f"gains_range={[low, high]}: give the smallest and the largest factor, with 1 between them, e.g. 0 1"
            )

    def _range(self) -> tuple[float, float]:
        values = list(self.gains_range)
        if len(values) != 2 or not all(isinstance(value, int | float) for value in values):
            raise InputError(f"gains_range={values}: give two numbers, the smallest and the largest factor, e.g. 0 1")
        return float(values[0]), float(values[1])

    def sides(self, general: Side, behaviour: Side) -> tuple[Side, Side]:
        if isinstance(general, SideScores) and isinstance(behaviour, SideScores):
            _check(general, behaviour, self.fisher)
            general = Fisher(general, self._shares(len(general.folders))) if self.fisher else _Even(general)
        return general, behaviour

    def _shares(self, num_folders: int) -> tuple[float, ...] | None:
        """The weight of each general folder, all together 1; None if all are the same."""
        if self.weights is None:
            return None
        seeds, rest = divmod(num_folders, len(self.weights))
        if rest or not seeds:
            raise InputError(
                f"contrast=budget: {len(self.weights)} weights for {num_folders} general folders; give one for each, "
                "or for each of equally many in a row"
            )
        each = [weight for weight in self.weights for _ in range(seeds)]
        return tuple(weight / sum(each) for weight in each)

    def require_comparable(self, general: Side, behaviour: Side) -> None:
        super().require_comparable(*self.sides(general, behaviour))

    def passes(self, general: Side, behaviour: Side) -> Passes:
        general, behaviour = self.sides(general, behaviour)
        steps = self.steps(general, behaviour)
        low, high = self._range()

        def passes() -> Iterator[Block]:
            for layer, block in behaviour.in_memory.items():
                step = steps[layer]
                allowed = ((step < 0) & (low < 1)) | ((step > 0) & (high > 1))
                yield replace(block, values=(block.values.double() * step).float(), allowed=allowed)

        return passes

    def steps(self, general: Side, behaviour: Side) -> dict[str, Tensor]:
        general, behaviour = self.sides(general, behaviour)
        fisher, derivatives = _fisher_of(general), behaviour.in_memory
        if self.off_diagonal and isinstance(general, Fisher):
            low, high = self._range()
            step = _steps_together(general, behaviour, self.ridge, self.off_diagonal, low < 1, high > 1)
        else:
            step = budget_steps(_values_of(behaviour), fisher, self.ridge)
        return dict(zip(derivatives, step.split([len(b.values) for b in derivatives.values()]), strict=True))

    def free_steps(self, general: Side, behaviour: Side) -> Callable[[Tensor], Tensor]:
        """What gives the changes at scale 1 for any derivative ``[N]``, as if ``gains_range`` had no ends.

        Args:
            general: Scores of general text.
            behaviour: Scores that are comparable with them, for what is checked.

        Raises:
            InputError: if the scores are not what this contrast is made of, or the Fisher information is 0 everywhere.
        """
        general, behaviour = self.sides(general, behaviour)
        fisher = _fisher_of(general)
        if self.off_diagonal and isinstance(general, Fisher):
            return lowest_anywhere(*_cost_together(general, self.ridge, self.off_diagonal))
        return lambda derivative: budget_steps(derivative, fisher, self.ridge)

    def factors(self, step: Tensor, scale: float) -> Tensor:
        """The factor of each component: 1 + scale * step, within ``gains_range``."""
        return (1 + scale * step).clamp(*self._range())


def _values_of(side: Side) -> Tensor:
    """The values of all components, ``[N]`` float32."""
    return torch.cat([block.values for block in side.in_memory.values()])


def _fisher_of(general: Side) -> Tensor:
    """The Fisher information of all components, ``[N]`` float32, which is not 0 everywhere."""
    fisher = _values_of(general)
    if not fisher.any():
        raise InputError("contrast=budget: the Fisher information of general text is 0 everywhere; score again")
    return fisher


@lru_cache(maxsize=1)  # a plan asks several times, and it takes a minute for tens of thousands of components
def _steps_together(
    general: Fisher, behaviour: Side, ridge: float, off_diagonal: float, down: bool, up: bool
) -> Tensor:
    """The change of every gain at scale 1, by what components cost together."""
    return lowest_in_cone(
        _values_of(behaviour).double(), *_cost_together(general, ridge, off_diagonal), down=down, up=up
    )


def _cost_together(general: Fisher, ridge: float, off_diagonal: float) -> tuple[Tensor, Tensor]:
    """H of the module's docstring: its diagonal without what the rows add to it ``[N]``, and the rows ``[R, N]``."""
    fisher = _fisher_of(general).double()
    rows = torch.cat(list(general.rows().values()), 1).mul_(math.sqrt(off_diagonal))
    return (1 - off_diagonal) * fisher + ridge * fisher.mean(), rows


def _check(general: SideScores, behaviour: SideScores, fisher: bool) -> None:
    """Refuses scores that are not the derivatives and squares that the contrast is made of."""
    sides = [("general", folder) for folder in general.folders] + [("behaviour", f) for f in behaviour.folders]
    for side, folder in sides:
        about, where = folder.manifest, f"{folder.path}: contrast=budget"
        if folder.holds_weights:
            raise InputError(f"{where} is not for weight scores; score neurons, heads or channels")
        if not METHODS.from_file(about.method, about.method_args).gives_derivatives:
            raise InputError(f"{where} needs scores by gradient or lrp, not by {about.method}; score again")
        if not about.signed:
            raise InputError(f"{where} needs signed scores; score again with --model.signed true")
        if side == "general":
            if about.target != "text" or about.target_args.get("labels") != "model":
                raise InputError(
                    f"{where} needs general text scored with target text and labels drawn from the model, not target "
                    f"{about.target}; score again with --model.target text --model.labels model"
                )
            if fisher and not about.squares:
                raise InputError(f"{where} needs the squares of general scores; score again with --model.squares true")
        elif about.target in _NOT_OF_A_BEHAVIOUR:
            raise InputError(
                f"{where} needs the derivative of the behaviour itself, not of target {about.target}; score the "
                "model's own completions with --model.target completion"
            )
        if not about.at_values:
            raise InputError(
                f"{where} needs derivatives by gains, read where the components' values are read, and these are not; "
                "score again"
            )
        if side == "general" and about.plan is not None:
            raise InputError(
                f"{where} measures costs from the model as it is, and these are scores of an edited one; score general "
                "text again without --plan"
            )
    require_comparable([folder for _, folder in sides], but=("target", "target_args", "plan"))
