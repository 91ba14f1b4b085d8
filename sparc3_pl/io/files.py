"""Files that appear whole or not at all, and paths that stay where they belong."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from sparc3_pl.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "FileKind",
    "FolderKind",
    "check_output",
    "fsync",
    "inside",
    "json_digest",
    "new_file",
    "new_folder",
    "open_tensors",
    "read_json",
    "save_tensors",
    "sha256_of_file",
    "strict_json",
    "tensor_digest",
    "write_text",
    "writing",
]


def strict_json(value: Any, indent: int | None = None) -> str:
    """``value`` as JSON that every reader accepts: a NaN or an infinity becomes ``null``.

    Bytes of a path that are not UTF-8 are lone surrogates in a ``str``; they are written as escapes, as all are that
    cannot be encoded, and are read back as they were.
    """
    text = json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


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


def tensor_digest(tensor: Tensor) -> str:
    """The sha256 of a tensor's values, in hex: of their bytes as a file holds them, whatever its shape.

    Args:
        tensor: In the host's memory, of a type that NumPy has.
    """
    return hashlib.sha256(memoryview(tensor.reshape(-1).numpy()).cast("B")).hexdigest()


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
    """Writes ``text`` and waits until it is on the disk; what UTF-8 cannot encode (bytes of a path) is escaped.

    Raises:
        InputError: if it cannot be written.
    """
    with writing(path), path.open("w", encoding="utf-8", errors="backslashreplace") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file and waits until it is on the disk.

    Raises:
        InputError: if it cannot be written.
    """
    from safetensors.torch import save_file  # torch, which --help does not need

    with writing(path):
        path.touch()
        mode = path.stat().st_mode  # safetensors makes files that only their owner can read: keep the user's umask
        save_file(tensors, path, metadata)
        path.chmod(mode)
        fsync(path)


def open_tensors(path: Path) -> Any:
    """``safetensors.safe_open`` for PyTorch, also where a name in ``path`` is not UTF-8, which it refuses.

    Raises:
        OSError, SafetensorError: if the file cannot be opened, or is damaged.
    """
    if _is_utf8(path):
        return safe_open(path, "pt")
    handle = os.open(path, os.O_RDONLY)
    try:
        return safe_open(f"/dev/fd/{handle}", "pt")  # it maps the file while it opens it
    finally:
        os.close(handle)


@dataclass(frozen=True)
class FolderKind:
    """A kind of result that is a folder, and what such a folder holds.

    Attributes:
        name: What it is called, with its article.
        marker: The JSON file, with a ``format_version``, by which it is known.
        files: Names of the files that it holds, with slashes for those in folders of its own.
        listed: Names of further files, from the content of the marker.
        is_marker: Whether a file of the marker's name is one, where it is not such a JSON file.
        names_are_utf8: Whether the libraries that read it open only paths that are UTF-8.
    """

    name: str
    marker: str
    files: tuple[str, ...] = ()
    listed: Callable[[dict[str, Any]], Iterable[str]] = lambda content: ()
    is_marker: Callable[[Path], bool] | None = None
    names_are_utf8: bool = False

    def check_earlier(self, path: Path) -> None:
        """Refuses a folder that is not an earlier result of this kind, or holds anything else beside it.

        Raises:
            InputError: naming what is there.
        """
        marker = path / self.marker
        content = _json_object(marker)
        is_ours = self.is_marker(marker) if self.is_marker else "format_version" in content
        if not is_ours:
            raise InputError(
                f"{path}: is not {self.name} (it has no {self.marker} of ours), so not an earlier result to replace; "
                "choose another output"
            )
        try:
            ours = {self.marker, *self.files, *self.listed(content)}
        except (AttributeError, KeyError, TypeError):  # a marker of another format: nothing is known to be ours
            ours = {self.marker}
        if others := sorted(_not_ours(path, ours)):
            more = f" and {len(others) - 1} more" if others[1:] else ""
            raise InputError(
                f"{path}: holds {others[0]!r}{more} beside {self.name}; "
                "--overwrite would delete it: move it away, or choose another output"
            )


def _not_ours(path: Path, ours: set[str], before: str = "") -> Iterator[str]:
    """Names in a folder that are not among ``ours``; a folder within it is ours if a file of ours belongs into it."""
    for entry in path.iterdir():
        name = before + entry.name
        if not entry.is_dir():
            if name not in ours:
                yield name
        elif any(own.startswith(f"{name}/") for own in ours) and not entry.is_symlink():
            yield from _not_ours(entry, ours, f"{name}/")
        else:
            yield name


