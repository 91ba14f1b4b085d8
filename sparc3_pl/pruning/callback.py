"""Pruning inside any Lightning Trainer run."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from sparc3_pl.errors import InputError
from sparc3_pl.pruning.edit import AppliedPlan, apply_plan
from sparc3_pl.pruning.plan import PrunePlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["PruningCallback", "find_model", "pruning_of"]

log = logging.getLogger(__name__)


def find_model(module: nn.Module) -> "PreTrainedModel":
    """The Hugging Face model inside ``module``: its attribute ``model``, or the only one among its modules.

    Raises:
        InputError: if there is none, or more than one.
    """
    from transformers import PreTrainedModel

    if isinstance(getattr(module, "model", None), PreTrainedModel):
        return module.model
    models = [m for m in module.modules() if isinstance(m, PreTrainedModel)]
    inner = {id(part) for m in models for part in m.modules() if part is not m}
    outermost = [m for m in models if id(m) not in inner]
    if len(outermost) != 1:
        names = ", ".join(type(m).__name__ for m in outermost) or "none"
        raise InputError(
            f"{type(module).__name__} holds {len(outermost)} Hugging Face models ({names}), so it is unclear which "
            "one to prune; keep it in the attribute `model`"
        )
    return outermost[0]


class PruningCallback(pl.Callback):
    """Prunes the model of a LightningModule for a Trainer run: ``fit``, ``validate``, ``test`` or ``predict``.

    The plan is applied when the run starts, once the model exists (it may be built in ``configure_model``) and before
    any batch. A plan that does not fit the model stops the run before anything is changed.

    Args:
        plan: A plan, or the path of one.
        revert: Whether the removed values come back when the run ends or fails.
        hold: Whether, during ``fit``, zeros stay zeros: they are written again after every optimiser step. (A ``scale``
            edit has no zeros; its weights train on.)
        check_fingerprint: Whether the model's weights must be those that were scored. Turn it off when training goes
            on from a checkpoint.
    """

    def __init__(
        self, plan: PrunePlan | str | Path, revert: bool = False, hold: bool = True, check_fingerprint: bool = True
    ) -> None:
        self.plan = plan
        self.revert = revert
        self.hold = hold
        self.check_fingerprint = check_fingerprint
        self._applied: AppliedPlan | None = None
        self._hooks: list[Any] = []

    def load(self) -> PrunePlan:
        """The plan, read from its file the first time.

        Raises:
            InputError: if there is no plan at that path, or it is damaged.
        """
        if not isinstance(self.plan, PrunePlan):
            self.plan = PrunePlan.load(self.plan)
        return self.plan

    @property
    def applied(self) -> AppliedPlan | None:
        """The edit that is in force, and in which model; None before the run has started and once it is reverted."""
        return self._applied if self._applied is not None and self._applied.active else None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prunes, and holds the zeros from now on: the optimisers exist by now."""
        applied = self._apply(pl_module)
        if self.hold:
            self._hooks = [o.register_step_post_hook(lambda *_: applied.hold()) for o in trainer.optimizers]

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prunes for ``validate``; validation within ``fit`` finds the model pruned."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._apply(pl_module)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prunes for ``test``."""
        self._apply(pl_module)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prunes for ``predict``."""
        self._apply(pl_module)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Takes the edit back at the end of the run."""
        self._end()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Takes the edit back after a failure, when Lightning calls no ``teardown``."""
        self._end()

    def _apply(self, pl_module: pl.LightningModule) -> AppliedPlan:
        model = find_model(pl_module)
        if self.applied is not None and self.applied.model is model:
            return self.applied  # pruned by an earlier run, and not reverted
        plan = self.load()
        with torch.inference_mode(False):  # what is kept must be usable after an inference run
            self._applied = apply_plan(model, plan, self.check_fingerprint, keep=self.revert)
        counts = plan.counts()
        layers = f"{len(counts)} layer{'' if len(counts) == 1 else 's'}"
        log.info("pruned %d %s in %s (edit %s)", sum(counts.values()), plan.unit, layers, plan.edit)
        return self._applied

    def _end(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self.revert and self._applied is not None:
            self._applied.revert()
            self._applied = None
            log.info("the pruned values are back in place")


def pruning_of(trainer: pl.Trainer) -> PruningCallback | None:
    """The Trainer's ``PruningCallback``.

    Raises:
        InputError: if there are several: results and scores name one plan.
    """
    callbacks = [callback for callback in trainer.callbacks if isinstance(callback, PruningCallback)]
    if len(callbacks) > 1:
        raise InputError(f"trainer.callbacks holds {len(callbacks)} PruningCallbacks; apply one plan at a time")
    return callbacks[0] if callbacks else None
