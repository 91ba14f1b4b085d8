"""The score folder: one number per neuron or weight, averaged over samples, with everything needed to trust it.

```
scores/
  manifest.json         what was scored, on what, how; counts and sha256 of every layer
  scores.safetensors    neuron scores: all layers, float32 [out]
  LAYER.safetensors     weight scores: one file per layer, float32 [out, in]
  squares.safetensors   on request: the mean over samples of squared per-sample neuron scores (for the t contrast)
  groups.safetensors    on request: the mean scores of disjoint groups of the samples, [groups, out] (for evidence)
  samples.jsonl         one line per sample: id, tokens, ending, relevance, target, ...
```

Tensors are read with plain reads, never mapped: mapped pages count as resident memory, and a file cut short under a
map kills the process. So a folder of any size is read in blocks, or a layer at a time.
"""

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from sparc3_pl.errors import InputError
from sparc3_pl.io.files import inside, sha256_of_file
from sparc3_pl.model.identity import differing_config
from sparc3_pl.scores.manifest import (
    FORMAT,
    GROUPS,
    MANIFEST,
    SAMPLES,
    SQUARES,
    LayerStats,
    Manifest,
    ScoredSample,
    samples_from,
)

__all__ = ["BLOCK", "ScoreFolder", "mean_blocks", "require_comparable"]

BLOCK = 1 << 19  # values read at a time: 2 MB of float32, which stays in cache and does not scatter the heap


