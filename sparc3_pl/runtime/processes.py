"""One process or many: exit codes, signals, and what happens to the others when one of them fails.

The process that the user started is rank 0; Lightning's launcher starts the others by repeating its command line. They
agree on the first failure through a small file that only one of them can create, and rank 0 shows it last. Ranks that
were started by others (``srun``, ``torchrun``) each speak for themselves.

Exit codes: 0 done; 1 failed; 2 the input is wrong; 143 (130) stopped by SIGTERM (Ctrl-C).

A terminal sends Ctrl-C to every process that was started from it, and Slurm sends SIGTERM to every process of a step,
so a rank may be asked to stop twice for one request: by the system, and by the process that has started it. Only a
second Ctrl-C, on the process that the user has started, means that the user will not wait for the work to be saved.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from sparc3_pl.errors import InputError
from sparc3_pl.io.provenance import redacted

__all__ = ["Stop", "deferring_stop", "kept", "run_child", "stop_requested", "supervised"]


POLL_SECONDS = 0.2

GRACE_SECONDS = 5.0
"""Time for the main thread to leave a collective or a batch after another rank has failed; then the process ends."""

STOP_SECONDS = 40.0
"""Time for the other ranks to save after SIGTERM, and for a rank without its launcher."""

STOPPED = (128 + signal.SIGTERM, 128 + signal.SIGINT)
"""Exit codes of a process that was asked to stop."""

_FAILURE, LAUNCHER = "SPARC3_FAILURE", "SPARC3_LAUNCHER"  # environment of the ranks that the launcher starts


class Stop(BaseException):
    """The process was asked to stop; what could be saved is saved.

    Args:
        signum: The signal that asked.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.code = 128 + signum

    def __reduce__(self) -> tuple[type[Stop], tuple[int]]:
        return Stop, (self.code - 128,)  # so that ranks can tell each other


class PeerFailed(BaseException):
    """Another rank has failed; there is nothing left to do here."""


@dataclass(frozen=True)
class Failure:
    """The first failure, on whatever rank."""

    rank: int
    code: int
    text: str


