import re
from collections import Counter

import pytest
import torch
from tiny_tokenizers import tiny_tokenizer, tokenizer_whose_unknown_is_bos, whole_word_tokenizer

from sparc3_pl.data.encoding import Encoder, load_encoder
from sparc3_pl.data.pair_tasks import agreement
from sparc3_pl.data.pair_tasks.agreement import NOUNS, VERBS
from sparc3_pl.data.pair_tasks.greater_than import EVENTS
from sparc3_pl.data.pair_tasks.indirect_objects import NAMES, OBJECTS, PLACES, TEMPLATES
from sparc3_pl.data.pair_tasks.task import PairText, Partition, one_token
from sparc3_pl.data.pairs import PAIR_TASKS, Pair, PairQuery, encode_pair, make_pairs, pad_pairs
from sparc3_pl.data.reference import ReferenceData
from sparc3_pl.errors import InputError
from sparc3_pl.model.source import ModelSource

TOKENIZERS = ("words", "words-bos", "pieces", "two-digits", "three-digits", "four-digits", "demo", "smollm2")


@pytest.fixture(scope="module")
def encoders(request):
    made: dict[str, Encoder] = {}

    def get(name: str) -> Encoder:
        if name not in made:
            if name == "demo":
                made[name] = load_encoder(ModelSource("demo"))
            elif name == "smollm2":
                made[name] = load_encoder(ModelSource(str(request.getfixturevalue("smollm2"))))
            else:
                made[name] = Encoder(whole_word_tokenizer(_words(), **_KINDS[name]))
        return made[name]

    return get


_KINDS = {
    "words": {},
    "words-bos": {"bos": True},
    "pieces": {"metaspace": True, "bos": True},
    "two-digits": {"digits": 2},
    "three-digits": {"digits": 3},
    "four-digits": {"digits": 4},
}


def _words() -> list[str]:
    texts = [
        *NAMES,
        *OBJECTS,
        *PLACES,
        *EVENTS,
        *NOUNS,
        *(f"{noun}s" for noun in NOUNS),
        *(v for p in VERBS for v in p),
    ]
    return [
        *texts,
        "to",
        "in",
        "the",
        *(word for template in TEMPLATES for word in re.findall(r"(?<!{)\b[a-z]+\b", template)),
    ]


def names_in(sentence: str) -> list[str]:
    return [word for word in re.findall(r"[A-Za-z]+", sentence) if word in NAMES]


def pairs_of(encoder: Encoder, source: str, number: int = 64, half: str = "all", **options) -> list[Pair]:
    return make_pairs(PairQuery(source, number, half, **options), encoder).pairs


@pytest.mark.parametrize("source", PAIR_TASKS)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_sentences_have_as_many_tokens_and_the_answers_follow_them(encoders, name, source):
    encoder = encoders(name)
    if (name, source) == ("demo", "agreement"):
        with pytest.raises(InputError, match=r"data.source=agreement: it needs 6 nouns whose singular and plural are"):
            pairs_of(encoder, source)
        return
    for kind in PAIR_TASKS[source].counterfactuals:
        for pair in pairs_of(encoder, source, counterfactual=kind):
            assert pair.clean_ids == encoder(pair.text.clean)
            assert pair.counterfactual_ids == encoder(pair.text.counterfactual) != pair.clean_ids
            assert len(pair.counterfactual_ids) == len(pair.clean_ids)
            # Whoever reads on after the sentence meets the answer's token, or the foil's.
            assert encoder(pair.text.clean + pair.text.answer)[: len(pair.clean_ids) + 1] == [
                *pair.clean_ids,
                pair.answer,
            ]
            assert encoder(pair.text.clean + pair.text.foil)[: len(pair.clean_ids) + 1] == [*pair.clean_ids, pair.foil]
            assert pair.answer != pair.foil


