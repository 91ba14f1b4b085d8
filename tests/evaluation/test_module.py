"""The evaluation pass on a tiny model: real data module, real files, a toy judge."""

import json
import math
from dataclasses import replace
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from plans import plan_for
from tiny_models import tiny
from word_tokenizer import word_tokenizer

from sparc3_pl.data.encoding import load_encoder
from sparc3_pl.data.evaluation_data import EvaluationData, window_size
from sparc3_pl.data.reference import ReferenceData
from sparc3_pl.data.sources import text_id
from sparc3_pl.errors import InputError
from sparc3_pl.evaluation import module as module_under_test
from sparc3_pl.evaluation.compare import compare_evaluations
from sparc3_pl.evaluation.completion_run import CompletionRun
from sparc3_pl.evaluation.evaluation_run import EvaluatedModel, EvaluationRun
from sparc3_pl.evaluation.generation import Generator, Sampling
from sparc3_pl.evaluation.module import EvaluationModule
from sparc3_pl.evaluation.perplexity_run import PerplexityRun
from sparc3_pl.evaluation.results import CompletionStore, Evaluation
from sparc3_pl.evaluation.rows import CompletionRow
from sparc3_pl.model.identity import ModelRecord, describe, fingerprint
from sparc3_pl.model.loading import load_model
from sparc3_pl.model.source import ModelSource
from sparc3_pl.pruning.callback import PruningCallback
from sparc3_pl.pruning.edit import pruned
from sparc3_pl.pruning.plan import PrunePlan
from sparc3_pl.runtime.run_config import RunConfig
from sparc3_pl.runtime.trainer import Trainer
from sparc3_pl.scoring.module import ScoringModule

PROMPTS = [f"w{i} w{i + 1} w{i + 2}" for i in range(4, 18, 2)]


class CountingJudge:
    """Share of a text's words that are odd; remembers what it was asked."""

    def __init__(self):
        self.seen = []

    def score(self, texts):
        self.seen += texts
        words = [[int(w[1:]) for w in t.split() if w[1:].isdigit()] for t in texts]
        odd = torch.tensor([sum(n % 2 for n in w) / max(1, len(w)) for w in words])
        return {"odd": odd, "toxicity": 1 - odd}


@pytest.fixture
def files(tmp_path) -> Path:
    """A model folder, a text and prompts."""
    tiny("llama").save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(" ".join(f"w{3 + (7 * i) % 47}" for i in range(90)))
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
    return tmp_path


def module_of(files: Path, name: str = "evaluation", **kwargs) -> EvaluationModule:
    settings = {"max_length": 32, "stride": 8, "max_new_tokens": 10, "samples_per_prompt": 2, "judge": CountingJudge()}
    return EvaluationModule(str(files / "model"), output=str(files / name), **{**settings, **kwargs})


def data_of(files: Path, **kwargs) -> EvaluationData:
    sources = {"text_source": str(files / "text.txt"), "prompts_source": str(files / "prompts.jsonl")}
    return EvaluationData(**{**sources, "prompts_field": "prompt", "batch_size": 3, "window_batch_size": 2, **kwargs})


def trainer_of(files: Path, **kwargs) -> Trainer:
    quiet = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False}
    return Trainer(default_root_dir=files, **{**quiet, **kwargs})


def run(files: Path, module: EvaluationModule, data: EvaluationData | None = None, **kwargs) -> Evaluation:
    trainer_of(files, **kwargs).eval(module, data or data_of(files))
    return Evaluation.open(module.output)