class Reporter:
    """A file that the first rank to fail creates; the others find it there.

    Args:
        path: The file, in the machine's temporary folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def claim(self, failure: Failure) -> bool:
        """Records ``failure`` unless there is one already; says whether it was the first."""
        draft = self.path.with_name(f"{self.path.name}.{os.getpid()}.{threading.get_ident()}")
        try:
            draft.write_text(json.dumps(asdict(failure)), encoding="utf-8")
            os.link(draft, self.path)  # whole or not at all, and only once
        except FileExistsError:
            return False
        except OSError:  # the temporary folder is full or gone: each rank speaks for itself
            return True
        finally:
            draft.unlink(missing_ok=True)
        return True

    def first(self, seconds: float = 0.0) -> Failure | None:
        """The first failure; waits for it up to ``seconds``."""
        deadline = time.monotonic() + seconds
        while True:
            if self.path.exists():
                return Failure(**json.loads(self.path.read_text(encoding="utf-8")))
            if time.monotonic() >= deadline:
                return None
            time.sleep(POLL_SECONDS)


class _Process:
    """This process among the ranks: the signals it got, the ranks it started, and how it exits."""

    def __init__(self) -> None:
        launcher = int(os.environ.get(LAUNCHER, "0"))
        self.launcher = launcher if launcher == os.getppid() and os.environ.get("LOCAL_RANK", "0") != "0" else None
        if self.launcher is None:
            name = f"sparc3-{os.getpid()}-{secrets.token_hex(8)}"
            os.environ[_FAILURE] = str(Path(tempfile.gettempdir()) / name)
        self.reporter = Reporter(Path(os.environ[_FAILURE]))
        self.children: list[subprocess.Popen[Any]] = []
        self.own: Failure | None = None
        self.signum: int | None = None
        self.is_stopping = False
        self.num_deferrals = 0
        self.partial_results: set[Path] = set()
        self.peer_failed = False
        self.is_leaving = False

    @property
    def rank(self) -> int:
        if (dist := _distributed()) is not None:
            return dist.get_rank()
        return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", os.environ.get("LOCAL_RANK", "0"))))

    # --- signals ------------------------------------------------------------------------------------------------------

    def handle(self, signum: int, frame: FrameType | None) -> None:
        """Handles a request to stop: passes it on to the ranks that this process has started, and stops when the work
        allows it.
        """
        if self.is_leaving:
            return
        if self.peer_failed:
            raise PeerFailed
        insists = self.signum is not None and signum == signal.SIGINT and self.launcher is None
        if self.signum is None:
            self.signum = signum
            self.forward()
        if insists or not (self.num_deferrals or self.is_stopping):
            self.is_stopping = True
            raise Stop(signum)

    def forward(self) -> None:
        """Asks the ranks that this process has started to stop: by SIGTERM, which never insists."""
        for child in self.children:
            if child.poll() is None:
                child.send_signal(signal.SIGTERM)

    # --- threads that watch the others --------------------------------------------------------------------------------

    def watch_children(self, children: list[subprocess.Popen[Any]]) -> None:
        """Notices, from now on, when a rank that this process has started ends badly."""
        self.children = children
        threading.Thread(target=self._watch_children, daemon=True, name="watch-ranks").start()

    def _watch_children(self) -> None:
        while not self.is_leaving:
            code = self.record_ended()
            if code in STOPPED:  # it was asked to stop: so are all
                if self.signum is None:
                    os.kill(os.getpid(), signal.SIGTERM)
                return
            if code:
                self._end_soon()
                return
            time.sleep(POLL_SECONDS)

    def _end_soon(self) -> None:
        """Ends this process after another rank has failed, even if the main thread is in a collective without end."""
        self.peer_failed = True
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE_SECONDS)
        if not self.is_leaving:
            self.leave(1)

    def watch_launcher(self) -> None:
        """Notices, from now on, when the process that has started this one is gone."""
        threading.Thread(target=self._watch_launcher, daemon=True, name="watch-launcher").start()

    def _watch_launcher(self) -> None:
        while os.getppid() == self.launcher:
            time.sleep(POLL_SECONDS)
        if self.is_leaving:
            return
        failure = Failure(0, 1, f"rank 0 (process {self.launcher}) was killed: every rank stops")
        if self.reporter.claim(failure):
            _say(failure.text)
        os.kill(os.getpid(), signal.SIGTERM)  # so that what can be saved is saved
        time.sleep(STOP_SECONDS)
        os._exit(1)

    # --- exit codes ---------------------------------------------------------------------------------------------------

    def failed(self, error: BaseException) -> int:
        """Records what went wrong, or leaves that to the rank where it began; gives this process's exit code."""
        self.is_leaving = True
        if isinstance(error, Stop):
            return self._stopped(error)
        if self.signum is not None and _by_another(error):  # the others have stopped while this rank waited for them
            return self._stopped(Stop(self.signum))
        code = 2 if isinstance(error, InputError) else 1
        text = _lost_text(self.rank, error) if _by_another(error) else _error_text(error)
        self.own = Failure(self.rank, code, text)
        if (self.launcher or self.children) and (not _by_another(error) or self._origin() is None):
            self.reporter.claim(self.own)
        return code

    def _origin(self) -> Failure | None:
        """The failure that another rank has recorded, or that a rank of this process has ended with; None: unknown."""
        deadline = time.monotonic() + GRACE_SECONDS
        while (failure := self.reporter.first()) is None and time.monotonic() < deadline:
            self.record_ended()
            time.sleep(POLL_SECONDS)
        return failure

    def record_ended(self) -> int | None:
        """Records the first of this process's ranks that has ended badly; gives its exit code."""
        for rank, child in enumerate(self.children, start=1):
            if code := child.poll():
                if code not in STOPPED:
                    self.reporter.claim(Failure(rank, 1, _ended_text(rank, child.pid, code)))
                return code
        return None

    def _stopped(self, stop: Stop) -> int:
        """Lets the ranks that this process has started save too."""
        if (dist := _distributed()) is not None and dist.get_backend() == "gloo":
            dist.destroy_process_group()  # those that wait for this rank in a collective wake up
        self._wait_for_children(STOP_SECONDS)
        if self.launcher is None:
            advice = ": run the same command again to resume" if self.partial_results else ""
            self.own = Failure(0, stop.code, f"{stop}{advice}")
        return stop.code

    def _wait_for_children(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while any(child.poll() is None for child in self.children) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)

    def conclude(self, code: int) -> int:
        """Ends the other ranks and shows the first failure, last on the screen; gives the exit code."""
        self.is_leaving = True
        if code == 0:
            self._wait_for_children(GRACE_SECONDS)  # they have done their work and are on their way out
        for child in self.children:
            if child.poll() is None:
                child.kill()
        for child in self.children:
            child.wait()
        if code and self.launcher is None:
            code = self._show(code)
        if self.launcher is None:
            self.reporter.path.unlink(missing_ok=True)
        sys.stdout.flush()
        sys.stderr.flush()
        return code

    def _show(self, code: int) -> int:
        first = self.own if code in STOPPED or not self.children else self.reporter.first() or self.own
        if first is None:
            return code
        own_words = first.code != 1 or not self.children or first.text.startswith("rank ")
        _say(first.text if own_words else f"rank {first.rank} failed:\n{first.text}")
        return first.code

    def leave(self, code: int) -> NoReturn:
        """Concludes, and ends the process at once: no collective and no exit hook can hold it."""
        os._exit(self.conclude(code))


