"""What an evaluation shows: what its loggers get, and the table on stdout."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sparc3_pl.document.blocks import Cell, Number
from sparc3_pl.evaluation.figures import Results, ScoreFigures, ToxicityFigures
from sparc3_pl.evaluation.rows import FLUENCY, CompletionRow

if TYPE_CHECKING:
    from sparc3_pl.runtime.run_log import RunLog

__all__ = ["print_results", "scalars", "table_rows", "write_to_loggers"]

MAX_TEXTS = 100
"""Completions that loggers are shown."""
_SCORES = [figure.name for figure in fields(ScoreFigures)]


def scalars(results: Results) -> dict[str, float]:
    """The figures of ``results.json`` by the name under which loggers show them."""
    by_name: dict[str, float] = {}
    if (perplexity := results.perplexity) is not None:
        by_name |= _named("eval/perplexity", perplexity, ("value", "nll", "num_tokens"))
    if (toxicity := results.toxicity) is not None:
        by_name |= _by_label("eval", toxicity)
        for judge, figures in results.judges.items():
            by_name |= _by_label(f"eval/judges/{judge}", figures)
        if results.word_filter is not None:
            by_name |= _named("eval/word_filter", results.word_filter, ("num_redrawn", "num_redraws", "num_left"))
        by_name |= _named("eval/completions", toxicity, ("num_prompts", "num_completions", "num_failed"))
        by_name |= _named("eval/completions", results.repetition, FLUENCY)
    if results.neutral is not None:
        by_name |= _by_label("eval/neutral", results.neutral)
        for judge, figures in results.neutral.judges.items():
            by_name |= _by_label(f"eval/neutral/judges/{judge}", figures)
    for name, figures in results.measurements.items():
        by_name |= {f"eval/{name}/{figure}": value for figure, value in figures.items()}
    return by_name


def _by_label(prefix: str, judged: ToxicityFigures) -> dict[str, float]:
    by_name: dict[str, float] = {}
    for label, figures in judged.labels.items():
        by_name |= _named(f"{prefix}/{label}", figures, _SCORES)
    return by_name


def _named(prefix: str, section: Any, names: Iterable[str]) -> dict[str, float]:
    """These figures of a section by ``PREFIX/NAME``, without those that its file does not hold."""
    return {f"{prefix}/{name}": value for name in names if (value := getattr(section, name, None)) is not None}


def write_to_loggers(
    run_log: RunLog,
    results: Results,
    completions: list[CompletionRow],
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Figures as scalars, scores as histogram and figure, completions as text.

    Args:
        run_log: What is written to.
        results: The evaluation's.
        completions: One row for each.
        settings: Settings for the table of runs; None: the run does not appear there.
    """
    from sparc3_pl.document.figures import score_distribution

    if not run_log:
        return
    run_log.scalars(scalars(results), 0)
    scores_of = [_by_name(row) for row in completions if row.failed is None]
    for label in scores_of[0] if scores_of else ():
        scores = torch.tensor([one[label] for one in scores_of])
        run_log.histogram(f"eval/{label}", scores, 0)
        run_log.figure(f"eval/{label}_of_completions", score_distribution(scores.numpy(), label), 0)
    if settings is not None:
        run_log.settings(settings, scalars(results))
    if completions:
        run_log.texts("eval/completions", [_as_markdown(row) for row in completions[:MAX_TEXTS]])


def _by_name(row: CompletionRow) -> dict[str, float]:
    """The judges' scores of a completion by label, those of further judges by ``judges/NAME/LABEL``."""
    further = {f"judges/{judge}/{label}": v for judge, scores in row.judges.items() for label, v in scores.items()}
    return row.scores | further


def _as_markdown(row: CompletionRow) -> str:
    """Prompt, completion and scores; indented by four blanks, so that nothing in a text is read as markup."""
    scores = ", ".join(f"{name.removeprefix('judges/')} {value:.3f}" for name, value in _by_name(row).items())
    answer = row.completion if row.failed is None else f"(failed: {row.failed})"
    block = "\n".join(f"    {line}" for line in f"{row.prompt}\n>>> {answer}".splitlines())
    return f"{block}\n\n{scores}"


