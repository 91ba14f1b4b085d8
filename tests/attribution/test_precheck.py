"""The relevance account that every scoring pass by LRP begins with."""

import json

import pytest
import torch
from tiny_models import tiny

from sparc3_pl.attribution.account import relevance_account
from sparc3_pl.attribution.precheck import NUM_TOKENS, checked_rules
from sparc3_pl.cli import main
from sparc3_pl.data.encoding import load_encoder
from sparc3_pl.data.samples import pack_windows
from sparc3_pl.data.texts import TextQuery
from sparc3_pl.model.loading import load_model
from sparc3_pl.model.source import ModelSource

QUIET = ["--trainer.accelerator", "cpu", "--trainer.logger", "false", "--trainer.enable_progress_bar", "false"]
SCORE = ["score", "--trainer.devices", "1", "--data.num_samples", "2", *QUIET]


def account_in_manifest(folder):
    return json.loads((folder / "manifest.json").read_text())["relevance_account"]


def test_the_manifest_keeps_the_residual(tmp_path, capsys):
    assert main([*SCORE, "--output", str(tmp_path / "lrp")]) == 0
    window = pack_windows(TextQuery("demo", "text").texts(), load_encoder(ModelSource()), 64, 1, "demo")[0]
    want = relevance_account(load_model(ModelSource()), torch.tensor(window.input_ids[:NUM_TOKENS])[None])
    found = account_in_manifest(tmp_path / "lrp")
    assert found["num_tokens"] == NUM_TOKENS
    assert found["relative_residual"] < 1e-5
    assert abs(found["relative_residual"] - want.relative_residual) < 1e-5
    assert main([*SCORE, "--model.method", "gradient", "--output", str(tmp_path / "gradient")]) == 0
    assert account_in_manifest(tmp_path / "gradient") is None


def test_a_wrong_rule_is_refused_before_the_first_batch(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        "sparc3_pl.scoring.module.ScoringModule.predict_step", lambda *_: pytest.fail("a batch was scored")
    )
    real = relevance_account

    def wrong(model, input_ids, **keys):
        account = real(model, input_ids, **keys)
        return type(account)(**{**vars(account), "input": account.input + 0.01 * account.logit})

    monkeypatch.setattr("sparc3_pl.attribution.account.relevance_account", wrong)
    assert main([*SCORE, "--output", str(tmp_path / "out")]) == 2
    screen = capsys.readouterr().err
    assert "unexplained" in screen
    assert "use method gradient or wanda" in screen
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_checked_says_so(tiny_llama, caplog):
    accelerate = pytest.importorskip("accelerate")
    accelerate.cpu_offload(tiny_llama, execution_device="cpu")
    outcome = checked_rules(tiny_llama, [1, 2, 3])
    assert outcome["relative_residual"] is None
    assert "offloaded" in outcome["reason"]
    assert "not checked" in caplog.text
    assert checked_rules(tiny("llama"), [])["reason"] == "there is no sample"
