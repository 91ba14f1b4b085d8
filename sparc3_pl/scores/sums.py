"""A file of sums that are read one tensor at a time."""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from sparc3_pl.errors import InputError
from sparc3_pl.io.files import open_tensors, tensor_digest, writing
from sparc3_pl.io.formats import Record
from sparc3_pl.runtime.collectives import whole
from sparc3_pl.scores.manifest import ScoredSample, samples_from

__all__ = ["SumsFile", "added", "samples_digest", "sums_of", "write_sums"]


LayerTensors = Mapping[str, Mapping[str, Tensor]]

_KINDS = {torch.float32: "F32", torch.float64: "F64", torch.int64: "I64"}

_BYTES = {"F32": 4, "F64": 8, "I64": 8}


# --- files of sums ----------------------------------------------------------------------------------------------------


class SumsFile:
    """Tensors by layer that simply add up, and the samples they are sums of.

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
        records = json.loads(about["records"])
        self.samples = samples_from(records, path)
        self.samples_sha256 = samples_digest(records)

    @property
    def ids(self) -> set[str]:
        """The ids of the samples in this file."""
        return {sample.id for sample in self.samples}

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
        if self._digests is not None and tensor_digest(tensor) != self._digests[name]:
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
    path: Path,
    shapes: Mapping[str, tuple[str, tuple[int, ...]]],
    load: Callable[[str], Tensor],
    samples: Sequence[ScoredSample],
) -> dict[str, str]:
    """Writes a safetensors file, one tensor at a time, and waits until it is on the disk.

    The library's own function makes a second copy of everything in memory first. The digests are known only when the
    tensors have been written; the header keeps room for them, and is written again at the end.

    Args:
        path: The file.
        shapes: The type in safetensors' spelling and the shape of each tensor, by its name ``LAYER/KEY``.
        load: Gives a tensor by its name; called once for each, in order.
        samples: The samples that the tensors are sums of.

    Returns:
        The sha256 of each tensor's bytes, in hex.

    Raises:
        InputError: if it cannot be written.
    """
    records = json.dumps([sample.to_json() for sample in samples])
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


def _header(shapes: Mapping[str, tuple[str, tuple[int, ...]]], records: str, digests: Mapping[str, str]) -> bytes:
    """The beginning of a safetensors file: the length of a JSON object, and that object."""
    texts = {"records": records, "digests": json.dumps(dict(digests))}
    about = texts | {"sha256": _header_digest(texts["records"], texts["digests"])}
    entries: dict[str, Any] = {"__metadata__": about}
    end = 0
    for name, (kind, shape) in shapes.items():
        start, end = end, end + math.prod(shape) * _BYTES[kind]
        entries[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def samples_digest(records: list[Record]) -> str:
    """The sha256 of the records of samples, as JSON objects."""
    return hashlib.sha256(json.dumps(records, sort_keys=True).encode()).hexdigest()


def _header_digest(records: str, digests: str) -> str:
    return hashlib.sha256(f"{records}\n{digests}".encode()).hexdigest()


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
