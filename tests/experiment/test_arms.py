"""Compression: arms, cuts and curves; a small experiment on the embedded demo."""

import json
import math
from pathlib import Path

import pytest
import yaml

from sparc3_pl.cli import main
from sparc3_pl.errors import InputError
from sparc3_pl.evaluation.results import Evaluation
from sparc3_pl.experiment.arms import arms_of
from sparc3_pl.experiment.run import run as run_experiment
from sparc3_pl.io.files import strict_json
from sparc3_pl.io.formats import typed
from sparc3_pl.pruning.plan import PrunePlan
from sparc3_pl.report.collect import ExperimentSummary
from sparc3_pl.report.curves import Curve, CurvePoint, curve_sections, curve_table

DEMO = Path(__file__).parents[2] / "configs" / "experiments" / "compress_demo.yaml"
ARMS = {
    "wanda": {"score": {"method": "wanda"}},
    "layer": {"score": {"method": "wanda"}, "plan": {"scope": "layer"}, "seeds": [0], "shares": [0.3]},
    "2of4": {"score": {"method": "magnitude"}, "plan": {"pattern": "2:4"}, "seeds": [0]},
}


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compress")
    config = yaml.safe_load(DEMO.read_text()) | {"output": str(folder / "out"), "arms": ARMS, "shares": [0.5, 0.3]}
    config["eval_data"]["text_max_bytes"] = 1000
    config["general"]["num_samples"] = 2
    config["trainer"]["default_root_dir"] = str(folder)
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    assert main(["run", "--config", str(folder / "config.yaml")]) == 0
    return folder / "out"


def test_each_method_is_scored_once_for_each_seed(out):
    assert {path.name for path in (out / "scores").iterdir()} == {"wanda-seed0", "wanda-seed1", "2of4-seed0"}
    plan = PrunePlan.load(out / "plans" / "layer-seed0-0.3.json")
    assert plan.scores["general"][0]["name"] == "wanda-seed0"
    assert (plan.contrast, plan.settings["per_layer"], plan.scores["behaviour"]) == ("general", True, [])


def test_every_arm_is_pruned_to_every_share_and_the_base_is_measured_once(out):
    cuts = {f"{arm}-{share}" for arm in ("wanda-seed0", "wanda-seed1") for share in (0.3, 0.5)}
    cuts |= {"layer-seed0-0.3", "2of4-seed0-0.5"}
    assert {path.stem for path in (out / "plans").glob("*.json")} == cuts
    assert {path.name for path in (out / "evaluations").iterdir()} == {"before", *cuts}


def test_the_curve_is_made_of_the_evaluations(out):
    summary = typed(ExperimentSummary, json.loads((out / "experiment.json").read_text()), "experiment.json", "again")
    (curve,) = summary.curves
    assert (curve.figure, curve.shares) == ("perplexity", (0.3, 0.5))

    def perplexity(name: str) -> float:
        return Evaluation.open(out / "evaluations" / name).results["perplexity"]["value"]

    assert curve.dense == pytest.approx(perplexity("before"))
    assert {name: [p.share for p in points] for name, points in curve.arms.items()} == {
        "wanda": [0.3, 0.5],
        "layer": [0.3],
        "2of4": [0.5],
    }
    for point in curve.arms["wanda"]:
        one, other = (perplexity(f"wanda-seed{seed}-{point.share}") for seed in (0, 1))
        assert point.mean == pytest.approx((one + other) / 2)
        assert point.deviation == pytest.approx(abs(one - other) / math.sqrt(2))
    assert curve.arms["2of4"][0].deviation is None
    page = (out / "report" / "report.html").read_text()
    assert "Against the share removed" in page
    assert "perplexity against the share removed" in page


def test_a_table_has_a_row_for_each_arm_and_a_column_for_each_share():
    points = (CurvePoint(0.5, (10.0, 12.0)), CurvePoint(0.7, (math.inf, 3.0)))
    curve = Curve("perplexity", 5.5, {"a": points, "b": (CurvePoint(0.7, (9.0,)),)})
    table = curve_table(curve)
    assert table.columns == ("arm", "0 %", "50 %", "70 %", "seeds")
    assert table.texts == (
        ("dense", "5.50", "", "", ""),
        ("a", "", "11.00 ± 1.41", "inf", "2"),
        ("b", "", "", "9.00", "1"),
    )
    assert typed(Curve, json.loads(strict_json(curve.to_json())), "f", "again") == curve
    (section,) = curve_sections({"e": [curve]})
    assert len(section.blocks) == 2
    assert list(curve_sections({"e": []})) == []


