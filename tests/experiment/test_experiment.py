"""A whole experiment on the embedded demo, small; resuming, and refusing to mix settings."""

import functools
import hashlib
import inspect
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from evaluations import GENERATION, results, toxicity
from score_folders import LAYERS, write

from sparc3_pl.cli import main
from sparc3_pl.data.encoding import load_encoder
from sparc3_pl.errors import InputError
from sparc3_pl.evaluation.compare import Comparison
from sparc3_pl.evaluation.results import Evaluation, write_evaluation
from sparc3_pl.evaluation.rows import CompletionRow
from sparc3_pl.experiment.correction import correction_arms
from sparc3_pl.experiment.run import EditOutcome, largest_within, outcome_table
from sparc3_pl.experiment.run import run as run_experiment
from sparc3_pl.io.formats import to_json
from sparc3_pl.model import loading
from sparc3_pl.model.identity import ModelRecord
from sparc3_pl.model.source import ModelSource
from sparc3_pl.passes import run as passes_module
from sparc3_pl.pruning.plan import PlannedNeuron, PrunePlan, entries_of
from sparc3_pl.scores.folder import ScoreFolder
from sparc3_pl.selection.command import Asked
from sparc3_pl.selection.command import prune as real_prune
from sparc3_pl.statistics.paired import paired_change

DEMO = Path(__file__).parents[2] / "configs" / "experiments" / "demo.yaml"
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
    inner, loads = loading._load, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "_load", lambda source: loads.append(source) or inner(source))
        assert run(folder) == 0
    assert len(loads) == 1  # all stages share it
    return folder


def test_everything_is_there(experiment):
    out = experiment / "out"
    assert {path.name for path in (out / "scores").iterdir()} == {"behaviour", "general-0", "general-1"}
    edits = {"prune-5", "prune-40", "control-random_matched", "control-null"}
    assert {path.stem for path in (out / "plans").glob("*.json")} == edits
    assert {path.name for path in (out / "evaluations").iterdir()} == {"before", *edits}
    summary = json.loads((out / "experiment.json").read_text())
    assert {outcome["name"] for outcome in summary["outcomes"]} == edits


def test_it_says_where_the_time_went(experiment):
    rows = {row["stage"]: row for row in json.loads((experiment / "out" / "experiment.json").read_text())["timing"]}
    ev = Evaluation.open(experiment / "out" / "evaluations" / "prune-5")
    completions, encoder = ev.completions, load_encoder(ModelSource("demo"))
    read = sum(len(encoder(prompt)) for prompt in {row.prompt for row in completions})
    assert rows["eval-prune-5: completions"]["samples"] == len(completions)
    # The last token of a completion is drawn, and not read.
    assert rows["eval-prune-5: completions"]["tokens"] == read + sum(len(row.completion_ids) - 1 for row in completions)
    scores = ScoreFolder.open(experiment / "out" / "scores" / "general-1").manifest
    assert rows["score-general-1: scoring"]["tokens"] == scores.num_tokens
    assert 0 < rows["score-general-1: scoring"]["share"] < 2
    assert {stage.stage for stage in scores.timing.stages} >= {"loading", "reading", "scoring", "other"}
    assert rows["eval-before: perplexity"]["peak_bytes"] > 1e8
    assert rows["plan-prune-5"]["seconds"] > 0


def test_a_dry_run_says_what_each_pass_takes_and_does_nothing(experiment, capsys, monkeypatch):
    before = content(experiment)
    assert run(experiment, "--dry_run") == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("score-behaviour", "score-general-0", "eval-before", "activations", "judge"))
    assert "4 like it" in " ".join(said.split())  # the evaluations of four edits
    monkeypatch.setattr("sparc3_pl.passes.run.free_by_place", lambda *_: {"host": 2**20, "disk": 2**40})
    assert run(experiment, "--dry_run") == 2
    assert "MiB on the host, but 1.0 MiB are free" in capsys.readouterr().err
    assert content(experiment) == before


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


def test_results_say_by_which_command_they_were_made(experiment):
    out = experiment / "out"
    manifest = json.loads((out / "scores" / "behaviour" / "manifest.json").read_text())
    assert manifest["command"].startswith(f"sparc3 score --config {out}/stages/score-behaviour.yaml")
    plan = PrunePlan.load(out / "plans" / "prune-5.json")
    assert plan.command.startswith(f"sparc3 prune --general {out}/scores/general-0 {out}/scores/general-1 --behaviour")
    assert "--num_neurons 5" in plan.command
    after = Evaluation.open(out / "evaluations" / "prune-5").results["command"]
    assert f"--plan {out}/plans/prune-5.json" in after
    assert json.loads((out / "comparisons" / "prune-5.json").read_text())["command"].startswith("sparc3 compare")


def test_other_settings_are_refused(experiment, capsys):
    assert run(experiment, "--behaviour.num_samples", "7") == 2
    assert "data.num_samples (8, now 7)" in capsys.readouterr().err


