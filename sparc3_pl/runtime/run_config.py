"""The resolved configuration of a Trainer's run, for modules that store it beside their results."""

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

__all__ = ["RunConfig", "resolved_config"]


class RunConfig(Callback):
    """Carries the configuration through the Trainer; the command line adds one.

    Args:
        text: The configuration as YAML, without secrets.
    """

    def __init__(self, text: str) -> None:
        self.text = text


def resolved_config(trainer: pl.Trainer) -> str | None:
    """The configuration of the Trainer's run as YAML; None for a Trainer that was made in Python."""
    return next((callback.text for callback in trainer.callbacks if isinstance(callback, RunConfig)), None)
