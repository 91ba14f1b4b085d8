"""Records with completions, weights, labels and answers, from the file to the batch."""

import json

import numpy as np
import pytest
import torch
from tiny_tokenizers import tiny_tokenizer

from sparc3_pl.data.encoding import Encoder
from sparc3_pl.data.fields import less_baseline
from sparc3_pl.data.reference import ReferenceData, pad_samples
from sparc3_pl.data.samples import Sample
from sparc3_pl.data.sources import partition, text_id
from sparc3_pl.errors import InputError
from sparc3_pl.statistics.advantages import token_advantages

ROWS = [
    {"prompt": "The red fox", "completion": " crosses the wide field.", "scores": {"toxicity": 0.5}},
    {"prompt": "The red fox", "completion": " paints.", "scores": {"toxicity": 0.25}},
    {"prompt": "The red fox", "completion": " paints.", "scores": {"toxicity": 0.25}},
    {"prompt": "The red fox", "completion": " paints.", "scores": {"toxicity": 1.0}},
    {"prompt": "A quiet child", "completion": " remembers", "scores": {"toxicity": 0.0}},
]
COMPLETIONS = {"text_field": "prompt", "completion_field": "completion", "weight_field": "scores.toxicity"}


def encoder(bos=True) -> Encoder:
    return Encoder(tiny_tokenizer(bos, pad_token="</s>"))


def ready(tmp_path, rows, bos=True, **options) -> ReferenceData:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ReferenceData(str(file), **options)
    data.read(encoder(bos))
    return data


def batch_of(data: ReferenceData):
    return pad_samples(data.samples, encoder().pad_id)


# --- completions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bos", [True, False])
def test_the_completions_own_tokens_follow_the_prompts(tmp_path, bos):
    data = ready(tmp_path, ROWS[:2], bos, **COMPLETIONS)
    batch, tokenizer = batch_of(data), tiny_tokenizer(bos)
    own = {}
    for row, mask, real in zip(batch.input_ids, batch.fields["completion_mask"], batch.attention_mask, strict=True):
        assert mask.dtype == torch.bool
        assert not (mask & ~real.bool()).any()
        assert row[real.bool() & ~mask].tolist() == tokenizer("The red fox").input_ids
        own[tokenizer.decode(row[mask])] = row[mask].tolist()
    texts = [row["completion"] for row in ROWS[:2]]
    assert own == {text: tokenizer(text, add_special_tokens=False).input_ids for text in texts}


@pytest.mark.parametrize("bos", [True, False])
def test_a_completion_may_follow_nothing_but_the_token_that_begins_a_text(tmp_path, bos):
    tokenizer = tiny_tokenizer(bos)
    row = {"prompt": tokenizer.bos_token, "completion": "The red fox paints."}
    data = ready(tmp_path, [row], bos, text_field="prompt", completion_field="completion")
    own = tokenizer(row["completion"], add_special_tokens=False).input_ids
    (sample,) = data.samples
    assert sample.input_ids == [tokenizer.bos_token_id, *own]
    assert sample.by_token["completion_mask"] == [False] + [True] * len(own)
    with pytest.raises(InputError, match=r"gives only 0 samples.*1 records give no token"):
        ready(tmp_path, [row], bos, text_field="prompt", seq_len=None)  # a text needs tokens of its own


def test_token_ids_of_a_completion_are_taken_as_they_are(tmp_path):
    data = ready(
        tmp_path, [{"prompt": "The red fox", "ids": [70, 71, 72, 1]}], text_field="prompt", completion_field="ids"
    )
    (sample,) = data.samples
    assert sample.input_ids == [*encoder()("The red fox"), 70, 71, 72, 1]
    assert sample.by_token["completion_mask"] == [False] * (len(sample.input_ids) - 4) + [True] * 4
    with pytest.raises(InputError, match=r"token id 320 at place 1 .*vocabulary"):
        ready(tmp_path, [{"prompt": "The red fox", "ids": [7, 320]}], text_field="prompt", completion_field="ids")


