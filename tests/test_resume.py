"""A scoring run that was stopped or killed at any time goes on, on any number of processes, to the same scores."""

import json
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from ranks import Rank, Ranks, wait_until
from score_checks import assert_same_scores
from tiny_models import tiny
from tiny_tokenizers import sentences, tiny_tokenizer

from sparc3_pl.cli import main
from sparc3_pl.errors import InputError
from sparc3_pl.evaluation.results import Evaluation
from sparc3_pl.resume import PartialSums, SumsFile, partial_folder

QUIET = ["--trainer.accelerator", "cpu", "--trainer.logger", "false", "--trainer.enable_progress_bar", "false"]
NUM_SAMPLES = 12
PUBLISH = "sparc3_pl.resume:publish"


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    tiny("llama", vocab_size=320, max_position_embeddings=128, bos_token_id=0, eos_token_id=1).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    texts = [" ".join(sentences(60)[3 * i : 3 * i + 1 + i % 3]) for i in range(NUM_SAMPLES)]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


def score(files: Path, output: Path, *words: object) -> list[object]:
    data = ["--data.source", files / "texts.jsonl", "--data.seq_len", "null", "--model.granularity", "weight"]
    return ["score", "--model.pretrained", files, *data, *QUIET, "--output", output, *words]


@pytest.fixture(scope="module")
def whole(ranks, files) -> Path:
    """The scores of a run that nothing has interrupted."""
    (rank,) = ranks.run(score(files, files / "whole"))
    assert rank.code == 0, rank.text()
    return files / "whole"


def succeed(ranks: list[Rank]) -> None:
    for rank in ranks:
        assert rank.wait() == 0, rank.text()


def scored(output: Path) -> int:
    """Samples whose sums are on the disk."""
    return sum(len(SumsFile(path).ids) for path in partial_folder(output).glob("*.safetensors"))


def start(ranks: Ranks, files: Path, output: Path, world: int, seconds: float, every: int = 1) -> list[Rank]:
    """A run of which every batch takes ``seconds``."""
    words = score(files, output, "--checkpoint_every", every, "--trainer.devices", world)
    return ranks.start(words, world, faults=dict.fromkeys(range(world), f"slow {seconds}"))


def test_killed_at_random_points_on_changing_numbers_of_processes(ranks, files, whole, tmp_path):
    output, chance = tmp_path / "scores", random.Random(4)
    for kills, world in enumerate((1, 3, 2, 4, 1, 2)):
        running = start(ranks, files, output, world, 0.3)
        wait_until(lambda least=2 * kills: partial_folder(output).exists() and scored(output) >= least, running)
        time.sleep(chance.uniform(0, 0.5))
        for rank in chance.sample(running, len(running)):
            rank.kill()
        assert all(rank.wait() == -signal.SIGKILL for rank in running)
    assert scored(output) >= 5
    succeed(ranks.run(score(files, output, "--checkpoint_every", 1), 3))
    assert_same_scores(output, whole, NUM_SAMPLES)
    assert not partial_folder(output).exists()


@pytest.mark.parametrize(
    "fault",
    [
        "kill 1 sparc3_pl.resume:write_sums",  # before the fold
        f"kill 1 {PUBLISH}",  # folded, but without its name
        "kill 1 sparc3_pl.resume:PartialSums._remove_dead",  # base and what it was folded from are both there
        "kill 1 sparc3_pl.scores:ScoreWriter.finish",  # while the scores are written
        "kill 1 sparc3_pl.resume:PartialSums.remove",  # the scores are there, the partial sums too
    ],
    ids=["before fold", "before rename", "before removal", "while writing", "after writing"],
)
def test_killed_at_the_worst_points(ranks, files, whole, tmp_path, fault):
    output = tmp_path / "scores"
    running = start(ranks, files, output, 2, 0.1)
    wait_until(lambda: scored(output) >= 4, running)
    for rank in running:
        rank.kill()
        rank.wait()
    (rank,) = ranks.run(score(files, output, "--checkpoint_every", 100), faults={0: fault})
    assert rank.code == -signal.SIGKILL
    if output.exists():  # whole, since it has its name
        assert_same_scores(output, whole, NUM_SAMPLES)
        return
    assert scored(output) >= 4
    succeed(ranks.run(score(files, output, "--checkpoint_every", 100), 2))
    assert_same_scores(output, whole, NUM_SAMPLES)
    assert [path.name for path in tmp_path.iterdir()] == ["scores"]


