"""Writes a run's scalars, histograms, figures and texts to its loggers, whichever Lightning logger it has.

Lightning's loggers share ``log_metrics`` and ``log_hyperparams`` and nothing else, so each kind of logger has an
adapter here for the rest. A logger of another kind gets the figures and texts as files beside its metrics.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import singledispatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from matplotlib.figure import Figure

__all__ = ["RunLog", "run_folder"]


def run_folder(trainer: pl.Trainer) -> Path | None:
    """The folder of this run alone; None for a trial run (``fast_dev_run``), whose loggers keep nothing.

    TensorBoard and CSV loggers make one for each run. All others have one for all runs (``save_dir``), so below it a
    run's folder is named after its name and version. Every rank must ask: rank 0 answers for all.
    """
    logger = trainer.loggers[0] if trainer.loggers else None
    if logger is None or isinstance(logger, TensorBoardLogger | CSVLogger):
        folder = trainer.log_dir
    elif isinstance(logger, DummyLogger):
        folder = None
    else:
        folder = trainer.strategy.broadcast(_own_folder(logger, trainer) if trainer.is_global_zero else None)
    return None if folder is None else Path(folder)


def _own_folder(logger: Logger, trainer: pl.Trainer) -> str:
    if logger.version is None:  # Weights & Biases gives a run its id when it begins
        getattr(logger, "experiment", None)
    version = f"version_{logger.version}" if isinstance(logger.version, int) else logger.version
    parts = [str(part) for part in (logger.name, version) if part is not None]
    return str(Path(logger.save_dir or trainer.default_root_dir, *parts))


class RunLog:
    """Writes to all loggers of a Trainer; to none on other ranks than 0.

    Args:
        trainer: The Trainer whose loggers are written to.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        folder = run_folder(trainer)  # on every rank
        self._adapters: list[Adapter] = []
        if trainer.is_global_zero and folder is not None:
            self._adapters = [adapted(logger, folder) for logger in trainer.loggers]

    def __bool__(self) -> bool:
        return bool(self._adapters)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Logs numbers by name."""
        for adapter in self._adapters:
            adapter.scalars(values, step)

    def histogram(self, name: str, values: Tensor, step: int) -> None:
        """Logs the distribution of ``values`` (any shape)."""
        for adapter in self._adapters:
            adapter.histogram(name, values, step)

    def figure(self, name: str, figure: Figure, step: int) -> None:
        """Logs a matplotlib figure."""
        for adapter in self._adapters:
            adapter.figure(name, figure, step)

    def texts(self, name: str, texts: Sequence[str]) -> None:
        """Logs Markdown texts, numbered from 0."""
        for adapter in self._adapters:
            adapter.texts(name, texts)

    def settings(self, settings: Mapping[str, Any], figures: Mapping[str, float]) -> None:
        """Logs the run's settings with its final figures, for a table of runs."""
        for adapter in self._adapters:
            adapter.settings(settings, figures)


class Adapter:
    """A logger of an unknown kind: metrics go to it, figures and texts into ``folder``.

    Args:
        logger: The logger.
        folder: Where files go that the logger has no place for.
    """

    def __init__(self, logger: Logger, folder: Path) -> None:
        self.logger, self.folder = logger, folder

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Logs numbers by name."""
        self.logger.log_metrics(dict(values), step)

    def histogram(self, name: str, values: Tensor, step: int) -> None:
        """Draws the distribution as a figure, for loggers without histograms of their own."""
        self.figure(name, _histogram(values, name), step)

    def figure(self, name: str, figure: Figure, step: int) -> None:
        """Writes a PNG file."""
        figure.savefig(self._file(name, f"-{step}.png"), format="png")

    def texts(self, name: str, texts: Sequence[str]) -> None:
        """Writes a Markdown file."""
        self._file(name, ".md").write_text("\n\n---\n\n".join(texts) + "\n", encoding="utf-8")

    def settings(self, settings: Mapping[str, Any], figures: Mapping[str, float]) -> None:
        """Logs settings and figures apart."""
        self.logger.log_hyperparams(dict(settings))
        self.logger.log_metrics(dict(figures), 0)

    def _file(self, name: str, ending: str) -> Path:
        path = self.folder / "media" / (re.sub(r"[^\w.-]+", "_", name) + ending)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


class TensorBoard(Adapter):
    """TensorBoard, which has a place for everything."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.logger.experiment.add_scalar(name, value, step)

    def histogram(self, name: str, values: Tensor, step: int) -> None:
        self.logger.experiment.add_histogram(name, values, step)

    def figure(self, name: str, figure: Figure, step: int) -> None:
        self.logger.experiment.add_figure(name, figure, step)

    def texts(self, name: str, texts: Sequence[str]) -> None:
        for step, text in enumerate(texts):
            self.logger.experiment.add_text(name, text, step)

    def settings(self, settings: Mapping[str, Any], figures: Mapping[str, float]) -> None:
        self.logger.log_hyperparams(dict(settings), dict(figures))


class Wandb(Adapter):
    """Weights & Biases: figures as images, texts as a table.

    Its step counts calls, so ours goes along as a metric of its own: a pass counts samples or batches as it likes.
    """

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self.logger.log_metrics({**values, "step": step})

    def figure(self, name: str, figure: Figure, step: int) -> None:
        self.logger.log_image(name, [figure])

    def texts(self, name: str, texts: Sequence[str]) -> None:
        self.logger.log_text(name, columns=["number", "text"], data=[[str(i), text] for i, text in enumerate(texts)])


class MLFlow(Adapter):
    """MLflow: figures and texts as artifacts of the run."""

    def figure(self, name: str, figure: Figure, step: int) -> None:
        self.logger.experiment.log_figure(self.logger.run_id, figure, f"{name}-{step}.png")

    def texts(self, name: str, texts: Sequence[str]) -> None:
        self.logger.experiment.log_text(self.logger.run_id, "\n\n---\n\n".join(texts) + "\n", f"{name}.md")


class CSV(Adapter):
    """CSV files; figures and texts lie beside them.

    Lightning's writer drops what it holds unless it is saved, which its fitting loop does and these passes do not.
    """

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        super().scalars(values, step)
        self.logger.save()

    def settings(self, settings: Mapping[str, Any], figures: Mapping[str, float]) -> None:
        super().settings(settings, figures)
        self.logger.save()


@singledispatch
def adapted(logger: Logger, folder: Path) -> Adapter:
    """The adapter for ``logger``."""
    return Adapter(logger, folder)


adapted.register(TensorBoardLogger, TensorBoard)
adapted.register(WandbLogger, Wandb)
adapted.register(MLFlowLogger, MLFlow)
adapted.register(CSVLogger, CSV)


def _histogram(values: Tensor, name: str) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    axes.hist(values.flatten().double().numpy(), bins=50)
    axes.set_xlabel(name)
    axes.set_ylabel("number")
    return figure
