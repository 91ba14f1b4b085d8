"""Perplexity of further texts: against the library's own loss, and against that of the first text."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from sparc3_pl.cli import main
from sparc3_pl.data.encoding import load_encoder
from sparc3_pl.data.evaluation_data import EvaluationData
from sparc3_pl.errors import InputError
from sparc3_pl.evaluation.compare import compare_evaluations
from sparc3_pl.evaluation.further_text import FurtherText
from sparc3_pl.evaluation.results import Evaluation
from sparc3_pl.model.loading import load_model
from sparc3_pl.model.source import ModelSource
from sparc3_pl.statistics.paired import ratio_change


@pytest.fixture(scope="module")
def demo():
    return load_model(ModelSource()), load_encoder(ModelSource())


@pytest.mark.parametrize(("max_length", "stride"), [(32, 32), (32, 12)])
def test_every_token_is_scored_once_with_what_its_window_shows(demo, max_length, stride):
    model, encoder = demo
    text = FurtherText("a", "demo:text", max_length, stride, max_bytes=600, batch_size=3)
    units = text.units(encoder)
    rows = [row for start in range(0, len(units), 3) for row in text.measure(model, encoder, units[start : start + 3])]
    ids = encoder(text.text.read())
    scored, total = set(), 0.0
    for start in range(0, len(ids), stride):
        window = ids[start : start + max_length]
        with torch.no_grad():
            log_p = model(input_ids=torch.tensor([window])).logits[0].double().log_softmax(-1)
        for place in range(1, len(window)):
            if start + place not in scored:
                scored.add(start + place)
                total -= float(log_p[place - 1, window[place]])
    assert sum(row["num_tokens"] for row in rows) == len(scored)
    assert math.fsum(row["nll"] for row in rows) == pytest.approx(total, rel=1e-6)
    assert text.figures(rows) == {"perplexity": pytest.approx(math.exp(total / len(scored)), rel=1e-6)}


def test_the_change_is_that_of_the_ratio():
    text = FurtherText("a", "demo:text", 32, 8)
    generator = np.random.default_rng(0)
    nll, tokens = generator.uniform(20, 30, 40), np.full(40, 8)
    sides = [
        [{"unit": i, "nll": x, "num_tokens": 8} for i, x in enumerate(values)]
        for values in (nll, nll + generator.normal(0.1, 0.2, 40))
    ]
    (change,) = text.compare(*sides, seed=0, num_resamples=500).values()
    after = np.array([row["nll"] for row in sides[1]])
    ratio = ratio_change(nll, after, tokens.astype(float), overlap=4, seed=0, num_resamples=500)
    assert (change.before, change.after) == (ratio.before, ratio.after)
    assert change.relative_change == pytest.approx(ratio.ratio - 1)
    ends = ((ratio.low - 1) * ratio.before, (ratio.high - 1) * ratio.before)
    assert (change.low, change.high) == pytest.approx(ends)
    assert change.low < change.change < change.high
    sides[1][3]["num_tokens"] = 7
    with pytest.raises(InputError, match="text a: the windows before and after differ"):
        text.compare(*sides, seed=0, num_resamples=500)


def test_an_evaluation_of_two_texts(tmp_path):
    """The first text once more as a further one: the same figure, on the same windows."""
    (tmp_path / "other.jsonl").write_text(
        "".join(json.dumps({"t": f"The old man sat {i} times."}) + "\n" for i in range(40))
    )
    texts = {
        "same": {"source": "demo:text", "max_bytes": 2000},
        "c4": {"source": str(tmp_path / "other.jsonl"), "field": "t"},
    }
    quiet = ["--trainer.logger", "false", "--trainer.accelerator", "cpu", "--trainer.devices", "1"]
    data = ["--data.prompts_source", "null", "--data.text_max_bytes", "2000", "--data.further_texts", json.dumps(texts)]
    words = ["eval", *data, *quiet, "--model.max_length", "64", "--model.stride", "32"]
    assert main([*words, "--output", str(tmp_path / "e")]) == 0
    evaluation = Evaluation.open(tmp_path / "e")
    measured = {name: figures["perplexity"] for name, figures in evaluation.results["measurements"].items()}
    assert measured["text same"] == pytest.approx(evaluation.results["perplexity"]["value"], rel=1e-9)
    assert measured["text c4"] != pytest.approx(measured["text same"], rel=0.01)
    assert evaluation.results["data"]["further_texts"].keys() == texts.keys()
    comparison = compare_evaluations(evaluation, evaluation, num_resamples=100)
    web = comparison.measurements["text c4"]["perplexity"]
    dearer = replace(web, after=1.08 * web.before, relative_change=0.08)
    measurements = comparison.measurements | {"text c4": {"perplexity": dearer}}
    ratio = replace(comparison.perplexity, ratio=1.05)
    compared = replace(comparison, perplexity=ratio, measurements=measurements)
    assert compared.rises == {"": pytest.approx(0.05), "same": 0.0, "c4": pytest.approx(0.08)}
    assert compared.rise == compared.rises["c4"]  # the dearest text
    lost = replace(web, after=float("nan"), change=float("nan"), relative_change=None)  # JSON holds no infinity
    assert replace(compared, measurements={"text c4": {"perplexity": lost}}).rise == float("inf")


@pytest.mark.parametrize(
    ("texts", "match"),
    [
        ({"a": {"field": "text"}}, "data.further_texts.a has no source"),
        ({"a": {"source": "demo", "fild": "text"}}, "data.further_texts.a: fild is none of its keys"),
        ({"a/b": {"source": "demo"}}, "'a/b' is not a name"),
        ({"a": {"source": "./no/such.jsonl"}}, "no/such.jsonl"),
        ({"a": {"source": "demo", "max_bytes": 0}}, "max_bytes=0: give 1 or more"),
    ],
)
def test_texts_that_are_refused(texts, match):
    with pytest.raises(InputError, match=match):
        EvaluationData(further_texts=texts)