@dataclass(frozen=True)
class FileKind:
    """A kind of result that is a file.

    Attributes:
        name: What it is called, with its article.
        is_one: Whether a file is an earlier result of this kind.
        is_content: Whether the object in a JSON file is one of this kind; None for other files.
    """

    name: str
    is_one: Callable[[Path], bool]
    is_content: Callable[[dict[str, Any]], bool] | None = None

    @classmethod
    def json(cls, name: str, is_one: Callable[[dict[str, Any]], bool]) -> FileKind:
        """The kind of a JSON file that is known by its content."""
        return cls(name, lambda path: is_one(_json_object(path)), is_one)

    def check_earlier(self, path: Path) -> None:
        """Refuses a file that is not an earlier result of this kind.

        Raises:
            InputError: naming it.
        """
        if not self.is_one(path):
            raise InputError(f"{path}: is not {self.name}, so it is not overwritten; choose another output")


def _json_object(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``; empty if there is none."""
    try:
        return read_json(path)
    except InputError:
        return {}


def check_output(path: str | Path, overwrite: bool, kind: FolderKind | FileKind) -> Path:
    """Refuses a place that a result cannot go to; cheap, so that a long run can ask before it starts.

    Args:
        path: The folder or file to be written.
        overwrite: Whether an earlier result of this kind may be replaced; nothing else ever is.
        kind: What is to be written.

    Raises:
        InputError: if the place is taken, cannot be written, or has a name that is too long.
    """
    path = _checked_name(Path(path).absolute())
    with writing(path):
        path = Path(os.path.realpath(path)) if path.is_symlink() else path  # what a link points to is replaced
        parent = next(folder for folder in path.parents if os.path.exists(folder))
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise InputError(f"{path}: cannot be written ({parent} is not a writable folder); choose another output")
        is_folder = isinstance(kind, FolderKind)
        if path.is_dir() and not is_folder:
            raise InputError(f"{path}: is a folder, but a file is to be written there; give a file name")
        if path.exists() and not path.is_dir() and is_folder:
            raise InputError(f"{path}: is a file, but a folder is to be written there; choose another output")
        if any(path.iterdir()) if path.is_dir() else path.exists():
            if not overwrite:
                raise InputError(f"{path}: already exists; give --overwrite to replace it, or choose another output")
            kind.check_earlier(path)
    if isinstance(kind, FolderKind) and kind.names_are_utf8 and not _is_utf8(path):
        raise InputError(f"{path}: has a name that is not UTF-8, which safetensors cannot open; choose another output")
    return path


_LONGEST_ADDITION = 40
"""Bytes that the names of hidden siblings (``.NAME.completions.partial``) add to a name."""
_LONGEST_NAME = 128
"""Bytes left for the names of the files in a folder."""


def _checked_name(path: Path) -> Path:
    try:
        names = [len(os.fsencode(name)) for name in path.parts]
        length = len(os.fsencode(path))
    except UnicodeEncodeError as error:
        raise InputError(f"{str(path)!r}: is no name for a file ({error.reason}); choose another output") from error
    if "\0" in str(path):
        raise InputError(f"{str(path)!r}: is no name for a file (it holds a NUL); choose another output")
    if max(names[:-1], default=0) > 255 or names[-1] + _LONGEST_ADDITION > 255 or length + _LONGEST_NAME > 4095:
        raise InputError(
            f"{path}: is too long: a name may have {255 - _LONGEST_ADDITION} bytes, and a path "
            f"{4095 - _LONGEST_NAME}; choose a shorter output"
        )
    return path


def _is_utf8(path: Path) -> bool:
    try:
        os.fspath(path).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


@contextmanager
def new_folder(path: str | Path, overwrite: bool, kind: FolderKind) -> Iterator[Path]:
    """A folder to fill, which takes its name only when the block ends well.

    The work is done in a hidden sibling of ``path``. At the end everything is flushed to the disk and the sibling is
    renamed; an earlier result is replaced as a whole, never merged with. If the block raises, nothing remains.

    Raises:
        InputError: as ``check_output``, before the block and again before the renaming.
    """
    path = check_output(path, overwrite, kind)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _sibling(path, "partial")
        temporary.mkdir()
    try:
        yield temporary
        check_output(path, overwrite, kind)
        with writing(path):
            for item in (*temporary.rglob("*"), temporary):
                fsync(item)
            _publish(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # gone already if it was renamed


@contextmanager
def new_file(path: str | Path, overwrite: bool, kind: FileKind) -> Iterator[Path]:
    """A file to write, which takes its name only when the block ends well, as ``new_folder`` does for a folder."""
    path = check_output(path, overwrite, kind)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _sibling(path, "partial")
    try:
        yield temporary
        check_output(path, overwrite, kind)
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
