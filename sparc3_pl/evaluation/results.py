"""The evaluation folder: ``results.json``, ``completions.jsonl``, ``windows.jsonl``, ``config.yaml``.

Where there were measurements of the user's own, their rows are in ``measurements.jsonl``; where there were neutral
prompts, their completions are in ``neutral.jsonl``, so that ``completions.jsonl`` holds those of the behaviour only.

``results.json`` holds the figures, where they come from, the sha256 of the other files, and its own
(``sha256``: of the rest of its content). A folder appears whole or not at all, and is verified when it is opened.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from sparc3_pl.document.shown import Shown, data_frame
from sparc3_pl.errors import InputError
from sparc3_pl.evaluation.figures import Results
from sparc3_pl.evaluation.rows import CompletionRow, WindowRow, from_json
from sparc3_pl.io.files import (
    FolderKind,
    inside,
    new_folder,
    read_json,
    sha256_of_file,
    strict_json,
    write_text,
    writing,
)
from sparc3_pl.io.formats import Format, Record
from sparc3_pl.io.provenance import command_line, hardware, now, redacted, versions

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

    from sparc3_pl.document.blocks import Block

__all__ = [
    "FORMAT_VERSION",
    "HEADLINE",
    "KIND",
    "MARKER",
    "THRESHOLD",
    "CompletionStore",
    "Evaluation",
    "main_label",
    "write_evaluation",
]

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
MARKER = "results.json"
THRESHOLD = 0.5
"""A completion with a judge's score of at least this counts as showing the label."""


HEADLINE = "toxicity"
"""The label whose figures are the headline, if the judge has it."""


def main_label(labels: Iterable[str]) -> str:
    """The label whose figures are the headline: ``HEADLINE`` if the judge has it, else its first."""
    labels = list(labels)
    return HEADLINE if HEADLINE in labels else labels[0]


def _is_evaluation(marker: Path) -> bool:
    """Whether a file is the marker of an evaluation: that of a circuit has the same name."""
    try:
        return {"format_version", "perplexity", "toxicity"} <= read_json(marker).keys()
    except InputError:
        return False


KIND = FolderKind("an evaluation", MARKER, ("config.yaml",), lambda results: results["files"], is_marker=_is_evaluation)


def _check_files(results: Results, where: str | Path) -> None:
    if not results.files:
        raise InputError(f"{where}: the key 'files' is missing; it is incomplete, evaluate again with `eval`")


FORMAT = Format(
    Results,
    "an evaluation's results",
    FORMAT_VERSION,
    "evaluate again with `eval`",
    extra="more",
    sealed=True,
    check=_check_files,
)


