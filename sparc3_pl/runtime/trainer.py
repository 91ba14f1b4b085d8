"""The Trainer of the command line: Lightning's, with the arguments that make sense here and our two verbs."""

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    LSFEnvironment,
    MPIEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.accelerators import MPSAccelerator
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.loops import _EvaluationLoop, _PredictionLoop
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch.trainer.states import RunningStage, TrainerFn

from sparc3_pl.errors import InputError
from sparc3_pl.io.claims import sole_run
from sparc3_pl.runtime.launcher import Launcher, NoSignals

__all__ = ["Trainer", "check_placement", "check_precision", "is_sharded_run"]

log = logging.getLogger(__name__)

NOT_LIGHTNINGS = ("self", "__class__", "rank_timeout")


class _ScoreLoop(_PredictionLoop):
    """Runs its hooks on a rank without samples too: the sums over ranks need every rank."""

    skip = False


class _EvalLoop(_EvaluationLoop):
    """Runs its hooks on a rank without windows and prompts too."""

    skip = False


class Trainer(pl.Trainer):
    """Lightning's Trainer for passes that take gradients without training.

    Gradients are allowed in ``predict`` (no inference mode), and the data modules share out the samples themselves:
    Lightning's own sampler repeats samples to even out the ranks, which would count them twice.

    Args:
        accelerator: ``auto``, ``cpu``, ``gpu``, ... On Apple silicon ``auto`` is the CPU: the GPU there has no float64.
        strategy: ``auto``, ``ddp``, ...; each process scores its share of the samples.
        devices: Number of devices (on the CPU: of processes), or their indices.
        num_nodes: Number of machines.
        precision: Only ``32-true``: the model keeps the precision that ``model.dtype`` says.
        logger: A Lightning logger; true: TensorBoard in ``lightning_logs``; false: none.
        callbacks: Further Lightning callbacks.
        fast_dev_run: Run one batch (or this many) to see that everything works.
        limit_predict_batches: Score only this many batches (or this share of them) on each process.
        limit_test_batches: Evaluate only this many batches (or this share of them) on each process.
        log_every_n_steps: Batches between two entries in the log.
        enable_progress_bar: Show a progress bar on stderr.
        default_root_dir: Where ``lightning_logs`` is made; the current folder by default.
        deterministic: Use deterministic algorithms only, or fail (true) or warn.
        profiler: Lightning's ``simple``, ``advanced`` or ``pytorch`` profiler.
        rank_timeout: Collective timeout in minutes. Crashed processes are detected within seconds regardless.
    """

    def __init__(
        self,
        *,
        accelerator: str = "auto",
        strategy: str | Strategy = "auto",
        devices: list[int] | str | int = "auto",
        num_nodes: int = 1,
        precision: Literal["32-true", "bf16-true", "16-true", "64-true"] = "32-true",
        logger: Logger | list[Logger] | bool = True,
        callbacks: list[Callback] | Callback | None = None,
        fast_dev_run: int | bool = False,
        limit_predict_batches: int | float | None = None,
        limit_test_batches: int | float | None = None,
        log_every_n_steps: int = 1,
        enable_progress_bar: bool = True,
        default_root_dir: str | Path | None = None,
        deterministic: bool | Literal["warn"] | None = None,
        profiler: Profiler | str | None = None,
        rank_timeout: float = 30.0,
    ) -> None:
        arguments: dict[str, Any] = {k: v for k, v in locals().items() if k not in NOT_LIGHTNINGS}
        _require_positive(rank_timeout, limit_predict_batches, limit_test_batches)
        arguments["accelerator"] = _with_float64(accelerator)
        ours = {"inference_mode": False, "use_distributed_sampler": False, "enable_model_summary": False}
        if (environment := _environment(strategy)) is not None:
            ours["plugins"] = [environment]
        try:
            super().__init__(**arguments, **ours)
        except (MisconfigurationException, ValueError, RuntimeError, LookupError, OSError, ImportError) as error:
            settings = ", ".join(f"trainer.{key}={arguments[key]!r}" for key in ("accelerator", "strategy", "devices"))
            reason = " ".join(str(error).split()) if not isinstance(error, LookupError) else f"no {error} is known"
            raise InputError(f"{settings}: {reason[:200]}; change one of them (see score --help)") from error
        self._check_number_of_processes()
        self._signal_connector = NoSignals(self)
        self.predict_loop = _ScoreLoop(self, inference_mode=False)
        self.test_loop = _EvalLoop(self, TrainerFn.TESTING, RunningStage.TESTING, inference_mode=False)
        self._watch_ranks(timedelta(minutes=rank_timeout))
        if isinstance(self.strategy, ModelParallelStrategy):
            _share_samples(self.strategy)

    def _check_number_of_processes(self) -> None:
        """Refuses processes that do not know of each other: each would do all the work, or wait for the others."""
        environment, expected = self._accelerator_connector.cluster_environment, self.num_devices * self.num_nodes
        if isinstance(environment, LightningEnvironment):
            num_started = int(os.environ.get("WORLD_SIZE", expected))
            if num_started == 1 and "LOCAL_RANK" not in os.environ:  # this process starts the others
                return
        else:
            num_started = environment.world_size()
        if num_started != expected:
            by = STARTERS.get(type(environment), type(environment).__name__)
            raise InputError(
                f"trainer.devices={self.num_devices}, trainer.num_nodes={self.num_nodes}: that is {expected} "
                f"processes, but {by} says that {num_started} were started; give trainer.devices the number on each "
                "machine and trainer.num_nodes the number of machines"
            )

    def _watch_ranks(self, timeout: timedelta) -> None:
        strategy = self.strategy
        if isinstance(strategy, DDPStrategy | ModelParallelStrategy):
            strategy._timeout = timeout
        if type(strategy.launcher) is _SubprocessScriptLauncher:
            theirs = strategy.launcher
            strategy._launcher = Launcher(theirs.cluster_environment, theirs.num_processes, theirs.num_nodes)

    def _output_of(self, model: pl.LightningModule) -> str | None:
        """The place of the run's result, on the rank that writes it; a module of the user's may have no such place."""
        return getattr(model, "output", None) if self.is_global_zero else None

    def score(self, model: pl.LightningModule, datamodule: pl.LightningDataModule) -> None:
        """Score a model's components (neurons, heads, single weights, ...) on reference samples."""
        with _clean_refusal(self), sole_run(self._output_of(model)):
            self.predict(model, datamodule=datamodule, return_predictions=False)

    def eval(self, model: pl.LightningModule, datamodule: pl.LightningDataModule) -> None:
        """Measure a model as it is or with a plan applied: perplexity, judged completions, sentence pairs, tasks."""
        with _clean_refusal(self), sole_run(self._output_of(model)):
            self.test(model, datamodule=datamodule, verbose=False)


