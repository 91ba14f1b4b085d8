"""Contrast ``expertise``: AurA, Damp and Det-zero against their formulas, in plans, in models and after saving."""

import json

import pytest
import torch
from score_folders import write
from tiny_models import tiny, tokens
from transformers import AutoModelForCausalLM

from sparc3_pl.cli import main
from sparc3_pl.data.samples import Sample
from sparc3_pl.errors import InputError
from sparc3_pl.model.components import COMPONENTS
from sparc3_pl.model.identity import fingerprint
from sparc3_pl.model.structure import mlps
from sparc3_pl.pruning.edit import pruned
from sparc3_pl.pruning.save import save_pruned
from sparc3_pl.selection.choose import make_dose, make_plan
from sparc3_pl.selection.dose import BudgetText, spend

IDS = tokens(2, 9)
AURA = {"contrast": "expertise", "edit": "gains", "scale": 1.0}


def scored(path, model, kind="neuron", method="expertise"):
    """A folder of made-up AUROCs of all components of a model, among them the ends 0, 0.5 and 1."""
    generator = torch.Generator().manual_seed(0)
    auroc = {}
    for group in COMPONENTS.make(kind).groups(model):
        auroc[group.layer] = torch.rand(group.shape, generator=generator)
        auroc[group.layer][:3] = torch.tensor([0.0, 0.5, 1.0])
    samples = [{"id": f"s{i}", "num_tokens": 9, "text_ids": [f"t{i}"]} for i in range(4)]
    about = {"model": {"pretrained": "demo", "fingerprint": fingerprint(model)}, "samples": samples}
    return write(path, auroc, method=method, granularity=kind, **about)


def by_hand(folder, scale=1.0):
    """1 - 2 (AUROC - 0.5) for those above 0.5, and of that the share ``scale`` of the way from 1: loops over floats."""
    factors = {}
    for layer in folder.layers:
        for index, auroc in enumerate(folder.load(layer).double().tolist()):
            if auroc > 0.5:
                published = 1 - 2 * (auroc - 0.5)
                factors[layer, index] = max(0.0, 1 + scale * (published - 1))
    return factors


