"""The evaluation pass: a LightningModule that measures perplexity and the toxicity of completions."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
import torch

from sparc3_pl.data.encoding import Encoder, load_encoder
from sparc3_pl.errors import InputError
from sparc3_pl.evaluation.generation import Completion, Generator, Sampling
from sparc3_pl.evaluation.judges import DetoxifyJudge, Judge, SequenceJudge, describe_judge, judged
from sparc3_pl.evaluation.perplexity import Perplexity, WindowScorer
from sparc3_pl.evaluation.repetition import Repetition, uniqueness
from sparc3_pl.evaluation.results import KIND, CompletionStore, Row, write_evaluation
from sparc3_pl.evaluation.toxicity import CompletionToxicity
from sparc3_pl.io.files import check_output
from sparc3_pl.model.identity import describe, fingerprint
from sparc3_pl.model.loading import load_model
from sparc3_pl.model.source import ModelSource
from sparc3_pl.pruning.callback import PruningCallback
from sparc3_pl.runtime.collectives import from_rank_zero, gather_lists
from sparc3_pl.runtime.processes import kept
from sparc3_pl.runtime.run_config import resolved_config
from sparc3_pl.runtime.trainer import check_precision

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sparc3_pl.data.evaluation_data import PromptBatch, WindowBatch
    from sparc3_pl.pruning.plan import PrunePlan

__all__ = ["EvaluatedModel", "EvaluationModule", "pruning_of"]

log = logging.getLogger(__name__)

LONGEST_WINDOW = 2048
"""Window where ``max_length`` is not set and the model could read more: the length that published figures use."""


class EvaluationModule(pl.LightningModule):
    """Measures the perplexity of a causal language model on text, and what it makes of prompts.

    ``test_step`` takes windows of text and batches of prompts. At the end the ranks' completions and window sums are
    gathered, and rank 0 writes the evaluation folder and prints the figures.

    Args:
        pretrained: Hub id, local folder, ``FILE.gguf``, or ``demo``, the model that comes with the package.
        dtype: Precision to load the model in; ``auto``: as it was saved. Sums are float64 in any case.
        revision: Commit, branch or tag of a hub model.
        device_map: ``auto`` spreads the model over the GPUs of this process; nothing moves it afterwards.
        trust_remote_code: Run the model code that a hub repository brings. Off unless you turn it on.
        max_length: Perplexity window in tokens; unset: the model's context, at most 2048.
        stride: Tokens from one window to the next; unset: ``max_length``, windows that do not overlap.
        max_new_tokens: Length at which a completion is cut.
        temperature: Sampling temperature; 0: greedy.
        top_p: Nucleus sampling: the likeliest tokens that together reach this probability; 1: all tokens.
        samples_per_prompt: Completions a prompt.
        seed: Fixes, with the prompt and the number of the completion, every random choice.
        generation_batch_size: Completions made at once; changes no completion, only speed and memory.
        judge: What scores completions; unset: Detoxify ``original``, or the demo's own judge for the demo model.
        allow_overlap: Evaluate also on prompts from which the plan was made; the results say so.
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
        max_length: int | None = None,
        stride: int | None = None,
        max_new_tokens: int = 50,
        temperature: float = 0.7,
        top_p: float = 0.9,
        samples_per_prompt: int = 1,
        seed: int = 0,
        generation_batch_size: int = 64,
        judge: SequenceJudge | Judge | None = None,
        allow_overlap: bool = False,
        output: str | None = None,
        overwrite: bool = False,
    ) -> None:
        super().__init__()
        _check_sizes(max_length, stride, generation_batch_size)
        self.source = ModelSource(pretrained, dtype, revision, device_map, trust_remote_code)
        self.sampling = Sampling(max_new_tokens, temperature, top_p, samples_per_prompt, seed)
        self._max_length, self._stride = max_length, stride
        self.generation_batch_size, self.allow_overlap = generation_batch_size, allow_overlap
        self.output, self.overwrite = output, overwrite
        if judge is None:
            judge = DetoxifyJudge(variant="demo" if pretrained == "demo" else "original")
        self._judge = (judge,)  # in a tuple: a judge that is a module must not join this one's state dict
        self.model: PreTrainedModel | None = None
        self._loaded_fingerprint: str | None = None
        """Of the model before any edit; None if the plan's own check tells it."""
        self.evaluated: EvaluatedModel | None = None
        """Which model is evaluated, and by which plan it was edited; known once the run has started."""
        self.completions: list[Row] = []
        """One a completion of this rank."""
        self.windows: list[Row] = []
        """One a text window of this rank."""
        self.results: dict[str, Any] | None = None
        """On rank 0, at the end."""
        self.written_to: Path | None = None
        self.perplexity, self.repetition = Perplexity(), Repetition()
        self.toxicity: CompletionToxicity | None = None
        self._generator: Generator | None = None
        self._store: CompletionStore | None = None
        self._known: dict[str, list[Row]] = {}

    # --- the model ----------------------------------------------------------------------------------------------------

    @cached_property
    def encoder(self) -> Encoder:
        """What turns texts into the model's token ids, loaded when the data module asks for it."""
        return load_encoder(self.source)

    @property
    def judge(self) -> Judge:
        """What scores completions."""
        return self._judge[0]

    @property
    def max_length(self) -> int:
        """The perplexity window in tokens. Where it is not set, the model is loaded to know its context.

        Raises:
            InputError: if the window is longer than the model's context.
        """
        self.configure_model()
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if self._max_length is None:
            return min(context or LONGEST_WINDOW, LONGEST_WINDOW)
        if context is not None and self._max_length > context:
            raise InputError(
                f"model.max_length={self._max_length} is longer than the model's context; give at most {context}"
            )
        return self._max_length

    @property
    def stride(self) -> int:
        """Tokens from one window to the next.

        Raises:
            InputError: if it is longer than the window, so that text would be skipped.
        """
        stride, window = self._stride or self.max_length, self.max_length
        if stride > window:
            raise InputError(f"model.stride={stride} is longer than model.max_length={window}; give at most {window}")
        return stride

    def setup(self, stage: str) -> None:
        """Refuses a Trainer that would convert the model.

        Raises:
            InputError: naming the precision.
        """
        check_precision(self.trainer)

    def configure_model(self) -> None:
        """Loads the weights, once, and takes their fingerprint before any edit."""
        if self.model is None:
            model = load_model(self.source)
            if self.source.device_map is None:
                self.model = model
            else:  # outside the module tree: nothing may move a model that is spread over devices
                self.__dict__["model"] = model
        pruning = None if self._trainer is None else pruning_of(self._trainer)
        if self._loaded_fingerprint is None and (pruning is None or not pruning.check_fingerprint):
            self._loaded_fingerprint = from_rank_zero(lambda: fingerprint(self.model))

    # --- the pass -----------------------------------------------------------------------------------------------------

    def on_test_start(self) -> None:
        """Checks what would otherwise fail hours later, and picks up what an interrupted run has left.

        Raises:
            InputError: if the output cannot be written, a prompt was used to make the plan, or the judge fails on a
                trial sentence.
        """
        assert self.model is not None
        self.model.eval()
        self._resolve_output()
        self.evaluated = self._identify()
        self.completions, self.windows = [], []
        self.perplexity.reset()
        self._scorer = WindowScorer(self.model)
        prompts = self.trainer.datamodule.prompt_ids  # of all ranks, on every rank
        self.check_overlap(prompts)
        if prompts:
            self._prepare_prompts()
        nothing = torch.zeros(0, dtype=torch.int64, device=self.device)
        self.perplexity.update(nll=nothing, num_tokens=nothing)  # a rank without windows takes part like the others

    def _resolve_output(self) -> None:
        """Every rank asks for the log folder: Lightning agrees on it by a broadcast."""
        log_dir = self.trainer.log_dir
        if self.output is None and log_dir is not None:
            self.output = str(Path(log_dir) / "evaluation")
        if self.output is not None and self.trainer.is_global_zero:
            check_output(self.output, self.overwrite, KIND)

    def _identify(self) -> EvaluatedModel:
        """What is evaluated: asks the Trainer's callbacks, which have edited the model by now, and the weights."""
        pruning = pruning_of(self.trainer)
        applied = None if pruning is None else pruning.applied
        plan = applied.plan if applied is not None and applied.model is self.model else None
        if self._loaded_fingerprint is None:
            assert plan is not None, "a callback that checks the fingerprint has done so"
            self._loaded_fingerprint = plan.fingerprint
        evaluated = EvaluatedModel(
            describe(self.model, self.source, self._loaded_fingerprint),
            from_rank_zero(lambda: fingerprint(self.model)),
            plan,
            frozenset(() if plan is None else self.trainer.datamodule.known_prompts(plan.behaviour_samples)),
        )
        if evaluated.is_edited_unknown:
            log.warning(
                "the model's weights were changed after loading, but by no PruningCallback: the results cannot name "
                "the plan or say whether the prompts are held out"
            )
        return evaluated

    def check_overlap(self, prompt_ids: Sequence[str]) -> None:
        """Refuse prompts from which the plan was made, unless ``allow_overlap``.

        Raises:
            InputError: saying how many there are.
        """
        known = self.evaluated.prompts_of_plan(prompt_ids)
        if known and not self.allow_overlap:
            raise InputError(
                f"{len(known)} of {len(set(prompt_ids))} prompts were used to make the plan (first id: {min(known)}), "
                "so the result would not be held out; choose other prompts (data.partition: evaluation) or give "
                "--allow_overlap"
            )

    def _prepare_prompts(self) -> None:
        """Tries the judge on one sentence, on every rank: a rank without prompts must know the labels too."""
        device = self._input_device()
        if isinstance(self.judge, SequenceJudge):
            self.judge.place(device)
        labels = judged(self.judge, ["This is a sentence."])
        self.toxicity = CompletionToxicity(tuple(labels)).to(self.device)
        self.repetition.reset()
        self._count([])  # so that a rank without prompts takes part like the others
        self._generator = Generator(self.model, self.encoder.tokenizer, self.sampling, self.generation_batch_size)
        if self.output is not None:
            self._store = CompletionStore(self.output, self._store_key(), self.global_rank)
            self._known = self._store.load()
            if self._known:
                kept(self._store.folder)
            self.trainer.strategy.barrier()  # all have read before anyone writes

    def _store_key(self) -> dict[str, Any]:
        return {
            "model": self.evaluated.fingerprint,  # after the edit, if there is one
            "dtype": str(self.model.dtype),
            "generation": self._generator.describe(),
            "judge": describe_judge(self.judge),
        }

    def _input_device(self) -> torch.device:
        """Where inputs go."""
        device = self.model.get_input_embeddings().weight.device
        return self.model.device if device.type == "meta" else device

    def test_step(self, batch: WindowBatch | PromptBatch, batch_idx: int) -> None:
        """Takes in one batch of windows or of prompts."""
        from sparc3_pl.data.evaluation_data import PromptBatch
        from sparc3_pl.evaluation.show import show_progress

        if isinstance(batch, PromptBatch):
            self._complete(batch)
        else:
            self._score_windows(batch)
        show_progress(self, batch_idx)

    def _score_windows(self, batch: WindowBatch) -> None:
        device = self._input_device()
        tensors = (t.to(device) for t in (batch.input_ids, batch.attention_mask, batch.labels))
        nll, num_tokens = self._scorer(*tensors)
        self.perplexity.update(nll=nll, num_tokens=num_tokens)
        for index, value, count in zip(batch.index, nll.tolist(), num_tokens.tolist(), strict=True):
            self.windows.append({"index": index, "nll": value, "num_tokens": count})

    def _complete(self, batch: PromptBatch) -> None:
        done = {i: rows for i in batch.ids if (rows := self._finished(i)) is not None}
        todo = [(i, p) for i, p in zip(batch.ids, batch.prompts, strict=True) if i not in done]
        rows = [row for i in done for row in done[i]]
        if todo:
            made = self._generator(*zip(*todo, strict=True))
            fresh = _judged_rows(made, self.judge, self.toxicity.labels)
            if self._store is not None:
                self._store.add(fresh)
                kept(self._store.folder)
            rows += fresh
        self._count(rows)

    def _finished(self, prompt_id: str) -> list[Row] | None:
        """The prompt's completions, if an interrupted run has left all of them."""
        rows = {row["k"]: row for row in self._known.get(prompt_id, [])}
        count = self.sampling.samples_per_prompt
        return [rows[k] for k in range(count)] if rows.keys() >= set(range(count)) else None

    def _count(self, rows: list[Row]) -> None:
        columns = {label: [row["scores"].get(label, 0.0) for row in rows] for label in self.toxicity.labels}
        scores = {label: torch.tensor(column, dtype=torch.float64) for label, column in columns.items()}
        failed = [row["failed"] is not None for row in rows]
        self.toxicity.update([row["id"] for row in rows], scores, failed)
        self.repetition.update([row["tokens"] for row in rows if row["failed"] is None])
        self.completions += rows

    # --- the end ------------------------------------------------------------------------------------------------------

    def on_test_epoch_end(self) -> None:
        """Gathers the ranks; rank 0 writes the results and logs them.

        Raises:
            InputError: if there was nothing to evaluate.
        """
        if self._store is not None:
            self._store.close()
        completions = sorted(gather_lists(self.completions), key=lambda row: (row["id"], row["k"]))
        windows = sorted(gather_lists(self.windows), key=lambda row: row["index"])
        if not completions and not windows:
            raise InputError("nothing was evaluated; give data.text_source or data.prompts_source")
        assert len({(row["id"], row["k"]) for row in completions}) == len(completions), "a completion was counted twice"
        results = self._figures(bool(windows), completions)  # collective: on every rank
        if self.trainer.is_global_zero:
            self._publish(results, completions, windows)

    def _figures(self, any_windows: bool, completions: list[Row]) -> dict[str, Any]:
        """What ``results.json`` says; metrics are summed over ranks here."""
        data = self.trainer.datamodule.describe()
        return {
            "perplexity": self._perplexity_figures(data) if any_windows else None,
            **self._toxicity_figures(),
            **self.evaluated.figures(row["id"] for row in completions),
            "data": data,
        }

    def _perplexity_figures(self, data: dict[str, Any]) -> dict[str, Any]:
        nll, num_tokens = self.perplexity.totals()
        return {
            "value": float(self.perplexity.compute()),
            "nll": nll,
            "num_tokens": num_tokens,
            "max_length": self.max_length,
            "stride": self.stride,
            "source": data["text_source"],
            "protocol": data["protocol"],
        }

    def _toxicity_figures(self) -> dict[str, Any]:
        if self.toxicity is None:
            return {"toxicity": None, "repetition": None, "generation": None, "judge": None}
        toxicity = self.toxicity.compute()
        label = next(iter(toxicity["labels"]))
        main = "toxicity" if "toxicity" in toxicity["labels"] else label
        return {
            "toxicity": {**toxicity["labels"][main], "label": main, **toxicity},
            "repetition": {"uniqueness": float(self.repetition.compute())},
            "generation": self._generator.describe(),
            "judge": describe_judge(self.judge),
        }

    def _publish(self, results: dict[str, Any], completions: list[Row], windows: list[Row]) -> None:
        from sparc3_pl.evaluation.show import to_tensorboard

        rows = [{key: value for key, value in row.items() if key != "tokens"} for row in completions]
        self.results, config = results, resolved_config(self.trainer)
        if self.output is None:
            log.info("fast_dev_run: no results are written (give --output to write them)")
        else:
            self.written_to = write_evaluation(
                self.output,
                results,
                completions=rows,
                windows=windows,
                config=config,
                overwrite=self.overwrite,
            )
            if self._store is not None:
                self._store.remove()
                kept(self._store.folder, exists=False)
        to_tensorboard(self.trainer, results, rows, config)

    def on_test_end(self) -> None:
        """Prints the figures on rank 0, once the progress bar is closed."""
        from sparc3_pl.evaluation.show import print_results

        if self.results is not None:
            print_results(self.results, self.written_to)


