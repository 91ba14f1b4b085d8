"""``device_map: auto`` where it leaves a part of the model on the disk, in every command: the same as without.

Which part goes where is decided by the memory that is free. Here it is the third decoder layer, whatever is free.
"""

import json
from pathlib import Path

import pytest
import torch
import yaml

from sparc3_pl.circuit.results import open_circuit
from sparc3_pl.cli import main
from sparc3_pl.evaluation.results import Evaluation
from sparc3_pl.model import loading
from sparc3_pl.scores.folder import ScoreFolder

LAYERS = {f"model.layers.{number}": "disk" if number == 2 else "cpu" for number in range(4)}
PLACES = LAYERS | dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
TRAINER = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False}
PLAIN = [word for key, value in TRAINER.items() for word in (f"--trainer.{key}", str(value).lower())]


@pytest.fixture
def spread(monkeypatch) -> list[int]:
    """What ``auto`` means here, and of each model that was loaded so, how many of its weights lay on the disk."""
    real, offloaded = loading._load, []

    def options(source, where, real=loading._load_options):
        found = real(source, where)
        return found | {"device_map": PLACES} if source.device_map == "auto" else found

    def load(source):
        model = real(source)
        if source.device_map == "auto":
            offloaded.append(sum(parameter.is_meta for parameter in model.parameters()))
        return model

    monkeypatch.setattr(loading, "_load_options", options)
    monkeypatch.setattr(loading, "_load", load)
    return offloaded


def both(spread: list[int], folder: Path, words: list[object], option: str = "--model.device_map") -> list[Path]:
    """Runs a command without and with ``device_map: auto``; where the two results are."""
    outputs = [folder / "whole", folder / "auto"]
    for output, more in zip(outputs, ([], [option, "auto"]), strict=True):
        assert main([*map(str, words), "--output", str(output), *more]) == 0
    assert spread == [9], "the layer's weights were not on the disk"
    return outputs


@pytest.mark.parametrize("more", [[], ["--model.granularity", "weight", "--model.gradient_checkpointing", "true"]])
def test_score(spread, tmp_path, more):
    words = ["score", *PLAIN, "--data.num_samples", 3, "--data.seq_len", 16, *more]
    whole, auto = map(ScoreFolder.open, both(spread, tmp_path, words))
    assert auto.manifest.model == whole.manifest.model
    for layer in whole.layers:
        torch.testing.assert_close(auto.load(layer), whole.load(layer), rtol=1e-6, atol=1e-9)


def test_eval_of_an_edited_model(spread, tmp_path):
    words = ["eval", *PLAIN, "--data.num_prompts", 3, "--model.max_new_tokens", 6, "--data.text_max_bytes", 1500]
    plan = _plan_of_third_layer(tmp_path)
    whole, auto = map(Evaluation.open, both(spread, tmp_path, [*words, "--plan", plan, "--allow_overlap"]))
    assert [row.tokens for row in auto.completions] == [row.tokens for row in whole.completions]
    assert auto.figures.perplexity.value == pytest.approx(whole.figures.perplexity.value, rel=1e-6)
    assert auto.figures.model == whole.figures.model
    assert auto.figures.model.evaluated_fingerprint != auto.figures.model.fingerprint


def _plan_of_third_layer(folder: Path) -> Path:
    from plans import plan_for

    from sparc3_pl.model.source import ModelSource

    model = loading.load_model(ModelSource())
    return plan_for(model, [("model.layers.2.mlp.up_proj", index) for index in range(40)]).save(folder / "plan.json")


def test_circuit(spread, tmp_path):
    words = ["circuit", "--data.source", "ioi", "--data.num_samples", 6, "--data.num_test", 6, "--model.draws", 1]
    words += ["--model.methods", "[lrp]", "--fractions", "[0.5, 1.0]", "--resamples", 0]
    whole, auto = map(open_circuit, both(spread, tmp_path, words))
    for one, other in zip(whole.arms["lrp"].curve, auto.arms["lrp"].curve, strict=True):
        assert other.logit_difference == pytest.approx(one.logit_difference, rel=1e-5, abs=1e-5)


