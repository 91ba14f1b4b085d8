"""Time the scoring pass against the plain procedure: same model, same samples, one run, taking turns.

The plain procedure is what one writes first: for each sample zero_grad, forward, backward with parameter gradients,
and |weight * gradient| of every linear layer copied to the CPU and added up there; for Wanda, a forward pass with a
hook on every linear layer. Both must give the same scores before anything is timed.

    python scripts/bench_scoring.py --model models/SmolLM2-135M-Instruct.Q4_1.gguf
    python scripts/bench_scoring.py --work unsigned --hidden 4096 --intermediate 14336 --layers 32 --heads 32 \
        --kv-heads 8 --vocab 128256 --dtype bfloat16 --device cuda --seq-len 2048

Where the plain procedure would take hours, ``--alone 128`` times ours by itself on 128 samples more.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench_common import (
    DTYPES,
    add_model_arguments,
    alternate,
    build_model,
    environment,
    figures,
    log,
    matmul_rate,
    median_ratio,
    peak_of,
    show,
    timed,
    write_json,
)
from torch import Tensor, nn

from sparc3_pl.attribution.methods import Options
from sparc3_pl.attribution.rules import attn_lrp
from sparc3_pl.attribution.scorers import Scorer
from sparc3_pl.data.batches import ReferenceBatch
from sparc3_pl.model.structure import linear_layers, output_head, select_layers

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 5e-3}
"""Largest difference of a layer's scores, relative to their norm. In half precision the plain procedure rounds its
gradients to the weights' type, ours does not."""


@dataclass(frozen=True)
class Work:
    """One row of the table."""

    title: str
    granularity: str
    targets: list[str] | None
    method: str = "lrp"
    signed: bool = False
    short: bool = False
    """Prompts in padded batches instead of windows."""


WORKS = {
    "weights": Work("weight scores, all linear layers", "weight", ["*"]),
    "unsigned": Work("unsigned neuron scores, up-projections", "neuron", None),
    "signed": Work("signed neuron scores, up-projections", "neuron", None, signed=True),
    "prompts": Work("unsigned neuron scores, up-projections, prompts", "neuron", None, short=True),
    "wanda": Work("wanda, all linear layers", "weight", ["*"], method="wanda"),
}


# --- the plain procedure ----------------------------------------------------------------------------------------------


class PlainGradients:
    """Per-sample |weight * gradient|, or its signed row sums, the straightforward way."""

    def __init__(self, model: nn.Module, work: Work, only_targets: bool) -> None:
        self.model, self.work = model, work
        self.targets = select_layers(model, work.targets)
        self.layers = self.targets if only_targets else linear_layers(model)
        self.sums: dict[str, Tensor] = {}
        self.count = 0
        self.missed = 0.0
        """How far a given target's logit lay below the largest, relative to that, at most."""

    def add(self, samples: list[Tensor], targets: list[int] | None = None) -> None:
        """Explains the largest logit, or the tokens ``targets``: half precision may decide otherwise in a batch."""
        self.model.requires_grad_(True)
        with attn_lrp(self.model) if self.work.method == "lrp" else nullcontext():
            for i, sample in enumerate(samples):
                self.model.zero_grad()
                logits = self.model(input_ids=sample[None], use_cache=False).logits[0, -1]
                logit = logits.max() if targets is None else logits[targets[i]]
                if targets is not None:
                    self.missed = max(self.missed, float(1 - logit.detach() / logits.detach().max()))
                logit.backward()
                for name, layer in self.layers.items():
                    relevance = layer.weight.detach() * layer.weight.grad
                    relevance = relevance.sum(1) if self.work.signed else relevance.abs()
                    relevance = relevance.cpu().float()
                    self.sums[name] = self.sums[name] + relevance if name in self.sums else relevance
        self.model.zero_grad()
        self.model.requires_grad_(False)
        self.count += len(samples)

    def scores(self, name: str) -> Tensor:
        scores = self.sums[name] / self.count
        return scores.sum(1) if self.work.granularity == "neuron" and not self.work.signed else scores


