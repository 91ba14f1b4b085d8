"""What long passes show: rates, time left and the running mean with its error, once a minute in a log."""

import logging
import math
import statistics
from types import SimpleNamespace

import pytest
import torch
from tiny_models import tiny

from sparc3_pl.data.evaluation_data import PromptBatch, WindowBatch, WindowSize
from sparc3_pl.evaluation.completion_run import CompletionRun
from sparc3_pl.evaluation.generation import Completion, Sampling
from sparc3_pl.evaluation.perplexity_run import PerplexityRun
from sparc3_pl.runtime.progress import Done, Watch, duration, show_progress


def test_rate_and_time_left():
    watch = Watch({"prompts": 40})
    watch.took("prompts", 12.0)
    watch.took("prompts", 8.0)
    watch.took("windows", 500.0)
    done = Done("prompts", 10, 1000, "toxicity", 0.3125, 0.0213)
    assert watch.text(done) == "10 of 40 prompts, 50 tokens/s, 60 s left, toxicity 0.3125 ± 0.021"
    assert watch.text(Done("prompts", 40)) == "40 of 40 prompts"
    assert watch.text(Done("units of x", 3)) == "3 units of x"
    assert [duration(s) for s in (0.4, 89, 91, 3600, 7380)] == ["0 s", "89 s", "2 min", "1 h 0 min", "2 h 3 min"]


def test_a_log_gets_a_line_a_minute(caplog):
    time = [0.0]
    watch = Watch({"prompts": 400}, clock=lambda: time[0])
    trainer = SimpleNamespace(is_global_zero=True, world_size=2, progress_bar_callback=None)
    with caplog.at_level(logging.INFO):
        for count in range(1, 400):
            time[0] += 1.0
            watch.took("prompts", 1.0)
            show_progress(trainer, "eval", watch, Done("prompts", count))
            show_progress(SimpleNamespace(is_global_zero=False), "eval", watch, Done("prompts", count))
    assert len(caplog.messages) == 6
    assert caplog.messages[0] == "eval: 60 of 400 prompts, 6 min left (process 1 of 2)"


def test_running_perplexity_and_its_error():
    """The error is that of a ratio of sums: by an explicit loop over windows."""
    model = tiny("llama")
    run = PerplexityRun(model, WindowSize(8, 8))
    for start in (0, 2, 4):
        ids = torch.randint(3, 30, (2, 8))
        labels = ids.clone()
        labels[0, : start + 1] = -100
        run.add(WindowBatch(ids, torch.ones_like(ids), labels, [start, start + 1]))
    nll, tokens = [row.nll for row in run.rows], [row.num_tokens for row in run.rows]
    mean = sum(nll) / sum(tokens)
    residuals = [a - mean * b for a, b in zip(nll, tokens, strict=True)]
    error = math.sqrt(sum(r * r for r in residuals) / 5 * 6) / sum(tokens)
    done = run.done()
    assert (done.unit, done.count, done.tokens, done.figure) == ("windows", 6, sum(tokens), "perplexity")
    assert done.mean == pytest.approx(math.exp(mean))
    assert done.error == pytest.approx(math.exp(mean) * error)


def test_running_mean_is_over_prompts():
    """Two completions of a prompt are one value: they are not independent."""
    scores = {"a": [0.0, 1.0], "b": [0.5, 0.75], "c": [0.25, 0.25]}

    class Fixed:
        def score(self, texts):
            return {"x": torch.tensor([float(t) if t[0].isdigit() else 0.0 for t in texts])}

    class Scripted:
        sampling, word_filter = Sampling(samples_per_prompt=2), None

        def __call__(self, ids, prompts):
            return [Completion(i, i, k, 0, str(value), (1, 2, 3)) for i in ids for k, value in enumerate(scores[i])]

    run = CompletionRun(Scripted(), Fixed(), torch.device("cpu"))
    assert math.isnan(run.done().mean)
    for names in (["a", "b"], ["c"]):
        run.add(PromptBatch(names, names))
    done, means = run.done(), [0.5, 0.625, 0.25]
    assert (done.unit, done.count, done.tokens, done.figure) == ("prompts", 3, 18, "x")
    assert done.mean == pytest.approx(statistics.mean(means))
    assert done.error == pytest.approx(statistics.stdev(means) / math.sqrt(3))
