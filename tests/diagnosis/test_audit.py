"""The audit: figures by another road, and every verdict by a folder that deserves it."""

import json
import math
import statistics
from dataclasses import replace

import pytest
import torch
from scipy.stats import spearmanr
from score_folders import LAYERS, random_scores, write
from tiny_models import tiny

from sparc3_pl.diagnosis.audit import audit
from sparc3_pl.diagnosis.score_checks import audit_folder, audit_folders, drawn_scores
from sparc3_pl.errors import InputError
from sparc3_pl.selection.contrast import SideScores


def samples(count, relevance, seed=0, **more):
    return [
        {"id": f"{seed}-{i}", "num_tokens": 10, "ending": "stop", "relevance": relevance[i % len(relevance)], **more}
        for i in range(count)
    ]


def sound(folder, seed=0, spread=0.02, **fields):
    """A folder whose samples' relevance averages to the scores' sum."""
    scores = random_scores(7)
    noise = random_scores(100 + seed)
    scores = {name: values + spread * noise[name] for name, values in scores.items()}
    total = sum(float(values.double().sum()) for values in scores.values())
    rows = samples(4, [total * 0.9, total * 1.1], seed=seed, first_token_share=0.1)
    model = {"pretrained": "./nowhere", "revision": None, "fingerprint": "sha256:00"}
    return write(folder, scores, samples=rows, **{"num_samples": 4, "num_tokens": 40, "model": model, **fields})


def checks(found):
    return {check.name: check for check in found.checks}


def test_figures_of_one_folder(tmp_path):
    folder = sound(tmp_path / "a")
    found = audit_folder(folder)
    values = torch.cat([folder.load(name) for name in LAYERS])
    relevance = [sample.relevance for sample in folder.samples()]
    assert found.num_scores == values.numel() == 21
    assert found.num_layers == 3
    assert found.total_relevance == pytest.approx(math.fsum(values.tolist()), rel=1e-9)
    assert found.relevance.standard_error == pytest.approx(statistics.stdev(relevance) / 2)
    assert found.stops == 1.0
    assert found.counts == {"nan": 0, "inf": 0, "negative": 0, "zero": 0}
    statuses = {name: check.status for name, check in checks(found).items() if name != "architecture"}
    assert set(statuses.values()) == {"pass"}, statuses


@pytest.mark.parametrize(
    ("about", "status"),
    [
        ({"target": "answer", "signed": True}, "pass"),
        ({"target": "text"}, "pass"),
        ({"target": "answer"}, "fail"),
        ({"signed": True}, "fail"),
    ],
)
def test_totals_that_cancel_are_not_held_against_scores(tmp_path, about, status):
    """Samples whose totals are around 0, and seeds whose totals are: more samples would not help either."""
    rows = [samples(4, [-1.0, 1.01], seed=seed) for seed in range(2)]
    folders = []
    for seed, sign in enumerate((1, -0.9)):
        scores = {name: sign * values for name, values in random_scores(7).items()}
        folders.append(write(tmp_path / str(seed), scores, samples=rows[seed], num_samples=4, num_tokens=40, **about))
    assert checks(audit_folder(folders[0]))["relevance per sample"].status == status
    (seeds,) = audit_folders(folders).seeds
    assert checks(seeds)["variation over seeds"].status == status


@pytest.mark.parametrize(
    ("name", "status", "change"),
    [
        ("numerical stability", "fail", {"scores": float("nan")}),
        ("numerical stability", "warn", {"nan": 3, "fields": {"nonfinite": "zero"}}),
        ("signs", "fail", {"scores": -1.0}),
        ("zeros", "warn", {"zeros": True}),
        ("mean over samples", "fail", {"relevance": 1.01}),
        ("relevance per sample", "fail", {"relevance": (0.1, 1.9)}),
        ("samples", "fail", {"twice": True}),
        ("samples", "fail", {"fields": {"num_samples": 5}}),
        ("first token", "warn", {"first": 0.8}),
    ],
)
def test_each_fault_is_found(tmp_path, name, status, change):
    scores = random_scores(7)
    if "scores" in change:
        scores[LAYERS[1]][2] = change["scores"]
    if change.get("zeros"):
        scores = {layer: torch.where(torch.arange(7) == 0, values, 0.0) for layer, values in scores.items()}
    total = sum(float(values.nan_to_num().double().sum()) for values in scores.values())
    factors = change.get("relevance", (0.9, 1.1))
    factors = factors if isinstance(factors, tuple) else (factors * 0.9, factors * 1.1)
    rows = samples(4, [total * factor for factor in factors], first_token_share=change.get("first", 0.1))
    if change.get("twice"):
        rows[3]["id"] = rows[2]["id"]
    fields = {"num_samples": 4, "num_tokens": 40, **change.get("fields", {})}
    folder = write(tmp_path / "a", scores, samples=rows, **fields)
    if "nan" in change:  # what was put to zero while scoring is in the counts only
        layers = {LAYERS[0]: replace(folder.manifest.layers[LAYERS[0]], nan=change["nan"])}
        folder.manifest = replace(folder.manifest, layers=folder.manifest.layers | layers)
    assert checks(audit_folder(folder))[name].status == status


@pytest.mark.parametrize(
    ("tokens", "status", "said"),
    [
        ((40, 3, 17), "pass", "3 to 40 of 40 tokens reached each layer"),
        ((40, 0, 0), "warn", f"2 of 3 had none (first: {LAYERS[1]})"),
    ],
)
def test_experts_that_no_token_reached(tmp_path, tokens, status, said):
    folder = sound(tmp_path / "a")
    assert "experts" not in checks(audit_folder(folder))
    layers = {
        name: replace(layer, tokens=count)
        for (name, layer), count in zip(folder.manifest.layers.items(), tokens, strict=True)
    }
    folder.manifest = replace(folder.manifest, layers=layers)
    check = checks(audit_folder(folder))["experts"]
    assert check.status == status
    assert said in check.reason


