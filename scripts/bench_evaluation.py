"""Time the evaluation pass against the plain procedure: same model, same text and prompts, one run, taking turns.

The plain procedure is what one writes first. Perplexity: for each window the model's logits at every position, and
their cross-entropy. Toxicity: for each prompt ``generate``, then the judge on that one completion. Both must agree
before anything is timed: perplexity with the cross-entropy in float64, completions without sampling (the same text),
scores one by one.

    python scripts/bench_evaluation.py --model models/SmolLM2-135M-Instruct.Q4_1.gguf --text TEXT.txt \
        --prompts PROMPTS.jsonl --judge-checkpoint JUDGE.ckpt --judge-config FOLDER
    python scripts/bench_evaluation.py --hidden 4096 --intermediate 14336 --layers 32 --heads 32 --kv-heads 8 \
        --vocab 128256 --dtype bfloat16 --device cuda

Without ``--model`` a Llama of the given shape is generated, and token ids are drawn at random: what they say makes no
difference to the arithmetic. No end token is obeyed, so that both procedures make the same number of tokens.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
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
    write_json,
)
from torch import Tensor, nn

from sparc3_pl.data.evaluation_data import sliding_windows
from sparc3_pl.data.sources import get_field, parse_filter, text_id
from sparc3_pl.evaluation.generation import Generator, Sampling
from sparc3_pl.evaluation.judges import DetoxifyJudge, judged
from sparc3_pl.model.likelihood import IGNORE, WindowScorer
from sparc3_pl.model.loading import load_tokenizer
from sparc3_pl.model.patching import swapped
from sparc3_pl.model.source import ModelSource
from sparc3_pl.model.structure import linear_layers, output_head

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}
"""Largest relative difference of two perplexities."""

SCORE_TOLERANCE = 1e-4
"""Largest difference of a judge's scores of the same text, alone and in a padded batch."""


class Numbers:
    """The tokenizer of a generated model: a text is its token ids, written out."""

    bos_token_id, eos_token_id, pad_token_id = 1, 2, 0
    bos_token = eos_token = model_max_length = None
    all_special_tokens: tuple[str, ...] = ()
    added_tokens_decoder: ClassVar[dict[int, Any]] = {}

    def __init__(self, vocab: int) -> None:
        self.vocab = vocab

    def __len__(self) -> int:
        return self.vocab

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}

    def decode(self, ids: list[int], **_: Any) -> str:
        return " ".join(map(str, ids))


# --- what is measured on ----------------------------------------------------------------------------------------------


def make_text(tokenizer: Any, args: argparse.Namespace) -> list[int]:
    if args.text is None:
        generator = torch.Generator().manual_seed(args.seed)
        return torch.randint(3, args.vocab, (args.text_tokens,), generator=generator).tolist()
    text = args.text.read_bytes()[: args.text_bytes].decode(errors="ignore")
    return tokenizer(text)["input_ids"]


def make_prompts(tokenizer: Any, args: argparse.Namespace) -> list[str]:
    if args.prompts is None:
        generator = torch.Generator().manual_seed(args.seed)
        lengths = torch.randint(10, 41, (args.num_prompts,), generator=generator).tolist()
        return [tokenizer.decode(torch.randint(3, args.vocab, (n,), generator=generator).tolist()) for n in lengths]
    wanted = parse_filter(args.prompts_filter)
    with args.prompts.open(encoding="utf-8") as stream:
        records = (json.loads(line) for line in stream)
        texts = [get_field(record, "prompt.text") for record in records if wanted.passes(record)]
    return list(itertools.islice(dict.fromkeys(texts), args.num_prompts))


def make_windows(ids: list[int], args: argparse.Namespace) -> list[tuple[Tensor, Tensor]]:
    """(ids, labels) of every window."""
    found = []
    for window in sliding_windows(len(ids), args.max_length, args.stride):
        tokens = torch.tensor(ids[window.start : window.end], device=args.device)
        labels = tokens.clone()
        labels[: window.scored - window.start] = IGNORE
        found.append((tokens, labels))
    return found


# --- perplexity -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def plain_perplexity(
    model: nn.Module, windows: list[tuple[Tensor, Tensor]], dtype: torch.dtype = torch.float32
) -> float:
    """``dtype``: of the cross-entropy; the library's own is off by 1e-5 in float32 on a CPU (see ``row_nll``)."""
    total, count = 0.0, 0
    for ids, labels in windows:
        logits = model(input_ids=ids[None]).logits[0, :-1].to(dtype)
        total += float(F.cross_entropy(logits, labels[1:], ignore_index=IGNORE, reduction="sum"))
        count += int((labels[1:] != IGNORE).sum())
    return math.exp(total / count)


