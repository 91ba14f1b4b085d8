"""Completions and their judge beside those of an earlier commit: seconds on the wall, and whether the tokens are equal.

Each side runs in processes of its own, in turns: the earlier commit's from a worktree of it that goes afterwards.

    python scripts/bench_before.py --before 45e68eb --model models/SmolLM2-135M-Instruct.Q4_1.gguf \
        --prompts PROMPTS.jsonl --judge-checkpoint JUDGE.ckpt --judge-config FOLDER

Two works: 643 prompts with 3 completions of 20 tokens, judged, and 93 prompts with one of 50.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
WORKS = {"643 x 3 x 20, judged": (0.5, 643, 3, 20, True), "93 x 1 x 50": (0.9, 93, 1, 50, False)}
"""Least toxicity of the prompts, how many, completions per prompt, new tokens, and whether a judge reads them."""


def run_side(args: argparse.Namespace) -> None:
    """One work by the package that this process imports; prints seconds and a digest of the tokens."""
    import hashlib

    from sparc3_pl.evaluation.generation import Generator, Sampling
    from sparc3_pl.evaluation.judges import DetoxifyJudge, judged
    from sparc3_pl.model.loading import load_model, load_tokenizer
    from sparc3_pl.model.source import ModelSource

    least, most, each, new, is_judged = WORKS[args.side]
    prompts = [json.loads(line)["prompt"] for line in args.prompts.read_text(encoding="utf-8").splitlines()]
    texts = [prompt["text"] for prompt in prompts if (prompt["toxicity"] or 0) >= least][:most]
    source = ModelSource(str(args.model), "float32")
    model, tokenizer = load_model(source), load_tokenizer(source)
    judge = DetoxifyJudge(checkpoint=args.judge_checkpoint, config_path=args.judge_config)
    judged(judge, ["One sentence."])
    generator = Generator(model, tokenizer, Sampling(new, samples_per_prompt=each))
    generator(["warm"], texts[:1])
    start, processor = time.perf_counter(), time.process_time()
    completions = generator([str(n) for n in range(len(texts))], texts)
    drawn = time.perf_counter()
    if is_judged:
        judged(judge, [completion.text for completion in completions])
    end = time.perf_counter()
    tokens = [list(completion.tokens) for completion in completions]  # earlier commits have no other name
    figures = {
        "prompts": len(texts),
        "seconds": end - start,
        "judge": end - drawn,
        "processor": time.process_time() - processor,
        "tokens": sum(map(len, tokens)),
        "digests": [hashlib.sha256(str(t).encode()).hexdigest()[:8] for t in tokens],
    }
    print(json.dumps(figures))


def child(tree: Path, words: list[str]) -> dict[str, Any]:
    """The figures of one work, by the package in ``tree``."""
    call = [sys.executable, str(HERE / "bench_before.py"), *words]
    out = subprocess.run(call, check=True, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(tree)})
    return json.loads(out.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", help="the earlier commit")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True, help="jsonl file in the RealToxicityPrompts schema")
    parser.add_argument("--judge-checkpoint", required=True)
    parser.add_argument("--judge-config", required=True)
    parser.add_argument("--repeats", type=int, default=1, help="runs of each side (1)")
    parser.add_argument("--work", nargs="+", choices=list(WORKS), default=list(WORKS))
    parser.add_argument("--side", choices=list(WORKS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        run_side(args)
        return
    words = ["--model", str(args.model.resolve()), "--prompts", str(args.prompts.resolve())]
    words += ["--judge-checkpoint", args.judge_checkpoint, "--judge-config", args.judge_config]
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "before"
        git = ["git", "-C", str(HERE.parent), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(tree), args.before], check=True)
        try:
            for work in args.work:
                for _ in range(args.repeats):
                    before, now = (child(t, ["--side", work, *words]) for t in (tree, HERE.parent))
                    equal = sum(a == b for a, b in zip(before["digests"], now["digests"], strict=True))
                    print(
                        f"{work}: {now['prompts']} prompts, {now['tokens']} tokens; before {before['seconds']:.1f} s "
                        f"(judge {before['judge']:.1f}), now {now['seconds']:.1f} s (judge {now['judge']:.1f}), "
                        f"{before['seconds'] / now['seconds']:.2f} times as fast (processor time "
                        f"{before['processor'] / now['processor']:.2f}); {equal} of {len(now['digests'])} equal",
                        flush=True,
                    )
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)


if __name__ == "__main__":
    main()
