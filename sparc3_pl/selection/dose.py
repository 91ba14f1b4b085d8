"""How far to go: a plan of gains whose scale is free, and the search for the scale that a budget allows.

The cost of a scale is measured, not predicted: the rise of the loss on held-back text of every kind, of which the
dearest holds the budget.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from sparc3_pl.errors import InputError
from sparc3_pl.pruning.plan import PrunePlan, TextRise
from sparc3_pl.scores.folder import ScoreFolder
from sparc3_pl.selection.contrast import Contrast

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sparc3_pl.data.encoding import Encoder
    from sparc3_pl.data.samples import Sample

__all__ = [
    "BudgetSource",
    "BudgetText",
    "Dose",
    "Search",
    "SourceSpec",
    "check_budget",
    "check_windows",
    "forecast_scale",
    "held_back",
    "search_scale",
    "spend",
]

log = logging.getLogger(__name__)

_WINDOW = 1024
_TOLERANCE = 0.03
_MOST = 12
_FIRST_LOOK = 8  # the search begins on one window in so many
_FIRST_TOLERANCE = 0.2


@dataclass(frozen=True)
class Dose:
    """A plan of gains before its scale is chosen.

    Attributes:
        plan: Everything but the factors.
        contrast: What turns steps into factors.
        steps: The change of each chosen component's gain at scale 1, by layer, in the order of the plan's entries.
        derivatives: Likewise, the derivative of what is to be lowered, by each gain; None if the contrast knows none.
        fisher: Likewise, the Fisher information per token of general text; None if the contrast does not use it.
        rows: Likewise ``[rows, n]``, whose products are that of every two components; None if the contrast, whose
            ``off_diagonal`` says how much of it counts, does not use it.
    """

    plan: PrunePlan
    contrast: Contrast
    steps: Mapping[str, Tensor]
    derivatives: Mapping[str, Tensor] | None
    fisher: Mapping[str, Tensor] | None
    rows: Mapping[str, Tensor] | None = None

    def at(self, scale: float, more: Mapping[str, Any] | None = None) -> PrunePlan:
        """The plan at a scale; its settings say what is predicted to first and second order, and ``more``.

        Raises:
            InputError: if the scale is not above 0.
        """
        if not 0 < scale < math.inf:
            raise InputError(f"scale={scale} of edit=gains is not a number above 0; give another")
        factors = {layer: self.contrast.factors(step, scale) for layer, step in self.steps.items()}
        entries = {layer: replace(one, factor=factors[layer]) for layer, one in self.plan.entries.items()}
        change = None if self.derivatives is None else self._sum(self.derivatives, factors, 1)
        rise = None if self.fisher is None else self._predicted_rise(factors)
        gains = {"scale": scale, "predicted_change": change, "predicted_rise": rise}
        return replace(self.plan, entries=entries, settings=self.plan.settings | {"gains": gains | dict(more or {})})

    def largest_scale(self) -> float:
        """The scale from which on every factor is at the end of its range."""
        scales = [math.inf]
        for step in self.steps.values():
            ends = self.contrast.factors(step.sign() * math.inf, 1.0)
            scales.append(float(((ends - 1) / step).max()))
        return max(scales[1:], default=math.inf)

    def predicted_scale(self, rise: float) -> float:
        """The scale at which the loss is predicted to rise by ``rise`` nats per token, for a search to begin with."""
        if self.fisher is None:
            step = torch.cat(list(self.steps.values()))
            return 1 / float(step.abs().max())

        def rise_at(scale: float) -> float:
            return self._predicted_rise({n: self.contrast.factors(step, scale) for n, step in self.steps.items()})

        low, high = 0.0, 1.0
        while rise_at(high) < rise and high < self.largest_scale():
            low, high = high, 2 * high
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if rise_at(middle) < rise else (low, middle)
        return high

    def _predicted_rise(self, factors: Mapping[str, Tensor]) -> float:
        """Half of d' H d, nats per token, d the factors less 1."""
        assert self.fisher is not None
        alone = self._sum(self.fisher, factors, 2)
        if self.rows is None:
            return 0.5 * alone
        together_R = sum(rows.double() @ (factors[layer] - 1).double() for layer, rows in self.rows.items())
        share = self.contrast.off_diagonal  # type: ignore[attr-defined]
        return 0.5 * ((1 - share) * alone + share * float((together_R**2).sum()))

    @staticmethod
    def _sum(values: Mapping[str, Tensor], factors: Mapping[str, Tensor], power: int) -> float:
        return math.fsum(float((values[layer] * (factors[layer] - 1) ** power).sum()) for layer in factors)


