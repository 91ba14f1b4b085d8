"""Sampled completions, the same for every (prompt, k, seed) however the prompts are batched and shared out.

Sampling is by inverse CDF: at each step one uniform number, drawn from a generator of the completion's own, picks the
token. The numbers do not depend on the other rows of a batch, on its size or on the number of processes. Logits do, in
their last bits, and a number that falls within that rounding of a boundary picks the neighbour: rare in float32,
frequent in bfloat16, where completions are reproducible for one batch size only. Two models that are given the same
seed are given the same numbers, which narrows the spread of their difference.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sparc3_pl.data.encoding import Encoder
from sparc3_pl.errors import InputError
from sparc3_pl.evaluation.words import WordFilter
from sparc3_pl.model.drawing import inverse_cdf
from sparc3_pl.model.kernels import onednn_linears, repacked_linears
from sparc3_pl.model.patching import swapped
from sparc3_pl.model.placement import input_device
from sparc3_pl.model.size import decoder_flops
from sparc3_pl.runtime.collectives import is_sharded
from sparc3_pl.runtime.memory import free_memory
from sparc3_pl.runtime.timing import current

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sparc3_pl.evaluation.decoding import Decoder

__all__ = [
    "Completion", "Generator", "Sampling", "choose_tokens", "completion_seed", "most_rows", "row_bytes",
    "uniforms",
]  # fmt: skip

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn.

    Args:
        max_new_tokens: Length at which a completion is cut.
        temperature: Divides the logits; 0 takes the likeliest token (greedy).
        top_p: The likeliest tokens whose probability first reaches this are sampled from (nucleus); 1: all.
        samples_per_prompt: Completions per prompt, K.
        seed: Together with the prompt's id and k it fixes a completion.
    """

    max_new_tokens: int = 50
    temperature: float = 0.7
    top_p: float = 0.9
    samples_per_prompt: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "samples_per_prompt"):
            if getattr(self, name) < 1:
                raise InputError(f"model.{name}={getattr(self, name)}; give at least 1")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise InputError(f"model.temperature={self.temperature}; give 0 (greedy) or a positive number")
        if not 0 < self.top_p <= 1:
            raise InputError(f"model.top_p={self.top_p}; give a number above 0 and at most 1")


@dataclass(frozen=True)
class Completion:
    """One completion.

    Attributes:
        id: ID of the prompt.
        prompt: Its text.
        k: Which of the prompt's completions, from 0.
        seed: Seed of its random numbers, derived from the run's seed, the prompt's id and k.
        text: New text only, without special tokens, up to the end token; None if it could not be made.
        tokens: The new token ids before the end token.
        end: The end token that it drew; None if it was cut.
        failed: Why it could not be made; None if it was.
        redraws: How often a word filter had it drawn again.
    """

    id: str
    prompt: str
    k: int
    seed: int
    text: str | None
    tokens: tuple[int, ...] = ()
    end: int | None = None
    failed: str | None = None
    redraws: int = 0

    @property
    def drawn(self) -> list[int]:
        """All token ids that were drawn, the end token with them."""
        return [*self.tokens, *([] if self.end is None else [self.end])]


def completion_seed(seed: int, prompt_id: str, k: int, redraw: int = 0) -> int:
    """The 64-bit seed of one completion: the same on every machine, another one each time it is drawn again."""
    name = f"{seed}/{prompt_id}/{k}" + (f"/{redraw}" if redraw else "")
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def uniforms(seed: int, count: int) -> np.ndarray:
    """The first ``count`` of a completion's random numbers in [0, 1), float64; a longer row begins with a shorter."""
    return np.random.Generator(np.random.Philox(seed)).random(count)


