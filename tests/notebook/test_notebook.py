"""The functions of ``import sparc3_pl``: the commands' numbers, the model as it was, one clear error each."""

import copy
import json
import math
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from IPython.lib.pretty import pretty
from ranks import environment
from tiny_models import tiny
from transformers import AutoModelForCausalLM, AutoTokenizer
from word_tokenizer import word_tokenizer

import sparc3_pl
from sparc3_pl import demo
from sparc3_pl.cli import execute
from sparc3_pl.data.texts import TextQuery
from sparc3_pl.errors import InputError
from sparc3_pl.model.identity import ModelRecord
from sparc3_pl.scores.folder import ScoreFolder

ONE_PROCESS = ["--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.enable_progress_bar", "false"]
DEMO_TEXTS = [json.loads(line)["text"][:300] for line in demo.GENERAL.read_text().splitlines()[:9]]
HOSTILE = [json.loads(line) for line in demo.PROMPTS.read_text().splitlines()]
HOSTILE = [one["prompt"]["text"] for one in HOSTILE if (one["prompt"]["toxicity"] or 0) > 0.5][:8]
HELD_OUT = [json.loads(line)["prompt"]["text"] for line in demo.PROMPTS_HELDOUT.read_text().splitlines()][:4]
TEXT = demo.TEXT.read_text()[:2000]


@pytest.fixture(scope="module")
def loaded():
    """The demo model and its tokenizer as a user loads them, with an eager mind for gradients."""
    return AutoModelForCausalLM.from_pretrained(demo.MODEL), AutoTokenizer.from_pretrained(demo.MODEL)


@pytest.fixture(scope="module")
def scored(loaded):
    """General and behaviour scores in memory."""
    return [sparc3_pl.score(*loaded, texts, progress=False) for texts in (DEMO_TEXTS, HOSTILE)]


class Shouting:
    """A judge: the share of a completion's words that hold an ``e``."""

    def score(self, texts):
        return {"e": torch.tensor([sum("e" in w for w in t.split()) / max(1, len(t.split())) for t in texts])}


def state(model):
    """All that a borrower might leave behind: weights, gradients, flags, hooks, attributes, configuration."""
    hooks = [name for name in vars(model) if name.endswith("_hooks")]
    return {
        "dtypes": {name: parameter.dtype for name, parameter in model.named_parameters()},
        "bits": [p.detach().clone() for p in model.parameters()],
        "gradients": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "asks": [p.requires_grad for p in model.parameters()],
        "training": [m.training for m in model.modules()],
        "hooks": [[len(getattr(m, name)) for name in hooks] for m in model.modules()],
        "attributes": [sorted(vars(m)) for m in model.modules()],
        "config": copy.deepcopy(model.config.to_dict()),
        "generation": copy.deepcopy(model.generation_config.to_dict()),
    }


def same_state(one, other):
    equal = all(torch.equal(a, b) for a, b in zip(one.pop("bits"), other.pop("bits"), strict=True))
    pairs = zip(one.pop("gradients"), other.pop("gradients"), strict=True)
    return equal and all(a is b if a is None else torch.equal(a, b) for a, b in pairs) and one == other


# --- the same numbers as the commands ---------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["neuron", "weight"])
def test_scores_are_the_commands_bit_for_bit(loaded, tmp_path, monkeypatch, granularity):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in DEMO_TEXTS))
    squares = str(granularity == "neuron").lower()
    execute(
        [
            *("score", "--model.pretrained", "demo", "--model.granularity", granularity, "--output", "command"),
            *("--data.source", "texts.jsonl", "--data.seq_len", "null", "--data.batch_size", "2"),
            *("--model.squares", squares, *ONE_PROCESS),
        ]
    )
    scores = sparc3_pl.score(*loaded, DEMO_TEXTS, granularity=granularity, batch_size=2, progress=False)
    scores.save("python")
    one, two = ScoreFolder.open("command"), ScoreFolder.open("python")
    assert one.layers == two.layers == scores.layers
    for layer in one.layers:
        assert torch.equal(one.load(layer), two.load(layer))
        assert torch.equal(one.load(layer), scores[layer])
        assert one.manifest.layers[layer] == scores.manifest.layers[layer]
        if granularity == "neuron":
            assert torch.equal(one.load_squares(layer), scores.folder.load_squares(layer))
    assert one.samples() == two.samples() == scores.samples
    assert one.manifest.model == two.manifest.model
    assert two.manifest.relevance_account["relative_residual"] < 1e-6  # of the first sample drawn, which is another
    assert two.digest == scores.folder.digest  # what a plan says of scores in memory is true once they are saved


