"""Makes docs/examples/demo_report.html, the report of the demo experiment as a page that opens anywhere, and a picture.

    python scripts/build_examples.py             # runs the experiment: some minutes on two cores
    python scripts/build_examples.py --picture   # only docs/report.png, of the page that is there

The experiment is made in a temporary folder, so that the page names no place. The picture needs Chromium.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from sparc3_pl.cli import main as sparc3

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "docs" / "examples"
PAGE = EXAMPLES / "demo_report.html"
PICTURE = ROOT / "docs" / "report.png"
SIZE = (1280, 1620)
"""Of the picture, in pixels: the first screen of the page on a wide window."""
LIMIT = 1_000_000
"""Bytes of one file."""


def main() -> int:
    """Runs the experiment and copies its page, unless only the picture is asked for; then takes the picture."""
    code = 0 if sys.argv[1:] == ["--picture"] else build()
    if not code:
        take_picture(PAGE, PICTURE)
    return code


def build() -> int:
    """Runs the experiment and copies its page; the experiment's exit code."""
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
    PAGE.write_text(page, encoding="utf-8")
    return 0


def take_picture(page: Path, picture: Path) -> None:
    """The top of a page as Chromium shows it, in light colours."""
    with tempfile.TemporaryDirectory() as profile:
        subprocess.run(
            [
                *("chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"),
                *("--hide-scrollbars", "--blink-settings=preferredColorScheme=1"),
                *(f"--window-size={SIZE[0]},{SIZE[1]}", f"--screenshot={picture}", page.as_uri()),
            ],
            check=True,
            capture_output=True,
            timeout=300,
        )


if __name__ == "__main__":
    sys.exit(main())
