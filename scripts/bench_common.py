"""What the benchmarks share: models, clocks, memory meters, the machine's matrix-product rate, tables."""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from rich.console import Console
from rich.table import Table

from sparc3_pl.io.provenance import command_line, now, versions
from sparc3_pl.model.loading import load_model
from sparc3_pl.model.source import ModelSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")

CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
_chosen = {"clock": time.perf_counter}

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that say which model, where and with how many threads."""
    model = parser.add_argument_group("model (the default: SmolLM2-135M's shape with random weights)")
    model.add_argument("--model", help="hub id, folder or FILE.gguf; without it a Llama is generated")
    model.add_argument("--hidden", type=int, default=576)
    model.add_argument("--intermediate", type=int, default=1536)
    model.add_argument("--layers", type=int, default=30)
    model.add_argument("--heads", type=int, default=9)
    model.add_argument("--kv-heads", type=int, default=3)
    model.add_argument("--vocab", type=int, default=49152)
    model.add_argument("--dtype", choices=list(DTYPES), default="float32")
    model.add_argument("--device", default="cpu", help="cpu or cuda")
    model.add_argument("--threads", type=int, help="CPU threads (the default is torch's)")
    model.add_argument(
        "--clock", choices=list(CLOCKS), default="wall",
        help="processor: seconds that this process computes, for a busy machine; use it with --threads 1 on the CPU",
    )  # fmt: skip


def build_model(args: argparse.Namespace) -> PreTrainedModel:
    """The model that the flags ask for, its output head untied so that both procedures score the head by itself."""
    if args.threads:
        torch.set_num_threads(args.threads)
    _chosen["clock"] = CLOCKS[args.clock]
    model = load_model(ModelSource(args.model, args.dtype)) if args.model else _generated(args)
    model = model.to(args.device).eval()
    head = model.get_output_embeddings()
    if head.weight is model.get_input_embeddings().weight:
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    return model.requires_grad_(False)


def _generated(args: argparse.Namespace) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        vocab_size=args.vocab,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
    )
    with torch.device(args.device):
        return AutoModelForCausalLM.from_config(config, dtype=DTYPES[args.dtype])


# --- clocks -----------------------------------------------------------------------------------------------------------


def timed(run: Callable[[], Any], device: str) -> float:
    """Seconds that ``run`` takes, the device's queue emptied before and after."""
    synchronise(device)
    clock = _chosen["clock"]
    start = clock()
    run()
    synchronise(device)
    return clock() - start


def synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def alternate(plain: Callable[[], Any], ours: Callable[[], Any], repeats: int, device: str) -> tuple[list, list]:
    """Seconds of both, ``repeats`` times each, taking turns at being first: a busy moment then hits both."""
    seconds: dict[Any, list[float]] = {plain: [], ours: []}
    for repeat in range(repeats):
        for run in (plain, ours) if repeat % 2 == 0 else (ours, plain):
            seconds[run].append(timed(run, device))
        log(f"  {repeat + 1}/{repeats}: plain {seconds[plain][-1]:.3f} s, ours {seconds[ours][-1]:.3f} s")
    return seconds[plain], seconds[ours]


def median_ratio(plain: list[float], ours: list[float]) -> float:
    return statistics.median(p / o for p, o in zip(plain, ours, strict=True))


def matmul_rate(tokens: int, hidden: int, intermediate: int, dtype: torch.dtype, device: str) -> float:
    """FLOP/s of the best matrix product of the model's own sizes, and of a large square one."""
    shapes = [(tokens, hidden, intermediate), (intermediate, tokens, hidden), (2048, 2048, 2048)]
    if device.startswith("cuda"):
        shapes.append((8192, 8192, 8192))
    return max(_rate_of(shape, dtype, device) for shape in shapes)


