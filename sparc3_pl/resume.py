"""Partial sums on the disk, so that a scoring run that was killed goes on, on any number of processes.

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
output for as long as it lasts, so nothing here belongs to another run that is still going on.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import secrets
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from sparc3_pl.claims import sole_run
from sparc3_pl.distributed import whole
from sparc3_pl.errors import InputError
from sparc3_pl.files import fsync, open_tensors, read_json, strict_json, write_text, writing
from sparc3_pl.provenance import redacted

__all__ = ["PartialSums", "SumsFile", "added", "differing_settings", "partial_folder", "sums_of", "write_sums"]

log = logging.getLogger(__name__)

LayerTensors = Mapping[str, Mapping[str, Tensor]]
Records = list[dict[str, Any]]

_SETTINGS = "settings.json"
_KINDS = {torch.float32: "F32", torch.float64: "F64", torch.int64: "I64"}
_BYTES = {"F32": 4, "F64": 8, "I64": 8}
_BASE = "-base.safetensors"


def partial_folder(output: str | Path) -> Path:
    """Where the partial sums of a run that writes to ``output`` are kept."""
    output = Path(output).absolute()
    return output.with_name(f".{output.name}.partial")


# --- files of sums ----------------------------------------------------------------------------------------------------


class SumsFile:
    """Tensors by layer that simply add up, and the records of the samples they are sums of.

    Args:
        path: A file that ``write_sums`` has written.

    Raises:
        InputError: if it is missing, damaged or cut short.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._open() as file:
            about = file.metadata() or {}
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            self.shapes = {name: (item.get_dtype(), tuple(item.get_shape())) for name, item in slices.items()}
        if "records" not in about:
            raise InputError(f"{path}: holds no records of samples, so it is no file of sums; score again")
        self._digests: dict[str, str] | None = None
        if "digests" in about:  # files of earlier versions have none
            if about.get("sha256") != _header_digest(about["records"], about["digests"]):
                raise self._damaged("its header")
            self._digests = json.loads(about["digests"])
            if self._digests.keys() != self.shapes.keys():
                raise self._damaged("its list of tensors")
        self.records: Records = json.loads(about["records"])

    @property
    def ids(self) -> set[str]:
        """The ids of the samples in this file."""
        return {record["id"] for record in self.records}

    def keys(self, layer: str) -> list[str]:
        """The names of a layer's tensors."""
        return [name.rpartition("/")[2] for name in self.shapes if name.rpartition("/")[0] == layer]

    def load(self, name: str) -> Tensor:
        """The tensor ``LAYER/KEY``, in memory of its own.

        Raises:
            InputError: if its bytes are not those that were written.
        """
        with self._open() as file:
            tensor = file.get_tensor(name).clone()
        if self._digests is not None and _sha256(tensor) != self._digests[name]:
            raise self._damaged(name)
        return tensor

    def verify(self) -> None:
        """Reads every tensor once.

        Raises:
            InputError: if the bytes of one are not those that were written.
        """
        for name in self.shapes:
            self.load(name)

    def _damaged(self, what: str) -> InputError:
        return InputError(
            f"{self.path}: {what} does not match its sha256, so the file is damaged; delete it, its samples are scored "
            "again"
        )

    def _open(self) -> Any:
        try:
            return open_tensors(self.path)
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"{self.path}: cannot be read ({error}); delete it, its samples are scored again"
            ) from error


def write_sums(
    path: Path, shapes: Mapping[str, tuple[str, tuple[int, ...]]], load: Callable[[str], Tensor], records: Records
) -> dict[str, str]:
    """Writes a safetensors file, one tensor at a time, and waits until it is on the disk.

    The library's own function makes a second copy of everything in memory first. The digests are known only when the
    tensors have been written; the header keeps room for them, and is written again at the end.

    Args:
        path: The file.
        shapes: By tensor name ``LAYER/KEY``: the type in safetensors' spelling, and the shape.
        load: Gives a tensor by its name; called once for each, in order.
        records: Of the samples.

    Returns:
        The sha256 of each tensor's bytes, in hex.

    Raises:
        InputError: if it cannot be written.
    """
    placeholders = dict.fromkeys(shapes, "0" * 64)
    room = _header(shapes, records, placeholders)
    digests = {}
    with writing(path), path.open("wb") as stream:
        stream.write(room)
        for name, (kind, shape) in shapes.items():
            tensor = load(name).detach().cpu().contiguous()
            assert (_KINDS[tensor.dtype], tuple(tensor.shape)) == (kind, shape), name
            view = memoryview(tensor.reshape(-1).numpy()).cast("B")
            stream.write(view)
            digests[name] = hashlib.sha256(view).hexdigest()
        header = _header(shapes, records, digests)
        assert len(header) == len(room)
        stream.seek(0)
        stream.write(header)
        stream.flush()
        os.fsync(stream.fileno())
    return digests


