"""What an evaluation takes, before any weight is read, against the generator that takes it."""

from pathlib import Path

import pytest
import torch
from tiny_models import MIXTURES, tiny
from tiny_tokenizers import tiny_tokenizer
from transformers import DynamicCache

from sparc3_pl import demo
from sparc3_pl.cli import execute
from sparc3_pl.data.evaluation_data import EvaluationData
from sparc3_pl.errors import InputError
from sparc3_pl.evaluation.decoding import prepare
from sparc3_pl.evaluation.judges import DetoxifyJudge
from sparc3_pl.evaluation.module import EvaluationModule
from sparc3_pl.evaluation.needs import needs_of
from sparc3_pl.model.footprint import key_value_bytes, skeleton_in_dtype
from sparc3_pl.model.source import ModelSource

WORDS = 320
PLENTY = {"host": 2**40, "disk": 2**40}


@pytest.fixture
def folder(tmp_path):
    """A model's config and tokenizer without its weights."""
    tiny("llama", vocab_size=WORDS).config.save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    return tmp_path / "m"


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", *MIXTURES])
def test_keys_and_values_are_those_of_a_real_pass(family, tmp_path):
    model = tiny(family)
    model.config.save_pretrained(tmp_path)
    counted = key_value_bytes(skeleton_in_dtype(ModelSource(str(tmp_path), "float32")))
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=torch.tensor([[3, 4, 5]]), past_key_values=cache, use_cache=True)
    assert 3 * counted == sum(4 * (layer.keys.numel() + layer.values.numel()) for layer in cache.layers)


def needs(folder, tmp_path, free=PLENTY, data=None, **model):
    (tmp_path / "prompts.txt").write_text("abc de\nfg\n\nhij klmno pq\n")
    data = {"text_source": None, "prompts_source": str(tmp_path / "prompts.txt"), "prompts_field": "text"} | (
        data or {}
    )
    judge = DetoxifyJudge(variant="demo")
    module = EvaluationModule(pretrained=str(folder), max_new_tokens=7, judge=judge, **model)
    return {(need.what, need.where): need for need in needs_of(module, EvaluationData(**data), free)}


def test_a_batch_of_completions_is_what_the_generator_would_make(folder, tmp_path):
    counted = needs(folder, tmp_path, samples_per_prompt=5)
    model, encoder = tiny("llama", vocab_size=WORDS), tiny_tokenizer()
    longest = len(encoder("hij klmno pq").input_ids)
    row = 2 * (longest + 7) * prepare(model, [3]).token_bytes + 24 * WORDS
    assert counted["completions", "device"].bytes == 15 * row  # three prompts, all at once
    assert (
        needs(folder, tmp_path, samples_per_prompt=5, generation_batch_size=4)["completions", "device"].bytes == 4 * row
    )
    weights = counted["weights", "device"].bytes
    assert weights == sum(4 * parameter.numel() for parameter in model.parameters())
    judge = counted["judge", "device"].bytes
    assert judge == sum(file.stat().st_size for file in Path(demo.JUDGE).glob("*.ckpt"))
    tight = {"host": weights + judge + 2 * 3 * row}  # half of what is left holds three
    assert needs(folder, tmp_path, tight, samples_per_prompt=5)["completions", "device"].bytes == 3 * row
    lines = counted["completions", "disk"].bytes
    assert 15 * 200 < lines < 15 * 300
    assert ("windows", "device") not in counted
    windows = needs(folder, tmp_path, data={"text_source": str(tmp_path / "prompts.txt")}, max_length=16)
    assert windows["windows", "device"].bytes > 16 * 32 * 4


def test_windows_that_the_model_cannot_read_are_refused(folder, tmp_path):
    tiny_tokenizer(context=16).save_pretrained(folder)
    text = {"text_source": str(tmp_path / "prompts.txt")}
    with pytest.raises(InputError, match=r"model\.max_length=17 is longer than the model's context of 16 tokens"):
        needs(folder, tmp_path, data=text, max_length=17)


def test_the_command_loads_and_writes_nothing(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["eval", "--dry_run", "--model.pretrained", str(folder), "--output", str(tmp_path / "out")]
    words += ["--data.num_prompts", "3", "--data.text_max_bytes", "2000"]
    words += ["--trainer.accelerator", "cpu", "--trainer.devices", "1"]
    execute(words)  # the folder has no weights
    said = capsys.readouterr().out
    assert all(word in said for word in ("weights", "windows", "judge", "completions", "free"))
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    monkeypatch.setattr("sparc3_pl.passes.run.free_by_place", lambda *_: {"host": 1000, "disk": 2**40})
    with pytest.raises((InputError, SystemExit)):
        execute(words)
