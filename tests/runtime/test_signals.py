"""What a signal to stop does to the work, and what is said afterwards."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from sparc3_pl.runtime.processes import deferring_stop, kept, run_child, stop_requested, supervised


@pytest.fixture
def rank_1(monkeypatch, tmp_path):
    """This process is a rank that another process has started."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("SPARC3_LAUNCHER", str(os.getppid()))
    monkeypatch.setenv("SPARC3_FAILURE", str(tmp_path / "failure"))


def stopped_by(*signals: signal.Signals, saved: list[str]) -> int:
    """The exit code of a command that got these signals while it could not stop, and then saved its work."""

    def work() -> None:
        with deferring_stop():
            for signum in signals:
                os.kill(os.getpid(), signum)
            saved.append("work")
            if (stop := stop_requested()) is not None:
                raise stop

    return supervised(work)


@pytest.mark.parametrize(
    "signals",
    [
        (signal.SIGINT, signal.SIGINT),  # from the terminal, and passed on
        (signal.SIGINT, signal.SIGTERM),
        (signal.SIGTERM, signal.SIGINT, signal.SIGINT),
    ],
)
def test_a_rank_that_is_asked_twice_saves_its_work(rank_1, signals):
    saved = []
    assert stopped_by(*signals, saved=saved) == 128 + signals[0]
    assert saved == ["work"]


def test_the_user_can_insist(capsys):
    saved = []
    assert stopped_by(signal.SIGTERM, signal.SIGTERM, saved=saved) == 143
    assert saved == ["work"]
    assert stopped_by(signal.SIGINT, signal.SIGINT, saved=saved) == 130
    assert saved == ["work"]


def test_a_second_request_does_not_disturb_the_clean_up(rank_1):
    cleaned = []

    def work() -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            cleaned.append(True)

    assert supervised(work) == 130
    assert cleaned == [True]


@pytest.mark.parametrize(
    ("places", "said"),
    [
        ([], "stopped by SIGINT\n"),
        ([("a", True)], "stopped by SIGINT: run the same command again to resume\n"),
        ([("a", True), ("a", False)], "stopped by SIGINT\n"),
        ([("a", True), ("b", True), ("b", False)], "stopped by SIGINT: run the same command again to resume\n"),
    ],
)
def test_only_what_can_be_resumed_is_said_to_be(capsys, places, said):
    def work() -> None:
        for place, exists in places:
            kept(Path(place), exists)
        os.kill(os.getpid(), signal.SIGINT)

    assert supervised(work) == 130
    assert capsys.readouterr().err == said


CHILD = """
import pathlib, signal, sys, time
log = pathlib.Path(sys.argv[1])
def note(signum, frame):
    with log.open("a") as stream: print(signal.Signals(signum).name, file=stream)
    if signum == signal.SIGTERM: sys.exit(143)
for signum in (signal.SIGINT, signal.SIGTERM): signal.signal(signum, note)
log.touch()
while True: time.sleep(0.01)
"""


def test_ctrl_c_reaches_a_stage_once(tmp_path, monkeypatch):
    """A terminal sends it to both; what is passed on is no second Ctrl-C, which would break the save."""
    log, started = tmp_path / "log", []
    real = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *words, **keys: started.append(real(*words, **keys)) or started[0])

    def ctrl_c() -> None:
        while not log.exists():
            time.sleep(0.01)
        started[0].send_signal(signal.SIGINT)
        while "SIGINT" not in log.read_text():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=ctrl_c, daemon=True).start()
    assert supervised(lambda: run_child([sys.executable, "-c", CHILD, str(log)])) == 130
    assert log.read_text().split() == ["SIGINT", "SIGTERM"]
