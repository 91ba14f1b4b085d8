"""Places of results: what is replaced, what never is, and names of any bytes."""

import json
import os
from pathlib import Path

import pytest
import torch
from evaluations import results

from sparc3_pl.document.page import PAGE, page
from sparc3_pl.document.publish import check_places
from sparc3_pl.errors import InputError
from sparc3_pl.evaluation.results import KIND as EVALUATION
from sparc3_pl.evaluation.results import Evaluation, write_evaluation
from sparc3_pl.io.files import (
    FileKind,
    FolderKind,
    check_output,
    new_file,
    new_folder,
    open_tensors,
    save_tensors,
    strict_json,
    write_text,
)
from sparc3_pl.pruning.plan import KIND as PLAN
from sparc3_pl.pruning.save import KIND as MODEL
from sparc3_pl.report.command import KIND as REPORT
from sparc3_pl.scores.folder import ScoreFolder
from sparc3_pl.scores.manifest import KIND as SCORES
from sparc3_pl.scores.writer import ScoreWriter

BOX = FolderKind("a box", "box.json", ("a.txt",), lambda marker: marker["files"])
NOTE = FileKind.json("a note", lambda data: data.get("kind") == "note")
BYTES = os.fsdecode(b"caf\xe9 [bold]")
"""A name that is not UTF-8, and reads as markup."""


def make_box(folder: Path, *names: str) -> Path:
    folder.mkdir()
    (folder / "box.json").write_text(json.dumps({"format_version": 1, "files": ["b.txt"]}))
    for name in names:
        (folder / name).write_text(name)
    return folder


def test_an_earlier_result_is_replaced_as_a_whole(tmp_path):
    box = make_box(tmp_path / "box", "a.txt", "b.txt")
    with new_folder(box, True, BOX) as temporary:
        (temporary / "box.json").write_text("{}")
    assert [path.name for path in box.iterdir()] == ["box.json"]


@pytest.mark.parametrize("other", ["notes.txt", "c.txt", ".hidden"])
def test_a_folder_that_holds_anything_else_is_not_replaced(other, tmp_path):
    box = make_box(tmp_path / "box", "a.txt", other)
    with pytest.raises(InputError, match=f"holds '{other}' beside a box"), new_folder(box, True, BOX):
        raise AssertionError("the work was begun")
    assert (box / other).read_text() == other
    assert list(tmp_path.iterdir()) == [box]


def test_a_folder_within_is_never_replaced(tmp_path):
    box = make_box(tmp_path / "box")
    (box / "a.txt").mkdir()
    with pytest.raises(InputError, match=r"holds 'a.txt' beside a box"):
        check_output(box, True, BOX)


@pytest.mark.parametrize("kind", [SCORES, EVALUATION, MODEL, REPORT], ids=lambda kind: kind.name)
@pytest.mark.parametrize("content", ["mine", "[]", '{"mine": 1}', "{}"])
def test_a_marker_of_the_users_own_is_no_marker(kind, content, tmp_path):
    (tmp_path / kind.marker).write_text(content)
    with pytest.raises(InputError, match=f"is not {kind.name}"):
        check_output(tmp_path, True, kind)


def test_a_plan_in_a_folder_makes_no_model_of_it(tmp_path):
    """A plan beside folders of scores is not a saved model that may be replaced."""
    (tmp_path / "plan.json").write_text('{"format_version": 1, "neurons": [], "model": {}}')
    (tmp_path / "general").mkdir()
    with pytest.raises(InputError, match="is not a pruned model"):
        check_output(tmp_path, True, MODEL)


@pytest.mark.parametrize("kind", [PLAN, PAGE, NOTE], ids=lambda kind: kind.name)
@pytest.mark.parametrize("content", [b"notes of mine", b"\xff\x00", b"{}", b"<!doctype html><html></html>", b""])
def test_a_file_of_another_kind_is_not_replaced(kind, content, tmp_path):
    file = tmp_path / "file"
    file.write_bytes(content)
    with pytest.raises(InputError, match=f"is not {kind.name}"), new_file(file, True, kind):
        raise AssertionError("the work was begun")
    assert file.read_bytes() == content


def test_a_file_of_the_same_kind_is_replaced(tmp_path):
    (tmp_path / "note").write_text('{"kind": "note"}')
    with new_file(tmp_path / "note", True, NOTE) as temporary:
        temporary.write_text("new")
    assert (tmp_path / "note").read_text() == "new"
    (tmp_path / "page.html").write_text(page("title", []))
    assert check_output(tmp_path / "page.html", True, PAGE)


def test_a_result_of_another_command_is_not_replaced(tmp_path):
    (tmp_path / "a.json").write_text('{"kind": "audit"}')
    check_places("audit", str(tmp_path / "a.json"), None, True)
    with pytest.raises(InputError, match="is not a result of evidence"):
        check_places("evidence", str(tmp_path / "a.json"), None, True)
    with pytest.raises(InputError, match="one file"):
        check_places("audit", str(tmp_path / "b"), str(tmp_path / "." / "b"), False)


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x" * 240, "é" * 120, "a/" * 2100 + "a", "y" * 300 + "/a"])
def test_a_name_that_is_too_long_is_refused_before_the_work(name, tmp_path):
    with pytest.raises(InputError, match="too long"):
        check_output(tmp_path / name, False, BOX)


@pytest.mark.parametrize("name", ["a\0b", "\ud800"])
def test_what_is_no_name_is_refused(name, tmp_path):
    with pytest.raises(InputError, match="is no name for a file"):
        check_output(tmp_path / name, False, NOTE)


def test_the_longest_name_that_is_taken_can_be_written(tmp_path):
    with new_folder(tmp_path / ("x" * 215), False, BOX) as temporary:
        (temporary / "a.txt").touch()
    assert (tmp_path / ("x" * 215) / "a.txt").is_file()


def test_a_folder_that_may_not_be_entered_is_one_line(tmp_path, monkeypatch):
    def refuse(path: Path, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "stat", refuse)
    with pytest.raises(InputError, match="Permission denied"):
        check_output(tmp_path / "a", False, BOX)


def test_a_path_of_any_bytes_is_told_and_read_back(tmp_path):
    assert json.loads(strict_json({BYTES: [BYTES]})) == {BYTES: [BYTES]}
    assert strict_json({"é": "–"}) == '{"é": "–"}'
    write_text(tmp_path / "page.html", page(BYTES, []))
    assert "caf\\udce9 [bold]" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_results_may_lie_in_a_folder_of_any_bytes(tmp_path):
    folder = tmp_path / BYTES
    save_tensors(tmp_path / "t", {"a": torch.arange(3)})
    with new_folder(folder, False, BOX) as temporary:
        save_tensors(temporary / "t.safetensors", {"a": torch.arange(3)})
    with open_tensors(folder / "t.safetensors") as tensors:
        assert tensors.get_tensor("a").tolist() == [0, 1, 2]
    with ScoreWriter(folder / "scores") as writer:
        writer.add_layer("layer", torch.ones(4))
        model = {"pretrained": str(folder), "fingerprint": "f"}
        writer.finish(method="magnitude", num_samples=0, num_tokens=0, model=model, data={"source": str(folder)})
    manifest = ScoreFolder.open(folder / "scores").manifest
    assert (manifest.model["pretrained"], manifest.data["source"]) == (str(folder), str(folder))
    write_evaluation(folder / "evaluation", results(model=model), completions=[], windows=[])
    assert Evaluation.open(folder / "evaluation").results["model"]["pretrained"] == str(folder)
    with pytest.raises(InputError, match="UTF-8"):
        check_output(folder / "model", False, MODEL)
