"""The evaluation folder: whole or not at all, and every change to it is noticed."""

import hashlib
import json
import math

import pytest
from evaluations import GENERATION, JUDGE, perplexity, results, toxicity

from sparc3_pl.errors import InputError
from sparc3_pl.evaluation.results import FORMAT, Evaluation, write_evaluation
from sparc3_pl.evaluation.rows import CompletionRow, WindowRow
from sparc3_pl.evaluation.show import scalars

RESULTS = results(perplexity=perplexity(value=9.5), toxicity=toxicity(mean=math.nan))
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
    assert found.results["toxicity"]["mean"] is None  # NaN is no JSON
    assert math.isnan(found.figures.toxicity.mean)
    assert found.results["format_version"] == 1
    assert sorted(p.name for p in folder.iterdir()) == [
        "completions.jsonl",
        "config.yaml",
        "results.json",
        "windows.jsonl",
    ]


def test_an_evaluation_of_the_first_version_has_all_that_later_ones_ask_for(tmp_path):
    """Its sections lack what was added since: those are then empty, and nothing is told of them."""
    first = results(perplexity=perplexity(), toxicity=toxicity(), repetition={"uniqueness": 0.9})
    first |= {"generation": GENERATION, "judge": JUDGE}
    path = write_evaluation(tmp_path / "old", first, completions=ROWS, windows=WINDOWS)
    figures = Evaluation.open(path).figures
    assert (figures.perplexity.windows, figures.perplexity.num_windows) == ("sliding", None)
    assert (figures.toxicity.share, figures.repetition.length, figures.model.config) == (None, None, None)
    assert (figures.judges, figures.word_filter, figures.neutral, figures.measurements) == ({}, None, None, {})
    assert (figures.overlapping_text, figures.num_overlapping_pairs, figures.timing) == (0.0, 0, None)
    text = str(Evaluation.open(path))
    assert "unique tokens" in text
    assert "share of" not in text
    assert "eval/toxicity/share" not in scalars(figures)
    content = FORMAT.content(figures)
    del content["perplexity"]["windows"], content["perplexity"]["num_windows"]  # what every new one has
    written = json.loads((path / "results.json").read_text())
    assert content == {k: v for k, v in written.items() if k not in ("format_version", "sha256")}


def test_a_section_of_a_later_version_is_read_as_far_as_it_is_known(tmp_path):
    later = results(perplexity=perplexity(colour="blue"), taste={"sweet": 1})
    evaluation = Evaluation.open(write_evaluation(tmp_path / "e", later, completions=ROWS, windows=WINDOWS))
    assert (evaluation.figures.perplexity.value, evaluation.figures.more) == (12.0, {"taste": {"sweet": 1}})
    copy = Evaluation.open(evaluation.save(tmp_path / "copy"))  # what is not known is not lost
    assert copy.results == evaluation.results


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"toxicity": toxicity(mean="high")}, r'toxicity\.mean="high"'),
        ({"perplexity": perplexity(num_tokens=-1)}, r"perplexity\.num_tokens=-1"),
        ({"plan": {"edit": "zero"}}, r"the key 'plan\.granularity' is missing"),
        ({"measurement_settings": {"m": {"settings": {}}}}, r"the key 'measurement_settings\.m\.class' is missing"),
    ],
)
def test_a_section_with_a_wrong_value_is_refused(tmp_path, change, message):
    evaluation = Evaluation(tmp_path / "e", RESULTS | change, ROWS, WINDOWS)
    with pytest.raises(InputError, match=message):
        str(evaluation)
    with pytest.raises(InputError, match=message):
        evaluation.sealed().save(tmp_path / "e")
    assert list(tmp_path.iterdir()) == []


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
