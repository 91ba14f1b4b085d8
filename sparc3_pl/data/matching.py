"""Samples of general text that match the format of a behaviour's samples."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sparc3_pl.data.encoding import Encoder, Text, UnreadableTextError
from sparc3_pl.data.samples import Ending, Origins, Sample, ending_of_ids, made_from
from sparc3_pl.data.sources import text_id
from sparc3_pl.errors import InputError
from sparc3_pl.io.hub import first_line

__all__ = ["SampleFormat", "matched_samples", "read_formats"]

_Fits = Callable[["_Document", list[int], int, Ending], bool]

_SENTENCE_START = re.compile(r"""[.!?…][”"'’»)\]]*\s+(?=\S)""")


_SEARCH_DOCUMENTS = 50


@dataclass(frozen=True)
class SampleFormat:
    """The format a matched sample must have: its length in tokens, special tokens included, and its ending."""

    num_tokens: int
    ending: Ending


# --- matched samples --------------------------------------------------------------------------------------------------


def read_formats(folder: Path) -> list[SampleFormat]:
    """Lengths and endings of the samples of a score folder (its ``samples.jsonl``).

    Raises:
        InputError: If the folder has no such file, or the file lacks the numbers.
    """
    file = folder / "samples.jsonl"
    if not file.is_file():
        raise InputError(f"data.match={str(folder)!r}: no samples.jsonl in it; give a score folder or a data file")
    formats = []
    lines = filter(None, file.read_text(encoding="utf-8").split("\n"))  # a string in them may hold other line ends
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if row["ending"] is None:
                raise ValueError("its samples were token ids that no tokenizer could read")
            formats.append(SampleFormat(int(row["num_tokens"]), "stop" if row["ending"] == "stop" else "cut"))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"data.match: line {number} of {str(file)!r} has no num_tokens and ending ({first_line(error)}); "
                "score the behaviour set again"
            ) from error
    if not formats:
        raise InputError(f"data.match={str(folder)!r}: its samples.jsonl is empty; match a folder with samples")
    return formats


def matched_samples(
    texts: Iterable[Text],
    encoder: Encoder,
    formats: Sequence[SampleFormat],
    source: str = "the source",
    counts: Counter[str] | None = None,
    origins: Origins | None = None,
) -> list[Sample]:
    """General samples of exactly the lengths asked for and, as far as the texts permit, of the endings.

    Each comes from a document of its own and starts where a sentence starts (the document's first one if that fits).
    A ``cut`` sample stops mid-sentence, after a whole word, with more text to follow; a ``stop`` sample ends where a
    sentence ends. Documents that fit no format are passed over. Formats that no document met are filled last from
    those, first with cuts inside a word, then ``stop`` formats with cuts; both are counted. At most
    ``_SEARCH_DOCUMENTS`` documents for every sample are looked at, so that an endless stream comes to an end.

    Args:
        texts: Documents; token ids have no sentences to start at and are refused.
        encoder: The model's encoder, with a tokenizer.
        formats: Lengths and endings.
        source: Name of what the documents come from, for messages.
        counts: Grows by ``num_too_short`` (documents shorter than every format), ``num_cut_in_word`` and
            ``num_unmatched_endings``.
        origins: Ids of the texts that a document was cut out of.

    Returns:
        The samples in the order of ``formats``.

    Raises:
        InputError: If the texts run out before every format has its sample.
    """
    counts = Counter() if counts is None else counts
    counts.update(num_too_short=0, num_cut_in_word=0, num_unmatched_endings=0)
    matcher = _Matcher(encoder, formats, origins)
    documents = _documents(itertools.islice(texts, _SEARCH_DOCUMENTS * (len(formats) + 1)), encoder, counts)
    spare = matcher.fill(documents, _fits)
    counts["num_too_short"] += sum(matcher.too_short(document) for document in spare)
    spare = matcher.fill(spare, _fits_but_for_the_word, "num_cut_in_word", counts)
    matcher.fill(spare, _is_cut, "num_unmatched_endings", counts)
    if matcher.open:
        longest = max(sample_format.num_tokens for sample_format in matcher.open)
        raise InputError(
            f"data.match: {source} gives only {len(matcher.samples)} samples for {len(formats)} lengths to match (the "
            f"longest left: {longest} tokens); give more or longer documents"
        )
    return [matcher.samples[i] for i in range(len(formats))]


def _documents(texts: Iterable[Text], encoder: Encoder, counts: Counter[str]) -> Iterator[str]:
    for text in texts:
        if not isinstance(text, str):
            raise UnreadableTextError("data.match needs text, not token ids: it looks for the ends of sentences")
        counts.update(encoder.special_counts(text))
        yield text


