"""Neutral prompts: completed, judged and compared in the same evaluation, and never mixed with the others."""

import json
from dataclasses import replace

import pytest
from evaluations import SCORES, toxicity
from plans import plan_for
from test_module import CountingJudge, data_of, files, module_of, run  # noqa: F401
from test_several_judges import folder

from sparc3_pl.data.encoding import load_encoder
from sparc3_pl.data.evaluation_data import EvaluationData, NeutralBatch, PromptBatch
from sparc3_pl.data.sources import text_id
from sparc3_pl.errors import InputError
from sparc3_pl.evaluation.compare import compare
from sparc3_pl.evaluation.results import Evaluation, write_evaluation
from sparc3_pl.evaluation.show import scalars
from sparc3_pl.model.loading import load_model
from sparc3_pl.model.source import ModelSource
from sparc3_pl.pruning.callback import PruningCallback
from sparc3_pl.report.command import make_report

PROMPTS = {f"w{i} w{i + 1} w{i + 2}": i / 20 for i in range(4, 18, 2)}
FILTERS = {"prompts_filter": "toxicity >= 0.5", "neutral_filter": "toxicity < 0.4"}
NEUTRAL = [prompt for prompt, toxicity in PROMPTS.items() if toxicity < 0.4]
MAIN = [prompt for prompt, toxicity in PROMPTS.items() if toxicity >= 0.5]


@pytest.fixture
def scored(files):  # noqa: F811
    """The files of ``test_module``, each prompt with its toxicity."""
    rows = [{"prompt": prompt, "toxicity": toxicity} for prompt, toxicity in PROMPTS.items()]
    (files / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return files


def read(data: EvaluationData, folder_of_model) -> EvaluationData:
    data.read(load_encoder(ModelSource(str(folder_of_model / "model"))))
    return data


def test_they_are_counted_apart_and_change_no_other_figure(scored, capsys):
    alone = run(scored, module_of(scored, "alone"), data_of(scored, prompts_filter=FILTERS["prompts_filter"]))
    printed = capsys.readouterr().out
    found = run(scored, module_of(scored, "both"), data_of(scored, **FILTERS))
    assert "neutral" not in printed and "neutral" not in alone.results
    assert not (scored / "alone" / "neutral.jsonl").exists()
    assert found.completions == alone.completions  # so completions.jsonl stays what scoring may read
    for part in ("toxicity", "repetition", "perplexity", "generation", "judge"):
        assert found.results[part] == alone.results[part]
    assert sorted({row.prompt for row in found.completions}) == sorted(MAIN)
    assert sorted({row.prompt for row in found.neutral}) == sorted(NEUTRAL)
    of_those = run(scored, module_of(scored, "swapped"), data_of(scored, prompts_filter=FILTERS["neutral_filter"]))
    assert found.neutral == of_those.completions  # the same completions as when they are the only prompts
    assert {k: v for k, v in found.results["neutral"].items() if k != "repetition"} == of_those.results["toxicity"]
    assert found.results["neutral"]["repetition"] == of_those.results["repetition"]
    scores = [row.scores["toxicity"] for row in found.neutral]
    assert found.results["neutral"]["mean"] == pytest.approx(sum(scores) / len(scores))
    assert found.results["neutral"]["share"] == sum(score >= 0.5 for score in scores) / len(scores)
    assert found.results["data"]["neutral"]["num_prompts"] == len(NEUTRAL)
    assert scalars(found.figures)["eval/neutral/toxicity/mean"] == found.results["neutral"]["mean"]
    assert f"{len(scores)} completions of {len(NEUTRAL)} neutral prompts" in " ".join(capsys.readouterr().out.split())
    assert not list(scored.glob(".*partial"))


def test_an_interrupted_run_keeps_both_kinds(scored, monkeypatch):
    want = run(scored, module_of(scored, "whole"), data_of(scored, **FILTERS))

    def dies(self, data):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("sparc3_pl.evaluation.completion_run.CompletionRun.finish", dies)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            run(scored, module_of(scored), data_of(scored, **FILTERS))
    again = CountingJudge()
    found = run(scored, module_of(scored, judge=again), data_of(scored, **FILTERS))
    assert again.seen == ["This is a sentence."] * 2
    assert (found.completions, found.neutral) == (want.completions, want.neutral)


def test_the_guard_knows_neutral_prompts_too(scored):
    plan = plan_for(load_model(ModelSource(str(scored / "model"))))
    plan = replace(plan, behaviour_samples=[text_id(NEUTRAL[0])])
    with pytest.raises(InputError, match=f"1 of {len(NEUTRAL + MAIN)} prompts were used to make the plan"):
        run(scored, module_of(scored), data_of(scored, **FILTERS), callbacks=[PruningCallback(plan)])
    assert not (scored / "evaluation").exists()
    module = module_of(scored, allow_overlap=True)
    results = run(scored, module, data_of(scored, **FILTERS), callbacks=[PruningCallback(plan)]).results
    assert (results["overlap"], results["num_overlapping_prompts"]) == ("allowed", 1)


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_ranks_share_them(scored, world_size):
    served = {PromptBatch: [], NeutralBatch: []}
    for rank in range(world_size):
        data = read(data_of(scored, text_source=None, **FILTERS), scored)
        data.trainer = type("Rank", (), {"global_rank": rank, "world_size": world_size})()
        data.plan_batches(None)
        for batch in data.test_dataloader():
            served[type(batch)] += batch.prompts
    assert {kind: sorted(prompts) for kind, prompts in served.items()} == {
        PromptBatch: sorted(MAIN),
        NeutralBatch: sorted(NEUTRAL),
    }


def test_another_source_a_number_and_another_field(scored):
    rows = [{"text": f"w{i} w5"} for i in range(30, 40)]
    (scored / "plain.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"neutral_source": str(scored / "plain.jsonl"), "neutral_field": "text", "num_neutral": 4}
    data = read(data_of(scored, **options), scored)
    assert len(data.neutral) == 4
    assert set(data.neutral) <= {row["text"] for row in rows}
    with pytest.raises(InputError, match=r"data\.num_neutral=11: only 10 prompts in .*lower data\.num_neutral"):
        read(data_of(scored, **options | {"num_neutral": 11}), scored)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_neutral": 3}, r"data\.num_neutral=3 needs data\.neutral_filter or data\.neutral_source"),
        ({"neutral_field": "p"}, r"data\.neutral_field='p' needs data\.neutral_filter or"),
        (
            {"neutral_filter": "a < 1", "prompts_source": None},
            r"data\.neutral_filter='a < 1' needs data\.prompts_source",
        ),
    ],
)
def test_settings_that_would_do_nothing_are_refused(scored, options, message):
    with pytest.raises(InputError, match=message):
        data_of(scored, **options)


