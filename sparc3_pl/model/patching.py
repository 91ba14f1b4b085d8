"""Changes to a module that are put back when the block ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["as_forward", "swapped"]


@contextmanager
def swapped(owner: object, name: str, new: object) -> Iterator[None]:
    """Give ``owner`` another attribute ``name`` until the block ends, an exception included."""
    own, old = name in vars(owner), getattr(owner, name)
    setattr(owner, name, new)
    try:
        yield
    finally:
        setattr(owner, name, old) if own else delattr(owner, name)


def as_forward(function: Callable[..., Any], model: nn.Module, *args: Tensor | None) -> Any:
    """``function(model, *args)``, called as the model's own forward pass, with whatever hooks the model has.

    The hooks of a sharded model put together the weights outside its decoder layers. They look for tensors in what the
    function returns: it must be a tensor, or tuples and dictionaries of tensors.
    """
    with swapped(model, "forward", partial(function, model)):
        return model(*args)
