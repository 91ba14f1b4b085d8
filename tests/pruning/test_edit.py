"""Edits: what they write, what they leave, that they come back bit for bit, and what is refused before any of it."""

import dataclasses
from contextlib import suppress

import pytest
import torch
from plans import plan_for, same_bits, state, weight_plan_for
from tiny_models import tiny, tokens

from sparc3_pl.errors import InputError
from sparc3_pl.model.identity import ModelRecord, fingerprint
from sparc3_pl.model.structure import mlps, weight_matrix
from sparc3_pl.pruning.edit import apply_plan, pruned, revert
from sparc3_pl.pruning.edits import mean_activations
from sparc3_pl.pruning.plan import entries_of

IDS = tokens(2, 9)


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, use_cache=False).logits


def neurons_of(plan, model):
    """(mlp, neuron) of every entry."""
    by_up = {mlp.up: mlp for mlp in mlps(model)}
    return [(by_up[n.layer], n.index % by_up[n.layer].width) for n in plan.neurons]


def without_neurons(model, plan, factor: float = 0.0):
    """Logits by another road: what enters the down-projections is multiplied by ``factor`` at the neurons."""
    handles = []
    for mlp, neuron in neurons_of(plan, model):

        def hook(_, inputs, neuron=neuron):
            hidden = inputs[0].clone()
            hidden[..., neuron] *= factor
            return (hidden,)

        handles.append(model.get_submodule(mlp.down).register_forward_pre_hook(hook))
    try:
        return logits(model)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("crash", [False, True])
def test_reverts_bit_for_bit(tiny_model, crash):
    with torch.no_grad():
        tiny_model.get_submodule(mlps(tiny_model)[0].up).weight.flatten()[:40] = -0.0
    before = state(tiny_model)
    plan = plan_for(tiny_model)
    with suppress(ZeroDivisionError), pruned(tiny_model, plan):
        assert not same_bits(state(tiny_model), before)
        if crash:
            raise ZeroDivisionError
    assert same_bits(state(tiny_model), before)


def test_zero_silences_exactly_these_neurons(tiny_model):
    plan = plan_for(tiny_model)
    expected, before = without_neurons(tiny_model, plan), state(tiny_model)
    with pruned(tiny_model, plan):
        torch.testing.assert_close(logits(tiny_model), expected, rtol=1e-5, atol=1e-5)
        after = state(tiny_model)
    assert not torch.allclose(logits(tiny_model), expected, atol=1e-3)
    count = 0
    for mlp, neuron in neurons_of(plan, tiny_model):
        for layer, row in mlp.rows(neuron):
            weight = after[f"{layer}.weight"]
            is_conv = type(tiny_model.get_submodule(layer)).__name__ == "Conv1D"
            assert not (weight[:, row] if is_conv else weight[row]).any()
            count += weight.shape[0] if is_conv else weight.shape[1]
            if f"{layer}.bias" in after:
                assert after[f"{layer}.bias"][row] == 0
                count += 1
        down = after[f"{mlp.down}.weight"]
        is_conv = type(tiny_model.get_submodule(mlp.down)).__name__ == "Conv1D"
        assert not (down[neuron] if is_conv else down[:, neuron]).any()
        count += down.shape[1] if is_conv else down.shape[0]
    changed = {name: (before[name] != after[name]) for name in before}
    tied = {id(p): name for name, p in tiny_model.named_parameters()}  # a tied weight is listed once
    assert sum(int(changed[name].sum()) for name in tied.values()) == count


def test_scale_multiplies_the_contribution(tiny_model):
    plan = plan_for(tiny_model, edit="scale", alpha=0.3)
    expected = without_neurons(tiny_model, plan, 0.3)
    with pruned(tiny_model, plan):
        torch.testing.assert_close(logits(tiny_model), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["opt", "gpt2", "gpt_neox", "llama"])
def test_mean_replaces_the_neuron_by_its_mean(family):
    """Llama's tiny model has biases in its MLPs."""
    model = tiny(family)
    mask = torch.ones_like(IDS)
    mask[1, 5:] = 0
    plan = plan_for(model, edit="mean")
    means = mean_activations(model, [(IDS, mask), (IDS[:1, :4], mask[:1, :4])])
    recorded = {}
    for mlp in mlps(model):
        down = model.get_submodule(mlp.down)
        for batch in ((IDS[0], 9), (IDS[1], 5), (IDS[0], 4)):  # one sample at a time, without padding
            store = recorded.setdefault(mlp.up, [])
            handle = down.register_forward_pre_hook(lambda _, x, s=store, m=mlp: s.append(x[0].reshape(-1, m.width)))
            with torch.no_grad():
                model(input_ids=batch[0][None, : batch[1]])
            handle.remove()
    for up, parts in recorded.items():
        torch.testing.assert_close(means[up], torch.cat(parts).mean(0), rtol=1e-4, atol=1e-5)

    handles = []
    for mlp, neuron in neurons_of(plan, model):

        def hook(_, inputs, neuron=neuron, value=means[mlp.up][neuron]):
            hidden = inputs[0].clone()
            hidden[..., neuron] = value
            return (hidden,)

        handles.append(model.get_submodule(mlp.down).register_forward_pre_hook(hook))
    expected = logits(model)
    for handle in handles:
        handle.remove()
    before = state(model)
    with pruned(model, dataclasses.replace(plan, means=means)):
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    assert same_bits(state(model), before)


