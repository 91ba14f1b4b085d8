"""Token sequences to attribute: packed windows, random windows of documents, and one text a sample."""

from __future__ import annotations

import itertools
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sparc3_pl.data.batches import ReferenceBatch
from sparc3_pl.data.encoding import Encoder, Text, UnreadableTextError
from sparc3_pl.data.fields import Baseline, TextRecord, Unequal, Values, less_baseline
from sparc3_pl.data.sources import text_id
from sparc3_pl.errors import InputError
from sparc3_pl.statistics.advantages import FEWEST, token_advantages

__all__ = [
    "Ending",
    "Origins",
    "Sample",
    "ending",
    "pack_windows",
    "pad_right",
    "pad_samples",
    "random_windows",
    "record_sample",
    "record_samples",
    "text_samples",
]


Ending = Literal["stop", "cut"]

Origins = Mapping[str, Iterable[str]]
"""The ids of the texts that a text was cut out of, by its ``text_id``."""


# A full stop, question or exclamation mark (also full-width), then any closing quotes or brackets.
_STOP = re.compile(r"""[.!?…。！？]["'”’»)\]*]*$""")


SEPARATOR = "\n\n"  # between packed documents


@dataclass(frozen=True)
class Sample:
    """One token sequence to attribute.

    Attributes:
        id: Identity by content: ``text_id`` of the text, or of the token ids for windows and matched cuts.
        input_ids: Token ids, special tokens included.
        ending: Whether the text ends in sentence-final punctuation (``stop``) or mid-sentence (``cut``); None for
            token ids that no tokenizer can read.
        text_ids: Identities of the texts that it was made from, sorted: none of these may be evaluated on.
        numbers: Numbers that a target or method needs, by name; in a batch a float becomes float64, an int int64.
        by_token: Likewise, lists with an entry for each of ``input_ids``: true or false, token ids, or numbers.
    """

    id: str
    input_ids: list[int]
    ending: Ending | None
    text_ids: tuple[str, ...] = ()
    numbers: Mapping[str, float | int] = field(default_factory=dict)
    by_token: Mapping[str, list[bool] | list[int] | list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, values in self.by_token.items():
            assert len(values) == len(self.input_ids), f"{name}: {len(values)} for {len(self.input_ids)} tokens"


def ending(text: str) -> Ending:
    """``stop`` if the last visible character closes a sentence (closing quotes may follow), else ``cut``."""
    return "stop" if _STOP.search(text.rstrip()) else "cut"


def ending_of_ids(encoder: Encoder, input_ids: Sequence[int]) -> Ending | None:
    # 16 tokens hold more than the punctuation and quotes that end a text.
    text = encoder.decode(input_ids[-16:])
    return None if text is None else ending(text)


def _read(texts: Iterable[Text], encoder: Encoder, counts: Counter[str]) -> Iterator[tuple[Text, list[int]]]:
    """The texts, all of one kind, each with its own tokens; ``counts`` grows by what users should know about them."""
    first: Text | None = None
    for text in texts:
        first = text if first is None else first
        if isinstance(text, str) is not isinstance(first, str):
            kinds = "text, others lists of token ids" if isinstance(text, str) else "a list of token ids, others text"
            raise UnreadableTextError(f"holds {kinds}; give either the one or the other")
        body = [] if encoder.is_only_special(text) else encoder.body(text)
        counts["num_without_tokens"] += not body
        counts.update(encoder.special_counts(text))
        yield text, body


def made_from(text: Text, encoder: Encoder, origins: Origins | None) -> set[str]:
    return {encoder.identity(text), *(origins or {}).get(text_id(text), ())}


def _merged(samples: dict[Any, Sample], key: Any, sample: Sample) -> bool:
    """Add a sample, or merge its identities into an equal one. Returns whether the sample was new."""
    first = samples.setdefault(key, sample)
    if first is not sample:
        samples[key] = replace(first, text_ids=tuple(sorted({*first.text_ids, *sample.text_ids})))
    return first is sample


# --- windows ----------------------------------------------------------------------------------------------------------


def pack_windows(
    texts: Iterable[Text],
    encoder: Encoder,
    seq_len: int,
    n: int | None,
    source: str = "the source",
    counts: Counter[str] | None = None,
    origins: Origins | None = None,
) -> list[Sample]:
    """Cut documents, joined in order, into windows of exactly ``seq_len`` tokens.

    Documents are tokenised without special tokens and joined by the tokenised ``SEPARATOR``; a window starts with the
    special tokens that the tokenizer puts before a text (BOS), which ``seq_len`` includes. Lists of token ids are
    joined as they stand, with nothing before or between them. What is left at the end is dropped.

    Args:
        texts: Documents, all texts or all lists; read only as far as ``n`` windows need.
        encoder: The model's.
        seq_len: Tokens of a window.
        n: Number of windows; None for all.
        source: What the documents come from, for messages.
        counts: Grows by ``num_duplicates`` (windows equal to an earlier one, which are passed over) and
            ``num_without_tokens`` (documents of which the tokenizer makes nothing).
        origins: Ids of the texts that a document was cut out of.

    Raises:
        InputError: If ``seq_len`` does not fit the model, or there is less text than ``n`` windows (or one) need.
    """
    counts = Counter() if counts is None else counts
    texts = iter(texts)
    first = list(itertools.islice(texts, 1))
    is_text = all(isinstance(text, str) for text in first)
    prefix = encoder.prefix if is_text else []
    _check_seq_len(seq_len, len(prefix), encoder.context)
    length = seq_len - len(prefix)
    separator = encoder.body(SEPARATOR) if first and is_text else []
    windows: dict[str, Sample] = {}
    stream: list[int] = []  # tokens that are in no window yet
    documents: list[tuple[int, int, set[str]]] = []  # where each begins and ends in the stream, and its identities
    num_tokens = 0
    for number, (text, body) in enumerate(_read(itertools.chain(first, texts), encoder, counts)):
        piece = [*separator, *body] if number else body
        documents.append((len(stream), len(stream) + len(piece), made_from(text, encoder, origins)))
        stream += piece
        num_tokens += len(piece)
        start = 0
        while len(stream) - start >= length and len(windows) != n:
            end = start + length
            names = [ids for begin, stop, ids in documents if begin < end and stop > start]
            tokens = stream[start:end]
            ids = prefix + tokens
            window = Sample(text_id(ids), ids, ending_of_ids(encoder, tokens), tuple(sorted(set().union(*names))))
            counts["num_duplicates"] += not _merged(windows, window.id, window)
            start = end
        if len(windows) == n:
            break
        stream = stream[start:]
        documents = [(begin - start, stop - start, ids) for begin, stop, ids in documents if stop > start]
    if len(windows) < (n or 1):
        raise InputError(
            f"data.num_samples={n}: {source} gives only {len(windows)} windows of data.seq_len={seq_len} tokens "
            f"({num_tokens} tokens in all); lower data.num_samples or data.seq_len, or give more text"
        )
    return list(windows.values())


def random_windows(
    texts: Iterable[Text],
    encoder: Encoder,
    seq_len: int,
    n: int | None,
    seed: int,
    source: str = "the source",
    counts: Counter[str] | None = None,
    origins: Origins | None = None,
) -> list[Sample]:
    """One window of exactly ``seq_len`` tokens out of every document that is longer, at a random place.

    This is how SparseGPT and Wanda draw their calibration samples, but for two things. As in ``pack_windows`` every
    window starts with the special tokens that the tokenizer puts before a text (BOS), which ``seq_len`` includes; the
    papers' code tokenizes the document with them, so that only a window from its very start has them. And a document
    that is drawn is drawn once.

    Args:
        texts: Documents, in the order in which they are to be drawn; read only as far as ``n`` windows need.
        encoder: The model's.
        seq_len: Tokens of a window.
        n: Number of windows; None: one of every document that is long enough.
        seed: Decides, with the document, where the window begins; every place is equally likely.
        source: What the documents come from, for messages.
        counts: Grows by ``num_too_short`` (documents that are passed over), ``num_duplicates`` (windows equal to an
            earlier one) and ``num_without_tokens``.
        origins: Ids of the texts that a document was cut out of.

    Raises:
        InputError: If ``seq_len`` does not fit the model, or there are fewer long documents than ``n`` (or none).
    """
    counts = Counter() if counts is None else counts
    counts["num_too_short"] += 0
    windows: dict[str, Sample] = {}
    for text, body in _read(texts, encoder, counts):
        prefix = encoder.before(text)
        _check_seq_len(seq_len, len(prefix), encoder.context)
        length = seq_len - len(prefix)
        if len(body) <= length:
            counts["num_too_short"] += 1
            continue
        # By content, so that a document's window does not depend on which others were read before it.
        start = random.Random(f"{seed} {text_id(text)}").randint(0, len(body) - length)
        tokens = body[start : start + length]
        ids = [*prefix, *tokens]
        text_ids = tuple(sorted(made_from(text, encoder, origins)))
        window = Sample(text_id(ids), ids, ending_of_ids(encoder, tokens), text_ids)
        counts["num_duplicates"] += not _merged(windows, window.id, window)
        if len(windows) == n:
            break
    if len(windows) < (n or 1):
        raise InputError(
            f"data.num_samples={n}: {source} has only {len(windows)} documents longer than data.seq_len={seq_len} "
            f"tokens ({counts['num_too_short']} are too short); lower data.num_samples or data.seq_len, or pack "
            "documents (data.windows: packed)"
        )
    return list(windows.values())


def _check_seq_len(seq_len: int, num_special: int, context: int | None) -> None:
    if seq_len <= num_special:
        raise InputError(
            f"data.seq_len={seq_len} leaves no room for text beside {num_special} special tokens; raise data.seq_len"
        )
    if context is not None and seq_len > context:
        raise InputError(f"data.seq_len={seq_len} is longer than the model's context of {context} tokens; lower it")


# --- one text a sample ------------------------------------------------------------------------------------------------


def text_samples(
    texts: Iterable[Text],
    encoder: Encoder,
    n: int | None = None,
    max_tokens: int | None = None,
    source: str = "the source",
    counts: Counter[str] | None = None,
    origins: Origins | None = None,
) -> list[Sample]:
    """A sample for each text, with what the tokenizer puts before a text; a list of token ids is taken as it stands.

    Args:
        texts: All texts or all lists; read only as far as ``n`` samples need.
        encoder: The model's.
        n: Number of samples; None for all texts.
        max_tokens: Keep only this many of a text's first tokens.
        source: What the texts come from, for messages.
        counts: Grows by what is passed over: ``num_without_tokens`` (the tokenizer makes nothing of the text) and
            ``num_duplicates`` (the same tokens as an earlier sample, once both are cut).
        origins: Ids of the texts that a text was cut out of.

    Raises:
        InputError: If there are fewer samples than ``n`` (or none), or a text is longer than the model's context.
    """
    counts = Counter() if counts is None else counts
    samples: dict[tuple[int, ...], Sample] = {}
    for text, body in _read(texts, encoder, counts):
        if body:
            sample = _text_sample(text, body, encoder, max_tokens, made_from(text, encoder, origins))
            counts["num_duplicates"] += not _merged(samples, tuple(sample.input_ids), sample)
        if len(samples) == n:
            break
    if len(samples) < (n or 1):
        raise _too_few(len(samples), n, source)
    return list(samples.values())


def _text_sample(
    text: Text, body: list[int], encoder: Encoder, max_tokens: int | None, text_ids: Iterable[str]
) -> Sample:
    prefix = encoder.before(text)
    if max_tokens is not None and max_tokens <= len(prefix):
        raise InputError(
            f"data.max_tokens={max_tokens} leaves no room for text beside {len(prefix)} special tokens; raise it"
        )
    ids = [*prefix, *body]
    if max_tokens is not None and len(ids) > max_tokens:
        ids = ids[:max_tokens]
        last = ending_of_ids(encoder, ids)
    else:
        last = ending(encoder.stripped(text)) if isinstance(text, str) else ending_of_ids(encoder, ids)
    if encoder.context is not None and len(ids) > encoder.context:
        raise InputError(
            f"data.source: a text of {len(ids)} tokens ({str(text)[:40]!r}...) is longer than the model's context of "
            f"{encoder.context}; set data.max_tokens: {encoder.context} to cut such texts, or data.seq_len to pack them"
        )
    return Sample(text_id(text), ids, last, tuple(sorted(text_ids)))


# --- records with completions, labels, answers ------------------------------------------------------------------------


def record_samples(
    records: Iterable[TextRecord],
    encoder: Encoder,
    n: int | None = None,
    max_tokens: int | None = None,
    baseline: Baseline = "mean",
    gae_lambda: float = 1.0,
    source: str = "the source",
    counts: Counter[str] | None = None,
    origins: Origins | None = None,
    unequal: Unequal = "drop",
) -> list[Sample]:
    """A sample for each record: its text, the completion after it, and what else the record holds.

    What the tokenizer puts before a text stands once, before the text; the completion's own tokens follow. An answer
    and a foil given as text are read as they continue the text, and the first token counts: whether a space stands
    between is up to the record. Their names in ``Sample``: ``weight`` (less the baseline),
    ``label``, ``answer``, ``foil`` (-1: none); by token ``completion_mask`` (true for the completion's tokens),
    ``token_weight`` (with ``baseline`` ``prefix``: see ``token_advantages``) and ``counterfactual_ids``.

    A sample's id is that of its whole content. Records with the same content, which are draws of one completion, have
    different ids.

    Args:
        records: Texts with their values; read only as far as ``n`` samples need.
        encoder: The model's.
        n: Number of samples; None for all.
        max_tokens: Keep only this many of a text's first tokens; not where its end matters.
        baseline: What is taken off the weights, see ``less_baseline``. The mean is that of the samples.
        gae_lambda: With ``baseline`` ``prefix``, see ``token_advantages``.
        source: What the records come from, for messages.
        counts: Grows by what is passed over: ``num_without_tokens`` (the tokenizer makes nothing of a text or
            completion), ``num_not_continuing`` (it makes nothing of an answer or foil, or joins it with the text's
            end), ``num_equal_answers`` (answer and foil begin with one token), ``num_unequal_lengths`` (the
            counterfactual has more or fewer tokens than the text) and ``num_without_baseline`` (the only completion of
            its prompt, with ``baseline`` ``prompt``); and by what is kept: ``num_long_answers`` (answer or foil has
            several tokens) and ``num_without_space`` (the answer goes on within the text's last word).
        origins: Ids of the texts that a text was cut out of.
        unequal: What to do with a record that cannot be compared, for its answer, foil or counterfactual: ``drop`` it
            and count it, or end with an ``error``.

    Raises:
        InputError: If there are fewer samples than ``n`` (or none), or one is longer than the model's context.
        UnreadableTextError: For the first record that cannot be compared, where ``unequal`` is ``error``.
    """
    counts = Counter() if counts is None else counts
    samples: dict[Any, Sample] = {}
    prompts: list[str] = []
    draws: Counter[str] = Counter()
    for record in records:
        sample = record_sample(record, encoder, counts, max_tokens, origins, unequal)
        if sample is not None:
            key: Any = tuple(sample.input_ids), *sample.numbers.items(), *map(tuple, sample.by_token.values())
            if record.values.completion is not None:  # what was drawn twice counts twice
                key = draw = (sample.id, draws[sample.id])
                draws[sample.id] += 1
                sample = replace(sample, id=text_id(f"{draw}")) if draw[1] else sample
            is_new = _merged(samples, key, sample)
            counts["num_duplicates"] += not is_new
            prompts += [text_id(record.text)] * is_new
        if len(samples) == n:
            break
    if len(samples) < (n or 1):
        raise _too_few(len(samples), n, source)
    if baseline == "prefix":
        return _with_advantages(list(samples.values()), prompts, gae_lambda)
    return _less_baseline(list(samples.values()), prompts, baseline, counts)


def _with_advantages(samples: list[Sample], prompts: list[str], gae_lambda: float) -> list[Sample]:
    """The samples with the credit of each token in place of the scores of their prefixes."""
    if len(samples) < FEWEST:
        raise InputError(
            f"data.weight_baseline=prefix: {len(samples)} completions are too few to tell what score is to be "
            f"expected; give {FEWEST} or more, or data.weight_baseline: prompt"
        )
    prefixes = [list(itertools.compress(s.by_token["token_weight"], s.by_token["completion_mask"])) for s in samples]
    scores_N = np.array([sample.numbers["weight"] for sample in samples], dtype=np.float64)
    mean = float(scores_N.mean())
    advantages = token_advantages(scores_N, prefixes, prompts, gae_lambda)
    return [
        replace(
            sample,
            numbers={**sample.numbers, "weight": score - mean},
            by_token={**sample.by_token, "token_weight": [0.0] * (len(sample.input_ids) - len(own)) + own.tolist()},
        )
        for sample, score, own in zip(samples, scores_N.tolist(), advantages, strict=True)
    ]


def _less_baseline(samples: list[Sample], prompts: list[str], baseline: Baseline, counts: Counter[str]) -> list[Sample]:
    if "weight" not in samples[0].numbers:
        return samples
    weights = less_baseline([sample.numbers["weight"] for sample in samples], prompts, baseline)
    counts["num_without_baseline"] += weights.count(None)
    if weights.count(None) == len(weights):
        raise InputError(
            "data.weight_baseline=prompt: every prompt has only one completion, and the baseline is the mean of its "
            "others; give several (eval's model.samples_per_prompt), or data.weight_baseline: mean"
        )
    return [
        replace(sample, numbers={**sample.numbers, "weight": weight})
        for sample, weight in zip(samples, weights, strict=True)
        if weight is not None
    ]


def _too_few(number: int, n: int | None, source: str) -> InputError:
    return InputError(
        f"data.num_samples={n}: {source} gives only {number} samples; lower data.num_samples, widen "
        "data.filter or give more text"
    )


def record_sample(
    record: TextRecord,
    encoder: Encoder,
    counts: Counter[str],
    max_tokens: int | None = None,
    origins: Origins | None = None,
    unequal: Unequal = "drop",
) -> Sample | None:
    """The record's sample, as in ``record_samples``; None if it cannot be one, for a reason that is counted."""
    text, values = record.text, record.values
    body, completion = encoder.body(text), []
    if values.completion is not None:  # it may follow nothing but the token that begins a text
        completion, has_tokens = encoder.body(values.completion), bool(encoder.before(text) or body)
    else:
        has_tokens = bool(body) and not encoder.is_only_special(text)
    for part in (text, values.completion):
        counts.update(encoder.special_counts(part) if part is not None else {})
    if not has_tokens or (values.completion is not None and not completion):
        counts["num_without_tokens"] += 1
        return None
    text_ids = made_from(text, encoder, origins)
    sample = _text_sample(text, [*body, *completion], encoder, max_tokens, text_ids)
    answers = {
        name: encoder.continuation(text, [value] if isinstance(value, int) else value)
        for name, value in (("answer", values.answer), ("foil", values.foil))
        if value is not None
    }
    other = None if values.counterfactual is None else encoder(values.counterfactual)
    if (fault := _fault(values, sample, answers, other)) is not None:
        reason, message = fault
        if unequal == "error":
            raise UnreadableTextError(f"{str(text)[:80]!r}: {message} (data.unequal: drop leaves such records out)")
        counts[reason] += 1
        return None
    by_token: dict[str, list[bool] | list[int] | list[float]] = {}
    if values.completion is not None:
        first = len(sample.input_ids) - len(completion)
        by_token["completion_mask"] = [place >= first for place in range(len(sample.input_ids))]
        if values.prefix is not None:
            if len(values.prefix) != len(completion):
                raise InputError(
                    f"data.prefix_field: a completion of {len(completion)} tokens has {len(values.prefix)} scores; it "
                    "needs one for each of the ids of data.completion_field, as eval writes them"
                )
            by_token["token_weight"] = [0.0] * first + values.prefix
        sample = replace(sample, ending=ending_of_ids(encoder, sample.input_ids))
    if other is not None:
        by_token["counterfactual_ids"] = other
        text_ids |= made_from(values.counterfactual, encoder, origins)
    own = {"weight": values.weight, "label": values.label, **{name: tokens[0] for name, tokens in answers.items()}}
    if "answer" in answers:
        own.setdefault("foil", -1)
        counts["num_long_answers"] += any(len(tokens) > 1 for tokens in answers.values())
        are_text = isinstance(text, str) and isinstance(values.answer, str)
        counts["num_without_space"] += are_text and text[-1:].isalpha() and values.answer[:1].isalpha()
    return replace(
        sample,
        id=values.identity(text),
        text_ids=tuple(sorted(text_ids)),
        numbers={name: value for name, value in own.items() if value is not None},
        by_token=by_token,
    )


def _fault(
    values: Values, sample: Sample, answers: Mapping[str, list[int]], other: list[int] | None
) -> tuple[str, str] | None:
    """Why a record cannot be compared: the count that grows, and the reason in words. None if it can be."""
    for name, tokens in answers.items():
        if not tokens:
            return "num_not_continuing", (
                f"the {name} {getattr(values, name)!r} does not begin with a token of its own after it; put the space "
                "between them before the answer, not at the text's end"
            )
    if "foil" in answers and answers["foil"][0] == answers["answer"][0]:
        return "num_equal_answers", (
            f"answer {values.answer!r} and foil {values.foil!r} begin with the same token, {answers['foil'][0]}"
        )
    if other is not None and len(other) != len(sample.input_ids):
        return "num_unequal_lengths", f"it has {len(sample.input_ids)} tokens, its counterfactual {len(other)}"
    return None


# --- batches ----------------------------------------------------------------------------------------------------------


def pad_samples(samples: Sequence[Sample], pad_id: int) -> ReferenceBatch:
    """One batch ``[B, T]``, padded on the right to the longest sample; of no sample, a stand-in ``[1, 1]``, no fields.

    ``numbers`` of the samples become fields ``[B]``, float64 or int64; ``by_token`` fields ``[B, T]``, padded by false,
    by 0.0 or by ``pad_id``.
    """
    input_ids, mask = pad_right([sample.input_ids for sample in samples] or [[]], pad_id)
    fields: dict[str, Any] = {}
    for name in samples[0].numbers if samples else ():
        values = [sample.numbers[name] for sample in samples]
        whole = all(isinstance(value, int) for value in values)
        fields[name] = torch.tensor(values, dtype=torch.int64 if whole else torch.float64)
    for name, first in samples[0].by_token.items() if samples else ():
        rows, kind = [sample.by_token[name] for sample in samples], type(first[0])
        if kind is float:
            fields[name] = pad_sequence([torch.tensor(row, dtype=torch.float64) for row in rows], batch_first=True)
        else:
            ids, _ = pad_right(rows, 0 if kind is bool else pad_id)
            fields[name] = ids.bool() if kind is bool else ids
    return ReferenceBatch(
        input_ids, mask, [s.id for s in samples], [s.ending for s in samples], [s.text_ids for s in samples], fields
    )


def pad_right(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, each ``[B, T]`` int64, padded on the right to the longest row."""
    length = max(1, *map(len, rows))
    input_ids = torch.tensor([[*row, *[pad_id] * (length - len(row))] for row in rows], dtype=torch.int64)
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return input_ids, mask
