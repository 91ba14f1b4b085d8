"""A saved model on the hub: its folder, card and plan included, in one commit."""

from __future__ import annotations

import logging
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from sparc3_pl.errors import InputError
from sparc3_pl.io.hub import first_line, hub_available, hub_name

if TYPE_CHECKING:
    from huggingface_hub import HfApi

__all__ = ["HubPlace"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HubPlace:
    """A model repository that may be written to.

    Attributes:
        name: ``ORG/NAME``.
        api: The hub's client, with the user's token.
    """

    name: str
    api: HfApi = field(repr=False)

    @classmethod
    def open(cls, name: str, overwrite: bool) -> HubPlace:
        """Checks what would otherwise fail after the model was saved. Writes nothing.

        A token is looked for where the hub's own tools keep it (``HF_TOKEN``, ``hf auth login``), and asked for on a
        terminal otherwise. It is kept nowhere.

        Args:
            name: ``ORG/NAME``.
            overwrite: Whether the repository may exist already.

        Raises:
            InputError: if the name is none, the hub cannot be reached or refuses, there is no token, or the repository
                exists.
        """
        from huggingface_hub import HfApi

        if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
            raise InputError(f"push_to_hub={name!r} is not ORG/NAME; give the name of a model repository on the hub")
        if not hub_available():
            raise InputError(
                f"push_to_hub={name!r}: the hub ({hub_name()}) cannot be reached; leave it out, and upload the folder "
                "of save_model from elsewhere"
            )
        place = cls(name, HfApi(token=_token(name)))
        try:
            exists = place.api.repo_exists(name)
        except Exception as error:  # whatever the HTTP client of the day raises
            reason = first_line(error)
            raise InputError(f"push_to_hub={name!r}: the hub refuses ({reason}); check name and token") from error
        if exists and not overwrite:
            raise InputError(
                f"push_to_hub={name!r}: already exists; give --overwrite to replace its model, or choose another name"
            )
        return place

    def push(self, folder: Path) -> str:
        """Uploads a folder that ``save_model`` has written. A new repository is private.

        Weights and JSON files that an earlier model has left there, and that the folder has not, are deleted; the
        hub's history keeps them.

        Returns:
            Where it is now.

        Raises:
            InputError: if the hub refuses it; the folder is still there.
        """
        try:
            self.api.create_repo(self.name, private=True, exist_ok=True)
            commit = self.api.upload_folder(
                repo_id=self.name,
                folder_path=folder,
                commit_message="Pruned by sparc3_pl",
                delete_patterns=["*.safetensors", "*.json"],
            )
        except Exception as error:  # as above
            raise InputError(
                f"push_to_hub={self.name!r}: the upload failed ({first_line(error)}); the model is saved in {folder}: "
                f"try `hf upload {self.name} {folder}`"
            ) from error
        log.info(
            "%s: plan.json and README.md say by which command and from which files the plan was made; read them before "
            "you make the repository public",
            self.name,
        )
        return str(commit.commit_url)


def _token(name: str) -> str:
    """The user's token.

    Raises:
        InputError: if there is none, and nobody to ask.
    """
    from getpass import getpass

    from huggingface_hub import get_token

    token = get_token()
    if not token and sys.stdin is not None and sys.stdin.isatty():
        token = getpass(f"Token of the hub with leave to write {name} (it is not shown, and kept nowhere): ").strip()
    if not token:
        raise InputError(
            f"push_to_hub={name!r}: there is no token; set HF_TOKEN to one that may write, or log in by `hf auth login`"
        )
    return token