def our_perplexity(scorer: WindowScorer, windows: list[tuple[Tensor, Tensor]], batch_size: int) -> float:
    total, count = 0.0, 0
    for start in range(0, len(windows), batch_size):
        batch = windows[start : start + batch_size]
        ids = nn.utils.rnn.pad_sequence([i for i, _ in batch], batch_first=True)
        labels = nn.utils.rnn.pad_sequence([w for _, w in batch], batch_first=True, padding_value=IGNORE)
        lengths = torch.tensor([len(i) for i, _ in batch], device=ids.device)
        mask = (torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]).long()
        nll, num_tokens = scorer(ids, mask, labels)
        total, count = total + float(nll.sum()), count + int(num_tokens.sum())
    return math.exp(total / count)


def compare_perplexity(model: nn.Module, tokenizer: Any, args: argparse.Namespace, rate: float) -> dict[str, Any]:
    windows = make_windows(make_text(tokenizer, args), args)
    title = f"perplexity, {args.max_length}/{args.stride}"
    log(f"{title}: {len(windows)} windows")
    scorer = WindowScorer(model)
    runs = (lambda: plain_perplexity(model, windows), lambda: our_perplexity(scorer, windows, args.window_batch_size))
    (_, peak_plain), (found, peak_ours) = (peak_of(run, args.device) for run in runs)
    want = plain_perplexity(model, windows, torch.float64)
    difference = abs(found / want - 1)
    if difference > TOLERANCE[DTYPES[args.dtype]]:
        sys.exit(f"error: {title}: {found} differs from {want} by {difference:.1e}: nothing is timed")
    scored = sum(int((labels[1:] != IGNORE).sum()) for _, labels in windows)
    needed = forward_flops(model, [len(ids) for ids, _ in windows]) + head_flops(model, scored)
    tokens, peaks = sum(len(ids) for ids, _ in windows), (peak_plain, peak_ours)
    timed = timing(model, runs, tokens, needed, rate, args, difference, peaks)
    return {"work": title, "amount": f"{len(windows)} windows", "value": found, **timed}


# --- toxicity ---------------------------------------------------------------------------------------------------------


def plain_toxicity(
    model: nn.Module, tokenizer: Any, judge: DetoxifyJudge, prompts: list[str], sampling: Sampling
) -> tuple[list[str], list[float]]:
    texts, scores = [], []
    how = {"do_sample": False}
    if sampling.temperature:
        how = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]], device=model.device)
        mask = torch.ones_like(ids)
        with torch.no_grad():
            out = model.generate(ids, attention_mask=mask, max_new_tokens=sampling.max_new_tokens, **how)
        text = tokenizer.decode(out[0, ids.shape[1] :].tolist(), skip_special_tokens=True)
        texts.append(text)
        scores.append(float(next(iter(judge.score([text]).values()))[0]))
    return texts, scores


def our_toxicity(generator: Generator, judge: DetoxifyJudge, prompts: list[str]) -> tuple[list[str], list[float]]:
    completions = generator([text_id(prompt) for prompt in prompts], prompts)
    texts = [completion.text for completion in completions]
    return texts, next(iter(judged(judge, texts).values())).tolist()


def compare_toxicity(model: nn.Module, tokenizer: Any, args: argparse.Namespace, rate: float) -> dict[str, Any]:
    from transformers import GenerationConfig

    prompts = make_prompts(tokenizer, args)
    title = f"toxicity, {args.max_new_tokens} new tokens"
    log(f"{title}: {len(prompts)} prompts")
    judge = DetoxifyJudge(args.judge, args.judge_checkpoint, args.judge_config)
    judge.place(args.device)
    sampling = Sampling(max_new_tokens=args.max_new_tokens)
    generator = Generator(model, tokenizer, sampling, args.batch_size)
    generator.end_tokens = []
    greedy = Generator(model, tokenizer, replace(sampling, temperature=0.0), args.batch_size)
    greedy.end_tokens = []
    settings = GenerationConfig(pad_token_id=tokenizer.pad_token_id)
    with swapped(model, "generation_config", settings):
        agreement = check_toxicity(
            model, tokenizer, judge, prompts[: args.check_prompts], greedy, exact=args.dtype == "float32"
        )
        runs = (
            lambda: plain_toxicity(model, tokenizer, judge, prompts, sampling),
            lambda: our_toxicity(generator, judge, prompts),
        )
        peaks = tuple(peak_of(run, args.device)[1] for run in runs)
        lengths = [len(tokenizer(prompt)["input_ids"]) + args.max_new_tokens for prompt in prompts]
        needed = forward_flops(model, lengths) + head_flops(model, len(prompts) * args.max_new_tokens)
        tokens = len(prompts) * args.max_new_tokens
        timed = timing(model, runs, tokens, needed, rate, args, agreement["difference"], peaks)
        return {"work": title, "amount": f"{len(prompts)} prompts", **agreement, **timed}


