"""Remembers what was read off a model's structure, for as long as the structure stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TypeVar
from weakref import WeakKeyDictionary

from torch import nn

__all__ = ["by_structure"]

T = TypeVar("T")

_SIZES = ("in_features", "out_features", "nx", "nf")
_HEADS = ("num_attention_heads", "num_key_value_heads")


def by_structure(read: Callable[[nn.Module], list[T]]) -> Callable[[nn.Module], list[T]]:
    """``read`` with a memory: the same model is read once, and again only after its modules have changed.

    What ``read`` returns must depend on the names, kinds and sizes of the model's modules alone, and hold no module.
    The memory keeps no model alive.
    """
    memory: WeakKeyDictionary[nn.Module, tuple[object, list[T]]] = WeakKeyDictionary()

    @wraps(read)
    def remembered(model: nn.Module) -> list[T]:
        now = _structure(model)
        if (last := memory.get(model)) is None or last[0] != now:
            memory[model] = last = now, read(model)
        return list(last[1])

    return remembered


def _structure(model: nn.Module) -> list[tuple[object, ...]]:
    """The structure of a model: the name, class, sizes and number of heads of each of its modules."""
    return [
        (
            name,
            type(module),
            *(getattr(module, size, None) for size in _SIZES),
            *(getattr(getattr(module, "config", None), heads, None) for heads in _HEADS),
        )
        for name, module in model.named_modules()
    ]