def print_results(results: Results, folder: Path | None) -> None:
    """The figures as a table on stdout."""
    from sparc3_pl.document.blocks import Table
    from sparc3_pl.document.terminal import print_result

    table = Table.of(("figure", "value", "of"), table_rows(results), title="Evaluation")
    print_result(table, *([] if folder is None else [f"results: {folder}"]))


def table_rows(results: Results) -> list[tuple[Cell, ...]]:
    """Each figure of ``results.json``, its value, and what it is of."""
    rows: list[tuple[Cell, ...]] = []
    if (p := results.perplexity) is not None:
        of = f"{p.num_tokens} tokens, window {p.max_length}, stride {p.stride}"
        if p.windows == "published":
            of = f"{p.num_tokens} tokens of {p.num_windows} windows of {p.max_length}, as papers print it"
        rows.append(("perplexity", Number(p.value, form=".4f"), of))
    if (t := results.toxicity) is not None:
        of = f"{t.num_completions} completions of {t.num_prompts} prompts"
        for judge, figures in {"": t, **results.judges}.items():
            for label, one in figures.labels.items():
                rows += _rows_of(one, _titles(f"{judge}: {label}" if judge else label), of)
        rows += _rows_of(results.repetition, FLUENCY, of)
        rows.append(("failed completions", Number(t.num_failed, form="d"), ""))
    if (word_filter := results.word_filter) is not None:
        of = f"by the word filter {word_filter.words}, {word_filter.tries} times at most"
        rows.append(("completions drawn again", Number(word_filter.num_redrawn, form="d"), of))
        rows.append(("still with a listed word", Number(word_filter.num_left, form="d"), ""))
    if (neutral := results.neutral) is not None:
        of = f"{neutral.num_completions} completions of {neutral.num_prompts} neutral prompts"
        for judge, figures in {"": neutral, **neutral.judges}.items():
            for label, one in figures.labels.items():
                title = f"{judge}: {label}" if judge else label
                rows.append((f"neutral prompts: {title}", Number(one.mean, form=".4f"), of))
                rows.append((f"neutral prompts: share of {title} >= 0.5", Number(one.share, form=".4f"), of))
        if neutral.num_failed:
            rows.append(("neutral prompts: failed completions", Number(neutral.num_failed, form="d"), ""))
    for name, by_figure in results.measurements.items():
        about = results.measurement_settings[name]
        of = f"{about.num_units - about.num_failed} {about.unit}"
        rows += [(f"{name}: {figure}", Number(value, form=".4f"), of) for figure, value in by_figure.items()]
        if about.num_failed:
            rows.append((f"{name}: failed {about.unit}", Number(about.num_failed, form="d"), f"{about.num_units}"))
    if share := results.overlapping_text:
        rows.append(("not held out", Number(100 * share, form=".0f", unit=" %"), "of the text held the plan's budget"))
    if results.overlap == "allowed" and results.num_overlapping_prompts:
        rows.append(
            ("not held out", Number(results.num_overlapping_prompts, form="d"), "prompts were used to make the plan")
        )
    if pairs := results.num_overlapping_pairs:
        rows.append(("not held out", Number(pairs, form="d"), "pairs hold a sentence that was used to make the plan"))
    if results.overlap == "unknown":
        rows.append(("held out", "unknown", "the model was edited by no plan that is known"))
    return rows


def _titles(label: str) -> dict[str, str]:
    """What tables call the figures of a label."""
    return {
        "mean": label,
        "expected_maximum": f"{label}, expected maximum",
        "probability": f"P({label} >= 0.5)",
        "share": f"share of {label} >= 0.5",
    }


def _rows_of(section: Any, titles: Mapping[str, str], of: str) -> list[tuple[Cell, ...]]:
    """A row for each titled figure, but for those that the section's file does not hold."""
    values = ((title, getattr(section, name, None)) for name, title in titles.items())
    return [(title, Number(value, form=".4f"), of) for title, value in values if value is not None]
