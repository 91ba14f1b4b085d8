"""How seconds and memory grow with the work: samples, tokens, completions, model size, components, arms.

Small random Llamas are scored, completed and edited at three or four sizes of each kind of work. For each a straight
line is laid through the logarithms (least squares): its slope is the power with which seconds, the peak of memory and
the operations of matrix products grow. Exits with 1 if one is above its bound.

    python scripts/bench_growth.py             # a Markdown table, in two minutes
    python scripts/bench_growth.py --counts    # operations only, the same on any machine, in seconds

Seconds are those that one thread computes, the fastest of several passes; memory is what a pass holds above what was
held before it (Linux), and its constant share makes a power smaller.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from bench_common import peak_of
from bench_evaluation import Numbers, our_perplexity
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sparc3_pl.attribution.methods import Options
from sparc3_pl.attribution.scorers import Scorer
from sparc3_pl.data.batches import ReferenceBatch
from sparc3_pl.evaluation.generation import Generator, Sampling
from sparc3_pl.model.likelihood import WindowScorer
from sparc3_pl.model.size import decoder_flops
from sparc3_pl.model.structure import mlps

Run = Callable[[], Any]

VOCABULARY = 4096


@dataclass(frozen=True)
class Growth:
    """A kind of work at several sizes.

    Attributes:
        title: What grows, and in which work.
        sizes: By size, makes what is run.
        bounds: The largest powers of seconds, of peak memory and of operations.
    """

    title: str
    sizes: dict[float, Callable[[], Run]]
    bounds: tuple[float, float, float]


def model_of(hidden: int = 256) -> Any:
    """A Llama of eight layers, random; its other widths go with ``hidden``."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=8, num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64, vocab_size=VOCABULARY, max_position_embeddings=4096,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def token_ids(*shape: int) -> Tensor:
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(1))


def scoring(model: Any, samples: int, length: int, batch_size: int, num_layers: int | None = None) -> Run:
    """Unsigned LRP scores of the neurons of the uppermost layers, all layers unless their number is given."""
    ups = [mlp.up for mlp in mlps(model)]
    scorer = Scorer(model, "lrp", "neuron", ups[-(num_layers or len(ups)) :], options=Options())
    batches = [ReferenceBatch(ids, torch.ones_like(ids)) for ids in token_ids(samples, length).split(batch_size)]
    return lambda: [scorer.update(batch) for batch in batches]


def completing(model: Any, prompts: int, new: int) -> Run:
    """A completion of each prompt of 16 tokens; no token ends one. Fewer than those for which weights are copied."""
    texts = [" ".join(map(str, ids)) for ids in token_ids(prompts, 16).tolist()]
    generator = Generator(model, Numbers(VOCABULARY), Sampling(new))
    generator.end_tokens = []
    generator(["warm"], texts[:1])
    return lambda: generator([str(n) for n in range(prompts)], texts)


def edits(model: Any, arms: int) -> Run:
    """Perplexity of a window under as many edits, one after the other: in each a neuron of the first layer is zero."""
    ids = token_ids(256)
    scorer = WindowScorer(model)
    weight = model.get_submodule(mlps(model)[0].down).weight

    def run() -> None:
        for neuron in range(arms):
            before = weight[:, neuron].clone()
            weight[:, neuron] = 0.0
            our_perplexity(scorer, [(ids, ids)], 1)
            weight[:, neuron] = before

    return run


def growths() -> list[Growth]:
    """All kinds of work."""
    model = model_of()
    sized = {hidden: model_of(hidden) for hidden in (128, 256, 512)}
    return [
        Growth("samples, scored", {n: lambda n=n: scoring(model, n, 64, 4) for n in (4, 8, 16, 32)}, (1.1, 0.25, 1.01)),
        # Attention multiplies every token with all before it.
        Growth(
            "tokens per sample, scored",
            {n: lambda n=n: scoring(model, 2, n, 2) for n in (64, 128, 256, 512)},
            (1.4, 1.2, 1.01),
        ),
        Growth("completions", {n: lambda n=n: completing(model, n, 8) for n in (16, 32, 64, 128)}, (1.1, 1.1, 1.01)),
        Growth(
            "tokens per completion", {n: lambda n=n: completing(model, 32, n) for n in (7, 14, 28, 56)}, (1.2, 1.1, 1.1)
        ),
        Growth(
            "parameters of the decoder, scored",
            {decoder_flops(m) / 2: lambda m=m: scoring(m, 4, 64, 4) for m in sized.values()},
            (1.1, 1.1, 1.05),
        ),
        Growth(
            "components (layers), scored",
            {n * 768: lambda n=n: scoring(model, 4, 64, 4, n) for n in (1, 2, 4, 8)},
            (1.1, 1.1, 1.01),
        ),
        Growth("arms, evaluated", {n: lambda n=n: edits(model, n) for n in (1, 2, 4, 8)}, (1.1, 0.25, 1.01)),
    ]


def power(sizes: list[float], costs: list[float]) -> float:
    """The slope of the straight line through the logarithms, by least squares."""
    x, y = ([math.log(value) for value in values] for values in (sizes, costs))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def operations(run: Run) -> int:
    """Of the matrix products of a pass, forward and backward; attention on the CPU is not counted."""
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.mkldnn._linear_pointwise: _of_linear})
    with counter:
        run()
    return counter.get_total_flops()


def _of_linear(x_shape: Any, weight_shape: Any, *_: Any, **__: Any) -> int:
    return 2 * math.prod(x_shape) * weight_shape[0]


def fastest(runs: list[Run], repeats: int) -> list[float]:
    """Processor seconds of each, taking turns, after a pass that is not counted."""
    best = [math.inf] * len(runs)
    for repeat in range(repeats + 1):
        for n, run in enumerate(runs):
            start = time.process_time()
            run()
            best[n] = min(best[n], time.process_time() - start) if repeat else math.inf
    return best


def main(words: list[str] | None = None) -> int:
    """Prints a row for each kind of work; 1 if a power is above its bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", action="store_true", help="count operations only, and leave out the largest size")
    parser.add_argument("--repeats", type=int, default=5, help="counted passes of each size (5)")
    args = parser.parse_args(words)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    too_large = False
    columns = ["what grows", "sizes", *([] if args.counts else ["seconds", "power", "peak MB", "power"])]
    columns += ["Gop", "power"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    try:
        for growth in growths():
            # Counts are exact: they need no lever as long as that of seconds.
            sizes = list(growth.sizes)[: -1 if args.counts else None]
            runs = [growth.sizes[size]() for size in sizes]
            cells = [growth.title, _list(sizes, "{:.3g}")]
            measures = [] if args.counts else [(fastest(runs, args.repeats), 1.0, "{:.3f}")]
            if not args.counts:
                measures.append(([max(1, peak_of(run, "cpu")[1]) for run in runs], 1e-6, "{:.0f}"))
            measures.append(([operations(run) for run in runs], 1e-9, "{:.2f}"))
            for (costs, unit, form), bound in zip(measures, growth.bounds[-len(measures) :], strict=True):
                slope = power(sizes, costs)
                too_large |= slope > bound
                mark = " **above**" if slope > bound else ""
                cells += [_list([cost * unit for cost in costs], form), f"{slope:.2f} (at most {bound:g}){mark}"]
            print(f"| {' | '.join(cells)} |", flush=True)
    finally:
        torch.set_num_threads(threads)
    return int(too_large)


def _list(values: list[float], form: str) -> str:
    return ", ".join(form.format(value) for value in values)


if __name__ == "__main__":
    sys.exit(main())