def test_largest_within_the_bound():
    def compared(ratio, of_web=None):
        perplexity = None if ratio is None else SimpleNamespace(ratio=ratio)
        web = SimpleNamespace(before=10.0, after=10.0 * (of_web or 1), relative_change=(of_web or 1) - 1)
        measurements = {} if of_web is None else {"text web": {"perplexity": web}, "pairs": {"share": web}}
        return Comparison("before", "after", perplexity, {}, None, 0, (), measurements=measurements)

    outcomes = [
        EditOutcome("a", 5, None, compared(1.001)),
        EditOutcome("b", 10, None, compared(1.009)),
        EditOutcome("c", 20, None, compared(1.05)),
        EditOutcome("d", 20, "random", compared(1.0)),
        EditOutcome("e", 30, None, compared(None)),
    ]
    assert largest_within(outcomes, 0.01).name == "b"
    assert largest_within(outcomes, 0.0001) is None
    dear = EditOutcome("f", 15, None, compared(1.001, 1.02))  # within the bound on the first text alone
    assert dear.comparison.rises == {"": pytest.approx(0.001), "web": pytest.approx(0.02)}
    assert largest_within([*outcomes, dear], 0.01).name == "b"
    gains = [EditOutcome(f"budget-{scale}", 9, None, compared(1.001 * scale), scale) for scale in (0.9, 1.0, 1.1)]
    assert largest_within(gains, 0.01).name == "budget-1.0"  # all turn equally many components


# --- what is done again -----------------------------------------------------------------------------------------------


