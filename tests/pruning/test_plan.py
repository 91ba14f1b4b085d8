"""The plan file: what is saved is loaded; what was changed, damaged or escapes is refused."""

import hashlib
import json

import pytest
import torch
from plans import plan_for, weight_plan_for

from sparc3_pl.errors import InputError
from sparc3_pl.pruning.plan import PlannedNeuron, PrunePlan

LAYER = "model.layers.0.mlp.up_proj"


@pytest.fixture
def saved(tiny_llama, tmp_path):
    return plan_for(tiny_llama, behaviour_samples=["x"], warnings=["w"]).save(tmp_path / "plan.json")


def unsealed(path, **changes):
    """Changes the file as someone without this program would."""
    data = json.loads(path.read_text())
    data.pop("sha256")
    path.write_text(json.dumps(data | changes))


def test_round_trip(tiny_llama, tmp_path, saved):
    plan = plan_for(tiny_llama, behaviour_samples=["x"], warnings=["w"])
    loaded = PrunePlan.load(saved)
    assert loaded.neurons == plan.neurons
    assert loaded.fingerprint == plan.fingerprint
    assert loaded.behaviour_samples == ["x"]
    data = json.loads(saved.read_text())
    assert data["neurons"][0].keys() == {"layer", "index", "score"}
    assert {"contrast", "num_neurons", "model", "scores", "edit"} <= set(data)
    assert len(saved.read_text().splitlines()) < 60
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_companions_round_trip(tiny_llama, tmp_path):
    plan = weight_plan_for(tiny_llama, LAYER, [0, 5, 700])
    loaded = PrunePlan.load(plan.save(tmp_path / "p.json"))
    assert torch.equal(loaded.weights[LAYER], plan.weights[LAYER])
    assert {path.name for path in tmp_path.iterdir()} == {"p.json", "p.weights.safetensors"}


def test_existing_plan_is_kept_unless_overwritten(tiny_llama, saved):
    before = saved.read_bytes()
    with pytest.raises(InputError, match="already exists; give --overwrite"):
        plan_for(tiny_llama).save(saved)
    assert saved.read_bytes() == before
    plan_for(tiny_llama, per_layer=1).save(saved, overwrite=True)
    assert PrunePlan.load(saved).num_neurons == 2


def test_nothing_is_left_when_a_companion_is_in_the_way(tiny_llama, tmp_path):
    (tmp_path / "p.weights.safetensors").write_text("mine")
    with pytest.raises(InputError, match="already exists"):
        weight_plan_for(tiny_llama, LAYER, [0]).save(tmp_path / "p.json")
    assert [path.name for path in tmp_path.iterdir()] == ["p.weights.safetensors"]


def refused(path, match):
    with pytest.raises(InputError, match=match) as caught:
        PrunePlan.load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"format_version": 0}, "format_version=0, but this program reads 1; make the plan again"),
        ({"format_version": 9}, "update sparc3_pl"),
        ({"neurons": []}, "it has no neurons"),
        ({"neurons": [{"layer": LAYER}]}, r"plan.json: the key 'neurons.0.index' is missing"),
        ({"neurons": [{"layer": LAYER, "index": "3"}]}, r"neurons.0.index=\"3\" \(.*valid integer\)"),
        ({"neurons": [{"layer": LAYER, "index": True}]}, r"neurons.0.index=true \(.*valid integer\)"),
        ({"neurons": [{"layer": LAYER, "index": 10**30}]}, r"neurons.0.index=10+ "),
        ({"neurons": [{"layer": LAYER, "index": 1, "row": 2}]}, r"neurons.0.row=2 \(Unexpected"),
        ({"files": {"weights": {"file": "w"}}}, r"the key 'files.weights.sha256' is missing"),
        ({"files": {"others": {"file": "w", "sha256": "0"}}}, "files.others"),
        ({"behaviour_samples": ["a", 3]}, r"behaviour_samples.1=3 \(.*valid string\)"),
        (
            {"neurons": [{"layer": LAYER, "index": -1}], "num_neurons": 1},
            r"neurons.0.index=-1 \(.*greater than or equal to 0\); it is damaged, make the plan again",
        ),
        ({"neurons": [{"layer": LAYER, "index": 24}], "num_neurons": 1}, "neuron 24 of .* is out of range"),
        ({"neurons": [{"layer": LAYER, "index": 2}] * 2, "num_neurons": 2}, "listed twice"),
        ({"num_neurons": 7}, "num_neurons=7, but 6 neurons are listed or lie beside it"),
        ({"model": {}}, "fingerprint is missing"),
        ({"model": {"fingerprint": 3}}, r"model.fingerprint=3 \(.*valid string\)"),
        ({"model": "demo"}, r"model=\"demo\" \(.*valid dictionary\)"),
        ({"edit": "burn"}, "edit='burn' is unknown"),
        ({"edit": "scale"}, "needs a finite alpha"),
        ({"granularity": "heed"}, "granularity='heed'"),
        ({"granularity": "weight", "neurons": []}, "indices lie beside it"),
        ({"extra": 1}, "'extra' is no key of a plan; remove it or make the plan again"),
    ],
)
def test_wrong_content(saved, changes, match):
    unsealed(saved, **changes)
    refused(saved, match)


