"""The JSON files of this program: typed, versioned, and known by their own digest.

A format is declared by a dataclass. Reading checks, in this order: that it is such a file at all, its version, its
digest (nothing was changed or lost), the type of every value, and what no type can say.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

from sparc3_pl.errors import InputError
from sparc3_pl.io.files import json_digest, read_json, strict_json

__all__ = ["Count", "Format", "MaybeNumber", "Number", "Record", "Unbounded", "omitted", "to_json", "typed"]

T = TypeVar("T")

Record = dict[str, Any]
"""A JSON object whose keys no format fixes: the user's settings, or what a class says of itself."""


@dataclass(frozen=True)
class _ForNull:
    """Has null read as ``value``: JSON cannot hold NaN and infinity, so they were written as null."""

    value: float

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        return core_schema.no_info_before_validator_function(
            lambda value: self.value if value is None else value, handler(source)
        )


class _FromZero:
    """Has integers refused that are below 0 or beyond the 64 bits of a tensor's index."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        return handler(source) | {"ge": 0, "le": 2**63 - 1}


Number = Annotated[float, _ForNull(float("nan"))]
"""A float that may have overflowed."""

MaybeNumber = Annotated[float | None, _ForNull(float("nan"))]
"""A float that may have overflowed, or None where the file has none: earlier versions did not measure it."""

Unbounded = Annotated[float, _ForNull(float("inf"))]
"""A float that overflows upwards only, as a perplexity does."""

Count = Annotated[int, _FromZero()]
"""A number of things, or the index of one."""


def omitted(default: Any = None) -> Any:
    """A dataclass field that is left out of the file while it has its default: a value, or a type that makes it."""
    options = {"default_factory": default} if isinstance(default, type) else {"default": default}
    return field(**options, metadata={"omitted": True})


def to_json(value: Any) -> Any:
    """A dataclass as a JSON object, in the order of its fields; what lies in lists and dictionaries likewise."""
    if is_dataclass(value):
        data = {}
        for one in fields(value):
            own = getattr(value, one.name)
            default = one.default if one.default_factory is MISSING else one.default_factory()
            if own != default or not one.metadata.get("omitted", False):
                data[_key(one.name)] = to_json(own)
        return data
    if isinstance(value, Mapping):
        return {key: to_json(item) for key, item in value.items()}
    return [to_json(item) for item in value] if isinstance(value, list | tuple) else value


def _key(name: str) -> str:
    """A field's key in the file: ``class_`` stands for ``class``, which Python keeps for itself."""
    return name.removesuffix("_")


