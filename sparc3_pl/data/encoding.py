"""Turns a text into the token ids that a model reads, and tells whether two texts are the same."""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sparc3_pl.data.sources import text_id
from sparc3_pl.errors import InputError
from sparc3_pl.model.loading import load_vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sparc3_pl.model.source import ModelSource

__all__ = ["Encoder", "Text", "UnreadableTextError", "load_encoder", "special_affixes"]

Text = str | list[int]
"""A text, or the token ids of one."""

_INVISIBLE = "\ufeff\u200b\u2060"  # byte order mark, zero-width space, word joiner: no white space to str.strip


class UnreadableTextError(InputError):
    """A text, or list of token ids, that the model cannot read; the message does not say where it stands."""


class Encoder:
    """Turns texts into the token ids that a model reads.

    What the tokenizer puts before a text (BOS) belongs to it, once: a text that begins with a rendered ``<s>`` gets no
    second one. What the tokenizer puts after a text (EOS, SEP) never does: targets and completions come after the text.
    A list of token ids is taken as it stands, with nothing before it.

    Args:
        tokenizer: The model's tokenizer; None if it has none, so that only lists of token ids can be read.
        vocab_size: Token ids of a list must be below it; unset: the tokenizer's size.
        context: Longest sequence that the model takes, in tokens; unset: the tokenizer's ``model_max_length``.

    Attributes:
        prefix: The token ids that stand before every text.
        suffix: The token ids that the tokenizer would put after it.
        pad_id: The token id to pad with; pads are masked wherever they are used.

    Raises:
        InputError: If the tokenizer's special tokens do not stand around a text.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int | None = None, context: int | None = None
    ) -> None:
        self.tokenizer, self.vocab_size, self.context = tokenizer, vocab_size, context
        self.prefix: list[int] = []
        self.suffix: list[int] = []
        self.pad_id = 0
        self._head = self._tail = ""  # how prefix and suffix are written
        self._marks: tuple[str, ...] = ()
        self._special: re.Pattern[str] | None = None
        if tokenizer is not None:
            self._look_at(tokenizer)

    def _look_at(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if self.vocab_size is None:
            self.vocab_size = len(tokenizer)
        length = getattr(tokenizer, "model_max_length", None)
        if self.context is None and length is not None and length < 10**9:  # transformers writes "unknown" as 1e30
            self.context = int(length)
        self.pad_id = tokenizer.pad_token_id or 0
        self.prefix, self.suffix = special_affixes(tokenizer)
        self._head, self._tail = self._written(self.prefix), self._written(self.suffix)
        ends = (self._head, self._tail, tokenizer.bos_token, tokenizer.eos_token)
        self._marks = tuple(dict.fromkeys(mark for mark in ends if mark))
        names = set(tokenizer.all_special_tokens)
        names |= {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        if names and not getattr(tokenizer, "split_special_tokens", False):
            self._special = re.compile("|".join(re.escape(name) for name in sorted(names, key=lambda name: -len(name))))

    def _written(self, ids: Sequence[int]) -> str:
        """Special tokens as they are written in a text, if the tokenizer reads them back from there; else nothing."""
        if not ids:
            return ""
        text = "".join(self.tokenizer.convert_ids_to_tokens(list(ids)))
        return text if _ids(self.tokenizer, text, special=False) == list(ids) else ""

    def __call__(self, text: Text) -> list[int]:
        """The token ids that the model reads: ``prefix`` and the text's own tokens; for a list, the list."""
        return [*self.before(text), *self.body(text)]

    def before(self, text: Text) -> list[int]:
        """The token ids that stand before this text: ``prefix``, or nothing before a list of token ids."""
        return self.prefix if isinstance(text, str) else []

    def beginning(self) -> list[int]:
        """The token ids that stand before a text whose first token is to be scored too: ``prefix``, or else the token
        that begins or ends a text (BOS, else EOS), as in lm-eval; nothing if the tokenizer has neither.
        """
        ends = [] if self.tokenizer is None else [self.tokenizer.bos_token_id, self.tokenizer.eos_token_id]
        return self.prefix or [token for token in ends if token is not None][:1]

    def body(self, text: Text) -> list[int]:
        """The text's own tokens.

        Raises:
            UnreadableTextError: If there is no tokenizer to read a text with, or a token id is none of the vocabulary.
        """
        if isinstance(text, str):
            if self.tokenizer is None:
                raise UnreadableTextError(
                    "the model has no tokenizer to read text with; put the tokenizer's files (tokenizer.json, "
                    "tokenizer_config.json) beside its config.json, or give lists of token ids"
                )
            return _ids(self.tokenizer, self.stripped(text), special=False)
        if not isinstance(text, list):
            kind = type(text).__name__
            raise UnreadableTextError(f"holds {kind}, neither text nor a list of token ids; name another field")
        for place, token in enumerate(text):
            if not isinstance(token, int) or isinstance(token, bool):
                raise UnreadableTextError(
                    f"the list of token ids holds {token!r} at place {place}; token ids are whole numbers"
                )
            if token < 0 or (self.vocab_size is not None and token >= self.vocab_size):
                raise UnreadableTextError(
                    f"token id {token} at place {place} is not in the model's vocabulary, whose ids are 0 to "
                    f"{self.vocab_size - 1 if self.vocab_size else '...'}; give ids of this model's tokenizer"
                )
        return list(text)

    def continuation(self, text: Text, more: Text) -> list[int]:
        """The tokens of what follows a text directly: those of both together, less the text's own.

        Empty where they cannot be told apart: the tokenizer joins the text's end and what follows in one token, as it
        does with a space at the end and the word after it. A list is returned as it is; after a list, all of ``more``.
        """
        if not (isinstance(text, str) and isinstance(more, str)):
            return self.body(more)
        before, both = self.body(text), self.body(text + more)
        return both[len(before) :] if both[: len(before)] == before else []

    def stripped(self, text: str) -> str:
        """The text without the special tokens that stand around every text, where it has them written out (``<s>``)."""
        if self._head:
            while (rest := text.lstrip().lstrip(_INVISIBLE)).startswith(self._head):
                text = rest.removeprefix(self._head)
        if self._tail:
            while (rest := text.rstrip()).endswith(self._tail):
                text = rest.removesuffix(self._tail)
        return text

    def special_counts(self, text: Text) -> dict[str, int]:
        """``num_with_prefix``: 1 if the text has the tokens before it (BOS) written out. ``num_with_special``: 1 if
        special tokens stand within it, which the model reads as such.
        """
        if isinstance(text, list) or self._special is None or not self._special.search(text):
            return {}
        own = self.stripped(text)
        return {
            "num_with_prefix": int(bool(self._head) and self._head in text[: len(text) - len(own)]),
            "num_with_special": int(self._special.search(own) is not None),
        }

    def is_only_special(self, text: Text) -> bool:
        """Whether the text consists of nothing but special tokens."""
        return isinstance(text, str) and self._special is not None and not self._special.sub("", text).strip()

    def decode(self, ids: Sequence[int]) -> str | None:
        """The text of token ids, without special tokens; None if there is no tokenizer."""
        return None if self.tokenizer is None else self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def identity(self, text: Text) -> str:
        """Identity of a text by its visible content.

        A byte order mark, white space or special tokens around it and the form of line ends and accents make no
        difference. For a text that has none of these it is ``text_id(text)``.
        """
        if not isinstance(text, str):
            return text_id(text)
        text, before = unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n")), None
        while text != before:
            before, text = text, text.strip().strip(_INVISIBLE)
            for mark in self._marks:
                text = text.removeprefix(mark).removesuffix(mark)
        return text_id(text)

    def identities(self, text: str) -> set[str]:
        """Every id under which a sample of this very text may be known: by its letters, by what is seen of it, and by
        its token ids, with and without those before it.
        """
        body = self.body(text)
        return {text_id(text), self.identity(text), text_id(body), text_id([*self.prefix, *body])}


