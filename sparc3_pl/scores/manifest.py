"""What a score folder says of itself: ``manifest.json``, and of each sample a line of ``samples.jsonl``."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from sparc3_pl.attribution.methods import METHODS
from sparc3_pl.errors import InputError
from sparc3_pl.io.files import FolderKind
from sparc3_pl.io.formats import Count, Format, Number, Record, omitted, typed
from sparc3_pl.model.components import COMPONENTS, Component
from sparc3_pl.model.identity import ModelRecord
from sparc3_pl.runtime.timing import Timing

__all__ = [
    "FORMAT",
    "FORMAT_VERSION",
    "KIND",
    "MARKER",
    "About",
    "LayerStats",
    "Manifest",
    "ScoredSample",
    "samples_from",
]


FORMAT_VERSION = 1

MARKER = "manifest.json"
"""The file by which a score folder is known."""

MANIFEST, SAMPLES, SCORES, SQUARES = "manifest.json", "samples.jsonl", "scores.safetensors", "squares.safetensors"

GROUPS = "groups.safetensors"

KIND = FolderKind(
    "a score folder",
    MARKER,
    (SAMPLES, SCORES, SQUARES, GROUPS, "config.yaml"),
    lambda manifest: [layer["file"] for layer in manifest["layers"].values()],
)


@dataclass(frozen=True)
class ScoredSample:
    """What is kept of a sample: a line of ``samples.jsonl``.

    Attributes:
        id: Identity by content.
        num_tokens: Its real tokens.
        ending: ``stop``, ``cut``, or None where nothing can decode the tokens.
        text_ids: Identities of the texts that it was made from; empty in folders that do not say.
        relevance: The sum of its scores over the components of all layers; None for a method without a target.
        first_token_share: Share of the first position in the relevance.
        more: Whatever else is known, such as what the target records: its ``logit`` and token.
    """

    id: str
    num_tokens: Count
    ending: str | None = None
    text_ids: tuple[str, ...] = ()
    relevance: float | None = None
    first_token_share: float | None = None
    more: Record = field(default_factory=dict)

    def to_json(self) -> Record:
        """The sample as a JSON object; what is not known is left out."""
        own = {name: value for name, value in vars(self).items() if name != "more" and value not in (None, ())}
        return own | self.more

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Reads what ``to_json`` has made."""
        arguments = cls._arguments(data)
        return cls(**arguments | {"text_ids": tuple(arguments["text_ids"])})

    @classmethod
    def _arguments(cls, data: Mapping[str, Any]) -> Record:
        names = {item.name for item in fields(cls)} - {"more"}
        own = {name: value for name, value in data.items() if name in names}
        own["text_ids"] = own.get("text_ids") or ()
        return own | {"more": {name: value for name, value in data.items() if name not in names}}


def samples_from(records: Sequence[Any], where: str | Path) -> list[ScoredSample]:
    """The samples of records that were read from a file, which ``where`` names.

    Raises:
        InputError: for a record that lacks a key or holds a value of the wrong type.
    """
    samples = [ScoredSample._arguments(record) if isinstance(record, dict) else record for record in records]
    return typed(list[ScoredSample], samples, where, "score again")


@dataclass(frozen=True, kw_only=True)
class About:
    """What a manifest says before any sample is scored; its attributes are those of ``Manifest``."""

    method: str
    granularity: str
    signed: bool
    model: ModelRecord
    data: Record
    method_args: Record = omitted(dict)
    granularity_args: Record = omitted(dict)
    target: str = "predicted"
    target_args: Record = omitted(dict)
    targets: list[str] | None = None
    nonfinite: str | None = None
    seed: int | None = None
    sequential: str | None = omitted()
    relevance_account: Record | None = None
    at_values: bool = omitted(False)
    plan: str | None = omitted()

    def components(self) -> list[Component]:
        """The kinds of component that are scored.

        Raises:
            InputError: as ``Registry.from_file``.
        """
        names = self.granularity.split("+")
        arguments = self.granularity_args if len(names) > 1 else {names[0]: self.granularity_args}
        return [COMPONENTS.from_file(name, arguments.get(name)) for name in names]


@dataclass(frozen=True)
class LayerStats:
    """A layer's entry in the manifest.

    Attributes:
        shape: ``[out]`` or ``[out, in]``.
        file: The file in the score folder that holds the tensor.
        sum: The sum of the finite scores, in float64.
        nan: Number of NaNs, those that were put to zero while scoring included.
        inf: Number of infinities, likewise.
        negative: Number of scores below zero.
        zero: Number of scores equal to zero.
        sha256: Digest of the tensor's bytes, in hex.
        rows: First and last + 1 of the scores that ``sum``, ``negative`` and ``zero`` are of; null: all of them. The
            gates' rows of a fused map are no neurons, and count for nothing.
        component: Name of the layer's kind of component, where the folder has several kinds.
        tokens: For an expert's layer, the number of real tokens that reached it.
    """

    shape: list[int]
    file: str
    sum: Number
    nan: Count
    inf: Count
    negative: Count
    zero: Count
    sha256: str
    rows: list[int] | None = omitted()
    component: str | None = omitted()
    tokens: Count | None = omitted()

    @property
    def counted(self) -> slice:
        """The scores, flattened, that the figures are of."""
        return slice(0, math.prod(self.shape)) if self.rows is None else slice(*self.rows)


