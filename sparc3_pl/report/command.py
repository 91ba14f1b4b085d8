"""The ``report`` command."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sparc3_pl.diagnosis.audit import Audit, audit_folders
from sparc3_pl.document.markdown import markdown
from sparc3_pl.document.page import PAGE, page
from sparc3_pl.io.files import FolderKind, check_output, new_folder, write_text
from sparc3_pl.io.provenance import now
from sparc3_pl.report.collect import Found, collect
from sparc3_pl.report.effects import effects
from sparc3_pl.report.sections import report_sections

__all__ = ["Report", "make_report", "report"]

_PAGE, _TEXT = "report.html", "report.md"
KIND = FolderKind("a report", _PAGE, (_TEXT,), is_marker=lambda path: path.is_file() and PAGE.is_one(path))


@dataclass(frozen=True)
class Report:
    """A report's two forms."""

    html: str
    markdown: str


def report(folders: list[str], output: str = "report", overwrite: bool = False) -> Path:
    """Tell what was done and found, as one HTML page and as Markdown.

    The page needs no network and opens from the disk. Everything that it is made from is verified while it is read.

    Args:
        folders: Score folders, plans, evaluation folders, results of compare, audit, doctor, evidence and overlap, or
            folders that hold such, as an experiment's.
        output: Folder for report.html and report.md.
        overwrite: Replace an earlier report there.

    Raises:
        InputError: If something is missing or damaged, nothing is known, or the output is taken.
    """
    from sparc3_pl.document.terminal import print_result

    check_output(output, overwrite, KIND)
    made = make_report(folders, leave_out=Path(output))
    with new_folder(output, overwrite, KIND) as folder:
        write_text(folder / _PAGE, made.html)
        write_text(folder / _TEXT, made.markdown)
    path = Path(output) / _PAGE
    print_result(f"report: {path}")
    return path


def make_report(folders: Sequence[str | Path], leave_out: Path | None = None) -> Report:
    """The same without writing.

    Args:
        folders: As in ``report``.
        leave_out: A folder below them that is passed over.
    """
    found = collect(folders, leave_out)
    audit = _audit(found)
    sections = report_sections(found, audit, *effects(found))
    title, subtitle = _title(found), f"Made {now()} by sparc3_pl from {_contents(found)}."
    return Report(page(title, sections, subtitle), markdown(title, sections, subtitle))


def _audit(found: Found) -> Audit | None:
    return audit_folders(list(found.scores.values()), list(found.scores)) if found.scores else None


def _title(found: Found) -> str:
    models = [folder.manifest.model.get("pretrained") for folder in found.scores.values()]
    models += [ev.results["model"].get("pretrained") for ev in found.evaluations.values()]
    names = dict.fromkeys(Path(str(name)).name for name in models if name)
    return f"Attribution-guided pruning of {', '.join(names)}" if names else "Attribution-guided pruning"


def _contents(found: Found) -> str:
    counts = {
        "score folder": len(found.scores),
        "plan": len(found.plans),
        "evaluation": len(found.evaluations),
        "comparison": len(found.comparisons),
        "other result": sum(map(len, found.results.values())),
    }
    return ", ".join(f"{number} {name}{'' if number == 1 else 's'}" for name, number in counts.items() if number)
