"""A part of a scoring run: the sums over some of its samples, for ``merge`` to join."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from sparc3_pl.attribution.methods import Options
from sparc3_pl.errors import InputError
from sparc3_pl.io.files import FolderKind, new_folder, strict_json, tensor_digest, write_text
from sparc3_pl.io.formats import Format, Record
from sparc3_pl.io.provenance import command_line, now, redacted, versions
from sparc3_pl.model.components import Group
from sparc3_pl.scores.manifest import About, ScoredSample
from sparc3_pl.scores.sums import LayerTensors, SumsFile, samples_digest, sums_of, write_sums

__all__ = ["KIND", "MARKER", "ScorePart", "parse_part", "write_part"]


MARKER = "shard.json"

FORMAT_VERSION = 1

_SUMS = "sums.safetensors"

KIND = FolderKind("a shard", MARKER, (_SUMS, "config.yaml"))


def parse_part(text: str) -> tuple[int, int]:
    """``"2/8"`` as ``(2, 8)``: the second of eight.

    Raises:
        InputError: if it is not of that form, or there is no such part.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    number, count = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= number <= count:
        raise InputError(f"part={text!r}: give i/n with i from 1 to n, such as 2/8 for the second of eight")
    return number, count


def write_part(
    folder: str | Path,
    overwrite: bool,
    *,
    part: tuple[int, int],
    settings: Mapping[str, Any],
    about: About,
    groups: Sequence[Group],
    tensors: LayerTensors,
    samples: Sequence[ScoredSample],
    config: str | None,
) -> None:
    """Writes a part, whole or not at all.

    Args:
        folder: Folder to write.
        overwrite: Whether an earlier part there may be replaced.
        part: Which part of how many.
        settings: What every part of the run has in common.
        about: What the manifest will say of the scores.
        groups: The scored components, by layer.
        tensors: The sums, by layer.
        samples: The samples they are sums of.
        config: The resolved configuration as YAML.

    Raises:
        InputError: if the place is taken or cannot be written.
    """
    with new_folder(folder, overwrite, KIND) as temporary:
        shapes, load = sums_of(tensors)
        digests = write_sums(temporary / _SUMS, shapes, load, samples)
        if config is not None:
            write_text(temporary / "config.yaml", config)
        content = {
            "shard": list(part),
            "settings": dict(settings),
            "about": asdict(about),
            "groups": [asdict(group) for group in groups],
            "tensors": digests,
            "samples_sha256": samples_digest([sample.to_json() for sample in samples]),
            "versions": versions(),
            "command": command_line(),
            "created": now(),
        }
        write_text(temporary / MARKER, strict_json(FORMAT.seal(redacted(content)), indent=1) + "\n")


@dataclass(frozen=True, kw_only=True)
class PartAbout(About):
    """What a part says of the scores; one of an earlier version names the rows that are neurons' here."""

    neuron_rows: dict[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class PartContent:
    """The content of ``shard.json``.

    Attributes:
        shard: Which part of how many, from 1.
        settings: What every part of the run has in common.
        about: What the manifest will say of the scores.
        tensors: sha256 of each tensor's bytes by ``LAYER/KEY``.
        samples_sha256: Digest of the samples' records.
        versions: Versions of Python and the packages.
        command: The command line that made the part.
        created: UTC, ISO 8601.
        groups: The scored components, in the model's order; a part of an earlier version has none.
    """

    shard: tuple[int, int]
    settings: Record
    about: PartAbout
    tensors: dict[str, str]
    samples_sha256: str
    versions: dict[str, str]
    command: str
    created: str
    groups: list[Group] | None = None


FORMAT = Format(PartContent, "the content of a part", FORMAT_VERSION, "score the part again", sealed=True)


@dataclass(frozen=True)
class ScorePart:
    """A part that was checked when opened; the bytes of a tensor are checked when they are read.

    Attributes:
        path: The folder.
        content: ``shard.json``.
        sums: ``sums.safetensors``.
    """

    path: Path
    content: PartContent
    sums: SumsFile

    @classmethod
    def open(cls, path: str | Path) -> ScorePart:
        """Opens a part for reading.

        Raises:
            InputError: if it is missing, is no part, of another version, incomplete, or was changed.
        """
        path = Path(path)
        if not (path / MARKER).is_file():
            raise InputError(f"{path}: holds no {MARKER}; give folders that score --part has written")
        content = FORMAT.read(path / MARKER)
        sums = SumsFile(path / _SUMS)
        if sums.shapes.keys() != content.tensors.keys() or sums.samples_sha256 != content.samples_sha256:
            raise InputError(f"{sums.path}: does not belong to its {MARKER}; it was changed, score the part again")
        return cls(path, content, sums)

    @property
    def number(self) -> int:
        """Which part this is, from 1."""
        return self.content.shard[0]

    @property
    def count(self) -> int:
        """How many parts the run has."""
        return self.content.shard[1]

    def load(self, name: str) -> Tensor:
        """The sum ``LAYER/KEY``.

        Raises:
            InputError: if its bytes do not match their sha256.
        """
        tensor = self.sums.load(name)
        if tensor_digest(tensor) != self.content.tensors[name]:
            raise InputError(f"{self.sums.path}: {name} does not match its sha256; a byte was changed, score it again")
        return tensor

    @property
    def about(self) -> About:
        """What the manifest will say of the scores."""
        return About(**{item.name: getattr(self.content.about, item.name) for item in fields(About)})

    @property
    def options(self) -> Options:
        """The options that the sums were made with, as far as scores depend on them."""
        settings = self.content.settings
        options = {name: settings[name] for name in ("signed", "squares", "groups", "nonfinite")}
        return Options(**options, seed=self.about.seed or 0)

    def groups(self) -> dict[str, Group]:
        """The scored components by layer, in the model's order."""
        if self.content.groups is not None:
            return {group.layer: group for group in self.content.groups}
        layers = self.content.settings["layers"]  # a part of an earlier version
        return {layer: self._earlier_group(layer) for layer in layers}

    def _earlier_group(self, layer: str) -> Group:
        shape = self.sums.shapes[f"{layer}/sum"][1]
        if self.about.granularity == "weight":
            return Group(layer, shape, "both", math.prod(shape))
        start, stop = self.content.about.neuron_rows.get(layer, (0, shape[0]))
        return Group(layer, shape, "out", stop - start, first=start)
