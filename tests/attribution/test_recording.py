"""What the backward pass shows of a layer, against the products that it stands for."""

from dataclasses import replace

import pytest
import torch
from tiny_models import tiny

from sparc3_pl.attribution.checkpointing import checkpointed
from sparc3_pl.attribution.recording import LayerPass, recording
from sparc3_pl.model.structure import mlps


def passes_of(model, layers, with_dx, backward_passes=1):
    """Passes of a batch of two samples of five tokens, in the order in which they are shown."""
    ids = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]])
    shown: list[LayerPass] = []
    with recording({name: model.get_submodule(name) for name in layers}, tuple(ids.shape), shown.append, with_dx):
        for _ in range(backward_passes):
            model(input_ids=ids, use_cache=False).logits[..., 3].sum().backward()
    return shown


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("again", [False, True])
def test_the_gradient_at_the_input_is_that_at_the_output_times_the_weight(family, again):
    model = tiny(family, dtype=torch.float64).requires_grad_(False)
    downs = [mlp.down for mlp in mlps(model)]
    if again:
        with checkpointed(model):
            passes = passes_of(model, downs, downs, backward_passes=2)
    else:
        passes = passes_of(model, downs, downs, backward_passes=2)
    assert [layer.name for layer in passes] == downs[::-1] * 2
    for layer in passes:
        if layer.name == downs[0]:  # the graph begins at its output
            assert layer.dx_BTI is None
            continue
        torch.testing.assert_close(layer.dx_BTI, layer.delta_BTO @ layer.weight_OI, rtol=1e-12, atol=1e-15)
        assert layer.dx_BTI.abs().max() > 0
        assert layer.transposed().units_BTO is layer.dx_BTI
        assert torch.equal(layer.first(1).dx_BTI, layer.dx_BTI[:1])


def test_a_layer_that_shares_its_input_is_shown_its_own_part_of_the_gradient():
    model = tiny("llama", dtype=torch.float64).requires_grad_(False)
    one = mlps(model)[1]
    (layer,) = passes_of(model, [one.up], [one.up])
    assert layer.dx_BTI is None  # nothing below carries a gradient
    below = mlps(model)[0].down
    up, _ = passes_of(model, [one.up, below], [one.up])
    torch.testing.assert_close(up.dx_BTI, up.delta_BTO @ up.weight_OI, rtol=1e-12, atol=1e-15)


def test_another_gradient_or_input_makes_it_anew():
    model = tiny("llama", dtype=torch.float64).requires_grad_(False)
    downs = [mlp.down for mlp in mlps(model)]
    layer = passes_of(model, downs, downs)[0]
    assert layer.dx_BTI is not None
    other = replace(layer, delta_BTO=2 * layer.delta_BTO)
    assert other.dx_BTI is None
    torch.testing.assert_close(other.transposed().units_BTO, 2 * layer.dx_BTI, rtol=1e-12, atol=1e-15)
    assert replace(layer, x_BTI=layer.x_BTI + 1).dx_BTI is None


def test_nobody_gets_it_who_did_not_ask():
    model = tiny("llama").requires_grad_(False)
    downs = [mlp.down for mlp in mlps(model)]
    assert all(layer.dx_BTI is None for layer in passes_of(model, downs, ()))
    for name in downs:
        module = model.get_submodule(name)
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
