"""Completions that show a behaviour become samples; resuming, refusing to mix settings, and what reads the samples."""

import json
from pathlib import Path

import pytest
import yaml

from sparc3_pl.cli import execute, main
from sparc3_pl.data.evaluation_data import EvaluationData
from sparc3_pl.data.sources import text_id
from sparc3_pl.data.texts import TextQuery
from sparc3_pl.errors import InputError
from sparc3_pl.evaluation.repetition import RepetitionJudge
from sparc3_pl.evaluation.rows import CompletionRow
from sparc3_pl.experiment.elicit import Halves, KeepRule, elicit, kept_samples

TRAINER = {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "logger": False}


@pytest.fixture(scope="module")
def elicited(tmp_path_factory) -> tuple[Path, dict]:
    """The demo's completions of 16 prompts, two each, those of them that its judge calls toxic; and the settings."""
    folder = tmp_path_factory.mktemp("elicit")
    data = {"prompts_source": "demo:prompts", "prompts_field": "prompt.text", "num_prompts": 16}
    settings = {"output": str(folder / "out"), "keep": "scores.toxicity >= 0.5", "data": data, "trainer": TRAINER}
    settings["model"] = {"pretrained": "demo", "max_new_tokens": 12, "samples_per_prompt": 2}
    (folder / "elicit.yaml").write_text(yaml.safe_dump(settings))
    execute(["elicit", "--config", str(folder / "elicit.yaml")])
    return folder / "out", settings


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_samples_are_the_completions_that_the_judge_scores_high(elicited):
    folder, _ = elicited
    rows = lines(folder / "completions" / "completions.jsonl")
    assert len(rows) == 32
    expected = [(row["id"], row["k"]) for row in rows if row["scores"]["toxicity"] >= 0.5 and row["completion"].strip()]
    samples = lines(folder / "samples.jsonl")
    assert [(sample["id"], sample["k"]) for sample in samples] == expected
    assert 0 < len(samples) < 32
    assert {"prompt", "completion", "completion_ids", "scores", "half"} <= samples[0].keys()


def test_the_halves_are_those_of_data_partition(elicited):
    """By either way to ask for a half, in score and in eval, the same prompts are read."""
    samples = lines(elicited[0] / "samples.jsonl")
    source = str(elicited[0] / "samples.jsonl")
    for half in ("attribution", "evaluation"):
        own = {sample["prompt"] for sample in samples if sample["half"] == half}
        assert own
        for options in ({"half": half}, {"filter": f'half == "{half}"'}):
            assert set(TextQuery(source, "prompt", **options).texts()) == own
        data = EvaluationData(None, prompts_source=source, prompts_field="prompt", prompts_filter=f'half == "{half}"')
        assert set(data.query.texts()) == own


def test_what_is_done_is_not_done_again_and_other_settings_are_refused(elicited, capsys):
    folder, settings = elicited
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    elicit(**settings)
    with pytest.raises(InputError, match=r"samples\.jsonl: was made with a different keep"):
        elicit(**settings | {"keep": "scores.toxicity >= 0.9"})
    with pytest.raises(InputError, match=r"completions: was made with a different model.max_new_tokens \(12, now 9\)"):
        elicit(**settings | {"model": settings["model"] | {"max_new_tokens": 9}})
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_other_samples_of_the_same_completions(elicited):
    """Without its samples.jsonl a folder takes another condition, and completes nothing again; cuts have halves too."""
    folder, settings = elicited
    kept = (folder / "samples.jsonl").read_bytes()
    results = folder / "completions" / "results.json"
    written = results.stat().st_mtime_ns
    (folder / "samples.jsonl").unlink()
    elicit(**settings | {"keep": "scores.toxicity >= 0", "cut": {"criterion": "text"}})
    cuts = lines(folder / "samples.jsonl")
    assert {cut["behaviour"] for cut in cuts} == {True, False}
    prompts = {row["prompt"] for row in lines(folder / "completions" / "completions.jsonl")}
    ids = {half: set(TextQuery("demo:prompts", "prompt.text", half=half).texts()) for half in ("attribution",)}
    for cut in cuts:
        assert cut["prompt"] in prompts and cut["text"].startswith(cut["prompt"].rstrip())
        assert (cut["half"] == "attribution") == (cut["prompt"] in ids["attribution"])
    (folder / "samples.jsonl").unlink()
    elicit(**settings)
    assert (folder / "samples.jsonl").read_bytes() == kept
    assert results.stat().st_mtime_ns == written


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch, elicited):
    """Stopped after some completions, it makes only the others; in the end the samples are those of a run in one go."""
    from sparc3_pl.evaluation.generation import Generator

    folder, settings = elicited
    settings = settings | {"output": str(tmp_path / "out"), "data": settings["data"] | {"batch_size": 4}}
    complete, asked = Generator.__call__, []

    def stopped(self, ids, prompts):
        if len(asked) == 2:
            raise InputError("the power is off")
        asked.append(list(ids))
        return complete(self, ids, prompts)

    monkeypatch.setattr(Generator, "__call__", stopped)
    with pytest.raises(InputError, match="the power is off"):
        elicit(**settings)
    assert not (tmp_path / "out" / "samples.jsonl").exists()
    first, asked[:] = [name for ids in asked for name in ids], []
    monkeypatch.setattr(Generator, "__call__", lambda self, ids, p: asked.append(list(ids)) or complete(self, ids, p))
    elicit(**settings)
    assert len(first) == 8 and not set(first) & {name for ids in asked for name in ids}
    assert lines(tmp_path / "out" / "samples.jsonl") == lines(folder / "samples.jsonl")


