"""Token sequences to attribute: packed windows, one text a sample, and samples matched to another set's format."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sparc3_pl.data.sources import text_id
from sparc3_pl.errors import InputError
from sparc3_pl.hub import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Ending",
    "Sample",
    "Target",
    "context_length",
    "ending",
    "matched_samples",
    "pack_windows",
    "read_targets",
    "special_affixes",
    "text_samples",
]

Ending = Literal["stop", "cut"]
_Fits = Callable[["PreTrainedTokenizerBase", list[int], int, Ending], bool]

# A full stop, question or exclamation mark (also full-width), then any closing quotes or brackets.
_STOP = re.compile(r"""[.!?…。！？]["'”’»)\]*]*$""")
_SENTENCE_START = re.compile(r"""[.!?…][”"'’»)\]]*\s+(?=\S)""")

_SEARCH_DOCUMENTS = 50

SEPARATOR = "\n\n"  # between packed documents


@dataclass(frozen=True)
class Sample:
    """One token sequence to attribute.

    Attributes:
        id: Identity by content: ``text_id`` of the text, or of the token ids for windows and matched cuts.
        input_ids: Token ids, special tokens included.
        ending: Whether the text ends in sentence-final punctuation (``stop``) or mid-sentence (``cut``).
    """

    id: str
    input_ids: list[int]
    ending: Ending


@dataclass(frozen=True)
class Target:
    """The format a matched sample must have: its length in tokens, special tokens included, and its ending."""

    num_tokens: int
    ending: Ending


def ending(text: str) -> Ending:
    """``stop`` if the last visible character closes a sentence (closing quotes may follow), else ``cut``."""
    return "stop" if _STOP.search(text.rstrip()) else "cut"


def special_affixes(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and after a text by default."""
    bare = tokenizer("a", add_special_tokens=False).input_ids
    full = tokenizer("a").input_ids
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    raise AssertionError(f"special tokens of {type(tokenizer).__name__} are not around the text: {full} and {bare}")


def context_length(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The longest sequence the model takes, in tokens; None if unknown. ``load_tokenizer`` sets it from the model."""
    length = tokenizer.model_max_length
    return None if length is None or length > 10**9 else int(length)  # transformers writes "unknown" as 1e30


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str, special: bool) -> list[int]:
    # verbose: a document longer than the context is no reason for a warning when it is going to be cut.
    return tokenizer(text, add_special_tokens=special, verbose=False).input_ids


def _ids_id(input_ids: Sequence[int]) -> str:
    return hashlib.sha256(("tokens " + " ".join(map(str, input_ids))).encode()).hexdigest()[:16]


def _ending_of_ids(tokenizer: PreTrainedTokenizerBase, input_ids: Sequence[int]) -> Ending:
    # 16 tokens hold more than the punctuation and quotes that end a text.
    return ending(tokenizer.decode(list(input_ids[-16:]), skip_special_tokens=True))


# --- windows ----------------------------------------------------------------------------------------------------------


def pack_windows(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
    n: int | None,
    source: str = "the source",
    counts: Counter[str] | None = None,
) -> list[Sample]:
    """Cut documents, joined in order, into windows of exactly ``seq_len`` tokens.

    Documents are tokenised without special tokens and joined by the tokenised ``SEPARATOR``; a window starts with the
    special tokens that the tokenizer puts before a text (BOS), which ``seq_len`` includes. What is left at the end is
    dropped. A window equal to an earlier one is passed over and added to ``counts["num_duplicates"]``. ``texts`` is
    read only as far as ``n`` windows need.

    Raises:
        InputError: If ``seq_len`` does not fit the model, or there is less text than ``n`` windows (or one) need.
    """
    prefix, _ = special_affixes(tokenizer)
    _check_seq_len(seq_len, len(prefix), context_length(tokenizer))
    body_len = seq_len - len(prefix)
    stream = _joined(texts, tokenizer)
    windows: dict[str, Sample] = {}
    num_tokens = 0
    while n is None or len(windows) < n:
        body = list(itertools.islice(stream, body_len))
        num_tokens += len(body)
        if len(body) < body_len:
            break
        ids = prefix + body
        window = Sample(_ids_id(ids), ids, _ending_of_ids(tokenizer, body))
        if windows.setdefault(window.id, window) is not window and counts is not None:
            counts["num_duplicates"] += 1
    if len(windows) < (n or 1):
        raise InputError(
            f"data.num_samples={n}: {source} gives only {len(windows)} windows of data.seq_len={seq_len} tokens "
            f"({num_tokens} tokens in all); lower data.num_samples or data.seq_len, or give more text"
        )
    return list(windows.values())


