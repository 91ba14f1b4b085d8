"""The pairs of a circuit run: sets for discovery, and those of the test, which share no text with them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING

from sparc3_pl.circuit.settings import CircuitData
from sparc3_pl.data.batches import ReferenceBatch, chunks
from sparc3_pl.data.encoding import Encoder
from sparc3_pl.errors import InputError
from sparc3_pl.io.formats import Record
from sparc3_pl.statistics.paired import LEAST_UNITS

if TYPE_CHECKING:
    from sparc3_pl.data.sources import Half

__all__ = ["CircuitPairs", "load_pairs"]

FEWEST_UNITS = 16
"""Batches that a set of discovery pairs is scored in, if it is large enough: what is resampled for the stability."""

_OF_OWN_PAIRS = ("text_field", "answer_field", "foil_field", "counterfactual_field", "filter", "split", "subset")


@dataclass(frozen=True)
class CircuitPairs:
    """The pairs, in batches.

    Attributes:
        sets: Sets of discovery pairs.
        tests: The test pairs.
        about: The record of each set: ``data`` in the manifest of a score folder.
        about_tests: The record of the test pairs, likewise.
    """

    sets: list[list[ReferenceBatch]]
    tests: list[ReferenceBatch]
    about: list[Record]
    about_tests: Record


def load_pairs(settings: CircuitData, encoder: Encoder, needs_counterfactuals: bool) -> CircuitPairs:
    """Draws the pairs.

    Args:
        settings: The keys of ``data``.
        encoder: The model's encoder.
        needs_counterfactuals: Whether pairs without a counterfactual are of no use.

    Raises:
        InputError: if there are too few, or they lack what is needed.
    """
    if settings.num_test < LEAST_UNITS:
        raise InputError(
            f"data.num_test={settings.num_test}: no interval can be given for fewer than {LEAST_UNITS} pairs; give more"
        )
    sets, about = [], []
    size = min(settings.batch_size, max(1, settings.num_samples // FEWEST_UNITS))
    for number in range(settings.num_sets):
        batches, record = _draw(settings, encoder, "attribution", settings.num_samples, settings.seed + number, size)
        sets.append(batches)
        about.append(record)
    try:
        tests, about_tests = _draw(
            settings, encoder, "evaluation", settings.num_test, settings.seed, settings.batch_size
        )
    except InputError as error:  # who draws samples knows one key for their number
        raise InputError(str(error).replace("data.num_samples", "data.num_test")) from None
    for batch in (*(batch for batches in sets for batch in batches), *tests):
        if bool((batch.fields["foil"] < 0).any()):
            raise InputError(f"data.source={settings.source!r}: a pair has no foil, which the logit difference needs")
        if needs_counterfactuals and "counterfactual_ids" not in batch.fields:
            raise InputError(
                f"data.source={settings.source!r} has no counterfactuals, which the ablation or a method needs; give "
                "data.counterfactual_field, or ablation: zero"
            )
    texts_of_sets = {text for batches in sets for batch in batches for texts in batch.text_ids for text in texts}
    if any(text in texts_of_sets for batch in tests for texts in batch.text_ids for text in texts):
        raise InputError(
            f"data.source={settings.source!r}: a sentence is in discovery pairs and in test pairs; give other data"
        )
    return CircuitPairs(sets, tests, about, about_tests)


def _draw(
    settings: CircuitData, encoder: Encoder, half: Half, number: int, seed: int, size: int
) -> tuple[list[ReferenceBatch], Record]:
    """Pairs of one half, longest first, in batches of ``size``; and the record of them."""
    from sparc3_pl.data.pairs import PAIR_TASKS

    about: Record = {"source": settings.source, "seed": seed, "partition": half, "num_pairs": number}
    about |= {name: asdict(settings)[name] for name in ("partition_seed", "partition_share")}
    if settings.source in PAIR_TASKS:
        batches, counts, more = _made(settings, encoder, half, number, seed, size)
    else:
        batches, counts, more = _read(settings, encoder, half, number, seed, size)
    ids = [name for batch in batches for name in batch.ids]
    return batches, about | more | {"sample_ids": ids} | counts


def _made(
    settings: CircuitData, encoder: Encoder, half: Half, number: int, seed: int, size: int
) -> tuple[list[ReferenceBatch], dict[str, int], Record]:
    from sparc3_pl.data.pairs import PairQuery, make_pairs, pad_pairs

    for item in fields(CircuitData):
        if item.name in _OF_OWN_PAIRS and (value := getattr(settings, item.name)) != item.default:
            raise InputError(
                f"data.{item.name}={value!r} is for pairs of your own, and data.source={settings.source!r} makes its "
                "sentences; leave it out"
            )
    query = PairQuery(
        source=settings.source, num_pairs=number, half=half, seed=seed, counterfactual=settings.counterfactual,
        partition_seed=settings.partition_seed, partition_share=settings.partition_share,
    )  # fmt: skip
    own = make_pairs(query, encoder)
    pairs = sorted(own.pairs, key=lambda pair: -len(pair.clean_ids))
    batches = [pad_pairs(part, encoder.pad_id) for part in chunks(pairs, size)]
    return batches, dict(own.counts), {"counterfactual": settings.counterfactual}


def _read(
    settings: CircuitData, encoder: Encoder, half: Half, number: int, seed: int, size: int
) -> tuple[list[ReferenceBatch], dict[str, int], Record]:
    from sparc3_pl.data.fields import RecordFields
    from sparc3_pl.data.reference import build_samples, pad_samples
    from sparc3_pl.data.texts import TextQuery

    if settings.counterfactual is not None:
        raise InputError(
            f"data.counterfactual={settings.counterfactual!r} is for tasks that make their sentences, and "
            f"data.source={settings.source!r} is not one; leave it out"
        )
    fields = RecordFields(
        answer=settings.answer_field, foil=settings.foil_field, counterfactual=settings.counterfactual_field
    )
    query = TextQuery(
        settings.source, settings.text_field, settings.filter, settings.split, settings.subset, seed,
        half, settings.partition_seed, settings.partition_share, fields=fields,
    )  # fmt: skip
    samples = sorted(build_samples(query, encoder, num_samples=number), key=lambda s: -len(s.input_ids))
    batches = [pad_samples(part, encoder.pad_id) for part in chunks(samples, size)]
    more = {"text_field": settings.text_field, "filter": settings.filter, **fields.given, **query.origin}
    return batches, dict(query.counts), more
