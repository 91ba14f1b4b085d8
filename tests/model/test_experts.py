"""Experts of a mixture as linear layers: views of fused parameters, which change nothing by themselves."""

import copy

import pytest
import torch
from plans import plan_for, same_bits, state
from tiny_models import MIXTURES, tiny, tokens
from transformers import AutoModelForCausalLM

from sparc3_pl.errors import InputError
from sparc3_pl.model.experts import experts_modules, is_routed, open_experts, router_of
from sparc3_pl.model.identity import fingerprint
from sparc3_pl.model.loading import load_skeleton
from sparc3_pl.model.source import ModelSource
from sparc3_pl.model.structure import features, linear_layers, mlps, weight_matrix
from sparc3_pl.pruning.edit import apply_plan, pruned, revert
from sparc3_pl.pruning.save import save_pruned, save_shrunk

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
