"""Every logger of Lightning's gets scalars, histograms, figures and texts; what it was given is read back."""

import csv
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import Logger
from matplotlib.figure import Figure

from sparc3_pl.runtime.run_log import RunLog


def written_by(logger, folder, is_global_zero=True):
    """One of everything, through a stand-in for the Trainer."""
    log = RunLog(
        SimpleNamespace(
            loggers=[logger],
            log_dir=str(folder),
            default_root_dir=str(folder),
            is_global_zero=is_global_zero,
            fast_dev_run=False,
        )
    )
    log.scalars({"score/total_relevance": 1.5}, 4)
    log.scalars({"score/total_relevance": 2.5}, 8)
    log.histogram("score/layer", torch.arange(10.0), 8)
    log.figure("score/by_layer", Figure(), 8)
    log.texts("eval/completions", ["first", "second"])
    log.settings({"model": {"method": "lrp"}}, {"score/final": 3.0})
    return log


class Recorder:
    """Keeps every call made to it, to any depth of attributes."""

    def __init__(self, calls, name=""):
        self._calls, self._name = calls, name

    def __getattr__(self, name):
        return Recorder(self._calls, f"{self._name}.{name}".lstrip("."))

    def __call__(self, *args, **kwargs):
        self._calls.append((self._name, args, kwargs))


def stand_in(kind, monkeypatch):
    """A logger of ``kind`` whose package is not needed: its experiment records what it is given."""
    calls = []
    logger = kind.__new__(kind)
    monkeypatch.setattr(kind, "experiment", property(lambda self: Recorder(calls, "experiment")))
    for name in ("log_metrics", "log_hyperparams", "log_image", "log_text", "run_id"):
        if hasattr(kind, name):
            value = "run-1" if name == "run_id" else Recorder(calls, name)
            monkeypatch.setattr(kind, name, value)
    return logger, calls


def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    written_by(logger, tmp_path)
    logger.finalize("success")
    (file,) = [
        f for f in tmp_path.rglob("events.out.tfevents.*") if "layer" in str(EventAccumulator(str(f)).Reload().Tags())
    ]
    read = EventAccumulator(str(file)).Reload()
    assert [(s.step, s.value) for s in read.Scalars("score/total_relevance")] == [(4, 1.5), (8, 2.5)]
    assert read.Tags()["histograms"] == ["score/layer"]
    assert read.Tags()["images"] == ["score/by_layer"]
    assert len(read.Tensors("eval/completions/text_summary")) == 2


def test_csv(tmp_path):
    logger = CSVLogger(tmp_path)
    written_by(logger, tmp_path)
    with open(f"{logger.log_dir}/metrics.csv") as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["step"], row["score/total_relevance"]) for row in rows if row["score/total_relevance"]] == [
        ("4", "1.5"),
        ("8", "2.5"),
    ]
    assert_files(tmp_path)


def assert_files(folder):
    names = {path.name for path in (folder / "media").iterdir()}
    assert names == {"score_layer-8.png", "score_by_layer-8.png", "eval_completions.md"}
    assert (folder / "media/eval_completions.md").read_text() == "first\n\n---\n\nsecond\n"


def test_wandb(tmp_path, monkeypatch):
    logger, calls = stand_in(WandbLogger, monkeypatch)
    written_by(logger, tmp_path)
    assert ("log_metrics", ({"score/total_relevance": 2.5, "step": 8},), {}) in calls
    images = [args[0] for name, args, _ in calls if name == "log_image"]
    assert images == ["score/layer", "score/by_layer"]
    (texts,) = [kwargs for name, _, kwargs in calls if name == "log_text"]
    assert texts["data"] == [["0", "first"], ["1", "second"]]


def test_mlflow(tmp_path, monkeypatch):
    logger, calls = stand_in(MLFlowLogger, monkeypatch)
    written_by(logger, tmp_path)
    assert ("log_metrics", ({"score/total_relevance": 2.5}, 8), {}) in calls
    figures = [args[0::2] for name, args, _ in calls if name == "experiment.log_figure"]
    assert figures == [("run-1", "score/layer-8.png"), ("run-1", "score/by_layer-8.png")]
    assert ("experiment.log_text", ("run-1", "first\n\n---\n\nsecond\n", "eval/completions.md"), {}) in calls


def test_a_logger_of_another_kind_gets_metrics_and_files(tmp_path):
    class Own(Logger):
        name, version = "own", 0

        def __init__(self):
            super().__init__()
            self.metrics = []

        def log_metrics(self, metrics, step=None):
            self.metrics.append((step, metrics))

        def log_hyperparams(self, params):
            self.params = params

    logger = Own()
    written_by(logger, tmp_path)
    assert logger.metrics == [
        (4, {"score/total_relevance": 1.5}),
        (8, {"score/total_relevance": 2.5}),
        (0, {"score/final": 3.0}),
    ]
    assert logger.params == {"model": {"method": "lrp"}}
    assert_files(tmp_path)


def test_other_ranks_write_nothing(tmp_path):
    assert not written_by(CSVLogger(tmp_path / "csv"), tmp_path, is_global_zero=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "methods"), [(WandbLogger, ("log_image", "log_text", "log_metrics")), (MLFlowLogger, ("log_metrics",))]
)
def test_lightning_still_has_what_the_adapters_call(kind, methods):
    assert all(callable(getattr(kind, name)) for name in methods)
