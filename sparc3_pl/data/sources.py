"""Records of a data set: hub names and local files through the same code; filters; which half a text belongs to."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import math
import operator
import re
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sparc3_pl.data.local_files import ENDINGS, BadFile, Cell, Row, Unusable, decoded, ending, open_binary
from sparc3_pl.data.local_files import rows as file_rows
from sparc3_pl.data.local_files import shuffled_rows as shuffled_file_rows
from sparc3_pl.errors import InputError
from sparc3_pl.io.formats import Record
from sparc3_pl.io.hub import first_line, hub_available, hub_name, local_path, offline

__all__ = [
    "Condition",
    "Filter",
    "Half",
    "MissingField",
    "Records",
    "get_field",
    "listed_records",
    "local_source",
    "parse_filter",
    "partition",
    "read_records",
    "read_text",
    "text_id",
]

log = logging.getLogger(__name__)

Half = Literal["attribution", "evaluation"]

_ENDINGS = tuple(f"{kind}{packed}" for packed in ("", ".gz") for kind in ENDINGS)

# Records held for shuffling a stream from the hub. A shard with fewer records is shuffled completely.
SHUFFLE_BUFFER = 10_000

# A folder's files are drawn from as a whole up to this size on the disk; beyond it, as many of them as fit.
WHOLE_BYTES = 4 * 2**30


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


# --- records ----------------------------------------------------------------------------------------------------------


class Records(Iterator[Record]):
    """The records of a data set, one by one.

    Attributes:
        place: Place of the last record read, for messages: ``line 7``, ``train-01.jsonl: line 7``, ``record 7``.
        origin: What a manifest should say of the records. ``revision``: the commit of a hub data set, null if unknown
            and for local files. ``drawn_from``: what the seed chooses among.
        fixed_fields: Whether every record has the same fields. Objects in a .json or .jsonl file need not.
    """

    def __init__(self, rows: Iterator[Row], origin: dict[str, str | None], fixed_fields: bool, name: str) -> None:
        self.place = ""
        self.origin = origin
        self.fixed_fields = fixed_fields
        self._rows = rows
        self._name = name

    def __next__(self) -> Record:
        try:
            row = next(self._rows)
        except BadFile as error:
            raise InputError(f"{self._name}: {error}") from error
        except StopIteration:
            if not self.place:
                raise InputError(f"{self._name}: no records in it; give a data set that is not empty") from None
            raise
        self.place = row.place
        return row.record


def read_records(
    source: str, *, split: str = "train", subset: str | None = None, seed: int | None = None, key: str = "data.source"
) -> Records:
    """Stream the records of a data set; nothing beyond what is consumed is read (with a seed: and kept).

    Local files are read as they are: .jsonl and .json by the rules of JSON, cells of .csv and .tsv as text, lines of
    .txt without their ends. The numbers in messages are those of the file's lines.

    Args:
        source: Hub data set id, local file (.jsonl, .json, .csv, .tsv, .parquet, .txt, each also .gz) or folder of a
            data set, or ``demo``.
        split: Split of a hub data set or folder; a local file has only one.
        subset: Configuration of a hub data set (``en`` of C4).
        seed: Shuffle with this seed; None keeps the order. The records of a local file, and of a folder's files up to
            ``WHOLE_BYTES``, are shuffled all together; of a hub data set the shards, then a buffer of
            ``SHUFFLE_BUFFER`` records.
        key: Configuration key of ``source``, for messages.

    Raises:
        InputError: If there is nothing to read, it cannot be parsed (with the line), or the hub cannot be reached.
            Rows are parsed when they are consumed.
    """
    path = local_source(source, key)
    name = f"{key}={source!r}"
    if path is None:
        return _streamed(_open_hub(source, subset, name), split, seed, name)
    name = f"{key}={str(path)!r}"
    if path.is_dir():
        builder = _folder_builder(path, subset, name)
        paths = _plain_files(builder, split)
        return _streamed(builder, split, seed, name) if paths is None else _read_files(paths, seed, name)
    if ending(path) not in ENDINGS:
        raise InputError(f"{name}: unknown kind of file; use {', '.join(ENDINGS)} (or one of them .gz)")
    if path.stat().st_size == 0:
        raise InputError(f"{name}: the file is empty; give one with records")
    return _read_files([path], seed, name)


def listed_records(records: Iterable[Record], name: str) -> Records:
    """Records that are held in memory, in their order.

    Args:
        records: The records; not all need the same fields.
        name: Their name in messages.
    """
    rows = (Row(f"record {number}", record) for number, record in enumerate(records, start=1))
    return Records(rows, _origin(None, "records in their order"), False, name)


def _read_files(paths: Sequence[Path], seed: int | None, name: str) -> Records:
    has_fixed_fields = all(ending(path) not in (".jsonl", ".json") for path in paths)
    if seed is None:
        return Records(file_rows(paths), _origin(None, "records in their order"), has_fixed_fields, name)
    files = _some_files(paths, seed)
    drawn_from = "all records"
    if len(files) < len(paths):
        drawn_from += f" of {len(files)} of {len(paths)} files, which the seed chose"
        log.warning("%s: its files are larger than %d GiB, so samples are drawn from %s; name one file to draw from it",
                    name, WHOLE_BYTES // 2**30, drawn_from)  # fmt: skip
    return Records(shuffled_file_rows(files, seed), _origin(None, drawn_from), has_fixed_fields, name)


def _some_files(paths: Sequence[Path], seed: int) -> list[Path]:
    """The files in an order that the seed decides, as many as fit ``WHOLE_BYTES``, but at least one."""
    import numpy

    order = list(paths)
    numpy.random.default_rng(seed).shuffle(order)  # type: ignore[arg-type]
    total, files = 0, []
    for path in order:
        total += path.stat().st_size
        if files and total > WHOLE_BYTES:
            break
        files.append(path)
    return files


def _origin(revision: str | None, drawn_from: str) -> dict[str, str | None]:
    return {"revision": revision, "drawn_from": drawn_from}


# --- what the library reads -------------------------------------------------------------------------------------------


def _open_hub(source: str, subset: str | None, name: str) -> Any:
    """The library's builder of a hub data set."""
    import datasets
    from huggingface_hub import is_offline_mode

    # In offline mode the library itself knows at once whether its cache has the data set.
    if not is_offline_mode() and not hub_available():
        raise InputError(
            f"{name}: the hub ({hub_name()}) cannot be reached; give a local file instead ({', '.join(ENDINGS)})"
        )
    with _quiet_datasets(), _as_input_error(name):
        return datasets.load_dataset_builder(source, subset)


