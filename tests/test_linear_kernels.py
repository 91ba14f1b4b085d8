import pytest
import torch
from tiny_models import tiny, tokens

from sparc3_pl.linear_kernels import onednn_linears


@torch.no_grad()
def test_same_values_and_nothing_left_behind(tiny_model):
    ids = tokens(3, 20)
    want = tiny_model(input_ids=ids).logits
    with onednn_linears(tiny_model):
        found = tiny_model(input_ids=ids).logits
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
        tiny_llama(input_ids=ids).logits.sum().backward()
    assert all(p.grad is not None for p in tiny_llama.parameters())
    double = tiny("llama", dtype=torch.float64)
    with torch.no_grad():
        want = double(input_ids=ids).logits
        with onednn_linears(double):
            torch.testing.assert_close(double(input_ids=ids).logits, want, rtol=0, atol=0)