def test_windows_are_joined_in_the_order_of_the_texts(loaded):
    model, tokenizer = loaded
    ids = [i for text in DEMO_TEXTS[:3] for i in tokenizer(text + "\n\n", add_special_tokens=False)["input_ids"]]
    prefix = tokenizer("a")["input_ids"][: -len(tokenizer("a", add_special_tokens=False)["input_ids"])]
    length = 24 - len(prefix)
    windows = [[*prefix, *ids[start : start + length]] for start in (0, length)]
    joined = sparc3_pl.score(model, tokenizer, DEMO_TEXTS[:3], seq_len=24, num_samples=2, progress=False)
    listed = sparc3_pl.score(model, None, windows, progress=False)
    assert all(torch.equal(joined[layer], listed[layer]) for layer in joined.layers)
    assert {sample.id for sample in joined.samples} == {sample.id for sample in listed.samples}


def test_records_give_completions_and_their_weights(loaded):
    records = [
        {"a": {"b": text}, "c": " you", "w": weight} for text, weight in zip(HOSTILE[:3], (0, 0.5, 1), strict=True)
    ]
    fields = {"text_field": "a.b", "completion_field": "c", "weight_field": "w"}
    scores = sparc3_pl.score(
        *loaded, records, target="completion", signed=True, method="gradient", progress=False, **fields
    )
    assert scores.manifest.target == "completion"
    assert scores.manifest.data["weight_baseline"] == "mean"
    assert scores.manifest.num_samples == 3


def test_a_plan_is_the_one_of_the_saved_folders_and_of_the_command(scored, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for scores, name in zip(scored, ("general", "behaviour"), strict=True):
        scores.save(name)
    plan = sparc3_pl.choose(*scored, num_neurons=7, contrast="t")
    execute(
        [
            *("prune", "--general", "general", "--behaviour", "behaviour", "--num_neurons", "7", "--contrast", "t"),
            *("--output", "plan.json"),
        ]
    )
    command = sparc3_pl.Plan.load("plan.json")
    assert (
        plan.neurons
        == command.neurons
        == sparc3_pl.choose("general", ["behaviour"], num_neurons=7, contrast="t").neurons
    )
    assert plan.behaviour_samples == command.behaviour_samples
    digests = [[one["sha256"] for one in some.scores["general"]] for some in (plan, command)]
    assert digests[0] == digests[1]
    assert "num_neurons=7" in plan.command


def test_an_evaluation_is_the_commands(loaded, scored, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"text": prompt}) + "\n" for prompt in HELD_OUT))
    plan = sparc3_pl.choose(*scored, num_neurons=5)
    plan.save("plan.json")
    execute(
        [
            *("eval", "--model.pretrained", "demo", "--plan", "plan.json", "--output", "command"),
            *("--data.text_source", "text.txt", "--data.prompts_source", "prompts.jsonl"),
            *("--data.prompts_field", "text", "--model.max_new_tokens", "6", "--model.max_length", "64", *ONE_PROCESS),
        ]
    )
    settings = {"text": TEXT, "prompts": HELD_OUT, "max_new_tokens": 6, "max_length": 64, "progress": False}
    with sparc3_pl.edited(loaded[0], plan):
        after = sparc3_pl.evaluate(*loaded, **settings)
    command = sparc3_pl.Evaluation.open("command")
    for key in ("toxicity", "repetition", "generation", "judge", "model", "overlap"):
        assert after.results[key] == command.results[key]
    rows = [[row.to_json() for row in one.completions] for one in (command, after)]
    assert rows[0] == rows[1] == [row.to_json() for row in sparc3_pl.Evaluation.open(after.save("python")).completions]
    assert after.windows == command.windows
    assert after.results["perplexity"]["value"] == command.results["perplexity"]["value"]
    assert after.results["plan"]["num_neurons"] == 5
    assert after.results["command"] == "sparc3_pl.evaluate(max_length=64, max_new_tokens=6)"
    before = sparc3_pl.evaluate(*loaded, **settings)
    assert before.results["plan"] is None
    comparison = sparc3_pl.compare(before, after)
    assert comparison.perplexity.after == after.results["perplexity"]["value"]
    assert (comparison.before, comparison.after) == ("before", "after")