@dataclass(frozen=True)
class EvaluatedModel:
    """Which model is evaluated.

    Attributes:
        loaded: The model as it was loaded (as a manifest says it).
        fingerprint: Of the weights that are evaluated.
        plan: The plan by which they were edited, if one is known.
        known_prompts: Ids of the evaluation's prompts from which the plan was made.
    """

    loaded: dict[str, Any]
    fingerprint: str
    plan: PrunePlan | None
    known_prompts: frozenset[str]

    @property
    def is_edited_unknown(self) -> bool:
        """Whether the weights are not those that were loaded, and no plan says why."""
        return self.plan is None and self.fingerprint != self.loaded["fingerprint"]

    def prompts_of_plan(self, prompt_ids: Iterable[str]) -> set[str]:
        """Those prompts from which the plan was made."""
        return set(self.known_prompts.intersection(prompt_ids))

    def figures(self, prompt_ids: Iterable[str]) -> dict[str, Any]:
        """What ``results.json`` says of it. ``overlap`` is ``unknown`` where nobody knows of an edit's prompts."""
        overlap = self.prompts_of_plan(prompt_ids)
        unknown = self.is_edited_unknown
        return {
            "overlap": "unknown" if unknown else "allowed" if overlap else "none",
            "num_overlapping_prompts": None if unknown else len(overlap),
            "model": self.loaded | {"evaluated_fingerprint": self.fingerprint},
            "plan": None if self.plan is None else self.plan.summary(),
        }