# --- which are kept ---------------------------------------------------------------------------------------------------


def row(prompt: str, k: int = 0, completion: str | None = "a b", uniqueness: float = 1.0, **scores) -> CompletionRow:
    failed = "too long" if completion is None else None
    ratio = None if failed else uniqueness
    return CompletionRow(text_id(prompt), prompt, k, completion, scores, uniqueness=ratio, failed=failed)


def kept(rows, keep: str, num_samples: int | None = None) -> list[tuple[str, int]]:
    samples = kept_samples(rows, KeepRule.of(keep, num_samples), Halves())
    return [(sample["prompt"], sample["k"]) for sample in samples]


ROWS = [row("p", 0, uniqueness=0.4), row("p", 1, uniqueness=0.2), row("q", 0, uniqueness=0.6), row("r", uniqueness=0.2)]


def test_by_threshold_and_the_worst():
    assert kept(ROWS, "uniqueness < 0.5") == [("p", 0), ("p", 1), ("r", 0)]
    assert kept(ROWS, "uniqueness < 0.5", 1) == [("p", 1)]
    assert kept(ROWS, "uniqueness <= 1", 3) == [("p", 0), ("p", 1), ("r", 0)]
    scored = [row("p", toxicity=0.7), row("q", toxicity=0.9), row("r", toxicity=0.2)]
    assert kept(scored, "scores.toxicity >= 0", 2) == [("p", 0), ("q", 0)]
    assert kept(scored, 'scores.toxicity >= 0 and prompt != "q"', 1) == [("p", 0)]


def test_what_failed_or_is_empty_is_no_sample(caplog):
    """Nothing at all has a uniqueness of 0, which is no repetition."""
    rows = [*ROWS, row("s", completion="", uniqueness=0.0), row("t", completion=None)]
    assert kept(rows, "uniqueness < 0.5") == kept(ROWS, "uniqueness < 0.5")
    assert "1 empty, 1 failed are left out" in caplog.text


@pytest.mark.parametrize(("keep", "number", "message"), [
    ("uniqueness < 0.1", None, "only 0 of 4 completions"),
    ("uniqueness < 0.5", 4, "only 3 of 4 completions.*lower num_samples"),
    ("uniqueness = 0.5", None, "keep='uniqueness = 0.5' is not FIELD OP VALUE"),
    ("uniquenes < 0.5", None, "keep: no field 'uniquenes'"),
    ("k == 0", 2, "begins with none"),
    ("uniqueness < 0.5", 0, "num_samples=0"),
])  # fmt: skip
def test_what_cannot_be_kept_is_refused(keep, number, message):
    with pytest.raises(InputError, match=message):
        kept(ROWS, keep, number)


@pytest.mark.parametrize(("changes", "message"), [
    ({"data": {"prompts_source": "demo:prompts", "text_source": "demo:text"}}, "no text_source"),
    ({"data": {}}, "give prompts_source"),
    ({"data": {"prompts_source": "demo:prompts", "pairs_source": "x.csv"}}, "data.pairs_source: is for eval"),
    ({"model": {"tasks": ["boolq"]}}, "model.tasks: is no key of elicit"),
    ({"cut": {"treshold": 0.5}}, "cut: .*treshold"),
])  # fmt: skip
def test_wrong_settings_are_refused_before_anything_is_written(tmp_path, changes, message):
    settings = {"output": str(tmp_path / "out"), "keep": "uniqueness < 0.5", "data": {"prompts_source": "demo:prompts"}}
    with pytest.raises(InputError, match=message):
        elicit(**settings | changes)
    assert not (tmp_path / "out").exists()


def test_a_measure_that_needs_no_judge_loads_none(tmp_path, monkeypatch):
    """Only the words of the completions are counted; the judge of toxicity is never asked."""
    monkeypatch.setattr("sparc3_pl.evaluation.judges.DetoxifyJudge.score", None)
    options = ["--data.prompts_source", "demo:prompts", "--data.prompts_field", "prompt.text", "--data.num_prompts"]
    options += ["4", "--model.max_new_tokens", "6", "--keep", "uniqueness <= 1", "--num_samples", "2"]
    trainer = "{accelerator: cpu, devices: 1, logger: false}"
    assert main(["elicit", *options, "--trainer", trainer, "--output", str(tmp_path / "out")]) == 0
    assert len(lines(tmp_path / "out" / "samples.jsonl")) == 2
    scores = RepetitionJudge().score(["to be or not to be", "", "all words differ"])["repetition"]
    assert scores.tolist() == pytest.approx([2 / 6, 0.0, 0.0])