def _rate_of(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> float:
    m, k, n = shape
    a, b = torch.randn(m, k, device=device, dtype=dtype), torch.randn(k, n, device=device, dtype=dtype)
    out = torch.empty(m, n, device=device, dtype=dtype)
    calls = max(1, min(50, int(2e10 / (m * k * n))))
    torch.mm(a, b, out=out)
    best = min(timed(lambda: [torch.mm(a, b, out=out) for _ in range(calls)], device) for _ in range(5))
    return 2 * m * k * n * calls / best


# --- memory -----------------------------------------------------------------------------------------------------------


def peak_of(run: Callable[[], T], device: str) -> tuple[T, int]:
    """The result of ``run`` and the most bytes that it held above those held before it.

    On the CPU the kernel's own mark of the resident set is used, which can be set back on Linux.
    """
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = run()
        return result, torch.cuda.max_memory_allocated() - before
    _return_freed_memory()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_bytes("VmRSS")
    result = run()
    return result, _status_bytes("VmHWM") - before


def _return_freed_memory() -> None:
    """Gives what was freed back to the system, so that a later peak is not hidden in it."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def weight_bytes(model: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


# --- what was measured where ------------------------------------------------------------------------------------------


def environment(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that a figure must carry: hardware, versions, commit, command, date."""
    return {
        "hardware": _hardware(args.device),
        "threads": torch.get_num_threads(),
        "clock": args.clock,
        "load_average": round(os.getloadavg()[0], 2),
        "versions": versions(),
        "commit": _commit(),
        "command": command_line(),
        "date": now(),
        "dtype": args.dtype,
        "device": args.device,
    }


def _hardware(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{name}, {os.cpu_count()} cores"


def _commit() -> str:
    """The commit, with ``+`` where tracked files differ from it."""
    folder = Path(__file__).parent
    call = {"cwd": folder, "capture_output": True, "text": True, "check": False}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], **call).stdout.strip()
    changed = subprocess.run(["git", "status", "--porcelain", "-uno", "--", "..", ":!../docs"], **call).stdout.strip()
    return f"{commit or 'unknown'}{'+' if changed else ''}"


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# --- tables -----------------------------------------------------------------------------------------------------------


def figures(
    model: torch.nn.Module, tokens: int, flops: float, rate: float, sides: dict[str, tuple[list[float], int]]
) -> dict[str, Any]:
    """A row's figures; ``sides``: for ``plain``, ``ours`` or both, the seconds of the passes and the peak of memory."""
    result: dict[str, Any] = {"tokens": tokens, "flops": flops}
    for side, (seconds, peak) in sides.items():
        median = statistics.median(seconds)
        result |= {
            f"seconds_{side}": seconds,
            f"tokens_per_second_{side}": tokens / median,
            f"share_{side}": flops / median / rate,
            f"peak_bytes_{side}": weight_bytes(model) + peak,
        }
    return result


def as_row(result: dict[str, Any], amount: str) -> list[str]:
    """The table's line; a figure that was not measured is a dash."""

    def cell(key: str, show: Callable[[Any], str]) -> str:
        return show(result[key]) if key in result else "-"

    def pair(key: str, show: Callable[[Any], str]) -> list[str]:
        return [cell(f"{key}_{side}", show) for side in ("plain", "ours")]

    return [
        result["work"],
        f"{result[amount]} ({result['tokens']} tokens)",
        cell("ratio", "{:.2f}".format),
        *pair("seconds", lambda seconds: f"{statistics.median(seconds):.3f}"),
        " -> ".join(pair("tokens_per_second", "{:.0f}".format)),
        *pair("share", "{:.0%}".format),
        *pair("peak_bytes", lambda peak: f"{peak / 1e9:.2f}"),
        cell("difference", "{:.0e}".format),
    ]


def show(title: str, amount: str, results: list[dict[str, Any]], facts: dict[str, Any]) -> None:
    """A table, and below it the facts that it needs to be believed; ``amount``: the key that says how much was done."""
    columns = ["work", amount, "ratio", "s plain", "s ours", "tokens/s", "share plain", "share ours"]
    table = Table(*columns, "GB plain", "GB ours", "difference", title=title, title_justify="left")
    for result in results:
        table.add_row(*as_row(result, amount))
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    for name, value in facts.items():
        text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        console.print(f"{name.replace('_', ' ')}: {text}", soft_wrap=True, highlight=False)


def write_json(path: Path | None, result: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(result, indent=1) + "\n")
