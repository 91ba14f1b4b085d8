"""Stages of an experiment: what each is made from, and whether it is done already.

A stage is done if its result is there and was made with the same settings from the same inputs: a record names the
digests of the files that it read (data, model, scores, plan) and of its result.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparc3_pl.data.sources import local_source
from sparc3_pl.errors import InputError
from sparc3_pl.io.files import json_digest, read_json, sha256_of_file, strict_json, write_text
from sparc3_pl.io.formats import typed
from sparc3_pl.io.provenance import now, redacted, versions
from sparc3_pl.io.shipped import list_file
from sparc3_pl.io.yaml_format import dump_yaml, load_yaml
from sparc3_pl.model.source import ModelSource
from sparc3_pl.runtime.processes import kept
from sparc3_pl.runtime.timing import StageTime, Timing, rows_of_results
from sparc3_pl.scores.manifest import MARKER as SCORES_MARKER

if TYPE_CHECKING:
    from sparc3_pl.passes.run import Forecast

__all__ = ["Settings", "Stage", "Stages", "check_folder", "write_json"]

log = logging.getLogger(__name__)

Settings = dict[str, bool | int | float | str | list | dict | None]
"""What a stage is made with. Plain values: were they ``Any``, the parser would make objects of class paths within."""


@dataclass(frozen=True)
class Stage:
    """A step of an experiment.

    Attributes:
        name: Name of its files in ``stages``.
        settings: What it is made with.
        output: The folder or file that it makes.
        result: The file that stands for the output: in a folder the one that names the digests of the others.
        reads: Results of earlier stages, by what they are to this one.
        make: Makes the output; is told whether to replace an earlier one.
        check: Refuses settings that the step would not take; reads and writes no results.
        forecast: Says what a process of the pass will take; None: the step is no pass.
    """

    name: str
    settings: Settings
    output: Path
    result: Path
    reads: Mapping[str, Path]
    make: Callable[[bool], None]
    check: Callable[[], None] = lambda: None
    forecast: Callable[[], Forecast] | None = None

    def inputs(self) -> dict[str, str]:
        """Digests of all files that the stage reads, by the key that names them or by what they are."""
        return {
            **_digests_of_files(self.settings),
            **{name: _digest_of_file(path) for name, path in self.reads.items()},
        }


@dataclass(frozen=True)
class Stages:
    """The folder in which the settings and the record of each stage are kept."""

    folder: Path

    def settings_file(self, stage: str) -> Path:
        """The file with the settings of the stage called ``stage``, without secrets."""
        return self.folder / f"{stage}.yaml"

    def record_file(self, stage: str) -> Path:
        """The file with the digests of what the stage called ``stage`` has read and made."""
        return self.folder / f"{stage}.json"

    def check_settings(self, stage: Stage) -> None:
        """Refuses to resume from a result that was made with other settings.

        Raises:
            InputError: naming the first that differs.
        """
        path = self.settings_file(stage.name)
        if not stage.output.exists() or not path.exists():
            return
        before = load_yaml(path.read_text(encoding="utf-8"))
        difference = next(_differing(before, redacted(stage.settings)), None)
        if difference is not None:
            raise InputError(
                f"{stage.output}: was made with a different {difference} than is asked for now; choose another output, "
                "or delete it"
            )

    def do(self, stage: Stage, place: str = "") -> None:
        """Makes the stage's result, unless it is there and made from what the stage reads now.

        Args:
            stage: The stage.
            place: Which of how many it is, for the log.
        """
        inputs = stage.inputs()
        reason = self._reason(stage, inputs)
        if reason is None:
            kept(stage.output)  # from here on a stop can say that the same command resumes
            return
        log.info("%s%s%s", place, stage.name, f" again: {reason}" if stage.output.exists() else "")
        self.record_file(stage.name).unlink(missing_ok=True)
        self.settings_file(stage.name).parent.mkdir(parents=True, exist_ok=True)
        write_text(self.settings_file(stage.name), dump_yaml(redacted(stage.settings)))
        start = time.perf_counter()
        stage.make(stage.output.exists())
        seconds = round(time.perf_counter() - start, 3)
        record = {"inputs": inputs, "result": sha256_of_file(stage.result), "versions": versions(), "created": now()}
        record["seconds"] = seconds
        write_json(self.record_file(stage.name), record)

    def times(self, stages: Sequence[Stage]) -> list[StageTime]:
        """Where the time of these stages went, also of those that were done before."""
        times: list[StageTime] = []
        for stage in stages:
            record = read_json(self.record_file(stage.name))
            is_folder = stage.result != stage.output
            data = (read_json(stage.result).get("timing") if is_folder else None) or {}
            parts = rows_of_results({stage.name: typed(Timing, data, stage.result, "run again")})
            times += parts or [StageTime(stage.name, record.get("seconds", 0.0))]
        return times

    def _reason(self, stage: Stage, inputs: Mapping[str, str]) -> str | None:
        """Why the stage must be done; None if it is done already. Writes nothing."""
        if not stage.result.is_file():
            return "its result is not there"
        path = self.record_file(stage.name)
        if not path.is_file() or not self.settings_file(stage.name).is_file():
            return "nothing says what the result that is there was made from"
        record = read_json(path)
        if record.get("result") != sha256_of_file(stage.result):
            return "its result is not the one that it made"
        before = record.get("inputs") or {}
        names = [name for name in {**before, **inputs} if before.get(name) != inputs.get(name)]
        return f"changed since: {', '.join(names)}" if names else None


def check_folder(folder: Path) -> None:
    """Refuses a folder that holds something else than stages' results, before anything is written there.

    Raises:
        InputError: if it is a file, or has content but no ``stages``.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output={folder}: is a file; give a folder for the experiment")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "stages").is_dir():
        raise InputError(f"output={folder}: holds other files and no experiment; give a new or an empty folder")