# --- the search -------------------------------------------------------------------------------------------------------


Trial = tuple[float, tuple[float, ...]]
"""A scale and the rise of each text's loss there, nats per token."""

WindowLoss = tuple[float, int]
"""The negative log-likelihood of a window's predicted tokens, nats, and their number."""


@dataclass
class Search:
    """A line search's result.

    Attributes:
        scale: The largest scale tried at which the dearest text's loss rises by no more than the budget; 0: none.
        rises: The rise of each text there, nats per token.
        reached: Whether the budget is used up there.
        trials: All, in the order in which they were made.
    """

    scale: float = 0.0
    rises: tuple[float, ...] = ()
    reached: bool = False
    trials: list[Trial] = field(default_factory=list)


def search_scale(
    rises_at: Callable[[float], Sequence[float]],
    budget: float,
    start: float,
    largest: float = math.inf,
    tolerance: float = _TOLERANCE,
    most: int = _MOST,
    alike: Sequence[Trial] = (),
) -> Search:
    """The scale at which the dearest text's loss rises by ``budget``, from below.

    The loss of a text is about a parabola in the scale. So the next scale is the smallest at which the parabola of a
    text, through its two trials nearest to the budget, meets it; at most 4 times the last while every one was too small
    (and after three of those, the largest there is), and between the nearest two once one was too large.

    Args:
        rises_at: Scale to the rise of each text's loss, nats per token.
        budget: Largest rise, nats per token.
        start: First scale to try.
        largest: From this scale on nothing changes any more.
        tolerance: A rise within this share below the budget ends the search.
        most: Trials.
        alike: Trials of the same edit on other text of the same kinds. How a parabola is curved differs less between
            texts than how it begins, so after the first trial these say how.
    """
    search, too_large, scale = Search(), math.inf, min(start, largest)
    for trial in range(most):
        rises = tuple(float(rise) for rise in rises_at(scale))
        search.trials.append((scale, rises))
        if max(rises) <= budget:
            search.scale, search.rises = scale, rises
            search.reached = max(rises) >= budget * (1 - tolerance)
            if search.reached or scale >= largest:
                break
        else:
            too_large = scale
        scale = forecast_scale(search.trials, budget * (1 - tolerance / 2), alike)
        if math.isinf(too_large):
            scale = min(max(scale, 1.01 * search.scale), 4 * search.scale, largest)
            if trial >= 3 and math.isfinite(largest):
                scale = largest
        elif not search.scale < scale < too_large or trial % 5 == 4:  # halved now and then, lest one end never moves
            scale = math.sqrt(search.scale * too_large) or too_large / 4
    return search


def forecast_scale(trials: Sequence[Trial], aim: float, alike: Sequence[Trial] = ()) -> float:
    """The smallest scale at which the loss of a text is forecast to rise by ``aim``; inf if that of none ever does.

    Args:
        trials: At least one scale, with the rise of each text.
        aim: Nats per token.
        alike: As in ``search_scale``.
    """
    texts = range(len(trials[0][1]))
    return min(_forecast(_of_text(trials, text), aim, _of_text(alike, text)) for text in texts)


def _of_text(trials: Sequence[Trial], text: int) -> list[tuple[float, float]]:
    return [(scale, rises[text]) for scale, rises in trials if math.isfinite(rises[text])]


def _forecast(trials: Sequence[tuple[float, float]], aim: float, alike: Sequence[tuple[float, float]]) -> float:
    """The scale at which a parabola through 0 meets ``aim``; inf if it never does."""
    if not trials:
        return math.inf
    (scale, rise), *others = _nearest(trials, aim)
    if others:
        square = _curvature((scale, rise), others[0])
    elif len(alike) > 1:
        square = _curvature(*_nearest(alike, aim))
    else:
        square = rise / scale**2
    linear = rise / scale - square * scale
    if square <= 0:
        return aim / linear if linear > 0 else math.inf
    return (math.sqrt(linear**2 + 4 * square * aim) - linear) / (2 * square)


def _nearest(trials: Sequence[tuple[float, float]], aim: float) -> list[tuple[float, float]]:
    """The two trials, or the one, whose rise is nearest to ``aim``."""
    return sorted(trials, key=lambda one: abs(one[1] - aim))[:2]


