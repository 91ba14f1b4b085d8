"""The score folder: what is written is what is read, and nothing damaged passes."""

import json
import math
import shutil
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from score_folders import LAYERS, random_scores, write

from sparc3_pl.data.matching import SampleFormat, read_formats
from sparc3_pl.errors import InputError
from sparc3_pl.io import files
from sparc3_pl.scores.folder import ScoreFolder, mean_blocks, require_comparable
from sparc3_pl.scores.manifest import FORMAT, ScoredSample
from sparc3_pl.scores.writer import ScoreWriter

KEYS = {  # of the fixed interface
    *("format_version", "method", "granularity", "signed", "num_samples", "num_tokens", "model", "data", "layers"),
    *("total_relevance", "versions", "command", "created"),
}
FIELDS = {"method": "lrp", "num_samples": 1, "num_tokens": 1, "model": {"fingerprint": "sha256:0"}, "data": {}}


def rewrite(folder: Path, **changes) -> None:
    """Changes the manifest as someone without this program would: the seal is left out."""
    data = json.loads((folder / "manifest.json").read_text())
    data.pop("sha256")
    for key, value in changes.items():
        data.pop(key) if value is None else data.update({key: value})
    (folder / "manifest.json").write_text(json.dumps(data))


@pytest.mark.parametrize("shape", [(7,), (7, 5)], ids=["neuron", "weight"])
def test_what_is_written_is_read(tmp_path, shape):
    values = random_scores(1, shape)
    samples = [{"id": "a", "num_tokens": 3, "relevance": float("nan")}, {"id": "b", "num_tokens": 4, "text_ids": ["t"]}]
    folder = write(tmp_path / "scores", values, samples=samples)
    data = json.loads((folder.path / "manifest.json").read_text())
    assert set(data) >= KEYS
    assert data["granularity"] == {1: "neuron", 2: "weight"}[len(shape)]
    assert folder.layers == list(LAYERS)
    for name in LAYERS:
        assert folder.shape(name) == shape
        assert torch.equal(folder.load(name), values[name])
        assert torch.equal(torch.cat(list(folder.blocks(name, 3))), values[name].flatten())
        assert torch.equal(load_file(folder.path / data["layers"][name]["file"])[name], values[name])
    assert folder.samples() == [ScoredSample("a", 3), ScoredSample("b", 4, text_ids=("t",))]
    assert FORMAT.parse(data, "m") == folder.manifest
    assert not list(tmp_path.glob(".*"))


def test_layer_order_is_that_of_the_calls(tmp_path):
    names = ["b.10", "b.9", "a"]
    assert write(tmp_path / "s", {name: torch.ones(2) for name in names}).layers == names


def test_statistics_by_numpy(tmp_path):
    values = torch.randn(50) * 1e3
    values[:9] = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e10, -1e10, 3.0, 0.0])
    with ScoreWriter(tmp_path / "s") as writer:
        writer.add_layer("a", values, nan=4)
        writer.finish(**FIELDS)
    entry = json.loads((tmp_path / "s/manifest.json").read_text())["layers"]["a"]
    array = values.numpy().astype(np.float64)
    assert entry["sum"] == pytest.approx(math.fsum(array[np.isfinite(array)]), rel=1e-12)
    assert (entry["nan"], entry["inf"]) == (4 + 1, 2)
    assert entry["negative"] == int((array < 0).sum())
    assert entry["zero"] == int((array == 0).sum())
    assert type(entry["nan"]) is int


def test_squares(tmp_path):
    values, squares = random_scores(1), random_scores(2)
    folder = write(tmp_path / "s", values, squares)
    assert all(torch.equal(folder.load_squares(name), squares[name]) for name in LAYERS)
    with pytest.raises(InputError, match="no squares"):
        write(tmp_path / "t", values).load_squares(LAYERS[0])


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_crash_leaves_nothing(tmp_path, when):
    with suppress(KeyError), ScoreWriter(tmp_path / "s") as writer:
        writer.add_layer("a", torch.ones(2, 2))
        if when == "after":
            writer.finish(**FIELDS)
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_forgotten_finish_leaves_nothing(tmp_path):
    with pytest.raises(AssertionError, match="finish"), ScoreWriter(tmp_path / "s") as writer:
        writer.add_layer("a", torch.ones(2))
    assert not list(tmp_path.iterdir())