def test_mean_is_refused_without_a_bias():
    model = tiny("mistral")
    with pytest.raises(InputError, match=r"needs a bias to fold the mean into, but .*down_proj has none; use zero"):
        apply_plan(model, plan_for(model, edit="mean"))


def test_mean_is_refused_without_means():
    model = tiny("opt")
    with pytest.raises(InputError, match="needs the mean activations of"):
        apply_plan(model, plan_for(model, edit="mean"))


@pytest.mark.parametrize("layer", ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.gate_proj", "lm_head"])
def test_a_neuron_of_another_layer_is_its_output_row(tiny_llama, layer):
    before = state(tiny_llama)
    with pruned(tiny_llama, plan_for(tiny_llama, [(layer, 2), (layer, 0)])):
        after = state(tiny_llama)
    for name in before:
        expected = before[name].clone()
        if name.startswith(f"{layer}."):
            expected[[0, 2]] = 0
        assert torch.equal(after[name], expected)
    assert same_bits(state(tiny_llama), before)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(("edit", "alpha"), [("zero", None), ("scale", -0.5)])
def test_weight_plan(family, edit, alpha):
    model = tiny(family)
    layer = mlps(model)[1].down
    before, matrix = state(model), weight_matrix(model.get_submodule(layer)).detach().clone()
    indices = [0, 5, 23, 24, 700]
    for i in indices:  # flat in [out, in], whatever the layout in memory
        matrix[i // matrix.shape[1], i % matrix.shape[1]] *= alpha or 0.0
    with pruned(model, weight_plan_for(model, layer, indices, edit=edit, alpha=alpha)):
        assert torch.equal(weight_matrix(model.get_submodule(layer)), matrix)
    assert same_bits(state(model), before)


def test_a_row_that_two_layers_of_the_plan_name(tiny_llama):
    """As a row of the gate and as part of a whole neuron: it is kept once, and comes back."""
    before = state(tiny_llama)
    up, gate = (f"model.layers.0.mlp.{name}_proj" for name in ("up", "gate"))
    plan = plan_for(tiny_llama, [(up, 5), (gate, 5), (gate, 2)])
    with pruned(tiny_llama, plan) as applied:
        assert applied.old_values[f"{gate}.rows"].shape == (2, 32)
        assert not tiny_llama.model.layers[0].mlp.gate_proj.weight[[2, 5]].any()
    assert same_bits(state(tiny_llama), before)


def test_rows_and_columns_of_one_matrix_cross(tiny_llama):
    """A neuron's column and an output's row of the down-projection: where they cross, both factors count."""
    mlp = mlps(tiny_llama)[0]
    plan = plan_for(tiny_llama, [(mlp.up, 3), (mlp.down, 5)], edit="scale", alpha=0.5)
    down = tiny_llama.get_submodule(mlp.down)
    before, wanted = state(tiny_llama), down.weight.detach().clone()
    wanted[:, 3] *= 0.5
    wanted[5] *= 0.5
    with pruned(tiny_llama, plan):
        torch.testing.assert_close(down.weight.detach(), wanted, rtol=0, atol=0)
    assert same_bits(state(tiny_llama), before)


def test_values_that_are_not_finite_become_zero_too(tiny_llama):
    plan = plan_for(tiny_llama, [("model.layers.0.mlp.up_proj", 3)])
    with torch.no_grad():
        tiny_llama.model.layers[0].mlp.up_proj.weight[3, 1] = torch.inf
    with pruned(tiny_llama, plan, check_fingerprint=False):
        assert not tiny_llama.model.layers[0].mlp.up_proj.weight[3].any()


def test_hold_writes_the_zeros_again(tiny_llama):
    applied = apply_plan(tiny_llama, plan_for(tiny_llama))
    zeroed = state(tiny_llama)
    with torch.no_grad():
        for parameter in tiny_llama.parameters():
            parameter += 1
    applied.hold()
    after = state(tiny_llama)
    for name in after:
        if "mlp" not in name:
            assert torch.equal(after[name], zeroed[name] + 1)
    for mlp, neuron in neurons_of(applied.plan, tiny_llama):
        assert not after[f"{mlp.down}.weight"][:, neuron].any()
        assert not after[f"{mlp.gate}.weight"][neuron].any()


def test_bfloat16_model(tiny_llama):
    plan = plan_for(tiny_llama)
    model = tiny_llama.to(torch.bfloat16)
    before = state(model)
    with pruned(model, plan):  # the fingerprint does not depend on the type the model was loaded in
        assert not same_bits(state(model), before)
    assert same_bits(state(model), before)


# --- refused before anything changes ----------------------------------------------------------------------------------


def refused(model, plan, match, **kwargs):
    before = state(model)
    with pytest.raises(InputError, match=match) as caught:
        apply_plan(model, plan, **kwargs)
    assert "\n" not in str(caught.value)
    assert same_bits(state(model), before)


def test_plan_of_another_model(tiny_llama):
    plan = plan_for(tiny("llama", seed=1))
    refused(tiny_llama, plan, r"was made for demo \(sha256:.*but this model's weights are sha256:")
    apply_plan(tiny_llama, plan, check_fingerprint=False)


def test_plan_that_is_applied_already(tiny_llama):
    plan = plan_for(tiny_llama)
    applied = apply_plan(tiny_llama, plan)
    plan = dataclasses.replace(plan, model=ModelRecord(plan.model | {"pruned_fingerprint": fingerprint(tiny_llama)}))
    refused(tiny_llama, plan, "already pruned by this plan")
    applied.revert()
    apply_plan(tiny_llama, plan)


def test_missing_layer(tiny_llama):
    plan = plan_for(tiny_llama)
    neurons = [dataclasses.replace(plan.neurons[0], layer="model.layers.7.mlp.up_proj"), *plan.neurons[1:]]
    plan = dataclasses.replace(plan, entries=entries_of(neurons), shapes={})
    refused(
        tiny_llama, plan, r"layer model.layers.7.mlp.up_proj is not in this LlamaForCausalLM \(nearest: model.layers"
    )


def test_index_out_of_range(tiny_llama):
    plan = plan_for(tiny_llama, [("model.layers.0.mlp.up_proj", 24)])
    refused(tiny_llama, dataclasses.replace(plan, shapes={}), "neuron 24 .* out of range: the layer has 24 rows")


def test_other_shape(tiny_llama):
    plan = plan_for(tiny_llama)
    shapes = {layer: [48] for layer in plan.shapes}
    refused(tiny_llama, dataclasses.replace(plan, shapes=shapes), r"has shape \[48\], but this model's has \[24\]")


def test_weight_beyond_the_layer(tiny_llama):
    plan = weight_plan_for(tiny_llama, "model.layers.0.mlp.up_proj", [24 * 32])
    refused(tiny_llama, dataclasses.replace(plan, shapes={}), "weight 768 .* out of range: the layer has 768 weights")


def test_tied_head_is_refused():
    model = tiny("qwen2")
    refused(model, plan_for(model, [("lm_head", 3)]), "lm_head shares its weight with model.embed_tokens")


def test_a_factor_beyond_the_number_format(tiny_llama):
    """Finite in itself; the weights would be infinite."""
    plan = plan_for(tiny_llama, edit="scale", alpha=1e39)
    refused(tiny_llama, plan, r"takes weights of .*down_proj beyond the range of torch.float32; use a smaller factor")


def test_a_fused_neuron_named_twice():
    model = tiny("phi3")
    up = mlps(model)[0].up
    refused(model, plan_for(model, [(up, 3), (up, 27)]), "twice, by its gate row and its up row")


# --- revert from the file ---------------------------------------------------------------------------------------------


def kept_plan(model, tmp_path, **fields):
    from sparc3_pl.pruning.plan import PrunePlan
    from sparc3_pl.selection.command import _with_kept_values

    plan = _with_kept_values(plan_for(model, **fields), model)
    return PrunePlan.load(plan.save(tmp_path / "plan.json"))


@pytest.mark.parametrize("fields", [{}, {"edit": "scale", "alpha": 0.5}], ids=["zero", "scale"])
def test_revert_in_another_process(tiny_model, tmp_path, fields):
    before = state(tiny_model)
    plan = kept_plan(tiny_model, tmp_path, **fields)
    assert same_bits(state(tiny_model), before)
    apply_plan(tiny_model, plan)
    assert not same_bits(state(tiny_model), before)
    revert(tiny_model, plan)
    assert same_bits(state(tiny_model), before)


def test_revert_is_refused_for_another_model(tiny_llama, tmp_path):
    plan = kept_plan(tiny_llama, tmp_path)
    before = state(tiny_llama)
    with pytest.raises(InputError, match="not the one that this plan pruned"):
        revert(tiny_llama, plan)
    assert same_bits(state(tiny_llama), before)
    with pytest.raises(InputError, match="make it with --keep_values"):
        revert(tiny_llama, plan_for(tiny_llama))