def _curvature(one: tuple[float, float], other: tuple[float, float]) -> float:
    """The coefficient of the square of the parabola through 0 and two trials."""
    return (one[1] / one[0] - other[1] / other[0]) / (one[0] - other[0])


# --- held-back text ---------------------------------------------------------------------------------------------------

SourceSpec = str | Mapping[str, str | None]
"""A source as ``data.source``, alone or with ``subset``, ``split``, ``field`` and ``filter``."""


@dataclass(frozen=True)
class BudgetSource:
    """The source of one kind of held-back text.

    Attributes:
        source: A source of texts, as ``data.source``.
        subset: Configuration of a hub data set.
        split: Split of a hub data set.
        field: Field of the text, dots for nesting.
        filter: Condition on a record's fields, as ``data.filter``.
        listed: Texts that somebody holds in memory; ``source`` is then only their name, and they keep their order.
    """

    source: str
    subset: str | None = None
    split: str = "train"
    field: str = "text"
    filter: str | None = None
    listed: Sequence[str | list[int]] | None = None

    @classmethod
    def of(cls, spec: SourceSpec, field: str = "text", condition: str | None = None) -> Self:
        """The source that a configuration names.

        Args:
            spec: A source, as ``data.source``, or a mapping with the keys of a source.
            field: Field of the text where ``spec`` names none.
            condition: Filter where ``spec`` names none.

        Raises:
            InputError: if a key is unknown, there is no source, or a file is not there.
        """
        from sparc3_pl.data.sources import local_source

        settings = {"source": spec} if isinstance(spec, str) else {k: v for k, v in spec.items() if v is not None}
        keys = [one.name for one in fields(cls) if one.name != "listed"]
        if unknown := sorted(settings.keys() - set(keys)):
            raise InputError(f"budget_text: {unknown[0]} is none of a text's keys; they are {', '.join(keys)}")
        if not settings.get("source") or not all(isinstance(value, str) for value in settings.values()):
            raise InputError(
                f"budget_text={spec!r}: give a source, as data.source, or a mapping with {', '.join(keys)}"
            )
        local_source(settings["source"], "budget_text")
        return cls(**({"field": field, "filter": condition} | settings))

    @property
    def name(self) -> str:
        """What results call it."""
        name = Path(self.source).name
        parts = [part for part in (self.subset, None if self.split == "train" else self.split) if part is not None]
        return f"{name} ({', '.join(parts)})" if parts else name


@dataclass(frozen=True)
class BudgetText:
    """Windows of one held-back text.

    Attributes:
        source: The name of the text.
        windows: The windows.
        num_left_out: Texts that were left out because general scores were made from them.
    """

    source: str
    windows: Sequence[Sample]
    num_left_out: int


def check_budget(edit: str, budget: float | None, budget_text: Sequence[Any] | None, scale: float | None) -> None:
    """Refuses a budget, or a scale in its place, that cannot be right, before any score is read.

    Args:
        edit: The edit's name; only ``gains`` has a budget.
        budget: Relative rise of perplexity.
        budget_text: Held-back texts.
        scale: The scale, in place of a budget.

    Raises:
        InputError: for the first setting that is wrong.
    """
    if edit != "gains":
        settings = {"budget": budget, "budget_text": budget_text, "scale": scale}
        for name, value in settings.items():
            if value is not None:
                setting = name if name == "budget_text" else f"{name}={value}"
                raise InputError(f"{setting} is for edit=gains, and this is edit={edit}; leave it out")
        return
    if (budget is None) == (scale is None):
        raise InputError(
            f"edit=gains with budget={budget} and scale={scale}: give one of the two, --budget 0.01 (with "
            "--budget_text) or --scale"
        )
    if budget is not None and not 0 < budget < math.inf:
        raise InputError(f"budget={budget} is not a rise of perplexity above 0; 0.01 is 1 %")
    if budget is not None and not budget_text:
        raise InputError(
            "budget needs held-back text to measure the rise of perplexity on; give --budget_text FILE ..."
        )
    if scale is not None and not 0 < scale < math.inf:
        raise InputError(f"scale={scale} of edit=gains is not a number above 0; give another")