@torch.no_grad()
def scaled_logits(model, factors, of_input):
    """Logits where layers' outputs (or the inputs of down-projections) are multiplied as they pass."""
    down = {mlp.up: mlp.down for mlp in mlps(model)}
    handles = []
    for layer in dict.fromkeys(layer for layer, _ in factors):
        own = {index: factor for (name, index), factor in factors.items() if name == layer}

        def scale(x, own=own):
            x = x.clone()
            for index, factor in own.items():
                x[..., index] *= factor
            return x

        if of_input:
            module = model.get_submodule(down[layer])
            handles.append(module.register_forward_pre_hook(lambda _, args, scale=scale: (scale(args[0]),)))
        else:
            module = model.get_submodule(layer)
            handles.append(module.register_forward_hook(lambda _, args, y, scale=scale: scale(y)))
    try:
        return model(input_ids=IDS, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("scale", [1.0, 0.3, 2.5])
def test_the_factors_are_the_published_ones_times_the_scale(tmp_path, scale):
    folder = scored(tmp_path / "e", tiny("llama"))
    plan = make_plan([], [folder], **(AURA | {"scale": scale}))
    wanted = by_hand(folder, scale)
    assert {(n.layer, n.index): n.factor for n in plan.neurons} == pytest.approx(wanted, rel=1e-6, abs=1e-7)
    always_right = {n.factor for n in plan.neurons if n.score == -1.0}
    assert always_right == {max(0.0, 1 - scale)}
    assert (plan.contrast, plan.edit, plan.num_candidates, plan.warnings) == ("expertise", "gains", 48, [])
    assert plan.behaviour_samples == sorted([f"{kind}{i}" for kind in "st" for i in range(4)])
    assert plan.scores["general"] == []
    assert plan.settings["gains"] == {"scale": scale, "predicted_change": None, "predicted_rise": None}


@pytest.mark.parametrize(
    ("family", "kind"),
    [("llama", "neuron"), ("opt", "neuron"), ("llama", "output"), ("opt", "output"), ("phi3", "output")],
)
def test_an_edited_model_does_what_scaled_activations_do(tmp_path, family, kind):
    model = tiny(family, dtype=torch.float64)
    folder = scored(tmp_path / "e", model, kind)
    plan = make_plan([], [folder], **AURA)
    touched = {layer.rpartition(".")[2] for layer in plan.entries}
    every = {name for mlp in mlps(model) for name in (mlp.gate, mlp.up, mlp.down) if name is not None}
    assert touched == {name.rpartition(".")[2] for name in (every if kind == "output" else {m.up for m in mlps(model)})}
    wanted = scaled_logits(model, by_hand(folder), of_input=kind == "neuron")
    with torch.no_grad(), pruned(model, plan):
        edited = model(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(edited, wanted, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        plain = model(input_ids=IDS, use_cache=False).logits
    assert (plain - wanted).abs().max() > 0.01


@pytest.mark.parametrize("kind", ["neuron", "output"])
def test_a_saved_model_has_the_factors_in_its_weights(tmp_path, kind):
    model = tiny("llama")
    folder = scored(tmp_path / "e", model, kind)
    plan = make_plan([], [folder], **AURA)
    save_pruned(model, None, plan, tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        got = loaded(input_ids=IDS, use_cache=False).logits
    wanted = scaled_logits(model, by_hand(folder), of_input=kind == "neuron")
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("edit", "factor"), [("zero", 0.0), ({"class_path": "scale", "init_args": {"alpha": 0.4}}, 0.4)]
)
def test_det_zero_and_damp_take_the_best_detectors(tmp_path, edit, factor):
    model = tiny("llama")
    folder = scored(tmp_path / "e", model)
    ranked = sorted(
        ((auroc, layer, i) for layer in folder.layers for i, auroc in enumerate(folder.load(layer).tolist())),
        key=lambda one: -one[0],
    )
    plan = make_plan([], [folder], contrast="expertise", edit=edit, num_neurons=10)
    best = {(layer, i) for _, layer, i in ranked[:10]}
    assert {(n.layer, n.index) for n in plan.neurons} == best
    with torch.no_grad(), pruned(model, plan):
        edited = model(input_ids=IDS, use_cache=False).logits
    wanted = scaled_logits(model, dict.fromkeys(sorted(best), factor), of_input=True)
    torch.testing.assert_close(edited, wanted, rtol=1e-4, atol=1e-4)
    above = {"class_path": "expertise", "init_args": {"threshold": 0.8}}
    plan = make_plan([], [folder], contrast=above, edit=edit)
    assert {(n.layer, n.index) for n in plan.neurons} == {(layer, i) for auroc, layer, i in ranked if auroc > 0.8}
    assert plan.settings["threshold"] == 0.8


def test_controls_that_need_no_general_scores(tmp_path):
    folder = scored(tmp_path / "e", tiny("llama"))
    plan, permuted = (make_plan([], [folder], **AURA, control=name) for name in (None, "permuted"))
    for layer in plan.entries:
        assert sorted(plan.entries[layer].factor.tolist()) == sorted(permuted.entries[layer].factor.tolist())
    assert [n.index for n in plan.neurons] != [n.index for n in permuted.neurons]
    random = make_plan([], [folder], contrast="expertise", control="random")
    assert random.num_neurons == len(by_hand(folder))


def test_its_factors_within_a_budget(tmp_path):
    """The search goes as far as the loss, measured anew by the library, rises by the budget."""
    model = tiny("llama")
    folder = scored(tmp_path / "e", model)
    windows = [Sample(f"w{i}", tokens(1, 30, seed=i)[0].tolist(), None, (f"text{i}",)) for i in range(3)]
    plan = spend(make_dose([], [folder], contrast="expertise"), model, [BudgetText("x", windows, 0)], 0.05)
    gains = plan.settings["gains"]
    assert gains["reached"]
    assert {(n.layer, n.index): n.factor for n in plan.neurons} == pytest.approx(by_hand(folder, gains["scale"]))
    ids = torch.tensor([window.input_ids for window in windows])

    def loss():
        with torch.no_grad():
            return float(model(input_ids=ids, labels=ids).loss)

    before = loss()
    with pruned(model, plan):
        rise = loss() - before
    assert 0.04 < torch.tensor(rise).expm1() <= 0.0501


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"general": True}, "contrast=expertise reads the behaviour's scores alone; leave out general"),
        ({"control": "random_matched"}, "control=random_matched goes by general scores"),
        ({"protect": 0.1}, "protect=0.1 goes by general scores"),
        ({"method": "gradient"}, "needs scores by method expertise, not by gradient"),
        ({"contrast": {"class_path": "expertise", "init_args": {"threshold": 0.4}}}, "threshold=0.4 is not from 0.5"),
    ],
)
def test_what_does_not_go_together(tmp_path, changes, match):
    folder = scored(tmp_path / "e", tiny("llama"), method=changes.pop("method", "expertise"))
    general = [folder] if changes.pop("general", False) else []
    with pytest.raises(InputError, match=match):
        make_plan(general, [folder], **(AURA | changes))


def test_from_labelled_prompts_to_a_plan_on_the_command_line(tmp_path, capsys):
    """As published, on the demo: outputs of up, gate and down; then what reads plans and scores knows them."""
    method = json.dumps({"class_path": "expertise", "init_args": {"at": "outputs"}})
    data = [
        "--data.source",
        "demo:prompts",
        "--data.text_field",
        "prompt.text",
        "--data.label_field",
        "prompt.toxicity",
    ]
    words = ["--model.method", method, "--model.granularity", "output", *data, "--data.num_samples", "8"]
    quiet = ["--trainer.logger", "false", "--trainer.accelerator", "cpu", "--trainer.devices", "1"]
    assert main(["score", *words, *quiet, "--output", str(tmp_path / "scores")]) == 0
    plan = ["--contrast", "expertise", "--edit", "gains", "--scale", "1", "--output", str(tmp_path / "plan.json")]
    assert main(["prune", "--behaviour", str(tmp_path / "scores"), *plan]) == 0
    assert main(["audit", str(tmp_path / "scores")]) in (0, 1)
    assert main(["report", str(tmp_path / "scores"), str(tmp_path / "plan.json"), "--output", str(tmp_path / "r")]) == 0
    capsys.readouterr()
    overlap = [str(tmp_path / "plan.json"), "--output", str(tmp_path / "evaluation"), *quiet]
    text = ["--data.prompts_source", "null", "--data.text_max_bytes", "500"]
    assert main(["eval", *text, "--plan", *overlap]) == 0
    assert "perplexity" in capsys.readouterr().out
