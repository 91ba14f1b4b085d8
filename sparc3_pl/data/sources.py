"""Records of a data set: hub names and local files through the same code; filters; which half a text belongs to."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import logging
import math
import operator
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sparc3_pl.errors import InputError
from sparc3_pl.hub import first_line, hub_available, hub_name, local_path, offline

__all__ = [
    "Condition",
    "Filter",
    "Half",
    "get_field",
    "local_source",
    "parse_filter",
    "partition",
    "read_records",
    "read_text",
    "text_id",
]

log = logging.getLogger(__name__)

Half = Literal["attribution", "evaluation"]

# Name of the `datasets` builder and its options, by file name ending.
_BUILDERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".parquet": ("parquet", {}),
    ".txt": ("text", {}),
}
_ENDINGS = tuple(f"{ending}{packed}" for packed in ("", ".gz") for ending in _BUILDERS)

# Records held for shuffling a stream. A file or hub shard with fewer records is shuffled completely.
SHUFFLE_BUFFER = 10_000


# --- where ------------------------------------------------------------------------------------------------------------


def _demo_files() -> dict[str, Path]:
    from sparc3_pl import demo

    return {
        "demo": demo.GENERAL,
        "demo:general": demo.GENERAL,
        "demo:general_heldout": demo.GENERAL_HELDOUT,
        "demo:prompts": demo.PROMPTS,
        "demo:prompts_heldout": demo.PROMPTS_HELDOUT,
        "demo:text": demo.TEXT,
    }


def local_source(source: str, key: str = "data.source") -> Path | None:
    """The local file or folder behind ``source`` (``demo`` and ``demo:...`` included), or None for a hub name.

    Raises:
        InputError: If it is written like a path and nothing is there, or no embedded corpus has that name.
    """
    if source == "demo" or source.startswith("demo:"):
        files = _demo_files()
        if source not in files:
            raise InputError(f"{key}={source!r}: no such embedded corpus; there are {', '.join(files)}")
        return Path(files[source])
    return local_path(source, key, suffixes=_ENDINGS)


def _builder(path: Path, key: str) -> tuple[str, dict[str, Any]]:
    ending = Path(path.name.removesuffix(".gz")).suffix.lower()
    if ending not in _BUILDERS:
        raise InputError(f"{key}={str(path)!r}: unknown kind of file; use {', '.join(_BUILDERS)} (or one of them .gz)")
    return _BUILDERS[ending]


# --- records ----------------------------------------------------------------------------------------------------------


def read_records(
    source: str, *, split: str = "train", subset: str | None = None, seed: int | None = None, key: str = "data.source"
) -> Iterator[dict[str, Any]]:
    """Stream the records of a data set; nothing beyond what is consumed (and the shuffle buffer) is read.

    Args:
        source: Hub data set id, local file (.jsonl, .json, .csv, .tsv, .parquet, .txt, each also .gz) or folder of a
            data set, or ``demo``.
        split: Split of a hub data set; a local file has only one.
        subset: Configuration of a hub data set (``en`` of C4).
        seed: Shuffle with this seed (shards, then a buffer of ``SHUFFLE_BUFFER`` records); None keeps the file's order.
        key: Configuration key of ``source``, for messages.

    Raises:
        InputError: If there is nothing to read, it cannot be parsed (with the line), or the hub cannot be reached.
    """
    path = local_source(source, key)
    name = f"{key}={source!r}"
    with _quiet_datasets():
        dataset = _open_hub(source, split, subset, name) if path is None else _open_local(path, split, subset, key)
        if seed is not None:
            dataset = dataset.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
        empty = True
        records = iter(dataset)
        while (record := _next_record(records, path, name)) is not None:
            empty = False
            yield record
        if empty:
            raise InputError(f"{name}: no records in it; give a data set that is not empty")


def _open_local(path: Path, split: str, subset: str | None, key: str) -> Any:
    import datasets

    if path.is_dir():
        with _as_input_error(f"{key}={str(path)!r}", "the data set"), offline():
            return datasets.load_dataset(str(path), subset, split=split, streaming=True)
    builder, options = _builder(path, key)
    if path.stat().st_size == 0:
        raise InputError(f"{key}={str(path)!r}: the file is empty; give one with records")
    files = {split: [str(path.resolve())]}
    with _as_parse_error(path, f"{key}={str(path)!r}"), offline():  # the library counts its loads over the network
        return datasets.load_dataset(builder, data_files=files, split=split, streaming=True, **options)


def _open_hub(source: str, split: str, subset: str | None, name: str) -> Any:
    import datasets
    from huggingface_hub import is_offline_mode

    # In offline mode the library itself knows at once whether its cache has the data set.
    if not is_offline_mode() and not hub_available():
        raise InputError(
            f"{name}: the hub ({hub_name()}) cannot be reached; give a local file instead ({', '.join(_BUILDERS)})"
        )
    with _as_input_error(name, "the data set"):
        return datasets.load_dataset(source, subset, split=split, streaming=True)


@contextlib.contextmanager
def _as_parse_error(path: Path | None, name: str) -> Iterator[None]:
    """What a parser raises becomes one line that says where; the library's own message is often about its buffers."""
    import pyarrow

    try:
        yield
    except (ValueError, KeyError, TypeError, EOFError, OSError, zlib.error, pyarrow.ArrowException) as error:
        where = _first_bad_line(path) if path is not None and path.is_file() else None
        raise InputError(f"{name}: {where or first_line(error)}; repair or remove it") from error


