"""Scores of sequential Wanda are pruned as they were made, or not at all."""

from types import SimpleNamespace

import pytest
from score_folders import random_scores, write

from sparc3_pl.attribution.sequential import Sparsity
from sparc3_pl.errors import InputError
from sparc3_pl.selection.choose import make_plan
from sparc3_pl.selection.sequential import check_sequential


def folder(sequential):
    return SimpleNamespace(path="scores", manifest=SimpleNamespace(sequential=sequential))


BY_ROW = {"scope": "row", "share": 0.5, "pattern": None, "contrast": "general", "protect": 0.0}
BY_PATTERN = BY_ROW | {"scope": "pattern", "share": None, "pattern": "2:4"}


def test_the_same_choice_is_taken():
    check_sequential([folder("0.5"), folder("0.5")], **BY_ROW)
    check_sequential([folder("2:4")], **BY_PATTERN)
    check_sequential([folder(None)], **BY_ROW | {"scope": "model", "contrast": "difference"})


@pytest.mark.parametrize(
    "change",
    [{"share": 0.6}, {"scope": "layer"}, {"contrast": "difference"}, {"protect": 0.1}, {"other": True}, BY_PATTERN],
)
def test_another_choice_is_refused(change):
    with pytest.raises(InputError, match=r"model\.sequential=0\.5: .* --contrast general --scope row --share 0\.5"):
        check_sequential([folder("0.5")], **BY_ROW | change)


@pytest.mark.parametrize("change", [{"pattern": "4:8"}, BY_ROW])
def test_another_pattern_is_refused(change):
    with pytest.raises(InputError, match=r"model\.sequential=2:4: .* --contrast general --pattern 2:4"):
        check_sequential([folder("2:4")], **BY_PATTERN | change)


def test_folders_of_both_kinds_are_refused():
    with pytest.raises(InputError, match="another folder was not; score all alike"):
        check_sequential([folder(None), folder("0.5")], **BY_ROW)


@pytest.mark.parametrize(("sparsity", "choice"), [("0.5", {"share": 0.5, "scope": "row"}), ("2:4", {"pattern": "2:4"})])
def test_a_plan_holds_what_was_removed_while_scoring(tmp_path, sparsity, choice):
    scores = {name: (8 * values).round() for name, values in random_scores(0, (5, 12)).items()}  # with ties
    folder = write(tmp_path / "s", scores, granularity="weight", method="wanda", sequential=sparsity)
    assert folder.manifest.sequential == sparsity
    pattern = choice.pop("pattern", None)
    scope = {"scope": {"class_path": "pattern", "init_args": {"pattern": pattern}}} if pattern else {}
    plan = make_plan([folder], contrast="general", **choice, **scope)
    for name, values in scores.items():
        assert (
            plan.weights[name].tolist() == Sparsity.of(sparsity).lowest(values).flatten().nonzero().flatten().tolist()
        )
    with pytest.raises(InputError, match=f"model.sequential={sparsity}"):
        make_plan([folder], contrast="general", share=0.5)
    first, second, *_ = scores
    with pytest.raises(InputError, match=f"layers leaves out {second}"):
        make_plan([folder], contrast="general", **choice, **scope, layers=[first])
