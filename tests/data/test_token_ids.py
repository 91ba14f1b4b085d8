"""Samples given as token ids: a model folder without a tokenizer is scored, pruned and saved."""

import json
from pathlib import Path

import pytest
import torch
from tiny_models import tiny
from tiny_tokenizers import sentences, tiny_tokenizer
from transformers import AutoModelForCausalLM

from sparc3_pl.data.reference import ReferenceData
from sparc3_pl.errors import InputError
from sparc3_pl.model.loading import load_tokenizer
from sparc3_pl.model.source import ModelSource
from sparc3_pl.runtime.trainer import Trainer
from sparc3_pl.scores.folder import ScoreFolder
from sparc3_pl.scoring.module import ScoringModule
from sparc3_pl.selection.command import prune

VOCAB = 320
LISTS = [tiny_tokenizer()(text).input_ids for text in sentences(6)]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """The same tiny model with and without a tokenizer; the same samples as words and as ids."""
    folder = tmp_path_factory.mktemp("files")
    for name in ("with", "without"):
        tiny("llama", vocab_size=VOCAB).save_pretrained(folder / name)
    tiny_tokenizer().save_pretrained(folder / "with")
    rows = [{"ids": ids, "text": text} for ids, text in zip(LISTS, sentences(6), strict=True)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def score(files: Path, model: str, field: str, output: Path, **data) -> ScoreFolder:
    module = ScoringModule(str(files / model), output=str(output))
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=output.parent)
    options = {"source": str(files / "data.jsonl"), "seq_len": None, "batch_size": 2} | data
    trainer.score(module, ReferenceData(text_field=field, **options))
    return ScoreFolder.open(output)


def test_scores_without_a_tokenizer_are_those_of_the_text(files, tmp_path):
    texts, ids = (score(files, *words, tmp_path / words[0]) for words in (("with", "text"), ("without", "ids")))
    for layer in texts.layers:
        one, other = (torch.cat(list(folder.blocks(layer))) for folder in (texts, ids))
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)  # the batches are in another order
    assert [sample.ending for sample in ids.samples()] == [None] * len(LISTS)
    saved = tmp_path / "pruned"
    prune([str(ids.path)], [str(texts.path)], str(tmp_path / "plan.json"), num_neurons=3, save_model=str(saved))
    assert AutoModelForCausalLM.from_pretrained(saved).config.vocab_size == VOCAB
    with pytest.raises(InputError, match="has no tokenizer"):
        load_tokenizer(ModelSource(str(saved)))


def test_text_for_a_model_without_a_tokenizer_is_refused_before_anything_is_written(files, tmp_path):
    with pytest.raises(InputError, match=r"line [1-6]: the model has no tokenizer to read text with"):
        score(files, "without", "text", tmp_path / "scores")
    assert not list(tmp_path.iterdir())


def test_ids_outside_the_vocabulary_are_refused_with_their_line(files, tmp_path):
    lists = [*LISTS[:2], [3, VOCAB], *LISTS[2:]]
    source = tmp_path / "bad.jsonl"
    source.write_text("".join(json.dumps({"ids": ids}) + "\n" for ids in lists))
    for model, seq_len in (("without", None), ("with", 4)):
        with pytest.raises(InputError, match=r"bad\.jsonl.*: line 3: token id 320 at place 1 .* 0 to 319"):
            score(files, model, "ids", tmp_path / "scores", source=str(source), seq_len=seq_len)
