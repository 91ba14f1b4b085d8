"""Whether scores have the layers and shapes of their model, by its config: no weights are loaded."""

from __future__ import annotations

import fnmatch
import functools
from dataclasses import dataclass

from sparc3_pl.document.verdicts import Check
from sparc3_pl.errors import InputError
from sparc3_pl.model.loading import load_skeleton
from sparc3_pl.model.source import ModelSource
from sparc3_pl.model.structure import features, linear_layers, select_layers
from sparc3_pl.scores.manifest import Manifest

__all__ = ["Architecture", "architecture", "check_architecture"]

NAME = "architecture"


@dataclass(frozen=True)
class Architecture:
    """The linear layers of a model, as its config describes them.

    Attributes:
        class_name: Class of the model.
        shapes: ``(out, in)`` of every linear layer of the decoder, and of the output head, which comes last.
        targets: The layers that scoring without ``model.targets`` looks at.
    """

    class_name: str
    shapes: dict[str, tuple[int, int]]
    targets: tuple[str, ...]

    def expected(self, patterns: list[str] | None) -> dict[str, tuple[int, int]]:
        """The layers that scoring with ``model.targets`` = ``patterns`` looks at, in the model's order."""
        if patterns is None:
            return {name: self.shapes[name] for name in self.targets}
        return {n: s for n, s in self.shapes.items() if any(fnmatch.fnmatchcase(n, pattern) for pattern in patterns)}


def architecture(pretrained: str, revision: str | None = None) -> Architecture:
    """Reads a model's config and builds it without weights.

    Raises:
        InputError: if the config cannot be found, or the model is not one that can be scored.
    """
    model = load_skeleton(ModelSource(pretrained, revision=revision))
    shapes = {name: features(layer) for name, layer in linear_layers(model).items()}
    return Architecture(type(model).__name__, shapes, tuple(select_layers(model, None)))


@functools.lru_cache(maxsize=16)
def _architecture_or_reason(pretrained: str, revision: str | None) -> Architecture | str:
    """The architecture, or why it is unknown; cached, because a hub that does not answer costs seconds."""
    try:
        return architecture(pretrained, revision)
    except InputError as error:
        return str(error)


def check_architecture(manifest: Manifest) -> Check:
    """Compares the scored layers with the model's own: names, order, shapes, class."""
    described = _architecture_or_reason(str(manifest.model.get("pretrained")), manifest.model.get("revision"))
    if isinstance(described, str):
        return Check(NAME, "warn", f"not checked: {described}")
    expected = described.expected(manifest.targets)
    problems = _problems(manifest, described, expected)
    if problems:
        return Check(NAME, "fail", f"{'; '.join(problems)}; the scores are of another model or incomplete: score again")
    weights = sum(rows * columns for rows, columns in expected.values())
    text = f"{len(expected)} layers with {weights:,} weights, as in the config of {described.class_name}"
    return Check(NAME, "pass", f"{text} (of {len(described.shapes)} linear layers)")


def _problems(manifest: Manifest, described: Architecture, expected: dict[str, tuple[int, int]]) -> list[str]:
    problems = []
    scored = {name: tuple(layer.shape) for name, layer in manifest.layers.items()}
    if (class_name := manifest.model.get("architecture")) not in (None, described.class_name):
        problems.append(f"scored as {class_name}, but the config says {described.class_name}")
    for text, names in (("lacks", expected.keys() - scored), ("has the unexpected", scored.keys() - expected)):
        if names:
            problems.append(f"{text} {len(names)} layer(s), e.g. {min(names)}")
    for name in (name for name in expected if name in scored):
        shape = expected[name][: len(scored[name])]
        if scored[name] != shape:
            problems.append(f"{name} has shape {list(scored[name])}, the model {list(shape)}")
    if not problems and list(expected) != list(scored):
        problems.append("its layers are not in the model's order")
    return problems[:4]
