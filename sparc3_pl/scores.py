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
from types import TracebackType, UnionType
from typing import Any, Self, get_args, get_origin

import torch
from torch import Tensor

from sparc3_pl import provenance
from sparc3_pl.attribution.methods import METHODS
from sparc3_pl.attribution.scorers import LayerScores
from sparc3_pl.components import COMPONENTS, Component
from sparc3_pl.errors import InputError
from sparc3_pl.files import (
    FolderKind,
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
    "KIND",
    "MARKER",
    "About",
    "LayerStats",
    "Manifest",
    "ScoreFolder",
    "ScoreWriter",
    "ScoredSample",
    "mean_blocks",
    "mean_scores",
    "require_comparable",
    "write_scores",
]

FORMAT_VERSION = 1
BLOCK = 1 << 19  # values read at a time: 2 MB of float32, which stays in cache and does not scatter the heap
MARKER = "manifest.json"
"""The file by which a score folder is known."""
_MANIFEST, _SAMPLES, _SCORES, _SQUARES = "manifest.json", "samples.jsonl", "scores.safetensors", "squares.safetensors"
_GROUPS = "groups.safetensors"
KIND = FolderKind(
    "a score folder",
    MARKER,
    (_SAMPLES, _SCORES, _SQUARES, _GROUPS, "config.yaml"),
    lambda manifest: [layer["file"] for layer in manifest["layers"].values()],
)


@dataclass(frozen=True)
class ScoredSample:
    """What is kept of a sample: a line of ``samples.jsonl``.

    Attributes:
        id: Identity by content.
        num_tokens: Its real tokens.
        ending: ``stop``, ``cut``, or None where nothing can decode the tokens.
        text_ids: Identities of the texts that it was made from; empty in folders that do not say.
        relevance: The sum of its scores over the components of all layers; None for a method without a target.
        first_token_share: Share of the first position in the relevance.
        more: Whatever else is known, such as what the target records: its ``logit`` and token.
    """

    id: str
    num_tokens: int
    ending: str | None = None
    text_ids: tuple[str, ...] = ()
    relevance: float | None = None
    first_token_share: float | None = None
    more: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As a JSON object; what is not known is left out."""
        own = {name: value for name, value in vars(self).items() if name != "more" and value not in (None, ())}
        return own | self.more

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Reads what ``to_json`` has made."""
        names = {item.name for item in fields(cls)} - {"more"}
        own = {name: value for name, value in data.items() if name in names}
        own["text_ids"] = tuple(own.get("text_ids") or ())
        return cls(**own, more={name: value for name, value in data.items() if name not in names})


@dataclass(frozen=True, kw_only=True)
class About:
    """What a manifest says before any sample is scored; its attributes are those of ``Manifest``."""

    method: str
    granularity: str
    signed: bool
    model: dict[str, Any]
    data: dict[str, Any]
    method_args: dict[str, Any] = field(default_factory=dict)
    granularity_args: dict[str, Any] = field(default_factory=dict)
    target: str = "predicted"
    target_args: dict[str, Any] = field(default_factory=dict)
    targets: list[str] | None = None
    nonfinite: str | None = None
    seed: int | None = None
    relevance_account: dict[str, Any] | None = None

    def components(self) -> list[Component]:
        """The kinds of component that are scored.

        Raises:
            InputError: as ``Registry.from_file``.
        """
        names = self.granularity.split("+")
        arguments = self.granularity_args if len(names) > 1 else {names[0]: self.granularity_args}
        return [COMPONENTS.from_file(name, arguments.get(name)) for name in names]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Reads the JSON object of ``dataclasses.asdict``; keys that are unknown are passed over."""
        names = {item.name for item in fields(cls)}
        return cls(**{name: value for name, value in data.items() if name in names})


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
        rows: First and last + 1 of the scores that ``sum``, ``negative`` and ``zero`` are of; null: all of them. The
            gates' rows of a fused map are no neurons, and count for nothing.
    """

    shape: list[int]
    file: str
    sum: float
    nan: int
    inf: int
    negative: int
    zero: int
    sha256: str
    rows: list[int] | None = None

    @property
    def counted(self) -> slice:
        """The scores, flattened, that the figures are of."""
        return slice(0, math.prod(self.shape)) if self.rows is None else slice(*self.rows)


