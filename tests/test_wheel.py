"""The wheel works without the repository: all that belongs to it is in it, configurations by name too."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
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


def _environment():
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def test_the_wheel_holds_all_of_the_package_and_nothing_else(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    own = {path.relative_to(ROOT).as_posix() for path in (ROOT / "sparc3_pl").rglob("*") if path.is_file()}
    own = {name for name in own if "__pycache__" not in name}
    configs = {f"sparc3_pl/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "configs").rglob("*.*")}
    assert len(configs) > 30
    assert names == own | configs
    assert wheel.name == f"sparc3_pl-{__version__}-py3-none-any.whl"
    assert wheel.stat().st_size < 10_000_000


AS_A_USER = """
import json, sys
sys.path[:0] = json.loads(sys.argv[1])  # of the environment only the packages: -S leaves out its link to the repository
from sparc3_pl.cli import main
words = ["score", "--config", "sparc3:lrp.yaml", "--config=sparc3:trainer/debug.yaml", "--output", "scores"]
code = main([*words, "--data.num_samples", "2", "--trainer.accelerator", "cpu"])
assert main(["score", "--config", "configs/lrp.yaml"]) == 2
import sparc3_pl
from sparc3_pl import demo
from sparc3_pl.evaluation.words import WordsJudge
refusals = WordsJudge("sparc3:judges/refusals.txt").num_words
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = AutoModelForCausalLM.from_pretrained(demo.MODEL), AutoTokenizer.from_pretrained(demo.MODEL)
behaviour = sparc3_pl.score(model, tokenizer, ["You are such a", "Get out"], progress=False)
plan = sparc3_pl.choose("scores", behaviour, num_neurons=4)
with sparc3_pl.edited(model, plan):
    after = sparc3_pl.evaluate(model, tokenizer, text="One, two, three.", progress=False)
print(json.dumps([code, sparc3_pl.__file__, after.results["plan"]["num_neurons"], refusals, main.__module__]))
"""


def test_the_demo_runs_from_the_wheel_in_an_empty_folder(wheel, tmp_path):
    """By command and from Python, with the repository nowhere to be imported from."""
    site, work = tmp_path / "site", tmp_path / "work"
    zipfile.ZipFile(wheel).extractall(site)
    work.mkdir()
    places = json.dumps([str(site), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    done = subprocess.run(
        [sys.executable, "-S", "-c", AS_A_USER, places], cwd=work, capture_output=True, text=True, env=_environment()
    )
    assert done.returncode == 0, done.stderr
    assert "neuron scores by lrp: 4 layers of demo" in done.stdout
    assert "comes with the package; give --config sparc3:lrp.yaml" in done.stderr
    code, place, num_neurons, num_refusals, module = json.loads(done.stdout.splitlines()[-1])
    assert (code, num_neurons) == (0, 4)
    assert num_refusals > 10
    assert place.startswith(str(site))
    (entries,) = site.glob("*.dist-info/entry_points.txt")
    assert f"sparc3 = {module.rpartition('.')[0]}:main" in entries.read_text()  # the program that pip puts on the path


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


def test_a_path_of_the_repository_is_told_by_its_name_where_there_is_no_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path, name in (("configs/lrp.yaml", "lrp.yaml"), ("../x/configs/data/c4.yaml", "data/c4.yaml")):
        with pytest.raises(InputError, match=f"--config {path}: no such file here, .* give --config sparc3:{name}"):
            with_shipped_configs(["score", "--config", path])
    others = ["score", "--config=mine.yaml", "--config", "configs/mine.yaml", "configs/lrp.yaml"]
    assert with_shipped_configs(others) == others  # not the package's: the parser says that it is missing
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "lrp.yaml").touch()
    assert with_shipped_configs(["score", "--config", "configs/lrp.yaml"])[-1] == "configs/lrp.yaml"


def test_an_unknown_name_ends_the_program_with_one_line(capfd):
    assert main(["score", "--config", "sparc3:lpr.yaml"]) == 2
    assert "did you mean sparc3:lrp.yaml" in capfd.readouterr().err
