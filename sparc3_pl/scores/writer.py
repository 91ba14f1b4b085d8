"""Writes a score folder, whole or not at all."""

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from sparc3_pl.attribution.scorers import LayerScores
from sparc3_pl.io import provenance
from sparc3_pl.io.files import (
    inside,
    new_folder,
    save_tensors,
    sha256_of_file,
    strict_json,
    write_text,
)
from sparc3_pl.scores.folder import BLOCK
from sparc3_pl.scores.manifest import (
    GROUPS,
    KIND,
    MANIFEST,
    SAMPLES,
    SCORES,
    SQUARES,
    About,
    LayerStats,
    Manifest,
    ScoredSample,
)

__all__ = ["ScoreWriter", "write_scores"]


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
        component: str | None = None,
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
            component: Name of the layer's kind of component, where the folder has several kinds.
        """
        assert scores.dim() == (self._dims or scores.dim()) in (1, 2), f"{name}: scores of unlike granularity"
        assert name not in self._layers, f"{name} was added twice"
        assert squares is None or squares.shape == scores.shape == (len(scores),), f"{name}: squares are for neurons"
        self._dims = scores.dim()
        scores = scores.detach().to("cpu", torch.float32).contiguous()
        file = SCORES if self._dims == 1 else f"{name}.safetensors"
        self._layers[name] = replace(_statistics(scores, file, nan, inf, rows), component=component)
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
        samples: Iterable[ScoredSample] = (),
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
            samples: Those samples.
            granularity: Name of the component; by default ``neuron`` or ``weight``, read off the layers.
            total_relevance: Sum of all layers' sums if not given.
            versions: In place of this process's own; so are ``command`` and ``created``.
            command: See ``versions``.
            created: See ``versions``.
            shards: Commands of the parts that were merged.
            signed: Whether scores keep their sign.
            about: The other fields of ``About``.
        """
        about_scores = About(granularity=granularity or {2: "weight"}.get(self._dims, "neuron"), signed=signed, **about)
        assert not self._squares or self._squares.keys() == self._layers.keys(), "squares for some layers only"
        if self._neurons:
            save_tensors(self._path / SCORES, self._neurons)
        if self._squares:
            save_tensors(self._path / SQUARES, self._squares)
        if self._groups:
            save_tensors(self._path / GROUPS, self._groups)
        write_text(self._path / SAMPLES, "".join(strict_json(sample.to_json()) + "\n" for sample in samples))
        total = math.fsum(layer.sum for layer in self._layers.values())
        manifest = Manifest(
            **provenance.redacted(vars(about_scores)),
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
            samples_sha256=sha256_of_file(self._path / SAMPLES),
            neuron_rows={name: layer.rows for name, layer in self._layers.items() if layer.rows is not None},
            hardware=provenance.hardware(),
            shards=provenance.redacted(list(shards)),
        )
        manifest.check(self.folder)
        write_text(self._path / MANIFEST, json.dumps(manifest.to_json(), indent=1, ensure_ascii=False) + "\n")
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
                rows=None if layer.scores.dim() == 2 else rows, component=layer.group.component,
            )  # fmt: skip
        if config is not None:
            writer.add_text("config.yaml", config)
        return writer.finish(
            **vars(about) | {"data": about.data | {"sample_ids": [sample.id for sample in samples]}},
            num_samples=len(samples),
            num_tokens=sum(sample.num_tokens for sample in samples),
            samples=samples,
            shards=shards,
        )