@pytest.mark.parametrize("world", [1, 2])
def test_sigterm_saves_and_asks_for_a_requeue(ranks, files, whole, tmp_path, world):
    output = tmp_path / "scores"
    words = score(files, output, "--checkpoint_every", 1000, "--trainer.devices", world)
    (rank,) = ranks.start(words, world, faults=dict.fromkeys(range(world), "slow 0.3"), launcher=True)
    wait_until((partial_folder(output) / "settings.json").exists, [rank])
    time.sleep(1.0)
    rank.kill(signal.SIGTERM)
    assert rank.wait() == 143, rank.text()
    assert "stopped by SIGTERM" in rank.text().splitlines()[-1]
    assert "Traceback" not in rank.text()
    assert 0 < scored(output) < NUM_SAMPLES
    succeed(ranks.run(score(files, output, "--checkpoint_every", 1000)))
    assert_same_scores(output, whole, NUM_SAMPLES)


def test_other_settings_are_refused(ranks, files, tmp_path):
    output = tmp_path / "scores"
    (rank,) = ranks.run(score(files, output, "--checkpoint_every", 1), faults={0: "kill 3 sparc3_pl.resume:publish"})
    assert rank.code == -signal.SIGKILL
    for words, key in (
        (["--model.method", "gradient"], "method ('lrp', here 'gradient')"),
        (["--model.targets", '["*.down_proj"]'], "layers"),
        (["--data.num_samples", 3], "data.sample_ids (12 of them, here 3 of them)"),
    ):
        (rank,) = ranks.run(score(files, output, "--checkpoint_every", 1, *words))
        assert rank.code == 2
        assert rank.text().count("\n") == 1
        assert key in rank.text()
        assert str(partial_folder(output)) in rank.text()
    assert scored(output) == 1


def test_needs_an_output(capsys):
    assert main(["score", "--checkpoint_every", "5"]) == 2
    assert "give --output" in capsys.readouterr().err


def test_samples_of_two_runs_at_once_are_counted_once(tmp_path):
    def save(rank, ids, value):
        run = PartialSums(tmp_path / "scores", rank)
        run.join({"generation": 0, "run": f"{rank:08x}", "ids": []})
        run.save({"layer": {"sum": torch.full((3,), value)}}, [{"id": identity} for identity in ids])

    save(0, ["a", "b"], 2.0)
    save(1, ["b", "c"], 2.0)
    save(2, ["d"], 1.0)
    agreed = PartialSums(tmp_path / "scores", 0).take_up({})
    assert agreed["ids"] == ["a", "b", "d"]
    again = PartialSums(tmp_path / "scores", 0)
    again.join(agreed)
    assert again.base().load("layer/sum").tolist() == [3.0] * 3
    assert [path.name for path in partial_folder(tmp_path / "scores").glob("*.safetensors")] == [
        "000001-base.safetensors"
    ]


def test_a_damaged_file_of_sums_is_named(tmp_path):
    run = PartialSums(tmp_path / "scores", 0)
    run.join({"generation": 0, "run": "0", "ids": []})
    run.save({"layer": {"sum": torch.ones(3)}}, [{"id": "a"}])
    (path,) = partial_folder(tmp_path / "scores").glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(InputError, match="its samples are scored again"):
        PartialSums(tmp_path / "scores", 0).take_up({})


def test_finished_completions_are_not_made_again(ranks, files, tmp_path):
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"p": s[:-6]}) + "\n" for s in sentences(NUM_SAMPLES)))
    words = ["eval", "--model.pretrained", files, "--model.judge.class_path", "DetoxifyJudge", *QUIET]
    words += ["--model.judge.init_args.variant", "demo", "--data.prompts_source", tmp_path / "prompts.jsonl"]
    words += ["--data.text_source", "null", "--data.prompts_field", "p", "--model.max_new_tokens", 4]
    words += ["--data.batch_size", 1]
    succeed(ranks.run([*words, "--output", tmp_path / "whole"]))
    step, output, chance = "sparc3_pl.evaluation.results:CompletionStore.add", tmp_path / "out", random.Random(1)
    store = tmp_path / ".out.completions.partial"
    for world in (2, 1, 3):
        slow = dict.fromkeys(range(world), f"slow 0.5 {step}")  # a rank must not be done before it is killed
        made = ranks.start([*words, "--output", output, "--trainer.devices", world], world, faults=slow)
        before = rows(store)
        wait_until(lambda least=before + 2: rows(store) >= least, made)
        time.sleep(chance.uniform(0, 0.05))
        for rank in made:
            rank.kill()
            rank.wait()
    kept = rows(store)
    assert kept >= 6
    faults = {0: f"raise {NUM_SAMPLES - kept + 1} {step}"}  # one more than is missing
    succeed(ranks.run([*words, "--output", output], faults=faults))
    assert Evaluation.open(output).completions == Evaluation.open(tmp_path / "whole").completions
    assert not store.exists()


def rows(store: Path) -> int:
    """Completions that are on the disk."""
    return sum(path.read_text().count('"completion"') for path in store.glob("*.jsonl"))