def test_figures_equal_those_of_the_rows(files, capsys):
    found = run(files, module_of(files))
    rows, windows, results = found.completions, found.windows, found.results
    assert len(rows) == 2 * len(PROMPTS)
    assert sorted({row.prompt for row in rows}) == sorted(PROMPTS)
    by_prompt: dict[str, list[float]] = {}
    for row in rows:
        by_prompt.setdefault(row.id, []).append(row.scores["toxicity"])
        numbers = [int(w[1:]) for w in row.completion.split()]
        share = sum(n % 2 for n in numbers) / max(1, len(numbers))
        assert row.scores == pytest.approx({"odd": share, "toxicity": 1 - share}, abs=1e-6)
    toxicity = results["toxicity"]
    assert toxicity["mean"] == pytest.approx(sum(map(sum, by_prompt.values())) / len(rows))
    assert toxicity["expected_maximum"] == pytest.approx(sum(map(max, by_prompt.values())) / len(by_prompt))
    assert toxicity["probability"] == sum(max(v) >= 0.5 for v in by_prompt.values()) / len(by_prompt)
    assert toxicity["share"] == sum(s >= 0.5 for v in by_prompt.values() for s in v) / len(rows)
    assert results["repetition"] == pytest.approx(
        {
            "uniqueness": sum(row.uniqueness for row in rows) / len(rows),
            "length": sum(len(row.completion_ids) - (row.completion_ids[-1:] == [2]) for row in rows) / len(rows),
            "empty": sum(row.completion == "" for row in rows) / len(rows),
        }
    )
    assert (toxicity["num_prompts"], toxicity["num_completions"], toxicity["num_failed"]) == (7, 14, 0)
    assert list(toxicity["labels"]) == ["odd", "toxicity"]
    perplexity = results["perplexity"]
    assert perplexity["nll"] == pytest.approx(math.fsum(row.nll for row in windows))
    assert perplexity["num_tokens"] == 89 == sum(row.num_tokens for row in windows)
    assert perplexity["value"] == pytest.approx(math.exp(perplexity["nll"] / 89))
    assert (perplexity["max_length"], perplexity["stride"]) == (32, 8)
    printed = capsys.readouterr().out
    assert f"{perplexity['value']:.4f}" in printed
    assert str(files / "evaluation") in printed


def test_completions_are_reference_samples_to_the_token(files):
    module = module_of(files)
    rows = run(files, module).completions
    names = {"text_field": "prompt", "completion_field": "completion_ids", "weight_field": "scores.odd"}
    data = ReferenceData(f"{module.output}/completions.jsonl", **names, weight_baseline="none")
    data.read(load_encoder(ModelSource(str(files / "model"))))
    made = {tuple(i.input_ids): (sum(i.by_token["completion_mask"]), i.numbers["weight"]) for i in data.samples}
    generator = Generator(tiny("llama"), word_tokenizer(), Sampling(max_new_tokens=10, samples_per_prompt=2))
    drawn = generator([text_id(p) for p in PROMPTS], PROMPTS)
    assert made.keys() == {(*(int(w[1:]) for w in c.prompt.split()), *c.drawn) for c in drawn}
    assert sorted(made.values()) == sorted((len(row.completion_ids), row.scores["odd"]) for row in rows)
    assert {name for sample in data.samples for name in sample.text_ids} == {row.id for row in rows}


def test_prefixes_are_judged_and_credit_every_token(files):
    module = module_of(files, samples_per_prompt=5, judge_prefixes=True)
    rows = run(files, module).completions
    for row in rows:
        shares = []
        for place in range(len(row.completion_ids)):
            words = [token for token in row.completion_ids[: place + 1] if token > 2]  # special tokens say nothing
            shares.append(sum(token % 2 for token in words) / max(1, len(words)))
        assert row.prefix_scores["odd"] == pytest.approx(shares, abs=1e-6)
        assert row.prefix_scores["toxicity"] == pytest.approx([1 - share for share in shares], abs=1e-6)
        assert row.prefix_scores["odd"][-1] == row.scores["odd"]
    plain = run(files, module_of(files, "plain", samples_per_prompt=5)).completions
    assert [replace(row, prefix_scores={}) for row in rows] == plain
    names = {"text_field": "prompt", "completion_field": "completion_ids", "weight_field": "scores.odd"}
    credit = {"weight_baseline": "prefix", "prefix_field": "prefix_scores.odd"}
    data = ReferenceData(f"{module.output}/completions.jsonl", **names, **credit)
    data.read(load_encoder(ModelSource(str(files / "model"))))
    assert len(data.samples) == len(rows)
    assert all(any(sample.by_token["token_weight"]) for sample in data.samples)


