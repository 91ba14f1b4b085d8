"""How a model is evaluated, whatever model it is and on whatever it is evaluated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from sparc3_pl.data.evaluation_data import Windows, WindowSize, check_window, window_size
from sparc3_pl.errors import InputError
from sparc3_pl.evaluation.generation import MOST_ROWS, Sampling
from sparc3_pl.evaluation.judges import Judge
from sparc3_pl.evaluation.words import WordFilter

__all__ = ["EvaluationSettings"]


@dataclass(frozen=True)
class EvaluationSettings:
    """How a text is cut into windows, and how prompts are completed and their completions judged.

    Attributes:
        sampling: How completions are drawn.
        judge: Scores completions; its figures are the evaluation's ``toxicity``.
        further_judges: Judges by name that score the same completions.
        judge_prefixes: Whether ``judge`` also scores each completion as it stands after each of its tokens.
        word_filter: Has completions that hold a listed word drawn again.
        generation_batch_size: The most completions made at once; None: as many as save time and fit into memory.
        max_length: The length of a window that was asked for, in tokens; None: the model's context, at most 2048.
        stride: The distance that was asked for from one window to the next; None: no overlap.
        windows: Which windows there are.

    Raises:
        InputError: for windows or batches that no model can be measured with.
    """

    sampling: Sampling
    judge: Judge
    further_judges: Mapping[str, Judge] = field(default_factory=dict)
    judge_prefixes: bool = False
    word_filter: WordFilter | None = None
    generation_batch_size: int | None = None
    max_length: int | None = None
    stride: int | None = None
    windows: Windows = "sliding"

    def __post_init__(self) -> None:
        check_window(self.max_length, self.stride, self.windows)
        if self.generation_batch_size is not None and self.generation_batch_size < 1:
            raise InputError(f"model.generation_batch_size={self.generation_batch_size}; give at least 1")

    def window(self, context: int | None) -> WindowSize:
        """The windows of a model.

        Args:
            context: Tokens that it can read; None: nothing says so.

        Raises:
            InputError: as ``window_size``.
        """
        return window_size(context, self.max_length, self.stride, self.windows)

    @property
    def prompts_at_once(self) -> int:
        """How many prompts are completed at once, all completions of each together, at most."""
        return max(1, (self.generation_batch_size or MOST_ROWS) // self.sampling.samples_per_prompt)
