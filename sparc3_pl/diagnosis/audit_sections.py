"""The tables of an audit."""

from __future__ import annotations

from collections.abc import Sequence

from sparc3_pl.diagnosis.score_checks import TOP, Audit, FolderAudit, SeedAudit, Summary
from sparc3_pl.document.blocks import Block, Cell, Checks, Number, Numbers, Section, Table, count, number, percent

__all__ = ["audit_sections", "verdicts"]


def audit_sections(audit: Audit) -> list[Section]:
    """Tables of all folders side by side, then the agreement of seeds, then the verdicts."""
    folders = audit.folders
    numbers: list[Block] = [_scored(folders), _stability(folders), _samples(folders)]
    sections = [Section("Scores", tuple(numbers))]
    if audit.seeds:
        seeds = tuple(block for group in audit.seeds for block in _seed_tables(group))
        sections.append(Section("Seeds", seeds))
    return [*sections, Section("Verdicts", verdicts(audit))]


def verdicts(audit: Audit) -> tuple[Block, ...]:
    """The checks of every folder and of every group of seeds."""
    groups = [(folder.name, folder.checks) for folder in audit.folders]
    groups += [(f"seeds: {', '.join(group.names)}", group.checks) for group in audit.seeds]
    return tuple(Checks(checks, name) for name, checks in groups)


def _scored(folders: Sequence[FolderAudit]) -> Table:
    rows = []
    for folder in folders:
        seed = folder.about.seed
        row = (
            folder.name,
            f"{'signed ' if folder.about.signed else ''}{folder.about.method}",
            str(folder.about.source),
            Number(seed, form="d") if seed is None or isinstance(seed, int) else str(seed),
            count(folder.num_layers),
            count(folder.num_scores),
            folder.about.granularity,
            number(folder.total_relevance, 6),
        )
        rows.append(row)
    columns = ("scores", "method", "data", "seed", "layers", "scored", "unit", "total relevance")
    return Table.of(columns, rows, "What was scored")


def _stability(folders: Sequence[FolderAudit]) -> Table:
    rows = [
        (
            folder.name,
            *(count(folder.counts[key]) for key in ("nan", "inf", "negative", "zero")),
            percent(folder.counts["zero"] / folder.num_scores),
        )
        for folder in folders
    ]
    return Table.of(("scores", "NaN", "infinite", "negative", "zero", "share of zeros"), rows, "Numerical stability")


def _samples(folders: Sequence[FolderAudit]) -> Table:
    rows = [
        (
            folder.name,
            count(folder.about.num_samples),
            count(folder.about.num_tokens),
            _spread(folder.tokens),
            percent(folder.stops, 0),
            number(folder.relevance.mean if folder.relevance else None, 5),
            number(folder.relevance.standard_error if folder.relevance else None, 2),
            _spread(folder.relevance),
            percent(folder.first_token.mean if folder.first_token else None),
        )
        for folder in folders
    ]
    columns = (
        *("scores", "samples", "tokens", "tokens/sample", "end with full stop"),
        *("relevance/sample", "standard error", "from .. to", "first position"),
    )
    note = "First position: its share of the relevance, as a sum of absolute values over tokens and neurons."
    return Table.of(columns, rows, "Samples", note)


def _seed_tables(group: SeedAudit) -> list[Block]:
    total = (number(group.mean, 6), number(group.standard_deviation, 3), percent(group.variation))
    sizes = [k for k in TOP if any(k in pair.top for pair in group.pairs)]
    rows = [
        (
            f"{pair.one} – {pair.other}",
            number(pair.rank_correlation),
            *(number(pair.top.get(k), 3) for k in sizes),
            count(pair.shared_samples),
        )
        for pair in group.pairs
    ]
    columns = ("seeds", "rank correlation", *(f"Jaccard, top {k}" for k in sizes), "samples in both")
    return [
        Table.of(
            ("seeds", "mean", "standard deviation", "variation"),
            [(", ".join(group.names), *total)],
            "Total relevance over seeds",
        ),
        Table.of(columns, rows, "Agreement of seeds"),
    ]


def _spread(summary: Summary | None) -> Cell:
    if summary is None or summary.low == summary.high:
        return number(summary and summary.low)
    return Numbers("{} .. {}", (number(summary.low), number(summary.high)))
