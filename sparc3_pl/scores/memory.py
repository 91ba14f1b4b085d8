"""Scores that are on no disk yet: to every reader the score folder that they would be."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from sparc3_pl.attribution.scorers import LayerScores
from sparc3_pl.errors import InputError
from sparc3_pl.scores.folder import BLOCK, ScoreFolder
from sparc3_pl.scores.gathering import Gathering, told_of_layer, told_of_samples
from sparc3_pl.scores.manifest import About, Manifest, ScoredSample
from sparc3_pl.scores.writer import write_scores

__all__ = ["ScoresInMemory"]


class ScoresInMemory(ScoreFolder):
    """The scores of a run, all layers in memory: of single weights as much as the weights in float32.

    Args:
        name: Stands for the path in messages and plans.
        layers: The scores.
        about: The manifest: what was scored, on which samples and how.
        samples: The samples in the mean; empty for a method that needs none.
        command: What made the scores.
    """

    def __init__(
        self, name: str, layers: Iterable[LayerScores], about: About, samples: Sequence[ScoredSample], command: str
    ) -> None:
        self.path = Path(name)
        self._about, self._samples = about, sorted(samples, key=lambda sample: sample.id)
        gathering = Gathering()
        self._layers: dict[str, LayerScores] = {}
        for layer in layers:
            scores = gathering.add(layer.group.layer, layer.scores, **told_of_layer(layer)).clone()
            self._layers[layer.group.layer] = replace(layer, scores=scores)
        self._squares, self._groups = gathering.squares, gathering.groups
        about_samples = told_of_samples(about, self._samples)
        self.manifest = gathering.manifest(self.path, **about_samples, samples=self._samples, command=command)

    def write(self, folder: str | Path, overwrite: bool = False) -> Manifest:
        """Writes the folder that the command would have written, but for its ``config.yaml``.

        Raises:
            InputError: if the place is taken, cannot be written, or the disk is full.
        """
        layers, manifest = self._layers.values(), self.manifest
        about = {"command": manifest.command, "created": manifest.created}
        return write_scores(folder, overwrite, layers, self._about, self._samples, **about)

    def blocks(self, name: str, size: int = BLOCK) -> Iterator[Tensor]:
        self._stats(name)
        for block in self._layers[name].scores.flatten().split(size):
            yield block.clone()  # the reader's own, as one from a disk is

    def load_squares(self, name: str) -> Tensor:
        self._stats(name)
        if not self._squares:
            raise InputError(f"{self.path}: holds no squares of the scores; score again with squares=True")
        return self._squares[name]

    def load_groups(self, name: str) -> Tensor:
        self._stats(name)
        if not self._groups:
            raise InputError(f"{self.path}: holds no groups of samples; score again with groups=8")
        return self._groups[name]

    def samples(self) -> list[ScoredSample]:
        return list(self._samples)

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.manifest.text().encode("utf-8", "backslashreplace")).hexdigest()
