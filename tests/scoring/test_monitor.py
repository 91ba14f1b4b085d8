"""What a scoring pass writes to a logger that is not TensorBoard."""

import csv
import logging
import re

import pytest
from lightning.pytorch.loggers import CSVLogger

from sparc3_pl.data.reference import ReferenceData
from sparc3_pl.runtime.run_config import RunConfig
from sparc3_pl.runtime.trainer import Trainer
from sparc3_pl.scoring.module import ScoringModule
from sparc3_pl.scoring.monitor import ScoringMonitor


def test_a_csv_logger_gets_everything(tmp_path, caplog):
    caplog.set_level(logging.INFO, "sparc3_pl")
    quiet = {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "default_root_dir": tmp_path}
    callbacks = [ScoringMonitor(), RunConfig("model: {method: lrp}\n")]
    module = ScoringModule()
    trainer = Trainer(logger=CSVLogger(tmp_path, "runs", "one"), callbacks=callbacks, **quiet)
    trainer.score(module, ReferenceData(num_samples=4, seq_len=16, batch_size=1))
    folder = tmp_path / "runs" / "one"
    assert module.output == str(folder / "scores")
    with (folder / "metrics.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    running = [float(row["score/total_relevance"]) for row in rows if row["score/total_relevance"]]
    assert len(running) == 4
    told = re.findall(r"score: (\S+) s per sample after the first batch, \d+ s for the 2 that are left", caplog.text)
    assert [0 < float(seconds) < 10 for seconds in told] == [True]
    assert running[-1] == pytest.approx(module.manifest.total_relevance, rel=1e-5)
    assert [float(v) for row in rows if (v := row["score/final_total_relevance"])] == [module.manifest.total_relevance]
    assert "method: lrp" in (folder / "hparams.yaml").read_text()
    media = {path.name for path in (folder / "media").iterdir()}
    layers = {f"score_{layer}-4.png" for layer in module.manifest.layers}
    assert media == {"score_relevance_by_layer-4.png", *layers}
