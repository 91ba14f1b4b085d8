"""The command: its folder, what reads it, and what it refuses."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from pair_batches import pair_batches
from tiny_models import tiny

from sparc3_pl.circuit.ablation import ABLATIONS
from sparc3_pl.circuit.arms import arms_of
from sparc3_pl.circuit.command import _warnings, circuit
from sparc3_pl.circuit.components import Candidates
from sparc3_pl.circuit.measure import predictions_of_batch
from sparc3_pl.circuit.results import open_circuit
from sparc3_pl.circuit.run import Bench
from sparc3_pl.circuit.settings import CircuitData, CircuitModel
from sparc3_pl.cli import execute, main
from sparc3_pl.diagnosis.overlap import overlap
from sparc3_pl.errors import InputError
from sparc3_pl.evaluation.results import KIND as EVALUATION
from sparc3_pl.model.components import COMPONENTS
from sparc3_pl.pruning.plan import PrunePlan
from sparc3_pl.report.command import make_report
from sparc3_pl.scores.folder import ScoreFolder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model and pairs of token ids that it is right on."""
    folder = tmp_path_factory.mktemp("circuit")
    model = tiny("llama")
    model.save_pretrained(folder / "model")
    (batch,) = pair_batches([5 + i % 3 for i in range(60)], 60)
    swap = predictions_of_batch(model, batch)[0] < 0
    with (folder / "pairs.jsonl").open("w") as stream:
        for row, length in enumerate(batch.attention_mask.sum(1).tolist()):
            answer, foil = (int(batch.fields[name][row]) for name in ("answer", "foil"))
            both = (foil, answer) if swap[row] else (answer, foil)
            clean, other = (ids[row, :length].tolist() for ids in (batch.input_ids, batch.fields["counterfactual_ids"]))
            record = {"clean": clean, "counterfactual": other, "answer": both[0], "foil": both[1]}
            stream.write(json.dumps(record) + "\n")
    return folder