def test_perplexity_by_another_road(loaded):
    model, tokenizer = loaded
    measured = sparc3_pl.evaluate(model, tokenizer, text=TEXT, max_length=50, progress=False)
    ids, nll, count = tokenizer(TEXT)["input_ids"], 0.0, 0
    for start in range(0, len(ids), 50):
        window = torch.tensor([ids[start : start + 50]])
        if window.shape[1] > 1:
            with torch.no_grad():
                logits = model(window).logits[0, :-1].double().log_softmax(-1)
            nll -= float(logits.gather(1, window[0, 1:, None]).sum())
            count += window.shape[1] - 1
    assert measured.results["perplexity"]["value"] == pytest.approx(math.exp(nll / count), rel=1e-6)


# --- an edit within a budget ------------------------------------------------------------------------------------------

OF_COMPLETIONS = {
    "text_field": "prompt", "completion_field": "completion_ids", "weight_field": "scores.toxicity",
    "weight_baseline": "prefix", "prefix_field": "prefix_scores.toxicity", "gae_lambda": 0.8,
}  # fmt: skip
DERIVATIVE = {"method": "gradient", "signed": True, "squares": True}
DRAWN = {"samples_per_prompt": 4, "max_new_tokens": 5, "judge_prefixes": True}
BUDGET = {"contrast": "budget", "budget_windows": 2, "budget_length": 48}


def options(section, settings):
    return [word for name, value in settings.items() for word in (f"--{section}{name}", str(value))]


@pytest.fixture(scope="module")
def within_budget(loaded):
    """Completions, their derivative, the costs, all in memory."""
    drawn = sparc3_pl.evaluate(*loaded, prompts=HOSTILE, **DRAWN, progress=False)
    scoring = {**DERIVATIVE, "granularity": ["neuron", "channel"], "progress": False}
    behaviour = sparc3_pl.score(*loaded, drawn.completions, target="completion", **OF_COMPLETIONS, **scoring)
    costs = sparc3_pl.score(*loaded, DEMO_TEXTS, target="text", labels="model", **scoring)
    return drawn, behaviour, costs


