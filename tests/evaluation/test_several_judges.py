"""Several judges of the same completions: each counted apart, compared, and where they disagree it is said."""

import json
import math

import numpy as np
import pytest
import torch
from evaluations import GENERATION, JUDGE, results, toxicity
from test_module import CountingJudge, data_of, files, module_of, run, trainer_of  # noqa: F401

from sparc3_pl.errors import InputError
from sparc3_pl.evaluation.compare import compare, compare_evaluations, write_comparison
from sparc3_pl.evaluation.results import Evaluation, write_evaluation
from sparc3_pl.evaluation.rows import CompletionRow
from sparc3_pl.evaluation.show import scalars
from sparc3_pl.evaluation.words import WordsJudge
from sparc3_pl.experiment.stages import _differing
from sparc3_pl.report.command import make_report


class EvenJudge:
    """1 for a completion with an even word that is listed; two labels, of which none is ``toxicity``."""

    def score(self, texts):
        even = torch.tensor([float(any(w in t.split() for w in ("w4", "w10"))) for t in texts])
        return {"even": even, "half": even / 2}


def test_further_judges_score_the_same_completions_and_change_nothing_else(files, capsys):  # noqa: F811
    (files / "words.txt").write_text("w4\nw10\nw12\n")
    words = WordsJudge(str(files / "words.txt"))
    alone = run(files, module_of(files, "alone"))
    printed = capsys.readouterr().out
    several = run(files, module_of(files, "several", judges={"words": words, "even": EvenJudge()}))
    odd = ("created", "command", "sha256", "files", "judges")
    assert {k: v for k, v in several.results.items() if k not in odd} == {
        k: v for k, v in alone.results.items() if k not in odd
    }
    assert "judges" not in alone.results
    assert '"judges"' not in (files / "alone" / "completions.jsonl").read_text()
    listed = [float(not {"w4", "w10", "w12"}.isdisjoint(row.completion.split())) for row in several.completions]
    assert 0 < sum(listed) < len(listed)
    assert [row.judges["words"] for row in several.completions] == [{"listed_word": score} for score in listed]
    assert [row.scores for row in several.completions] == [row.scores for row in alone.completions]
    by_prompt: dict[str, list[float]] = {}
    for row, score in zip(several.completions, listed, strict=True):
        by_prompt.setdefault(row.id, []).append(score)
    figures = several.results["judges"]["words"]
    assert figures["mean"] == pytest.approx(sum(listed) / len(listed))
    assert figures["expected_maximum"] == pytest.approx(np.mean([max(s) for s in by_prompt.values()]))
    assert (figures["label"], figures["judge"]["num_words"], figures["num_completions"]) == ("listed_word", 3, 14)
    assert several.results["judges"]["even"]["label"] == "even"
    named = scalars(several.figures)
    assert named["eval/judges/words/listed_word/mean"] == figures["mean"]
    assert named.keys() - scalars(alone.figures).keys() == {n for n in named if n.startswith("eval/judges/")}
    table = capsys.readouterr().out
    assert "words: listed_word, expected maximum" in table
    assert "words" not in printed


def test_without_a_judge_the_first_of_several_has_the_headline(files, caplog):  # noqa: F811
    caplog.set_level("INFO")
    only = module_of(files, judge=None, judges={"mine": CountingJudge(), "words": WordsJudge()})
    assert (type(only.settings.judge), list(only.settings.further_judges)) == (CountingJudge, ["words"])
    assert caplog.messages == ["no judge is set: 'mine', the first of judges, gives the figures that are shown first"]
    caplog.clear()
    both = module_of(files, judge=EvenJudge(), judges={"mine": CountingJudge()})
    assert (type(both.settings.judge), list(both.settings.further_judges)) == (EvenJudge, ["mine"])
    assert not caplog.messages


@pytest.mark.parametrize("name", ["", "a.b", "api_key"])
def test_a_name_that_results_could_not_hold_is_refused(files, name):  # noqa: F811
    with pytest.raises(InputError, match=r"model\.judges: .* cannot name a judge"):
        module_of(files, judges={name: CountingJudge()})


def test_an_interrupted_run_keeps_what_all_judges_said(files, monkeypatch):  # noqa: F811
    def dies(self, data):
        raise KeyboardInterrupt

    judges = {"even": EvenJudge()}
    want = run(files, module_of(files, "whole", judges=judges))
    with monkeypatch.context() as patch:
        patch.setattr("sparc3_pl.evaluation.completion_run.CompletionRun.finish", dies)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            run(files, module_of(files, judges=judges))
    again = CountingJudge()
    found = run(files, module_of(files, judge=again, judges=judges))
    assert again.seen == ["This is a sentence."]  # nothing was made again
    assert found.completions == want.completions
    assert found.results["judges"] == want.results["judges"]


def test_yaml_and_the_command_line_name_judges(tmp_path):
    from jsonargparse import ArgumentParser

    from sparc3_pl.evaluation.module import EvaluationModule

    (tmp_path / "words.txt").write_text("one")
    config = tmp_path / "judges.yaml"
    settings = {
        "zeta": {"class_path": "WordsJudge", "init_args": {"words": str(tmp_path / "words.txt")}},
        "alpha": {"class_path": "sparc3_pl.evaluation.words.WordsJudge"},
    }
    config.write_text(json.dumps({"model": {"judges": settings}}))

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(EvaluationModule, "model")
    parser.add_argument("--config", action="config")
    settings = parser.instantiate_classes(parser.parse_args([f"--config={config}"])).model.settings
    assert (settings.judge.words, list(settings.further_judges)) == ("words.txt", ["alpha"])  # in the order of the file


RNG = np.random.default_rng(5)
SCORES = np.round(0.4 + 0.3 * RNG.random((40, 2)), 6)