def test_doctor(spread, tmp_path):
    words = ["doctor", "--num_samples", 2, "--seq_len", 12]
    whole, auto = (json.loads(path.read_text()) for path in both(spread, tmp_path, words, "--device_map"))
    for one, other in zip(whole["accounts"], auto["accounts"], strict=True):
        assert other == pytest.approx(one, rel=1e-4, abs=1e-5)
    assert auto["verdict"] == "warn" and auto["precision"] is None
    reasons = {check["name"]: check["reason"] for check in auto["checks"]}
    assert "part of the model is offloaded" in reasons["half precision against float32"]


def test_elicit(spread, tmp_path):
    settings = {"keep": "scores.toxicity >= 0.0", "trainer": TRAINER}
    settings["data"] = {"prompts_source": "demo:prompts", "prompts_field": "prompt.text", "num_prompts": 2}
    samples = []
    for name, more in (("whole", {}), ("auto", {"device_map": "auto"})):
        settings["model"] = {"pretrained": "demo", "max_new_tokens": 5} | more
        settings["output"] = str(tmp_path / name)
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(settings))
        assert main(["elicit", "--config", str(tmp_path / f"{name}.yaml")]) == 0
        samples.append((tmp_path / name / "samples.jsonl").read_text())
    assert samples[0] == samples[1] != ""
    assert spread == [9]


def test_run(spread, tmp_path):
    settings = {
        "trainer": TRAINER,
        "score": {"squares": False},
        "general": {"source": "demo", "num_samples": 3, "seq_len": 16},
        "behaviour": {"source": "demo:prompts", "text_field": "prompt.text", "num_samples": 3},
        "seeds": [0],
        "plan": {"num_neurons": 5, "layers": ["model.layers.2.*"]},
        "controls": [],
        "eval_model": {"max_new_tokens": 4},
        "eval_data": {"text_source": "demo:text", "text_max_bytes": 1500, "prompts_source": "demo:prompts_heldout"}
        | {"prompts_field": "prompt.text", "num_prompts": 2},
    }
    outcomes = []
    for name, more in (("whole", {}), ("auto", {"device_map": "auto"})):
        own = {"model": {"pretrained": "demo"} | more, "output": str(tmp_path / name)}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(settings | own))
        assert main(["run", "--config", str(tmp_path / f"{name}.yaml")]) == 0
        after = Evaluation.open(tmp_path / name / "evaluations" / "prune-5")
        outcomes.append(([row.tokens for row in after.completions], after.figures.perplexity.value))
    assert outcomes[1][0] == outcomes[0][0]
    assert outcomes[1][1] == pytest.approx(outcomes[0][1], rel=1e-6)
    before = Evaluation.open(tmp_path / "auto" / "evaluations" / "before").figures.perplexity.value
    assert outcomes[1][1] != before
    assert spread and set(spread) == {9}


def test_from_python(spread):
    """An offloaded model that the caller has loaded is scored, edited and measured as one that lies in memory."""
    import sparc3_pl
    from sparc3_pl.data.encoding import load_encoder
    from sparc3_pl.model.source import ModelSource

    tokenizer = load_encoder(ModelSource()).tokenizer
    texts = ["The weather was fine, and they walked along the river.", "A house stood on the hill for years."]
    results = []
    for device_map in (None, "auto"):
        model = loading.load_model(ModelSource(device_map=device_map)).eval()
        general = sparc3_pl.score(model, tokenizer, texts)
        behaviour = sparc3_pl.score(model, tokenizer, ["You are the worst of all people", "I hate all of them so much"])
        plan = sparc3_pl.choose(general, behaviour, num_neurons=20, layers=["model.layers.2.*"])
        with sparc3_pl.edited(model, plan):
            after = sparc3_pl.evaluate(model, tokenizer, text="\n".join(texts * 3))
        before = sparc3_pl.evaluate(model, tokenizer, text="\n".join(texts * 3))
        places = {(neuron.layer, neuron.index) for neuron in plan.neurons}
        results.append((places, after.figures.perplexity.value, before.figures.perplexity.value))
    assert spread == [9]
    assert results[0][0] == results[1][0]
    assert results[1][1:] == pytest.approx(results[0][1:], rel=1e-6)
    assert results[1][1] != results[1][2]
