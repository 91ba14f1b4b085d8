"""What the modules of the passes have in common: a model, its encoder, and a place for the result."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import lightning.pytorch as pl

from sparc3_pl.data.encoding import Encoder, load_encoder
from sparc3_pl.io.files import FolderKind, check_output
from sparc3_pl.model.source import ModelSource
from sparc3_pl.runtime.run_log import run_folder
from sparc3_pl.runtime.trainer import check_placement, check_precision, is_sharded_run

if TYPE_CHECKING:
    import transformers  # its classes are not loaded where a parser reads the types of this file

__all__ = ["PassModule"]


class PassModule(pl.LightningModule):
    """A LightningModule that takes a model through a pass and writes what it has measured.

    Args:
        source: Where the model comes from.
        output: Where the result goes; None: a folder in the run's log folder.
        overwrite: Replace an earlier result in ``output``.
    """

    def __init__(self, source: ModelSource, output: str | None, overwrite: bool) -> None:
        super().__init__()
        self.source, self.output, self.overwrite = source, output, overwrite
        self.model: transformers.PreTrainedModel | None = None

    @cached_property
    def encoder(self) -> Encoder:
        """What turns texts into the model's token ids, loaded before the weights."""
        return load_encoder(self.source)

    @property
    def is_sharded(self) -> bool:
        """Whether each rank holds only its part of every weight, so that all must take part in every pass."""
        return self._trainer is not None and is_sharded_run(self._trainer)

    def setup(self, stage: str) -> None:
        """Checks what the Trainer would do to the model.

        Raises:
            InputError: if it would convert it, or move it from where it is put.
        """
        check_precision(self.trainer)
        check_placement(self.trainer, self.source.device_map)

    def hold(self, model: transformers.PreTrainedModel) -> None:
        """Takes the model, once it is loaded, as ``model``."""
        if self.source.device_map is None:
            self.model = model
        else:  # outside the module tree: nothing may move a model that is spread over devices
            self.__dict__["model"] = model

    def place(self, name: str, kind: FolderKind) -> str | None:
        """Where the result goes: to ``output`` or, where the user names no place, the folder ``name`` of this run.

        Every rank must ask. None: a trial run (``fast_dev_run``) keeps nothing.

        Raises:
            InputError: if it cannot be written, or holds something that may not be replaced.
        """
        folder = run_folder(self.trainer)  # on every rank
        output = str(folder / name) if self.output is None and folder is not None else self.output
        if output is not None and self.trainer.is_global_zero:
            check_output(output, self.overwrite, kind)
        return output
