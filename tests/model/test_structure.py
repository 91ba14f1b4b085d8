import pytest
import torch
from tiny_models import FAMILIES, MORE_FAMILIES, VARIANTS, tiny, tokens, variant
from torch import nn

from sparc3_pl.errors import InputError
from sparc3_pl.model.structure import (
    decoder,
    features,
    is_linear,
    linear_layers,
    mlps,
    output_head,
    select_layers,
    weight_matrix,
)

EVERYTHING = [*FAMILIES, *MORE_FAMILIES, *VARIANTS]

UP = {
    "llama": "model.layers.{}.mlp.up_proj",
    "gpt2": "transformer.h.{}.mlp.c_fc",
    "opt": "model.decoder.layers.{}.fc1",
    "gpt_neox": "gpt_neox.layers.{}.mlp.dense_h_to_4h",
    "phi3": "model.layers.{}.mlp.gate_up_proj",
}


@pytest.mark.parametrize("name", EVERYTHING)
def test_silencing_rows_or_column_is_silencing_the_neuron(name):
    """Functional proof of the roles: neuron i is what the down-projection reads at i."""
    model, ids = variant(name, dtype=torch.float64), tokens(2, 7)
    with torch.no_grad():
        plain = model(ids).logits
        for mlp in mlps(model):
            index = 5
            want = _without_neuron(model, mlp, index, ids)
            assert not torch.allclose(want, plain)
            layer, column = mlp.column(index)
            for entries in ([(layer, (slice(None), column))], [(layer, row) for layer, row in mlp.rows(index)]):
                torch.testing.assert_close(_with_zeros(model, entries, ids), want, rtol=0, atol=1e-12)


def _without_neuron(model, mlp, index, ids):
    def zero(module, args):
        x = args[0].clone()
        x[..., index] = 0
        return (x,)

    handle = model.get_submodule(mlp.down).register_forward_pre_hook(zero)
    logits = model(ids).logits
    handle.remove()
    return logits


def _with_zeros(model, entries, ids):
    before = {name: p.clone() for name, p in model.named_parameters()}
    for name, entry in entries:
        layer = model.get_submodule(name)
        weight_matrix(layer)[entry] = 0
        if isinstance(entry, int) and layer.bias is not None:
            layer.bias[entry] = 0
    logits = model(ids).logits
    for name, p in model.named_parameters():
        p.copy_(before[name])
    return logits


@pytest.mark.parametrize("name", EVERYTHING)
def test_up_rows_are_the_branch_that_no_activation_touches(name):
    """Doubling the up rows (and their biases) of a gated MLP doubles what the down-projection reads."""
    model, ids = variant(name, dtype=torch.float64), tokens(1, 5)
    mlp = mlps(model)[-1]
    assert mlp.up_rows.stop - mlp.up_rows.start == mlp.width
    assert features(model.get_submodule(mlp.up))[0] == (2 if mlp.fused else 1) * mlp.width
    if mlp.gated:
        with torch.no_grad():
            before, layer = _read_by_down(model, mlp, ids), model.get_submodule(mlp.up)
            weight_matrix(layer)[mlp.up_rows] *= 2
            if layer.bias is not None:
                layer.bias[mlp.up_rows] *= 2
            torch.testing.assert_close(_read_by_down(model, mlp, ids), 2 * before)


def _read_by_down(model, mlp, ids):
    seen = []
    handle = model.get_submodule(mlp.down).register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    model(ids)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("family", UP)
def test_up_projections_by_name(family):
    model = tiny(family)
    want = [UP[family].format(i) for i in range(2)]
    assert list(select_layers(model, None)) == want
    assert [mlp.width for mlp in mlps(model)] == [24, 24]
    assert mlps(model)[0].fused == (family == "phi3")
    assert (mlps(model)[0].gate is not None) == (family == "llama")


