"""Writes a score folder, whole or not at all."""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from sparc3_pl.attribution.scorers import LayerScores
from sparc3_pl.io.files import inside, new_folder, save_tensors, write_text
from sparc3_pl.runtime.timing import Timing
from sparc3_pl.scores.gathering import Gathering, samples_text, told_of_layer, told_of_samples
from sparc3_pl.scores.manifest import (
    GROUPS,
    KIND,
    MANIFEST,
    SAMPLES,
    SCORES,
    SQUARES,
    About,
    Manifest,
    ScoredSample,
)

__all__ = ["ScoreWriter", "write_scores"]


class ScoreWriter:
    """Writes a score folder, whole or not at all.

    ```python
    with ScoreWriter("scores", overwrite=False) as writer:
        for name, scores in layers:          # [out] a neuron, [out, in] a weight
            writer.add_layer(name, scores)
        writer.finish(method="lrp", signed=False, num_samples=16, num_tokens=4096, model={...}, data={...})
    ```
    Everything is written to a hidden sibling, which takes the folder's name when the block ends. If the block raises,
    or ends without ``finish``, nothing remains. Weight scores go to the disk as they are added: memory of one layer.

    Args:
        folder: Where the scores go.
        overwrite: Whether an earlier score folder there may be replaced (as a whole).

    Raises:
        InputError: if the place is taken, cannot be written, or the disk is full.
    """

    def __init__(self, folder: str | Path, overwrite: bool = False) -> None:
        self.folder = Path(folder)
        self._overwrite = overwrite
        self._exit = ExitStack()
        self._gathering = Gathering()
        self._neurons: dict[str, Tensor] = {}  # small: written together at the end
        self._finished = False

    def __enter__(self) -> Self:
        self._path = self._exit.enter_context(new_folder(self.folder, self._overwrite, KIND))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and not self._finished:
            failure = AssertionError("ScoreWriter: the block ended without finish(); nothing was written")
            self._exit.__exit__(AssertionError, failure, None)
            raise failure
        self._exit.__exit__(kind, error, trace)

    def add_layer(
        self,
        name: str,
        scores: Tensor,
        squares: Tensor | None = None,
        groups: tuple[Tensor, list[int]] | None = None,
        *,
        nan: int = 0,
        inf: int = 0,
        rows: slice | None = None,
        component: str | None = None,
        tokens: int | None = None,
    ) -> None:
        """Adds a layer; the folder keeps the order of the calls.

        Args:
            name: The module's name in ``named_modules()``.
            scores: ``[out]`` or ``[out, in]``, on any device; kept as float32.
            squares: ``[out]``: mean over samples of the squared per-sample neuron score.
            groups: ``[groups, out]``: mean scores of disjoint groups of the samples, and the groups' sizes.
            nan: NaNs that were put to zero while scoring, counted beside those still in ``scores``.
            inf: Infinities, likewise.
            rows: The scores that belong to a component, if not all do: only they stand in sums, counts and shares.
            component: Name of the layer's kind of component, where the folder has several kinds.
            tokens: For an expert's layer, the real tokens that reached it.
        """
        options = {"nan": nan, "inf": inf, "rows": rows, "component": component, "tokens": tokens}
        scores = self._gathering.add(name, scores, squares, groups, **options)
        if scores.dim() == 1:
            self._neurons[name] = scores.clone()
        else:
            save_tensors(inside(self._path, self._gathering.layers[name].file), {name: scores})

    def add_text(self, name: str, text: str) -> None:
        """Adds a text file beside the scores, such as the resolved ``config.yaml``."""
        write_text(inside(self._path, name), text)

    def finish(
        self,
        *,
        num_samples: int,
        num_tokens: int,
        samples: Iterable[ScoredSample] = (),
        granularity: str | None = None,
        total_relevance: float | None = None,
        versions: dict[str, str] | None = None,
        command: str | None = None,
        created: str | None = None,
        shards: Sequence[str] = (),
        signed: bool = False,
        timing: Timing | None = None,
        **about: Any,
    ) -> Manifest:
        """Writes manifest and samples; the folder takes its name when the ``with`` block ends.

        Args:
            num_samples: Samples in the mean.
            num_tokens: Real tokens in them.
            samples: The samples in the mean.
            granularity: Name of the component; by default ``neuron`` or ``weight``, read off the layers.
            total_relevance: Sum of all layers' sums if not given.
            versions: In place of this process's own; so are ``command`` and ``created``.
            command: See ``versions``.
            created: See ``versions``.
            shards: Commands of the parts that were merged.
            signed: Whether scores keep their sign.
            timing: Where the time went so far.
            about: The other fields of ``About``.
        """
        samples, gathering = list(samples), self._gathering
        manifest = gathering.manifest(
            self.folder, num_samples=num_samples, num_tokens=num_tokens, samples=samples, granularity=granularity,
            total_relevance=total_relevance, versions=versions, command=command, created=created, shards=shards,
            signed=signed, timing=timing, **about,
        )  # fmt: skip
        for file, tensors in ((SCORES, self._neurons), (SQUARES, gathering.squares), (GROUPS, gathering.groups)):
            if tensors:
                save_tensors(self._path / file, tensors)
        write_text(self._path / SAMPLES, samples_text(samples))
        write_text(self._path / MANIFEST, manifest.text())
        self._finished = True
        return manifest


def write_scores(
    folder: str | Path,
    overwrite: bool,
    layers: Iterable[LayerScores],
    about: About,
    samples: Sequence[ScoredSample],
    *,
    config: str | None = None,
    shards: Sequence[str] = (),
    command: str | None = None,
    created: str | None = None,
    timing: Timing | None = None,
) -> Manifest:
    """Writes the scores of a whole run, in one process or merged, as a score folder.

    Args:
        folder: Where the scores go.
        overwrite: Whether an earlier score folder there may be replaced.
        layers: The scores, layer by layer: one at a time is in memory.
        about: What was scored, on which samples and how.
        samples: The samples in the mean; empty for a method that needs none.
        config: The resolved configuration as YAML.
        shards: Commands of the parts that were merged.
        command: What made the scores; None: this process's command line.
        created: When they were made, UTC, ISO 8601; None: now.
        timing: Where the time went so far.

    Raises:
        InputError: if the place is taken, cannot be written, or the disk is full.
    """
    samples = sorted(samples, key=lambda sample: sample.id)
    with ScoreWriter(folder, overwrite) as writer:
        for layer in layers:
            writer.add_layer(layer.group.layer, layer.scores, **told_of_layer(layer))
        if config is not None:
            writer.add_text("config.yaml", config)
        about_samples = told_of_samples(about, samples)
        return writer.finish(
            **about_samples, samples=samples, shards=shards, command=command, created=created, timing=timing
        )
