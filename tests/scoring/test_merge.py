"""Parts of a scoring run, merged, are the run."""

import json
import shutil
from pathlib import Path

import pytest
from score_checks import assert_same_scores
from tiny_models import tiny
from tiny_tokenizers import sentences, tiny_tokenizer

from sparc3_pl.cli import main
from sparc3_pl.scores.folder import ScoreFolder

QUIET = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.logger=false"]
QUIET += ["--trainer.enable_progress_bar=false"]
METHODS = {
    "neurons": ["--model.squares=true"],
    "signed": ["--model.signed=true"],
    "weights": ["--model.granularity=weight", '--model.targets=["*"]'],
    "wanda neurons": ["--model.method=wanda"],
    "wanda weights": ["--model.method=wanda", "--model.granularity=weight", '--model.targets=["*_proj"]'],
}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    tiny("llama", vocab_size=320, max_position_embeddings=128, bos_token_id=0, eos_token_id=1).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences(7)))
    return folder


def score(files: Path, output: Path, *words: str) -> int:
    data = [f"--data.source={files / 'texts.jsonl'}", "--data.seq_len=null", f"--model.pretrained={files}"]
    return main(["score", *data, *QUIET, f"--output={output}", *words])


@pytest.fixture(scope="module")
def parts(files) -> list[str]:
    """Three parts of the neurons' run."""
    for number in (1, 2, 3):
        assert score(files, files / f"part-{number}", f"--part={number}/3", *METHODS["neurons"]) == 0
    return [str(files / f"part-{number}") for number in (1, 2, 3)]


@pytest.mark.parametrize("method", METHODS)
def test_merged_parts_are_the_whole_run(files, tmp_path, method, capsys):
    options = METHODS[method]
    assert score(files, tmp_path / "whole", *options) == 0
    parts = []
    for number in (2, 1):
        parts.append(str(tmp_path / f"part-{number}"))
        assert score(files, Path(parts[-1]), f"--part={number}/2", *options) == 0
    capsys.readouterr()
    assert main(["merge", *parts, f"--output={tmp_path / 'merged'}"]) == 0
    assert "7 samples" in capsys.readouterr().out
    assert_same_scores(tmp_path / "merged", tmp_path / "whole", num_samples=7)
    one, other = (ScoreFolder.open(tmp_path / name).manifest for name in ("merged", "whole"))
    assert one.total_relevance == pytest.approx(other.total_relevance, rel=1e-6)
    assert one.model == other.model
    assert one.data == other.data
    assert bool(one.squares) == (method == "neurons")


def test_a_part_may_hold_no_sample(files, tmp_path):
    words = ["--data.num_samples=2"]
    assert score(files, tmp_path / "whole", *words) == 0
    for number in (1, 2, 3):
        assert score(files, tmp_path / f"part-{number}", f"--part={number}/3", *words) == 0
    parts = [str(tmp_path / f"part-{number}") for number in (1, 2, 3)]
    assert main(["merge", *parts, f"--output={tmp_path / 'merged'}"]) == 0
    assert_same_scores(tmp_path / "merged", tmp_path / "whole", num_samples=2)


def refused(capsys, *words: str) -> str:
    capsys.readouterr()
    assert main(list(words)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def test_a_part_given_twice_is_refused(parts, tmp_path, capsys):
    error = refused(capsys, "merge", *parts[:2], parts[0], f"--output={tmp_path / 'out'}")
    assert "would count twice" in error
    assert parts[0] in error
    assert not (tmp_path / "out").exists()


def test_a_missing_part_is_refused(parts, tmp_path, capsys):
    assert "part 2/3 is missing" in refused(capsys, "merge", parts[0], parts[2], f"--output={tmp_path / 'out'}")


def test_parts_of_other_settings_are_refused(files, parts, tmp_path, capsys):
    other = tmp_path / "other"
    assert score(files, other, "--part=3/3") == 0  # without squares
    error = refused(capsys, "merge", *parts[:2], str(other), f"--output={tmp_path / 'out'}")
    assert "squares (True, here False)" in error
    assert str(other) in error


def test_parts_of_another_number_are_refused(files, parts, tmp_path, capsys):
    assert score(files, tmp_path / "other", "--part=4/4", *METHODS["neurons"]) == 0
    error = refused(capsys, "merge", *parts, str(tmp_path / "other"), f"--output={tmp_path / 'out'}")
    assert "shard (3, here 4)" in error


@pytest.mark.parametrize("name", ["shard.json", "sums.safetensors"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_part_is_refused(parts, tmp_path, capsys, name, damage):
    broken = Path(shutil.copytree(parts[0], tmp_path / "broken"))
    data = (broken / name).read_bytes()
    changed = {"flip": data[:-20] + bytes([data[-20] ^ 1]) + data[-19:], "cut": data[: len(data) // 2]}
    (broken / name).write_bytes(changed[damage]) if damage in changed else (broken / name).unlink()
    error = refused(capsys, "merge", str(broken), *parts[1:], f"--output={tmp_path / 'out'}")
    assert str(broken) in error
    assert not (tmp_path / "out").exists()


def test_a_part_of_another_version_is_refused(parts, tmp_path, capsys):
    old = Path(shutil.copytree(parts[0], tmp_path / "old"))
    content = json.loads((old / "shard.json").read_text()) | {"format_version": 0}
    (old / "shard.json").write_text(json.dumps(content))
    error = refused(capsys, "merge", str(old), *parts[1:], f"--output={tmp_path / 'out'}")
    assert "format_version=0" in error


def test_wanda_needs_the_same_model(files, tmp_path, capsys):
    assert score(files, tmp_path / "part", "--part=1/1", *METHODS["wanda neurons"]) == 0
    tiny("llama", vocab_size=320, seed=1).save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    words = ["merge", str(tmp_path / "part"), f"--output={tmp_path / 'out'}", f"--pretrained={tmp_path / 'other'}"]
    assert "is not the model that the parts scored" in refused(capsys, *words)


def test_a_part_is_no_score_folder_and_a_score_folder_no_part(files, parts, tmp_path, capsys):
    words = ["--num_neurons=1", f"--output={tmp_path / 'plan.json'}"]
    error = refused(capsys, "prune", f"--general={parts[0]}", f"--behaviour={parts[1]}", *words)
    assert "join all of them with merge first" in error
    assert score(files, tmp_path / "whole") == 0
    assert "holds no shard.json" in refused(capsys, "merge", str(tmp_path / "whole"), f"--output={tmp_path / 'out'}")


def test_a_method_without_samples_has_no_parts(files, tmp_path, capsys):
    data = [f"--model.pretrained={files}", "--model.method=magnitude", f"--output={tmp_path / 'out'}"]
    assert "needs no sample" in refused(capsys, "score", *data, "--part=1/2", *QUIET)


@pytest.mark.parametrize("part", ["0/2", "3/2", "1", "one/two", "1/2/3", "-1/2"])
def test_parts_are_counted_from_one(files, tmp_path, capsys, part):
    assert "i from 1 to n" in refused(capsys, "score", f"--output={tmp_path / 'out'}", f"--part={part}", *QUIET)