STARTERS = {
    SLURMEnvironment: "srun (SLURM_NTASKS)",
    TorchElasticEnvironment: "torchrun (WORLD_SIZE)",
    LightningEnvironment: "the variable WORLD_SIZE",
}
"""The starters of processes, as the user knows them, by Lightning's names for them."""


def _with_float64(accelerator: str) -> str:
    """The accelerator to use: one that has float64, in which sums are kept.

    Raises:
        InputError: if Apple's GPU was asked for.
    """
    if not MPSAccelerator.is_available():
        return accelerator
    if accelerator == "auto":
        log.info("the CPU is used: Apple's GPU (mps) has no float64, in which sums are kept")
        return "cpu"
    if accelerator in ("mps", "gpu"):
        raise InputError(
            f"trainer.accelerator={accelerator!r}: Apple's GPU (mps) has no float64, in which sums are kept; give cpu"
        )
    return accelerator


def _environment(strategy: str | Strategy) -> ClusterEnvironment | None:
    """The cluster environment to give to Lightning where it would judge by variables that say too little.

    A shell inside a Slurm allocation has Slurm's variables, but only a task that ``srun`` has started is one of several
    (and the only task of a step starts its further processes itself). ``torchrun`` numbers the processes it starts.

    Returns:
        None: Lightning's own choice is right.
    """
    if isinstance(strategy, Strategy) and getattr(strategy, "cluster_environment", None) is not None:
        return None
    alone = LightningEnvironment()
    if TorchElasticEnvironment.detect():
        missing = [name for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if name not in os.environ]
        if missing:
            log.info("torchrun has not started this process (%s is not set): it runs on its own", missing[0])
        return alone if missing else None
    if "SLURM_NTASKS" not in os.environ or os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        return None
    if (other := next((kind for kind in (LSFEnvironment, MPIEnvironment) if kind.detect()), None)) is not None:
        return other()
    if "SLURM_STEP_NUM_TASKS" not in os.environ and os.environ["SLURM_NTASKS"] != "1":
        log.info(
            "SLURM_NTASKS=%s is set, but srun has not started this process: it runs on its own, with "
            "the processes of trainer.devices",
            os.environ["SLURM_NTASKS"],
        )
    return alone


