"""What the doctor measures, on models whose state is known."""

import pytest
import torch
from tiny_models import tiny, tokens

from sparc3_pl.attribution.rules import attn_lrp
from sparc3_pl.attribution.soundness import (
    forward_change,
    neuron_scores,
    padded,
    padding_error,
    parameters_as,
    precision_agreement,
)


def frozen(family="llama", **options):
    return tiny(family, **options).requires_grad_(False)


def test_padded_puts_samples_at_either_end():
    samples = [torch.tensor([5, 6, 7]), torch.tensor([8])]
    ids, mask = padded(samples, "right")
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    ids, mask = padded(samples, "left")
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_scores_equal_an_explicit_loop():
    model = tiny("llama")
    samples = [tokens(1, length, seed=length)[0] for length in (7, 4)]
    found = neuron_scores(model.requires_grad_(False), *padded(samples)).scores["model.layers.0.mlp.up_proj"]
    weight = model.model.layers[0].mlp.up_proj.weight.requires_grad_()
    expected = torch.zeros_like(found)
    for sample in samples:
        with attn_lrp(model):
            logits = model(sample[None]).logits[0, -1]
        (gradient,) = torch.autograd.grad(logits.max(), weight)
        expected += (weight * gradient).abs().sum(1).detach() / 2
    torch.testing.assert_close(found, expected)


def test_a_sound_model_is_unchanged_and_padding_is_invisible(tiny_model):
    model = tiny_model.requires_grad_(False)
    samples = [tokens(1, length, seed=length)[0] for length in (9, 6, 4)]
    assert forward_change(model, *padded(samples)) == 0
    assert padding_error(model, samples, "right") < 1e-5
    assert padding_error(model, samples, "left") < 1e-5


def test_a_model_that_sees_its_padding_is_found_out(monkeypatch):
    """A decoder that takes pads for tokens reads them where they stand on the left."""
    model = frozen()
    inner = model.model.forward

    def forward(attention_mask=None, **rest):
        return inner(attention_mask=None if attention_mask is None else torch.ones_like(attention_mask), **rest)

    monkeypatch.setattr(model.model, "forward", forward)
    samples = [tokens(1, length, seed=length)[0] for length in (9, 3)]
    assert padding_error(model, samples, "left") > 0.01


def test_nonfinite_relevance_is_counted_by_layer():
    model = frozen()
    model.model.layers[1].mlp.up_proj.weight.data[3, 2] = torch.inf
    found = neuron_scores(model, *padded([tokens(1, 5)[0]]))
    assert found.nonfinite["model.layers.1.mlp.up_proj"] > 0
    assert found.flat.isfinite().all()


@pytest.mark.parametrize("crash", [False, True])
def test_parameters_come_back_bit_for_bit(crash):
    model = frozen()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        with parameters_as(model, torch.bfloat16):
            assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
            assert model.model.rotary_emb.inv_freq.dtype == torch.float32
            if crash:
                raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)


def test_parameters_as_equals_loading_in_that_precision(tmp_path):
    from sparc3_pl.model.loading import load_model
    from sparc3_pl.model.source import ModelSource

    frozen().save_pretrained(tmp_path)
    exact, rough = (load_model(ModelSource(str(tmp_path), dtype)) for dtype in ("float32", "bfloat16"))
    batch = padded([tokens(1, 8)[0]])
    with parameters_as(exact, torch.bfloat16):
        assert torch.equal(neuron_scores(exact, *batch).flat, neuron_scores(rough, *batch).flat)


def test_precision_agreement_by_hand():
    exact = torch.arange(1.0, 13.0)
    rough = exact.clone()
    rough[[10, 7]] = rough[[7, 10]]  # the second strongest of 12 becomes the fifth
    found = precision_agreement(exact, rough, top=100)
    assert found.top == 3
    assert found.jaccard == 2 / 4
    assert found.total_change == 0
    assert found.rank_correlation == pytest.approx(1 - 6 * 2 * 3**2 / (12 * (12**2 - 1)))  # Spearman's own formula