@pytest.mark.parametrize("name", ["words", "pieces", "demo", "smollm2"])
def test_names_of_indirect_objects_stand_where_they_must(encoders, name):
    encoder = encoders(name)
    for pair in pairs_of(encoder, "ioi", counterfactual="abc"):
        answer, foil = pair.text.answer.strip(), pair.text.foil.strip()
        first, second, subject = names_in(pair.text.clean)
        assert {first, second} == {answer, foil}
        assert subject == foil != answer
        assert pair.text.words == (answer, foil)
        others = names_in(pair.text.counterfactual)
        assert len({*others, answer, foil}) == 5
        masked = re.sub("|".join({answer, foil}), "_", pair.text.clean)
        assert masked == re.sub("|".join(others), "_", pair.text.counterfactual)  # nothing but the names differs
        # Three tokens differ: the names are one token each.
        assert sum(a != b for a, b in zip(pair.clean_ids, pair.counterfactual_ids, strict=True)) == 3
    for pair in pairs_of(encoder, "ioi", counterfactual="s2_io"):
        places = [i for i, (a, b) in enumerate(zip(pair.clean_ids, pair.counterfactual_ids, strict=True)) if a != b]
        assert [(pair.clean_ids[i], pair.counterfactual_ids[i]) for i in places] == [(pair.foil, pair.answer)]
        assert pair.clean_ids.index(pair.foil) < places[0]


def test_both_orders_and_all_templates_come_equally_often(encoders):
    number = 4 * 2 * len(TEMPLATES)
    pairs = pairs_of(encoders("words"), "ioi", number)
    kinds = Counter((pair.text.template, names_in(pair.text.clean)[0] == pair.text.words[0]) for pair in pairs)
    assert len(TEMPLATES) >= 12
    assert set(kinds.values()) == {4}
    assert len(kinds) == 2 * len(TEMPLATES)


def test_no_sentence_begins_with_a_name_and_every_template_has_its_places():
    for template in TEMPLATES:
        assert not template.startswith("{")
        assert sorted(re.findall(r"{(\w+)}", template)) == ["first", "object", "place", "second", "subject"]
    assert len(NAMES) == len(set(NAMES)) >= 100


@pytest.mark.parametrize("source", PAIR_TASKS)
@pytest.mark.parametrize("seed", [0, 3])
def test_the_halves_share_no_template_and_no_name(encoders, source, seed):
    halves = [
        pairs_of(encoders("words"), source, 150, half, partition_seed=seed) for half in ("attribution", "evaluation")
    ]
    templates = [{pair.text.template for pair in half} for half in halves]
    words = [{word for pair in half for word in pair.text.words if not word.isdigit()} for half in halves]
    if source == "ioi":  # the counterfactuals' names too
        words = [
            {*own, *(n for pair in half for n in names_in(pair.text.counterfactual))}
            for own, half in zip(words, halves, strict=True)
        ]
    for one, other in (templates, words):
        assert one and other
        assert not one & other
    again = pairs_of(encoders("words"), source, 150, "evaluation", partition_seed=seed + 1)
    assert {pair.text.template for pair in again} != templates[1]


def test_the_seed_alone_decides(encoders):
    encoder = encoders("words")
    one, same, other = (pairs_of(encoder, "ioi", 40, seed=seed) for seed in (0, 0, 1))
    assert one == same
    assert not {pair.id for pair in one} & {pair.id for pair in other}
    assert [pair.id for pair in pairs_of(encoder, "ioi", 20)] == [pair.id for pair in one[:20]]
    # Both kinds of counterfactual belong to the same sentences.
    assert [pair.clean_ids for pair in pairs_of(encoder, "ioi", 40, counterfactual="s2_io")] == [
        p.clean_ids for p in one
    ]
    assert len({pair.id for pair in one}) == 40