def test_seeds_against_scipy(tmp_path):
    folders = [sound(tmp_path / str(seed), seed) for seed in range(3)]
    found = audit_folders(folders)
    (group,) = found.seeds
    totals = [folder.manifest.total_relevance for folder in folders]
    assert group.mean == pytest.approx(statistics.mean(totals))
    assert group.variation == pytest.approx(statistics.stdev(totals) / statistics.mean(totals))
    flat = [torch.cat([folder.load(name) for name in LAYERS]) for folder in folders]
    expected = spearmanr(flat[0].numpy(), flat[1].numpy()).statistic
    assert group.pairs[0].rank_correlation == pytest.approx(expected)
    top = [set(values.topk(10).indices.tolist()) for values in flat]
    assert group.pairs[0].top == {10: len(top[0] & top[1]) / len(top[0] | top[1])}
    assert found.verdict == "warn"  # this model's config is not there to be checked


def test_folders_of_other_data_are_not_seeds(tmp_path):
    one = sound(tmp_path / "a", 0)
    other = sound(
        tmp_path / "b", 1, data={"source": "elsewhere", "seed": 0, "sample_ids": [f"1-{i}" for i in range(4)]}
    )
    assert audit_folders([one, other]).seeds == ()


def test_shared_samples_are_no_independent_seeds(tmp_path):
    found = audit_folders([sound(tmp_path / "a", 0), sound(tmp_path / "b", 0)])
    assert checks(found.seeds[0])["independence of seeds"].status == "warn"


def test_a_drawn_part_is_the_same_components_in_both(tmp_path):
    """Weight scores are ranked on a draw; its positions must not depend on the values or on the blocks."""
    shape = (40, 50)
    folder = write(tmp_path / "a", {name: torch.arange(2000.0).view(shape) + 2000 * i for i, name in enumerate(LAYERS)})
    drawn = drawn_scores(SideScores.of([folder]), most=600)
    assert len(drawn) == 600
    assert (drawn.diff() > 0).all()  # ascending values were put in: ascending positions were taken
    assert ((drawn / 10).long() == torch.arange(600)).all()  # one from each stretch of ten
    assert len(drawn_scores(SideScores.of([folder]), most=10_000)) == 6000


@pytest.mark.parametrize("granularity", ["neuron", "weight"])
def test_architecture_is_compared_with_the_config(tmp_path, granularity):
    model = tiny("llama")
    model.save_pretrained(tmp_path / "model")
    shape = {"neuron": (24,), "weight": (24, 32)}[granularity]
    about = {"pretrained": str(tmp_path / "model"), "revision": None, "fingerprint": "sha256:00"}
    names = [f"model.layers.{i}.mlp.up_proj" for i in range(2)]

    def status(folder, layers, shape, **more):
        made = write(tmp_path / folder, random_scores(0, shape, layers), model={**about, **more}, targets=None)
        return checks(audit_folder(made))["architecture"]

    assert status("right", names, shape).status == "pass"
    assert f"{2 * 24 * 32:,} weights" in status("weights", names, shape).reason
    assert status("missing", names[:1], shape).status == "fail"
    assert status("order", names[::-1], shape).status == "fail"
    assert status("shape", names, (25, *shape[1:])).status == "fail"
    assert status("class", names, shape, architecture="OPTForCausalLM").status == "fail"
    gone = status("gone", names, shape, pretrained=str(tmp_path / "nowhere"))
    assert gone.status == "warn"
    assert "not checked" in gone.reason


def test_command_writes_table_json_and_page(tmp_path, capsys):
    for seed in range(2):
        sound(tmp_path / f"seed{seed}", seed)
    folders = [str(tmp_path / f"seed{seed}") for seed in range(2)]
    found = audit(folders, output=str(tmp_path / "audit.json"), html=str(tmp_path / "audit.html"))
    said = json.loads((tmp_path / "audit.json").read_text())
    assert said["kind"] == "audit"
    assert said["verdict"] == found.verdict
    assert said["seeds"][0]["pairs"][0]["rank_correlation"] == found.seeds[0].pairs[0].rank_correlation
    out = capsys.readouterr().out
    assert "Numerical stability" in out
    assert "variation over seeds" in out
    assert "<table" in (tmp_path / "audit.html").read_text()
    with pytest.raises(InputError, match="already exists"):
        audit(folders, output=str(tmp_path / "audit.json"))


def test_a_changed_byte_is_refused(tmp_path):
    sound(tmp_path / "a")
    file = tmp_path / "a" / "scores.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    with pytest.raises(InputError, match="sha256"):
        audit([str(tmp_path / "a")])


@pytest.mark.parametrize(
    ("granularity", "layer", "shape"),
    [("head", "self_attn.o_proj", (4,)), ("channel", "self_attn.o_proj", (32,)), ("neuron", "mlp.up_proj", (24,))],
)
def test_architecture_of_every_kind_of_component(tmp_path, granularity, layer, shape):
    tiny("llama").save_pretrained(tmp_path / "model")
    about = {"pretrained": str(tmp_path / "model"), "revision": None, "fingerprint": "sha256:00"}
    names = [f"model.layers.{i}.{layer}" for i in range(2)]
    for other, status in (("neuron" if granularity == "head" else "head", "fail"), (granularity, "pass")):
        scores = random_scores(0, shape, names)
        folder = write(tmp_path / other, scores, model=about, targets=None, granularity=other)
        assert checks(audit_folder(folder))["architecture"].status == status
