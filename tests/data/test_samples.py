import json
import re
from collections import Counter

import pytest
from tiny_tokenizers import digits_tokenizer, documents, sentences, tiny_tokenizer, with_template

from sparc3_pl.data.encoding import Encoder, UnreadableTextError
from sparc3_pl.data.matching import SampleFormat, matched_samples, read_formats
from sparc3_pl.data.samples import ending, pack_windows, random_windows, text_samples
from sparc3_pl.data.sources import text_id
from sparc3_pl.errors import InputError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It is.", "stop"),
        ("Is it?", "stop"),
        ("It is! \n", "stop"),
        ('He said "yes."', "stop"),
        ("He said “yes.”", "stop"),
        ("(It is.)", "stop"),
        ("そうです。", "stop"),
        ("It is", "cut"),
        ("It is,", "cut"),
        ('He said "yes', "cut"),
        ('He said "yes"', "cut"),
        ("a: b;", "cut"),
        ("", "cut"),
    ],
)
def test_ending(text, expected):
    assert ending(text) == expected


# --- windows ----------------------------------------------------------------------------------------------------------


def slow_windows(texts, tokenizer, seq_len, bos):
    """The whole text as one list, then slices."""
    ids = []
    for i, text in enumerate(texts):
        ids += (tokenizer("\n\n", add_special_tokens=False).input_ids if i else []) + tokenizer(
            text, add_special_tokens=False
        ).input_ids
    body = seq_len - bos
    return [[0] * bos + ids[i : i + body] for i in range(0, len(ids) - body + 1, body)]


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("seq_len", [2, 7, 64])
def test_windows_equal_slices_of_the_joined_text(bos, seq_len):
    tokenizer, texts = tiny_tokenizer(bos), documents(12)
    windows = pack_windows(texts, Encoder(tokenizer), seq_len, None)
    slow = dict.fromkeys(tuple(window) for window in slow_windows(texts, tokenizer, seq_len, bos))  # equal ones once
    assert [tuple(w.input_ids) for w in windows] == list(slow)
    assert all(len(w.input_ids) == seq_len for w in windows)
    assert len({w.id for w in windows}) == len(windows)


def test_windows_know_their_ending():
    tokenizer = tiny_tokenizer()
    text = sentences(1)[0]
    num_tokens = len(tokenizer(text).input_ids)
    assert pack_windows([text], Encoder(tokenizer), num_tokens, 1)[0].ending == "stop"
    assert pack_windows([text], Encoder(tokenizer), num_tokens - 1, 1)[0].ending == "cut"


def test_windows_read_no_more_than_they_need():
    tokenizer, read = tiny_tokenizer(), []

    def texts():
        for text in documents(100):
            read.append(text)
            yield text

    pack_windows(texts(), Encoder(tokenizer), 32, 2)
    assert len(read) == 1


def test_equal_windows_are_served_once():
    tokenizer, counts = tiny_tokenizer(bos=False), Counter()
    texts = ["The red fox crosses the wide field."] * 5
    seq_len = len(tokenizer(texts[0] + "\n\n").input_ids)
    assert len(pack_windows(texts, Encoder(tokenizer), seq_len, None, counts=counts)) == 1
    assert counts["num_duplicates"] == 3


@pytest.mark.parametrize("bos", [True, False])
def test_random_windows_are_slices_of_long_documents(bos):
    """Each window is looked for in its own document's tokens; the document is known by its id."""
    tokenizer, texts, counts = tiny_tokenizer(bos), documents(30), Counter()
    bodies = {text_id(text): tokenizer(text, add_special_tokens=False).input_ids for text in texts}
    seq_len = sorted(map(len, bodies.values()))[10] + bos  # one document fills a window exactly: not longer, left out
    windows = random_windows(texts, Encoder(tokenizer), seq_len, None, seed=3, counts=counts)
    long = [name for name, body in bodies.items() if len(body) + bos > seq_len]
    assert [window.text_ids for window in windows] == [(name,) for name in long]
    assert counts["num_too_short"] == len(texts) - len(long) >= 11
    for window in windows:
        (name,), tokens = window.text_ids, window.input_ids[bos:]
        starts = [i for i in range(len(bodies[name])) if bodies[name][i : i + seq_len - bos] == tokens]
        assert starts and len(window.input_ids) == seq_len and window.input_ids[:bos] == [0] * bos


