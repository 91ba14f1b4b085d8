"""Neurons and channels in one run: from scores that name each layer's kind to a plan that edits both."""

import json

import pytest
import torch
from plans import same_bits, state
from score_folders import write
from tiny_models import tiny, tokens

from sparc3_pl.attribution.scorers import groups_of
from sparc3_pl.cli import main
from sparc3_pl.diagnosis.architecture import Architecture, _problems
from sparc3_pl.diagnosis.overlap import measure_overlap
from sparc3_pl.errors import InputError
from sparc3_pl.model.components import COMPONENTS
from sparc3_pl.model.identity import fingerprint
from sparc3_pl.pruning.edit import pruned
from sparc3_pl.pruning.plan import PrunePlan
from sparc3_pl.pruning.save import shrink
from sparc3_pl.scores.folder import require_comparable
from sparc3_pl.selection.choose import make_plan
from sparc3_pl.selection.contrast import SideScores

BOTH = "neuron+channel"


def layer_kinds(depth=2):
    names = {f"model.layers.{i}.mlp.up_proj": "neuron" for i in range(depth)}
    return names | {f"model.layers.{i}.self_attn.o_proj": "channel" for i in range(depth)}


def both(folder, seed, model=None, **fields):
    """Scores of the tiny llama's 2 x 24 neurons and 2 x 32 channels."""
    generator = torch.Generator().manual_seed(seed)
    kinds = layer_kinds()
    scores = {name: torch.rand(24 if kind == "neuron" else 32, generator=generator) for name, kind in kinds.items()}
    about = {"pretrained": "demo", "fingerprint": "sha256:00" if model is None else fingerprint(model)}
    defaults = {"granularity": BOTH, "components": kinds, "model": about}
    return write(folder, scores, **(defaults | fields))


@pytest.fixture
def sides(tmp_path):
    model = tiny("llama")
    return [[both(tmp_path / name, seed, model)] for seed, name in enumerate(("general", "behaviour"))]


def test_scoring_writes_the_kind_of_every_layer_and_merging_keeps_it(tmp_path):
    config = tmp_path / "score.yaml"
    config.write_text(
        "model: {granularity: [neuron, channel], method: gradient}\n"
        "data: {seq_len: 16, num_samples: 4, batch_size: 2}\n"
        "trainer: {accelerator: cpu, devices: 1, logger: false, enable_progress_bar: false}\n"
    )
    words = ["score", "--config", str(config)]
    assert main([*words, "--output", str(tmp_path / "whole")]) == 0
    for i in (1, 2):
        assert main([*words, "--part", f"{i}/2", "--output", str(tmp_path / str(i))]) == 0
    assert main(["merge", str(tmp_path / "1"), str(tmp_path / "2"), "--output", str(tmp_path / "merged")]) == 0
    for name in ("whole", "merged"):
        layers = json.loads((tmp_path / name / "manifest.json").read_text())["layers"]
        assert {entry["component"] for entry in layers.values()} == {"neuron", "channel"}
        assert all((entry["component"] == "channel") == layer.endswith("o_proj") for layer, entry in layers.items())


def test_groups_of_one_kind_name_none():
    model = tiny("llama")
    neuron, channel = COMPONENTS.make("neuron"), COMPONENTS.make("channel")
    assert {group.component for group in groups_of(model, [neuron])} == {None}
    assert {group.layer: group.component for group in groups_of(model, [neuron, channel])} == layer_kinds()


def test_a_manifest_of_one_kind_has_no_new_key(tmp_path):
    write(tmp_path / "one", {"model.layers.0.mlp.up_proj": torch.rand(3)})
    (entry,) = json.loads((tmp_path / "one" / "manifest.json").read_text())["layers"].values()
    assert "component" not in entry


def test_a_kind_that_the_granularity_does_not_name_is_refused(tmp_path):
    with pytest.raises(InputError, match="component='head', but granularity='neuron\\+channel'"):
        both(tmp_path / "s", 0, components=layer_kinds() | {"model.layers.0.self_attn.o_proj": "head"})


def test_folders_that_disagree_on_a_layer_cannot_be_compared(tmp_path, sides):
    kinds = layer_kinds() | {"model.layers.0.self_attn.o_proj": "neuron"}
    other = both(tmp_path / "other", 0, tiny("llama"), components=kinds)
    with pytest.raises(InputError, match=r"component of model\.layers\.0\.self_attn\.o_proj=channel in"):
        require_comparable([sides[0][0], other])


