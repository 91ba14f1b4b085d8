"""The command line as its users meet it."""

import json
import re

import pytest
import torch
import yaml
from safetensors import safe_open

from sparc3_pl import __version__
from sparc3_pl.cli import COMMANDS, PASSES, main
from sparc3_pl.io.yaml_format import load_yaml
from sparc3_pl.scores.folder import ScoreFolder

SMALL = ["--data.num_samples", "3", "--data.seq_len", "32", "--trainer.accelerator", "cpu", "--trainer.devices", "1"]


@pytest.fixture(scope="module")
def scores(tmp_path_factory):
    """Scores of the demo, by the command."""
    folder = tmp_path_factory.mktemp("cli")
    assert main(["score", *SMALL, "--trainer.default_root_dir", str(folder), "--output", str(folder / "scores")]) == 0
    return folder / "scores"


def test_score_folder_has_what_the_design_says(scores):
    manifest = json.loads((scores / "manifest.json").read_text())
    assert manifest["format_version"] == 1
    assert (manifest["method"], manifest["granularity"], manifest["signed"]) == ("lrp", "neuron", False)
    assert (manifest["num_samples"], manifest["num_tokens"]) == (3, 96)
    assert manifest["model"].keys() >= {"pretrained", "revision", "fingerprint", "architecture", "dtype"}
    assert manifest["data"].keys() >= {"source", "seed", "seq_len", "filter", "sample_ids"}
    assert len(set(manifest["data"]["sample_ids"])) == 3
    assert manifest["command"]
    assert manifest["created"]
    with safe_open(scores / "scores.safetensors", "pt") as tensors:
        for name, layer in manifest["layers"].items():
            values = tensors.get_tensor(name)
            assert values.dtype == torch.float32
            assert list(values.shape) == layer["shape"]
            assert float(values.double().sum()) == pytest.approx(layer["sum"])
    assert manifest["total_relevance"] == pytest.approx(sum(layer["sum"] for layer in manifest["layers"].values()))


def test_samples_add_up_to_the_total(scores):
    folder = ScoreFolder.open(scores)
    relevance = [sample.relevance for sample in folder.samples()]
    assert sum(relevance) / len(relevance) == pytest.approx(folder.manifest.total_relevance, rel=1e-5)


def test_the_resolved_configuration_runs_again(scores, tmp_path):
    again = ["score", "--config", str(scores / "config.yaml"), "--output", str(tmp_path / "again")]
    assert main([*again, "--trainer.default_root_dir", str(tmp_path)]) == 0
    first, second = ScoreFolder.open(scores), ScoreFolder.open(tmp_path / "again")
    assert first.manifest.data["sample_ids"] == second.manifest.data["sample_ids"]
    for name in first.layers:
        torch.testing.assert_close(first.load(name), second.load(name), rtol=1e-6, atol=0)


def test_scores_are_not_overwritten_unasked(scores, capsys):
    before = (scores / "manifest.json").read_bytes()
    assert main(["score", *SMALL, "--output", str(scores)]) == 2
    assert "already exists; give --overwrite" in capsys.readouterr().err
    assert (scores / "manifest.json").read_bytes() == before


def test_default_output_is_in_the_log_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["score", *SMALL, "--model.method", "wanda", "--trainer.enable_progress_bar", "false"]) == 0
    (manifest,) = tmp_path.rglob("manifest.json")
    assert manifest.relative_to(tmp_path).parts == ("lightning_logs", "version_0", "scores", "manifest.json")