def test_random_windows_begin_anywhere():
    """A document of n tokens has n - length + 1 windows; over many seeds each is drawn about equally often."""
    text = list(range(12))  # token ids, which stand for themselves
    encoder = Encoder(digits_tokenizer(), vocab_size=12)
    starts = Counter(random_windows([text], encoder, 9, 1, seed=seed)[0].input_ids[0] for seed in range(800))
    assert sorted(starts) == [0, 1, 2, 3]
    assert all(150 < count < 250 for count in starts.values())  # 200 +- 4 standard deviations


def test_a_documents_window_does_not_depend_on_the_others():
    encoder, texts = Encoder(tiny_tokenizer()), documents(20)
    every = {w.text_ids: w.input_ids for w in random_windows(texts, encoder, 16, None, seed=1)}
    some = {w.text_ids: w.input_ids for w in random_windows(texts[::-2], encoder, 16, None, seed=1)}
    other = {w.text_ids: w.input_ids for w in random_windows(texts, encoder, 16, None, seed=2)}
    assert some.items() <= every.items() and len(some) < len(every)
    assert other.keys() == every.keys() and other != every


def test_random_windows_read_no_more_than_they_need():
    read = []

    def texts():
        for text in documents(100):
            read.append(text)
            yield text

    assert len(random_windows(texts(), Encoder(tiny_tokenizer()), 16, 5, seed=0)) == 5
    assert len(read) < 20


def test_too_few_long_documents():
    with pytest.raises(InputError, match=r"num_samples=9: here has only 0 documents longer than data\.seq_len=5000"):
        random_windows(documents(12), Encoder(tiny_tokenizer()), 5000, 9, 0, "here")


def test_too_little_text_for_the_windows():
    tokenizer = tiny_tokenizer()
    with pytest.raises(InputError, match=r"data\.num_samples=1000: here gives only \d+ windows of data\.seq_len=32"):
        pack_windows(documents(3), Encoder(tokenizer), 32, 1000, "here")
    with pytest.raises(InputError, match=r"only 0 windows of data\.seq_len=500 tokens \(\d+ tokens in all\)"):
        pack_windows(documents(1), Encoder(tokenizer), 500, None)


def test_windows_that_do_not_fit():
    with pytest.raises(InputError, match=r"data\.seq_len=1 leaves no room"):
        pack_windows(documents(3), Encoder(tiny_tokenizer()), 1, 1)
    with pytest.raises(InputError, match=r"data\.seq_len=65 is longer than the model's context of 64"):
        pack_windows(documents(3), Encoder(tiny_tokenizer(context=64)), 65, 1)


def test_windows_know_the_texts_that_they_were_made_from():
    """The slow road: each token of the joined text carries its text's id."""
    tokenizer, texts = tiny_tokenizer(bos=False), [f"<s>{text} " for text in documents(9, length=2)]
    separator = tokenizer("\n\n").input_ids
    stream = []
    for number, text in enumerate(texts):
        own = text_id(text.removeprefix("<s>").strip())
        stream += [(token, own) for token in (separator if number else []) + tokenizer(text).input_ids]
    windows = pack_windows(texts, Encoder(tokenizer), 16, None)
    assert len(windows) == len(stream) // 16
    for number, window in enumerate(windows):
        part = stream[16 * number : 16 * number + 16]
        assert window.input_ids == [token for token, _ in part]
        assert set(window.text_ids) == {own for _, own in part}


def test_equal_windows_keep_the_ids_of_all_their_texts():
    encoder = Encoder(tiny_tokenizer(bos=False))
    texts = ["The red fox crosses", "The red fox watches"]
    seq_len = len(encoder("The red fox")) + 0
    windows = pack_windows([texts[0]], encoder, seq_len, 1) + pack_windows([texts[1]], encoder, seq_len, 1)
    assert windows[0].id == windows[1].id
    both = text_samples(texts, encoder, max_tokens=seq_len)
    assert [set(sample.text_ids) for sample in both] == [{text_id(text) for text in texts}]


def test_texts_cut_out_of_others_keep_the_ids_of_those():
    encoder, texts = Encoder(tiny_tokenizer()), documents(2)
    origins = {text_id(texts[0]): ["a", "b"]}
    expected = {"a", "b", text_id(texts[0])}
    assert set(text_samples(texts, encoder, origins=origins)[0].text_ids) == expected
    assert set(pack_windows(texts, encoder, 8, 1, origins=origins)[0].text_ids) == expected
    assert set(matched_samples(texts, encoder, [SampleFormat(8, "cut")], origins=origins)[0].text_ids) == expected


