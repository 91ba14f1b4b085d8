"""Contrast and selection over weight scores of a gigabyte work in the memory of two layers."""

import json
from pathlib import Path

import pytest
import torch
from bench_common import peak_of

from sparc3_pl.cli import main
from sparc3_pl.scores.writer import ScoreWriter

LAYERS, SHAPE = 8, (4096, 4096)
LAYER_BYTES = 4 * SHAPE[0] * SHAPE[1]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    """Two folders of half a GiB: nearly all of their scores are one small number, so that they are made in seconds."""
    made = []
    for seed, name in enumerate(("general", "behaviour")):
        generator = torch.Generator().manual_seed(seed)
        path = tmp_path_factory.mktemp("scores") / name
        with ScoreWriter(path) as writer:
            for layer in range(LAYERS):
                scores = torch.full(SHAPE, 1e-4)
                scores[layer] = torch.rand(SHAPE[1], generator=generator)
                writer.add_layer(f"model.layers.{layer}.mlp.up_proj", scores)
            writer.finish(
                method="lrp",
                num_samples=2,
                num_tokens=4,
                model={"pretrained": "demo", "revision": None, "fingerprint": "sha256:00", "dtype": "float32"},
                data={"source": "demo", "seed": seed, "sample_ids": [f"{seed}a", f"{seed}b"]},
            )
        made.append(path)
    return made


@pytest.mark.parametrize("contrast", ["difference", "normalized"])
def test_pruning_by_weight_scores_stays_small(folders, tmp_path, contrast):
    size = sum(path.stat().st_size for folder in folders for path in folder.iterdir())
    assert size >= 2 * LAYERS * LAYER_BYTES == 2**30
    words = ["prune", f"--general={folders[0]}", f"--behaviour={folders[1]}", "--num_weights=1000"]
    words += [f"--contrast={contrast}", f"--output={tmp_path / 'plan.json'}"]
    code, peak = peak_of(lambda: main(words), "cpu")
    assert code == 0
    print(f"peak: {peak / 2**20:.0f} MiB")
    assert peak < 2 * LAYER_BYTES
    assert json.loads((tmp_path / "plan.json").read_text())["num_weights"] == 1000


def test_half_of_every_row_stays_small(folders, tmp_path):
    """Indices of the chosen half would take four bytes each, a quarter of a GiB; masks take 16 MiB."""
    words = ["prune", f"--general={folders[0]}", "--contrast=general", "--scope=row", "--share=0.5"]
    code, peak = peak_of(lambda: main([*words, f"--output={tmp_path / 'plan.json'}"]), "cpu")
    assert code == 0
    print(f"peak: {peak / 2**20:.0f} MiB")
    assert peak < 2 * LAYER_BYTES
    assert json.loads((tmp_path / "plan.json").read_text())["num_weights"] == LAYERS * SHAPE[0] * SHAPE[1] // 2
    assert (tmp_path / "plan.masks.safetensors").stat().st_size < LAYERS * SHAPE[0] * SHAPE[1] / 8 + 10_000
