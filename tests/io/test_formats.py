"""One validator for all JSON files: every way to be wrong is one line that names the file, the key and the value."""

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pytest

from sparc3_pl.errors import InputError
from sparc3_pl.io.files import strict_json
from sparc3_pl.io.formats import Count, Format, MaybeNumber, Number, omitted, to_json, typed


@dataclass(frozen=True)
class Layer:
    shape: list[Count]
    sum: Number


@dataclass(frozen=True)
class Content:
    method: str
    layers: dict[str, Layer]
    seed: int | None = None
    share: float = 0.0
    format_version: int = 3
    extra: dict[str, Any] = field(default_factory=dict)


def no_shape_is_empty(content: Content, where: str) -> None:
    for name, layer in content.layers.items():
        if not layer.shape:
            raise InputError(f"{where}: layer {name} is empty")


OPEN = Format(Content, "a test file", 3, "make it again", extra="extra", check=no_shape_is_empty)
VALUE = Content("lrp", {"a.b": Layer([2], 1.5), "c": Layer([1], math.inf)}, extra={"own": [1]})


def sealed() -> dict[str, Any]:
    data = asdict(VALUE)
    return OPEN.seal(data | data.pop("extra"))


def test_what_is_written_is_read_back():
    data = sealed()
    assert next(iter(data)) == "format_version"
    assert list(data)[-1] == "sha256"
    assert "extra" not in data
    read = OPEN.parse(data, "f")
    assert read.layers["a.b"] == VALUE.layers["a.b"]
    assert read.extra == {"own": [1]}
    assert math.isnan(read.layers["c"].sum)  # JSON has no infinity


@dataclass(frozen=True, kw_only=True)
class Later:
    """A field with the name of a Python keyword, and fields that are left out while they have their defaults."""

    class_: str
    part: Layer | None = omitted()
    counts: dict[str, Count] = omitted(dict)
    share: MaybeNumber = omitted()
    seed: int | None = None


def test_a_dataclass_is_written_by_its_fields_and_read_back():
    layer = Layer([1, 2], 0.5)
    assert to_json(Later(class_="a.B")) == {"class": "a.B", "seed": None}
    whole = Later(class_="a.B", part=layer, counts={"x": 1}, share=0.0)
    data = to_json(whole)
    assert list(data) == ["class", "part", "counts", "share", "seed"]
    assert (data["part"], data["share"]) == ({"shape": [1, 2], "sum": 0.5}, 0.0)
    assert typed(Later, json.loads(strict_json(data)), "f", "again") == whole
    assert typed(Later, {"class": "a.B"}, "f", "again") == Later(class_="a.B")
    assert math.isnan(typed(Later, {"class": "a.B", "share": None}, "f", "again").share)  # it was measured
    with pytest.raises(InputError, match="the key 'class' is missing"):
        typed(Later, {"class_": "a.B"}, "f", "again")


def test_a_whole_number_is_a_float_but_not_the_other_way_round():
    data = {key: value for key, value in sealed().items() if key != "sha256"}
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
        ({"layers": {"a": {"shape": [], "sum": 1}}}, "f: layer a is empty"),
        ({"layers": {"a": {"shape": [-1], "sum": 1}}}, r"f: layers.a.shape.0=-1 .*greater than or equal to 0"),
        ({"layers": {"a": {"shape": [2**64], "sum": 1}}}, r"f: layers.a.shape.0=\d+ "),
        ({"layers": [["a", {}]]}, r"f: layers=\[\["),
        ({"layers": {"a.b": {"shape": ["x"], "sum": 1}}}, 'f: layers.a.b.shape.0="x" '),
        ({"layers": {"a.b": {"sum": 1}}}, "f: the key 'layers.a.b.shape' is missing; it is incomplete, make it again"),
        ({"method": "x" * 200}, None),
    ],
)
def test_refusals(change, message):
    data = {key: value for key, value in sealed().items() if key != "sha256"} | change
    if message is None:
        assert OPEN.parse(data, "f").method == "x" * 200
        return
    with pytest.raises(InputError, match=f"^{message}"):
        OPEN.parse(data, "f")


def test_a_changed_value_is_noticed():
    with pytest.raises(InputError, match=r"^f: its content does not match its sha256"):
        OPEN.parse(sealed() | {"method": "gradient"}, "f")


def test_without_a_place_for_them_unknown_keys_are_refused():
    closed = Format(Layer, "a layer", 1, "make it again")
    with pytest.raises(InputError, match=r"^f: 'own' is no key of a layer; remove it or make it again"):
        closed.parse({"format_version": 1, "shape": [1], "sum": 1.0, "own": 1}, "f")


def test_a_path_that_is_not_utf8_is_read_as_it_was_written():
    data = OPEN.seal({"method": "caf\udce9", "layers": {}, "note": ["\udcff"]})
    content = OPEN.parse(json.loads(strict_json(data)), "f")
    assert (content.method, content.extra) == ("caf\udce9", {"note": ["\udcff"]})


def test_a_digest_of_earlier_evaluations_is_known():
    data = sealed()
    del data["sha256"]
    earlier = hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
    assert OPEN.parse(data | {"sha256": earlier}, "f").method == "lrp"
    with pytest.raises(InputError, match="does not match its sha256"):
        OPEN.parse(data | {"sha256": earlier, "method": "gradient"}, "f")


def test_a_sealed_kind_has_its_digest():
    kind = replace(OPEN, sealed=True)
    assert kind.parse(sealed(), "f").method == "lrp"
    with pytest.raises(InputError, match=r"^f: the key 'sha256' is missing; .*make it again"):
        kind.parse({key: value for key, value in sealed().items() if key != "sha256"}, "f")


def test_rows_are_typed_by_their_place():
    assert typed(list[Layer], [{"shape": [1], "sum": 2}], "f", "make it again") == [Layer([1], 2.0)]
    with pytest.raises(InputError, match=r"^f: the key '1.shape' is missing"):
        typed(list[Layer], [{"shape": [1], "sum": 2}, {"sum": 1}], "f", "make it again")
    with pytest.raises(InputError, match=r"^f: 0=\[3\] \("):
        typed(list[Layer], [[3]], "f", "make it again")
