"""Scores of a real model on real text, by the command, against the model's own parameter gradients."""

import json

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


def test_completions_by_the_derivative_of_a_gain(smollm2, tmp_path):
    """Against one prompt at a time through the plain model, a gain at the down-projection's input differentiated."""
    tokenizer = load_tokenizer(ModelSource(str(smollm2)))
    said = [(" sat on the mat.", 0.75), (" sat down,", 0.25), (" ran.", 1.0)]
    rows = [
        {"prompt": "The cat", "completion_ids": [*tokenizer(text).input_ids, tokenizer.eos_token_id], "score": score}
        for text, score in said
    ]
    (tmp_path / "said.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = ["--data.text_field", "prompt", "--data.completion_field", "completion_ids", "--data.weight_field", "score"]
    what = ["--model.method", "gradient", "--model.target", "completion", "--model.signed", "true"]
    source = ["--data.source", str(tmp_path / "said.jsonl"), "--data.num_samples", "null", "--data.batch_size", "3"]
    folder = score(smollm2, tmp_path / "scores", *source, *names, *what)
    model = load_model(ModelSource(str(smollm2), "float32"))
    gain = torch.ones(1536, requires_grad=True)
    down = model.get_submodule(LAYER.replace("up_proj", "down_proj"))
    down.register_forward_pre_hook(lambda _, args: (args[0] * gain,))
    prompt, value = tokenizer("The cat").input_ids, 0.0
    for row in rows:
        tokens = torch.tensor([*prompt, *row["completion_ids"]])
        nats_TV = model(tokens[None]).logits[0].log_softmax(-1)
        nats = nats_TV[:-1].gather(1, tokens[1:, None])[len(prompt) - 1 :].sum()
        value = value + (row["score"] - 2 / 3) * nats / 3
    (wanted,) = torch.autograd.grad(value, gain)
    torch.testing.assert_close(folder.load(LAYER), wanted, rtol=1e-3, atol=1e-5 * float(wanted.abs().max()))


def test_windows_by_wanda(smollm2, real_data, tmp_path):
    windows = ["--data.source", str(real_data / "c4_dev.jsonl"), "--data.seq_len", "64", "--data.num_samples", "2"]
    folder = score(smollm2, tmp_path / "scores", "--model.method", "wanda", *windows)
    assert (folder.manifest.num_samples, folder.manifest.num_tokens) == (2, 128)
    assert len(folder.layers) == 30
    assert folder.manifest.total_relevance > 0