class Passes:
    """Stands for ``score`` and ``eval``: results that follow from what is read, without a model."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.typed: list[list[str]] = []
        self.configs: list[dict] = []
        self.fails_at: str | None = None

    def __call__(self, name: str, words: list[str]) -> None:
        options = dict(zip(words[::2], words[1::2], strict=False))
        config, output = yaml.safe_load(Path(options["--config"]).read_text()), Path(options["--output"])
        assert output.exists() == ("--overwrite" in words)
        if output.name == self.fails_at:
            raise InputError("a full disk")
        shutil.rmtree(output, ignore_errors=True)
        (self.score if name == "score" else self.evaluate)(config, output, options.get("--plan"))
        self.done.append(f"{name} {output.name}")
        self.typed.append(sys.argv)
        self.configs.append(config)

    def score(self, config: dict, output: Path, _: str | None) -> None:
        data = config["data"]
        content = Path(data["source"]).read_bytes() + str(data.get("seed")).encode()
        generator = torch.Generator().manual_seed(int(hashlib.sha256(content).hexdigest()[:8], 16))
        scores = {layer: torch.rand(20, generator=generator) for layer in LAYERS}
        total = sum(float(values.double().sum()) for values in scores.values())
        samples = [{"id": f"{output.name}{i}", "num_tokens": 9, "relevance": total} for i in range(2)]
        write(output, scores, samples=samples, method=config["model"].get("method", "lrp"))

    def evaluate(self, config: dict, output: Path, plan: str | None) -> None:
        summary = None if plan is None else PrunePlan.load(plan).summary()
        scores = {"toxicity": 0.5 if plan else 0.9}
        rows = [CompletionRow(f"p{i}", f"prompt {i}", 0, "x", scores, uniqueness=1.0) for i in range(6)]
        model = {"pretrained": "m", "fingerprint": "sha256:00", "dtype": "float32", "evaluated_fingerprint": plan}
        measured = results(toxicity=toxicity(), model=model, plan=to_json(summary), data=config["data"])
        write_evaluation(output, measured | {"generation": GENERATION, "judge": {}}, completions=rows, windows=[])


@pytest.fixture
def passes(monkeypatch):
    stub = Passes()
    monkeypatch.setattr("sparc3_pl.passes.run.run_pass", stub)
    stub.check_pass = passes_module.check_pass  # a parser takes half a second to build: one test asks for it
    monkeypatch.setattr("sparc3_pl.passes.run.check_pass", lambda *_: None)
    monkeypatch.setattr("sparc3_pl.report.command.report", lambda *_, **__: None)
    return stub


@pytest.fixture
def small(tmp_path, passes):
    """The settings of an experiment on three files and a model folder, and what was done for it."""
    for name in ("general", "behaviour", "prompts"):
        (tmp_path / f"{name}.txt").write_text(f"{name} text")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    settings = {
        "output": str(tmp_path / "out"),
        "general": {"source": str(tmp_path / "general.txt")},
        "behaviour": {"source": str(tmp_path / "behaviour.txt")},
        "eval_data": {"prompts_source": str(tmp_path / "prompts.txt"), "text_source": None},
        "plan": {"num_neurons": 4},
        "model": {"pretrained": str(tmp_path / "model")},
        "trainer": {"devices": 1},
        "seeds": [0, 1],
        "controls": ["random_matched"],
    }
    run_experiment(**settings)
    assert passes.done == [*SCORES, "eval before", *EDITED]
    passes.done.clear()
    return settings


SCORES = ["score behaviour", "score general-0", "score general-1"]
EDITED = ["eval prune-4", "eval control-random_matched"]


def content(folder: Path) -> dict[Path, tuple[int, bytes]]:
    return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()}


def test_nothing_is_done_twice_and_asking_writes_nothing(small, passes, tmp_path):
    before = content(tmp_path / "out" / "stages")
    run_experiment(**small)
    assert passes.done == []
    assert content(tmp_path / "out" / "stages") == before


@pytest.mark.parametrize(("file", "again"), [
    ("general.txt", [*SCORES[1:], *EDITED]),
    ("behaviour.txt", [SCORES[0], *EDITED]),
    ("prompts.txt", ["eval before", *EDITED]),
    ("model/config.json", [*SCORES, "eval before", *EDITED]),
])  # fmt: skip
def test_a_changed_file_at_the_same_path_is_read_again(small, passes, tmp_path, file, again):
    (tmp_path / file).write_text("others")
    run_experiment(**small)
    assert passes.done == again
    for name in ("prune-4", "control-random_matched"):
        plan = PrunePlan.load(tmp_path / "out" / "plans" / f"{name}.json").summary()
        assert Evaluation.open(tmp_path / "out" / "evaluations" / name).figures.plan.sha256 == plan.sha256
    run_experiment(**small)
    assert passes.done == again


def test_no_evaluation_of_an_earlier_plan_stands_under_a_new_one(small, passes, tmp_path):
    shutil.rmtree(tmp_path / "out" / "plans")
    run_experiment(**small | {"plan": {"num_neurons": 4, "contrast": "rank"}})
    assert passes.done == EDITED
    assert Evaluation.open(tmp_path / "out" / "evaluations" / "prune-4").figures.plan.contrast == "rank"


def test_other_settings_are_refused_before_anything_is_done(small, passes, tmp_path):
    (tmp_path / "general.txt").write_text("others")  # would be scored again
    before = content(tmp_path / "out")
    with pytest.raises(InputError, match=r"prune-4\.json: was made with a different contrast \(None, now 'rank'\)"):
        run_experiment(**small | {"plan": {"num_neurons": 4, "contrast": "rank"}})
    assert passes.done == []
    assert content(tmp_path / "out") == before


def test_a_folder_of_something_else_is_left_alone(small, passes, tmp_path):
    for name in ("papers", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "papers" / "experiment.json").write_text("mine")
    for name, message in (("papers", "holds other files and no experiment"), ("general.txt", "is a file")):
        with pytest.raises(InputError, match=message):
            run_experiment(**small | {"output": str(tmp_path / name)})
    assert content(tmp_path / "papers").keys() == {tmp_path / "papers" / "experiment.json"}
    assert passes.done == []
    run_experiment(**small | {"output": str(tmp_path / "empty")})
    assert (tmp_path / "empty" / "experiment.json").is_file()


@pytest.mark.parametrize("lost", ["yaml", "json"])
def test_a_result_without_its_record_is_not_done(small, passes, tmp_path, lost):
    (tmp_path / "out" / "stages" / f"score-behaviour.{lost}").unlink()
    run_experiment(**small)
    assert passes.done[0] == "score behaviour"
    assert "score general-0" not in passes.done


def test_a_result_that_somebody_put_there_is_not_the_stages(small, passes, tmp_path):
    shutil.rmtree(tmp_path / "out" / "evaluations" / "before")
    shutil.copytree(tmp_path / "out" / "evaluations" / "prune-4", tmp_path / "out" / "evaluations" / "before")
    run_experiment(**small)
    assert passes.done == ["eval before"]


def test_a_stage_that_failed_is_done_again_and_no_other(small, passes, tmp_path):
    (tmp_path / "behaviour.txt").write_text("others")
    passes.fails_at = "prune-4"
    with pytest.raises(InputError, match="full disk"):
        run_experiment(**small)
    assert passes.done == [SCORES[0]]
    passes.fails_at = None
    run_experiment(**small)
    assert passes.done == [SCORES[0], *EDITED]


class KeyedJudge:
    """A judge that asks for a secret."""

    def __init__(self, api_key: str) -> None:
        self.api_key = api_key

    def score(self, texts: list[str]) -> dict[str, torch.Tensor]:
        return {"toxicity": torch.zeros(len(texts))}


def test_secrets_stay_out_of_the_stages(small, passes, tmp_path):
    judge = {"class_path": f"{__name__}.KeyedJudge", "init_args": {"api_key": "abcdef123456"}}
    shutil.rmtree(tmp_path / "out" / "evaluations")
    run_experiment(**small | {"eval_model": {"judge": judge}})
    assert passes.configs[-1]["model"]["judge"] == judge  # the pass itself is told
    assert not any(b"abcdef123456" in data for _, data in content(tmp_path / "out").values())
    assert not any("abcdef123456" in word for words in passes.typed for word in words)
    passes.done.clear()
    judge["init_args"]["api_key"] = "another key of the same judge"
    run_experiment(**small | {"eval_model": {"judge": judge}})
    assert passes.done == []


# --- gains ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def with_budget(small, tmp_path, monkeypatch):
    """The settings of an experiment with gains on completions, and the arguments that ``prune`` was asked with."""
    asked, text = [], tmp_path / "held.txt"
    text.write_text("held back")
    defaults = {name: one.default for name, one in inspect.signature(real_prune).parameters.items()}

    @functools.wraps(real_prune)
    def prune(**arguments):
        asked.append({key: value for key, value in arguments.items() if value != defaults.get(key)})
        settings = {"gains": {"scale": 100 * (arguments["budget"] or 0) or arguments["scale"]}}
        settings["held_back"] = text.read_text()  # another text gives another plan, as in life
        entries = entries_of([PlannedNeuron(LAYERS[0], place, -1.0, 0.5) for place in range(3)])
        plan = PrunePlan(entries=entries, model=ModelRecord(fingerprint="sha256:00"), edit="gains", settings=settings)
        plan.save(arguments["output"], arguments["overwrite"])

    monkeypatch.setattr("sparc3_pl.selection.command.prune", prune)
    settings = small | {
        "output": str(tmp_path / "gains"),
        "completions": {"data": {"prompts_source": str(tmp_path / "prompts.txt")}, "model": {"samples_per_prompt": 3}},
        "behaviour": {"text_field": "prompt"},
        "behaviour_score": {"target": "completion"},
        "general_score": {"target": "text", "labels": "model"},
        "texts": [{"source": str(tmp_path / "behaviour.txt")}],
        "seeds": [0],
        "plan": {"contrast": "budget", "edit": "gains", "budget": 0.01, "budget_text": [str(text)]},
        "controls": ["permuted"],
    }
    return settings, asked


@pytest.mark.parametrize(
    ("plan", "match"),
    [
        ({"protect": 1.5}, r"plan-prune-4: protect=1.5 is not a share from 0 to below 1"),
        ({"share": 0.1}, r"num_neurons=4, share=0.1: say in one way how many to choose"),
        ({"scope": "rows"}, "scope='rows' is unknown"),
        ({"edit": "scale"}, "edit=scale with alpha=None"),
        ({"gains_range": [0, 2]}, r"gains_range=\[0.0, 2.0\] is for contrast=budget"),
        ({"top_general": 0.1}, "top_general=0.1 is for contrast=set_difference"),
        ({"contrast": "budget"}, "contrast=budget is for edit=gains, and this is edit=zero"),
        ({"protect": "much"}, 'Parser key "protect": Expected a .*float'),
        ({"layers": 3}, 'Parser key "layers": Expected a list. Got value: 3'),
        ({"seed": True}, 'plan-prune-4: Parser key "seed": Expected a .*int'),
        ({"edit": "mean"}, "edit=mean needs text to measure mean activations on"),
        ({"shrink": True}, "shrink=true makes a smaller model, but there is no place for it"),
        ({"edit": "remove", "keep_values": True}, "edit=remove replaces no value that could be kept"),
        ({"device": "sharded"}, "device=sharded shares a model out for the search of edit=gains"),
        ({"budgets": "owl"}, "budgets give every layer a share of its own, but scope=model"),
        ({"budgets": "owl", "scope": "layer"}, "budgets are shares, but num_neurons=4 is a number"),
        ({"pattern": "2:4"}, "scope=pattern says by itself how many are chosen; leave out num_neurons=4"),
        ({"contrast": "expertise"}, "controls: random_matched goes by general scores, and contrast=expertise"),
    ],
)
@pytest.mark.parametrize("dry_run", [False, True])
def test_a_plan_that_cannot_be_is_refused_before_any_score(small, passes, tmp_path, plan, match, dry_run):
    settings = small | {"output": str(tmp_path / "new"), "plan": small["plan"] | plan, "dry_run": dry_run}
    with pytest.raises(InputError, match=match):
        run_experiment(**settings)
    assert passes.done == []


def test_one_text_for_a_list_of_a_plan_is_that_list(with_budget, tmp_path):
    """Not the list of its letters, of which ``*`` alone would choose every layer; and a file that changes is seen."""
    settings, asked = with_budget
    plan = settings["plan"] | {"layers": "*up*", "budget_text": str(tmp_path / "held.txt")}
    run_experiment(**settings | {"plan": plan})
    assert {tuple(one["layers"]) for one in asked} == {("*up*",)}
    assert {tuple(one["budget_text"]) for one in asked} == {(str(tmp_path / "held.txt"),)}
    assert len(asked) == 2
    (tmp_path / "held.txt").write_text("other text")
    run_experiment(**settings | {"plan": plan})
    assert len(asked) == 4


def test_budgets_from_completions_to_controls_at_the_same_scale(with_budget, passes, tmp_path):
    """The order of the stages, what each is asked, and that a changed plan makes its control anew."""
    settings, asked = with_budget
    settings |= {"budgets": [0.02]}
    run_experiment(**settings)
    edits = ["budget-0.01", "control-permuted-0.01", "budget-0.02", "control-permuted-0.02"]
    first = ["eval completions", "score behaviour", "score general-0", "score general-text1-0", "eval before"]
    assert passes.done == [*first, *(f"eval {name}" for name in edits)]
    models = [config["model"] for config in passes.configs[-9:-5]]
    assert [model.get("target") for model in models] == [None, "completion", "text", "text"]
    assert passes.configs[-8]["data"]["source"] == str(tmp_path / "gains" / "completions" / "completions.jsonl")
    given = [(a.get("budget"), a.get("scale"), a.get("control", "none")) for a in asked]
    assert given == [(0.01, None, "none"), (None, 1.0, "permuted"), (0.02, None, "none"), (None, 2.0, "permuted")]
    assert len(asked[0]["general"]) == 2
    outcomes = json.loads((tmp_path / "gains" / "experiment.json").read_text())["outcomes"]
    assert [(outcome["name"], outcome["count"]) for outcome in outcomes] == [(name, 3) for name in edits]

    passes.done.clear()
    run_experiment(**settings)
    assert passes.done == []
    (tmp_path / "held.txt").write_text("other text")
    run_experiment(**settings)
    assert len(asked) == 8  # every plan, and what was measured with it
    assert passes.done == [f"eval {name}" for name in edits]


def test_a_round_draws_and_scores_completions_of_the_edited_model(with_budget, passes, tmp_path):
    settings, asked = with_budget
    run_experiment(**settings)
    passes.done.clear(), asked.clear(), passes.typed.clear()
    run_experiment(**settings | {"rounds": 3})
    rounds = [f"{kind}-round{number}" for number in (2, 3) for kind in ("eval completions", "score behaviour")]
    assert passes.done == [*rounds, "eval budget-0.01", "eval control-permuted-0.01"]  # the first round is there
    out = tmp_path / "gains"
    assert [a.get("budget") for a in asked] == [pytest.approx(0.01 / 3), pytest.approx(0.02 / 3), 0.01, None]
    scored = [str(out / "scores" / f"behaviour{end}") for end in ("", "-round2", "-round3")]
    assert [a["behaviour"] for a in asked] == [scored[:1], scored[:2], scored, scored]
    assert all(len(a["general"]) == 2 for a in asked)
    plans = [dict(zip(words[2::2], words[3::2], strict=False)).get("--plan") for words in passes.typed[:4]]
    assert plans == [str(out / "plans" / f"round{number}.json") for number in (2, 2, 3, 3)]
    configs = passes.configs[-6:-2]
    assert [config["model"].get("seed") for config in configs[::2]] == [1, 2]
    sources = [config["data"]["source"] for config in configs[1::2]]
    assert sources == [str(out / f"completions-round{number}" / "completions.jsonl") for number in (2, 3)]
    assert configs[0]["allow_overlap"] is True
    passes.done.clear()
    run_experiment(**settings | {"rounds": 3})
    assert passes.done == []


def test_the_report_has_the_edits_of_an_arm_of_any_name_but_no_round(with_budget, passes, tmp_path, monkeypatch):
    inputs = []
    monkeypatch.setattr("sparc3_pl.report.command.report", lambda paths, **_: inputs.extend(paths))
    settings, _ = with_budget
    run_experiment(**settings | {"rounds": 2, "arms": {"completions": {"plan": {"budget": 0.02}}}, "controls": []})
    out = tmp_path / "gains"
    assert str(out / "evaluations" / "completions-budget-0.02") in inputs
    assert str(out / "completions") in inputs and str(out / "completions-round2") not in inputs


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"rounds": 0}, "rounds=0: give 1"),
        ({"rounds": 2, "completions": None, "behaviour": {"source": "prompts.txt"}}, "rounds=2 draw completions"),
        ({"rounds": 2, "behaviour": {"source": "prompts.txt"}}, "rounds=2 draw completions"),
        ({"rounds": 2, "plan": {"contrast": "budget", "edit": "gains", "scale": 0.1}}, "take a part of the budget"),
    ],
)
def test_rounds_that_are_refused(with_budget, passes, change, match):
    settings, asked = with_budget
    with pytest.raises(InputError, match=match):
        run_experiment(**settings | change)
    assert (passes.done, asked) == ([], [])


@pytest.mark.parametrize(
    ("score", "plan", "control"),
    [
        ({}, {"num_neurons": 4}, "control-random_matched"),
        ({"granularity": "weight"}, {"num_weights": 4}, "control-random"),
        ({"granularity": ["weight"]}, {"num_weights": 4}, "control-random"),
        ({"granularity": {"class_path": "weight"}}, {"num_weights": 4}, "control-random"),
        ({"granularity": "sparc3_pl.model.components.Weight"}, {"num_weights": 4}, "control-random"),
        ({}, {"edit": "gains", "budget": 0.01}, "control-permuted-0.01"),
        ({}, {"edit": {"class_path": "gains"}, "budget": 0.01}, "control-permuted-0.01"),
        ({}, {"edit": "sparc3_pl.pruning.gains.Gains", "budget": 0.01}, "control-permuted-0.01"),
        ({}, {"edit": "gains", "budget": 0.01, "num_neurons": 4}, "control-random_matched-0.01"),
        ({"method": "expertise"}, {"contrast": "expertise", "num_neurons": 4}, "control-random"),
    ],
)
def test_controls_that_are_not_given_are_one_that_the_plan_can_have(score, plan, control):
    sections = {"plan": plan, "score": score, "behaviour": {"source": "b"}, "general": {"source": "g"}}
    lists = {"texts": [], "seeds": [0], "counts": None, "budgets": None, "controls": None}
    own, arm = correction_arms({"same": {}}, sections, **lists)
    assert [name for name, edit in own.edits.items() if edit.control] == [control]
    assert [name for name, edit in arm.edits.items() if edit.control] == [f"same-{control}"]


# --- arms -------------------------------------------------------------------------------------------------------------


def test_controls_that_single_weights_cannot_have(small, passes, tmp_path):
    """Those of the experiment are left out for an arm of weights; its own, and those of weights alone, are refused."""
    sections = {"plan": {"num_neurons": 4}, "behaviour": {"source": "b"}, "general": {"source": "g"}}
    lists = {"texts": [], "seeds": [0], "counts": None, "budgets": None, "controls": ["random_matched", "random"]}
    for granularity in ("weight", {"class_path": "weight"}, ["weight"]):
        weights = {"score": {"granularity": granularity}, "plan": {"num_neurons": None, "num_weights": 5}}
        _, arm = correction_arms({"weights": weights}, sections, **lists)
        assert list(arm.edits) == ["weights-prune-5", "weights-control-random"]
        with pytest.raises(InputError, match=r"arms.weights: controls: random_matched is not for weight scores; use "):
            correction_arms({"weights": weights | {"controls": ["random_matched"]}}, sections, **lists)
    own = small | {"score": {"granularity": granularity}, "plan": {"num_weights": 5}, "output": str(tmp_path / "other")}
    with pytest.raises(InputError, match="controls: random_matched is not for weight scores; use random"):
        run_experiment(**own)
    assert passes.done == []


def test_arms_join_an_experiment_that_is_done(small, passes, tmp_path):
    """Other ways to choose beside the experiment's own: only what is new is scored, planned and measured."""
    labelled = {"source": str(tmp_path / "prompts.txt"), "label_field": "toxicity"}
    aura = {"contrast": "expertise", "edit": "gains", "scale": 1.0, "num_neurons": None}
    arms = {
        "rank": {"plan": {"contrast": "rank"}, "counts": [2], "controls": []},
        "aura": {"score": {"method": "expertise"}, "behaviour": labelled, "plan": aura, "controls": ["permuted"]},
        "plain": {"score": {"method": "gradient"}, "seeds": [1]},
    }
    run_experiment(**small | {"arms": arms})
    edits = ["rank-prune-2", "rank-prune-4", "aura-scale-1", "aura-control-permuted-1"]
    edits += ["plain-prune-4", "plain-control-random_matched"]
    scores = ["score aura-behaviour", "score plain-behaviour", "score plain-general-1"]
    assert passes.done == [*scores, *(f"eval {name}" for name in edits)]
    assert passes.configs[-len(passes.done)]["data"] == labelled  # nothing of the other samples
    out = tmp_path / "out"
    plans = {name: PrunePlan.load(out / "plans" / f"{name}.json") for name in edits}
    assert [plan.scores["behaviour"][0]["name"] for plan in plans.values()][:3] == ["behaviour"] * 2 + [
        "aura-behaviour"
    ]
    assert plans["aura-scale-1"].scores["general"] == []
    assert [len(plan.scores["general"]) for plan in plans.values()] == [2, 2, 0, 0, 1, 1]
    (folder,) = [ScoreFolder.open(out / "scores" / "aura-behaviour")]
    wanted = {
        (layer, i): 1 - 2 * (auroc - 0.5)
        for layer in folder.layers
        for i, auroc in enumerate(folder.load(layer).double().tolist())
        if auroc > 0.5
    }
    assert {(n.layer, n.index): n.factor for n in plans["aura-scale-1"].neurons} == pytest.approx(wanted)
    outcomes = json.loads((out / "experiment.json").read_text())["outcomes"]
    assert [outcome["arm"] for outcome in outcomes] == [None] * 2 + ["rank"] * 2 + ["aura"] * 2 + ["plain"] * 2
    passes.done.clear()
    run_experiment(**small | {"arms": arms})
    assert passes.done == []


