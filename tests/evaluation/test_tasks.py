"""Zero-shot tasks against a plain loop over the model's own log-probabilities."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tiny_models import tiny
from word_tokenizer import word_tokenizer

from sparc3_pl.data.encoding import Encoder
from sparc3_pl.data.evaluation_data import EvaluationData
from sparc3_pl.errors import InputError
from sparc3_pl.evaluation import tasks
from sparc3_pl.evaluation.compare import compare
from sparc3_pl.evaluation.harness_model import HarnessModel
from sparc3_pl.evaluation.module import EvaluationModule
from sparc3_pl.evaluation.results import Evaluation
from sparc3_pl.evaluation.tasks import TaskAccuracy
from sparc3_pl.runtime.trainer import Trainer

CHOICES = [["w4 w5", "w6", "w7 w8 w9"], ["w10", "w11 w12"], ["w13 w14 w15 w16", "w17", "w18"]]
WORDS = [[f"w{3 + (i * 7 + j * j) % 40}" for j in range(2 + i % 5)] for i in range(14)]
DOCS = [{"question": " ".join(words), "choices": CHOICES[i % 3], "label": i % 2} for i, words in enumerate(WORDS)]
TASK = {
    "task": "made_up",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "made_up.jsonl"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "label",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    "metadata": {"version": 3.0},
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tasks._manager.cache_clear()


def folder(tmp_path: Path, docs=DOCS, **changes) -> str:
    (tmp_path / "tasks").mkdir(exist_ok=True)
    task = {**TASK, **changes}
    (tmp_path / "tasks" / "made_up.yaml").write_text(yaml.safe_dump(task))
    (tmp_path / "tasks" / "made_up.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    return str(tmp_path / "tasks")


@torch.no_grad()
def slow(model, docs=DOCS) -> list[tuple[float, float]]:
    """By item whether the likeliest choice is right: by its sum of log-probabilities, and by that over its letters."""
    tokenizer, right = word_tokenizer(), []
    for doc in docs:
        sums = []
        for choice in doc["choices"]:
            ids = tokenizer(f"{doc['question']} {choice}").input_ids
            num = len(tokenizer(choice, add_special_tokens=False).input_ids)
            log_p = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            sums.append(sum(float(log_p[place - 1, ids[place]]) for place in range(len(ids) - num, len(ids))))
        by_letter = [value / len(choice) for value, choice in zip(sums, doc["choices"], strict=True)]
        right.append(tuple(float(one.index(max(one)) == doc["label"]) for one in (sums, by_letter)))
    return right


def rows_of(task: TaskAccuracy, model, units=None) -> dict[int, dict]:
    encoder = Encoder(word_tokenizer())
    units = task.units(encoder) if units is None else units
    return {int(row["unit"].partition("-")[0]): row for row in task.measure(model, encoder, units)}


def test_rows_and_figures_equal_a_plain_loop(tmp_path):
    model, want = tiny("llama").eval(), slow(tiny("llama").eval())
    task = TaskAccuracy("made_up", folder(tmp_path), batch_size=4)
    rows = rows_of(task, model)
    assert [(rows[i]["acc"], rows[i]["acc_norm"]) for i in range(len(DOCS))] == want
    assert 0 < sum(acc for acc, _ in want) < len(DOCS) and want != [(acc, acc) for acc, _ in want]
    figures = task.figures(list(rows.values()))
    p, n = sum(acc for acc, _ in want) / len(DOCS), len(DOCS)
    assert figures["acc"] == pytest.approx(p)
    assert figures["acc_stderr"] == pytest.approx(math.sqrt(p * (1 - p) / (n - 1)))  # closed form for zeros and ones


def test_ranks_that_share_the_items_give_the_same_rows(tmp_path):
    """Each of two processes makes its own object, and is told the items by the first."""
    model, place = tiny("llama").eval(), folder(tmp_path)
    first, second = (TaskAccuracy("made_up", place) for _ in range(2))
    units = first.units(Encoder(word_tokenizer()))
    parts = rows_of(first, model, units[::2]) | rows_of(second, model, units[1::2])
    assert parts == rows_of(TaskAccuracy("made_up", place, batch_size=3), model)
    with pytest.raises(InputError, match="reads other items of made_up than the first"):
        rows_of(second, model, ["000001-0"])


def test_the_first_items_only(tmp_path):
    assert sorted(rows_of(TaskAccuracy("made_up", folder(tmp_path), limit=3), tiny("llama").eval())) == [0, 1, 2]


def test_what_has_no_answer_fails_and_counts_for_nothing(tmp_path):
    docs = [*DOCS[:3], DOCS[3] | {"label": -1}, DOCS[4] | {"label": 7}]
    rows = rows_of(TaskAccuracy("made_up", folder(tmp_path, docs)), tiny("llama").eval())
    assert [rows[i].get("failed") is None for i in range(5)] == [True, True, True, False, False]
    assert rows[3]["failed"] == "the label -1 is none of the 3 choices"


def test_without_a_context_the_first_token_follows_the_one_that_begins_a_text(tmp_path):
    """As lm-eval has it: BOS, also where the tokenizer does not put it there; a model without any is refused."""
    tokenizer, model = word_tokenizer(), tiny("llama").eval()
    task = TaskAccuracy("made_up", folder(tmp_path, doc_to_text=""))
    (sums,) = [HarnessModel(model, Encoder(tokenizer), 4).loglikelihood(task._items[unit], disable_tqdm=True)
               for unit in task.units(Encoder(tokenizer))[:1]]  # fmt: skip
    choices = [request.args[1] for request in task._items[task.units(Encoder(tokenizer))[0]]]
    for choice, (value, _) in zip(choices, sums, strict=True):
        ids = [tokenizer.bos_token_id, *tokenizer(choice).input_ids]
        with torch.no_grad():
            log_p = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        assert value == pytest.approx(sum(float(log_p[i - 1, ids[i]]) for i in range(1, len(ids))), abs=1e-5)
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(InputError, match="made_up has items without a context"):
        task.units(Encoder(tokenizer))


def test_a_model_that_gives_no_numbers_fails(tmp_path):
    model = tiny("llama").eval()
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    rows = rows_of(TaskAccuracy("made_up", folder(tmp_path), limit=2), model)
    assert all(row["failed"] == "the log-likelihood of a choice is nan" for row in rows.values())


def test_before_and_after_by_item(tmp_path):
    """McNemar by hand: of 8 answers that changed, 1 turned right; 2 (1 + 8) / 2^8."""
    before = [{"unit": i, "acc": float(i < 7)} for i in range(20)]
    after = [{"unit": i, "acc": float(i == 7)} for i in range(20)]
    change = TaskAccuracy("made_up").compare(before, after, seed=0, num_resamples=200)["acc"]
    assert change.p_value == 2 * (1 + 8) / 2**8
    assert (change.improved, change.worsened, change.unchanged) == (1, 7, 12)
    assert change.change == pytest.approx(-0.3)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("made_upp", {}, "there is no task 'made_upp'; nearest: made_up"),
        ("made_up", {"output_type": "generate_until"}, "made_up is a task of kind generate_until"),
        ("made_up", {"dataset_kwargs": {"data_files": {"test": "gone.jsonl"}}}, r"made_up cannot be loaded \(.*gone"),
        ("made_up", {"doc_to_text": "{{question.missing.deeper}}"}, r"made_up cannot be loaded \(UndefinedError"),
    ],
)
def test_tasks_that_cannot_be_run_are_refused_in_one_line(tmp_path, monkeypatch, name, changes, message):
    only_the_folder = tasks._manager(place := folder(tmp_path, **changes), False)
    monkeypatch.setattr(tasks, "_manager", lambda folder, with_own: only_the_folder)  # the harness' own take seconds
    with pytest.raises(InputError, match=message) as error:
        TaskAccuracy(name, place).units(Encoder(word_tokenizer()))
    assert "\n" not in str(error.value)


def test_the_harness_is_imported_only_where_tasks_are_run():
    code = "import sys, sparc3_pl.evaluation.tasks; sys.exit('lm_eval' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_the_extra_or_the_folder(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"model\.tasks_folder='/gone': there is no such folder"):
        TaskAccuracy("made_up", "/gone").units(Encoder(word_tokenizer()))
    monkeypatch.setattr(tasks, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'pip install "sparc3_pl\[harness\]"'):
        TaskAccuracy("made_up", folder(tmp_path)).units(Encoder(word_tokenizer()))
    with pytest.raises(InputError, match=r"model\.tasks_limit=0"):
        TaskAccuracy("made_up", limit=0)
    with pytest.raises(InputError, match=r"need model\.tasks"):
        EvaluationModule(tasks_limit=4)


def test_an_evaluation_with_tasks(tmp_path, capsys):
    """The whole way: eval before and after an edit, results, table, comparison."""
    place = folder(tmp_path)
    for name in ("before", "after"):
        model = tiny("llama")
        if name == "after":
            with torch.no_grad():
                model.model.layers[0].mlp.down_proj.weight.mul_(-30)
        model.save_pretrained(tmp_path / name)
        word_tokenizer().save_pretrained(tmp_path / name)
        module = EvaluationModule(
            str(tmp_path / name), tasks=["made_up"], tasks_folder=place, output=str(tmp_path / f"{name}_out")
        )
        quiet = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False}
        Trainer(default_root_dir=tmp_path, **quiet).eval(module, EvaluationData(text_source=None, prompts_source=None))
    sides = [Evaluation.open(tmp_path / f"{name}_out") for name in ("before", "after")]
    settings = sides[0].results["measurement_settings"]["made_up"]["settings"]
    assert {"lm_eval", "version", "num_fewshot", "limit"} <= settings.keys() and settings["version"] == 3.0
    want = slow(tiny("llama").eval())
    assert sides[0].results["measurements"]["made_up"]["acc"] == pytest.approx(sum(a for a, _ in want) / len(want))
    found = compare(str(tmp_path / "before_out"), str(tmp_path / "after_out"), num_resamples=200)
    change = found.measurements["made_up"]["acc"]
    assert change.num_pairs == len(DOCS)
    assert "made_up: acc" in capsys.readouterr().out


def test_items_and_figures_do_not_depend_on_processes(ranks, tmp_path):
    kwargs = TASK["dataset_kwargs"] | {"cache_dir": str(tmp_path / "cache")}
    place = folder(tmp_path, dataset_kwargs=kwargs)
    tiny("llama").save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    words = ["eval", "--model.pretrained", tmp_path / "model", "--model.tasks", "[made_up]"]
    words += ["--model.tasks_folder", place, "--model.tasks_batch_size", 1]  # four items in a batch, fourteen in all
    words += ["--data.text_source", "null", "--data.prompts_source", "null", "--trainer.accelerator", "cpu"]
    words += ["--trainer.logger", "false", "--trainer.enable_progress_bar", "false"]
    for rank in ranks.run([*words, "--output", tmp_path / "out"], 2):
        assert rank.wait() == 0, rank.text()
    both, task = Evaluation.open(tmp_path / "out"), TaskAccuracy("made_up", place)
    want = rows_of(task, tiny("llama").eval())
    assert both.measurements == [{"measurement": "made_up", **want[i]} for i in range(len(DOCS))]
    assert both.results["measurements"]["made_up"] == task.figures([want[i] for i in range(len(DOCS))])
