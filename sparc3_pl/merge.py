"""Shards: parts of one scoring run that were made on separate machines, and how they become one score folder.

A shard holds sums over its samples of what the method accumulates: those add up whatever the method (|W| * ||x|| of
Wanda does not, its sums of squares do).

```
shard/
  shard.json         settings, model, data, which part of how many; sha256 of every tensor and of the samples
  sums.safetensors   by LAYER/KEY: sum, squares, nan, inf; the samples' records in the header
  config.yaml
```
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sparc3_pl.attribution.scorers import WandaScorer, group_means
from sparc3_pl.errors import InputError
from sparc3_pl.families import linear_layers
from sparc3_pl.files import check_output, json_digest, new_folder, read_json, strict_json, write_text
from sparc3_pl.language_model import ModelSource, differing_config, fingerprint, load_model, model_config
from sparc3_pl.provenance import command_line, now, redacted_values, versions
from sparc3_pl.resume import LayerTensors, Records, SumsFile, differing_settings, sums_of, write_sums
from sparc3_pl.scores import MARKER as SCORES_MARKER
from sparc3_pl.scores import Manifest, ScoreWriter

__all__ = ["MARKER", "Shard", "merge", "parse_shard", "write_shard"]

MARKER = "shard.json"
FORMAT_VERSION = 1
_SUMS = "sums.safetensors"


def parse_shard(text: str) -> tuple[int, int]:
    """``"2/8"`` as ``(2, 8)``: the second of eight.

    Raises:
        InputError: if it is not of that form, or there is no such part.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    number, count = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= number <= count:
        raise InputError(f"shard={text!r}: give i/n with i from 1 to n, as 2/8 for the second of eight")
    return number, count


def write_shard(
    folder: str | Path,
    overwrite: bool,
    *,
    shard: tuple[int, int],
    settings: Mapping[str, Any],
    about: Mapping[str, Any],
    tensors: LayerTensors,
    records: Records,
    config: str | None,
) -> Path:
    """Writes a shard, whole or not at all.

    Args:
        folder: Where.
        overwrite: Whether an earlier shard there may be replaced.
        shard: Which part of how many.
        settings: What every shard of the run has in common.
        about: Manifest fields that ``merge`` hands on: ``model``, ``data``, ``targets``, ``nonfinite``, ``seed``.
        tensors: The sums, by layer.
        records: Of the samples.
        config: The resolved configuration as YAML.

    Raises:
        InputError: if the place is taken or cannot be written.
    """
    with new_folder(folder, overwrite, MARKER) as temporary:
        shapes, load = sums_of(tensors)
        digests = write_sums(temporary / _SUMS, shapes, load, records)
        if config is not None:
            write_text(temporary / "config.yaml", config)
        content = {
            "format_version": FORMAT_VERSION,
            "shard": list(shard),
            "settings": dict(settings),
            "about": dict(about),
            "tensors": digests,
            "samples_sha256": _records_digest(records),
            "versions": versions(),
            "command": command_line(),
            "created": now(),
        }
        content = json.loads(strict_json(redacted_values(content)))
        write_text(temporary / MARKER, strict_json(content | {"sha256": json_digest(content)}, indent=1) + "\n")
    return Path(folder)


