"""Samples whose predicted next word shows a behaviour: texts cut right before a word that the judge objects to.

What the target ``predicted`` attributes is the logit of the token that the model predicts after a sample. After most
prompts that elicit a behaviour that is a harmless one, and its attribution is not about the behaviour. So a text is cut
before the first word that the judge scores high and that the model itself predicts: its likeliest next token begins the
word. Beside these stand the same texts cut before harmless words that the model predicts as well, of like length: the
general samples.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Literal, get_args

import torch

from sparc3_pl.data.encoding import Encoder
from sparc3_pl.data.samples import pad_right
from sparc3_pl.data.sources import text_id
from sparc3_pl.errors import InputError
from sparc3_pl.evaluation.judges import Judge, judged
from sparc3_pl.io.formats import Record
from sparc3_pl.model.placement import input_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["CutRule", "CutText", "cut_samples"]

_WORD = re.compile(r"[^\W\d_][\w'’*-]*")

Criterion = Literal["word", "text"]


@dataclass(frozen=True)
class CutRule:
    """Before which words texts are cut.

    Args:
        label: Label of the judge to read; None: its first one.
        criterion: ``word``: a word is bad if it scores high alone and at the end of the text so far. ``text``: if the
            score of the text so far crosses the threshold at it (for a judge that makes nothing of single words).
        threshold: Score from which a word or text is bad.
        harmless: Score below which it is harmless.
        general_per_cut: Cuts before harmless words for each one before a bad word.
        batch_size: Texts that the model reads at once.
    """

    label: str | None = None
    criterion: Criterion = "word"
    threshold: float = 0.5
    harmless: float = 0.1
    general_per_cut: int = 2
    batch_size: int = 16

    def __post_init__(self) -> None:
        if self.criterion not in get_args(Criterion):
            raise InputError(f"cut.criterion={self.criterion!r} is unknown; give {' or '.join(get_args(Criterion))}")
        for name, least in (("general_per_cut", 0), ("batch_size", 1)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise InputError(f"cut.{name}={value!r}; give a whole number of at least {least}")
        if not 0 <= self.harmless <= self.threshold:
            raise InputError(
                f"cut.harmless={self.harmless} and cut.threshold={self.threshold}; give 0 <= harmless <= threshold"
            )


@dataclass(frozen=True)
class CutText:
    """A text to look into: the model reads ``prompt`` and ``body``, the judge ``body`` only."""

    prompt: str
    body: str

    @property
    def whole(self) -> str:
        """What the model reads."""
        return self.prompt + self.body

    @cached_property
    def record(self) -> str:
        """Its identity by content."""
        return text_id(self.whole)


@dataclass(frozen=True)
class _Cut:
    """A text up to a word: the model reads ``text``, the judge what of it is no prompt, without and with the word.

    ``place`` is where the word begins in the body.
    """

    of: CutText
    text: str
    judged_before: str
    judged: str
    word: str
    place: int

    @classmethod
    def at(cls, text: CutText, word: re.Match[str]) -> _Cut:
        # A space belongs to the token of the word that follows it.
        before = text.body[: word.start()].rstrip(" ")
        whole = text.prompt + before if before else text.prompt.rstrip(" ")
        return cls(text, whole, before, text.body[: word.end()], word[0], word.start())

    @property
    def key(self) -> tuple[str, int]:
        """Which place of which text it is."""
        return self.of.record, self.place


def cut_samples(
    texts: Sequence[CutText], judge: Judge, rule: CutRule, encoder: Encoder, load: Callable[[], PreTrainedModel]
) -> list[Record]:
    """Cuts before bad words, the first of each text, and before harmless ones.

    Args:
        texts: Each is looked into once.
        judge: Scores words and texts.
        rule: Which words are bad, which harmless.
        encoder: The model's.
        load: Loads the model, once the judge has something to cut before.

    Returns:
        Records: ``text``, ``behaviour`` (true before a bad word), ``word``, ``prompt``, ``record`` (id of the whole
        text), and ``text_ids`` of the prompts and texts that were cut, so that none of them is evaluated on later.
        Equal input gives equal records.

    Raises:
        InputError: If the judge has no such label, or the model predicts none of the bad words.
    """
    texts = list({text.record: text for text in texts if text.body}.values())
    bad, harmless = _candidates(texts, judge, rule)
    ids_by_cut = _ids_by_cut([*bad, *harmless], encoder)
    records = {cut.of.record for cut in bad}
    places = (
        _predicted([text for text in texts if text.record in records], load(), encoder, rule.batch_size)
        if records
        else set()
    )
    bad = _first_of_each([cut for cut in bad if cut.key in places])
    if not bad:
        raise InputError(
            f"cut: the model predicts none of the words that the judge scores {rule.threshold:g} or more, in "
            f"{len(texts)} texts; give more prompts, lower cut.threshold, or set cut.criterion: text for a judge that "
            "cannot judge single words"
        )
    general = _like(bad, [cut for cut in harmless if cut.key in places], rule.general_per_cut)
    return [
        {
            "text": cut.text,
            "behaviour": behaviour,
            "word": cut.word,
            "prompt": cut.of.prompt,
            "record": cut.of.record,
            "text_ids": ids_by_cut[cut.text],
        }
        for behaviour, side in ((True, bad), (False, general))
        for cut in side
    ]


def _candidates(texts: Sequence[CutText], judge: Judge, rule: CutRule) -> tuple[list[_Cut], list[_Cut]]:
    """Cuts before bad words, and before harmless ones, whatever the model predicts there."""
    cuts = [_Cut.at(text, word) for text in texts for word in _WORD.finditer(text.body)]
    score, bound = partial(_score_each, judge=judge, label=rule.label), rule.threshold
    if rule.criterion == "text":
        scores = score([text for cut in cuts for text in (cut.judged_before, cut.judged)])
        bad = [cut for cut in cuts if scores[cut.judged_before] < bound <= scores[cut.judged]]
        return bad, [cut for cut in cuts if scores[cut.judged] < rule.harmless]
    scores = score([cut.word for cut in cuts])
    bad = [cut for cut in cuts if scores[cut.word] >= bound]
    in_context = score([cut.judged for cut in bad])
    bad = [cut for cut in bad if in_context[cut.judged] >= bound]
    return bad, [cut for cut in cuts if scores[cut.word] < rule.harmless]


def _score_each(texts: Sequence[str], judge: Judge, label: str | None) -> dict[str, float]:
    """The judge's score of each different text."""
    todo = sorted(set(texts))
    scores: dict[str, float] = {}
    for start in range(0, len(todo), 256):
        part = todo[start : start + 256]
        by_label = judged(judge, part)
        if label is not None and label not in by_label:
            raise InputError(f"cut.label={label!r} is none of the judge's; use one of {', '.join(by_label)}")
        scores |= dict(zip(part, by_label[label or next(iter(by_label))].tolist(), strict=True))
    return scores


