"""``python -m sparc3_pl.cli``, and ``sparc3`` for short: the subcommands.

``score`` and ``eval`` run a Trainer and are driven by LightningCLI; the other commands are plain functions. Results go
to stdout, the log to stderr. Exit codes: 0 done, 2 the input is wrong (one line says what), 143 stopped by SIGTERM with
everything saved, 1 anything else.
"""

from __future__ import annotations

import difflib
import inspect
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

import docstring_parser
import yaml
from jsonargparse import set_dumper, set_loader
from jsonargparse._actions import _ActionConfigLoad
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from sparc3_pl.data.evaluation_data import EvaluationData
from sparc3_pl.data.reference import ReferenceData
from sparc3_pl.diagnosis.audit import audit
from sparc3_pl.diagnosis.doctor import doctor
from sparc3_pl.diagnosis.evidence import evidence
from sparc3_pl.diagnosis.overlap import overlap
from sparc3_pl.document.terminal import print_result, print_summary, unfailing_output
from sparc3_pl.evaluation.compare import compare
from sparc3_pl.evaluation.module import EvaluationModule
from sparc3_pl.experiment.run import run
from sparc3_pl.io.provenance import REDACTED, RedactingFilter, redacted
from sparc3_pl.io.yaml_format import dump_yaml, load_yaml
from sparc3_pl.pruning.callback import PruningCallback
from sparc3_pl.pruning.plan import PrunePlan
from sparc3_pl.report.command import report
from sparc3_pl.runtime.processes import supervised
from sparc3_pl.runtime.progress import ProgressBar
from sparc3_pl.runtime.run_config import RunConfig
from sparc3_pl.runtime.trainer import Trainer
from sparc3_pl.scoring.merge import merge
from sparc3_pl.scoring.module import ScoringModule
from sparc3_pl.scoring.monitor import ScoringMonitor
from sparc3_pl.selection.command import prune

__all__ = ["CLI", "main"]


def load_value(text: str) -> Any:
    """A value of the command line as jsonargparse wants it: a text that YAML takes for nothing (``#x``) is a text."""
    value = load_yaml(text)
    return text if value is None and text.strip() not in ("null", "Null", "NULL", "~", "") else value


set_loader("yaml", load_value, exceptions=(yaml.YAMLError,))
set_dumper("yaml", dump_yaml)