def folder(path, shift=0.0, num_prompts=40, **shifts):
    """An evaluation whose first judge gives ``SCORES + shift``, and judge NAME the same plus its own shift."""
    first = SCORES + shift
    noise = np.random.default_rng(9).normal(scale=0.05, size=SCORES.shape)
    rows = [
        CompletionRow(
            f"p{i:02}", f"prompt {i}", k, "x", {"toxicity": float(first[i, k])}, 1, 4, 0.5,
            judges={n: {"rude": float(SCORES[i, k] + by + (noise[i, k] if by else 0))} for n, by in shifts.items()},
        )
        for i in range(num_prompts) for k in range(2)
    ]  # fmt: skip
    model = {"pretrained": "m", "dtype": "float32", "fingerprint": "f"}
    model["evaluated_fingerprint"] = "f" if path.name == "a" else path.name
    measured = {"toxicity": toxicity(), "repetition": {"uniqueness": 0.5}, "generation": GENERATION, "judge": JUDGE}
    if shifts:
        measured["judges"] = {name: toxicity(judge={"class": "K"}) for name in shifts}
    write_evaluation(path, results(**measured, model=model), completions=rows, windows=[])
    return str(path)


def test_each_judges_change_is_compared(tmp_path, capsys):
    found = compare(folder(tmp_path / "a", other=1e-9), folder(tmp_path / "b", -0.1, other=-0.2))
    change = found.judges["other"]["rude"]["mean"]
    assert found.toxicity["toxicity"]["mean"].change == pytest.approx(-0.1)
    assert change.change == pytest.approx(-0.2)
    assert change.low <= change.change <= change.high < 0
    assert found.disagreement is None
    assert "other: rude: expected maximum" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("first", "other", "message"),
    [
        (-0.1, 0.1, "the judges disagree in the direction of the change: toxicity -0.1000 (-0.1000 .. -0.1000), other"),
        (-0.1, -0.001, "the judges disagree on whether there is a change"),
        (0.0, -0.001, None),
        (-0.1, -0.1, None),
    ],
)
def test_where_judges_disagree_it_is_said(tmp_path, capsys, first, other, message):
    before, after = folder(tmp_path / "a", other=0.0), folder(tmp_path / "b", first, other=other)
    found = compare(before, after)
    said = " ".join(capsys.readouterr().out.split())
    interval = found.judges["other"]["rude"]["mean"]
    assert (interval.low <= 0 <= interval.high) is (abs(other) < 0.01)  # what the cases are about
    if message is None:
        assert found.disagreement is None
        assert "judges disagree" not in said
    else:
        assert found.disagreement.startswith(message)
        assert "note: the judges disagree" in said


def test_directions_that_differ_within_chance_are_said_with_that(tmp_path):
    noise = np.random.default_rng(1).normal(scale=0.05, size=SCORES.shape)
    before, after = (
        folder(tmp_path / "a", other=0.0),
        folder(tmp_path / "b", noise - noise.mean() + 0.001, other=-0.003),
    )
    found = compare(before, after)
    assert found.toxicity["toxicity"]["mean"].change == pytest.approx(0.001, abs=1e-6)
    assert "in the direction of the change, though each interval holds zero: " in found.disagreement


def test_too_few_prompts_for_intervals_still_tell_directions(tmp_path):
    before, after = folder(tmp_path / "a", num_prompts=3, other=0.0), folder(tmp_path / "b", 0.1, 3, other=-0.1)
    assert (
        "direction of the change: toxicity +0.1000 (none: 3 of 6 needed), other" in compare(before, after).disagreement
    )


def test_judges_that_only_one_side_has_or_that_differ(tmp_path):
    one, other = folder(tmp_path / "a", other=0.0), folder(tmp_path / "b", -0.1)
    found = compare(one, other)
    assert found.judges == {}
    assert f"the judge other is in {one} only and is not compared" in found.notes
    written = json.loads((tmp_path / "a" / "results.json").read_text())
    written["judges"]["other"]["judge"]["class"] = "L"
    rows = Evaluation.open(one).completions
    keep = {k: v for k, v in written.items() if k not in ("files", "sha256")}
    write_evaluation(tmp_path / "c", keep, completions=rows, windows=[])
    with pytest.raises(InputError, match=r"judges\.other\.judge\.class is 'K' in .*a and 'L' in .*c"):
        compare(one, str(tmp_path / "c"))


def test_the_report_shows_every_judge_and_their_disagreement(tmp_path):
    before, after = folder(tmp_path / "a", other=0.0), folder(tmp_path / "b", -0.1, other=0.1)
    text = make_report([tmp_path]).markdown
    assert "What each judge says" in text
    assert "other: rude" in text
    assert text.count("share of empty completions") == text.count("tokens per completion") == 1
    assert text.count("he judges disagree in the direction of the change") == 2  # in short, and beside the table
    comparison = compare_evaluations(Evaluation.open(before), Evaluation.open(after))
    write_comparison(tmp_path / "c.json", comparison)
    old = {
        k: v for k, v in json.loads((tmp_path / "c.json").read_text()).items() if k not in ("judges", "disagreement")
    }
    (tmp_path / "c.json").write_text(json.dumps(old))  # of an earlier version
    assert "What each judge says" not in make_report([tmp_path]).markdown
    assert math.isfinite(comparison.judges["other"]["rude"]["mean"].change)


def test_an_experiment_notices_that_another_judge_is_first():
    one = {"model": {"judges": {"a": 1, "b": 2}}}
    other = {"model": {"judges": {"b": 2, "a": 1}}}
    assert list(_differing(one, other)) == ["model.judges (a, b, now b, a)"]
    assert list(_differing(one, json.loads(json.dumps(one)))) == []