class ScoreFolder:
    """A score folder that was checked when opened: right version, all files there, none cut short.

    The bytes of a layer are checked against their sha256 when they are read, again if the file was written since.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest
        self._verified: dict[str, tuple[int, int]] = {}  # layer to its file's time and size when its sha256 was right
        names = {stats.file for stats in manifest.layers.values()}
        self._spans = {name: _spans(inside(path, name)) for name in sorted(names)}
        for name, stats in manifest.layers.items():
            self._check_span(self._spans[stats.file], name, stats.file)
        self._square_spans = _spans(path / SQUARES) if manifest.squares else {}
        for name in manifest.squares:
            self._check_span(self._square_spans, name, SQUARES)
        self._group_spans = _spans(path / GROUPS) if manifest.groups else {}
        for name in manifest.groups:
            self._check_span(self._group_spans, name, GROUPS, [len(manifest.group_sizes)])

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Opens a score folder for reading.

        Raises:
            InputError: if it is missing, not a score folder, of another version, incomplete, or cut short.
        """
        path = Path(path)
        if not path.exists():
            raise InputError(f"{path}: there is no such score folder; check the path, or score first")
        if (path / "shard.json").is_file():
            raise InputError(f"{path}: is one part of a scoring run; join all of them with merge first")
        if not (path / MANIFEST).is_file():
            raise InputError(f"{path}: not a score folder (no {MANIFEST}); give the folder that score wrote")
        return cls(path, FORMAT.read(path / MANIFEST))

    def _check_span(
        self, spans: Mapping[str, tuple[int, list[int]]], name: str, file: str, leading: Sequence[int] = ()
    ) -> None:
        if name not in self.manifest.layers or name not in spans:
            raise InputError(f"{self.path / file}: layer {name} is missing; the folder is incomplete, score again")
        shape = [*leading, *self.manifest.layers[name].shape]
        if spans[name][1] != shape:
            raise InputError(
                f"{self.path / file}: layer {name} has shape {spans[name][1]}, but the manifest says "
                f"{shape}; the folder is damaged, score again"
            )

    @property
    def layers(self) -> list[str]:
        """The module names, in the model's order."""
        return list(self.manifest.layers)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a layer's scores, ``[out]`` or ``[out, in]``."""
        return tuple(self._stats(name).shape)

    @property
    def holds_weights(self) -> bool:
        """Whether the scores are of single weights."""
        return any(len(layer.shape) > 1 for layer in self.manifest.layers.values())

    def component(self, name: str) -> str:
        """Name of the kind of component that a layer's scores are of.

        Raises:
            InputError: if the folder has several kinds and does not say which layer is of which.
        """
        kind = self._stats(name).component or self.manifest.granularity
        if "+" in kind:
            raise InputError(
                f"{self.path}: holds scores of {kind} and does not say which layer is of which kind, as earlier "
                "versions wrote it; score again"
            )
        return kind

    def _stats(self, name: str) -> LayerStats:
        if name not in self.manifest.layers:
            raise InputError(
                f"{self.path}: layer {name} is not scored here; scored are {', '.join(self.layers[:3])}, ..."
            )
        return self.manifest.layers[name]

    def blocks(self, name: str, size: int = BLOCK) -> Iterator[Tensor]:
        """A layer's scores, flattened, ``size`` values at a time.

        Raises:
            InputError: after the last block, if the bytes read do not match their sha256: use nothing before that.
        """
        stats = self._stats(name)
        offset, shape = self._spans[stats.file][name]
        path = self.path / stats.file
        if not path.is_file():
            raise InputError(f"{path}: is missing; the score folder is incomplete, score again")
        state = (path.stat().st_mtime_ns, path.stat().st_size)
        is_known = self._verified.get(name) == state  # a selection reads several times; hashing costs more than reading
        yield from _read(path, name, offset, math.prod(shape), size, None if is_known else stats.sha256)
        self._verified[name] = state

    def counted_blocks(self, name: str, size: int = BLOCK) -> Iterator[Tensor]:
        """The scores that the layer's figures in the manifest count, in blocks as ``blocks`` gives them."""
        counted, start = self._stats(name).counted, 0
        for block in self.blocks(name, size):
            own = block[max(0, counted.start - start) : max(0, counted.stop - start)]
            start += len(block)
            if len(own):
                yield own

    def load(self, name: str) -> Tensor:
        """A layer's scores, ``[out]`` or ``[out, in]`` float32.

        Raises:
            InputError: if the layer is not scored, or its bytes do not match their sha256.
        """
        shape = self.shape(name)
        (values,) = self.blocks(name, math.prod(shape))
        return values.view(shape)

    def load_squares(self, name: str) -> Tensor:
        """Mean over samples of a layer's squared per-sample neuron scores, ``[out]`` float32.

        Raises:
            InputError: if they were not stored, or are damaged.
        """
        shape = self.shape(name)
        if not self.manifest.squares:
            raise InputError(f"{self.path}: holds no squares of the scores; score again with --model.squares true")
        offset, _ = self._square_spans[name]
        count, digest = math.prod(shape), self.manifest.squares[name]
        (values,) = _read(self.path / SQUARES, name, offset, count, count, digest)
        return values

    def load_groups(self, name: str) -> Tensor:
        """Mean scores of a layer over each group of samples, ``[groups, out]`` float32 (``manifest.group_sizes``).

        Raises:
            InputError: if they were not stored, or are damaged.
        """
        shape = (len(self.manifest.group_sizes), *self.shape(name))
        if not self.manifest.groups:
            raise InputError(f"{self.path}: holds no groups of samples; score again with --model.groups 8")
        offset, _ = self._group_spans[name]
        count, digest = math.prod(shape), self.manifest.groups[name]
        (values,) = _read(self.path / GROUPS, name, offset, count, count, digest)
        return values.view(shape)

    @property
    def digest(self) -> str:
        """sha256 of ``manifest.json``, which names the digests of the scores: whose scores these are."""
        return sha256_of_file(self.path / MANIFEST)

    def samples(self) -> list[ScoredSample]:
        """The samples of ``samples.jsonl``; none if there is no such file.

        Raises:
            InputError: if the file was changed or damaged.
        """
        path = self.path / SAMPLES
        if not path.is_file():
            if self.manifest.samples_sha256 is not None:
                raise InputError(f"{path}: is missing; the folder is incomplete, score again")
            return []
        if self.manifest.samples_sha256 not in (None, sha256_of_file(path)):
            raise InputError(f"{path}: does not match its sha256; it was changed or damaged, score again")
        try:
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        except ValueError as error:
            raise InputError(f"{path}: a line is not valid JSON ({error}); it is damaged, score again") from error
        return samples_from(rows, path)


