"""What a scoring run will take, before any weight is read: bytes of weights, sums, activations and outputs.

Names and shapes come from the model's config. The activations that a backward pass keeps are counted on tensors
without values, at the run's own batch size and length, with fused attention and the plain gradient; the rules of LRP
keep a few more.
"""

from __future__ import annotations

import logging
import math
import shutil
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparc3_pl.attribution.methods import Options
from sparc3_pl.document.blocks import Table
from sparc3_pl.errors import InputError
from sparc3_pl.model.attention import attention_modules, wrapped_attention
from sparc3_pl.model.loading import load_skeleton
from sparc3_pl.model.source import ModelSource
from sparc3_pl.model.structure import decoder
from sparc3_pl.scoring.score_run import ScoreRequest

__all__ = ["Need", "free_memory", "needs_of", "refuse_what_cannot_fit", "table_of"]

log = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Need:
    """Bytes that one process takes.

    Attributes:
        what: ``weights``, ``sums``, ``activations`` or ``scores``.
        where: ``device`` (of the model), ``host`` or ``disk``.
        bytes: How many; None: unknown.
        note: How they were counted.
    """

    what: str
    where: str
    bytes: int | None
    note: str = ""


def needs_of(request: ScoreRequest, source: ModelSource, batch_size: int, length: int | None) -> list[Need]:
    """What a process of a run takes; no weight is read.

    Args:
        request: What is scored.
        source: The model.
        batch_size: Samples in a batch.
        length: Tokens of the longest sample; None: as many as the model takes.

    Raises:
        InputError: as ``load_skeleton`` and ``ScoreRequest.groups``.
    """
    skeleton = load_skeleton(source).eval().requires_grad_(False)
    config = skeleton.config.get_text_config()
    dtype = _DTYPES.get(source.dtype) or getattr(config, "dtype", None) or torch.float32
    skeleton.to(dtype)
    length = length or getattr(config, "max_position_embeddings", None)
    weights = sum(parameter.nbytes for parameter in skeleton.parameters())
    request_on_device = replace(request, options=replace(request.options, sums_on_host=False))
    scorer = request_on_device.scorer(skeleton)
    sums = sum(tensor.nbytes for layer in scorer.sums.values() for tensor in layer.values())
    options = request.options
    scores = sum(_bytes_on_disk(math.prod(layer.group.shape), options) for layer in scorer.layers.values())
    needs = [
        Need("weights", "device", weights, f"{weights // dtype.itemsize:,} parameters, {_name(dtype)}"),
        Need("sums", "host" if options.sums_on_host else "device", sums, f"{len(scorer.layers)} layers"),
    ]
    if request.method.object.needs_target and length is not None:
        what = f"{batch_size} x {length} tokens"
        needs.append(Need("activations", "device", _activations(skeleton, batch_size, length, options), what))
    return [*needs, Need("scores", "disk", scores, "float32")]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _bytes_on_disk(count: int, options: Options) -> int:
    return 4 * count * (1 + options.squares + options.groups)


def _activations(skeleton: nn.Module, batch_size: int, length: int, options: Options) -> int | None:
    """What the backward pass of a batch keeps of its forward pass; of one decoder layer with checkpointing.

    None if the model's code does something that tensors without values cannot.
    """
    kept: dict[int, Tensor] = {}
    own = {parameter.untyped_storage()._cdata for parameter in skeleton.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        if (storage := tensor.untyped_storage()._cdata) not in own:
            kept[storage] = tensor
        return tensor

    hidden = skeleton.get_input_embeddings().weight.shape[1]
    words = torch.zeros(batch_size, length, hidden, dtype=skeleton.dtype, device="meta", requires_grad=True)
    mask = torch.ones(batch_size, 1, length, length, dtype=torch.bool, device="meta")  # one that nobody looks into
    try:
        with torch.enable_grad(), ExitStack() as undo:
            for module in attention_modules(skeleton).values():
                undo.enter_context(wrapped_attention(module, lambda base: _fused))
            undo.enter_context(torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor))
            decoder(skeleton)(inputs_embeds=words, attention_mask=mask, use_cache=False)
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        log.warning("activations cannot be counted without weights: %s", error)
        return None
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    layers = getattr(skeleton.config.get_text_config(), "num_hidden_layers", 1)
    return total // layers + layers * words.nbytes if options.gradient_checkpointing else total


def _fused(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    return _Fused.apply(q, k, v), None


class _Fused(torch.autograd.Function):
    """Keeps what fused attention keeps: its inputs and its output, and no weights ``[T, T]``."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        output = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])
        ctx.save_for_backward(q, k, v, output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None]:
        return None, None, None


# --- what there is ----------------------------------------------------------------------------------------------------


def free_memory(device: torch.device, folder: str | Path) -> dict[str, int | None]:
    """Free bytes by ``device``, ``host`` and ``disk`` (where ``folder`` will be); None: unknown."""
    host = _free_on_host()
    there = next(path for path in (Path(folder).absolute(), *Path(folder).absolute().parents) if path.exists())
    of_device = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else host
    return {"device": of_device, "host": host, "disk": shutil.disk_usage(there).free}


def _free_on_host() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def refuse_what_cannot_fit(needs: list[Need], free: dict[str, int | None]) -> None:
    """Compares what a process takes with what is free.

    Raises:
        InputError: naming the place and both numbers.
    """
    for where, available in free.items():
        parts = [need for need in needs if need.where == where and need.bytes is not None]
        total = sum(need.bytes for need in parts)
        if available is not None and total > available:
            named = ", ".join(f"{need.what} {_size(need.bytes)}" for need in parts)
            raise InputError(
                f"the run does not fit: {named} make {_size(total)} on the {where}, but {_size(available)} are free; "
                f"{_WAYS_OUT[where]}"
            )


_WAYS_OUT = {
    "device": "lower data.batch_size or data.seq_len, or set model.gradient_checkpointing, model.sums_on_host or "
    "model.device_map: auto",
    "host": "score fewer layers at a time (model.targets)",
    "disk": "give another --output, or score fewer layers (model.targets)",
}


def table_of(needs: list[Need], free: dict[str, int | None]) -> Table:
    """What is taken where, and what is free there."""
    rows: list[tuple[Any, ...]] = [(need.what, need.where, _size(need.bytes), need.note) for need in needs]
    rows += [("free", where, _size(available), "") for where, available in free.items()]
    return Table.of(("what", "where", "size", "how"), rows, note="Of each process; nothing was loaded.")


def _size(number: int | None) -> str:
    return "unknown" if number is None else f"{number / 2**20:,.1f} MiB"