def test_existing_folder_is_kept_unless_overwritten_as_a_whole(tmp_path):
    write(tmp_path / "s", {"a": torch.ones(2, 2), "b": torch.ones(2, 2)})
    with pytest.raises(InputError, match="already exists; give --overwrite"), ScoreWriter(tmp_path / "s"):
        pass
    with ScoreWriter(tmp_path / "s", overwrite=True) as writer:
        writer.add_layer("a", torch.zeros(2, 2))
        writer.finish(**FIELDS)
    assert ScoreFolder.open(tmp_path / "s").layers == ["a"]
    assert not (tmp_path / "s/b.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_overwrite_fails_then_the_old_one_stays(tmp_path):
    write(tmp_path / "s", {"a": torch.ones(2)})
    with suppress(KeyError), ScoreWriter(tmp_path / "s", overwrite=True) as writer:
        writer.add_layer("a", torch.zeros(2))
        raise KeyError
    assert torch.equal(ScoreFolder.open(tmp_path / "s").load("a"), torch.ones(2))


def test_overwrite_never_replaces_a_folder_of_another_kind(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.tex").write_text("x")
    with pytest.raises(InputError, match="not an earlier result"), ScoreWriter(tmp_path / "home", overwrite=True):
        pass
    assert (tmp_path / "home/thesis.tex").exists()


def test_empty_folder_is_taken(tmp_path):
    (tmp_path / "s").mkdir()
    assert write(tmp_path / "s", {"a": torch.ones(2)}).layers == ["a"]


def test_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(InputError, match=r"cannot be written .* choose another output"),
        ScoreWriter(tmp_path / "file/s"),
    ):
        pass


def test_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with (
        pytest.raises(InputError, match=r"No space left on device\); free some space") as caught,
        ScoreWriter(tmp_path / "s") as writer,
    ):
        writer.add_layer("a", torch.ones(2, 2))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_files_have_the_users_permissions(tmp_path):
    folder = write(tmp_path / "s", {"a": torch.ones(2)})
    modes = {path.stat().st_mode for path in folder.path.iterdir()}
    (tmp_path / "plain").touch()
    assert modes == {(tmp_path / "plain").stat().st_mode}


def test_tokens_never_reach_the_manifest(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "planted-secret-value")
    monkeypatch.setattr(sys, "argv", ["score", "--token", "planted-secret-value", "--key=hf_Abcdefghijk1"])
    text = (write(tmp_path / "s", {"a": torch.ones(2)}).path / "manifest.json").read_text()
    assert "planted-secret-value" not in text
    assert "hf_Abcdefghijk1" not in text


# --- damage -----------------------------------------------------------------------------------------------------------


def read_all(path: Path) -> None:
    folder = ScoreFolder.open(path)
    folder.samples()
    for name in folder.layers:
        folder.load(name)


def refused(path: Path, match: str) -> None:
    """Opening and reading everything ends in one line."""
    with pytest.raises(InputError, match=match) as caught:
        read_all(path)
    assert "\n" not in str(caught.value)


def test_not_a_score_folder(tmp_path):
    refused(tmp_path / "none", "no such score folder")
    refused(tmp_path, "not a score folder")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"format_version": 0}, "format_version=0, but this program reads 1; score again"),
        ({"format_version": 2}, "update sparc3_pl"),
        ({"format_version": None}, "no format_version"),
        ({"method": None}, "'method' is missing"),
        ({"method": "guess"}, "method='guess' is unknown"),
        ({"granularity": "heed"}, "granularity='heed'"),
        (
            {"num_samples": -1},
            r"manifest.json: num_samples=-1 \(.*greater than or equal to 0\); it is damaged, score again",
        ),
        ({"num_samples": "many"}, r"num_samples=\"many\" \(.*valid integer\)"),
        ({"signed": 1}, r"signed=1 \(.*valid boolean\)"),
        ({"layers": {}}, "no layer is scored"),
        ({"layers": {"a": {}}}, "incomplete"),
        ({"model": {}}, "fingerprint is missing"),
        ({"neuron_rows": {LAYERS[0]: [3, 9]}}, r"neuron_rows of layer .* are \[3, 9\]"),
    ],
)
def test_manifest_that_is_wrong(tmp_path, changes, match):
    folder = write(tmp_path / "s", random_scores(1))
    rewrite(folder.path, **changes)
    refused(folder.path, match)


