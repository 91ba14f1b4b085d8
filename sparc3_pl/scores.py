"""The score folder: one number a neuron or a weight, averaged over samples, with everything needed to trust it.

```
scores/
  manifest.json         what was scored, on what, how; counts and sha256 of every layer
  scores.safetensors    neuron scores: all layers, float32 [out]
  LAYER.safetensors     weight scores: a file a layer, float32 [out, in]
  squares.safetensors   on request: the mean over samples of squared per-sample neuron scores (for the t contrast)
  groups.safetensors    on request: the mean scores of disjoint groups of the samples, [groups, out] (for evidence)
  samples.jsonl         a line a sample: id, tokens, ending, relevance, target, ...
```

Tensors are read with plain reads, never mapped: mapped pages count as resident memory, and a file cut short under a
map kills the process. So a folder of any size is read in blocks, or a layer at a time.
"""

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from sparc3_pl import provenance
from sparc3_pl.errors import InputError
from sparc3_pl.files import (
    inside,
    json_digest,
    new_folder,
    read_json,
    save_tensors,
    sha256_of_file,
    strict_json,
    write_text,
)
from sparc3_pl.language_model import differing_config

__all__ = [
    "BLOCK",
    "FORMAT_VERSION",
    "MARKER",
    "LayerStats",
    "Manifest",
    "ScoreFolder",
    "ScoreWriter",
    "mean_blocks",
    "mean_scores",
    "require_comparable",
]

FORMAT_VERSION = 1
BLOCK = 1 << 19  # values read at a time: 2 MB of float32, which stays in cache and does not scatter the heap
MARKER = "manifest.json"
"""The file by which a score folder is known."""
_MANIFEST, _SAMPLES, _SCORES, _SQUARES = "manifest.json", "samples.jsonl", "scores.safetensors", "squares.safetensors"
_GROUPS = "groups.safetensors"
_METHODS = ("lrp", "gradient", "wanda", "magnitude", "random")


