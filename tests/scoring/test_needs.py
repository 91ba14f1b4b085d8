"""What a scoring run takes, before any weight is read, against a run that takes it."""

import pytest
import torch
from tiny_models import tiny

from sparc3_pl.cli import execute
from sparc3_pl.document.needs import Need, refuse_what_cannot_fit
from sparc3_pl.errors import InputError
from sparc3_pl.model.footprint import skeleton_in_dtype, weight_bytes_by_device
from sparc3_pl.model.source import ModelSource
from sparc3_pl.model.structure import decoder, mlps
from sparc3_pl.passes.run import _shared_out
from sparc3_pl.runtime.memory import free_by_place, free_memory
from sparc3_pl.scoring.needs import needs_of
from sparc3_pl.scoring.score_run import ScoreRequest


@pytest.fixture
def folder(tmp_path):
    """A model's config without its weights."""
    tiny("llama").config.save_pretrained(tmp_path / "m")
    return str(tmp_path / "m")


def by_what(folder, length=16, dtype="float32", **request):
    needs = needs_of(ScoreRequest.of(**request), ModelSource(folder, dtype), 2, length)
    return {need.what: need for need in needs}


def test_weights_sums_and_scores_are_those_of_the_model(folder):
    model = tiny("llama")
    needs = by_what(folder)
    assert needs["weights"].bytes == sum(p.numel() * 4 for p in model.parameters())
    assert by_what(folder, dtype="bfloat16")["weights"].bytes == needs["weights"].bytes // 2
    neurons = sum(mlp.width for mlp in mlps(model))
    assert needs["sums"].bytes == 8 * neurons + 2 * 2 * 8  # float64; counts of NaN and infinity of two layers
    assert needs["scores"].bytes == 4 * neurons
    assert by_what(folder, squares=True, groups=4)["scores"].bytes == 4 * neurons * 6
    weights = by_what(folder, granularity="weight", method="gradient", sums_on_host=True)
    assert weights["sums"].where == "host"
    assert weights["scores"].bytes == 4 * sum(model.get_submodule(mlp.up).weight.numel() for mlp in mlps(model))


def test_activations_are_what_a_backward_pass_keeps(folder):
    """Counted by their storages in a real pass, whose attention keeps a few numbers more."""
    model = tiny("llama").requires_grad_(False)
    own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (tensor, storage.nbytes())
        return tensor

    words = torch.zeros(2, 16, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        decoder(model)(inputs_embeds=words, use_cache=False)
    real = sum(size for _, size in kept.values())
    counted = by_what(folder)["activations"].bytes
    assert counted == pytest.approx(real, rel=0.05)
    assert by_what(folder, length=32)["activations"].bytes >= 2 * counted
    assert by_what(folder, gradient_checkpointing=True)["activations"].bytes < counted
    assert "activations" not in by_what(folder, method="wanda")


def test_samples_of_any_length_are_not_counted_at_the_longest_that_the_model_takes(folder, tmp_path, capsys):
    need = by_what(folder, length=None)["activations"]
    assert need.bytes is None
    assert f"{by_what(folder, length=128)['activations'].bytes / 2**20:,.1f} MiB for 2 x 128 tokens" in need.note
    words = ["--dry_run", "--model.pretrained", folder, "--data.seq_len", "64"]  # which records do not use
    for more, note in ((["--data.completion_field", "c"], "unknown"), (["--data.text_field", "t"], "x 64 tokens")):
        target = ["--model.target", "completion"] if note == "unknown" else []
        execute(["score", *words, *more, *target, "--trainer.accelerator", "cpu", "--trainer.devices", "1"])
        (line,) = (line for line in capsys.readouterr().out.splitlines() if "activations" in line)
        assert note in line


def test_what_does_not_fit_is_refused_with_both_numbers():
    needs = [
        Need("weights", "device", 3 * 2**20, way_out="get a larger one"),
        Need("activations", "device", None),
        Need("scores", "disk", 2**20, way_out="tidy up"),
    ]
    refuse_what_cannot_fit(needs, {"device": 3 * 2**20, "host": None, "disk": 2**20})
    message = r"weights 3\.0 MiB add up to 3\.0 MiB on the device, but 1\.0 MiB are free; get a"
    with pytest.raises(InputError, match=message):
        refuse_what_cannot_fit(needs, {"device": 2**20, "disk": 2**30})
    with pytest.raises(InputError, match=r"on the disk, but 0\.5 MiB are free; tidy up"):
        refuse_what_cannot_fit(needs, {"disk": 2**19})
    on_the_cpu = [*needs, Need("sums", "host", 2**20)]  # both are in the host's memory
    refuse_what_cannot_fit(on_the_cpu, {"host": 4 * 2**20})
    with pytest.raises(InputError, match=r"weights 3\.0 MiB, sums 1\.0 MiB add up to 4\.0 MiB on the host"):
        refuse_what_cannot_fit(on_the_cpu, {"host": 4 * 2**20 - 1})


def test_free_memory_is_told(tmp_path):
    free = free_by_place(torch.device("cpu"), tmp_path / "not" / "yet")
    assert free.keys() == {"host", "disk"}
    assert free["disk"] > 0
    assert free["host"] == pytest.approx(free_memory(torch.device("cpu")), rel=0.2)


def test_the_command_loads_and_writes_nothing(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--dry_run", "--model.pretrained", folder, "--output", str(tmp_path / "out")]
    execute(["score", *words, "--trainer.accelerator", "cpu", "--trainer.devices", "1"])  # the folder has no weights
    said = capsys.readouterr().out
    assert "weights" in said
    assert "activations" in said
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_model_that_is_spread_is_counted_by_device(folder, capsys):
    model = tiny("llama")
    skeleton = skeleton_in_dtype(ModelSource(folder, "bfloat16"))
    places = {"model": 0, "model.layers.1": "disk", "model.layers.1.mlp": 1, "lm_head": "cpu"}
    inner = model.model.layers[1]
    mlp, layer, head = (sum(p.numel() for p in m.parameters()) for m in (inner.mlp, inner, model.lm_head))
    rest = sum(p.numel() for p in model.parameters()) - layer - head
    expected = {"cuda:0": 2 * rest, "disk": 2 * (layer - mlp), "cuda:1": 2 * mlp, "cpu": 2 * head}
    assert weight_bytes_by_device(skeleton, places) == expected
    assert weight_bytes_by_device(skeleton, "cpu") == {"cpu": 2 * (rest + layer + head)}
    words = ["--dry_run", "--model.pretrained", folder, "--model.device_map", "auto"]
    execute(["score", *words, "--trainer.accelerator", "cpu", "--trainer.devices", "1"])
    assert "spread over cpu" in " ".join(capsys.readouterr().out.split())  # there is the host alone
    with pytest.raises(InputError, match=r"model\.device_map='anywhere': When passing"):
        weight_bytes_by_device(skeleton, "anywhere")


def test_a_model_that_is_shared_out_is_counted_by_parts():
    needs = [Need("weights", "device", 101), Need("sums", "device", 10), Need("activations", "device", 7)]
    shared = {need.what: need for need in _shared_out(needs, 4, 2)}
    assert {what: need.bytes for what, need in shared.items()} == {
        "weights": 26,
        "sums": 3,
        "activations": 7,
        "loading": 202,
    }
    assert shared["loading"].where == "host"
