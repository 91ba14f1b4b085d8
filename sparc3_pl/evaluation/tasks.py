"""Zero-shot accuracy on the multiple-choice tasks of the LM Evaluation Harness (``lm_eval``, extra ``harness``).

The harness says what a task is: its items, prompts, choices, and which answer is right. The log-likelihood of each
choice is ours, by the same code as perplexity. Items are the units: the ranks share them, and ``compare`` pairs them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparc3_pl.errors import InputError
from sparc3_pl.evaluation.measurement import Measurement, Row
from sparc3_pl.io.formats import Record
from sparc3_pl.statistics.paired import PairedChange, mcnemar_p_value

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedModel

    from sparc3_pl.data.encoding import Encoder

__all__ = ["TaskAccuracy", "task_specs"]

_FEWSHOT_SEED = 1234
"""The harness' own default: examples that a task shows are those that its command line shows."""


def task_specs(tasks: Sequence[str], folder: str | None, limit: int | None, batch_size: int) -> list[Record]:
    """How ``model.measurements`` would name these tasks."""
    options = {"folder": folder, "limit": limit, "batch_size": batch_size}
    return [{"class_path": "task", "init_args": {"task": task, **options}} for task in tasks]


class TaskAccuracy(Measurement):
    """Share of a task's items whose right answer gets the highest log-likelihood of all choices.

    Args:
        task: Name of a multiple-choice task.
        folder: Folder of task files (YAML) besides the harness' own; a name in both is the folder's.
        limit: Only the first so many items.
        batch_size: Sequences (a context with one of its choices) in one forward pass.
    """

    unit = "items"
    better = "higher"

    def __init__(self, task: str, folder: str | None = None, limit: int | None = None, batch_size: int = 8) -> None:
        for key, value in (("tasks_limit", limit), ("tasks_batch_size", batch_size)):
            if value is not None and value < 1:
                raise InputError(f"model.{key}={value}; give 1 or more")
        self.name, self.folder, self.limit, self._batch_size = task, folder, limit, batch_size
        self.batch_size = 4 * batch_size  # items: long sequences meet long ones, so that little is padding
        self._model: tuple[PreTrainedModel, Any] | None = None

    def describe(self) -> Record:
        about: Record = {"folder": None if self.folder is None else Path(self.folder).resolve().name}
        if "_task" in vars(self):
            about |= {
                "lm_eval": version("lm_eval"),
                "version": self._task.VERSION,
                "num_fewshot": self._task.get_config("num_fewshot"),
            }
        return about

    @cached_property
    def _task(self) -> Task:
        """The harness' own object, which reads its data.

        Raises:
            InputError: if there is no such task, its data cannot be read, or it is not of multiple choice.
        """
        task = _loaded_task(self.name, self.folder)
        kind = task.OUTPUT_TYPE
        if kind != "multiple_choice":
            raise InputError(f"model.tasks: {self.name} is a task of kind {kind}; give tasks of multiple choice")
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=_FEWSHOT_SEED)
        return task

    @cached_property
    def _items(self) -> dict[str, list[Instance]]:
        """The requests of every item, by its id: its number, and a digest of all that the model reads of it."""
        task = self._task
        try:
            task.build_all_requests(limit=self.limit, rank=0, world_size=1)
        except Exception as error:  # whatever a task's own templates and functions raise
            raise InputError(f"model.tasks: the items of {self.name} cannot be made ({_told(error)})") from error
        by_number: dict[int, list[Instance]] = {}
        for request in task.instances:
            by_number.setdefault(request.doc_id, []).append(request)
        items = {}
        for number, requests in by_number.items():
            requests.sort(key=lambda request: request.idx)
            digest = hashlib.sha256(repr([request.args for request in requests]).encode()).hexdigest()[:12]
            items[f"{number:06}-{digest}"] = requests
        return items

    def units(self, encoder: Encoder) -> list[str]:
        """Ids of the items, those with the longest prompts first."""
        if encoder.tokenizer is None:
            raise InputError(f"model.tasks: {self.name} is text, and the model has no tokenizer to read it with")
        contexts = (request.args[0] for requests in self._items.values() for request in requests)
        if not encoder.beginning() and "" in contexts:
            raise InputError(
                f"model.tasks: {self.name} has items without a context, and the model no token that begins or ends a "
                "text, without which the first token of a choice cannot be scored; leave the task out"
            )
        length = {name: max(len("".join(r.args)) for r in requests) for name, requests in self._items.items()}
        return sorted(length, key=lambda name: (-length[name], name))

    def measure(self, model: PreTrainedModel, encoder: Encoder, units: Sequence[str]) -> list[Row]:
        if absent := [unit for unit in units if unit not in self._items]:
            raise InputError(f"model.tasks: this process reads other items of {self.name} than the first ({absent[0]})")
        from sparc3_pl.evaluation.harness_model import HarnessModel

        if self._model is None or self._model[0] is not model:
            self._model = (model, HarnessModel(model, encoder, self._batch_size))
        requests = [request for unit in units for request in self._items[unit]]
        answers = iter(self._model[1].loglikelihood(requests, disable_tqdm=True))
        return [self._row(unit, [next(answers) for _ in self._items[unit]]) for unit in units]

    def _row(self, unit: str, answers: list[tuple[float, bool]]) -> Row:
        """The row of an item: whether the harness calls its answers right, by each of the task's accuracies."""
        requests = self._items[unit]
        doc = requests[0].doc
        if odd := [value for value, _ in answers if not math.isfinite(value)]:
            return {"unit": unit, "failed": f"the log-likelihood of a choice is {odd[0]}"}
        if (reason := _without_answer(self._task, doc)) is not None:
            return {"unit": unit, "failed": reason}
        for request, answer in zip(requests, answers, strict=True):
            request.resps = [answer]
        self._task._instances = requests
        self._task.apply_filters()
        name = next(iter(requests[0].filtered_resps))
        values = self._task.process_results(doc, [request.filtered_resps[name] for request in requests])
        values = {key: value for key, value in values.items() if key.startswith("acc")}
        if not values:
            return {"unit": unit, "failed": "the task has no accuracy"}
        return {"unit": unit, **{key: float(value) for key, value in values.items()}}

    def figures(self, rows: Sequence[Row]) -> dict[str, float]:
        """Each accuracy, and its standard error as the harness gives it: s / sqrt(n), s with n - 1."""
        figures = super().figures(rows)
        for name, mean in dict(figures).items():
            if len(rows) > 1:
                squares = math.fsum((row[name] - mean) ** 2 for row in rows)
                figures[f"{name}_stderr"] = math.sqrt(squares / (len(rows) - 1) / len(rows))
        return figures

    def compare(
        self, before: Sequence[Row], after: Sequence[Row], *, seed: int, num_resamples: int
    ) -> dict[str, PairedChange]:
        """The change of each accuracy; for answers that are right or wrong, with McNemar's exact p-value."""
        changes = dict(super().compare(before, after, seed=seed, num_resamples=num_resamples))
        for name, change in changes.items():
            pair = [np.array([row[name] for row in rows]) for rows in (before, after)]
            if np.isin(pair, (0, 1)).all():
                changes[name] = replace(change, p_value=mcnemar_p_value(*pair))
        return changes


