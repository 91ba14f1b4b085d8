"""Small score folders with known values, for the tests of scores and pruning."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparc3_pl.scores.folder import ScoreFolder
from sparc3_pl.scores.manifest import ScoredSample
from sparc3_pl.scores.writer import ScoreWriter

LAYERS = ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj", "model.layers.2.mlp.up_proj")


def random_scores(seed: int, shape: Sequence[int] = (7,), layers: Sequence[str] = LAYERS) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(*shape, generator=generator) for name in layers}


def write(
    folder: Path,
    scores: Mapping[str, Tensor],
    squares: Mapping[str, Tensor] | None = None,
    samples: Sequence[Mapping[str, Any]] = (),
    neuron_rows: Mapping[str, Sequence[int]] | None = None,
    components: Mapping[str, str] | None = None,
    groups: Mapping[str, Tensor] | None = None,
    group_sizes: Sequence[int] = (),
    **fields: Any,
) -> ScoreFolder:
    """Writes a score folder and opens it.

    ``neuron_rows``: first and last + 1 of the scores that are of neurons; ``components``: the kind of each layer;
    ``groups``: mean scores of groups of samples, of ``group_sizes``.
    """
    defaults = {
        "method": "lrp",
        "num_samples": max(len(samples), 2),
        "num_tokens": 20,
        "model": {"pretrained": "demo", "revision": None, "fingerprint": "sha256:00", "dtype": "float32"},
        "data": {"source": "demo", "seed": 0, "sample_ids": [sample["id"] for sample in samples]},
    }
    with ScoreWriter(folder) as writer:
        for name, values in scores.items():
            rows = slice(*neuron_rows[name]) if name in (neuron_rows or {}) else None
            writer.add_layer(
                name,
                values,
                squares[name] if squares else None,
                (groups[name], list(group_sizes)) if groups else None,
                rows=rows,
                component=(components or {}).get(name),
            )
        writer.finish(**{**defaults, **fields}, samples=map(ScoredSample.from_json, samples))
    return ScoreFolder.open(folder)
