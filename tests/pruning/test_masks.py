"""Plans of many weights are bit masks: they do, bit for bit, what the same weights listed by index do."""

import dataclasses
import json

import lightning.pytorch as pl
import pytest
import torch
from plans import same_bits, state, weight_plan_for
from safetensors.torch import load_file, save_file
from tiny_models import tiny, tokens
from torch.utils.data import DataLoader

from sparc3_pl.errors import InputError
from sparc3_pl.io.files import sha256_of_file
from sparc3_pl.model.bitmask import BitMask
from sparc3_pl.model.structure import linear_layers
from sparc3_pl.pruning.callback import PruningCallback
from sparc3_pl.pruning.edit import apply_plan, pruned, revert
from sparc3_pl.pruning.plan import Entries, PrunePlan


def both_forms(model, **fields):
    """The same third of the weights of two layers, listed and as masks; the first layer's weight is no even number."""
    generator = torch.Generator().manual_seed(0)
    plans = []
    for layer in [name for name in linear_layers(model) if "head" not in name][:2]:
        size = dict(model.named_modules())[layer].weight.numel()
        chosen = torch.rand(size, generator=generator) < 1 / 3
        plans.append((layer, chosen))
    listed = weight_plan_for(model, plans[0][0], [0], **fields)
    shapes = {layer: weight_plan_for(model, layer, [0]).shapes[layer] for layer, _ in plans}
    by_index = {layer: Entries(chosen.nonzero().flatten().int()) for layer, chosen in plans}
    by_mask = {layer: Entries.of_weights(BitMask.of(chosen)) for layer, chosen in plans}
    assert all(entries.mask is not None for entries in by_mask.values())
    return (dataclasses.replace(listed, entries=entries, shapes=shapes) for entries in (by_index, by_mask))


@pytest.mark.parametrize("fields", [{}, {"edit": "scale", "alpha": -0.5}])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])  # gpt2 keeps its matrices the other way round
def test_does_what_a_list_of_indices_does(architecture, fields, tmp_path):
    model = tiny(architecture)
    listed, masked = both_forms(model, **fields)
    masked = PrunePlan.load(masked.save(tmp_path / "plan.json"))
    assert (masked.num_weights, masked.counts()) == (listed.num_weights, listed.counts())
    before = state(model)
    with pruned(model, listed) as applied:
        expected, old_values = state(model), applied.old_values
    assert not same_bits(before, expected)
    with pruned(model, masked) as applied:
        assert same_bits(state(model), expected)
        assert all(torch.equal(applied.old_values[key], old_values[key]) for key in old_values)
    assert same_bits(state(model), before)


def test_values_are_kept_only_when_they_are_asked_for():
    model = tiny("llama")
    listed, masked = both_forms(model)
    with pruned(model, listed):
        expected = state(model)
    applied = apply_plan(model, masked, keep=False)
    assert same_bits(state(model), expected)
    with pytest.raises(InputError, match="were not kept"):
        applied.revert()


def test_a_saved_model_gets_its_values_back(tmp_path):
    from sparc3_pl.selection.command import _with_kept_values

    model = tiny("llama")
    before = state(model)
    _, masked = both_forms(model)
    plan = PrunePlan.load(_with_kept_values(masked, model).save(tmp_path / "plan.json"))
    apply_plan(model, plan)
    revert(model, plan)
    assert same_bits(state(model), before)


def test_the_smaller_form_is_written(tmp_path):
    few = Entries.of_weights(BitMask.of(torch.arange(640) < 20))
    many = Entries.of_weights(BitMask.of(torch.arange(640) < 21))  # one bit for 640, 32 bits for each of 20
    assert few.mask is None and few.index.tolist() == list(range(20)) and few.index.dtype == torch.int32
    assert many.mask is not None and many.indices.tolist() == list(range(21))
    _, masked = both_forms(tiny("llama"))
    masked.save(tmp_path / "p.json")
    assert {path.name for path in tmp_path.iterdir()} == {"p.json", "p.masks.safetensors"}
    tensors = load_file(tmp_path / "p.masks.safetensors")
    assert {bits.dtype for bits in tensors.values()} == {torch.uint8}
    sizes = {layer: shape[0] * shape[1] for layer, shape in masked.shapes.items()}
    assert {layer: len(bits) for layer, bits in tensors.items()} == {name: -(-n // 8) for name, n in sizes.items()}


def rewritten(path, tensors):
    """The plan with another mask file, as by someone who also changes the digest."""
    file = path.with_name("p.masks.safetensors")
    save_file(tensors, file)
    data = json.loads(path.read_text())
    data.pop("sha256", None)
    data["files"]["masks"]["sha256"] = sha256_of_file(file)
    path.write_text(json.dumps(data))


def test_no_file_of_the_plan_before_is_left_behind(tmp_path):
    model = tiny("llama")
    listed, masked = both_forms(model)
    (tmp_path / "plan.other.safetensors").write_bytes(b"mine")
    for plan, kind in ((masked, "masks"), (listed, "weights"), (masked, "masks")):
        plan.save(tmp_path / "plan.json", overwrite=True)
        assert {path.name for path in tmp_path.iterdir()} == {
            "plan.json", f"plan.{kind}.safetensors", "plan.other.safetensors"
        }  # fmt: skip
        assert PrunePlan.load(tmp_path / "plan.json").counts() == masked.counts()


def test_damaged_masks_are_refused(tmp_path):
    _, masked = both_forms(tiny("llama"))
    path, file = masked.save(tmp_path / "p.json"), tmp_path / "p.masks.safetensors"
    tensors, data = load_file(file), file.read_bytes()
    layer = next(iter(tensors))
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(InputError, match="does not match the sha256"):
        PrunePlan.load(path)
    rewritten(path, tensors | {layer: tensors[layer][:-1].clone()})
    with pytest.raises(InputError, match=rf"mask of layer {layer} is \d+ bytes long where \d+ belong"):
        PrunePlan.load(path)
    rewritten(path, tensors | {layer: torch.zeros_like(tensors[layer])})
    with pytest.raises(InputError, match="shows no weight"):
        PrunePlan.load(path)
    flipped = tensors[layer].clone()
    flipped[0] ^= 1
    rewritten(path, tensors | {layer: flipped})
    with pytest.raises(InputError, match=r"num_weights=\d+, but \d+ weights"):
        PrunePlan.load(path)
    file.unlink()
    with pytest.raises(InputError, match="is missing"):
        PrunePlan.load(path)


class Module(pl.LightningModule):
    def __init__(self, layer: str) -> None:
        super().__init__()
        self.model, self.layer, self.seen = tiny("llama"), layer, []

    def training_step(self, batch, *_):
        self.seen.append(self.model.get_submodule(self.layer).weight.detach().clone())
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.1)


def test_masked_weights_stay_zero_while_the_rest_is_trained():
    _, plan = both_forms(tiny("llama"))
    layer = next(iter(plan.entries))
    module = Module(layer)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", callbacks=[PruningCallback(plan)], **options)
    trainer.fit(module, DataLoader(tokens(4, 6), batch_size=1))
    removed = plan.entries[layer].mask.unpacked().view(plan.shapes[layer])
    assert len(module.seen) == 4
    assert all((weight[removed] == 0).all() for weight in module.seen)
    assert not torch.equal(module.seen[0], module.seen[-1])