def test_an_edit_within_a_budget_is_the_commands(loaded, within_budget, tmp_path, monkeypatch):
    """Every step of the page on weakening a behaviour, from Python and by command."""
    monkeypatch.chdir(tmp_path)
    drawn, behaviour, costs = within_budget
    for name, rows in (("prompts", HOSTILE), ("texts", DEMO_TEXTS)):
        Path(f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    prompts = {"prompts_source": "prompts.jsonl", "prompts_field": "text", "text_source": "null"}
    execute(["eval", *options("model.", DRAWN), *options("data.", prompts), "--output", "drawn", *ONE_PROCESS])
    assert sparc3_pl.Evaluation.open("drawn").completions == [replace(row, tokens=[]) for row in drawn.completions]
    signed = [*options("model.", {**DERIVATIVE, "granularity": "[neuron, channel]"}), *ONE_PROCESS]
    completions = {"source": "drawn/completions.jsonl", **OF_COMPLETIONS}
    execute(["score", *signed, "--model.target", "completion", *options("data.", completions), "--output", "behaviour"])
    text = {"source": "texts.jsonl", "seq_len": "null"}
    words = ["--model.target", "text", "--model.labels", "model", *options("data.", text), "--output", "costs"]
    execute(["score", *signed, *words])
    for name, scores in (("behaviour", behaviour), ("costs", costs)):
        folder = ScoreFolder.open(name)
        for layer in folder.layers:
            torch.testing.assert_close(folder.load(layer), scores[layer], rtol=1e-5, atol=1e-9)
            torch.testing.assert_close(folder.load_squares(layer), scores.folder.load_squares(layer), rtol=1e-5, atol=0)
    before = state(loaded[0])
    given = {**BUDGET, "budget": 0.02, "model": loaded[0], "tokenizer": loaded[1], "progress": False}
    plan = sparc3_pl.choose(costs, behaviour, **given, budget_text=["demo:text"])
    assert same_state(before, state(loaded[0]))
    words = ["--general", "costs", "--behaviour", "behaviour", "--edit", "gains", *options("", BUDGET)]
    execute(["prune", *words, "--budget", "0.02", "--budget_text", "demo:text"])
    command = sparc3_pl.Plan.load("plan.json")
    gains, other = plan.settings["gains"], command.settings["gains"]
    assert gains["reached"] and 0.019 < gains["texts"][0]["rise"] <= 0.02
    assert gains["scale"] == pytest.approx(other["scale"], rel=1e-4)
    assert gains["texts"][0].pop("source") == other["texts"][0].pop("source") == "demo:text"
    assert gains["texts"][0] == pytest.approx(other["texts"][0], rel=1e-3)
    assert plan.budget_samples == command.budget_samples
    factors = [{(n.layer, n.index): n.factor for n in one.neurons} for one in (plan, command)]
    assert factors[0] == pytest.approx(factors[1], abs=1e-4)
    assert min(factors[0].values()) < 0.9


def test_held_back_texts_in_memory_are_the_same_as_in_a_file(loaded, within_budget):
    _, behaviour, costs = within_budget
    lines = [text for _, text in zip(range(40), TextQuery("demo:text", "text", seed=0).texts(), strict=False)]
    given = {**BUDGET, "scale": 3.0, "model": loaded[0], "tokenizer": loaded[1], "progress": False}
    plans = [
        sparc3_pl.choose(costs, behaviour, **given, budget_text=text)
        for text in (["demo:text"], [lines], {"web": lines})
    ]
    texts = [plan.settings["gains"]["texts"][0] for plan in plans]
    assert [text.pop("source") for text in texts] == ["demo:text", "text 1", "web"]
    assert texts[0] == texts[1] == texts[2]
    general = [sparc3_pl.score(*loaded, lines[:9], target="text", labels="model", progress=False,
                               granularity=["neuron", "channel"], **DERIVATIVE)]  # fmt: skip
    unseen = sparc3_pl.choose(general, behaviour, **given, budget_text=[lines]).settings["gains"]["texts"][0]
    assert unseen["num_left_out"] == 9
    with sparc3_pl.edited(loaded[0], plans[0]):
        with pytest.raises(InputError, match=r"edited already, by a plan of .* leave that block first"):
            sparc3_pl.choose(costs, behaviour, **given, budget_text=[lines])
        with pytest.raises(
            InputError, match=r"of data.further_texts.web.source is text by which the plan's budget was held"
        ):
            sparc3_pl.evaluate(*loaded, further_texts={"web": "\n".join(lines)}, progress=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give one of the two"),
        ({"budget": 0.01}, "budget needs held-back text"),
        ({"budget": 0.01, "budget_text": ["demo:text"], "model": None}, "give model=model, tokenizer=tokenizer"),
        ({"budget": 0.01, "budget_text": ["One text.", "Another text."]}, r"holds 'One text\.', which is a text"),
        ({"budget": 0.01, "budget_text": "demo:text"}, "budget_text is one text; give a list of the kinds"),
        ({"budget": 0.01, "budget_text": ["demo:text"], "edit": "zero"}, "budget=0.01 is for edit=gains"),
        ({"budget_text": [["a b"]], "edit": "zero"}, "^budget_text is for edit=gains"),
        ({"budget": 0.01, "budget_text": ["demo:text"], "budgets": "owl"}, "leave out num_weights and budgets"),
    ],
)
def test_budgets_that_are_refused(loaded, within_budget, arguments, message):
    _, behaviour, costs = within_budget
    given = {**BUDGET, "model": loaded[0], "tokenizer": loaded[1], "progress": False}
    with pytest.raises(InputError, match=message):
        sparc3_pl.choose(costs, behaviour, **given | arguments)


