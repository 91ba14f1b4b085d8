"""A small byte-level BPE tokenizer, trained in milliseconds on sentences of the tests' own."""

import functools
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SUBJECTS = ("The red fox", "A quiet child", "My old neighbour", "The last train", "Our teacher", "One small boat")
VERBS = ("crosses", "watches", "remembers", "leaves behind", "looks for", "paints")
OBJECTS = ("the frozen river", "a green door", "the wide field", "an empty house", "the evening star", "some bread")


def sentences(count: int) -> list[str]:
    """Different sentences, at most 216 of them."""
    made = [f"{s} {v} {o}." for o in OBJECTS for v in VERBS for s in SUBJECTS]
    return made[:count]


def documents(count: int, length: int = 5) -> list[str]:
    """Different documents of ``length`` sentences each."""
    pool = sentences(216)
    return [" ".join(pool[(7 * i + 11 * j) % 216] for j in range(length)) + f" Page {i}." for i in range(count)]


@functools.cache
def _backend() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences(216), trainer)
    return tokenizer.to_str()


def tiny_tokenizer(bos: bool = True, context: int | None = None, **special: str) -> PreTrainedTokenizerFast:
    """Ids: 0 ``<s>``, 1 ``</s>``, then bytes and merges; 320 in all. ``bos``: put ``<s>`` before every text."""
    backend = Tokenizer.from_str(_backend())
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
        )
    names = {"bos_token": "<s>", "eos_token": "</s>"} | special
    options = {} if context is None else {"model_max_length": context}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names, **options)


def with_template(tokenizer: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    """The tokenizer with other special tokens around a text, as ``<s> $A </s>``."""
    names = [name for name in template.split() if name != "$A"]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(name, tokenizer.convert_tokens_to_ids(name)) for name in names]
    )
    return tokenizer


def digits_tokenizer(template: str = "<s> $A") -> PreTrainedTokenizerFast:
    """Ids: 0 ``<s>``, 1 to 9 the digits, 10 ``12``; it makes nothing of anything else."""
    digits = {"<s>": 0, **{str(digit): digit for digit in range(1, 10)}, "12": 10}
    backend = Tokenizer(models.BPE(digits, [("1", "2")]))
    return with_template(PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>"), template)


def tokenizer_whose_unknown_is_bos() -> PreTrainedTokenizerFast:
    """Ids: 0 ``<s>``, which stands for unknown words too, 1 ``red``, 2 ``fox``."""
    backend = Tokenizer(models.WordLevel({"<s>": 0, "red": 1, "fox": 2}, unk_token="<s>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<s>")
    return with_template(made, "<s> $A")


def whole_word_tokenizer(
    words: Iterable[str], bos: bool = False, metaspace: bool = False, digits: int = 1
) -> PreTrainedTokenizerFast:
    """Each word is one token with the space before it, anything else bytes; ``digits`` of a number are one token.

    ``metaspace``: as SentencePiece does it, a space is put before the text too, and spaces are written as a low line.
    """
    space = "▁" if metaspace else "Ġ"
    spaces = [space, *({} if metaspace else pre_tokenizers.ByteLevel.alphabet())]
    if metaspace:
        spaces += [chr(code) for code in range(33, 127)]
    numbers = [f"{number:0{width}}" for width in range(1, digits + 1) for number in range(10**width)]
    tokens = dict.fromkeys(["<s>", "<unk>", *spaces, *numbers, *(f"{space}{word}" for word in words)])
    backend = Tokenizer(models.Unigram([(token, -float(1)) for token in tokens], unk_id=1))
    split = pre_tokenizers.Split(Regex(rf"\d{{1,{digits}}}"), "isolated")
    if metaspace:
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.Metaspace(prepend_scheme="first")])
        backend.decoder = decoders.Metaspace()
    else:
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        words_ = pre_tokenizers.Split(Regex(r" ?[^\s\d]+"), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, words_, bytes_])
        backend.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<unk>")
    return with_template(made, "<s> $A") if bos else made


def of_letters() -> PreTrainedTokenizerFast:
    """A tokenizer of three words."""
    words = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "a", "b", "c"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>")
