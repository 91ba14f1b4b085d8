"""The evaluation folder: whole or not at all, and every change to it is noticed."""

import hashlib
import json
import math

import pytest

from sparc3_pl.errors import InputError
from sparc3_pl.evaluation.results import FORMAT, Evaluation, write_evaluation
from sparc3_pl.evaluation.rows import CompletionRow, WindowRow

RESULTS = {"perplexity": {"value": 9.5}, "toxicity": {"mean": math.nan}, "model": {}, "data": {}}
ROWS = [
    CompletionRow("a", "A", 0, "line one\nline\u2028two", {"toxicity": 0.5}, 7, 3, 1.0),
    CompletionRow("b", "B", 0, failed="no finite logits"),
]
WINDOWS = [WindowRow(0, 1.25, 3)]


@pytest.fixture
def folder(tmp_path):
    return write_evaluation(tmp_path / "e", RESULTS, completions=ROWS, windows=WINDOWS, config="a: 1\n")


def test_reads_what_was_written(folder):
    found = Evaluation.open(folder)
    assert found.completions == ROWS
    assert found.windows == WINDOWS
    assert found.results["toxicity"] == {"mean": None}  # NaN is no JSON
    assert found.results["format_version"] == 1
    assert sorted(p.name for p in folder.iterdir()) == [
        "completions.jsonl",
        "config.yaml",
        "results.json",
        "windows.jsonl",
    ]


@pytest.mark.parametrize("name", ["completions.jsonl", "windows.jsonl", "config.yaml", "results.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_damage_is_noticed(folder, name, damage):
    path = folder / name
    content = bytearray(path.read_bytes())
    if damage == "flip":
        place = (
            content.find(b"9.5") if name == "results.json" else next(i for i, c in enumerate(content) if c in b"ab:")
        )
        content[place] ^= 1
        path.write_bytes(content)
    elif damage == "cut":
        path.write_bytes(content[:-3])
    else:
        path.unlink()
    with pytest.raises(InputError, match=name):
        Evaluation.open(folder)


def test_an_old_format_and_a_foreign_path_are_refused(folder):
    results = json.loads((folder / "results.json").read_text())
    (folder / "results.json").write_text(json.dumps({**results, "format_version": 0}))
    with pytest.raises(InputError, match=r"results.json: format_version=0, but this program reads 1; evaluate again"):
        Evaluation.open(folder)
    outside = {k: v for k, v in results.items() if k != "sha256"} | {"files": {"../secret": "0"}}
    (folder / "results.json").write_text(json.dumps(FORMAT.seal(outside)))
    with pytest.raises(InputError, match="outside the folder"):
        Evaluation.open(folder)


def test_what_earlier_versions_wrote_is_read_and_a_wrong_type_is_refused(folder):
    path = folder / "results.json"
    results = json.loads(path.read_text())
    del results["sha256"]
    earlier = hashlib.sha256(json.dumps(results, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(results | {"sha256": earlier}))
    assert Evaluation.open(folder).digest == earlier
    path.write_text(json.dumps(results))
    with pytest.raises(InputError, match=r"results.json: the key 'sha256' is missing"):
        Evaluation.open(folder)
    path.write_text(json.dumps(FORMAT.seal(results | {"toxicity": [1]})))
    with pytest.raises(InputError, match=r"results.json: toxicity=\[1\] \("):
        Evaluation.open(folder)
    path.write_text(json.dumps(FORMAT.seal({key: value for key, value in results.items() if key != "data"})))
    with pytest.raises(InputError, match=r"results.json: the key 'data' is missing"):
        Evaluation.open(folder)


def test_an_existing_folder_stays_unless_overwritten(folder):
    with pytest.raises(InputError, match="already exists"):
        write_evaluation(folder, RESULTS, completions=[], windows=[])
    assert Evaluation.open(folder).completions == ROWS
    write_evaluation(folder, RESULTS, completions=[], windows=[], overwrite=True)
    assert Evaluation.open(folder).completions == []


def test_a_failure_while_writing_leaves_nothing(tmp_path):
    with pytest.raises(TypeError):
        write_evaluation(tmp_path / "e", RESULTS, completions=[CompletionRow("a", "A", 0, object())], windows=[])
    assert list(tmp_path.iterdir()) == []
