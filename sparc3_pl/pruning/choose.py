"""From score folders to a plan."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from sparc3_pl.errors import InputError
from sparc3_pl.files import sha256_of_file
from sparc3_pl.pruning.contrast import ContrastKind, Scores, contrast, format_warnings, protected, strongest
from sparc3_pl.pruning.controls import Control, null_sides, random_matched, random_passes
from sparc3_pl.pruning.plan import Edit, PlannedNeuron, PrunePlan
from sparc3_pl.pruning.selection import Passes, collect, cut_lowest, select_lowest
from sparc3_pl.scores import ScoreFolder

__all__ = ["make_plan"]

_STRONG = 0.05  # a choice is checked for how much of it lies in this share of the general set's strongest
_MANY = 0.3


def make_plan(
    general: Sequence[ScoreFolder],
    behaviour: Sequence[ScoreFolder] = (),
    *,
    num_neurons: int | None = None,
    num_weights: int | None = None,
    share: float | None = None,
    contrast: ContrastKind = "difference",
    layers: Sequence[str] | None = None,
    protect: float = 0.0,
    top_general: float = 0.05,
    top_behaviour: float = 0.05,
    control: Control | None = None,
    seed: int = 0,
    edit: Edit = "zero",
    alpha: float | None = None,
    per_layer: bool = False,
) -> PrunePlan:
    """Chooses the neurons (or weights) that the behaviour uses and general text does not.

    Args:
        general: Score folders of general text, one a seed.
        behaviour: Score folders of the behaviour's samples; not needed for ``contrast=general`` and the controls
            ``random``, ``top_general`` and ``null``.
        num_neurons: How many, over all layers together.
        num_weights: The same for folders of weight scores.
        share: A share of all instead, in (0, 1).
        contrast: How the sides are compared (``contrast.py``).
        layers: Globs of layer names to choose from (default: all that are scored).
        protect: Share of the general set's strongest that is never touched (but by ``control=top_general``).
        top_general: For ``set_difference``.
        top_behaviour: For ``set_difference``.
        control: Draw a control of the same size instead (``controls.py``).
        seed: Of the control.
        edit: What the plan does to what is chosen.
        alpha: Factor of ``edit=scale``.
        per_layer: Choose the same number in every layer, so that the model can be made smaller.

    Raises:
        InputError: naming the argument that is wrong.
    """
    _check_arguments(contrast, control, edit, alpha)
    if control == "null":
        general, behaviour = null_sides(general, seed)
    sides = (Scores.of(general, layers), Scores.of(behaviour, layers) if behaviour else None)
    chooser = _Chooser(*sides, contrast, protect, top_general, top_behaviour, control, seed)
    count = _count(sides[0], num_neurons, num_weights, share, per_layer)
    chosen = chooser.choose(count, per_layer)
    scores = sides[0]
    used = behaviour if control in (None, "random_matched", "null") and contrast != "general" else ()
    is_neuron = scores.granularity == "neuron"
    return PrunePlan(
        neurons=chooser.neurons(chosen) if is_neuron else [],
        weights={} if is_neuron else {layer: index.int() for layer, (index, _) in chosen.items()},
        model=dict(general[0].manifest.model),
        granularity=scores.granularity,
        num_neurons=count if is_neuron else 0,
        num_weights=0 if is_neuron else count,
        num_candidates=scores.count,
        contrast=contrast,
        edit=edit,
        alpha=alpha,
        control=control,
        seed=None if control is None else seed,
        settings=chooser.settings() | {"share": share, "layers": layers and list(layers), "per_layer": per_layer},
        shapes={layer: list(general[0].shape(layer)) for layer in chosen},
        scores={"general": _provenance(general), "behaviour": _provenance(used)},
        behaviour_samples=_behaviour_ids(used),
        warnings=_warnings(chooser, chosen, general, used),
    )


def _check_arguments(kind: str, control: str | None, edit: str, alpha: float | None) -> None:
    for name, value, known in (("contrast", kind, ContrastKind), ("control", control, Control), ("edit", edit, Edit)):
        if value is not None and value not in get_args(known):
            raise InputError(f"{name}={value!r} is unknown; known are {', '.join(get_args(known))}")
    if (edit == "scale") != (alpha is not None):
        raise InputError(f"edit={edit} with alpha={alpha}: a factor goes with edit=scale and only with it; e.g. 0.5")


def _count(scores: Scores, num_neurons: int | None, num_weights: int | None, share: float | None, each: bool) -> int:
    """How many components to choose; in the per-layer mode a multiple of the number of layers."""
    kind = scores.granularity
    asked = {"num_neurons": num_neurons, "num_weights": num_weights, "share": share}
    given = {name: value for name, value in asked.items() if value is not None}
    own, other = ("num_neurons", "num_weights") if kind == "neuron" else ("num_weights", "num_neurons")
    if len(given) != 1 or other in given:
        told = ", ".join(f"{name}={value}" for name, value in given.items()) or "neither was given"
        raise InputError(f"these are {kind} scores: give either {own} or share ({told})")
    if each:
        return _count_per_layer(scores, num_neurons, share)
    if share is not None:
        if not 0 < share < 1:
            raise InputError(f"share={share} is not a share between 0 and 1; e.g. 0.01 is 1 %")
        return max(1, round(share * scores.count))
    count = given[own]
    if count < 1:
        raise InputError(f"{own}={count}: at least 1 must be chosen")
    if count > scores.count:
        raise InputError(f"{own}={count}, but only {scores.count} are scored; lower {own} or widen layers")
    return count


def _count_per_layer(scores: Scores, num_neurons: int | None, share: float | None) -> int:
    if scores.granularity != "neuron":
        raise InputError("shrink removes whole neurons, but these are weight scores; give neuron scores")
    widths = {stop - start for start, stop in map(scores.span, scores.layers)}
    if len(widths) > 1:
        raise InputError(f"shrink needs layers of one width, but widths are {sorted(widths)}; narrow layers")
    width, depth = widths.pop(), len(scores.layers)
    if share is not None and not 0 < share < 1:
        raise InputError(f"share={share} is not a share between 0 and 1; e.g. 0.01 is 1 %")
    count = max(1, round(share * width)) * depth if share is not None else num_neurons
    if count < depth or count % depth or count >= width * depth:
        near = max(1, min(round(count / depth), width - 1)) * depth
        raise InputError(f"num_neurons={count} is not the same number in each of {depth} layers; e.g. {near} is")
    return count


class _Chooser:
    """The values to choose by, and the choice."""

    def __init__(
        self,
        general: Scores,
        behaviour: Scores | None,
        kind: ContrastKind,
        protect: float,
        top_general: float,
        top_behaviour: float,
        control: Control | None,
        seed: int,
    ) -> None:
        self.general, self.behaviour, self.kind, self.control, self.seed = general, behaviour, kind, control, seed
        self.protect, self.top_general, self.top_behaviour = protect, top_general, top_behaviour
        self.name = "num_neurons" if general.granularity == "neuron" else "num_weights"
        if control in ("random", "top_general"):
            values = random_passes(general, seed) if control == "random" else strongest(general)
        else:
            values = contrast(kind, general, behaviour, top_general, top_behaviour)
        self.values = values if control == "top_general" else protected(values, general, protect)
        if control == "random_matched" and general.granularity == "weight":
            raise InputError("control=random_matched is for neuron scores; use random for weight scores")

    def settings(self) -> dict[str, Any]:
        own = {"top_general": self.top_general, "top_behaviour": self.top_behaviour}
        return {"protect": self.protect} | (own if self.kind == "set_difference" else {})

    @property
    def refusal(self) -> str:
        reasons = [f"protect={self.protect}"] if self.protect else []
        if self.kind == "set_difference":
            reasons.append(f"set_difference of top_behaviour={self.top_behaviour}, top_general={self.top_general}")
        left_out = f" ({'; '.join(reasons)})" if reasons else ""
        return f"{self.name}={{k}}, but only {{n}} of {self.general.count} may be chosen{left_out}; lower {self.name}"

    def choose(self, count: int, per_layer: bool) -> dict[str, tuple[Tensor, Tensor]]:
        """Indices and values by layer."""
        if not per_layer:
            chosen = select_lowest(self.values, count, self.refusal)
        else:
            each, chosen = count // len(self.general.layers), {}
            for layer, (start, values) in collect(self.values).items():
                chosen |= select_lowest(_one_layer(layer, start, values), each, f"layer {layer}: {self.refusal}")
        return self._matched(chosen) if self.control == "random_matched" else chosen

    def _matched(self, chosen: dict[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
        general, values = collect(self.general), collect(self._unmasked())
        allowed = {layer: part.isfinite() for layer, (_, part) in collect(self._open()).items()}
        start = {layer: offset for layer, (offset, _) in general.items()}
        wanted = [(n.layer, n.index - start[n.layer]) for n in self.neurons(chosen)]
        drawn = random_matched(wanted, {layer: part for layer, (_, part) in general.items()}, allowed, self.seed)
        found: dict[str, list[int]] = {}
        for layer, position in drawn:
            found.setdefault(layer, []).append(position)
        index = {layer: torch.tensor(sorted(found[layer])) for layer in self.general.layers if layer in found}
        return {layer: (i + start[layer], values[layer][1][i]) for layer, i in index.items()}

    def _unmasked(self) -> Passes:
        """The plain difference: a value for those, too, that the contrast leaves out."""
        return contrast("difference", self.general, self.behaviour) if self.behaviour else self.general

    def _open(self) -> Passes:
        """Finite for whatever is not protected."""
        return protected(self.general, self.general, self.protect)

    def neurons(self, chosen: dict[str, tuple[Tensor, Tensor]]) -> list[PlannedNeuron]:
        """Best first; equal scores by layer and index."""
        found = [
            PlannedNeuron(layer, index, value)
            for layer, (indices, values) in chosen.items()
            for index, value in zip(indices.tolist(), values.tolist(), strict=True)
        ]
        return sorted(found, key=lambda neuron: neuron.score)

    def share_of_strongest(self, chosen: dict[str, tuple[Tensor, Tensor]]) -> float:
        """How much of the choice lies in the top ``_STRONG`` share of general scores."""
        ordered = strongest(self.general)
        cut = cut_lowest(ordered, max(1, round(_STRONG * self.general.count)))
        hits = total = 0
        for layer, offset, values in ordered():
            top = cut.take(values)
            index = chosen.get(layer, (torch.empty(0, dtype=torch.int64),))[0] - offset
            inside = index[(index >= 0) & (index < len(top))]
            hits, total = hits + int(top[inside].sum()), total + len(inside)
        return hits / total


def _one_layer(layer: str, start: int, values: Tensor) -> Passes:
    return lambda: iter([(layer, start, values)])


def _warnings(
    chooser: _Chooser, chosen: dict[str, tuple[Tensor, Tensor]], general: Sequence[ScoreFolder], used: Sequence[Any]
) -> list[str]:
    found = format_warnings(general, used) if used else []
    if chooser.control is None and chooser.kind != "general" and chooser.general.granularity == "neuron":
        part = chooser.share_of_strongest(chosen)
        if part > _MANY:
            found.append(
                f"{part:.0%} of the chosen are among the {_STRONG:.0%} that general text uses most: the edit will harm "
                f"the model; protect them (protect={_STRONG}) or use another contrast"
            )
    for name, folders in (("general", general), ("behaviour", used)):
        sets = [set(folder.manifest.data.get("sample_ids") or ()) for folder in folders]
        if len(set().union(*sets)) < sum(map(len, sets)):
            found.append(f"{name} folders share samples, so they are not independent; score them with unequal seeds")
    if set(_sample_ids(general)) & set(_sample_ids(used)):
        found.append("general and behaviour folders share samples; score general text on other data")
    return found


def _provenance(folders: Sequence[ScoreFolder]) -> list[dict[str, Any]]:
    """What a plan says of the scores that it came from: names, never paths."""
    return [
        {
            "name": folder.path.resolve().name,
            "sha256": sha256_of_file(folder.path / "manifest.json"),
            "method": folder.manifest.method,
            "signed": folder.manifest.signed,
            "num_samples": folder.manifest.num_samples,
            "num_tokens": folder.manifest.num_tokens,
            "source": Path(str(folder.manifest.data.get("source"))).name,
            "seed": folder.manifest.data.get("seed"),
            "total_relevance": folder.manifest.total_relevance,
        }
        for folder in folders
    ]


def _sample_ids(folders: Sequence[ScoreFolder]) -> list[str]:
    return sorted({str(name) for folder in folders for name in folder.manifest.data.get("sample_ids") or ()})


def _behaviour_ids(folders: Sequence[ScoreFolder]) -> list[str]:
    """Ids of the samples, and of the texts that they were made from: of packed or cut ones these are others."""
    texts = {str(name) for folder in folders for sample in folder.samples() for name in sample.get("text_ids") or ()}
    return sorted({*_sample_ids(folders), *texts})
