"""The scoring pass: a LightningModule that accumulates a method's statistics over reference samples."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn

from sparc3_pl.attribution.precheck import checked_rules
from sparc3_pl.attribution.rules import PreparedRules
from sparc3_pl.attribution.scorers import GradientScorer, MagnitudeScorer, RandomScorer, Scorer, WandaScorer
from sparc3_pl.distributed import after_rank_zero, from_rank_zero, gather_lists, sum_over_ranks
from sparc3_pl.errors import InputError
from sparc3_pl.families import mlps, select_layers
from sparc3_pl.files import check_output
from sparc3_pl.language_model import ModelSource, check_vocabulary, describe, load_model, load_tokenizer
from sparc3_pl.merge import MARKER as SHARD_MARKER
from sparc3_pl.merge import parse_shard, write_shard
from sparc3_pl.processes import deferring_stop, kept, stop_requested
from sparc3_pl.resume import PartialSums, sums_of
from sparc3_pl.scores import MARKER as SCORES_MARKER
from sparc3_pl.scores import Manifest, ScoreWriter
from sparc3_pl.sharding import shard

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sparc3_pl.data.reference import ReferenceBatch

__all__ = ["ScoringModule", "build_scorer"]

log = logging.getLogger(__name__)

Method = Literal["lrp", "gradient", "wanda", "magnitude", "random"]
Granularity = Literal["neuron", "weight"]
WITH_SAMPLES = ("lrp", "gradient", "wanda")
"""Methods whose scores depend on samples."""
Rules = Callable[[nn.Module], AbstractContextManager[object]]


def build_scorer(
    layers: Mapping[str, nn.Module],
    method: Method,
    granularity: Granularity,
    *,
    signed: bool = False,
    squares: bool = False,
    groups: int = 0,
    zero_nonfinite: bool = False,
    seed: int = 0,
    sums_on_host: bool = False,
    gradient_checkpointing: bool = False,
    rules: Rules | None = None,
) -> Scorer:
    """The scorer of ``method`` for the target ``layers``; the arguments are those of ``ScoringModule``.

    ``rules``: those of ``rules_of``, if they have looked at the model already.
    """
    if method == "wanda":
        return WandaScorer(layers, granularity, zero_nonfinite=zero_nonfinite)
    if method == "magnitude":
        return MagnitudeScorer(layers, granularity)
    if method == "random":
        return RandomScorer(layers, granularity, seed=seed)
    return GradientScorer(
        layers,
        granularity,
        rules or rules_of(method),
        signed=signed,
        squares=squares,
        groups=groups,
        zero_nonfinite=zero_nonfinite,
        device="cpu" if sums_on_host else None,
        checkpointing=gradient_checkpointing,
    )


def rules_of(method: Method) -> Rules:
    """What makes the context of a pass: the rules of LRP, or none."""
    return PreparedRules() if method == "lrp" else nullcontext


class ScoringModule(pl.LightningModule):
    """Scores the weights or neurons of a causal language model on reference samples.

    ``predict_step`` accumulates and returns nothing. At the end the ranks' sums are added up, and rank 0 writes the
    mean over samples as a score folder (or the sums as a shard). Under Lightning's ``ModelParallelStrategy`` the model
    is sharded over the ranks (FSDP2), and the sums of weight scores with it.

    Args:
        pretrained: Hub id, local folder, ``FILE.gguf``, or ``demo``, the model that comes with the package.
        dtype: Precision to load the model in; ``auto``: as it was saved. Sums are float32 or better in any case.
        revision: Commit, branch or tag of a hub model.
        device_map: ``auto`` spreads the model over the GPUs of this process; nothing moves it afterwards.
        trust_remote_code: Run the model code that a hub repository brings. Off unless you turn it on.
        method: ``lrp`` (AttnLRP), ``gradient``, ``wanda``, ``magnitude`` or ``random``.
        granularity: ``neuron`` (row sums) or ``weight``.
        signed: Keep the sign of neuron scores (SparC3, App. B); needs no weight gradient.
        targets: Glob patterns of linear layers, as ``["*.up_proj"]``; ``["*"]``: all of the decoder and the output
            head; unset: the up-projection of every MLP.
        squares: Store squared neuron scores too, for the ``t`` contrast.
        groups: Store the neuron scores of this many groups of samples too (8 is a good number), by which ``evidence``
            tells whether there are enough samples. 0: none.
        nonfinite: ``error`` stops at the first NaN or infinity; ``zero`` counts them and takes them for 0.
        seed: Seed of the ``random`` method.
        output: Where the scores go; by default ``scores`` in the run's log folder.
        overwrite: Replace earlier scores in ``output``.
        checkpoint_every: Batches (of one process) between two savings of the partial sums; the same command goes on
            from them after a crash, on any number of processes. Needs ``output``.
        shard: ``i/n``: score only the i-th of n parts of the samples, for ``merge`` to join.
        sums_on_host: Keep the sums of weight scores (as large as the weights in float32) in the host's memory, where
            they do not fit beside the model. Larger batches then mean fewer transfers. The processes add them up
            through gloo, whatever connects their devices.
        gradient_checkpointing: Keep the activations of one decoder layer at a time and make the others again, for
            windows that do not fit: about a third slower, the same scores.
    """

    def __init__(
        self,
        pretrained: str = "demo",
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        revision: str | None = None,
        device_map: str | None = None,
        trust_remote_code: bool = False,
        method: Method = "lrp",
        granularity: Granularity = "neuron",
        signed: bool = False,
        targets: list[str] | None = None,
        squares: bool = False,
        groups: int = 0,
        nonfinite: Literal["error", "zero"] = "error",
        seed: int = 0,
        output: str | None = None,
        overwrite: bool = False,
        checkpoint_every: int | None = None,
        shard: str | None = None,
        sums_on_host: bool = False,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        _check_choices(method, granularity, signed=signed, squares=squares, groups=groups)
        self.shard = _checked_shard(shard, method)
        self.checkpoint_every = _checked_interval(checkpoint_every, output)
        self.source = ModelSource(pretrained, dtype, revision, device_map, trust_remote_code)
        self.method, self.granularity, self.signed, self.targets = method, granularity, signed, targets
        self.squares, self.groups, self.nonfinite, self.seed = squares, groups, nonfinite, seed
        self.output, self.overwrite = output, overwrite
        self.sums_on_host, self.gradient_checkpointing = sums_on_host, gradient_checkpointing
        self.resolved_config: str | None = None
        """The configuration of this run as YAML, kept beside the scores; set by the command line."""
        self.model: PreTrainedModel | None = None
        self.scorer: Scorer | None = None
        self.records: list[dict[str, Any]] = []
        """One a sample that this rank has scored: id, num_tokens, ending, relevance, ..."""
        self.manifest: Manifest | None = None
        """On rank 0, once the scores are written."""
        self.written_to: Path | None = None
        self.shard_written_to: Path | None = None
        self._description: dict[str, Any] = {}
        """On rank 0, the model's entry in the manifest."""
        self._rules = rules_of(method)
        self._account: dict[str, Any] | None = None
        """What the relevance account of a sample said of the rules; LRP only."""
        self._partial: PartialSums | None = None
        self._unsaved = False
        self._loop = ExitStack()

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, loaded when the data module asks for it; the weights follow later."""
        return load_tokenizer(self.source)

    def setup(self, stage: str) -> None:
        """Checks what would otherwise fail after the model was loaded, or hours later.

        Raises:
            InputError: if the output cannot be written, or an argument does not go with a sharded model.
        """
        if self.is_sharded:
            self._check_sharded()
        log_dir = self.trainer.log_dir  # on every rank: Lightning agrees on it by a broadcast
        if self.output is None and log_dir is not None:
            self.output = str(Path(log_dir) / "scores")
        if self.output is not None and self.trainer.is_global_zero:
            check_output(self.output, self.overwrite, SCORES_MARKER if self.shard is None else SHARD_MARKER)
        if self.checkpoint_every is not None and self.trainer.limit_predict_batches != 1.0:
            raise InputError(
                f"trainer.limit_predict_batches={self.trainer.limit_predict_batches} counts from where a run goes on, "
                "so with checkpoint_every it says nothing; give data.num_samples instead"
            )

    def configure_model(self) -> None:
        """Loads the weights, once, and drops the samples that this run need not score."""
        if self.model is None:
            model = load_model(self.source)
            check_vocabulary(model, self.tokenizer)
            if self.trainer.is_global_zero:
                self._description = describe(model, self.source)
            if self.is_sharded:
                self._shard(model)
            if self.source.device_map is None:
                self.model = model
            else:  # outside the module tree: nothing may move a model that is spread over devices
                self.__dict__["model"] = model
            self._drop_samples()

    @property
    def is_sharded(self) -> bool:
        """Whether each rank holds only its part of every weight, so that all must take part in every pass."""
        return isinstance(self.trainer.strategy, ModelParallelStrategy)

    def _check_sharded(self) -> None:
        if self.source.device_map is not None:
            raise InputError(
                f"model.device_map={self.source.device_map!r}: trainer.strategy=ModelParallelStrategy places the model "
                "itself; leave out one of the two"
            )
        if self.sums_on_host:
            raise InputError(
                "model.sums_on_host=true: with trainer.strategy=ModelParallelStrategy each device keeps its part of "
                "the sums; leave it out"
            )
        if self.checkpoint_every is not None and self.granularity == "weight" and self.method in ("lrp", "gradient"):
            raise InputError(
                f"model.checkpoint_every={self.checkpoint_every}: weight scores whose sums ModelParallelStrategy "
                "shares out cannot be saved in between; leave it out, and score parts by --shard i/n, which merge joins"
            )

    def _shard(self, model: PreTrainedModel) -> None:
        self._check_rules(model)  # now, for the same reason
        with self._rules(model):  # they look at the modules once: now, while the weights are whole
            pass
        shard(model, self.device_mesh["data_parallel"])
        self.trainer.datamodule.equal_passes = True  # type: ignore[attr-defined]

    def _check_rules(self, model: PreTrainedModel) -> None:
        samples = getattr(self.trainer.datamodule, "samples", [])  # type: ignore[attr-defined]
        if self.method == "lrp" and self._account is None:
            self._account = checked_rules(model, samples[0].input_ids if samples else [])

    def _drop_samples(self) -> None:
        """Those of other shards, and those whose sums an interrupted run has left."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if self.shard is not None:
            number, count = self.shard
            ids = sorted(sample.id for sample in data.samples)
            data.exclude(set(ids) - set(ids[number - 1 :: count]))
        if self.checkpoint_every is not None and self.method in WITH_SAMPLES:
            assert self.output is not None
            self._partial = PartialSums(self.output, self.global_rank)
            part = {"part": None if self.shard is None else self.shard[0]}
            self._partial.join(from_rank_zero(lambda: self._partial.take_up(self._settings() | part)))
            data.exclude(self._partial.ids)
            if self._partial.ids:
                kept(self._partial.folder)
                if self.trainer.is_global_zero:
                    log.info("resuming: %d samples are scored already", len(self._partial.ids))

    def _settings(self) -> dict[str, Any]:
        """What sums must have in common to be added up."""
        assert self.model is not None
        data = self.trainer.datamodule.describe()  # type: ignore[attr-defined]
        return {
            "model": {key: self._description[key] for key in ("fingerprint", "dtype", "config")},
            "method": self.method,
            "granularity": self.granularity,
            "signed": self.signed,
            "squares": self.squares,
            "groups": self.groups,
            "nonfinite": self.nonfinite,
            "layers": list(select_layers(self.model, self.targets)),
            "data": {key: value for key, value in data.items() if not key.startswith("num_")},
            "shard": None if self.shard is None else self.shard[1],
        }

    def on_predict_start(self) -> None:
        """Makes the accumulators where the weights are.

        Raises:
            InputError: if gradients are off, or the targets match nothing.
        """
        if torch.is_inference_mode_enabled():
            raise InputError("scoring needs gradients: give the Trainer inference_mode=False")
        assert self.model is not None
        self.model.eval()
        self._check_rules(self.model)
        layers = select_layers(self.model, self.targets)
        zero = self.nonfinite == "zero"
        self.scorer = build_scorer(
            layers, self.method, self.granularity,
            signed=self.signed, squares=self.squares, groups=self.groups, zero_nonfinite=zero, seed=self.seed,
            sums_on_host=self.sums_on_host, gradient_checkpointing=self.gradient_checkpointing, rules=self._rules,
        )  # fmt: skip
        if self.sums_on_host:
            sum_over_ranks(
                torch.zeros(1)
            )  # connects the hosts now: at the end it would be too late to learn they cannot
        if self._partial is not None:
            self._loop.enter_context(deferring_stop())  # until the sums hold whole batches

    def predict_step(self, batch: ReferenceBatch, batch_idx: int) -> None:
        """Takes in one batch; ``records`` grows by its samples (a stand-in has none)."""
        assert self.scorer is not None and self.model is not None
        num_tokens = batch.attention_mask.sum(1)[: len(batch.ids)].tolist()
        statistics = None
        if self.scorer.needs_samples:
            device = self.model.get_input_embeddings().weight.device
            statistics = self.scorer.update(self.model, batch.input_ids.to(device), batch.attention_mask.to(device))
        known = statistics.records() if statistics else [{} for _ in batch.ids]
        for sample_id, ending, tokens, extra in zip(batch.ids, batch.endings, num_tokens, known, strict=True):
            self.records.append({"id": sample_id, "num_tokens": tokens, "ending": ending, **extra})
        self._unsaved = True
        if self.checkpoint_every is not None and (batch_idx + 1) % self.checkpoint_every == 0:
            self._save()
        self._stop_if_asked()

    def _save(self) -> None:
        """Puts this rank's sums on the disk."""
        assert self.scorer is not None
        if self._partial is not None and self._unsaved:
            self._partial.save(self.scorer.tensors, self.records)
            kept(self._partial.folder)
            self._unsaved = False

    def _stop_if_asked(self) -> None:
        if self._partial is None:
            return
        stop = stop_requested()
        if self.is_sharded:  # after the same pass: a rank that goes on would wait for the others' weights in the next
            stop = next((other for other in gather_lists([stop]) if other is not None), None)
        if stop is not None:
            self._save()
            raise stop

    def on_predict_epoch_end(self) -> None:
        """Adds up the ranks and writes the scores."""
        assert self.scorer is not None
        self._stop_if_asked()
        self._save()  # a rank that dies while the sums are added up or written costs nothing
        self._loop.close()
        records = gather_lists(self.records)
        for tensors in self.scorer.tensors.values():
            for tensor in tensors.values():
                sum_over_ranks(tensor)
        if self.trainer.is_global_zero:
            records += self._add_base()
            self._write(sorted(records, key=lambda record: record["id"]))
        elif self.is_sharded and self.output is not None:
            self._give_parts()
        after_rank_zero()  # if it fails to write, the others fail too

    def _add_base(self) -> list[dict[str, Any]]:
        """Adds the sums of earlier runs, one tensor at a time; gives their samples' records."""
        base = None if self._partial is None else self._partial.base()
        if base is None:
            return []
        assert self.scorer is not None
        for name, tensors in self.scorer.tensors.items():
            for key, tensor in tensors.items():
                tensor += base.load(f"{name}/{key}").to(tensor.device)
        return base.records

    def _give_parts(self) -> None:
        """While rank 0 writes: takes part in the gathering of what it writes, one tensor after the other."""
        assert self.scorer is not None
        if self.shard is not None:
            shapes, load = sums_of(self.scorer.tensors)
            for name in shapes:
                load(name)
        else:
            for name in self.scorer.layers:
                self.scorer.scores(name, 1)

    def _write(self, records: list[dict[str, Any]]) -> None:
        assert len({record["id"] for record in records}) == len(records), "a sample was counted twice"
        if self.output is None:
            log.info("fast_dev_run: no scores are written (give --output to write them)")
            return
        if self.shard is not None:
            self._write_shard(records)
        else:
            with ScoreWriter(self.output, self.overwrite) as writer:
                self._add_layers(writer, len(records))
                if self.resolved_config is not None:
                    writer.add_text("config.yaml", self.resolved_config)
                self.manifest = self._finish(writer, records)
            self.written_to = Path(self.output)
        if self._partial is not None:
            self._partial.remove()
            kept(self._partial.folder, exists=False)

    def _write_shard(self, records: list[dict[str, Any]]) -> None:
        assert self.scorer is not None and self.output is not None and self.shard is not None
        self.shard_written_to = write_shard(
            self.output,
            self.overwrite,
            shard=self.shard,
            settings=self._settings(),
            about=self._about(),
            tensors=self.scorer.tensors,
            records=records,
            config=self.resolved_config,
        )

    def _add_layers(self, writer: ScoreWriter, num_samples: int) -> None:
        assert self.scorer is not None
        if self.scorer.needs_samples and num_samples == 0:
            raise InputError("no sample was scored: raise trainer.limit_predict_batches or data.num_samples")
        for name in self.scorer.layers:
            tensors = self.scorer.tensors.get(name, {})
            counts = {key: int(tensors[key]) for key in ("nan", "inf") if key in tensors}
            scores = self.scorer.scores(name, num_samples)
            squares, groups = self.scorer.squares(name, num_samples), self.scorer.groups(name)
            writer.add_layer(name, scores, squares, groups, **counts)

    def _finish(self, writer: ScoreWriter, records: list[dict[str, Any]]) -> Manifest:
        assert self.scorer is not None
        used = records if self.scorer.needs_samples else []
        about = self._about()
        return writer.finish(
            **about | {"data": about["data"] | {"sample_ids": [record["id"] for record in used]}},
            num_samples=len(used),
            num_tokens=sum(record["num_tokens"] for record in used),
            samples=used,
        )

    def _about(self) -> dict[str, Any]:
        """Manifest fields that do not depend on which samples were scored."""
        assert self.scorer is not None and self.model is not None
        return {
            "method": self.method,
            "granularity": self.granularity,
            "signed": self.signed,
            "model": self._description,
            "data": self.trainer.datamodule.describe(),  # type: ignore[attr-defined]
            "targets": self.targets,
            "nonfinite": self.nonfinite,
            "seed": self.seed if self.method == "random" else None,
            "relevance_account": self._account,
            "neuron_rows": _neuron_rows(self.model, self.scorer.layers) if self.granularity == "neuron" else {},
        }