def _header(shapes: Mapping[str, tuple[str, tuple[int, ...]]], records: Records, digests: Mapping[str, str]) -> bytes:
    """The beginning of a safetensors file: the length of a JSON object, and that object."""
    texts = {"records": json.dumps(records), "digests": json.dumps(dict(digests))}
    about = texts | {"sha256": _header_digest(texts["records"], texts["digests"])}
    entries: dict[str, Any] = {"__metadata__": about}
    end = 0
    for name, (kind, shape) in shapes.items():
        start, end = end, end + math.prod(shape) * _BYTES[kind]
        entries[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _header_digest(records: str, digests: str) -> str:
    return hashlib.sha256(f"{records}\n{digests}".encode()).hexdigest()


def _sha256(tensor: Tensor) -> str:
    return hashlib.sha256(memoryview(tensor.reshape(-1).numpy()).cast("B")).hexdigest()


def sums_of(tensors: LayerTensors) -> tuple[dict[str, tuple[str, tuple[int, ...]]], Callable[[str], Tensor]]:
    """``shapes`` and ``load`` of ``write_sums`` for a scorer's tensors; a sharded one is gathered when it is loaded."""
    flat = {f"{layer}/{key}": tensor for layer, entry in tensors.items() for key, tensor in entry.items()}
    shapes = {name: (_KINDS[tensor.dtype], tuple(tensor.shape)) for name, tensor in flat.items()}
    return shapes, lambda name: whole(flat[name])


def added(files: Sequence[SumsFile]) -> Callable[[str], Tensor]:
    """Gives the sum over files of a tensor by its name, read one file after the other."""

    def load(name: str) -> Tensor:
        total = files[0].load(name)
        for file in files[1:]:
            total += file.load(name)
        return total

    return load


# --- the folder beside the output -------------------------------------------------------------------------------------


class PartialSums:
    """The partial sums of a scoring run.

    On rank 0 ``take_up`` comes first; what it returns goes to the other ranks, and every rank calls ``join`` with it.

    Args:
        output: Where the scores will go.
        rank: Of this process.
    """

    def __init__(self, output: str | Path, rank: int) -> None:
        self.folder = partial_folder(output)
        self._rank = rank
        self._output = output
        self._claim = ExitStack()
        self._generation, self._run = 0, ""
        self.ids: frozenset[str] = frozenset()
        """The ids of the samples that earlier runs have scored."""

    def take_up(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Claims the output until ``remove``, and folds what earlier runs have left into one base; on rank 0 only.

        Raises:
            InputError: if another run is writing to the output, or what earlier runs have left was made with other
                settings, is damaged, or cannot be read or written.
        """
        self._claim.enter_context(sole_run(self._output))  # so what is here belongs to runs that have ended
        for half_written in self.folder.parent.glob(f"{self.folder.name}-*"):  # by a run that was killed meanwhile
            shutil.rmtree(half_written, ignore_errors=True)
        self._check_settings(settings)
        live = self._live_files()
        generation = self._generation_of(live[0].path) if live else 0
        if live and (len(live) > 1 or not live[0].path.name.endswith(_BASE)):
            generation += 1
            self._fold(live, generation)
        else:
            for file in live:
                file.verify()  # now, not when it is added to hours of work
        self._remove_dead(generation)
        ids = sorted(identity for file in live for identity in file.ids)
        return {"generation": generation, "run": secrets.token_hex(4), "ids": ids}

    def join(self, agreed: Mapping[str, Any]) -> None:
        """Takes over what rank 0 has found."""
        self._generation, self._run, self.ids = agreed["generation"], agreed["run"], frozenset(agreed["ids"])

    def save(self, tensors: LayerTensors, records: Records) -> None:
        """Puts this rank's sums on the disk in place of its earlier ones; an interruption leaves one or the other.

        Raises:
            InputError: if they cannot be written.
        """
        name = f"{self._generation:06d}-{self._run}-{self._rank:05d}.safetensors"
        shapes, load = sums_of(tensors)
        self._write(self.folder / name, shapes, load, records)

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
                    f"{self.folder}: holds partial sums of a run with another {key}; give the same settings to go on, "
                    "or delete that folder to begin again, or choose another output"
                )
            return
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".draft")
        write_text(draft, strict_json(now, indent=1) + "\n")
        publish(draft, path)

    def _live_files(self) -> list[SumsFile]:
        """Files of the latest generation, its base first. One whose samples are held already is left out: two runs
        at once have both scored them.
        """
        paths = sorted(self.folder.glob("*.safetensors"), key=lambda path: (not path.name.endswith(_BASE), path.name))
        latest = max(map(self._generation_of, paths), default=0)  # its base may be gone: it was damaged and deleted
        found: list[SumsFile] = []
        held: set[str] = set()
        for path in paths:
            if self._generation_of(path) != latest:
                continue
            file = SumsFile(path)
            if held & file.ids:
                log.warning("%s: holds samples that another file holds too; they are counted once", path)
                continue
            held |= file.ids
            found.append(file)
        return found

    def _fold(self, files: Sequence[SumsFile], generation: int) -> None:
        records = [record for file in files for record in file.records]
        self._write(self.folder / f"{generation:06d}{_BASE}", files[0].shapes, added(files), records)

    def _write(
        self,
        path: Path,
        shapes: Mapping[str, tuple[str, tuple[int, ...]]],
        load: Callable[[str], Tensor],
        records: Records,
    ) -> None:
        draft = path.with_suffix(f".{secrets.token_hex(4)}.draft")
        try:
            with writing(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
            write_sums(draft, shapes, load, records)
            with writing(path):
                publish(draft, path)
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


def publish(draft: Path, path: Path) -> None:
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
