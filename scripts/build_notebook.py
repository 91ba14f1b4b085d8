"""Runs docs/notebook.ipynb and keeps what its cells show, without what they print on stderr.

python scripts/build_notebook.py
"""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "docs" / "notebook.ipynb"


def executed(path: Path, folder: Path) -> nbformat.NotebookNode:
    """The notebook after a run of all its cells in ``folder``.

    Raises:
        CellExecutionError: if a cell fails.
    """
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()
    return notebook


def code_lines(notebook: nbformat.NotebookNode) -> list[str]:
    """Every line of code that is no comment."""
    cells = (cell.source for cell in notebook.cells if cell.cell_type == "code")
    lines = (line.strip() for source in cells for line in source.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def main() -> int:
    """Writes the notebook with its outputs."""
    notebook = executed(NOTEBOOK, NOTEBOOK.parent)
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = [out for out in cell.outputs if out.get("name") != "stderr"]
    notebook.metadata = {"kernelspec": notebook.metadata.kernelspec, "language_info": {"name": "python"}}
    nbformat.write(notebook, NOTEBOOK)
    return 0


if __name__ == "__main__":
    sys.exit(main())
