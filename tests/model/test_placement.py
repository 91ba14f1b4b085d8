"""Weights that lie elsewhere than in their module: offloaded to the host or a disk, or shared out over ranks."""

from dataclasses import replace
from pathlib import Path

import accelerate
import pytest
import torch
import torch.distributed as dist
from plans import plan_for, same_bits, state, weight_plan_for
from tiny_models import tiny, tokens
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from sparc3_pl.attribution.methods import Options
from sparc3_pl.attribution.scorers import Scorer
from sparc3_pl.circuit.ablation import masked_weights
from sparc3_pl.circuit.components import Candidates
from sparc3_pl.data.batches import ReferenceBatch
from sparc3_pl.errors import InputError
from sparc3_pl.model.components import Weight
from sparc3_pl.model.experts import experts_modules
from sparc3_pl.model.fsdp import shard
from sparc3_pl.model.identity import fingerprint, named_values
from sparc3_pl.model.loading import load_model
from sparc3_pl.model.placement import put_values
from sparc3_pl.model.source import ModelSource
from sparc3_pl.pruning.edit import pruned
from sparc3_pl.pruning.edits import mean_activations

IDS = tokens(2, 9)


def on_disk(model: torch.nn.Module, folder: Path):
    """The model as ``device_map`` loads it with its second decoder layer left on the disk."""
    model.save_pretrained(folder)
    layer = next(n for n, m in model.named_modules() if isinstance(m, torch.nn.ModuleList)) + ".1"
    rest = {n: "cpu" for n, m in model.named_modules() if not list(m.children()) and not n.startswith(f"{layer}.")}
    rest |= {n: "cpu" for n in experts_modules(model) if not n.startswith(f"{layer}.")}
    loaded = load_model(ModelSource(str(folder), device_map=rest | {layer: "disk"}))
    assert any(parameter.is_meta for parameter in loaded.parameters())
    return loaded


def on_host(model: torch.nn.Module, folder: Path):
    """The model with all its weights in the host's memory, of where each is fetched when its module runs."""
    accelerate.cpu_offload(model, execution_device="cpu")
    assert all(parameter.is_meta for parameter in model.parameters())
    return model


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(IDS).logits


def plans(model):
    """A plan of every kind of edit that the model permits."""
    layer = next(iter(plan_for(model).counts()))
    yield plan_for(model)
    yield plan_for(model, edit="scale", alpha=0.5)
    yield weight_plan_for(model, layer, [0, 5, 17])
    gains, factors = plan_for(model, edit="gains"), torch.tensor([0.0, 0.3, 1.7], dtype=torch.float64)
    yield replace(gains, entries={name: replace(one, factor=factors) for name, one in gains.entries.items()})
    if model.config.model_type == "gpt2":
        yield plan_for(model, edit="mean", means=mean_activations(model, [(IDS, torch.ones_like(IDS))]))


@pytest.mark.parametrize("offloaded", [on_disk, on_host])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "qwen3_moe"])
def test_edits_of_an_offloaded_model_are_those_of_a_whole_one(family, offloaded, tmp_path):
    """In force, to the bit; and afterwards every value is as it was. qwen2's output head is tied."""
    whole, away = tiny(family).requires_grad_(False), offloaded(tiny(family), tmp_path)
    assert fingerprint(away) == fingerprint(whole)
    before = {name: value.clone() for name, value in named_values(away)}
    assert same_bits(before, {name: value for name, value in state(whole).items() if name in before})
    plain = logits(whole)
    assert torch.equal(logits(away), plain)
    for plan in plans(whole):
        with pruned(whole, plan), pruned(away, plan):
            edited = logits(whole)
            assert not torch.equal(edited, plain)
            assert torch.equal(logits(away), edited)
            assert fingerprint(away) == fingerprint(whole)
        assert same_bits(dict(named_values(away)), before)
        assert torch.equal(logits(away), plain)


