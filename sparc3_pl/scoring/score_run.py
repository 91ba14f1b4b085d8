"""A scoring run: what is asked for, the sums over batches, and what is written at the end. Plain Python, no Trainer."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from sparc3_pl.attribution.methods import METHODS, Method, Options
from sparc3_pl.attribution.scorers import LayerScores, Scorer, groups_of, require_heeded
from sparc3_pl.attribution.sequential import Sparsity
from sparc3_pl.attribution.targets import TARGETS, Target
from sparc3_pl.data.batches import ReferenceBatch
from sparc3_pl.data.fields import FIELD_KEYS
from sparc3_pl.data.samples import Sample
from sparc3_pl.errors import InputError
from sparc3_pl.io.formats import Record
from sparc3_pl.model.components import COMPONENTS, Component, Group
from sparc3_pl.model.identity import ModelRecord
from sparc3_pl.model.size import decoder_flops
from sparc3_pl.registry import Choice, Spec
from sparc3_pl.runtime.collectives import after_rank_zero, gather_lists, is_rank_zero, sum_over_ranks
from sparc3_pl.runtime.processes import kept
from sparc3_pl.runtime.timing import timed, timing
from sparc3_pl.scores.manifest import About, Manifest, ScoredSample
from sparc3_pl.scores.memory import ScoresInMemory
from sparc3_pl.scores.partial import PartialSums
from sparc3_pl.scores.parts import write_part
from sparc3_pl.scores.sums import sums_of
from sparc3_pl.scores.writer import write_scores

__all__ = [
    "Destination",
    "ScoreRequest",
    "ScoreRun",
    "as_unlisted",
    "check_samples",
    "require_fields",
    "settings_of",
]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScoreRequest:
    """What is scored, and how: checked when it is made, before a model is loaded."""

    method: Choice[Method]
    components: tuple[Choice[Component], ...]
    target: Choice[Target]
    layers: list[str] | None
    options: Options

    @classmethod
    def of(
        cls,
        method: Spec | Method = "lrp",
        granularity: Spec | Component | list[Spec | Component] = "neuron",
        target: Spec | Target = "predicted",
        layers: list[str] | None = None,
        labels: Literal["data", "model"] = "data",
        **options: Any,
    ) -> ScoreRequest:
        """The request that the keys of ``model`` make; ``options`` are those of ``Options``.

        Raises:
            InputError: if a name is unknown, or the method or target ignores an option.
        """
        if labels != "data":
            target = _with_labels(target, labels, options.pop("seed", 0))
        kinds = granularity if isinstance(granularity, list) else [granularity]
        components = tuple(COMPONENTS.choose(kind) for kind in kinds)
        request = cls(METHODS.choose(method), components, TARGETS.choose(target), layers, Options(**options))
        if not components:
            raise InputError("model.granularity is an empty list; name what is scored, such as neuron")
        for component in components:
            require_heeded(request.method.object, component.object, request.target.object, request.options)
        if request.options.sequential is not None:
            Sparsity.of(request.options.sequential)
        if len({component.object.dims for component in components}) > 1:
            raise InputError("model.granularity: scores of single weights and of whole components need two runs")
        return request

    def scorer(self, model: nn.Module) -> Scorer:
        """The scorer of ``model``, which lies where it will run."""
        components = [component.object for component in self.components]
        return Scorer(model, self.method.object, components, self.layers, self.target.object, self.options)

    def groups(self, model: nn.Module) -> list[Group]:
        """The groups of components that are scored in ``model``, one for each layer.

        Raises:
            InputError: if a glob matches nothing, or two components share a layer.
        """
        return groups_of(model, [component.object for component in self.components], self.layers)

    def about(self, model: ModelRecord, data: Mapping[str, Any]) -> About:
        """What the manifest says of the scores.

        Args:
            model: ``describe(model, source)`` of ``model.identity``.
            data: ``ReferenceData.describe()``.
        """
        arguments = {kind.name: kind.arguments for kind in self.components if kind.arguments}
        return About(
            method=self.method.name,
            method_args=self.method.arguments,
            granularity="+".join(component.name for component in self.components),
            granularity_args=arguments if len(self.components) > 1 else self.components[0].arguments,
            target=self.target.name,
            target_args=self.target.arguments,
            signed=self.options.signed,
            targets=self.layers,
            nonfinite=self.options.nonfinite,
            seed=self.options.seed if "seed" in self.method.object.heeds(self.components[0].object) else None,
            sequential=self.options.sequential,
            model=ModelRecord(model),
            data=dict(data),
            at_values=self.method.object.at_values(self.target.object, self.options),
        )


def _with_labels(target: Spec | Target, labels: str, seed: int) -> Spec:
    """Target ``text`` with labels that are drawn, by the run's seed."""
    spec = {"class_path": target} if isinstance(target, str) else target
    arguments = spec.get("init_args") or {} if isinstance(spec, dict) else {}
    if not isinstance(spec, dict) or spec.get("class_path") != "text" or {"labels", "seed"} & arguments.keys():
        raise InputError(f"model.labels={labels} is for model.target: text, and given once; leave it out, or set that")
    return {"class_path": "text", "init_args": {**arguments, "labels": labels, "seed": seed}}