def _digests_of_files(settings: Any, key: str = "") -> dict[str, str]:
    """Digests of the local files and folders that settings name, by the key under which they stand."""
    if isinstance(settings, Mapping):
        items = ((f"{key}.{name}" if key else str(name), value) for name, value in settings.items())
    elif isinstance(settings, list | tuple):
        items = ((f"{key}.{place}", value) for place, value in enumerate(settings))
    else:
        path = _path_of(key, settings) if isinstance(settings, str) and settings else None
        return {} if path is None else {key: _digest(path)}
    return {name: digest for one, value in items for name, digest in _digests_of_files(value, one).items()}


def _path_of(key: str, value: str) -> Path | None:
    """The local file or folder that the value of a key names; None if it names none (a word, something on the hub).

    Raises:
        InputError: if it is written like a path and nothing is there.
    """
    name = key.rpartition(".")[2]
    if name == "source" or name.endswith("_source"):
        return local_source(value, key)
    if key in ("model.pretrained", "pretrained"):
        return ModelSource(value).path
    if (key.removesuffix(f".{name}") if name.isdecimal() else key).endswith("budget_text"):
        return local_source(value, key)
    path = list_file(value, key) if ".judge" in key or name == "word_filter" else Path(value).expanduser()
    if name in ("match", "budgets", "word_filter") or (
        ".judge" in key and name.endswith(("path", "folder", "dir", "pretrained"))
    ):
        return path if path.exists() else None
    return path if ".judge" in key and path.is_file() else None  # a judge's own settings: any file


def _digest(path: Path) -> str:
    """Digest of the content of a file or folder."""
    if path.is_file():
        return _digest_of_file(path)
    if (path / SCORES_MARKER).is_file():  # it names the digests of the other files
        return _digest_of_file(path / SCORES_MARKER)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return json_digest({str(file.relative_to(path)): _digest_of_file(file) for file in files})


def _digest_of_file(path: Path) -> str:
    about = path.stat()
    return _digest_of_content(path.resolve(), about.st_size, about.st_mtime_ns)


@functools.cache
def _digest_of_content(path: Path, _size: int, _modified: int) -> str:
    """Digest of a file's content, kept while the file looks the same: every stage asks for the model's."""
    return sha256_of_file(path)


def _differing(one: Any, other: Any, path: str = "") -> Iterator[str]:
    """Dotted keys at which two configurations differ."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        if path.endswith(".judges") and list(one) != list(other):  # the first has the headline figures
            yield f"{path} ({', '.join(one)}, now {', '.join(other)})"
        for key in sorted({*one, *other}):
            yield from _differing(one.get(key), other.get(key), f"{path}.{key}" if path else str(key))
    elif one != other:
        yield f"{path} ({one!r}, now {other!r})"


def write_json(path: Path, value: Any) -> None:
    """Writes a file of JSON, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, strict_json(value, indent=1) + "\n")
