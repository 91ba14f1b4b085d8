"""Samples whose predicted next word shows a behaviour: texts cut right before a word that the judge objects to.

What is attributed is the logit of the token that the model predicts after a sample. After most toxic prompts that is a
harmless one, and its attribution is not about toxicity. This script makes samples after which it is not harmless: it
looks in each text for the first word that the judge scores high, alone and at the end of the text so far, and that the
model itself predicts (its likeliest next token begins the word), and cuts the text before it. A judge that makes
nothing of single words needs ``--criterion text``. Beside these it puts the same texts cut before harmless words that
the model predicts as well, of like length: the general samples. One field tells the two apart, so that one file serves
both sides; ``text_ids`` of each row names the prompt and the text that were cut, so that neither is evaluated on later:

    python scripts/cut_before_behaviour.py --source texts.jsonl --text_field text --pretrained MODEL \
        --checkpoint JUDGE.ckpt --output cuts.jsonl
    sparc3 score ... --data.source cuts.jsonl --data.seq_len null --data.filter "behaviour == true"
    sparc3 score ... --data.source cuts.jsonl --data.seq_len null --data.filter "behaviour == false"

The texts may be a collection's, or what the model wrote itself (``completions.jsonl`` of ``sparc3 eval``, with
``--prompt_field prompt --text_field completion``: then the judge reads the completion only, the model both).
The judge has Detoxify's form. Same input, same output.
"""

import argparse
import json
import logging
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from sparc3_pl.data.encoding import Encoder, load_encoder
from sparc3_pl.data.samples import pad_right
from sparc3_pl.data.sources import get_field, parse_filter, partition, read_records, text_id
from sparc3_pl.errors import InputError
from sparc3_pl.evaluation.judges import DetoxifyJudge, judged
from sparc3_pl.io.files import write_text
from sparc3_pl.model.loading import load_model
from sparc3_pl.model.source import ModelSource

WORD = re.compile(r"[^\W\d_][\w'’*-]*")


@dataclass(frozen=True)
class Text:
    """A text to look into; ``record`` identifies what it came from."""

    prompt: str
    body: str
    record: str