SECTIONS = {
    "general": {"source": "web", "seq_len": 128},
    "behaviour": {"text_field": "prompt", "weight_field": "scores.toxicity"},
    "score": {"method": "gradient", "granularity": ["neuron", "channel"], "signed": True, "squares": True},
    "behaviour_score": {"target": "completion"},
    "general_score": {"target": "text", "labels": "model"},
    "plan": {"contrast": "budget", "edit": "gains", "budget": 0.01, "budget_text": ["held"], "gains_range": [0, 2]},
}
LISTS = {"texts": [{"source": "wiki"}], "seeds": [0], "counts": None, "budgets": [0.02], "controls": ["permuted"]}
HELD = {"contrast": "expertise", "edit": "gains", "budget_text": ["held"]}
ARMS = {
    "no_fisher": (
        {"plan": {"contrast": {"class_path": "budget", "init_args": {"fisher": False}}}},
        ["budget-0.01", "control-permuted-0.01", "budget-0.02", "control-permuted-0.02"],
        SECTIONS["score"] | {"target": "completion"},
        SECTIONS["plan"] | {"contrast": {"class_path": "budget", "init_args": {"fisher": False}}, "control": None},
    ),
    "neurons": (
        {"plan": {"layers": ["*up*"]}, "budgets": [], "controls": []},
        ["budget-0.01"],
        SECTIONS["score"] | {"target": "completion"},
        SECTIONS["plan"] | {"layers": ["*up*"], "control": None},
    ),
    "aura": (
        {"score": {"method": "expertise"}, "plan": {"contrast": "expertise", "scale": 1.0}},
        ["scale-1", "control-permuted-1"],
        {"method": "expertise", "granularity": ["neuron", "channel"]},
        HELD | {"scale": 1.0, "control": None},
    ),
    "aura_budget": (
        {"score": {"method": "expertise"}, "plan": {"contrast": "expertise"}, "budgets": []},
        ["budget-0.01", "control-permuted-0.01"],
        {"method": "expertise", "granularity": ["neuron", "channel"]},
        HELD | {"budget": 0.01, "control": None},
    ),
    "aura_by_class": (
        {"plan": {"contrast": {"class_path": "expertise"}}},
        ["budget-0.01", "control-permuted-0.01", "budget-0.02", "control-permuted-0.02"],
        SECTIONS["score"] | {"target": "completion"},
        HELD | {"contrast": {"class_path": "expertise"}, "budget": 0.01, "control": None},
    ),
    "published": (
        {
            "score": {"method": "lrp", "granularity": "neuron", "signed": None},
            "behaviour_score": {"target": None},
            "general_score": {"target": None, "labels": None},
            "plan": {"contrast": "difference", "edit": "zero", "num_neurons": 100},
            "counts": [50],
        },
        ["prune-50", "prune-100"],
        {"method": "lrp", "granularity": "neuron", "squares": True},
        {"contrast": "difference", "edit": "zero", "num_neurons": 50, "control": None},
    ),
}


