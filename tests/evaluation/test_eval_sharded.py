"""``eval`` of a model that is sharded over real processes (FSDP2)."""

import json
from pathlib import Path

import pytest
from plans import plan_for
from ranks import Rank
from tiny_models import tiny
from tiny_tokenizers import sentences, tiny_tokenizer

from sparc3_pl.evaluation.results import Evaluation

CONFIG = Path(__file__).parents[2] / "configs" / "trainer" / "fsdp2.yaml"
QUIET = ["--trainer.accelerator", "cpu", "--trainer.logger", "false", "--trainer.enable_progress_bar", "false"]
SMALL = {"vocab_size": 320, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 1}
ONE_PROCESS = ["--trainer.strategy", "auto"]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A model with a plan for it, a text, seven prompts of different lengths, and two lists of words."""
    folder = tmp_path_factory.mktemp("files")
    model = tiny("llama", **SMALL, tie_word_embeddings=True)
    model.save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    plan_for(model).save(folder / "plan.json")
    prompts = [" ".join(sentences(40)[7 * i : 7 * i + 1 + i % 3]) for i in range(5)] + ["The red fox", "A door"]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts))
    (folder / "text.txt").write_text(" ".join(sentences(30)))
    (folder / "some.txt").write_text("\n".join("abcdefghijklm"))
    (folder / "others.txt").write_text("\n".join("nopqrstuvwxyz"))
    return folder


def evaluation(files: Path, output: Path, *words: object) -> list[object]:
    measurement = {"class_path": "own_measurements.LogitDifference", "init_args": {"prompts": sentences(5)}}
    judges = {
        name: {"class_path": "WordsJudge", "init_args": {"words": str(files / f"{name}.txt")}}
        for name in ("some", "others")
    }
    return [
        "eval", "--config", CONFIG, "--model.pretrained", files / "model", "--output", output, *QUIET,
        "--data.text_source", files / "text.txt", "--model.max_length", 32, "--model.stride", 12,
        "--data.prompts_source", files / "prompts.jsonl", "--data.prompts_field", "prompt",
        "--data.prompts_filter", "null", "--data.num_prompts", "null", "--model.max_new_tokens", 12,
        "--model.samples_per_prompt", 2, "--model.judges", json.dumps(judges),
        "--model.measurements", json.dumps([measurement]), *words,
    ]  # fmt: skip


def succeed(ranks: list[Rank]) -> None:
    for rank in ranks:
        assert rank.wait() == 0, "\n".join(one.text() for one in ranks)


def assert_same(one: Path, other: Path) -> None:
    """Figures to 1e-6, completions to the letter."""
    mine, yours = Evaluation.open(one), Evaluation.open(other)
    assert [(row.id, row.k, row.tokens, row.judges) for row in mine.completions] == [
        (row.id, row.k, row.tokens, row.judges) for row in yours.completions
    ]
    figures, same = mine.figures, yours.figures
    assert figures.perplexity.num_tokens == same.perplexity.num_tokens
    assert figures.perplexity.value == pytest.approx(same.perplexity.value, rel=1e-6)
    assert figures.measurements["logit_difference"] == pytest.approx(same.measurements["logit_difference"], rel=1e-6)
    assert figures.toxicity.mean == pytest.approx(same.toxicity.mean, rel=1e-6)
    assert figures.judges.keys() == same.judges.keys() != set()
    for name, judge in figures.judges.items():
        assert judge.mean == pytest.approx(same.judges[name].mean, rel=1e-6)
    assert figures.model == same.model


def test_figures_and_completions_are_those_of_one_process(ranks, files, tmp_path):
    """Two and four ranks, with windows, prompts and units that they cannot share out evenly; the model is edited."""
    words = ["--plan", files / "plan.json", "--allow_overlap"]
    succeed(ranks.run(evaluation(files, tmp_path / "one", *words, *ONE_PROCESS)))
    for world, batch in ((2, "null"), (4, 1)):
        output = tmp_path / str(world)
        succeed(ranks.run(evaluation(files, output, *words, "--model.generation_batch_size", batch), world))
        assert_same(output, tmp_path / "one")


def test_a_model_that_is_placed_twice_is_refused(ranks, files, tmp_path):
    (rank,) = ranks.run(evaluation(files, tmp_path / "out", "--model.device_map", "auto"))
    assert rank.code == 2
    last = rank.text().splitlines()[-1]
    assert last.startswith("error: model.device_map='auto': trainer.strategy=ModelParallelStrategy places")
    assert not (tmp_path / "out").exists()