@dataclass(frozen=True)
class Manifest:
    """What a score folder says of itself; the keys of ``manifest.json``.

    Attributes:
        method: ``lrp``, ``gradient``, ``wanda``, ``magnitude``, ``random``, or the class path of a user's own.
        granularity: ``neuron`` or ``weight``, or the class path of a user's own component; several joined by ``+``.
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
        method_args: Arguments of the method, where it was given any.
        granularity_args: Arguments of the component, likewise; of several components, by their names.
        target: What is attributed: ``predicted``, or the class path of a user's own target.
        target_args: Arguments of the target, likewise.
        targets: Globs of the scored layers; null: the component's own choice.
        nonfinite: ``error`` or ``zero``: what was done with NaN and infinite values.
        seed: Seed of random scores; null for other methods.
        relevance_account: Of a method that checks itself on one sample (LRP): ``relative_residual`` and
            ``num_tokens``; where nothing was measured, the ``reason``.
        neuron_rows: By layer with scores that belong to no component (the gates' of a fused map): first and last + 1
            of those that do.
        hardware: The machine that wrote the scores.
        shards: Commands of the parts that were merged.
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
    method_args: dict[str, Any] = field(default_factory=dict)
    granularity_args: dict[str, Any] = field(default_factory=dict)
    target: str = "predicted"
    target_args: dict[str, Any] = field(default_factory=dict)
    targets: list[str] | None = None
    nonfinite: str | None = None
    seed: int | None = None
    relevance_account: dict[str, Any] | None = None
    neuron_rows: dict[str, list[int]] = field(default_factory=dict)
    hardware: str | None = None
    shards: list[str] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def num_scores(self) -> int:
        """Number of components that are scored."""
        counted = (layer.counted for layer in self.layers.values())
        return sum(part.stop - part.start for part in counted)

    def to_json(self) -> dict[str, Any]:
        """As the JSON object, ``extra`` spread out, with its own sha256 as the last key."""
        data = {"format_version": self.format_version} | asdict(self)
        extra = data.pop("extra")
        for name in _ONLY_WHERE_GIVEN:
            if not data[name]:
                del data[name]
        for layer in data["layers"].values():
            if layer["rows"] is None:
                del layer["rows"]
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
        for kind, names, known in (
            ("granularity", self.granularity.split("+"), COMPONENTS),
            ("method", [self.method], METHODS),
        ):
            for name in names:
                if name not in known and "." not in name:
                    raise InputError(
                        f"{where}: {kind}={name!r} is unknown; known are {', '.join(known)}; update sparc3_pl"
                    )
        if not self.layers:
            raise InputError(f"{where}: no layer is scored; score again with other model.targets")
        if not isinstance(self.model.get("fingerprint"), str):
            raise InputError(f"{where}: the model's fingerprint is missing; score again")
        dims = {len(layer.shape) for layer in self.layers.values()}
        if self.granularity in COMPONENTS:  # what a class of the user's own scores, its shapes say
            dims = {COMPONENTS.make(self.granularity).dims}
        for name, layer in self.layers.items():
            sizes_are_right = all(type(size) is int and size > 0 for size in layer.shape)
            if {len(layer.shape)} != dims or not dims <= {1, 2} or not sizes_are_right:
                raise InputError(
                    f"{where}: layer {name} has shape {layer.shape}, which no {self.granularity} score has"
                )
        spans = [("neuron_rows", name, span) for name, span in self.neuron_rows.items()]
        spans += [("rows", name, layer.rows) for name, layer in self.layers.items() if layer.rows is not None]
        for key, name, span in spans:
            whole = range(self.layers[name].shape[0] + 1) if name in self.layers else ()
            if not (isinstance(span, list) and len(span) == 2 and all(i in whole for i in span) and span[0] < span[1]):
                raise InputError(f"{where}: {key} of layer {name} are {span!r}; the file is damaged, score again")


_ONLY_WHERE_GIVEN = ("method_args", "granularity_args", "target_args", "shards")
"""Keys that most manifests do not have."""


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
    allowed = tuple(get_origin(part) or part for part in get_args(kind) if get_origin(kind) is UnionType)
    allowed = allowed or (get_origin(kind) or kind,)
    if float in allowed and type(value) in (int, float, type(None)):
        return float("nan") if value is None else float(value)
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        raise InputError(f"{where}: {name}={value!r} is not of type {kind}; the file is damaged, score again")
    if isinstance(value, int) and value < 0 and name != "seed":
        raise InputError(f"{where}: {name}={value} is negative; the file is damaged, score again")
    return value


def _layer(name: str, entry: Any, where: str | Path) -> LayerStats:
    known = {item.name: item for item in fields(LayerStats)}
    if not isinstance(entry, dict) or {key for key, item in known.items() if _required(item)} - set(entry):
        raise InputError(f"{where}: the entry of layer {name} is incomplete; the file is damaged, score again")
    there = {key: item for key, item in known.items() if key in entry}
    return LayerStats(**{k: _typed(f"layers.{name}.{k}", entry[k], item.type, where) for k, item in there.items()})


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
        self._path = self._exit.enter_context(new_folder(self.folder, self._overwrite, KIND))
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
        rows: slice | None = None,
    ) -> None:
        """Adds a layer; the folder keeps the order of the calls.

        Args:
            name: The module's name in ``named_modules()``.
            scores: ``[out]`` or ``[out, in]``, on any device; kept as float32.
            squares: ``[out]``: mean over samples of the squared per-sample neuron score.
            groups: ``[groups, out]``: mean scores of disjoint groups of the samples, and the groups' sizes.
            nan: NaNs that were put to zero while scoring, counted beside those still in ``scores``.
            inf: Infinities, likewise.
            rows: The scores that belong to a component, if not all do: only they stand in sums, counts and shares.
        """
        assert scores.dim() == (self._dims or scores.dim()) in (1, 2), f"{name}: scores of unlike granularity"
        assert name not in self._layers, f"{name} was added twice"
        assert squares is None or squares.shape == scores.shape == (len(scores),), f"{name}: squares are for neurons"
        self._dims = scores.dim()
        scores = scores.detach().to("cpu", torch.float32).contiguous()
        file = _SCORES if self._dims == 1 else f"{name}.safetensors"
        self._layers[name] = _statistics(scores, file, nan, inf, rows)
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
        num_samples: int,
        num_tokens: int,
        samples: Iterable[Mapping[str, Any]] = (),
        granularity: str | None = None,
        total_relevance: float | None = None,
        versions: dict[str, str] | None = None,
        command: str | None = None,
        created: str | None = None,
        shards: Sequence[str] = (),
        signed: bool = False,
        **about: Any,
    ) -> Manifest:
        """Writes manifest and samples; the folder takes its name when the ``with`` block ends.

        Args:
            num_samples: Samples in the mean.
            num_tokens: Real tokens in them.
            samples: A dictionary for each sample, as ``ScoredSample.to_json`` makes it.
            granularity: Name of the component; by default ``neuron`` or ``weight``, read off the layers.
            total_relevance: Sum of all layers' sums if not given.
            versions: In place of this process's own; so are ``command`` and ``created``.
            command: See ``versions``.
            created: See ``versions``.
            shards: Commands of the parts that were merged.
            signed: Whether scores keep their sign.
            about: The other fields of ``About``.
        """
        known = About(granularity=granularity or {2: "weight"}.get(self._dims, "neuron"), signed=signed, **about)
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
            **provenance.redacted(vars(known)),
            num_samples=num_samples,
            num_tokens=num_tokens,
            layers=self._layers,
            total_relevance=total if total_relevance is None else total_relevance,
            versions=versions or provenance.versions(),
            command=command or provenance.command_line(),
            created=created or provenance.now(),
            squares={name: _sha256(squares) for name, squares in self._squares.items()},
            groups={name: _sha256(means) for name, means in self._groups.items()},
            group_sizes=self._group_sizes,
            samples_sha256=sha256_of_file(self._path / _SAMPLES),
            neuron_rows={name: layer.rows for name, layer in self._layers.items() if layer.rows is not None},
            hardware=provenance.hardware(),
            shards=provenance.redacted(list(shards)),
        )
        manifest._check(self.folder)
        write_text(self._path / _MANIFEST, json.dumps(manifest.to_json(), indent=1, ensure_ascii=False) + "\n")
        self._finished = True
        return manifest


def _sha256(tensor: Tensor) -> str:
    return hashlib.sha256(memoryview(tensor.numpy()).cast("B")).hexdigest()


def _statistics(scores: Tensor, file: str, nan: int, inf: int, rows: slice | None) -> LayerStats:
    """Counts and the float64 sum of a layer, block by block: no second copy of a large one."""
    sums, negative, zero = [], 0, 0
    for block in scores.flatten().split(BLOCK):
        nan += int(block.isnan().sum())
        inf += int(block.isinf().sum())
    for block in scores.flatten()[slice(None) if rows is None else rows].split(BLOCK):
        negative += int((block < 0).sum())
        zero += int((block == 0).sum())
        sums.append(float(torch.nan_to_num(block, nan=0.0, posinf=0.0, neginf=0.0).double().sum()))
    own = None if rows is None or rows == slice(0, len(scores)) else [rows.start, rows.stop]
    return LayerStats(list(scores.shape), file, math.fsum(sums), nan, inf, negative, zero, _sha256(scores), own)


def write_scores(
    folder: str | Path,
    overwrite: bool,
    layers: Iterable[LayerScores],
    about: About,
    samples: Sequence[ScoredSample],
    *,
    config: str | None = None,
    shards: Sequence[str] = (),
) -> Manifest:
    """Writes the scores of a whole run, in one process or merged, as a score folder.

    Args:
        folder: Where the scores go.
        overwrite: Whether an earlier score folder there may be replaced.
        layers: The scores, layer by layer: one at a time is in memory.
        about: What was scored, on what, how.
        samples: Those in the mean; of a method that needs none, none.
        config: The resolved configuration as YAML.
        shards: Commands of the parts that were merged.

    Raises:
        InputError: if the place is taken, cannot be written, or the disk is full.
    """
    samples = sorted(samples, key=lambda sample: sample.id)
    with ScoreWriter(folder, overwrite) as writer:
        for layer in layers:
            name, rows = layer.group.layer, layer.group.own
            writer.add_layer(
                name, layer.scores, layer.squares, layer.groups, nan=layer.nan, inf=layer.inf,
                rows=None if layer.scores.dim() == 2 else rows,
            )  # fmt: skip
        if config is not None:
            writer.add_text("config.yaml", config)
        return writer.finish(
            **vars(about) | {"data": about.data | {"sample_ids": [sample.id for sample in samples]}},
            num_samples=len(samples),
            num_tokens=sum(sample.num_tokens for sample in samples),
            samples=[sample.to_json() for sample in samples],
            shards=shards,
        )


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
            raise InputError(f"{path}: is one part of a scoring run; join all of them with merge first")
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

    def counted_blocks(self, name: str, size: int = BLOCK) -> Iterator[Tensor]:
        """As ``blocks``, of the scores that the layer's figures in the manifest are of."""
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
            granularity, target, signed, layers, shapes.
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
    for key in ("method", "method_args", "granularity", "granularity_args", "target", "target_args", "signed"):
        if getattr(one, key) != getattr(two, key):
            found.append(told(key, getattr(one, key), getattr(two, key)))
    if first.layers != other.layers:
        odd = ", ".join(sorted(set(first.layers) ^ set(other.layers))[:3]) or "in another order"
        found.append(told("layers", len(first.layers), f"{len(other.layers)} ({odd})"))
    shared = [name for name in first.layers if name in two.layers]
    unequal = [name for name in shared if first.shape(name) != other.shape(name)]
    found += [told(f"shape of {name}", list(first.shape(name)), list(other.shape(name))) for name in unequal[:3]]
    return found