def test_a_tied_weight_that_is_offloaded_is_refused(tmp_path):
    """The embedding has a copy of its own there, which would stay as it is."""
    away = on_host(tiny("qwen2"), tmp_path)
    plan = weight_plan_for(away, "lm_head", [3])
    with pytest.raises(InputError, match=r"lm_head shares its weight with model\.embed_tokens"), pruned(away, plan):
        pass


def test_what_is_offloaded_in_an_unknown_way_is_refused(tiny_llama):
    plan = plan_for(tiny_llama)
    tiny_llama.model.layers[0].mlp.up_proj.to("meta")
    with pytest.raises(InputError, match="offloaded in a way that is not known"), pruned(tiny_llama, plan, False):
        pass


def test_single_weights_of_an_offloaded_model_are_ablated(tmp_path):
    whole, away = tiny("llama").requires_grad_(False), on_disk(tiny("llama"), tmp_path)
    candidates = Candidates.of(whole, {"weight": Weight()}, ["*.down_proj"])
    kept = torch.arange(candidates.count) % 3 == 0
    with torch.no_grad(), masked_weights(whole, candidates, kept), masked_weights(away, candidates, kept):
        assert torch.equal(logits(away), logits(whole))
    assert torch.equal(logits(away), logits(tiny("llama")))


SCORES = {
    "lrp": ("lrp", "neuron", {}),
    "signed": ("gradient", "neuron", {"signed": True}),
    "weights": ("lrp", "weight", {}),
    "heads": ("gradient", "head", {}),
    "wanda": ("wanda", "weight", {}),
    "magnitude": ("magnitude", "weight", {}),
    "activation": ("activation", "neuron", {}),
    "integrated": ({"class_path": "integrated_gradients", "init_args": {"steps": 2}}, "channel", {"signed": True}),
}


@pytest.mark.parametrize("offloaded", [on_disk, on_host])
@pytest.mark.parametrize("case", SCORES)
def test_scores_of_an_offloaded_model_are_those_of_a_whole_one(case, offloaded, tmp_path):
    method, component, options = SCORES[case]
    fields = {"counterfactual_ids": tokens(2, 9, seed=1), "answer": torch.tensor([7, 8]), "foil": torch.tensor([9, 9])}
    batch = ReferenceBatch(IDS, torch.ones_like(IDS), fields=fields)
    target = "answer" if case == "integrated" else "predicted"
    whole, away = tiny("llama").requires_grad_(False), offloaded(tiny("llama"), tmp_path)
    scorers = [Scorer(model, method, component, None, target, Options(**options)) for model in (whole, away)]
    for scorer in scorers:
        scorer.update(batch)
        scorer.finish()
    for name in scorers[0].layers:
        want, got = (scorer.scores(name, 2).scores for scorer in scorers)
        assert want.abs().sum() > 0
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)


def test_a_rank_keeps_its_part_of_what_is_written():
    """The last of three ranks: of 24 rows 8, of the 50 of the head 16."""
    dist.init_process_group("fake", store=FakeStore(), rank=2, world_size=3)
    try:
        model = tiny("llama").requires_grad_(False)
        shard(model, init_device_mesh("cpu", (3,)))
        for layer, rows in ((model.model.layers[1].mlp.up_proj, 8), (model.lm_head, 16)):
            values = torch.randn(layer.weight.shape)
            put_values(layer, "weight", values)
            assert torch.equal(layer.weight.to_local(), values[-rows:])
    finally:
        dist.destroy_process_group()


def test_edits_of_a_sharded_model_are_taken_back_bit_for_bit():
    model, plain = tiny("gpt2").requires_grad_(False), logits(tiny("gpt2"))
    every = list(plans(model))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        shard(model, init_device_mesh("cpu", (1,)))
        before = {name: value.clone() for name, value in named_values(model)}
        for plan in every:
            whole = tiny("gpt2").requires_grad_(False)
            with pruned(model, plan), pruned(whole, plan):
                torch.testing.assert_close(logits(model), logits(whole))
                assert fingerprint(model) == fingerprint(whole)
            assert same_bits(dict(named_values(model)), before)
        assert torch.equal(logits(model), plain)
    finally:
        dist.destroy_process_group()