@dataclass(frozen=True)
class LayerStats:
    """A layer's entry in the manifest.

    Attributes:
        shape: ``[out]`` or ``[out, in]``.
        file: The file in the score folder that holds the tensor.
        sum: The sum of the finite scores, in float64.
        nan: Number of NaNs, those that were put to zero while scoring included.
        inf: Number of infinities, likewise.
        negative: Number of scores below zero.
        zero: Number of scores equal to zero.
        sha256: Of the tensor's bytes, in hex.
    """

    shape: list[int]
    file: str
    sum: float
    nan: int
    inf: int
    negative: int
    zero: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a score folder says of itself; the keys of ``manifest.json``.

    Attributes:
        method: ``lrp``, ``gradient``, ``wanda``, ``magnitude`` or ``random``.
        granularity: ``neuron`` or ``weight``.
        signed: Whether neuron scores keep their sign.
        num_samples: Samples in the mean.
        num_tokens: Real tokens of those samples.
        model: ``pretrained``, ``revision``, ``fingerprint``, ``architecture``, ``dtype``.
        data: ``source``, ``seed``, ``seq_len``, ``filter``, ``sample_ids``, ...
        layers: By module name, in the model's order.
        total_relevance: Sum of all scores.
        versions: Of Python and the packages.
        command: The command line, without tokens.
        created: UTC, ISO 8601.
        format_version: Of this folder's layout.
        squares: sha256 of the squares by module name; empty if they were not asked for.
        groups: sha256 of the groups' scores by module name; empty if they were not asked for.
        group_sizes: Samples of each group.
        samples_sha256: sha256 of ``samples.jsonl``.
        extra: Any further top-level keys, kept as they were.
    """

    method: str
    granularity: str
    signed: bool
    num_samples: int
    num_tokens: int
    model: dict[str, Any]
    data: dict[str, Any]
    layers: dict[str, LayerStats]
    total_relevance: float
    versions: dict[str, str]
    command: str
    created: str
    format_version: int = FORMAT_VERSION
    squares: dict[str, str] = field(default_factory=dict)
    groups: dict[str, str] = field(default_factory=dict)
    group_sizes: list[int] = field(default_factory=list)
    samples_sha256: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As the JSON object, ``extra`` spread out, with its own sha256 as the last key."""
        data = {"format_version": self.format_version} | asdict(self)
        extra = data.pop("extra")
        data = json.loads(strict_json(data | extra))
        return data | {"sha256": json_digest(data)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], where: str | Path = _MANIFEST) -> Self:
        """Reads and checks the JSON object; ``where`` names the file in errors.

        Raises:
            InputError: for another format version, a changed byte, a missing key, or a value of the wrong type.
        """
        _check_version(data, where)
        data = dict(data)
        claimed = data.pop("sha256", None)
        if claimed is not None and claimed != json_digest(data):
            raise InputError(f"{where}: its content does not match its sha256; it was changed or damaged, score again")
        known = {item.name: item for item in fields(cls) if item.name != "extra"}
        for name in (name for name, item in known.items() if _required(item)):
            if name not in data:
                raise InputError(f"{where}: the key {name!r} is missing; the folder is incomplete, score again")
        values = {name: _typed(name, data[name], known[name].type, where) for name in known if name in data}
        values["layers"] = {name: _layer(name, entry, where) for name, entry in values["layers"].items()}
        manifest = cls(**values, extra={key: value for key, value in data.items() if key not in known})
        manifest._check(where)
        return manifest

    def _check(self, where: str | Path) -> None:
        if self.granularity not in ("neuron", "weight"):
            raise InputError(f"{where}: granularity={self.granularity!r} is unknown; it must be neuron or weight")
        if self.method not in _METHODS:
            raise InputError(f"{where}: method={self.method!r} is unknown; known are {', '.join(_METHODS)}")
        if not self.layers:
            raise InputError(f"{where}: no layer is scored; score again with other model.targets")
        if not isinstance(self.model.get("fingerprint"), str):
            raise InputError(f"{where}: the model's fingerprint is missing; score again")
        dims = 1 if self.granularity == "neuron" else 2
        for name, layer in self.layers.items():
            if len(layer.shape) != dims or not all(type(size) is int and size > 0 for size in layer.shape):
                raise InputError(
                    f"{where}: layer {name} has shape {layer.shape}, which no {self.granularity} score has"
                )
        for name, span in (self.extra.get("neuron_rows") or {}).items():
            whole = range(self.layers[name].shape[0] + 1) if name in self.layers else ()
            if not (isinstance(span, list) and len(span) == 2 and all(i in whole for i in span) and span[0] < span[1]):
                raise InputError(f"{where}: neuron_rows of layer {name} are {span!r}; the file is damaged, score again")


def _required(item: Any) -> bool:
    return item.default is MISSING and item.default_factory is MISSING


def _check_version(data: Mapping[str, Any], where: str | Path) -> None:
    version = data.get("format_version")
    if version is None:
        raise InputError(f"{where}: has no format_version, so it is not a score folder's manifest; score again")
    if version != FORMAT_VERSION:
        way = "score again with this program" if _is_older(version) else "update sparc3_pl"
        raise InputError(f"{where}: format_version={version}, but this program reads {FORMAT_VERSION}; {way}")


def _is_older(version: Any) -> bool:
    return not isinstance(version, int) or version < FORMAT_VERSION


def _typed(name: str, value: Any, kind: Any, where: str | Path) -> Any:
    """``value`` if it is of the annotated type; an int passes for a float, and ``null`` for a float that overflowed."""
    base = getattr(kind, "__origin__", kind)
    if base is float and type(value) in (int, float, type(None)):
        return float("nan") if value is None else float(value)
    wanted = base if isinstance(base, type) else (str, type(None))
    if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
        raise InputError(f"{where}: {name}={value!r} is not of type {kind}; the file is damaged, score again")
    if wanted is int and value < 0:
        raise InputError(f"{where}: {name}={value} is negative; the file is damaged, score again")
    return value


def _layer(name: str, entry: Any, where: str | Path) -> LayerStats:
    wanted = {item.name: item.type for item in fields(LayerStats)}
    if not isinstance(entry, dict) or set(wanted) - set(entry):
        raise InputError(f"{where}: the entry of layer {name} is incomplete; the file is damaged, score again")
    return LayerStats(**{key: _typed(f"layers.{name}.{key}", entry[key], kind, where) for key, kind in wanted.items()})


