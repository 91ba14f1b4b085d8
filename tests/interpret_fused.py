"""Runs the fused kernel in Triton's interpreter, which needs no GPU: ``interpret_fused.py BATCHES.pt SUMS.pt``.

A program of its own, because Triton settles when it is imported whether it interprets: TRITON_INTERPRET=1 is to be set.
"""

import sys
from collections import Counter

import torch

from sparc3_pl.attribution import accumulators, fused
from sparc3_pl.attribution.methods import Gradient, Options
from sparc3_pl.attribution.recording import LayerPass
from sparc3_pl.model.components import Group

CARDS = {"ampere": (8, 0), "hopper": (9, 0)}

calls: Counter[str] = Counter()


def main() -> None:
    batches = torch.load(sys.argv[1])
    for x, delta, weight in batches.values():
        assert not fused.fusible(LayerPass("layer", x, delta, delta, weight)), "by itself a CPU takes the plain path"
    error = fused._self_check_error(torch.device("cpu"), torch.bfloat16, True)
    fused._usable = lambda *_: True
    fused.DTYPES = (*fused.DTYPES, torch.float32)
    accumulators.fused_relevance = counted(fused.fused_relevance)
    sums = {}
    for card, capability in CARDS.items():
        fused._capability = lambda device, capability=capability: capability
        for name, batch in batches.items():
            if runs_on(card, batch[0].dtype):
                sums[name, card] = accumulated(*batch)
    torch.save({"sums": sums, "self-check error": error}, sys.argv[2])


def runs_on(card, dtype) -> bool:
    """The cards' tiles of float32 are the same: tried once."""
    return card == "ampere" or dtype != torch.float32


def counted(function):
    def call(*args):
        calls["fused"] += 1
        return function(*args)

    return call


def accumulated(x, delta, weight) -> dict[str, torch.Tensor]:
    """What the method makes of the batch; the sum of weight scores was 1 before."""
    calls.clear()
    layer, found = LayerPass("layer", x, delta, delta, weight), {}
    for axis in ("both", "out", "in"):
        shape = {"both": tuple(weight.shape), "out": weight.shape[:1], "in": weight.shape[1:]}[axis]
        group, method = Group("layer", shape, axis, shape[0]), Gradient()
        sums = method.sums(group, weight, Options())
        sums["sum"].fill_(axis == "both")
        relevance = method.add(sums, group, layer, None, Options())
        found |= {axis: sums["sum"], f"{axis} relevance": relevance}
    assert calls["fused"] == 3, "the method took the plain path"
    return found


if __name__ == "__main__":
    main()