def _check_seq_len(seq_len: int, num_special: int, context: int | None) -> None:
    if seq_len <= num_special:
        raise InputError(
            f"data.seq_len={seq_len} leaves no room for text beside {num_special} special tokens; raise data.seq_len"
        )
    if context is not None and seq_len > context:
        raise InputError(f"data.seq_len={seq_len} is longer than the model's context of {context} tokens; lower it")


def _joined(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[int]:
    separator = _tokens(tokenizer, SEPARATOR, special=False)
    for number, text in enumerate(texts):
        if number:
            yield from separator
        yield from _tokens(tokenizer, text, special=False)


# --- one text a sample ------------------------------------------------------------------------------------------------


def text_samples(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    n: int | None = None,
    max_tokens: int | None = None,
    source: str = "the source",
) -> list[Sample]:
    """Each text a sample of its own, tokenised as the tokenizer does by default.

    Args:
        texts: Read only as far as ``n`` samples need.
        tokenizer: The model's.
        n: Number of samples; None for all texts.
        max_tokens: Keep only the first so many tokens of a text.
        source: What the texts come from, for messages.

    Raises:
        InputError: If there are fewer texts than ``n`` (or none), or a text is longer than the model's context.
    """
    samples = [_text_sample(text, tokenizer, max_tokens) for text in itertools.islice(texts, n)]
    if len(samples) < (n or 1):
        raise InputError(
            f"data.num_samples={n}: {source} gives only {len(samples)} samples; lower data.num_samples, widen "
            "data.filter or give more text"
        )
    return samples


def _text_sample(text: str, tokenizer: PreTrainedTokenizerBase, max_tokens: int | None) -> Sample:
    ids = _tokens(tokenizer, text, special=True)
    context = context_length(tokenizer)
    if max_tokens is not None and len(ids) > max_tokens:
        ids = ids[:max_tokens]
        last = _ending_of_ids(tokenizer, ids)
    else:
        last = ending(text)
    if context is not None and len(ids) > context:
        raise InputError(
            f"data.source: a text of {len(ids)} tokens ({text[:40]!r}...) is longer than the model's context of "
            f"{context}; set data.max_tokens: {context} to cut such texts, or data.seq_len to pack them"
        )
    return Sample(text_id(text), ids, last)


# --- matched samples --------------------------------------------------------------------------------------------------


def read_targets(folder: Path) -> list[Target]:
    """Lengths and endings of the samples of a score folder (its ``samples.jsonl``).

    Raises:
        InputError: If the folder has no such file, or the file lacks the numbers.
    """
    file = folder / "samples.jsonl"
    if not file.is_file():
        raise InputError(f"data.match={str(folder)!r}: no samples.jsonl in it; give a score folder or a data file")
    targets = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            last: Ending = "stop" if row["ending"] == "stop" else "cut"
            targets.append(Target(int(row["num_tokens"]), last))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"data.match: line {number} of {str(file)!r} has no num_tokens and ending ({first_line(error)}); "
                "score the behaviour set again"
            ) from error
    if not targets:
        raise InputError(f"data.match={str(folder)!r}: its samples.jsonl is empty; match a folder with samples")
    return targets


def matched_samples(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    targets: Sequence[Target],
    source: str = "the source",
) -> tuple[list[Sample], dict[str, int]]:
    """General samples of exactly the targets' lengths and, as far as the texts permit, their endings.

    Each comes from a document of its own and starts where a sentence starts (the document's first one if that fits).
    A ``cut`` sample stops mid-sentence, after a whole word, with more text to follow; a ``stop`` sample ends where a
    sentence ends. Documents that fit no target are passed over. Targets that no document met are filled last from
    those, first with cuts inside a word, then ``stop`` targets with cuts; both are counted. At most
    ``_SEARCH_DOCUMENTS`` documents for every target are looked at, so that an endless stream comes to an end.

    Returns:
        The samples in the order of ``targets``, and counts: ``num_too_short`` (documents shorter than every target
        that was open), ``num_cut_in_word``, ``num_unmatched_endings``.

    Raises:
        InputError: If the texts run out before every target has a sample.
    """
    matcher = _Matcher(tokenizer, targets)
    spare = matcher.fill(itertools.islice(texts, _SEARCH_DOCUMENTS * (len(targets) + 1)), _fits)
    matcher.counts["num_too_short"] = sum(matcher.too_short(text) for text in spare)
    spare = matcher.fill(spare, _fits_but_for_the_word, counter="num_cut_in_word")
    matcher.fill(spare, _is_cut, counter="num_unmatched_endings")
    if matcher.open:
        longest = max(targets[i].num_tokens for i in matcher.open)
        raise InputError(
            f"data.match: {source} gives only {len(matcher.found)} samples for {len(targets)} lengths to match (the "
            f"longest left: {longest} tokens); give more or longer documents"
        )
    return [matcher.found[i] for i in range(len(targets))], dict(matcher.counts)


