"""Real processes for tests, without the seconds that importing torch and Lightning takes in each of them.

One process imports everything and then forks a process for every rank that a test asks for. The ranks find each other
by Lightning's environment variables, as those that ``torchrun`` starts do; with ``launcher=True`` only rank 0 is asked
for, and Lightning's launcher forks the others instead of starting Python again. ``command`` is the real thing.
"""

import contextlib
import functools
import importlib
import io
import itertools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparc3_pl.runtime.launcher import Launcher

ROOT = Path(__file__).parents[1]
SECONDS = 180.0
"""For any one process; a machine that is busy with other tests needs most of it."""


def environment(**extra: str) -> dict[str, str]:
    """Of a process for tests: one thread, no network, no ranks of somebody else's."""
    own = {k: v for k, v in os.environ.items() if k not in RANK_VARIABLES}
    return own | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | extra


RANK_VARIABLES = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SPARC3_LAUNCHER")


def command(*words: object) -> list[str]:
    """``python -m sparc3_pl.cli`` with these words."""
    return [sys.executable, "-m", "sparc3_pl.cli", *map(str, words)]


@dataclass
class Rank:
    """A forked process."""

    pid: int
    out: Path
    """Its stdout and stderr."""
    code: int | None = None

    def poll(self) -> int | None:
        """Its exit code (negative: the signal that killed it); None while it runs."""
        status = self.out.with_suffix(".code")
        if self.code is None and status.exists():
            self.code = int(status.read_text())
        return self.code

    def wait(self, seconds: float = SECONDS) -> int:
        """Its exit code, once it has ended."""
        deadline = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(f"process {self.pid} still runs after {seconds} s:\n{self.text()}")
            time.sleep(0.01)
        assert self.code is not None
        return self.code

    def kill(self, signum: int = signal.SIGKILL) -> None:
        """Sends a signal; nothing happens if the process has ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signum)

    def family(self) -> list[int]:
        """Process ids of the ranks that write to this file."""
        return [int(line) for line in self.out.with_suffix(".pids").read_text().split()]

    def text(self) -> str:
        """What it has written to stdout and stderr."""
        return self.out.read_text(errors="replace")


def wait_until(reached: Callable[[], bool], running: Sequence[Rank]) -> None:
    """Waits for something that ``running`` ranks do; fails as soon as one of them has ended without it."""
    deadline = time.monotonic() + SECONDS
    while not reached():
        assert all(rank.poll() is None for rank in running), f"ended too early:\n{running[0].text()}"
        assert time.monotonic() < deadline, f"not reached after {SECONDS} s:\n{running[0].text()}"
        time.sleep(0.01)


class Ranks:
    """The process that forks; use it as a context manager."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._count = folder, 0

    def __enter__(self) -> "Ranks":
        self._server = subprocess.Popen(
            [sys.executable, __file__], env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stdin.close()
        self._server.wait(SECONDS)

    def start(
        self,
        words: Sequence[object],
        world: int = 1,
        env: Mapping[str, str] | None = None,
        faults: Mapping[int, str] | None = None,
        launcher: bool = False,
    ) -> list[Rank]:
        """Starts ``sparc3 WORDS`` on so many ranks.

        Args:
            words: The command line.
            world: How many ranks.
            env: Environment variables.
            faults: By rank what goes wrong there (``inject``).
            launcher: Start rank 0 only, which starts the others; all write to its file.
        """
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        made = []
        for rank in range(1 if launcher else world):
            self._count += 1
            out = self.folder / f"rank-{self._count}.txt"
            known = {"RANK": rank, "LOCAL_RANK": rank, "NODE_RANK": 0, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1"}
            ranks = (
                {k: str(v) for k, v in known.items()} | {"MASTER_PORT": str(port)} if world > 1 and not launcher else {}
            )
            task = {"words": [str(word) for word in words], "env": {**ranks, **(env or {})}, "out": str(out)}
            task["faults"] = {str(rank): fault for rank, fault in (faults or {}).items()}
            self._server.stdin.write(json.dumps(task) + "\n")
            self._server.stdin.flush()
            made.append(Rank(int(self._server.stdout.readline()), out))
        return made

    def run(self, words: Sequence[object], world: int = 1, **kwargs: Mapping) -> list[Rank]:
        """``start`` of a pass, and waits until all ranks have ended."""
        ranks = self.start([*words, "--trainer.devices", world], world, **kwargs)
        for rank in ranks:
            rank.wait()
        return ranks


def serve() -> None:
    """The forking process: a line of JSON in, a process id out; exit codes go to files beside the outputs."""
    import datasets  # noqa: F401
    import transformers.models.auto.modeling_auto
    import transformers.models.llama.modeling_llama  # noqa: F401

    from sparc3_pl.cli import main

    for name in ("score", "eval"):  # what the parsers look up, they look up once for all ranks
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
            main([name, "--print_config"])
    running: dict[int, Path] = {}
    while True:
        ready, _, _ = select.select([0], [], [], 0.02)
        if ready:
            line = sys.stdin.buffer.raw.readline()
            if not line:
                return
            task = json.loads(line)
            if not (pid := os.fork()):
                work(task)
            running[pid] = Path(task["out"]).with_suffix(".code")
            os.write(1, f"{pid}\n".encode())
        for pid in list(running):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                path = running.pop(pid)
                draft = path.with_suffix(".draft")
                draft.write_text(str(os.waitstatus_to_exitcode(status)))
                draft.replace(path)


def work(task: dict) -> None:
    """In the forked process: runs the command and ends."""
    from sparc3_pl.cli import main
    from sparc3_pl.runtime.launcher import Launcher

    out = os.open(task["out"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(out, stream)
    with Path(task["out"]).with_suffix(".pids").open("a") as pids:
        pids.write(f"{os.getpid()}\n")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(task["env"])
    for name in os.environ.keys() & set(RANK_VARIABLES) - task["env"].keys():
        del os.environ[name]
    inject(task["faults"].get(os.environ.get("LOCAL_RANK", "0"), ""), Path(task["out"]).with_suffix(".fault"))
    Launcher._call_children_scripts = lambda launcher: fork_ranks(launcher, task)
    sys.argv = ["sparc3", *task["words"]]
    code = 1
    try:
        code = main()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class Forked:
    """As much of ``subprocess.Popen`` as a launcher needs."""

    def __init__(self, pid: int) -> None:
        self.pid, self.returncode = pid, None

    def poll(self) -> int | None:
        if self.returncode is None and (found := os.waitpid(self.pid, os.WNOHANG))[0]:
            self.returncode = os.waitstatus_to_exitcode(found[1])
        return self.returncode

    def wait(self) -> int:
        while self.poll() is None:
            time.sleep(0.01)
        return self.returncode

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, signum)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def fork_ranks(launcher: "Launcher", task: dict) -> None:
    """What Lightning's launcher does, by forks."""
    cluster = launcher.cluster_environment
    ranks = {"NODE_RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": launcher.num_processes}
    ranks |= {"MASTER_ADDR": cluster.main_address, "MASTER_PORT": cluster.main_port}
    os.environ.update({name: str(value) for name, value in ranks.items()})
    for rank in range(1, launcher.num_processes):
        if not (pid := os.fork()):
            env = {name: os.environ[name] for name in RANK_VARIABLES}
            work({**task, "env": {**task["env"], **env, "LOCAL_RANK": str(rank)}})
        launcher.procs.append(Forked(pid))


def inject(fault: str, moment: Path) -> None:
    """``slow S TARGET``: every call of TARGET (``module:function`` or ``module:Class.method``; without one every batch
    of a scoring pass) takes S seconds more. ``kill N TARGET``: SIGKILL instead of the N-th call of TARGET; ``stop``,
    ``raise``, ``refuse``: SIGSTOP, an exception, an InputError instead. The file ``moment`` appears when that happens.
    """
    kind, _, rest = fault.partition(" ")
    if kind == "slow":
        seconds, _, target = rest.partition(" ")
        wrap(target or "sparc3_pl.scoring.module:ScoringModule.predict_step", lambda count: time.sleep(float(seconds)))
    elif kind:
        number, target = rest.split()
        wrap(target, lambda count: strike(kind, moment) if count == int(number) else None)


def strike(kind: str, moment: Path) -> None:
    moment.touch()
    FAULTS[kind]()


def wrap(target: str, before: Callable[[int], None]) -> None:
    """Calls ``before`` with the number of the call, from 1, whenever ``target`` is called."""
    module, _, path = target.partition(":")
    owner = importlib.import_module(module)
    *outer, name = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    real, count, rank = getattr(owner, name), itertools.count(1), os.environ.get("LOCAL_RANK", "0")

    @functools.wraps(real)
    def wrapped(*args: object, **kwargs: object) -> object:
        if os.environ.get("LOCAL_RANK", "0") == rank:  # a rank that this one forks has no part in it
            before(next(count))
        return real(*args, **kwargs)

    setattr(owner, name, wrapped)


def _raise() -> None:
    raise ZeroDivisionError("planted by a test")


def _refuse() -> None:
    from sparc3_pl.errors import InputError

    raise InputError("planted=1: by a test; leave it out")


FAULTS = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "raise": _raise,
    "refuse": _refuse,
}

if __name__ == "__main__":
    serve()
