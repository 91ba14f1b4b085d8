"""The scoring pass as a LightningModule: it loads the model, and forwards the Trainer's hooks to a ``ScoreRun``."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from sparc3_pl.data.pass_module import PassModule
from sparc3_pl.errors import InputError
from sparc3_pl.model.checks import check_vocabulary
from sparc3_pl.model.fsdp import shard as share_out
from sparc3_pl.model.identity import ModelRecord, describe
from sparc3_pl.model.loading import load_model
from sparc3_pl.model.source import ModelSource
from sparc3_pl.pruning.callback import pruning_of
from sparc3_pl.registry import Spec
from sparc3_pl.runtime.collectives import from_rank_zero, gather_lists, sum_over_ranks
from sparc3_pl.runtime.processes import deferring_stop, kept, stop_requested
from sparc3_pl.runtime.run_config import resolved_config
from sparc3_pl.runtime.timing import timed
from sparc3_pl.scores.manifest import KIND as SCORES
from sparc3_pl.scores.manifest import About, Manifest, ScoredSample
from sparc3_pl.scores.partial import PartialSums
from sparc3_pl.scores.parts import KIND as PART
from sparc3_pl.scores.parts import parse_part
from sparc3_pl.scoring.score_run import (
    Destination,
    ScoreRequest,
    ScoreRun,
    as_unlisted,
    check_samples,
    settings_of,
)

if TYPE_CHECKING:
    import transformers  # its classes are not loaded where a parser reads the types of this file

    from sparc3_pl.data.batches import ReferenceBatch
    from sparc3_pl.data.reference import ReferenceData

__all__ = ["ScoringModule"]

log = logging.getLogger(__name__)


class ScoringModule(PassModule):
    """Scores the components of a causal language model on reference samples.

    ``predict_step`` accumulates and returns nothing. At the end the ranks' sums are added up, and rank 0 writes the
    mean over samples as a score folder (or the sums as a part). Under Lightning's ``ModelParallelStrategy`` the model
    is sharded over the ranks (FSDP2), and the sums of weight scores with it.

    Args:
        pretrained: Hub id, local folder, ``FILE.gguf``, or ``demo``, the model that comes with the package.
        dtype: Precision to load the model in; ``auto``: as it was saved. Sums are float32 or better in any case.
        revision: Commit, branch or tag of a hub model.
        device_map: ``auto`` spreads the model over the GPUs of this process; nothing moves it afterwards.
        trust_remote_code: Run the model code that a hub repository brings. Off unless you turn it on.
        dequantize: Make plain weights of those of an 8-bit or 4-bit checkpoint, where transformers can (FP8, MXFP4,
            compressed-tensors, bitsandbytes); else it is refused. GGUF files are unpacked in any case.
        method: ``lrp`` (AttnLRP), ``gradient``, ``wanda``, ``magnitude``, ``random``, ``activation``; ``expertise``
            for samples with labels; ``attribution_patching``, ``relevance_patching`` or ``integrated_gradients`` for
            samples with counterfactuals; or ``class_path`` and ``init_args`` of one of them or of a method of your own.
        unlisted_family: Let ``lrp`` and ``relevance_patching`` try a model family that they do not list, as ``doctor``
            may advise. It is scored if its relevance account balances.
        granularity: What is scored: ``neuron`` (row sums), ``weight``, ``head`` (query heads), ``channel`` (inputs of
            attention's output projection), ``mlp`` (whole MLPs), ``expert`` (whole experts of a mixture), ``output``
            (outputs of single linear layers, by default of the MLPs'), or a class of your own. A list scores several
            kinds in one pass, each at layers of its own.
        target: What is attributed: ``predicted`` (the largest logit after the sample), ``completion`` (log-likelihood
            of the sample's completion, times its weight), ``text`` (log-likelihood of its tokens), ``answer`` (logit of
            the answer minus that of the foil), or a class of your own.
        labels: For target ``text``: the text's own tokens (``data``), or tokens drawn from the model at every place
            (``model``); the mean of squares is then the Fisher information.
        signed: Keep the sign of scores (SparC3, App. B); needs no weight gradient. Not for single weights. With any
            target but ``predicted`` they are the derivative by each component's gain.
        targets: Glob patterns of linear layers, as ``["*.up_proj"]``; ``["*"]``: all of the decoder and the output
            head; unset: the up-projection of every MLP, or for heads and channels every attention's output projection,
            for whole MLPs every down-projection, for outputs all linear layers of the MLPs.
        squares: Store squared neuron scores too, for the ``t`` contrast.
        groups: Store the neuron scores of this many groups of samples too (8 is a good number), by which ``evidence``
            tells whether there are enough samples. 0: none.
        nonfinite: ``error`` stops at the first NaN or infinity; ``zero`` replaces each by 0 and counts them.
        seed: Seed of the ``random`` method, and of labels drawn from the model.
        output: Where the scores go; by default ``scores`` in the run's log folder.
        overwrite: Replace earlier scores in ``output``.
        checkpoint_every: Save the partial sums every so many batches of a process. After a crash the same command
            resumes from them, on any number of processes. Needs ``output``.
        part: ``i/n``: score only the i-th of n parts of the samples, for ``merge`` to join.
        shard: Earlier name of ``part``.
        sums_on_host: Keep the sums of weight scores (as large as the weights in float32) in the host's memory, where
            they do not fit beside the model. Larger batches then mean fewer transfers. The processes add them up
            through gloo, whatever connects their devices.
        sequential: For ``wanda`` and single weights: a share (``0.5``) or pattern (``"2:4"``: 2 of 4 stay) by which
            each decoder layer is pruned, row by row, before the next one's inputs are measured, as Wanda's authors do.
            The model itself is not changed; ``prune`` must then remove the same.
        gradient_checkpointing: Keep the activations of one decoder layer at a time and compute the others again, for
            windows that do not fit: about a third slower, the same scores.
    """

    def __init__(
        self,
        pretrained: str = "demo",
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        revision: str | None = None,
        device_map: str | None = None,
        trust_remote_code: bool = False,
        dequantize: bool = False,
        method: Spec = "lrp",
        unlisted_family: bool = False,
        granularity: Spec | list[Spec] = "neuron",
        target: Spec = "predicted",
        labels: Literal["data", "model"] = "data",
        signed: bool = False,
        targets: list[str] | None = None,
        squares: bool = False,
        groups: int = 0,
        nonfinite: Literal["error", "zero"] = "error",
        seed: int = 0,
        output: str | None = None,
        overwrite: bool = False,
        checkpoint_every: int | None = None,
        part: str | None = None,
        shard: str | None = None,
        sums_on_host: bool = False,
        gradient_checkpointing: bool = False,
        sequential: str | float | None = None,
    ) -> None:
        source = ModelSource(pretrained, dtype, revision, device_map, trust_remote_code, dequantize)
        super().__init__(source, output, overwrite)
        method = as_unlisted(method) if unlisted_family else method
        self.request = ScoreRequest.of(
            method, granularity, target, targets, labels, signed=signed, squares=squares, groups=groups,
            nonfinite=nonfinite, seed=seed, sums_on_host=sums_on_host, gradient_checkpointing=gradient_checkpointing,
            sequential=None if sequential is None else str(sequential),
        )  # fmt: skip
        self.part = _checked_part(part, shard, self.request)
        self.checkpoint_every = _checked_interval(checkpoint_every, output)
        if sequential is not None and (self.part is not None or checkpoint_every is not None):
            other = "part" if self.part is not None else "model.checkpoint_every"
            raise InputError(
                f"model.sequential={sequential}: a decoder layer is pruned by what all samples show, so that neither "
                f"sums in between nor those of a part can be kept; leave out {other}"
            )
        if self.request.method.object.needs_all_samples and (self.part is not None or checkpoint_every is not None):
            other = "part" if self.part is not None else "model.checkpoint_every"
            raise InputError(
                f"model.method={self.request.method.name} compares all samples with each other, so that neither sums "
                f"in between nor those of a part can be kept; leave out {other}"
            )
        self.run: ScoreRun | None = None
        """The run; from the first batch on."""
        self._description = ModelRecord()
        """The model's entry in the manifest; on rank 0."""
        self._account: dict[str, Any] | None = None
        """What the method's check of itself on one sample said."""
        self._is_checked = False
        self._partial: PartialSums | None = None
        self._loop = ExitStack()

    @property
    def data(self) -> ReferenceData:
        """What the Trainer was given to score on."""
        return self.trainer.datamodule  # type: ignore[attr-defined]

    @property
    def samples(self) -> list[ScoredSample]:
        """The samples that this rank has scored."""
        return [] if self.run is None else self.run.samples

    @property
    def manifest(self) -> Manifest | None:
        """The manifest of the scores; on rank 0, once they are written."""
        return None if self.run is None else self.run.manifest

    def setup(self, stage: str) -> None:
        """Checks what would otherwise fail after the model was loaded, or hours later, and has the samples drawn.

        Raises:
            InputError: if the output cannot be written, an argument does not go with a sharded model, or the samples
                cannot be read.
        """
        super().setup(stage)
        if self.is_sharded:
            self._check_sharded()
        self.output = self.place("scores", SCORES if self.part is None else PART)
        if self.checkpoint_every is not None and self.trainer.limit_predict_batches != 1.0:
            raise InputError(
                f"trainer.limit_predict_batches={self.trainer.limit_predict_batches} would count from where a run "
                "resumes (checkpoint_every); give data.num_samples instead"
            )
        with timed("reading"):
            self.data.read(self.encoder)
        check_samples(self.request, self.data.samples)
        if self.part is not None:
            number, count = self.part
            ids = sorted(sample.id for sample in self.data.samples)
            self.data.exclude(set(ids) - set(ids[number - 1 :: count]))

    def _check_sharded(self) -> None:
        if (sequential := self.request.options.sequential) is not None:
            raise InputError(
                f"model.sequential={sequential}: a model that trainer.strategy=ModelParallelStrategy shares out cannot "
                "be run layer by layer; use model.device_map, or processes with a whole model each"
            )
        if pruning_of(self.trainer) is not None:
            raise InputError(
                "a plan cannot be in force while a model is scored that trainer.strategy=ModelParallelStrategy shares "
                "out; save the edited model (prune --save_model) and score that"
            )
        if self.request.options.sums_on_host:
            raise InputError(
                "model.sums_on_host=true: with trainer.strategy=ModelParallelStrategy each device keeps its part of "
                "the sums; leave it out"
            )
        sums_are_sharded = self.request.method.object.needs_target and self.request.components[0].object.dims == 2
        if self.checkpoint_every is not None and sums_are_sharded:
            raise InputError(
                f"checkpoint_every={self.checkpoint_every}: weight scores whose sums ModelParallelStrategy "
                "shares out cannot be saved in between; leave it out, and score parts by --part i/n, which merge joins"
            )

    def configure_model(self) -> None:
        """Loads the weights, once, and takes up what an interrupted run has left.

        This is the last hook before Lightning asks for the batches, and whether sums of an earlier run may be taken up
        depends on the model's fingerprint.
        """
        if self.model is not None:
            return
        model = load_model(self.source)
        check_vocabulary(model, self.encoder.tokenizer)
        if self.trainer.is_global_zero:
            self._description = describe(model, self.source)
        if self.checkpoint_every is not None and self.request.method.object.needs_samples:
            self._take_up_partial_sums(model)
        if self.is_sharded:
            self._check_method(model)  # now, while the weights are whole
            self.request.method.object.prepare(model)
            share_out(model, self.device_mesh["data_parallel"])
        self.hold(model)

    def _take_up_partial_sums(self, model: transformers.PreTrainedModel) -> None:
        """Leaves out the samples whose sums an interrupted run has saved."""
        assert self.output is not None
        partial = PartialSums(self.output, self.global_rank)
        layers = [group.layer for group in self.request.groups(model)]
        partial.join(
            from_rank_zero(
                lambda: partial.take_up(
                    settings_of(self._about(), self.request.options, layers, self.part)
                    | {"part": None if self.part is None else self.part[0]}
                )
            )
        )
        self.data.exclude(partial.ids)
        if partial.ids:
            kept(partial.folder)
            if self.trainer.is_global_zero:
                log.info("resuming: %d samples already scored", len(partial.ids))
        self._partial = partial

    def _check_method(self, model: transformers.PreTrainedModel) -> None:
        if not self._is_checked:
            self._is_checked = True
            sample = self.data.samples[0].input_ids
            self._account = self.request.method.object.check(model, sample)
            self.request.target.object.check(model, sample)

    def _about(self) -> About:
        about = self.request.about(self._description, self.data.describe())
        pruning = pruning_of(self.trainer)
        return replace(about, relevance_account=self._account, plan=None if pruning is None else pruning.load().digest)

    def on_predict_start(self) -> None:
        """Makes the sums where the weights are.

        Raises:
            InputError: if gradients are off, or the targets match nothing.
        """
        if torch.is_inference_mode_enabled():
            raise InputError("scoring needs gradients: give the Trainer inference_mode=False")
        assert self.model is not None
        self.model.eval()
        self._check_method(self.model)
        config = resolved_config(self.trainer)
        destination = self.output and Destination(Path(self.output), self.overwrite, self.part, config)
        about = self._about() if self.trainer.is_global_zero else None
        self.run = ScoreRun(self.request.scorer(self.model), about, destination or None, self._partial)
        if self.request.options.sums_on_host:
            sum_over_ranks(torch.zeros(1))  # connects the hosts now: at the end it would be too late
        if self._partial is not None:
            self._loop.enter_context(deferring_stop())  # until the sums hold whole batches

    def predict_step(self, batch: ReferenceBatch, batch_idx: int) -> None:
        """Takes in one batch; ``samples`` grows by its samples (a stand-in has none)."""
        assert self.run is not None
        self.run.add(batch)
        if self.checkpoint_every is not None and (batch_idx + 1) % self.checkpoint_every == 0:
            self.run.save()
        self._stop_if_asked(self.run)

    def _stop_if_asked(self, run: ScoreRun) -> None:
        if self._partial is None:
            return
        stop = stop_requested()
        if self.is_sharded:  # after the same pass: a rank that continued would wait for the others' weights in the next
            stop = next((other for other in gather_lists([stop]) if other is not None), None)
        if stop is not None:
            run.save()
            raise stop

    def on_predict_epoch_end(self) -> None:
        """Adds up the ranks and writes the scores."""
        assert self.run is not None
        self._stop_if_asked(self.run)
        self.run.save()  # nothing is lost if a rank dies while the sums are added up or written
        self._loop.close()
        self.run.finish()


def _checked_interval(checkpoint_every: int | None, output: str | None) -> int | None:
    if checkpoint_every is not None and checkpoint_every < 1:
        raise InputError(f"checkpoint_every={checkpoint_every}; give 1 batch or more")
    if checkpoint_every is not None and output is None:
        raise InputError(
            f"checkpoint_every={checkpoint_every} needs a place that stays the same when the run resumes; give --output"
        )
    return checkpoint_every


def _checked_part(part: str | None, shard: str | None, request: ScoreRequest) -> tuple[int, int] | None:
    if part is not None and shard is not None and part != shard:
        raise InputError(f"part={part!r} and shard={shard!r} are two names of one setting; give part only")
    name = shard if part is None else part
    if name is None:
        return None
    if not request.method.object.needs_samples:
        raise InputError(
            f"part={name!r}: method {request.method.name} needs no sample, so there is nothing to share; leave it out"
        )
    return parse_part(name)