@pytest.mark.parametrize("name", ["words", "two-digits", "three-digits", "four-digits", "demo", "smollm2"])
def test_years_are_later_or_earlier_by_the_first_token(encoders, name):
    encoder = encoders(name)
    # Where a year's tokens are 175 and 8, or the year is one, the sentence ends before it.
    within = name not in ("three-digits", "four-digits")
    for pair in pairs_of(encoder, "greater_than"):
        start = int(pair.text.words[1])
        assert pair.text.clean.count(str(start)) == 1
        century = str(start // 100)
        assert pair.text.clean.endswith(f" {century}" if within else " ")
        answer, foil = (int((century if within else "") + last) for last in (pair.text.answer, pair.text.foil))
        assert foil < start < answer
        assert answer // 100 == start // 100 == foil // 100
        # As far as the first token reaches, the order is clear already.
        written = [encoder.decode([token]).strip() for token in (pair.answer, pair.foil)]
        after, before = ((century if within else "") + token for token in written)
        assert int(before) < int(str(start)[: len(before)])
        assert int(after) > int(str(start)[: len(after)])
        assert pair.text.counterfactual == pair.text.clean.replace(str(start), f"{century}01")


def test_a_tokenizer_that_cannot_tell_years_apart_is_refused_with_what_it_does():
    with pytest.raises(
        InputError, match=r"greater_than: the tokenizer writes 'in 1758' as .*, so that only 0 start years"
    ):
        pairs_of(Encoder(tokenizer_whose_unknown_is_bos()), "greater_than")


@pytest.mark.parametrize("name", ["words", "pieces", "smollm2"])
def test_verbs_agree_with_the_subject_and_not_with_the_noun_between(encoders, name):
    plural = {verb for _, verb in VERBS}
    seen = Counter()
    for pair in pairs_of(encoders(name), "agreement", 96):
        subject, other = pair.text.words
        words = re.findall(r"\w+", pair.text.clean)
        is_plural, other_is_plural = f"{subject}s" in words, f"{other}s" in words
        assert (subject in words) is not is_plural
        assert (pair.text.answer.strip() in plural) is is_plural
        assert (pair.text.foil.strip() in plural) is not is_plural
        assert {(pair.text.answer.strip(), pair.text.foil.strip())} & {*VERBS, *(verbs[::-1] for verbs in VERBS)}
        changed = [(a, b) for a, b in zip(words, re.findall(r"\w+", pair.text.counterfactual), strict=True) if a != b]
        assert changed == [(f"{subject}s", subject) if is_plural else (subject, f"{subject}s")]
        seen[is_plural, other_is_plural] += 1
    assert set(seen.values()) == {24}  # both numbers of both nouns equally often


def test_a_tokenizer_without_enough_names_is_refused():
    with pytest.raises(InputError, match=r"data.source=ioi: it needs 6 first names that are one token .* there are 0"):
        pairs_of(Encoder(tiny_tokenizer()), "ioi")
    few = Encoder(whole_word_tokenizer([word for word in _words() if word not in NAMES[10:]]))
    assert one_token(NAMES, few) == list(NAMES[:10])
    assert len(pairs_of(few, "ioi", 8)) == 8
    with pytest.raises(InputError, match=r"names .* in the evaluation half, but there are 5 \(10 in all\)"):
        pairs_of(few, "ioi", 8, "evaluation")
    with pytest.raises(InputError, match="the model has none; put the tokenizer's files"):
        pairs_of(Encoder(None, 100), "ioi")


def test_more_pairs_than_there_are_are_refused(monkeypatch):
    monkeypatch.setattr(agreement, "TEMPLATES", agreement.TEMPLATES[:1])
    encoder = Encoder(whole_word_tokenizer([*NOUNS[:6], *(f"{noun}s" for noun in NOUNS[:6]), *VERBS[0]]))
    # Six nouns before five others, each in both numbers; one template, one verb.
    assert len(pairs_of(encoder, "agreement", 120)) == 120
    with pytest.raises(InputError, match=r"data.num_samples=121: data.source=agreement gives only 120 pairs for this"):
        pairs_of(encoder, "agreement", 121)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "ior"}, "data.source='ior' makes no pairs; give ioi, greater_than, agreement"),
        ({"counterfactual": "number"}, "data.counterfactual='number' is not a kind that ioi knows; give abc or s2_io"),
        ({"num_pairs": 0}, "data.num_samples=0 is too small"),
        ({"half": "test"}, "data.partition='test' is not known"),
        ({"partition_share": 2.0}, "data.partition_share=2.0 is not between 0 and 1"),
        ({"unequal": "keep"}, "data.unequal='keep' is not known; use drop or error"),
    ],
)
def test_bad_settings_are_refused_before_a_tokenizer_is_there(options, message):
    with pytest.raises(InputError, match=re.escape(message)):
        PairQuery(**options)


def test_halves_are_disjoint_and_whole_whatever_the_share():
    items = [f"word {i}" for i in range(30)]
    for share in (0.0, 0.2, 0.5, 1.0):
        one, other = (Partition(half, 5, share).of(items) for half in ("attribution", "evaluation"))
        assert len(one) == round(30 * share)
        assert sorted(one + other) == sorted(items) == sorted(Partition("all", 5, share).of(items))
    assert Partition("attribution", 5).of(items) == Partition("attribution", 5).of(items[::-1])


