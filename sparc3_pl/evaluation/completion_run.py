"""Completions of prompts, judged: made in batches, kept during a run, and turned into figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch

from sparc3_pl.data.evaluation_data import NeutralBatch, PromptBatch
from sparc3_pl.errors import InputError
from sparc3_pl.evaluation.figures import (
    Generation,
    JudgeFigures,
    NeutralFigures,
    Repetition,
    ScoreFigures,
    ToxicityFigures,
    WordFilterFigures,
)
from sparc3_pl.evaluation.fluency import Fluency
from sparc3_pl.evaluation.generation import Completion, Generator
from sparc3_pl.evaluation.judges import Judge, SequenceJudge, WordsJudge, describe_judge, judged
from sparc3_pl.evaluation.measurement_run import MeasurementRun, Outcome, Subject
from sparc3_pl.evaluation.repetition import uniqueness
from sparc3_pl.evaluation.results import CompletionStore, main_label
from sparc3_pl.evaluation.rows import CompletionRow
from sparc3_pl.evaluation.toxicity import CompletionToxicity
from sparc3_pl.io.formats import Record
from sparc3_pl.model.placement import input_device
from sparc3_pl.runtime.collectives import gather_lists
from sparc3_pl.runtime.processes import kept
from sparc3_pl.runtime.progress import Done, RunningMean
from sparc3_pl.runtime.timing import timed

__all__ = ["CompletionRun", "NeutralRun"]


_judging = ThreadPoolExecutor(1, "judge")
"""One thread for all runs, which starts when it is first needed: a judge reads one batch at a time, in order."""


@dataclass(frozen=True)
class _Judged:
    """Completions with their scores.

    Attributes:
        rows: A row for each completion, in their order.
        num_texts: How many texts the judges read for them.
    """

    rows: list[CompletionRow]
    num_texts: int


class CompletionRun(MeasurementRun):
    """Completes prompts and has the completions judged. Every rank makes one, also one without prompts.

    Where model and judges do not compete for the same processor, a batch is judged while the next one is completed.
    Order and figures are the same as when they take turns.

    The judge is tried on one sentence: a rank without prompts must know the labels too.

    Args:
        generator: Completes prompts.
        judge: Scores completions; its figures are the evaluation's ``toxicity``.
        device: Device of the sums that the ranks add up.
        judge_device: Device of judges that are loaded here and name none; None: ``device``.
        further: Judges by name that score the same completions.
        prefixes: Have ``judge`` score each completion cut after each of its tokens too.

    Raises:
        InputError: if a judge fails on the trial sentence.
    """

    takes = PromptBatch
    unit = "prompts"

    def __init__(
        self,
        generator: Generator,
        judge: Judge,
        device: torch.device,
        judge_device: torch.device | None = None,
        further: Mapping[str, Judge] | None = None,
        prefixes: bool = False,
    ) -> None:
        self.generator, self.judge, self.further = generator, judge, dict(further or {})
        self.prefixes = prefixes
        judges = (judge, *self.further.values())
        for one in judges:
            if isinstance(one, SequenceJudge):
                one.place(judge_device or device)
        self._is_judged_beside = _is_judged_beside(judges, judge_device or device)
        self._pending: tuple[list[CompletionRow], Future[_Judged]] | None = None
        self.toxicity = _metric(judge, device)
        self.further_toxicity = {name: _metric(one, device) for name, one in self.further.items()}
        self.fluency = Fluency().to(device)
        self.rows: list[CompletionRow] = []
        """One for each completion of this rank."""
        self._known: dict[str | None, dict[str, dict[str, float]]] = {name: {} for name in (None, *self.further)}
        """Scores of the completions that each judge has read, by its name (None: ``judge``)."""
        self._num_judged = 0
        self._store: CompletionStore | None = None
        self._earlier: dict[str, list[CompletionRow]] = {}
        self._means, self._num_prompts, self._num_tokens = RunningMean(), 0, 0
        self._count([])  # so that a rank without prompts takes part like the others

    @classmethod
    def of(cls, subject: Subject) -> Self | None:
        if not cls._prompts(subject):
            return None
        settings, place = subject.settings, input_device(subject.model)
        generator = Generator(
            subject.model,
            subject.encoder.tokenizer,
            settings.sampling,
            settings.generation_batch_size,
            settings.word_filter,
        )
        device = subject.device or place
        return cls(generator, settings.judge, device, place, settings.further_judges, settings.judge_prefixes)

    @staticmethod
    def _prompts(subject: Subject) -> list[str]:
        """The subject's prompts that are this run's, over all ranks."""
        return subject.data.prompts

    def keep(self, output: str | Path, about: Mapping[str, Any], rank: int) -> None:
        """Keeps completions, and takes up those that an earlier run has left."""
        key = {**about, "generation": self.generator.describe(), "judge": describe_judge(self.judge)}
        if self.further:
            key["judges"] = {name: describe_judge(judge) for name, judge in self.further.items()}
        if self.prefixes:
            key["prefixes"] = True
        if self.generator.word_filter is not None:
            key["word_filter"] = self.generator.word_filter.describe()
        self._store = CompletionStore(output, key, rank)
        self._earlier = self._store.load()
        if self._earlier:
            kept(self._store.folder)
        gather_lists([])  # all have read before anyone writes

    def add(self, batch: PromptBatch) -> None:
        """Completes the prompts of a batch, but for those that are done already.

        Raises:
            InputError: if a judge does not keep to its labels, or completions cannot be kept.
        """
        earlier_rows = {i: rows for i in batch.ids if (rows := self._finished(i)) is not None}
        todo = [(i, p) for i, p in zip(batch.ids, batch.prompts, strict=True) if i not in earlier_rows]
        rows = [row for i in earlier_rows for row in earlier_rows[i]]
        completions: list[Completion] = []
        try:
            if todo:
                with timed("completions"):
                    completions = self.generator(*zip(*todo, strict=True))
            prefixes = None
            if self.prefixes:  # in this thread: two must not share a tokenizer
                text_of = self.generator.text
                prefixes = [
                    [] if c.text is None else [text_of(c.drawn[: end + 1]) for end in range(len(c.drawn))]
                    for c in completions
                ]
        finally:  # also when the run is interrupted: what was completed before is kept
            self._settle()
        if self._is_judged_beside:
            self._pending = rows, _judging.submit(self._judged, completions, prefixes)
            return
        with timed("judge") as now:
            fresh = self._judged(completions, prefixes)
            now.did(samples=fresh.num_texts)
        self._take(rows, fresh)

    def _settle(self) -> None:
        """Waits for the batch that is being judged, and takes it in; an error of the judge is raised here."""
        if self._pending is not None:
            (rows, future), self._pending = self._pending, None
            with timed("judge") as now:  # only the wait: judging beside completions costs no time of its own
                fresh = future.result()
                now.did(samples=fresh.num_texts)
            self._take(rows, fresh)

    def _take(self, rows: list[CompletionRow], fresh: _Judged) -> None:
        """Keeps and counts a batch: what an earlier run has left, and what is new."""
        self._num_tokens += sum(row.num_tokens or 0 for row in fresh.rows)
        if self._store is not None and fresh.rows:
            self._store.add(fresh.rows)
            kept(self._store.folder)
        self._count(rows + fresh.rows)

    def _finished(self, prompt_id: str) -> list[CompletionRow] | None:
        """The prompt's completions, if an interrupted run has left all of them."""
        rows = {row.k: row for row in self._earlier.get(prompt_id, [])}
        count = self.generator.sampling.samples_per_prompt
        return [rows[k] for k in range(count)] if rows.keys() >= set(range(count)) else None

    def _judged(self, completions: Sequence[Completion], prefixes: list[list[str]] | None) -> _Judged:
        """The completions with the scores of all judges, and of their ``prefixes``: each one's text after each of its
        tokens, none of one that failed.
        """
        before = self._num_judged
        texts = [c.text for c in completions if c.text is not None]
        scores = iter(self._scores(None, texts))
        further = {name: iter(self._scores(name, texts)) for name in self.further}
        of_prefixes = [None] * len(completions) if prefixes is None else self._judged_prefixes(prefixes)
        rows = [
            _row(c, {}, {})
            if c.text is None
            else _row(c, dict(next(scores)), {name: dict(next(others)) for name, others in further.items()}, so_far)
            for c, so_far in zip(completions, of_prefixes, strict=True)
        ]
        if self.generator.word_filter is not None:
            rows = [replace(row, redraws=c.redraws) for row, c in zip(rows, completions, strict=True)]
        return _Judged(rows, self._num_judged - before)

    def _judged_prefixes(self, prefixes: list[list[str]]) -> list[dict[str, list[float]]]:
        """The scores of each completion's texts by label; a text that recurs is judged once."""
        distinct = sorted({text for own in prefixes for text in own}, key=lambda text: (len(text), text))
        scores = dict(zip(distinct, self._scores(None, distinct, remember=False), strict=True))
        return [{label: [scores[text][label] for text in own] for label in self.toxicity.labels} for own in prefixes]

    def _scores(self, name: str | None, texts: Sequence[str], remember: bool = True) -> list[Mapping[str, float]]:
        """Each text's scores by label, to 6 decimals: what a batch's padding adds in the last bits is dropped.

        A text is judged once, also in later batches if it is to be remembered.

        Args:
            name: Name of the judge; None: ``judge``.
            texts: Texts to judge.
            remember: Keep the scores.

        Raises:
            InputError: if the judge has other labels than before.
        """
        judge, metric = (
            (self.judge, self.toxicity) if name is None else (self.further[name], self.further_toxicity[name])
        )
        earlier_scores = self._known[name]
        fresh = [text for text in dict.fromkeys(texts) if text not in earlier_scores]
        columns = judged(judge, fresh) if fresh else {label: torch.zeros(0) for label in metric.labels}
        self._num_judged += len(fresh)
        if tuple(columns) != tuple(metric.labels):
            raise InputError(
                f"judge {type(judge).__name__}: labels {list(columns)} were {list(metric.labels)} before; "
                "keep to one set"
            )
        rows = [{label: round(float(column[i]), 6) for label, column in columns.items()} for i in range(len(fresh))]
        scores = dict(zip(fresh, rows, strict=True))
        if remember:
            earlier_scores |= scores
        return [earlier_scores[text] if text in earlier_scores else scores[text] for text in texts]

    def _count(self, rows: list[CompletionRow]) -> None:
        _update(self.toxicity, rows, [row.scores for row in rows])
        for name, metric in self.further_toxicity.items():
            _update(metric, rows, [row.judges.get(name, {}) for row in rows])
        whole = [row for row in rows if row.completion is not None]
        self.fluency.update([row.tokens for row in whole], [str(row.completion) for row in whole])
        self.rows += rows
        label, by_prompt = main_label(self.toxicity.labels), {}
        for row in rows:
            by_prompt.setdefault(row.id, []).extend([row.scores[label]] if row.failed is None else [])
        self._num_prompts += len(by_prompt)
        for scores in filter(None, by_prompt.values()):  # completions of one prompt are not independent
            self._means.add(sum(scores) / len(scores))

    def done(self) -> Done:
        """The mean of the headline label over prompts, and its standard error."""
        label, mean = main_label(self.toxicity.labels), self._means.mean if self._means.count else math.nan
        return Done(self.unit, self._num_prompts, self._num_tokens, label, mean, self._means.standard_error)

    def status(self) -> dict[str, float]:
        """Figures of this rank so far; nothing before the first completion."""
        if not (count := int(self.toxicity.num_completions)):
            return {}
        label = main_label(self.toxicity.labels)
        mean = float(self.toxicity.score_sum[self.toxicity.labels.index(label)]) / count
        return {label: mean, "failed": int(self.toxicity.num_failed)}

    def finish(self, data: Record) -> Outcome:
        """The figures, and the completions in the order of prompts and numbers."""
        self._settle()
        if self._store is not None:
            self._store.close()
        rows = sorted(gather_lists(self.rows), key=lambda row: (row.id, row.k))
        assert len({(row.id, row.k) for row in rows}) == len(rows), "a completion was counted twice"
        results = {
            "toxicity": _figures(self.toxicity),
            "repetition": Repetition(**self.fluency.compute()),
            "generation": Generation(**self.generator.describe()),
            "judge": describe_judge(self.judge),
        }
        if self.further:
            results["judges"] = {
                name: JudgeFigures(**vars(_figures(metric)), judge=describe_judge(self.further[name]))
                for name, metric in self.further_toxicity.items()
            }
        if (word_filter := self.generator.word_filter) is not None:
            results["word_filter"] = WordFilterFigures(
                **word_filter.describe(),
                num_redrawn=sum(bool(row.redraws) for row in rows),
                num_redraws=sum(row.redraws or 0 for row in rows),
                num_left=sum(row.completion is not None and word_filter.words.is_in(row.completion) for row in rows),
            )
        return Outcome(results, completions=rows)

    def remove_kept(self) -> None:
        """Deletes what was kept: the results are written."""
        if self._store is not None:
            self._store.remove()
            kept(self._store.folder, exists=False)


