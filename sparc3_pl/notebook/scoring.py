"""``score``: what the command of that name does, on a model that is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from tqdm import tqdm

from sparc3_pl.data.reference import ReferenceData
from sparc3_pl.errors import InputError
from sparc3_pl.evaluation.results import Evaluation
from sparc3_pl.evaluation.rows import CompletionRow
from sparc3_pl.model.identity import ModelRecord, describe
from sparc3_pl.notebook.models import IN_MEMORY, as_call, borrowed, encoder_of
from sparc3_pl.notebook.scores import Scores
from sparc3_pl.runtime.progress import RunningMean
from sparc3_pl.scoring.score_run import ScoreRequest, ScoreRun, check_samples

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sparc3_pl.attribution.methods import Method
    from sparc3_pl.attribution.targets import Target
    from sparc3_pl.data.encoding import Encoder
    from sparc3_pl.data.fields import Baseline
    from sparc3_pl.model.components import Component
    from sparc3_pl.registry import Spec

__all__ = ["score"]


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    texts: Iterable[str | list[int] | Mapping[str, Any] | CompletionRow] = (),
    *,
    seq_len: int | None = None,
    num_samples: int | None = None,
    max_tokens: int | None = None,
    batch_size: int = 1,
    seed: int = 0,
    method: Spec | Method = "lrp",
    granularity: Spec | Component | list[Spec | Component] = "neuron",
    target: Spec | Target = "predicted",
    labels: Literal["data", "model"] = "data",
    signed: bool = False,
    layers: Sequence[str] | None = None,
    squares: bool | None = None,
    groups: int = 0,
    nonfinite: Literal["error", "zero"] = "error",
    sequential: str | float | None = None,
    gradient_checkpointing: bool = False,
    text_field: str = "text",
    completion_field: str | None = None,
    weight_field: str | None = None,
    weight_baseline: Baseline = "mean",
    prefix_field: str | None = None,
    gae_lambda: float = 1.0,
    label_field: str | None = None,
    answer_field: str | None = None,
    foil_field: str | None = None,
    counterfactual_field: str | None = None,
    progress: bool = True,
) -> Scores:
    """Scores the components of a model on texts, as ``sparc3 score`` does; the model is left as it was.

    The same samples give the same scores as the command, bit for bit.

    Args:
        model: A causal language model of transformers, in eval mode, on any device.
        tokenizer: The model's; None if all texts are lists of token ids. It is not changed, and needs no pad token.
        texts: Texts, lists of token ids, or records (as of a .jsonl file) with the fields that are named below;
            ``completions`` of an evaluation are such records, with the fields of ``completions.jsonl``. Not needed for
            the methods ``magnitude`` and ``random``.
        seq_len: Join the texts in their order and cut them into windows of so many tokens, special tokens included.
            None: each text is a sample.
        num_samples: How many samples; None: all.
        max_tokens: Where each text is a sample: keep only its first so many tokens.
        batch_size: Samples of one batch.
        seed: Seed of the ``random`` method, and of labels drawn from the model.
        method: ``lrp``, ``gradient``, ``wanda``, ``magnitude``, ``random``, ``activation``, ``expertise``,
            ``integrated_gradients``, ..., or a method of your own.
        granularity: ``neuron``, ``weight``, ``head``, ``channel``, ``mlp``, a component of your own, or a list.
        target: What is attributed: ``predicted``, ``completion``, ``text``, ``answer``, or a target of your own.
        labels: For target ``text``: the text's own tokens (``data``) or tokens drawn from the model (``model``).
        signed: Keep the sign of scores.
        layers: Glob patterns of linear layers, as ``["*.up_proj"]``; None: the component's own choice. The command
            calls it ``model.targets``.
        squares: Keep the mean of squared scores too, which ``contrast="t"`` needs. None: where the method can.
        groups: Keep the scores of this many groups of samples too, for ``sparc3 evidence``.
        nonfinite: ``error``, or ``zero``: NaN and infinities are counted and taken for 0.
        sequential: For ``wanda`` and single weights: a share or pattern by which layers are pruned in turn.
        gradient_checkpointing: Less memory, a third slower, the same scores.
        text_field: Field of the text in records, dots for nesting.
        completion_field: The field of what follows the text, for target ``completion``.
        weight_field: The field of the completion's weight, such as a judge's score.
        weight_baseline: What is taken off the weights: ``mean`` of all, ``prompt`` (the mean of the prompt's other
            completions), ``prefix`` (for each token, the weight expected before it; needs ``prefix_field``), ``none``.
        prefix_field: The field of the weights of the completion cut after each of its tokens, as
            ``evaluate(judge_prefixes=True)`` gives them.
        gae_lambda: With ``weight_baseline="prefix"``: how far ahead a token's credit looks, 1 to the end, 0 to the next
            token.
        label_field: The field of the text's label, for method ``expertise``.
        answer_field: The field of what the model should say next, for target ``answer``.
        foil_field: The field of what it should not say.
        counterfactual_field: The field of the text with the decisive words exchanged.
        progress: Show a bar on stderr.

    Raises:
        InputError: if the model is quantised or in training mode, samples cannot be made of the texts, or an argument
            is wrong.
    """
    command = as_call(score, locals())
    settings: dict[str, Any] = {"method": method, "granularity": granularity, "target": target, "labels": labels}
    settings |= {"layers": None if layers is None else list(layers), "signed": signed, "groups": groups}
    settings |= {"nonfinite": nonfinite, "seed": seed, "gradient_checkpointing": gradient_checkpointing}
    settings |= {"sequential": None if sequential is None else str(sequential)}
    request = _request(squares, **settings)
    with borrowed(model) as source, torch.enable_grad():
        data = None
        if records := _records(texts, text_field):
            data = ReferenceData.of_records(
                records, IN_MEMORY, seq_len=seq_len, num_samples=num_samples, max_tokens=max_tokens, seed=seed,
                batch_size=batch_size, text_field=text_field, completion_field=completion_field,
                weight_field=weight_field, weight_baseline=weight_baseline, prefix_field=prefix_field,
                gae_lambda=gae_lambda, label_field=label_field, answer_field=answer_field, foil_field=foil_field,
                counterfactual_field=counterfactual_field,
            )  # fmt: skip
        elif request.method.object.needs_samples:
            raise InputError(f"texts is empty, and method {request.method.name} needs samples; give a list of texts")
        encoder, about = encoder_of(model, tokenizer, source), describe(model, source)
        run = _run(model, encoder, request, about, data, progress)
        return Scores(run.in_memory(IN_MEMORY, command))


def _request(squares: bool | None, **settings: Any) -> ScoreRequest:
    """The request; with ``squares`` None, squares are kept if the method can."""
    if squares is None:
        request = ScoreRequest.of(**settings)
        components = (choice.object for choice in request.components)
        squares = all("squares" in request.method.object.heeds(component) for component in components)
    return ScoreRequest.of(**settings, squares=squares)


def _records(
    texts: Iterable[str | list[int] | Mapping[str, Any] | CompletionRow], text_field: str
) -> list[dict[str, Any]]:
    if isinstance(texts, str | Mapping):
        raise InputError(f"texts is one {type(texts).__name__}; give a list, such as [text]")
    if isinstance(texts, Evaluation):
        raise InputError("texts is an evaluation; give its completions")
    records = (text.to_json() if isinstance(text, CompletionRow) else text for text in texts)
    return [dict(text) if isinstance(text, Mapping) else _nested(text_field, text) for text in records]


def _nested(field: str, value: Any) -> dict[str, Any]:
    for name in reversed(field.split(".")):
        value = {name: value}
    return value


def _run(
    model: PreTrainedModel,
    encoder: Encoder,
    request: ScoreRequest,
    about_model: ModelRecord,
    data: ReferenceData | None,
    progress: bool,
) -> ScoreRun:
    """The whole pass; ``ScoringModule`` takes the same steps in the Trainer's hooks."""
    account, batches = None, []
    if data is not None:
        data.read(encoder)
        check_samples(request, data.samples)
        sample = data.samples[0].input_ids
        account = request.method.object.check(model, sample)
        request.target.object.check(model, sample)
        batches = data.predict_dataloader() if request.method.object.needs_samples else []
    about = request.about(about_model, {"source": None} if data is None else data.describe())
    run = ScoreRun(request.scorer(model), replace(about, relevance_account=account), None)
    relevance = RunningMean()
    total = len(data.samples) if batches and data is not None else 0
    with tqdm(total=total, desc="scoring", unit=" samples", disable=not progress) as bar:
        for batch in batches:
            run.add(batch)
            for one in run.samples[bar.n :]:
                if one.relevance is not None:
                    relevance.add(one.relevance)
            bar.update(len(batch.ids))
            if relevance.count > 1:
                bar.set_postfix_str(f"relevance {relevance.mean:.4g} ± {relevance.standard_error:.2g}")
    return run