def _without_answer(task: Task, doc: Any) -> str | None:
    """Why an item has no right answer: the label of a test set may be hidden (-1), which would count as wrong."""
    if task.get_config("process_results") is not None or getattr(task, "multiple_input", 0):
        return None
    choices, label = task.doc_to_choice(doc), task.doc_to_target(doc)
    for one in label if isinstance(label, list) else [label]:
        if not (one in choices if isinstance(one, str) else 0 <= one < len(choices)):
            return f"the label {one!r} is none of the {len(choices)} choices"
    return None


def _loaded_task(name: str, folder: str | None) -> Task:
    if find_spec("lm_eval") is None:
        raise InputError('model.tasks needs the package lm_eval; install it: pip install "sparc3_pl[harness]"')
    if folder is not None and not Path(folder).is_dir():
        raise InputError(f"model.tasks_folder={folder!r}: there is no such folder; give one that holds task files")
    manager = _manager(folder, False)  # the harness has thousands of task files, which take seconds to look through
    if name not in manager.all_tasks:
        manager = _manager(folder, True)
    if name not in manager.all_tasks:
        import difflib

        near = difflib.get_close_matches(name, manager.all_tasks, n=3)
        hint = f"nearest: {', '.join(near)}" if near else "name another one, or give its folder (model.tasks_folder)"
        raise InputError(f"model.tasks: there is no task {name!r}; {hint}")
    try:
        tasks = manager.load([_with_files_beside(manager, name, folder)])["tasks"]
    except Exception as error:  # of the harness, of datasets, of the hub's client: a missing network has many names
        raise InputError(
            f"model.tasks: {name} cannot be loaded ({_told(error)}); where there is no hub, give a folder of tasks "
            "whose data lie beside them (model.tasks_folder)"
        ) from error
    if list(tasks) != [name]:
        raise InputError(f"model.tasks: {name} is a group; give its tasks by name: {', '.join(sorted(tasks)[:8])}")
    return tasks[name]


def _with_files_beside(manager: TaskManager, name: str, folder: str | None) -> str | Record:
    """The task's name; or, of a task in ``folder`` that reads files, its configuration with where they lie.

    A path that a task file gives is looked up beside that file first. The harness itself would look only in the folder
    that the program was started in.
    """
    from lm_eval.tasks._yaml_loader import load_yaml

    path = manager.task_index[name].yaml_path
    if folder is None or path is None or Path(folder).resolve() not in Path(path).resolve().parents:
        return name
    config = load_yaml(path, resolve_func=True, recursive=True)
    options = config.get("dataset_kwargs") or {}
    if "task" not in config or "data_files" not in options:
        return name

    def beside(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: beside(one) for key, one in value.items()}
        if isinstance(value, list):
            return [beside(one) for one in value]
        near = Path(path).resolve().parent / str(value)
        return str(near) if near.is_file() else value

    return config | {"dataset_kwargs": options | {"data_files": beside(options["data_files"])}}


@lru_cache(maxsize=4)
def _manager(folder: str | None, with_own: bool) -> TaskManager:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder, include_defaults=with_own)


def _told(error: Exception) -> str:
    """The kind of an error and the first line of what it says."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:160]}" if text else type(error).__name__
