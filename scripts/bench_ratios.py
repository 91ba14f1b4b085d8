"""Whether the work of the program still costs what it did, beside plain torch in the same run. Takes under a minute.

A small random Llama is scored, completed and read. Each is done by the program and in the plainest way, in turns:
scores beside a bare forward and backward pass with nothing recorded; completions beside ``generate`` with a whole batch
of padded prompts and its own sampling; perplexity beside logits and cross-entropy. What counts is the processor time of
one thread, and of that the fastest pass of each, which other work on the machine changes least. Exits with 1 if a ratio
is worse by a third than the recorded one.

    python scripts/bench_ratios.py
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_scoring
import torch
from bench_evaluation import Numbers, our_perplexity, plain_perplexity
from torch import Tensor, nn

from sparc3_pl.evaluation.generation import Generator, Sampling
from sparc3_pl.model.likelihood import WindowScorer
from sparc3_pl.model.patching import swapped

RECORDED = {"signed scores": 1.0, "unsigned scores": 1.05, "completions": 0.33, "perplexity": 1.0}
"""Processor seconds of ours over those of the plain way."""

WORSE = 4 / 3
"""A ratio may be so many times the recorded one."""

VOCABULARY = 49152


def small_model() -> nn.Module:
    """A Llama with the widths of SmolLM2-135M and four of its layers, random."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=4, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=VOCABULARY, max_position_embeddings=1024, tie_word_embeddings=False,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    model.lm_head.weight.mul_(8.0)  # untrained logits are so flat that a nucleus is most of the vocabulary
    return model


def scoring(model: nn.Module, work: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Ours and a bare pass over one window of 256 tokens."""
    sample = torch.randint(3, VOCABULARY, (256,), generator=torch.Generator().manual_seed(1))
    ours = bench_scoring.Ours(model, bench_scoring.WORKS[work], 1)

    def bare() -> None:
        hook = model.get_input_embeddings().register_forward_hook(lambda _m, _i, out: out.detach().requires_grad_())
        model(input_ids=sample[None], use_cache=False, logits_to_keep=1).logits[0, -1].max().backward()
        hook.remove()

    return lambda: ours.add([sample]), bare


def completions(model: nn.Module) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """24 prompts of 10 to 40 tokens, two completions of 6 tokens each; no token ends one."""
    from transformers import GenerationConfig

    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(10, 41, (24,), generator=generator).tolist()
    prompts = [torch.randint(3, VOCABULARY, (n,), generator=generator) for n in lengths]
    texts = [" ".join(map(str, prompt.tolist())) for prompt in prompts]
    ours = Generator(model, Numbers(VOCABULARY), Sampling(6, samples_per_prompt=2))
    ours.end_tokens = []
    rows = [prompt for prompt in prompts for _ in range(2)]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left")
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
    config = GenerationConfig(
        max_new_tokens=6, do_sample=True, temperature=0.7, top_p=0.9, top_k=0, pad_token_id=0, eos_token_id=None
    )

    def plain() -> None:
        with swapped(model, "generation_config", config), torch.inference_mode():
            model.generate(ids, attention_mask=mask, generation_config=config)

    return lambda: ours([str(n) for n in range(len(texts))], texts), plain


def perplexity(model: nn.Module) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Two windows of 256 tokens."""
    windows: list[tuple[Tensor, Tensor]] = []
    for seed in (3, 4):
        ids = torch.randint(3, VOCABULARY, (256,), generator=torch.Generator().manual_seed(seed))
        windows.append((ids, ids))
    scorer = WindowScorer(model)
    return lambda: our_perplexity(scorer, windows, 1), lambda: plain_perplexity(model, windows)


def ratio_of(ours: Callable[[], Any], plain: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Processor seconds of both, the fastest pass of each, in turns after one that is not counted."""
    seconds = []
    for _ in range(repeats + 1):
        row = []
        for run in (ours, plain):
            start = time.process_time()
            run()
            row.append(time.process_time() - start)
        seconds.append(row)
    return min(row[0] for row in seconds[1:]), min(row[1] for row in seconds[1:])


def main(words: list[str] | None = None) -> int:
    """Prints a row for each kind of work; 1 if one is worse by a third than recorded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="counted passes of each (3)")
    parser.add_argument("--json", type=Path, help="keep the figures in this file")
    args = parser.parse_args(words)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = small_model()
        works = {
            "signed scores": scoring(model, "signed"),
            "unsigned scores": scoring(model, "unsigned"),
            "completions": completions(model),
            "perplexity": perplexity(model),
        }
        print(f"{'work':<16} {'ours s':>8} {'plain s':>8} {'ratio':>6} {'recorded':>9}")
        rows = {}
        for name, (ours, plain) in works.items():
            own, other = ratio_of(ours, plain, args.repeats)
            rows[name] = own / other
            print(f"{name:<16} {own:>8.2f} {other:>8.2f} {rows[name]:>6.2f} {RECORDED[name]:>9.2f}", flush=True)
    finally:
        torch.set_num_threads(threads)
    if args.json is not None:
        args.json.write_text(json.dumps({"ratios": rows, "recorded": RECORDED}, indent=1) + "\n")
    return int(any(ratio > WORSE * RECORDED[name] for name, ratio in rows.items()))


if __name__ == "__main__":
    sys.exit(main())