# --- pairs as a file has them -----------------------------------------------------------------------------------------


def encoded(encoder: Encoder, unequal="drop", **text) -> tuple[Pair | None, Counter]:
    counts: Counter = Counter()
    defaults = {"clean": "After Mary and John met, John gave the key to", "answer": " Mary", "foil": " John"}
    return encode_pair(PairText(**(defaults | text)), encoder, counts, unequal), +counts


@pytest.mark.parametrize(
    ("text", "reason", "message"),
    [
        ({"counterfactual": "Mary gave the key to"}, "num_unequal_lengths", "its counterfactual"),
        ({"answer": " John gave"}, "num_equal_answers", "' John gave' and foil ' John' begin with the same token"),
        ({"answer": ""}, "num_not_continuing", "does not begin with a token of its own"),
        ({"foil": ""}, "num_not_continuing", "does not begin with a token of its own"),
    ],
)
def test_a_pair_that_cannot_be_compared_is_dropped_and_counted_or_an_error(encoders, text, reason, message):
    pair, counts = encoded(encoders("words"), **text)
    assert pair is None
    assert counts == {reason: 1}
    with pytest.raises(InputError, match=message):
        encoded(encoders("words"), "error", **text)


def test_a_space_at_the_end_of_the_sentence_is_no_space_before_the_answer(encoders):
    encoder = encoders("words")
    clean = "After Mary and John met, John gave the key to "
    pair, counts = encoded(encoder, clean=clean, answer="Mary", foil="John")
    assert (pair, counts) == (None, {"num_not_continuing": 1})  # the tokenizer would join space and name
    whole, _ = encoded(encoder)
    assert encoder.decode([whole.answer]) == " Mary"


def test_of_a_long_answer_the_first_token_counts_and_a_foil_is_not_needed(encoders):
    encoder = encoders("words")
    pair, counts = encoded(encoder, answer=" Mary in the garden", foil=None)
    assert pair.answer == encoder.body("to Mary")[-1]
    assert pair.foil is None
    assert counts == {"num_long_answers": 1}
    whole, counts = encoded(encoder)
    assert not counts
    assert whole.id != pair.id
    assert whole.sample.text_ids == (encoder.identity(whole.text.clean),)


def test_too_long_a_sentence_is_an_error():
    encoder = Encoder(whole_word_tokenizer(_words()), context=5)
    with pytest.raises(InputError, match="is longer than the model's context of 5"):
        encoded(encoder)


def test_a_batch_is_padded_on_the_right(encoders):
    encoder = encoders("words-bos")
    pairs = sorted(pairs_of(encoder, "ioi", 16), key=lambda pair: len(pair.clean_ids))[::5]
    batch = pad_pairs(pairs, pad_id=7)
    assert len({len(pair.clean_ids) for pair in pairs}) > 1
    for row, pair in enumerate(pairs):
        size, rest = len(pair.clean_ids), batch.input_ids.shape[1] - len(pair.clean_ids)
        assert batch.input_ids[row].tolist() == [*pair.clean_ids, *[7] * rest]
        assert batch.fields["counterfactual_ids"][row].tolist() == [*pair.counterfactual_ids, *[7] * rest]
        assert batch.attention_mask[row].tolist() == [1] * size + [0] * rest
    assert batch.fields["answer"].tolist() == [pair.answer for pair in pairs]
    assert batch.fields["foil"].dtype == torch.int64
    assert batch.ids == [pair.id for pair in pairs]
    alone, _ = encoded(encoder, foil=None)
    assert pad_pairs([alone], 0).fields["foil"].tolist() == [-1]
    assert "counterfactual_ids" not in pad_pairs([alone], 0).fields


# --- in the data module -----------------------------------------------------------------------------------------------


