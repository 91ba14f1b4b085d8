import pytest
from tiny_tokenizers import (
    digits_tokenizer,
    sentences,
    tiny_tokenizer,
    tokenizer_whose_unknown_is_bos,
    with_template,
)
from tokenizers import Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

from sparc3_pl.data.encoding import Encoder, UnreadableTextError, special_affixes
from sparc3_pl.data.sources import text_id
from sparc3_pl.errors import InputError

TEXT = sentences(1)[0]


@pytest.mark.parametrize(
    ("tokenizer", "expected"),
    [
        (tiny_tokenizer(), ([0], [])),
        (tiny_tokenizer(bos=False), ([], [])),
        (with_template(tiny_tokenizer(), "<s> $A </s>"), ([0], [1])),
        (with_template(tiny_tokenizer(), "$A </s>"), ([], [1])),
        (with_template(tiny_tokenizer(), "</s> <s> $A"), ([1, 0], [])),
        (digits_tokenizer(), ([0], [])),
        (digits_tokenizer("$A <s>"), ([], [0])),
        (tokenizer_whose_unknown_is_bos(), ([0], [])),
    ],
)
def test_special_affixes(tokenizer, expected):
    assert special_affixes(tokenizer) == expected


def test_a_tokenizer_that_reads_none_of_its_words():
    backend = Tokenizer(models.WordLevel({"<s>": 0, "word": 1}, unk_token="<s>"))
    backend.normalizer = normalizers.Replace("word", "")
    with pytest.raises(InputError, match="makes nothing of the words of its own vocabulary"):
        special_affixes(PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>"))


def test_what_a_tokenizer_puts_after_a_text_is_not_read():
    ending = with_template(tiny_tokenizer(), "<s> $A </s>")
    assert ending(TEXT).input_ids[-1] == 1
    assert Encoder(ending)(TEXT) == tiny_tokenizer()(TEXT).input_ids
    assert Encoder(ending)(f"<s>{TEXT}</s>") == tiny_tokenizer()(TEXT).input_ids


@pytest.mark.parametrize("written", ["<s>", "<s><s>", "\ufeff<s>", "  <s>"])
def test_a_rendered_bos_is_read_once(written):
    encoder = Encoder(tiny_tokenizer())
    assert encoder(written + TEXT) == tiny_tokenizer()(TEXT).input_ids
    assert encoder.special_counts(written + TEXT) == {"num_with_prefix": 1, "num_with_special": 0}


def test_special_tokens_within_a_text_are_read_and_counted():
    encoder = Encoder(tiny_tokenizer())
    chat = "<s>The red fox</s> crosses"
    assert encoder(chat) == tiny_tokenizer()("The red fox</s> crosses").input_ids
    assert encoder.special_counts(chat) == {"num_with_prefix": 1, "num_with_special": 1}
    assert encoder.special_counts("The red fox</s>") == {"num_with_prefix": 0, "num_with_special": 1}
    assert not any(encoder.special_counts(TEXT).values())


def test_bos_that_the_tokenizer_does_not_put_there_stays():
    tokenizer = tiny_tokenizer(bos=False)
    assert Encoder(tokenizer)("<s>" + TEXT) == tokenizer("<s>" + TEXT).input_ids


def test_an_unknown_word_is_no_rendered_bos():
    assert Encoder(tokenizer_whose_unknown_is_bos())("blue fox") == [0, 0, 2]
    assert Encoder(tokenizer_whose_unknown_is_bos())("<s> red fox") == [0, 1, 2]


def test_token_ids_are_taken_as_they_stand():
    for encoder in (Encoder(tiny_tokenizer()), Encoder(None, vocab_size=320)):
        assert encoder([7, 319, 0]) == [7, 319, 0]
        assert encoder.before([7]) == []
    assert Encoder(None).decode([7]) is None


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1, 320], "token id 320 at place 1 is not in the model's vocabulary, whose ids are 0 to 319"),
        ([-1], "token id -1 at place 0"),
        ([1.0], r"holds 1\.0 at place 0"),
        ([True], "holds True at place 0"),
        (0.5, "holds float, neither text nor"),
    ],
)
def test_lists_that_are_no_token_ids(ids, message):
    with pytest.raises(UnreadableTextError, match=message):
        Encoder(None, vocab_size=320)(ids)


def test_text_needs_a_tokenizer():
    with pytest.raises(UnreadableTextError, match="no tokenizer to read text with"):
        Encoder(None, vocab_size=320)(TEXT)


@pytest.mark.parametrize(
    "variant", ["{} ", "\ufeff{}", "<s>{}", "{}</s>", "\n <s> {}\r\n", "\u200b{}", "<s><s>{}</s> "]
)
@pytest.mark.parametrize("bos", [True, False])
def test_what_cannot_be_seen_makes_no_new_text(variant, bos):
    encoder = Encoder(tiny_tokenizer(bos))
    for text in ("One\r\ntwo café.", "One\ntwo cafe\u0301."):
        assert encoder.identity(variant.format(text)) == text_id("One\ntwo café.")
    assert encoder.identity(TEXT) == text_id(TEXT)
    assert encoder.identity(TEXT + "!") != text_id(TEXT)


def test_identities_know_a_text_by_letters_and_by_token_ids():
    encoder = Encoder(tiny_tokenizer())
    body = tiny_tokenizer(bos=False)(TEXT).input_ids
    names = encoder.identities(f"{TEXT} ")
    assert {text_id(f"{TEXT} "), text_id(TEXT)} < names
    assert {text_id(body), text_id([0, *body])} < encoder.identities(TEXT)
