"""A user's own component, contrast, scope and edit, by class path, from scores to an edited model and back."""

import json
import subprocess
import sys

import pytest
import torch
from plans import plan_for, same_bits, state
from score_folders import write
from tiny_models import tiny

from sparc3_pl.cli import main
from sparc3_pl.errors import InputError
from sparc3_pl.model.components import COMPONENTS
from sparc3_pl.model.identity import fingerprint
from sparc3_pl.model.structure import mlps
from sparc3_pl.pruning.edit import apply_plan, pruned, revert
from sparc3_pl.pruning.plan import PrunePlan
from sparc3_pl.selection.choose import make_plan
from sparc3_pl.selection.command import _with_kept_values
from sparc3_pl.selection.contrast import SideScores, contrast, named_in_plan

RATIO = {"class_path": "extensions.Ratio", "init_args": {"floor": 0.5}}
GAINS = {"class_path": "extensions.Gains", "init_args": {"strength": 0.5}}


@pytest.fixture
def folders(tmp_path):
    """Scores of the tiny llama's neurons: general, and a behaviour that does not use the last ten of a layer."""
    model = tiny("llama")
    generator = torch.Generator().manual_seed(0)
    sides = []
    for name in ("general", "behaviour"):
        scores = {mlp.up: torch.rand(mlp.width, generator=generator) for mlp in mlps(model)}
        if name == "behaviour":
            for values in scores.values():
                values[-10:] = 0
        sides.append([write(tmp_path / name, scores, model={"pretrained": "demo", "fingerprint": fingerprint(model)})])
    return sides


def by_hand(folders) -> list[tuple[float, str, int]]:
    """Value, layer and index of all that may be chosen, by loops."""
    (general,), (behaviour,) = folders
    found = []
    for layer in general.layers:
        g, b = general.load(layer), behaviour.load(layer)
        found += [(float(g[i] / (b[i] + 0.5)), layer, i) for i in range(len(g)) if b[i] > 0]
    return sorted(found)


def test_a_contrast_and_gains_from_scores_to_the_model(folders, tmp_path):
    plan = make_plan(*folders, num_neurons=6, contrast=RATIO, edit=GAINS)
    expected = by_hand(folders)[:6]
    assert [(n.layer, n.index) for n in plan.neurons] == [entry[1:] for entry in expected]
    assert [n.factor for n in plan.neurons] == pytest.approx([0.5 * value for value, *_ in expected])
    loaded = PrunePlan.load(plan.save(tmp_path / "plan.json"))
    assert loaded.neurons == plan.neurons
    assert (loaded.contrast, loaded.edit) == ("extensions.Ratio", "extensions.Gains")
    assert loaded.summary() == plan.summary()
    assert named_in_plan(loaded.contrast, loaded.settings).floor == 0.5

    model = tiny("llama")
    before = state(model)
    wanted = {name: value.clone() for name, value in before.items()}
    for neuron in plan.neurons:  # its column of the down-projection, by another road
        column = wanted[neuron.layer.replace("up_proj", "down_proj") + ".weight"][:, neuron.index]
        column.copy_((column.double() * neuron.factor).float())
    with pruned(model, loaded):
        assert same_bits(state(model), wanted)
    assert same_bits(state(model), before)


def test_the_command_takes_class_paths(folders, tmp_path):
    """As words and as YAML."""
    sides = [f"--{name}={side[0].path}" for name, side in zip(("general", "behaviour"), folders, strict=True)]
    config = tmp_path / "prune.yaml"
    config.write_text(json.dumps({"edit": GAINS, "contrast": RATIO}))
    words = ["prune", *sides, "--num_neurons=6", f"--output={tmp_path / 'plan.json'}"]
    assert main([*words, f"--config={config}"]) == 0
    expected = make_plan(*folders, num_neurons=6, contrast=RATIO, edit=GAINS)
    assert PrunePlan.load(tmp_path / "plan.json").neurons == expected.neurons
    assert main([*words, "--overwrite", "--edit=extensions.Gains", "--contrast=extensions.Ratio"]) == 0
    plan = PrunePlan.load(tmp_path / "plan.json")
    assert (plan.load_edit().strength, plan.contrast) == (1.0, "extensions.Ratio")


def test_kept_values_of_gains_come_back(folders, tmp_path):
    model = tiny("llama")
    before = state(model)
    plan = _with_kept_values(make_plan(*folders, num_neurons=6, contrast=RATIO, edit=GAINS), model)
    loaded = PrunePlan.load(plan.save(tmp_path / "plan.json"))
    apply_plan(model, loaded)
    revert(model, loaded)
    assert same_bits(state(model), before)


def test_too_few_candidates_are_told_with_the_contrasts_arguments(folders):
    with pytest.raises(InputError, match=r"num_neurons=30, but only 28 of 48 may be chosen \(floor=0.5\)"):
        make_plan(*folders, num_neurons=30, contrast=RATIO)


def test_a_scope(folders):
    plan = make_plan(*folders, num_neurons=5, scope="extensions.FirstLayer")
    assert list(plan.entries) == [folders[0][0].layers[0]]
    assert plan.settings["scope"] == "extensions.FirstLayer"


def test_a_component(tmp_path):
    """Columns of the attention's output projection: the edit touches these and nothing else."""
    model = tiny("llama")
    component = COMPONENTS.make("extensions.InputChannel")
    layers = [group.layer for group in component.groups(model)]
    plan = plan_for(model, [(layers[0], 3), (layers[1], 0), (layers[0], 1)], granularity="extensions.InputChannel")
    loaded = PrunePlan.load(plan.save(tmp_path / "plan.json"))
    assert loaded.unit == "channels"
    before = state(model)
    with pruned(model, loaded):
        after = state(model)
    for name in before:
        expected = before[name].clone()
        if name == f"{layers[0]}.weight":
            expected[:, [1, 3]] = 0
        elif name == f"{layers[1]}.weight":
            expected[:, 0] = 0
        assert torch.equal(after[name], expected)
    assert same_bits(state(model), before)


def test_a_file_imports_nothing_by_itself(folders, tmp_path):
    """In a process of its own, where nobody has imported the module that the plan names."""
    path = make_plan(*folders, num_neurons=3, edit=GAINS).save(tmp_path / "plan.json")
    code = f"from sparc3_pl.pruning.plan import PrunePlan; PrunePlan.load({str(path)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode
    assert "SPARC3_PLUGINS=extensions" in done.stderr


def test_a_plan_without_all_factors_is_refused(folders, tmp_path):
    path = make_plan(*folders, num_neurons=3, edit=GAINS).save(tmp_path / "plan.json")
    data = json.loads(path.read_text())
    del data["sha256"], data["neurons"][1]["factor"]
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match="some neurons of the plan have a factor and some have none"):
        PrunePlan.load(path)


def test_a_contrast_whose_values_are_not_finite_is_refused(folders):
    """They would sort to one end of the choice."""
    sides = [SideScores.of(side) for side in folders]
    with pytest.raises(InputError, match=r"contrast=extensions.Ratio: layer .* values that are not finite"):
        list(contrast({"class_path": "extensions.Ratio", "init_args": {"floor": float("nan")}}, *sides)())
