"""The notebook of the documentation: it runs, in twenty lines, and its plan does what the page says."""

import re
from pathlib import Path

import nbformat
from build_notebook import NOTEBOOK, code_lines, executed


def test_the_notebook_runs_in_twenty_lines_and_the_behaviour_is_gone(tmp_path):
    notebook = executed(NOTEBOOK, tmp_path)
    assert len(code_lines(notebook)) <= 20
    shown = [out.data for cell in notebook.cells for out in cell.get("outputs", ()) if "data" in out]
    assert all("text/html" in data for data in shown)
    assert len(shown) == 3
    row = re.search(r"toxicity: mean</th><td[^>]*>([\d.]+)</td><td[^>]*>([\d.]+)", shown[1]["text/html"])
    before, after = map(float, row.groups())
    assert before > 0.3
    assert after < before / 4
    assert list(tmp_path.iterdir()) == []  # nothing was written


def test_what_is_kept_of_a_run_names_no_place_on_a_machine():
    text = Path(NOTEBOOK).read_text(encoding="utf-8")
    kept = nbformat.reads(text, as_version=4)
    assert [cell for cell in kept.cells if cell.get("outputs")]
    assert str(Path.home()) not in text
    assert len(text) < 500_000