def choose_tokens(logits_RV: Tensor, uniforms_R: Tensor, temperature: float, top_p: float) -> Tensor:
    """One token per row, by temperature, nucleus and inverse CDF in the order of the vocabulary.

    Args:
        logits_RV: Finite in their maximum; -inf forbids a token.
        uniforms_R: A random number in [0, 1) for each row, float64.
        temperature: 0 takes the first of the likeliest tokens.
        top_p: See ``Sampling``.

    Returns:
        Token ids ``[R]``.
    """
    if temperature == 0:
        return logits_RV.argmax(-1)
    if logits_RV.device.type == "cpu" and len(logits_RV) > _ROWS_IN_CACHE:
        parts = zip(logits_RV.split(_ROWS_IN_CACHE), uniforms_R.split(_ROWS_IN_CACHE), strict=True)
        return torch.cat([choose_tokens(*part, temperature, top_p) for part in parts])
    probs_RV = (logits_RV.float() / temperature).softmax(-1)
    return inverse_cdf(probs_RV, uniforms_R) if top_p >= 1 else _from_nucleus(probs_RV, uniforms_R, top_p)


_ROWS_IN_CACHE = 8
"""Rows of a large vocabulary that, with what is made of them, stay in a processor's cache."""


def _from_nucleus(probs_RV: Tensor, uniforms_R: Tensor, top_p: float, width: int = 64) -> Tensor:
    """Tokens from the smallest set of likeliest ones that reaches ``top_p`` (Holtzman et al. 2020), ``[R]``.

    Tokens as likely as the last one of the set stay too. Sorting a whole vocabulary costs more than a small model's
    forward pass, so only the ``width`` likeliest are looked at, and more of those rows whose set may go beyond them.
    """
    vocabulary = probs_RV.shape[-1]
    top_RW, tokens_RW = _largest(probs_RV, min(width, vocabulary))
    mass_RW = top_RW.cumsum(-1, dtype=torch.float64)
    last_R1 = (mass_RW < top_p).sum(-1, keepdim=True).clamp_(max=top_RW.shape[-1] - 1)
    border_R1 = top_RW.gather(-1, last_R1)
    tokens_RW, order_RW = tokens_RW.sort(-1)  # the inverse CDF goes through them in the order of the vocabulary
    kept_RW = top_RW.where(top_RW >= border_R1, 0).gather(-1, order_RW)
    token_R = tokens_RW.gather(1, inverse_cdf(kept_RW, uniforms_R)[:, None])[:, 0]
    if width < vocabulary:
        beyond_R = (mass_RW[:, -1] < top_p) | (top_RW[:, -1] == border_R1[:, 0])
        if bool(beyond_R.any()):
            wider = 8 * width if width < 4096 else vocabulary  # by then sorting it all costs no more
            token_R[beyond_R] = _from_nucleus(probs_RV[beyond_R], uniforms_R[beyond_R], top_p, wider)
    return token_R


