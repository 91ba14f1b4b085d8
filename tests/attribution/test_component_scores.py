"""Scores of components along rows and columns, against slow loops over parameter gradients in float64."""

import pytest
import torch
from tiny_models import tiny

from sparc3_pl.attribution.methods import Options
from sparc3_pl.attribution.scorers import Scorer
from sparc3_pl.attribution.soundness import padded
from sparc3_pl.data.batches import ReferenceBatch
from sparc3_pl.errors import InputError
from sparc3_pl.model.components import Component, Group
from sparc3_pl.model.structure import features, mlps, output_head, select_layers, weight_matrix

SAMPLES = [torch.arange(3, 3 + length) for length in (7, 4, 2)]


class Blocks(Component):
    """Blocks of ``width`` rows or columns of every layer that is asked for."""

    unit = "blocks"

    def __init__(self, axis="in", width=1):
        self.axis, self.width = axis, width

    def groups(self, model, patterns=None):
        sizes = {name: features(layer) for name, layer in select_layers(model, patterns).items()}
        counts = {name: (inner if self.axis == "in" else out) // self.width for name, (out, inner) in sizes.items()}
        return [Group(name, (count,), self.axis, count, self.width) for name, count in counts.items()]

    def parts(self, model, layer, index):
        raise NotImplementedError


def gradients(model, layers, sample):
    """W * G of one sample by the parameters' own gradients, ``[out, in]`` by layer."""
    model.requires_grad_(True)
    model.zero_grad()
    model(sample[None]).logits[0, -1].max().backward()
    found = {}
    for name in layers:
        module = model.get_submodule(name)
        gradient = module.weight.grad if isinstance(module, torch.nn.Linear) else module.weight.grad.T
        found[name] = (gradient * weight_matrix(module)).detach().clone()
    model.zero_grad()
    model.requires_grad_(False)
    return found


def by_loops(relevance_OI, axis, width):
    """The sum of every block, one entry after the other."""
    out, inner = relevance_OI.shape
    sums = [0.0] * ((out if axis == "out" else inner) // width)
    for o in range(out):
        for i in range(inner):
            sums[(o if axis == "out" else i) // width] += float(relevance_OI[o, i])
    return torch.tensor(sums, dtype=torch.float64)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(("axis", "width"), [("in", 1), ("in", 4), ("out", 1), ("out", 4)])
@pytest.mark.parametrize(("family", "pattern"), [("llama", "*.0.self_attn.o_proj"), ("gpt2", "*.0.mlp.c_proj")])
def test_blocks_of_rows_and_columns(family, pattern, axis, width, signed):
    model = tiny(family, dtype=torch.float64).requires_grad_(False)
    scorer = Scorer(model, "gradient", Blocks(axis, width), [pattern], options=Options(signed=signed, squares=True))
    figures = scorer.update(ReferenceBatch(*padded(SAMPLES)))
    (name,) = scorer.layers
    parts = [gradients(model, [name], sample)[name] for sample in SAMPLES]
    wanted = torch.stack([by_loops(part if signed else part.abs(), axis, width) for part in parts])
    layer = scorer.scores(name, len(SAMPLES))
    torch.testing.assert_close(layer.scores.double(), wanted.mean(0), rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(layer.squares.double(), wanted.square().mean(0), rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(figures.relevance, wanted.sum(1))


@pytest.mark.parametrize(("axis", "width"), [("in", 4), ("out", 2)])
@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_other_methods_sum_over_the_same_blocks(method, axis, width):
    model = tiny("llama").requires_grad_(False)
    blocks, weights = (Scorer(model, method, kind, ["*.o_proj"]) for kind in (Blocks(axis, width), "weight"))
    for scorer in (blocks, weights):
        scorer.update(ReferenceBatch(*padded(SAMPLES)))
    for name in blocks.layers:
        wanted = by_loops(weights.scores(name, 3).scores, axis, width).float()
        torch.testing.assert_close(blocks.scores(name, 3).scores, wanted)


def test_several_kinds_in_one_pass():
    model = tiny("llama").requires_grad_(False)

    class OutputColumns(Blocks):
        def groups(self, model, patterns=None):
            return super().groups(model, ["*.o_proj"])

    both, neurons, columns = (
        Scorer(model, "lrp", kinds) for kinds in (["neuron", OutputColumns()], "neuron", OutputColumns())
    )
    batch = ReferenceBatch(*padded(SAMPLES))
    relevance = [scorer.update(batch).relevance for scorer in (both, neurons, columns)]
    torch.testing.assert_close(relevance[0], relevance[1] + relevance[2])
    assert list(both.layers) == [*neurons.layers, *columns.layers]
    for name in both.layers:
        alone = neurons if name in neurons.layers else columns
        torch.testing.assert_close(both.scores(name, 3).scores, alone.scores(name, 3).scores)
    with pytest.raises(InputError, match="two kinds of component are scored at layer"):
        Scorer(model, "lrp", ["neuron", "weight"])


# --- fused maps -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("family", ["phi3", "glm4"])
def test_the_gates_rows_of_a_fused_map_are_no_neurons(family, signed):
    model = tiny(family).requires_grad_(False)
    scorer = Scorer(model, "gradient", options=Options(signed=signed))
    figures = scorer.update(ReferenceBatch(*padded(SAMPLES)))
    up = {mlp.up: mlp for mlp in mlps(model)}
    wanted = []
    for sample in SAMPLES:
        parts = gradients(model, up, sample)
        rows = {name: (part if signed else part.abs()).sum(1) for name, part in parts.items()}
        wanted.append(sum(float(rows[name][mlp.width :].sum()) for name, mlp in up.items()))
    torch.testing.assert_close(figures.relevance, torch.tensor(wanted, dtype=torch.float64), rtol=1e-4, atol=1e-5)


def test_what_is_not_finite_in_a_gates_row_stops_the_run():
    model = tiny("phi3").requires_grad_(False)
    with torch.no_grad():
        model.get_submodule(mlps(model)[1].up).weight[0, 0] = torch.inf
    with pytest.raises(InputError, match="NaN or infinite"):
        Scorer(model, "gradient").update(ReferenceBatch(*padded(SAMPLES)))


# --- what a method ignores --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "component", "options"),
    [
        ("lrp", "weight", {"signed": True}),
        ("gradient", "weight", {"squares": True}),
        ("lrp", "weight", {"groups": 2}),
        ("lrp", "neuron", {"seed": 3}),
        ("gradient", "neuron", {"sums_on_host": True}),
        *(("wanda", kind, {"signed": True}) for kind in ("neuron", "weight")),
        ("wanda", "neuron", {"squares": True}),
        ("wanda", "neuron", {"groups": 2}),
        ("wanda", "weight", {"gradient_checkpointing": True}),
        ("wanda", "weight", {"sums_on_host": True}),
        ("magnitude", "neuron", {"nonfinite": "zero"}),
        ("magnitude", "weight", {"seed": 1}),
        ("random", "neuron", {"squares": True}),
    ],
)
def test_an_option_that_changes_nothing_is_refused(method, component, options):
    (name,) = options
    with pytest.raises(
        InputError, match=rf"model\.{name}=.* has no effect on scores of {component}s by method {method}"
    ):
        Scorer(tiny("llama"), method, component, options=Options(**options))


def test_the_heads_weight_stays(tiny_llama):
    """Scores along the columns of the head, whose gradient is one row, are those of the explicit gradient."""
    model = tiny_llama.requires_grad_(False)
    name, _ = output_head(model)
    scorer = Scorer(model, "gradient", Blocks("in"), [name])
    scorer.update(ReferenceBatch(*padded(SAMPLES)))
    wanted = torch.stack([gradients(model, [name], sample)[name].abs().sum(0) for sample in SAMPLES]).mean(0)
    torch.testing.assert_close(scorer.scores(name, 3).scores, wanted, rtol=1e-4, atol=1e-6)
