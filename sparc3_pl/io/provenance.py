"""What a result must carry to be made again: versions, hardware, command, date."""

import functools
import importlib.metadata
import json
import logging
import os
import platform
import re
import shlex
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from sparc3_pl import __version__

__all__ = [
    "REDACTED",
    "RedactingFilter",
    "command_line",
    "hardware",
    "is_secret_name",
    "now",
    "redacted",
    "redacted_command",
    "versions",
]

_PACKAGES = ("torch", "lightning", "transformers", "datasets", "torchmetrics", "safetensors")
REDACTED = "***"
"""What stands for a secret that was left out."""

_SECRET_NAME = re.compile(
    r".*(?:token|secrets?|pass(?:word|wd|phrase)s?|credentials?|authorization)"
    r"|(?:.*_)?(?:(?:api|access|private|auth|subscription)_?keys?|(?:hf|hub|api|auth|access)_?tokens|auth|bearer"
    r"|cookies?|pwd)"
    r"|.*secret_key"
)
_NO_SECRET = re.compile(
    r"(?:.*_)?(?:bos|eos|pad|unk|sep|cls|mask|first|last|next|new|special|target|start|end|stop|num|max|min|per)_token"
)
"""Tokens of a text, not of an account."""
_NAMED = re.compile(
    r"(?<![\w.\-])(?P<name>-{0,2}[A-Za-z_][\w.\-]*)"
    r"(?:(?P<assigned>[\"']?\s*=(?!=)\s*|[\"']\s*:\s*)|(?P<colon>:[ \t]+)|(?P<blank>[ \t]+))(?=\S)"
)
_VALUE = re.compile(r"\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'|(?:(?i:bearer|basic)\s+)?[^\s,;&'\"{}\[\]()]+")
_FORMS = re.compile(
    r"\bhf_(?=[a-z]*[A-Z0-9])[A-Za-z0-9]{10,}"  # the hub's own form; not a folder called hf_models
    r"|\bsk-[A-Za-z0-9_\-]{16,}|\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}|\bglpat-[\w\-]{16,}"
    r"|\bAKIA[A-Z0-9]{16}\b"
    r"|(?<=://)[^/\s'\"]+(?=@)"  # https://user:password@host
    r"|(?i:(?<=[?&]sig=)|(?<=signature=)|(?<=bearer ))[^\s&'\"]+"
)


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that shape a number; a package that is not there is left out."""
    result = {"python": platform.python_version(), "sparc3_pl": __version__}
    for name in _PACKAGES:
        try:
            result[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return result


def hardware() -> str:
    """This machine's processor, the number of its cores, and its GPUs."""
    import torch

    gpus = Counter(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    parts = [f"{os.cpu_count()} x {_processor()}", *(f"{count} x {name}" for name, count in gpus.items())]
    return ", ".join(parts)


def _processor() -> str:
    """The processor's name where the system tells it, else its architecture."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names and names[0] else platform.machine()


@functools.cache
def is_secret_name(name: str) -> bool:
    """Whether the value of a key, an option or a variable of this name must not be shown.

    ``api_key``, ``HF_TOKEN``, ``model.judge.init_args.apiKey`` and ``X-Auth-Token`` are such names; ``tokenizer``,
    ``max_new_tokens`` and ``bos_token`` are not.
    """
    last = name.rsplit(".", 1)[-1]
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", last).replace("-", "_").strip("_").lower()
    return _SECRET_NAME.fullmatch(words) is not None and _NO_SECRET.fullmatch(words) is None


def redacted(value: Any) -> Any:
    """``value`` without secrets: a text, or JSON data of any depth.

    What stands under the name of a secret (``is_secret_name``) becomes ``***``, whatever it looks like. So do, within
    any text, values that follow such a name, known forms of tokens, passwords in addresses, and the values of the
    environment's secret variables. Floats, booleans and null hold no secret and stay.
    """
    if isinstance(value, str):
        return _redacted_text(value)
    if isinstance(value, Mapping):
        return {
            key: _left_out(item) if isinstance(key, str) and is_secret_name(key) else redacted(item)
            for key, item in value.items()
        }
    return [redacted(item) for item in value] if isinstance(value, list | tuple) else value


def _left_out(value: Any) -> Any:
    """``value`` with every text and whole number in it replaced."""
    if isinstance(value, Mapping):
        return {key: _left_out(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_left_out(item) for item in value]
    return REDACTED if isinstance(value, str | int) and not isinstance(value, bool) and value != "" else value


def _redacted_text(text: str) -> str:
    for name, value in os.environ.items():
        if len(value) >= 6 and is_secret_name(name) and name != "PWD":  # the working folder
            text = text.replace(value, REDACTED)
    return _FORMS.sub(REDACTED, _without_assigned(text))


def _without_assigned(text: str) -> str:
    """``text`` without what follows a secret's name: ``name=value``, ``name: value``, ``--name value``."""
    parts, start = [], 0
    while match := _NAMED.search(text, start):
        parts.append(text[start : match.end()])
        start = match.end()
        assigned = match["assigned"] or (match["colon"] and match["name"] != "token")  # "the next token: ..."
        if (assigned or match["name"].startswith("--")) and is_secret_name(match["name"]):
            value = _VALUE.match(text, start)
            if value and not (match["blank"] and value[0].startswith("--")):  # the next option
                quote = value[0][0] if value[0][0] in "\"'" else ""
                parts.append(f"{quote}{REDACTED}{quote}")
                start = value.end()
    return "".join(parts) + text[start:]


def redacted_command(words: Sequence[str]) -> str:
    """A command line as one would type it, without secrets.

    Besides what ``redacted`` leaves out, secrets are the word after ``--name``, and what stands under the name of a
    secret in a word that is YAML or JSON.
    """
    words_out, secret_follows = [], False
    for word in words:
        name, equals, value = word.partition("=")
        if secret_follows and not word.startswith("--"):
            word = REDACTED
        elif equals and is_secret_name(name):
            word = f"{name}={REDACTED}"
        elif equals and name.startswith("--"):
            word = f"{name}={_redacted_word(value)}"
        else:
            word = _redacted_word(word)
        secret_follows = word.startswith("--") and not equals and is_secret_name(word)
        words_out.append(word)
    return redacted(shlex.join(words_out))


def _redacted_word(word: str) -> str:
    """A word of a command line in which a mapping or a list may be written."""
    if not re.search(r"[{\[:]", word):
        return word
    try:
        value = yaml.safe_load(word)
    except (ValueError, yaml.YAMLError):
        return word
    if not isinstance(value, dict | list) or redacted(value) == value:
        return word
    return json.dumps(redacted(value), ensure_ascii=False, default=str)


class RedactingFilter(logging.Filter):
    """Takes access tokens out of log records."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Takes secrets out of the record, and lets it pass."""
        record.msg, record.args = redacted(record.getMessage()), ()
        return True


def command_line() -> str:
    """The command that this process was started with, without secrets."""
    return redacted_command([os.path.basename(sys.argv[0] or "python"), *sys.argv[1:]])


def now() -> str:
    """The time in UTC, to the second, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")