class PlainWanda:
    """|weight| times the norm of the inputs, by a hook on every linear layer."""

    missed = 0.0  # no token is explained

    def __init__(self, model: nn.Module, work: Work, only_targets: bool) -> None:
        self.model, self.work = model, work
        self.layers = self.targets = select_layers(model, work.targets)
        self.sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, samples: list[Tensor], targets: list[int] | None = None) -> None:
        hooks = [layer.register_forward_hook(self._hook(name)) for name, layer in self.layers.items()]
        for sample in samples:
            self.model(input_ids=sample[None], use_cache=False)
        for hook in hooks:
            hook.remove()

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            inputs = args[0].flatten(0, -2).float()
            self.sums[name] = self.sums.get(name, 0) + (inputs.norm(dim=0) ** 2).cpu()

        return hook

    def scores(self, name: str) -> Tensor:
        return self.layers[name].weight.detach().abs().cpu().float() * self.sums[name].sqrt()


# --- ours -------------------------------------------------------------------------------------------------------------


class Ours:
    """The scorer of the package, fed as its LightningModule feeds it."""

    def __init__(self, model: nn.Module, work: Work, batch_size: int) -> None:
        self.model, self.batch_size = model, batch_size
        self.layers = select_layers(model, work.targets)
        options = Options(signed=work.signed)
        self.scorer = Scorer(model, work.method, work.granularity, work.targets, options=options)
        self.count = 0
        self.targets: list[int] | None = None
        """The tokens explained in the last pass."""

    def add(self, samples: list[Tensor]) -> None:
        longest_first = sorted(range(len(samples)), key=lambda i: -len(samples[i]))
        targets = {}
        for start in range(0, len(samples), self.batch_size):
            batch = longest_first[start : start + self.batch_size]
            figures = self.scorer.update(ReferenceBatch(*_padded([samples[i] for i in batch])))
            if figures is not None:
                targets |= dict(zip(batch, figures.target["target"].tolist(), strict=True))
        self.targets = [targets[i] for i in range(len(samples))] if targets else None
        self.count += len(samples)

    def scores(self, name: str) -> Tensor:
        return self.scorer.scores(name, self.count).scores


def _padded(samples: list[Tensor]) -> tuple[Tensor, Tensor]:
    input_ids = nn.utils.rnn.pad_sequence(samples, batch_first=True)
    lengths = torch.tensor([len(sample) for sample in samples], device=input_ids.device)
    mask = torch.arange(input_ids.shape[1], device=input_ids.device) < lengths[:, None]
    return input_ids, mask.long()


# --- comparison -------------------------------------------------------------------------------------------------------


def make_samples(work: Work, args: argparse.Namespace, vocab: int, count: int) -> list[Tensor]:
    """Random token ids: what they say makes no difference to the arithmetic."""
    generator = torch.Generator().manual_seed(args.seed)
    if not work.short:
        lengths = [args.seq_len] * count
    else:
        lengths = torch.randint(args.prompt_min, args.prompt_max + 1, (count,), generator=generator).tolist()
    return [torch.randint(3, vocab, (length,), generator=generator).to(args.device) for length in lengths]


def difference(plain: Any, ours: Ours) -> float:
    """The largest relative difference (of norms) between two procedures' scores of one layer."""
    worst = 0.0
    for name in ours.layers:
        got = ours.scores(name).double()
        want = plain.scores(name).to(got.device).double()
        worst = max(worst, float((want - got).norm() / want.norm()))
    return worst


def flops(model: nn.Module, work: Work, samples: list[Tensor]) -> float:
    """Multiplications and additions of the matrix products that the scores need, attention included (causal half).

    A weight costs 2 per token in the forward pass, 2 in the backward pass, and 2 for its own gradient where that is
    needed; the output head has one token a sample.
    """
    targets = select_layers(model, work.targets)
    name, head = output_head(model)
    layers = {n: m for n, m in linear_layers(model).items() if n != name}
    size = sum(m.weight.numel() for m in layers.values())
    own = 0 if work.signed else sum(m.weight.numel() for n, m in targets.items() if n != name)
    passes = 1 if work.method == "wanda" else 2
    config = model.config
    width = config.hidden_size * config.num_hidden_layers
    total = 0.0
    for tokens in map(len, samples):
        attention = 2 * width * tokens**2
        if passes == 1:
            total += 2 * size * tokens + attention
        else:
            total += (4 * size + 2 * own) * tokens + 3 * attention + 4 * head.weight.numel()
    return total