def _records_digest(records: Records) -> str:
    return hashlib.sha256(json.dumps(records, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Shard:
    """A shard that was checked when opened; the bytes of a tensor are checked when they are read.

    Attributes:
        path: The folder.
        content: ``shard.json``.
        sums: ``sums.safetensors``.
    """

    path: Path
    content: dict[str, Any]
    sums: SumsFile

    @classmethod
    def open(cls, path: str | Path) -> Shard:
        """Opens a shard for reading.

        Raises:
            InputError: if it is missing, is no shard, of another version, incomplete, or was changed.
        """
        path = Path(path)
        if not (path / MARKER).is_file():
            raise InputError(f"{path}: holds no {MARKER}; give folders that score --shard has written")
        content = read_json(path / MARKER)
        version = content.get("format_version")
        if version != FORMAT_VERSION:
            raise InputError(
                f"{path}: format_version={version!r}, but this program reads {FORMAT_VERSION}; score the shard again"
            )
        if content.pop("sha256", None) != json_digest(content):
            raise InputError(f"{path / MARKER}: its content does not match its sha256; it was changed, score it again")
        sums = SumsFile(path / _SUMS)
        if (
            sums.shapes.keys() != content["tensors"].keys()
            or _records_digest(sums.records) != content["samples_sha256"]
        ):
            raise InputError(f"{sums.path}: does not belong to its {MARKER}; it was changed, score the shard again")
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


def merge(
    folders: list[str],
    output: str,
    overwrite: bool = False,
    pretrained: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Join the shards of one scoring run (score --shard i/n) into the score folder of the whole run.

    Args:
        folders: All shards, in any order.
        output: The score folder to write.
        overwrite: Replace earlier scores in output.
        pretrained: Where the model lies on this machine, if not where the shards found it; only for wanda scores,
            which need its weights.
        trust_remote_code: Run the model code that a hub repository brings; only for wanda scores.

    Raises:
        InputError: If a shard is missing, was given twice, or was made with other settings.
    """
    from sparc3_pl.report.terminal import print_summary

    check_output(output, overwrite, SCORES_MARKER)
    shards = sorted((Shard.open(folder) for folder in folders), key=lambda shard: shard.number)
    _require_whole(shards)
    manifest = _write(shards, output, overwrite, pretrained, trust_remote_code)
    print_summary(manifest, Path(output))


def _require_whole(shards: Sequence[Shard]) -> None:
    """The shards are parts of one run, all of them, and no sample is in two."""
    first = shards[0]
    for shard in shards[1:]:
        key = next(differing_settings(first.content["settings"], shard.content["settings"]), None)
        if key is not None:
            raise InputError(
                f"{shard.path}: was made with another {key} than {first.path}; score it again like the others"
            )
    _require_disjoint(shards)
    if missing := sorted(set(range(1, first.count + 1)) - {shard.number for shard in shards}):
        listed = ", ".join(f"{number}/{first.count}" for number in missing[:5])
        raise InputError(f"shard {listed} is missing: {len(shards)} of {first.count} were given; score it and give all")
    wanted, found = set(first.content["about"]["data"]["sample_ids"]), {i for shard in shards for i in shard.sums.ids}
    if wanted != found:
        raise InputError(
            f"the shards hold {len(found)} samples, but the run has {len(wanted)}; score the shards again, without "
            "trainer.limit_predict_batches"
        )


def _require_disjoint(shards: Sequence[Shard]) -> None:
    held: dict[str, Shard] = {}
    for shard in shards:
        both = [identity for identity in sorted(shard.sums.ids) if identity in held]
        if both:
            raise InputError(
                f"{shard.path}: {len(both)} of its samples are in {held[both[0]].path} too (first id: {both[0]}), so "
                "they would count twice; give each shard once"
            )
        held |= dict.fromkeys(shard.sums.ids, shard)


def _write(
    shards: Sequence[Shard], output: str, overwrite: bool, pretrained: str | None, trust_remote_code: bool
) -> Manifest:
    about = shards[0].content["about"]
    layers = shards[0].content["settings"]["layers"]
    records = sorted((record for shard in shards for record in shard.sums.records), key=lambda record: record["id"])
    if about["method"] == "wanda":
        scores = _wanda_scores(shards[0], _source(about["model"], pretrained, trust_remote_code))
    else:
        scores = _mean_scores(len(records))
    with ScoreWriter(output, overwrite) as writer:
        for layer in layers:
            tensors = {key: _added(shards, f"{layer}/{key}") for key in shards[0].sums.keys(layer)}
            counts = {key: int(tensors[key]) for key in ("nan", "inf")}
            squares = tensors.get("squares")
            mean_squares = None if squares is None else (squares / len(records)).float()
            writer.add_layer(layer, scores(layer, tensors), mean_squares, group_means(tensors), **counts)
        if (shards[0].path / "config.yaml").is_file():
            writer.add_text("config.yaml", (shards[0].path / "config.yaml").read_text(encoding="utf-8"))
        return writer.finish(
            **about | {"data": about["data"] | {"sample_ids": [record["id"] for record in records]}},
            num_samples=len(records),
            num_tokens=sum(record["num_tokens"] for record in records),
            samples=records,
            shards=[shard.content["command"] for shard in shards],
        )


def _added(shards: Sequence[Shard], name: str) -> Tensor:
    """The sum over shards of one tensor: two of them in memory at a time."""
    total = shards[0].load(name)
    for shard in shards[1:]:
        total += shard.load(name)
    return total


Scores = Callable[[str, Mapping[str, Tensor]], Tensor]


def _mean_scores(num_samples: int) -> Scores:
    return lambda layer, tensors: (tensors["sum"] / num_samples).float()


def _wanda_scores(shard: Shard, source: ModelSource) -> Scores:
    """|W| * ||x||: the sums hold the squared norms, the weights come from the model.

    Raises:
        InputError: if the model is not the one that the shards have scored.
    """
    model = load_model(source)
    about = shard.content["about"]
    found, wanted = fingerprint(model), about["model"]["fingerprint"]
    if found != wanted:
        raise InputError(
            f"pretrained={source.pretrained!r}: is another model ({found[:19]}...) than the shards have scored "
            f"({wanted[:19]}...); give the model of the shards"
        )
    if (key := differing_config(about["model"].get("config") or {}, model_config(model))) is not None:
        raise InputError(f"pretrained={source.pretrained!r}: has another {key} than the shards have scored")
    modules = linear_layers(model)

    def scores(layer: str, tensors: Mapping[str, Tensor]) -> Tensor:
        scorer = WandaScorer({layer: modules[layer]}, about["granularity"])
        scorer.tensors[layer]["sum"].copy_(tensors["sum"])
        return scorer.scores(layer, 0)

    return scores


def _source(model: Mapping[str, Any], pretrained: str | None, trust_remote_code: bool) -> ModelSource:
    if pretrained is not None:
        return ModelSource(pretrained, model["dtype"], trust_remote_code=trust_remote_code)
    return ModelSource(model["pretrained"], model["dtype"], model["revision"], trust_remote_code=trust_remote_code)
