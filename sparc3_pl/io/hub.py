"""Is the Hugging Face hub there? Asked once per process, briefly, before a library spends minutes on retries."""

from __future__ import annotations

import contextlib
import difflib
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from sparc3_pl.errors import InputError

__all__ = ["first_line", "hub_available", "hub_name", "local_path", "nearest_names", "offline"]

log = logging.getLogger(__name__)

# The whole budget is 30 s, of which imports on a busy machine take up to half.
PROBE_SECONDS = 6.0


def hub_name() -> str:
    """Address of the hub in use (``HF_ENDPOINT`` may name a mirror)."""
    from huggingface_hub import constants

    return constants.ENDPOINT


_ANSWERS: dict[str, bool] = {}  # by address: no hub is asked twice in a process


def hub_available(timeout: float = PROBE_SECONDS) -> bool:
    """Whether the hub answered within ``timeout`` seconds when it was first asked in this process.

    False at once in offline mode (``HF_HUB_OFFLINE=1``). The libraries retry an unreachable hub five times per file,
    and a connection that is swallowed rather than refused makes every try wait for its own timeout, once for each
    address of the host. A thread bounds all of that.
    """
    from huggingface_hub import is_offline_mode

    if is_offline_mode():
        return False
    address = hub_name()
    if address not in _ANSWERS:
        answers: list[bool] = []
        thread = threading.Thread(target=lambda: answers.append(_answers(timeout)), daemon=True)
        thread.start()
        thread.join(timeout)
        _ANSWERS[address] = bool(answers and answers[0])
    return _ANSWERS[address]


def _answers(timeout: float) -> bool:
    from huggingface_hub.utils import get_session

    try:
        return get_session().head(hub_name(), timeout=timeout).status_code < 500
    except Exception as error:  # whatever the HTTP client of the day raises, the answer to the question is no
        log.debug("%s does not answer: %s", hub_name(), type(error).__name__)
        return False


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Inside the block the Hugging Face libraries make no request: for local files, and for a hub that is not there.

    They ask for more than the file they were told to load, also for local ones, and each unanswered request takes
    seconds.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def local_path(name: str, key: str, suffixes: tuple[str, ...] = ()) -> Path | None:
    """The local file or folder that ``name`` means; None if it must be a hub name.

    Args:
        name: What the user wrote.
        key: The configuration key it stands under, for the message.
        suffixes: File name endings that no hub name has.

    Raises:
        InputError: If ``name`` is written like a path (starts with ``/``, ``.`` or ``~``, has more than one ``/``, or
            ends in one of ``suffixes``) and nothing is there, or nobody may look. A hub is never asked about such a
            name.
    """
    if not name or not name.strip():
        raise InputError(f"{key} is empty; give a hub name or a local path")
    try:
        path = Path(name).expanduser()
        exists, is_folder = path.exists(), path.is_dir()
    except OSError as error:  # a folder on the way without execute permission; a name that is too long
        raise InputError(
            f"{key}={name!r} cannot be looked up ({error.strerror}); give a path that can be read"
        ) from error
    except RuntimeError as error:  # ~nobody
        raise InputError(f"{key}={name!r}: {first_line(error)}; write the path out") from error
    if is_folder and not os.access(path, os.R_OK | os.X_OK):  # libraries would find it empty
        raise InputError(
            f"{key}={name!r}: its permissions do not let you list and enter the folder; allow both (chmod u+rx)"
        )
    if exists:
        return path
    looks_local = name[0] in "/.~" or "\\" in name or name.count("/") > 1 or name.lower().endswith(suffixes or ("\0",))
    if looks_local:
        raise InputError(f"{key}={name!r}: no such file or folder{nearest_names(path)}")
    return None


def nearest_names(path: Path) -> str:
    """``; nearest names in FOLDER: a, b`` for a path that does not exist, or what is known of its folder instead."""
    folder = path.parent
    if not folder.is_dir():
        return f"; the folder {str(folder)!r} does not exist either"
    try:
        names = [entry.name for entry in folder.iterdir()]
    except OSError as error:
        return f" in {str(folder)!r}, which cannot be listed ({error.strerror})"
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    return f"; nearest names in {str(folder)!r}: {', '.join(near)}" if near else f" in {str(folder)!r}"


def first_line(error: BaseException, limit: int = 200) -> str:
    """The first line of an error's text, for quoting in a one-line message."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0].strip()
    return text if len(text) <= limit else text[: limit - 3] + "..."