def test_neutral_prompts_further_texts_and_a_word_filter(loaded, tmp_path):
    """What a page shows to add to an evaluation, as the command measures it."""
    settings = {"prompts": HELD_OUT[:2], "judge": Shouting(), "max_new_tokens": 4, "progress": False}
    plain = sparc3_pl.evaluate(*loaded, **settings, text=TEXT)
    (tmp_path / "words.txt").write_text(plain.completions[0].completion.split()[0])
    more = {"neutral": HOSTILE[:2], "further_texts": {"same": TEXT}, "word_filter": str(tmp_path / "words.txt")}
    whole = sparc3_pl.evaluate(*loaded, **settings, **more)
    assert whole.results["measurements"]["text same"]["perplexity"] == plain.results["perplexity"]["value"]
    assert whole.results["measurement_settings"]["text same"]["settings"]["source"] == "in memory"
    assert TEXT[:50] not in json.dumps(whole.results)
    assert whole.results["word_filter"]["num_redrawn"] >= 1
    swapped = sparc3_pl.evaluate(*loaded, **settings | {"prompts": HOSTILE[:2]}, word_filter=more["word_filter"])
    assert whole.neutral == swapped.completions
    assert whole.results["neutral"]["mean"] == swapped.results["toxicity"]["mean"]
    changes = sparc3_pl.compare(whole, whole).changes()
    assert changes["text same: perplexity"].change == changes["neutral prompts: e: mean"].change == 0
    with pytest.raises(InputError, match="neutral is one text"):
        sparc3_pl.evaluate(*loaded, prompts=["a"], neutral="b")
    with pytest.raises(InputError, match="give prompts, too"):
        sparc3_pl.evaluate(*loaded, text=TEXT, neutral=["b"])


# --- the model is given back as it was --------------------------------------------------------------------------------


@pytest.mark.parametrize("crash", [False, True])
@pytest.mark.parametrize("use", ["score", "edited", "evaluate"])
def test_leaves_no_trace(use, crash):
    model, tokenizer = tiny("llama"), word_tokenizer()
    model.requires_grad_(True)
    for place, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(place % 3 != 0)
        parameter.grad = torch.ones_like(parameter) if place % 2 else None
    texts = [[3, 4, 5], [6, 7, 8, 9]]
    plan = sparc3_pl.choose(sparc3_pl.score(model, None, texts, progress=False), num_neurons=3, contrast="general")
    before, pad = state(model), tokenizer.pad_token

    class Boom(Exception):
        pass

    class Breaking:
        def score(self, texts):
            if crash and texts != ["This is a sentence."]:
                raise Boom
            return {"x": torch.zeros(len(texts))}

    def broken(*_):
        raise Boom

    with suppress(Boom):
        if use == "edited":
            with sparc3_pl.edited(model, plan):
                assert not same_state(copy.deepcopy(before), state(model))
                if crash:
                    raise Boom
        elif use == "evaluate":
            sparc3_pl.evaluate(model, tokenizer, prompts=["a b"], judge=Breaking(), max_new_tokens=2, progress=False)
        else:
            handle = model.model.layers[0].mlp.register_forward_hook(broken) if crash else None
            try:
                sparc3_pl.score(model, None, texts, progress=False)
            finally:
                if handle is not None:
                    handle.remove()
    assert same_state(before, state(model))
    assert tokenizer.pad_token == pad


def test_no_pad_token_is_needed_and_none_is_given(loaded):
    model, tokenizer = loaded
    bare = copy.deepcopy(tokenizer)
    bare.pad_token = None
    one, two = (sparc3_pl.score(model, t, DEMO_TEXTS[:3], batch_size=3, progress=False) for t in (tokenizer, bare))
    assert all(torch.equal(one[layer], two[layer]) for layer in one.layers)
    settings = {"prompts": HELD_OUT[:2], "judge": Shouting(), "max_new_tokens": 3, "progress": False}
    rows = [sparc3_pl.evaluate(model, t, **settings).completions for t in (tokenizer, bare)]
    assert rows[0] == rows[1]
    assert bare.pad_token is None


# --- one clear error each ---------------------------------------------------------------------------------------------


def test_a_model_that_cannot_be_used_is_refused():
    model, texts = tiny("llama"), [[3, 4, 5]]
    scores = sparc3_pl.score(model, None, texts, progress=False)
    plan = sparc3_pl.choose(scores, num_neurons=2, contrast="general")
    for wrong in ("demo", torch.nn.Linear(2, 2), model.model):
        with pytest.raises(InputError, match=r"not a loaded language model; give the one of AutoModelForCausalLM"):
            sparc3_pl.score(wrong, None, texts, progress=False)
    with pytest.raises(InputError, match=r"the model has no weights \(device meta\)"):
        sparc3_pl.score(copy.deepcopy(model).to("meta"), None, texts, progress=False)
    model.model.layers[1].train()
    with pytest.raises(InputError, match=r"its module model.layers.1 is in training mode; call model.eval\(\) first"):
        sparc3_pl.score(model, None, texts, progress=False)
    model.eval()
    with sparc3_pl.edited(model, plan):
        with pytest.raises(InputError, match=r"edited already, by a plan of 2 neurons \(contrast general\)"):
            sparc3_pl.edited(model, plan).__enter__()
        assert sparc3_pl.score(model, None, texts, progress=False).manifest.model != scores.manifest.model
    sparc3_pl.edited(model, plan).__enter__()  # the block was left: the plan may be in force again