def test_the_plan_edits_each_layer_by_its_kind(tmp_path, sides):
    (general,), (behaviour,) = sides
    plan = make_plan(*sides, num_neurons=30)
    values = [
        (float(general.load(layer)[i] - behaviour.load(layer)[i]), layer, i)
        for layer in general.layers
        for i in range(len(general.load(layer)))
    ]
    expected = sorted(values)[:30]
    assert [(n.layer, n.index) for n in plan.neurons] == [entry[1:] for entry in expected]
    assert (plan.granularity, plan.unit, plan.num_candidates) == (BOTH, "neurons and channels", 112)
    loaded = PrunePlan.load(plan.save(tmp_path / "plan.json"))
    assert loaded.components == plan.components == layer_kinds()
    assert loaded.summary() == plan.summary()

    model = tiny("llama")
    before = state(model)
    wanted = {name: value.clone() for name, value in before.items()}
    for _, layer, i in expected:  # by another road than the components'
        if layer.endswith("o_proj"):
            wanted[f"{layer}.weight"][:, i] = 0
            continue
        for name in (layer, layer.replace("up_proj", "gate_proj")):
            wanted[f"{name}.weight"][i] = 0
            wanted[f"{name}.bias"][i] = 0
        wanted[layer.replace("up_proj", "down_proj") + ".weight"][:, i] = 0
    with pruned(model, loaded):
        assert same_bits(state(model), wanted)
        assert torch.isfinite(model(input_ids=tokens(1, 5)).logits).all()
    assert same_bits(state(model), before)


def test_layers_of_one_kind_make_a_plan_of_that_kind(sides):
    plan = make_plan(*sides, num_neurons=4, layers=["*.o_proj"])
    assert (plan.granularity, plan.components, plan.unit) == ("channel", {}, "channels")
    assert "components" not in plan.to_json()


def test_the_first_few_keep_their_kinds(sides):
    plan = make_plan(*sides, num_neurons=30).first(2)
    assert plan.components == {layer: layer_kinds()[layer] for layer in layer_kinds() if layer in plan.entries}


def test_a_plan_whose_layer_is_of_no_kind_is_refused(tmp_path, sides):
    path = make_plan(*sides, num_neurons=30).save(tmp_path / "plan.json")
    data = json.loads(path.read_text())
    del data["sha256"], data["components"]["model.layers.0.self_attn.o_proj"]
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match=r"layer model\.layers\.0\.self_attn\.o_proj is of component=None"):
        PrunePlan.load(path)


def test_channels_cannot_be_removed(sides):
    with pytest.raises(InputError, match="the plan is for neurons and channels"):
        shrink(tiny("llama"), make_plan(*sides, num_neurons=30))


def test_matched_controls_stay_in_their_layer(sides):
    plan, control = (make_plan(*sides, num_neurons=12, control=name) for name in (None, "random_matched"))
    assert control.counts() == plan.counts()
    assert not {(n.layer, n.index) for n in plan.neurons} & {(n.layer, n.index) for n in control.neurons}


def test_overlap_of_plans_of_both_kinds(tmp_path, sides):
    plans = {str(n): make_plan(*sides, num_neurons=n) for n in (10, 30)}
    result = measure_overlap(plans, SideScores.of(sides[0]), {}, num_permutations=10)
    assert (result.groups[0].common, result.unit, result.num_candidates) == (10, "neurons and channels", 112)
    one = {"a": make_plan(*sides, num_neurons=10, layers=["*.up_proj"]), "b": plans["10"]}
    with pytest.raises(InputError, match="a is a plan of neurons and b of neurons and channels"):
        measure_overlap(one, None, {})
    kinds = layer_kinds() | {"model.layers.0.self_attn.o_proj": "neuron"}
    other = both(tmp_path / "other", 0, tiny("llama"), components=kinds)
    with pytest.raises(InputError, match="give the right --general"):
        measure_overlap(plans, SideScores.of([other]), {})


def test_an_audit_sees_a_kind_that_is_not_the_models(sides):
    (folder,) = sides[0]
    shapes = {layer: folder.shape(layer) for layer in folder.layers}
    right = Architecture("X", 4, shapes, layer_kinds(), 0)
    assert _problems(folder.manifest, right) == []
    wrong = Architecture("X", 4, shapes, layer_kinds() | {"model.layers.0.self_attn.o_proj": "head"}, 0)
    assert "is scored as channel" in _problems(folder.manifest, wrong)[0]


def test_evidence_of_both_kinds(sides, capsys):
    words = [
        word
        for name, side in zip(("general", "behaviour"), sides, strict=True)
        for word in (f"--{name}", str(side[0].path))
    ]
    assert main(["evidence", *words, "--num_neurons", "10"]) == 0
    assert "strongest neurons" in capsys.readouterr().out