class ScoreWriter:
    """Writes a score folder, whole or not at all.

    ```python
    with ScoreWriter("scores", overwrite=False) as writer:
        for name, scores in layers:          # [out] a neuron, [out, in] a weight
            writer.add_layer(name, scores)
        writer.finish(method="lrp", signed=False, num_samples=16, num_tokens=4096, model={...}, data={...})
    ```
    Everything is written to a hidden sibling, which takes the folder's name when the block ends. If the block raises,
    or ends without ``finish``, nothing remains. Weight scores go to the disk as they are added: memory of one layer.

    Args:
        folder: Where the scores go.
        overwrite: Whether an earlier score folder there may be replaced (as a whole).

    Raises:
        InputError: if the place is taken, cannot be written, or the disk is full.
    """

    def __init__(self, folder: str | Path, overwrite: bool = False) -> None:
        self.folder = Path(folder)
        self._overwrite = overwrite
        self._exit = ExitStack()
        self._layers: dict[str, LayerStats] = {}
        self._neurons: dict[str, Tensor] = {}  # small: written together at the end
        self._squares: dict[str, Tensor] = {}
        self._groups: dict[str, Tensor] = {}
        self._group_sizes: list[int] = []
        self._dims: int | None = None
        self._finished = False

    def __enter__(self) -> Self:
        self._path = self._exit.enter_context(new_folder(self.folder, self._overwrite, _MANIFEST))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and not self._finished:
            failure = AssertionError("ScoreWriter: the block ended without finish(); nothing was written")
            self._exit.__exit__(AssertionError, failure, None)
            raise failure
        self._exit.__exit__(kind, error, trace)

    def add_layer(
        self,
        name: str,
        scores: Tensor,
        squares: Tensor | None = None,
        groups: tuple[Tensor, list[int]] | None = None,
        *,
        nan: int = 0,
        inf: int = 0,
    ) -> None:
        """Adds a layer; the folder keeps the order of the calls.

        Args:
            name: The module's name in ``named_modules()``.
            scores: ``[out]`` or ``[out, in]``, on any device; kept as float32.
            squares: ``[out]``: mean over samples of the squared per-sample neuron score.
            groups: ``[groups, out]``: mean scores of disjoint groups of the samples, and the groups' sizes.
            nan: NaNs that were put to zero while scoring, counted beside those still in ``scores``.
            inf: Infinities, likewise.
        """
        assert scores.dim() == (self._dims or scores.dim()) in (1, 2), f"{name}: scores of unlike granularity"
        assert name not in self._layers, f"{name} was added twice"
        assert squares is None or squares.shape == scores.shape == (len(scores),), f"{name}: squares are for neurons"
        self._dims = scores.dim()
        scores = scores.detach().to("cpu", torch.float32).contiguous()
        file = _SCORES if self._dims == 1 else f"{name}.safetensors"
        self._layers[name] = _statistics(scores, file, nan, inf)
        if self._dims == 1:
            self._neurons[name] = scores.clone()
        else:
            save_tensors(inside(self._path, file), {name: scores})
        if squares is not None:
            self._squares[name] = squares.detach().to("cpu", torch.float32, copy=True).contiguous()
        if groups is not None:
            means, sizes = groups
            assert means.shape == (len(sizes), *scores.shape), f"{name}: groups of another shape"
            self._groups[name] = means.detach().to("cpu", torch.float32, copy=True).contiguous()
            self._group_sizes = sizes

    def add_text(self, name: str, text: str) -> None:
        """Adds a text file beside the scores, such as the resolved ``config.yaml``."""
        write_text(inside(self._path, name), text)

    def finish(
        self,
        *,
        method: str,
        num_samples: int,
        num_tokens: int,
        model: dict[str, Any],
        data: dict[str, Any],
        signed: bool = False,
        granularity: str | None = None,
        total_relevance: float | None = None,
        samples: Iterable[Mapping[str, Any]] = (),
        **extra: Any,
    ) -> Manifest:
        """Writes manifest and samples; the folder takes its name when the ``with`` block ends.

        Args:
            method: As the manifest's key; so are the others that are not explained here.
            num_samples: Samples in the mean.
            num_tokens: Real tokens in them.
            model: ``language_model.describe(model, source)``.
            data: ``ReferenceData.describe()``.
            signed: Whether neuron scores keep their sign.
            granularity: ``neuron`` or ``weight``; read off the layers if not given.
            total_relevance: Sum of all layers' sums if not given.
            samples: A dict a sample: ``id``, ``num_tokens``, ``ending``, ``relevance``, ...
            extra: ``versions``, ``command``, ``created`` in place of this process's own, and any further keys.
        """
        seen = {1: "neuron", 2: "weight"}[self._dims] if self._dims else granularity
        assert granularity in (None, seen), f"granularity={granularity}, but the scores added are {seen} scores"
        assert not self._squares or self._squares.keys() == self._layers.keys(), "squares for some layers only"
        if self._neurons:
            save_tensors(self._path / _SCORES, self._neurons)
        if self._squares:
            save_tensors(self._path / _SQUARES, self._squares)
        if self._groups:
            save_tensors(self._path / _GROUPS, self._groups)
        write_text(self._path / _SAMPLES, "".join(strict_json(dict(sample)) + "\n" for sample in samples))
        total = math.fsum(layer.sum for layer in self._layers.values())
        manifest = Manifest(
            method=method,
            granularity=seen or "neuron",
            signed=signed,
            num_samples=num_samples,
            num_tokens=num_tokens,
            model=provenance.redacted_values(model),
            data=provenance.redacted_values(data),
            layers=self._layers,
            total_relevance=total if total_relevance is None else total_relevance,
            versions=extra.pop("versions", None) or provenance.versions(),
            command=extra.pop("command", None) or provenance.command_line(),
            created=extra.pop("created", None) or provenance.now(),
            squares={name: _sha256(squares) for name, squares in self._squares.items()},
            groups={name: _sha256(means) for name, means in self._groups.items()},
            group_sizes=self._group_sizes,
            samples_sha256=sha256_of_file(self._path / _SAMPLES),
            extra={"hardware": provenance.hardware()} | provenance.redacted_values(extra),
        )
        manifest._check(self.folder)
        write_text(self._path / _MANIFEST, json.dumps(manifest.to_json(), indent=1, ensure_ascii=False) + "\n")
        self._finished = True
        return manifest