@pytest.mark.parametrize("name", ARMS)
def test_what_an_arm_takes_over(name):
    given, edits, score, plan = ARMS[name]
    own, arm = correction_arms({name: given}, SECTIONS, **LISTS)
    assert (own.name, next(iter(own.edits)), own.scores[1]["labels"]) == (None, "budget-0.01", "model")
    assert list(arm.edits) == [f"{name}-{edit}" for edit in edits]
    assert arm.scores[0] == score
    assert all(edit.scale_of in (None, *arm.edits) for edit in arm.edits.values())
    if plan is not None:
        assert next(iter(arm.edits.values())).settings == plan
    assert arm.seeds == (() if "aura" in name else [0])


@pytest.mark.parametrize(
    ("experiment", "arm", "expected"),
    [
        ({}, {"contrast": None, "edit": None, "budget": None, "num_neurons": 4}, {"num_neurons": 4}),
        (
            {},
            {"contrast": {"class_path": "budget", "init_args": {"gains_range": [0, 3]}}},
            {
                "contrast": {"class_path": "budget", "init_args": {"gains_range": [0, 3]}},
                "edit": "gains",
                "budget": 0.01,
            },
        ),
        (
            {"contrast": "set_difference", "edit": "zero", "num_neurons": 4, "top_general": 0.1},
            {"contrast": "difference"},
            {"contrast": "difference", "edit": "zero", "num_neurons": 4},
        ),
    ],
)
def test_an_arm_takes_no_argument_over_that_its_contrast_does_not_take(experiment, arm, expected):
    sections = SECTIONS | {"plan": experiment or SECTIONS["plan"]}
    lists = LISTS | {"budgets": None, "controls": []}
    _, way = correction_arms({"a": {"plan": arm}}, sections, **lists)
    settings = next(iter(way.edits.values())).settings
    assert {key: value for key, value in settings.items() if key not in ("budget_text", "control")} == expected
    given = settings | {"general": ["g"], "behaviour": ["b"], "budget_text": ["demo:text"], "control": "none"}
    given = given if "budget" in settings else {key: one for key, one in given.items() if key != "budget_text"}
    defaults = {name: one.default for name, one in inspect.signature(real_prune).parameters.items()}
    Asked.of(defaults | given)


