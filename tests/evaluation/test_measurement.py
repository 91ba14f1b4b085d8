"""A measurement of the user's own, by class path, from the evaluation to the comparison; and what is refused."""

import csv
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from own_measurements import LogitDifference
from plans import plan_for
from tiny_models import tiny
from word_tokenizer import word_tokenizer

from sparc3_pl.cli import main
from sparc3_pl.data.encoding import Encoder
from sparc3_pl.data.evaluation_data import EvaluationData, UnitBatch
from sparc3_pl.errors import InputError
from sparc3_pl.evaluation.compare import compare, compare_evaluations
from sparc3_pl.evaluation.evaluation_run import EvaluatedModel, EvaluationRun
from sparc3_pl.evaluation.measurement import Measured, Measurement, checked_rows, chosen_measurements
from sparc3_pl.evaluation.measurement_run import UnitRun
from sparc3_pl.evaluation.module import EvaluationModule
from sparc3_pl.evaluation.results import Evaluation
from sparc3_pl.evaluation.show import print_results
from sparc3_pl.model.identity import ModelRecord
from sparc3_pl.model.loading import load_model
from sparc3_pl.model.source import ModelSource
from sparc3_pl.pruning.edit import pruned
from sparc3_pl.runtime.run_config import RunConfig
from sparc3_pl.runtime.trainer import Trainer

PROMPTS = [f"w{i} w{i + 1} w{i + 2}" for i in range(4, 25, 2)]
OWN = {"class_path": "own_measurements.LogitDifference", "init_args": {"prompts": PROMPTS, "answer": 7}}


@pytest.fixture
def folder(tmp_path):
    """A model folder."""
    tiny("llama").save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path


def differences(model) -> np.ndarray:
    """By hand, one prompt at a time."""
    tokenizer = word_tokenizer()
    ids = [tokenizer(prompt, return_tensors="pt").input_ids for prompt in PROMPTS]
    with torch.no_grad():
        logits = [model(one).logits[0, -1] for one in ids]
    return np.array([float(one[7] - one[5]) for one in logits])


def test_from_the_command_line_to_the_comparison(folder, capsys):
    model = load_model(ModelSource(str(folder / "model")))
    plan = plan_for(model)
    plan.save(folder / "plan.json")
    nothing_else = ["--data.text_source", "null", "--data.prompts_source", "null"]
    quiet = ["--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.logger", "false"]
    words = ["eval", "--model.pretrained", str(folder / "model"), *nothing_else, *quiet]
    words += ["--trainer.enable_progress_bar", "false", "--model.measurements", json.dumps([OWN])]
    assert main([*words, "--output", str(folder / "a")]) == 0
    assert main([*words, "--output", str(folder / "b"), "--plan", str(folder / "plan.json")]) == 0
    with pruned(model, plan):
        after = differences(model)
    before, sides = differences(model), [Evaluation.open(folder / name) for name in "ab"]
    for side, want in zip(sides, (before, after), strict=True):
        figures = {"difference": want.mean(), "correct": (want > 0).mean(), "least": want.min()}
        assert side.results["measurements"] == {"logit_difference": pytest.approx(figures, abs=1e-5)}
        rows = [(row["measurement"], row["unit"]) for row in side.measurements]
        assert rows == [("logit_difference", f"pair {i:02}") for i in range(11)]
        assert [row["difference"] for row in side.measurements] == pytest.approx(want, abs=1e-5)
    about = sides[0].results["measurement_settings"]["logit_difference"]
    assert about == {
        "class": "own_measurements.LogitDifference", "settings": {"prompts": PROMPTS, "answer": 7, "foil": 5},
        "unit": "pairs", "better": "higher", "paired": ["difference", "correct"], "num_units": 11, "num_failed": 0,
    }  # fmt: skip
    assert [sides[0].results[key] for key in ("perplexity", "toxicity")] == [None, None]
    assert f"{before.mean():.4f}" in capsys.readouterr().out
    comparison = compare(str(folder / "a"), str(folder / "b"), str(folder / "c.json"), num_resamples=200)
    change = comparison.measurements["logit_difference"]["difference"]
    assert (change.before, change.after) == pytest.approx((before.mean(), after.mean()), abs=1e-5)
    assert (change.improved, change.worsened) == ((after > before).sum(), (after < before).sum())  # more is better
    assert change.low <= change.change <= change.high
    assert "logit_difference: correct" in capsys.readouterr().out
    saved = json.loads((folder / "c.json").read_text())
    assert saved["measurements"]["logit_difference"]["difference"]["p_value"] == change.p_value