def _folder_builder(path: Path, subset: str | None, name: str) -> Any:
    """The library's builder of a folder, which knows what files belong to which split."""
    import datasets

    # It wants a cache that it can write, also where it has nothing to put there.
    with _quiet_datasets(), _as_input_error(name), offline(), tempfile.TemporaryDirectory(prefix="sparc3-") as cache:
        return datasets.load_dataset_builder(str(path), subset, cache_dir=cache)


def _plain_files(builder: Any, split: str) -> list[Path] | None:
    """The files of a folder's split, if they are of kinds that are read here and are to be read in no special way."""
    config = builder.config
    if type(config).__name__ not in ("CsvConfig", "JsonConfig", "ParquetConfig", "TextConfig"):
        return None
    paths = [Path(file) for file in (config.data_files or {}).get(split, [])]
    usual = {"sep": "\t"} if paths and all(ending(path) == ".tsv" for path in paths) else {}
    of_all_sets = {"name", "version", "data_dir", "data_files", "description", "features"}
    for option in dataclasses.fields(config):
        usual_value = usual.get(option.name, option.default)
        if option.name not in of_all_sets and getattr(config, option.name) != usual_value:
            return None
    return paths if paths and all(ending(path) in ENDINGS for path in paths) else None


def _streamed(builder: Any, split: str, seed: int | None, name: str) -> Records:
    with _quiet_datasets(), _as_input_error(name):
        dataset = builder.as_streaming_dataset(split=split)
    drawn_from = "records in their order"
    if seed is not None:
        dataset = dataset.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
        drawn_from = f"a stream: its files shuffled, then its records in a buffer of {SHUFFLE_BUFFER:,}"
    commit = re.fullmatch(r"[0-9a-f]{40}", str(builder.hash or ""))
    return Records(_stream_rows(dataset), _origin(commit and commit[0], drawn_from), True, name)


def _stream_rows(dataset: Any) -> Iterator[Row]:
    import pyarrow

    with _quiet_datasets():
        try:
            for number, record in enumerate(dataset, start=1):
                yield Row(f"record {number} of the stream", record)
        except OSError as error:
            raise BadFile(f"reading broke off ({first_line(error)}); try again, or give a local file") from error
        except (ValueError, KeyError, IndexError, TypeError, EOFError, zlib.error, pyarrow.ArrowException) as error:
            raise BadFile(f"{first_line(error)}; its files cannot be parsed; give a repaired local copy") from error