def test_linear_layers_in_order_head_last(tiny_model):
    layers = linear_layers(tiny_model)
    named = {n: m for n, m in tiny_model.named_modules() if is_linear(m)}
    assert layers.items() == named.items()
    name, head = output_head(tiny_model)
    assert list(layers)[-1] == name
    assert features(head)[0] == 50
    assert list(layers) == list(named)  # these nine list the head last by themselves


def test_decoder_gives_what_the_head_reads(tiny_model):
    ids, head = tokens(2, 6), output_head(tiny_model)[1]
    with torch.no_grad():
        hidden = decoder(tiny_model)(input_ids=ids).last_hidden_state
        torch.testing.assert_close(head(hidden), tiny_model(ids).logits)


def test_weight_matrix_is_a_view_out_by_in():
    model = tiny("gpt2")
    layer = model.transformer.h[0].mlp.c_fc
    view = weight_matrix(layer)
    assert view.shape == (24, 32)
    with torch.no_grad():
        view[3, 4] = 7.0
    assert layer.weight[4, 3] == 7.0


def test_weight_matrix_refuses_quantised_weights():
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(InputError, match="unquantised"):
        weight_matrix(layer)


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("*.up_porj", r"nearest: \*\.up_proj$"),
        ("model.layers.9.mlp.up_proj", "nearest: model.layers.1.mlp.up_proj"),
        ("*.c_fc", r"\*\.q_proj.*\*\.down_proj, lm_head$"),
    ],
)
def test_unmatched_pattern_names_the_nearest(pattern, hint):
    with pytest.raises(InputError, match=hint):
        select_layers(tiny("llama"), ["*.down_proj", pattern])


def test_select_layers_keeps_order_and_takes_each_once():
    model = tiny("llama")
    names = list(select_layers(model, ["lm_head", "*.1.mlp.*", "*.up_proj", "model.layers.1.mlp.up_proj"]))
    order = list(linear_layers(model))
    assert names == [n for n in order if n in names]
    assert len(names) == 5
    assert list(select_layers(model, ["*"])) == order
    with pytest.raises(InputError, match="empty"):
        select_layers(model, [])


def test_finding_mlps_costs_no_weights_and_leaves_no_trace():
    with torch.device("meta"):
        model = tiny("llama")
    before = {n: set(vars(m)) for n, m in model.named_modules()}
    assert mlps(model)[1].gate == "model.layers.1.mlp.gate_proj"
    assert {n: set(vars(m)) for n, m in model.named_modules()} == before


def test_gate_is_found_by_what_feeds_the_activation_not_by_its_name():
    class Crossed(nn.Module):
        def forward(self, x):
            return self.down_proj(self.gate_proj(x) * self.act_fn(self.up_proj(x)))

    model = tiny("llama")
    for layer in model.model.layers:
        layer.mlp.__class__ = Crossed
    mlp = mlps(model)[0]
    assert (mlp.gate, mlp.up) == ("model.layers.0.mlp.up_proj", "model.layers.0.mlp.gate_proj")


def test_finding_mlps_calls_no_hook(tiny_llama):
    def fail(*args):
        raise AssertionError

    for module in tiny_llama.modules():
        module.register_forward_pre_hook(fail)
    assert len(mlps(tiny_llama)) == 2


@pytest.mark.parametrize("index", [-1, 24])
def test_neuron_out_of_range(index):
    mlp = mlps(tiny("llama"))[0]
    with pytest.raises(InputError, match="from 0 to 23"):
        mlp.rows(index)
    with pytest.raises(InputError, match="from 0 to 23"):
        mlp.column(index)


def test_models_without_mlps_or_head_are_refused():
    model = tiny("llama")
    for layer in model.model.layers:
        layer.mlp = nn.Identity()
    with pytest.raises(InputError, match="no MLP found"):
        mlps(model)
    with pytest.raises(InputError, match="no linear output head"):
        output_head(tiny("llama").model)