def words(place, *more, output="out"):
    """A command line for the tiny model."""
    return [
        "circuit", "--model.pretrained", str(place / "model"), "--data.source", str(place / "pairs.jsonl"),
        "--data.num_samples", "12", "--data.num_test", "12",
        "--model.draws", "2", "--fractions", "[0.1, 0.5, 1.0]", "--resamples", "3", "--permutations", "9",
        "--output", str(place / output), *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def made(place):
    execute(words(place, "--save_fraction", "0.1", "--tensorboard", "true"))
    return place / "out"


def test_the_folder_holds_what_was_measured(made, capsys):
    results = open_circuit(made)
    assert set(results.arms) == {"lrp", "gradient", "random"}
    assert results.components.counts == {"neuron": 48, "head": 8}
    assert [point.kept for point in results.arms["lrp"].curve] == [5, 28, 56]
    assert results.full.accuracy == 1.0 and results.ablation == {"kind": "zero"}
    rows = list(csv.DictReader((made / "curve.csv").open()))
    assert len(rows) == 3 * (3 + 3 + 2) and {row["curve"] for row in rows} >= {"sufficiency", "necessity"}
    value = json.loads((made / "results.json").read_text())["arms"]["gradient"]["curve"][1]["logit_difference"]
    assert float(rows[10]["logit_difference"]) == pytest.approx(value)
    assert (made / "curves.svg").read_text().count("<svg") == 1
    assert json.loads((made / "importances" / "lrp" / "importances.json").read_text())["cfg"]["n_heads"] == 4
    tests, (sets,) = results.pairs.test, results.pairs.discovery
    assert len(tests["sample_ids"]) == len(sets["sample_ids"]) == 12
    assert not set(tests["sample_ids"]) & set(sets["sample_ids"])


def test_steps_of_tensorboard_are_numbers_of_components(made):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = (made / "tensorboard").iterdir()
    events = EventAccumulator(str(file)).Reload()
    arm = open_circuit(made).arms["lrp"]
    for kind, points, steps in (("sufficiency", arm.curve, [5, 28, 56]), ("necessity", arm.necessity, [5, 28, 56])):
        shown = events.Scalars(f"{kind}/accuracy/lrp")
        assert [event.step for event in shown] == steps[: len(points)]
        assert [event.value for event in shown] == pytest.approx([point.accuracy for point in points])


def test_scores_and_plans_are_read_by_others(made):
    folder = ScoreFolder.open(made / "scores" / "lrp")
    assert folder.manifest.granularity == "neuron+head" and folder.manifest.signed
    assert folder.manifest.num_samples == 12 and len(folder.samples()) == 12
    remove, keep = (PrunePlan.load(made / "plans" / f"lrp-{what}.json") for what in ("remove", "keep"))
    assert (remove.num_neurons, keep.num_neurons) == (5, 51)
    assert {n.layer for n in remove.neurons} <= set(folder.layers)
    result = overlap([str(made / "plans" / f"{arm}-remove.json") for arm in ("lrp", "gradient")])
    assert result.num_candidates == 56
    named = [json.loads(line) for line in (made / "scores" / "lrp" / "samples.jsonl").read_text().splitlines()]
    assert set(remove.behaviour_samples) >= {sample["id"] for sample in named}


def test_ranks_that_share_the_model_out_measure_the_same(made, place, ranks):
    """On two ranks and on four, scores and curves are those of one process; the first rank alone writes."""
    for world in (2, 4):
        sharded = [*words(place, "--save_fraction", "0.1", output=str(world)), "--model.device_map", "sharded"]
        started = ranks.start(sharded, world)
        assert [rank.wait() for rank in started] == [0] * world, "\n".join(rank.text() for rank in started)
        one, many = open_circuit(made), open_circuit(place / str(world))
        for name, arm in one.arms.items():
            for kind in ("curve", "necessity"):
                for point, other in zip(getattr(arm, kind), getattr(many.arms[name], kind), strict=True):
                    assert other.kept == point.kept
                    assert other.logit_difference == pytest.approx(point.logit_difference, rel=1e-6, abs=1e-6)
            want, got = (ScoreFolder.open(folder / "scores" / name) for folder in (made, place / str(world)))
            for layer in want.layers if name != "random" else ():
                torch.testing.assert_close(got.load(layer), want.load(layer), rtol=1e-6, atol=1e-7)
            assert got.manifest.model == want.manifest.model


def test_a_report_has_a_section_on_it(made):
    report = make_report([made])
    assert "Circuits: out" in report.markdown and "Faithfulness by size of the circuit" in report.html
    assert "1 circuit" in report.html


def test_a_changed_file_and_a_taken_place_are_refused(made, place):
    with pytest.raises(InputError, match="already exists"):
        execute(words(place))
    copy = place / "copy"
    shutil.copytree(made, copy)
    (copy / "curve.csv").write_text("changed")
    with pytest.raises(InputError, match=r"curve\.csv: is missing or was changed"):
        open_circuit(copy)
    (copy / "scores" / "lrp" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds 'scores/lrp/notes\.txt' beside a circuit"):
        execute(words(place, "--overwrite", output="copy"))
    with pytest.raises(InputError, match="is not an evaluation"):
        EVALUATION.check_earlier(made)


def test_ablation_by_the_paired_sentence(place):
    execute(
        words(
            place,
            "--ablation",
            "counterfactual",
            "--model.methods",
            "[gradient]",
            "--model.granularity",
            "head",
            output="patched",
        )
    )
    results = open_circuit(place / "patched")
    assert results.ablation == {"kind": "counterfactual"} and not results.overlaps
    assert results.components.granularity == ["head"]
    assert not (place / "patched" / "plans").exists()


def test_without_a_gap_no_share_is_told(place, capsys):
    """Answers and foils at random: the model is no better at them than with everything ablated."""
    records = [json.loads(line) for line in (place / "pairs.jsonl").read_text().splitlines()]
    for i, record in enumerate(records):
        if i % 2:
            record["answer"], record["foil"] = record["foil"], record["answer"]
    (place / "noise.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    execute(words(place, "--data.source", str(place / "noise.jsonl"), "--model.methods", "[wanda]", output="noise"))
    printed = capsys.readouterr().out
    assert "faithfulness, CPR and CMD are not given" in printed and "higher is better" not in printed
    assert open_circuit(place / "noise").arms["wanda"].cpr is None
    assert "reaches 0.9" not in make_report([place / "noise"]).markdown


WRONG = {
    "fractions": (["--fractions", "[0.5, 0.1]"], "fractions=[0.5, 0.1]: give at least two, ascending"),
    "few pairs": (["--data.num_test", "5"], "data.num_test=5: no interval can be given for fewer than 6"),
    "many pairs": (["--data.num_test", "500"], "data.num_test=500"),
    "ablation": (["--ablation", "zeros"], "ablation='zeros' is unknown; did you mean zero?"),
    "weights": (
        ["--ablation", "mean", "--model.granularity", "[weight]"],
        "ablation=mean: single weights are ablated by zero only",
    ),
    "method": (["--model.methods", "[lpr]"], "model.method='lpr' is unknown; did you mean lrp?"),
    "fraction": (["--save_fraction", "1.5"], "save_fraction=1.5: give a share between 0 and 1"),
    "draws": (["--model.draws", "0"], "model.draws=0; draw 1 random circuit or more"),
    "key": (["--model.method", "lrp"], "did you mean model.methods?"),
    "target": (["--model.target", "completion"], "model.target: completion needs samples with completion_mask"),
    "labels": (["--model.methods", "[lrp, expertise]"], "model.methods: expertise needs samples with label, and the"),
    "kinds": (["--model.granularity", "[head, channel]"], "are read by the same columns"),
    "kind": (["--data.counterfactual", "abc"], "data.counterfactual='abc' is for tasks that make their sentences"),
    "fields": (
        ["--data.source", "ioi", "--data.answer_field", "right"],
        "data.answer_field='right' is for pairs of your own, and data.source='ioi' makes its sentences",
    ),
    "none": (
        ["--data.counterfactual_field", "null", "--ablation", "counterfactual"],
        "has no counterfactuals, which the ablation or a method needs",
    ),
}


@pytest.mark.parametrize(("options", "message"), WRONG.values(), ids=WRONG)
def test_bad_settings_end_with_one_line_and_nothing_written(place, capsys, options, message):
    before = sorted(place.iterdir())
    try:
        code = main(words(place, *options, output="bad"))
    except SystemExit as stop:  # from the parser
        code = stop.code
    assert code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error, error
    assert sorted(place.iterdir()) == before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"save_fraction": 0.001}, r"save_fraction=0\.001 of 56 components is less than 1"),
        ({"methods": ["gradient", "lrp"]}, "no LRP rules"),
        ({"methods": ["wanda"], "logits": 1.5}, "does something to its logits"),
    ],
)
def test_what_a_model_cannot_do_is_refused_before_anything_is_measured(place, monkeypatch, more, message):
    monkeypatch.setattr("sparc3_pl.circuit.command.Bench.of", lambda *args: pytest.fail("it was measured"))
    monkeypatch.setattr("sparc3_pl.attribution.rules.SUPPORTED", ())
    if factor := more.pop("logits", None):
        monkeypatch.setattr("sparc3_pl.model.logits.OutputHead.logits", lambda self, x: factor * self.linear(x))
    data = CircuitData(source=str(place / "pairs.jsonl"), num_samples=8, num_test=8)
    model = CircuitModel(str(place / "model"), methods=more.pop("methods", ["wanda"]))
    with pytest.raises(InputError, match=message):
        circuit(model, data, **more, output=str(place / "never"))
    assert not (place / "never").exists()


