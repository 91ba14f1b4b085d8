"""The same numbers on one process or many, and what happens when one of them fails."""

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
from ranks import Rank, Ranks, command, environment
from score_checks import assert_same_scores
from tiny_models import tiny
from tiny_tokenizers import sentences, tiny_tokenizer

from sparc3_pl.evaluation.results import Evaluation

QUIET = ["--trainer.accelerator", "cpu", "--trainer.logger", "false", "--trainer.enable_progress_bar", "false"]
STEP = "sparc3_pl.scoring.module:ScoringModule.predict_step"
NEURONS = ["--model.squares", "true"]
WEIGHTS = ["--model.granularity", "weight", "--model.targets", '["*"]']
WANDA = ["--model.method", "wanda", "--model.granularity", "weight"]
FASTEST = 60.0
"""Seconds within which every rank must have ended, the time that it takes to start them included."""


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A model and seven texts of different lengths."""
    folder = tmp_path_factory.mktemp("files")
    tiny("llama", vocab_size=320, max_position_embeddings=128, bos_token_id=0, eos_token_id=1).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    texts = [" ".join(sentences(40)[7 * i : 7 * i + 1 + i % 3]) for i in range(5)] + ["The red fox", "A green door."]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


def score(files: Path, output: Path, *words: object) -> list[object]:
    data = ["--data.source", files / "texts.jsonl", "--data.seq_len", "null", "--output", output]
    return ["score", "--model.pretrained", files, *data, *QUIET, *words]


def succeed(ranks: list[Rank]) -> None:
    for rank in ranks:
        assert rank.wait() == 0, rank.text()


# --- the same numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [NEURONS, WEIGHTS, WANDA], ids=["neurons", "weights", "wanda"])
def test_scores_do_not_depend_on_processes_and_batches(ranks, files, tmp_path, method):
    splits = [(1, 1), (1, 3), (1, 8), (2, 3), (4, 1), (4, 8)]  # on the last two some ranks get less, or nothing
    for world, batch in splits:
        output = tmp_path / f"{world}-{batch}"
        succeed(ranks.run(score(files, output, *method, "--data.batch_size", batch), world))
        assert_same_scores(output, tmp_path / "1-1", num_samples=7)


def test_scores_of_log_likelihoods_do_not_depend_on_processes_and_batches(ranks, files, tmp_path):
    rows = [{"p": s[: 9 + i], "c": s[9 + i :], "score": (3 * i % 7) / 7} for i, s in enumerate(sentences(7))]
    (tmp_path / "said.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = ["--data.text_field", "p", "--data.completion_field", "c", "--data.weight_field", "score"]
    said = ["--data.source", tmp_path / "said.jsonl", *names, "--model.target", "completion"]
    drawn = ["--model.target", "text", "--model.labels", "model", "--model.method", "gradient"]
    for name, words in (("said", said), ("drawn", drawn)):
        words = [*words, "--model.granularity", "[neuron, channel]", "--model.signed", "true", *NEURONS]
        for world, batch in [(1, 1), (2, 3)]:
            output = tmp_path / f"{name}-{world}-{batch}"
            succeed(ranks.run([*score(files, output), *words, "--data.batch_size", batch], world))
            assert_same_scores(output, tmp_path / f"{name}-1-1", num_samples=7)


def test_layers_pruned_one_after_the_other_do_not_depend_on_processes(ranks, files, tmp_path):
    """What a layer loses is decided by the sums of all ranks: else the next one would read something else on each."""
    for world, batch in [(1, 1), (2, 3)]:
        words = [*WANDA, "--model.sequential", "2:4", "--model.targets", '["model.*"]', "--data.batch_size", batch]
        succeed(ranks.run(score(files, tmp_path / str(world), *words), world))
        assert_same_scores(tmp_path / str(world), tmp_path / "1", num_samples=7)


def test_ranks_without_any_sample_take_part(ranks, files, tmp_path):
    for world in (1, 4):
        words = score(files, tmp_path / str(world), "--data.num_samples", 2)
        succeed(ranks.run(words, world))
    assert_same_scores(tmp_path / "4", tmp_path / "1", num_samples=2)


def test_evaluation_does_not_depend_on_processes_and_batches(ranks, files, tmp_path):
    (tmp_path / "text.txt").write_text(" ".join(sentences(9)))
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"p": s[:-6]}) + "\n" for s in sentences(5)))
    data = ["--data.text_source", tmp_path / "text.txt", "--data.prompts_source", tmp_path / "prompts.jsonl"]
    made = [
        "--model.max_length",
        48,
        "--model.stride",
        40,
        "--model.max_new_tokens",
        6,
        "--model.samples_per_prompt",
        2,
    ]
    words = ["eval", "--model.pretrained", files, "--model.judge.class_path", "DetoxifyJudge"]
    words += ["--model.judge.init_args.variant", "demo", *data, *made, "--data.prompts_field", "p", *QUIET]
    own = {"class_path": "own_measurements.LogitDifference", "init_args": {"prompts": sentences(5)}}
    words += ["--model.measurements", json.dumps([own])]
    found = {}
    for world, batch in [(1, 1), (1, 8), (2, 3), (4, 1), (6, 8)]:  # on the last a rank has no prompt
        output = tmp_path / f"{world}-{batch}"
        sizes = ["--data.batch_size", batch, "--data.window_batch_size", batch, "--output", output]
        succeed(ranks.run([*words, *sizes], world))
        found[world, batch] = Evaluation.open(output)
    want = found[1, 1]
    assert len(want.completions) == 10
    for other in found.values():
        assert other.completions == want.completions
        assert [row["unit"] for row in other.measurements] == [f"pair {number:02}" for number in range(5)]
        for row, one in zip(other.measurements, want.measurements, strict=True):
            assert row["difference"] == pytest.approx(one["difference"], abs=1e-5)
        assert [window.index for window in other.windows] == [window.index for window in want.windows]
        assert other.results["perplexity"]["num_tokens"] == want.results["perplexity"]["num_tokens"]
        assert other.results["perplexity"]["value"] == pytest.approx(want.results["perplexity"]["value"], rel=1e-6)
        assert [other.results["toxicity"][n] for n in ("num_prompts", "num_completions", "num_failed")] == [5, 10, 0]
        for label, figures in want.results["toxicity"]["labels"].items():
            assert other.results["toxicity"]["labels"][label] == pytest.approx(figures, abs=1e-6)


# --- failing fast -----------------------------------------------------------------------------------------------------


def fail(
    ranks: Ranks, files: Path, output: Path, *words: object, world: int = 3, faults: dict[int, str] | None = None
) -> tuple[int, str]:
    """Exit code and screen of a run that Lightning's launcher has started and that must fail within a minute."""
    start = time.monotonic()
    words = score(files, output, "--trainer.devices", world, *words)
    (first,) = ranks.start(words, world, faults=faults, launcher=True)
    code = first.wait(FASTEST)
    while any(alive(pid) for pid in first.family()):
        assert time.monotonic() < start + FASTEST, f"some of {first.family()} still run:\n{first.text()}"
        time.sleep(0.05)
    assert not output.exists()
    lines = [line for line in first.text().splitlines() if "s per sample after the first batch" not in line]  # its pace
    return code, "\n".join(lines).rstrip()


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_one_rank_raises(ranks, files, tmp_path, rank):
    code, screen = fail(ranks, files, tmp_path / "out", world=4, faults={rank: f"raise 1 {STEP}"})
    assert code == 1
    assert f"rank {rank} failed:" in screen
    assert screen.endswith("ZeroDivisionError: planted by a test")
    assert screen.count("Traceback") == 1
    assert not list(tmp_path.iterdir())


