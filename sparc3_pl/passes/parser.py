"""Parsers that read YAML and options in one dialect, and say what is wrong in one line.

Knows jsonargparse only: commands without a Trainer import no Lightning before their own work needs it.
"""

from __future__ import annotations

import difflib
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

import docstring_parser
import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace, set_dumper, set_loader
from jsonargparse._actions import _ActionConfigLoad
from jsonargparse._link_arguments import ActionLink

from sparc3_pl.errors import InputError
from sparc3_pl.io.provenance import REDACTED, redacted
from sparc3_pl.io.yaml_format import dump_yaml, load_yaml

__all__ = ["FLAG", "FunctionParser", "OneLineErrors", "argument_texts", "function_parser", "secrets_left_out"]


def load_value(text: str) -> Any:
    """A value of the command line as jsonargparse wants it: a text that YAML takes for nothing (``#x``) is a text."""
    value = load_yaml(text)
    return text if value is None and text.strip() not in ("null", "Null", "NULL", "~", "") else value


set_loader("yaml", load_value, exceptions=(yaml.YAMLError,))
set_dumper("yaml", dump_yaml)

_files: ContextVar[list[Path] | None] = ContextVar("config files of the current parse", default=None)
"""The config files that were read so far: one list for a parser and for those that it makes of classes in the files."""


class OneLineErrors:
    """Mixed into a parser: says in one line which key is wrong, in which file, and what its nearest key is."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})  # disable argparse's prefix matching

    def parse_args(self, args: Sequence[str] | None = None, *more: Any, **kwargs: Any) -> Any:
        """Parses the words as jsonargparse does; an error names the config files that have to do with it."""
        token = _files.set([]) if _files.get() is None else None
        if args is not None:
            args = [self._without_section(word) for word in args]
        try:
            return super().parse_args(args, *more, **kwargs)
        finally:
            if token is not None:
                _files.reset(token)

    ends_program = True
    """Whether an error ends the program, with exit code 2; else it is an InputError."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Says what is wrong.

        Raises:
            SystemExit: if an error ends the program.
            InputError: if not.
        """
        text = _shorter(" ".join(str(message).split()))
        words = [word for pair in NAMED.findall(text) for word in pair if word]
        files = "".join(f" (in {path})" for path in _files.get() or () if _is_at_fault(path, words))
        said = f"{redacted(text)}{files}{self._did_you_mean(words)}"
        if not self.ends_program:
            raise InputError(said) from ex
        sys.stderr.write(f"error: {said} (see --help)\n")
        raise SystemExit(2)

    def parse_path(self, path: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """Reads a config file.

        Raises:
            TypeError: if it cannot be read, or is not UTF-8.
        """
        if (files := _files.get()) is not None and os.path.isfile(path):  # unlike a Path's, never raises
            files.append(Path(path))
        try:
            Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise TypeError(f"{path}: cannot be read ({error.strerror})") from error
        except UnicodeDecodeError as error:
            raise TypeError(f"{path}: is not UTF-8 (byte {error.start}); save it as UTF-8") from error
        return super().parse_path(path, *args, **kwargs)

    def _load_config_parser_mode(
        self, content: str, path: str | os.PathLike = "", ext_vars: dict | None = None, prev_cfg: Any = None
    ) -> Any:
        """Reads a config file's text; one without any key says nothing."""
        try:
            settings = load_yaml(content)
        except yaml.YAMLError as error:
            raise TypeError(f"Problems parsing config: {error}") from error
        settings = {} if settings is None else settings
        if not isinstance(settings, dict):
            raise TypeError(f"Unexpected config: holds a {type(settings).__name__}, not keys and their values")
        for section in (action.dest for action in self._actions if isinstance(action, _ActionConfigLoad)):
            if settings.get(section, "") is None:
                del settings[section]
            elif not isinstance(settings.get(section, {}), dict | str):
                raise TypeError(f'Parser key "{section}": holds {settings[section]!r}, not keys and their values')
        self._move_linked(settings)
        if left_out := next(secrets_left_out(settings), None):
            raise TypeError(
                f'Parser key "{left_out}": {REDACTED} stands for a secret that was left out of the file; give it again'
            )
        return self._apply_actions(settings, prev_cfg=prev_cfg)

    def validate(self, namespace: Any, *args: Any, **kwargs: Any) -> None:
        """Checks values as jsonargparse does, and refuses null for keys whose type does not hold it.

        Raises:
            TypeError: if a value is not of its key's type.
        """
        super().validate(namespace, *args, **kwargs)
        for action in self._actions:
            kind = getattr(action, "_typehint", None)
            is_null = action.default is not None and action.dest in namespace and namespace[action.dest] is None
            if kind is not None and is_null and not _takes_null(kind):
                is_class = isinstance(kind, type) and not get_args(kind)
                name = kind.__name__ if is_class else str(kind).replace("typing.", "")
                raise TypeError(f'Parser key "{action.dest}": is null; give a value of type {name}')

    def _linked(self) -> dict[str, str]:
        """The key that gives a linked key its value (``output``), by that linked key (``model.output``)."""
        return {action.dest: action.source[0][0] for action in self._actions if isinstance(action, ActionLink)}

    def _without_section(self, word: Any) -> Any:
        """The option ``--output`` for ``--model.output``: jsonargparse takes only the key that is linked from."""
        option, equals, value = word.partition("=") if isinstance(word, str) else ("", "", "")
        short = self._linked().get(option.removeprefix("--")) if option.startswith("--") else None
        return word if short is None else f"--{short}{equals}{value}"

    def _move_linked(self, settings: dict[str, Any]) -> None:
        """Moves the values of linked keys in a config file to the keys that they are linked from.

        jsonargparse would put the default of ``output`` over a given ``model.output``.

        Raises:
            TypeError: if both are given, and differ.
        """
        for key, short in self._linked().items():
            section, _, name = key.partition(".")
            inner = settings.get(section)
            if not isinstance(inner, dict) or name not in inner:
                continue
            value = inner.pop(name)
            if settings.setdefault(short, value) != value:
                raise TypeError(f'Parser key "{key}": is {value!r}, but {short} is {settings[short]!r}; give only one')

    def _require_known(self, settings: dict[str, Any], within: str = "") -> None:
        """Refuses unknown keys that hold nothing (``foo: {}``), which jsonargparse passes over.

        Raises:
            TypeError: for the first of them.
        """
        sections = {action.dest for action in self._actions if isinstance(action, _ActionConfigLoad)}
        keys = {action.dest for action in self._actions}
        for name, value in settings.items():
            key = f"{within}.{name}" if within else str(name)
            if not isinstance(value, dict) or (key in keys and key not in sections):
                continue
            if not value and key not in keys and not any(str(other).startswith(f"{key}.") for other in keys):
                raise TypeError(f"there is no key '{key}'")
            self._require_known(value, key)

    def _apply_actions(self, cfg: Any, parent_key: str = "", *args: Any, **kwargs: Any) -> Any:
        """Applies actions as jsonargparse does, once keys are known, also in a section that has a file of its own.

        Raises:
            TypeError: if such a file holds a key that another key gives, or there is an unknown key that holds nothing.
        """
        if isinstance(cfg, dict | Namespace):  # the latter holds the arguments of a class within a section
            self._require_known(cfg if isinstance(cfg, dict) else vars(cfg), parent_key)
        for key, short in self._linked().items() if isinstance(cfg, dict) else ():
            section, _, name = key.partition(".")
            if section == parent_key and name in cfg:
                raise TypeError(f'"{key}" is given as "{short}" where {section} has a file of its own')
        return super()._apply_actions(cfg, parent_key, *args, **kwargs)

    def _did_you_mean(self, named: Sequence[str]) -> str:
        keys = [action.dest for action in self._actions if action.dest not in (None, "help")]
        close = [
            key for word in named if word not in keys for key in difflib.get_close_matches(word, keys, n=1, cutoff=0.75)
        ]
        return f"; did you mean {close[0]}?" if close else ""


