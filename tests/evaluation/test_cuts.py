"""Texts are cut before a word that the judge objects to and the model predicts; by the demo's model and judge."""

import json
from pathlib import Path

import pytest
import torch

from sparc3_pl import demo
from sparc3_pl.data.encoding import load_encoder
from sparc3_pl.data.sources import text_id
from sparc3_pl.errors import InputError
from sparc3_pl.evaluation.cuts import CutRule, CutText, cut_samples
from sparc3_pl.evaluation.judges import DetoxifyJudge
from sparc3_pl.model.loading import load_model
from sparc3_pl.model.source import ModelSource

RULE = {"criterion": "text"}  # the demo's judge makes nothing of single words


@pytest.fixture(scope="module")
def model():
    return load_model(ModelSource("demo", dtype="float32"))


@pytest.fixture(scope="module")
def texts() -> list[CutText]:
    """Some of the demo's openings with what follows them."""
    lines = Path(demo.PROMPTS).read_text(encoding="utf-8").splitlines()[:30]
    records = [json.loads(line) for line in lines]
    return [CutText(record["prompt"]["text"], record["continuation"]["text"]) for record in records]


def cuts(texts: list[CutText], model: torch.nn.Module, **rule) -> list[dict]:
    encoder = load_encoder(ModelSource("demo"))
    return cut_samples(texts, DetoxifyJudge("demo"), CutRule(**RULE | rule), encoder, lambda: model)


@pytest.fixture(scope="module")
def rows(texts, model) -> list[dict]:
    return cuts(texts, model)


def test_the_model_predicts_the_word_behind_each_cut(rows, model):
    tokenizer = load_encoder(ModelSource("demo")).tokenizer
    for row in rows:
        with torch.inference_mode():
            likeliest = model(**tokenizer(row["text"], return_tensors="pt")).logits[0, -1].argmax()
        begun = tokenizer.decode([likeliest]).strip()
        assert begun and row["word"].startswith(begun)


def test_the_judge_objects_to_the_word_behind_a_bad_cut(rows):
    for row in rows:
        before = row["text"].removeprefix(row["prompt"])
        scores = DetoxifyJudge("demo").score([before, f"{before} {row['word']}"])["toxicity"].tolist()
        assert scores[0] < 0.5 <= scores[1] if row["behaviour"] else scores[1] < 0.1


def test_cuts_are_of_the_texts_and_of_like_length(rows, texts):
    wholes = [text.prompt + text.body for text in texts]
    assert all(any(f"{row['text']} {row['word']}" in whole for whole in wholes) for row in rows)
    bad, general = ([row for row in rows if row["behaviour"] is side] for side in (True, False))
    assert len(bad) >= 5 and len({row["record"] for row in bad}) == len(bad)
    assert len(general) == 2 * len(bad) and len({row["text"] for row in rows}) == len(rows)
    lengths = [sum(len(row["text"]) for row in side) / len(side) for side in (bad, general)]
    assert lengths[0] == pytest.approx(lengths[1], rel=0.1)


def test_rows_name_the_prompts_and_texts_that_were_cut(rows, texts):
    for row in rows:
        (text,) = [text for text in texts if text_id(text.prompt + text.body) == row["record"]]
        parts = {text.prompt, text.body, text.prompt + text.body}
        assert row["prompt"] == text.prompt
        assert {text_id(part.strip()) for part in parts} <= set(row["text_ids"])


def test_same_input_same_output(rows, texts, model):
    assert cuts([*reversed(texts), texts[0]], model, batch_size=3) == rows


@pytest.mark.parametrize(("rule", "message"), [
    ({"label": "insult"}, "cut.label='insult'"),
    ({"threshold": 1.1}, "the model predicts none"),
    ({"criterion": "line"}, "cut.criterion='line'"),
    ({"harmless": 0.6}, "0 <= harmless <= threshold"),
    ({"batch_size": 0}, "cut.batch_size=0"),
])  # fmt: skip
def test_wrong_input_is_named(texts, model, rule, message):
    with pytest.raises(InputError, match=message):
        cuts(texts[:3], model, **rule)
