"""Parts of one scoring run that were scored on separate machines, and how they become one score folder.

A part holds sums over its samples of what the method accumulates: those add up whatever the method (|W| * ||x|| of
Wanda does not, its sums of squares do).

```
part/
  shard.json         settings, model, data, which part of how many; sha256 of every tensor and of the samples
  sums.safetensors   by LAYER/KEY: sum, squares, nan, inf; the samples' records in the header
  config.yaml
```
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sparc3_pl.attribution.methods import METHODS, Method, Options
from sparc3_pl.attribution.scorers import LayerScores, groups_of, layer_scores
from sparc3_pl.components import Group
from sparc3_pl.errors import InputError
from sparc3_pl.families import weight_matrix
from sparc3_pl.files import FolderKind, check_output, json_digest, new_folder, read_json, strict_json, write_text
from sparc3_pl.language_model import ModelSource, differing_config, fingerprint, load_model, model_config
from sparc3_pl.provenance import command_line, now, redacted, versions
from sparc3_pl.resume import LayerTensors, Records, SumsFile, added, differing_settings, sums_of, write_sums
from sparc3_pl.scores import KIND as SCORES
from sparc3_pl.scores import About, Manifest, ScoredSample, write_scores

__all__ = ["KIND", "MARKER", "ScorePart", "merge", "parse_part", "write_part"]

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


def merge(
    folders: list[str],
    output: str,
    overwrite: bool = False,
    pretrained: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Join the parts of one scoring run (score --part i/n) into the score folder of the whole run.

    Args:
        folders: All parts, in any order.
        output: The score folder to write.
        overwrite: Replace earlier scores in output.
        pretrained: Where the model lies on this machine, if not where the parts found it; only for methods whose
            scores need its weights, such as wanda.
        trust_remote_code: Run the model code that a hub repository brings; only where the model is needed.

    Raises:
        InputError: If a part is missing, was given twice, or was made with other settings.
    """
    from sparc3_pl.report.terminal import print_summary

    check_output(output, overwrite, SCORES)
    parts = sorted((ScorePart.open(folder) for folder in folders), key=lambda part: part.number)
    _require_whole(parts)
    manifest = _write(parts, output, overwrite, pretrained, trust_remote_code)
    print_summary(manifest, Path(output))


def _require_whole(parts: Sequence[ScorePart]) -> None:
    """They are parts of one run, all of them, and no sample is in two."""
    first = parts[0]
    for part in parts[1:]:
        key = next(differing_settings(first.content["settings"], part.content["settings"]), None)
        if key is not None:
            raise InputError(
                f"{part.path}: was made with another {key} than {first.path}; score it again like the others"
            )
    _require_disjoint(parts)
    if missing := sorted(set(range(1, first.count + 1)) - {part.number for part in parts}):
        listed = ", ".join(f"{number}/{first.count}" for number in missing[:5])
        raise InputError(f"part {listed} is missing: {len(parts)} of {first.count} were given; score it and give all")
    wanted, scored = set(first.about.data["sample_ids"]), {i for part in parts for i in part.sums.ids}
    if wanted != scored:
        raise InputError(
            f"the parts hold {len(scored)} samples, but the run has {len(wanted)}; score the parts again, without "
            "trainer.limit_predict_batches"
        )


def _require_disjoint(parts: Sequence[ScorePart]) -> None:
    held: dict[str, ScorePart] = {}
    for part in parts:
        both = [identity for identity in sorted(part.sums.ids) if identity in held]
        if both:
            raise InputError(
                f"{part.path}: {len(both)} of its samples are in {held[both[0]].path} too (first id: {both[0]}), so "
                "they would count twice; give each part once"
            )
        held |= dict.fromkeys(part.sums.ids, part)


def _write(
    parts: Sequence[ScorePart], output: str, overwrite: bool, pretrained: str | None, trust_remote_code: bool
) -> Manifest:
    first, about = parts[0], parts[0].about
    method = METHODS.from_file(about.method, about.method_args)
    groups, model = None, None
    if method.needs_weights:
        model = _model_of(about, _source(about.model, pretrained, trust_remote_code))
        groups = {group.layer: group for group in groups_of(model, about.components(), about.targets)}
    samples = [ScoredSample.from_json(record) for part in parts for record in part.sums.records]
    config = first.path / "config.yaml"
    return write_scores(
        output,
        overwrite,
        _merged(parts, method, groups or first.groups(), len(samples), model),
        about,
        samples,
        config=config.read_text(encoding="utf-8") if config.is_file() else None,
        shards=[part.content["command"] for part in parts],
    )


def _merged(
    parts: Sequence[ScorePart], method: Method, groups: Mapping[str, Group], num_samples: int, model: nn.Module | None
) -> Iterator[LayerScores]:
    """The scores of every layer, from the sums of all parts: two tensors in memory at a time."""
    load = added(parts)
    for layer, group in groups.items():
        sums = {key: load(f"{layer}/{key}") for key in parts[0].sums.keys(layer)}
        weight_OI = None if model is None else weight_matrix(model.get_submodule(layer)).detach()
        yield layer_scores(method, group, sums, num_samples, weight_OI, parts[0].options)


def _model_of(about: About, source: ModelSource) -> nn.Module:
    """The model that the parts have scored.

    Raises:
        InputError: if ``source`` is another one.
    """
    model = load_model(source)
    here, wanted = fingerprint(model), about.model["fingerprint"]
    if here != wanted:
        raise InputError(
            f"pretrained={source.pretrained!r}: is another model ({here[:19]}...) than the parts have scored "
            f"({wanted[:19]}...); give the model of the parts"
        )
    if (key := differing_config(about.model.get("config") or {}, model_config(model))) is not None:
        raise InputError(f"pretrained={source.pretrained!r}: has another {key} than the parts have scored; check it")
    return model


def _source(model: Mapping[str, Any], pretrained: str | None, trust_remote_code: bool) -> ModelSource:
    if pretrained is not None:
        return ModelSource(pretrained, model["dtype"], trust_remote_code=trust_remote_code)
    return ModelSource(model["pretrained"], model["dtype"], model["revision"], trust_remote_code=trust_remote_code)