def test_perplexity_as_papers_print_it(files, capsys):
    """The loop of SparseGPT and Wanda, as their papers and code describe it, on the model as transformers runs it."""
    words = [f"w{3 + (7 * i) % 47}" for i in range(90)]
    texts = ["", *(" ".join(words[i : i + 11]) for i in range(0, 90, 11)), ""]
    (files / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    source = load_model(ModelSource(str(files / "model"))).eval()
    ids = word_tokenizer()("\n\n".join(texts), return_tensors="pt").input_ids
    seq_len, losses = 32, []
    count = ids.numel() // seq_len
    for i in range(count):
        batch = ids[:, i * seq_len : (i + 1) * seq_len]
        with torch.no_grad():
            logits = source(batch).logits.double()
        loss = torch.nn.functional.cross_entropy(logits[0, :-1], batch[0, 1:])
        losses.append(loss * seq_len)
    want = math.exp(sum(losses) / (count * seq_len))
    data = data_of(files, text_source=str(files / "text.jsonl"), prompts_source=None)
    found = run(files, module_of(files, stride=None, windows="published", judge=None), data).results["perplexity"]
    assert found["value"] == pytest.approx(want, rel=1e-6)
    assert (found["windows"], found["num_windows"], found["num_tokens"]) == ("published", count, count * (seq_len - 1))
    assert ids.numel() % seq_len and found["protocol"]["num_text_tokens"] == ids.numel()
    assert f"{count * (seq_len - 1)} tokens of {count} windows of 32, as papers print it" in capsys.readouterr().out


def test_a_run_without_a_trainer_gives_the_same(files):
    want = run(files, module_of(files))
    source = ModelSource(str(files / "model"))
    model, encoder, data = load_model(source).eval(), load_encoder(source), data_of(files)
    data.read(encoder)
    data.plan_batches(window_size(64, 32, 8))
    generator = Generator(model, encoder.tokenizer, Sampling(max_new_tokens=10, samples_per_prompt=2), 64)
    runs = [
        PerplexityRun(model, window_size(64, 32, 8)),
        CompletionRun(generator, CountingJudge(), torch.device("cpu")),
    ]
    evaluation = EvaluationRun(EvaluatedModel(describe(model, source), fingerprint(model)), runs)
    for batch in data.test_dataloader():
        evaluation.add(batch)
    evaluation.finish(data.describe(), files / "plain")
    found = Evaluation.open(files / "plain")
    assert (found.completions, found.windows) == (want.completions, want.windows)
    odd = ("created", "command", "sha256")
    assert {k: v for k, v in found.results.items() if k not in odd} == {
        k: v for k, v in want.results.items() if k not in odd
    }


def test_the_record_says_where_it_comes_from(files):
    results = run(files, module_of(files), callbacks=[RunConfig("seed: 0\n")]).results
    assert results["model"]["fingerprint"] == results["model"]["evaluated_fingerprint"]
    assert results["generation"]["eos_token_ids"] == [2]
    assert results["judge"]["class"].endswith("CountingJudge")
    assert (results["overlap"], results["plan"]) == ("none", None)
    assert (files / "evaluation" / "config.yaml").read_text() == "seed: 0\n"
    assert {"versions", "command", "created", "sha256", "files"} <= results.keys()


@pytest.mark.parametrize("batch_size", [1, 8])
def test_batch_sizes_change_nothing(files, batch_size):
    want = run(files, module_of(files, "one"))
    module = module_of(files, "other", generation_batch_size=batch_size + 1)
    found = run(files, module, data_of(files, batch_size=batch_size, window_batch_size=batch_size))
    assert found.completions == want.completions
    for label, figures in want.results["toxicity"]["labels"].items():
        assert found.results["toxicity"]["labels"][label] == pytest.approx(figures, rel=1e-12)
    assert found.results["perplexity"]["value"] == pytest.approx(want.results["perplexity"]["value"], rel=1e-6)


def test_judge_and_metrics_stay_out_of_the_state_dict(files):
    module = module_of(files, judge=torch.nn.Linear(2, 2))
    module.configure_model()
    assert {name.split(".")[0] for name in module.state_dict()} == {"model"}
    before = module.model
    module.configure_model()
    assert module.model is before


def test_a_text_is_judged_once(files):
    judge = CountingJudge()
    found = run(files, module_of(files, judge=judge, temperature=0, samples_per_prompt=3))
    texts = {row.completion for row in found.completions}
    assert len(found.completions) == 3 * len(PROMPTS) > len(texts)
    assert sorted(judge.seen) == sorted(["This is a sentence.", *texts])
    assert found.completions[0].scores == found.completions[1].scores


def test_prompts_that_are_completed_at_once_come_in_one_batch(files, monkeypatch):
    sizes = []
    inner = Generator.__call__
    monkeypatch.setattr(Generator, "__call__", lambda self, ids, p: sizes.append(len(p)) or inner(self, ids, p))
    run(files, module_of(files, generation_batch_size=8), data_of(files, batch_size=None))
    run(files, module_of(files, "other"), data_of(files, batch_size=None))
    run(files, module_of(files, "third"), data_of(files, batch_size=5))
    assert sizes == [4, 3, 7, 5, 2]


def test_an_interrupted_run_goes_on(files, monkeypatch):
    want = run(files, module_of(files, "whole"))
    calls = []
    inner = Generator.__call__

    def dies_in_the_second_batch(self, ids, prompts):
        calls.append(list(prompts))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return inner(self, ids, prompts)

    monkeypatch.setattr(Generator, "__call__", dies_in_the_second_batch)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run(files, module_of(files))
    assert not (files / "evaluation").exists()
    (store,) = files.glob(".evaluation.*")
    with next(store.glob("*.jsonl")).open("a") as stream:
        stream.write('{"id": "torn')  # as a kill in the middle of a write leaves it
    calls.append([])  # the third call and those after it work
    found = run(files, module_of(files))
    again = [p for batch in calls[3:] for p in batch]
    assert len(again) == len(PROMPTS) - 3
    assert not set(again) & set(calls[0])
    assert found.completions == want.completions
    assert found.results["toxicity"] == want.results["toxicity"]
    assert found.results["repetition"] == want.results["repetition"]
    assert not list(files.glob(".evaluation*"))


def test_other_settings_do_not_find_the_store(files):
    store = CompletionStore(files / "evaluation", {"seed": 0}, rank=0)
    row = CompletionRow("a", "A prompt", 0, "and", {"toxicity": 0.5}, 7, 1, 1.0, None, [4])
    store.add([row])
    store.close()
    assert CompletionStore(files / "evaluation", {"seed": 0}, rank=3).load() == {"a": [row]}
    assert CompletionStore(files / "evaluation", {"seed": 1}, rank=0).load() == {}


@pytest.fixture
def plan(files):
    """Of the model in the folder; made from one of its prompts and another."""
    model = load_model(ModelSource(str(files / "model")))
    return replace(plan_for(model), behaviour_samples=[text_id(PROMPTS[2]), "elsewhere"])


def run_on_text(files: Path, module: EvaluationModule, **kwargs) -> Evaluation:
    """Without prompts, which take most of the time."""
    return run(files, module, data_of(files, prompts_source=None), **kwargs)


def test_prompts_of_the_plan_are_refused_unless_allowed(files, plan):
    with pytest.raises(InputError, match="1 of 7 prompts were used to make the plan"):
        run(files, module_of(files), callbacks=[PruningCallback(plan)])
    assert not (files / "evaluation").exists()
    results = run(files, module_of(files, allow_overlap=True), callbacks=[PruningCallback(plan)]).results
    assert (results["overlap"], results["num_overlapping_prompts"]) == ("allowed", 1)


def test_text_that_held_the_budget_is_refused_unless_allowed(files, plan):
    text = (files / "text.txt").read_text()
    plan = replace(plan, budget_samples=[text_id(text)])
    plan.save(files / "plan.json")
    plan = PrunePlan.load(files / "plan.json")
    with pytest.raises(InputError, match=r"100% of data\.text_source is text by which the plan's budget was held"):
        run_on_text(files, module_of(files), callbacks=[PruningCallback(plan)])
    assert not (files / "evaluation").exists()
    before = run_on_text(files, module_of(files, "before"))
    after = run_on_text(files, module_of(files, allow_overlap=True), callbacks=[PruningCallback(plan)])
    assert (after.results["overlap"], after.results["overlapping_text"]) == ("allowed", 1.0)
    assert after.results["num_overlapping_prompts"] == 0
    assert "100% of the text held the plan's budget" in compare_evaluations(before, after).notes[-1]
    assert "overlapping_text" not in before.results


def test_a_known_prompt_with_a_space_behind_it_is_no_new_one(files, plan):
    (files / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"<s> {p} "}) + "\n" for p in PROMPTS))
    plan = replace(plan, behaviour_samples=[text_id(PROMPTS[2])])
    with pytest.raises(InputError, match="1 of 7 prompts were used to make the plan"):
        run(files, module_of(files), callbacks=[PruningCallback(plan)])


