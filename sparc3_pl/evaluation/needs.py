"""What an evaluation will take, before any weight is read: bytes of weights, a batch, the judges and the outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import nn

from sparc3_pl.document.needs import Need
from sparc3_pl.evaluation.generation import most_rows, row_bytes
from sparc3_pl.model.footprint import activation_bytes, key_value_bytes, num_layers, skeleton_in_dtype, weight_bytes

if TYPE_CHECKING:
    from sparc3_pl.data.encoding import Encoder
    from sparc3_pl.data.evaluation_data import EvaluationData
    from sparc3_pl.evaluation.module import EvaluationModule
    from sparc3_pl.evaluation.settings import EvaluationSettings

__all__ = ["needs_of"]

_FIELDS_OF_A_LINE = 200
"""Bytes of a line of completions beside the two texts, about."""

_LESS = "lower data.window_batch_size or model.max_length, or set model.device_map: auto"


def needs_of(module: EvaluationModule, data: EvaluationData, free: Mapping[str, int | None]) -> list[Need]:
    """What a process of an evaluation takes. Text and prompts are read; no weight is.

    Measurements of your own and tasks are not counted.

    Args:
        module: What is measured.
        data: The data it is measured on.
        free: Bytes by place, as of ``runtime.memory``: completions are made in batches that fit.

    Raises:
        InputError: as ``load_skeleton``, or if text or prompts cannot be read.
    """
    settings, skeleton = module.settings, skeleton_in_dtype(module.source)
    data.read(module.encoder)
    weights, dtype = weight_bytes(skeleton), skeleton.dtype
    name = str(dtype).removeprefix("torch.")
    needs = [Need("weights", "device", weights, f"{weights // dtype.itemsize:,} parameters, {name}", _LESS)]
    if data.text_source is not None or data.further_texts:
        context = getattr(skeleton.config.get_text_config(), "max_position_embeddings", None)
        window = settings.window(context)
        data.plan_batches(window)  # refuses what the tokenizer says that the model cannot read
        activations = activation_bytes(skeleton, data.window_batch_size, window.max_length)
        what = f"one layer's, {data.window_batch_size} x {window.max_length} tokens"
        needs.append(
            Need("windows", "device", None if activations is None else activations // num_layers(skeleton), what)
        )
    prompts = [*data.prompts, *data.neutral]
    if prompts:
        judges = {"judge": settings.judge} | {f"judge {key}": one for key, one in settings.further_judges.items()}
        for label, judge in judges.items():
            if (stored_bytes := getattr(judge, "stored_bytes", None)) is not None:
                needs.append(Need(label, "device", stored_bytes(), "as the checkpoint is stored"))
        available = free.get("device", free.get("host"))
        rest = None if available is None else available - sum(need.bytes or 0 for need in needs)
        needs += _of_completions(settings, module.encoder, prompts, key_value_bytes(skeleton), skeleton, rest)
    return needs


def _of_completions(
    settings: EvaluationSettings,
    encoder: Encoder,
    prompts: Sequence[str],
    token_bytes: int | None,
    skeleton: nn.Module,
    available: int | None,
) -> list[Need]:
    """The needs of a batch of completions as large as the run would make it, and of all of them on the disk."""
    lengths = [len(encoder.prefix) + len(encoder.body(prompt)) for prompt in prompts]
    new, number = settings.sampling.max_new_tokens, len(prompts) * settings.sampling.samples_per_prompt
    vocabulary = skeleton.get_input_embeddings().weight.shape[0]
    size, rows = None, settings.generation_batch_size
    if token_bytes is not None:
        of_row = row_bytes(max(lengths) + new, token_bytes, vocabulary)
        rows = min(number, most_rows(of_row, rows, available))
        size = rows * of_row
    text = sum(len(prompt.encode()) for prompt in prompts)
    line = text / len(prompts) + new * text / max(1, sum(lengths)) + _FIELDS_OF_A_LINE
    at_once = "" if rows is None else f"{rows} at once of {number:,}, "
    batch = Need(
        "completions", "device", size, f"{at_once}up to {max(lengths) + new} tokens", "lower model.max_new_tokens"
    )
    return [batch, Need("completions", "disk", int(number * line), f"{number:,} lines, about", "give another --output")]