@dataclass(frozen=True)
class Cut:
    """A text up to a word: the model reads ``text``, the judge what of it is no prompt, without and with the word."""

    text: str
    judged_before: str
    judged: str
    word: str
    record: str
    place: int
    """Of the word in the text, to keep the order."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line.

    Returns:
        0, or 2 if the input is wrong (one line on stderr says what).
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    options = parser().parse_args(arguments)
    try:
        print(cut_file(options))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = made.add_argument
    add("--source", required=True, help="texts: .jsonl, .json, .csv, .tsv, .parquet, .txt, or a hub data set")
    add("--text_field", default="text", help="field of the text, dots for nesting; the cuts lie in it")
    add("--prompt_field", help="field of a text that stands before it: the model reads it, the judge does not")
    add("--filter", help="condition on a record, as: prompt.toxicity >= 0.5")
    add("--partition", choices=("all", "attribution", "evaluation"), default="all",
        help="records of one half only, by a hash of the prompt (of the text, without prompt_field)")  # fmt: skip
    add("--partition_seed", type=int, default=0, help="decides the halves; use the same one everywhere")
    add("--pretrained", default="demo", help="the model: hub id, folder, FILE.gguf, or demo")
    add("--variant", help="Detoxify's judge by name, or demo")
    add("--checkpoint", help="the judge's checkpoint, in Detoxify's form")
    add("--config_path", help="folder of the judge's config and tokenizer, if not the checkpoint's")
    add("--label", help="label of the judge to read; its first one if unset")
    add("--criterion", choices=("word", "text"), default="word",
        help="word: a word is bad if it scores high alone and at the end of the text so far; "
        "text: if the score of the text so far crosses the threshold at it")  # fmt: skip
    add("--threshold", type=float, default=0.5, help="score from which a word or text is bad")
    add("--harmless", type=float, default=0.1, help="score below which it is harmless")
    add("--general_per_cut", type=int, default=2, help="cuts before harmless words for each one before a bad word")
    add("--batch_size", type=int, default=16, help="texts that the model reads at once")
    add("--output", required=True, help="the .jsonl file to write")
    add("--overwrite", action="store_true", help="replace an earlier file there")
    return made


def cut_file(options: argparse.Namespace) -> str:
    """Does what the options say.

    Returns:
        How many cuts were made from what, in a line.

    Raises:
        InputError: If an option is wrong, or there is nothing to cut.
    """
    output = Path(options.output)
    if output.exists() and not options.overwrite:
        raise InputError(f"output={str(output)!r} is there already; give another name, or --overwrite")
    judge = DetoxifyJudge(options.variant, options.checkpoint, options.config_path)
    source = ModelSource(options.pretrained, dtype="float32")
    encoder = load_encoder(source)
    texts = list(read_texts(options))
    bad, harmless = candidates(texts, judge, options)
    text_ids = ids_by_cut([*bad, *harmless], texts, encoder)
    named = {cut.record for cut in bad}
    texts = [text for text in texts if text.record in named]
    predicted = predicted_places(texts, load_model(source), encoder, options.batch_size)
    bad = first_of_each([cut for cut in bad if (cut.record, cut.place) in predicted])
    if not bad:
        raise InputError(
            f"source={options.source!r}: the model predicts none of the words that the judge scores "
            f"{options.threshold} or more; give more texts, or texts that the model wrote itself"
        )
    general = like(bad, [cut for cut in harmless if (cut.record, cut.place) in predicted], options.general_per_cut)
    rows = [row(cut, True, text_ids) for cut in bad] + [row(cut, False, text_ids) for cut in general]
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    return f"{output}: {len(bad)} cuts before a bad word, {len(general)} before a harmless one"


def read_texts(options: argparse.Namespace) -> Iterator[Text]:
    """The texts that pass, each once."""
    passes = parse_filter(options.filter, "filter").passes if options.filter else lambda record: True
    seen = set()
    for record in read_records(options.source, key="source"):
        body = get_field(record, options.text_field, "text_field")
        prompt = get_field(record, options.prompt_field, "prompt_field") if options.prompt_field else ""
        if body is None or prompt is None or not passes(record):
            continue
        if not isinstance(body, str) or not isinstance(prompt, str):
            raise InputError(f"text_field={options.text_field!r} holds no text; name another field")
        half = partition(text_id(prompt or body), options.partition_seed)
        if options.partition in ("all", half) and (prompt + body) not in seen:
            seen.add(prompt + body)
            yield Text(prompt, body, text_id(prompt + body))


def candidates(texts: Sequence[Text], judge: DetoxifyJudge, options: argparse.Namespace) -> tuple[list[Cut], list[Cut]]:
    """Cuts before bad words, and before harmless ones, whatever the model predicts there."""
    cuts = [cut_at(text, word) for text in texts for word in WORD.finditer(text.body)]
    score, bound = partial(score_each, judge=judge, label=options.label), options.threshold
    if options.criterion == "text":
        scores = score([text for cut in cuts for text in (cut.judged_before, cut.judged)])
        bad = [cut for cut in cuts if scores[cut.judged_before] < bound <= scores[cut.judged]]
        return bad, [cut for cut in cuts if scores[cut.judged] < options.harmless]
    scores = score([cut.word for cut in cuts])
    bad = [cut for cut in cuts if scores[cut.word] >= bound]
    in_context = score([cut.judged for cut in bad])
    bad = [cut for cut in bad if in_context[cut.judged] >= bound]
    return bad, [cut for cut in cuts if scores[cut.word] < options.harmless]


def cut_at(text: Text, word: re.Match) -> Cut:
    # A space belongs to the token of the word that follows it.
    before = text.body[: word.start()].rstrip(" ")
    return Cut(text.prompt + before if before else text.prompt.rstrip(" "), before, text.body[: word.end()], word[0],
               text.record, word.start())  # fmt: skip


def score_each(texts: Sequence[str], judge: DetoxifyJudge, label: str | None) -> dict[str, float]:
    """The judge's score of each different text."""
    todo = sorted(set(texts))
    scores: dict[str, float] = {}
    for start in tqdm(range(0, len(todo), 256), desc="judging", leave=False):
        part = todo[start : start + 256]
        by_label = judged(judge, part)
        if label is not None and label not in by_label:
            raise InputError(f"label={label!r} is none of the judge's; use one of {', '.join(by_label)}")
        scores |= dict(zip(part, by_label[label or next(iter(by_label))].tolist(), strict=True))
    return scores