def test_every_draw_is_a_sample(tmp_path):
    data = ready(tmp_path, ROWS, **COMPLETIONS, weight_baseline="none")
    assert len({sample.id for sample in data.samples}) == len(ROWS)
    assert sorted(sample.numbers["weight"] for sample in data.samples) == [0.0, 0.25, 0.25, 0.5, 1.0]
    assert data.describe()["num_duplicates"] == 0
    again = ready(tmp_path, ROWS[::-1], **COMPLETIONS, weight_baseline="none", seed=5)
    weights = [{sample.id: sample.numbers["weight"] for sample in one.samples} for one in (data, again)]
    assert weights[0] == weights[1]  # an id says the same whatever the order


def test_a_completion_knows_its_prompt_and_the_half_is_the_prompts(tmp_path):
    data = ready(tmp_path, ROWS, **COMPLETIONS)
    prompts = {text_id(row["prompt"]) for row in ROWS}
    assert {name for sample in data.samples for name in sample.text_ids} == prompts
    rows = [
        {"prompt": f"prompt {i}", "completion": f" {k}", "scores": {"toxicity": 0.1}}
        for i in range(20)
        for k in range(2)
    ]
    half = ready(tmp_path, rows, **COMPLETIONS, partition="attribution")
    expected = {text_id(f"prompt {i}") for i in range(20) if partition(text_id(f"prompt {i}"), 0) == "attribution"}
    assert {name for sample in half.samples for name in sample.text_ids} == expected
    assert len(half.samples) == 2 * len(expected)


def test_what_has_no_score_or_no_completion_is_counted_and_told(tmp_path, caplog):
    failed = [
        {"prompt": "A quiet child", "completion": None, "scores": {}, "failed": "no room"},
        {"prompt": "A quiet child", "completion": " paints", "scores": {}},
        {"prompt": "A quiet child", "completion": " paints", "scores": {"toxicity": None}},
        {"prompt": "A quiet child", "completion": "", "scores": {"toxicity": 0.3}},
    ]
    data = ready(tmp_path, ROWS + failed, **COMPLETIONS, weight_baseline="none")
    assert len(data.samples) == len(ROWS)
    entry = data.describe()
    assert (entry["num_read"], entry["num_null"], entry["num_empty"]) == (9, 3, 1)
    assert "3 records without a completion or a value asked for were left out" in caplog.text
    assert "1 records whose completion is empty were left out" in caplog.text
    with pytest.raises(InputError, match=r"gives only 0 samples.*2 records hold a null"):
        ready(tmp_path, [failed[0], failed[2]], **COMPLETIONS)
    with pytest.raises(InputError, match=r"data\.weight_field: no field 'scores\.toxicity'"):
        ready(tmp_path, [failed[1]], **COMPLETIONS)


def test_the_baseline_is_taken_off(tmp_path):
    weights = {}
    for baseline in ("none", "mean", "prompt"):
        data = ready(tmp_path, ROWS, **COMPLETIONS, weight_baseline=baseline)
        weights[baseline] = {sample.id: sample.numbers["weight"] for sample in data.samples}
        assert data.describe()["weight_baseline"] == baseline
    mean = sum(row["scores"]["toxicity"] for row in ROWS) / 5
    assert weights["mean"] == {name: pytest.approx(value - mean) for name, value in weights["none"].items()}
    # Of the fox's four completions each is compared with the other three; the child's only one has none.
    assert sorted(weights["prompt"].values()) == pytest.approx(
        sorted([0.5 - 1.5 / 3, 0.25 - 1.75 / 3, 0.25 - 1.75 / 3, 1.0 - 1.0 / 3])
    )
    assert data.describe()["num_without_baseline"] == 1


def credited_rows(number=40):
    ids = [[70 + n % 7, 71, 72][: 1 + n % 3] for n in range(number)]
    prefixes = [[0.1 * (n % 5) + 0.2 * t for t in range(len(own))] for n, own in enumerate(ids)]
    return [
        {"prompt": f"The red fox {n // 4}", "ids": own, "score": prefix[-1] + 0.01 * n, "so_far": prefix}
        for n, (own, prefix) in enumerate(zip(ids, prefixes, strict=True))
    ]


CREDITED = {"text_field": "prompt", "completion_field": "ids", "weight_field": "score", "prefix_field": "so_far"}