def test_a_rank_is_killed(ranks, files, tmp_path):
    code, screen = fail(ranks, files, tmp_path / "out", faults={1: f"kill 1 {STEP}"})
    assert code == 1
    assert screen.splitlines()[-1].startswith("rank 1 (process ")
    assert "was killed by SIGKILL" in screen.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_rank_0_is_killed(ranks, files, tmp_path):
    code, screen = fail(ranks, files, tmp_path / "out", faults={0: f"kill 2 {STEP}", 1: "slow 2", 2: "slow 2"})
    assert code == -signal.SIGKILL
    assert screen.splitlines()[-1].startswith("rank 0 (process ")
    assert screen.splitlines()[-1].endswith("was killed: every rank stops")


def test_a_rank_is_killed_before_the_ranks_have_met(ranks, files, tmp_path):
    code, screen = fail(ranks, files, tmp_path / "out", faults={1: "kill 1 torch.distributed:init_process_group"})
    assert code == 1
    assert "was killed by SIGKILL" in screen.splitlines()[-1]


def test_a_rank_that_hangs_is_given_up(ranks, files, tmp_path):
    timeout = ["--trainer.rank_timeout", 0.1]
    code, screen = fail(ranks, files, tmp_path / "out", *timeout, world=2, faults={1: f"stop 1 {STEP}"})
    assert code == 1
    assert "rank 0 lost contact with another rank" in screen.splitlines()[-1]


