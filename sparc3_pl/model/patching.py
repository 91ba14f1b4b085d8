"""Changes to a module that are put back when the block ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["swapped"]


@contextmanager
def swapped(owner: object, name: str, new: object) -> Iterator[None]:
    """Give ``owner`` another attribute ``name`` until the block ends, an exception included."""
    own, old = name in vars(owner), getattr(owner, name)
    setattr(owner, name, new)
    try:
        yield
    finally:
        setattr(owner, name, old) if own else delattr(owner, name)