def test_a_head_that_is_the_embedding_too_is_told():
    model = tiny("qwen2").requires_grad_(False)
    batches = pair_batches([5] * 8, 8)
    for layers, told in ((["lm_head"], 1), (["*.up_proj"], 0)):
        candidates = Candidates.of(model, {"weight": COMPONENTS.make("weight")}, layers)
        bench = Bench.of(model, candidates, ABLATIONS.make("zero"), [batches], batches, (0.5, 1.0))
        assert sum("are one matrix" in text for text in _warnings(bench)) == told


def test_a_function_for_a_notebook(place):
    data = CircuitData(source=str(place / "pairs.jsonl"), num_samples=8, num_test=8)
    model = CircuitModel(str(place / "model"), methods=["wanda"], granularity=["mlp"], targets=["*.0.mlp.down_proj"])
    results = circuit(model, data, fractions=[0.5, 1.0], resamples=0, output=str(place / "mlp"))
    assert results.components.counts == {"mlp": 1}
    assert any("of 1 components are less than 1" in text for text in results.warnings)
    assert torch.is_grad_enabled()


CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "circuits").glob("*.yaml"))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_method_of_a_shipped_config_can_be_an_arm(config):
    model = CircuitModel(**yaml.safe_load(config.read_text())["model"])
    made = arms_of(
        model.methods, model.granularity, model.target, model.targets, model.signed, model.draws, model.seed,
        model.nonfinite,
    )  # fmt: skip
    assert len(made) == len(model.methods) > 1