def check_windows(num_windows: int, length: int | None) -> None:
    """Refuses windows of held-back text that cannot be right, before a model is loaded.

    Raises:
        InputError: if there would be no windows, or windows without a token to predict.
    """
    if num_windows < 1:
        raise InputError(f"budget_windows={num_windows}: give at least 1 window of each text")
    if length is not None and length < 2:
        raise InputError(f"budget_length={length}: give at least 2 tokens, of which the first is not predicted")


def held_back(
    sources: Sequence[BudgetSource],
    encoder: Encoder,
    general: Sequence[ScoreFolder],
    *,
    num_windows: int = 16,
    length: int | None = None,
    seed: int = 0,
) -> list[BudgetText]:
    """Windows of every source, without the texts that general scores were made from.

    Args:
        sources: Where the texts are.
        encoder: The model's.
        general: Folders whose texts are left out.
        num_windows: Windows of each source.
        length: Tokens in a window; None: 1,024, at most the model's context.
        seed: Seed of the shuffle.

    Raises:
        InputError: if a source gives too few windows, or the general folders do not say what they were made from.
    """
    from sparc3_pl.data.samples import pack_windows
    from sparc3_pl.data.texts import TextQuery

    check_windows(num_windows, length)
    used_ids: set[str] = set()
    for folder in general:
        samples = folder.samples()
        if not samples or not all(sample.text_ids for sample in samples):
            raise InputError(
                f"{folder.path}: does not say which texts its samples were made from, so that these cannot be kept out "
                "of budget_text; score again"
            )
        used_ids.update(*(sample.text_ids for sample in samples), (sample.id for sample in samples))
    length = min(_WINDOW, encoder.context or _WINDOW) if length is None else length
    texts = []
    for source in sources:
        query = TextQuery(
            source.source, source.field, source.filter, source.split, source.subset, seed, prefix="budget_",
            source_key="budget_text",
            listed=None if source.listed is None else [{source.field: text} for text in source.listed],
        )  # fmt: skip
        left_out = 0

        def unseen(query: TextQuery = query):
            nonlocal left_out
            for text in query.texts():
                if encoder.identity(text) in used_ids:
                    left_out += 1
                else:
                    yield text

        try:
            windows = pack_windows(unseen(), encoder, length, num_windows, source.name, origins=query.made_from)
        except InputError as error:
            reason = f"; {left_out} texts were left out because general scores were made from them" if left_out else ""
            raise InputError(
                f"budget_text={source.source!r}, budget_windows={num_windows}, budget_length={length}: {error}{reason}"
            ) from None
        texts.append(BudgetText(source.name, windows, left_out))
    if len({window.id for text in texts for window in text.windows}) < sum(len(text.windows) for text in texts):
        raise InputError("budget_text: two of the texts give the same windows; give each text once")
    return texts


class _Rises:
    """How much more the model loses on each text at a scale of the edit, nats per token.

    Attributes:
        before: The mean negative log-likelihood of each text without the edit, nats per token.
        num_tokens: Tokens of each text that are predicted.
    """

    def __init__(
        self, dose: Dose, model: PreTrainedModel, texts: Sequence[BudgetText], tell: Callable[[float], None]
    ) -> None:
        from sparc3_pl.model.likelihood import WindowScorer
        from sparc3_pl.model.loading import measured_once
        from sparc3_pl.model.placement import input_device

        self._dose, self._model, self._texts, self._tell = dose, model, texts, tell
        self._scorer, self._device = WindowScorer(model), input_device(model)
        windows = tuple(tuple(window.id for window in text.windows) for text in texts)
        self._before = measured_once(model, ("losses", str(self._device), windows), self._losses)
        self.before = [_mean(losses) for losses in self._before]
        self.num_tokens = [_count(losses) for losses in self._before]
        for text, nll in zip(texts, self.before, strict=True):
            if not math.isfinite(nll):
                raise InputError(
                    f"budget_text: the model's own loss on {text.source} is {nll}, so no rise can be measured; load it "
                    "in another number format (dtype), or give other text"
                )

    def __call__(self, scale: float, most: int | None = None) -> list[float]:
        """The rises at ``scale``, on the first ``most`` windows of each text; None: on all."""
        from sparc3_pl.pruning.edit import pruned

        with pruned(self._model, self._dose.at(scale), check_fingerprint=False):
            after = self._losses(most)
        self._tell(scale)
        rises = [_mean(a) - _mean(b[:most]) for a, b in zip(after, self._before, strict=True)]
        if not all(map(math.isfinite, rises)):
            return [math.inf] * len(rises)
        changes = (f"{one.source} {math.expm1(rise):+.3%}" for one, rise in zip(self._texts, rises, strict=True))
        log.info("scale %.4g: perplexity of %s (%d tokens)", scale, ", ".join(changes), sum(map(_count, after)))
        return rises

    def _losses(self, most: int | None = None) -> list[list[WindowLoss]]:
        """The losses of the first ``most`` windows of each text."""
        losses: list[list[WindowLoss]] = []
        for text in self._texts:
            losses.append([])
            for window in text.windows[:most]:
                ids = torch.tensor([window.input_ids], device=self._device)
                nll, num_scored = self._scorer(ids, torch.ones_like(ids), ids)
                losses[-1].append((float(nll.sum()), int(num_scored.sum())))
        return losses


