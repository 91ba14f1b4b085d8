"""The prune command, end to end on tiny models, and once on the real one."""

import json
import logging

import pytest
import torch
from plans import same_bits, state
from score_folders import write
from tiny_models import tiny, tokens
from tiny_tokenizers import of_letters
from transformers import AutoModelForCausalLM

from sparc3_pl.errors import InputError
from sparc3_pl.model.identity import describe
from sparc3_pl.model.loading import load_model
from sparc3_pl.model.source import ModelSource
from sparc3_pl.model.structure import features, linear_layers, mlps
from sparc3_pl.pruning.edit import pruned, revert
from sparc3_pl.pruning.plan import PrunePlan
from sparc3_pl.pruning.save import save_pruned
from sparc3_pl.scores.folder import ScoreFolder
from sparc3_pl.selection.choose import make_plan
from sparc3_pl.selection.command import prune


def score(folder, model, seed, *, pretrained, layers=None, weights=False, **fields):
    """Random scores of a model's up-projections."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: features(model.get_submodule(name)) for name in layers or [mlp.up for mlp in mlps(model)]}
    scores = {name: torch.rand(shape if weights else shape[:1], generator=generator) for name, shape in shapes.items()}
    source = ModelSource(str(pretrained))
    data = {"source": f"{folder.parent}/c4.jsonl", "seed": seed, "sample_ids": [f"id{seed}"]}
    return str(write(folder, scores, model=describe(model, source), data=data, **fields).path)


@pytest.fixture
def scored(tmp_path):
    """A model on the disk and its scores: two general seeds and a behaviour."""
    model = tiny("llama")
    model.save_pretrained(tmp_path / "model")
    of_letters().save_pretrained(tmp_path / "model")
    folders = [score(tmp_path / f"s{seed}", model, seed, pretrained=tmp_path / "model") for seed in range(3)]
    return {"general": folders[:2], "behaviour": folders[2:], "output": str(tmp_path / "out/plan.json")}


def test_writes_a_plan_and_prints_a_table(scored, capsys, tmp_path):
    result = prune(**scored, num_neurons=10)
    plan = PrunePlan.load(scored["output"])
    assert plan.neurons == result.plan.neurons
    assert len(plan.neurons) == 10
    out = capsys.readouterr().out
    assert "10 neurons of 48 scored" in out
    assert "contrast difference, edit zero" in out
    for layer, count in plan.counts().items():
        assert any(layer in line and f" {count} " in line for line in out.splitlines())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["plan.json"]


def test_needs_no_model_for_a_plan(tmp_path, monkeypatch):
    from sparc3_pl.model import loading

    monkeypatch.setattr(loading, "load_model", None)
    folders = [score(tmp_path / str(seed), tiny("llama"), seed, pretrained="gone/away") for seed in (0, 1)]
    prune(folders[:1], folders[1:], str(tmp_path / "p.json"), num_neurons=3)


def test_save_model(scored, tmp_path, capsys):
    result = prune(**scored, num_neurons=8, save_model=str(tmp_path / "pruned"), keep_values=True)
    assert "same size: neurons set to zero" in capsys.readouterr().out
    original = load_model(ModelSource(str(tmp_path / "model")))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    ids = tokens(2, 8)
    with torch.no_grad(), pruned(original, result.plan):
        assert torch.equal(loaded(input_ids=ids).logits, original(input_ids=ids).logits)
    revert(loaded, PrunePlan.load(scored["output"]))
    assert same_bits(state(loaded), state(original))


def test_shrink(scored, tmp_path, capsys):
    prune(**scored, share=0.25, shrink=True, save_model=str(tmp_path / "small"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "small").config.intermediate_size == 18
    assert "smaller" in capsys.readouterr().out


def test_mean(scored, tmp_path):
    (tmp_path / "text.txt").write_text("a b c\n" * 100)
    result = prune(
        **scored, num_neurons=4, edit="mean", mean_source=str(tmp_path / "text.txt"), mean_samples=3, mean_seq_len=16
    )
    assert set(result.plan.means) == set(result.plan.counts())
    model = load_model(ModelSource(str(tmp_path / "model")))
    with pruned(model, PrunePlan.load(scored["output"])):
        pass


def test_weight_scores(tmp_path):
    model = tiny("llama")
    folders = [score(tmp_path / str(s), model, s, pretrained="demo", weights=True) for s in (0, 1)]
    prune(folders[:1], folders[1:], str(tmp_path / "p.json"), num_weights=50)
    plan = PrunePlan.load(tmp_path / "p.json")
    before = state(model)
    with pruned(model, plan):
        assert sum(int((before[n] != v).sum()) for n, v in state(model).items()) == 50


def test_fused_map_is_chosen_by_its_up_rows(tmp_path):
    model = tiny("phi3")
    rows = {mlp.up: [mlp.up_rows.start, mlp.up_rows.stop] for mlp in mlps(model)}
    folders = [score(tmp_path / str(s), model, s, pretrained="demo", neuron_rows=rows) for s in (0, 1)]
    result = prune(folders[:1], folders[1:], str(tmp_path / "p.json"), num_neurons=48)
    assert {n.index for n in result.plan.neurons} == set(range(24, 48))
    with pruned(model, result.plan):
        assert not model.get_submodule(mlps(model)[0].up).weight.any()


def test_warnings_are_logged_printed_and_kept(tmp_path, caplog, capsys):
    model = tiny("llama")
    folders = [
        score(
            tmp_path / name,
            model,
            seed,
            pretrained="demo",
            samples=[{"id": f"{name}{i}", "num_tokens": n, "ending": "cut"} for i in range(3)],
        )
        for seed, (name, n) in enumerate([("g", 256), ("b", 20)])
    ]
    with caplog.at_level(logging.WARNING):
        prune(folders[:1], folders[1:], str(tmp_path / "p.json"), num_neurons=3)
    assert "256.0 tokens on average" in caplog.text
    assert "256.0 tokens on average" in capsys.readouterr().out
    assert "256.0 tokens on average" in json.loads((tmp_path / "p.json").read_text())["warnings"][0]


def test_no_path_of_the_machine_in_the_plan_but_the_models(scored, tmp_path):
    prune(**scored, num_neurons=3)
    data = json.loads((tmp_path / "out/plan.json").read_text())
    data.pop("command")
    assert data["model"].pop("pretrained") == str(tmp_path / "model")
    assert str(tmp_path) not in json.dumps(data)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"num_neurons": 4, "shrink": True}, "give --save_model"),
        ({"num_neurons": 4, "edit": "mean"}, "give --mean_source"),
        ({"num_neurons": 4, "pretrained": "demo:none/", "save_model": "@/m"}, "demo:none/"),
        ({"num_neurons": 4, "general": ["@/none"]}, "no such score folder"),
        ({"num_neurons": 4, "general": ["@"]}, "not a score folder"),
        ({"num_neurons": 4, "general": []}, "no score folder"),
        ({"num_neurons": 4, "edit": "scale"}, "edit=scale with alpha=None"),
        ({"num_neurons": 4, "alpha": 0.5}, "edit=zero with alpha=0.5"),
        ({"num_neurons": 4, "edit": "scale", "alpha": float("inf")}, "needs a finite alpha, but alpha=inf"),
        ({"num_neurons": 4, "edit": "scale", "alpha": float("nan")}, "needs a finite alpha, but alpha=nan"),
        ({"num_neurons": 4, "behaviour": None}, "needs behaviour scores"),
        ({"num_neurons": 4, "save_model": "@/model"}, "already exists"),
        ({"num_neurons": 4, "save_model": "@/model", "overwrite": True}, "not an earlier result"),
        ({"num_neurons": 4, "output": "@/model"}, "is a folder"),
        ({"num_neurons": 400}, "num_neurons=400, but only 48 are scored"),
    ],
)
def test_wrong_input_is_one_line_and_writes_nothing(scored, tmp_path, arguments, match):
    def placed(value):
        if isinstance(value, list):
            return [placed(item) for item in value]
        return value.replace("@", str(tmp_path)) if isinstance(value, str) else value

    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=match) as caught:
        prune(**(scored | {key: placed(value) for key, value in arguments.items()}))
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_scores_of_another_model(scored, tmp_path):
    tiny("llama", seed=4).save_pretrained(tmp_path / "other")
    from shutil import copy

    for name in ("tokenizer.json", "tokenizer_config.json"):
        copy(tmp_path / "model" / name, tmp_path / "other" / name)
    with pytest.raises(InputError, match="was made for"):
        prune(**scored, num_neurons=3, pretrained=str(tmp_path / "other"), save_model=str(tmp_path / "m"))
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("control", ["null", "random", "none"])
def test_control_is_what_was_typed(scored, capsys, control):
    """On a command line, null must not mean "nothing": a plan without control would pass for one."""
    from sparc3_pl.cli import main

    sides = ["--general", *scored["general"], "--behaviour", *scored["behaviour"]]
    assert main(["prune", *sides, "--num_neurons", "5", "--control", control, "--output", scored["output"]]) == 0
    assert PrunePlan.load(scored["output"]).control == (None if control == "none" else control)


@pytest.mark.parametrize(
    ("words", "stay", "of"), [(["--scope", "row", "--share", "0.5"], 8, 16), (["--pattern", "2:4"], 2, 4)]
)
def test_compresses_rows_and_patterns(tmp_path, capsys, words, stay, of):
    """The saved model, by plain transformers: the lowest of each group are zero, everything else is as it was."""
    from sparc3_pl.cli import main

    model = tiny("llama", bias=False)
    model.save_pretrained(tmp_path / "model")
    of_letters().save_pretrained(tmp_path / "model")
    layers = [name for name in linear_layers(model) if ".0." in name]
    folder = score(tmp_path / "s", model, 0, pretrained=tmp_path / "model", layers=layers, weights=True)
    places = ["--output", str(tmp_path / "plan.json"), "--save_model", str(tmp_path / "m")]
    assert main(["prune", "--general", folder, "--contrast", "general", *words, *places]) == 0
    said = capsys.readouterr().out
    assert "a pruned model keeps its size, with 50.0 % zeros among these weights" in said
    assert "same size: weights set to zero, " in said
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m").state_dict()
    scores = ScoreFolder.open(folder)
    for name, before in model.state_dict().items():
        layer = name.removesuffix(".weight")
        if layer not in layers:
            assert torch.equal(loaded[name], before)
            continue
        values = scores.load(layer).tolist()
        for row, weights in enumerate(loaded[name].tolist()):
            width = len(weights) if words[0] == "--scope" else of
            for start in range(0, len(weights), width):
                group = sorted((values[row][i], i) for i in range(start, start + width))
                zero = {i for _, i in group[: width // 2]}
                assert [weights[i] for i in range(start, start + width)] == [
                    0.0 if i in zero else float(before[row, i]) for i in range(start, start + width)
                ]


def test_half_of_every_row_of_a_real_model(tmp_path, smollm2):
    model = load_model(ModelSource(str(smollm2), "float32"))
    layers = [name for name in linear_layers(model) if ".layers.0." in name]
    scores = {name: model.get_submodule(name).weight.detach().abs() for name in layers}
    about = describe(model, ModelSource(str(smollm2), "float32"))
    folder = write(tmp_path / "s", scores, granularity="weight", method="magnitude", model=about)
    plan = make_plan([folder], contrast="general", scope="row", share=0.5)
    save_pruned(model, None, plan, tmp_path / "m")
    assert plan.num_weights == sum(values.numel() // 2 for values in scores.values())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m").state_dict()
    for name, before in model.state_dict().items():
        layer = name.removesuffix(".weight")
        if layer in scores:
            order = before.abs().argsort(dim=1, stable=True)  # each row by magnitude, equal ones by index
            before = before.scatter(1, order[:, : before.shape[1] // 2], 0.0)
        assert torch.equal(loaded[name], before), name


def test_a_pattern_and_a_scope_are_not_both_taken(scored):
    with pytest.raises(InputError, match="pattern=2:4 says among whom weights compete, and so does scope=row"):
        prune(**scored, pattern="2:4", scope="row")