def _sha256(tensor: Tensor) -> str:
    return hashlib.sha256(memoryview(tensor.numpy()).cast("B")).hexdigest()


def _statistics(scores: Tensor, file: str, nan: int, inf: int) -> LayerStats:
    """Counts and the float64 sum of a layer, block by block: no second copy of a large one."""
    sums, negative, zero = [], 0, 0
    for block in scores.flatten().split(BLOCK):
        nan += int(block.isnan().sum())
        inf += int(block.isinf().sum())
        negative += int((block < 0).sum())
        zero += int((block == 0).sum())
        sums.append(float(torch.nan_to_num(block, nan=0.0, posinf=0.0, neginf=0.0).double().sum()))
    return LayerStats(list(scores.shape), file, math.fsum(sums), nan, inf, negative, zero, _sha256(scores))


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
        self._square_spans = _spans(path / _SQUARES) if manifest.squares else {}
        for name in manifest.squares:
            self._check_span(self._square_spans, name, _SQUARES)
        self._group_spans = _spans(path / _GROUPS) if manifest.groups else {}
        for name in manifest.groups:
            self._check_span(self._group_spans, name, _GROUPS, [len(manifest.group_sizes)])

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
            raise InputError(f"{path}: is one shard of a scoring run; join all of them with merge first")
        if not (path / _MANIFEST).is_file():
            raise InputError(f"{path}: not a score folder (no {_MANIFEST}); give the folder that score wrote")
        return cls(path, Manifest.from_json(read_json(path / _MANIFEST), path / _MANIFEST))

    def _check_span(
        self, spans: Mapping[str, tuple[int, list[int]]], name: str, file: str, leading: Sequence[int] = ()
    ) -> None:
        if name not in self.manifest.layers or name not in spans:
            raise InputError(f"{self.path / file}: layer {name} is missing; the folder is incomplete, score again")
        wanted = [*leading, *self.manifest.layers[name].shape]
        if spans[name][1] != wanted:
            raise InputError(
                f"{self.path / file}: layer {name} has shape {spans[name][1]}, but the manifest says "
                f"{wanted}; the folder is damaged, score again"
            )

    @property
    def layers(self) -> list[str]:
        """The module names, in the model's order."""
        return list(self.manifest.layers)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a layer's scores, ``[out]`` or ``[out, in]``."""
        return tuple(self._stats(name).shape)

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
        known = self._verified.get(name) == state  # a selection reads several times; hashing costs more than reading
        yield from _read(path, name, offset, math.prod(shape), size, None if known else stats.sha256)
        self._verified[name] = state

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
        (values,) = _read(self.path / _SQUARES, name, offset, count, count, digest)
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
        (values,) = _read(self.path / _GROUPS, name, offset, count, count, digest)
        return values.view(shape)

    def samples(self) -> list[dict[str, Any]]:
        """The lines of ``samples.jsonl``; empty if there is no such file.

        Raises:
            InputError: if the file was changed or damaged.
        """
        path = self.path / _SAMPLES
        if not path.is_file():
            if self.manifest.samples_sha256 is not None:
                raise InputError(f"{path}: is missing; the folder is incomplete, score again")
            return []
        if self.manifest.samples_sha256 not in (None, sha256_of_file(path)):
            raise InputError(f"{path}: does not match its sha256; it was changed or damaged, score again")
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def _spans(path: Path) -> dict[str, tuple[int, list[int]]]:
    """Where each float32 tensor of a safetensors file begins, in bytes, and its shape.

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


def mean_scores(folders: Sequence[ScoreFolder]) -> Iterator[tuple[str, Tensor]]:
    """The mean over seeds: each layer's name and the mean of the folders' scores, one layer at a time.

    Raises:
        InputError: if the folders cannot be compared (``require_comparable``) or a byte was changed.
    """
    require_comparable(folders)
    for name in folders[0].layers:
        mean = torch.empty(math.prod(folders[0].shape(name)))
        start = 0
        for block in mean_blocks(folders, name):
            mean[start : start + len(block)] = block
            start += len(block)
        yield name, mean.view(folders[0].shape(name))


def require_comparable(folders: Sequence[ScoreFolder]) -> None:
    """Refuses folders whose scores must not be averaged or subtracted.

    Raises:
        InputError: naming every key that differs, with both values and folders: model fingerprint, method,
            granularity, signed, layers, shapes.
    """
    if not folders:
        raise InputError("no score folder was given; name at least one")
    first = folders[0]
    differences = [text for other in folders[1:] for text in _differences(first, other)]
    if differences:
        raise InputError(f"scores that cannot be compared: {'; '.join(differences)}; score them alike")


def _differences(first: ScoreFolder, other: ScoreFolder) -> list[str]:
    def told(key: str, mine: Any, yours: Any) -> str:
        return f"{key}={mine} in {first.path} but {yours} in {other.path}"

    one, two = first.manifest, other.manifest
    found = []
    if one.model["fingerprint"] != two.model["fingerprint"]:
        found.append(told("model.fingerprint", one.model["fingerprint"], two.model["fingerprint"]))
    if (key := differing_config(one.model.get("config") or {}, two.model.get("config") or {})) is not None:
        found.append(f"model.config.{key} in {other.path}")
    for key in ("method", "granularity", "signed"):
        if getattr(one, key) != getattr(two, key):
            found.append(told(key, getattr(one, key), getattr(two, key)))
    if first.layers != other.layers:
        odd = ", ".join(sorted(set(first.layers) ^ set(other.layers))[:3]) or "in another order"
        found.append(told("layers", len(first.layers), f"{len(other.layers)} ({odd})"))
    shared = [name for name in first.layers if name in two.layers]
    unequal = [name for name in shared if first.shape(name) != other.shape(name)]
    found += [told(f"shape of {name}", list(first.shape(name)), list(other.shape(name))) for name in unequal[:3]]
    return found
