"""What is remembered of a model's structure goes with the model, and with the structure."""

import gc
import weakref

import torch
from tiny_models import tiny
from torch import nn

from sparc3_pl.model.attention_components import Head
from sparc3_pl.model.components import WholeMLP
from sparc3_pl.model.heads import attentions
from sparc3_pl.model.structure import mlps


def test_one_look_for_all_layers(monkeypatch):
    model, forwards = tiny("phi3"), []  # one fused map: which rows are whose is seen in a forward pass
    model.model.register_forward_pre_hook(lambda *_: forwards.append(1))
    head = Head()
    for group in head.groups(model):
        head.parts(model, group.layer, torch.tensor([0]))
    assert len(forwards) == 1


def test_another_structure_is_looked_at_again():
    model = tiny("llama", num_hidden_layers=3)
    assert len(mlps(model)) == len(attentions(model)) == 3
    model.model.layers = nn.ModuleList(list(model.model.layers)[:2])
    assert len(mlps(model)) == len(attentions(model)) == 2
    smaller = nn.Linear(32, 20), nn.Linear(32, 20), nn.Linear(20, 32)
    mlp = model.model.layers[1].mlp
    mlp.gate_proj, mlp.up_proj, mlp.down_proj = smaller
    assert [block.width for block in mlps(model)] == [24, 20]
    mlps(model).clear()
    assert len(mlps(model)) == 2, "a caller has emptied what is remembered"


def test_the_memory_keeps_no_model():
    model = tiny("phi3")
    WholeMLP().groups(model)
    Head().groups(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
