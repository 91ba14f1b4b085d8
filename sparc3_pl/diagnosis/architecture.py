"""Do scores have the layers and shapes that the model says it has? Asked of the config: no weights are loaded."""

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
    """A model's linear layers, as its config describes them.

    Attributes:
        class_name: Of the model.
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
    """Asked once for all folders of a model: a hub that does not answer takes seconds to find out."""
    try:
        return architecture(pretrained, revision)
    except InputError as error:
        return str(error)


def check_architecture(manifest: Manifest) -> Check:
    """Compares the scored layers with the model's own: names, order, shapes, class."""
    found = _architecture_or_reason(str(manifest.model.get("pretrained")), manifest.model.get("revision"))
    if isinstance(found, str):
        return Check(NAME, "warn", f"not checked: {found}")
    wanted = found.expected(manifest.targets)
    problems = _problems(manifest, found, wanted)
    if problems:
        return Check(NAME, "fail", f"{'; '.join(problems)}; the scores are of another model or incomplete: score again")
    weights = sum(out * inside for out, inside in wanted.values())
    text = f"{len(wanted)} layers with {weights:,} weights, as the config of {found.class_name} says"
    return Check(NAME, "pass", f"{text} (of {len(found.shapes)} linear layers)")


def _problems(manifest: Manifest, found: Architecture, wanted: dict[str, tuple[int, int]]) -> list[str]:
    problems = []
    scored = {name: tuple(layer.shape) for name, layer in manifest.layers.items()}
    if (said := manifest.model.get("architecture")) not in (None, found.class_name):
        problems.append(f"scored as {said}, but the config says {found.class_name}")
    for text, names in (("lacks", wanted.keys() - scored), ("has the unexpected", scored.keys() - wanted)):
        if names:
            problems.append(f"{text} {len(names)} layer(s), e.g. {min(names)}")
    for name in wanted.keys() & scored:
        shape = wanted[name][: len(scored[name])]
        if scored[name] != shape:
            problems.append(f"{name} has shape {list(scored[name])}, the model {list(shape)}")
    if not problems and list(wanted) != list(scored):
        problems.append("its layers are not in the model's order")
    return problems[:4]