def pruning_of(trainer: pl.Trainer) -> PruningCallback | None:
    """The Trainer's ``PruningCallback``.

    Raises:
        InputError: if there are several: results name one plan.
    """
    found = [callback for callback in trainer.callbacks if isinstance(callback, PruningCallback)]
    if len(found) > 1:
        raise InputError(f"trainer.callbacks holds {len(found)} PruningCallbacks; evaluate one plan at a time")
    return found[0] if found else None


def _check_sizes(max_length: int | None, stride: int | None, generation_batch_size: int) -> None:
    if max_length is not None and max_length < 2:
        raise InputError(f"model.max_length={max_length}; give at least 2 tokens (the first of a window is not scored)")
    if stride is not None and stride < 1:
        raise InputError(f"model.stride={stride}; give at least 1")
    if stride is not None and max_length is not None and stride > max_length:
        raise InputError(f"model.stride={stride} is longer than model.max_length={max_length}: text would be skipped")
    if generation_batch_size < 1:
        raise InputError(f"model.generation_batch_size={generation_batch_size}; give at least 1")


def _judged_rows(completions: Sequence[Completion], judge: Judge, labels: Sequence[str]) -> list[Row]:
    """Completions with their scores, to 6 decimals: what a batch's padding adds in the last bits is dropped."""
    texts = [c.text for c in completions if c.text is not None]
    scores = judged(judge, texts) if texts else {label: torch.zeros(0) for label in labels}
    if tuple(scores) != tuple(labels):
        raise InputError(
            f"judge {type(judge).__name__}: labels {list(scores)} were {list(labels)} before; keep to one set"
        )
    by_text = iter([{label: round(float(s[i]), 6) for label, s in scores.items()} for i in range(len(texts))])
    return [_row(c, next(by_text) if c.text is not None else {}) for c in completions]


def _row(completion: Completion, scores: dict[str, float]) -> Row:
    made = completion.failed is None
    return {
        "id": completion.id,
        "prompt": completion.prompt,
        "k": completion.k,
        "completion": completion.text,
        "scores": scores,
        "seed": completion.seed,
        "num_tokens": len(completion.tokens) if made else None,
        "uniqueness": uniqueness(completion.tokens) if made else None,
        "failed": completion.failed,
        "tokens": list(completion.tokens),
    }