class _Matcher:
    """Gives each target a document. Those that are hard to meet choose first: endings at a stop, then great lengths."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, targets: Sequence[Target]) -> None:
        self.tokenizer, self.targets = tokenizer, targets
        self.prefix, self.suffix = special_affixes(tokenizer)
        self.open = sorted(range(len(targets)), key=lambda i: (targets[i].ending == "cut", -targets[i].num_tokens, i))
        self.found: dict[int, Sample] = {}
        self.counts = {"num_too_short": 0, "num_cut_in_word": 0, "num_unmatched_endings": 0}
        self._ids: set[str] = set()
        self._lengths = [target.num_tokens - len(self.prefix) - len(self.suffix) for target in targets]

    def fill(self, texts: Iterable[str], fits: _Fits, counter: str | None = None) -> list[str]:
        """Serve the open targets from ``texts``; returns the texts that were not used."""
        texts, left = iter(texts), []
        while self.open and (text := next(texts, None)) is not None:
            if not self._take(text, fits):
                left.append(text)
            elif counter is not None:
                self.counts[counter] += 1
        return left

    def too_short(self, text: str) -> bool:
        """Whether the text is shorter than every target."""
        return len(_tokens(self.tokenizer, text, special=False)) <= min(self._lengths)

    def _take(self, text: str, fits: _Fits) -> bool:
        """Give the first open target that some span of the text fits a sample of it."""
        spans = list(_spans(text, self.tokenizer, max(self._lengths[i] for i in self.open)))
        for i, span in itertools.product(self.open, spans):
            length = self._lengths[i]
            if 1 <= length <= len(span) and fits(self.tokenizer, span, length, self.targets[i].ending):
                ids = self.prefix + span[:length] + self.suffix
                if _ids_id(ids) in self._ids:
                    continue
                self._ids.add(_ids_id(ids))
                self.found[i] = Sample(_ids_id(ids), ids, _ending_of_ids(self.tokenizer, span[:length]))
                self.open.remove(i)
                return True
        return False


def _spans(text: str, tokenizer: PreTrainedTokenizerBase, length: int, limit: int = 32) -> Iterator[list[int]]:
    """Tokens from each of the first ``limit`` sentence starts on, at least ``length + 1`` of them where there are."""
    starts = [0, *(match.end() for match in _SENTENCE_START.finditer(text))]
    for start in starts[:limit]:
        # 16 characters a token are more than enough for nearly all text: no need to tokenise the rest each time.
        ids = _tokens(tokenizer, text[start : start + 16 * (length + 4)], special=False)
        yield ids if len(ids) > length + 1 else _tokens(tokenizer, text[start:], special=False)


def _fits(tokenizer: PreTrainedTokenizerBase, span: list[int], length: int, wanted: Ending) -> bool:
    """Whether the span, cut to ``length``, ends as wanted, and after a whole word."""
    if not _fits_but_for_the_word(tokenizer, span, length, wanted):
        return False
    shorter, longer = (tokenizer.decode(span[max(0, length - 8) : end]) for end in (length, length + 1))
    return not longer[len(shorter) : len(shorter) + 1].isalnum()


def _fits_but_for_the_word(tokenizer: PreTrainedTokenizerBase, span: list[int], length: int, wanted: Ending) -> bool:
    if wanted == "cut":
        return _is_cut(tokenizer, span, length, wanted)
    return _ending_of_ids(tokenizer, span[:length]) == "stop"


def _is_cut(tokenizer: PreTrainedTokenizerBase, span: list[int], length: int, _wanted: Ending) -> bool:
    """A cut has text after it: a headline without a full stop is no text broken off."""
    return len(span) > length and _ending_of_ids(tokenizer, span[:length]) == "cut"