@pytest.mark.parametrize(
    "model", [{"fingerprint": "sha256:0"}, {"bits": 4, "revision": None, "fingerprint": "sha256:0"}]
)
def test_what_a_manifest_says_of_the_model_is_kept_as_it_is(tmp_path, model):
    path = write(tmp_path / "s", random_scores(1)).path
    rewrite(path, model=model)
    manifest = ScoreFolder.open(path).manifest
    assert (manifest.model.fingerprint, manifest.model.revision, manifest.model.config) == ("sha256:0", None, None)
    written = json.loads(manifest.text())
    assert list(written["model"].items()) == list(model.items())
    before = json.loads((path / "manifest.json").read_text())
    assert {k: v for k, v in written.items() if k != "sha256"} == {k: v for k, v in before.items() if k != "sha256"}
    with pytest.raises(AttributeError, match="no attribute 'bits'"):
        manifest.model.bits  # noqa: B018


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "link.safetensors", ""])
def test_paths_that_escape(tmp_path, name):
    folder = write(tmp_path / "s", {"a": torch.ones(2)})
    shutil.copy(folder.path / "scores.safetensors", tmp_path / "outside.safetensors")
    (folder.path / "link.safetensors").symlink_to(tmp_path / "outside.safetensors")
    layers = json.loads((folder.path / "manifest.json").read_text())["layers"]
    layers["a"]["file"] = name
    rewrite(folder.path, layers=layers)
    refused(folder.path, "outside the folder")


def test_manifest_with_a_changed_digit(tmp_path):
    path = write(tmp_path / "s", random_scores(1)).path / "manifest.json"
    path.write_text(path.read_text().replace('"num_tokens": 20', '"num_tokens": 21'))
    refused(path.parent, "does not match its sha256")


def test_manifest_cut_short(tmp_path):
    path = write(tmp_path / "s", random_scores(1)).path / "manifest.json"
    path.write_text(path.read_text()[:-20])
    refused(path.parent, "not valid JSON")


@pytest.mark.parametrize("shape", [(7,), (7, 5)], ids=["neuron", "weight"])
@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "missing", "grown", "other dtype", "no such tensor"])
def test_damaged_tensors(tmp_path, shape, damage):
    folder = write(tmp_path / "s", random_scores(1, shape))
    path = folder.path / folder.manifest.layers[LAYERS[1]].file
    whole = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(whole[:-5])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "flipped":
        whole[-3] ^= 4
        path.write_bytes(whole)
    elif damage == "missing":
        path.unlink()
    elif damage == "grown":
        path.write_bytes(whole + b"0")
    elif damage == "other dtype":
        path.write_bytes(whole.replace(b"F32", b"I32"))
    else:
        path.write_bytes(whole.replace(b"layers.1", b"layers.9"))
    refused(folder.path, "score again")


def test_flipped_byte_in_the_samples(tmp_path):
    folder = write(tmp_path / "s", random_scores(1), samples=[{"id": "a", "num_tokens": 5}])
    path = folder.path / "samples.jsonl"
    path.write_text(path.read_text().replace("5", "6"))
    refused(folder.path, "samples.jsonl: does not match")


@pytest.mark.parametrize(
    ("lines", "match"),
    [
        ('{"id": "a"}\n', r"samples.jsonl: the key '0.num_tokens' is missing"),
        ('{"id": "a", "num_tokens": 1}\n{"id": "b", "num_tokens": "2"}\n', r'samples.jsonl: 1.num_tokens="2" '),
        ('{"id": "a", "num_tokens": 1, "text_ids": 3}\n', r"samples.jsonl: 0.text_ids=3 "),
        ("[1]\n", r"samples.jsonl: 0=\[1\] "),
        ('{"id": "a", "num_to', "samples.jsonl: a line is not valid JSON"),
    ],
)
def test_samples_that_are_wrong_where_no_digest_tells(tmp_path, lines, match):
    """Folders of earlier versions have no sha256 of their samples."""
    folder = write(tmp_path / "s", random_scores(1))
    rewrite(folder.path, samples_sha256=None)
    (folder.path / "samples.jsonl").write_text(lines)
    refused(folder.path, match)