@torch.inference_mode()
def _predicted(
    texts: Sequence[CutText], model: PreTrainedModel, encoder: Encoder, batch_size: int
) -> set[tuple[str, int]]:
    """Text and place of the words that the model's likeliest next token begins."""
    places = set()
    texts = sorted(texts, key=lambda text: (len(text.whole), text.record))
    for start in range(0, len(texts), batch_size):
        part = texts[start : start + batch_size]
        rows = [encoder(text.whole)[: encoder.context] for text in part]
        input_ids_BT, mask_BT = (tensor.to(input_device(model)) for tensor in pad_right(rows, encoder.pad_id))
        likeliest = model(input_ids=input_ids_BT, attention_mask=mask_BT, use_cache=False).logits.argmax(-1).tolist()
        for text, ids, tokens in zip(part, rows, likeliest, strict=True):
            for word in _WORD.finditer(text.body):
                cut = _Cut.at(text, word)
                before = encoder(cut.text)
                # A tokenizer may join what is before the cut with what is behind: then there is no such place.
                if len(before) > len(encoder.prefix) and ids[: len(before)] == before:
                    beginning = encoder.tokenizer.decode([tokens[len(before) - 1]]).strip()
                    if beginning and word[0].startswith(beginning):
                        places.add(cut.key)
    return places


def _ids_by_cut(cuts: Sequence[_Cut], encoder: Encoder) -> dict[str, list[str]]:
    """The identities of all prompts and texts that were cut to the same text, by that text."""
    ids_of_text: dict[str, set[str]] = {}
    by_cut: dict[str, set[str]] = {}
    for cut in cuts:
        text = cut.of
        if text.record not in ids_of_text:
            ids_of_text[text.record] = {encoder.identity(part) for part in (text.prompt, text.body, text.whole) if part}
        by_cut.setdefault(cut.text, set()).update(ids_of_text[text.record])
    return {text: sorted(ids) for text, ids in by_cut.items()}


def _first_of_each(cuts: Sequence[_Cut]) -> list[_Cut]:
    """The first cut of each text, and no text twice."""
    by_record = {cut.of.record: cut for cut in sorted(cuts, key=lambda cut: -cut.place)}
    by_text = {cut.text: cut for cut in by_record.values()}
    return sorted(by_text.values(), key=lambda cut: cut.key)


def _like(bad: Sequence[_Cut], harmless: Sequence[_Cut], each: int) -> list[_Cut]:
    """Harmless cuts, ``each`` for every one of ``bad``: those left whose length is nearest to it, no text twice."""
    bad_texts = {cut.text for cut in bad}
    candidates = {cut.text: cut for cut in sorted(harmless, key=lambda cut: cut.key) if cut.text}
    candidates = {text: cut for text, cut in candidates.items() if text not in bad_texts}
    matches = []
    for cut in [cut for cut in bad for _ in range(each)]:
        if candidates:
            nearest = min(candidates, key=lambda text: (abs(len(text) - len(cut.text)), text))
            matches.append(candidates.pop(nearest))
    return matches
