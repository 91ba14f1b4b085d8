import json

import pytest

from sparc3_pl.data.evaluation_data import EvaluationData
from sparc3_pl.data.reference import ReferenceData
from sparc3_pl.data.sources import partition, text_id
from sparc3_pl.data.texts import TextQuery
from sparc3_pl.errors import InputError

IDS = [[5, 6, 7], [0], [5, 6, 7], [], [8] * 300]


def source(folder, values, kind="jsonl") -> str:
    path = folder / f"a.{kind}"
    records = [{"x": value} for value in values]
    if kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    else:
        path.write_text(json.dumps(records) if kind == "json" else "".join(json.dumps(r) + "\n" for r in records))
    return str(path)


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet"])
def test_token_ids_stand_where_texts_do(kind, tmp_path):
    query = TextQuery(source(tmp_path, IDS, kind), "x")
    assert list(query.texts()) == [[5, 6, 7], [0], [8] * 300]
    assert (query.counts["num_read"], query.counts["num_duplicates"], query.counts["num_empty"]) == (5, 1, 1)


def test_token_ids_are_halved_by_their_content(tmp_path):
    ids = [[i, i + 1] for i in range(50)]
    halves = [list(TextQuery(source(tmp_path, ids), "x", half=half).texts()) for half in ("attribution", "evaluation")]
    assert sorted(halves[0] + halves[1]) == ids
    assert all(partition(text_id(sample), 0) == "attribution" for sample in halves[0])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([[1, 2], "text"], r"texts in some records and token ids in others \(line 2\)"),
        (["text", None, [1, 2]], r"texts in some records and token ids in others \(line 3\)"),
        ([[1, "a"]], r"not one of token ids .*\(line 1\)"),
        ([[1], [-1]], r"not one of token ids .*\(line 2\)"),
        ([[1], [True]], r"not one of token ids .*\(line 2\)"),
        ([[1.0]], r"not one of token ids .*\(line 1\)"),
        ([[[1]]], r"not one of token ids .*\(line 1\)"),
        (["a", 5], r"holds int, not text.*\(line 2\)"),
    ],
)
def test_neither_text_nor_token_ids(values, message, tmp_path):
    with pytest.raises(InputError, match=message):
        list(TextQuery(source(tmp_path, values), "x").texts())


def test_prompts_are_text(tmp_path):
    with pytest.raises(InputError, match=r"data\.prompts_field: 'x' holds list, not text"):
        list(TextQuery(source(tmp_path, IDS), "x", prefix="data.prompts_", token_ids=False).texts())


def test_place_of_the_text(tmp_path):
    query = TextQuery(source(tmp_path, [None, "a", "b"]), "x")
    assert [(text, query.place) for text in query.texts()] == [("a", "line 2"), ("b", "line 3")]
    assert query.origin == {"revision": None, "drawn_from": "records in their order"}


def test_a_field_that_only_some_records_have(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"y": 1}\n{"x": "a", "y": 1}\n{"x": "b"}\n{"x": "c", "y": 0}\n')
    query = TextQuery(str(tmp_path / "a.jsonl"), "x")
    assert list(query.texts()) == ["a", "b", "c"]
    assert query.counts["num_null"] == 1
    query = TextQuery(str(tmp_path / "a.jsonl"), "x", filter="y > 0")
    assert list(query.texts()) == ["a"]
    assert query.counts["num_null"] == 2
    for options in ({"text_field": "z"}, {"text_field": "x", "filter": "z > 0"}):
        with pytest.raises(InputError, match="no field 'z'; there are: y"):
            list(TextQuery(str(tmp_path / "a.jsonl"), **options).texts())


def test_cells_that_look_like_numbers_are_text(tmp_path):
    (tmp_path / "a.csv").write_text("x\n001\n1\nNA\n")
    texts = list(TextQuery(str(tmp_path / "a.csv"), "x").texts())
    assert texts == ["001", "1", "NA"]
    assert {type(text) for text in texts} == {str}


def test_half_a_character_is_refused_where_it_is_used(tmp_path):
    for kind in ("json", "jsonl"):
        with pytest.raises(InputError, match=r"half a character .*\((line|record) 2\)"):
            list(TextQuery(source(tmp_path, ["a", "\ud83d"], kind), "x").texts())


def test_negative_seed():
    with pytest.raises(InputError, match=r"data\.seed=-1 is negative; give 0 or more"):
        TextQuery("demo", "text", seed=-1)


def test_results_say_what_was_drawn_from():
    data, evaluation = ReferenceData(match="demo:prompts", match_field="prompt.text"), EvaluationData(text_source=None)
    for query in (data.query, data.match_query, evaluation.query):
        next(query.texts())
    about = data.describe()
    assert (about["revision"], about["drawn_from"], about["match_revision"]) == (None, "all records", None)
    about = evaluation.describe()
    assert (about["prompts_revision"], about["prompts_drawn_from"]) == (None, "all records")
