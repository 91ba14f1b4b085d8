"""Reads local data files row by row, in their order or all rows shuffled, and never holds them in memory whole.

Nothing here guesses types: a record is what the file says, and only the values that are asked for can be refused.
"""

from __future__ import annotations

import bisect
import codecs
import contextlib
import csv
import gzip
import itertools
import json
import re
import shutil
import tempfile
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from sparc3_pl.io.formats import Record
from sparc3_pl.io.hub import first_line

__all__ = ["ENDINGS", "BadFile", "Cell", "Row", "Unusable", "decoded", "ending", "open_binary", "rows", "shuffled_rows"]

ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")

# What the common writers of tables put where a number is missing.
_NO_NUMBER = frozenset({"", "na", "n/a", "#n/a", "<na>", "nan", "-nan", "null", "none"})
_REPAIR = "repair or remove it"
_DAMAGE = (EOFError, gzip.BadGzipFile, zlib.error)  # what reading a .gz file ends in


class BadFile(ValueError):
    """Raised for a faulty file: says what is wrong, where, and how to fix it, in one line without the file's name."""


@dataclass(frozen=True)
class Row:
    """A record and where it stands in its file (``line 7``, ``record 7``)."""

    place: str
    record: Record


@dataclass(frozen=True)
class Unusable:
    """A value that the file has but nobody can use, for this reason. Only those who ask for it need to know."""

    reason: str


class Cell(str):
    """A cell of a .csv or .tsv file: text, as such files know nothing else, until it is compared with a number."""

    __slots__ = ()

    def like(self, value: Any) -> Any:
        """The cell as a number or true/false, like ``value``, if it reads as one; None where it says there is none."""
        word = self.strip().lower()
        if isinstance(value, str):
            return str(self)
        if word in _NO_NUMBER:
            return None
        if isinstance(value, bool):
            return word == "true" if word in ("true", "false") else str(self)
        try:
            return float(word.replace("_", "x"))  # Python reads 1_000 as a number, no table does
        except ValueError:
            return str(self)


# --- bytes and lines --------------------------------------------------------------------------------------------------


def ending(path: Path) -> str:
    """The ending that tells the kind of file, without ``.gz`` and in lower case."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def open_binary(path: Path) -> IO[bytes]:
    """The file's bytes, unpacked if its name ends in ``.gz``, after a byte order mark of UTF-8.

    Raises:
        BadFile: If the byte order mark is that of UTF-16.
    """
    file: Any = path.open("rb") if path.suffix.lower() != ".gz" else gzip.GzipFile(path)
    try:
        head = file.read(3)
        if head[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise BadFile("the file is UTF-16; convert it to UTF-8")
        file.seek(3 if head == codecs.BOM_UTF8 else 0)
    except BaseException:
        file.close()
        raise
    return file


def decoded(data: bytes, where: Callable[[int], str], whole: bool = True) -> str:
    """UTF-8 bytes as text.

    Args:
        data: The bytes.
        where: Names the place of the byte with this number.
        whole: Whether the last character is complete; if not, it is left out.

    Raises:
        BadFile: If they are not UTF-8, or hold a NUL, as no text does but UTF-16 without a byte order mark.
    """
    try:
        text, _ = codecs.utf_8_decode(data, "strict", whole)
    except UnicodeDecodeError as error:
        raise BadFile(f"{where(error.start)} is not UTF-8; convert the file to UTF-8") from error
    if "\0" in text:
        raise BadFile(f"{where(data.index(0))} holds a NUL byte, so this is not UTF-8 text; convert the file to UTF-8")
    return text


# A line and its end: \n, \r\n or \r, as everywhere in Python. A form feed or U+2028 ends no line of a file.
_LINE = re.compile(rb"[^\r\n]*(?:\r\n?|\n)|[^\r\n]+")


@dataclass
class _Line:
    offset: int  # in bytes, of the line's beginning
    number: int  # from 1
    data: bytes  # the line's end included

    def text(self) -> str:
        return decoded(self.data, lambda _: f"line {self.number}")


def _lines(file: IO[bytes], number: int) -> Iterator[_Line]:
    """The lines from where the file stands, which is the beginning of line ``number``."""
    offset = file.tell()
    try:
        for chunk in file:
            inside = chunk[:-2] if chunk.endswith(b"\r\n") else chunk
            for data in _LINE.findall(chunk) if b"\r" in inside else [chunk]:
                yield _Line(offset, number, data)
                offset, number = offset + len(data), number + 1
    except _DAMAGE as error:
        raise BadFile(
            f"the file breaks off or is damaged after line {number - 1} ({first_line(error)}); {_REPAIR}"
        ) from error


# --- kinds of files ---------------------------------------------------------------------------------------------------


_NewFolder = Callable[[], Path]


class _Rows(Protocol):
    """The rows of one file. ``len`` and indexing read the file anew and need no more memory than a row's place."""

    def __iter__(self) -> Iterator[Row]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Row: ...


