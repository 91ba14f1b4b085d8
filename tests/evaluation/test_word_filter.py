"""A word filter after generation: counted in the results, an arm of its own in comparison, report and experiment."""

import pytest
from test_module import data_of, files, module_of, run  # noqa: F401
from test_several_judges import folder

from sparc3_pl.errors import InputError
from sparc3_pl.evaluation.compare import compare, compare_evaluations
from sparc3_pl.evaluation.results import Evaluation, write_evaluation
from sparc3_pl.report.collect import collect
from sparc3_pl.report.command import make_report
from sparc3_pl.report.effects import effects, headline, title_of

LISTED = {"w4", "w10", "w12", "w14", "w20", "w30", "w36", "w44"}


def test_what_it_did_is_counted_and_compared(files, capsys):  # noqa: F811
    (files / "words.txt").write_text("\n".join(LISTED))
    plain = run(files, module_of(files, "plain"))
    assert "drawn again" not in capsys.readouterr().out
    found = run(files, module_of(files, "filtered", word_filter=str(files / "words.txt"), word_filter_tries=2))
    before, after = (
        [not LISTED.isdisjoint(row.completion.split()) for row in side.completions] for side in (plain, found)
    )
    assert 0 < sum(after) < sum(before)
    counts = found.results["word_filter"]
    assert (counts["words"], counts["num_words"], counts["tries"]) == ("words.txt", len(LISTED), 2)
    assert (counts["num_redrawn"], counts["num_left"]) == (sum(before), sum(after))
    assert counts["num_redraws"] == sum(row.redraws for row in found.completions) > sum(before)
    assert [row.redraws > 0 for row in found.completions] == before
    assert '"redraws"' not in (files / "plain" / "completions.jsonl").read_text()
    assert found.results["generation"] == plain.results["generation"]
    assert (plain.is_plain, found.is_plain, found.is_unedited) == (True, False, True)
    assert "by the word filter words.txt, 2 times at most" in " ".join(capsys.readouterr().out.split())
    notes = compare_evaluations(plain, found).notes
    assert f"{sum(before)} of 14 completions were drawn again, {sum(after)} still hold a listed word" in " ".join(notes)
    assert not any("changed after loading" in note for note in notes)


def test_an_interrupted_run_with_another_filter_starts_anew(files, monkeypatch):  # noqa: F811
    (files / "words.txt").write_text("\n".join(LISTED))

    def dies(self, data):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("sparc3_pl.evaluation.completion_run.CompletionRun.finish", dies)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            run(files, module_of(files))
    found = run(files, module_of(files, word_filter=str(files / "words.txt"), word_filter_tries=2))
    assert found.results["word_filter"]["num_redrawn"] > 0


def test_without_completions_it_is_refused(files):  # noqa: F811
    with pytest.raises(InputError, match=r"model\.word_filter needs completions"):
        run(files, module_of(files, word_filter="default"), data_of(files, prompts_source=None))


def test_the_report_sets_it_beside_the_edit(tmp_path, capsys):
    """Folders a (as it was), b (an edit without a plan) and c (the filter), which here lowers toxicity by more."""
    folder(tmp_path / "a")
    folder(tmp_path / "b", -0.1)
    counts = {"words": "default", "num_words": 3, "sha256": "00", "tries": 10, "num_redrawn": 7, "num_left": 1}
    counts["num_redraws"] = 9
    other = Evaluation.open(folder(tmp_path / "c", -0.2))
    results = {k: v for k, v in other.results.items() if k not in ("files", "sha256")} | {"word_filter": counts}
    results["model"] = results["model"] | {"evaluated_fingerprint": "f"}
    write_evaluation(tmp_path / "c", results, completions=other.completions, windows=[], overwrite=True)
    measured, notes = effects(collect([tmp_path]))
    assert notes == []
    assert [(title_of(e), e.control) for e in measured] == [("b", None), ("c", "word filter")]
    assert headline(measured).name == "b"
    text = make_report([tmp_path]).markdown
    change = measured[1].toxicity
    assert f"(7 of 80 were, 1 still hold one) changed toxicity from {change.before:.3f}" in text
    assert f"lower than the edit's {measured[0].toxicity.after:.3f}" in text
    assert "7 of 80 completions were drawn again" in " ".join(compare(str(tmp_path / "a"), str(tmp_path / "c")).notes)
