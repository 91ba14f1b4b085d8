import pytest
import torch
from tiny_models import tiny, tokens
from torch.profiler import ProfilerActivity, profile

from sparc3_pl.model import kernels
from sparc3_pl.model.kernels import onednn_linears, repacked_linears

FAST = "mkldnn::_linear_pointwise"


def operators(function):
    """What ``function`` returns, and the names of the operators that it ran."""
    with profile(activities=[ProfilerActivity.CPU]) as record:
        result = function()
    return result, {event.key for event in record.key_averages()}


@torch.no_grad()
def test_same_values_and_nothing_left_behind(tiny_model):
    def logits():
        return tiny_model(input_ids=tokens(3, 20)).logits

    want, plain = operators(logits)
    with onednn_linears(tiny_model):
        found, fast = operators(logits)
    assert FAST not in plain
    assert (FAST in fast) == torch.backends.mkldnn.is_available()
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)
    assert not any("forward" in vars(m) for m in tiny_model.modules())


def test_nothing_left_behind_after_a_crash(tiny_llama):
    def crash():
        with onednn_linears(tiny_llama):
            assert any("forward" in vars(m) for m in tiny_llama.modules())
            raise KeyError

    with pytest.raises(KeyError):
        crash()
    assert not any("forward" in vars(m) for m in tiny_llama.modules())


def test_gradients_and_other_types_take_the_usual_way(tiny_llama):
    ids = tokens(2, 20)
    tiny_llama.requires_grad_(True)
    with onednn_linears(tiny_llama):
        _, ran = operators(lambda: tiny_llama(input_ids=ids).logits.sum().backward())
    assert FAST not in ran
    assert all(p.grad is not None for p in tiny_llama.parameters())
    double = tiny("llama", dtype=torch.float64)
    with torch.no_grad():
        want = double(input_ids=ids).logits
        with onednn_linears(double):
            torch.testing.assert_close(double(input_ids=ids).logits, want, rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("columns", [16, 512])
def test_copies_in_another_order_give_the_same_values(tiny_model, monkeypatch, columns):
    monkeypatch.setattr(kernels, "_COLUMNS", columns)
    ids = tokens(3, 20)
    want = tiny_model(input_ids=ids).logits
    with repacked_linears(tiny_model):
        logits = tiny_model(input_ids=ids).logits
        few = tiny_model(input_ids=ids[:1, :5]).logits
    torch.testing.assert_close(logits, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(few, tiny_model(input_ids=ids[:1, :5]).logits, rtol=0, atol=0)
    assert not any("forward" in vars(m) for m in tiny_model.modules())


@torch.no_grad()
@pytest.mark.parametrize(("free", "is_copied"), [(10**12, True), (0, False)])
def test_copies_are_made_where_memory_is_free(monkeypatch, free, is_copied):
    monkeypatch.setattr(kernels, "free_memory", lambda device: free)
    layer = torch.nn.Linear(24, 700)
    x = torch.randn(2, 16, 24)
    want = layer(x)
    with repacked_linears(torch.nn.Sequential(layer)):
        weight, layer.weight.data = layer.weight.data, torch.zeros_like(layer.weight)
        of_copies = layer(x)
        layer.weight.data = weight
    torch.testing.assert_close(of_copies, want if is_copied else layer.bias.expand_as(want), rtol=1e-5, atol=1e-5)


def test_no_copies_are_used_for_gradients_and_left_behind_after_a_crash(tiny_llama):
    ids = tokens(2, 20)
    want = tiny_llama(input_ids=ids).logits
    want.sum().backward()
    gradients = [p.grad.clone() for p in tiny_llama.parameters()]
    tiny_llama.zero_grad()

    def crash():
        with repacked_linears(tiny_llama):
            logits = tiny_llama(input_ids=ids).logits
            torch.testing.assert_close(logits, want, rtol=0, atol=0)
            logits.sum().backward()
            raise KeyError

    with pytest.raises(KeyError):
        crash()
    torch.testing.assert_close([p.grad for p in tiny_llama.parameters()], gradients, rtol=0, atol=0)
    assert not any("forward" in vars(m) for m in tiny_llama.modules())
