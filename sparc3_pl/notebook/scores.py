"""Scores as a notebook holds them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

from sparc3_pl.document.shown import Shown, data_frame
from sparc3_pl.errors import InputError
from sparc3_pl.scores.folder import ScoreFolder
from sparc3_pl.scores.memory import ScoresInMemory

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame
    from torch import Tensor

    from sparc3_pl.document.blocks import Block
    from sparc3_pl.scores.manifest import Manifest, ScoredSample

__all__ = ["Scores"]


class Scores(Shown):
    """One score for each component of a model, averaged over samples, and everything needed to trust it.

    Args:
        folder: The scores: in memory, or a folder that is open.
    """

    def __init__(self, folder: ScoreFolder) -> None:
        self.folder = folder

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Opens a folder that ``save`` or ``sparc3 score`` has written.

        Raises:
            InputError: if it is no score folder, or is damaged.
        """
        return cls(ScoreFolder.open(folder))

    def save(self, folder: str | Path, overwrite: bool = False) -> Path:
        """Writes the folder that ``sparc3 score`` would have written, for every command to read.

        Args:
            folder: Folder to write.
            overwrite: Replace an earlier score folder there.

        Raises:
            InputError: if the place is taken or cannot be written, or the scores were read from a folder.
        """
        if not isinstance(self.folder, ScoresInMemory):
            raise InputError(f"these scores lie in {self.folder.path} already; copy that folder")
        self.folder.write(folder, overwrite)
        return Path(folder)

    @property
    def manifest(self) -> Manifest:
        """What was scored, on which samples and how, with sums and counts of every layer."""
        return self.folder.manifest

    @property
    def layers(self) -> list[str]:
        """Names of the scored modules, in the model's order."""
        return self.folder.layers

    @property
    def samples(self) -> Sequence[ScoredSample]:
        """The samples in the mean."""
        return self.folder.samples()

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The scores of each layer: ``[out]`` or, of single weights, ``[out, in]``, float32 on the CPU."""
        return {layer: self.folder.load(layer) for layer in self.layers}

    def __getitem__(self, layer: str) -> Tensor:
        """The scores of a layer.

        Raises:
            InputError: if it is not scored.
        """
        return self.folder.load(layer)

    def blocks(self) -> list[Block]:
        """What the scores are of, and the layers with most of the relevance."""
        from sparc3_pl.document.blocks import Text
        from sparc3_pl.document.terminal import summary

        about, table = summary(self.manifest)
        return [Text(about), table]

    def to_pandas(self) -> DataFrame:
        """A row for each component: ``layer``, ``index``, ``score``.

        Raises:
            InputError: for single weights, which are too many, or without pandas.
        """
        if self.folder.holds_weights:
            raise InputError("single weights are too many for a table; see scores.tensors")
        return data_frame(
            {"layer": layer, "index": index, "score": value}
            for layer in self.layers
            for index, value in enumerate(self[layer].tolist())
        )

    def plot(self) -> Figure:
        """The sum of the scores of each layer, as bars."""
        from sparc3_pl.document.figures import for_notebook, relevance_by_layer

        return for_notebook(relevance_by_layer({name: layer.sum for name, layer in self.manifest.layers.items()}))