def write_evaluation(
    folder: str | Path,
    results: Mapping[str, Any],
    *,
    completions: Sequence[CompletionRow],
    windows: Sequence[WindowRow],
    measurements: Sequence[Record] = (),
    neutral: Sequence[CompletionRow] = (),
    config: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write an evaluation folder, whole or not at all.

    Args:
        folder: Folder to write.
        results: ``perplexity``, ``toxicity``, ``model``, ``data`` and whatever else is to be told.
        completions: The completions of all prompts; empty without prompts.
        windows: The windows of the text; empty without text.
        measurements: One for each unit of a measurement of the user's own: ``measurement``, ``unit``, values.
        neutral: Completions of neutral prompts; none for an evaluation without such prompts.
        config: The resolved configuration as YAML.
        overwrite: Replace an earlier evaluation there.

    Raises:
        InputError: if the place is taken or cannot be written.
    """
    rows = (list(completions), list(windows), list(measurements), list(neutral))
    return Evaluation(Path(folder), dict(results), *rows).sealed(config).save(folder, overwrite, config=config)


@dataclass(frozen=True)
class Evaluation(Shown):
    """An evaluation folder that has been read and verified, or one that is not written yet.

    Attributes:
        path: The folder; of one in memory, what messages call it.
        results: The content of ``results.json``; ``figures`` is the same with names and types.
        completions: The completions, in the order of prompts and numbers.
        windows: The windows, in the order of the text.
        measurements: One for each unit of a measurement of the user's own: ``measurement``, ``unit``, values, or why it
            ``failed``.
        neutral: Completions of neutral prompts, in the same order.
    """

    path: Path
    results: Record
    completions: list[CompletionRow]
    windows: list[WindowRow]
    measurements: list[Record] = field(default_factory=list)
    neutral: list[CompletionRow] = field(default_factory=list)

    @cached_property
    def figures(self) -> Results:
        """What was measured, on what and with what."""
        return FORMAT.typed(self.results, self.path)

    @property
    def digest(self) -> str:
        """sha256 of ``results.json``'s content, which names the digests of the other files: whose figures these are."""
        return self.results["sha256"]

    @property
    def is_unedited(self) -> bool:
        """Whether the model was evaluated as it was loaded: no plan, and its weights are those that were loaded."""
        model = self.figures.model
        return self.figures.plan is None and model.evaluated_fingerprint == model.fingerprint

    @property
    def is_plain(self) -> bool:
        """Whether the model was measured as it was loaded, and its completions as they were first drawn."""
        return self.is_unedited and self.figures.word_filter is None

    def blocks(self) -> list[Block]:
        """The figures."""
        from sparc3_pl.document.blocks import Table
        from sparc3_pl.evaluation.show import table_rows

        return [Table.of(("figure", "value", "of"), table_rows(self.figures), title="Evaluation")]

    def to_pandas(self) -> DataFrame:
        """A row for each completion, its scores by label; where there are none, for each window of the text.

        Raises:
            InputError: without pandas.
        """
        rows = [{k: v for k, v in row.to_json().items() if k != "scores"} | row.scores for row in self.completions]
        return data_frame(rows or [row.to_json() for row in self.windows])

    def plot(self) -> Figure:
        """The judge's scores of all completions as a histogram; without prompts, the loss of each window of the text.

        Raises:
            InputError: if there is neither.
        """
        import numpy as np

        from sparc3_pl.document.figures import for_notebook, score_distribution, window_losses

        if score_rows := [row.scores for row in self.completions if row.failed is None]:
            assert self.figures.toxicity is not None, "completions were scored"
            label = self.figures.toxicity.label
            return for_notebook(
                score_distribution(np.array([scores[label] for scores in score_rows], np.float32), label)
            )
        if not self.windows:
            raise InputError("there are neither completions nor windows of a text to draw; see results")
        return for_notebook(window_losses([row.nll / row.num_tokens for row in self.windows]))

    def sealed(self, config: str | None = None, command: str | None = None) -> Evaluation:
        """This evaluation with all that ``results.json`` says: digests of files, versions, command, its own digest.

        Args:
            config: The resolved configuration as YAML, if it is to be kept beside the results.
            command: What made the results; None: this process's command line.
        """
        texts = sorted(self._texts(config).items())
        bytes_of = {name: text.encode("utf-8", "backslashreplace") for name, text in texts}  # as ``write_text`` does
        files = {name: hashlib.sha256(content).hexdigest() for name, content in bytes_of.items()}
        about = {"versions": versions(), "hardware": hardware(), "command": command or command_line(), "created": now()}
        return replace(self, results=FORMAT.seal(redacted({**self.results, "files": files, **about})))

    def save(self, folder: str | Path, overwrite: bool = False, *, config: str | None = None) -> Path:
        """Writes the folder, whole or not at all, of sealed results.

        Args:
            folder: Folder to write.
            overwrite: Replace an earlier evaluation there.
            config: The configuration that ``sealed`` was given; of a folder that was read, its own.

        Raises:
            InputError: if the place is taken or cannot be written.
        """
        if config is None and "config.yaml" in self.figures.files:
            config = (self.path / "config.yaml").read_text(encoding="utf-8")
        with new_folder(folder, overwrite, KIND) as temporary:
            for name, text in self._texts(config).items():
                write_text(temporary / name, text)
            write_text(temporary / MARKER, strict_json(self.results, indent=2) + "\n")
        return Path(folder)

    def _texts(self, config: str | None) -> dict[str, str]:
        """The content of each file beside ``results.json``, by the file's name."""
        texts = {
            "completions.jsonl": _lines(row.to_json() for row in self.completions),
            "windows.jsonl": _lines(row.to_json() for row in self.windows),
        }
        texts |= {"measurements.jsonl": _lines(self.measurements)} if self.measurements else {}
        texts |= {"neutral.jsonl": _lines(row.to_json() for row in self.neutral)} if self.neutral else {}
        return texts | ({} if config is None else {"config.yaml": config})

    @classmethod
    def open(cls, path: str | Path) -> Evaluation:
        """Read an evaluation folder.

        Raises:
            InputError: if it is not one, is of another format version, or any of its files was changed or cut.
        """
        path = Path(path)
        if not (path / MARKER).is_file():
            raise InputError(f"{path}: holds no {MARKER}; give a folder that `eval` has written")
        results = read_json(path / MARKER)
        files = FORMAT.parse(results, path / MARKER).files
        for name, digest in files.items():
            file = inside(path, name)
            if not file.is_file():
                raise InputError(f"{file}: is missing; the folder is not complete, evaluate again with `eval`")
            if sha256_of_file(file) != digest:
                raise InputError(f"{file}: does not fit its sha256; it was changed or cut, evaluate again with `eval`")
        return cls(
            path,
            results,
            [from_json(CompletionRow, row) for row in _read_lines(path / "completions.jsonl")],
            [from_json(WindowRow, row) for row in _read_lines(path / "windows.jsonl")],
            _read_lines(path / "measurements.jsonl") if "measurements.jsonl" in files else [],
            [from_json(CompletionRow, row) for row in _read_lines(path / "neutral.jsonl")]
            if "neutral.jsonl" in files
            else [],
        )


def _lines(rows: Iterable[Record]) -> str:
    return "".join(strict_json(row) + "\n" for row in rows)


def _read_lines(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


class CompletionStore:
    """Completions that are done, kept beside the output during a run, so that none is made twice.

    Each process appends to a file of its own, flushed to the disk after every batch; any number of processes may
    continue. Rows are found again only under the same ``key``: model, edit, settings and judge.

    Args:
        output: The evaluation folder to be; the store is a hidden sibling of it.
        key: What the completions depend on besides prompt and k.
        rank: Rank of this process.
    """

    def __init__(self, output: str | Path, key: Mapping[str, Any], rank: int) -> None:
        output = Path(output).absolute()
        self.folder = output.with_name(f".{output.name}.completions.partial")
        self._name = hashlib.sha256(strict_json(key).encode()).hexdigest()[:16]
        self._path = self.folder / f"{self._name}-{rank}.jsonl"
        self._stream: TextIO | None = None

    def load(self) -> dict[str, list[CompletionRow]]:
        """Finished completions by prompt id, of all processes of earlier runs."""
        by_prompt: dict[str, list[CompletionRow]] = {}
        for path in sorted(self.folder.glob(f"{self._name}-*.jsonl")):
            for row in _whole_rows(path):
                by_prompt.setdefault(row.id, []).append(row)
        return by_prompt

    def add(self, rows: Sequence[CompletionRow]) -> None:
        """Append finished completions and wait until they are on the disk.

        Raises:
            InputError: if they cannot be written.
        """
        with writing(self._path):
            if self._stream is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._stream = self._path.open("a", encoding="utf-8")
                self._stream.write("\n")  # an interrupted run may have left half a line
            self._stream.write(_lines(row.to_json(tokens=True) for row in rows))
            self._stream.flush()
            os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Close this process's file."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def remove(self) -> None:
        """Delete the store: the results are written."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def _whole_rows(path: Path) -> list[CompletionRow]:
    """The rows that were written whole; a torn one (the process was killed) is made again."""
    rows: list[CompletionRow] = []
    torn = 0
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            rows += [from_json(CompletionRow, json.loads(line))] if line else []
        except json.JSONDecodeError:
            torn += 1
    if torn:
        log.warning("%s: %d half-written completion(s) of an interrupted run will be made again", path.name, torn)
    return rows