def test_samples_hold_nothing_that_comes_after_a_text():
    plain, ending = Encoder(tiny_tokenizer()), Encoder(with_template(tiny_tokenizer(), "<s> $A </s>"))
    texts, formats = documents(20), [SampleFormat(n, "cut") for n in (5, 9, 12)]
    assert text_samples(texts, ending) == text_samples(texts, plain)
    assert pack_windows(texts, ending, 16, None) == pack_windows(texts, plain, 16, None)
    assert matched_samples(texts, ending, formats) == matched_samples(texts, plain, formats)


# --- token ids --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoder", [Encoder(None, vocab_size=320, context=64), Encoder(tiny_tokenizer())])
def test_token_ids_are_samples_as_they_stand(encoder):
    lists = [[5, 6, 7], [319, 0], [5, 6, 7, 8, 9]]
    samples = text_samples(lists, encoder, max_tokens=4)
    assert [sample.input_ids for sample in samples] == [[5, 6, 7], [319, 0], [5, 6, 7, 8]]
    assert [sample.id for sample in samples] == [text_id(ids) for ids in lists]
    assert [sample.text_ids for sample in samples] == [(text_id(ids),) for ids in lists]
    windows = pack_windows(lists, encoder, 4, None)
    assert [window.input_ids for window in windows] == [[5, 6, 7, 319], [0, 5, 6, 7]]
    assert set(windows[0].text_ids) == {text_id(lists[0]), text_id(lists[1])}


def test_endings_of_token_ids_are_known_where_they_can_be_read():
    tokenizer = tiny_tokenizer()
    lists = [tokenizer(text).input_ids for text in ("It is.", "It is")]
    assert [sample.ending for sample in text_samples(lists, Encoder(tokenizer))] == ["stop", "cut"]
    assert [sample.ending for sample in text_samples(lists, Encoder(None, 320))] == [None, None]


def test_token_ids_that_are_none():
    encoder = Encoder(None, vocab_size=320, context=4)
    with pytest.raises(UnreadableTextError, match="token id 320"):
        text_samples([[1], [320]], encoder)
    with pytest.raises(UnreadableTextError, match="holds a list of token ids, others text"):
        text_samples(["a", [1]], Encoder(tiny_tokenizer()))
    with pytest.raises(UnreadableTextError, match="holds text, others lists of token ids"):
        pack_windows([[1], "a"], Encoder(tiny_tokenizer()), 2, 1)
    with pytest.raises(InputError, match="longer than the model's context of 4"):
        text_samples([[1] * 5], encoder)
    with pytest.raises(UnreadableTextError, match=r"data\.match needs text"):
        matched_samples([[1, 2, 3]], Encoder(tiny_tokenizer()), [SampleFormat(2, "cut")])


# --- one text a sample ------------------------------------------------------------------------------------------------


def test_each_text_is_a_sample():
    tokenizer, texts = tiny_tokenizer(), ["The red fox crosses.", "The red fox"]
    samples = text_samples(texts, Encoder(tokenizer))
    assert [s.input_ids for s in samples] == [tokenizer(text).input_ids for text in texts]
    assert [s.id for s in samples] == [text_id(text) for text in texts]
    assert [s.ending for s in samples] == ["stop", "cut"]


def test_max_tokens_cuts():
    tokenizer = tiny_tokenizer(context=16)
    text = documents(1)[0]
    [sample] = text_samples([text], Encoder(tokenizer), max_tokens=10)
    assert sample.input_ids == tokenizer(text).input_ids[:10]
    assert sample.id == text_id(text)
    assert sample.ending == "cut"


def test_texts_that_are_too_long_or_too_few():
    with pytest.raises(InputError, match=r"longer than the model's context of 16; set data\.max_tokens: 16"):
        text_samples(documents(1), Encoder(tiny_tokenizer(context=16)))
    with pytest.raises(InputError, match=r"data\.num_samples=5: here gives only 3 samples"):
        text_samples(documents(3), Encoder(tiny_tokenizer()), 5, source="here")
    with pytest.raises(InputError, match="gives only 0 samples"):
        text_samples([], Encoder(tiny_tokenizer()))


