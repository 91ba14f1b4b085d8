"""The plan: which neurons or weights are edited, how, in which model, and on what evidence.

A plan is a small JSON file. What does not belong in JSON lies beside it in safetensors files named in the plan with
their sha256: the indices of a weight plan (``weights``), mean activations for the ``mean`` edit (``means``), and, when
asked for, the removed values (``kept``).
"""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch
from safetensors import SafetensorError
from torch import Tensor

from sparc3_pl import provenance
from sparc3_pl.errors import InputError
from sparc3_pl.files import (
    FileKind,
    inside,
    json_digest,
    new_file,
    open_tensors,
    read_json,
    save_tensors,
    sha256_of_file,
    strict_json,
    write_text,
)

__all__ = ["KIND", "Edit", "PlannedNeuron", "PrunePlan"]

FORMAT_VERSION = 1
Edit = Literal["zero", "scale", "mean"]
_COMPANIONS = ("weights", "means", "kept")
KIND = FileKind.json("a plan", lambda data: {"neurons", "format_version", "model"} <= data.keys())


@dataclass(frozen=True)
class PlannedNeuron:
    """One output row of a scored layer, and the value (of the contrast) by which it was chosen."""

    layer: str
    index: int
    score: float | None = None


@dataclass(frozen=True)
class PrunePlan:
    """What to edit in which model.

    Attributes:
        neurons: The chosen neurons, best first; empty for a weight plan.
        model: The manifest's ``model`` entry; ``fingerprint`` ties the plan to the model. ``pruned_fingerprint`` is
            added when the plan keeps values: it is that of the pruned model.
        granularity: ``neuron`` or ``weight``.
        num_neurons: Their number.
        num_weights: The number of chosen weights.
        num_candidates: How many the choice was made from.
        contrast: What the choice is by (``contrast.py``).
        edit: ``zero``, ``scale`` or ``mean``.
        alpha: Factor of ``scale``.
        control: The control that the plan is, or None.
        seed: Of the control.
        settings: ``protect``, ``layers``, ``per_layer``, ``top_general``, ``top_behaviour``.
        shapes: Shape of the scores of every layer that is touched.
        scores: ``general`` and ``behaviour``: a list of folder name, sha256 of its manifest, samples, source, seed.
        behaviour_samples: Ids of the behaviour's samples and of the texts that they were made from: these must not be
            evaluated on.
        warnings: What whoever made the plan should have known.
        versions: Of Python and the packages.
        command: The command line that made it.
        created: UTC, ISO 8601.
        format_version: Of the file's layout.
        weights: By layer, the chosen weights' flat indices into ``[out, in]``, ascending (companion file).
        means: By layer, mean activations ``[neurons]`` (companion file).
        kept: Values before the edit, for ``revert`` (companion file).
    """

    neurons: list[PlannedNeuron]
    model: dict[str, Any]
    granularity: str = "neuron"
    num_neurons: int = 0
    num_weights: int = 0
    num_candidates: int | None = None
    contrast: str = "difference"
    edit: str = "zero"
    alpha: float | None = None
    control: str | None = None
    seed: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    shapes: dict[str, list[int]] = field(default_factory=dict)
    scores: dict[str, Any] = field(default_factory=dict)
    behaviour_samples: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=provenance.versions)
    command: str = field(default_factory=provenance.command_line)
    created: str = field(default_factory=provenance.now)
    format_version: int = FORMAT_VERSION
    weights: dict[str, Tensor] = field(default_factory=dict, repr=False)
    means: dict[str, Tensor] = field(default_factory=dict, repr=False)
    kept: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @property
    def fingerprint(self) -> str:
        """Of the model that the plan is for."""
        return self.model["fingerprint"]

    def by_layer(self) -> dict[str, list[int]]:
        """The neurons' indices by layer, in the order of the choice."""
        found: dict[str, list[int]] = {}
        for neuron in self.neurons:
            found.setdefault(neuron.layer, []).append(neuron.index)
        return found

    def counts(self) -> dict[str, int]:
        """How many neurons (or weights) of each layer are chosen, in the model's order."""
        chosen = self.by_layer() if self.granularity == "neuron" else self.weights
        order = [
            *(layer for layer in self.shapes if layer in chosen),
            *(layer for layer in chosen if layer not in self.shapes),
        ]
        return {layer: len(chosen[layer]) for layer in order}

    def first(self, num_neurons: int) -> "PrunePlan":
        """The plan of the first ``num_neurons`` neurons: plans of growing size are nested.

        Raises:
            InputError: if there are not so many, or the plan is for weights.
        """
        if self.granularity != "neuron" or not 0 < num_neurons <= self.num_neurons:
            raise InputError(
                f"num_neurons={num_neurons}, but the plan has {self.num_neurons} neurons; choose from 1 to that"
            )
        kept = self.neurons[:num_neurons]
        shapes = {layer: self.shapes[layer] for layer in self.shapes if any(n.layer == layer for n in kept)}
        model = {key: value for key, value in self.model.items() if key != "pruned_fingerprint"}
        return replace(self, neurons=kept, num_neurons=num_neurons, model=model, shapes=shapes, kept={})

    def summary(self) -> dict[str, Any]:
        """What results say of the plan that made them: small, without the neurons."""
        keys = ("granularity", "num_neurons", "num_weights", "num_candidates", "contrast", "edit", "alpha", "control",
                "seed", "settings", "warnings")  # fmt: skip
        digest = json_digest(_plain(self.to_json()))
        return {key: getattr(self, key) for key in keys} | {"scored_model": self.fingerprint, "sha256": digest}

    # --- file -------------------------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """The plan without its tensors, as a JSON object."""
        plain = replace(self, weights={}, means={}, kept={})
        data = {key: value for key, value in asdict(plain).items() if key not in _COMPANIONS}
        return {"format_version": data.pop("format_version")} | data

    def save(self, path: str | Path, overwrite: bool = False) -> Path:
        """Writes the plan and what lies beside it: all of it or nothing.

        Raises:
            InputError: if the file exists (and ``overwrite`` is off) or cannot be written.
        """
        path = Path(path)
        with ExitStack() as files:  # entered first, renamed last: a plan never names a file that is not there yet
            plan_file = files.enter_context(new_file(path, overwrite, KIND))
            named = {}
            for kind in _COMPANIONS:
                if tensors := getattr(self, kind):
                    name = f"{path.stem}.{kind}.safetensors"
                    temporary = files.enter_context(new_file(path.with_name(name), overwrite, _companion_of(path)))
                    save_tensors(temporary, {key: value.detach().cpu().contiguous() for key, value in tensors.items()})
                    named[kind] = {"file": name, "sha256": sha256_of_file(temporary)}
            data = self.to_json() | {"files": named}
            write_text(plan_file, _readable(data | {"sha256": json_digest(_plain(data))}))
        return path

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads a plan, checking it and the files that it names.

        Raises:
            InputError: if it is missing, not a plan, of another version, changed, damaged or inconsistent.
        """
        path = Path(path)
        if not path.is_file():
            raise InputError(f"{path}: there is no such plan file; check the path, or make it with prune")
        data = read_json(path)
        _check_version(data, path)
        claimed = data.pop("sha256", None)
        if claimed is not None and claimed != json_digest(data):
            raise InputError(f"{path}: its content does not match its sha256; it was changed, make the plan again")
        files = data.pop("files", {})
        plan = cls.from_json(data, path)
        tensors = {kind: _companion(path, files[kind], kind) for kind in _COMPANIONS if kind in files}
        plan = replace(plan, **tensors)
        plan.check(path)
        return plan

    @classmethod
    def from_json(cls, data: Mapping[str, Any], where: str | Path = "plan") -> Self:
        """Reads the JSON object, checking the type of every value; ``check`` comes after.

        Raises:
            InputError: for a missing or unknown key, or a value of the wrong type.
        """
        known = {item.name: item.type for item in fields(cls) if item.name not in _COMPANIONS}
        if unknown := sorted(set(data) - set(known)):
            raise InputError(f"{where}: the key {unknown[0]!r} is unknown in a plan; remove it or make the plan again")
        for key in ("neurons", "model"):
            if key not in data:
                raise InputError(f"{where}: the key {key!r} is missing; it is not a whole plan, make it again")
        for key, value in data.items():
            if not _is_of(value, known[key]):
                raise InputError(f"{where}: {key}={value!r} is of the wrong type; make the plan again")
        neurons = [_neuron(entry, where) for entry in data["neurons"]]
        return cls(**{"num_neurons": len(neurons), **data, "neurons": neurons})

    def check(self, where: str | Path = "plan") -> None:
        """Refuses a plan that contradicts itself.

        Raises:
            InputError: naming the contradiction.
        """
        problem = next(self._problems(), None)
        if problem:
            raise InputError(f"{where}: {problem}; make the plan again")

    def _problems(self) -> Iterator[str]:
        if not isinstance(self.model.get("fingerprint"), str):
            yield "the model's fingerprint is missing"
        if self.granularity not in ("neuron", "weight"):
            yield f"granularity={self.granularity!r} is unknown"
        if self.edit not in get_args(Edit):
            yield f"edit={self.edit!r} is unknown; known are {', '.join(get_args(Edit))}"
        if self.edit == "scale" and (self.alpha is None or not math.isfinite(self.alpha)):
            yield f"edit=scale needs a finite alpha, but alpha={self.alpha}"
        if self.granularity == "neuron":
            yield from self._neuron_problems()
        else:
            yield from self._weight_problems()

    def _neuron_problems(self) -> Iterator[str]:
        if not self.neurons:
            yield "it has no neurons"
        if self.num_neurons != len(self.neurons):
            yield f"num_neurons={self.num_neurons}, but {len(self.neurons)} neurons are listed"
        if len({(neuron.layer, neuron.index) for neuron in self.neurons}) < len(self.neurons):
            yield "a neuron is listed twice"
        for neuron in self.neurons:
            if not 0 <= neuron.index < self.shapes.get(neuron.layer, [math.inf])[0]:
                yield f"neuron {neuron.index} of {neuron.layer} is out of range"

    def _weight_problems(self) -> Iterator[str]:
        if self.neurons:
            yield "a weight plan lists neurons"
        if self.edit == "mean":
            yield "edit=mean is for neurons"
        if not self.weights or self.num_weights != sum(map(len, self.weights.values())):
            yield f"num_weights={self.num_weights}, but {sum(map(len, self.weights.values()))} indices lie beside it"
        for layer, indices in self.weights.items():
            if indices.dim() != 1 or indices.dtype not in (torch.int32, torch.int64) or not len(indices):
                yield f"the indices of layer {layer} are not a list of integers"
            elif indices[0] < 0 or indices[-1] >= math.prod(self.shapes.get(layer, [math.inf])):
                yield f"a weight of {layer} is out of range"
            elif not (indices[1:] > indices[:-1]).all():
                yield f"the indices of layer {layer} are not in ascending order"


def _plain(data: dict[str, Any]) -> dict[str, Any]:
    """``data`` as it will be read back: floats that JSON cannot hold are null, tuples are lists."""
    return json.loads(strict_json(data))


def _readable(data: dict[str, Any]) -> str:
    """JSON with a line for every key and every neuron."""
    lines = []
    for key, value in data.items():
        text = strict_json(value, indent=1 if isinstance(value, dict) else None).replace("\n", "\n ")
        if key == "neurons" and value:
            text = "[\n  " + ",\n  ".join(strict_json(neuron) for neuron in value) + "\n ]"
        lines.append(f' "{key}": {text}')
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _check_version(data: Mapping[str, Any], where: Path) -> None:
    version = data.get("format_version")
    if version is None:
        raise InputError(f"{where}: has no format_version, so it is not a plan; give the file that prune wrote")
    if version != FORMAT_VERSION:
        older = not isinstance(version, int) or version < FORMAT_VERSION
        way = "make the plan again" if older else "update sparc3_pl"
        raise InputError(f"{where}: format_version={version}, but this program reads {FORMAT_VERSION}; {way}")


def _is_of(value: Any, kind: Any) -> bool:
    """Whether ``value`` fits an annotation such as ``int | None`` or ``list[str]`` (the items are not looked at)."""
    kinds = getattr(kind, "__args__", ()) if not hasattr(kind, "__origin__") else ()
    if kinds:
        return any(_is_of(value, one) for one in kinds)
    base = getattr(kind, "__origin__", kind)
    if base in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if base is float else base)


def _neuron(entry: Any, where: str | Path) -> PlannedNeuron:
    wanted = {item.name: item.type for item in fields(PlannedNeuron)}
    fits = isinstance(entry, dict) and {"layer", "index"} <= set(entry) <= set(wanted)
    if not fits or not all(_is_of(value, wanted[key]) for key, value in entry.items()):
        raise InputError(f"{where}: {entry!r} is not a neuron (layer, index, score); make the plan again")
    return PlannedNeuron(**entry)


def _companion_of(plan: Path) -> FileKind:
    """A file of tensors that the earlier plan at this path names."""
    before = read_json(plan).get("files") if plan.is_file() and KIND.is_one(plan) else None
    names = {entry.get("file") for entry in (before or {}).values()}
    return FileKind(f"a part of {plan}", lambda path: path.name in names)


def _companion(path: Path, entry: Any, kind: str) -> dict[str, Tensor]:
    """The tensors of a file beside the plan, once its bytes are those that the plan was saved with."""
    if not isinstance(entry, dict) or not isinstance(entry.get("file"), str):
        raise InputError(f"{path}: files.{kind}={entry!r} names no file; make the plan again")
    file = inside(path.parent, entry["file"])
    if not file.is_file():
        raise InputError(f"{file}: is missing, but {path} needs it; put it beside the plan")
    if sha256_of_file(file) != entry.get("sha256"):
        raise InputError(f"{file}: does not match the sha256 in {path}; it was changed or damaged, make the plan again")
    try:
        with open_tensors(file) as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise InputError(f"{file}: not a safetensors file ({error}); make the plan again") from error
