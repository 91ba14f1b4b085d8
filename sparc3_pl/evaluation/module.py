"""The evaluation pass as a LightningModule: it loads the model, and forwards the hooks to an ``EvaluationRun``."""

from __future__ import annotations

import logging
import time
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import lightning.pytorch as pl

from sparc3_pl.data.encoding import Encoder, load_encoder
from sparc3_pl.data.evaluation_data import Units, Windows, WindowSize, window_size
from sparc3_pl.errors import InputError
from sparc3_pl.evaluation.completion_run import CompletionRun, NeutralRun
from sparc3_pl.evaluation.evaluation_run import EvaluatedModel, EvaluationRun
from sparc3_pl.evaluation.further_text import FurtherText, further_texts
from sparc3_pl.evaluation.generation import Generator, Sampling, prompts_at_once
from sparc3_pl.evaluation.judges import Judge, SequenceJudge, chosen_judges
from sparc3_pl.evaluation.measurement import chosen_measurements
from sparc3_pl.evaluation.measurement_run import MeasurementRun, UnitRun
from sparc3_pl.evaluation.perplexity_run import PerplexityRun
from sparc3_pl.evaluation.results import KIND, Evaluation
from sparc3_pl.evaluation.show import print_results, write_to_loggers
from sparc3_pl.evaluation.tasks import task_specs
from sparc3_pl.evaluation.words import WordFilter, WordsJudge
from sparc3_pl.io.files import check_output
from sparc3_pl.model.fsdp import InStep
from sparc3_pl.model.fsdp import shard as share_out
from sparc3_pl.model.identity import describe, fingerprint
from sparc3_pl.model.loading import load_model
from sparc3_pl.model.placement import input_device
from sparc3_pl.model.source import ModelSource
from sparc3_pl.pruning.callback import pruning_of
from sparc3_pl.registry import Spec
from sparc3_pl.runtime.collectives import from_rank_zero
from sparc3_pl.runtime.progress import Watch, show_progress
from sparc3_pl.runtime.run_config import resolved_config, shown_settings
from sparc3_pl.runtime.run_log import RunLog, run_folder
from sparc3_pl.runtime.timing import timed
from sparc3_pl.runtime.trainer import check_placement, check_precision, is_sharded_run

if TYPE_CHECKING:
    import transformers  # its classes are not loaded where a parser reads the types of this file

    from sparc3_pl.data.evaluation_data import EvaluationData, NeutralBatch, PromptBatch, UnitBatch, WindowBatch

__all__ = ["EvaluationModule", "check_sizes"]

log = logging.getLogger(__name__)