def test_hand_written_plan_is_read(tmp_path):
    path = tmp_path / "p.json"
    neurons = [{"layer": LAYER, "index": 1}]
    path.write_text(json.dumps({"format_version": 1, "neurons": neurons, "model": {"fingerprint": "sha256:0"}}))
    assert PrunePlan.load(path).neurons == [PlannedNeuron(LAYER, 1)]


OF_OTHER_VERSIONS = [
    {"fingerprint": "sha256:0"},
    {"bits": {"kept": [4, None]}, "dtype": None, "fingerprint": "sha256:0", "revision": "main", "config": {}},
]


@pytest.mark.parametrize("model", OF_OTHER_VERSIONS)
def test_what_a_plan_says_of_its_model_is_kept_as_it_is(saved, tmp_path, model):
    unsealed(saved, model=model)
    plan = PrunePlan.load(saved)
    assert (plan.model.fingerprint, plan.model.dtype, plan.model.pretrained) == ("sha256:0", None, None)
    assert plan.model.revision == model.get("revision")
    content = json.loads(saved.read_text())
    del content["files"]
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    assert plan.digest == plan.first(6).digest == hashlib.sha256(canonical.encode()).hexdigest()
    again = json.loads(plan.save(tmp_path / "again.json").read_text())["model"]
    assert list(again.items()) == list(model.items())
    assert PrunePlan.load(tmp_path / "again.json").digest == plan.digest


def test_changed_damaged_missing(saved, tmp_path):
    text = saved.read_text()
    saved.write_text(text.replace('"index": ', '"index": 1', 1))
    refused(saved, "does not match its sha256")
    saved.write_text(text[:-9])
    refused(saved, "not valid JSON")
    saved.write_text("[]")
    refused(saved, "object is expected")
    saved.write_text("{}")
    refused(saved, "no format_version")
    refused(tmp_path / "none.json", "no such plan file")


@pytest.mark.parametrize("name", ["../w.safetensors", "/w.safetensors", "link.safetensors"])
def test_companions_cannot_escape(tiny_llama, tmp_path, name):
    folder = tmp_path / "plans"
    path = weight_plan_for(tiny_llama, LAYER, [0]).save(folder / "p.json")
    (folder / "p.weights.safetensors").rename(tmp_path / "w.safetensors")
    (folder / "link.safetensors").symlink_to(tmp_path / "w.safetensors")
    files = json.loads(path.read_text())["files"]
    files["weights"]["file"] = name
    unsealed(path, files=files)
    refused(path, "outside the folder")


@pytest.mark.parametrize("damage", ["flipped", "cut", "missing"])
def test_damaged_companions(tiny_llama, tmp_path, damage):
    path = weight_plan_for(tiny_llama, LAYER, [0, 5]).save(tmp_path / "p.json")
    file = tmp_path / "p.weights.safetensors"
    whole = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    else:
        whole[-1] ^= 1
        file.write_bytes(whole if damage == "flipped" else whole[:-2])
    refused(path, "p.weights.safetensors: ")


@pytest.mark.parametrize("indices", [[3, 1], [1, 1], [-1], [24 * 32]])
def test_wrong_weight_indices(tiny_llama, tmp_path, indices):
    path = weight_plan_for(tiny_llama, LAYER, indices).save(tmp_path / "p.json")
    refused(path, "out of range|ascending order")


def test_no_paths_of_this_machine(saved, tmp_path):
    assert str(tmp_path) not in saved.read_text()
