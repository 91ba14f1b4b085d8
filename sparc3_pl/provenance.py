"""What a result must carry to be made again: versions, hardware, command, date."""

import importlib.metadata
import logging
import os
import platform
import re
import shlex
import sys
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sparc3_pl import __version__

__all__ = ["RedactingFilter", "command_line", "hardware", "now", "redacted", "redacted_values", "versions"]

_PACKAGES = ("torch", "lightning", "transformers", "datasets", "torchmetrics", "safetensors")
_SECRET = re.compile(
    r"\bhf_(?=[a-z]*[A-Z0-9])[A-Za-z0-9]{10,}"  # the hub's own form; not a folder called hf_models
    r"|(?<=://)[^/\s@'\"]+(?=@)"  # https://user:password@host
    r"|(?i:(?<=token=)|(?<=--token )|(?<=api_key=)|(?<=apikey=)|(?<=secret=)|(?<=password=)|(?<=bearer ))[^\s&'\"]+"
)
_SECRET_NAMES = ("TOKEN", "SECRET", "PASSWORD", "API_KEY", "ACCESS_KEY")


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that shape a number; a package that is not there is left out."""
    found = {"python": platform.python_version(), "sparc3_pl": __version__}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


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


def redacted(text: str) -> str:
    """``text`` without access tokens: known forms, and the values of the environment's token variables."""
    for name, value in os.environ.items():
        if name.upper().endswith(_SECRET_NAMES) and len(value) >= 6:
            text = text.replace(value, "***")
    return _SECRET.sub("***", text)


def redacted_values(value: Any) -> Any:
    """JSON data in which every string is ``redacted``."""
    if isinstance(value, str):
        return redacted(value)
    if isinstance(value, Mapping):
        return {key: redacted_values(item) for key, item in value.items()}
    return [redacted_values(item) for item in value] if isinstance(value, list | tuple) else value


class RedactingFilter(logging.Filter):
    """Takes access tokens out of log records."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Changes the record; lets it pass."""
        record.msg, record.args = redacted(record.getMessage()), ()
        return True


def command_line() -> str:
    """The command that this process was started with, without access tokens."""
    return redacted(shlex.join([os.path.basename(sys.argv[0] or "python"), *sys.argv[1:]]))


def now() -> str:
    """The time in UTC, to the second, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")