def _mean(losses: Sequence[WindowLoss]) -> float:
    return sum(nll for nll, _ in losses) / _count(losses)


def _count(losses: Sequence[WindowLoss]) -> int:
    return sum(count for _, count in losses)


def spend(
    dose: Dose,
    model: PreTrainedModel,
    texts: Sequence[BudgetText],
    budget: float | None,
    scale: float | None = None,
    tell: Callable[[float], None] = lambda scale: None,
) -> PrunePlan:
    """The plan at the scale that the budget allows, with what it costs on every text.

    Args:
        dose: The plan without its scale.
        model: The model it is for, in eval mode.
        texts: Held-back text.
        budget: Relative rise of perplexity of the dearest text: 0.01 is 1 %. None: ``scale`` is given.
        scale: Instead of a search: measure what this scale costs.
        tell: Is told each scale that was tried.

    Raises:
        InputError: if even the smallest scale tried costs more than the budget, or the plan does not fit the model.
    """
    from sparc3_pl.pruning.edit import planned_changes

    planned_changes(model, dose.at(1.0))  # a plan of another model is refused before anything is measured
    rises_at = _Rises(dose, model, texts, tell)
    perplexities = ", ".join(
        f"{text.source} {math.exp(nll):.4g}" for text, nll in zip(texts, rises_at.before, strict=True)
    )
    log.info("perplexity of held-back text: %s", perplexities)
    if scale is not None:
        search = Search(scale, tuple(rises_at(scale)))
    else:
        assert budget is not None
        rise, largest = math.log1p(budget), dose.largest_scale()
        start, look = dose.predicted_scale(rise), Search()
        if few := min(len(text.windows) for text in texts) // _FIRST_LOOK:
            # What is predicted is too low by far where components that cost much together are weakened.
            look = search_scale(lambda scale: rises_at(scale, few), rise, start, largest, _FIRST_TOLERANCE)
            if look.scale:
                start = min(forecast_scale(look.trials, rise * (1 - _TOLERANCE / 2)), 4 * look.scale)
        search = search_scale(rises_at, rise, start, largest, alike=look.trials)
    if not search.scale:
        scale, rises = min(search.trials)
        raise InputError(
            f"budget={budget}: even scale {scale:.3g} raises the perplexity of held-back text by "
            f"{math.expm1(max(rises)):.2%}; give a larger budget or more text"
        )
    costs = [
        asdict(
            TextRise(text.source, nll, nll + rise, math.expm1(rise), len(text.windows), num_tokens, text.num_left_out)
        )
        for text, nll, rise, num_tokens in zip(texts, rises_at.before, search.rises, rises_at.num_tokens, strict=True)
    ]
    more = {"budget": budget, "reached": search.reached if budget is not None else None, "texts": costs}
    names = {name for text in texts for window in text.windows for name in window.text_ids}
    plan = replace(dose.at(search.scale, more), budget_samples=sorted(names))
    if sources := [text["source"] for text in costs if not math.isfinite(text["rise"])]:
        warning = f"scale {search.scale:.4g} breaks the model: its loss on {', '.join(sources)} is not finite"
        plan = replace(plan, warnings=[*plan.warnings, warning])
    if budget is not None and not search.reached:
        largest = max(text["rise"] for text in costs)
        why = (
            "every factor is at the end of gains_range" if search.scale >= dose.largest_scale() else "of too few trials"
        )
        warning = f"the budget of {budget:.2%} was not reached, because {why}: perplexity rises by {largest:.2%}"
        plan = replace(plan, warnings=[*plan.warnings, warning])
    return plan