def _spans(path: Path) -> dict[str, tuple[int, list[int]]]:
    """The place in bytes at which each float32 tensor of a safetensors file begins, and its shape, by name.

    Raises:
        InputError: if the file is missing, is no safetensors file, holds another type, or is cut short.
    """
    try:
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            size = os.fstat(stream.fileno()).st_size
            header = json.loads(stream.read(length)) if length < size else None
    except FileNotFoundError as error:
        raise InputError(f"{path}: is missing; the score folder is incomplete, score again") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    except (ValueError, struct.error) as error:
        raise InputError(f"{path}: not a whole safetensors file; it is damaged or cut short, score again") from error
    spans, end = {}, 8 + length
    for name, entry in (header or {}).items():
        if name == "__metadata__":
            continue
        start, stop = entry["data_offsets"]
        if entry["dtype"] != "F32" or stop - start != 4 * math.prod(entry["shape"]):
            raise InputError(f"{path}: tensor {name} is not float32 or of the wrong size; it is damaged, score again")
        spans[name], end = (8 + length + start, entry["shape"]), max(end, 8 + length + stop)
    if header is None or size != end:
        raise InputError(f"{path}: has {size} bytes where {end} belong; it is cut short or damaged, score again")
    return spans


def _read(path: Path, name: str, offset: int, count: int, size: int, sha256: str | None) -> Iterator[Tensor]:
    """Reads ``count`` float32 from ``offset`` on, ``size`` at a time, and checks their sha256 (if any) at the end."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as stream:
            stream.seek(offset)
            for start in range(0, count, size):
                block = torch.empty(min(size, count - start))
                view = memoryview(block.numpy()).cast("B")
                if stream.readinto(view) != len(view):
                    raise InputError(f"{path}: layer {name} is cut short; score again")
                if sha256 is not None:
                    digest.update(view)
                yield block
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the disk") from error
    if sha256 is not None and digest.hexdigest() != sha256:
        raise InputError(f"{path}: layer {name} does not match its sha256; a byte was changed, score again")


def mean_blocks(folders: Sequence[ScoreFolder], name: str, size: int = BLOCK) -> Iterator[Tensor]:
    """The mean of several folders' scores of one layer, flattened, block by block (float64 sums, float32 out)."""
    for blocks in zip(*(folder.blocks(name, size) for folder in folders), strict=True):
        if len(blocks) == 1:
            yield blocks[0]
        else:
            yield (sum(block.double() for block in blocks) / len(blocks)).float()


def require_comparable(folders: Sequence[ScoreFolder], but: Sequence[str] = ()) -> None:
    """Refuses folders whose scores must not be averaged or subtracted.

    Args:
        folders: The folders.
        but: Keys of the manifest in which they may differ.

    Raises:
        InputError: naming every key that differs, with both values and folders: model fingerprint, method,
            granularity, target, signed, plan, layers, shapes.
    """
    if not folders:
        raise InputError("no score folder was given; name at least one")
    first = folders[0]
    differences = [text for other in folders[1:] for text in _differences(first, other, but)]
    if differences:
        raise InputError(f"scores that cannot be compared: {'; '.join(differences)}; score them alike")


def _differences(first: ScoreFolder, other: ScoreFolder, but: Sequence[str]) -> list[str]:
    def told(key: str, mine: Any, yours: Any) -> str:
        return f"{key}={mine} in {first.path} but {yours} in {other.path}"

    one, two = first.manifest, other.manifest
    differences = []
    if one.model.fingerprint != two.model.fingerprint:
        differences.append(told("model.fingerprint", one.model.fingerprint, two.model.fingerprint))
    if (key := differing_config(one.model.config, two.model.config)) is not None:
        differences.append(f"model.config.{key} in {other.path}")
    for key in ("method", "method_args", "granularity", "granularity_args", "target", "target_args", "signed", "plan"):
        if key not in but and getattr(one, key) != getattr(two, key):
            differences.append(told(key, getattr(one, key), getattr(two, key)))
    if first.layers != other.layers:
        odd = ", ".join(sorted(set(first.layers) ^ set(other.layers))[:3]) or "in another order"
        differences.append(told("layers", len(first.layers), f"{len(other.layers)} ({odd})"))
    common = [name for name in first.layers if name in two.layers]
    unequal = [name for name in common if first.shape(name) != other.shape(name)]
    kinds = [(name, one.layers[name].component, two.layers[name].component) for name in common]
    differences += [
        told(f"component of {name}", *pair) for name, *pair in kinds if None not in pair and pair[0] != pair[1]
    ]
    differences += [told(f"shape of {name}", list(first.shape(name)), list(other.shape(name))) for name in unequal[:3]]
    return differences
