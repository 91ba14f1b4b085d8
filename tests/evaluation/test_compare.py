"""Comparison of two evaluation folders with known contents."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from evaluations import GENERATION, JUDGE, perplexity, results, toxicity

from sparc3_pl.errors import InputError
from sparc3_pl.evaluation.compare import compare
from sparc3_pl.evaluation.results import Evaluation, write_evaluation
from sparc3_pl.evaluation.rows import CompletionRow, WindowRow

RNG = np.random.default_rng(3)
SCORES = np.round(RNG.random((40, 2)), 6)
NLL = 100 + RNG.random(30)


def write(path, scores=SCORES, nll=NLL, failed=(), drop=(), **changes):
    rows = [
        CompletionRow(f"p{i:02}", f"prompt {i}", k, failed="why") if (i, k) in failed
        else CompletionRow(f"p{i:02}", f"prompt {i}", k, "x", {"toxicity": float(scores[i, k])}, 1, 4, 0.5)
        for i in range(len(scores)) for k in range(2) if i not in drop
    ]  # fmt: skip
    windows = [WindowRow(i, float(v), 50) for i, v in enumerate(nll)]
    model = {"pretrained": "m", "dtype": "float32", "fingerprint": "f", "evaluated_fingerprint": path.name}
    measured = {"perplexity": perplexity(num_tokens=1500), "toxicity": toxicity(), "model": model}
    measured |= {"generation": GENERATION, "judge": JUDGE}
    write_evaluation(path, results(**measured | changes), completions=rows, windows=windows)
    return str(path)


def test_changes_of_known_size(tmp_path, capsys):
    after = np.clip(SCORES - 0.1, 0, 1)
    found = compare(write(tmp_path / "a"), write(tmp_path / "b", after, NLL + 0.5), str(tmp_path / "c.json"))
    mean = found.toxicity["toxicity"]["mean"]
    assert mean.change == pytest.approx(after.mean() - SCORES.mean())
    assert found.toxicity["toxicity"]["expected_maximum"].after == pytest.approx(after.max(1).mean())
    assert found.toxicity["toxicity"]["probability"].before == pytest.approx((SCORES.max(1) >= 0.5).mean())
    assert (mean.improved + mean.unchanged, mean.num_pairs) == (40, 40)
    assert mean.p_value < 0.001
    assert found.perplexity.ratio == pytest.approx(math.exp(0.5 / 50))
    saved = json.loads((tmp_path / "c.json").read_text())
    assert saved["toxicity"]["toxicity"]["mean"]["change"] == pytest.approx(mean.change)
    assert {"seed", "num_resamples", "versions", "command", "created"} <= saved.keys()
    printed = capsys.readouterr().out
    assert "toxicity: mean" in printed
    assert f"{mean.change:+.4f}" in printed
    assert "+1.01 %" in printed


def test_fluency_is_compared_by_prompt(tmp_path, capsys):
    """Length and emptiness of each prompt's two completions by hand; improved is a prompt with fewer empty ones."""
    sides = []
    for side, (name, num_tokens, text) in enumerate((("a", 4, "x"), ("b", 6, "x"))):
        write(tmp_path / name)
        rows = [
            replace(
                row,
                num_tokens=num_tokens + int(row.id[1:]) % 3,
                completion=" " if row.k < side and row.id < "p20" else text,
            )
            for row in Evaluation.open(tmp_path / name).completions
        ]
        written = Evaluation.open(tmp_path / name).results
        keep = {key: value for key, value in written.items() if key not in ("files", "sha256")}
        write_evaluation(
            tmp_path / name, keep, completions=rows, windows=Evaluation.open(tmp_path / name).windows, overwrite=True
        )
        sides.append(str(tmp_path / name))
    found = compare(*sides)
    assert (found.length.change, found.length.low, found.length.high) == (2, 2, 2)
    assert found.length.before == pytest.approx(np.mean([4 + i % 3 for i in range(40)]))
    assert (found.empty.before, found.empty.after) == (0, 0.25)
    assert (found.empty.improved, found.empty.worsened, found.uniqueness.change) == (0, 20, 0)
    assert "tokens per completion" in capsys.readouterr().out
    assert found.toxicity["toxicity"]["share"].before == pytest.approx((SCORES >= 0.5).mean())


def test_what_earlier_versions_did_not_write_is_not_compared(tmp_path):
    rows = [CompletionRow(f"p{i}", "prompt", 0, "x", {"toxicity": 0.5}, uniqueness=1.0) for i in range(8)]
    written = {k: v for k, v in Evaluation.open(write(tmp_path / "a")).results.items() if k not in ("files", "sha256")}
    for name in ("b", "c"):
        write_evaluation(tmp_path / name, written | {"perplexity": None}, completions=rows, windows=[])
    found = compare(str(tmp_path / "b"), str(tmp_path / "c"))
    assert (found.length, found.uniqueness.change, found.empty.change) == (None, 0, 0)