def _checked_interval(checkpoint_every: int | None, output: str | None) -> int | None:
    if checkpoint_every is not None and checkpoint_every < 1:
        raise InputError(f"model.checkpoint_every={checkpoint_every}; give 1 batch or more")
    if checkpoint_every is not None and output is None:
        raise InputError(
            f"model.checkpoint_every={checkpoint_every} needs a place that is the same when the run goes on: give "
            "--output"
        )
    return checkpoint_every


def _checked_shard(shard: str | None, method: str) -> tuple[int, int] | None:
    if shard is None:
        return None
    if method not in WITH_SAMPLES:
        raise InputError(
            f"shard={shard!r}: method {method} needs no sample, so there is nothing to share; leave it out"
        )
    return parse_shard(shard)


def _neuron_rows(model: PreTrainedModel, layers: Iterable[str]) -> dict[str, list[int]]:
    """Which rows of the scored fused maps (gate and up in one) are the neurons: first and last + 1."""
    try:
        fused = [mlp for mlp in mlps(model) if mlp.fused and mlp.up in set(layers)]
    except InputError:  # no MLP is recognised, so none is fused: the targets were named one by one
        return {}
    return {mlp.up: [mlp.up_rows.start, mlp.up_rows.stop] for mlp in fused}


def _check_choices(method: str, granularity: str, *, signed: bool, squares: bool, groups: int) -> None:
    if groups < 0:
        raise InputError(f"model.groups={groups}; give 0 for none, or a number of groups such as 8")
    if method in ("lrp", "gradient") and granularity == "neuron":
        return
    asked = {"signed=true": signed, "squares=true": squares, f"groups={groups}": groups > 0}
    for name in (name for name, is_asked in asked.items() if is_asked):
        raise InputError(
            f"model.{name} is for neuron scores by lrp or gradient, not for {granularity} scores by {method}: "
            "drop it, or change model.method and model.granularity"
        )