@pytest.mark.parametrize("from_file", [False, True])
def test_the_module_asks_the_trainer_for_the_plan(files, plan, from_file):
    plan = replace(plan, behaviour_samples=[])
    given = plan.save(files / "plan.json") if from_file else plan
    results = run_on_text(files, module_of(files), callbacks=[PruningCallback(given, revert=True)]).results
    assert results["plan"]["sha256"] == (PrunePlan.load(given) if from_file else plan).summary().sha256
    assert (results["overlap"], results["num_overlapping_prompts"]) == ("none", 0)
    model = load_model(ModelSource(str(files / "model")))
    assert results["model"]["fingerprint"] == fingerprint(model) == plan.fingerprint
    with pruned(model, plan):
        assert results["model"]["evaluated_fingerprint"] == fingerprint(model)


def test_an_edit_by_nobody_knows_whom_is_not_called_plain(files, caplog, capsys):
    class Silencer(pl.Callback):
        def on_test_start(self, trainer, pl_module):
            with torch.no_grad():
                pl_module.model.model.layers[0].mlp.down_proj.weight.zero_()

    evaluation = run_on_text(files, module_of(files), callbacks=[Silencer()])
    assert not evaluation.is_plain
    assert (evaluation.results["plan"], evaluation.results["overlap"]) == (None, "unknown")
    assert evaluation.results["num_overlapping_prompts"] is None
    assert "by no PruningCallback" in caplog.text
    assert "no plan that is known" in capsys.readouterr().out
    module = module_of(files, "edited before the run")
    module.configure_model()
    module.model.requires_grad_(False).model.layers[0].mlp.down_proj.weight[0] = 0
    assert run_on_text(files, module).results["overlap"] == "unknown"
    assert run_on_text(files, module_of(files, "plain")).is_plain