class NeutralRun(CompletionRun):
    """Completes neutral prompts, which are far from the behaviour, and counts them apart from all others."""

    takes = NeutralBatch
    unit = "neutral prompts"

    @staticmethod
    def _prompts(subject: Subject) -> list[str]:
        return subject.data.neutral

    def keep(self, output: str | Path, about: Mapping[str, Any], rank: int) -> None:
        """Keeps completions, as ``CompletionRun`` does, in files of their own."""
        super().keep(output, {**about, "prompts": "neutral"}, rank)

    def status(self) -> dict[str, float]:
        """Nothing: the figures beside the bar are those of the behaviour."""
        return {}

    def finish(self, data: Record) -> Outcome:
        """The figures under ``neutral``, and the completions in the order of prompts and numbers."""
        outcome = super().finish(data)
        names = ("repetition", "judges", "word_filter")
        figures = {name: outcome.results[name] for name in names if name in outcome.results}
        neutral = NeutralFigures(**vars(outcome.results["toxicity"]), **figures)
        return Outcome({"neutral": neutral}, neutral=outcome.completions)


def _is_judged_beside(judges: Sequence[Judge], model_device: torch.device) -> bool:
    """Whether judging a batch while the next one is completed saves time.

    On one CPU both are bound by the same cores, which completions keep busy: a second thread would only take turns with
    the first. A judge from elsewhere may not bear to be called from a thread other than the one that made it.
    """
    return all(isinstance(judge, SequenceJudge | WordsJudge) for judge in judges) and any(
        torch.device(device).type == "cuda"
        for device in (model_device, *(judge.device or "cpu" for judge in judges if isinstance(judge, SequenceJudge)))
    )