class _LineRows:
    """Rows that begin at a line each; subclasses ``scan`` for them and make a ``record`` of each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offsets: array[int] | None = None
        self._numbers = array("Q")

    def scan(self, file: IO[bytes], number: int) -> Iterator[tuple[_Line, Any]]:
        """The first line of each row, and the row unparsed, from where the file stands."""
        raise NotImplementedError

    def record(self, line: _Line, raw: Any) -> Record:
        raise NotImplementedError

    def _row(self, line: _Line, raw: Any) -> Row:
        return Row(f"line {line.number}", self.record(line, raw))

    def __iter__(self) -> Iterator[Row]:
        with open_binary(self.path) as file:
            yield from itertools.starmap(self._row, self.scan(file, 1))

    def __len__(self) -> int:
        if self._offsets is None:
            offsets = array("Q")
            with open_binary(self.path) as file:
                for line, _ in self.scan(file, 1):
                    offsets.append(line.offset)
                    self._numbers.append(line.number)
            self._offsets = offsets
        return len(self._offsets)

    def __getitem__(self, index: int) -> Row:
        assert self._offsets is not None, "count the rows first"
        with open_binary(self.path) as file:
            file.seek(self._offsets[index])
            return self._row(*next(self.scan(file, self._numbers[index])))


class _TextRows(_LineRows):
    """The rows of a .txt file: every line is a text."""

    def scan(self, file: IO[bytes], number: int) -> Iterator[tuple[_Line, None]]:
        return ((line, None) for line in _lines(file, number))

    def record(self, line: _Line, raw: None) -> Record:
        return {"text": line.text().rstrip("\r\n")}


class _JsonLineRows(_LineRows):
    """The rows of a file with a JSON object in every line that is not blank."""

    def scan(self, file: IO[bytes], number: int) -> Iterator[tuple[_Line, None]]:
        return ((line, None) for line in _lines(file, number) if line.data.strip())

    def record(self, line: _Line, raw: None) -> Record:
        return _object(_json(line.text().strip(), line.number), f"line {line.number}")


class _CsvRows(_LineRows):
    """Rows of cells under the names of the first row; a quoted cell may hold line ends."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._separator = "\t" if ending(path) == ".tsv" else ","
        csv.field_size_limit(2**31 - 1)  # the module's own limit is shorter than many documents
        with open_binary(path) as file:
            line, self._names = next(self._all_rows(file, 1), (None, []))
        self._header_offset = -1 if line is None else line.offset
        self._repeated = {name for name, times in Counter(self._names).items() if times > 1}

    def scan(self, file: IO[bytes], number: int) -> Iterator[tuple[_Line, list[str]]]:
        return ((line, cells) for line, cells in self._all_rows(file, number) if line.offset != self._header_offset)

    def _all_rows(self, file: IO[bytes], number: int) -> Iterator[tuple[_Line, list[str]]]:
        row_lines: list[_Line] = []  # the lines of the row that the reader is at

        def texts() -> Iterator[str]:
            for line in _lines(file, number):
                row_lines.append(line)
                yield line.text()

        reader = csv.reader(texts(), delimiter=self._separator, strict=True)
        while True:
            row_lines.clear()
            try:
                cells = next(reader, None)
            except csv.Error as error:
                first = row_lines[0].number if row_lines else number
                raise BadFile(
                    f"line {first} breaks the rules of quotes ({first_line(error)}); put a cell that holds quotes, "
                    "separators or line ends in double quotes, and double the quotes in it"
                ) from error
            if cells is None:
                return
            if cells and not (len(cells) == 1 and cells[0].isspace()):
                yield row_lines[0], cells

    def record(self, line: _Line, raw: list[str]) -> Record:
        if any(raw[len(self._names) :]):
            raise BadFile(
                f"line {line.number} has {len(raw)} cells for {len(self._names)} columns; {_REPAIR}, or put cells that "
                "hold the separator in double quotes"
            )
        cells = itertools.chain((Cell(cell) if cell else None for cell in raw), itertools.repeat(None))
        record: Record = {name: cell for name, cell in zip(self._names, cells, strict=False) if name}
        return record | {name: _repeated(name) for name in self._repeated if name}