def test_the_data_module_serves_what_make_pairs_makes(encoders):
    encoder = encoders("words-bos")
    data = ReferenceData("ioi", num_samples=20, partition="evaluation", seed=4, counterfactual="s2_io", batch_size=6)
    data.read(encoder)
    pairs = {p.id: p for p in pairs_of(encoder, "ioi", 20, "evaluation", seed=4, counterfactual="s2_io")}
    seen = 0
    for batch in data.predict_dataloader():
        for row, name in enumerate(batch.ids):
            pair, size = pairs[name], int(batch.attention_mask[row].sum())
            assert batch.input_ids[row, :size].tolist() == pair.clean_ids
            assert batch.fields["counterfactual_ids"][row, :size].tolist() == pair.counterfactual_ids
            assert (int(batch.fields["answer"][row]), int(batch.fields["foil"][row])) == (pair.answer, pair.foil)
            seen += 1
    assert seen == 20
    about = data.describe()
    assert about["sample_ids"] == list(pairs)
    assert (about["source"], about["counterfactual"], about["partition"]) == ("ioi", "s2_io", "evaluation")
    assert about["seq_len"] is about["text_field"] is None
    default = ReferenceData("agreement")
    default.read(encoder)
    assert len(default.samples) == 128
    assert default.describe()["counterfactual"] == "number"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"source": "ioi", "answer_field": "answer"},
            "data.answer_field='answer' has no meaning where data.source=ioi",
        ),
        ({"source": "ioi", "filter": "a > 1"}, "data.filter='a > 1' has no meaning"),
        ({"source": "ioi", "counterfactual": "number"}, "data.counterfactual='number' is not a kind that ioi knows"),
        (
            {"source": "demo", "counterfactual": "abc"},
            "data.counterfactual='abc' is for sources that make their sentences",
        ),
        ({"source": "demo", "unequal": "keep"}, "data.unequal='keep' is not known"),
    ],
)
def test_settings_of_the_data_module_that_do_not_fit_are_refused(options, message):
    with pytest.raises(InputError, match=re.escape(message)):
        ReferenceData(**options)


PAIRS = """\
clean,counterfactual,answer,foil
"After Mary and John met, John gave the key to","After Mary and John met, Mary gave the key to", Mary, John
"After Anna and Paul met, Paul gave the key to","After Anna and Paul met, Anna gave the key to Paul", Anna, Paul
"After Anna and Ruth met, Ruth gave the key to","After Anna and Ruth met, Anna gave the key to", Ruth, Ruth
"After Anna and Carl met, Carl gave the key to ","After Anna and Carl met, Anna gave the key to ",Anna,Carol
"After Jane and Paul met, Paul gave the key to","After Jane and Paul met, Jane gave the key to",Jane,Paul
"""
FIELDS = {f"{name}_field": name for name in ("answer", "foil", "counterfactual")} | {"text_field": "clean"}


def test_pairs_of_a_file_are_read_dropped_and_counted(encoders, tmp_path, caplog):
    (tmp_path / "pairs.csv").write_text(PAIRS)
    encoder = encoders("words")
    data = ReferenceData(str(tmp_path / "pairs.csv"), **FIELDS)
    with caplog.at_level("INFO"):
        data.read(encoder)
    first = next(sample for sample in data.samples if sample.input_ids == encoder(PAIRS.split('"')[1]))
    assert first.numbers == {
        name: encoder.body(f"to {word}")[-1] for name, word in {"answer": "Mary", "foil": "John"}.items()
    }
    assert first.by_token["counterfactual_ids"] == encoder(PAIRS.split('"')[3])
    about = data.describe()
    reasons = ("num_unequal_lengths", "num_equal_answers", "num_not_continuing", "num_without_space")
    assert [about[name] for name in reasons] == [1, 1, 1, 1]
    assert len(data.samples) == 2
    for message in ("1 answers go on within the text's last word", "1 records whose answer or foil is not told apart"):
        assert message in caplog.text
    whole = ReferenceData(str(tmp_path / "pairs.csv"), **FIELDS, unequal="error")
    with pytest.raises(InputError, match=r"pairs.csv': line [345]: 'After Anna .* \(data.unequal: drop leaves such"):
        whole.read(encoder)


def test_answers_are_read_as_they_follow_the_sentence_not_as_texts_of_their_own(encoders):
    encoder = encoders("pieces")
    # SentencePiece puts a space before every text: taken by itself, the name would be the word that follows a space.
    assert encoder.body("Mary") == encoder.body(" Mary") == [encoder.body("to Mary")[-1]]
    pair, _ = encoded(encoder, clean='John said to her "', answer="Mary", foil="John")
    assert [encoder.decode([token]) for token in (pair.answer, pair.foil)] == ["M", "J"]
    pair, _ = encoded(encoder, answer=" Mary")
    assert pair.answer == encoder.body("to Mary")[-1]