def _next_record(records: Iterator[dict[str, Any]], path: Path | None, name: str) -> dict[str, Any] | None:
    """The next record, None at the end."""
    with _as_parse_error(path, name):
        try:
            return next(records)
        except (StopIteration, IndexError):  # IndexError is what a file of blank lines ends with
            return None


def _first_bad_line(path: Path) -> str | None:
    """``line N is not JSON (...)`` for the first line of a JSON-lines file that no record can be read from."""
    if Path(path.name.removesuffix(".gz")).suffix.lower() not in (".jsonl", ".json"):
        return None
    number = 0
    try:
        with _open_binary(path) as file:
            for number, line in enumerate(file, start=1):
                if number == 1 and (line.lstrip()[:1] == b"[" or line.strip() == b"{"):  # one value over many lines
                    json.loads(line + file.read())
                    return None
                if line.strip() and not isinstance(json.loads(line.strip()), dict):
                    return f"line {number} is JSON but not an object in braces"
    except json.JSONDecodeError as error:
        return f"line {number + error.lineno - 1} is not JSON ({error.msg})"
    except UnicodeDecodeError:
        return f"line {number} is not UTF-8"
    except (EOFError, OSError, zlib.error) as error:
        return f"the file breaks off or is damaged after line {number} ({first_line(error)})"
    return None


def _open_binary(path: Path) -> Any:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def read_text(path: Path, key: str, max_bytes: int | None = None) -> str:
    """A text file verbatim, or its first ``max_bytes`` bytes up to a whole character.

    Raises:
        InputError: If it is empty, damaged, or not UTF-8 (with the position).
    """
    try:
        with _open_binary(path) as file:
            data = file.read() if max_bytes is None else file.read(max_bytes)
        # Only a character that the limit cut in two may be dropped, at the very end.
        text = data.decode("utf-8") if max_bytes is None else _decode_prefix(data)
    except UnicodeDecodeError as error:
        raise InputError(f"{key}={str(path)!r}: not UTF-8 at byte {error.start}; convert the file") from error
    except (EOFError, OSError, zlib.error) as error:
        raise InputError(f"{key}={str(path)!r}: cannot be read ({first_line(error)})") from error
    if not text.strip():
        raise InputError(f"{key}={str(path)!r}: the file is empty; give one with text")
    return text


