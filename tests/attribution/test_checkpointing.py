"""Activation checkpointing: the same scores, nothing left behind."""

import pytest
import torch
from tiny_models import tokens

from sparc3_pl.attribution.checkpointing import checkpointed
from sparc3_pl.attribution.methods import Options
from sparc3_pl.attribution.scorers import Scorer
from sparc3_pl.data.batches import ReferenceBatch
from sparc3_pl.errors import InputError


@pytest.mark.parametrize("method", ["lrp", "gradient"])
@pytest.mark.parametrize(("granularity", "targets"), [("weight", ["*"]), ("neuron", None)])
def test_same_scores(tiny_model, method, granularity, targets):
    tiny_model.requires_grad_(False)
    batch = ReferenceBatch(tokens(2, 9), torch.ones(2, 9, dtype=torch.int64))
    options = [Options(gradient_checkpointing=on) for on in (False, True)]
    scorers = [Scorer(tiny_model, method, granularity, targets, options=one) for one in options]
    first, second = (scorer.update(batch) for scorer in scorers)
    for name in scorers[0].layers:
        plain, again = (scorer.scores(name, 2).scores for scorer in scorers)
        torch.testing.assert_close(again, plain, rtol=1e-6, atol=0)
    torch.testing.assert_close(second.relevance, first.relevance)


def kept_bytes(model, checkpointing):
    """Bytes that the graph holds when the backward pass begins."""
    held = {}

    def pack(tensor):
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    scorer = Scorer(model, "gradient", "neuron", ["*"], options=Options(gradient_checkpointing=checkpointing))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        scorer.update(ReferenceBatch(tokens(1, 60), torch.ones(1, 60, dtype=torch.int64)))
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
