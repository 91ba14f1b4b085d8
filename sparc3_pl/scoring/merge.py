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

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from torch import nn

from sparc3_pl.attribution.methods import METHODS, Method
from sparc3_pl.attribution.scorers import LayerScores, groups_of, layer_scores
from sparc3_pl.errors import InputError
from sparc3_pl.io.files import check_output
from sparc3_pl.model.components import Group
from sparc3_pl.model.identity import differing_config, fingerprint, model_config
from sparc3_pl.model.loading import load_model
from sparc3_pl.model.placement import matrix_of
from sparc3_pl.model.source import ModelSource
from sparc3_pl.scores.manifest import KIND as SCORES
from sparc3_pl.scores.manifest import About, Manifest
from sparc3_pl.scores.partial import differing_settings
from sparc3_pl.scores.parts import ScorePart
from sparc3_pl.scores.sums import added
from sparc3_pl.scores.writer import write_scores

__all__ = ["merge"]


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
    from sparc3_pl.document.terminal import print_summary

    check_output(output, overwrite, SCORES)
    parts = sorted((ScorePart.open(folder) for folder in folders), key=lambda part: part.number)
    _require_whole(parts)
    manifest = _write(parts, output, overwrite, pretrained, trust_remote_code)
    print_summary(manifest, Path(output))


def _require_whole(parts: Sequence[ScorePart]) -> None:
    """Refuses parts that are of several runs, are not all parts of their run, or share a sample."""
    first = parts[0]
    for part in parts[1:]:
        key = next(differing_settings(first.content.settings, part.content.settings), None)
        if key is not None:
            raise InputError(
                f"{part.path}: was made with a different {key} from {first.path}; score it again like the others"
            )
    _require_disjoint(parts)
    if missing := sorted(set(range(1, first.count + 1)) - {part.number for part in parts}):
        names = ", ".join(f"{number}/{first.count}" for number in missing[:5])
        raise InputError(f"part {names} is missing: {len(parts)} of {first.count} were given; score it and give all")
    planned_ids, scored_ids = set(first.about.data["sample_ids"]), {i for part in parts for i in part.sums.ids}
    if planned_ids != scored_ids:
        raise InputError(
            f"the parts hold {len(scored_ids)} samples, but the run has {len(planned_ids)}; score the parts again, "
            "without trainer.limit_predict_batches"
        )


def _require_disjoint(parts: Sequence[ScorePart]) -> None:
    part_of: dict[str, ScorePart] = {}
    for part in parts:
        both = [identity for identity in sorted(part.sums.ids) if identity in part_of]
        if both:
            raise InputError(
                f"{part.path}: {len(both)} of its samples are in {part_of[both[0]].path} too (first id: {both[0]}), so "
                "they would count twice; give each part once"
            )
        part_of |= dict.fromkeys(part.sums.ids, part)


def _write(
    parts: Sequence[ScorePart], output: str, overwrite: bool, pretrained: str | None, trust_remote_code: bool
) -> Manifest:
    first, about = parts[0], parts[0].about
    method = METHODS.from_file(about.method, about.method_args)
    groups, model = None, None
    if method.needs_weights:
        name, revision = pretrained, None
        if pretrained is None:
            name, revision = about.model.pretrained, about.model.revision
        unpack = about.model.dequantized is not None
        model = _model_of(about, ModelSource(name, about.model.dtype, revision, None, trust_remote_code, unpack))
        groups = {group.layer: group for group in groups_of(model, about.components(), about.targets)}
    samples = [sample for part in parts for sample in part.sums.samples]
    config = first.path / "config.yaml"
    return write_scores(
        output,
        overwrite,
        _merged(parts, method, groups or first.groups(), len(samples), model),
        about,
        samples,
        config=config.read_text(encoding="utf-8") if config.is_file() else None,
        shards=[part.content.command for part in parts],
    )


def _merged(
    parts: Sequence[ScorePart], method: Method, groups: Mapping[str, Group], num_samples: int, model: nn.Module | None
) -> Iterator[LayerScores]:
    """The scores of every layer, from the sums of all parts: two tensors in memory at a time."""
    load = added(parts)
    for layer, group in groups.items():
        sums = {key: load(f"{layer}/{key}") for key in parts[0].sums.keys(layer)}
        weight_OI = None if model is None else matrix_of(model.get_submodule(layer))
        yield layer_scores(method, group, sums, num_samples, weight_OI, parts[0].options)


def _model_of(about: About, source: ModelSource) -> nn.Module:
    """The model that the parts have scored.

    Raises:
        InputError: if ``source`` is another one.
    """
    model = load_model(source)
    actual, expected = fingerprint(model), about.model.fingerprint
    if actual != expected:
        raise InputError(
            f"pretrained={source.pretrained!r}: is not the model that the parts scored ({actual[:19]}..., not "
            f"{expected[:19]}...); give the model of the parts"
        )
    if (key := differing_config(about.model.config, model_config(model))) is not None:
        raise InputError(f"pretrained={source.pretrained!r}: its {key} differs from that of the scored model; check it")
    return model