class Parser(LightningArgumentParser):
    """Says what is wrong in one line: the key, the file it stands in, and the nearest key for a misspelt one."""

    words: Sequence[str] = ()
    """The command line; set before any parser is made."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})  # half a key must not pass for a whole one

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Ends the program with exit code 2."""
        text = _shorter(" ".join(str(message).split()))
        named = [word for pair in NAMED.findall(text) for word in pair if word]
        files = "".join(f" (in {path})" for path in Parser.config_files() if _is_at_fault(path, named))
        sys.stderr.write(f"error: {redacted(text)}{files}{self._did_you_mean(named)} (see --help)\n")
        raise SystemExit(2)

    def parse_path(self, path: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """Reads a config file.

        Raises:
            TypeError: if it cannot be read, or is not UTF-8.
        """
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
        if left_out := next(_left_out(settings), None):
            raise TypeError(
                f'Parser key "{left_out}": {REDACTED} stands for a secret that was left out of the file; give it again'
            )
        return self._apply_actions(settings, prev_cfg=prev_cfg)

    def validate(self, namespace: Any, *args: Any, **kwargs: Any) -> None:
        """As jsonargparse's, which takes null for every key.

        Raises:
            TypeError: if a value is not of its key's type.
        """
        super().validate(namespace, *args, **kwargs)
        for action in self._actions:
            kind = getattr(action, "_typehint", None)
            is_null = action.default is not None and action.dest in namespace and namespace[action.dest] is None
            if kind is not None and is_null and not _takes_null(kind):
                raise TypeError(f'Parser key "{action.dest}": is null; give a value of type {_type_name(kind)}')

    def _did_you_mean(self, named: Sequence[str]) -> str:
        commands = getattr(self, "_subcommands_action", None)
        parsers = [self, *(commands.choices[name] for name in named if commands and name in commands.choices)]
        keys = [action.dest for parser in parsers for action in parser._actions if action.dest not in (None, "help")]
        keys += list(commands.choices) if commands else []
        close = [
            key for word in named if word not in keys for key in difflib.get_close_matches(word, keys, n=1, cutoff=0.75)
        ]
        return f"; did you mean {close[0]}?" if close else ""

    @classmethod
    def config_files(cls) -> list[Path]:
        """The files given with ``--config``."""
        pairs = zip(cls.words, [*cls.words[1:], ""], strict=False)
        given = [after if word == "--config" else word.removeprefix("--config=") for word, after in pairs
                 if word == "--config" or word.startswith("--config=")]  # fmt: skip
        return [Path(name) for name in given if os.path.isfile(name)]  # unlike a Path's, never raises


NAMED = re.compile(r"[\"'](?:--)?([\w.]+)[\"']|--([\w.]+)")
"""Keys and options in a message of the parser."""


def _shorter(text: str) -> str:
    """The parser's own words, less of them."""
    if found := re.match(r'Parser key "([\w.]+)":.*Expected a dot import path string: (\S+)', text):
        return f"{found[1]}={found[2]!r}: there is no such class; give one of the built-in ones or an import path"
    return text if len(text) <= 400 else f"{text[:397]}..."


def _left_out(settings: Any, path: str = "") -> Iterator[str]:
    """Dotted keys of secrets that ``redacted`` took out of a config file."""
    items = settings.items() if isinstance(settings, dict) else enumerate(settings)
    for key, value in items:
        where = f"{path}.{key}" if path else str(key)
        if isinstance(value, dict | list):
            yield from _left_out(value, where)
        elif isinstance(value, str) and (value == REDACTED or f"://{REDACTED}@" in value):
            yield where


def _takes_null(kind: Any) -> bool:
    return kind in (Any, None, NoneType) or any(_takes_null(part) for part in get_args(kind) if _is_union(kind))


def _is_union(kind: Any) -> bool:
    return get_origin(kind) in (Union, UnionType)


def _type_name(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind).replace("typing.", "")


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


@dataclass(frozen=True)
class Pass:
    """A subcommand that runs the Trainer: its module, its data, and its callbacks."""

    module: type
    data: type
    callbacks: Sequence[type] = ()
    shortcuts: Sequence[str] = ("output", "overwrite")
    """Arguments of the module that may also be given without the ``model.`` prefix."""
    plan: bool = False
    """Whether ``--plan`` prunes the model for the length of the pass."""


PASSES = {
    "score": Pass(
        ScoringModule,
        ReferenceData,
        (ProgressBar, ScoringMonitor),
        ("output", "overwrite", "checkpoint_every", "part", "shard"),
    ),
    "eval": Pass(EvaluationModule, EvaluationData, (ProgressBar,), ("output", "overwrite", "allow_overlap"), plan=True),
}


COMMANDS: dict[str, Callable[..., Any]] = {
    "prune": prune,
    "compare": compare,
    "run": run,
    "audit": audit,
    "evidence": evidence,
    "doctor": doctor,
    "overlap": overlap,
    "report": report,
    "merge": merge,
}
"""Subcommands without a Trainer: functions whose arguments and docstring make their ``--help``."""


def add_function(parser: LightningArgumentParser, function: Callable[..., Any]) -> None:
    """Adds a function's arguments as options.

    Lists of strings take several words (those of ``folders`` without the option's name), and ``--overwrite`` alone
    means true; everything else is jsonargparse's own doing.
    """
    hints = get_type_hints(function)
    texts = argument_texts(function)
    ours = []
    for name, parameter in inspect.signature(function).parameters.items():
        required = parameter.default is inspect.Parameter.empty
        options: dict[str, Any] = {"help": texts.get(name), "default": None if required else parameter.default}
        if name == "folders":
            parser.add_argument(name, nargs="+", type=str, metavar="DIR", help=texts.get(name))
        elif hints[name] in (list[str], list[str] | None):
            parser.add_argument(f"--{name}", nargs="+", type=str, required=required, **options)
        elif hints[name] is bool:
            parser.add_argument(f"--{name}", type=bool, **FLAG, **options)
        else:
            continue
        ours.append(name)
    parser.add_function_arguments(function, as_positional=False, skip=set(ours))


def argument_texts(documented: Any) -> dict[str, str]:
    """What the docstring says of each argument, in one line."""
    found = docstring_parser.parse(documented.__doc__ or "").params
    return {item.arg_name: " ".join((item.description or "").split()) for item in found}


FLAG = {"nargs": "?", "const": True}
"""``--flag`` alone means true."""


class CLI(LightningCLI):
    """LightningCLI with a module and data of its own for every pass, and plain functions beside them."""

    def __init__(self, *, args: Sequence[str] | None = None, **kwargs: Any) -> None:
        Parser.words = list(sys.argv[1:] if args is None else args)
        super().__init__(args=args, **kwargs)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The Trainer's verbs and the arguments that do not come from the user."""
        return {name: {"model", "datamodule"} for name in PASSES}

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        super()._add_subcommands(parser, **kwargs)
        for name, function in COMMANDS.items():
            description = (function.__doc__ or "").partition("\n")[0]
            command = self.init_parser(description=description)
            if _is_asked_for(name):
                add_function(command, function)
            self._subcommand_parsers[name] = command
            parser._subcommands_action.add_subcommand(name, command, help=description)

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        if not _is_asked_for(subcommand):
            return self.init_parser(**kwargs)
        self._use(PASSES[subcommand])
        return super()._prepare_subcommand_parser(klass, subcommand, **kwargs)

    def _use(self, chosen: Pass) -> None:
        """LightningCLI knows one module class and one data class; they are set before it looks at them."""
        self.model_class = self._model_class = chosen.module
        self.datamodule_class = self._datamodule_class = chosen.data
        self.subclass_mode_model = self.subclass_mode_data = False  # no class_path in the user's YAML
        self._shortcuts, self._takes_plan = chosen.shortcuts, chosen.plan

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """No ``seed_everything``: every random choice here has a seed of its own."""

    def _set_seed(self) -> None:
        pass

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """As LightningCLI's, without its warning about arguments that come from a caller."""
        self.config = parser.parse_args(args)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Lets ``--output`` stand for ``--model.output``, and so on."""
        hints = get_type_hints(self._model_class.__init__)
        texts = argument_texts(self._model_class)
        for name in self._shortcuts:
            default = inspect.signature(self._model_class).parameters[name].default
            flag = FLAG if hints[name] is bool else {}
            parser.add_argument(f"--{name}", type=hints[name], default=default, help=texts[name], **flag)
            parser.link_arguments(name, f"model.{name}")
        if self._takes_plan:
            parser.add_argument("--plan", type=str | None, default=None, help="Plan to apply before measuring.")

    def instantiate_classes(self) -> None:
        """Makes the classes of the chosen pass; a plain command has none."""
        if self.subcommand in COMMANDS:
            return
        chosen = PASSES[self.subcommand]
        self._use(chosen)
        callbacks = [callback for callback in chosen.callbacks if callback is not ProgressBar or self._wants_bar()]
        self.trainer_defaults = {"callbacks": [callback() for callback in callbacks]}
        path = self.config[self.subcommand].get("plan")
        if path is not None:
            self.trainer_defaults["callbacks"].append(PruningCallback(PrunePlan.load(path)))
        self.trainer_defaults["callbacks"].append(RunConfig(self._resolved_config()))
        super().instantiate_classes()

    def _resolved_config(self) -> str:
        """The configuration as YAML, without its secrets, which are named in the first lines."""
        text = self._parser(self.subcommand).dump(self.config[self.subcommand], skip_unset=False)
        settings = redacted(load_yaml(text))
        missing = list(_left_out(settings))
        note = "# Secrets are left out; before this file runs it again, give: " + ", ".join(missing) + "\n"
        return (note if missing else "") + dump_yaml(settings)

    def _wants_bar(self) -> bool:
        return self.config[self.subcommand].trainer.enable_progress_bar

    def _run_subcommand(self, subcommand: str) -> None:
        if subcommand in COMMANDS:
            arguments = self.config[subcommand].as_dict()
            arguments.pop("config", None)
            COMMANDS[subcommand](**arguments)
        else:
            super()._run_subcommand(subcommand)

    def after_score(self) -> None:
        """Says on stdout where the scores are, and what they look like."""
        if self.model.manifest is not None:
            print_summary(self.model.manifest, Path(self.model.output))
        elif self.model.part is not None and self.model.output is not None:
            print_result(self.model.output)


def _is_asked_for(command: str) -> bool:
    """Whether the command line needs the options of ``command``; to look up those of all commands takes its time."""
    first = next(iter(Parser.words), None)
    return first == command or first not in {*PASSES, *COMMANDS}


def execute(args: Sequence[str] | None = None) -> None:
    """Runs one command in this process; ``args`` stand for ``sys.argv[1:]``.

    Raises:
        InputError: If what the user gave is wrong.
        SystemExit: If the arguments cannot be parsed, or ask for ``--help``.
    """
    CLI(
        trainer_class=Trainer,
        parser_class=Parser,
        parser_kwargs={"description": "Attribution-guided pruning of language models.", "prog": "sparc3"},
        save_config_callback=None,
        auto_configure_optimizers=False,
        args=args,
    )


def main(args: Sequence[str] | None = None) -> int:
    """The command line.

    Returns:
        The exit code.
    """
    with unfailing_output():
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
        for handler in logging.getLogger().handlers:
            handler.addFilter(REDACTING)
        for name in ("lightning.pytorch", "lightning.fabric"):
            logging.getLogger(name).setLevel(logging.WARNING)
        for noise in NOISE:
            warnings.filterwarnings("ignore", message=noise)
        if os.environ.get("LOCAL_RANK", "0") != "0":  # rank 0 speaks for all
            logging.getLogger().setLevel(logging.ERROR)
            warnings.simplefilter("ignore")
        return supervised(partial(execute, args))


REDACTING = RedactingFilter()
"""One object, so that a handler that has it already is not given it twice."""

NOISE = (
    ".*does not have many workers.*",
    ".*isinstance.treespec, LeafSpec.*",
    "predict returned None.*",
    "Total length of `DataLoader` across ranks is zero.*",
    "FSDP2-wrapped module .* returned a view tensor.*",  # OPT's layers do; nothing writes to them in place
)
"""Warnings of libraries about what is meant to be so."""


if __name__ == "__main__":
    sys.exit(main())
