"""Experts of a mixture as linear layers: views of fused parameters, which change nothing by themselves."""

import copy
from types import SimpleNamespace

import pytest
import torch
from plans import plan_for, same_bits, state
from score_folders import write
from tiny_models import MIXTURES, tiny, tokens
from transformers import AutoModelForCausalLM

from sparc3_pl.errors import InputError
from sparc3_pl.model.experts import experts_modules, is_routed, open_experts, router_of
from sparc3_pl.model.identity import describe, fingerprint
from sparc3_pl.model.loading import load_model, load_skeleton, models_kept
from sparc3_pl.model.source import ModelSource
from sparc3_pl.model.structure import features, linear_layers, mlps, weight_matrix
from sparc3_pl.pruning.edit import apply_plan, pruned, revert
from sparc3_pl.pruning.plan import PlannedNeuron, PrunePlan, entries_of
from sparc3_pl.pruning.save import save_pruned, save_shrunk
from sparc3_pl.selection.command import prune
from sparc3_pl.selection.contrast import SideScores
from sparc3_pl.selection.controls import Permuted

IDS = tokens(2, 9)
BLOCK = {"mixtral": "mlp", "granitemoe": "block_sparse_moe"}


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, use_cache=False).logits


def test_opening_changes_nothing():
    for family in MIXTURES:
        model = tiny(family)
        before, plain, identity = state(model), logits(model), fingerprint(model)
        names = [name for name, _ in model.named_parameters()]
        open_experts(model)
        open_experts(model)
        assert same_bits(state(model), before)
        assert [name for name, _ in model.named_parameters()] == names
        assert fingerprint(model) == identity
        assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("family", MIXTURES)
def test_names_and_roles(family):
    model = tiny(family)
    block = f"model.layers.1.{BLOCK.get(family, 'mlp')}.experts"
    blocks = [mlp for mlp in mlps(model) if mlp.name.startswith(block)]
    assert [mlp.up for mlp in blocks] == [f"{block}.{e}" for e in range(4)]
    assert (blocks[3].gate, blocks[3].down) == (f"{block}.3.gate_proj", f"{block}.3.down_proj")
    assert (blocks[3].width, blocks[3].gated) == (12, True)
    experts = model.get_submodule(block)
    layers = linear_layers(model)
    assert torch.equal(weight_matrix(layers[f"{block}.3"]), experts.gate_up_proj[3, 12:])
    assert torch.equal(weight_matrix(layers[f"{block}.3.gate_proj"]), experts.gate_up_proj[3, :12])
    assert torch.equal(weight_matrix(layers[f"{block}.3.down_proj"]), experts.down_proj[3])
    assert features(layers[f"{block}.3"]) == (12, 32)
    assert router_of(model, block).weight.shape == (4, 32)


@pytest.mark.parametrize("family", MIXTURES)
def test_layers_that_are_watched_compute_the_same(family):
    model, seen = tiny(family, dtype=torch.float64), {}
    plain = logits(model)
    with torch.no_grad():
        handles = [
            model.get_submodule(mlp.down).register_forward_pre_hook(
                lambda module, args, name=mlp.name: seen.__setitem__(name, (module.routed.tokens_N, args[0]))
            )
            for mlp in mlps(model)
        ]
    torch.testing.assert_close(logits(model), plain, rtol=1e-6, atol=1e-6)  # routers work in float32
    for handle in handles:
        handle.remove()
    by_layer = [sum(len(t) for name, (t, _) in seen.items() if name.startswith(f"model.layers.{i}.")) for i in (0, 1)]
    assert by_layer == [2 * IDS.numel()] * 2  # each token goes to two experts
    assert all(is_routed(m) is False or m.routed is None for m in model.modules())