def load_encoder(source: ModelSource) -> Encoder:
    """The encoder of a model.

    Raises:
        InputError: If the model is not there or its tokenizer cannot be loaded.
    """
    vocabulary = load_vocabulary(source)
    return Encoder(vocabulary.tokenizer, vocabulary.size, vocabulary.context)


def special_affixes(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and after a text by default.

    Words of its own vocabulary are tokenised with and without special tokens. Where a word itself gives a special
    token (an unknown token that is BOS too), it can be seen at several places, and another word tells which is right.

    Raises:
        InputError: If they do not stand around a text, or no word of the vocabulary tells where.
    """
    possible: set[tuple[tuple[int, ...], tuple[int, ...]]] | None = None
    size = len(tokenizer)
    for token in itertools.chain(range(0, size, max(1, size // 256)), range(size)):
        text = tokenizer.decode([token], skip_special_tokens=True)
        bare, full = _ids(tokenizer, text, special=False), _ids(tokenizer, text, special=True)
        if not bare:
            continue
        ends = [(start, start + len(bare)) for start in range(len(full) - len(bare) + 1)]
        here = {(tuple(full[:start]), tuple(full[end:])) for start, end in ends if full[start:end] == bare}
        possible = here if possible is None else possible & here
        if len(possible) == 1:
            ((prefix, suffix),) = possible
            return list(prefix), list(suffix)
        if not possible:
            raise InputError(
                f"the tokenizer ({type(tokenizer).__name__}) puts no fixed special tokens around a text: it makes "
                f"{full} of {text!r}, and {bare} without special tokens; give a model with another tokenizer"
            )
    raise InputError(
        f"the tokenizer ({type(tokenizer).__name__}) makes nothing of the words of its own vocabulary, so that no "
        "text can be read; put the model's own tokenizer files beside config.json"
    )


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, special: bool) -> list[int]:
    # verbose: a document longer than the context is no reason for a warning when it is going to be cut.
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
