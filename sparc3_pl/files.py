"""Files that appear whole or not at all, and paths that stay where they belong."""

import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from sparc3_pl.errors import InputError

__all__ = [
    "check_output",
    "fsync",
    "inside",
    "json_digest",
    "new_file",
    "new_folder",
    "read_json",
    "save_tensors",
    "sha256_of_file",
    "strict_json",
    "write_text",
    "writing",
]


def strict_json(value: Any, indent: int | None = None) -> str:
    """``value`` as JSON that every reader accepts: a NaN or an infinity becomes ``null``."""
    return json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def json_digest(data: Mapping[str, Any]) -> str:
    """The sha256 of a JSON object's content, whatever its layout on the disk, in hex."""
    canonical = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``.

    Raises:
        InputError: if the file is missing, cannot be read, or holds anything but one JSON object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from error
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}); the file is damaged, make it again") from error
    if not isinstance(data, dict):
        raise InputError(
            f"{path}: holds a JSON {type(data).__name__} where an object is expected; is it the right file?"
        )
    return data


def sha256_of_file(path: Path) -> str:
    """The sha256 of a file's bytes, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def inside(folder: Path, name: str) -> Path:
    """The path of the file ``name`` in ``folder``.

    Raises:
        InputError: if ``name`` is absolute, climbs out with ``..`` or leads out through a link.
    """
    path = folder / name
    if not name or Path(name).is_absolute() or not path.resolve().is_relative_to(folder.resolve()):
        raise InputError(
            f"{folder}: names the file {name!r}, which is outside the folder; refused, make the folder again"
        )
    return path


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns a failure to write into one line for the user: full disk, no permission, not a folder.

    Raises:
        InputError: in place of the ``OSError`` or the safetensors error of the block.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in reason
        advice = "free some space or choose another place" if full else "choose a place that can be written"
        raise InputError(f"{path}: cannot be written ({reason}); {advice}") from error


def write_text(path: Path, text: str) -> None:
    """Writes ``text`` and waits until it is on the disk.

    Raises:
        InputError: if it cannot be written.
    """
    with writing(path), path.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file and waits until it is on the disk.

    Raises:
        InputError: if it cannot be written.
    """
    with writing(path):
        path.touch()
        mode = path.stat().st_mode  # safetensors makes files that only their owner can read: keep the user's umask
        save_file(tensors, path, metadata)
        path.chmod(mode)
        fsync(path)


def check_output(path: str | Path, overwrite: bool = False, marker: str | None = None) -> Path:
    """Refuses a place that a result cannot go to; cheap, so that a long run can ask before it starts.

    Args:
        path: The folder or file to be written.
        overwrite: Whether an earlier result there may be replaced.
        marker: For folders: the file by which an earlier result of the same kind is known. Without it a folder is
            never replaced, whatever ``overwrite`` says: it holds something else of the user's.

    Raises:
        InputError: if the place is taken or cannot be written.
    """
    path = Path(path).absolute()
    path = path.resolve() if path.is_symlink() else path  # what a link points to is replaced, not the link
    if path.is_dir() and marker is None:
        raise InputError(f"{path}: is a folder, but a file is to be written there; give a file name")
    if path.is_dir() and any(path.iterdir()):
        if not overwrite:
            raise InputError(f"{path}: already exists; give --overwrite to replace it, or choose another output")
        if not (path / marker).is_file():
            raise InputError(f"{path}: holds no {marker}, so it is not an earlier result; choose another output")
    elif path.exists() and not path.is_dir():
        if marker is not None:
            raise InputError(f"{path}: is a file, but a folder is to be written there; choose another output")
        if not overwrite:
            raise InputError(f"{path}: already exists; give --overwrite to replace it, or choose another output")
    parent = next(folder for folder in path.parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"{path}: cannot be written ({parent} is not a writable folder); choose another output")
    return path


@contextmanager
def new_folder(path: str | Path, overwrite: bool = False, marker: str = "manifest.json") -> Iterator[Path]:
    """A folder to fill, which takes its name only when the block ends well.

    The work is done in a hidden sibling of ``path``. At the end everything is flushed to the disk and the sibling is
    renamed; an earlier result is replaced as a whole, never merged with. If the block raises, nothing remains.

    Raises:
        InputError: as ``check_output``, before the block and again before the renaming.
    """
    path = check_output(path, overwrite, marker)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _sibling(path, "partial")
        temporary.mkdir()
    try:
        yield temporary
        check_output(path, overwrite, marker)
        with writing(path):
            for item in (*temporary.rglob("*"), temporary):
                fsync(item)
            _publish(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # gone already if it was renamed


@contextmanager
def new_file(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """As ``new_folder``, for one file: yields the temporary name to write to."""
    path = check_output(path, overwrite)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _sibling(path, "partial")
    try:
        yield temporary
        check_output(path, overwrite)
        with writing(path):
            fsync(temporary)
            temporary.replace(path)
            fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sibling(path: Path, word: str) -> Path:
    return path.with_name(f".{path.name}.{word}-{secrets.token_hex(4)}")


def _publish(temporary: Path, path: Path) -> None:
    """Renames a finished folder to its place; an earlier one steps aside first and comes back if that fails."""
    if not path.exists() or not any(path.iterdir()):
        temporary.rename(path)  # onto nothing or onto an empty folder: one atomic step
    else:
        old = _sibling(path, "old")
        path.rename(old)
        try:
            temporary.rename(path)
        except OSError:
            old.rename(path)
            raise
        shutil.rmtree(old)
    fsync(path.parent)


def fsync(path: Path) -> None:
    """Waits until a file's bytes, or a folder's entries, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