def test_later_configs_win(tmp_path, capsys):
    for name, value in (("one", 5), ("two", 7)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"data": {"num_samples": value}}))
    with pytest.raises(SystemExit):
        main(["score", *(f"--config={tmp_path / name}.yaml" for name in ("one", "two")), "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["data"]["num_samples"] == 7


def printed_config(args, capsys):
    """What ``--print_config`` prints: text and value."""
    with pytest.raises(SystemExit) as stop:
        main([*args, "--print_config"])
    out, err = capsys.readouterr()
    assert stop.value.code == 0, err
    return out, load_yaml(out)


TEXTS = ("source", "split", "text_field", "subset", "filter", "match", "match_field", "match_filter")
ODD = (
    "77950e8",
    "1e3",
    "012",
    "1_000",
    "1:30",
    "2026-01-01",
    "#x",
    "&a",
    "---",
    "=",
    ".inf",
    "{a}",
    "é",
    " x",
    "on",
    "!",
)


@pytest.mark.parametrize("values", [ODD[:8], ODD[8:]])
def test_a_printed_configuration_holds_for_every_value(values, tmp_path, capsys):
    """A configuration that was printed says the same when it is read, whatever the values look like."""
    chosen = dict(zip(TEXTS, values, strict=True))
    args = [f"--data.{key}={value}" for key, value in chosen.items()]
    out, config = printed_config(["score", *args, "--trainer.devices=2"], capsys)
    assert {key: config["data"][key] for key in TEXTS} == chosen
    (tmp_path / "config.yaml").write_text(out, encoding="utf-8")
    assert printed_config(["score", "--config", str(tmp_path / "config.yaml")], capsys)[0] == out


@pytest.mark.parametrize("text", ["# all of it is a comment\n", "data:\n"])
def test_an_overlay_may_say_nothing(text, tmp_path, capsys):
    (tmp_path / "empty.yaml").write_text(text)
    assert printed_config(["score", "--config", str(tmp_path / "empty.yaml")], capsys)[1]["data"]["source"] == "demo"


@pytest.mark.parametrize(
    ("command", "text", "says"),
    [
        ("score", b"model: {granularity: null}", "model.granularity"),
        ("score", b"data: {seed: null}", "data.seed"),
        ("score", b"trainer: {devices: null}", "trainer.devices"),
        ("score", b"overwrite: null", "overwrite"),
        ("score", b"data: 5", "data"),
        ("score", b"data: {seed: 1, seed: 2}", "'seed' stands twice"),
        ("score", b"data: {source: '\xe9'}", "UTF-8"),
        ("score", b"[1]", "list"),
        ("prune", b"protect: null", "protect"),
        ("eval", b"model: {judge: {class_path: DetoxifyJudge, init_args: {batch_size: null}}}", "batch_size"),
        ("score", b"data: {source: '***'}", "left out"),
    ],
)
def test_a_config_file_that_is_wrong_is_named_with_its_key(command, text, says, tmp_path, capsys):
    (tmp_path / "wrong.yaml").write_bytes(text)
    given = ["--general", "a", "--num_neurons", "1"] if command == "prune" else []
    with pytest.raises(SystemExit) as stop:
        main([command, *given, "--config", str(tmp_path / "wrong.yaml"), "--print_config"])
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert not out
    assert says in err
    assert "wrong.yaml" in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["score", "--model.metod", "lrp"], "did you mean model.method"),
        (["score", "--data.num_samples", "-1"], "data.num_samples=-1"),
        (["score", *SMALL, "--model.targets", "['*.up_projj']"], "nearest: *.up_proj"),
        (["score", *SMALL, "--model.method", "wanda", "--model.signed", "true"], "model.signed=true"),
        (["score", *SMALL, "--model.pretrained", "./nowhere"], "./nowhere"),
        (["scores"], "scores"),
    ],
)
def test_bad_input_is_one_line_and_code_2(args, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        code = main(args)
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert code == 2
    assert len(lines) == 1
    assert says in lines[0]
    assert "Traceback" not in err
    assert not out
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("command", [*PASSES, *COMMANDS])
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert "usage" in capsys.readouterr().out


def test_the_version_is_told(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"sparc3 {__version__}\n"


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    assert set(re.findall(r"^ {4}(\w+)", capsys.readouterr().out, re.M)) == {*PASSES, *COMMANDS}