@pytest.mark.parametrize(
    ("arms", "match"),
    [
        ({}, "arms is empty"),
        ({"a/b": {}}, "'a/b' also names files"),
        (
            {"a": {"method": "wanda"}},
            "arms.a: method is none of its keys; they are general, plan, score, seeds, shares",
        ),
        ({"a": {"plan": 3}}, "arms.a.plan=3: give keys with values"),
        ({"a": {"shares": [2.0]}}, r"shares=\[2.0\]: give shares between 0 and 1"),
        ({"a": {"seeds": []}}, r"arms.a.seeds=\[\]: give a list of whole numbers"),
        ({"a": {"plan": {"share": 0.5}}}, "arms.a: shares says how much is removed"),
        ({"a": {"score": {"sequential": 0.6}, "plan": {"scope": "row"}}}, r"sequential=0.6 .* shares: \[0.6\]"),
        ({"a": {"score": {"sequential": 0.5}}}, "arms.a: with score.sequential=0.5 .* give the arm plan: {scope: row}"),
        ({"a": {"score": {"sequential": "2:4"}, "plan": {"scope": "row"}}}, 'give the arm plan: {pattern: "2:4"}'),
        (
            {"a": {"score": {"sequential": 0.5}, "plan": {"scope": "row", "budgets": "owl"}}},
            "and leave out budgets",
        ),
    ],
)
def test_bad_arms(arms, match):
    with pytest.raises(InputError, match=match):
        arms_of(arms, {}, {}, {}, [0], [0.5])


@pytest.mark.parametrize(("value", "plan"), [(0.5, {"scope": "row"}), ("2:4", {"pattern": "2:4"})])
def test_an_arm_may_be_pruned_as_it_was_scored(value, plan):
    (arm,) = arms_of({"a": {"score": {"sequential": value}, "plan": plan}}, {}, {}, {}, [0], [0.5])
    assert [cut.share for cut in arm.cuts()] == [0.5]


def test_random_scores_follow_the_seed():
    (arm,) = arms_of(
        {"random": {"score": {"method": "random"}}}, {"granularity": "weight"}, {"source": "x"}, {}, [3], [0.5]
    )
    assert arm.scoring(3) == ({"granularity": "weight", "method": "random", "seed": 3}, {"source": "x", "seed": 3})
    again = {"random": {"score": {"method": {"class_path": "random"}}}}
    (arm,) = arms_of(again, {}, {}, {}, [3], [0.5])
    assert arm.scoring(3)[0] == {"method": {"class_path": "random"}, "seed": 3}
    (lrp,) = arms_of(None, {"method": "lrp"}, {}, {}, [0], [0.5])
    assert (lrp.name, lrp.scoring(0)) == ("lrp", ({"method": "lrp"}, {"seed": 0}))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"shares": [0.5], "behaviour": {"source": "x"}}, "leave out behaviour, or shares"),
        ({"shares": [0.5], "counts": [3]}, "leave out counts, or shares"),
        ({"shares": [0.5], "general_score": {"target": "text"}}, "leave out general_score, or shares"),
        ({"shares": [0.5], "controls": ["random"]}, "leave out controls, or shares"),
        ({"shares": [1.5]}, r"shares=\[1.5\]: give shares between 0 and 1"),
        ({"shares": [1.5], "controls": ["random_matched"]}, r"shares=\[1.5\]: give shares between 0 and 1"),
        ({"shares": []}, r"shares=\[\]: give shares"),
        ({}, "behaviour is missing: give behaviour to correct one, or shares"),
        ({"arms": {"a": {}}}, "behaviour is missing: give behaviour to correct one, or shares"),
        ({"arms": {"a/b": {}}, "behaviour": {"source": "x"}, "plan": {"num_neurons": 3}}, "'a/b' also names files"),
    ],
)
def test_settings_that_contradict_each_other(tmp_path, settings, match):
    with pytest.raises(InputError, match=match):
        run_experiment(str(tmp_path / "out"), {"source": "x"}, {"text_source": "y"}, **settings)
    assert not (tmp_path / "out").exists()