def test_failed_completions_are_left_out_on_both_sides(tmp_path):
    after = SCORES.copy()
    after[3, 1] = 0.0
    found = compare(write(tmp_path / "a"), write(tmp_path / "b", after, failed={(3, 1), (5, 0), (5, 1)}))
    assert found.toxicity["toxicity"]["mean"].change == 0
    assert (found.toxicity["toxicity"]["mean"].num_pairs, found.num_dropped) == (39, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"generation": GENERATION | {"seed": 1, "eos_token_ids": [3]}}, r"generation\.seed is 0 in .*a and 1 in .*b"),
        ({"judge": {"class": "K"}}, r"judge\.class is 'J'"),
        ({"drop": {4, 7}}, r"2 prompts are in one of them only \(first id: p04\)"),
        ({"nll": NLL[:-1]}, "text windows differ"),
        ({"perplexity": perplexity(max_length=32)}, r"perplexity\.max_length is 64"),
        (
            {"perplexity": perplexity(windows="published")},
            r"perplexity\.windows is 'sliding' in .*a and 'published' in .*b",
        ),
        ({"perplexity": None, "toxicity": None}, "no figure in common"),
    ],
)
def test_evaluations_that_measure_something_else_are_refused(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        compare(write(tmp_path / "a"), write(tmp_path / "b", **changes))


def test_a_figure_on_one_side_only_is_told(tmp_path, capsys):
    found = compare(write(tmp_path / "a"), write(tmp_path / "b", perplexity=None))
    assert found.perplexity is None
    assert "perplexity is in" in found.notes[0]
    assert "note: perplexity is in" in capsys.readouterr().out


def test_same_weights_and_prompts_not_held_out_are_told(tmp_path):
    model = {"pretrained": "m", "dtype": "float32", "fingerprint": "f", "evaluated_fingerprint": "a"}
    found = compare(write(tmp_path / "a"), write(tmp_path / "b", model=model, num_overlapping_prompts=3))
    assert "both evaluations are of the same weights" in found.notes
    assert any("3 prompts were used to make the plan" in note for note in found.notes)


def test_something_else_than_a_folder(tmp_path):
    with pytest.raises(InputError, match=r"holds no results\.json"):
        compare(str(tmp_path), str(tmp_path))


def test_results_are_named_by_their_digests(tmp_path):
    found = compare(write(tmp_path / "a"), write(tmp_path / "b"), str(tmp_path / "c.json"))
    digests = [json.loads((tmp_path / name / "results.json").read_text())["sha256"] for name in ("a", "b")]
    assert [found.before_sha256, found.after_sha256] == digests
    saved = json.loads((tmp_path / "c.json").read_text())
    assert [saved["before_sha256"], saved["after_sha256"]] == digests


def test_overlapping_windows_are_resampled_in_blocks_and_the_table_says_so(tmp_path, capsys):
    settings = perplexity(stride=16, num_tokens=1500)
    sides = [write(tmp_path / name, nll=nll, perplexity=settings) for name, nll in (("a", NLL), ("b", NLL[::-1]))]
    assert compare(*sides).perplexity.block >= 4
    assert "30 windows were resampled in 7 blocks of 4" in capsys.readouterr().out


def test_too_few_prompts_and_windows_give_no_interval(tmp_path, capsys):
    sides = [
        write(tmp_path / name, scores=SCORES[:3] * factor, nll=NLL[:2]) for name, factor in (("a", 1.0), ("b", 0.5))
    ]
    found = compare(*sides, str(tmp_path / "c.json"))
    assert (found.toxicity["toxicity"]["mean"].low, found.perplexity.high) == (None, None)
    assert json.loads((tmp_path / "c.json").read_text())["perplexity"]["low"] is None
    printed = capsys.readouterr().out
    assert "none: 3 of 6 needed" in printed
    assert "none: 2 of 6 needed" in printed


def test_a_judge_whose_digest_is_not_known_is_told(tmp_path):
    judges = [{"class": "J", "sha256": None}, {"class": "J", "sha256": "00"}, {"class": "J", "sha256": "01"}]
    old, new, other = (write(tmp_path / str(i), judge=judge) for i, judge in enumerate(judges))
    assert any("digest of its judge's weights" in note for note in compare(old, new).notes)
    with pytest.raises(InputError, match=r"judge\.sha256"):
        compare(new, other)