def test_line_ends_in_what_is_known_of_a_sample(tmp_path):
    record = {"id": "a", "num_tokens": 1, "token": "x\u2028y\x85z"}
    folder = write(tmp_path / "s", random_scores(1), samples=[record])
    assert folder.samples() == [ScoredSample("a", 1, more={"token": "x\u2028y\x85z"})]
    assert folder.samples()[0].to_json() == record
    (tmp_path / "samples.jsonl").write_text(files.strict_json(record | {"ending": "stop"}) + "\n", encoding="utf-8")
    assert read_formats(tmp_path) == [SampleFormat(1, "stop")]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"versions": {"torch": 2}}, r"versions.torch=2 \("),
        ({"group_sizes": [4, -1]}, r"group_sizes.1=-1 \("),
        ({"shards": "score"}, r'shards="score" \('),
        ({"squares": {LAYERS[0]: 5}}, "squares."),
    ],
)
def test_values_inside_of_others_are_typed_too(tmp_path, changes, match):
    folder = write(tmp_path / "s", random_scores(1))
    rewrite(folder.path, **changes)
    refused(folder.path, match)


def test_shape_that_the_file_does_not_have(tmp_path):
    folder = write(tmp_path / "s", {"a": torch.ones(2, 3)})
    layers = json.loads((folder.path / "manifest.json").read_text())["layers"]
    layers["a"]["shape"] = [3, 2]
    rewrite(folder.path, layers=layers)
    refused(folder.path, r"has shape \[2, 3\], but the manifest says \[3, 2\]")


# --- several folders --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7,), (7, 5)], ids=["neuron", "weight"])
def test_mean_over_seeds(tmp_path, shape):
    sets = [random_scores(seed, shape) for seed in range(3)]
    folders = [write(tmp_path / str(i), values) for i, values in enumerate(sets)]
    for name in LAYERS:
        expected = np.mean([values[name].numpy().astype(np.float64) for values in sets], axis=0)
        blocks = list(mean_blocks(folders, name, size=4))
        assert [len(block) for block in blocks[:-1]] == [4] * (len(blocks) - 1)
        np.testing.assert_allclose(torch.cat(blocks).numpy(), expected.ravel(), rtol=1e-7)


def test_mean_of_one_is_itself(tmp_path):
    folder = write(tmp_path / "s", random_scores(1))
    assert torch.equal(torch.cat(list(mean_blocks([folder], LAYERS[0]))), folder.load(LAYERS[0]))


def test_every_mismatch_is_named(tmp_path):
    first = write(tmp_path / "one", random_scores(1))
    other = write(
        tmp_path / "two",
        {"x": torch.ones(3, 3)},
        method="wanda",
        model={"fingerprint": "sha256:11"},
    )
    with pytest.raises(InputError) as caught:
        require_comparable([first, first, other])
    for part in (
        "model.fingerprint=sha256:00",
        "sha256:11",
        "method=lrp",
        "granularity=neuron",
        "layers=3",
        "one",
        "two",
    ):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    require_comparable([first, first])


@pytest.mark.parametrize(
    ("fields", "match"), [({"signed": True}, "signed=False"), ({"method": "gradient"}, "method=lrp in")]
)
def test_unlike_folders_are_not_averaged(tmp_path, fields, match):
    folders = [write(tmp_path / "a", random_scores(1)), write(tmp_path / "b", random_scores(1), **fields)]
    with pytest.raises(InputError, match=match):
        require_comparable(folders)


def test_unlike_shapes_are_not_averaged(tmp_path):
    folders = [write(tmp_path / "a", random_scores(1, (3,))), write(tmp_path / "b", random_scores(1, (4,)))]
    with pytest.raises(InputError, match=r"shape of .*\[3\] in .*\[4\]"):
        require_comparable(folders)


def test_a_byte_flipped_between_two_readings_is_seen(tmp_path):
    folder = write(tmp_path / "s", {"a": torch.ones(4, 4)})
    folder.load("a")
    path = folder.path / "a.safetensors"
    whole = bytearray(path.read_bytes())
    whole[-3] ^= 4
    path.write_bytes(whole)
    with pytest.raises(InputError, match="does not match its sha256"):
        folder.load("a")
