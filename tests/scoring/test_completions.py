"""The command on a file of completions: as a whole and in parts, and what a plan from it may be measured on."""

import json

import pytest
import torch
from score_checks import assert_same_scores

from sparc3_pl.cli import main
from sparc3_pl.data.encoding import load_encoder
from sparc3_pl.demo import PROMPTS
from sparc3_pl.errors import InputError
from sparc3_pl.model.source import ModelSource
from sparc3_pl.pruning.plan import PrunePlan
from sparc3_pl.scores.folder import ScoreFolder, require_comparable

CPU = ["--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.logger", "false"]


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> str:
    """Two completions of each of four prompts of the demo, as ``eval`` writes them; one more failed."""
    encoder, rows = load_encoder(ModelSource()), []
    records = [json.loads(line) for line in PROMPTS.read_text(encoding="utf-8").splitlines()[:4]]
    for number, record in enumerate(records):
        for k in range(2):
            ids = encoder.body(record["continuation"]["text"])[: 3 + number + k]
            row = {"id": str(number), "k": k, "prompt": record["prompt"]["text"], "completion_ids": ids}
            rows.append({**row, "scores": {"toxicity": (3 * number + k) / 10}, "failed": None})
    rows.append({**rows[0], "completion_ids": None, "scores": {}, "failed": "no room"})
    path = tmp_path_factory.mktemp("said") / "completions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def score(said: str, output, *words: str) -> None:
    names = ["--data.text_field", "prompt", "--data.completion_field", "completion_ids"]
    names += ["--data.weight_field", "scores.toxicity", "--data.source", said, "--data.num_samples", "null"]
    command = ["score", "--config", "configs/completion.yaml", *names, "--model.granularity", "neuron"]
    assert main([*command, *words, *CPU, "--output", str(output)]) == 0


def test_parts_are_the_whole_and_the_prompts_are_known(said, tmp_path, capsys):
    score(said, tmp_path / "whole")
    for number in (1, 2):
        score(said, tmp_path / f"part{number}", "--part", f"{number}/2")
    assert main(["merge", str(tmp_path / "part1"), str(tmp_path / "part2"), "--output", str(tmp_path / "merged")]) == 0
    assert_same_scores(tmp_path / "merged", tmp_path / "whole", num_samples=8)  # the baseline is that of all samples
    whole = ScoreFolder.open(tmp_path / "whole")
    assert (whole.manifest.target, whole.manifest.data["num_null"]) == ("completion", 1)
    assert sum(sample.more["weight"] for sample in whole.samples()) == pytest.approx(0, abs=1e-9)
    plan = str(tmp_path / "plan.json")
    words = ["--general", str(tmp_path / "whole"), "--behaviour", str(tmp_path / "whole"), "--num_neurons", "3"]
    assert main(["prune", *words, "--output", plan]) == 0
    capsys.readouterr()
    measured = ["--data.text_source", "null", "--data.prompts_source", "demo:prompts", "--data.prompts_filter", "null"]
    words = ["eval", "--config", "configs/eval.yaml", "--plan", plan, *measured, *CPU]
    assert main([*words, "--output", str(tmp_path / "eval")]) == 2
    assert "4 of" in capsys.readouterr().err


def test_an_edited_model_is_scored_as_the_one_that_is_saved(said, tmp_path, capsys):
    score(said, tmp_path / "whole")
    plan, saved = str(tmp_path / "plan.json"), str(tmp_path / "model")
    words = ["--general", str(tmp_path / "whole"), "--behaviour", str(tmp_path / "whole"), "--num_neurons", "9"]
    words += ["--edit", "scale", "--alpha", "0.5", "--save_model", saved]
    assert main(["prune", *words, "--output", plan]) == 0
    score(said, tmp_path / "edited", "--plan", plan)
    score(said, tmp_path / "saved", "--model.pretrained", saved)
    as_it_is, edited, of_saved = (ScoreFolder.open(tmp_path / name) for name in ("whole", "edited", "saved"))
    for layer in edited.layers:
        assert torch.equal(edited.load(layer), of_saved.load(layer))
    assert any(not torch.equal(edited.load(layer), as_it_is.load(layer)) for layer in edited.layers)
    assert edited.manifest.plan == PrunePlan.load(plan).digest and as_it_is.manifest.plan is None
    assert edited.manifest.model["fingerprint"] == as_it_is.manifest.model["fingerprint"]
    with pytest.raises(InputError, match=r"plan=None in .*whole but .* in .*edited"):
        require_comparable([as_it_is, edited])
    score(said, tmp_path / "part1", "--part", "1/2")
    score(said, tmp_path / "part2", "--part", "2/2", "--plan", plan)
    capsys.readouterr()
    assert main(["merge", *(str(tmp_path / f"part{i}") for i in (1, 2)), "--output", str(tmp_path / "merged")]) == 2
    assert "plan" in capsys.readouterr().err


def test_settings_that_do_not_fit_are_refused_before_the_weights(said, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sparc3_pl.scoring.module.load_model", None)
    words = ["--data.source", said, "--data.text_field", "prompt", "--data.seq_len", "null", *CPU]
    assert main(["score", "--model.target", "completion", *words, "--output", str(tmp_path / "a")]) == 2
    assert "model.target=completion needs data.completion_field" in capsys.readouterr().err
    names = ["--data.completion_field", "completion_ids", "--data.weight_field", "scores.toxicity"]
    assert main(["score", *words, *names, "--output", str(tmp_path / "a")]) == 2
    assert "data.completion_field: model.target=predicted ignores it" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
