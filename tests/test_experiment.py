"""A whole experiment on the embedded demo, small; going on, and refusing to mix settings."""

import json
from pathlib import Path

import pytest
import yaml

from sparc3_pl.cli import main
from sparc3_pl.evaluation.results import Evaluation
from sparc3_pl.experiment import Outcome, largest_within
from sparc3_pl.pruning.plan import PrunePlan

DEMO = Path(__file__).parents[1] / "configs" / "experiments" / "demo.yaml"
SMALL = {
    "seeds": [0, 1],
    "counts": [5],
    "controls": ["random_matched", "null"],
    "general": {"num_samples": 4, "seq_len": 64},
    "behaviour": {"num_samples": 8},
    "eval_model": {"max_new_tokens": 8},
    "eval_data": {"num_prompts": 6, "text_max_bytes": 2000},
}


def run(folder, *args):
    """Runs the folder's experiment; one setting is given here, and must join its section, not replace it."""
    return main(["run", "--config", str(folder / "experiment.yaml"), "--eval_data.num_prompts", "6", *args])


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experiment")
    config = yaml.safe_load(DEMO.read_text()) | {"output": str(folder / "out")}
    for key, value in SMALL.items():
        config[key] = config[key] | value if isinstance(value, dict) else value
    config["trainer"]["default_root_dir"] = str(folder)
    (folder / "experiment.yaml").write_text(yaml.safe_dump(config))
    config["eval_data"].pop("num_prompts")
    (folder / "experiment.yaml").write_text(yaml.safe_dump(config))
    assert run(folder) == 0
    return folder


def test_everything_is_there(experiment):
    out = experiment / "out"
    assert {path.name for path in (out / "scores").iterdir()} == {"behaviour", "general-0", "general-1"}
    edits = {"prune-5", "prune-40", "control-random_matched", "control-null"}
    assert {path.stem for path in (out / "plans").glob("*.json")} == edits
    assert {path.name for path in (out / "evaluations").iterdir()} == {"before", *edits}
    summary = json.loads((out / "experiment.json").read_text())
    assert {outcome["name"] for outcome in summary["outcomes"]} == edits


def test_plans_of_growing_size_are_nested(experiment):
    small, large = (PrunePlan.load(experiment / "out" / "plans" / f"prune-{n}.json") for n in (5, 40))
    assert [(n.layer, n.index) for n in small.neurons] == [(n.layer, n.index) for n in large.neurons[:5]]


def test_evaluations_name_their_plan_and_are_held_out(experiment):
    after = Evaluation.open(experiment / "out" / "evaluations" / "prune-5")
    assert after.results["plan"]["num_neurons"] == 5
    assert after.results["overlap"] == "none"
    model = after.results["model"]
    assert model["fingerprint"] != model["evaluated_fingerprint"]


def test_what_is_done_is_not_done_again(experiment):
    files = {p: p.stat().st_mtime_ns for p in experiment.rglob("*.safetensors")}
    files |= {p: p.stat().st_mtime_ns for p in experiment.rglob("results.json")}
    assert len(files) >= 8
    assert run(experiment) == 0
    assert files == {p: p.stat().st_mtime_ns for p in files}


def test_settings_of_the_command_line_join_those_of_the_file(experiment):
    stage = yaml.safe_load((experiment / "out" / "stages" / "eval-before.yaml").read_text())
    assert stage["data"]["num_prompts"] == 6
    assert stage["data"]["prompts_source"] == "demo:prompts_heldout"


def test_other_settings_are_refused(experiment, capsys):
    assert run(experiment, "--behaviour.num_samples", "7") == 2
    assert "data.num_samples (8, now 7)" in capsys.readouterr().err


def test_largest_within_the_bound():
    class Stub:
        def __init__(self, ratio):
            self.perplexity = type("P", (), {"ratio": ratio})

    outcomes = [
        Outcome("a", 5, None, Stub(1.001)),
        Outcome("b", 10, None, Stub(1.009)),
        Outcome("c", 20, None, Stub(1.05)),
        Outcome("d", 20, "random", Stub(1.0)),
    ]
    assert largest_within(outcomes, 0.01).name == "b"
    assert largest_within(outcomes, 0.0001) is None