def _largest(values_RV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` largest values of each row in falling order, and their places, ``[R, count]`` each.

    They lie in the ``count`` columns with the largest maxima of the row folded into 64 lines: finding those and looking
    through them takes half of the time of torch's ``topk`` of a whole vocabulary on the CPU.
    """
    num_rows, vocabulary = values_RV.shape
    lines, columns = 64, vocabulary // 64
    if columns < 2 * count:
        return values_RV.topk(count)
    lines_RLC = values_RV[:, : lines * columns].unflatten(1, (lines, columns))
    column_RC = lines_RLC.amax(1).topk(count).indices
    inside = lines_RLC.gather(2, column_RC[:, None].expand(-1, lines, -1)).flatten(1)
    place_of_line = torch.arange(0, lines * columns, columns, device=values_RV.device)
    places = (column_RC[:, None] + place_of_line[:, None]).flatten(1)
    rest = torch.arange(lines * columns, vocabulary, device=values_RV.device).expand(num_rows, -1)
    largest, at = torch.cat([inside, values_RV[:, lines * columns :]], 1).topk(count)
    return largest, torch.cat([places, rest], 1).gather(1, at)


def _chosen(logits_RV: Tensor, uniforms_R: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The next token of each row, and whether the row's logits were finite; where they were not, it is any token."""
    finite_R = logits_RV.amax(-1).isfinite()  # NaN and +inf reach the maximum; all -inf is it
    # On a GPU asking whether that is needed would make the host wait.
    if logits_RV.device.type == "cuda" or not bool(finite_R.all()):
        logits_RV = logits_RV.where(finite_R[:, None], 0.0)
    return choose_tokens(logits_RV, uniforms_R, sampling.temperature, sampling.top_p), finite_R


class _Picker:
    """Stands last in ``generate``'s chain of logits processors: leaves each row one token to choose.

    Attributes:
        broken_at: The step at which each row's logits were first not finite, ``[R]``; -1 if never.
    """

    def __init__(self, uniforms_RS: Tensor, sampling: Sampling) -> None:
        self.uniforms_RS, self.sampling, self.step = uniforms_RS, sampling, 0
        self.broken_at = torch.full((len(uniforms_RS),), -1, device=uniforms_RS.device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token_R, finite_R = _chosen(scores, self.uniforms_RS[:, self.step], self.sampling)
        self.broken_at = self.broken_at.where(finite_R | (self.broken_at >= 0), self.step)
        self.step += 1
        return torch.full_like(scores, -math.inf).scatter_(1, token_R[:, None], 0.0)


@dataclass(frozen=True)
class _Row:
    """A completion to be made."""

    id: str
    prompt: str
    k: int
    seed: int
    ids: tuple[int, ...]


MOST_ROWS = 256
"""Completions made at once where nothing else bounds them: more make a step no faster a row."""

GENERAL_ROWS = 64
"""The most rows for models that go through ``generate``, whose cache is not known."""

FEWEST_TOKENS_FOR_COPIES = 2000
"""New tokens from which on copies of the weights in another order pay: making them takes as long as drawing 700."""


_MEMORY = 4 * 10**9
"""Bytes taken to be free where the system does not say."""


def row_bytes(length: int, token_bytes: int, vocabulary: int) -> int:
    """Bytes that a completion takes while it is made.

    They are its keys and values, twice, since there is a copy while prompts are read or rows leave, and its logits with
    what is made of them to choose a token.

    Args:
        length: Tokens of the prompt and of the completion.
        token_bytes: Bytes of the keys and values of one token.
        vocabulary: Number of logits.
    """
    return 2 * length * token_bytes + 24 * vocabulary


def most_rows(of_row: int, rows_per_batch: int | None, free: int | None) -> int:
    """How many completions that take so many bytes each are made at once: what half of the free memory holds.

    Args:
        of_row: Bytes of one.
        rows_per_batch: The most that was asked for; None: as many as save time.
        free: Bytes; None: unknown.
    """
    most_in_memory = max(1, int((_MEMORY if free is None else free) * 0.5) // of_row)
    return min(rows_per_batch or MOST_ROWS, most_in_memory)


class Generator:
    """Draws completions in batches, with the KV cache.

    A model's own generation settings (sampling, repetition penalty, forced tokens, ...) are not used: what
    ``sampling`` says is all there is. Its end tokens are.

    Args:
        model: A causal language model in eval mode.
        tokenizer: Its tokenizer; the special tokens that it puts before a text (BOS) are kept, those after it (EOS)
            are not: the completion comes after the text.
        sampling: How to draw.
        rows_per_batch: The most completions made at once; None: as many as save time and fit into the memory that is
            free. When they do not fit into the GPU's memory after all, half as many are tried.
        word_filter: Has completions that hold a listed word drawn again.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        rows_per_batch: int | None = None,
        word_filter: WordFilter | None = None,
    ) -> None:
        self.word_filter = word_filter
        self.model, self.tokenizer, self.sampling, self.rows_per_batch = model, tokenizer, sampling, rows_per_batch
        self.encoder = Encoder(tokenizer)
        self.end_tokens = _end_tokens(model, tokenizer)
        self.context: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self._decoder: Decoder | None = None
        self._tried = False

    def describe(self) -> dict[str, Any]:
        """The settings, for the record of a result."""
        return {**asdict(self.sampling), "eos_token_ids": self.end_tokens}

    def __call__(self, ids: Sequence[str], prompts: Sequence[str]) -> list[Completion]:
        """K completions of each prompt, in the order of the prompts, k rising.

        A prompt that has no token, or leaves no room for ``max_new_tokens`` in the model's context, gives K failed
        completions with the reason.
        """
        token_ids = [self._encode(prompt) for prompt in prompts]
        reasons = [self._refusal(e) for e in token_ids]
        rows = [
            _Row(i, p, k, completion_seed(self.sampling.seed, i, k), e)
            for i, p, e in zip(ids, prompts, token_ids, strict=True)
            for k in range(self.sampling.samples_per_prompt)
        ]
        why = {i: reason for i, reason in zip(ids, reasons, strict=True) if reason}
        completions = [Completion(r.id, r.prompt, r.k, r.seed, None, failed=why[r.id]) for r in rows if r.id in why]
        copies_pay = len(rows) * self.sampling.max_new_tokens >= FEWEST_TOKENS_FOR_COPIES
        with repacked_linears(self.model) if copies_pay else onednn_linears(self.model):
            for batch in self._batches([r for r in rows if r.id not in why]):
                completions += self._complete(batch)
            completions = self._filtered(completions)
        place = {i: n for n, i in enumerate(ids)}
        return sorted(completions, key=lambda c: (place[c.id], c.k))

    def _filtered(self, completions: list[Completion]) -> list[Completion]:
        """The completions, those that hold a listed word drawn again until they hold none or the tries are used up."""
        if self.word_filter is None:
            return completions
        for redraw in range(1, self.word_filter.tries + 1):
            rows = [
                _Row(
                    c.id, c.prompt, c.k, completion_seed(self.sampling.seed, c.id, c.k, redraw), self._encode(c.prompt)
                )
                for c in completions
                if c.text is not None and self.word_filter.words.is_in(c.text)
            ]
            again = [c for batch in self._batches(rows) for c in self._complete(batch)]
            others = {(c.id, c.k): replace(c, redraws=redraw) for c in again}
            completions = [others.get((c.id, c.k), c) for c in completions]
        return completions

    def _encode(self, prompt: str) -> tuple[int, ...]:
        body, bos = self.encoder.body(prompt), self.tokenizer.bos_token_id
        if not body and prompt.strip():  # an empty text would be completed in its place
            return ()
        ids = (*self.encoder.prefix, *body)
        return ids if ids or bos is None else (bos,)

    def _refusal(self, ids: tuple[int, ...]) -> str | None:
        if not ids:
            return "the prompt has no tokens"
        new = self.sampling.max_new_tokens
        if self.context is not None and len(ids) + new > self.context:
            return f"the prompt's {len(ids)} tokens and {new} new ones exceed the model's context of {self.context}"
        return None

    def _batches(self, rows: list[_Row]) -> Iterator[list[_Row]]:
        """Batches of rows, longest first: rows of one length stand together, and the largest batch comes first."""
        rows = sorted(rows, key=lambda r: (-len(r.ids), r.id, r.k))
        start = 0
        while start < len(rows):
            size = self._most_rows(rows[start].ids)
            yield rows[start : start + size]
            start += size

    def _most_rows(self, longest: tuple[int, ...]) -> int:
        """How many rows as long as this prompt and its completion are made at once."""
        length = len(longest) + self.sampling.max_new_tokens
        decoder = self._decoder_for(longest, length)
        if decoder is None:
            return self.rows_per_batch or GENERAL_ROWS
        of_row = row_bytes(length, decoder.token_bytes, self.model.get_output_embeddings().weight.shape[0])
        return most_rows(of_row, self.rows_per_batch, free_memory(self.model.device))

    def _decoder_for(self, prompt: tuple[int, ...], length: int) -> Decoder | None:
        """The decoder that draws rows of this length; None: transformers' ``generate`` must."""
        if not self._tried:
            from sparc3_pl.evaluation.decoding import prepare

            self._decoder, self._tried = prepare(self.model, prompt), True
        decoder = self._decoder
        return decoder if decoder is not None and length <= (decoder.longest or length) else None

    def _complete(self, rows: list[_Row]) -> list[Completion]:
        try:
            new_RS, broken_at = self._draw(rows)
        except torch.OutOfMemoryError:
            if is_sharded(self.model.get_input_embeddings().weight):  # the other ranks have gone on with this pass
                raise InputError(
                    f"model.generation_batch_size={self.rows_per_batch}: {len(rows)} completions at once do not fit "
                    "into memory, and ranks that share a model out cannot try fewer; lower it"
                ) from None
            if len(rows) == 1:
                raise
            half = len(rows) // 2
            log.warning("%d completions at once do not fit into memory: trying %d", len(rows), half)
            self.rows_per_batch = max(1, min(self.rows_per_batch or half, half))
        else:
            return [self._finish(*item) for item in zip(rows, new_RS, broken_at, strict=True)]
        torch.cuda.empty_cache()
        return self._complete(rows[:half]) + self._complete(rows[half:])

    @torch.inference_mode()
    def _draw(self, rows: list[_Row]) -> tuple[list[list[int]], list[int]]:
        """New token ids of every row (whatever comes after its end), and the step at which its logits broke, or -1."""
        device = input_device(self.model)
        numbers = np.stack([uniforms(r.seed, self.sampling.max_new_tokens) for r in rows])
        uniforms_RS = torch.from_numpy(numbers).to(device)
        decoder = self._decoder_for(rows[0].ids, max(len(r.ids) for r in rows) + self.sampling.max_new_tokens)
        if decoder is None:
            return self._generate(rows, uniforms_RS)

        now = current()

        def choose(logits: Tensor, step: int, rows_R: Tensor) -> tuple[Tensor, Tensor]:
            with now.choosing():
                return _chosen(logits, uniforms_RS[rows_R.to(device), step], self.sampling)

        draws = decoder([r.ids for r in rows], self.sampling.max_new_tokens, choose, self.end_tokens)
        return [d.tokens for d in draws], [d.broken_at for d in draws]

    def _generate(self, rows: list[_Row], uniforms_RS: Tensor) -> tuple[list[list[int]], list[int]]:
        """Draws rows with transformers' ``generate``, padded on the left, which works for any model."""
        from transformers import LogitsProcessorList

        length, device = max(len(r.ids) for r in rows), uniforms_RS.device
        pad = self.tokenizer.pad_token_id or 0
        input_ids = torch.tensor([[pad] * (length - len(r.ids)) + list(r.ids) for r in rows], device=device)
        mask = torch.tensor([[0] * (length - len(r.ids)) + [1] * len(r.ids) for r in rows], device=device)
        picker = _Picker(uniforms_RS, self.sampling)
        config = self._config(pad)
        # Settings left unset would be taken from the model's own.
        with swapped(self.model, "generation_config", config):
            out = self.model.generate(
                input_ids, attention_mask=mask, generation_config=config, logits_processor=LogitsProcessorList([picker])
            )
        new = out[:, length:].tolist()
        num_read = sum(len(r.ids) for r in rows)
        num_drawn = sum(
            next((n + 1 for n, token in enumerate(row) if token in self.end_tokens), len(row)) for row in new
        )
        tokens = num_read + num_drawn
        head = self.model.get_output_embeddings().weight
        current().did(
            samples=len(rows),
            tokens=tokens,
            padded=out.numel() - tokens,
            flops=decoder_flops(self.model) * tokens + 2.0 * head.numel() * num_drawn,
            passes=1 + len(new[0]),
            like=self.model.get_input_embeddings().weight,
        )
        return new, picker.broken_at.tolist()

    def _config(self, pad: int) -> Any:
        from transformers import GenerationConfig

        return GenerationConfig(
            max_new_tokens=self.sampling.max_new_tokens,
            do_sample=False,  # the picker has sampled already: what it leaves is the only token to take
            eos_token_id=self.end_tokens or None,
            pad_token_id=pad,
            use_cache=True,
        )

    def text(self, tokens: Sequence[int]) -> str:
        """The text of drawn tokens, without special ones."""
        return self.tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _finish(self, row: _Row, new: list[int], broken_at: int) -> Completion:
        end = next((n for n, token in enumerate(new) if token in self.end_tokens), len(new))
        if 0 <= broken_at <= end:
            reason = f"the model's logits are not finite at new token {broken_at}"
            return Completion(row.id, row.prompt, row.k, row.seed, None, failed=reason)
        tokens = tuple(new[:end])
        text = self.text(tokens)
        return Completion(row.id, row.prompt, row.k, row.seed, text, tokens, new[end] if end < len(new) else None)


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a text: those of the model's generation settings (chat models have several) and the
    tokenizer's.
    """
    config = getattr(model, "generation_config", None)
    settings = [getattr(c, "eos_token_id", None) for c in (config, model.config.get_text_config(), tokenizer)]
    flat = [token for item in settings if item is not None for token in (item if isinstance(item, list) else [item])]
    return sorted({int(token) for token in flat})