def test_a_model_in_use_in_another_thread_is_refused():
    """While a judge is asked, the model is being measured; that thread may use it, no other may."""
    model, tokenizer = tiny("llama"), word_tokenizer()
    plan = sparc3_pl.choose(
        sparc3_pl.score(model, None, [[3, 4, 5]], progress=False), num_neurons=2, contrast="general"
    )
    calls = {
        "score": lambda: sparc3_pl.score(model, None, [[3, 4, 5]], progress=False),
        "evaluate": lambda: sparc3_pl.evaluate(model, tokenizer, text="a b c", progress=False),
        "edited": lambda: sparc3_pl.edited(model, plan).__enter__(),
    }
    said = {}

    def use(name):
        try:
            calls[name]()
        except InputError as error:
            said[name] = str(error)

    class Asking:
        def score(self, texts):
            calls["score"]()
            for name in calls if texts != ["This is a sentence."] else ():
                thread = threading.Thread(target=use, args=(name,))
                thread.start()
                thread.join()
            return {"x": torch.zeros(len(texts))}

    before = state(model)
    sparc3_pl.evaluate(model, tokenizer, prompts=["a b"], judge=Asking(), max_new_tokens=2, progress=False)
    assert said == dict.fromkeys(
        calls, "the model is in use by a call in another thread; wait until it is done, or load it again"
    )
    assert same_state(before, state(model))
    thread = threading.Thread(target=use, args=("score",))
    said.clear()
    thread.start()
    thread.join()
    assert said == {}


def test_a_quantised_model_is_refused():
    model = tiny("llama")
    up = model.model.layers[0].mlp.up_proj
    up.weight = torch.nn.Parameter(up.weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(InputError, match=r"quantised .*layers.0.mlp.up_proj.weight is int8.*unquantised checkpoint"):
        sparc3_pl.score(model, None, [[3, 4]], progress=False)
    packed = torch.ao.quantization.quantize_dynamic(tiny("llama"), {torch.nn.Linear}, dtype=torch.qint8)
    with pytest.raises(InputError, match=r"quantised \(weights are packed: .*q_proj is a .*unquantised checkpoint"):
        sparc3_pl.score(packed, None, [[3, 4]], progress=False)
    model = tiny("llama")
    model.hf_quantizer = object()
    with pytest.raises(InputError, match="the model is quantised"):
        sparc3_pl.evaluate(model, word_tokenizer(), text="a b c", progress=False)
    model.hf_quantizer = SimpleNamespace(
        quantization_config=SimpleNamespace(dequantize=True)
    )  # unpacked as it was read
    sparc3_pl.evaluate(model, word_tokenizer(), text="a b c", progress=False)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, t: sparc3_pl.score(m, t, "a b"), r"texts is one str; give a list"),
        (lambda m, t: sparc3_pl.score(m, t, []), r"texts is empty, and method lrp needs samples"),
        (lambda m, t: sparc3_pl.score(m, t, ["a b"], method="lpr"), r"model.method='lpr'"),
        (lambda m, t: sparc3_pl.score(m, None, ["a b"]), r"no tokenizer to read text with"),
        (lambda m, t: sparc3_pl.score(m, "gpt2", ["a b"]), r"tokenizer is a str"),
        (lambda m, t: sparc3_pl.evaluate(m, t), r"nothing to evaluate; give text, prompts or measurements"),
        (lambda m, t: sparc3_pl.evaluate(m, t, prompts="a b"), r"prompts is one text; give a list"),
        (lambda m, t: sparc3_pl.evaluate(m, t, text="a b c", stride=0), r"model.stride=0"),
    ],
)
def test_wrong_arguments_are_refused(call, message):
    with pytest.raises(InputError, match=message):
        call(tiny("llama"), word_tokenizer())


def test_pairs_of_the_plan_are_refused(loaded, scored, tmp_path):
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"more": HOSTILE[0], "less": "Another sentence."}))
    pairs = {"class_path": "pairs", "init_args": {"source": str(tmp_path / "pairs.jsonl")}}
    plan, told = sparc3_pl.choose(*scored, num_neurons=3), "1 pairs hold a sentence from which the plan was made"
    with sparc3_pl.edited(loaded[0], plan), pytest.raises(InputError, match=told):
        sparc3_pl.evaluate(*loaded, measurements=[pairs], progress=False)


