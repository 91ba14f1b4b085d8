"""``choose`` and ``edited``: from scores to a plan, and the plan in force for as long as a block lasts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from sparc3_pl.errors import InputError
from sparc3_pl.notebook.models import as_call, edits_in_force, require_plain
from sparc3_pl.notebook.scores import Scores
from sparc3_pl.pruning.edit import pruned
from sparc3_pl.pruning.plan import PrunePlan
from sparc3_pl.scores.folder import ScoreFolder
from sparc3_pl.selection.choose import make_plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sparc3_pl.pruning.edits import Edit
    from sparc3_pl.registry import Spec
    from sparc3_pl.selection.budgets import Budgets
    from sparc3_pl.selection.contrast import Contrast
    from sparc3_pl.selection.controls import Control
    from sparc3_pl.selection.scope import Scope

__all__ = ["choose", "edited"]

AnyScores = Scores | ScoreFolder | str | Path
"""Scores in memory, or the path of a score folder."""


def choose(
    general: AnyScores | Sequence[AnyScores],
    behaviour: AnyScores | Sequence[AnyScores] = (),
    *,
    num_neurons: int | None = None,
    num_weights: int | None = None,
    share: float | None = None,
    contrast: Spec | Contrast = "difference",
    scope: Spec | Scope = "model",
    layers: Sequence[str] | None = None,
    protect: float = 0.0,
    control: Spec | Control | None = None,
    seed: int = 0,
    edit: Spec | Edit = "zero",
    budgets: Spec | Budgets | None = None,
    scale: float | None = None,
) -> PrunePlan:
    """Chooses the components that a behaviour uses and general text does not, as ``sparc3 prune`` does.

    Args:
        general: Scores of general text; several (seeds) are averaged.
        behaviour: Scores of the behaviour's samples; not needed for ``contrast="general"`` (compression) and the
            controls ``random``, ``top_general`` and ``null``.
        num_neurons: How many components, over all layers together.
        num_weights: The same for scores of single weights.
        share: A share of all instead, in (0, 1).
        contrast: ``difference``, ``normalized``, ``rank``, ``t``, ``set_difference``, ``general``, ``budget``, or a
            contrast of your own.
        scope: Among whom components compete: ``model``, ``layer``, ``row``,
            ``{"class_path": "pattern", "init_args": {"pattern": "2:4"}}``, or a scope of your own.
        layers: Glob patterns of the layers to choose from; None: all that are scored.
        protect: Share of the general set's strongest that is never touched.
        control: Draw a control of the same size instead: ``random``, ``random_matched``, ``top_general``, ``null``,
            ``permuted``.
        seed: Seed for drawing the control.
        edit: ``zero``, ``{"class_path": "scale", "init_args": {"alpha": 0.5}}``, ``gains``, or an edit of your own.
        budgets: A share of its own for each layer: ``owl``, a file, or a class.
        scale: For ``edit="gains"``: how far to go along the contrast's steps.

    Raises:
        InputError: naming the argument that is wrong.
    """
    plan = make_plan(
        _folders(general), _folders(behaviour), num_neurons=num_neurons, num_weights=num_weights, share=share,
        contrast=contrast, scope=scope, layers=layers, protect=protect, control=control, seed=seed, edit=edit,
        budgets=budgets, scale=scale,
    )  # fmt: skip
    return replace(plan, command=as_call(choose, locals()))


def _folders(scores: AnyScores | Sequence[AnyScores]) -> list[ScoreFolder]:
    several = [scores] if isinstance(scores, Scores | ScoreFolder | str | Path) else scores
    return [_folder(one) for one in several]


def _folder(scores: AnyScores) -> ScoreFolder:
    if isinstance(scores, Scores):
        return scores.folder
    return scores if isinstance(scores, ScoreFolder) else ScoreFolder.open(scores)


@contextmanager
def edited(
    model: PreTrainedModel, plan: PrunePlan | str | Path, *, check_fingerprint: bool = True
) -> Iterator[PreTrainedModel]:
    """The plan is in force inside the block; afterwards, an exception included, the model is as it was, bit for bit.

    Args:
        model: The model that was scored, on any device, in any floating-point type.
        plan: What to edit, or the path of a plan.
        check_fingerprint: Whether the weights must be those that were scored. Turn it off for a model that was trained
            since.

    Yields:
        The model.

    Raises:
        InputError: if the plan does not fit the model, or the model is quantised or inside such a block already.
    """
    require_plain(model)
    if (other := edits_in_force.get(model)) is not None:
        raise InputError(
            f"the model is edited already, by a plan of {other.num_neurons or other.num_weights} {other.unit} "
            f"(contrast {other.contrast}); leave that block first"
        )
    plan = plan if isinstance(plan, PrunePlan) else PrunePlan.load(plan)
    with pruned(model, plan, check_fingerprint):
        edits_in_force[model] = plan
        try:
            yield model
        finally:
            del edits_in_force[model]
