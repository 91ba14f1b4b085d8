"""The fused kernel, run in Triton's interpreter, against the plain path and against loops in float64.

The interpreter shows that the kernel's arithmetic is right, the compiler that it becomes code for the cards; how fast
that is, and whether it is right on a card, only a card shows.
"""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from sparc3_pl.attribution import accumulators, fused
from sparc3_pl.attribution.accumulators import add_weight_scores, component_scores, no_counts
from sparc3_pl.attribution.recording import LayerPass
from sparc3_pl.model.components import Group

HERE = Path(__file__).parents[1]

from interpret_fused import CARDS, runs_on  # noqa: E402

with_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton: it is made for Linux only")
with_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def random_batch(dtype, num_B, num_T, num_O, num_I, device="cpu"):
    shapes = (num_B, num_T, num_I), (num_B, num_T, num_O), (num_O, num_I)
    generator = torch.Generator().manual_seed(sum(map(sum, shapes)))
    return tuple(torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)


def strided(dtype):
    """Views between numbers that would be seen: x with gaps in its features, delta transposed, and W transposed."""
    x, delta, weight = random_batch(dtype, 2, 21, 70, 90)
    gaps = torch.full((2, 21, 180), torch.nan, dtype=dtype)
    gaps[..., ::2] = x
    wider = torch.full((2, 80, 25), torch.nan, dtype=dtype)
    wider[:, 5:75, 2:23] = delta.mT
    return gaps[..., ::2], wider[:, 5:75, 2:23].mT, weight.t().contiguous().t()


def batches():
    """By name x ``[B, T, I]``, delta ``[B, T, O]`` and W ``[O, I]``."""
    float32, bfloat16, float16 = torch.float32, torch.bfloat16, torch.float16
    x, delta, weight = random_batch(float16, 2, 19, 30, 34)
    return {
        "odd sizes": random_batch(float32, 3, 37, 90, 67),
        "odd sizes bfloat16": random_batch(bfloat16, 2, 67, 150, 261),
        "odd sizes float16": random_batch(float16, 2, 33, 129, 65),
        "whole blocks": random_batch(bfloat16, 2, 64, 128, 256),
        "one sample": random_batch(bfloat16, 1, 40, 100, 300),
        "two tokens": random_batch(float32, 4, 2, 65, 1),
        "more rows than a group": random_batch(bfloat16, 1, 3, 1160, 140),
        "strided": strided(float32),
        "strided bfloat16": strided(bfloat16),
        "larger than a float16": (x * 300, delta * 300, weight),
        "float32 weight": (*random_batch(bfloat16, 2, 16, 30, 20)[:2], random_batch(float32, 2, 16, 30, 20)[2] / 3),
    }


BATCHES = batches()
CASES = [(n, card) for n, batch in BATCHES.items() for card in CARDS if runs_on(card, batch[0].dtype)]


POISON = [("nan", "x"), ("inf", "delta"), ("inf", "weight")]


def poisoned(value, where):
    x, delta, weight = random_batch(torch.bfloat16, 2, 9, 40, 35)
    {"x": x[1], "delta": delta[1], "weight": weight}[where][3, 5] = float(value)
    return x, delta, weight


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """What ``interpret_fused.py`` makes of the batches, and of ones with a value that is not finite."""
    folder = tmp_path_factory.mktemp("interpreted")
    poison = {f"{value} in {where}": poisoned(value, where) for value, where in POISON}
    torch.save({**BATCHES, **poison}, folder / "batches.pt")
    settings = {"TRITON_INTERPRET": "1", "OPENBLAS_NUM_THREADS": "1"}
    call = [sys.executable, HERE / "interpret_fused.py", folder / "batches.pt", folder / "sums.pt"]
    done = subprocess.run(call, env={**os.environ, **settings}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "sums.pt")


def explicit(x, delta, weight):
    """|W * G| of every sample, one token after the other in float64: ``[B, O, I]``."""
    relevance = torch.zeros(len(x), *weight.shape, dtype=torch.float64)
    for b in range(len(x)):
        for x_I, delta_O in zip(x[b].double(), delta[b].double(), strict=True):
            relevance[b] += torch.outer(delta_O, x_I)
    return (relevance * weight.double()).abs()


def close(actual, expected, tolerance=1e-5):
    """Half precision has no tolerance of its own: its products are exact in float32, where they are added."""
    assert actual.shape == expected.shape
    difference = (actual.double() - expected.double()).abs().max()
    assert difference <= tolerance * expected.abs().max(), float(difference / expected.abs().max())