def test_prompts_of_the_plan_are_refused(loaded, scored):
    plan = sparc3_pl.choose(*scored, num_neurons=3)
    settings = {"prompts": HOSTILE[:2], "judge": Shouting(), "max_new_tokens": 2, "progress": False}
    with sparc3_pl.edited(loaded[0], plan):
        with pytest.raises(InputError, match="2 of 2 prompts were used to make the plan"):
            sparc3_pl.evaluate(*loaded, **settings)
        after = sparc3_pl.evaluate(*loaded, **settings, allow_overlap=True)
    assert (after.results["overlap"], after.results["num_overlapping_prompts"]) == ("allowed", 2)


def test_methods_without_samples_need_no_texts():
    model = tiny("llama")
    scores = sparc3_pl.score(model, None, method="magnitude", granularity="weight", progress=False)
    name = scores.layers[0]
    assert torch.equal(scores[name], model.get_submodule(name).weight.detach().abs().float())
    assert scores.manifest.num_samples == 0


# --- what is shown ----------------------------------------------------------------------------------------------------


def test_results_show_themselves(loaded, scored):
    plan = sparc3_pl.choose(*scored, num_neurons=6)
    settings = {"prompts": HELD_OUT, "text": TEXT, "judge": Shouting(), "max_new_tokens": 4, "progress": False}
    before = sparc3_pl.evaluate(*loaded, **settings)
    with sparc3_pl.edited(loaded[0], plan):
        after = sparc3_pl.evaluate(*loaded, **settings)
    comparison = sparc3_pl.compare(before, after)
    scores = scored[0]
    frames = {"scores": scores.to_pandas(), "plan": plan.to_pandas(), "comparison": comparison.to_pandas()}
    assert len(frames["scores"]) == scores.manifest.num_scores
    assert frames["scores"].score.sum() == pytest.approx(scores.manifest.total_relevance)
    assert list(frames["plan"].score) == sorted(frames["plan"].score)
    row = frames["comparison"].set_index("figure").loc["perplexity"]
    assert row.change == pytest.approx(row.after - row.before)
    assert list(before.to_pandas().e) == [one.scores["e"] for one in before.completions]
    for shown in (scores, plan, before, comparison):
        html = shown._repr_html_()
        assert html.count("<table>") == 1
        assert html.count("<div") == html.count("</div>")
        assert "<table>" not in str(shown)
        assert pretty(shown) == str(shown)
        svg = shown.plot()._repr_html_()
        assert "<svg" in svg
        assert "var(--muted)" in svg
    assert "perplexity" in str(comparison)
    assert f"{before.results['perplexity']['value']:.4f}" in str(before)
    assert "&lt;b&gt;" in sparc3_pl.Plan(model=ModelRecord(fingerprint="x"), entries={}, warnings=["<b>"])._repr_html_()


def test_loaded_scores_are_not_saved_again(scored, tmp_path):
    scored[0].save(tmp_path / "a")
    again = sparc3_pl.Scores.load(tmp_path / "a")
    assert all(torch.equal(again[layer], scored[0][layer]) for layer in again.layers)
    with pytest.raises(InputError, match="copy that folder"):
        again.save(tmp_path / "b")
    with pytest.raises(InputError, match="already exists"):
        scored[0].save(tmp_path / "a")


def test_the_package_imports_nothing_until_a_function_is_asked_for():
    code = """
import sys, sparc3_pl
assert {"torch", "lightning", "transformers"}.isdisjoint(sys.modules)
assert {"score", "choose", "edited", "evaluate", "compare", "Plan"} <= set(dir(sparc3_pl))
sparc3_pl.choose
assert "lightning" not in sys.modules and "transformers" not in sys.modules
try:
    sparc3_pl.scor
except AttributeError as error:
    assert "scor" in str(error)
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=environment())


def test_stubs_name_what_the_package_has():
    import sparc3_pl as package

    stub = Path(package.__file__).with_suffix(".pyi").read_text()
    assert all(f"as {name}\n" in stub for name in package.__all__)
    assert all(getattr(package, name).__doc__ for name in package.__all__)
