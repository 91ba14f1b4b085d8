"""The layers contract of ``.importlinter``: it holds, and it notices an import upwards or in a circle."""

import configparser
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs import-linter on the package in ``folder``."""
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache", ROOT / ".importlinter"]
    environment = os.environ | {"PYTHONPATH": str(folder)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_no_room_imports_one_above_it_and_no_files_import_in_a_circle():
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("file", "line", "broken"),
    [
        ("io/files.py", "import sparc3_pl.scores.folder", "sparc3_pl.io is not allowed to import sparc3_pl.scores"),
        ("scores/manifest.py", "import sparc3_pl.scores.writer", "No cycles are allowed in sparc3_pl.scores"),
    ],
)
def test_a_step_back_is_noticed(tmp_path, file, line, broken):
    shutil.copytree(ROOT / "sparc3_pl", tmp_path / "sparc3_pl", ignore=shutil.ignore_patterns("demo", "__pycache__"))
    (tmp_path / "sparc3_pl" / "demo").mkdir()
    (tmp_path / "sparc3_pl" / "demo" / "__init__.py").touch()
    with (tmp_path / "sparc3_pl" / file).open("a") as stream:
        stream.write(f"{line}\n")
    done = lint(tmp_path)
    assert done.returncode == 1
    assert broken in " ".join(done.stdout.split())


def test_every_room_has_a_place_in_the_contract():
    config = configparser.ConfigParser()
    config.read(ROOT / ".importlinter")
    layers = {name.removeprefix("sparc3_pl.") for name in config["importlinter:contract:layers"]["layers"].split()}
    rooms = {path.stem for path in (ROOT / "sparc3_pl").iterdir() if path.suffix in ("", ".py")}
    assert layers == rooms - {"__init__", "__pycache__", "demo"}