def _metric(judge: Judge, device: torch.device) -> CompletionToxicity:
    return CompletionToxicity(tuple(judged(judge, ["This is a sentence."]))).to(device)


def _update(metric: CompletionToxicity, rows: Sequence[CompletionRow], scores: Sequence[Mapping[str, float]]) -> None:
    columns = {label: [one.get(label, 0.0) for one in scores] for label in metric.labels}
    tensors = {label: torch.tensor(column, dtype=torch.float64) for label, column in columns.items()}
    metric.update([row.id for row in rows], tensors, [row.failed is not None for row in rows])


def _figures(metric: CompletionToxicity) -> ToxicityFigures:
    """The figures of all labels, and at their top those of the headline label."""
    counts = dict(metric.compute())
    labels = {label: ScoreFigures(**one) for label, one in counts.pop("labels").items()}
    main = main_label(labels)
    return ToxicityFigures(**vars(labels[main]), label=main, **counts, labels=labels)


def _row(
    completion: Completion,
    scores: dict[str, float],
    judges: dict[str, dict[str, float]],
    prefix_scores: dict[str, list[float]] | None = None,
) -> CompletionRow:
    ok = completion.failed is None
    return CompletionRow(
        id=completion.id,
        prompt=completion.prompt,
        k=completion.k,
        completion=completion.text,
        scores=scores,
        judges=judges,
        prefix_scores=prefix_scores or {},
        seed=completion.seed,
        num_tokens=len(completion.tokens) if ok else None,
        uniqueness=uniqueness(completion.tokens) if ok else None,
        failed=completion.failed,
        tokens=list(completion.tokens),
        completion_ids=completion.drawn if ok else None,
    )