def test_a_prompt_of_both_kinds_is_refused(scored):
    with pytest.raises(InputError, match=r"2 prompts \(one of them 'w10 .*that exclude each other"):
        read(data_of(scored, prompts_filter="toxicity >= 0.4", neutral_filter="toxicity < 0.55"), scored)


def neutral_folder(path, shift=0.0, changed=0):
    """As ``folder`` of test_several_judges, with its completions as neutral ones, of which the first so many differ."""
    ev = Evaluation.open(folder(path))
    neutral = [
        replace(row, completion="y" if place < changed else "x", scores={"toxicity": row.scores["toxicity"] + shift})
        for place, row in enumerate(ev.completions)
    ]
    results = {k: v for k, v in ev.results.items() if k not in ("files", "sha256")}
    results["neutral"] = toxicity(labels={}, repetition={"uniqueness": 0.5})
    write_evaluation(path, results, completions=ev.completions, windows=[], neutral=neutral, overwrite=True)
    return str(path)


def test_the_comparison_and_the_report_say_what_changed(tmp_path, capsys):
    before, after = neutral_folder(tmp_path / "a"), neutral_folder(tmp_path / "b", 0.01, changed=25)
    found = compare(before, after)
    assert found.toxicity["toxicity"]["mean"].change == 0
    assert found.neutral.toxicity["toxicity"]["mean"].change == pytest.approx(0.01)
    assert list(found.neutral.toxicity["toxicity"]) == ["mean", "share"]
    assert (found.neutral.num_changed, found.neutral.num_completions, found.neutral.num_dropped) == (25, 80, 0)
    assert "25 of 80 (31.2 %)" in " ".join(capsys.readouterr().out.split())
    text = make_report([tmp_path]).markdown
    assert "Neutral prompts" in text
    assert "25 of 80 (31.2 %)" in text


def test_every_judge_is_asked_about_them(tmp_path, capsys):
    """The second says 0.25 more of each than the first on both sides, and of the edited model another 0.02 more."""
    places = [neutral_folder(tmp_path / name, shift, changed=3) for name, shift in (("a", 0.0), ("b", 0.01))]
    for place, extra in zip(places, (0.25, 0.27), strict=True):
        ev = Evaluation.open(place)
        rows = [
            [replace(row, judges={"strict": {"rude": row.scores["toxicity"] + extra}}) for row in side]
            for side in (ev.completions, ev.neutral)
        ]
        results = {k: v for k, v in ev.results.items() if k not in ("files", "sha256")}
        about = toxicity(label="rude", labels={"rude": SCORES}, judge={"name": "strict"})
        results |= {"judges": {"strict": about}, "neutral": results["neutral"] | {"judges": {"strict": about}}}
        write_evaluation(place, results, completions=rows[0], windows=[], neutral=rows[1], overwrite=True)
        assert scalars(Evaluation.open(place).figures)["eval/neutral/judges/strict/rude/mean"] == SCORES["mean"]
    found = compare(*places)
    assert found.neutral.judges["strict"]["rude"]["mean"].change == pytest.approx(0.03)
    assert found.judges["strict"]["rude"]["mean"].change == pytest.approx(0.02)
    assert found.neutral.toxicity["toxicity"]["mean"].change == pytest.approx(0.01)
    assert "neutral prompts: strict: rude: mean" in " ".join(capsys.readouterr().out.split())
    text = make_report([tmp_path]).markdown
    assert "strict: rude: share" in text


def test_neutral_prompts_on_one_side_only_are_told(tmp_path):
    one = neutral_folder(tmp_path / "a")
    found = compare(one, folder(tmp_path / "b"))
    assert found.neutral is None
    assert f"neutral prompts are in {one} only and are not compared" in found.notes
