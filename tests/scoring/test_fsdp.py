"""A model shared out over real processes by FSDP2 gives the numbers of one process, and no rank holds all of it."""

import json
import signal
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import Rank, wait_until
from score_checks import assert_same_scores
from tiny_models import FAMILIES, tiny, tokens
from tiny_tokenizers import sentences, tiny_tokenizer
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from sparc3_pl.attribution.methods import Lrp
from sparc3_pl.attribution.scorers import Scorer
from sparc3_pl.cli import main
from sparc3_pl.data.batches import ReferenceBatch
from sparc3_pl.model.fsdp import shard
from sparc3_pl.model.identity import fingerprint
from sparc3_pl.model.structure import linear_layers
from sparc3_pl.scores.folder import ScoreFolder
from sparc3_pl.scores.partial import partial_folder
from sparc3_pl.scores.sums import SumsFile

CONFIG = Path(__file__).parents[2] / "configs" / "trainer" / "fsdp2.yaml"
QUIET = ["--trainer.accelerator", "cpu", "--trainer.logger", "false", "--trainer.enable_progress_bar", "false"]
ALL_WEIGHTS = ["--model.granularity", "weight", "--model.targets", '["*"]']
SMALL = {"vocab_size": 320, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 1}
STEP = "sparc3_pl.scoring.module:ScoringModule.predict_step"
CASES = {
    "weights": ("untied", ALL_WEIGHTS),
    "neurons": ("tied", ["--model.squares", "true", "--model.groups", "2"]),
    "signed": ("untied", ["--model.signed", "true", "--model.gradient_checkpointing", "true"]),
    "text": ("tied", ["--model.target", "text", "--model.signed", "true"]),
    "drawn": ("untied", ["--model.target", "text", "--model.labels", "model", *ALL_WEIGHTS]),
    "wanda": ("tied", ["--model.method", "wanda", *ALL_WEIGHTS]),
    "magnitude": ("untied", ["--model.method", "magnitude", *ALL_WEIGHTS]),
}
"""The model, and what is scored (weights of the tied one: in the tests after it)."""


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Two models, and seven texts of different lengths."""
    folder = tmp_path_factory.mktemp("files")
    for name in ("tied", "untied"):
        tiny("llama", **SMALL, tie_word_embeddings=name == "tied").save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    texts = [" ".join(sentences(40)[7 * i : 7 * i + 1 + i % 3]) for i in range(5)] + ["The red fox", "A green door."]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


def score(files: Path, model: str, output: Path, *words: object) -> list[object]:
    data = ["--data.source", files / "texts.jsonl", "--data.seq_len", "null", "--output", output]
    return ["score", "--config", CONFIG, "--model.pretrained", files / model, *data, *QUIET, *words]


ONE_PROCESS = ["--trainer.strategy", "auto"]


def succeed(ranks: list[Rank]) -> None:
    for rank in ranks:
        assert rank.wait() == 0, rank.text()


# --- the same numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_scores_are_those_of_one_process(ranks, files, tmp_path, case):
    model, what = CASES[case]
    succeed(ranks.run(score(files, model, tmp_path / "one", *what, *ONE_PROCESS)))
    for world, batch in ((2, 3), (4, 1)):  # on four ranks the last runs a stand-in
        output = tmp_path / f"{world}-{batch}"
        succeed(ranks.run(score(files, model, output, *what, "--data.batch_size", batch), world))
        assert_same_scores(output, tmp_path / "one", num_samples=0 if case == "magnitude" else 7)
        assert ScoreFolder.open(output).manifest.model == ScoreFolder.open(tmp_path / "one").manifest.model


def test_ranks_without_any_sample_take_part(ranks, files, tmp_path):
    words = [*ALL_WEIGHTS, "--data.num_samples", 2]
    succeed(ranks.run(score(files, "tied", tmp_path / "one", *words, *ONE_PROCESS)))
    succeed(ranks.run(score(files, "tied", tmp_path / "four", *words), 4))
    assert_same_scores(tmp_path / "four", tmp_path / "one", num_samples=2)


def test_parts_of_the_samples_are_merged(ranks, files, tmp_path):
    succeed(ranks.run(score(files, "tied", tmp_path / "one", *ALL_WEIGHTS, *ONE_PROCESS)))
    parts = [tmp_path / "1", tmp_path / "2"]
    for number, part in enumerate(parts, start=1):
        succeed(ranks.run(score(files, "tied", part, *ALL_WEIGHTS, "--part", f"{number}/2"), number))
    assert main(["merge", *map(str, parts), "--output", str(tmp_path / "both")]) == 0
    assert_same_scores(tmp_path / "both", tmp_path / "one", num_samples=7)


def test_a_stopped_run_goes_on_in_one_process(ranks, files, tmp_path):
    """All ranks stop after the same pass: none is left waiting for the weights of another."""
    succeed(ranks.run(score(files, "tied", tmp_path / "one", *ONE_PROCESS)))
    words = score(files, "tied", tmp_path / "two", "--checkpoint_every", 100)
    (rank,) = ranks.start(
        [*words, "--trainer.devices", 2], 2, faults=dict.fromkeys(range(2), "slow 0.5"), launcher=True
    )
    wait_until(lambda: (partial_folder(tmp_path / "two") / "settings.json").exists(), [rank])
    time.sleep(1.0)
    rank.kill(signal.SIGTERM)
    assert rank.wait() == 143, rank.text()
    saved = [len(SumsFile(path).ids) for path in partial_folder(tmp_path / "two").glob("*.safetensors")]
    assert len(saved) == 2
    assert saved[0] == saved[1] > 0
    succeed(ranks.run(score(files, "tied", tmp_path / "two", "--checkpoint_every", 100, *ONE_PROCESS)))
    assert_same_scores(tmp_path / "two", tmp_path / "one", num_samples=7)


# --- refused, or failed -----------------------------------------------------------------------------------------------


def test_a_failure_on_one_rank_ends_all(ranks, files, tmp_path):
    words = score(files, "tied", tmp_path / "out", *ALL_WEIGHTS, "--trainer.devices", 2)
    (rank,) = ranks.start(words, 2, faults={1: f"refuse 2 {STEP}"}, launcher=True)
    assert rank.wait(60) == 2, rank.text()
    assert rank.text().rstrip().endswith("error: planted=1: by a test; leave it out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model.device_map", "auto"], "model.device_map='auto': trainer.strategy=ModelParallelStrategy places"),
        (
            [*ALL_WEIGHTS, "--model.sums_on_host", "true"],
            "model.sums_on_host=true: with trainer.strategy=ModelParallelStrategy",
        ),
        ([*ALL_WEIGHTS, "--checkpoint_every", 2], "checkpoint_every=2: weight scores whose sums"),
        (["--trainer.strategy.init_args.tensor_parallel_size", 2], "data_parallel_size=auto, tensor_parallel_size=2"),
        (["--trainer.strategy.init_args.data_parallel_size", 3], "data_parallel_size=3, tensor_parallel_size=1, but"),
    ],
)
def test_what_does_not_go_with_it_is_refused(ranks, files, tmp_path, words, message):
    (rank,) = ranks.run(score(files, "tied", tmp_path / "out", *words))
    assert rank.code == 2
    assert rank.text().startswith("error: ")
    assert message in rank.text()
    assert rank.text().count("\n") == 1


# --- what a rank holds ------------------------------------------------------------------------------------------------


@contextmanager
def ranks_of(world: int, backend: str, store: dist.Store) -> Iterator[DeviceMesh]:
    """A process group in this process, as its rank 0."""
    dist.init_process_group(backend, store=store, rank=0, world_size=world)
    try:
        yield init_device_mesh("cpu", (world,))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_sharded(family):
    ids = tokens(3, 9)
    batch, method = ReferenceBatch(ids, torch.ones_like(ids)), Lrp()
    alone, shared = tiny(family), tiny(family)
    want = Scorer(alone, "lrp", "weight", ["*"])
    want.update(batch)
    with ranks_of(1, "gloo", dist.HashStore()) as mesh, warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")  # OPT, in cli.NOISE
        method.prepare(shared)
        shard(shared.requires_grad_(False), mesh)
        found = Scorer(shared, method, "weight", ["*"])
        found.update(batch)
        assert all(isinstance(parameter, DTensor) for parameter in shared.parameters())
        assert fingerprint(shared) == fingerprint(alone)
        for name in linear_layers(alone):
            torch.testing.assert_close(found.scores(name, 3).scores, want.scores(name, 3).scores)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_rank_holds_its_part_of_weights_and_sums(family):
    world = 4
    with ranks_of(world, "fake", FakeStore()) as mesh:
        model = tiny(family).requires_grad_(False)
        shard(model, mesh)
        layers = linear_layers(model)
        scorer = Scorer(model, "gradient", "weight", ["*"])
        for name, layer in layers.items():
            weight, total = layer.weight, scorer.sums[name]["sum"]
            assert total.shape == (
                layer.weight.shape if family == "llama" or name == "lm_head" else layer.weight.T.shape
            )
            part = -(-len(weight) // world) * weight.shape[1]  # a number of rows that 4 does not divide is rounded up
            assert weight.to_local().numel() == total.to_local().numel() == part
