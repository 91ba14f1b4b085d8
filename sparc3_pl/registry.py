"""Finds an implementation by its short name, or a user's own by its class path.

Components, methods, targets, edits and measurements each have a registry. In YAML a built-in one is a word
(``method: lrp``), and anything else a class path, alone or with arguments::

    method:
      class_path: my_package.methods.Occlusion
      init_args: {width: 4}
"""

import difflib
import importlib
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from sparc3_pl.errors import InputError

__all__ = ["PLUGINS", "Choice", "Registry", "Spec"]

T = TypeVar("T")
Spec = str | dict[str, Any]
"""A short name, a class path, or ``{"class_path": ..., "init_args": {...}}``."""

PLUGINS = "SPARC3_PLUGINS"
"""Environment variable: modules, separated by commas, whose classes a file may name."""


@dataclass(frozen=True)
class Choice(Generic[T]):
    """An implementation that the user chose.

    Attributes:
        object: The implementation.
        name: How files name it: the short name of a built-in class, the class path of any other.
        arguments: Its arguments.
    """

    object: T
    name: str
    arguments: dict[str, Any] = field(default_factory=dict)


class Registry(Generic[T]):
    """The implementations of one idea.

    Args:
        kind: The idea in error messages, in the singular: ``method``.
        base: The class that all of them extend.
        builtin: Class path by short name. Modules are imported when one of their classes is asked for.
    """

    def __init__(self, kind: str, base: type[T], builtin: Mapping[str, str]) -> None:
        self.kind, self.base, self._paths = kind, base, dict(builtin)

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def make(self, spec: Spec | T) -> T:
        """The implementation that ``spec`` names; an instance is returned as it is.

        Raises:
            InputError: if there is no such class, it is of another kind, or its arguments do not fit.
        """
        if isinstance(spec, self.base):
            return spec
        path, arguments = _split(self.kind, spec)
        kind = self._class(path)
        try:
            return kind(**arguments)
        except TypeError as error:
            raise InputError(f"{self.kind}={path}: its arguments do not fit ({error}); see its documentation") from None

    def class_of(self, spec: Spec | T) -> type[T]:
        """The class that ``spec`` names; its arguments are not looked at.

        Raises:
            InputError: if there is no such class, or it is of another kind.
        """
        return type(spec) if isinstance(spec, self.base) else self._class(_split(self.kind, spec)[0])

    def choose(self, spec: Spec | T) -> Choice[T]:
        """The implementation that ``spec`` names, with the name and arguments that files give it.

        Raises:
            InputError: as ``make``.
        """
        implementation = self.make(spec)
        return Choice(implementation, self.name_of(implementation), self.arguments_of(spec))

    def arguments_of(self, spec: Spec | T) -> dict[str, Any]:
        """The arguments that ``spec`` gives; none for an instance.

        Raises:
            InputError: if ``spec`` is neither a name nor a mapping of a class path and arguments.
        """
        return {} if isinstance(spec, self.base) else _split(self.kind, spec)[1]

    def with_arguments(self, spec: Spec, more: Mapping[str, Any]) -> Spec:
        """``spec`` with more arguments, which take the place of its own of the same name.

        Raises:
            InputError: as ``arguments_of``.
        """
        path, arguments = _split(self.kind, spec)
        return {"class_path": path, "init_args": arguments | dict(more)}

    def from_file(self, name: str, arguments: Mapping[str, Any] | None = None) -> T:
        """The implementation that a score folder, plan or result names.

        A file must not make this program import whatever it likes: a class path counts only if its module was
        imported by the user's own doing, or is listed in the environment variable ``SPARC3_PLUGINS``.

        Raises:
            InputError: as ``make``, and for a class path whose module the user did not name.
        """
        module = name.rpartition(".")[0]
        plugins = [item.strip() for item in os.environ.get(PLUGINS, "").split(",")]
        if name not in self._paths and module and module not in sys.modules and module not in plugins:
            raise InputError(
                f"{self.kind}={name!r} is a class of your own; allow its module to be imported: {PLUGINS}={module}"
            )
        return self.make({"class_path": name, "init_args": dict(arguments or {})})

    def name_of(self, implementation: T) -> str:
        """The name of an implementation in files: a built-in class's short name, any other's class path."""
        kind = type(implementation)
        path = f"{kind.__module__}.{kind.__qualname__}"
        return next((name for name, other in self._paths.items() if other == path), path)

    def _class(self, path: str) -> type[T]:
        module, _, name = self._paths.get(path, path).rpartition(".")
        if not module:
            near = difflib.get_close_matches(path, self._paths, n=1, cutoff=0.6)
            hint = f"did you mean {near[0]}? " if near else ""
            names = f"known are {', '.join(self)}, or " if self._paths else ""
            raise InputError(f"{self.kind}={path!r} is unknown; {hint}{names}give a class path")
        try:
            kind = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise InputError(f"{self.kind}={path!r}: there is no such class ({error}); check the class path") from None
        if not (isinstance(kind, type) and issubclass(kind, self.base)):
            raise InputError(f"{self.kind}={path!r} is not a {self.base.__name__}; derive it from that class")
        return kind


def _split(kind: str, spec: Spec) -> tuple[str, dict[str, Any]]:
    if isinstance(spec, str):
        return spec, {}
    entries = dict(spec) if isinstance(spec, Mapping) else {}
    path, arguments = entries.get("class_path"), entries.get("init_args") or {}
    if not isinstance(path, str) or not isinstance(arguments, Mapping) or set(entries) - {"class_path", "init_args"}:
        raise InputError(f"{kind}={spec!r}: give a name, or class_path with init_args")
    return path, dict(arguments)