def as_unlisted(method: Spec) -> Spec:
    """The method, set to try a model family that it does not list.

    Raises:
        InputError: if it is a method of any model.
    """
    choice = METHODS.choose(method)
    if not choice.object.lists_families:
        raise InputError(
            f"model.unlisted_family=true: method {choice.name} scores any family; leave it out, or use method lrp"
        )
    return {"class_path": choice.name, "init_args": {**choice.arguments, "unlisted": True}}


def require_fields(request: ScoreRequest, names: Collection[str]) -> None:
    """Refuses samples that lack what target or method needs, or hold what nothing heeds.

    Args:
        request: What is scored.
        names: Names of the fields that come with the samples.

    Raises:
        InputError: with the configuration key of the first such field.
    """
    target, name, needs_target = request.target.object, request.target.name, request.method.object.needs_target
    needs = dict.fromkeys(target.needs, f"model.target={name}")
    needs |= dict.fromkeys(request.method.object.needs, f"model.method={request.method.name}")
    for field, what in needs.items():
        if field not in names:
            raise InputError(f"{what} needs {FIELD_KEYS.get(field, field)}; give it")
    # Labels and pairs are for methods and measurements too; a completion and its weight say what the target should be.
    reads = target.reads if needs_target else frozenset(("completion_mask",))
    for field in ("completion_mask", "weight", "token_weight"):
        if field in names and reads is not None and field not in reads:
            what = f"model.target={name}" if needs_target else f"model.method={request.method.name}"
            raise InputError(f"{FIELD_KEYS[field]}: {what} ignores it; leave it out, or set model.target: completion")


def check_samples(request: ScoreRequest, samples: Sequence[Sample]) -> None:
    """Refuses samples that target or method cannot do with; one that needs none passes any.

    Raises:
        InputError: as ``require_fields`` and ``Method.check_samples``.
    """
    if request.method.object.needs_samples:
        require_fields(request, {*samples[0].numbers, *samples[0].by_token})
        request.method.object.check_samples([sample.numbers for sample in samples])


def settings_of(about: About, options: Options, layers: Sequence[str], part: tuple[int, int] | None) -> Record:
    """What sums must have in common to be added up."""
    newer = {
        "method_args": about.method_args,
        "granularity_args": about.granularity_args,
        "target": None if about.target == "predicted" else about.target,
        "target_args": about.target_args,
        "sequential": about.sequential,
        "at_values": about.at_values,
        "plan": about.plan,
    }
    return {
        "model": {key: about.model.get(key) for key in ("fingerprint", "dtype", "config")},
        "method": about.method,
        "granularity": about.granularity,
        "signed": about.signed,
        "squares": options.squares,
        "groups": options.groups,
        "nonfinite": about.nonfinite,
        "layers": list(layers),
        "data": {key: value for key, value in about.data.items() if not key.startswith("num_")},
        "shard": None if part is None else part[1],
        **{key: value for key, value in newer.items() if value},  # earlier versions wrote none of them
    }


@dataclass(frozen=True)
class Destination:
    """Where a run writes.

    Attributes:
        folder: The folder of the scores, or of the part.
        overwrite: Whether an earlier one may be replaced.
        part: Which part of how many this run scores; None: all samples.
        config: The resolved configuration as YAML, which is kept beside the scores.
    """

    folder: Path
    overwrite: bool = False
    part: tuple[int, int] | None = None
    config: str | None = None


