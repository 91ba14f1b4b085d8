"""Every file in ``configs/`` parses, and the complete ones run a batch on the embedded demo."""

import inspect
import re
from pathlib import Path

import pytest
import yaml

from sparc3_pl.cli import execute
from sparc3_pl.experiment.correction import correction_arms
from sparc3_pl.passes.run import check_pass
from sparc3_pl.scoring.score_run import ScoreRequest
from sparc3_pl.selection.command import prune

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


def experiments_with_arms() -> dict[str, list[Path]]:
    """Each experiment that has arms of its own, and each file of arms behind the experiment that its comment names."""
    experiments = sorted((CONFIGS / "experiments").glob("*.yaml"))
    cases = {path.stem: [path] for path in experiments if "\narms:" in path.read_text()}
    for path in sorted((CONFIGS / "arms").glob("*.yaml")):
        (name,) = set(re.findall(r"configs/experiments/(\w+\.yaml)", path.read_text()))
        cases[f"arms/{path.stem}"] = [CONFIGS / "experiments" / name, path]
    return cases


ARMS = {name: paths for name, paths in experiments_with_arms().items() if not name.startswith("compress")}


@pytest.mark.parametrize("paths", ARMS.values(), ids=ARMS)
def test_arms_of_a_correction_are_whole(paths, capsys, tmp_path):
    """Each arm has an edit, by arguments of ``prune``, of scores that its method can make and settings that parse."""
    with pytest.raises(SystemExit) as stop:
        execute(["run", *(word for path in paths for word in ("--config", str(path))), "--print_config"])
    assert stop.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    sections = {
        key: config[key] for key in ("general", "behaviour", "score", "behaviour_score", "general_score", "plan")
    }
    lists = {key: config[key] for key in ("seeds", "counts", "budgets", "controls")} | {"texts": config["texts"] or []}
    arms = correction_arms(config["arms"], sections, **lists)
    assert [arm.name for arm in arms[1:]] == list(config["arms"])
    for arm in arms:
        assert arm.edits
        of_records = {"completion_field", "label_field", "answer_field"} & arm.behaviour.keys()
        is_prompt = str(arm.behaviour.get("text_field", "")).startswith("prompt")
        assert (
            of_records or not is_prompt or arm.behaviour["seq_len"] is None
        )  # prompts are samples, not packed into windows
        for edit in arm.edits.values():
            inspect.signature(prune).bind_partial(**edit.settings)
        samples = {"source": "demo", **{key: value for key, value in arm.behaviour.items() if value is not None}}
        sides = [(arm.scores[0], samples | {"subset": None})]
        sides += [(arm.scores[1], arm.general | own) for own in ({}, *(arm.texts or ()))] if arm.seeds else []
        for number, (score, data) in enumerate(sides):
            settings = tmp_path / f"{arm.name}-{number}.yaml"
            names = ("method", "granularity", "target", "labels")
            ScoreRequest.of(
                score.get("method", "lrp"), score.get("granularity", "neuron"), score.get("target", "predicted"), None,
                score.get("labels", "data"), **{key: value for key, value in score.items() if key not in names},
            )  # fmt: skip
            settings.write_text(yaml.safe_dump({"model": config["model"] | score, "data": data}))
            check_pass("score", ["--config", str(settings)])


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