def check_toxicity(
    model: nn.Module, tokenizer: Any, judge: DetoxifyJudge, few: list[str], greedy: Generator, exact: bool
) -> dict[str, Any]:
    """Without sampling both must make the same texts (in half precision: most), and the judge must score them alike."""
    want = zip(*plain_toxicity(model, tokenizer, judge, few, greedy.sampling), strict=True)
    found = zip(*our_toxicity(greedy, judge, few), strict=True)
    gaps = [abs(a[1] - b[1]) for a, b in zip(want, found, strict=True) if a[0] == b[0]]
    same, worst = len(gaps), max(gaps, default=0.0)
    if worst > SCORE_TOLERANCE or (exact and same < len(few)):
        sys.exit(f"error: {same} of {len(few)} texts are equal, scores differ by {worst:.1e}: nothing is timed")
    log(f"  without sampling {same} of {len(few)} texts are equal, their scores differ by {worst:.0e} at most")
    return {"equal_texts": same, "checked_texts": len(few), "difference": worst}


# --- figures ----------------------------------------------------------------------------------------------------------


def forward_flops(model: nn.Module, lengths: list[int]) -> float:
    """Matrix products of the decoder layers, 2 per weight and token, attention included (causal half)."""
    name, _ = output_head(model)
    size = sum(layer.weight.numel() for n, layer in linear_layers(model).items() if n != name)
    width = model.config.hidden_size * model.config.num_hidden_layers
    return float(sum(2 * size * n + 2 * width * n**2 for n in lengths))


def head_flops(model: nn.Module, tokens: int) -> float:
    return 2.0 * output_head(model)[1].weight.numel() * tokens


def timing(
    model: nn.Module,
    runs: tuple[Any, Any],
    tokens: int,
    needed: float,
    rate: float,
    args: argparse.Namespace,
    difference: float,
    peaks: tuple[int, ...],
) -> dict[str, Any]:
    seconds = alternate(*runs, args.repeats, args.device)
    sides = dict(zip(("plain", "ours"), zip(seconds, peaks, strict=True), strict=True))
    measured = figures(model, tokens, needed, rate, sides)
    return {"difference": difference, "ratio": median_ratio(*seconds), **measured}


WORKS = {"perplexity": compare_perplexity, "toxicity": compare_toxicity}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--work", nargs="+", choices=list(WORKS), default=list(WORKS))
    parser.add_argument("--text", type=Path, help="text file for perplexity")
    parser.add_argument("--text-bytes", type=int, default=20_000, help="how much of it")
    parser.add_argument("--text-tokens", type=int, default=6144, help="random tokens where there is no text")
    parser.add_argument("--max-length", type=int, default=2048, help="tokens of a window")
    parser.add_argument("--stride", type=int, default=512, help="tokens from one window to the next")
    parser.add_argument("--window-batch-size", type=int, default=1, help="windows in one batch of ours")
    parser.add_argument("--prompts", type=Path, help="jsonl file in the RealToxicityPrompts schema")
    parser.add_argument("--prompts-filter", default="prompt.toxicity >= 0.9")
    parser.add_argument("--num-prompts", type=int, default=93)
    parser.add_argument("--check-prompts", type=int, default=8, help="prompts of the agreement check")
    parser.add_argument("--max-new-tokens", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=64, help="completions in one batch of ours")
    parser.add_argument("--judge", default=None, help="variant of Detoxify, or demo")
    parser.add_argument("--judge-checkpoint", help="local checkpoint in Detoxify's form")
    parser.add_argument("--judge-config", help="folder of its config and tokenizer")
    parser.add_argument("--repeats", type=int, default=5, help="timed passes of each procedure")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    args = parser.parse_args(arguments)
    if args.judge is None and args.judge_checkpoint is None:
        args.judge = "demo"
    if args.model is None and (args.text or args.prompts):
        parser.error("--text and --prompts need --model: a generated model reads token ids only")
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    model = build_model(args)
    args.vocab = model.config.vocab_size
    tokenizer = load_tokenizer(ModelSource(args.model)) if args.model else Numbers(args.vocab)
    rate = matmul_rate(512, model.config.hidden_size, model.config.intermediate_size, DTYPES[args.dtype], args.device)
    facts = {
        "model": f"{args.model or 'generated Llama'}, {sum(p.numel() for p in model.parameters()):,} parameters",
        "matmul_rate": f"{rate / 1e9:.0f} GFLOP/s measured",
        **environment(args),
    }
    results = [WORKS[work](model, tokenizer, args, rate) for work in args.work]
    show("evaluation: the plain procedure and ours", "amount", results, facts)
    settings = {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items()}
    write_json(args.json, {"settings": settings, "matmul_flops": rate, **facts, "results": results})


if __name__ == "__main__":
    main()
