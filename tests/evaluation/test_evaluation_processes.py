"""``eval`` with real processes: the same figures and completions however the work is split."""

import json
from pathlib import Path

import pytest
from judge_folder import judge_folder
from ranks import Ranks
from tiny_models import tiny
from word_tokenizer import word_tokenizer

from sparc3_pl.evaluation.results import Evaluation


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    tiny("llama").save_pretrained(folder / "model")
    word_tokenizer().save_pretrained(folder / "model")
    (folder / "judge").mkdir()
    judge_folder(folder / "judge")
    (folder / "text.txt").write_text(" ".join(f"w{3 + (7 * i) % 47}" for i in range(90)))
    prompts = [{"prompt": {"text": f"w{i} w{i + 1}"}} for i in range(4, 7)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(p) + "\n" for p in prompts))
    return folder


def evaluate(ranks: Ranks, files: Path, processes: int) -> Evaluation:
    options = {
        "model.pretrained": files / "model", "model.max_length": 32, "model.stride": 16, "model.max_new_tokens": 8,
        "model.samples_per_prompt": 2, "model.judge": "DetoxifyJudge",
        "model.judge.checkpoint": files / "judge" / "judge.ckpt",
        "data.text_source": files / "text.txt", "data.prompts_source": files / "prompts.jsonl",
        "trainer.accelerator": "cpu", "trainer.devices": processes, "trainer.logger": "false",
        "output": files / f"on_{processes}",
    }  # fmt: skip
    words = [f"--{name}={value}" for name, value in options.items()]
    (rank,) = ranks.start(["eval", *words], processes, launcher=True)
    assert rank.wait() == 0, rank.text()
    return Evaluation.open(files / f"on_{processes}")


def test_one_two_and_four_processes_agree(ranks, files):
    want = evaluate(ranks, files, 1)
    assert len(want.completions) == 6
    for processes in (2, 4):  # the fourth has no prompt
        found = evaluate(ranks, files, processes)
        assert found.completions == want.completions
        assert [w["index"] for w in found.windows] == [w["index"] for w in want.windows]
        one, other = want.results, found.results
        assert other["perplexity"]["value"] == pytest.approx(one["perplexity"]["value"], rel=1e-6)
        assert other["perplexity"]["num_tokens"] == one["perplexity"]["num_tokens"] == 89
        for label, figures in one["toxicity"]["labels"].items():
            assert other["toxicity"]["labels"][label] == pytest.approx(figures, abs=1e-6)
        counts = ("num_prompts", "num_completions", "num_failed")
        assert [other["toxicity"][n] for n in counts] == [one["toxicity"][n] for n in counts] == [3, 6, 0]