class ScoreRun:
    """One scoring run of one process, or of one rank of several: ``add`` batches, then ``finish``.

    Args:
        scorer: Holds the model and the sums.
        about: What the manifest says of the scores; needed on rank 0 only.
        destination: None: nothing is written.
        partial: The place of sums that are saved in between, and of those of earlier runs; joined already.
    """

    def __init__(
        self,
        scorer: Scorer,
        about: About | None,
        destination: Destination | None,
        partial: PartialSums | None = None,
    ) -> None:
        self.scorer, self.about, self.destination = scorer, about, destination
        self.samples: list[ScoredSample] = []
        """The samples that this rank has scored."""
        self.manifest: Manifest | None = None
        """The manifest of the scores; on rank 0, once they are written."""
        self._partial = partial
        self._unsaved = False

    def add(self, batch: ReferenceBatch) -> None:
        """Takes in one batch; ``samples`` grows by its samples (a stand-in has none)."""
        num_tokens = batch.attention_mask.sum(1)[: len(batch.ids)].tolist()
        with timed("scoring") as now:
            figures = self.scorer.update(batch)
            # Forward, and backward to what the layers read: gradients of weights are not counted.
            passes = (2 if self.scorer.method.needs_target else 1) * getattr(self.scorer.method, "steps", 1)
            tokens = sum(num_tokens)
            now.did(
                samples=len(batch.ids),
                tokens=tokens,
                padded=batch.attention_mask.numel() - tokens,
                flops=passes * tokens * decoder_flops(self.scorer.model),
                passes=1,
                like=self.scorer.model.get_input_embeddings().weight,
            )
        rows = figures.rows() if figures else [{} for _ in batch.ids]
        text_ids = batch.text_ids or [()] * len(batch.ids)
        columns = zip(batch.ids, num_tokens, batch.endings, text_ids, rows, strict=True)
        for identity, tokens, ending, texts, row in columns:
            about = {"id": identity, "num_tokens": tokens, "ending": ending, "text_ids": texts}
            self.samples.append(ScoredSample.from_json(about | row))
        self._unsaved = True

    def save(self) -> None:
        """Puts this rank's sums on the disk, if the run keeps any and there are new ones.

        Raises:
            InputError: if they cannot be written.
        """
        if self._partial is not None and self._unsaved:
            self._partial.save(self.scorer.sums, self.samples)
            kept(self._partial.folder)
            self._unsaved = False

    def finish(self) -> None:
        """Adds up the ranks, and writes scores or a part on rank 0. Every rank must call it.

        Raises:
            InputError: if no sample was scored, or the folder cannot be written.
        """
        with timed("scoring"):
            self.scorer.finish()
        with timed("writing"):
            self._finish()

    def _finish(self) -> None:
        samples = gather_lists(self.samples)
        for sums in self.scorer.sums.values():
            for tensor in sums.values():
                sum_over_ranks(tensor)
        if is_rank_zero():
            self._write(samples + self._add_earlier_sums())
        elif self.destination is not None and self.scorer.is_sharded:
            self._take_part_in_writing()
        after_rank_zero()  # if it fails to write, the others fail too

    def in_memory(self, name: str, command: str) -> ScoresInMemory:
        """The scores of a run in one process, in place of ``finish`` and a folder.

        Args:
            name: Stands for the folder's path.
            command: What made the scores.

        Raises:
            InputError: if no sample was scored.
        """
        assert self.about is not None
        self.scorer.finish()
        samples = self._in_the_mean(self.samples)
        return ScoresInMemory(name, self._layer_scores(len(samples)), self.about, samples, command)

    def _in_the_mean(self, samples: list[ScoredSample]) -> list[ScoredSample]:
        if not self.scorer.method.needs_samples:
            return []
        if not samples:
            raise InputError("no sample was scored: raise trainer.limit_predict_batches or data.num_samples")
        return samples

    def _add_earlier_sums(self) -> list[ScoredSample]:
        """Adds the sums of earlier runs, one tensor at a time, and returns their samples."""
        base = None if self._partial is None else self._partial.base()
        if base is None:
            return []
        for name, sums in self.scorer.sums.items():
            for key, tensor in sums.items():
                tensor += base.load(f"{name}/{key}").to(tensor.device)
        return base.samples

    def _write(self, samples: list[ScoredSample]) -> None:
        assert len({sample.id for sample in samples}) == len(samples), "a sample was counted twice"
        where = self.destination
        if where is None:
            log.info("fast_dev_run: no scores are written (give --output to write them)")
            return
        assert self.about is not None
        if where.part is not None:
            write_part(
                where.folder,
                where.overwrite,
                part=where.part,
                settings=settings_of(self.about, self.scorer.options, list(self.scorer.layers), where.part),
                about=self.about,
                groups=[layer.group for layer in self.scorer.layers.values()],
                tensors=self.scorer.sums,
                samples=sorted(samples, key=lambda sample: sample.id),
                config=where.config,
            )
        else:
            scored_samples = self._in_the_mean(samples)
            layers = self._layer_scores(len(scored_samples))
            self.manifest = write_scores(
                where.folder, where.overwrite, layers, self.about, scored_samples, config=where.config, timing=timing()
            )
        if self._partial is not None:
            self._partial.remove()
            kept(self._partial.folder, exists=False)

    def _layer_scores(self, num_samples: int) -> Iterator[LayerScores]:
        return (self.scorer.scores(name, num_samples) for name in self.scorer.layers)

    def _take_part_in_writing(self) -> None:
        """While rank 0 writes: takes part in the gathering of what it writes, one tensor after the other."""
        if self.destination is not None and self.destination.part is not None:
            shapes, load = sums_of(self.scorer.sums)
            for name in shapes:
                load(name)
        else:
            for _ in self._layer_scores(1):
                pass