def test_every_token_of_a_completion_has_its_own_weight(tmp_path):
    rows = credited_rows()
    data = ready(tmp_path, rows, **CREDITED, weight_baseline="prefix", gae_lambda=0.5)
    assert (data.describe()["weight_baseline"], data.describe()["gae_lambda"]) == ("prefix", 0.5)
    scores = np.array([row["score"] for row in rows])
    expected = token_advantages(scores, [row["so_far"] for row in rows], [row["prompt"] for row in rows], 0.5)
    batch = batch_of(data)
    weights, masks = batch.fields["token_weight"], batch.fields["completion_mask"]
    assert weights.dtype == torch.float64
    assert not weights[~masks].any()
    own = sorted(row[mask].tolist() for row, mask in zip(weights, masks, strict=True))
    for one, other in zip(own, sorted(one.tolist() for one in expected), strict=True):
        assert one == pytest.approx(other)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"prefix_field": None}, "need each other"),
        ({"weight_baseline": "mean"}, "need each other"),
        ({"completion_field": None}, "give data.completion_field"),
        ({"gae_lambda": 1.5}, r"data\.gae_lambda=1\.5; give a number from 0 to 1"),
        ({"num_samples": 29}, "29 completions are too few"),
        ({"prefix_field": "score"}, "not a list of finite numbers"),
    ],
)
def test_token_weights_that_cannot_be_made(tmp_path, changes, match):
    with pytest.raises(InputError, match=match):
        ready(tmp_path, credited_rows(), **(CREDITED | {"weight_baseline": "prefix"} | changes))


def test_a_prefix_without_a_score_is_refused(tmp_path):
    rows = credited_rows()
    rows[7]["so_far"] = rows[7]["so_far"] + [0.5]
    with pytest.raises(InputError, match=r"of 2 tokens has 3 scores"):
        ready(tmp_path, rows, **CREDITED, weight_baseline="prefix")
    with pytest.raises(InputError, match=r"data\.weight_baseline=prefix; leave it out"):
        ready(tmp_path, rows, gae_lambda=0.5)


def test_leaving_one_out_equals_a_loop():
    weights, prompts = [0.1, 0.9, 0.4, 0.7, 0.2, 0.6], list("abaabc")
    slow = []
    for i, prompt in enumerate(prompts):
        others = [weights[j] for j in range(6) if j != i and prompts[j] == prompt]
        slow.append(weights[i] - sum(others) / len(others) if others else None)
    assert less_baseline(weights, prompts, "prompt")[:5] == pytest.approx(slow[:5])
    assert less_baseline(weights, prompts, "prompt")[5] is slow[5] is None


# --- labels and pairs -------------------------------------------------------------------------------------------------


def test_labels(tmp_path):
    rows = [{"text": "The red fox", "toxic": True}, {"text": "A quiet child", "toxic": False}]
    rows += [rows[0], {"text": "The red fox", "toxic": False}, {"text": "Our teacher", "toxic": None}]
    data = ready(tmp_path, rows, label_field="toxic")
    labels = {(encoder().decode(s.input_ids), s.numbers["label"]) for s in data.samples}
    assert labels == {("The red fox", 1.0), ("The red fox", 0.0), ("A quiet child", 0.0)}
    assert (data.describe()["num_duplicates"], data.describe()["num_null"]) == (1, 1)
    assert data.describe()["seq_len"] is None
    assert batch_of(data).fields["label"].dtype == torch.float64