def is_sharded_run(trainer: pl.Trainer) -> bool:
    """Whether each rank holds only its part of every weight (FSDP2), so that all must take part in every pass."""
    return isinstance(trainer.strategy, ModelParallelStrategy)


def check_placement(trainer: pl.Trainer, device_map: object) -> None:
    """Refuses to place a model twice.

    Raises:
        InputError: if the strategy shares the model out, and a device map is to spread it as well.
    """
    if is_sharded_run(trainer) and device_map is not None:
        raise InputError(
            f"model.device_map={device_map!r}: trainer.strategy=ModelParallelStrategy places the model itself; leave "
            "out one of the two"
        )


def check_precision(trainer: pl.Trainer) -> None:
    """Refuse a Trainer that would convert the model, or autocast, after it was loaded as ``model.dtype`` says.

    Results name the precision of the loaded model; rotary frequencies and the judge would be converted as well.

    Raises:
        InputError: naming the precision.
    """
    if trainer.precision != "32-true":
        dtype = {"16": "float16", "64": "float32"}.get(trainer.precision[:2], "bfloat16")
        raise InputError(
            f"trainer.precision={trainer.precision}: a pass computes in the precision in which the model was loaded; "
            f"leave it at 32-true and give model.dtype={dtype}"
        )


def _share_samples(strategy: ModelParallelStrategy) -> None:
    """Gives every process samples of its own; Lightning's ``auto`` would split each matrix within a machine."""
    processes = strategy.num_processes * strategy.num_nodes
    data, tensor = strategy._data_parallel_size, strategy._tensor_parallel_size
    if data not in ("auto", processes) or tensor not in ("auto", 1):
        raise InputError(
            f"trainer.strategy: data_parallel_size={data}, tensor_parallel_size={tensor}, but the samples are shared "
            f"out over all {processes} processes; give data_parallel_size: auto and tensor_parallel_size: 1"
        )
    strategy._data_parallel_size, strategy._tensor_parallel_size = processes, 1


@contextmanager
def _clean_refusal(trainer: pl.Trainer) -> Iterator[None]:
    """If wrong input ends the block before a batch is done, the log folder that the run has just made goes too."""
    folders = [Path(logger.log_dir) for logger in trainer.loggers if logger.log_dir is not None]
    new = [folder for folder in folders if not folder.exists()]
    try:
        yield
    except InputError:
        progress = (trainer.predict_loop.batch_progress, trainer.test_loop.batch_progress)
        if trainer.is_global_zero and not any(part.total.processed for part in progress):
            for folder in new:
                shutil.rmtree(folder, ignore_errors=True)
                with suppress(OSError):  # other runs are in it
                    folder.parent.rmdir()
        raise


def _require_positive(
    rank_timeout: float, limit_predict_batches: float | None, limit_test_batches: float | None
) -> None:
    if not rank_timeout > 0:
        raise InputError(f"trainer.rank_timeout={rank_timeout}; give a positive number of minutes")
    limits = {"limit_predict_batches": limit_predict_batches, "limit_test_batches": limit_test_batches}
    for name, value in limits.items():
        if value is not None and value <= 0:
            raise InputError(f"trainer.{name}={value} leaves nothing to do; give at least 1 batch, or leave it out")
