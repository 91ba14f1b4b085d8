"""Checks that scores have the layers and shapes of their model, by its config: no weights are loaded."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparc3_pl.attribution.scorers import groups_of
from sparc3_pl.document.verdicts import Check
from sparc3_pl.errors import InputError
from sparc3_pl.model.loading import load_skeleton
from sparc3_pl.model.source import ModelSource
from sparc3_pl.model.structure import features, linear_layers
from sparc3_pl.scores.manifest import Manifest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Architecture", "check_architecture", "expected_scores"]

NAME = "architecture"


@dataclass(frozen=True)
class Architecture:
    """The layers and shapes of a model's scores, by its config and the kinds of component.

    Attributes:
        class_name: Class of the model.
        num_layers: Number of its linear layers, the output head included.
        shapes: Shape of the scores of every layer that is scored, in the model's order.
        components: The name of each layer's kind of component, where several kinds are scored.
        num_weights: Number of weights of these layers.
    """

    class_name: str
    num_layers: int
    shapes: dict[str, tuple[int, ...]]
    components: dict[str, str | None]
    num_weights: int


def expected_scores(manifest: Manifest) -> Architecture:
    """The layers and shapes that a score folder must hold, by its manifest's model, components and targets.

    Raises:
        InputError: if the config cannot be found, or the model has no such components.
    """
    skeleton = _skeleton(
        str(manifest.model.pretrained), manifest.model.revision, manifest.model.dequantized is not None
    )
    if isinstance(skeleton, str):
        raise InputError(skeleton)
    layers = linear_layers(skeleton)
    groups = groups_of(skeleton, manifest.components(), manifest.targets)
    shapes = {group.layer: group.shape for group in groups}
    components = {group.layer: group.component for group in groups}
    num_weights = sum(math.prod(features(layers[name])) for name in shapes)
    return Architecture(type(skeleton).__name__, len(layers), shapes, components, num_weights)


@functools.lru_cache(maxsize=16)
def _skeleton(pretrained: str, revision: str | None, dequantize: bool) -> PreTrainedModel | str:
    """The model without weights, or why it is unknown; cached, because a hub that does not answer costs seconds."""
    try:
        return load_skeleton(ModelSource(pretrained, revision=revision, dequantize=dequantize))
    except InputError as error:
        return str(error)


def check_architecture(manifest: Manifest) -> Check:
    """Compares the scored layers with the model's own: names, order, shapes, class."""
    try:
        expected = expected_scores(manifest)
    except InputError as error:
        return Check(NAME, "warn", f"not checked: {error}")
    problems = _problems(manifest, expected)
    if problems:
        return Check(NAME, "fail", f"{'; '.join(problems)}; the scores are of another model or incomplete: score again")
    text = f"{len(expected.shapes)} layers with {expected.num_weights:,} weights, as in the config of "
    return Check(NAME, "pass", f"{text}{expected.class_name} (of {expected.num_layers} linear layers)")


def _problems(manifest: Manifest, expected: Architecture) -> list[str]:
    problems = []
    shapes = {name: tuple(layer.shape) for name, layer in manifest.layers.items()}
    if (class_name := manifest.model.architecture) not in (None, expected.class_name):
        problems.append(f"scored as {class_name}, but the config says {expected.class_name}")
    missing, unexpected = expected.shapes.keys() - shapes, shapes.keys() - expected.shapes
    for text, names in (("lacks", missing), ("has the unexpected", unexpected)):
        if names:
            problems.append(f"{text} {len(names)} layer(s), e.g. {min(names)}")
    for name, shape in expected.shapes.items():
        if name in shapes and shapes[name] != shape:
            problems.append(f"{name} has shape {list(shapes[name])}, the model {list(shape)}")
    for name, layer in manifest.layers.items():
        if layer.component is not None and layer.component != (kind := expected.components.get(name)):
            problems.append(f"{name} is scored as {layer.component}, in the model it is a layer of {kind}")
    if not problems and list(expected.shapes) != list(shapes):
        problems.append("its layers are not in the model's order")
    return problems[:4]
