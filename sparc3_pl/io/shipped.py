"""The configurations that come with the package, by name: ``--config sparc3:lrp.yaml``."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

from sparc3_pl.errors import InputError

__all__ = ["PREFIX", "shipped_config", "with_shipped_configs"]

PREFIX = "sparc3:"

_PACKAGE = Path(__file__).parents[1]
_FOLDERS = (_PACKAGE / "configs", _PACKAGE.parent / "configs")
"""Where a wheel has them, and the repository."""


def shipped_config(name: str) -> Path:
    """The file of a configuration, such as ``lrp.yaml`` or ``experiments/demo.yaml``.

    Raises:
        InputError: if there is none of this name.
    """
    folder = next((folder for folder in _FOLDERS if folder.is_dir()), _FOLDERS[0])
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.yaml"))
    if name in names:
        return folder / name
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    hint = f"did you mean {PREFIX}{close[0]}?" if close else f"there are {', '.join(names[:5])}, ..."
    raise InputError(f"--config {PREFIX}{name}: no such configuration comes with the package; {hint}")


def with_shipped_configs(words: Sequence[str]) -> list[str]:
    """A command line in which the names of shipped configurations are replaced by their paths.

    Raises:
        InputError: as ``shipped_config``.
    """
    located, before = [], ""
    for word in words:
        option, _, value = word.rpartition("=")
        if value.startswith(PREFIX) and "--config" in (option, "" if option else before):
            word = f"{option}{'=' if option else ''}{shipped_config(value.removeprefix(PREFIX))}"
        located.append(word)
        before = word
    return located
