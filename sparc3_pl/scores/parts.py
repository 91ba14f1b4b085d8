"""A part of a scoring run: the sums over some of its samples, for ``merge`` to join."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sparc3_pl.attribution.methods import Options
from sparc3_pl.errors import InputError
from sparc3_pl.io.files import FolderKind, json_digest, new_folder, read_json, strict_json, write_text
from sparc3_pl.io.provenance import command_line, now, redacted, versions
from sparc3_pl.model.components import Group
from sparc3_pl.scores.manifest import About, ScoredSample
from sparc3_pl.scores.sums import LayerTensors, Records, SumsFile, sums_of, write_sums

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
        raise InputError(f"part={text!r}: give i/n with i from 1 to n, as 2/8 for the second of eight")
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
        folder: Where.
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
    records = [sample.to_json() for sample in samples]
    with new_folder(folder, overwrite, KIND) as temporary:
        shapes, load = sums_of(tensors)
        digests = write_sums(temporary / _SUMS, shapes, load, records)
        if config is not None:
            write_text(temporary / "config.yaml", config)
        content = {
            "format_version": FORMAT_VERSION,
            "shard": list(part),
            "settings": dict(settings),
            "about": asdict(about),
            "groups": [asdict(group) for group in groups],
            "tensors": digests,
            "samples_sha256": _records_digest(records),
            "versions": versions(),
            "command": command_line(),
            "created": now(),
        }
        content = json.loads(strict_json(redacted(content)))
        write_text(temporary / MARKER, strict_json(content | {"sha256": json_digest(content)}, indent=1) + "\n")


def _records_digest(records: Records) -> str:
    return hashlib.sha256(json.dumps(records, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class ScorePart:
    """A part that was checked when opened; the bytes of a tensor are checked when they are read.

    Attributes:
        path: The folder.
        content: ``shard.json``.
        sums: ``sums.safetensors``.
    """

    path: Path
    content: dict[str, Any]
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
        content = read_json(path / MARKER)
        version = content.get("format_version")
        if version != FORMAT_VERSION:
            raise InputError(
                f"{path}: format_version={version!r}, but this program reads {FORMAT_VERSION}; score the part again"
            )
        if content.pop("sha256", None) != json_digest(content):
            raise InputError(f"{path / MARKER}: its content does not match its sha256; it was changed, score it again")
        sums = SumsFile(path / _SUMS)
        if (
            sums.shapes.keys() != content["tensors"].keys()
            or _records_digest(sums.records) != content["samples_sha256"]
        ):
            raise InputError(f"{sums.path}: does not belong to its {MARKER}; it was changed, score the part again")
        return cls(path, content, sums)

    @property
    def number(self) -> int:
        """Which part this is, from 1."""
        return self.content["shard"][0]

    @property
    def count(self) -> int:
        """Of how many."""
        return self.content["shard"][1]

    def load(self, name: str) -> Tensor:
        """The sum ``LAYER/KEY``.

        Raises:
            InputError: if its bytes do not match their sha256.
        """
        tensor = self.sums.load(name)
        if (
            hashlib.sha256(memoryview(tensor.reshape(-1).numpy()).cast("B")).hexdigest()
            != self.content["tensors"][name]
        ):
            raise InputError(f"{self.sums.path}: {name} does not match its sha256; a byte was changed, score it again")
        return tensor

    @property
    def about(self) -> About:
        """What the manifest will say of the scores."""
        return About.from_json(self.content["about"])

    @property
    def options(self) -> Options:
        """The options that the sums were made with, as far as scores depend on them."""
        settings = self.content["settings"]
        given = {name: settings[name] for name in ("signed", "squares", "groups", "nonfinite")}
        return Options(**given, seed=self.about.seed or 0)

    def groups(self) -> dict[str, Group]:
        """The scored components by layer, in the model's order."""
        if "groups" in self.content:
            groups = [Group(**group | {"shape": tuple(group["shape"])}) for group in self.content["groups"]]
            return {group.layer: group for group in groups}
        layers = self.content["settings"]["layers"]  # a part of an earlier version
        return {layer: self._earlier_group(layer) for layer in layers}

    def _earlier_group(self, layer: str) -> Group:
        shape = self.sums.shapes[f"{layer}/sum"][1]
        if self.about.granularity == "weight":
            return Group(layer, shape, "both", math.prod(shape))
        start, stop = self.content["about"].get("neuron_rows", {}).get(layer, (0, shape[0]))
        return Group(layer, shape, "out", stop - start, first=start)