@with_triton
@pytest.mark.parametrize(("name", "card"), CASES)
def test_equals_a_loop_in_float64(interpreted, name, card):
    sums, relevance = interpreted["sums"][name, card], explicit(*BATCHES[name])
    close(sums["both"], 1 + relevance.sum(0))
    close(sums["out"], relevance.sum((0, 2)))
    close(sums["in"], relevance.sum((0, 1)))
    for axis in ("both", "out", "in"):
        close(sums[f"{axis} relevance"], relevance.sum((1, 2)))
        assert sums[f"{axis} relevance"].dtype == torch.float64
    assert sums["both"].dtype == torch.float32
    assert sums["out"].dtype == sums["in"].dtype == torch.float64


@with_triton
@pytest.mark.parametrize(("name", "card"), CASES)
def test_equals_the_plain_path(interpreted, name, card):
    sums, (x, delta, weight) = interpreted["sums"][name, card], BATCHES[name]
    layer, total = LayerPass("layer", x, delta, delta, weight), torch.ones(weight.shape)
    close(sums["both relevance"], add_weight_scores(total, layer))
    close(sums["both"], total)
    for axis, size in zip(("out", "in"), weight.shape, strict=True):
        scores = component_scores(layer, Group("layer", (size,), axis, size))
        close(sums[axis], scores.sum(0))
        close(sums[f"{axis} relevance"], scores.sum(1))


@with_triton
@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize(("value", "where"), POISON)
def test_what_is_not_finite_is_seen(interpreted, value, where, card):
    """The scorer looks at each sample's total: that of the poisoned sample, and of no other, is not finite."""
    sums = interpreted["sums"][f"{value} in {where}", card]
    for axis in ("both", "out", "in"):
        assert sums[f"{axis} relevance"].isfinite().tolist() == [where != "weight", False]


@with_triton
def test_self_check(interpreted):
    assert interpreted["self-check error"] < 1e-6


@pytest.mark.parametrize("fault", ["raises", "wrong", "nan"])
def test_a_kernel_that_fails_is_not_used(monkeypatch, caplog, fault):
    def relevance(layer, total_OI=None):
        if fault == "raises":
            raise RuntimeError("no C compiler")
        gradient = layer.delta_BTO.double().mT @ layer.x_BTI.double()
        return (gradient * layer.weight_OI.double()).abs().sum(2) * (1.01 if fault == "wrong" else float("nan"))

    monkeypatch.setattr(fused, "fused_relevance", relevance)
    assert not fused._agrees(torch.device("cpu"), torch.bfloat16, False)
    assert "plain torch does its work" in caplog.text
    assert ("no C compiler" in caplog.text) == (fault == "raises")


@pytest.fixture
def good_card(monkeypatch):
    """As if the CPU were a card on which the kernel runs."""
    monkeypatch.setattr(fused, "_usable", lambda *_: True)


def test_what_the_kernel_takes(good_card):
    def asks(x, delta, weight, total=None):
        return fused.fusible(LayerPass("layer", x, delta, delta, weight), total)

    x, delta, weight = random_batch(torch.bfloat16, 2, 3, 5, 4)
    assert asks(x, delta, weight)
    assert asks(x, delta, weight.float(), torch.zeros(5, 4))
    assert not asks(x[:, :1], delta[:, :1], weight)  # the output head: the plain path does one row
    assert not asks(x, delta.half(), weight)
    assert not asks(x.float(), delta.float(), weight.float())
    assert not asks(x.double(), delta.double(), weight.double())
    assert not asks(x, delta, weight, torch.zeros(5, 4, dtype=torch.float64))
    assert not asks(x, delta, weight, torch.zeros(4, 5).t())
    assert not asks(x, delta, weight, torch.zeros(5, 4, device="meta"))  # sums on the host
    assert not asks(x, delta, weight.to("meta"))


@pytest.mark.parametrize("whole", [True, False])
def test_who_counts_what_is_not_finite_takes_the_plain_path(good_card, monkeypatch, whole):
    monkeypatch.setattr(accumulators, "fused_relevance", lambda *_: pytest.fail("the kernel does not count"))
    x, delta, weight = poisoned("nan", "x")
    layer, counts = LayerPass("layer", x, delta, delta, weight), no_counts(x.device)
    if whole:
        add_weight_scores(torch.zeros(weight.shape), layer, counts)
    else:
        component_scores(layer, Group("layer", (len(weight),), "out", len(weight)), counts=counts)
    assert counts["nan"] > 0


