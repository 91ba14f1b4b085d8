"""Two runs with one output: the second is refused while the first lives, however that one ends."""

import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from sparc3_pl.errors import InputError
from sparc3_pl.io import claims
from sparc3_pl.io.claims import sole_run
from sparc3_pl.scores.partial import PartialSums, partial_folder

HOLD = """
import sys
from sparc3_pl.io.claims import sole_run
with sole_run(sys.argv[1]):
    print('held', flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other_run(tmp_path):
    """Another process that has claimed ``tmp_path / "out"``."""
    words = [sys.executable, "-c", HOLD, str(tmp_path / "out")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_live_run_keeps_its_output_and_a_dead_one_does_not(other_run, tmp_path):
    with pytest.raises(InputError, match=f"another run .process {other_run.pid} on "), sole_run(tmp_path / "out"):
        pass
    (tmp_path / "link").symlink_to(tmp_path / "out")
    with pytest.raises(InputError, match="another run"), sole_run(tmp_path / "link"):
        pass
    other_run.send_signal(signal.SIGKILL)
    other_run.wait()
    assert (tmp_path / ".out.lock").exists()  # it could not clean up
    with sole_run(tmp_path / "out"), sole_run(tmp_path / "out"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


def test_taking_up_leaves_a_live_runs_folders_alone(other_run, tmp_path):
    half_written = partial_folder(tmp_path / "out").with_name(".out.partial-0123")
    half_written.mkdir()
    with pytest.raises(InputError, match="another run"):
        PartialSums(tmp_path / "out", 0).take_up({})
    assert half_written.exists()
    other_run.send_signal(signal.SIGKILL)
    other_run.wait()
    PartialSums(tmp_path / "out", 0).take_up({})
    assert not half_written.exists()


def test_leaves_nothing_behind(tmp_path):
    with suppress(ZeroDivisionError), sole_run(tmp_path / "a" / "b" / "out"):
        assert (tmp_path / "a" / "b" / ".out.lock").exists()
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with sole_run(tmp_path / "file" / "out"), sole_run(None):  # whoever writes there will say why it cannot
        pass


@pytest.mark.parametrize(
    ("changes", "lives"),
    [({}, True), ({"started": "1"}, False), ({"pid": 2**22 + 1}, False), ({"host": "elsewhere"}, False)],
)
def test_without_locks_the_named_process_decides(tmp_path, monkeypatch, changes, lives):
    def no_locks(*_: object) -> None:
        raise OSError(38, os.strerror(38))

    monkeypatch.setattr(claims.fcntl, "lockf", no_locks)
    started = Path(f"/proc/{os.getpid()}/stat").read_text().rpartition(") ")[2].split()[19]
    owner = {"pid": os.getpid(), "host": socket.gethostname(), "started": started} | changes
    (tmp_path / ".out.lock").write_text(json.dumps(owner))
    if lives:
        with pytest.raises(InputError, match="another run"), sole_run(tmp_path / "out"):
            pass
    else:
        with sole_run(tmp_path / "out"):
            pass
