"""``choose`` and ``edited``: from scores to a plan, and the plan in force for as long as a block lasts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparc3_pl.errors import InputError
from sparc3_pl.notebook.models import as_call, borrowed, edits_in_force, encoder_of, require_free, require_plain
from sparc3_pl.notebook.scores import Scores
from sparc3_pl.pruning.edit import pruned
from sparc3_pl.pruning.edits import EDITS
from sparc3_pl.pruning.plan import PrunePlan
from sparc3_pl.scores.folder import ScoreFolder
from sparc3_pl.selection.choose import make_dose, make_plan
from sparc3_pl.selection.contrast import CONTRASTS
from sparc3_pl.selection.dose import (
    BudgetSource,
    BudgetText,
    Dose,
    SourceSpec,
    check_budget,
    check_windows,
    held_back,
    spend,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sparc3_pl.pruning.edits import Edit
    from sparc3_pl.registry import Spec
    from sparc3_pl.selection.budgets import Budgets
    from sparc3_pl.selection.contrast import Contrast
    from sparc3_pl.selection.controls import Control
    from sparc3_pl.selection.scope import Scope

__all__ = ["choose", "edited"]

AnyScores = Scores | ScoreFolder | str | Path
"""Scores in memory, or the path of a score folder."""

BudgetTexts = Sequence[SourceSpec | Path | Sequence[str]] | Mapping[str, Sequence[str]]
"""Kinds of held-back text: each a source, as ``data.source``, or a list of texts; lists may have names."""


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
    edit: Spec | Edit | None = None,
    budgets: Spec | Budgets | None = None,
    scale: float | None = None,
    budget: float | None = None,
    budget_text: BudgetTexts | None = None,
    budget_windows: int = 16,
    budget_length: int | None = None,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: bool = True,
) -> PrunePlan:
    """Chooses the components that a behaviour uses and general text does not, as ``sparc3 prune`` does.

    With ``budget`` a search on the model finds how far ``edit="gains"`` may go. The model is left as it was.

    Args:
        general: Scores of general text; several (seeds) are averaged.
        behaviour: Scores of the behaviour's samples; not needed for ``contrast="general"`` (compression) and the
            controls ``random``, ``top_general`` and ``null``.
        num_neurons: How many components, over all layers together.
        num_weights: How many single weights, for scores of those.
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
            None: ``gains`` where there is a ``budget`` or the contrast is ``budget``, else ``zero``.
        budgets: A share of its own for each layer: ``owl``, a file, or a class. Not to be confused with ``budget``.
        scale: For ``edit="gains"``: how far to go along the contrast's steps, in place of a search.
        budget: For ``edit="gains"``: by how much the perplexity of held-back text may rise; 0.01 is 1 %. The text whose
            perplexity rises most decides.
        budget_text: Several kinds of held-back text, none of them that of an evaluation: lists of texts, as
            ``[web, wiki]`` or ``{"web": web, "wiki": wiki}``, or sources, as ``["web.jsonl", "wiki.jsonl"]`` or
            ``[{"source": "allenai/c4", "subset": "en", "split": "validation"}]``. Texts that the general scores were
            made from are left out.
        budget_windows: Windows of each text.
        budget_length: Tokens in a window; None: 1,024, at most the model's context.
        model: What was scored; needed with ``budget_text``.
        tokenizer: The model's.
        progress: Show a bar on stderr.

    Raises:
        InputError: naming the argument that is wrong.
    """
    command = as_call(choose, locals())
    if edit is None:
        edit = "gains" if budget is not None or CONTRASTS.make(contrast).for_gains_only else "zero"
    check_budget(EDITS.name_of(EDITS.make(edit)), budget, budget_text, scale)
    folders = _folders(general)
    choice: dict[str, Any] = {"num_neurons": num_neurons, "share": share, "contrast": contrast, "scope": scope}
    choice |= {"layers": layers, "protect": protect, "control": control, "seed": seed}
    if budget_text and num_weights is None and budgets is None:
        check_windows(budget_windows, budget_length)
        sources = _budget_sources(budget_text)
        if model is None:
            raise InputError("budget_text is read by the model; give model=model, tokenizer=tokenizer")
        _require_unedited(model)
        dose = make_dose(folders, _folders(behaviour), **choice)
        with borrowed(model) as source:
            encoder = encoder_of(model, tokenizer, source)
            texts = held_back(sources, encoder, folders, num_windows=budget_windows, length=budget_length, seed=seed)
            plan = _spent(dose, model, texts, budget, scale, progress)
    else:
        choice |= {"num_weights": num_weights, "budgets": budgets, "scale": 1.0 if budget else scale}
        plan = make_plan(folders, _folders(behaviour), **choice, edit=edit)
    return replace(plan, command=command)


def _budget_sources(texts: BudgetTexts) -> list[BudgetSource]:
    """The sources of held-back text: for each kind where it is, or its texts themselves.

    Raises:
        InputError: if one is neither, or a source is not there.
    """
    if isinstance(texts, str | Path):
        raise InputError("budget_text is one text; give a list of the kinds of text, such as [web_texts, wiki_texts]")
    if isinstance(texts, Mapping):
        return [BudgetSource(name, listed=list(listed)) for name, listed in texts.items()]
    sources = []
    for number, text in enumerate(texts, start=1):
        if isinstance(text, str) and len(text.split()) > 1 and not Path(text).exists():
            raise InputError(
                f"budget_text holds {text[:40]!r}, which is a text and no source; give a list of texts for each kind, "
                "such as [web_texts, wiki_texts]"
            )
        if isinstance(text, str | Path | Mapping):
            sources.append(BudgetSource.of(str(text) if isinstance(text, Path) else text))
        else:
            sources.append(BudgetSource(f"text {number}", listed=list(text)))
    return sources


def _spent(
    dose: Dose,
    model: PreTrainedModel,
    texts: Sequence[BudgetText],
    budget: float | None,
    scale: float | None,
    progress: bool,
) -> PrunePlan:
    """The plan at the scale that the budget allows, found with a bar that counts the scales tried."""
    from tqdm import tqdm

    with tqdm(desc="searching", unit=" scales", disable=not progress) as bar:

        def tell(scale: float) -> None:
            bar.set_postfix_str(f"scale {scale:.4g}", refresh=False)
            bar.update()

        return spend(dose, model, texts, budget, scale, tell)


def _folders(scores: AnyScores | Sequence[AnyScores]) -> list[ScoreFolder]:
    all_scores = [scores] if isinstance(scores, Scores | ScoreFolder | str | Path) else scores
    folders = [one if isinstance(one, Scores | ScoreFolder) else ScoreFolder.open(one) for one in all_scores]
    return [one.folder if isinstance(one, Scores) else one for one in folders]


def _require_unedited(model: PreTrainedModel) -> None:
    require_free(model)
    if (other := edits_in_force.get(model)) is not None:
        raise InputError(
            f"the model is edited already, by a plan of {other.num_neurons or other.num_weights} {other.unit} "
            f"(contrast {other.contrast}); leave that block first"
        )


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
    _require_unedited(model)
    plan = plan if isinstance(plan, PrunePlan) else PrunePlan.load(plan)
    with pruned(model, plan, check_fingerprint):
        edits_in_force[model] = plan
        try:
            yield model
        finally:
            del edits_in_force[model]