def test_copies_have_views_of_their_own():
    model = tiny("mixtral")
    open_experts(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        weight_matrix(linear_layers(other)["model.layers.0.mlp.experts.1"]).zero_()
    assert not torch.equal(logits(other), logits(model))
    assert float(other.model.layers[0].mlp.experts.gate_up_proj[1, 12:].abs().sum()) == 0
    assert float(model.model.layers[0].mlp.experts.gate_up_proj[1, 12:].abs().sum()) > 0


@pytest.mark.parametrize("family", MIXTURES)
def test_an_edit_zeroes_the_neurons_and_comes_off(family):
    model = tiny(family)
    before, plan = state(model), plan_for(model, per_layer=2)
    applied = apply_plan(model, plan)
    for name, experts in experts_modules(model).items():
        for e in range(4):
            index = plan.entries[f"{name}.{e}"].index.long()
            want = [before[f"{name}.{part}"][e].clone() for part in ("gate_up_proj", "down_proj")]
            want[0][index], want[0][index + 12], want[1][:, index] = 0, 0, 0
            assert torch.equal(experts.gate_up_proj[e], want[0])
            assert torch.equal(experts.down_proj[e], want[1])
    assert not torch.equal(state(model)[f"{name}.down_proj"], before[f"{name}.down_proj"])
    applied.revert()
    assert same_bits(state(model), before)


@pytest.mark.parametrize("family", MIXTURES)
def test_saved_models_load_plainly_with_equal_logits(family, tmp_path):
    model = tiny(family)
    before, plan = state(model), plan_for(model, per_layer=2)
    with pruned(model, plan):
        expected = logits(model)
    result = save_pruned(model, None, plan, tmp_path / "m")
    assert result.max_difference == 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    assert torch.equal(logits(loaded), expected)
    assert same_bits(state(model), before)


@pytest.mark.parametrize("family", MIXTURES)
def test_shrunk_experts_have_fewer_neurons(family, tmp_path):
    model = tiny(family)
    before, plan = state(model), plan_for(model, per_layer=4)
    with pruned(model, plan):
        expected = logits(model)
    result = save_shrunk(model, None, plan, tmp_path / "m")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert result.parameters[0] - result.parameters[1] == 8 * 4 * 3 * 32  # 8 experts, 4 neurons, 3 vectors of 32
    for name, experts in experts_modules(loaded).items():
        assert experts.down_proj.shape == (4, 32, 8)
        index = plan.entries[f"{name}.3"].index.tolist()
        kept = [i for i in range(12) if i not in index]
        assert torch.equal(experts.gate_up_proj[3], before[f"{name}.gate_up_proj"][3][kept + [12 + i for i in kept]])
        assert torch.equal(experts.down_proj[3], before[f"{name}.down_proj"][3][:, kept])
    assert same_bits(state(model), before)


def test_shrinking_needs_the_same_number_of_each_expert(tmp_path):
    model = tiny("mixtral")
    open_experts(model)
    with pytest.raises(InputError, match="multiple of 4 for the experts"):
        save_shrunk(model, None, plan_for(model, per_layer=2), tmp_path / "m")
    with pytest.raises(InputError, match="the same number of neurons gone from each layer"):
        save_shrunk(model, None, plan_for(model, [("model.layers.0.mlp.experts.1", 3)]), tmp_path / "m")
    assert not list(tmp_path.iterdir())


# --- whole experts ----------------------------------------------------------------------------------------------------

GONE = {0: (1,), 1: (3,)}  # by decoder layer


def experts_plan(model, gone=GONE, edit="remove"):
    open_experts(model)
    names = list(experts_modules(model))
    neurons = [PlannedNeuron(f"{names[i]}.{e}.down_proj", 0, -1.0) for i, those in gone.items() for e in those]
    about = {"pretrained": "demo", "revision": None, "fingerprint": fingerprint(model), "dtype": "float32"}
    return PrunePlan(entries=entries_of(neurons), model=about, granularity="expert", edit=edit)


def without(model, family, gone):
    """A model made from a config with fewer experts, given the rows of the others."""
    left = 4 - len(gone[0])
    key = "num_experts" if "num_experts" in MIXTURES[family] else "num_local_experts"
    other = tiny(family, **{key: left, "num_experts_per_tok": min(2, left)})
    values = state(model)
    for i, those in gone.items():
        kept = [e for e in range(4) if e not in those]
        for name in values:
            if name.startswith(f"model.layers.{i}.") and values[name].shape[0] == 4:
                values[name] = values[name][kept]
    other.load_state_dict(values)
    return other


@pytest.mark.parametrize("gone", [GONE, {0: (0, 1, 3), 1: (1, 2, 3)}], ids=["one", "all but one"])
@pytest.mark.parametrize("family", MIXTURES)
def test_experts_that_are_removed_might_never_have_been(family, gone, tmp_path):
    """The edit in memory, the saved model, and one that was made smaller from the first give the same logits."""
    model = tiny(family)
    before, whole, plan = state(model), logits(model), experts_plan(model, gone)
    with pruned(model, plan):
        edited = logits(model)
    assert torch.equal(edited, logits(without(model, family, gone)))
    result = save_shrunk(model, None, plan, tmp_path / "m")
    assert str(result).startswith(f"{tmp_path / 'm'}: smaller")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    assert torch.equal(logits(loaded), edited)
    assert loaded.config.num_experts_per_tok == min(2, 4 - len(gone[0]))
    assert result.parameters[0] - result.parameters[1] == 2 * len(gone[0]) * (3 * 12 * 32 + 32)
    # nothing is left behind, and silencing the same experts is something else
    assert same_bits(state(model), before)
    assert torch.equal(logits(model), whole)
    with pruned(model, experts_plan(model, gone, edit="zero")):
        assert float((logits(model) - edited).abs().max()) > 0.01


def test_a_model_with_removed_experts_has_another_fingerprint():
    model = tiny("mixtral")
    before = fingerprint(model)
    with pruned(model, experts_plan(model)):
        during = fingerprint(model)
        with pytest.raises(InputError, match="this model's weights are"):
            apply_plan(model, experts_plan(tiny("mixtral")))
    assert during != before
    assert fingerprint(model) == before
    assert not any("forward" in vars(module) for module in model.modules())


def test_what_cannot_be_removed_is_refused(tmp_path):
    model = tiny("olmoe")
    before = state(model)
    with pytest.raises(InputError, match=r"all 4 experts of model\.layers\.0\.mlp\.gate out of the routing"):
        apply_plan(model, experts_plan(model, {0: (0, 1, 2, 3)}))
    with pytest.raises(InputError, match=r"the same number of experts gone from each layer.* removes 0 to 2"):
        save_shrunk(model, None, experts_plan(model, {0: (0, 1)}), tmp_path / "m")
    with pytest.raises(InputError, match="no saved weight says; save with --shrink"):
        save_pruned(model, None, experts_plan(model), tmp_path / "m")
    with pytest.raises(InputError, match="the plan is for experts with edit=zero; make the plan with edit=remove"):
        save_shrunk(model, None, experts_plan(model, edit="zero"), tmp_path / "m")
    with pytest.raises(InputError, match=r"edit=remove is for whole experts, and .*experts\.0 is none"):
        apply_plan(model, plan_for(model, edit="remove"))
    assert same_bits(state(model), before)
    assert not list(tmp_path.iterdir())


def test_prune_chooses_experts_layer_by_layer(tmp_path, capsys):
    """The two lowest of each layer, though all of the first layer's are lower than the second's."""
    model = tiny("granitemoe")
    model.save_pretrained(tmp_path / "model")
    open_experts(model)
    names = [f"{name}.{e}.down_proj" for name in experts_modules(model) for e in range(4)]
    values = dict(zip(names, map(torch.tensor, [[1.0], [4.0], [2.0], [3.0], [9.0], [5.0], [8.0], [7.0]]), strict=True))
    about = describe(model, ModelSource(str(tmp_path / "model")))
    folder = write(tmp_path / "scores", values, granularity="expert", model=about)
    common = {"general": [str(folder.path)], "contrast": "general", "output": str(tmp_path / "plan.json")}
    result = prune(**common, share=0.5, shrink=True, save_model=str(tmp_path / "small"))
    assert result.plan.edit == "remove"
    assert [neuron.layer for neuron in result.plan.neurons] == [names[i] for i in (0, 2, 5, 7)]
    assert "smaller" in capsys.readouterr().out
    matched = prune(**common | {"output": str(tmp_path / "c")}, share=0.5, scope="layer", control="random_matched")
    assert {neuron.layer for neuron in matched.plan.neurons} == {names[i] for i in (1, 3, 4, 6)}  # the others
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert loaded.model.layers[0].block_sparse_moe.router.weight.shape == (2, 32)
    with pytest.raises(InputError, match="not the same number in each of 2 layers"):
        prune(**common | {"output": str(tmp_path / "p")}, num_neurons=3, scope="layer")
    for wrong, match in (
        ({"edit": "remove", "save_model": str(tmp_path / "m")}, "save with --shrink"),
        ({"edit": "remove", "keep_values": True}, "leave out keep_values"),
        (
            {"edit": "zero", "shrink": True, "layers": ["model.layers.0.*"], "save_model": str(tmp_path / "m")},
            "removes 0 to 2",
        ),
    ):
        with pytest.raises(InputError, match=match):
            prune(**common | {"output": str(tmp_path / "p")}, share=0.5, **wrong)
    other = write(tmp_path / "neurons", {"model.layers.0.block_sparse_moe.experts.0": torch.rand(12)})
    with pytest.raises(InputError, match="edit=remove is for expert scores, and these are of neurons"):
        prune([str(other.path)], contrast="general", output=str(tmp_path / "p"), num_neurons=1, edit="remove")


def test_factors_are_dealt_out_among_the_experts_of_a_layer(tmp_path):
    names = [f"model.layers.{i}.mlp.experts.{e}.down_proj" for i in range(2) for e in range(4)]
    folder = write(tmp_path / "scores", {name: torch.rand(1) for name in names}, granularity="expert")
    question = SimpleNamespace(general=SideScores.of([folder]))
    draws = {tuple(Permuted(seed).counterparts(question, [(name, 0) for name in names])) for seed in range(8)}
    assert len(draws) > 1
    for draw in draws:
        assert [name.partition(".experts.")[0] for name, _ in draw] == [n.partition(".experts.")[0] for n in names]
        assert sorted(draw) == [(name, 0) for name in names]


def test_a_kept_model_may_have_its_experts_opened(tmp_path):
    tiny("mixtral").save_pretrained(tmp_path / "m")
    with models_kept():
        model = load_model(ModelSource(str(tmp_path / "m")))
        open_experts(model)
        assert load_model(ModelSource(str(tmp_path / "m"))) is model
        hook = model.model.layers[0].mlp.experts.get_submodule("0").register_forward_hook(lambda *_: None)
        assert load_model(ModelSource(str(tmp_path / "m"))) is not model
        hook.remove()


def test_kept_values_come_back_into_a_reloaded_model(tmp_path):
    from sparc3_pl.selection.command import _with_kept_values

    model = tiny("qwen3_moe")
    plan = _with_kept_values(plan_for(model), model)
    save_pruned(model, None, plan, tmp_path / "m")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    revert(loaded, plan)
    assert same_bits(state(loaded), state(model))


def test_a_skeleton_has_experts_too(tmp_path):
    model = tiny("olmoe")
    model.save_pretrained(tmp_path / "m")
    skeleton = load_skeleton(ModelSource(str(tmp_path / "m")))
    assert [mlp.up for mlp in mlps(skeleton)] == [mlp.up for mlp in mlps(model)]


def test_experts_that_are_otherwise_are_refused():
    model = tiny("gpt_oss", num_local_experts=2, head_dim=8)
    with pytest.raises(InputError, match="have a gate of their own kind"):
        mlps(model)
    assert "model.layers.0.self_attn.o_proj" in linear_layers(model)
