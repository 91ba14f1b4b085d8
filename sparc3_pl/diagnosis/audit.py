"""The ``audit`` command."""

from __future__ import annotations

from dataclasses import asdict

from sparc3_pl.diagnosis.audit_sections import audit_sections
from sparc3_pl.diagnosis.score_checks import Audit, audit_folders
from sparc3_pl.document.publish import as_json, check_places, publish
from sparc3_pl.scores.folder import ScoreFolder

__all__ = ["audit"]


def audit(folders: list[str], output: str | None = None, html: str | None = None, overwrite: bool = False) -> Audit:
    """Check score folders: numbers, architecture, samples, agreement of seeds; a verdict for each.

    Folders that differ only in their seed are compared with each other. Weight scores of any size are read in blocks.

    Args:
        folders: Score folders, of any models and methods.
        output: JSON file for the result.
        html: HTML page for the result.
        overwrite: Replace earlier files at output and html.

    Raises:
        InputError: If a folder is missing, incomplete or was changed, or an output is taken.
    """
    check_places("audit", output, html, overwrite)
    result = audit_folders([ScoreFolder.open(path) for path in folders])
    publish(
        "Audit of scores",
        audit_sections(result),
        json=as_json("audit", {"verdict": result.verdict, **asdict(result)}),
        output=output,
        html=html,
        overwrite=overwrite,
        verdict=result.verdict,
    )
    return result
