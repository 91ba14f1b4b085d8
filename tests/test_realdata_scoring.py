"""Scores of a real model on real text, by the command, against the model's own parameter gradients."""

import pytest
import torch

from sparc3_pl.attribution.rules import attn_lrp
from sparc3_pl.cli import main
from sparc3_pl.model.loading import load_model, load_tokenizer
from sparc3_pl.model.source import ModelSource
from sparc3_pl.scores.folder import ScoreFolder

pytestmark = pytest.mark.realdata

CPU = ["--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.logger", "false"]
LAYER = "model.layers.29.mlp.up_proj"


def score(smollm2, output, *args):
    command = ["score", "--config", "configs/lrp.yaml", "--config", "configs/models/smollm2.yaml"]
    assert main([*command, "--model.pretrained", str(smollm2), *args, *CPU, "--output", str(output)]) == 0
    return ScoreFolder.open(output)


def test_prompts_by_lrp_equal_a_loop_over_parameter_gradients(smollm2, real_data, tmp_path):
    prompts = ["--data.source", str(real_data / "rtp_dev.jsonl"), "--data.text_field", "prompt.text"]
    chosen = ["--data.filter", "prompt.toxicity >= 0.9", "--data.seq_len", "null", "--data.num_samples", "3"]
    folder = score(smollm2, tmp_path / "scores", *prompts, *chosen, "--data.batch_size", "3")
    assert len(folder.layers) == 30
    assert all(folder.shape(name) == (1536,) and bool((folder.load(name) >= 0).all()) for name in folder.layers)
    torch.testing.assert_close(folder.load(LAYER), loop(smollm2, real_data, folder), rtol=1e-3, atol=1e-6)


def loop(smollm2, real_data, folder):
    """Row sums of |W * G| of one layer, a prompt at a time; the prompts are found again by their ids."""
    from sparc3_pl.data.sources import get_field, read_records, text_id

    wanted = set(folder.manifest.data["sample_ids"])
    texts = [get_field(record, "prompt.text") for record in read_records(str(real_data / "rtp_dev.jsonl"))]
    source = ModelSource(str(smollm2), "float32")
    model, tokenizer = load_model(source), load_tokenizer(source)
    weight = model.get_submodule(LAYER).weight
    weight.requires_grad_(True)
    rows = []
    for text in {text for text in texts if text and text_id(text) in wanted}:
        with attn_lrp(model):
            model(**tokenizer(text, return_tensors="pt")).logits[0, -1].max().backward()
        rows.append((weight * weight.grad).abs().sum(1).detach().clone())
        weight.grad = None
    assert len(rows) == len(wanted) == 3
    return torch.stack(rows).mean(0)


def test_windows_by_wanda(smollm2, real_data, tmp_path):
    windows = ["--data.source", str(real_data / "c4_dev.jsonl"), "--data.seq_len", "64", "--data.num_samples", "2"]
    folder = score(smollm2, tmp_path / "scores", "--model.method", "wanda", *windows)
    assert (folder.manifest.num_samples, folder.manifest.num_tokens) == (2, 128)
    assert len(folder.layers) == 30
    assert folder.manifest.total_relevance > 0
