"""The plan: which components are edited, how, in which model, and on what evidence.

A plan is a small JSON file that lists the chosen components. What does not belong in JSON lies beside it in safetensors
files named in the plan with their sha256: single weights, of which there may be billions, as indices (``weights``) or,
where these would take more room, as one bit for each weight of the layer (``masks``); mean activations for the ``mean``
edit (``means``); long lists of components with factors (``listed``); and, when asked for, the values that are replaced
(``kept``).
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from safetensors import SafetensorError
from torch import Tensor

from sparc3_pl.document.shown import Shown, data_frame
from sparc3_pl.errors import InputError
from sparc3_pl.io import provenance
from sparc3_pl.io.files import (
    FileKind,
    inside,
    new_file,
    open_tensors,
    read_json,
    save_tensors,
    sha256_of_file,
    strict_json,
    write_text,
)
from sparc3_pl.io.formats import Count, Format, Record, Unbounded, typed
from sparc3_pl.model.bitmask import BitMask
from sparc3_pl.model.components import COMPONENTS, Component
from sparc3_pl.model.identity import ModelRecord
from sparc3_pl.pruning.edits import EDITS, Edit

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

    from sparc3_pl.document.blocks import Block

__all__ = ["KIND", "Entries", "GainsFigures", "PlanSummary", "PlannedNeuron", "PrunePlan", "TextRise", "entries_of"]

FORMAT_VERSION = 1
_INDEX_BITS = 32  # of an index in a file, where one bit shows a weight in a mask
_INT32 = 2**31
_MANY = 1000
"""With more components than this, those that have factors lie beside the JSON."""
_COLUMNS = {"index": torch.int64, "rank": torch.int64, "score": torch.float64, "factor": torch.float64}
KIND = FileKind.json("a plan", lambda data: {"neurons", "format_version", "model"} <= data.keys())


@dataclass(frozen=True)
class PlannedNeuron:
    """A chosen component as the file lists it: an output row of a scored layer, or what else has a score there.

    Attributes:
        layer: Name of the layer.
        index: Index of its score.
        score: The value (of the contrast) by which it was chosen.
        factor: What it is multiplied by, for edits with a factor for each component.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    layer: str
    index: Count
    score: float | None = None
    factor: float | None = None


@dataclass(frozen=True)
class Entries:
    """The chosen components of one layer, all of them in tensors ``[n]``, or as a mask.

    Attributes:
        index: Indices into the layer's flattened scores, integers; empty where there is a mask.
        rank: Place of each in the order of the whole choice, best first; None for single weights, whose indices ascend.
        score: The values they were chosen by, float64, NaN where unknown; None for single weights.
        factor: A factor for each, float64, for edits that need one.
        mask: The chosen weights, where indices would take more room.
    """

    index: Tensor
    rank: Tensor | None = None
    score: Tensor | None = None
    factor: Tensor | None = None
    mask: BitMask | None = None

    @classmethod
    def of_weights(cls, mask: BitMask) -> Self:
        """Single weights, in whichever form is the smaller in a file."""
        if mask.count * _INDEX_BITS > mask.size:
            return cls(torch.empty(0, dtype=torch.int64), mask=mask)
        index = mask.index()
        return cls(index.int() if mask.size <= _INT32 else index)

    @property
    def count(self) -> int:
        """How many components are chosen."""
        return len(self.index) if self.mask is None else self.mask.count

    @property
    def indices(self) -> Tensor:
        """Indices of the chosen, read off the mask if there is one: 64 bits for each."""
        return self.index if self.mask is None else self.mask.index()


