"""Texts are cut before a word that the judge objects to and the model predicts; by the demo's model and judge."""

import json
from pathlib import Path

import cut_before_behaviour
import pytest
import torch

from sparc3_pl import demo
from sparc3_pl.data.sources import text_id
from sparc3_pl.evaluation.judges import DetoxifyJudge
from sparc3_pl.model.loading import load_model, load_tokenizer
from sparc3_pl.model.source import ModelSource

FIELDS = ["--prompt_field", "prompt.text", "--text_field", "continuation.text", "--variant", "demo"]
FIELDS += ["--criterion", "text"]  # the demo's judge makes nothing of single words


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> Path:
    """Some of the demo's openings with what follows them."""
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    path.write_text("".join(Path(demo.PROMPTS).read_text(encoding="utf-8").splitlines(keepends=True)[:30]))
    return path


def cuts(source: Path, output: Path, *options: str) -> list[dict]:
    assert cut_before_behaviour.main(["--source", str(source), *FIELDS, "--output", str(output), *options]) == 0
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def rows(records, tmp_path_factory) -> list[dict]:
    return cuts(records, tmp_path_factory.mktemp("cuts") / "cuts.jsonl")


def test_the_model_predicts_the_word_behind_each_cut(rows):
    source = ModelSource("demo", dtype="float32")
    model, tokenizer = load_model(source), load_tokenizer(source)
    for row in rows:
        with torch.inference_mode():
            likeliest = model(**tokenizer(row["text"], return_tensors="pt")).logits[0, -1].argmax()
        begun = tokenizer.decode([likeliest]).strip()
        assert begun and row["word"].startswith(begun)


def test_the_judge_objects_to_the_word_behind_a_bad_cut(rows, records):
    texts = [json.loads(line) for line in records.read_text(encoding="utf-8").splitlines()]
    bodies = {record["prompt"]["text"]: record["continuation"]["text"] for record in texts}
    for row in rows:
        prompt = next(prompt for prompt in bodies if row["text"].startswith(prompt))
        before = row["text"].removeprefix(prompt)
        scores = DetoxifyJudge("demo").score([before, f"{before} {row['word']}"])["toxicity"].tolist()
        assert scores[0] < 0.5 <= scores[1] if row["behaviour"] else scores[1] < 0.1


def test_cuts_are_of_the_texts_and_of_like_length(rows, records):
    texts = [json.loads(line) for line in records.read_text(encoding="utf-8").splitlines()]
    texts = [record["prompt"]["text"] + record["continuation"]["text"] for record in texts]
    assert all(any(f"{row['text']} {row['word']}" in text for text in texts) for row in rows)
    bad, general = ([row for row in rows if row["behaviour"] is side] for side in (True, False))
    assert len(bad) >= 5 and len({row["record"] for row in bad}) == len(bad)
    assert len(general) == 2 * len(bad) and len({row["text"] for row in rows}) == len(rows)
    lengths = [sum(len(row["text"]) for row in side) / len(side) for side in (bad, general)]
    assert lengths[0] == pytest.approx(lengths[1], rel=0.1)


def test_rows_name_the_prompts_and_texts_that_were_cut(rows, records):
    texts = [json.loads(line) for line in records.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        (text,) = [t for t in texts if text_id(t["prompt"]["text"] + t["continuation"]["text"]) == row["record"]]
        prompt, body = text["prompt"]["text"], text["continuation"]["text"]
        assert {text_id(part.strip()) for part in (prompt, body, prompt + body)} <= set(row["text_ids"])


def test_same_input_same_output_and_halves(rows, records, tmp_path):
    again = cuts(records, tmp_path / "again.jsonl", "--batch_size", "3")
    assert again == rows
    halves = [cuts(records, tmp_path / half, "--partition", half) for half in ("attribution", "evaluation")]
    assert not {row["record"] for row in halves[0]} & {row["record"] for row in halves[1]}
    bad = [{row["text"] for row in side if row["behaviour"]} for side in (rows, *halves)]
    assert bad[1] and bad[2] and bad[1] | bad[2] == bad[0]


def test_wrong_input_is_named(records, tmp_path, capsys):
    def message(*options: str) -> str:
        arguments = ["--source", str(records), *FIELDS, "--output", str(tmp_path / "cuts.jsonl"), *options]
        assert cut_before_behaviour.main(arguments) == 2
        return capsys.readouterr().err

    assert "no field 'body'" in message("--text_field", "body")
    assert "label='insult'" in message("--label", "insult")
    assert "the model predicts none" in message("--threshold", "1.1")
    (tmp_path / "cuts.jsonl").write_text("kept")
    assert "--overwrite" in message()
    assert (tmp_path / "cuts.jsonl").read_text() == "kept"