def test_texts_without_tokens_are_counted_and_left_out():
    for template, prefix in (("<s> $A", [0]), ("$A", [])):
        counts, encoder = Counter(), Encoder(digits_tokenizer(template))
        samples = text_samples(["1", "abc", "<s>", "2"], encoder, 2, counts=counts)
        assert [sample.input_ids for sample in samples] == [[*prefix, 1], [*prefix, 2]]
        assert counts["num_without_tokens"] == 2
    with pytest.raises(InputError, match="gives only 0 samples"):
        text_samples(["abc"], Encoder(digits_tokenizer()))


def test_texts_equal_once_cut_are_one_sample():
    tokenizer, counts = tiny_tokenizer(), Counter()
    texts = [f"The red fox crosses the wide field, page {i}" for i in range(20)]
    samples = text_samples([*texts, "A quiet child"], Encoder(tokenizer), max_tokens=5, counts=counts)
    assert [sample.input_ids for sample in samples] == [
        tokenizer(text).input_ids[:5] for text in (texts[0], "A quiet child")
    ]
    assert counts["num_duplicates"] == 19
    with pytest.raises(InputError, match=r"data\.num_samples=3: .* gives only 2 samples"):
        text_samples([*texts, "A quiet child"], Encoder(tokenizer), 3, max_tokens=5)
    with pytest.raises(InputError, match=r"data\.max_tokens=1 leaves no room for text beside 1 special tokens"):
        text_samples(texts, Encoder(tokenizer), max_tokens=1)


# --- matched ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bos", [True, False])
def test_matched_samples_have_the_formats_asked_for(bos):
    tokenizer = tiny_tokenizer(bos)
    stops = [len(tokenizer(text).input_ids) for text in (sentences(1)[0], "Page 7.")]
    formats = [SampleFormat(n, "cut") for n in (5, 9, 9, 12, 20)] + [SampleFormat(n, "stop") for n in stops]
    counts = Counter()
    samples = matched_samples(documents(200), Encoder(tokenizer), formats, counts=counts)
    assert [len(s.input_ids) for s in samples] == [t.num_tokens for t in formats]
    assert [s.ending for s in samples] == [t.ending for t in formats]
    assert counts["num_unmatched_endings"] == 0
    for sample in samples:
        text = tokenizer.decode(sample.input_ids, skip_special_tokens=True)
        assert sample.input_ids[:bos] == [0] * bos
        assert text[0].isupper() or text.startswith("Page")  # from the start of a sentence
        assert text.endswith(".") == (sample.ending == "stop")


def slow_matched(texts, tokenizer, formats):
    """Every document tried on every open format by every sentence start; no order of formats, nothing kept."""
    todo = sorted(range(len(formats)), key=lambda i: (formats[i].ending == "cut", -formats[i].num_tokens, i))
    samples = {}
    for text in texts:
        starts = [0, *(match.end() for match in re.finditer(r"[.!?]\s+(?=\S)", text))][:32]
        spans = [tokenizer(text[start:], add_special_tokens=False).input_ids for start in starts]

        def fits(i, span):
            length = formats[i].num_tokens - 1
            said, more = tokenizer.decode(span[:length]), tokenizer.decode(span[: length + 1])
            is_whole = len(span) >= length and not more[len(said) : len(said) + 1].isalnum()
            is_cut = formats[i].ending == "cut"
            return is_whole and ending(said) == formats[i].ending and len(span) > length * is_cut

        tried = ((i, [0, *span[: formats[i].num_tokens - 1]]) for i in todo for span in spans if fits(i, span))
        chosen = next(((i, ids) for i, ids in tried if ids not in samples.values()), None)
        if chosen is not None:
            samples[chosen[0]] = chosen[1]
            todo.remove(chosen[0])
    return [samples[i] for i in range(len(formats))]


def test_matched_samples_by_the_slow_road():
    tokenizer, texts = tiny_tokenizer(), documents(120)
    lengths = [len(tokenizer(text).input_ids) for text in sentences(10)]
    formats = [SampleFormat(lengths[i % 10], "stop") if i % 3 else SampleFormat(5 + i % 7, "cut") for i in range(40)]
    samples = matched_samples(texts, Encoder(tokenizer), formats)
    assert [sample.input_ids for sample in samples] == slow_matched(texts, tokenizer, formats)


