"""Every logger of Lightning's gets scalars, histograms, figures and texts; what it was given is read back."""

import csv
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import Logger
from matplotlib.figure import Figure

from sparc3_pl.runtime.run_log import RunLog, run_folder


def trainer_with(logger, folder, is_global_zero=True):
    """A stand-in for the Trainer."""
    return SimpleNamespace(
        loggers=[logger],
        log_dir=str(folder),
        default_root_dir=str(folder),
        is_global_zero=is_global_zero,
        strategy=SimpleNamespace(broadcast=lambda folder: folder),
    )


def written_by(logger, folder, is_global_zero=True):
    """One of everything."""
    log = RunLog(trainer_with(logger, folder, is_global_zero))
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
    for name, value in (("name", "project"), ("version", "id-1"), ("save_dir", None)):
        monkeypatch.setattr(kind, name, property(lambda self, value=value: value))
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
    assert [row["score/final"] for row in rows if row["score/final"]] == ["3.0"]  # on the disk, though nothing ended
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


class Own(Logger):
    """Of a user's: it has one ``save_dir`` for all runs, as those of W&B and MLflow have."""

    name = "own"

    def __init__(self, version, save_dir=None):
        super().__init__()
        self.metrics = []
        self._version, self._save_dir = version, save_dir

    version = property(lambda self: self._version)
    save_dir = property(lambda self: self._save_dir)

    def log_metrics(self, metrics, step=None):
        self.metrics.append((step, metrics))

    def log_hyperparams(self, params):
        self.params = params


def test_a_logger_of_another_kind_gets_metrics_and_files(tmp_path):
    logger = Own(0)
    written_by(logger, tmp_path)
    assert logger.metrics == [
        (4, {"score/total_relevance": 1.5}),
        (8, {"score/total_relevance": 2.5}),
        (0, {"score/final": 3.0}),
    ]
    assert logger.params == {"model": {"method": "lrp"}}
    assert_files(tmp_path / "own" / "version_0")


@pytest.mark.parametrize("version", ["abc", 3])
def test_two_runs_never_share_a_folder(tmp_path, version):
    other = version * 2
    folders = [run_folder(trainer_with(Own(v, tmp_path / "runs"), tmp_path)) for v in (version, other)]
    assert folders == [tmp_path / "runs/own" / (v if v == str(v) else f"version_{v}") for v in (version, other)]


def test_a_run_that_gets_its_id_when_it_begins(tmp_path, monkeypatch):
    begun = []
    monkeypatch.setattr(Own, "version", property(lambda self: begun[0] if begun else None))
    monkeypatch.setattr(Own, "experiment", property(lambda self: begun.append("id-7")), raising=False)
    assert run_folder(trainer_with(Own(None), tmp_path)) == tmp_path / "own" / "id-7"


def test_the_folder_of_a_run(tmp_path):
    csv = CSVLogger(tmp_path, "csv", "one")
    trainer = Trainer(logger=csv, accelerator="cpu", default_root_dir=tmp_path, enable_checkpointing=False)
    assert run_folder(trainer) == tmp_path / "csv" / "one"
    none = {"accelerator": "cpu", "default_root_dir": tmp_path, "enable_checkpointing": False}
    assert run_folder(Trainer(logger=False, **none)) == tmp_path
    assert run_folder(Trainer(logger=csv, fast_dev_run=True, **none)) is None


def test_other_ranks_write_nothing(tmp_path):
    assert not written_by(CSVLogger(tmp_path / "csv"), tmp_path, is_global_zero=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "methods"), [(WandbLogger, ("log_image", "log_text", "log_metrics")), (MLFlowLogger, ("log_metrics",))]
)
def test_lightning_still_has_what_the_adapters_call(kind, methods):
    assert all(callable(getattr(kind, name)) for name in methods)
