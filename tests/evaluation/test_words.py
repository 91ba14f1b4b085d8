"""Whole words in any case and any script; texts are written out, so that each expectation can be read."""

import hashlib
import json
import re
import unicodedata
from pathlib import Path
from typing import get_type_hints

import pytest

from sparc3_pl.errors import InputError
from sparc3_pl.evaluation.judges import describe_judge, judged
from sparc3_pl.evaluation.words import DEFAULT, RUDE_WORDS, WordList, WordsJudge
from sparc3_pl.experiment.stages import _digests_of_files


def list_of(tmp_path, text: str, encoding: str = "utf-8") -> str:
    path = tmp_path / "words.txt"
    path.write_text(text, encoding=encoding)
    return str(path)


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("an ass.", True),
        ("ASS!", True),
        ("Ass's", True),
        ("dumb-ass", True),
        ("an_ass_", True),
        ("assess the class", False),
        ("ass2", False),
        ("a\u00ads\u200bs", True),  # soft hyphen, zero-width space
        ("ａｓｓ", True),  # full width
        ("ass\u0301e", False),  # an accent on the s: another word
        ("STRASSE", True),
        ("Straße", True),
        ("straßen", False),
        ("Son  of\na -- Gun", True),
        ("son of guns", False),
        ("son of", False),
        ("क", True),
        ("की", False),  # the same letter with a vowel sign
        ("caf\u00e9", True),
        ("cafe\u0301", True),
        ("cafe", False),
        ("", False),
    ],
)
def test_whole_words_in_any_case(tmp_path, text, holds):
    listed = "ass\n# a comment\n\nstrasse  # another\nson of a gun\nक\ncafé\n"
    assert WordList.read(list_of(tmp_path, listed), "judge.words").is_in(text) is holds


def test_the_default_list_against_a_regular_expression():
    """ASCII text, where \\b of a regular expression says the same."""
    text = "what the HELL is this shell? Damn, a damsel. class ass; pass, moronic morons shitake shit"
    words = text.split()
    pattern = re.compile(rf"\b(?:{'|'.join(RUDE_WORDS)})\b", re.IGNORECASE)
    default = WordList.read(DEFAULT, "judge.words")
    assert [default.is_in(word) for word in words] == [bool(pattern.search(word)) for word in words]
    assert 0 < sum(default.is_in(word) for word in words) < len(words)
    assert len(set(RUDE_WORDS)) == len(RUDE_WORDS) == len(default.phrases)
    assert all(word == unicodedata.normalize("NFKC", word.casefold()) for word in RUDE_WORDS)


def test_a_judge_like_any_other(tmp_path):
    judge = WordsJudge(list_of(tmp_path, "bad\nWorse\n"))
    assert judged(judge, ["a BAD day", "a badge", "", "worse"])["listed_word"].tolist() == [1.0, 0.0, 0.0, 1.0]
    digest = hashlib.sha256(json.dumps([["bad"], ["worse"]]).encode()).hexdigest()
    about = {"words": "words.txt", "num_words": 2, "sha256": digest}
    assert describe_judge(judge) == {"class": "sparc3_pl.evaluation.words.WordsJudge", **about}
    assert describe_judge(WordsJudge(list_of(tmp_path, "WORSE\n\ufeffbad")))["sha256"] == digest
    assert describe_judge(WordsJudge(list_of(tmp_path, "bad")))["sha256"] != digest


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"# nothing\n\n", "lists no word"),
        (b"fine\n--- # dashes\n", r"line 2 holds no word \('---'\)"),
        (b"\xff\xfe\x00", r"cannot be read as text \(UnicodeDecodeError\)"),
    ],
)
def test_a_list_of_no_use_is_refused(tmp_path, content, message):
    (tmp_path / "words.txt").write_bytes(content)
    with pytest.raises(InputError, match=message):
        WordsJudge(str(tmp_path / "words.txt"))


def test_a_list_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"judge\.words='none\.txt' cannot be read as text \(FileNotFoundError\)"):
        WordsJudge("none.txt")


def test_a_list_of_the_package_is_named_in_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "sparc3:judges/refusals.txt"
    judge = WordsJudge(name)
    assert judge.score(["Sorry, I CAN'T do that.", "I can."])["listed_word"].tolist() == [1.0, 0.0]
    assert judge.words == "refusals.txt"  # as a path in the repository's folder names it
    content = (Path(__file__).parents[2] / "configs" / "judges" / "refusals.txt").read_bytes()
    settings = {"model": {"judge": {"init_args": {"words": name}}}, "word_filter": name}  # what a stage depends on
    keys = ("model.judge.init_args.words", "word_filter")
    assert _digests_of_files(settings) == dict.fromkeys(keys, hashlib.sha256(content).hexdigest())
    with pytest.raises(InputError, match=r"judge\.words=sparc3:refusals\.txt: no such list .* sparc3:judges/refusals"):
        WordsJudge("sparc3:refusals.txt")
    with pytest.raises(InputError, match="no such list"):
        WordsJudge("sparc3:../LICENSE.txt")


def test_it_has_a_short_name_in_yaml(tmp_path):
    from jsonargparse import ArgumentParser

    from sparc3_pl.evaluation.module import EvaluationModule

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--judge", type=get_type_hints(EvaluationModule.__init__)["judge"])
    for name in ("WordsJudge", "sparc3_pl.evaluation.judges.WordsJudge"):  # where the other judges are, too
        config = parser.parse_args([f"--judge={name}", f"--judge.words={list_of(tmp_path, 'one')}"])
        assert parser.instantiate_classes(config).judge.words == "words.txt"
