"""Makes docs/examples: the report of the demo experiment, as a page that opens anywhere.

    python scripts/build_examples.py

It takes some minutes on two cores. Everything is made in a temporary folder, so that the page names no place.
"""

import contextlib
import os
import shutil
import sys
import tempfile
from pathlib import Path

from sparc3_pl.cli import main as sparc3

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "docs" / "examples"
LIMIT = 1_000_000
"""Bytes of one file."""


def main() -> int:
    """Runs the experiment and copies its page."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        shutil.copytree(ROOT / "configs", "configs")
        words = ["run", "--config", "configs/experiments/demo.yaml", "--output", "runs/demo"]
        sys.argv[1:] = words  # what the page says of the command that made it
        if code := sparc3(words):
            return code
        page = Path("runs/demo/report/report.html").read_text(encoding="utf-8")
    assert os.fspath(folder) not in page, "the page names the folder in which it was made"
    assert len(page.encode()) < LIMIT, f"the page has {len(page.encode()):,} bytes"
    EXAMPLES.mkdir(exist_ok=True)
    (EXAMPLES / "demo_report.html").write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
