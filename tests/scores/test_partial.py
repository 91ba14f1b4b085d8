"""A scoring run that was stopped or killed at any time resumes, on any number of processes, to the same scores."""

import json
import os
import random
import signal
import struct
import time
from pathlib import Path

import pytest
import torch
from ranks import Rank, Ranks, wait_until
from safetensors.torch import save_file
from score_checks import assert_same_scores
from tiny_models import tiny
from tiny_tokenizers import sentences, tiny_tokenizer

from sparc3_pl.cli import main
from sparc3_pl.errors import InputError
from sparc3_pl.evaluation.results import Evaluation
from sparc3_pl.scores.manifest import ScoredSample
from sparc3_pl.scores.partial import PartialSums, partial_folder
from sparc3_pl.scores.sums import SumsFile
from sparc3_pl.scores.writer import ScoreWriter

QUIET = ["--trainer.accelerator", "cpu", "--trainer.logger", "false", "--trainer.enable_progress_bar", "false"]
NUM_SAMPLES = 12
PUBLISH = "sparc3_pl.scores.partial:put_in_place"


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
    """Samples whose sums are on the disk; looked at again where a run has folded a listed file into another."""
    while True:
        files = list(partial_folder(output).glob("*.safetensors"))
        try:
            return sum(len(SumsFile(path).ids) for path in files)
        except (OSError, RuntimeError):
            if all(path.exists() for path in files):
                raise


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
        "kill 1 sparc3_pl.scores.partial:write_sums",  # before the fold
        f"kill 1 {PUBLISH}",  # folded, but without its name
        "kill 1 sparc3_pl.scores.partial:PartialSums._remove_dead",  # base and what it was folded from are both there
        "kill 1 sparc3_pl.scores.writer:ScoreWriter.finish",  # while the scores are written
        "kill 1 sparc3_pl.scores.partial:PartialSums.remove",  # the scores are there, the partial sums too
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


@pytest.mark.parametrize(
    ("world", "signum", "code"),
    [(1, signal.SIGTERM, 143), (2, signal.SIGTERM, 143), (2, signal.SIGINT, 130)],
    ids=["one process", "rank 0 of 2", "Ctrl-C on both"],
)
def test_a_stop_saves_and_says_so(ranks, files, whole, tmp_path, world, signum, code):
    output = tmp_path / "scores"
    words = score(files, output, "--checkpoint_every", 1000, "--trainer.devices", world)
    (rank,) = ranks.start(words, world, faults=dict.fromkeys(range(world), "slow 0.3"), launcher=True)
    wait_until((partial_folder(output) / "settings.json").exists, [rank])
    time.sleep(1.0)
    for pid in rank.family() if signum == signal.SIGINT else [rank.pid]:  # a terminal reaches every process
        os.kill(pid, signum)
    assert rank.wait() == code, rank.text()
    advice = "run the same command again to resume"
    assert rank.text().splitlines()[-1] == f"stopped by {signum.name}: {advice}"
    assert "Traceback" not in rank.text()
    assert 0 < scored(output) < NUM_SAMPLES
    assert len(list(partial_folder(output).glob("*.safetensors"))) == world
    succeed(ranks.run(score(files, output, "--checkpoint_every", 1000)))
    assert_same_scores(output, whole, NUM_SAMPLES)


def test_other_settings_are_refused(ranks, files, tmp_path):
    output = tmp_path / "scores"
    (rank,) = ranks.run(score(files, output, "--checkpoint_every", 1), faults={0: f"kill 3 {PUBLISH}"})
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
        run.save({"layer": {"sum": torch.full((3,), value)}}, [ScoredSample(identity, 1) for identity in ids])

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


def saved(output: Path, generation: int, rank: int, sample: str, value: float) -> Path:
    """A file of sums as a run leaves it."""
    before = set(partial_folder(output).glob("*"))
    run = PartialSums(output, rank)
    run.join({"generation": generation, "run": f"{rank:08x}", "ids": []})
    run.save({"layer": {"sum": torch.full((3,), value)}}, [ScoredSample(sample, 1)])
    (path,) = set(partial_folder(output).glob("*")) - before
    return path