def entries_of(neurons: Sequence[PlannedNeuron]) -> dict[str, Entries]:
    """Listed components, best first, by layer.

    Raises:
        InputError: if only some of them have a factor.
    """
    ranks: dict[str, list[int]] = {}
    for rank, neuron in enumerate(neurons):
        ranks.setdefault(neuron.layer, []).append(rank)
    with_factor = [neuron.factor is not None for neuron in neurons]
    if any(with_factor) and not all(with_factor):
        raise InputError("some neurons of the plan have a factor and some have none; make the plan again")

    def column(own: list[int], name: str) -> Tensor:
        values = [getattr(neurons[i], name) for i in own]
        return torch.tensor([math.nan if value is None else value for value in values], dtype=torch.float64)

    return {
        layer: Entries(
            torch.tensor([neurons[i].index for i in own]),
            torch.tensor(own),
            column(own, "score"),
            column(own, "factor") if any(with_factor) else None,
        )
        for layer, own in ranks.items()
    }


@dataclass(frozen=True, kw_only=True)
class _About:
    """What a plan says besides its components; its attributes are those of ``PrunePlan``."""

    model: ModelRecord
    granularity: str = "neuron"
    components: dict[str, str] = field(default_factory=dict)
    num_candidates: int | None = None
    contrast: str = "difference"
    edit: str = "zero"
    alpha: float | None = None
    control: str | None = None
    seed: int | None = None
    settings: Record = field(default_factory=dict)
    shapes: dict[str, list[int]] = field(default_factory=dict)
    scores: Record = field(default_factory=dict)
    behaviour_samples: list[str] = field(default_factory=list)
    budget_samples: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=provenance.versions)
    command: str = field(default_factory=provenance.command_line)
    created: str = field(default_factory=provenance.now)
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", ModelRecord(self.model))  # whoever makes a plan in Python may give a dict


@dataclass(frozen=True)
class _Companion:
    """A file beside the plan."""

    file: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class _Content(_About):
    """The content of the file."""

    neurons: list[PlannedNeuron]
    num_neurons: int | None = None
    num_weights: int | None = None
    files: dict[Literal["weights", "masks", "means", "listed", "kept"], _Companion] = field(default_factory=dict)


FORMAT = Format(_Content, "a plan", FORMAT_VERSION, "make the plan again")


@dataclass(frozen=True)
class TextRise:
    """What an edit costs on one held-back text.

    Attributes:
        source: Name of the text.
        nll_before: Mean negative log-likelihood of the model as it was, nats per token.
        nll_after: Mean negative log-likelihood with the edit, likewise.
        rise: Relative rise of perplexity: 0.01 is 1 %.
        num_windows: Windows.
        num_tokens: Tokens whose likelihood was measured.
        num_left_out: Texts that were left out because general scores were made from them.
    """

    source: str
    nll_before: float
    nll_after: Unbounded
    rise: Unbounded
    num_windows: int
    num_tokens: int
    num_left_out: int


@dataclass(frozen=True, kw_only=True)
class GainsFigures:
    """How far an edit of gains goes, and what that was expected to do.

    Attributes:
        scale: How far along the contrast's steps.
        predicted_change: Expected change of what was attributed, to first order; None for a part of a plan.
        predicted_rise: Expected rise of the loss on general text, in nats per token; None likewise.
        budget: Allowed rise of perplexity; None if the scale was given.
        texts: The cost on each text, measured in the search for the scale; empty without one.
    """

    scale: float
    predicted_change: float | None = None
    predicted_rise: float | None = None
    budget: float | None = None
    texts: list[TextRise] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class PlanSummary:
    """What results say of the plan that made them: small, without the components. Its attributes are the plan's.

    Attributes:
        scored_model: Fingerprint of the model that the plan was made for.
        sha256: Digest of the plan.
    """

    granularity: str
    num_neurons: Count
    num_weights: Count
    num_candidates: Count | None
    contrast: str
    edit: str
    alpha: float | None
    control: str | None
    seed: int | None
    settings: Record
    warnings: list[str]
    scored_model: str
    sha256: str

    @property
    def size(self) -> int:
        """Number of edited components."""
        return self.num_neurons + self.num_weights

    @property
    def gains(self) -> GainsFigures | None:
        """How far an edit of gains goes; None for any other edit."""
        return _gains_of(self.settings)

    def participle(self) -> str:
        """What was done to the components, to follow their name: ``set to zero``."""
        try:
            return _edit_of(self.edit, self.alpha, self.settings).participle()
        except InputError:  # a user's class that this process may not import
            return f"edited by {self.edit}"


