"""What is written is read back as it was, in the dialect of the command line."""

import random

import pytest
import yaml

from sparc3_pl.io.yaml_format import dump_yaml, load_yaml

ODD = [
    "77950e8", "1e3", "012", "on", "no", "null", "~", "1_000", "0x1f", "0o17", "1:30", "2026-01-01", " x", "x ", "",
    "é", "a: b", "#x", "x #y", ".inf", ".nan", "{a}", "[1]", "1.", "-.5", "._", "=", "<<", "true", "-", "- a", "?",
    "!x", "&a", "*a", "|", ">", "@x", "%x", "`x", "'", '"', "---", "...", "a\nb", "\n", "\t", "a\rb", "a\x85b",
    "a\u2028b", "\ufeffx", "\x00", "\x1b[2J", "a\udcffb", "y" * 300 + " z" * 100,
]  # fmt: skip


@pytest.mark.parametrize("text", ODD)
def test_an_odd_text_stays_that_text(text):
    value = {"key": text, text: [text, {"inner": text}]}
    assert load_yaml(dump_yaml(value)) == value


def test_random_texts_stay_themselves():
    letters, drawn = "0123456789e.+-_: #'\"\n\txXobn~aé=<>[]{}|&*!%@`,?\\\r\udcff\x85\u2028y", random.Random(0)
    texts = ["".join(drawn.choices(letters, k=drawn.randint(0, 8))) for _ in range(1000)]
    assert load_yaml(dump_yaml(texts)) == texts


@pytest.mark.parametrize(
    "value", [0.1, 1e-5, 1e300, float("inf"), 0, -1, 10**30, True, None, [], {}, [None], {"a": {"b": [1.0]}}]
)
def test_other_values_stay_themselves(value):
    read = load_yaml(dump_yaml(value))
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("text", "value"),
    [("012", 12), ("0x1f", 31), ("1_000", 1000), ("1e-4", 1e-4), ("1:30", "1:30"), ("2026-01-01", "2026-01-01"),
     ("no", False), ("# nothing", None), ("", None),
     ("a: &x {b: 1}\nc: {<<: *x, b: 2}\nd:\t1", {"a": {"b": 1}, "c": {"b": 2}, "d": 1}),
     ("a: &a {x: 1}\no: {b: &b {<<: *a, x: 2}}\nc: {<<: *b}", {"a": {"x": 1}, "o": {"b": {"x": 2}}, "c": {"x": 2}})],
)  # fmt: skip
def test_the_dialect(text, value):
    assert load_yaml(text) == value


@pytest.mark.parametrize(
    "text", ["a: 1\na: 2", "{a: {b: 1, b: 1}}", "\ta: 1", "a: <<", "a: !!int x", "a: !!python/name:os.x"]
)
def test_what_is_refused(text):
    with pytest.raises(yaml.YAMLError):
        load_yaml(text)