def test_an_arm_of_one_seed_has_no_control_that_takes_two():
    controls = ["random_matched", "null"]
    sections = SECTIONS | {"plan": {"num_neurons": 4}, "score": {"method": "gradient"}}
    lists = LISTS | {"budgets": None, "seeds": [0, 1], "texts": [], "controls": controls}
    own, arm = correction_arms({"a": {"seeds": [3]}}, sections, **lists)
    assert [edit.control for edit in own.edits.values()] == [None, *controls]
    assert [edit.control for edit in arm.edits.values()] == [None, "random_matched"]


@pytest.mark.parametrize(
    ("arm", "match"),
    [
        ({"shares": [0.5]}, "arms.a: shares is none of its keys; they are general, behaviour, score"),
        ({"plan": {"edit": "zero"}}, "arms.a: plan.num_neurons=None: say how many to choose"),
        ({"controls": ["null"]}, "arms.a: controls: null is no control of plan.edit=gains"),
        ({"plan": {"scale": 1.0}, "budgets": [0.1]}, "arms.a: with plan.scale=1.0 there is one edit"),
        ({"plan": {"contrast": "budgett"}}, "contrast='budgett' is unknown"),
        ({"behaviour": ["x"]}, r"arms.a.behaviour=\['x'\]: give keys with values"),
    ],
)
def test_arms_that_are_refused(arm, match):
    with pytest.raises(InputError, match=match):
        correction_arms({"a": arm}, SECTIONS, **LISTS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_model": {"max_new_tokns": 5}}, "model.max_new_tokns"),
        ({"eval_model": {"judge": {"class_path": "no.such.Judge"}}}, "model.judge"),
        ({"score": {"method": "lrp", "signed": "perhaps"}}, "model.signed"),
        ({"general": {"source": "demo", "num_samples": "many"}}, "data.num_samples"),
    ],
)
def test_settings_of_every_pass_are_read_before_the_first_is_done(
    small, passes, changes, message, capsys, tmp_path, monkeypatch
):
    monkeypatch.setattr("sparc3_pl.passes.run.check_pass", passes.check_pass)
    changes = changes | {"output": str(tmp_path / "new")}
    passes.done.clear()
    with pytest.raises(SystemExit) as stop:
        run_experiment(**(small | changes))
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert passes.done == []


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"budgets": [0.02]}, r"budgets=\[0.02\] are for plan.edit=gains"),
        ({"plan": {"edit": "gains"}, "controls": []}, "give plan.budget"),
        ({"plan": {"edit": "gains", "budget": 0.01}, "counts": [3], "controls": []}, "budgets in place of counts"),
        ({"plan": {"edit": "gains", "budget": 0.01}, "controls": ["null"]}, "null is no control of plan.edit=gains"),
        ({"controls": ["permuted"]}, "permuted is no control of plan.edit=zero; use random_matched"),
        ({"seeds": [0], "controls": ["null"]}, "null takes 2 sets of general scores, and there is 1; give 2 seeds"),
        (
            {"arms": {"a": {"seeds": [3], "controls": ["null"]}}},
            "arms.a: controls: null takes 2 sets of general scores, and there is 1",
        ),
        (
            {"plan": {"edit": "gains", "budget": 0.01, "num_neurons": None}, "controls": ["random_matched"]},
            "about half of all are chosen; use permuted, or give plan.num_neurons",
        ),
        ({"completions": {"samples_per_prompt": 3}}, "completions: samples_per_prompt is none of its keys"),
        ({"plan": {"num_neurons": 3, "protekt": 0.1}}, "plan: got an unexpected keyword argument 'protekt'"),
        ({"plan": {"num_neurons": 3, "overwrite": True}}, "plan: .* multiple values"),
    ],
)
def test_budgets_that_do_not_fit_the_plan(small, passes, changes, match):
    with pytest.raises(InputError, match=match):
        run_experiment(**(small | changes))
    assert passes.done == []


