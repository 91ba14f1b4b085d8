"""One run for one output: a claim beside the output that ends with the process that holds it, however that ends.

A claim is a lock on the hidden file ``.NAME.lock``. The system gives it up when the process dies, on another machine of
the same file system too, so a run that was killed never stands in its successor's way.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sparc3_pl.errors import InputError

__all__ = ["sole_run"]

_held: set[Path] = set()
"""Outputs that this process has claimed: within one process a lock excludes nobody."""


@contextmanager
def sole_run(output: str | Path | None) -> Iterator[None]:
    """Keeps other processes from writing to ``output`` for as long as the block lasts.

    A claim inside a claim of the same process is part of it. Where no file can be made beside ``output``, or ``output``
    is None, there is nothing to claim; writing the result then fails with the reason.

    Raises:
        InputError: if another run has claimed ``output``.
    """
    path = None if output is None else Path(os.path.realpath(output))
    if path is None or path in _held:
        yield
        return
    lock = path.with_name(f".{path.name}.lock")
    folders = _make_parents(lock)
    try:
        handle = _locked(lock, path)
    except InputError:
        _remove_empty(folders)
        raise
    except OSError:
        _remove_empty(folders)
        yield
        return
    _held.add(path)
    try:
        yield
    finally:
        _held.discard(path)
        with suppress(OSError):
            lock.unlink()
        os.close(handle)
        _remove_empty(folders)


def _locked(lock: Path, output: Path) -> int:
    """Locks the file ``lock``, writes into it which process that was, and returns its open handle.

    Raises:
        InputError: if another run has locked it.
    """
    while True:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not _lock(handle):
                owner = _owner(handle)
                who = f" (process {owner.get('pid')} on {owner.get('host')})" if owner else ""
                raise InputError(
                    f"{output}: another run{who} is writing to it; wait until it has ended, or choose another output"
                )
            if _is_open_at(lock, handle):  # else its last owner has removed it meanwhile
                os.ftruncate(handle, 0)
                own = {"pid": os.getpid(), "host": socket.gethostname(), "started": _started(os.getpid())}
                os.pwrite(handle, json.dumps(own).encode(), 0)
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _lock(handle: int) -> bool:
    """Takes the lock if it is free, and tells whether it is ours now.

    Where the file system knows no locks, it is free unless the process that the file names still runs.
    """
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        return not _lives(_owner(handle))
    return True


def _is_open_at(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except FileNotFoundError:
        return False


def _owner(handle: int) -> dict[str, Any]:
    with suppress(ValueError):
        owner = json.loads(os.pread(handle, 4096, 0))
        if isinstance(owner, dict):
            return owner
    return {}


def _started(pid: int) -> str | None:
    """When a process began, in the system's ticks; None where that cannot be read, or there is no such process."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[19]
    return None


def _lives(owner: dict[str, Any]) -> bool:
    """Whether the process is known to run: on this machine, with this number, begun at this time."""
    pid = owner.get("pid")
    if owner.get("host") != socket.gethostname() or not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return _started(pid) == owner.get("started")


def _make_parents(path: Path) -> list[Path]:
    """Makes the folders above ``path``, and returns those that were missing, the innermost first."""
    new_folders = [folder for folder in path.parents if not folder.exists()]
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
    return new_folders


def _remove_empty(folders: list[Path]) -> None:
    with suppress(OSError):  # not empty: the result lies in it
        for folder in folders:
            folder.rmdir()