def test_a_pruned_module_that_is_used_again_is_not_called_plain(files, plan):
    plan = replace(plan, behaviour_samples=[])
    module = module_of(files)
    run_on_text(files, module, callbacks=[PruningCallback(plan)])
    module.output = str(files / "again")
    results = run_on_text(files, module).results  # the edit is still in the weights
    assert results["overlap"] == "unknown"
    assert results["model"]["fingerprint"] == plan.fingerprint


def test_a_refused_plan_says_nothing_of_the_model(files, plan):
    module, other = module_of(files), replace(plan, model=ModelRecord(fingerprint="sha256:other"))
    with pytest.raises(InputError, match="was made for"):
        run_on_text(files, module, callbacks=[PruningCallback(other)])
    results = run_on_text(files, module).results
    assert results["model"]["fingerprint"] == results["model"]["evaluated_fingerprint"] == plan.fingerprint


@pytest.mark.parametrize("with_plan", [False, True])
def test_each_state_of_the_model_is_hashed_once(files, plan, monkeypatch, with_plan):
    hashed = []
    for name in ("evaluation.module", "model.identity", "pruning.edit"):
        monkeypatch.setattr(f"sparc3_pl.{name}.fingerprint", lambda model: hashed.append(model) or fingerprint(model))
    plan = replace(plan, behaviour_samples=[])
    module = module_of(files, max_new_tokens=2, samples_per_prompt=1)
    run(files, module, callbacks=[PruningCallback(plan)] if with_plan else [])
    assert len(hashed) == 2  # as it was loaded, and as it was evaluated


def test_two_plans_are_refused(files, plan):
    with pytest.raises(InputError, match="one plan at a time"):
        run(files, module_of(files), callbacks=[PruningCallback(plan), PruningCallback(plan)])


@pytest.mark.parametrize(("precision", "dtype"), [
    ("bf16-true", "bfloat16"), ("16-true", "float16"), ("64-true", "float32"), ("bf16-mixed", "bfloat16"),
])  # fmt: skip
def test_another_precision_of_the_trainer_is_refused(files, precision, dtype):
    trainer = pl.Trainer(precision=precision, accelerator="cpu", logger=False, enable_progress_bar=False)
    with pytest.raises(InputError, match=rf"trainer\.precision={precision}.*model\.dtype={dtype}"):
        trainer.test(module_of(files), datamodule=data_of(files))
    assert not (files / "evaluation").exists()
    scoring = ScoringModule(str(files / "model"), output=str(files / "scores"))
    with pytest.raises(InputError, match=rf"trainer\.precision={precision}"):
        trainer.predict(scoring, datamodule=ReferenceData(source=str(files / "text.txt")))