def test_figures_reach_a_csv_logger(folder):
    (folder / "text.txt").write_text(" ".join(f"w{3 + (7 * i) % 47}" for i in range(90)))
    module = EvaluationModule(str(folder / "model"), max_length=32, measurements=[OWN])
    data = EvaluationData(str(folder / "text.txt"), prompts_source=None)
    logger = CSVLogger(folder, "runs", "one")
    options = {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "default_root_dir": folder}
    trainer = Trainer(logger=logger, callbacks=[RunConfig("model: {stride: 8}\n")], **options)
    trainer.eval(module, data)
    assert module.written_to == folder / "runs" / "one" / "evaluation"
    with (folder / "runs" / "one" / "metrics.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    logged = {name: float(value) for row in rows for name, value in row.items() if value}
    least = module.evaluation.results["measurements"]["logit_difference"]["least"]
    assert logged["eval/logit_difference/least"] == pytest.approx(least)
    assert logged["eval/perplexity/value"] == pytest.approx(module.evaluation.results["perplexity"]["value"])
    assert logged["eval/running_perplexity"] == pytest.approx(module.evaluation.results["perplexity"]["value"])
    assert "stride: 8" in (folder / "runs" / "one" / "hparams.yaml").read_text()


# --- without a Trainer ------------------------------------------------------------------------------------------------


class Fixed(Measurement):
    """Gives the values it was told."""

    name = "fixed"

    def __init__(self, values=()):
        self.values = values

    def units(self, encoder):
        return list(range(len(self.values)))

    def measure(self, model, encoder, units):
        return [{"unit": unit, "value": self.values[unit]} for unit in units]


@pytest.fixture(scope="module")
def model():
    return tiny("llama").eval()


def evaluated(model, folder, values, better="lower") -> Evaluation:
    """An evaluation with one measurement, made by the run alone."""
    measurement = values if isinstance(values, Fixed) else Fixed(values)
    measurement.better = better
    loaded = ModelRecord(fingerprint="f", pretrained="m", dtype="float32")
    choices = chosen_measurements([measurement])
    run = EvaluationRun(EvaluatedModel(loaded, str(folder)), [UnitRun(model, Encoder(word_tokenizer()), choices)])
    run.add(UnitBatch(measurement.name, range(len(measurement.values))))
    run.finish({"text_source": None}, folder)
    print_results(run.evaluation.figures, run.written_to)
    return Evaluation.open(folder)


def test_what_is_no_number_is_a_failure_that_is_counted(model, tmp_path, capsys):
    values = [math.nan, 1.0, 2.0, 3.0, math.inf, 5.0, 6.0, 7.0, 8.0]
    before = evaluated(model, tmp_path / "a", values)
    assert before.results["measurements"]["fixed"] == {"value": pytest.approx(32 / 7)}
    assert before.results["measurement_settings"]["fixed"]["num_failed"] == 2
    assert [row["failed"] for row in before.measurements if "failed" in row] == ["value is nan", "value is inf"]
    assert "fixed: failed units" in capsys.readouterr().out
    after = evaluated(model, tmp_path / "b", [0.0, 0.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, math.nan])
    found = compare_evaluations(before, after, num_resamples=200)
    change = found.measurements["fixed"]["value"]
    assert (change.num_pairs, change.before, change.after) == (6, 4.0, pytest.approx(23 / 6))
    assert any("fixed: 3 units were not measured on both sides" in note for note in found.notes)


class Answers(Fixed):
    """Right or wrong, compared by McNemar's exact test."""

    name = "answers"
    better = "higher"

    def compare(self, before, after, *, seed, num_resamples):
        change = super().compare(before, after, seed=seed, num_resamples=num_resamples)["value"]
        count, fewer = change.improved + change.worsened, min(change.improved, change.worsened)
        p_value = 2 * sum(math.comb(count, k) for k in range(fewer + 1)) / 2**count
        return {"accuracy": replace(change, p_value=min(1.0, p_value))}


def test_a_measurement_may_say_how_it_is_compared(model, tmp_path, capsys):
    """15 wrong answers become right and 4 right ones wrong: p = 2 (C(19, 0) + ... + C(19, 4)) / 2^19 = 10072 / 2^19."""
    sides = [Answers([i < 20 for i in range(40)]), Answers([4 <= i < 35 for i in range(40)])]
    before, after = (evaluated(model, tmp_path / name, side, "higher") for name, side in zip("ab", sides, strict=True))
    about = before.results["measurement_settings"]["answers"]
    assert about["compared_by"] == {"class_path": f"{__name__}.Answers", "init_args": {}}
    comparison = compare(str(before.path), str(after.path))
    (change,) = comparison.measurements["answers"].values()
    assert (change.before, change.after, change.improved, change.worsened) == (0.5, 31 / 40, 15, 4)
    assert change.p_value == 10072 / 2**19
    assert "answers: accuracy" in capsys.readouterr().out


def test_a_comparison_whose_class_may_not_be_imported(model, tmp_path, monkeypatch):
    before = evaluated(model, tmp_path / "a", Answers([True, False]), "higher")
    about = before.results["measurement_settings"]["answers"]
    about["compared_by"]["class_path"] = "elsewhere.Answers"
    with pytest.raises(InputError, match="SPARC3_PLUGINS=elsewhere"):
        compare_evaluations(before, before)


def test_nothing_but_failures_is_no_figure(model, tmp_path):
    before = evaluated(model, tmp_path / "a", [math.nan, math.nan])
    assert before.results["measurements"] == {"fixed": {}}
    with pytest.raises(InputError, match="no units of fixed were measured on both sides"):
        compare_evaluations(before, before)


def test_what_cannot_be_compared(model, tmp_path):
    before = evaluated(model, tmp_path / "a", [1.0, 2.0])
    with pytest.raises(InputError, match="1 units of fixed are in one of them only"):
        compare_evaluations(before, evaluated(model, tmp_path / "b", [1.0, 2.0, 3.0]))
    with pytest.raises(InputError, match=r"measurement_settings\.fixed\.better is 'lower' .* 'higher'"):
        compare_evaluations(before, evaluated(model, tmp_path / "c", [1.0, 2.0], better="higher"))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"unit": 1}], "returned 1 for 2 units"),
        ({}, "returned dict for 2 units"),
        ([{"unit": 1}, {"value": 2}], "no unit id"),
        ([{"unit": 1}, {"unit": 2, "value": torch.tensor(1)}], "unit 2 is no JSON"),
        ([{"unit": 1}, {"unit": 2, "measurement": "x"}], "rename it"),
    ],
)
def test_rows_that_are_refused(rows, message):
    with pytest.raises(InputError, match=message):
        checked_rows(Fixed(), rows, 2)


def test_two_rows_of_one_unit_are_refused():
    (choice,) = chosen_measurements([Fixed()])
    with pytest.raises(InputError, match="two rows are of unit 3"):
        Measured.of(choice, [{"unit": 3}, {"unit": 2}, {"unit": 3}])


def test_a_paired_value_that_some_row_lacks_is_refused():
    (choice,) = chosen_measurements([LogitDifference()])
    with pytest.raises(InputError, match="'correct' is no number in every row"):
        Measured.of(choice, [{"unit": 1, "difference": 2.0}]).settings()


class Nameless(Fixed):
    name = ""


class Token(Fixed):
    name = "token"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["own_measurements.Nothing"], "there is no such class"),
        (["nothing"], r"model\.measurements='nothing' is unknown; known are pairs, task, text, or give a class path"),
        ([{"class_path": "own_measurements.LogitDifference", "init_args": {"foils": 1}}], "arguments do not fit"),
        ([OWN, OWN], "the name 'logit_difference' .* is taken"),
        ([Nameless()], "has no name"),
        ([Token()], "'token' would be left out of results as a secret"),
    ],
)
def test_measurements_that_are_refused(given, message):
    with pytest.raises(InputError, match=message):
        EvaluationModule(measurements=given)
