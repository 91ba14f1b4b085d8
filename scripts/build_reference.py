"""Write docs/reference.md from the program itself: its parsers, docstrings and configs.

``python scripts/build_reference.py`` after a change to a command, a key or a docstring; a test compares the two.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from jsonargparse import Namespace

from sparc3_pl.cli import COMMANDS, PASSES
from sparc3_pl.evaluation.judges import ClassifierJudge, DetoxifyJudge
from sparc3_pl.evaluation.words import WordsJudge
from sparc3_pl.passes.parser import argument_texts, function_parser
from sparc3_pl.passes.run import PassCLI
from sparc3_pl.pruning.plan import PrunePlan
from sparc3_pl.runtime.trainer import Trainer
from sparc3_pl.scores.manifest import LayerStats, Manifest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reference.md"

INTRODUCTION = """\
# Reference of commands and keys

This page is made from the program by `python scripts/build_reference.py`. Do not edit it.

`sparc3 COMMAND` is short for `python -m sparc3_pl.cli COMMAND`. Every command takes `--help`, `--print_config` (prints
what all settings add up to, and does nothing else) and `--config FILE.yaml`. `--config` may be given several times.
Settings are applied in the order in which they stand: a later file, or a later option, wins over an earlier one. A key
`model.dtype` is `--model.dtype` on the command line, and `dtype:` under `model:` in YAML. `null` means that a setting
is not set.

The result goes to stdout, the log to stderr.

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | failed; the traceback says where |
| 2 | the input is wrong; one line says what, which value, and how to fix it |
| 130, 143 | Ctrl-C or SIGTERM; `run`, `elicit`, `eval` and, with `checkpoint_every`, `score` resume if restarted |
"""

OWN = ("help", "config", "print_config")
"""Options of every command."""


class _ParserOnly(PassCLI):
    """The parser of a pass as it is built; nothing is parsed or made with it."""

    def parse_arguments(self, parser: Any, args: Any) -> None:
        self.config = Namespace()

    def before_instantiate_classes(self) -> None:
        pass

    def instantiate_classes(self) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=PAGE, help="the page to write (docs/reference.md)")
    path = parser.parse_args().output
    path.write_text(reference(), encoding="utf-8")
    print(path)


def reference() -> str:
    """The whole page."""
    parsers = command_parsers()
    contents = ", ".join(f"[{name}](#{name})" for name in parsers)
    parts = [INTRODUCTION, f"Commands: {contents}. Then: {_CONTENTS}.\n"]
    parts += [command_section(name, parser) for name, parser in parsers.items()]
    parts += [trainer_section(parsers["score"]), judge_section(), config_section(), file_section()]
    return "\n".join(parts)


_CONTENTS = "[keys of trainer](#keys-of-trainer), [judges](#judges), [configs](#configs), [files](#files)"


def command_parsers() -> dict[str, Any]:
    """Every command's parser, in the order of ``--help``."""
    passes = {name: _ParserOnly(name, []).parser for name in PASSES}
    return passes | {
        name: function_parser(command.function(name), f"sparc3 {name}") for name, command in COMMANDS.items()
    }


# --- commands ---------------------------------------------------------------------------------------------------------


def command_section(name: str, parser: Any) -> str:
    """A command: what it does, and a table of its options."""
    lines = [f"## {name}", "", *_about(name, parser), ""]
    options = list(_options(parser))
    if name in PASSES:
        plain = [option for option in options if "." not in option.dest]
        lines += [*_table(plain), "", "Keys of `model`:", "", *_table(_under(options, "model")), ""]
        lines += ["Keys of `data`:", "", *_table(_under(options, "data")), ""]
        lines += ["The keys of `trainer` are [the same for both passes](#keys-of-trainer).", ""]
    else:
        lines += [*_table(options), ""]
    return "\n".join(lines)


def trainer_section(parser: Any) -> str:
    """The Trainer's keys, which ``score`` and ``eval`` share."""
    table = _table(_under(_options(parser), "trainer"))
    return "\n".join(["## Keys of trainer", "", _prose(Trainer), "", *table, ""])


def _about(name: str, parser: Any) -> list[str]:
    """Summary and, where there is one, the paragraph below it."""
    paragraphs = [parser.description] if name in PASSES else _paragraphs(COMMANDS[name].function(name))
    return "\n\n".join(paragraphs).splitlines()


