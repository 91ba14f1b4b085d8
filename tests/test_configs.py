"""Every file in ``configs/`` parses, and the complete ones run a batch on the embedded demo."""

from pathlib import Path

import pytest
import yaml

from sparc3_pl.cli import execute

CONFIGS = Path(__file__).parents[1] / "configs"
TINY = ["--config", str(CONFIGS / "trainer" / "cpu.yaml"), "--trainer.fast_dev_run", "true"]

SCORE = sorted(path for path in CONFIGS.glob("*.yaml") if path.name != "eval.yaml")
OVERLAYS = sorted(path for folder in ("models", "data", "trainer") for path in (CONFIGS / folder).glob("*.yaml"))


@pytest.mark.parametrize("path", SCORE, ids=lambda path: path.stem)
def test_score_runs_a_batch(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    execute(["score", "--config", str(path), *TINY])
    assert not list(tmp_path.rglob("manifest.json"))  # fast_dev_run writes only where it is told to


def test_eval_runs_a_batch(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    execute(["eval", "--config", str(CONFIGS / "eval.yaml"), *TINY])
    assert "perplexity" in capsys.readouterr().out


@pytest.mark.parametrize("path", OVERLAYS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_overlays_fit_score(path, capsys):
    with pytest.raises(SystemExit) as stop:
        execute(["score", "--config", str(CONFIGS / "lrp.yaml"), "--config", str(path), "--print_config"])
    assert stop.value.code == 0
    assert holds(yaml.safe_load(capsys.readouterr().out), yaml.safe_load(path.read_text()))


def holds(merged: object, overlay: object) -> bool:
    if not isinstance(overlay, dict):
        return merged == overlay
    return all(key in merged and holds(merged[key], value) for key, value in overlay.items())


@pytest.mark.parametrize("path", sorted((CONFIGS / "models").glob("*.yaml")), ids=lambda path: path.stem)
def test_model_overlays_fit_eval(path, capsys):
    with pytest.raises(SystemExit) as stop:
        execute(["eval", "--config", str(CONFIGS / "eval.yaml"), "--config", str(path), "--print_config"])
    assert stop.value.code == 0
    assert yaml.safe_load(path.read_text())["model"]["pretrained"] in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted((CONFIGS / "eval_data").glob("*.yaml")), ids=lambda path: path.stem)
def test_evaluation_overlays_fit_eval(path, capsys):
    with pytest.raises(SystemExit) as stop:
        execute(["eval", "--config", str(CONFIGS / "eval.yaml"), "--config", str(path), "--print_config"])
    assert stop.value.code == 0
    assert holds(yaml.safe_load(capsys.readouterr().out), yaml.safe_load(path.read_text()))


@pytest.mark.parametrize("path", sorted((CONFIGS / "experiments").glob("*.yaml")), ids=lambda path: path.stem)
def test_experiments_parse(path, capsys):
    with pytest.raises(SystemExit) as stop:
        execute(["run", "--config", str(path), "--print_config"])
    assert stop.value.code == 0


@pytest.mark.parametrize("path", sorted((CONFIGS / "circuits").glob("*.yaml")), ids=lambda path: path.stem)
def test_circuits_parse(path, capsys):
    with pytest.raises(SystemExit) as stop:
        execute(["circuit", "--config", str(path), "--print_config"])
    assert stop.value.code == 0
    assert holds(yaml.safe_load(capsys.readouterr().out), yaml.safe_load(path.read_text()))


@pytest.mark.parametrize("path", sorted((CONFIGS / "elicit").glob("*.yaml")), ids=lambda path: path.stem)
def test_elicit_parses(path, capsys):
    with pytest.raises(SystemExit) as stop:
        execute(["elicit", "--config", str(path), "--print_config"])
    assert stop.value.code == 0
    assert holds(yaml.safe_load(capsys.readouterr().out), yaml.safe_load(path.read_text()))
