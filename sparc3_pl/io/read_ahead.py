"""Reads the next item while the last one is worked on."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

__all__ = ["read_ahead"]

T = TypeVar("T")


def read_ahead(items: Iterable[T]) -> Iterator[T]:
    """The given items in their order, each made in a thread while the one before it is in use.

    It pays where making an item and using it both leave the interpreter alone (reading, hashing, sorting): the two take
    the time of the longer. Memory holds one item more.
    """
    rest, end = iter(items), object()
    with ThreadPoolExecutor(1) as reader:
        item = reader.submit(next, rest, end)
        while (value := item.result()) is not end:
            item = reader.submit(next, rest, end)
            yield value
