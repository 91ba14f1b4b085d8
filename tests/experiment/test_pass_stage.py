"""A pass of an experiment in a process of its own."""

import runpy
import sys

import pytest

from sparc3_pl.experiment import pass_stage as pass_stages
from sparc3_pl.experiment.stages import Stages
from sparc3_pl.scores.folder import ScoreFolder
from sparc3_pl.scores.manifest import MARKER


def here(command):
    """What a new process does with the command, done in this one; gives its exit code."""
    python, option, module, *words = command
    assert (python, option) == (sys.executable, "-m")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{module.replace('.', '/')}/__main__.py", *words])
        with pytest.raises(SystemExit) as exit_:
            runpy.run_module(module, run_name="__main__")
    return exit_.value.code


@pytest.mark.parametrize(("method", "code", "said"), [("magnitude", 0, ""), ("magnitud", 2, "did you mean magnitude?")])
def test_it_ends_as_the_command_would(tmp_path, monkeypatch, capsys, method, code, said):
    monkeypatch.setattr(pass_stages, "run_child", here)
    stages, output = Stages(tmp_path / "stages"), tmp_path / "scores"
    trainer = {"accelerator": "cpu", "logger": False, "default_root_dir": str(tmp_path)}
    settings = {"model": {"pretrained": "demo", "method": method}, "data": {"num_samples": 1}, "trainer": trainer}
    stage = pass_stages.pass_stage(stages, "score", "one", settings, output, MARKER)
    if code:
        with pytest.raises(SystemExit) as exit_:
            stages.do(stage)
        assert exit_.value.code == code
        assert not output.exists()
    else:
        stages.do(stage)
        assert ScoreFolder.open(output).manifest.command.startswith("__main__.py score --config ")
    assert said in capsys.readouterr().err