_process: _Process | None = None


def supervised(work: Callable[[], None]) -> int:
    """Runs ``work`` and turns whatever ends it into an exit code, on this rank and on those that it starts.

    Returns:
        The exit code. Where ranks are connected and one has failed, the process is ended right here instead: nothing
        that waits for another rank may run any more.
    """
    global _process
    process = _process = _Process()
    if process.launcher is not None:
        process.watch_launcher()
    code = 0
    with _signals(process):
        try:
            work()
        except SystemExit as exit_:
            if not process.children:
                raise
            code = exit_.code if isinstance(exit_.code, int) else 1
        except BaseException as error:
            code = process.failed(error)
    if (dist := _distributed()) is not None:
        if code:
            process.leave(code)
        dist.destroy_process_group()  # gloo now and then aborts at exit otherwise
    _process = None
    return process.conclude(code)


def is_supervised() -> bool:
    """Whether ``supervised`` is at work in this process."""
    return _process is not None


def watch_children(children: Sequence[subprocess.Popen]) -> None:
    """Has the supervisor of this process watch the ranks that it started."""
    assert _process is not None
    _process.watch_children(children)


def _distributed() -> Any | None:
    """``torch.distributed`` if ranks are connected. A process that has not imported it (it takes a second) has none."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist is not None and dist.is_available() and dist.is_initialized() else None


@contextmanager
def _signals(process: _Process) -> Iterator[None]:
    """SIGTERM and Ctrl-C reach ``process`` inside the block; outside the main thread nothing can be installed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.signal(signum, process.handle) for signum in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@contextmanager
def deferring_stop() -> Iterator[None]:
    """Inside the block a signal to stop is only remembered: ask ``stop_requested`` where the work is consistent."""
    if _process is None:
        yield
        return
    _process.num_deferrals += 1
    try:
        yield
    finally:
        _process.num_deferrals -= 1


def stop_requested() -> Stop | None:
    """The exception to raise once everything is saved, if this process was asked to stop; else None."""
    return None if _process is None or _process.signum is None else Stop(_process.signum)


def kept(place: Path, exists: bool = True) -> None:
    """Says that ``place`` now holds work from which the same command resumes (or that it no longer does).

    A process that is stopped advises to run the command again only where there is such a place.
    """
    if _process is not None:
        (_process.partial_results.add if exists else _process.partial_results.discard)(place)


def run_child(command: Sequence[str]) -> int:
    """Runs another process to its end and gives its exit code; a request to stop is passed on and waited for.

    It is passed on as SIGTERM: of a Ctrl-C in a terminal the child has its own, and a second one would insist.
    """
    with subprocess.Popen(command) as child:
        try:
            return child.wait()
        except Stop:
            child.send_signal(signal.SIGTERM)
            child.wait()
            raise


# --- words ------------------------------------------------------------------------------------------------------------


def _by_another(error: BaseException) -> bool:
    """Whether ``error`` only says that another rank is gone."""
    dist = sys.modules.get("torch.distributed")
    if isinstance(error, PeerFailed) or (dist is not None and isinstance(error, dist.DistError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("gloo" in text or "closed by peer" in text or "reset by peer" in text)


def _error_text(error: BaseException) -> str:
    if isinstance(error, InputError):
        return redacted(f"error: {error}")
    return redacted("".join(traceback.format_exception(error)).rstrip())


def _lost_text(rank: int, error: BaseException) -> str:
    reason = redacted(str(error).partition("\n")[0]) or type(error).__name__
    return (
        f"rank {rank} lost contact with another rank, which has reported no error here ({reason}); if it is only slow, "
        "raise trainer.rank_timeout"
    )


def _ended_text(rank: int, pid: int, code: int) -> str:
    if code > 0:
        return f"rank {rank} (process {pid}) ended with exit code {code}"
    name = signal.Signals(-code).name
    hint = " (is there enough memory?)" if name == "SIGKILL" else ""
    return f"rank {rank} (process {pid}) was killed by {name}{hint}"


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