class FunctionParser(OneLineErrors, ArgumentParser):
    """Parser of a command that is a plain function.

    A key within a section of settings, as ``--completions.model.seed 1``, is set in what a config file says of the
    section; jsonargparse itself takes one level of such keys.
    """

    def parse_args(self, args: Sequence[str] | None = None, *more: Any, **kwargs: Any) -> Any:
        """Parses the words as ``OneLineErrors`` does, and sets the keys within sections."""
        words, inner = self._without_inner_keys(sys.argv[1:] if args is None else args)
        result = super().parse_args(words, *more, **kwargs)
        for (section, *path), value in inner:
            settings = result[section] = dict(result[section] or {})
            for name in path[:-1]:
                within = settings.get(name)
                settings[name] = dict(within) if isinstance(within, dict) else {}
                settings = settings[name]
            settings[path[-1]] = value
        return result

    def _apply_actions(self, cfg: Any, parent_key: str = "", *args: Any, **kwargs: Any) -> Any:
        """Applies actions as ``OneLineErrors`` does; one text for a list of them is that list, as it is among words.

        Raises:
            TypeError: if something else is given for a list.
        """
        for action in self._actions if isinstance(cfg, dict) and not parent_key else ():
            value = cfg.get(action.dest)
            if action.nargs == "+" and value is not None and not isinstance(value, list | tuple):
                if not isinstance(value, str | dict):
                    raise TypeError(f'Parser key "{action.dest}": Expected a list. Got value: {value}')
                cfg = {**cfg, action.dest: [value]}
        return super()._apply_actions(cfg, parent_key, *args, **kwargs)

    def _without_inner_keys(self, args: Sequence[str]) -> tuple[list[str], list[tuple[list[str], Any]]]:
        """The words without options two or more levels below a section, and the keys and values of those options."""
        kinds = {action.dest: getattr(action, "_typehint", None) for action in self._actions}
        sections = {name for name, kind in kinds.items() if dict in map(get_origin, (kind, *get_args(kind)))}
        words, inner, rest = [], [], list(args)
        while rest:
            word = rest.pop(0)
            option, has_value, text = word.partition("=")
            keys = option.removeprefix("--").split(".")
            if not option.startswith("--") or len(keys) < 3 or keys[0] not in sections or not all(keys):
                words.append(word)
                continue
            if not has_value and not rest:
                self.error(f"expected a value for {option}")
            value = text if has_value else rest.pop(0)
            try:
                inner.append((keys, load_yaml(value)))
            except yaml.YAMLError:
                self.error(f"{option}: {value!r} is no YAML; put it in quotes within quotes")
        return words, inner


