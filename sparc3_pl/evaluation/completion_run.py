"""Completions of prompts, judged: made in batches, kept while a run goes on, and turned into figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from sparc3_pl.data.evaluation_data import PromptBatch
from sparc3_pl.errors import InputError
from sparc3_pl.evaluation.generation import Completion, Generator
from sparc3_pl.evaluation.judges import Judge, SequenceJudge, describe_judge, judged
from sparc3_pl.evaluation.measurement_run import MeasurementRun, Outcome
from sparc3_pl.evaluation.repetition import Repetition, uniqueness
from sparc3_pl.evaluation.results import CompletionStore
from sparc3_pl.evaluation.rows import CompletionRow
from sparc3_pl.evaluation.toxicity import CompletionToxicity
from sparc3_pl.runtime.collectives import gather_lists
from sparc3_pl.runtime.processes import kept

__all__ = ["CompletionRun"]


class CompletionRun(MeasurementRun):
    """Completes prompts and has the completions judged. Every rank makes one, also one without prompts.

    The judge is tried on one sentence: a rank without prompts must know the labels too.

    Args:
        generator: Completes prompts.
        judge: Scores completions.
        device: Of the sums that the ranks add up.
        judge_device: Where a judge that is loaded here runs, unless it says so itself.

    Raises:
        InputError: if the judge fails on the trial sentence.
    """

    takes = PromptBatch

    def __init__(
        self, generator: Generator, judge: Judge, device: torch.device, judge_device: torch.device | None = None
    ) -> None:
        self.generator, self.judge = generator, judge
        if isinstance(judge, SequenceJudge):
            judge.place(judge_device or device)
        self.toxicity = CompletionToxicity(tuple(judged(judge, ["This is a sentence."]))).to(device)
        self.repetition = Repetition().to(device)
        self.rows: list[CompletionRow] = []
        """One for each completion of this rank."""
        self._store: CompletionStore | None = None
        self._earlier: dict[str, list[CompletionRow]] = {}
        self._count([])  # so that a rank without prompts takes part like the others

    def keep(self, output: str, about: Mapping[str, Any], rank: int) -> None:
        """Keeps completions beside ``output`` until ``remove_kept``, and takes up those that an earlier run has left.

        Args:
            output: The evaluation folder to be.
            about: What completions depend on besides generator and judge: the weights and their precision.
            rank: Of this process.
        """
        key = {**about, "generation": self.generator.describe(), "judge": describe_judge(self.judge)}
        self._store = CompletionStore(output, key, rank)
        self._earlier = self._store.load()
        if self._earlier:
            kept(self._store.folder)
        gather_lists([])  # all have read before anyone writes

    def add(self, batch: PromptBatch) -> None:
        """Completes the prompts of a batch, but for those that are done already.

        Raises:
            InputError: if the judge does not keep to its labels, or completions cannot be kept.
        """
        finished = {i: rows for i in batch.ids if (rows := self._finished(i)) is not None}
        todo = [(i, p) for i, p in zip(batch.ids, batch.prompts, strict=True) if i not in finished]
        rows = [row for i in finished for row in finished[i]]
        if todo:
            fresh = _judged_rows(self.generator(*zip(*todo, strict=True)), self.judge, self.toxicity.labels)
            if self._store is not None:
                self._store.add(fresh)
                kept(self._store.folder)
            rows += fresh
        self._count(rows)

    def _finished(self, prompt_id: str) -> list[CompletionRow] | None:
        """The prompt's completions, if an interrupted run has left all of them."""
        rows = {row.k: row for row in self._earlier.get(prompt_id, [])}
        count = self.generator.sampling.samples_per_prompt
        return [rows[k] for k in range(count)] if rows.keys() >= set(range(count)) else None

    def _count(self, rows: list[CompletionRow]) -> None:
        columns = {label: [row.scores.get(label, 0.0) for row in rows] for label in self.toxicity.labels}
        scores = {label: torch.tensor(column, dtype=torch.float64) for label, column in columns.items()}
        has_failed = [row.failed is not None for row in rows]
        self.toxicity.update([row.id for row in rows], scores, has_failed)
        self.repetition.update([row.tokens for row in rows if row.failed is None])
        self.rows += rows

    def status(self) -> dict[str, float]:
        """Figures of this rank so far; nothing before the first completion."""
        if not (count := int(self.toxicity.num_completions)):
            return {}
        labels = self.toxicity.labels
        main = labels.index("toxicity") if "toxicity" in labels else 0  # the headline figure of the results
        return {labels[main]: float(self.toxicity.score_sum[main]) / count, "failed": int(self.toxicity.num_failed)}

    def finish(self, data: dict[str, Any]) -> Outcome:
        """The figures, and the completions in the order of prompts and numbers."""
        if self._store is not None:
            self._store.close()
        rows = sorted(gather_lists(self.rows), key=lambda row: (row.id, row.k))
        assert len({(row.id, row.k) for row in rows}) == len(rows), "a completion was counted twice"
        toxicity = self.toxicity.compute()
        label = next(iter(toxicity["labels"]))
        main = "toxicity" if "toxicity" in toxicity["labels"] else label
        results = {
            "toxicity": {**toxicity["labels"][main], "label": main, **toxicity},
            "repetition": {"uniqueness": float(self.repetition.compute())},
            "generation": self.generator.describe(),
            "judge": describe_judge(self.judge),
        }
        return Outcome(results, completions=rows)

    def remove_kept(self) -> None:
        """Deletes what was kept: the results are written."""
        if self._store is not None:
            self._store.remove()
            kept(self._store.folder, exists=False)


def _judged_rows(completions: Sequence[Completion], judge: Judge, labels: Sequence[str]) -> list[CompletionRow]:
    """Completions with their scores, to 6 decimals: what a batch's padding adds in the last bits is dropped."""
    texts = [c.text for c in completions if c.text is not None]
    scores = judged(judge, texts) if texts else {label: torch.zeros(0) for label in labels}
    if tuple(scores) != tuple(labels):
        raise InputError(
            f"judge {type(judge).__name__}: labels {list(scores)} were {list(labels)} before; keep to one set"
        )
    by_text = iter([{label: round(float(s[i]), 6) for label, s in scores.items()} for i in range(len(texts))])
    return [_row(c, next(by_text) if c.text is not None else {}) for c in completions]


def _row(completion: Completion, scores: dict[str, float]) -> CompletionRow:
    ok = completion.failed is None
    return CompletionRow(
        id=completion.id,
        prompt=completion.prompt,
        k=completion.k,
        completion=completion.text,
        scores=scores,
        seed=completion.seed,
        num_tokens=len(completion.tokens) if ok else None,
        uniqueness=uniqueness(completion.tokens) if ok else None,
        failed=completion.failed,
        tokens=list(completion.tokens),
        completion_ids=completion.drawn if ok else None,
    )
