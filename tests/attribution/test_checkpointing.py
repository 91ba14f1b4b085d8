"""Activation checkpointing: the same scores, nothing left behind."""

import pytest
import torch
from tiny_models import tokens

from sparc3_pl.attribution.checkpointing import checkpointed
from sparc3_pl.errors import InputError
from sparc3_pl.families import linear_layers, select_layers
from sparc3_pl.scoring import build_scorer


@pytest.mark.parametrize("method", ["lrp", "gradient"])
@pytest.mark.parametrize(("granularity", "targets"), [("weight", ["*"]), ("neuron", None)])
def test_same_scores(tiny_model, method, granularity, targets):
    tiny_model.requires_grad_(False)
    layers = select_layers(tiny_model, targets)
    batch = tokens(2, 9), torch.ones(2, 9, dtype=torch.int64)
    scorers = [build_scorer(layers, method, granularity, gradient_checkpointing=on) for on in (False, True)]
    first, second = (scorer.update(tiny_model, *batch) for scorer in scorers)
    for name in layers:
        torch.testing.assert_close(scorers[1].scores(name, 2), scorers[0].scores(name, 2), rtol=1e-6, atol=0)
    torch.testing.assert_close(second.relevance, first.relevance)


def kept_bytes(model, checkpointing):
    """Bytes that the graph holds when the backward pass begins."""
    held = {}

    def pack(tensor):
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    scorer = build_scorer(linear_layers(model), "gradient", "neuron", gradient_checkpointing=checkpointing)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        scorer.update(model, tokens(1, 60), torch.ones(1, 60, dtype=torch.int64))
    return sum(held.values())


def test_less_is_kept(tiny_llama):
    """Inside a checkpointed layer its own hooks are innermost, so that what is counted is what outlives the layer."""
    tiny_llama.requires_grad_(False)
    assert kept_bytes(tiny_llama, checkpointing=True) < kept_bytes(tiny_llama, checkpointing=False) / 2


def test_leaves_no_trace(tiny_llama):
    before = [vars(layer).keys() - {"_modules"} for layer in tiny_llama.model.layers]

    def crash():
        with checkpointed(tiny_llama):
            assert all("forward" in vars(layer) for layer in tiny_llama.model.layers)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        crash()
    assert [vars(layer).keys() - {"_modules"} for layer in tiny_llama.model.layers] == before


def test_a_model_without_layers_is_refused():
    class Bare(torch.nn.Module):
        def get_decoder(self):
            return torch.nn.Linear(2, 2)

    with pytest.raises(InputError, match="no layers that can be run again"), checkpointed(Bare()):
        pass
