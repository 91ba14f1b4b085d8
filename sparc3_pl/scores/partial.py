"""Partial sums on disk, so that a killed scoring run can resume on any number of processes.

```
.scores.partial/                         beside the output, gone once that is written
  settings.json                          what the sums depend on; a run with other settings is refused
  000002-base.safetensors                sums over all samples of earlier runs
  000002-4f1c9a02-00003.safetensors      sums of rank 3 of a later run: generation, run, rank
```
A file of sums also holds the records of its samples, in its header: sums and ids cannot come apart. The header holds
the sha256 of records and tensors too, so that a damaged file is refused, never added. It is written to another name,
flushed to the disk and renamed. At the next start rank 0 folds the files of the latest generation into the base of the
next one, layer by layer; as soon as that has its name, the files of earlier generations are dead. The run claims its
output for as long as it lasts, so nothing here belongs to another run that is still active.
"""

from __future__ import annotations

import json
import logging
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor

from sparc3_pl.errors import InputError
from sparc3_pl.io.claims import sole_run
from sparc3_pl.io.files import fsync, read_json, strict_json, write_text, writing
from sparc3_pl.io.formats import Record
from sparc3_pl.io.provenance import redacted
from sparc3_pl.scores.manifest import ScoredSample
from sparc3_pl.scores.sums import LayerTensors, SumsFile, added, sums_of, write_sums

__all__ = ["PartialSums", "differing_settings", "partial_folder"]


log = logging.getLogger(__name__)


_SETTINGS = "settings.json"

_BASE = "-base.safetensors"


def partial_folder(output: str | Path) -> Path:
    """The folder of the partial sums of a run that writes to ``output``."""
    output = Path(output).absolute()
    return output.with_name(f".{output.name}.partial")


# --- the folder beside the output -------------------------------------------------------------------------------------


class PartialSums:
    """The partial sums of a scoring run.

    On rank 0 ``take_up`` comes first; what it returns goes to the other ranks, and every rank calls ``join`` with it.

    Args:
        output: Where the scores will go.
        rank: Rank of this process.
    """

    def __init__(self, output: str | Path, rank: int) -> None:
        self.folder = partial_folder(output)
        self._rank = rank
        self._output = output
        self._claim = ExitStack()
        self._generation, self._run = 0, ""
        self.ids: frozenset[str] = frozenset()
        """The ids of the samples that earlier runs have scored."""

    def take_up(self, settings: Mapping[str, Any]) -> Record:
        """Claims the output until ``remove``, and folds what earlier runs have left into one base; on rank 0 only.

        Raises:
            InputError: if another run is writing to the output, or what earlier runs have left was made with other
                settings, is damaged, or cannot be read or written.
        """
        self._claim.enter_context(sole_run(self._output))  # so what is here belongs to runs that have ended
        for half_written in self.folder.parent.glob(f"{self.folder.name}-*"):  # left behind by a killed run
            shutil.rmtree(half_written, ignore_errors=True)
        self._check_settings(settings)
        live = self._live_files()
        generation = self._generation_of(live[0].path) if live else 0
        if live and (len(live) > 1 or not live[0].path.name.endswith(_BASE)):
            generation += 1
            samples = [sample for file in live for sample in file.samples]
            self._write(self.folder / f"{generation:06d}{_BASE}", live[0].shapes, added(live), samples)
        else:
            for file in live:
                file.verify()  # now, not when it is added to hours of work
        self._remove_dead(generation)
        ids = sorted(identity for file in live for identity in file.ids)
        return {"generation": generation, "run": secrets.token_hex(4), "ids": ids}

    def join(self, agreed: Mapping[str, Any]) -> None:
        """Takes over what rank 0 has found."""
        self._generation, self._run, self.ids = agreed["generation"], agreed["run"], frozenset(agreed["ids"])

    def save(self, tensors: LayerTensors, samples: Sequence[ScoredSample]) -> None:
        """Puts this rank's sums on the disk in place of its earlier ones; an interruption leaves one or the other.

        Raises:
            InputError: if they cannot be written.
        """
        name = f"{self._generation:06d}-{self._run}-{self._rank:05d}.safetensors"
        shapes, load = sums_of(tensors)
        self._write(self.folder / name, shapes, load, samples)

    def base(self) -> SumsFile | None:
        """The sums of earlier runs; None if there are none."""
        return SumsFile(self.folder / f"{self._generation:06d}{_BASE}") if self.ids else None

    def remove(self) -> None:
        """Deletes everything: the scores are written."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._claim.close()

    def _check_settings(self, settings: Mapping[str, Any]) -> None:
        path = self.folder / _SETTINGS
        now = json.loads(strict_json(redacted(dict(settings))))
        if path.exists():
            key = next(differing_settings(read_json(path), now), None)
            if key is not None:
                raise InputError(
                    f"{self.folder}: holds partial sums of a run with a different {key}; give the same settings to "
                    "resume, or delete that folder to begin again, or choose another output"
                )
            return
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".draft")
        write_text(draft, strict_json(now, indent=1) + "\n")
        put_in_place(draft, path)

    def _live_files(self) -> list[SumsFile]:
        """Files of the latest generation, its base first. One whose samples are held already is left out: two runs
        at once have both scored them.
        """
        paths = sorted(self.folder.glob("*.safetensors"), key=lambda path: (not path.name.endswith(_BASE), path.name))
        latest = max(map(self._generation_of, paths), default=0)  # its base may be gone: it was damaged and deleted
        files: list[SumsFile] = []
        ids: set[str] = set()
        for path in paths:
            if self._generation_of(path) != latest:
                continue
            file = SumsFile(path)
            if ids & file.ids:
                log.warning("%s: holds samples that another file holds too; they are counted once", path)
                continue
            ids |= file.ids
            files.append(file)
        return files

    def _write(
        self,
        path: Path,
        shapes: Mapping[str, tuple[str, tuple[int, ...]]],
        load: Callable[[str], Tensor],
        samples: Sequence[ScoredSample],
    ) -> None:
        draft = path.with_suffix(f".{secrets.token_hex(4)}.draft")
        try:
            with writing(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
            write_sums(draft, shapes, load, samples)
            with writing(path):
                put_in_place(draft, path)
        finally:
            draft.unlink(missing_ok=True)

    def _remove_dead(self, generation: int) -> None:
        """Deletes files of earlier generations, and those that were never finished."""
        dead = [path for path in self.folder.glob("*.safetensors") if self._generation_of(path) != generation]
        for path in [*dead, *self.folder.glob("*.draft")]:
            path.unlink(missing_ok=True)

    @staticmethod
    def _generation_of(path: Path) -> int:
        return int(path.name.partition("-")[0])


def put_in_place(draft: Path, path: Path) -> None:
    """Gives a finished file its name, in one step that is on the disk when this returns."""
    draft.replace(path)
    fsync(path.parent)


def differing_settings(one: Any, other: Any, path: str = "") -> Iterator[str]:
    """Dotted keys at which two settings differ, each with both values.

    A key of the model's config that only one of them has is passed over: versions of the libraries differ in them.
    """
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for key in sorted({*one, *other}):
            name = f"{path}.{key}" if path else str(key)
            if (key in one and key in other) or not name.startswith("model.config"):
                yield from differing_settings(one.get(key), other.get(key), name)
    elif one != other:
        yield f"{path} ({_short(one)}, here {_short(other)})"


def _short(value: Any) -> str:
    if isinstance(value, list):
        return f"{len(value)} of them"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