class _JsonRows:
    """The objects of a file without one object a line: an array, or objects over several lines. Held in memory."""

    def __init__(self, path: Path) -> None:
        with open_binary(path) as file:
            text = "".join(line.text() for line in _lines(file, 1))
        values = _json(text) if text.lstrip().startswith("[") else list(_values(text))
        if values and isinstance(values[0], str):
            values = [{"text": value} if isinstance(value, str) else value for value in values]
        self._values = values

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[Row]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, index: int) -> Row:
        place = f"record {index + 1}"
        return Row(place, _object(self._values[index], place))


class _ParquetRows:
    """The rows of a .parquet file. To be read in any order, they are unpacked into a file in a new folder."""

    def __init__(self, path: Path, new_folder: _NewFolder) -> None:
        import pyarrow.parquet

        with _arrow_errors():
            self._file = pyarrow.parquet.ParquetFile(path)
        self._repeated = {name for name, n in Counter(self._file.schema_arrow.names).items() if n > 1}
        self._new_folder = new_folder
        self._batches: list[Any] = []
        self._ends: list[int] = []

    def __len__(self) -> int:
        return self._file.metadata.num_rows

    def __iter__(self) -> Iterator[Row]:
        number = itertools.count()
        for batch in self._read():
            for index in range(batch.num_rows):
                yield self._row(batch, index, next(number))

    def _read(self) -> Iterator[Any]:
        with _arrow_errors():
            yield from self._file.iter_batches(1024)

    def __getitem__(self, index: int) -> Row:
        if not self._batches:
            self._unpack()
        which = bisect.bisect_right(self._ends, index)
        return self._row(self._batches[which], index - (self._ends[which - 1] if which else 0), index)

    def _unpack(self) -> None:
        import pyarrow

        path = str(self._new_folder() / "rows.arrow")
        with pyarrow.ipc.new_stream(path, self._file.schema_arrow) as writer:
            for batch in self._read():
                writer.write_batch(batch)
        self._batches = list(pyarrow.ipc.open_stream(pyarrow.memory_map(path)))
        self._ends = list(itertools.accumulate(batch.num_rows for batch in self._batches))

    def _row(self, batch: Any, index: int, number: int) -> Row:
        pairs = zip(batch.schema.names, batch.columns, strict=True)
        record = {name: _value(column, index) for name, column in pairs}
        return Row(f"record {number + 1}", record | {name: _repeated(name) for name in self._repeated})


@contextlib.contextmanager
def _arrow_errors() -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # the disk's, not the format's
            raise
        raise BadFile(f"{first_line(error)}; {_REPAIR}") from error


def _value(column: Any, index: int) -> Any:
    import pyarrow

    try:
        return column[index].as_py()
    # Nanoseconds, and odd time zones: an unknown one is a KeyError where pytz is installed.
    except (ValueError, OverflowError, ImportError, KeyError, pyarrow.ArrowException) as error:
        return Unusable(first_line(error))


def _repeated(name: str) -> Unusable:
    return Unusable(f"there are several fields named {name!r}")


# --- JSON -------------------------------------------------------------------------------------------------------------


def _unique(pairs: list[tuple[str, Any]]) -> Record:
    value = dict(pairs)
    if len(value) < len(pairs):
        value |= {name: _repeated(name) for name, times in Counter(name for name, _ in pairs).items() if times > 1}
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def _json(text: str, number: int = 1) -> Any:
    """The one JSON value in ``text``, which begins in line ``number``."""
    with _json_errors(number):
        return _DECODER.decode(text)


def _values(text: str) -> Iterator[Any]:
    """The JSON values of a text, one after the other."""
    blank, position = re.compile(r"\s*"), 0
    while (position := blank.match(text, position).end()) < len(text):  # type: ignore[union-attr]
        with _json_errors(1):
            value, position = _DECODER.raw_decode(text, position)
        yield value


