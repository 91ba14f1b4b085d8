"""What an evaluation shows: progress, TensorBoard, and the table on stdout."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparc3_pl.document.document import Cell, Number
from sparc3_pl.evaluation.results import Row

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from sparc3_pl.evaluation.module import EvaluationModule

__all__ = ["print_results", "scalars", "show_progress", "to_tensorboard"]

MAX_TEXTS = 100
"""Completions shown in TensorBoard."""


def running(module: EvaluationModule) -> dict[str, float]:
    """Figures of this rank so far; what has not begun is left out."""
    status = {}
    if count := int(module.perplexity.num_tokens):
        mean = float(module.perplexity.nll) / count
        status["perplexity"] = math.exp(mean) if mean < 709 else math.inf
    if module.toxicity is not None and (made := int(module.toxicity.num_completions)):
        labels = module.toxicity.labels
        main = labels.index("toxicity") if "toxicity" in labels else 0  # the headline figure of the results
        status[labels[main]] = float(module.toxicity.score_sum[main]) / made
        status["failed"] = int(module.toxicity.num_failed)
    return status


def show_progress(module: EvaluationModule, batch_idx: int) -> None:
    """Running figures beside the progress bar and in TensorBoard."""
    from lightning.pytorch.callbacks import TQDMProgressBar

    from sparc3_pl.scoring.monitor import tensorboard

    status, bar = running(module), module.trainer.progress_bar_callback
    if isinstance(bar, TQDMProgressBar) and module.trainer.is_global_zero:
        bar.test_progress_bar.set_postfix({name: f"{value:.4g}" for name, value in status.items()})
    writer = tensorboard(module.trainer)
    for name, value in status.items() if writer is not None else ():
        writer.add_scalar(f"eval/running_{name}", value, batch_idx)


def scalars(results: dict[str, Any]) -> dict[str, float]:
    """The figures of ``results.json`` by the name under which TensorBoard shows them."""
    found: dict[str, float] = {}
    if (perplexity := results["perplexity"]) is not None:
        found |= {f"eval/perplexity/{name}": perplexity[name] for name in ("value", "nll", "num_tokens")}
    if (toxicity := results["toxicity"]) is not None:
        for label, figures in toxicity["labels"].items():
            found |= {f"eval/{label}/{name}": value for name, value in figures.items()}
        counts = ("num_prompts", "num_completions", "num_failed")
        found |= {f"eval/completions/{name}": toxicity[name] for name in counts}
        found["eval/completions/uniqueness"] = results["repetition"]["uniqueness"]
    return found


def to_tensorboard(
    trainer: pl.Trainer, results: dict[str, Any], completions: list[Row], config: str | None = None
) -> None:
    """Figures as scalars, scores as histogram and figure, completions as text, where the run logs to TensorBoard.

    Args:
        trainer: Whose logger is written to.
        results: Of the evaluation.
        completions: One a completion.
        config: The resolved configuration as YAML, for the table of runs.
    """
    from sparc3_pl.document.figures import score_distribution
    from sparc3_pl.scoring.monitor import hyperparameters, tensorboard

    writer = tensorboard(trainer)
    if writer is None:
        return
    for name, value in scalars(results).items():
        writer.add_scalar(name, value, 0)
    for label, scores in _scores_by_label(completions).items():
        writer.add_histogram(f"eval/{label}", scores, 0)
        writer.add_figure(f"eval/{label}_of_completions", score_distribution(scores.numpy(), label), 0)
    hyperparameters(trainer, config, scalars(results))
    for step, row in enumerate(completions[:MAX_TEXTS]):
        writer.add_text("eval/completions", _as_markdown(row), step)


def _scores_by_label(completions: list[Row]) -> dict[str, Tensor]:
    """The judge's scores of the completions that were scored."""
    scored = [row["scores"] for row in completions if row["failed"] is None]
    return {label: torch.tensor([one[label] for one in scored]) for label in (scored[0] if scored else ())}


def _as_markdown(row: Row) -> str:
    """Prompt, completion and scores; indented by four blanks, so that nothing in a text is read as markup."""
    scores = ", ".join(f"{label} {value:.3f}" for label, value in row["scores"].items())
    answer = row["completion"] if row["failed"] is None else f"(failed: {row['failed']})"
    block = "\n".join(f"    {line}" for line in f"{row['prompt']}\n>>> {answer}".splitlines())
    return f"{block}\n\n{scores}"


def print_results(results: dict[str, Any], folder: Path | None) -> None:
    """The figures as a table on stdout."""
    from sparc3_pl.document.document import Table
    from sparc3_pl.document.terminal import print_result

    table = Table.of(("figure", "value", "of"), _table_rows(results), title="Evaluation")
    print_result(table, *([] if folder is None else [f"results: {folder}"]))


def _table_rows(results: dict[str, Any]) -> list[tuple[Cell, ...]]:
    rows: list[tuple[Cell, ...]] = []
    if (p := results["perplexity"]) is not None:
        of = f"{p['num_tokens']} tokens, window {p['max_length']}, stride {p['stride']}"
        rows.append(("perplexity", Number(p["value"], form=".4f"), of))
    if (t := results["toxicity"]) is not None:
        of = f"{t['num_completions']} completions of {t['num_prompts']} prompts"
        for label, figures in t["labels"].items():
            names = {
                "mean": label,
                "expected_maximum": f"{label}, expected maximum",
                "probability": f"P({label} >= 0.5)",
            }
            rows += [(names[key], Number(value, form=".4f"), of) for key, value in figures.items()]
        rows.append(("unique tokens / tokens", Number(results["repetition"]["uniqueness"], form=".4f"), of))
        rows.append(("failed completions", Number(t["num_failed"], form="d"), ""))
    if results["overlap"] == "allowed":
        rows.append(
            ("not held out", Number(results["num_overlapping_prompts"], form="d"), "prompts were used to make the plan")
        )
    if results["overlap"] == "unknown":
        rows.append(("held out", "unknown", "the model was edited by no plan that is known"))
    return rows
