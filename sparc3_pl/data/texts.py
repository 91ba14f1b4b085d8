"""Takes from a source the texts that are used: filtered, of one half, each once; all that is left out is counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from sparc3_pl.data.fields import RecordFields, TextRecord, checked_text
from sparc3_pl.data.sources import (
    Filter,
    MissingField,
    Records,
    get_field,
    listed_records,
    parse_filter,
    partition,
    read_records,
    text_id,
)
from sparc3_pl.errors import InputError
from sparc3_pl.io.formats import Record

__all__ = ["PartitionChoice", "TextQuery", "check_partition"]

PartitionChoice = Literal["all", "attribution", "evaluation"]


def check_partition(half: str, share: float, key: str = "data.partition") -> None:
    """Refuses a half that there is not, or a share that is none.

    Args:
        half: The half.
        share: Share of the attribution half.
        key: The configuration key of the half; that of the share is ``key`` + ``_share``.

    Raises:
        InputError: naming the key that is wrong.
    """
    if half not in get_args(PartitionChoice):
        raise InputError(f"{key}={half!r} is not known; use all, attribution or evaluation")
    if not 0 <= share <= 1:
        raise InputError(f"{key}_share={share} is not between 0 and 1")


@dataclass
class TextQuery:
    """A query for texts of a source.

    Attributes:
        source: As in ``read_records``.
        text_field: Field of the text, dots for nesting.
        filter: ``FIELD OP VALUE [and ...]``, or None.
        split: Split of a hub data set.
        subset: Configuration of a hub data set.
        seed: Seed of the shuffle; None keeps the source's order.
        half: Texts of one half only, or ``all``.
        partition_seed: Seed by which texts are assigned to the two halves.
        partition_share: Share of the attribution half.
        partition_field: Field whose text decides the half of a record; None: the text itself.
        prefix: What the configuration keys of this query start with, for messages (``data.``, ``data.prompts_``).
        source_key: The configuration key of ``source`` if it is not ``prefix`` + ``source``.
        token_ids: Whether lists of token ids may stand where texts do.
        fields: What else ``records`` reads of a record.
        counts: Filled while reading: records ``num_read``, passed over because the text or a field of the filter is
            null or missing (``num_null``), the text empty (``num_empty``) or already seen (``num_duplicates``).
        origin: ``revision`` and ``drawn_from`` of the records, as in ``Records``; set when they are first read.
        listed: Records that are held in memory; ``source`` is then their name, and they keep their order.
        made_from: Filled while reading: the ids of the texts that a text was cut out of, by its ``text_id``, where its
            record has them as ``text_ids``.
    """

    source: str
    text_field: str
    filter: str | None = None
    split: str = "train"
    subset: str | None = None
    seed: int | None = None
    half: PartitionChoice = "all"
    partition_seed: int = 0
    partition_share: float = 0.5
    partition_field: str | None = None
    prefix: str = "data."
    source_key: str | None = None
    token_ids: bool = True
    fields: RecordFields = field(default_factory=RecordFields)
    counts: Counter[str] = field(default_factory=Counter)
    origin: dict[str, str | None] = field(default_factory=lambda: {"revision": None, "drawn_from": None})
    made_from: dict[str, list[str]] = field(default_factory=dict)
    listed: Sequence[Record] | None = None

    def __post_init__(self) -> None:
        check_partition(self.half, self.partition_share)
        if self.seed is not None and self.seed < 0:
            raise InputError(f"data.seed={self.seed} is negative; give 0 or more")
        self._records: Records | None = None
        self._filter: Filter | None = parse_filter(self.filter, self._key("filter")) if self.filter else None
        self._reset()

    def _key(self, name: str) -> str:
        return f"{self.prefix}{name}"

    @property
    def _field_key(self) -> str:
        return "data.text_field" if self.prefix == "data." else self._key("field")

    def _reset(self) -> None:
        self.counts.clear()  # in place: callers that add counts hold the same object
        self.counts.update(num_read=0, num_null=0, num_empty=0, num_duplicates=0)

    @property
    def place(self) -> str:
        """Place in the source of the last text yielded, for messages: ``line 7``, ``record 7``."""
        return "" if self._records is None else self._records.place

    def texts(self) -> Iterator[str | list[int]]:
        """The texts, each once, in the order of the shuffle; ``counts`` is filled on the way.

        A source gives either texts, each a ``str``, or token ids, each a ``list[int]`` without an id below 0: the first
        record decides which, and a source that has both is refused. Whether a vocabulary has the ids, and whether
        special tokens are among them, is not checked here; ``place`` says where an id stands.

        Raises:
            InputError: If the source cannot be read, a field does not exist, or a text is neither text nor token ids.
        """
        for record in self.records():
            yield record.text

    def records(self) -> Iterator[TextRecord]:
        """The texts, as ``texts`` gives them, each with the values of ``fields``.

        Equal records count once, but for those with a completion: a model that says the same twice has said it twice,
        and a mean over its completions knows that. The half is that of the text, or of ``partition_field``.

        Raises:
            InputError: As ``texts``, and if a value is not of the kind that belongs there.
        """
        self._reset()
        seen: set[str] = set()
        key = self.source_key or self._key("source")
        if self.listed is not None:
            self._records = listed_records(self.listed, f"{key}={self.source!r}")
        else:
            self._records = read_records(self.source, split=self.split, subset=self.subset, seed=self.seed, key=key)
        self.origin = self._records.origin
        for record in self._passing(self._records):
            if self.fields.completion is None:
                identity = record.values.identity(record.text)
                if identity in seen:
                    self.counts["num_duplicates"] += 1
                    continue
                seen.add(identity)
            decisive = text_id(record.text if record.half_of is None else record.half_of)
            if self.half in ("all", partition(decisive, self.partition_seed, self.partition_share)):
                yield record

    def _passing(self, records: Records) -> Iterator[TextRecord]:
        """The records that pass, their texts all of one kind."""
        num_without_field, first_error, kind = 0, None, None
        for record in records:
            try:
                text_record = self._read(record)
            except MissingField as error:
                if records.fixed_fields:
                    raise
                # Where every record has fields of its own, one that lacks a field has a null there.
                num_without_field, first_error = num_without_field + 1, first_error or error
                self.counts["num_null"] += 1
                continue
            except InputError as error:
                raise InputError(f"{error} ({records.place})") from error
            if text_record is None:
                continue
            if kind not in (None, type(text_record.text)):
                raise InputError(
                    f"{self._field_key}: {self.text_field!r} holds texts in some records and token ids in others "
                    f"({records.place}); give a source with one of them"
                )
            kind = type(text_record.text)
            yield text_record
        if first_error is not None and num_without_field == self.counts["num_read"]:
            raise first_error

    def _read(self, record: dict) -> TextRecord | None:
        """The record's text and values if it passes, else None; the reason is counted."""
        self.counts["num_read"] += 1
        passes = True if self._filter is None else self._filter.passes(record)
        text = get_field(record, self.text_field, self._field_key)
        values = self.fields.values(record) if passes else None
        half_of = None
        if self.partition_field is not None:
            half_of = get_field(record, self.partition_field, "data.partition_field")
            text = None if half_of is None else text
        if passes is None or text is None or (passes and values is None):
            self.counts["num_null"] += 1
            return None
        where = f"{self._field_key}: {self.text_field!r}"
        if not (self.token_ids or isinstance(text, str)):
            raise InputError(f"{where} holds {type(text).__name__}, not text; name another field")
        text = checked_text(text, where)
        if _is_empty(text) or (
            values is not None and (_is_empty(values.counterfactual) or values.completion in ("", []))
        ):
            self.counts["num_empty"] += 1
            return None
        if isinstance(record.get("text_ids"), list):
            self.made_from[text_id(text)] = [str(name) for name in record["text_ids"]]
        if half_of is not None:
            half_of = checked_text(half_of, f"data.partition_field: {self.partition_field!r}")
        return TextRecord(text, values, half_of) if values is not None else None

    def seen(self) -> str:
        """The records read so far, in words, for messages."""
        details = [f"{self.counts['num_read']} records read"]
        if self.filter:
            details.append(f"filter {self.filter!r}")
        if self.half != "all":
            details.append(f"{self.half} half")
        words = {"num_null": "null", "num_empty": "empty", "num_duplicates": "duplicates"}
        details += [f"{self.counts[name]} {word}" for name, word in words.items() if self.counts[name]]
        return f"{self.source!r} ({', '.join(details)})"


def _is_empty(text: str | list[int] | None) -> bool:
    return text is not None and (not text or (isinstance(text, str) and not text.strip()))
