"""Completions that are judged while the next ones are drawn: the same as in turns, whatever takes long."""

import threading
from dataclasses import asdict

import pytest
import torch

from sparc3_pl.data.evaluation_data import PromptBatch
from sparc3_pl.errors import InputError
from sparc3_pl.evaluation import completion_run
from sparc3_pl.evaluation.completion_run import CompletionRun, _is_judged_beside
from sparc3_pl.evaluation.generation import Completion, Sampling
from sparc3_pl.evaluation.judges import DetoxifyJudge, WordsJudge

BATCHES = [["a", "b"], ["c"], ["d", "e"]]
WAIT = 10.0  # seconds until what waits for the other thread gives up
CPU = torch.device("cpu")


class Drawn:
    """Two completions per prompt: its id and the number of the completion."""

    sampling, word_filter = Sampling(samples_per_prompt=2), None

    def __init__(self, before=lambda ids: None):
        self.before = before

    def __call__(self, ids, prompts):
        self.before(list(ids))
        return [Completion(i, i, k, 0, f"{i}{k}", (1, k)) for i in ids for k in range(2)]

    def describe(self):
        return {**asdict(self.sampling), "eos_token_ids": [0]}

    def text(self, tokens):
        return " ".join(map(str, tokens))


class Lengths:
    """The share of the alphabet before a text's first letter; does something first."""

    def __init__(self, before=lambda texts: None):
        self.before = before

    def score(self, texts):
        if texts != ["This is a sentence."]:
            self.before(texts)
        return {"x": torch.tensor([ord(text[0]) / 128 for text in texts])}


@pytest.fixture
def beside(monkeypatch):
    monkeypatch.setattr(completion_run, "_is_judged_beside", lambda judges, device: True)


def finished(run):
    for ids in BATCHES:
        run.add(PromptBatch(ids, ids))
    return run.finish({})


@pytest.mark.parametrize("prefixes", [False, True])
def test_the_same_as_in_turns_while_the_next_are_drawn(monkeypatch, prefixes):
    want = finished(CompletionRun(Drawn(), Lengths(), CPU, prefixes=prefixes))
    is_drawing = threading.Event()

    def drawing(ids):
        if ids != BATCHES[0]:
            is_drawing.set()

    def slow(texts):
        assert is_drawing.wait(WAIT), "nothing was drawn meanwhile"

    monkeypatch.setattr(completion_run, "_is_judged_beside", lambda judges, device: True)
    outcome = finished(CompletionRun(Drawn(drawing), Lengths(slow), CPU, prefixes=prefixes))
    assert [(row.id, row.k) for row in outcome.completions] == [(i, k) for ids in BATCHES for i in ids for k in (0, 1)]
    assert outcome.completions == want.completions
    assert outcome.results["toxicity"] == want.results["toxicity"]
    assert outcome.results["repetition"] == want.results["repetition"]


@pytest.mark.parametrize("at", range(3))
def test_a_judges_error_reaches_the_caller(beside, at):
    def fails(texts):
        if texts[0][0] == BATCHES[at][0]:
            raise InputError("the judge has lost its voice")

    run = CompletionRun(Drawn(), Lengths(fails), CPU)
    with pytest.raises(InputError, match="lost its voice"):
        finished(run)
    assert [row.id for row in run.rows] == [i for ids in BATCHES[:at] for i in ids for _ in range(2)]


def test_what_was_completed_before_an_interruption_is_kept(beside):
    def interrupted(ids):
        if ids == BATCHES[1]:
            raise KeyboardInterrupt

    run = CompletionRun(Drawn(interrupted), Lengths(), CPU)
    with pytest.raises(KeyboardInterrupt):
        finished(run)
    assert [row.id for row in run.rows] == ["a", "a", "b", "b"]


@pytest.mark.parametrize(
    ("judges", "model", "is_beside"),
    [
        ([DetoxifyJudge("demo")], "cpu", False),
        ([DetoxifyJudge("demo")], "cuda:1", True),
        ([DetoxifyJudge("demo", device="cpu")], "cuda", True),
        ([DetoxifyJudge("demo", device="cuda:0")], "cpu", True),
        ([DetoxifyJudge("demo", device="cpu"), Lengths()], "cuda", False),
        ([WordsJudge(), DetoxifyJudge("demo")], "cuda", True),
    ],
)
def test_where_they_do_not_compete_for_a_processor(judges, model, is_beside):
    assert _is_judged_beside(judges, torch.device(model)) is is_beside
