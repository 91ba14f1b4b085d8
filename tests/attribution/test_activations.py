import math

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from sparc3_pl.attribution.activations import RATIOS, activation_kind, identity_rule

KINDS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "relu2": "relu_squared",
    "mish": "mish",
    "linear": "linear",
}


@pytest.mark.parametrize("name", KINDS)
def test_kind_is_told_by_values(name):
    assert activation_kind(ACT2FN[name]) == KINDS[name]


@pytest.mark.parametrize("name", ["sigmoid", "laplace", "relu6", "tanh", "gelu_10", "hardswish", "xielu"])
def test_functions_without_a_rule(name):
    assert activation_kind(ACT2FN[name]) is None


@pytest.mark.parametrize("module", [nn.Dropout(), nn.Linear(2, 2), nn.Bilinear(2, 2, 2), nn.LayerNorm(4), nn.Flatten()])
def test_other_modules_are_no_activations(module):
    assert activation_kind(module) is None


@pytest.mark.parametrize("name", KINDS)
def test_gradient_is_y_over_x(name):
    x = torch.tensor([-20.0, -3.0, -0.7, -1e-3, 2e-3, 0.4, 2.5, 20.0], dtype=torch.float64, requires_grad=True)
    function = ACT2FN[name]
    y = identity_rule(x, function, KINDS[name])
    assert torch.equal(y, function(x))
    (gradient,) = torch.autograd.grad(y, x, torch.full_like(y, 3.0))
    torch.testing.assert_close(gradient, 3 * y.detach() / x.detach(), rtol=1e-9, atol=1e-14)


CLOSED = {
    "silu": (0.5, lambda x: 1 / (1 + math.exp(-x))),
    "gelu": (0.5, lambda x: 0.5 * (1 + math.erf(x / math.sqrt(2)))),
    "gelu_tanh": (0.5, lambda x: 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))),
    "quick_gelu": (0.5, lambda x: 1 / (1 + math.exp(-1.702 * x))),
    "relu": (0.0, lambda x: float(x > 0)),
    "relu_squared": (0.0, lambda x: max(x, 0.0)),
    "mish": (math.tanh(math.log(2)), lambda x: math.tanh(math.log1p(math.exp(x)))),
    "linear": (1.0, lambda x: 1.0),
}


@pytest.mark.parametrize("kind", RATIOS)
def test_closed_forms(kind):
    at_zero, form = CLOSED[kind]
    points = [-5.0, -1.3, -1e-6, 0.0, 1e-6, 0.9, 4.0]
    got = RATIOS[kind](torch.tensor(points, dtype=torch.float64))
    assert got.tolist() == pytest.approx([form(x) for x in points], rel=1e-9, abs=1e-12)
    assert float(RATIOS[kind](torch.zeros(()))) == pytest.approx(at_zero)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", RATIOS)
def test_half_precision_is_finite_and_near(kind, dtype):
    x = torch.linspace(-30, 30, 241).to(dtype).requires_grad_()
    y = identity_rule(x, lambda v: v * RATIOS[kind](v), kind)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert gradient.dtype == dtype
    assert gradient.isfinite().all()
    torch.testing.assert_close(gradient.double(), RATIOS[kind](x.detach().double()), rtol=1e-2, atol=1e-4)