def test_samples_of_one_format_are_tried_once_a_document(monkeypatch):
    looks = []

    def counting(tokenizer):
        decode = tokenizer.decode
        tokenizer.decode = lambda *args, **kwargs: looks.append(1) or decode(*args, **kwargs)
        return Encoder(tokenizer)

    def number_of_looks(num_formats):
        encoder = counting(tiny_tokenizer())
        looks.clear()
        texts = [text.replace(".", ",") for text in documents(30)]
        with pytest.raises(InputError, match="lengths to match"):
            matched_samples(texts, encoder, [SampleFormat(9, "stop"), SampleFormat(12, "stop")] * num_formats)
        return len(looks)

    assert number_of_looks(400) <= 2 * number_of_looks(40)


def test_matched_samples_come_from_different_documents():
    tokenizer, texts = tiny_tokenizer(), [f"Page {i} tells of some bread and the evening star." for i in range(9)]
    samples = matched_samples(texts, Encoder(tokenizer), [SampleFormat(8, "cut")] * 9)
    starts = {tokenizer.decode(s.input_ids, skip_special_tokens=True)[:6] for s in samples}
    assert starts == {f"Page {i}" for i in range(9)}


def test_matched_cuts_end_after_a_word():
    tokenizer, texts = tiny_tokenizer(), documents(50)
    samples = matched_samples(texts, Encoder(tokenizer), [SampleFormat(n, "cut") for n in range(5, 25)])
    words = {word.strip(".") for text in texts for word in text.split()}
    for sample in samples:
        assert tokenizer.decode(sample.input_ids, skip_special_tokens=True).split()[-1] in words


def test_short_documents_are_passed_over_and_counted():
    texts = ["Short.", "Some.", *documents(3)]
    counts = Counter()
    samples = matched_samples(texts, Encoder(tiny_tokenizer()), [SampleFormat(30, "cut")] * 3, counts=counts)
    assert [len(s.input_ids) for s in samples] == [30] * 3
    assert counts["num_too_short"] == 2


def test_a_whole_text_is_no_cut():
    tokenizer = tiny_tokenizer()
    headline = "The evening star"
    with pytest.raises(InputError, match="only 0 samples for 1 lengths"):
        matched_samples([headline], Encoder(tokenizer), [SampleFormat(len(tokenizer(headline).input_ids), "cut")])


def test_cuts_inside_a_word_are_the_last_resort():
    counts = Counter()
    samples = matched_samples(
        ["Neighbourhood" * 20], Encoder(tiny_tokenizer()), [SampleFormat(9, "cut")], counts=counts
    )
    assert [len(s.input_ids) for s in samples] == [9]
    assert counts["num_cut_in_word"] == 1


def test_the_same_sentence_in_two_documents_is_used_once():
    texts = [f"The red fox crosses the wide field. It is page {i} of my old neighbour." for i in range(3)]
    samples = matched_samples(texts, Encoder(tiny_tokenizer()), [SampleFormat(9, "cut")] * 2)
    assert len({s.id for s in samples}) == 2


def test_endings_that_cannot_be_met_are_filled_and_counted():
    texts = [text.replace(".", ",") for text in documents(5)]
    counts = Counter()
    samples = matched_samples(
        texts, Encoder(tiny_tokenizer()), [SampleFormat(9, "stop"), SampleFormat(9, "cut")], counts=counts
    )
    assert [s.ending for s in samples] == ["cut", "cut"]
    assert counts["num_unmatched_endings"] == 1


def test_an_endless_stream_comes_to_an_end():
    def endless():
        while True:
            yield "no, no"

    with pytest.raises(InputError, match="only 0 samples for 1 lengths to match"):
        matched_samples(endless(), Encoder(tiny_tokenizer()), [SampleFormat(40, "cut")])


def test_read_formats(tmp_path):
    rows = [{"id": "a", "num_tokens": 5, "ending": "stop", "relevance": 1.0}, {"num_tokens": 7, "ending": "cut"}]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_formats(tmp_path) == [SampleFormat(5, "stop"), SampleFormat(7, "cut")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"no samples\.jsonl"),
        ("", "is empty"),
        ('{"num_tokens": 5}\n', "line 1 of .* has no num_tokens and ending"),
        ('{"num_tokens": 5, "ending": "cut"}\n{"num', "line 2 of"),
        ('{"num_tokens": 5, "ending": null}\n', "token ids that no tokenizer could read"),
    ],
)
def test_formats_that_cannot_be_read(content, message, tmp_path):
    if content is not None:
        (tmp_path / "samples.jsonl").write_text(content)
    with pytest.raises(InputError, match=message) as error:
        read_formats(tmp_path)
    assert "data.match" in str(error.value)
