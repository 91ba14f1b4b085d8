"""Completions token by token: each prompt is read once for all its completions, and nothing is copied at a step.

transformers' ``generate`` pads a batch on the left, reads a prompt once for every completion, grows its cache by
copying it at every token and keeps rows that have ended. Here prompts of about one length are read together, padded on
the right, which needs no mask; their keys and values go into a buffer that is long enough for the tokens to come; a
mask for the whole batch is made once; and rows that have ended leave.

That is right for attention over all earlier tokens, which is tried on the model itself before it is relied on
(``prepare``). Other models go through ``generate``.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from sparc3_pl.model.placement import input_device
from sparc3_pl.model.size import decoder_flops
from sparc3_pl.runtime.timing import current, measuring

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Decoder", "Draws", "prepare"]

log = logging.getLogger(__name__)

MOST_TOKENS = 4096
"""The most tokens of prompts that are read at once: more make a matrix product no faster, and take memory."""

_TRIAL = 8  # tokens of the longest row on which a model is tried

_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3}  # relative, of the trial's logits; half precision: 0.1

Chooser = Callable[[Tensor, int, Tensor], tuple[Tensor, Tensor]]
"""(logits ``[R, V]``, step, which rows of the batch these are ``[R]``) -> token ids ``[R]``, and whether the logits of
each row were finite ``[R]``."""


@dataclass(frozen=True)
class Draws:
    """What was drawn for one row.

    Attributes:
        tokens: New token ids, the end token with them.
        broken_at: Step at which the row's logits were not finite (nothing was drawn from there on); -1: never.
    """

    tokens: list[int]
    broken_at: int = -1


class _Buffer(DynamicLayer):
    """Keys and values of one layer, ``[R, heads, length, size]``, filled from the left."""

    def __init__(self, keys: Tensor, values: Tensor, rows: int, length: int) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        # Zeros: what is masked is multiplied by a weight of 0, and so must be finite.
        self.keys, self.values = (
            torch.zeros((rows, x.shape[1], length, x.shape[3]), dtype=x.dtype, device=x.device) for x in (keys, values)
        )
        self.length = 0

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        start, self.length = self.length, self.length + key_states.shape[2]
        self.keys[:, :, start : self.length] = key_states
        self.values[:, :, start : self.length] = value_states
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def get_seq_length(self) -> int:
        return self.length


@dataclass(frozen=True)
class Decoder:
    """Draws completions of a model that has passed the trial.

    Attributes:
        model: The model, in eval mode.
        longest: Tokens, prompt and completion together, up to which every layer sees all earlier ones; None: any.
        token_bytes: Bytes of the keys and values of one token.
        flops: Operations a token, of the decoder layers and of the output head.
    """

    model: PreTrainedModel
    longest: int | None
    token_bytes: int
    flops: tuple[float, float]

    @torch.inference_mode()
    def __call__(
        self, prompts: Sequence[tuple[int, ...]], steps: int, choose: Chooser, ends: Sequence[int]
    ) -> list[Draws]:
        """New tokens of each row.

        Args:
            prompts: Token ids of each row; rows that are equal and stand together share one pass over them.
            steps: The most tokens that are drawn.
            choose: Picks the next token of each row.
            ends: Token ids after which a row ends.
        """
        now = current()
        now.did(samples=len(prompts), like=self.model.get_input_embeddings().weight)
        logits, cache, mask = self._prefill(prompts, steps)
        device = logits.device
        lengths = torch.tensor([len(p) for p in prompts], device=device)
        rows = torch.arange(len(prompts), device=device)  # rows of the batch that still go on
        tokens_RS = torch.full((len(prompts), steps), -1, device=device)
        broken_at = torch.full((len(prompts),), -1, device=device)
        end_tokens, longest = torch.tensor(ends, dtype=torch.long, device=device), max(map(len, prompts))
        goes_on = torch.ones(len(prompts), dtype=torch.bool, device=device)  # for each row that is still there
        for step in range(steps):
            token_R, finite = choose(logits, step, rows)
            tokens_RS[rows, step] = token_R
            before = broken_at[rows]
            broken_at[rows] = torch.where(finite | (before >= 0), before, step)
            goes_on = goes_on & finite & ~torch.isin(token_R, end_tokens)
            num_open = int(goes_on.sum())
            if step + 1 == steps or not num_open:
                break
            # Leaving copies the cache once. Until an eighth has ended, rows are carried on, and what is drawn for
            # them after their end is not looked at.
            if len(rows) - num_open >= max(1, len(rows) // 8):
                keep = goes_on.nonzero()[:, 0]
                rows, token_R, mask, goes_on = rows[keep], token_R[keep], mask[keep], goes_on[keep]
                cache.batch_select_indices(keep)
            now.did(tokens=num_open, padded=len(rows) - num_open, flops=sum(self.flops) * num_open, passes=1)
            logits = self._step(token_R, lengths[rows] + step, mask[..., : longest + step + 1], cache)
        return [
            _until_end(tokens, first_broken, set(ends))
            for tokens, first_broken in zip(tokens_RS.tolist(), broken_at.tolist(), strict=True)
        ]

    def _prefill(self, prompts: Sequence[tuple[int, ...]], steps: int) -> tuple[Tensor, Cache, Tensor]:
        """Logits after each row's prompt ``[R, V]``, the filled cache, and the mask of all steps ``[R, 1, 1, T]``.

        The mask is added to the attention's logits: 0 for a row's own prompt and all new tokens, -inf for the places
        between the end of its prompt and the first new token.
        """
        device = input_device(self.model)
        longest = max(map(len, prompts))
        layers: list[_Buffer] = []
        logits = None
        for first, last in _chunks(prompts):
            distinct = list(dict.fromkeys(prompts[first:last]))
            place = {prompt: n for n, prompt in enumerate(distinct)}
            place_R = torch.tensor([place[prompt] for prompt in prompts[first:last]], device=device)
            cache = DynamicCache()  # without the config: layers with a window keep all that is within ``longest``
            z_PV = self._read(distinct, cache, device)
            if logits is None:
                logits = z_PV.new_empty(len(prompts), z_PV.shape[-1])
                length = longest + steps - 1  # the last token that is drawn is not read
                layers = [_Buffer(layer.keys, layer.values, len(prompts), length) for layer in cache.layers]
            logits[first:last] = z_PV[place_R]
            for buffer, layer in zip(layers, cache.layers, strict=True):
                there = place_R.to(layer.keys.device)
                buffer.keys[first:last, :, : layer.keys.shape[2]] = layer.keys[there]
                buffer.values[first:last, :, : layer.keys.shape[2]] = layer.values[there]
        for buffer in layers:
            buffer.length = longest
        assert logits is not None
        place_T = torch.arange(longest + steps, device=device)
        lengths_R1 = torch.tensor([[len(prompt)] for prompt in prompts], device=device)
        hidden_RT = (place_T >= lengths_R1) & (place_T < longest)
        mask = torch.zeros(hidden_RT.shape, dtype=self.model.dtype, device=device).masked_fill_(hidden_RT, -math.inf)
        return logits, Cache(layers=layers), mask[:, None, None]

    def _read(self, prompts: Sequence[tuple[int, ...]], cache: Cache, device: torch.device) -> Tensor:
        """Logits after each prompt ``[P, V]``. What pads a prompt comes after it, so it does not see that."""
        sizes = [len(prompt) for prompt in prompts]
        longest, num_logits = max(sizes), max(sizes) - min(sizes) + 1
        ids = torch.tensor([prompt + prompt[-1:] * (longest - len(prompt)) for prompt in prompts], device=device)
        out = self.model(input_ids=ids, use_cache=True, logits_to_keep=num_logits, past_key_values=cache)
        body, head = self.flops
        flops = body * sum(sizes) + head * len(sizes)
        current().did(tokens=sum(sizes), padded=ids.numel() - sum(sizes), flops=flops, passes=1)
        last = torch.tensor(sizes, device=out.logits.device) - longest - 1
        return out.logits[torch.arange(len(prompts), device=last.device), last]

    def _step(self, tokens_R: Tensor, positions_R: Tensor, mask: Tensor, cache: Cache) -> Tensor:
        out = self.model(
            input_ids=tokens_R[:, None],
            position_ids=positions_R[:, None],
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits[:, -1]


def prepare(model: PreTrainedModel, prompt: Sequence[int]) -> Decoder | None:
    """A decoder for the model, or None if it is not sure that its completions would be the model's own.

    Logits of three short rows of different length, drawn through buffer and mask, must be those of plain passes over
    them. What so few tokens do not show is read off the configuration: windows, and positions that depend on the length
    of the text.

    Args:
        model: The model, in eval mode.
        prompt: Some token ids to try it on, at least one.
    """
    ids = tuple((list(prompt) * _TRIAL)[:_TRIAL])
    forced = torch.tensor([ids[1:3], ids[:2], ids[3:5]])
    trial_logits: list[Tensor] = []

    def choose(logits: Tensor, step: int, rows_R: Tensor) -> tuple[Tensor, Tensor]:
        trial_logits.append(logits)
        token_R = forced[rows_R.cpu(), step].to(logits.device) if step < 2 else rows_R
        return token_R, torch.ones_like(rows_R, dtype=torch.bool)

    try:
        flops = decoder_flops(model), 2.0 * model.get_output_embeddings().weight.numel()
        decoder = Decoder(model, _longest(model), 0, flops)
        ids = ids if decoder.longest is None else ids[: max(2, decoder.longest - 2)]
        rows = [ids, ids[:-1], ids[: len(ids) // 2]]  # the first two are read together
        cache = DynamicCache()
        with measuring(), torch.inference_mode():  # with a clock of its own: nobody asked for the trial
            decoder(rows, 3, choose, [])
            device = trial_logits[0].device
            decoder._read([ids], cache, device)
            plain = [
                model(input_ids=torch.tensor([[*row, *forced[n, :step].tolist()]], device=device)).logits[0, -1]
                for step in range(3)
                for n, row in enumerate(rows)
            ]
    except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        log.info("completions are drawn by transformers' generate (%s: %s)", type(error).__name__, error)
        return None
    want, trial = torch.stack(plain).double(), torch.cat(trial_logits).double()
    gap = float((trial - want).norm() / want.norm())
    if not gap <= _TOLERANCE.get(model.dtype, 0.1):
        log.info("completions are drawn by transformers' generate (in a trial the logits differed by %.1e)", gap)
        return None
    token_bytes = sum((x.keys.numel() + x.values.numel()) * x.keys.element_size() for x in cache.layers) // len(ids)
    return replace(decoder, token_bytes=token_bytes)


def _longest(model: PreTrainedModel) -> int | None:
    """Tokens up to which all layers attend to everything before; None: however many.

    Raises:
        NotImplementedError: if some layer attends otherwise.
    """
    config = model.config.get_text_config()
    if config._attn_implementation not in ("sdpa", "eager"):  # others do not read a mask that is made already
        raise NotImplementedError(f"attention {config._attn_implementation}")
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {r.get("rope_type", "default") for r in (rope, *rope.values()) if isinstance(r, dict)}
    if kinds & {"dynamic", "longrope"}:
        raise NotImplementedError("positions depend on the longest row of a batch")
    windows = []
    for layer in DynamicCache(config=config).layers:
        if type(layer) is DynamicSlidingWindowLayer:
            windows.append(layer.sliding_window)
        elif type(layer) is not DynamicLayer:
            raise NotImplementedError(type(layer).__name__)
    return min(windows, default=None)


def _chunks(prompts: Sequence[tuple[int, ...]]) -> list[tuple[int, int]]:
    """Neighbours that are read together: (first row, one past the last).

    They are at most an eighth shorter than the first, and have at most ``MOST_TOKENS`` tokens, where equal neighbours
    count once.
    """
    chunks: list[tuple[int, int]] = []
    first, start, distinct, longest = 0, 0, 0, len(prompts[0])
    for prompt, same in groupby(prompts):
        fits = longest - longest // 8 <= len(prompt) <= longest and (distinct + 1) * longest <= MOST_TOKENS
        if distinct and not fits:
            chunks.append((first, start))
            first, distinct, longest = start, 0, len(prompt)
        distinct, start = distinct + 1, start + len(list(same))
    return [*chunks, (first, start)]


def _until_end(tokens: list[int], broken_at: int, ends: set[int]) -> Draws:
    stop = next((n + 1 for n, token in enumerate(tokens) if token in ends), len(tokens))
    if 0 <= broken_at < stop:
        return Draws(tokens[:broken_at], broken_at)
    return Draws(tokens[:stop])
