"""The evaluation pass as a LightningModule: it loads the model, and forwards the hooks to an ``EvaluationRun``."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sparc3_pl.data.evaluation_data import Units, Windows, WindowSize
from sparc3_pl.data.pass_module import PassModule
from sparc3_pl.errors import InputError
from sparc3_pl.evaluation.evaluation_run import EvaluatedModel, EvaluationRun
from sparc3_pl.evaluation.further_text import further_texts
from sparc3_pl.evaluation.generation import Sampling
from sparc3_pl.evaluation.judges import Judge, SequenceJudge, chosen_judges
from sparc3_pl.evaluation.measurement import Measurement, chosen_measurements
from sparc3_pl.evaluation.measurement_run import Subject, units_of
from sparc3_pl.evaluation.results import KIND, Evaluation
from sparc3_pl.evaluation.settings import EvaluationSettings
from sparc3_pl.evaluation.show import print_results, write_to_loggers
from sparc3_pl.evaluation.tasks import task_specs
from sparc3_pl.evaluation.words import WordFilter, WordsJudge
from sparc3_pl.model.fsdp import InStep
from sparc3_pl.model.fsdp import shard as share_out
from sparc3_pl.model.identity import describe, fingerprint
from sparc3_pl.model.loading import load_model
from sparc3_pl.model.source import ModelSource
from sparc3_pl.pruning.callback import pruning_of
from sparc3_pl.registry import Choice, Spec
from sparc3_pl.runtime.collectives import from_rank_zero
from sparc3_pl.runtime.progress import Watch, show_progress
from sparc3_pl.runtime.run_config import resolved_config, shown_settings
from sparc3_pl.runtime.run_log import RunLog
from sparc3_pl.runtime.timing import timed

if TYPE_CHECKING:
    from sparc3_pl.data.evaluation_data import EvaluationData, NeutralBatch, PromptBatch, UnitBatch, WindowBatch

__all__ = ["EvaluationModule"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Test:
    """What there is while the model is evaluated.

    Attributes:
        run: Measures the batches.
        output: The evaluation folder to be; None: nothing is written.
        log: The Trainer's loggers.
        watch: Tells how long the rest takes.
        in_step: Keeps the ranks of a sharded model in step.
    """

    run: EvaluationRun
    output: str | None
    log: RunLog
    watch: Watch
    in_step: InStep | None


class EvaluationModule(PassModule):
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
        samples_per_prompt: Completions per prompt.
        seed: Fixes, with the prompt and the number of the completion, every random choice.
        generation_batch_size: The most completions made at once; null: as many as save time and fit into memory. It
            changes no completion, only speed and memory.
        word_filter: A file of words, one per line, or ``default``, a list of rude English ones: a completion that holds
            a listed word is drawn again. An edit should do better than this.
        word_filter_tries: Most tries for each completion; the last one is kept, and those that still hold a listed word
            are counted.
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
        source = ModelSource(pretrained, dtype, revision, device_map, trust_remote_code, dequantize)
        super().__init__(source, output, overwrite)
        sampling = Sampling(max_new_tokens, temperature, top_p, samples_per_prompt, seed)
        words = None if word_filter is None else WordFilter.of(word_filter, word_filter_tries, temperature)
        if not tasks and (tasks_folder is not None or tasks_limit is not None):
            raise InputError("model.tasks_folder and model.tasks_limit need model.tasks; name tasks, or leave them out")
        self.specs = [*(measurements or ()), *task_specs(tasks or (), tasks_folder, tasks_limit, tasks_batch_size)]
        """The measurements that ``measurements`` and ``tasks`` name."""
        chosen_measurements(self.specs)  # refuses now what ``setup`` would
        main, further = chosen_judges(judge, judges, pretrained)
        self.settings = EvaluationSettings(
            sampling, main, further, judge_prefixes, words, generation_batch_size, max_length, stride, windows
        )
        self.allow_overlap = allow_overlap
        self._loaded_fingerprint: str | None = None
        """Fingerprint of the model before any edit; None if the plan's own check tells it."""
        self._measurements: tuple[Choice[Measurement], ...] = ()
        """Those of ``specs`` and those that the data module asks for; from ``setup`` on."""
        self._units: list[Units] = []
        """The units of ``_measurements``."""
        self._test: _Test | None = None
        """From ``on_test_start`` on."""

    @property
    def evaluation(self) -> Evaluation | None:
        """Results and rows, not yet sealed; on rank 0, at the end."""
        return None if self._test is None else self._test.run.evaluation

    @property
    def written_to(self) -> Path | None:
        """The evaluation folder; on rank 0, once it is written."""
        return None if self._test is None else self._test.run.written_to

    @property
    def _started(self) -> _Test:
        assert self._test is not None, "the Trainer calls on_test_start first"
        return self._test

    @property
    def data(self) -> EvaluationData:
        """What the Trainer was given to evaluate on."""
        return self.trainer.datamodule  # type: ignore[attr-defined]

    # --- the model ----------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Checks what would otherwise fail after the model was loaded, and has text and prompts read.

        Raises:
            InputError: if the Trainer would convert the model, there is nothing to evaluate, or it cannot be read.
        """
        super().setup(stage)
        specs = [*self.specs, *([] if self.data.pairs is None else [self.data.pairs])]
        if self.data.further_texts:
            window = self.settings.window(self.encoder.context)
            specs += further_texts(self.data.further_texts, window, self.data.window_batch_size)
        self._measurements = chosen_measurements(specs)
        if self.data.text_source is None and self.data.query is None and not specs:
            raise InputError(
                "data.text_source and data.prompts_source are both null: nothing to evaluate; give one of them, "
                "data.pairs_source, model.measurements or model.tasks"
            )
        if self.settings.word_filter is not None and self.data.query is None:
            raise InputError("model.word_filter needs completions; give data.prompts_source, or leave it out")
        with timed("reading"):
            self.data.read(self.encoder)
        self._units = units_of(self._measurements, self.encoder)

    def configure_model(self) -> None:
        """Loads the weights, once, takes their fingerprint before any edit, and says what the batches are to hold.

        Raises:
            InputError: if the window is longer than the model's context.
        """
        if self.model is None:
            model = load_model(self.source)
            if self.is_sharded:
                share_out(model, self.device_mesh["data_parallel"])
            self.hold(model)
        pruning = None if self._trainer is None else pruning_of(self._trainer)
        if self._loaded_fingerprint is None and (pruning is None or not pruning.check_fingerprint):
            self._loaded_fingerprint = self._fingerprint()
        if self._trainer is not None:
            self._plan_batches()

    def _fingerprint(self) -> str:
        if self.is_sharded:
            return fingerprint(self.model)  # which gathers the ranks' parts
        return from_rank_zero(lambda: fingerprint(self.model))

    def _window(self) -> WindowSize | None:
        """The windows of ``data.text_source``, in which the model can read it; None without that text."""
        if self.data.text_source is None:
            return None
        return self.settings.window(getattr(self.model.config.get_text_config(), "max_position_embeddings", None))

    def _plan_batches(self) -> None:
        """Has windows, units and prompts put into batches: the data module cannot know the model's context."""
        window = self._window()
        if window is not None and self.data.further_texts:
            of_further_texts = self.settings.window(self.encoder.context)
            if window != of_further_texts:
                raise InputError(
                    f"the tokenizer allows windows of {of_further_texts.max_length} tokens and the model of "
                    f"{window.max_length}; set model.max_length, so that all texts are measured alike"
                )
        self.data.plan_batches(window, self._units, self.settings.prompts_at_once)

    # --- the pass -----------------------------------------------------------------------------------------------------

    def on_test_start(self) -> None:
        """Checks what would otherwise fail hours later, and picks up what an interrupted run has left.

        Raises:
            InputError: if the output cannot be written, a prompt was used to make the plan, or a judge fails on a
                trial sentence.
        """
        self.model.eval()
        output = self.place("evaluation", KIND)
        run_log = RunLog(self.trainer)
        subject = Subject(
            self.model, self.encoder, self.settings, self.data, self._window(), self._measurements, self.device
        )
        evaluated = self._identify(subject)
        if not self.allow_overlap:
            evaluated.require_held_out([*self.data.prompt_ids, *self.data.neutral_ids])  # of all ranks, on every rank
        run = EvaluationRun.of(evaluated, subject, output, self.global_rank)
        in_step = InStep(self.model) if self.is_sharded else None
        self._test = _Test(run, output, run_log, Watch(self.data.shares()), in_step)

    def _identify(self, subject: Subject) -> EvaluatedModel:
        """What is evaluated: asks the Trainer's callbacks, which have edited the model by now, and the weights."""
        pruning = pruning_of(self.trainer)
        edit = None if pruning is None else pruning.applied
        plan = edit.plan if edit is not None and edit.model is self.model else None
        if self._loaded_fingerprint is None:
            assert plan is not None, "a callback that checks the fingerprint has done so"
            self._loaded_fingerprint = plan.fingerprint
        loaded = describe(self.model, self.source, self._loaded_fingerprint)
        evaluated = EvaluatedModel.of(loaded, self._fingerprint(), plan, subject, self._units)
        if evaluated.is_edited_unknown:
            log.warning(
                "the model's weights were changed after loading, but by no PruningCallback: the results cannot name "
                "the plan or say whether the prompts are held out"
            )
        return evaluated

    def test_step(self, batch: WindowBatch | PromptBatch | NeutralBatch | UnitBatch, batch_idx: int) -> None:
        """Takes in one batch of windows, of prompts, of neutral prompts or of other units."""
        test = self._started
        start = time.perf_counter()
        progress = test.run.add(batch)
        test.watch.took(progress.unit, time.perf_counter() - start)
        show_progress(self.trainer, "eval", test.watch, progress)
        status = {f"eval/running_{name}": value for name, value in test.run.status().items()}
        test.log.scalars(status, batch_idx)

    def on_test_epoch_end(self) -> None:
        """Gathers the ranks; rank 0 writes the results and logs them.

        Raises:
            InputError: if there was nothing to evaluate.
        """
        test = self._started
        if test.in_step is not None:
            test.in_step.finish()
        if test.output is None:
            log.info("fast_dev_run: no results are written (give --output to write them)")
        config = resolved_config(self.trainer)
        rows = test.run.finish(self.data.describe(), test.output, config, overwrite=self.overwrite)
        if self.evaluation is not None:
            write_to_loggers(test.log, self.evaluation.figures, rows, shown_settings(self.trainer))

    def on_test_end(self) -> None:
        """Prints the figures on rank 0, once the progress bar is closed."""
        if self.evaluation is not None:
            print_results(self.evaluation.figures, self.written_to)