@pytest.mark.parametrize("target", ["finish", "add_layer"])
def test_rank_0_fails_while_it_writes(ranks, files, tmp_path, target):
    faults = {0: f"raise 1 sparc3_pl.scores.writer:ScoreWriter.{target}"}
    code, screen = fail(ranks, files, tmp_path / "out", faults=faults)
    assert code == 1
    assert screen.endswith("ZeroDivisionError: planted by a test")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("rank", [0, 2])
def test_wrong_input_on_one_rank_is_one_line(ranks, files, tmp_path, rank):
    code, screen = fail(ranks, files, tmp_path / "out", faults={rank: f"refuse 1 {STEP}"})
    assert (code, screen) == (2, "error: planted=1: by a test; leave it out")


def test_wrong_input_on_every_rank_is_one_line(ranks, files, tmp_path):
    code, screen = fail(ranks, files, tmp_path / "out", "--model.targets", '["*.nothing"]')
    assert code == 2
    assert screen.startswith("error: targets: '*.nothing' matches no linear layer")
    assert len(screen.splitlines()) == 1


def test_an_output_that_is_taken_is_found_before_the_model_is_loaded(ranks, files, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep me")
    (first,) = ranks.start(score(files, tmp_path / "out", "--trainer.devices", 2), launcher=True)
    assert first.wait(FASTEST) == 2
    assert first.text().startswith("error: ")
    assert first.text().count("\n") == 1
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep me"


# --- the real thing ---------------------------------------------------------------------------------------------------


def test_the_command_starts_its_own_processes(ranks, files, tmp_path):
    """Through ``python -m``, as users do: once well, once with a rank that is killed from outside."""
    succeed(ranks.run(score(files, tmp_path / "one")))
    words = score(files, tmp_path / "two", "--trainer.devices", 2, "--trainer.strategy", "ddp")
    done = subprocess.run(command(*words), env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("scores:") == 1
    assert "GPU available" not in done.stderr
    assert "distributed" not in done.stderr
    assert_same_scores(tmp_path / "two", tmp_path / "one", num_samples=7)

    words = score(files, tmp_path / "three", "--trainer.devices", 2)
    with subprocess.Popen(command(*words), env=environment(), stderr=subprocess.PIPE, text=True) as process:
        child = None
        while child is None:  # as soon as it is there
            listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            child = next(
                (int(pid) for pid in listed if b"sparc3_pl.cli" in Path(f"/proc/{pid}/cmdline").read_bytes()), None
            )
            time.sleep(0.05)
        time.sleep(1)
        subprocess.run(["kill", "-9", str(child)], check=True)
        _, screen = process.communicate(timeout=FASTEST)
    assert process.returncode == 1
    assert screen.rstrip().splitlines()[-1].startswith(f"rank 1 (process {child}) was killed by SIGKILL")
    assert not (tmp_path / "three").exists()
