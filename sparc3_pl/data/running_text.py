"""A running text that perplexity is measured of."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sparc3_pl.data.encoding import Encoder
from sparc3_pl.data.samples import SEPARATOR
from sparc3_pl.data.sources import Records, get_field, listed_records, local_source, read_records, read_text
from sparc3_pl.errors import InputError

__all__ = ["RunningText"]


@dataclass
class RunningText:
    """A text and where it comes from. A .txt file is read verbatim; other records are joined by an empty line.

    Attributes:
        source: Hub data set id or local file.
        field: Field of the text in a record, dots for nesting.
        split: Split of a hub data set.
        subset: Configuration of a hub data set.
        max_bytes: Read only this many bytes from the start (UTF-8, whole characters).
        key: The configuration key of the source, for messages.
        listed: The text itself, or its documents, if they are held in memory: ``source`` is then only a name.
        verbatim: Whether it is one text, read as it is; known once it is read.
        revision: Revision of a hub data set; known once it is read.
    """

    source: str
    field: str = "text"
    split: str = "test"
    subset: str | None = None
    max_bytes: int | None = None
    key: str = "data.text_source"
    listed: str | Sequence[str] | None = None
    verbatim: bool = dataclasses.field(default=False, init=False)
    revision: str | None = dataclasses.field(default=None, init=False)

    def read(self) -> str:
        """The text.

        Raises:
            InputError: if the source cannot be read, or a record holds no text.
        """
        if isinstance(self.listed, str):
            self.verbatim = True
            return self.listed
        path = None if self.listed is not None else local_source(self.source, self.key)
        if path is not None and path.is_file() and Path(path.name.removesuffix(".gz")).suffix.lower() == ".txt":
            self.verbatim = True
            return read_text(path, self.key, self.max_bytes)
        parts, size = [], 0
        for text in self._documents():
            parts.append(text)
            size += len((text + SEPARATOR).encode())
            if self.max_bytes is not None and size >= self.max_bytes:
                break
        data = SEPARATOR.join(parts).encode()[: self.max_bytes]
        return data.decode(errors="ignore")  # ignores only a last character that the limit cut in two

    def _documents(self) -> Iterator[str]:
        """The records' texts in order; empty ones too, as they are part of the running text."""
        records = self._records()
        self.revision = records.origin["revision"]
        for number, record in enumerate(records, start=1):
            text = get_field(record, self.field)
            if not isinstance(text, str):
                raise InputError(
                    f"{self.key}={self.source!r}: {self.field!r} of record {number} is "
                    f"{'null' if text is None else type(text).__name__}, not text; repair it or name another field"
                )
            yield text

    def _records(self) -> Records:
        """The records of the source; the lines of a text that is read verbatim."""
        if self.listed is None:
            return read_records(self.source, split=self.split, subset=self.subset, key=self.key)
        is_one = isinstance(self.listed, str)
        texts = self.listed.splitlines() if isinstance(self.listed, str) else self.listed
        name = "text" if is_one else self.field
        return listed_records([{name: text} for text in texts], f"{self.key}={self.source!r}")

    def known(self, ids: Collection[str], encoder: Encoder) -> float:
        """The share of the text, by letters, that is in texts of these identities; once it has been read.

        The source is read once more, in its records (of a .txt file: lines), as it is for a plan.
        """
        if not ids:
            return 0.0
        records = self._records()
        name, num_known, total, size = "text" if self.verbatim else self.field, 0, 0, 0
        for record in records:
            text = get_field(record, name)
            total += len(text)
            num_known += len(text) if encoder.identity(text) in ids else 0
            size += len((text + ("\n" if self.verbatim else SEPARATOR)).encode())
            if self.max_bytes is not None and size >= self.max_bytes:
                break
        return num_known / total if total else 0.0
