"""Sequential Wanda against a loop that prunes a copy of the model in place, layer after layer, one sample at a time."""

import copy

import pytest
import torch
from tiny_models import tiny

from sparc3_pl.attribution.methods import Options
from sparc3_pl.attribution.scorers import Scorer
from sparc3_pl.attribution.sequential import Blocks, Sparsity
from sparc3_pl.data.batches import ReferenceBatch
from sparc3_pl.errors import InputError
from sparc3_pl.model.structure import linear_layers, output_head
from sparc3_pl.scoring.module import ScoringModule

LENGTHS = (9, 4, 6, 2, 7)
LISTS = {"llama": "model.layers", "opt": "model.decoder.layers", "gpt2": "transformer.h"}


def samples_of(model):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, model.config.vocab_size, (length,), generator=generator) for length in LENGTHS]


def padded(samples):
    input_ids = torch.zeros(len(samples), max(map(len, samples)), dtype=torch.int64)
    mask = torch.zeros_like(input_ids)
    for row, sample in enumerate(samples):
        input_ids[row, : len(sample)], mask[row, : len(sample)] = sample, 1
    return ReferenceBatch(input_ids, mask)


def matrix(module):
    """``[out, in]``, written by hand: GPT-2's maps keep ``[in, out]``."""
    return module.weight.data.T if type(module).__name__ == "Conv1D" else module.weight.data


def remove(scores, sparsity):
    """The lowest of every row, or of every m of it, by a stable sort of each."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    for row, values in enumerate(scores):
        if ":" in sparsity:
            kept, of = map(int, sparsity.split(":"))
            groups = [list(range(start, start + of)) for start in range(0, len(values), of)]
            count = of - kept
        else:
            groups, count = [list(range(len(values)))], int(len(values) * float(sparsity))
        for group in groups:
            mask[row, sorted(group, key=lambda i: float(values[i]))[:count]] = True
    return mask


@torch.no_grad()
def slow(model, samples, sparsity):
    """By layer its scores and what is removed: whole passes of a copy, pruned in place, show what a layer reads."""
    model = copy.deepcopy(model)
    inputs, scores, masks = {}, {}, {}

    def see(names):
        handles = [
            model.get_submodule(name).register_forward_pre_hook(
                lambda _, args, name=name: inputs.setdefault(name, []).append(args[0].reshape(-1, args[0].shape[-1]))
            )
            for name in names
        ]
        for sample in samples:
            model(input_ids=sample[None])
        for handle in handles:
            handle.remove()
        for name in names:
            norms = torch.cat(inputs[name]).double().norm(dim=0)
            scores[name] = matrix(model.get_submodule(name)).double().abs() * norms

    prefix = LISTS[model.config.model_type]
    for number in range(len(model.get_submodule(prefix))):
        names = [name for name in linear_layers(model) if name.startswith(f"{prefix}.{number}.")]
        see(names)
        for name in names:
            masks[name] = remove(scores[name], sparsity)
            matrix(model.get_submodule(name))[masks[name]] = 0
    see([name for name in linear_layers(model) if name not in masks])  # the head, and OPT's projections
    return scores, masks


@pytest.mark.parametrize("sparsity", ["0.5", "2:4"])
@pytest.mark.parametrize("family", LISTS)
def test_scores_and_masks_equal_a_loop_over_layers(family, sparsity):
    model = tiny(family).eval().requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    samples = samples_of(model)
    scorer = Scorer(model, "wanda", "weight", ["*"], options=Options(sequential=sparsity))
    for part in (samples[:2], samples[2:]):
        scorer.update(padded(part))
    scorer.finish()
    want, masks = slow(model, samples, sparsity)
    assert set(scorer.layers) == set(want)
    assert output_head(model)[0] not in masks
    for name in scorer.layers:
        scores = scorer.scores(name, len(samples)).scores
        torch.testing.assert_close(scores, want[name].float(), rtol=1e-4, atol=1e-6)
        if name in masks:
            assert torch.equal(Sparsity.of(sparsity).lowest(scores), masks[name])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    plain = Scorer(model, "wanda", "weight", ["*"])  # it makes a difference: all but the first layer see other inputs
    plain.update(padded(samples))
    last = list(masks)[-1]
    assert not torch.equal(Sparsity.of(sparsity).lowest(plain.scores(last, 5).scores), masks[last])


def test_the_model_is_put_back_after_a_crash(monkeypatch):
    model = tiny("llama").eval().requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    scorer = Scorer(model, "wanda", "weight", ["*"], options=Options(sequential="0.5"))
    scorer.update(padded(samples_of(model)))
    inner, calls = Blocks._called, []

    def fails(self, number, batch):
        calls.append(number)
        if calls == [0, 0]:  # the first layer is pruned by now
            assert not torch.equal(
                model.model.layers[0].mlp.up_proj.weight, before["model.layers.0.mlp.up_proj.weight"]
            )
            raise RuntimeError("stop")
        return inner(self, number, batch)

    monkeypatch.setattr(Blocks, "_called", fails)
    with pytest.raises(RuntimeError, match="stop"):
        scorer.finish()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("value", ["0", "1", "1.5", "-0.5", "half", "4:4", "0:4", "124.0", ""])
def test_what_is_neither_a_share_nor_a_pattern(value):
    with pytest.raises(InputError, match=r"model\.sequential=.*: give a share between 0 and 1"):
        Sparsity.of(value)


def test_what_cannot_be_pruned_so():
    model = tiny("llama").eval().requires_grad_(False)
    batch = padded(samples_of(model))
    for layers, sparsity, message in [
        (["lm_head"], "0.5", "no layer of model.targets lies in a decoder layer"),
        (["*.up_proj"], "3:7", "are not a multiple of 7; leave the layer out"),
        (["*.up_proj"], "0.01", "is less than 1; raise it"),
    ]:
        with pytest.raises(InputError, match=message):
            Scorer(model, "wanda", "weight", layers, options=Options(sequential=sparsity)).update(batch)
    model.model.layers = torch.nn.Sequential(*model.model.layers)
    with pytest.raises(InputError, match=r"model\.sequential: .* no list of decoder layers .*; leave it out"):
        Scorer(model, "wanda", "weight", ["*"], options=Options(sequential="0.5")).update(batch)
    for method, kind in [("lrp", "weight"), ("wanda", "neuron")]:
        with pytest.raises(InputError, match=r"model\.sequential=0\.5 has no effect on"):
            Scorer(model, method, kind, options=Options(sequential="0.5"))


def test_what_does_not_go_with_it_is_refused_before_a_model_is_loaded():
    asked = {"method": "wanda", "granularity": "weight", "sequential": 0.5, "output": "scores"}
    with pytest.raises(InputError, match=r"model\.sequential=0\.5: .* leave out part"):
        ScoringModule(**asked, part="1/2")
    with pytest.raises(InputError, match=r"leave out model\.checkpoint_every"):
        ScoringModule(**asked, checkpoint_every=2)
    with pytest.raises(InputError, match=r"model\.sequential=50: give a share"):
        ScoringModule(**asked | {"sequential": 50})
