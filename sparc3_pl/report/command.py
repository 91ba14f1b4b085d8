"""The ``report`` command."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sparc3_pl.diagnosis.score_checks import audit_folders
from sparc3_pl.document.markdown import markdown
from sparc3_pl.document.page import PAGE, page
from sparc3_pl.io.files import FolderKind, check_output, new_folder, write_text
from sparc3_pl.io.provenance import now
from sparc3_pl.report.collect import collect
from sparc3_pl.report.effects import effects
from sparc3_pl.report.sections import MOST_READ, report_sections

__all__ = ["Report", "make_report", "report"]

_PAGE, _TEXT = "report.html", "report.md"
KIND = FolderKind("a report", _PAGE, (_TEXT,), is_marker=lambda path: path.is_file() and PAGE.is_one(path))


@dataclass(frozen=True)
class Report:
    """A report as a page and as text."""

    html: str
    markdown: str


def report(folders: list[str], output: str = "report", overwrite: bool = False) -> Path:
    """Write a report on scores, plans, evaluations and circuits, as one HTML page and as Markdown.

    The page needs no network and opens from the disk. Its inputs are verified while they are read; the tensors of score
    folders over 100 MB are not read, use audit for that.

    Args:
        folders: Score folders, plans, evaluation folders, circuit folders, results of compare, audit, doctor, evidence
            and overlap, or folders that hold such, as an experiment's.
        output: Folder for report.html and report.md.
        overwrite: Replace an earlier report there.

    Raises:
        InputError: If something is missing or damaged, there are no results, or the output is taken.
    """
    from sparc3_pl.document.terminal import print_result

    check_output(output, overwrite, KIND)
    content = make_report(folders, leave_out=Path(output))
    with new_folder(output, overwrite, KIND) as folder:
        write_text(folder / _PAGE, content.html)
        write_text(folder / _TEXT, content.markdown)
    path = Path(output) / _PAGE
    print_result(f"report: {path}")
    return path


def make_report(folders: Sequence[str | Path], leave_out: Path | None = None) -> Report:
    """Makes the report without writing it.

    Args:
        folders: The inputs, as in ``report``.
        leave_out: A folder below them to pass over.
    """
    inputs = collect(folders, leave_out)
    scores = inputs.scores
    audit = audit_folders(list(scores.values()), list(scores), most_bytes=MOST_READ) if scores else None
    sections = report_sections(inputs, audit, *effects(inputs))
    models = [folder.manifest.model.pretrained for folder in scores.values()]
    models += [ev.figures.model.pretrained for ev in inputs.evaluations.values()]
    models += [results.model.pretrained for results in inputs.circuits.values()]
    names = dict.fromkeys(Path(str(model)).name for model in models if model)
    title = f"Attribution-guided pruning of {', '.join(names)}" if names else "Attribution-guided pruning"
    counts = {
        "score folder": len(scores),
        "plan": len(inputs.plans),
        "evaluation": len(inputs.evaluations),
        "circuit": len(inputs.circuits),
        "comparison": len(inputs.comparisons),
        "other result": sum(map(len, inputs.diagnoses.values())),
    }
    contents = ", ".join(f"{n} {name}{'' if n == 1 else 's'}" for name, n in counts.items() if n)
    subtitle = f"Made {now()} by sparc3_pl from {contents}."
    return Report(page(title, sections, subtitle), markdown(title, sections, subtitle))