def test_a_word_filter_is_an_arm_of_its_own(small, passes, tmp_path):
    (tmp_path / "words.txt").write_text("rude")
    given = small | {"word_filter": str(tmp_path / "words.txt")}
    run_experiment(**given)
    assert passes.done == ["eval word_filter"]  # nothing else is made again
    assert passes.configs[-1]["model"]["word_filter"] == given["word_filter"]
    outcomes = json.loads((tmp_path / "out" / "experiment.json").read_text())["outcomes"]
    assert [(o["name"], o["control"], o["count"]) for o in outcomes][-1] == ("word_filter", "word filter", 0)
    (tmp_path / "words.txt").write_text("ruder")
    run_experiment(**given)
    assert passes.done == ["eval word_filter"] * 2
    with pytest.raises(InputError, match=r"word_filter='none\.txt' cannot be read"):
        run_experiment(**given | {"output": str(tmp_path / "other"), "word_filter": "none.txt"})
    assert passes.done == ["eval word_filter"] * 2


# --- the table --------------------------------------------------------------------------------------------------------


def test_the_table_is_of_what_was_measured():
    """Named by the judge's only label; without completions, the figures of measurements stand there."""
    change = paired_change(np.array([0.0, 1.0, 1.0]), np.array([0.0, 0.0, 1.0]), lower_is_better=True)

    def table(**figures):
        given = {"toxicity": {}, "judges": {}, "measurements": {}, "rises": {}} | figures
        return outcome_table([EditOutcome("prune-4", 4, None, SimpleNamespace(**given))])

    judged = table(toxicity={"repetition": {"mean": change}})
    assert judged.columns[2] == "repetition"
    assert judged.texts[0][:3] == ("prune-4", "4", "0.667 to 0.333")
    measured = table(measurements={"pairs": {"prefers_first": change, "difference": change}})
    assert [row[0] for row in measured.texts] == ["prune-4: pairs: prefers_first", "prune-4: pairs: difference"]
    assert measured.columns[2] == "figure"
    assert table().texts[0][:3] == ("prune-4", "4", "")
