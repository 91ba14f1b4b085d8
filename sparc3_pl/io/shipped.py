"""The configurations that come with the package, by name: ``--config sparc3:lrp.yaml``; and the lists they name."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

from sparc3_pl.errors import InputError

__all__ = ["PREFIX", "list_file", "shipped_config", "with_shipped_configs"]

PREFIX = "sparc3:"

_PACKAGE = Path(__file__).parents[1]
_FOLDERS = (_PACKAGE / "configs", _PACKAGE.parent / "configs")
"""Where a wheel has them, and the repository."""


def shipped_config(name: str) -> Path:
    """The file of a configuration, such as ``lrp.yaml`` or ``experiments/demo.yaml``.

    Raises:
        InputError: if there is none of this name.
    """
    return _shipped_file(name, ".yaml", f"--config {PREFIX}{name}: no such configuration")


def list_file(value: str, key: str) -> Path:
    """The file of a list of words: the package's own by its name (``sparc3:judges/refusals.txt``), or any by its path.

    Args:
        value: Name or path.
        key: The setting that names it, for messages.

    Raises:
        InputError: if the package has no list of this name.
    """
    if value.startswith(PREFIX):
        return _shipped_file(value.removeprefix(PREFIX), ".txt", f"{key}={value}: no such list")
    return Path(value).expanduser()


def _shipped_file(name: str, suffix: str, complaint: str) -> Path:
    folder, names = _shipped(suffix)
    if name in names:
        return folder / name
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    hint = f"did you mean {PREFIX}{close[0]}?" if close else f"there are {', '.join(names[:5])}, ..."
    raise InputError(f"{complaint} comes with the package; {hint}")


def _shipped(suffix: str) -> tuple[Path, list[str]]:
    """The folder of the configurations, and the names of its files of one kind."""
    folder = next((folder for folder in _FOLDERS if folder.is_dir()), _FOLDERS[0])
    return folder, sorted(path.relative_to(folder).as_posix() for path in folder.rglob(f"*{suffix}"))


def _require_file(path: str) -> None:
    """Refuses a file that is not here but comes with the package, as ``configs/lrp.yaml`` without the repository."""
    name = path.rpartition("configs/")[2]
    if not Path(path).exists() and name in _shipped(".yaml")[1]:
        raise InputError(
            f"--config {path}: no such file here, but it comes with the package; give --config {PREFIX}{name}"
        )


def with_shipped_configs(words: Sequence[str]) -> list[str]:
    """A command line in which the names of shipped configurations are replaced by their paths.

    Raises:
        InputError: as ``shipped_config``, and for a file that is not here where the package has one of its name.
    """
    result, before = [], ""
    for word in words:
        option, _, value = word.rpartition("=")
        if "--config" in (option, "" if option else before):
            if value.startswith(PREFIX):
                word = f"{option}{'=' if option else ''}{shipped_config(value.removeprefix(PREFIX))}"
            else:
                _require_file(value)
        result.append(word)
        before = word
    return result
