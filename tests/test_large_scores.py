"""Contrast and selection over weight scores of 2 GB work in the memory of one layer."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks import environment

from sparc3_pl.scores import ScoreWriter

LAYERS, SHAPE = 16, (4096, 4096)  # 64 MiB a layer, 1 GiB a folder
LIMIT_MB = 600

MEASURED = """
import json, sys
from pathlib import Path
from sparc3_pl.cli import main
code = main(sys.argv[1:])
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(json.dumps({"code": code, "peak_mb": int(status["VmHWM"].split()[0]) / 1024}))
"""
"""``ru_maxrss`` would count the process that has started this one: it is handed on."""


@pytest.fixture
def folders(tmp_path) -> list[Path]:
    """Two folders of 1 GiB: nearly all of their scores are one small number, so that they are made in seconds."""
    made = []
    for seed, name in enumerate(("general", "behaviour")):
        generator = torch.Generator().manual_seed(seed)
        with ScoreWriter(tmp_path / name) as writer:
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
        made.append(tmp_path / name)
    return made


def test_pruning_by_weight_scores_stays_small(folders, tmp_path):
    size = sum(path.stat().st_size for folder in folders for path in folder.iterdir())
    assert size > 2e9
    words = ["prune", f"--general={folders[0]}", f"--behaviour={folders[1]}", "--num_weights=1000"]
    words += [f"--output={tmp_path / 'plan.json'}"]
    command = [sys.executable, "-c", MEASURED, *words]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["code"] == 0
    assert found["peak_mb"] < LIMIT_MB
    print(f"peak: {found['peak_mb']:.0f} MB of {LIMIT_MB}")
    chosen = json.loads((tmp_path / "plan.json").read_text())
    assert chosen["num_weights"] == 1000
