import pytest
import torch
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from sparc3_pl.attribution.norms import NormKind, norm_kind, std_constant_rule

D = 6
CASES = {
    "llama": (lambda: LlamaRMSNorm(D, eps=1e-5), NormKind(False, 0.0, 1e-5)),
    "gemma": (lambda: Gemma3RMSNorm(D, eps=1e-6), NormKind(False, 1.0, 1e-6)),
    "torch rms": (lambda: nn.RMSNorm(D, eps=1e-6), NormKind(False, 0.0, 1e-6)),
    "torch rms without weight": (
        lambda: nn.RMSNorm(D, eps=1e-6, elementwise_affine=False),
        NormKind(False, 0.0, 1e-6),
    ),
    "layer": (lambda: nn.LayerNorm(D, eps=1e-4), NormKind(True, 0.0, 1e-4)),
    "layer without bias": (lambda: nn.LayerNorm(D, bias=False), NormKind(True, 0.0, 1e-5)),
    "layer without weight": (lambda: nn.LayerNorm(D, elementwise_affine=False), NormKind(True, 0.0, 1e-5)),
}


def make(case):
    module = CASES[case][0]()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return module


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_kind_is_told_by_values(case, dtype):
    assert norm_kind(make(case).to(dtype)) == CASES[case][1]


class Odd(nn.Module):
    """Scales by the weight squared: looks like a norm, is none that is known."""

    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.full((D,), 1.5)), 1e-6

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight**2


@pytest.mark.parametrize("module", [Odd(), nn.Linear(D, D), nn.BatchNorm1d(D), nn.GroupNorm(2, D), nn.Dropout()])
def test_unknown_is_no_norm(module):
    assert norm_kind(module.eval()) is None


@pytest.mark.parametrize("case", CASES)
def test_gradient_with_a_frozen_standard_deviation(case):
    """Against autograd through the formula, with the standard deviation detached."""
    module, kind = make(case), CASES[case][1]
    x = torch.randn(2, 3, D, requires_grad=True)
    y = std_constant_rule(x, module, module, kind)
    assert torch.equal(y, module(x))
    upstream = torch.randn_like(y)
    (got,) = torch.autograd.grad(y, x, upstream)

    centre = x - x.mean(-1, keepdim=True) if kind.centred else x
    std = (centre.pow(2).mean(-1, keepdim=True) + kind.eps).sqrt().detach()
    scale = getattr(module, "weight", None)
    want_y = centre / std * (1 if scale is None else scale.detach() + kind.offset)
    (want,) = torch.autograd.grad(want_y, x, upstream)
    torch.testing.assert_close(got, want)
    bias = getattr(module, "bias", None)
    torch.testing.assert_close(y, want_y if bias is None else want_y + bias)


def test_layer_norm_by_hand():
    """x = (1, 3): mean 2, std 1, w = (2, 5), upstream (1, 1): h = (2, 5), h - mean h = (-1.5, 1.5)."""
    module = nn.LayerNorm(2, eps=0.0)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([2.0, 5.0]))
    x = torch.tensor([[1.0, 3.0]], requires_grad=True)
    std_constant_rule(x, module, module, NormKind(True, 0.0, 0.0)).sum().backward()
    assert x.grad.tolist() == [[-1.5, 1.5]]


def test_rms_norm_by_hand():
    """x = (1, 7): root mean square 5, w = (2, 10), upstream (1, 1): (2, 10) / 5."""
    module = nn.RMSNorm(2, eps=0.0)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([2.0, 10.0]))
    x = torch.tensor([[1.0, 7.0]], requires_grad=True)
    std_constant_rule(x, module, module, NormKind(False, 0.0, 0.0)).sum().backward()
    assert x.grad[0].tolist() == pytest.approx([0.4, 2.0])
