"""``evaluate`` and ``compare``: what the commands ``eval`` and ``compare`` do, on a model that is loaded."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from sparc3_pl.data.evaluation_data import EvaluationData, Windows
from sparc3_pl.errors import InputError
from sparc3_pl.evaluation.compare import Comparison, compare_evaluations
from sparc3_pl.evaluation.evaluation_run import EvaluatedModel, EvaluationRun
from sparc3_pl.evaluation.further_text import FurtherText
from sparc3_pl.evaluation.generation import Sampling
from sparc3_pl.evaluation.judges import Judge, chosen_judges
from sparc3_pl.evaluation.measurement import chosen_measurements
from sparc3_pl.evaluation.measurement_run import Subject, units_of
from sparc3_pl.evaluation.results import Evaluation
from sparc3_pl.evaluation.settings import EvaluationSettings
from sparc3_pl.evaluation.words import WordFilter
from sparc3_pl.model.identity import describe, fingerprint
from sparc3_pl.notebook.models import IN_MEMORY, as_call, borrowed, edits_in_force, encoder_of
from sparc3_pl.runtime.progress import Watch
from sparc3_pl.statistics.paired import NUM_RESAMPLES

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sparc3_pl.evaluation.measurement import Measurement
    from sparc3_pl.registry import Spec

__all__ = ["compare", "evaluate"]


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    text: str | Sequence[str] | None = None,
    prompts: Sequence[str] | None = None,
    judge: Judge | None = None,
    judges: Mapping[str, Judge] | None = None,
    judge_prefixes: bool = False,
    neutral: Sequence[str] | None = None,
    further_texts: Mapping[str, str | Sequence[str]] | None = None,
    word_filter: str | None = None,
    word_filter_tries: int = 10,
    measurements: Sequence[Spec | Measurement] = (),
    max_length: int | None = None,
    stride: int | None = None,
    windows: Windows = "sliding",
    max_new_tokens: int = 50,
    temperature: float = 0.7,
    top_p: float = 0.9,
    samples_per_prompt: int = 1,
    seed: int = 0,
    batch_size: int | None = None,
    generation_batch_size: int | None = None,
    window_batch_size: int = 1,
    allow_overlap: bool = False,
    progress: bool = True,
) -> Evaluation:
    """Measures a model as ``sparc3 eval`` does: perplexity of a text, judged completions of prompts, or both.

    Inside an ``edited`` block the results name the plan, and prompts that the plan was made from are refused.

    Args:
        model: A causal language model of transformers, in eval mode, on any device. It is left as it was.
        tokenizer: The model's. It is not changed, and needs no pad token.
        text: For perplexity: one text, read verbatim, or documents, joined by an empty line.
        prompts: Prompts to complete.
        judge: Scores completions in [0, 1]; None: Detoxify ``original``, or for the demo model the demo's own judge.
        judges: Further judges of the same completions, by name.
        judge_prefixes: Have the judge score each completion also as it stands after each of its tokens, for
            ``score(weight_baseline="prefix")``.
        neutral: Prompts far from the behaviour: completed and judged too, in figures of their own.
        further_texts: By name, texts like ``text``, for a perplexity of each.
        word_filter: A file of words, or ``default``: a completion that holds a listed word is drawn again.
        word_filter_tries: Most tries for each completion; the last one is kept.
        measurements: Measurements of your own, or ``{"class_path": "pairs", "init_args": {...}}``.
        max_length: Perplexity window in tokens; None: the model's context, at most 2048.
        stride: Tokens from one window to the next; None: ``max_length``.
        windows: ``sliding``, or ``published``: as SparseGPT and Wanda measure.
        max_new_tokens: Length at which a completion is cut.
        temperature: Sampling temperature; 0: greedy.
        top_p: Nucleus sampling; 1: all tokens.
        samples_per_prompt: Completions per prompt.
        seed: Fixes, with the prompt and the number of the completion, every random choice.
        batch_size: The most prompts of one batch; None: as many as are completed at once.
        generation_batch_size: The most completions made at once; None: as many as save time and fit into memory. It
            changes no completion, only speed and memory.
        window_batch_size: Windows of one batch.
        allow_overlap: Evaluate also on prompts from which the plan was made; the results say so.
        progress: Show a bar on stderr.

    Raises:
        InputError: if the model is quantised or in training mode, there is nothing to measure, prompts are not held
            out, or an argument is wrong.
    """
    command = as_call(evaluate, locals())
    for name, listed in (("prompts", prompts), ("neutral", neutral)):
        if isinstance(listed, str):
            raise InputError(f"{name} is one text; give a list, such as [prompt]")
    if text is None and prompts is None and not measurements and not further_texts:
        raise InputError("there is nothing to evaluate; give text, prompts or measurements")
    sampling = Sampling(max_new_tokens, temperature, top_p, samples_per_prompt, seed)
    words = None if word_filter is None else WordFilter.of(word_filter, word_filter_tries, temperature)
    with borrowed(model) as source:
        encoder = encoder_of(model, tokenizer, source)
        main, further = chosen_judges(judge, judges, source.pretrained)
        settings = EvaluationSettings(
            sampling, main, further, judge_prefixes, words, generation_batch_size, max_length, stride, windows
        )
        options = {"seed": seed, "batch_size": batch_size, "window_batch_size": window_batch_size}
        data = EvaluationData.of_lists(text, prompts, IN_MEMORY, neutral, **options)
        data.read(encoder)
        size = settings.window(encoder.context)
        more = [
            FurtherText(name, IN_MEMORY, **vars(size), batch_size=window_batch_size, listed=listed)
            for name, listed in (further_texts or {}).items()
        ]
        choices = chosen_measurements([*measurements, *more])
        subject = Subject(model, encoder, settings, data, None if text is None else size, choices)
        units = units_of(choices, encoder)
        data.plan_batches(subject.window, units, settings.prompts_at_once)
        plan = edits_in_force.get(model)
        about = describe(model, source, None if plan is None else plan.fingerprint)
        evaluated = EvaluatedModel.of(about, fingerprint(model), plan, subject, units)
        if not allow_overlap:
            evaluated.require_held_out([*data.prompt_ids, *data.neutral_ids])
        run = EvaluationRun.of(evaluated, subject)
        watch = Watch(data.shares())
        with tqdm(data.test_dataloader(), desc="evaluating", unit=" batches", disable=not progress) as batches:
            for batch in batches:
                start = time.monotonic()
                done = run.add(batch)
                watch.took(done.unit, time.monotonic() - start)
                batches.set_postfix_str(watch.text(done))
        run.finish(data.describe())
    assert run.evaluation is not None
    return replace(run.evaluation, path=Path(IN_MEMORY)).sealed(command=command)


def compare(
    before: Evaluation | str | Path,
    after: Evaluation | str | Path,
    *,
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
) -> Comparison:
    """Compares two evaluations of the same prompts and text, before and after an edit, as ``sparc3 compare`` does.

    Args:
        before: Evaluation of the model as it was, or the path of its folder.
        after: Evaluation of the edited model, or its path.
        seed: Seed of the resampling.
        num_resamples: Resamples of every interval and test.

    Raises:
        InputError: if the two differ in prompts, text, settings or judge, or a folder is damaged.
    """
    sides = (_named(before, "before"), _named(after, "after"))
    return compare_evaluations(*sides, seed=seed, num_resamples=num_resamples)


def _named(side: Evaluation | str | Path, name: str) -> Evaluation:
    """The evaluation at ``side``, opened if it is a path; one in memory gets ``name`` for its path."""
    if not isinstance(side, Evaluation):
        return Evaluation.open(side)
    return replace(side, path=Path(name)) if side.path == Path(IN_MEMORY) else side