@torch.inference_mode()
def predicted_places(
    texts: Sequence[Text], model: PreTrainedModel, encoder: Encoder, batch_size: int
) -> set[tuple[str, int]]:
    """Record and place of the words that the model's likeliest next token begins."""
    found = set()
    texts = sorted(texts, key=lambda text: (len(text.prompt + text.body), text.record))
    for start in tqdm(range(0, len(texts), batch_size), desc="reading", leave=False):
        part = texts[start : start + batch_size]
        rows = [encoder(text.prompt + text.body)[: encoder.context] for text in part]
        input_ids, mask = pad_right(rows, encoder.pad_id)
        likeliest = model(input_ids=input_ids, attention_mask=mask).logits.argmax(-1).tolist()
        for text, ids, tokens in zip(part, rows, likeliest, strict=True):
            for word in WORD.finditer(text.body):
                before = encoder(cut_at(text, word).text)
                # A tokenizer may join what is before the cut with what is behind: then there is no such place.
                if len(before) > len(encoder.prefix) and ids[: len(before)] == before:
                    begun = encoder.tokenizer.decode([tokens[len(before) - 1]]).strip()
                    if begun and word[0].startswith(begun):
                        found.add((text.record, word.start()))
    return found


def ids_by_cut(cuts: Sequence[Cut], texts: Sequence[Text], encoder: Encoder) -> dict[str, list[str]]:
    """By the text of a cut: the identities of all prompts and texts that have a cut with this text."""
    parts = {text.record: (text.prompt, text.body, text.prompt + text.body) for text in texts}
    known = {record: {encoder.identity(part) for part in three if part} for record, three in parts.items()}
    by_cut: dict[str, set[str]] = {}
    for cut in cuts:
        by_cut.setdefault(cut.text, set()).update(known[cut.record])
    return {text: sorted(ids) for text, ids in by_cut.items()}


def first_of_each(cuts: Sequence[Cut]) -> list[Cut]:
    """The first cut of each record, and no text twice."""
    by_record = {cut.record: cut for cut in sorted(cuts, key=lambda cut: -cut.place)}
    by_text = {cut.text: cut for cut in by_record.values()}
    return sorted(by_text.values(), key=lambda cut: (cut.record, cut.place))


def like(bad: Sequence[Cut], harmless: Sequence[Cut], each: int) -> list[Cut]:
    """For each of ``bad`` the ``each`` harmless cuts whose length is nearest among those left, no text twice."""
    taken = {cut.text for cut in bad}
    left = {cut.text: cut for cut in sorted(harmless, key=lambda cut: (cut.record, cut.place)) if cut.text}
    left = {text: cut for text, cut in left.items() if text not in taken}
    chosen = []
    for cut in [cut for cut in bad for _ in range(each)]:
        if left:
            nearest = min(left, key=lambda text: (abs(len(text) - len(cut.text)), text))
            chosen.append(left.pop(nearest))
    return chosen


def row(cut: Cut, behaviour: bool, text_ids: dict[str, list[str]]) -> dict[str, object]:
    return {
        "text": cut.text,
        "behaviour": behaviour,
        "word": cut.word,
        "record": cut.record,
        "text_ids": text_ids[cut.text],
    }


if __name__ == "__main__":
    sys.exit(main())