NAMED = re.compile(r"[\"'](?:--)?([\w.]+)[\"']|--([\w.]+)")
"""Keys and options in a message of the parser."""


def _shorter(text: str) -> str:
    """The parser's message, shortened."""
    if place := re.match(r'Parser key "([\w.]+)":.*Expected a dot import path string: (\S+)', text):
        return f"{place[1]}={place[2]!r}: there is no such class; give one of the built-in ones or an import path"
    if place := re.match(r"Group '([\w.]+)' does not accept option '([\w.]+)'", text):
        return f"there is no key '{place[1]}.{place[2]}'"
    return text if len(text) <= 400 else f"{text[:397]}..."


def secrets_left_out(settings: Any, path: str = "") -> Iterator[str]:
    """Dotted keys of secrets that ``redacted`` took out of a config file."""
    items = settings.items() if isinstance(settings, dict) else enumerate(settings)
    for key, value in items:
        where = f"{path}.{key}" if path else str(key)
        if isinstance(value, dict | list):
            yield from secrets_left_out(value, where)
        elif isinstance(value, str) and (value == REDACTED or f"://{REDACTED}@" in value):
            yield where


def _takes_null(kind: Any) -> bool:
    return kind in (Any, None, NoneType) or any(_takes_null(part) for part in get_args(kind) if _is_union(kind))


def _is_union(kind: Any) -> bool:
    return get_origin(kind) in (Union, UnionType)


def _is_at_fault(path: Path, named: Sequence[str]) -> bool:
    """Whether a config file cannot be read as one, or holds one of the ``named`` keys."""
    try:
        content = load_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return True
    return not isinstance(content, dict | NoneType) or any(_holds(content, key) for key in named)


def _holds(content: Any, key: str) -> bool:
    """Whether ``key`` is in ``content``: a dotted one from the top, a word alone (a class's argument) at any depth."""
    if "." not in key:
        return isinstance(content, dict) and (key in content or any(_holds(part, key) for part in content.values()))
    for part in key.split("."):
        if not isinstance(content, dict) or part not in content:
            return False
        content = content[part]
    return True


def function_parser(function: Callable[..., Any], prog: str) -> FunctionParser:
    """A parser whose options are the arguments of ``function``, described by its docstring.

    Lists of texts take several words (those of ``folders`` without the option's name), and ``--overwrite`` alone
    means true. The types are resolved here: jsonargparse's own ``add_function_arguments`` would import what the
    function's module imports for type checkers only, transformers among it.
    """
    parser = FunctionParser(prog=prog, description=(function.__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "-c", "--config", action=ActionConfigFile, help="Path to a configuration file in json or yaml format."
    )
    hints, texts = get_type_hints(function), argument_texts(function)
    for name, parameter in inspect.signature(function).parameters.items():
        required = parameter.default is inspect.Parameter.empty
        options: dict[str, Any] = {"type": hints[name], "help": texts.get(name)}
        if (kind := _kind_of_words(hints[name])) is not None:
            options |= {"type": kind, "nargs": "+"}
        elif hints[name] is bool:
            options |= FLAG
        if name == "folders":
            parser.add_argument(name, metavar="DIR", **options)
        else:
            default = None if required else parameter.default
            parser.add_argument(f"--{name}", required=required, default=default, **options)
    return parser


def _kind_of_words(hint: Any) -> Any:
    """The type of one word, for a list that may hold texts; None for any other type hint."""
    kinds = [kind for kind in (get_args(hint) if _is_union(hint) else (hint,)) if kind is not NoneType]
    element = get_args(kinds[0])[0] if len(kinds) == 1 and get_origin(kinds[0]) is list else None
    return element if element is str or (_is_union(element) and str in get_args(element)) else None


def argument_texts(documented: Any) -> dict[str, str]:
    """What the docstring says of each argument, in one line."""
    params = docstring_parser.parse(documented.__doc__ or "").params
    return {param.arg_name: " ".join((param.description or "").split()) for param in params}


FLAG = {"nargs": "?", "const": True}
"""``--flag`` alone means true."""