@dataclass(frozen=True, kw_only=True)
class Manifest(About):
    """What a score folder says of itself; the keys of ``manifest.json``.

    Attributes:
        method: As in ``model.method``: a built-in method's name, or the class path of a user's own.
        granularity: ``neuron``, ``weight``, ``head``, ``channel``, ``mlp``, ``output``, or the class path of a user's
            own component; several joined by ``+``.
        signed: Whether neuron scores keep their sign.
        num_samples: Samples in the mean.
        num_tokens: Real tokens of those samples.
        model: The model that was scored.
        data: ``source``, ``seed``, ``seq_len``, ``filter``, ``sample_ids``, ...
        layers: The scored layers by module name, in the model's order.
        total_relevance: Sum of all scores.
        versions: Versions of Python and the packages.
        command: The command line, without tokens.
        created: UTC, ISO 8601.
        format_version: Version of this folder's layout.
        squares: sha256 of the squares by module name; empty if they were not asked for.
        groups: sha256 of the groups' scores by module name; empty if they were not asked for.
        group_sizes: Samples of each group.
        samples_sha256: sha256 of ``samples.jsonl``.
        method_args: Arguments of the method, where it was given any.
        granularity_args: Arguments of the component, likewise; of several components, by their names.
        target: What is attributed: ``predicted``, ``completion``, ``text``, ``answer``, or the class path of a user's
            own target.
        target_args: Arguments of the target, likewise.
        targets: Globs of the scored layers; null: the component's own choice.
        nonfinite: ``error`` or ``zero``: what was done with NaN and infinite values.
        seed: Seed of random scores; null for other methods.
        sequential: The share or pattern by which decoder layers were pruned one after the other while scoring.
        relevance_account: For a method that checks itself on one sample (LRP): ``relative_residual`` and
            ``num_tokens``; where nothing was measured, the ``reason``.
        at_values: Whether components are scored where their values are read: a neuron at the input of the
            down-projection. Signed scores of ``gradient`` are then the target's derivative by each component's gain.
        plan: sha256 of the plan that was in force; null: the model was scored as it is. ``model`` is the one before.
        neuron_rows: First and last + 1 of the scores that belong to a component, by layer; only layers with others (the
            gates' of a fused map) are named.
        hardware: The machine that wrote the scores.
        unreached: Layers of experts that no token of any sample reached: their scores are 0 because nothing is known.
        shards: Commands of the parts that were merged.
        timing: Where the time went until they were written, by stage.
        extra: Any further top-level keys, kept as they were.
    """

    num_samples: Count
    num_tokens: Count
    layers: dict[str, LayerStats]
    total_relevance: Number
    versions: dict[str, str]
    command: str
    created: str
    format_version: int = FORMAT_VERSION
    squares: dict[str, str] = field(default_factory=dict)
    groups: dict[str, str] = field(default_factory=dict)
    group_sizes: list[Count] = field(default_factory=list)
    samples_sha256: str | None = None
    neuron_rows: dict[str, list[int]] = field(default_factory=dict)
    hardware: str | None = None
    unreached: list[str] = omitted(list)
    shards: list[str] = omitted(list)
    timing: Timing | None = omitted()
    extra: Record = field(default_factory=dict)

    @property
    def num_scores(self) -> int:
        """Number of components that are scored."""
        counted = (layer.counted for layer in self.layers.values())
        return sum(part.stop - part.start for part in counted)

    def to_json(self) -> Record:
        """The manifest as a JSON object, ``extra`` spread out, with its own sha256 as the last key."""
        return FORMAT.seal(FORMAT.content(self))

    def text(self) -> str:
        """The content of ``manifest.json``."""
        return json.dumps(self.to_json(), indent=1, ensure_ascii=False) + "\n"

    def check(self, where: str | Path = MANIFEST) -> None:
        """Refuses a manifest that contradicts itself; ``where`` names the file.

        Raises:
            InputError: naming the contradiction.
        """
        for kind, names, registry in (
            ("granularity", self.granularity.split("+"), COMPONENTS),
            ("method", [self.method], METHODS),
        ):
            for name in names:
                if name not in registry and "." not in name:
                    raise InputError(
                        f"{where}: {kind}={name!r} is unknown; known are {', '.join(registry)}; update sparc3_pl"
                    )
        if not self.layers:
            raise InputError(f"{where}: no layer is scored; score again with other model.targets")
        if not isinstance(self.model.fingerprint, str):
            raise InputError(f"{where}: the model's fingerprint is missing; score again")
        dims = {len(layer.shape) for layer in self.layers.values()}
        if self.granularity in COMPONENTS:  # the shapes tell what a user's own class scores
            dims = {COMPONENTS.make(self.granularity).dims}
        for name, layer in self.layers.items():
            if {len(layer.shape)} != dims or not dims <= {1, 2} or min(layer.shape) < 1:
                raise InputError(
                    f"{where}: layer {name} has shape {layer.shape}, which no {self.granularity} score has"
                )
            if layer.component is not None and layer.component not in self.granularity.split("+"):
                raise InputError(
                    f"{where}: layer {name} is of component={layer.component!r}, but granularity={self.granularity!r}; "
                    "the file is damaged, score again"
                )
        spans = [("neuron_rows", name, span) for name, span in self.neuron_rows.items()]
        spans += [("rows", name, layer.rows) for name, layer in self.layers.items() if layer.rows is not None]
        for key, name, span in spans:
            whole = range(self.layers[name].shape[0] + 1) if name in self.layers else ()
            if not (len(span) == 2 and all(i in whole for i in span) and span[0] < span[1]):
                raise InputError(f"{where}: {key} of layer {name} are {span!r}; the file is damaged, score again")


FORMAT = Format(
    Manifest, "a score folder's manifest", FORMAT_VERSION, "score again", extra="extra", check=Manifest.check
)