def _paragraphs(documented: Any) -> list[str]:
    """The docstring's prose before its first section."""
    text = re.split(r"\n\s*(?:Args|Attributes|Raises|Returns):\n", inspect.getdoc(documented) or "")[0]
    return [_markdown(part) for part in text.strip().split("\n\n")]


def _prose(documented: Any) -> str:
    return "\n\n".join(_paragraphs(documented))


def _options(parser: Any) -> Iterator[Any]:
    """What a user can set. Links between keys and helpers about classes are not."""
    for action in parser._actions:
        kind = type(action).__name__
        if action.dest not in OWN and kind not in ("ActionLink", "_ActionHelpClassPath", "_ActionConfigLoad"):
            yield action


def _under(options: Iterable[Any], prefix: str) -> list[Any]:
    return [option for option in options if option.dest.startswith(f"{prefix}.")]


# --- tables -----------------------------------------------------------------------------------------------------------


def _table(options: Iterable[Any]) -> list[str]:
    rows = [_row(option) for option in options]
    return ["| key | type | default | meaning |", "|---|---|---|---|", *rows]


def _row(option: Any) -> str:
    name = option.dest if not option.option_strings or "." in option.dest else f"--{option.dest}"
    kind = _type_text(getattr(option, "_typehint", None) or option.type)
    kind = "several words" if option.nargs == "+" else kind
    default = "required" if option.required else _value(option.default)
    return "| " + " | ".join(map(_cell, (f"`{name}`", kind, default, _markdown(option.help or "")))) + " |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _markdown(text: str) -> str:
    """One line, with Markdown's single quotes of code instead of reStructuredText's double ones."""
    return " ".join(text.split()).replace("``", "`")


def _value(value: Any) -> str:
    return "" if value is None else f"`{json.dumps(value)}`".replace('"', "")


_NAMES = {str: "text", int: "whole number", float: "number", bool: "true or false", type(None): "null", Path: "text"}


def _type_text(hint: Any) -> str:
    """A type in words, the same on every version of Python."""
    if get_origin(hint) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(hint))
    if get_origin(hint) in (Union, types.UnionType):
        parts = dict.fromkeys(_type_text(part) for part in get_args(hint) if part is not type(None))
        return " or ".join(parts) + (" or null" if type(None) in get_args(hint) else "")
    if get_origin(hint) is list:
        return f"list ({_type_text(get_args(hint)[0])})"
    if get_origin(hint) is dict:
        return "mapping"
    return _NAMES.get(hint, "class" if inspect.isclass(hint) else "any")


# --- judges, configs, files -------------------------------------------------------------------------------------------


def judge_section() -> str:
    """The judges that ``model.judge`` can name."""
    lines = [
        "## Judges",
        "",
        "`model.judge` of `eval`, and each of `model.judges`, is a `class_path` with its `init_args`.",
        "",
    ]
    for judge in (DetoxifyJudge, ClassifierJudge, WordsJudge):
        lines += [f"### {judge.__name__}", "", f"`{judge.__module__}.{judge.__name__}`", "", _prose(judge), ""]
        lines += [*_described(judge, "init_args"), ""]
    return "\n".join(lines)


def config_section() -> str:
    """The YAML files that come with the program, with the comment that each begins with."""
    lines = ["## Configs", "", "| file | what |", "|---|---|"]
    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        comment = []
        for line in path.read_text(encoding="utf-8").splitlines():
            if not line.startswith("#"):
                break
            comment.append(line.removeprefix("#").strip())
        lines.append(f"| `{path.relative_to(ROOT)}` | {_cell(' '.join(comment))} |")
    return "\n".join([*lines, ""])


def file_section() -> str:
    """What the files that commands exchange hold."""
    lines = ["## Files", ""]
    for title, documented in (
        ("Score folder: `manifest.json`", Manifest),
        ("A layer in `manifest.json`", LayerStats),
        ("Plan", PrunePlan),
    ):
        lines += [f"### {title}", "", _prose(documented), "", *_described(documented, "key"), ""]
    return "\n".join(lines)


def _described(documented: Any, heading: str) -> list[str]:
    rows = [f"| `{name}` | {_cell(_markdown(text))} |" for name, text in argument_texts(documented).items()]
    return [f"| {heading} | meaning |", "|---|---|", *rows]


if __name__ == "__main__":
    main()