def read_text(path: Path, key: str, max_bytes: int | None = None) -> str:
    r"""A text file as one text: without a byte order mark, its line ends as ``\n``, all else as it is.

    Args:
        path: The file, perhaps .gz.
        key: The configuration key, for messages.
        max_bytes: Keep only this many of the text's first bytes in UTF-8, up to a whole character.

    Raises:
        InputError: If it is empty, damaged, or not UTF-8 (with the position).
    """
    name = f"{key}={str(path)!r}"
    try:
        with open_binary(path) as file:
            # A byte of the text takes at most two of the file: a line end is \r\n there.
            data = file.read() if max_bytes is None else file.read(2 * max_bytes)
            whole = not file.read(1)
        text = decoded(data, lambda at: f"byte {at}", whole)
    except BadFile as error:
        raise InputError(f"{name}: {error}") from error
    except (EOFError, OSError, zlib.error) as error:
        raise InputError(f"{name}: cannot be read ({first_line(error)})") from error
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if max_bytes is not None:
        text = text.encode()[:max_bytes].decode(errors="ignore")  # what it ignores is a last character cut in two
    if not text.strip():
        raise InputError(f"{name}: the file is empty; give one with text")
    return text


@contextlib.contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Silences the library's log: it logs what it raises as well, and one message is enough."""
    from datasets.utils import logging as datasets_logging

    level = datasets_logging.get_verbosity()
    datasets_logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        datasets_logging.set_verbosity(level)


@contextlib.contextmanager
def _as_input_error(name: str) -> Iterator[None]:
    """Turns an unknown data set, configuration or split into an ``InputError`` with the library's words on one line."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        way_out = "check name, subset and split, or give a local file"
        if isinstance(error, OSError) and error.errno and error.filename:
            reason, way_out = (
                f"{error.filename}: {error.strerror}",
                "it must be readable, and the cache in HF_HOME writable",
            )
        raise InputError(f"{name}: the data set cannot be opened ({reason}); {way_out}") from error


# --- fields and filters -----------------------------------------------------------------------------------------------


class MissingField(InputError):
    """Raised for a field that a record lacks. Where records differ in their fields, another may have it."""


def get_field(record: Record, field: str, key: str = "data.text_field") -> Any:
    """A field of a record, dots for nesting (``prompt.text``). None where it, or what it lies in, is null or NaN.

    Raises:
        MissingField: If there is no such field, naming those that exist.
        InputError: If it is there but cannot be used: given twice, or text with half a character in it.
    """
    parts = [field] if field in record else field.split(".")  # a column of a table may have a dot in its name
    value: Any = record
    for step, part in enumerate(parts):
        if value is None:
            return None
        if not isinstance(value, dict) or part not in value:
            error = MissingField if isinstance(value, dict) else InputError
            raise error(f"{key}: no field {field!r}; {_existing_fields(value, parts[:step])}")
        value = value[part]
        if isinstance(value, Unusable):
            raise InputError(f"{key}: {field!r} cannot be used: {value.reason}")
    if isinstance(value, str) and not value.isascii() and re.search("[\ud800-\udfff]", value):
        raise InputError(
            f"{key}: {field!r} holds half a character (a surrogate without its other half); repair the text"
        )
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
    """One condition, ``field op value``, as in ``prompt.toxicity >= 0.9``."""

    field: str
    op: str
    value: float | int | str | bool

    def holds(self, record: Record, key: str = "data.filter") -> bool | None:
        """Whether the record passes; None if its field is null.

        Raises:
            InputError: If the record has no such field, or text is compared with a number.
        """
        value = get_field(record, self.field, key)
        if isinstance(value, Cell):
            value = value.like(self.value)
        if value is None:
            return None
        if _kind(value) != _kind(self.value) or (_kind(value) == "true/false" and self.op not in ("==", "!=")):
            raise InputError(
                f"{key}: {self.field!r} holds {str(value)[:60]!r} ({_kind(value)}), which {self.op} cannot compare "
                f"with {self.value!r} ({_kind(self.value)})"
            )
        return bool(_OPERATORS[self.op](value, self.value))


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

    def passes(self, record: Record) -> bool | None:
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


def text_id(text: str | Sequence[int]) -> str:
    """Identity of a text, or of token ids: the first 16 hex digits of a SHA-256, whatever file or row it came from."""
    content = text if isinstance(text, str) else "tokens " + " ".join(map(str, text))
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def partition(sample_id: str, seed: int, share: float = 0.5) -> Half:
    """The half that a text belongs to: ``attribution`` with probability ``share``, else ``evaluation``.

    A hash of id and seed alone decides: the same text lands in the same half from any file, in any order, so what
    is attributed and what is evaluated never overlap.
    """
    digest = hashlib.sha256(f"{seed}:{sample_id}".encode()).digest()
    return "attribution" if int.from_bytes(digest[:8], "big") < share * 2**64 else "evaluation"
