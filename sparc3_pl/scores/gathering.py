"""The layers of a score folder as they come in, and the manifest that they make; on the disk or not."""

import hashlib
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparc3_pl.attribution.scorers import LayerScores
from sparc3_pl.io import provenance
from sparc3_pl.io.files import strict_json, tensor_digest
from sparc3_pl.io.formats import Record
from sparc3_pl.model.identity import ModelRecord
from sparc3_pl.runtime.timing import Timing
from sparc3_pl.scores.folder import BLOCK
from sparc3_pl.scores.manifest import SCORES, About, LayerStats, Manifest, ScoredSample

__all__ = ["Gathering", "samples_text", "told_of_layer", "told_of_samples"]

log = logging.getLogger(__name__)


class Gathering:
    """Layers in the order in which they were added, with their counts, sums and digests.

    Squares and scores of groups, vectors, are kept; the scores themselves are the caller's to keep or to write.
    """

    def __init__(self) -> None:
        self.layers: dict[str, LayerStats] = {}
        self.squares: dict[str, Tensor] = {}
        self.groups: dict[str, Tensor] = {}
        self.group_sizes: list[int] = []
        self.dims: int | None = None

    def add(
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
        tokens: int | None = None,
    ) -> Tensor:
        """Adds a layer; see ``ScoreWriter.add_layer``.

        Returns:
            The scores as they are kept: float32, on the CPU, in one piece. They may share memory with ``scores``.
        """
        assert scores.dim() == (self.dims or scores.dim()) in (1, 2), f"{name}: scores of unlike granularity"
        assert name not in self.layers, f"{name} was added twice"
        assert squares is None or squares.shape == scores.shape == (len(scores),), f"{name}: squares are for neurons"
        self.dims = scores.dim()
        scores = scores.detach().to("cpu", torch.float32).contiguous()
        file = SCORES if self.dims == 1 else f"{name}.safetensors"
        self.layers[name] = replace(_statistics(scores, file, nan, inf, rows), component=component, tokens=tokens)
        if squares is not None:
            self.squares[name] = squares.detach().to("cpu", torch.float32, copy=True).contiguous()
        if groups is not None:
            means, sizes = groups
            assert means.shape == (len(sizes), *scores.shape), f"{name}: groups of another shape"
            self.groups[name] = means.detach().to("cpu", torch.float32, copy=True).contiguous()
            self.group_sizes = sizes
        return scores

    def manifest(
        self,
        where: str | Path,
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
        timing: Timing | None = None,
        **about: Any,
    ) -> Manifest:
        """The manifest of all layers; see ``ScoreWriter.finish``.

        Raises:
            InputError: as ``Manifest.check``; ``where`` names the folder.
        """
        about_scores = About(granularity=granularity or {2: "weight"}.get(self.dims, "neuron"), signed=signed, **about)
        assert not self.squares or self.squares.keys() == self.layers.keys(), "squares for some layers only"
        total = math.fsum(layer.sum for layer in self.layers.values())
        own = provenance.redacted(vars(about_scores))
        manifest = Manifest(
            **own | {"model": ModelRecord(own["model"])},
            num_samples=num_samples,
            num_tokens=num_tokens,
            layers=self.layers,
            total_relevance=total if total_relevance is None else total_relevance,
            versions=versions or provenance.versions(),
            command=command or provenance.command_line(),
            created=created or provenance.now(),
            squares={name: tensor_digest(squares) for name, squares in self.squares.items()},
            groups={name: tensor_digest(means) for name, means in self.groups.items()},
            group_sizes=self.group_sizes,
            samples_sha256=hashlib.sha256(samples_text(samples).encode()).hexdigest(),
            neuron_rows={name: layer.rows for name, layer in self.layers.items() if layer.rows is not None},
            hardware=provenance.hardware(),
            unreached=[name for name, layer in self.layers.items() if layer.tokens == 0],
            shards=provenance.redacted(list(shards)),
            timing=timing,
        )
        manifest.check(where)
        if names := manifest.unreached:
            more = f" and {len(names) - 10} more, which the manifest lists (unreached)" if len(names) > 10 else ""
            log.warning(
                "no token of any sample reached %d layers of experts, whose scores are 0 because nothing is known of "
                "them: %s%s", len(names), ", ".join(names[:10]), more,
            )  # fmt: skip
        return manifest


def told_of_layer(layer: LayerScores) -> Record:
    """The arguments of ``Gathering.add`` and ``ScoreWriter.add_layer`` that describe a layer besides its scores."""
    return {
        "squares": layer.squares,
        "groups": layer.groups,
        "nan": layer.nan,
        "inf": layer.inf,
        "rows": None if layer.scores.dim() == 2 else layer.group.own,
        "component": layer.group.component,
        "tokens": layer.tokens,
    }


def told_of_samples(about: About, samples: Sequence[ScoredSample]) -> Record:
    """The arguments of ``Gathering.manifest`` and ``ScoreWriter.finish`` that describe a run and its samples."""
    return vars(about) | {
        "data": about.data | {"sample_ids": [sample.id for sample in samples]},
        "num_samples": len(samples),
        "num_tokens": sum(sample.num_tokens for sample in samples),
    }


def samples_text(samples: Iterable[ScoredSample]) -> str:
    """The content of ``samples.jsonl``."""
    return "".join(strict_json(sample.to_json()) + "\n" for sample in samples)


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
    return LayerStats(list(scores.shape), file, math.fsum(sums), nan, inf, negative, zero, tensor_digest(scores), own)