@contextlib.contextmanager
def _json_errors(number: int) -> Iterator[None]:
    try:
        yield
    except json.JSONDecodeError as error:
        raise BadFile(f"line {number + error.lineno - 1} is not JSON ({error.msg}); {_REPAIR}") from error
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits; brackets by the thousand
        raise BadFile(f"line {number} is JSON that cannot be held ({first_line(error)}); {_REPAIR}") from error


def _object(value: Any, place: str) -> Record:
    if not isinstance(value, dict):
        raise BadFile(f"{place} is JSON but not an object in braces; {_REPAIR}")
    return value


def _json_rows(path: Path) -> _Rows:
    """The rows of a JSON file: one object a line, unless the first line begins an array or ends before its object."""
    with open_binary(path) as file:
        first = next((line for line in _lines(file, 1) if line.data.strip()), None)
    text = first.text().strip() if first is not None else ""
    if text.startswith("["):
        return _JsonRows(path)
    try:
        _DECODER.raw_decode(text)
    except json.JSONDecodeError as error:
        if text and error.pos == len(text):
            return _JsonRows(path)
    except (ValueError, RecursionError):
        pass  # reported when that line is read
    return _JsonLineRows(path)


# --- one file, several files ------------------------------------------------------------------------------------------


def _open(path: Path, new_folder: _NewFolder, any_order: bool) -> _Rows:
    kind = ending(path)
    if path.suffix.lower() == ".gz" and (any_order or kind == ".parquet"):
        path = _unzip(path, new_folder())
    if kind == ".parquet":
        return _ParquetRows(path, new_folder)
    if kind in (".csv", ".tsv"):
        return _CsvRows(path)
    return _TextRows(path) if kind == ".txt" else _json_rows(path)


def _unzip(path: Path, folder: Path) -> Path:
    """The file unpacked in ``folder``, where any place of it can be read."""
    copy = folder / path.name[: -len(".gz")]
    with gzip.open(path, "rb") as source, copy.open("wb") as file:
        shutil.copyfileobj(source, file)
    return copy


@contextlib.contextmanager
def _new_folders() -> Iterator[_NewFolder]:
    """Gives a function that makes temporary folders, which are removed at the end of the block."""
    with contextlib.ExitStack() as stack:
        yield lambda: Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sparc3-")))


@contextlib.contextmanager
def _named(path: Path, several: bool) -> Iterator[None]:
    """Turns what goes wrong inside the block into one line, with the file's name if there are several."""
    prefix = f"{path.name}: " if several else ""
    try:
        yield
    except BadFile as error:
        raise BadFile(f"{prefix}{error}") from error
    except _DAMAGE as error:
        raise BadFile(f"{prefix}the file breaks off or is damaged ({first_line(error)}); {_REPAIR}") from error
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise BadFile(f"{str(error.filename or path)!r} cannot be read or written ({reason})") from error


def rows(paths: Sequence[Path]) -> Iterator[Row]:
    """The rows of the files one after the other, in their order; no more is read than is asked for.

    Raises:
        BadFile: At the first row that cannot be read.
    """
    several = len(paths) > 1
    with _new_folders() as new_folder:
        for path in paths:
            with _named(path, several):
                for row in _open(path, new_folder, any_order=False):
                    yield _placed(row, path, several)


def _placed(row: Row, path: Path, several: bool) -> Row:
    return Row(f"{path.name}: {row.place}", row.record) if several else row


def shuffled_rows(paths: Sequence[Path], seed: int) -> Iterator[Row]:
    """The rows of all files in an order that the seed decides; each is as likely at each place as any other.

    Raises:
        BadFile: At the first row that cannot be read.
    """
    import numpy

    several = len(paths) > 1
    with _new_folders() as new_folder:
        files: list[_Rows] = []
        ends: list[int] = []
        for path in paths:
            with _named(path, several):
                files.append(_open(path, new_folder, any_order=True))
                ends.append(len(files[-1]) + (ends[-1] if ends else 0))
        for number in map(int, numpy.random.default_rng(seed).permutation(ends[-1])):
            which = bisect.bisect_right(ends, number)
            with _named(paths[which], several):
                row = files[which][number - (ends[which - 1] if which else 0)]
            yield _placed(row, paths[which], several)