@pytest.mark.parametrize("files", [1, 2])
@pytest.mark.parametrize(
    ("old", "new"),
    [(struct.pack("<f", 2.5), struct.pack("<f", 2.25)), (b"sample-1", b"sample-9"), (None, b"")],
    ids=["a sum", "an id", "cut short"],
)
def test_a_damaged_file_of_sums_is_refused_and_the_others_kept(tmp_path, files, old, new):
    output = tmp_path / "scores"
    damaged = saved(output, 3, 0, "sample-1", 2.5)
    for rank in range(1, files):
        saved(output, 3, rank, f"sample-{rank + 1}", 1.0)
    if files == 1:  # a base is not folded, so nothing else would read it before the end of the run
        damaged = damaged.rename(damaged.with_name("000003-base.safetensors"))
    content = damaged.read_bytes()
    assert old is None or content.count(old) in (1, 3)
    damaged.write_bytes(content[:-4] if old is None else content.replace(old, new, 1))
    with pytest.raises(InputError, match="its samples are scored again") as error:
        PartialSums(output, 0).take_up({})
    assert str(damaged) in str(error.value)
    damaged.unlink()  # as the message advises
    assert PartialSums(output, 0).take_up({})["ids"] == [f"sample-{rank + 1}" for rank in range(1, files)]


def test_sums_survive_the_removal_of_their_damaged_base(tmp_path):
    output = tmp_path / "scores"
    saved(output, 3, 1, "sample-2", 1.0)  # written after the fold into base 3, which was damaged and deleted
    assert PartialSums(output, 0).take_up({})["ids"] == ["sample-2"]


def test_sums_of_an_earlier_version_without_digests(tmp_path):
    save_file(
        {"layer/sum": torch.ones(3)},
        tmp_path / "old.safetensors",
        {"records": '[{"id": "a", "num_tokens": 3, "ending": null}]'},
    )
    old = SumsFile(tmp_path / "old.safetensors")
    old.verify()
    assert old.samples == [ScoredSample("a", 3)]


def test_another_part_and_another_config_are_other_sums(tmp_path):
    before = {"model": {"fingerprint": "x", "config": {"rope": {"theta": 1e4}, "gone": 1}}, "part": 1}
    PartialSums(tmp_path / "scores", 0).take_up(before)
    PartialSums(tmp_path / "scores", 0).take_up(before)
    new_library = {"model": {"fingerprint": "x", "config": {"rope": {"theta": 1e4}, "new": 2}}, "part": 1}
    PartialSums(tmp_path / "scores", 0).take_up(new_library)
    with pytest.raises(InputError, match=r"a different part \(1, here 2\)"):
        PartialSums(tmp_path / "scores", 0).take_up(before | {"part": 2})
    other = {"model": {"fingerprint": "x", "config": {"rope": {"theta": 1e6}}}, "part": 1}
    with pytest.raises(InputError, match=r"a different model.config.rope.theta \(10000.0, here 1000000.0\)"):
        PartialSums(tmp_path / "scores", 0).take_up(other)


def test_a_part_does_not_take_up_another_part(files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ScoreWriter, "__init__", lambda *_, **__: pytest.fail("not a part"))
    monkeypatch.setattr("sparc3_pl.scoring.score_run.write_part", lambda *_, **__: 1 / 0)
    words = [str(word) for word in score(files, tmp_path / "scores", "--checkpoint_every", 1, "--trainer.devices", 1)]
    assert main([*words, "--shard", "1/2"]) == 1
    assert scored(tmp_path / "scores") == NUM_SAMPLES // 2
    capsys.readouterr()
    assert main([*words, "--shard", "2/2"]) == 2
    assert "a different part (1, here 2)" in capsys.readouterr().err


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