def _edit_of(name: str, alpha: float | None, settings: Record) -> Edit:
    """The edit that a plan names, with its arguments.

    Raises:
        InputError: if there is no such edit, the user has not allowed its module to be imported, or its arguments are
            wrong.
    """
    arguments = typed(dict, settings.get("edit", {}), "settings.edit", "make the plan again")
    return EDITS.from_file(name, ({} if alpha is None else {"alpha": alpha}) | arguments)


def _gains_of(settings: Record) -> GainsFigures | None:
    gains = settings.get("gains")
    return typed(GainsFigures, gains, "settings.gains", "make the plan again") if gains else None


@dataclass(frozen=True, kw_only=True)
class PrunePlan(_About, Shown):
    """What to edit in which model.

    In Python, ``entries`` holds the chosen components by layer; what the file says of them is made from it.

    Attributes:
        neurons: The chosen components, best first: ``layer``, ``index``, ``score``, and ``factor`` for an edit that
            gives each its own; empty for single weights.
        model: The manifest's ``model`` entry; ``fingerprint`` ties the plan to the model. ``pruned_fingerprint`` is
            added when the plan keeps values: it is that of the pruned model.
        granularity: The kind of component, as in the manifest: a name or a class path; several joined by ``+``.
        components: The kind of each layer that is touched, where the plan has several kinds.
        num_neurons: Number of listed components.
        num_weights: Number of chosen single weights.
        num_candidates: How many the choice was made from.
        contrast: What the choice is by (``contrast.py``).
        edit: ``zero``, ``scale``, ``mean``, ``gains``, ``remove``, or a class path.
        alpha: Factor of ``scale``.
        control: The control that the plan is, or None.
        seed: Seed of the control.
        settings: ``protect``, ``layers``, ``per_layer`` (scope ``layer``), ``top_general``, ``top_behaviour``; the
            arguments of a user's own ``contrast`` and ``edit``, and the class path of a user's own ``scope``.
        shapes: Shape of the scores of every layer that is touched.
        scores: ``general`` and ``behaviour``: a list of folder name, sha256 of its manifest, samples, source, seed.
        behaviour_samples: Ids of the behaviour's samples and of the texts that they were made from: these must not be
            evaluated on.
        budget_samples: Ids of the texts whose perplexity held the budget of ``gains``: these must not either.
        warnings: Warnings raised when the plan was made.
        versions: Versions of Python and the packages.
        command: The command line that made it.
        created: UTC, ISO 8601.
        format_version: Version of the file's layout.
        weights: Flat indices of the chosen weights into ``[out, in]``, ascending, by layer (companion files).
        means: Mean activations ``[neurons]`` by layer (companion file).
        kept: Values before the edit, for ``revert`` (companion file).
    """

    entries: dict[str, Entries]
    means: dict[str, Tensor] = field(default_factory=dict, repr=False)
    kept: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the model the plan was made for."""
        return self.model.fingerprint

    @property
    def neurons(self) -> list[PlannedNeuron]:
        """The components in the order of the choice; empty for single weights, which have none."""
        rows = []
        for layer, entries in self.entries.items():
            if entries.rank is not None:
                columns = (entries.index, entries.score, entries.factor)
                values = ([None] * len(entries.index) if c is None else c.tolist() for c in columns)
                rows += zip(entries.rank.tolist(), *values, [layer] * len(entries.index), strict=True)
        return [
            PlannedNeuron(layer, index, None if score is None or math.isnan(score) else score, factor)
            for _, index, score, factor, layer in sorted(rows, key=lambda entry: entry[0])
        ]

    @property
    def holds_weights(self) -> bool:
        """Whether the plan is of single weights, which are not listed."""
        return any(entries.rank is None for entries in self.entries.values())

    @property
    def weights(self) -> dict[str, Tensor]:
        """Flat indices of the chosen weights into ``[out, in]``, ascending, by layer; empty for listed components.

        Masks are unpacked for it: of a large plan use ``entries``.
        """
        return {layer: entries.indices for layer, entries in self.entries.items() if entries.rank is None}

    @property
    def listed(self) -> dict[str, Tensor]:
        """Tensors ``LAYER/index``, ``/rank``, ``/score`` and ``/factor`` of listed components; empty unless so many of
        them have factors that JSON is no place for them.
        """
        if self.num_neurons <= _MANY or any(entries.factor is None for entries in self.entries.values()):
            return {}
        return {f"{layer}/{name}": getattr(one, name) for layer, one in self.entries.items() for name in _COLUMNS}

    @property
    def num_neurons(self) -> int:
        """Number of listed components."""
        return sum(entries.count for entries in self.entries.values() if entries.rank is not None)

    @property
    def num_weights(self) -> int:
        """Number of chosen single weights."""
        return sum(entries.count for entries in self.entries.values() if entries.rank is None)

    @property
    def unit(self) -> str:
        """The word for the components in tables: ``neurons``, ``neurons and channels``."""
        return " and ".join(COMPONENTS.from_file(kind).unit for kind in self.granularity.split("+"))

    def counts(self) -> dict[str, int]:
        """How many components of each layer are chosen, in the model's order."""
        order = [
            *(layer for layer in self.shapes if layer in self.entries),
            *(layer for layer in self.entries if layer not in self.shapes),
        ]
        return {layer: self.entries[layer].count for layer in order}

    def component(self, layer: str) -> str:
        """Name of the kind of component that is chosen in a layer."""
        return self.components.get(layer, self.granularity)

    def load_components(self) -> dict[str, Component]:
        """The kind of component that is chosen in each layer, in the model's order.

        Raises:
            InputError: if there is no such kind, or the user has not allowed its module to be imported.
        """
        kinds = {name: COMPONENTS.from_file(name) for name in self.granularity.split("+")}
        return {layer: kinds[self.component(layer)] for layer in self.counts()}

    def load_edit(self) -> Edit:
        """The edit that the plan names, with its arguments.

        Raises:
            InputError: as ``load_components``, or if its arguments are wrong.
        """
        return _edit_of(self.edit, self.alpha, self.settings)

    def first(self, num_neurons: int) -> "PrunePlan":
        """The plan of the first ``num_neurons`` neurons: plans of growing size are nested.

        Raises:
            InputError: if there are not so many, or the plan is for weights.
        """
        if not 0 < num_neurons <= self.num_neurons:
            raise InputError(
                f"num_neurons={num_neurons}, but the plan has {self.num_neurons} neurons; choose from 1 to that"
            )
        entries = entries_of(self.neurons[:num_neurons])
        shapes, components = (
            {layer: of_layer[layer] for layer in of_layer if layer in entries}
            for of_layer in (self.shapes, self.components)
        )
        model = ModelRecord({key: value for key, value in self.model.items() if key != "pruned_fingerprint"})
        settings = self.settings
        if self.gains is not None:  # what was predicted and measured is of the whole plan
            settings = settings | {"gains": {"scale": self.gains.scale}}
        about = {"model": model, "shapes": shapes, "components": components, "settings": settings}
        return replace(self, entries=entries, **about, kept={})

    @property
    def digest(self) -> str:
        """sha256 of its content, in hex."""
        return FORMAT.seal(self.to_json())["sha256"]

    def summary(self) -> PlanSummary:
        """What results say of the plan that made them."""
        own = {item.name: getattr(self, item.name) for item in fields(PlanSummary) if hasattr(self, item.name)}
        return PlanSummary(**own, scored_model=self.fingerprint, sha256=self.digest)

    @property
    def gains(self) -> GainsFigures | None:
        """How far an edit of gains goes; None for any other edit."""
        return _gains_of(self.settings)

    # --- shown -------------------------------------------------------------------------------------------------------

    def blocks(self) -> "list[Block]":
        """How many components of which layers are chosen, how, and what whoever uses the plan should know."""
        from sparc3_pl.document.blocks import Number, Table, Text

        counts = self.counts()
        rows = [
            (layer, Number(count, form="d"), Number(math.prod(self.shapes[layer]), form="d"))
            for layer, count in counts.items()
        ]
        title = f"{sum(counts.values())} {self.unit} of {self.num_candidates} scored"
        factor = "" if self.alpha is None else f" by {self.alpha}"
        choice = f"control {self.control} (seed {self.seed})" if self.control else f"contrast {self.contrast}"
        lines = [
            f"{choice}, edit {self.edit}{factor}",
            *self._gains_lines(),
            *(f"warning: {warning}" for warning in self.warnings),
        ]
        if left_out := self.settings.get("left_out"):
            names = ", ".join(left_out)
            lines.append(f"left out: {names}; name all layers to choose from (layers) to have it pruned too")
        if self.holds_weights and self.edit == "zero" and self.num_candidates:
            zeros = Number(100 * self.num_weights / self.num_candidates, form=".1f")
            lines.append(f"a pruned model keeps its size, with {zeros} % zeros among these weights")
        return [Table.of(("layer", self.unit, "of"), rows, title=title), *map(Text, lines)]

    def _gains_lines(self) -> list[str]:
        """How far an edit of gains goes, and what that costs."""
        gains = self.gains
        if gains is None:
            return []
        texts = ", ".join(f"{text.rise:+.2%} on {text.source}" for text in gains.texts)
        factors = [factor for one in self.entries.values() for factor in one.factor.tolist()]
        ends = f"{min(factors):.3g} to {max(factors):.3g}"
        change = gains.predicted_change  # of the whole plan; ``first`` drops it
        return [
            f"scale {gains.scale:.4g}: factors from {ends}, {factors.count(0)} of them 0",
            *([] if change is None else [f"predicted change of what was attributed: {change:+.4g}"]),
            *([f"perplexity of held-back text: {texts}"] if texts else []),
        ]

    def to_pandas(self) -> "DataFrame":
        """A row for each listed component, best first: ``layer``, ``index``, ``score``, and ``factor`` if there is one.

        Raises:
            InputError: for single weights, which are not listed, or without pandas.
        """
        if self.holds_weights:
            raise InputError("single weights are not listed in a table; see plan.counts() and plan.weights")
        rows = map(asdict, self.neurons)
        is_factored = any(entries.factor is not None for entries in self.entries.values())
        return data_frame({k: v for k, v in row.items() if is_factored or k != "factor"} for row in rows)

    def plot(self) -> "Figure":
        """How many components of each touched layer are chosen, as bars."""
        from sparc3_pl.document.figures import chosen_by_layer, for_notebook

        return for_notebook(chosen_by_layer({layer: [count] for layer, count in self.counts().items()}, [self.unit]))

    # --- file -------------------------------------------------------------------------------------------------------

    def to_json(self) -> Record:
        """The plan without its tensors, as a JSON object."""
        data = asdict(replace(self, entries={}, means={}, kept={}))
        for key in ("entries", "means", "kept"):
            del data[key]
        neurons = [asdict(neuron) for neuron in self.neurons]
        for neuron in neurons:
            if neuron["factor"] is None:
                del neuron["factor"]
        for key in ("components", "budget_samples"):
            if not data[key]:
                del data[key]
        return {
            "format_version": data.pop("format_version"),
            "neurons": neurons,
            "model": data.pop("model"),
            "granularity": data.pop("granularity"),
            "num_neurons": self.num_neurons,
            "num_weights": self.num_weights,
        } | data

    def save(self, path: str | Path, overwrite: bool = False) -> Path:
        """Writes the plan and what lies beside it: all of it or nothing.

        Raises:
            InputError: if the file exists (and ``overwrite`` is off) or cannot be written.
        """
        path = Path(path)
        old = read_json(path).get("files") if path.is_file() and KIND.is_one(path) else None
        before = {entry.get("file") for entry in (old or {}).values()}  # the files that the plan that is there names
        earlier_file = FileKind(f"a part of {path}", lambda file: file.name in before)
        with ExitStack() as files:  # entered first, renamed last: a plan never names a file that is not there yet
            plan_file = files.enter_context(new_file(path, overwrite, KIND))
            by_name = {}
            for kind, tensors in self._companions().items():
                if tensors:
                    name = f"{path.stem}.{kind}.safetensors"
                    temporary = files.enter_context(new_file(path.with_name(name), overwrite, earlier_file))
                    save_tensors(temporary, {key: value.detach().cpu().contiguous() for key, value in tensors.items()})
                    by_name[kind] = {"file": name, "sha256": sha256_of_file(temporary)}
            beside = {"files": by_name} | ({"neurons": []} if "listed" in by_name else {})
            write_text(plan_file, _readable(FORMAT.seal(self.to_json() | beside)))
        now = {companion["file"] for companion in by_name.values()}
        for name in before - now:  # of the plan that was there: no other will ever name it
            if name in {f"{path.stem}.{kind}.safetensors" for kind in self._companions()}:
                path.with_name(name).unlink(missing_ok=True)
        return path

    def _companions(self) -> dict[str, dict[str, Tensor]]:
        """What lies beside the JSON file, by kind."""
        unlisted = {layer: entries for layer, entries in self.entries.items() if entries.rank is None}
        return {
            "weights": {layer: entries.index for layer, entries in unlisted.items() if entries.mask is None},
            "masks": {layer: entries.mask.bits for layer, entries in unlisted.items() if entries.mask is not None},
            "means": self.means,
            "listed": self.listed,
            "kept": self.kept,
        }

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads a plan, checking it and the files that it names.

        Raises:
            InputError: if it is missing, not a plan, of another version, changed, damaged or inconsistent.
        """
        path = Path(path)
        if not path.is_file():
            raise InputError(f"{path}: there is no such plan file; check the path, or make it with prune")
        content = FORMAT.read(path)
        about = {item.name: getattr(content, item.name) for item in fields(_About)}
        plan = cls(entries=entries_of(content.neurons), **about)
        tensors: dict[str, Any] = {kind: _companion(path, entry) for kind, entry in content.files.items()}
        weights, masks = tensors.pop("weights", {}), tensors.pop("masks", {})
        if plan.entries and (weights or masks):
            raise InputError(f"{path}: it lists neurons and has weights beside it; make the plan again")
        if both := sorted(weights.keys() & masks.keys()):
            raise InputError(f"{path}: layer {both[0]} has indices and a mask beside it; make the plan again")
        if weights or masks:
            none = torch.empty(0, dtype=torch.int64)
            entries = {layer: Entries(index) for layer, index in weights.items()}
            for layer, bits in masks.items():
                entries[layer] = Entries(none, mask=BitMask(bits, math.prod(plan.shapes.get(layer, [0]))))
            tensors["entries"] = {name: entries[name] for name in [*plan.shapes, *entries] if name in entries}
        if listed := tensors.pop("listed", None):
            if plan.entries or weights or masks:
                raise InputError(f"{path}: it lists components twice, here and beside it; make the plan again")
            tensors["entries"] = _entries_from(listed, path)
        plan = replace(plan, **tensors)
        plan.check(path)
        for key in ("num_neurons", "num_weights"):
            claimed, listed = getattr(content, key), getattr(plan, key)
            if claimed not in (None, listed):
                raise InputError(
                    f"{path}: {key}={claimed}, but {listed} {key.removeprefix('num_')} are listed or lie beside it; "
                    "make the plan again"
                )
        return plan

    def check(self, where: str | Path = "plan") -> None:
        """Refuses a plan that contradicts itself.

        Raises:
            InputError: naming the contradiction.
        """
        problem = next(self._problems(), None)
        if problem:
            raise InputError(f"{where}: {problem}; make the plan again")
        try:
            self.load_components()
            self.load_edit()
        except InputError as error:
            raise InputError(f"{where}: {error}") from None

    def _problems(self) -> Iterator[str]:
        if not isinstance(self.model.fingerprint, str):
            yield "the model's fingerprint is missing"
        if not isinstance(self.settings.get("edit", {}), dict):
            yield f"the edit's arguments are {self.settings['edit']!r}"
        if not self.entries:
            yield "it has no neurons listed, and no weights' indices lie beside it"
        kinds = self.granularity.split("+")
        for layer in self.entries:
            if self.component(layer) not in kinds:
                kind = self.components.get(layer)
                yield f"layer {layer} is of component={kind!r}, but granularity={self.granularity!r}"
                return
        for layer, entries in self.entries.items():
            index = entries.index
            if entries.mask is not None:
                if problem := entries.mask.problem:
                    yield f"the mask of layer {layer} is {problem}"
                elif not entries.mask.count:
                    yield f"the mask of layer {layer} shows no weight"
                continue
            if index.dim() != 1 or index.dtype not in (torch.int32, torch.int64) or not len(index):
                yield f"the indices of layer {layer} are not a list of integers"
                continue
            low, high = int(index.min()), int(index.max())
            if low < 0 or high >= math.prod(self.shapes.get(layer, [math.inf])):
                yield f"{self.component(layer)} {low if low < 0 else high} of {layer} is out of range"
            if entries.rank is None and not (index[1:] > index[:-1]).all():
                yield f"the indices of layer {layer} are not in ascending order"
            if entries.factor is not None and not entries.factor.isfinite().all():
                yield f"a factor of layer {layer} is not finite"
            if entries.rank is not None and len(index.unique()) < len(index):
                yield f"a {self.component(layer)} of {layer} is listed twice"


def _entries_from(tensors: dict[str, Tensor], path: Path) -> dict[str, Entries]:
    """The chosen components by layer, from the tensors that ``PrunePlan.listed`` has made."""
    by_layer: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        layer, _, name = key.rpartition("/")
        by_layer.setdefault(layer, {})[name] = tensor
    for layer, columns in by_layer.items():
        shapes = {name: (tensor.dtype, tensor.shape) for name, tensor in columns.items()}
        if shapes != {name: (dtype, columns.get("index", torch.empty(0)).shape) for name, dtype in _COLUMNS.items()}:
            raise InputError(f"{path}: what lies beside it is no list of components of {layer}; make the plan again")
    ranks = torch.cat([columns["rank"] for columns in by_layer.values()])
    if not torch.equal(ranks.sort().values, torch.arange(len(ranks))):
        raise InputError(f"{path}: the ranks of its components are not 0 to {len(ranks) - 1}; make the plan again")
    return {layer: Entries(**columns) for layer, columns in by_layer.items()}


def _readable(data: Record) -> str:
    """JSON with a line for every key and every neuron."""
    lines = []
    for key, value in data.items():
        text = strict_json(value, indent=1 if isinstance(value, dict) else None).replace("\n", "\n ")
        if key == "neurons" and value:
            text = "[\n  " + ",\n  ".join(strict_json(neuron) for neuron in value) + "\n ]"
        lines.append(f' "{key}": {text}')
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _companion(path: Path, entry: _Companion) -> dict[str, Tensor]:
    """The tensors of a file beside the plan, once its bytes are those that the plan was saved with."""
    file = inside(path.parent, entry.file)
    if not file.is_file():
        raise InputError(f"{file}: is missing, but {path} needs it; put it beside the plan")
    if sha256_of_file(file) != entry.sha256:
        raise InputError(f"{file}: does not match the sha256 in {path}; it was changed or damaged, make the plan again")
    try:
        with open_tensors(file) as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise InputError(f"{file}: not a safetensors file ({error}); make the plan again") from error