@dataclass(frozen=True)
class Format(Generic[T]):
    """One kind of JSON file.

    Attributes:
        kind: Dataclass of the content.
        name: What such a file is called in messages: ``a score folder's manifest``.
        version: Version of the layout; other versions are refused.
        again: How the user gets a good file, as the end of a sentence: ``score again``.
        extra: Field of ``kind`` that keeps keys of unknown name; without one they are refused.
        sealed: Whether a file without its sha256 is refused; people write some kinds by hand.
        check: Refuses content that contradicts itself; it is given the content and where that was read.
    """

    kind: type[T]
    name: str
    version: int
    again: str
    extra: str | None = None
    sealed: bool = False
    check: Callable[[T, str | Path], None] | None = None

    def read(self, path: Path) -> T:
        """The checked content of a file.

        Raises:
            InputError: if it cannot be read, or as ``parse``.
        """
        return self.parse(read_json(path), path)

    def parse(self, data: Mapping[str, Any], where: str | Path) -> T:
        """The checked content of a JSON object that was read from ``where``.

        Raises:
            InputError: for another kind of file, another version, a changed byte, a missing or unknown key, a value of
                the wrong type, or a contradiction.
        """
        data = dict(data)
        self._check_version(data.get("format_version"), where)
        digest = data.pop("sha256", None)
        if digest is None and self.sealed:
            raise InputError(f"{where}: the key 'sha256' is missing; it was changed or damaged, {self.again}")
        if digest is not None and digest != json_digest(data) and digest != _earlier_digest(data):
            raise InputError(f"{where}: its content does not match its sha256; it was changed or damaged, {self.again}")
        names = self._names()
        if "format_version" not in names:
            del data["format_version"]
        unknown = sorted(data.keys() - names)
        if unknown and self.extra is None:
            raise InputError(f"{where}: {unknown[0]!r} is no key of {self.name}; remove it or {self.again}")
        value = self.typed(data, where)
        if self.check is not None:
            self.check(value, where)
        return value

    def typed(self, data: Mapping[str, Any], where: str | Path) -> T:
        """The content of a JSON object that was checked before, or is not sealed yet.

        Raises:
            InputError: for a missing key or a value of the wrong type.
        """
        names = self._names()
        content = {key: value for key, value in data.items() if key in names}
        unknown = {key: data[key] for key in sorted(data.keys() - names - {"format_version", "sha256"})}
        return typed(self.kind, content | ({self.extra: unknown} if self.extra else {}), where, self.again)

    def _names(self) -> set[str]:
        """The keys that have a field."""
        return {_key(item.name) for item in fields(self.kind)} - {self.extra}  # type: ignore[arg-type]

    def content(self, value: T) -> Record:
        """The JSON object that the file is to hold, before it is sealed."""
        data = to_json(value)
        return data | (data.pop(self.extra) if self.extra else {})

    def seal(self, data: Mapping[str, Any]) -> Record:
        """A JSON object exactly as it will be read back: the version first, its sha256 last."""
        content = json.loads(strict_json({"format_version": self.version} | dict(data)))
        return content | {"sha256": json_digest(content)}

    def _check_version(self, version: Any, where: str | Path) -> None:
        if version is None:
            raise InputError(f"{where}: has no format_version, so it is not {self.name}; {self.again}")
        if version != self.version:
            newer = type(version) is int and version > self.version
            remedy = "update sparc3_pl" if newer else f"{self.again} with this program"
            raise InputError(f"{where}: format_version={version}, but this program reads {self.version}; {remedy}")


def typed(kind: type[T], data: Any, where: str | Path, again: str) -> T:
    """A value of ``kind`` from what was read from JSON, each part of the type that it is declared with.

    Args:
        kind: A dataclass, or a list of one.
        data: What JSON holds of it.
        where: What it was read from, for messages.
        again: How the user gets a good file.

    Raises:
        InputError: for a missing key or a value of another type, with its place.
    """
    from pydantic import ValidationError

    try:
        return _validator(kind).validate_python(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        if first["type"] == "missing":
            raise InputError(f"{where}: the key {key!r} is missing; it is incomplete, {again}") from None
        value = strict_json(first["input"])
        text = value if len(value) < 80 else f"{value[:77]}..."
        raise InputError(f"{where}: {key}={text} ({first['msg']}); it is damaged, {again}") from None


@functools.cache
def _validator(kind: Any) -> Any:
    from pydantic import TypeAdapter
    from pydantic_core import SchemaValidator

    return SchemaValidator(_unconverted(TypeAdapter(kind).core_schema))


_OWN_TYPE = ("bool", "dict", "float", "int", "list", "str")


def _unconverted(schema: Any) -> Any:
    """A pydantic schema that converts nothing: ``"3"`` is no number, ``1`` no boolean; ``_key`` names the fields.

    Pydantic's own strict mode makes dataclasses from JSON text only, and its JSON reader refuses the lone surrogates of
    paths that are not UTF-8.
    """
    if isinstance(schema, dict):
        more = {"strict": True} if schema.get("type") in _OWN_TYPE else {}
        if schema.get("type") == "dataclass-field" and _key(schema["name"]) != schema["name"]:
            more = {"validation_alias": _key(schema["name"])}
        return {key: _unconverted(value) for key, value in schema.items()} | more
    return [_unconverted(item) for item in schema] if isinstance(schema, list) else schema


def _earlier_digest(data: Mapping[str, Any]) -> str:
    """The digest that evaluations of earlier versions were written with."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