def test_which_cards_are_supported(monkeypatch):
    card = torch.device("cuda", 0)
    monkeypatch.setitem(sys.modules, "triton", torch)  # something that is found
    monkeypatch.setattr(torch.version, "hip", None)
    for capability, supported in (((9, 0), True), ((8, 0), True), ((7, 5), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, capability=capability: capability)
        assert fused._supported(card) == supported
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert not fused._supported(torch.device("cpu"))
    with monkeypatch.context() as off:
        off.setenv("SPARC3_FUSED", "0")
        assert not fused._supported(card)
    with monkeypatch.context() as amd:
        amd.setattr(torch.version, "hip", "7.0")
        assert not fused._supported(card)
    monkeypatch.setitem(sys.modules, "triton", None)  # as where it is not installed
    assert not fused._supported(card)


def test_the_package_does_not_import_triton():
    program = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(name)
sys.modules["triton"] = None  # an import of it fails
import torch
from sparc3_pl.attribution.accumulators import add_weight_scores
from sparc3_pl.attribution.recording import LayerPass
x, delta, weight = torch.ones(1, 2, 3), torch.ones(1, 2, 4), torch.ones(4, 3)
assert add_weight_scores(torch.zeros(4, 3), LayerPass("layer", x, delta, delta, weight)) == 24
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


# --- the compiler, which needs no card --------------------------------------------------------------------------------

SHARED_MEMORY = {80: 99 * 1024, 90: 227 * 1024}
"""Bytes a program may have; of the cards that take the kernel made for 8.0, those of 8.6 and 8.9 have least."""


@with_triton
@pytest.mark.skipif(sys.platform != "linux", reason="Triton brings its assembler on Linux only")
@pytest.mark.parametrize(("capability", "adds", "num_B"), [(90, True, 2), (90, False, 1), (80, True, 2)])
def test_compiles_for_cards(monkeypatch, tmp_path, capability, adds, num_B):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = compiled(capability, adds, num_B)
    assert kernel.asm["cubin"]
    assert kernel.metadata.shared <= SHARED_MEMORY[capability]
    code = kernel.asm["ptx"]
    assert "cp.async" in code
    assert ("wgmma.mma_async" if capability == 90 else "mma.sync") in code  # the tensor cores, in bfloat16
    assert not re.search(r"\b(atom|red)\.", code)  # the same bits again


def compiled(capability, adds, num_B):
    """The kernel for bfloat16 and the sizes of Llama-3-8B's up-projection, for a card that need not be there."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sparc3_pl.attribution.fused_kernel import relevance_kernel

    tile = fused._tile(torch.bfloat16, divmod(capability, 10), adds and num_B > 1)
    constants = {
        "x_i": 1, "delta_o": 1, "weight_i": 1, "ADD": adds, "WIDEN": False, "GROUP": 8,
        "BLOCK_O": tile.num_out, "BLOCK_I": tile.num_in, "BLOCK_T": tile.num_tokens,
        **({"num_B": 1} if num_B == 1 else {}),
    }  # fmt: skip
    pointers = {"x": "*bf16", "delta": "*bf16", "weight": "*bf16", "total": "*fp32", "rows": "*fp32"}
    names = relevance_kernel.arg_names
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names}
    odd = {"num_B", "num_T", *constants}
    attributes = {(place,): [["tt.divisibility", 16]] for place, name in enumerate(names) if name not in odd}
    source = ASTSource(relevance_kernel, signature, constants, attributes)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


# --- a card -----------------------------------------------------------------------------------------------------------


@with_card
@with_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(3, 67, 150, 261), (1, 300, 1160, 512), (4, 128, 256, 512)])
def test_equals_the_plain_path_on_a_card(monkeypatch, dtype, shape):
    x, delta, weight = random_batch(dtype, *shape, device="cuda")
    layer = LayerPass("layer", x, delta, delta, weight)
    total, again = torch.ones(2, *weight.shape, device="cuda")
    rows = fused.fused_relevance(layer, total)
    assert torch.equal(rows, fused.fused_relevance(layer, again))  # to the last bit
    assert torch.equal(total, again)
    alone = fused.fused_relevance(layer)
    relevance = (weight.double() * (delta.double().mT @ x.double())).abs()
    for got, want in ((rows, relevance.sum(2)), (alone, relevance.sum(2)), (total, 1 + relevance.sum(0))):
        close(got, want)
    monkeypatch.setattr(accumulators, "fusible", lambda *_: False)
    plain = torch.zeros_like(total)
    close(rows.sum(1), add_weight_scores(plain, layer))
    close(total - 1, plain)


@with_card
@with_triton
def test_a_card_takes_the_kernel():
    if torch.version.hip or torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs an NVIDIA card of compute capability 8.0 or higher")
    x, delta, weight = random_batch(torch.bfloat16, 2, 64, 128, 256, device="cuda")
    layer = LayerPass("layer", x, delta, delta, weight)
    assert fused.fusible(layer)
    assert fused.fusible(layer, torch.zeros(weight.shape, device="cuda"))
