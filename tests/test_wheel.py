"""The wheel works without the repository: all that belongs to it is in it, configurations by name too."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from sparc3_pl import __version__
from sparc3_pl.cli import main
from sparc3_pl.errors import InputError
from sparc3_pl.io.shipped import shipped_config, with_shipped_configs

ROOT = Path(__file__).parents[1]
BUILT = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "configs", "sparc3_pl")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Made as ``python -m build`` makes it: from the source distribution, by the build system that pyproject names."""
    source, out = (tmp_path_factory.mktemp(name) for name in ("source", "out"))
    for name in BUILT:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name, **({"ignore": _no_caches} if copy is shutil.copytree else {}))
    _call("build_sdist", source, out)
    with tarfile.open(next(out.glob("*.tar.gz"))) as archive:
        archive.extractall(out, filter="data")
    _call("build_wheel", out / f"sparc3_pl-{__version__}", out)
    return next(out.glob("*.whl"))


def _no_caches(folder, names):
    return [name for name in names if name == "__pycache__"]


def _call(hook, folder, out):
    code = f"import setuptools.build_meta as build; build.{hook}({str(out)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, capture_output=True, env=_environment())


def _environment(*paths):
    rest = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return rest | ({"PYTHONPATH": os.pathsep.join(map(str, paths))} if paths else {})


def test_the_wheel_holds_all_of_the_package_and_nothing_else(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    own = {path.relative_to(ROOT).as_posix() for path in (ROOT / "sparc3_pl").rglob("*") if path.is_file()}
    own = {name for name in own if "__pycache__" not in name}
    configs = {f"sparc3_pl/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "configs").rglob("*.*")}
    assert len(configs) > 30
    assert names == own | configs
    assert wheel.name == f"sparc3_pl-{__version__}-py3-none-any.whl"
    assert wheel.stat().st_size < 10_000_000


def test_the_demo_runs_from_the_wheel_in_an_empty_folder(wheel, tmp_path):
    site, work = tmp_path / "site", tmp_path / "work"
    zipfile.ZipFile(wheel).extractall(site)
    work.mkdir()
    words = ["-m", "sparc3_pl.cli", "score", "--config", "sparc3:lrp.yaml", "--config=sparc3:trainer/debug.yaml"]
    words += ["--output", "scores", "--data.num_samples", "2", "--trainer.accelerator", "cpu"]
    done = subprocess.run(
        [sys.executable, *words], cwd=work, check=True, capture_output=True, text=True, env=_environment(site)
    )
    assert "neuron scores by lrp: 4 layers of demo" in done.stdout
    code = "import sparc3_pl; print(sparc3_pl.__file__)"
    where = subprocess.run(
        [sys.executable, "-c", code], cwd=work, capture_output=True, text=True, env=_environment(site)
    )
    assert where.stdout.startswith(str(site))


def test_configurations_by_name():
    lrp = str(ROOT / "configs" / "lrp.yaml")
    demo = str(ROOT / "configs" / "experiments" / "demo.yaml")
    words = [
        "run",
        "--config",
        "sparc3:lrp.yaml",
        "--config=sparc3:experiments/demo.yaml",
        "--output",
        "sparc3:lrp.yaml",
    ]
    assert with_shipped_configs(words) == ["run", "--config", lrp, f"--config={demo}", "--output", "sparc3:lrp.yaml"]
    with pytest.raises(InputError, match=r"--config sparc3:lpr.yaml: no such .*; did you mean sparc3:lrp.yaml"):
        shipped_config("lpr.yaml")
    with pytest.raises(InputError, match="no such configuration"):
        shipped_config("../pyproject.toml")


def test_an_unknown_name_ends_the_program_with_one_line(capfd):
    assert main(["score", "--config", "sparc3:lpr.yaml"]) == 2
    assert "did you mean sparc3:lrp.yaml" in capfd.readouterr().err
