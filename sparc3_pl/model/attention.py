"""Puts a function of ours around the attention of single modules, whatever implementation they use."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from sparc3_pl.model.patching import swapped

__all__ = ["AttentionFunction", "attention_modules", "has_soft_cap", "wrapped_attention"]


AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]
"""(module, query [B,H,T,D], key, value, mask, **kwargs) -> (output [B,T,H,D], attention weights or None)."""


_NAME = "sparc3"  # in transformers' registry

_SLOT = "_sparc3_attention"  # on a module's copy of its config


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of ``model`` that call the attention registry, by name."""
    codes = ((name, module, getattr(_forward(module), "__code__", None)) for name, module in model.named_modules())
    return {name: module for name, module, code in codes if code and "ALL_ATTENTION_FUNCTIONS" in code.co_names}


def has_soft_cap(module: nn.Module) -> bool:
    """Whether an attention module caps its scores softly before the softmax, as Gemma 2 does.

    Gemma 3 keeps a cap in its config and uses none: the cap is passed on to the attention function, or it is not.
    """
    names = (name for names in _forward(module).__code__.co_consts if isinstance(names, tuple) for name in names)
    return getattr(module.config, "attn_logit_softcapping", None) is not None and "softcap" in names


def base_function(module: nn.Module) -> AttentionFunction:
    """The attention function that ``module`` uses as it stands."""
    names = _forward(module).__globals__
    registry = names["ALL_ATTENTION_FUNCTIONS"]
    if module.config._attn_implementation == _NAME:
        return getattr(module.config, _SLOT)
    return registry.get_interface(module.config._attn_implementation, names.get("eager_attention_forward"))


@contextmanager
def wrapped_attention(module: nn.Module, wrap: Callable[[AttentionFunction], AttentionFunction]) -> Iterator[None]:
    """Until the block ends, ``module`` attends by ``wrap(its own function)``. Blocks can be nested."""
    _register()
    config = copy.copy(module.config)
    setattr(config, _SLOT, wrap(base_function(module)))
    config._attn_implementation_internal = _NAME  # the public setter would also write to shared sub-configs
    with swapped(module, "config", config):
        yield


def _forward(module: nn.Module) -> Callable[..., Any]:
    """The plain function behind the class's forward, decorators taken off."""
    return inspect.unwrap(type(module).forward)


@functools.cache
def _register() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(_NAME, _dispatch)


def _dispatch(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    return getattr(module.config, _SLOT)(module, *args, **kwargs)