class _Matcher:
    """Finds a document for each sample. Formats that are hard to meet choose first: endings at a stop, then great
    lengths. A document is looked at once for each format, not once for each sample that is to have it.
    """

    def __init__(self, encoder: Encoder, formats: Sequence[SampleFormat], origins: Origins | None) -> None:
        self.encoder, self.origins = encoder, origins
        self.open: dict[SampleFormat, deque[int]] = {}
        """The places of the samples still missing, by format, in the order of choice."""
        for i in sorted(range(len(formats)), key=lambda i: (formats[i].ending == "cut", -formats[i].num_tokens, i)):
            self.open.setdefault(formats[i], deque()).append(i)
        self.samples: dict[int, Sample] = {}
        self._ids: set[str] = set()
        self._special = len(encoder.prefix)
        self._shortest = min((sample_format.num_tokens for sample_format in formats), default=0) - self._special

    def fill(
        self, texts: Iterable[str], fits: _Fits, counter: str | None = None, counts: Counter[str] | None = None
    ) -> list[str]:
        """Serve the open formats from ``texts``; returns the texts that were not used."""
        texts, rest = iter(texts), []
        while self.open and (text := next(texts, None)) is not None:
            if not self._take(text, fits):
                rest.append(text)
            elif counter is not None and counts is not None:
                counts[counter] += 1
        return rest

    def too_short(self, text: str) -> bool:
        """Whether the text is shorter than every format."""
        return len(self.encoder.body(text)) <= self._shortest

    def _take(self, text: str, fits: _Fits) -> bool:
        """Gives a sample of the text to the first open format that some span of it fits; False if there is none."""
        longest = max(sample_format.num_tokens for sample_format in self.open) - self._special
        document = _Document(text, self.encoder, longest)
        for sample_format in self.open:
            length = sample_format.num_tokens - self._special
            for span in document.spans():
                if not (1 <= length <= len(span) and fits(document, span, length, sample_format.ending)):
                    continue
                ids = self.encoder.prefix + span[:length]
                identity = text_id(ids)
                if identity in self._ids:
                    continue
                self._ids.add(identity)
                text_ids = tuple(sorted(made_from(text, self.encoder, self.origins)))
                place = self.open[sample_format].popleft()
                self.samples[place] = Sample(identity, ids, document.ending(span[:length]), text_ids)
                if not self.open[sample_format]:
                    del self.open[sample_format]
                return True
        return False


class _Document:
    """A document to cut samples from; its tokens and endings are made when they are asked for, once.

    Args:
        text: The document.
        encoder: The model's encoder.
        length: Length in tokens of the longest sample that may be cut from it.
        limit: Sentence starts that are tried.
    """

    def __init__(self, text: str, encoder: Encoder, length: int, limit: int = 32) -> None:
        self.encoder = encoder
        self._text, self._length = text, length
        self._starts = iter([0, *(match.end() for match in _SENTENCE_START.finditer(text))][:limit])
        self._spans: list[list[int]] = []
        self._endings: dict[tuple[int, ...], Ending | None] = {}

    def spans(self) -> Iterator[list[int]]:
        """Tokens from each sentence start on, at least one more than the longest sample has where there are."""
        yield from self._spans
        for start in self._starts:
            # 16 characters a token are more than enough for nearly all text: no need to tokenise the rest each time.
            ids = self.encoder.body(self._text[start : start + 16 * (self._length + 4)])
            self._spans.append(ids if len(ids) > self._length + 1 else self.encoder.body(self._text[start:]))
            yield self._spans[-1]

    def ending(self, input_ids: Sequence[int]) -> Ending | None:
        """``stop`` or ``cut``."""
        key = tuple(input_ids[-16:])
        if key not in self._endings:
            self._endings[key] = ending_of_ids(self.encoder, key)
        return self._endings[key]

    def ends_in_a_word(self, span: list[int], length: int) -> bool:
        """Whether the span, cut to ``length``, breaks off inside a word."""
        decode = self.encoder.tokenizer.decode
        shorter, longer = (decode(span[max(0, length - 8) : end]) for end in (length, length + 1))
        return longer[len(shorter) : len(shorter) + 1].isalnum()


def _fits(document: _Document, span: list[int], length: int, ending: Ending) -> bool:
    """Whether the span, cut to ``length``, ends like ``ending``, and after a whole word."""
    return _fits_but_for_the_word(document, span, length, ending) and not document.ends_in_a_word(span, length)


def _fits_but_for_the_word(document: _Document, span: list[int], length: int, ending: Ending) -> bool:
    if ending == "cut":
        return _is_cut(document, span, length, ending)
    return document.ending(span[:length]) == "stop"


def _is_cut(document: _Document, span: list[int], length: int, _ending: Ending) -> bool:
    """Whether the span, cut to ``length``, breaks off: a headline without a full stop has no text after it."""
    return len(span) > length and document.ending(span[:length]) == "cut"