def test_cells_of_a_table_are_numbers(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\nThe red fox,1\nA quiet child,0.5\nOur teacher,\n")
    data = ReferenceData(str(tmp_path / "a.csv"), label_field="label")
    data.read(encoder())
    assert sorted(sample.numbers["label"] for sample in data.samples) == [0.5, 1.0]


def test_pairs(tmp_path, caplog):
    rows = [
        {"clean": "The red fox", "other": "The fox red", "good": " paints", "bad": " watches"},
        {"clean": "A quiet child", "other": "A quiet", "good": " paints", "bad": " watches"},
        {"clean": "Our teacher", "other": "Our teacher", "good": " paints", "bad": " paints"},
    ]
    same = [len(encoder()(row["clean"])) == len(encoder()(row["other"])) for row in rows]
    assert same == [True, False, True]
    names = {"text_field": "clean", "answer_field": "good", "counterfactual_field": "other"}
    data = ready(tmp_path, rows, **names, foil_field="bad")
    (sample,) = data.samples
    first = {word: tiny_tokenizer(False)(word).input_ids[0] for word in (" paints", " watches")}
    assert sample.numbers == {"answer": first[" paints"], "foil": first[" watches"]}
    assert sample.by_token["counterfactual_ids"] == encoder()("The fox red")
    assert set(sample.text_ids) == {text_id("The red fox"), text_id("The fox red")}
    assert (data.describe()["num_unequal_lengths"], data.describe()["num_equal_answers"]) == (1, 1)
    assert "counterfactual has more or fewer tokens" in caplog.text
    without = batch_of(ready(tmp_path, rows, **names))
    assert without.fields["foil"].tolist() == [-1, -1]
    assert without.fields["foil"].dtype == without.fields["answer"].dtype == torch.int64


# --- batches ----------------------------------------------------------------------------------------------------------


def test_fields_are_padded_like_the_tokens():
    by_token = [{"completion_mask": [False, True, True], "other": [8, 9, 8]}, {"completion_mask": [True], "other": [7]}]
    numbers = [{"weight": 1.0, "answer": 3}, {"weight": -0.5, "answer": 2}]
    samples = [
        Sample(name, [4] * n, "cut", (), *own) for name, n, *own in zip("ab", (3, 1), numbers, by_token, strict=True)
    ]
    fields = pad_samples(samples, 1).fields
    assert fields["completion_mask"].tolist() == [[False, True, True], [True, False, False]]
    assert fields["other"].tolist() == [[8, 9, 8], [7, 1, 1]]
    assert fields["weight"].tolist() == [1.0, -0.5]
    assert (fields["weight"].dtype, fields["answer"].dtype) == (torch.float64, torch.int64)
    assert pad_samples([], 1).fields == {}
    with pytest.raises(AssertionError, match="2 for 3 tokens"):
        Sample("a", [5, 6, 7], "cut", by_token={"x": [1, 2]})


# --- bad settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"completion_field": "c", "match": "demo:prompts"}, r"data\.match='demo:prompts'.*data\.completion_field"),
        ({"completion_field": "c", "max_tokens": 4}, r"data\.max_tokens=4 would cut"),
        ({"weight_baseline": "prompt"}, r"data\.weight_baseline=prompt needs weights"),
        ({"weight_field": "w", "weight_baseline": "best"}, r"data\.weight_baseline='best' is unknown"),
        ({"foil_field": "f"}, r"data\.foil_field='f' needs an answer"),
        ({"completion_field": "c", "answer_field": "a"}, r"two kinds of sample"),
    ],
)
def test_fields_that_do_not_go_together(options, message):
    with pytest.raises(InputError, match=message):
        ReferenceData(**options)


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"c": 3}, {"completion_field": "c"}, r"data\.completion_field: 'c' holds int, not text.*line 1"),
        ({"c": ["a"]}, {"completion_field": "c"}, r"'c' holds a list that is not one of token ids.*line 1"),
        ({"w": "bad"}, {"weight_field": "w"}, r"data\.weight_field: 'w' holds 'bad', not a finite number.*line 1"),
        ({"w": 1e999}, {"label_field": "w"}, r"data\.label_field: 'w'"),
        ({"a": 1.5}, {"answer_field": "a"}, r"'a' holds '1\.5', neither text nor a token id.*line 1"),
        ({"a": 999}, {"answer_field": "a"}, r"token id 999 .*vocabulary"),
        (
            {"c": " b"},
            {"completion_field": "nothing"},
            r"data\.completion_field: no field 'nothing'; there are: text, c",
        ),
    ],
)
def test_values_of_the_wrong_kind(tmp_path, row, options, message):
    with pytest.raises(InputError, match=message):
        ready(tmp_path, [{"text": "The red fox"} | row], **options)


def test_only_completions_of_prompts_with_several(tmp_path):
    with pytest.raises(InputError, match=r"data\.weight_baseline=prompt: every prompt has only one"):
        ready(tmp_path, [ROWS[0], ROWS[4]], **COMPLETIONS, weight_baseline="prompt")