class EvaluationModule(pl.LightningModule):
    """Measures the perplexity of a causal language model on text, and what it makes of prompts.

    ``test_step`` takes windows of text, batches of prompts, and batches of units of your own measurements. At the end
    what the ranks have made is gathered, and rank 0 writes the evaluation folder and prints the figures. Under
    Lightning's ``ModelParallelStrategy`` the model is sharded over the ranks (FSDP2), which then take passes in step.

    Args:
        pretrained: Hub id, local folder, ``FILE.gguf``, or ``demo``, the model that comes with the package.
        dtype: Precision to load the model in; ``auto``: as it was saved. Sums are float64 in any case.
        revision: Commit, branch or tag of a hub model.
        device_map: ``auto`` spreads the model over the GPUs of this process; nothing moves it afterwards.
        trust_remote_code: Run the model code that a hub repository brings. Off unless you turn it on.
        dequantize: Make plain weights of those of an 8-bit or 4-bit checkpoint, where transformers can (FP8, MXFP4,
            compressed-tensors, bitsandbytes); else it is refused. GGUF files are unpacked in any case.
        max_length: Perplexity window in tokens; unset: the model's context, at most 2048.
        stride: Tokens from one window to the next; unset: ``max_length``, windows that do not overlap.
        windows: ``sliding``: every token of the text is scored once. ``published``: as SparseGPT and Wanda measure (so
            that their tables compare), whole windows without overlap, the short one at the end dropped.
        max_new_tokens: Length at which a completion is cut.
        temperature: Sampling temperature; 0: greedy.
        top_p: Nucleus sampling: the likeliest tokens that together reach this probability; 1: all tokens.
        samples_per_prompt: Completions a prompt.
        seed: Fixes, with the prompt and the number of the completion, every random choice.
        generation_batch_size: The most completions made at once; null: as many as save time and fit into memory. It
            changes no completion, only speed and memory.
        word_filter: A file of words, one a line, or ``default``, a list of rude English ones: a completion that holds
            a listed word is drawn again. An edit should do better than this.
        word_filter_tries: How often at most; the last one stays, and those that still hold a listed word are counted.
        judge: What scores completions; unset: the first of ``judges``, or else Detoxify ``original``, or the demo's own
            judge for the demo model.
        judges: Further judges of the same completions, by names of your choice, each as ``judge`` is set.
        judge_prefixes: Have the judge score each completion also as it stands after each of its tokens, for
            ``data.prefix_field`` of score.
        measurements: Measurements of your own, each a class path, alone or with ``init_args``; they follow the others.
        tasks: Multiple-choice tasks of the LM Evaluation Harness (``lm_eval``, extra ``harness``), as
            ``[boolq, arc_easy]``: zero-shot accuracy, item by item.
        tasks_folder: Folder of task files (YAML) besides the harness' own, for tasks of your own and for machines
            without a hub.
        tasks_limit: Only the first so many items of each task; null: all.
        tasks_batch_size: Sequences (a context with one of its choices) in one forward pass.
        allow_overlap: Evaluate also on prompts and pairs from which the plan was made, and on text by which its budget
            was held; the results say so.
        output: Where the results go; by default ``evaluation`` in the run's log folder.
        overwrite: Replace an earlier evaluation in ``output``.
    """

    def __init__(
        self,
        pretrained: str = "demo",
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        revision: str | None = None,
        device_map: str | None = None,
        trust_remote_code: bool = False,
        dequantize: bool = False,
        max_length: int | None = None,
        stride: int | None = None,
        windows: Windows = "sliding",
        max_new_tokens: int = 50,
        temperature: float = 0.7,
        top_p: float = 0.9,
        samples_per_prompt: int = 1,
        seed: int = 0,
        generation_batch_size: int | None = None,
        word_filter: str | None = None,
        word_filter_tries: int = 10,
        judge: SequenceJudge | WordsJudge | Judge | None = None,
        judges: dict[str, SequenceJudge | WordsJudge | Judge] | None = None,
        judge_prefixes: bool = False,
        measurements: list[Spec] | None = None,
        tasks: list[str] | None = None,
        tasks_folder: str | None = None,
        tasks_limit: int | None = None,
        tasks_batch_size: int = 8,
        allow_overlap: bool = False,
        output: str | None = None,
        overwrite: bool = False,
    ) -> None:
        super().__init__()
        check_sizes(max_length, stride, windows, generation_batch_size)
        self.source = ModelSource(pretrained, dtype, revision, device_map, trust_remote_code, dequantize)
        self.sampling = Sampling(max_new_tokens, temperature, top_p, samples_per_prompt, seed)
        self.word_filter = None
        if word_filter is not None:
            self.word_filter = WordFilter.of(word_filter, word_filter_tries, temperature)
        if not tasks and (tasks_folder is not None or tasks_limit is not None):
            raise InputError("model.tasks_folder and model.tasks_limit need model.tasks; name tasks, or leave them out")
        self._specs = [*(measurements or ()), *task_specs(tasks or (), tasks_folder, tasks_limit, tasks_batch_size)]
        self.measurements = chosen_measurements(self._specs)
        """The measurements of ``measurements`` and ``tasks``; from ``setup`` on also the pairs of the data module."""
        self._max_length, self._stride, self._windows = max_length, stride, windows
        self.generation_batch_size, self.allow_overlap = generation_batch_size, allow_overlap
        self.output, self.overwrite = output, overwrite
        judge, self.further_judges = chosen_judges(judge, judges, pretrained)
        self.judge_prefixes = judge_prefixes
        self._judge = (judge,)  # in a tuple: a judge that is a module must not join this one's state dict
        self.model: transformers.PreTrainedModel | None = None
        self.run: EvaluationRun | None = None
        """Once the Trainer has started."""
        self._in_step: InStep | None = None
        self._loaded_fingerprint: str | None = None
        """Fingerprint of the model before any edit; None if the plan's own check tells it."""
        self._window: WindowSize | None = None
        self._units: list[Units] = []

    @property
    def evaluation(self) -> Evaluation | None:
        """Results and rows, not yet sealed; on rank 0, at the end."""
        return None if self.run is None else self.run.evaluation

    @property
    def written_to(self) -> Path | None:
        """The evaluation folder; on rank 0, once it is written."""
        return None if self.run is None else self.run.written_to

    @property
    def data(self) -> EvaluationData:
        """What the Trainer was given to evaluate on."""
        return self.trainer.datamodule  # type: ignore[attr-defined]

    # --- the model ----------------------------------------------------------------------------------------------------

    @cached_property
    def encoder(self) -> Encoder:
        """What turns texts into the model's token ids, loaded before the weights."""
        return load_encoder(self.source)

    @property
    def window_settings(self) -> tuple[int | None, int | None, Windows]:
        """Length, stride and kind of the windows of perplexity, as they were asked for."""
        return self._max_length, self._stride, self._windows

    @property
    def judge(self) -> Judge:
        """What scores completions."""
        return self._judge[0]

    def setup(self, stage: str) -> None:
        """Checks what would otherwise fail after the model was loaded, and has text and prompts read.

        Raises:
            InputError: if the Trainer would convert the model, there is nothing to evaluate, or it cannot be read.
        """
        check_precision(self.trainer)
        check_placement(self.trainer, self.source.device_map)
        specs: list[Spec] = [] if self.data.pairs is None else [self.data.pairs]
        if self.data.further_texts:
            self._window = window_size(self.encoder.context, self._max_length, self._stride, self._windows)
            specs += further_texts(self.data.further_texts, self._window, self.data.window_batch_size)
        if specs:
            self.measurements = chosen_measurements([*self._specs, *specs])
        if self.data.text_source is None and self.data.query is None and not self.measurements:
            raise InputError(
                "data.text_source and data.prompts_source are both null: nothing to evaluate; give one of them, "
                "data.pairs_source, model.measurements or model.tasks"
            )
        if self.word_filter is not None and self.data.query is None:
            raise InputError("model.word_filter needs completions; give data.prompts_source, or leave it out")
        with timed("reading"):
            self.data.read(self.encoder)
        measurements = (choice.object for choice in self.measurements)
        self._units = [
            Units(one.name, from_rank_zero(lambda one=one: list(one.units(self.encoder))), one.batch_size)
            for one in measurements
        ]

    def configure_model(self) -> None:
        """Loads the weights, once, takes their fingerprint before any edit, and says what the batches are to hold.

        Raises:
            InputError: if the window is longer than the model's context.
        """
        if self.model is None:
            model = load_model(self.source)
            if self._trainer is not None and is_sharded_run(self._trainer):
                share_out(model, self.device_mesh["data_parallel"])
            if self.source.device_map is None:
                self.model = model
            else:  # outside the module tree: nothing may move a model that is spread over devices
                self.__dict__["model"] = model
        pruning = None if self._trainer is None else pruning_of(self._trainer)
        if self._loaded_fingerprint is None and (pruning is None or not pruning.check_fingerprint):
            self._loaded_fingerprint = self._fingerprint()
        if self._trainer is not None:
            self._plan_batches()

    def _fingerprint(self) -> str:
        assert self.model is not None
        if self._trainer is not None and is_sharded_run(self._trainer):
            return fingerprint(self.model)  # which gathers the ranks' parts
        return from_rank_zero(lambda: fingerprint(self.model))

    def _plan_batches(self) -> None:
        """Has windows, units and prompts put into batches: the data module cannot know the model's context."""
        assert self.model is not None
        of_further_texts, self._window = self._window, None
        if self.data.text_source is not None:
            context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
            self._window = window_size(context, self._max_length, self._stride, self._windows)
        if self.data.further_texts and self._window not in (None, of_further_texts):
            raise InputError(
                f"the tokenizer allows windows of {of_further_texts.max_length} tokens and the model of "
                f"{self._window.max_length}; set model.max_length, so that all texts are measured alike"
            )
        at_once = prompts_at_once(self.generation_batch_size, self.sampling.samples_per_prompt)
        self.data.plan_batches(self._window, self._units, at_once)

    # --- the pass -----------------------------------------------------------------------------------------------------

    def on_test_start(self) -> None:
        """Checks what would otherwise fail hours later, and picks up what an interrupted run has left.

        Raises:
            InputError: if the output cannot be written, a prompt was used to make the plan, or a judge fails on a
                trial sentence.
        """
        assert self.model is not None
        self.model.eval()
        folder = run_folder(self.trainer)  # on every rank
        if self.output is None and folder is not None:
            self.output = str(folder / "evaluation")
        if self.output is not None and self.trainer.is_global_zero:
            check_output(self.output, self.overwrite, KIND)
        self._log = RunLog(self.trainer)
        evaluated = self._identify()
        prompts = [*self.data.prompt_ids, *self.data.neutral_ids]  # of all ranks, on every rank
        if not self.allow_overlap:
            evaluated.require_held_out(prompts)
        runs: list[MeasurementRun] = []  # the same on every rank, also on one without prompts or windows
        if self._window is not None:
            runs.append(PerplexityRun(self.model, self._window, self.device))
        if self.data.prompt_ids:
            runs.append(self._completion_run(evaluated, CompletionRun))
        if self.data.neutral_ids:
            runs.append(self._completion_run(evaluated, NeutralRun))
        if self.measurements:
            runs.append(UnitRun(self.model, self.encoder, self.measurements))
        self.run = EvaluationRun(evaluated, runs)
        self._watch = Watch(self.data.shares())
        if is_sharded_run(self.trainer):
            self._in_step = InStep(self.model)

    def _completion_run(self, evaluated: EvaluatedModel, kind: type[CompletionRun]) -> CompletionRun:
        assert self.model is not None
        generator = Generator(
            self.model, self.encoder.tokenizer, self.sampling, self.generation_batch_size, self.word_filter
        )
        judge_device = input_device(self.model)
        completions = kind(generator, self.judge, self.device, judge_device, self.further_judges, self.judge_prefixes)
        if self.output is not None:
            copy = {"model": evaluated.fingerprint, "dtype": str(self.model.dtype)}
            completions.keep(self.output, copy, self.global_rank)
        return completions

    def _identify(self) -> EvaluatedModel:
        """What is evaluated: asks the Trainer's callbacks, which have edited the model by now, and the weights."""
        pruning = pruning_of(self.trainer)
        edit = None if pruning is None else pruning.applied
        plan = edit.plan if edit is not None and edit.model is self.model else None
        if self._loaded_fingerprint is None:
            assert plan is not None, "a callback that checks the fingerprint has done so"
            self._loaded_fingerprint = plan.fingerprint
        texts = [one.object.text for one in self.measurements if isinstance(one.object, FurtherText)]
        evaluated = EvaluatedModel.of(
            describe(self.model, self.source, self._loaded_fingerprint),
            self._fingerprint(),
            plan,
            self.data,
            self._units,
            texts,
        )
        if evaluated.is_edited_unknown:
            log.warning(
                "the model's weights were changed after loading, but by no PruningCallback: the results cannot name "
                "the plan or say whether the prompts are held out"
            )
        return evaluated

    def test_step(self, batch: WindowBatch | PromptBatch | NeutralBatch | UnitBatch, batch_idx: int) -> None:
        """Takes in one batch of windows, of prompts, of neutral prompts or of other units."""
        assert self.run is not None
        start = time.perf_counter()
        progress = self.run.add(batch)
        self._watch.took(progress.unit, time.perf_counter() - start)
        show_progress(self.trainer, "eval", self._watch, progress)
        running = {f"eval/running_{name}": value for name, value in self.run.status().items()}
        self._log.scalars(running, batch_idx)

    def on_test_epoch_end(self) -> None:
        """Gathers the ranks; rank 0 writes the results and logs them.

        Raises:
            InputError: if there was nothing to evaluate.
        """
        assert self.run is not None
        if self._in_step is not None:
            self._in_step.finish()
        if self.output is None:
            log.info("fast_dev_run: no results are written (give --output to write them)")
        rows = self.run.finish(
            self.data.describe(), self.output, resolved_config(self.trainer), overwrite=self.overwrite
        )
        if self.evaluation is not None:
            write_to_loggers(self._log, self.evaluation.figures, rows, shown_settings(self.trainer))

    def on_test_end(self) -> None:
        """Prints the figures on rank 0, once the progress bar is closed."""
        if self.evaluation is not None:
            print_results(self.evaluation.figures, self.written_to)


def check_sizes(
    max_length: int | None, stride: int | None, windows: Windows, generation_batch_size: int | None
) -> None:
    """Refuses windows and batches that no model can be measured with.

    Raises:
        InputError: for the first setting that is wrong.
    """
    if max_length is not None and max_length < 2:
        raise InputError(f"model.max_length={max_length}; give at least 2 tokens (the first of a window is not scored)")
    if stride is not None and stride < 1:
        raise InputError(f"model.stride={stride}; give at least 1")
    if stride is not None and max_length is not None and stride > max_length:
        raise InputError(f"model.stride={stride} is longer than model.max_length={max_length}: text would be skipped")
    if windows not in get_args(Windows):
        raise InputError(f"model.windows={windows!r} is unknown; give {' or '.join(get_args(Windows))}")
    if windows == "published" and stride is not None and stride != max_length:
        raise InputError(
            f"model.stride={stride}: published windows do not overlap; leave it out, or set model.windows: sliding"
        )
    if generation_batch_size is not None and generation_batch_size < 1:
        raise InputError(f"model.generation_batch_size={generation_batch_size}; give at least 1")
