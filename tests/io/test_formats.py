"""One validator for all JSON files: every way to be wrong is one line that names the file, the key and the value."""

import math
from dataclasses import dataclass, field
from typing import Any

import pytest

from sparc3_pl.errors import InputError
from sparc3_pl.io.formats import Format, Number


@dataclass(frozen=True)
class Layer:
    shape: list[int]
    sum: Number


@dataclass(frozen=True)
class Content:
    method: str
    layers: dict[str, Layer]
    seed: int | None = None
    share: float = 0.0
    format_version: int = 3
    extra: dict[str, Any] = field(default_factory=dict)


OPEN = Format(Content, "a test file", 3, "make it again", extra="extra")
VALUE = Content("lrp", {"a.b": Layer([2], 1.5), "c": Layer([1], math.inf)}, extra={"own": [1]})


def test_what_is_written_is_read_back():
    data = OPEN.dump(VALUE)
    assert next(iter(data)) == "format_version"
    assert list(data)[-1] == "sha256"
    assert "extra" not in data
    read = OPEN.parse(data, "f")
    assert read.layers["a.b"] == VALUE.layers["a.b"]
    assert read.extra == {"own": [1]}
    assert math.isnan(read.layers["c"].sum)  # JSON has no infinity


def test_a_whole_number_is_a_float_but_not_the_other_way_round():
    data = {key: value for key, value in OPEN.dump(VALUE).items() if key != "sha256"}
    assert OPEN.parse(data | {"share": 1}, "f").share == 1.0
    with pytest.raises(InputError, match=r"^f: seed=1.0 \(.*integer.*\); it is damaged, make it again$"):
        OPEN.parse(data | {"seed": 1.0}, "f")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": None}, "f: has no format_version, so it is not a test file; make it again"),
        ({"format_version": 2}, "f: format_version=2, but this program reads 3; make it again with this program"),
        ({"format_version": 4}, "f: format_version=4, but this program reads 3; update sparc3_pl"),
        ({"method": None}, "f: method=null .*valid string.*; it is damaged, make it again"),
        ({"seed": True}, "f: seed=true "),
        ({"layers": {"a.b": {"shape": ["x"], "sum": 1}}}, 'f: layers.a.b.shape.0="x" '),
        ({"layers": {"a.b": {"sum": 1}}}, "f: the key 'layers.a.b.shape' is missing; it is incomplete, make it again"),
        ({"method": "x" * 200}, None),
    ],
)
def test_refusals(change, message):
    data = {key: value for key, value in OPEN.dump(VALUE).items() if key != "sha256"} | change
    if message is None:
        assert OPEN.parse(data, "f").method == "x" * 200
        return
    with pytest.raises(InputError, match=f"^{message}"):
        OPEN.parse(data, "f")


def test_a_changed_value_is_noticed():
    with pytest.raises(InputError, match=r"^f: its content does not match its sha256"):
        OPEN.parse(OPEN.dump(VALUE) | {"method": "gradient"}, "f")


def test_without_a_place_for_them_unknown_keys_are_refused():
    closed = Format(Layer, "a layer", 1, "make it again")
    with pytest.raises(InputError, match=r"^f: 'own' is no key of a layer; remove it or make it again"):
        closed.parse({"format_version": 1, "shape": [1], "sum": 1.0, "own": 1}, "f")