def _decode_prefix(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.reason == "unexpected end of data" and error.end == len(data):
            return data[: error.start].decode("utf-8")
        raise


@contextlib.contextmanager
def _quiet_datasets() -> Iterator[None]:
    """The library logs what it raises as well; one message is enough."""
    from datasets.utils import logging as datasets_logging

    level = datasets_logging.get_verbosity()
    datasets_logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        datasets_logging.set_verbosity(level)


@contextlib.contextmanager
def _as_input_error(name: str, what: str) -> Iterator[None]:
    """Unknown data set, configuration or split: the library's own words, on one line."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(
            f"{name}: {what} cannot be opened ({reason}); check name, subset and split, or give a local file"
        ) from error


# --- fields and filters -----------------------------------------------------------------------------------------------


def get_field(record: dict[str, Any], field: str, key: str = "data.text_field") -> Any:
    """A field of a record, dots for nesting (``prompt.text``). None where it, or what it lies in, is null or NaN.

    Raises:
        InputError: If there is no such field, naming those that exist.
    """
    value: Any = record
    for step, part in enumerate(field.split(".")):
        if value is None:
            return None
        if not isinstance(value, dict) or part not in value:
            raise InputError(f"{key}: no field {field!r}; {_existing_fields(value, field.split('.')[:step])}")
        value = value[part]
    return None if isinstance(value, float) and math.isnan(value) else value


def _existing_fields(value: Any, path: list[str]) -> str:
    owner = ".".join(path)
    if not isinstance(value, dict):
        return f"{owner!r} is {type(value).__name__}, without fields of its own"
    names = ", ".join(".".join([*path, str(name)]) for name in value)
    return f"there are: {names}"


_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge,
    ">": operator.gt,
    "<=": operator.le,
    "<": operator.lt,
    "==": operator.eq,
    "!=": operator.ne,
}
_CONDITION = re.compile(
    r"""\s*(?P<field>[^\s<>=!"']+)\s*(?P<op>>=|<=|==|!=|>|<)\s*"""
    r"""(?P<value>"[^"]*"|'[^']*'|[^\s"']+)\s*(?P<more>\band\b|$)""",
    re.VERBOSE,
)


@dataclass(frozen=True)
class Condition:
    """``field op value``, as in ``prompt.toxicity >= 0.9``."""

    field: str
    op: str
    value: float | int | str | bool

    def holds(self, record: dict[str, Any], key: str = "data.filter") -> bool | None:
        """Whether the record passes; None if its field is null.

        Raises:
            InputError: If the record has no such field, or text is compared with a number.
        """
        found = get_field(record, self.field, key)
        if found is None:
            return None
        if _kind(found) != _kind(self.value) or (_kind(found) == "true/false" and self.op not in ("==", "!=")):
            raise InputError(
                f"{key}: {self.field!r} holds {str(found)[:60]!r} ({_kind(found)}), which {self.op} cannot compare "
                f"with {self.value!r} ({_kind(self.value)})"
            )
        return bool(_OPERATORS[self.op](found, self.value))


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "true/false"
    if isinstance(value, int | float):
        return "a number"
    return "text" if isinstance(value, str) else type(value).__name__


@dataclass(frozen=True)
class Filter:
    """Conditions that must all hold. A null never passes."""

    text: str
    conditions: tuple[Condition, ...]
    key: str = "data.filter"

    def passes(self, record: dict[str, Any]) -> bool | None:
        """True or False; None if no condition is false but some field is null, so that nulls can be counted."""
        results = [condition.holds(record, self.key) for condition in self.conditions]
        if False in results:
            return False
        return None if None in results else True


def parse_filter(text: str, key: str = "data.filter") -> Filter:
    """Parse ``FIELD OP VALUE [and FIELD OP VALUE ...]``.

    OP is one of ``>= > <= < == !=``; VALUE a number, ``true``, ``false``, or text in quotes.

    Raises:
        InputError: If it is written in any other way.
    """
    conditions, position, more = [], 0, True
    while more:
        match = _CONDITION.match(text, position)
        if match is None:
            raise InputError(f'{key}={text!r} is not FIELD OP VALUE joined by "and", as in: prompt.toxicity >= 0.9')
        conditions.append(Condition(match["field"], match["op"], _value(match["value"], text, key)))
        position, more = match.end(), bool(match["more"])
    return Filter(text, tuple(conditions), key)


def _value(word: str, text: str, key: str) -> float | int | str | bool:
    if word[0] in "\"'":
        return word[1:-1]
    if word.lower() in ("true", "false"):
        return word.lower() == "true"
    try:
        number = float(word)
    except ValueError:
        raise InputError(f"{key}={text!r}: {word!r} is neither a number nor true/false; put text in quotes") from None
    if math.isnan(number):
        raise InputError(f"{key}={text!r}: nothing compares with nan; a null never passes anyway")
    return number


# --- identity ---------------------------------------------------------------------------------------------------------


def text_id(text: str) -> str:
    """Identity of a text: the first 16 hex digits of its SHA-256, whatever file or row it came from."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def partition(sample_id: str, seed: int, share: float = 0.5) -> Half:
    """Which half a text belongs to: ``attribution`` with probability ``share``, else ``evaluation``.

    Decided by a hash of id and seed alone: the same text lands in the same half from any file, in any order, so what
    is attributed and what is evaluated never overlap.
    """
    digest = hashlib.sha256(f"{seed}:{sample_id}".encode()).digest()
    return "attribution" if int.from_bytes(digest[:8], "big") < share * 2**64 else "evaluation"
