"""Perplexity and completions of a real model on real text."""

import math
from functools import cache
from pathlib import Path

import pytest
import torch

from sparc3_pl.data.evaluation_data import EvaluationData
from sparc3_pl.evaluation.judges import DetoxifyJudge, judged
from sparc3_pl.evaluation.module import EvaluationModule
from sparc3_pl.evaluation.results import Evaluation
from sparc3_pl.runtime.trainer import Trainer

pytestmark = [pytest.mark.realdata, pytest.mark.timeout(3600)]  # minutes on two quiet cores

NUM_BYTES = 20_000


@cache
def model_and_tokenizer(path: Path):
    """As transformers loads them, past all of our code."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    return AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(
        **where
    )


@cache
@torch.inference_mode()
def window_nll(model, ids: tuple[int, ...]) -> torch.Tensor:
    """Negative log-likelihoods of all tokens of one window but its first, from full logits, in float64."""
    window = torch.tensor([ids])
    logprobs = model(window).logits[0, :-1].double().log_softmax(-1)
    return -logprobs.gather(1, window[0, 1:, None])[:, 0]


def independent_perplexity(model, ids: list[int], max_length: int, stride: int) -> tuple[float, int]:
    """The loop of the transformers guide to perplexity, one window at a time."""
    total, count, reached = 0.0, 0, 0
    for start in range(0, len(ids), stride):
        end = min(start + max_length, len(ids))
        nll = window_nll(model, tuple(ids[start:end]))
        new = nll[max(0, reached - start - 1) :]
        total, count, reached = total + float(new.sum()), count + len(new), end
        if end == len(ids):
            break
    return math.exp(total / count), count


@pytest.mark.parametrize("stride", [2048, 512])
def test_perplexity_of_smollm2_on_wikitext2(real_data, smollm2, tmp_path, stride):
    text = real_data / "wikitext2_valid.txt"
    module = EvaluationModule(str(smollm2), "float32", max_length=2048, stride=stride, output=str(tmp_path / "e"))
    data = EvaluationData(str(text), text_max_bytes=NUM_BYTES, prompts_source=None, window_batch_size=2)
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    trainer.eval(module, data)
    found = Evaluation.open(tmp_path / "e").results["perplexity"]
    model, tokenizer = model_and_tokenizer(smollm2)
    ids = tokenizer(text.read_bytes()[:NUM_BYTES].decode(errors="ignore"))["input_ids"]
    value, count = independent_perplexity(model, ids, 2048, stride)
    assert found["num_tokens"] == count
    assert found["value"] == pytest.approx(value, rel=1e-5)


def test_completions_of_smollm2_are_reproducible(real_data, smollm2, tmp_path):
    files = real_data / "toxicity_judge"
    rows = []
    for name, batch_size in (("a", 2), ("b", 6)):
        judge = DetoxifyJudge(checkpoint=str(files / "bert-tiny-toxicity.detoxify.ckpt"), config_path=str(files))
        module = EvaluationModule(
            str(smollm2), "float32", max_new_tokens=8, samples_per_prompt=2, judge=judge,
            generation_batch_size=batch_size, output=str(tmp_path / name),
        )  # fmt: skip
        data = EvaluationData(
            None, prompts_source=str(real_data / "rtp_dev.jsonl"), prompts_filter="prompt.toxicity >= 0.9",
            num_prompts=3, partition="evaluation", batch_size=batch_size,
        )  # fmt: skip
        trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False)
        trainer.eval(module, data)
        rows.append(Evaluation.open(tmp_path / name).completions)
    assert rows[0] == rows[1]
    scores = judged(judge, [row.completion for row in rows[0]])["toxicity"].tolist()
    assert [row.scores["toxicity"] for row in rows[0]] == pytest.approx(scores, abs=1e-5)
