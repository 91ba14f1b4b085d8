"""The JSON files of this program: typed, versioned, and known by their own digest.

A format is declared by a dataclass. Reading checks, in this order: that it is such a file at all, its version, its
digest (nothing was changed or lost), and the type of every value. Writing is the way back.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

from sparc3_pl.errors import InputError
from sparc3_pl.io.files import json_digest, read_json, strict_json

__all__ = ["Format", "Number"]

T = TypeVar("T")


class _NanForNull:
    """JSON cannot hold NaN and infinity: they were written as null, and null is read as NaN."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        return core_schema.no_info_before_validator_function(
            lambda value: float("nan") if value is None else value, handler(source)
        )


Number = Annotated[float, _NanForNull()]
"""A float that may have overflowed."""


@dataclass(frozen=True)
class Format(Generic[T]):
    """One kind of JSON file.

    Attributes:
        kind: Dataclass of the content.
        name: What such a file is called in messages: ``a score folder's manifest``.
        version: Version of the layout; other versions are refused.
        again: How the user gets a good file, as the end of a sentence: ``score again``.
        extra: Field of ``kind`` that keeps keys of unknown name; without one they are refused.
    """

    kind: type[T]
    name: str
    version: int
    again: str
    extra: str | None = None

    def read(self, path: Path) -> T:
        """The checked content of a file.

        Raises:
            InputError: if it cannot be read, or as ``parse``.
        """
        return self.parse(read_json(path), path)

    def parse(self, data: Mapping[str, Any], where: str | Path) -> T:
        """The checked content of a JSON object that was read from ``where``.

        Raises:
            InputError: for another kind of file, another version, a changed byte, a missing or unknown key, or a value
                of the wrong type.
        """
        data = dict(data)
        self._check_version(data.get("format_version"), where)
        claimed = data.pop("sha256", None)
        if claimed is not None and claimed != json_digest(data):
            raise InputError(f"{where}: its content does not match its sha256; it was changed or damaged, {self.again}")
        names = {item.name for item in fields(self.kind)} - {self.extra}  # type: ignore[arg-type]
        if "format_version" not in names:
            del data["format_version"]
        unknown = {key: data.pop(key) for key in sorted(set(data) - names)}
        if unknown and self.extra is None:
            raise InputError(f"{where}: {next(iter(unknown))!r} is no key of {self.name}; remove it or {self.again}")
        return self._typed(data | ({self.extra: unknown} if self.extra else {}), where)

    def dump(self, value: T) -> dict[str, Any]:
        """The JSON object of ``value``, exactly as it will be read back: the version first, its sha256 last."""
        data = {"format_version": self.version} | asdict(value)  # type: ignore[call-overload]
        if self.extra is not None:
            data |= data.pop(self.extra)
        data = json.loads(strict_json(data))
        return data | {"sha256": json_digest(data)}

    def _check_version(self, version: Any, where: str | Path) -> None:
        if version is None:
            raise InputError(f"{where}: has no format_version, so it is not {self.name}; {self.again}")
        if version != self.version:
            newer = type(version) is int and version > self.version
            remedy = "update sparc3_pl" if newer else f"{self.again} with this program"
            raise InputError(f"{where}: format_version={version}, but this program reads {self.version}; {remedy}")

    def _typed(self, data: dict[str, Any], where: str | Path) -> T:
        from pydantic import ValidationError

        try:
            return _adapter(self.kind).validate_json(json.dumps(data), strict=True)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            key = ".".join(map(str, first["loc"]))
            if first["type"] == "missing":
                raise InputError(f"{where}: the key {key!r} is missing; it is incomplete, {self.again}") from None
            given = strict_json(first["input"])
            shown = given if len(given) < 80 else f"{given[:77]}..."
            raise InputError(f"{where}: {key}={shown} ({first['msg']}); it is damaged, {self.again}") from None


@functools.cache
def _adapter(kind: type) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)