def compare(model: nn.Module, work: Work, args: argparse.Namespace, rate: float) -> dict[str, Any]:
    """One row: agreement and memory of the first pass of both, then ``--repeats`` timed passes of each."""
    log(work.title)
    samples = make_samples(work, args, model.config.vocab_size, args.prompts if work.short else args.samples)
    make_plain = PlainWanda if work.method == "wanda" else PlainGradients
    ours, peak_ours = first_pass(lambda: make_ours(model, work, args), args.device, samples)
    plain, peak_plain = first_pass(
        lambda: make_plain(model, work, args.plain_layers == "targets"), args.device, samples, ours.targets
    )
    worst = max(plain.missed, difference(plain, ours))
    tolerance = TOLERANCE[DTYPES[args.dtype]]
    log(f"  scores differ by {worst:.1e} at most (tolerance {tolerance:.0e})")
    if not worst <= tolerance:
        sys.exit(f"error: {work.title}: the scores differ by {worst:.2e}, more than {tolerance:.0e}: nothing is timed")
    seconds = alternate(lambda: plain.add(samples), lambda: ours.add(samples), args.repeats, args.device)
    sides = {"plain": (seconds[0], peak_plain), "ours": (seconds[1], peak_ours)}
    return {**row(model, work, samples, rate, sides), "difference": worst, "ratio": median_ratio(*seconds)}


def alone(model: nn.Module, work: Work, args: argparse.Namespace, rate: float) -> dict[str, Any]:
    """A row without the plain procedure: ours, once, over ``--alone`` samples."""
    log(f"{work.title}: ours alone, {args.alone} samples")
    samples = make_samples(work, args, model.config.vocab_size, args.alone)
    make_ours(model, work, args).add(samples[:1])  # what a first pass compiles and looks up is not timed
    seconds: list[float] = []

    def run(ours: Ours) -> None:
        seconds.append(timed(lambda: ours.add(samples), args.device))

    _, peak = peak_of(lambda: run(make_ours(model, work, args)), args.device)
    return row(model, work, samples, rate, {"ours": (seconds, peak)})


def row(
    model: nn.Module, work: Work, samples: list[Tensor], rate: float, sides: dict[str, tuple[list[float], int]]
) -> dict[str, Any]:
    needed = flops(model, work, samples)
    return {"work": work.title, "samples": len(samples), **figures(model, sum(map(len, samples)), needed, rate, sides)}


def make_ours(model: nn.Module, work: Work, args: argparse.Namespace) -> Ours:
    return Ours(model, work, args.batch_size if work.short else args.window_batch_size)


def first_pass(make: Callable[[], Any], device: str, *what: Any) -> tuple[Any, int]:
    """One side after its first pass over ``what``, and the most bytes that it held, its sums included."""

    def run() -> Any:
        side = make()
        side.add(*what)
        return side

    return peak_of(run, device)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--work", nargs="+", choices=list(WORKS), default=list(WORKS))
    parser.add_argument("--seq-len", type=int, default=512, help="tokens of a window")
    parser.add_argument("--samples", type=int, default=1, help="windows in one timed pass")
    parser.add_argument("--window-batch-size", type=int, default=1, help="windows in one batch of ours")
    parser.add_argument("--prompts", type=int, default=93)
    parser.add_argument("--prompt-min", type=int, default=10, help="tokens of the shortest prompt")
    parser.add_argument("--prompt-max", type=int, default=40, help="tokens of the longest prompt")
    parser.add_argument("--batch-size", type=int, default=16, help="prompts in one batch of ours")
    parser.add_argument("--repeats", type=int, default=5, help="timed passes of each procedure")
    parser.add_argument("--alone", type=int, default=0, help="then time ours by itself, once, on so many samples")
    parser.add_argument(
        "--plain-layers", choices=["all", "targets"], default="all",
        help="layers whose |weight * gradient| the plain procedure makes: all linear ones, or only those scored",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    model = build_model(args)
    config = model.config
    rate = matmul_rate(args.seq_len, config.hidden_size, config.intermediate_size, DTYPES[args.dtype], args.device)
    facts = {
        "model": f"{args.model or 'generated Llama'}, {sum(p.numel() for p in model.parameters()):,} parameters",
        "matmul_rate": f"{rate / 1e9:.0f} GFLOP/s measured",
        **environment(args),
    }
    results = []
    for work in args.work:
        results.append(compare(model, WORKS[work], args, rate))
        if args.alone:
            results.append(alone(model, WORKS[work], args, rate))
    show("scoring: the plain procedure and ours", "samples", results, facts)
    settings = {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items()}
    write_json(args.json, {"settings": settings, "matmul_flops": rate, **facts, "results": results})


if __name__ == "__main__":
    main()
