"""Weight scores of any size are chosen from in the memory of a few blocks."""

import subprocess
import sys

PROGRAM = """
import resource, sys, torch
from pathlib import Path
from sparc3_pl.scores import ScoreFolder, ScoreWriter
from sparc3_pl.pruning.choose import make_plan

GENERATED_MB = 0
root = Path(sys.argv[1])
for seed in range(2):
    with ScoreWriter(root / str(seed)) as writer:
        for i in range(8):
            scores = torch.rand(1536, 4096, generator=torch.Generator().manual_seed(8 * seed + i))
            writer.add_layer(f"layers.{i}.up_proj", scores)
            GENERATED_MB += scores.nbytes / 2**20
        writer.finish(method="lrp", num_samples=2, num_tokens=2, model={"fingerprint": "sha256:0"}, data={})
del scores
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
folders = [ScoreFolder.open(root / str(seed)) for seed in range(2)]
plan = make_plan(folders[:1], folders[1:], num_weights=10000, contrast="normalized")
plan.save(root / "plan.json")
print(plan.num_weights, GENERATED_MB, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before)
"""


def test_choice_from_weight_scores_takes_little_memory(tmp_path):
    run = subprocess.run([sys.executable, "-c", PROGRAM, tmp_path], capture_output=True, text=True, check=True)
    chosen, generated, growth = map(float, run.stdout.split())
    assert chosen == 10000
    assert generated == 384  # megabytes, two folders of 8 layers
    assert growth < 48  # two layers; the mark that writing one layer left is not far exceeded
