"""A component, a method, a target, an edit and a measurement of a test file go through all commands."""

import json
import math
from statistics import fmean

import pytest
import torch

from sparc3_pl.cli import main
from sparc3_pl.data.encoding import load_encoder
from sparc3_pl.data.reference import ReferenceData
from sparc3_pl.evaluation.results import Evaluation
from sparc3_pl.model.loading import load_model
from sparc3_pl.model.source import ModelSource
from sparc3_pl.pruning.edit import pruned
from sparc3_pl.pruning.plan import PrunePlan
from sparc3_pl.scores.folder import ScoreFolder

SCORE = """
model:
  method: additions.RootMeanSquare
  granularity: additions.Pair
  target: {class_path: additions.Runner, init_args: {rank: 2}}
data: {seq_len: 24, num_samples: 4, batch_size: 2}
trainer: {accelerator: cpu, devices: 1, logger: false, enable_progress_bar: false}
"""


EVAL = """
model:
  max_length: 64
  measurements: [{class_path: additions.Surprise, init_args: {sentences: 8}}]
data: {prompts_source: null, text_max_bytes: 1500}
trainer: {accelerator: cpu, devices: 1, logger: false, enable_progress_bar: false}
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two score folders and a plan, made by the commands."""
    folder = tmp_path_factory.mktemp("additions")
    (folder / "own.yaml").write_text(SCORE)
    for name, seed in (("general", 0), ("behaviour", 1)):
        words = ["--config", str(folder / "own.yaml"), "--data.seed", str(seed), "--output", str(folder / name)]
        assert main(["score", *words]) == 0
    words = ["--general", str(folder / "general"), "--behaviour", str(folder / "behaviour"), "--num_neurons", "6"]
    edit = json.dumps({"class_path": "additions.Fade", "init_args": {"first": 0.25}})
    assert main(["prune", *words, "--edit", edit, "--output", str(folder / "plan.json")]) == 0
    return folder


def samples_of(seed):
    """Token ids of the samples that ``SCORE`` draws."""
    data = ReferenceData(seq_len=24, num_samples=4, seed=seed)
    data.read(load_encoder(ModelSource()))
    return {sample.id: torch.tensor([sample.input_ids]) for sample in data.samples}


def test_scores_are_those_of_a_loop(folders):
    """Root mean square over samples of the sum of |W * G| over both columns, G by autograd, one sample at a time."""
    scores, model, samples = ScoreFolder.open(folders / "general"), load_model(ModelSource()), samples_of(0)
    manifest = scores.manifest
    assert (manifest.method, manifest.granularity) == ("additions.RootMeanSquare", "additions.Pair")
    assert (manifest.target, manifest.target_args) == ("additions.Runner", {"rank": 2})
    weights = {layer: model.get_submodule(layer).weight.requires_grad_() for layer in scores.layers}
    squares, leads = dict.fromkeys(weights, 0.0), {}
    for name, ids in samples.items():
        top = model(input_ids=ids).logits[0, -1].topk(3).values
        (lead := top[0] - top[2]).backward()
        leads[name] = lead.item()
        for layer, weight in weights.items():
            columns_I = (weight * weight.grad).abs().sum(0).detach().double()
            squares[layer] += columns_I.unflatten(0, (-1, 2)).sum(1).square()
            weight.grad = None
    assert {record["id"]: record["lead"] for record in records(folders / "general")} == pytest.approx(leads, rel=1e-5)
    for layer, sum_of_squares in squares.items():
        wanted = (sum_of_squares / len(samples)).sqrt().float()
        torch.testing.assert_close(torch.cat(list(scores.blocks(layer))), wanted, rtol=1e-4, atol=1e-7)


def records(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_the_edit_is_that_of_the_plan(folders):
    plan, model = PrunePlan.load(folders / "plan.json"), load_model(ModelSource())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pruned(model, plan):
        for layer, entries in plan.entries.items():
            weight = model.get_submodule(layer).weight
            for pair, factor in zip(entries.index.tolist(), entries.factor.tolist(), strict=True):
                columns = slice(2 * pair, 2 * pair + 2)
                torch.testing.assert_close(weight[:, columns], before[f"{layer}.weight"][:, columns] * factor)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def entropy_of(model, text):
    """By another road than the measurement's: probabilities, and their logarithms, one after the other."""
    ids = load_encoder(ModelSource()).tokenizer(text).input_ids
    probabilities = model(input_ids=torch.tensor([ids])).logits[0, -1].double().softmax(0).tolist()
    return -sum(p * math.log(p) for p in probabilities if p)


def test_the_measurement_goes_through_eval_compare_and_report(folders, capsys):
    (folders / "eval.yaml").write_text(EVAL)
    runs = folders / "runs"
    for name, plan in (("before", []), ("after", ["--plan", str(folders / "plan.json")])):
        words = ["--config", str(folders / "eval.yaml"), "--output", str(runs / name), *plan]
        assert main(["eval", *words]) == 0
    before, after = (Evaluation.open(runs / name) for name in ("before", "after"))
    assert after.results["plan"]["edit"] == "additions.Fade"
    model, plan = load_model(ModelSource()), PrunePlan.load(folders / "plan.json")
    texts = [f"The red fox number {i} crosses the" for i in range(8)]
    entropies = [entropy_of(model, text) for text in texts]
    assert before.results["measurements"]["surprise"]["nats"] == pytest.approx(fmean(entropies), rel=1e-6)
    with pruned(model, plan):
        changed = [entropy_of(model, text) for text in texts]
    assert after.results["measurements"]["surprise"]["nats"] == pytest.approx(fmean(changed), rel=1e-6)
    sides = ["--before", str(runs / "before"), "--after", str(runs / "after")]
    assert main(["compare", *sides, "--output", str(runs / "comparison.json")]) == 0
    change = json.loads((runs / "comparison.json").read_text())["measurements"]["surprise"]["nats"]
    assert change["change"] == pytest.approx(fmean(changed) - fmean(entropies), rel=1e-5)
    assert change["num_pairs"] == 8
    assert main(["report", str(runs), str(folders / "plan.json"), "--output", str(folders / "report")]) == 0
    page = (folders / "report" / "report.md").read_text()
    assert "additions.Fade" in page
    assert "surprise" in page
    assert f"{change['change']:+.3f} (" in page
    capsys.readouterr()