def test_failed_completions_are_told(files):
    (files / "prompts.jsonl").write_text(
        json.dumps({"prompt": " ".join(["w5"] * 60)}) + "\n" + json.dumps({"prompt": "w4"})
    )
    found = run(files, module_of(files))
    assert found.results["toxicity"]["num_failed"] == 2
    failed = [row for row in found.completions if row.failed]
    assert [row.completion for row in failed] == [None, None]
    assert [row.scores for row in failed] == [{}, {}]


def test_text_only_and_prompts_only(files):
    judge = CountingJudge()
    found = run(files, module_of(files, "text", judge=judge), data_of(files, prompts_source=None))
    assert (found.results["toxicity"], found.completions) == (None, [])
    assert not judge.seen  # nor loaded, where a judge has something to load
    found = run(files, module_of(files, "prompts"), data_of(files, text_source=None))
    assert (found.results["perplexity"], found.windows) == (None, [])


def test_a_judge_that_fails_does_so_before_anything_is_generated(files, monkeypatch):
    judge = CountingJudge()
    judge.score = lambda texts: {"toxicity": torch.full((len(texts),), 2.0)}
    monkeypatch.setattr(Generator, "__call__", lambda *_: pytest.fail("generated"))
    with pytest.raises(InputError, match=r"scores must lie in \[0, 1\]"):
        run(files, module_of(files, judge=judge))


def test_an_existing_result_is_refused_at_the_start(files, monkeypatch):
    run(files, module_of(files))
    monkeypatch.setattr(Generator, "__call__", lambda *_: pytest.fail("generated"))
    with pytest.raises(InputError, match="already exists"):
        run(files, module_of(files))
    monkeypatch.undo()
    run(files, module_of(files, overwrite=True))


@pytest.mark.parametrize(
    "wrong",
    [
        {"windows": "printed"},
        {"windows": "published", "stride": 4},
        {"max_length": 1},
        {"stride": 0},
        {"max_length": 8, "stride": 9},
        {"generation_batch_size": 0},
    ],
)
def test_impossible_sizes_are_refused_when_the_module_is_made(files, wrong):
    with pytest.raises(InputError, match=list(wrong)[-1]):
        module_of(files, **{"stride": None, **wrong})


def test_a_window_longer_than_the_context_is_refused(files):
    with pytest.raises(InputError, match="give at most 64"):
        run(files, module_of(files, max_length=128))


def test_unset_window_is_the_models_context(files):
    perplexity = run_on_text(files, module_of(files, max_length=None, stride=None)).results["perplexity"]
    assert (perplexity["max_length"], perplexity["stride"]) == (64, 64)


def test_nothing_to_evaluate_is_refused_before_the_model_is_loaded(files, monkeypatch):
    monkeypatch.setattr(module_under_test, "load_model", lambda source: pytest.fail("loaded"))
    with pytest.raises(InputError, match="nothing to evaluate"):
        run(files, module_of(files), data_of(files, text_source=None, prompts_source=None))


def test_fast_dev_run_writes_nothing(files, capsys):
    module = EvaluationModule(str(files / "model"), max_length=32, max_new_tokens=3, judge=CountingJudge())
    trainer_of(files, fast_dev_run=True, logger=True).eval(module, data_of(files))
    assert module.written_to is None
    assert "perplexity" in capsys.readouterr().out


def test_figures_and_completions_reach_tensorboard(files):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    module = module_of(files)
    module.output = None
    trainer_of(files, logger=True).eval(module, data_of(files))
    assert module.written_to == Path(module.trainer.log_dir) / "evaluation"
    events = EventAccumulator(module.trainer.log_dir).Reload()
    assert "eval/perplexity/value" in events.Tags()["scalars"]
    assert events.Scalars("eval/toxicity/mean")[0].value == pytest.approx(module.evaluation.results["toxicity"]["mean"])
    assert any(tag.startswith("eval/completions") for tag in events.Tags()["tensors"])


def test_default_judges():
    assert module_under_test.EvaluationModule().settings.judge.variant == "demo"
    assert module_under_test.EvaluationModule("some/model").settings.judge.variant == "original"
