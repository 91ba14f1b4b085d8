"""Names for paths."""

from collections.abc import Sequence
from pathlib import Path

__all__ = ["distinct_names"]


def distinct_names(paths: Sequence[Path]) -> dict[Path, str]:
    """Short names: the last parts of each path, as many as it takes to tell all paths apart."""
    parts = {path: path.with_suffix("").resolve().parts if path.is_file() else path.resolve().parts for path in paths}
    for length in range(1, max((len(p) for p in parts.values()), default=1) + 1):
        names = {path: "/".join(p[-length:]) for path, p in parts.items()}
        if len(set(names.values())) == len(names):
            return names
    return {path: str(path) for path in paths}  # a file and a folder may differ in the ending only
