"""Contrast ``budget`` and edit ``gains``: the derivation, the steps, the search, the plan, the edited model."""

import json
import math
from dataclasses import asdict

import extensions
import pytest
import torch
from plans import same_bits, state
from score_folders import write
from tiny_models import tiny, tokens

from sparc3_pl.cli import main
from sparc3_pl.data.sources import listed_records
from sparc3_pl.errors import InputError
from sparc3_pl.model.identity import fingerprint
from sparc3_pl.model.loading import load_model, models_kept
from sparc3_pl.model.source import ModelSource
from sparc3_pl.passes.parser import function_parser
from sparc3_pl.pruning.edit import apply_plan, pruned, revert
from sparc3_pl.pruning.plan import PrunePlan, TextRise, entries_of
from sparc3_pl.pruning.save import save_pruned, shrink
from sparc3_pl.scores.folder import ScoreFolder
from sparc3_pl.selection.budget import fisher_per_token
from sparc3_pl.selection.choose import make_dose, make_plan
from sparc3_pl.selection.command import _with_kept_values, prune
from sparc3_pl.selection.contrast import CONTRASTS, SideScores
from sparc3_pl.selection.dose import BudgetSource, _Rises, forecast_scale, held_back, search_scale, spend

KINDS = {
    "model.layers.0.mlp.up_proj": "neuron",
    "model.layers.0.self_attn.o_proj": "channel",
    "model.layers.1.mlp.up_proj": "neuron",
}
WIDTHS = {"neuron": 24, "channel": 32}
GENERAL = {
    "signed": True,
    "at_values": True,
    "method": "gradient",
    "target": "text",
    "target_args": {"labels": "model"},
}
BEHAVIOUR = {"signed": True, "at_values": True, "method": "gradient", "target": "completion"}
WEIGHED = {"source": "demo", "seed": 0, "sample_ids": [], "weight_field": "scores.toxicity", "weight_baseline": "mean"}


def random(seed, power=1):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(WIDTHS[kind], generator=generator).abs() ** power for name, kind in KINDS.items()}


def signed(seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(WIDTHS[kind], generator=generator) * 0.01 for name, kind in KINDS.items()}


def made_of(name):
    return [{"id": f"{name}{i}", "num_tokens": 9, "text_ids": [f"text of {name}{i}"]} for i in range(4)]


def general_folder(path, seed, model, **fields):
    about = {"granularity": "neuron+channel", "components": KINDS, "model": model, **GENERAL}
    about |= {"num_samples": 4, "num_tokens": 36 + 8 * seed, "samples": made_of(path.name), **fields}
    return write(path, signed(seed), random(100 + seed, 2), **about)


def behaviour_folder(path, seed, model, **fields):
    about = {"granularity": "neuron+channel", "components": KINDS, "model": model, "data": WEIGHED, **BEHAVIOUR}
    return write(path, signed(seed), random(200 + seed, 2), **(about | fields))


@pytest.fixture
def about():
    return {"pretrained": "demo", "fingerprint": fingerprint(tiny("llama"))}


@pytest.fixture
def sides(tmp_path, about):
    """General folders of two kinds of text, and a behaviour."""
    general = [general_folder(tmp_path / f"g{i}", i, about) for i in range(2)]
    return general, [behaviour_folder(tmp_path / "b", 9, about)]


def by_hand(sides, ridge=0.1, fisher=True, weights=None):
    """Derivative, Fisher information and step of every component, by loops over Python's floats."""
    general, (behaviour,) = sides
    derivatives, costs = {}, {}
    for layer, kind in KINDS.items():
        for i in range(WIDTHS[kind]):
            per_text = []
            for folder in general:
                tokens_per_sample = (
                    folder.manifest.num_tokens - folder.manifest.num_samples
                ) / folder.manifest.num_samples
                per_text.append(float(folder.load_squares(layer)[i]) / tokens_per_sample)
            mean = sum(per_text) / len(per_text)
            if weights is not None:
                mean = sum(w * cost for w, cost in zip(weights, per_text, strict=True)) / sum(weights)
            costs[layer, i] = mean if fisher else 1.0
            derivatives[layer, i] = float(behaviour.load(layer)[i])
    mean = sum(costs.values()) / len(costs)
    steps = {key: -derivatives[key] / (costs[key] + ridge * mean) for key in costs}
    return derivatives, costs, steps


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.0, 2.0), (-0.5, 1.0)])
def test_factors_are_those_of_a_loop(sides, low, high):
    derivatives, costs, steps = by_hand(sides)
    contrast = {"class_path": "budget", "init_args": {"gains_range": [low, high]}}
    plan = make_plan(*sides, contrast=contrast, edit="gains", scale=7.0)
    wanted = {key: min(max(1 + 7.0 * step, low), high) for key, step in steps.items()}
    moved = {key: factor for key, factor in wanted.items() if factor != 1}
    assert {(n.layer, n.index): n.factor for n in plan.neurons} == pytest.approx(moved, rel=1e-5)
    assert len(moved) < len(wanted) if high == 1 else len(moved) == len(wanted)
    assert (plan.granularity, plan.num_candidates, plan.warnings) == ("neuron+channel", 80, [])
    change = sum(derivatives[key] * (factor - 1) for key, factor in wanted.items())
    rise = 0.5 * sum(costs[key] * (factor - 1) ** 2 for key, factor in wanted.items())
    gains = plan.settings["gains"]
    assert (gains["predicted_change"], gains["predicted_rise"]) == pytest.approx((change, rise), rel=1e-5)
    assert change < 0


@pytest.mark.parametrize("ridge", [0.1, 2.0])
def test_the_largest_effect_per_cost_is_chosen_first(sides, ridge):
    derivatives, _, steps = by_hand(sides, ridge)
    ranked = sorted((derivatives[key] * step, *key) for key, step in steps.items() if step < 0)
    contrast = {"class_path": "budget", "init_args": {"ridge": ridge}}
    plan = make_plan(*sides, contrast=contrast, edit="gains", scale=1.0, num_neurons=10)
    assert [(n.layer, n.index) for n in plan.neurons] == [entry[1:] for entry in ranked[:10]]
    assert [n.score for n in plan.neurons] == pytest.approx([entry[0] for entry in ranked[:10]], rel=1e-5)


def test_without_fisher_the_steps_follow_the_gradient(sides):
    contrast = {"class_path": "budget", "init_args": {"fisher": False}}
    derivatives, _, _ = by_hand(sides)
    plan = make_plan(*sides, contrast=contrast, edit="gains", scale=1.0)
    ratio = [(1 - n.factor) / derivatives[n.layer, n.index] for n in plan.neurons]
    assert ratio == pytest.approx([ratio[0]] * len(ratio), rel=1e-4)
    assert plan.settings["gains"]["predicted_rise"] is None


@pytest.mark.parametrize(("given", "of_folders"), [([3, 1], (3, 1)), ([0.2], (0.2, 0.2)), ([0, 5], (0, 5))])
def test_kinds_of_general_text_count_by_their_weights(sides, given, of_folders):
    _, _, steps = by_hand(sides, weights=of_folders)
    contrast = {"class_path": "budget", "init_args": {"weights": given}}
    plan = make_plan(*sides, contrast=contrast, edit="gains", scale=7.0)
    wanted = {key: max(1 + 7.0 * step, 0.0) for key, step in steps.items() if step < 0}
    assert {(n.layer, n.index): n.factor for n in plan.neurons} == pytest.approx(wanted, rel=1e-5)
    assert plan.settings["weights"] == given


def test_no_other_change_of_that_cost_lowers_more(sides):
    """The step is the steepest descent in the metric (F + ridge): any other of the same length lowers a . d less."""
    derivatives, costs, steps = by_hand(sides)
    mean = sum(costs.values()) / len(costs)
    a, metric, d = (
        torch.tensor(list(v)) for v in (derivatives.values(), [c + 0.1 * mean for c in costs.values()], steps.values())
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        other = d + 0.1 * d.abs().mean() * torch.randn(len(d), generator=generator)
        other *= ((metric * d * d).sum() / (metric * other * other).sum()).sqrt()
        assert a @ other > a @ d


# --- what components cost together ------------------------------------------------------------------------------------


def whole_cost(sides, ridge, off_diagonal):
    """The matrix of the cost, entry by entry, from each folder's groups."""
    general, _ = sides
    _, costs, _ = by_hand(sides)
    mean, keys = sum(costs.values()) / len(costs), list(costs)
    cost = torch.zeros(len(keys), len(keys), dtype=torch.float64)
    for folder in general:
        tokens = folder.manifest.num_tokens - folder.manifest.num_samples
        for group, size in enumerate(folder.manifest.group_sizes):
            sums = [float(folder.load_groups(layer)[group, i]) * size for layer, i in keys]
            for i, one in enumerate(sums):
                for j, other in enumerate(sums):
                    cost[i, j] += off_diagonal * one * other / tokens / len(general)
    for i, key in enumerate(keys):
        cost[i, i] += (1 - off_diagonal) * costs[key] + ridge * mean
    return keys, cost


@pytest.fixture
def grouped_sides(tmp_path, about):
    """As ``sides``, the general folders with groups of one and two samples."""
    general = []
    for i, sizes in enumerate([[1, 1, 1, 1], [2, 1, 1]]):
        draws = [{name: 100 * one for name, one in signed(70 + 9 * i + g).items()} for g in range(len(sizes))]
        groups = {name: torch.stack([draw[name] for draw in draws]) for name in KINDS}
        general.append(general_folder(tmp_path / f"g{i}", i, about, groups=groups, group_sizes=sizes))
    return general, [behaviour_folder(tmp_path / "b", 9, about)]


@pytest.mark.parametrize("off_diagonal", [0.5, 1.0])
@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.0, 2.0), (1.0, 3.0)])
def test_the_step_is_the_best_of_its_range_for_what_components_cost_together(grouped_sides, off_diagonal, low, high):
    """The conditions of Karush, Kuhn and Tucker, by the whole matrix; without a bound the solution of H d = -a."""
    keys, cost = whole_cost(grouped_sides, 0.1, off_diagonal)
    derivatives, _, alone = by_hand(grouped_sides)
    a = torch.tensor([derivatives[key] for key in keys], dtype=torch.float64)
    contrast = CONTRASTS.make(
        {"class_path": "budget", "init_args": {"off_diagonal": off_diagonal, "gains_range": [low, high]}}
    )
    general, behaviour = (SideScores.of(folders) for folders in grouped_sides)
    steps = contrast.steps(general, behaviour)
    d = torch.cat([steps[layer] for layer in general.layers])
    order = [(layer, i) for layer in general.layers for i in range(WIDTHS[KINDS[layer]])]
    d = d[torch.tensor([order.index(key) for key in keys])]
    exact = torch.linalg.solve(cost, -a)
    slope = a + cost @ d
    if low < 1 < high:
        torch.testing.assert_close(d, exact, rtol=0, atol=5e-3 * float(exact.abs().max()))
    else:
        side = -1 if high == 1 else 1
        assert (side * d >= 0).all() and 5 < int((d != 0).sum()) < len(d)
        assert float(slope[d != 0].abs().max()) < 0.02 * float(a.abs().max())
        assert (side * slope[d == 0] >= -0.02 * float(a.abs().max())).all()
    step = torch.tensor([min(alone[key], 0) if high == 1 else alone[key] for key in keys], dtype=torch.float64)
    if (low, high) != (1.0, 3.0):  # at the same cost it lowers more than what each costs alone would say
        step *= ((d @ cost @ d) / (step @ cost @ step)).sqrt()
        assert a @ d < 1.001 * (a @ step) < 0


def test_the_predicted_rise_counts_what_components_cost_together(grouped_sides):
    keys, cost = whole_cost(grouped_sides, 0.0, 0.7)
    contrast = {"class_path": "budget", "init_args": {"off_diagonal": 0.7}}
    dose = make_dose(*grouped_sides, contrast=contrast)
    plan = dose.at(0.5)
    factors = {(n.layer, n.index): n.factor for n in plan.neurons}
    d = torch.tensor([factors.get(key, 1.0) - 1 for key in keys], dtype=torch.float64)
    assert plan.settings["gains"]["predicted_rise"] == pytest.approx(float(0.5 * d @ cost @ d), rel=1e-4)
    scale = dose.predicted_scale(1e-4)
    assert dose.at(scale).settings["gains"]["predicted_rise"] == pytest.approx(1e-4, rel=1e-4)
    assert plan.settings["off_diagonal"] == 0.7


def test_what_components_cost_together_needs_groups(sides):
    contrast = {"class_path": "budget", "init_args": {"off_diagonal": 0.5}}
    with pytest.raises(InputError, match="needs groups of the general samples, the more the better; score again"):
        make_dose(*sides, contrast=contrast)


def test_the_step_follows_the_mean_derivative_of_several_rounds(sides, about, tmp_path):
    """The second folder's is that of an edited model; every other contrast refuses to average the two."""
    general, (first,) = sides
    second = behaviour_folder(tmp_path / "b2", 11, about, plan="ab12")
    _, costs, _ = by_hand(sides)
    mean = sum(costs.values()) / len(costs)
    plan = make_plan(general, [first, second], contrast="budget", edit="gains", scale=3.0)
    wanted = {}
    for (layer, i), cost in costs.items():
        derivative = (float(first.load(layer)[i]) + float(second.load(layer)[i])) / 2
        wanted[layer, i] = max(1 - 3.0 * derivative / (cost + 0.1 * mean), 0.0)
    moved = {key: factor for key, factor in wanted.items() if factor < 1}
    assert {(n.layer, n.index): n.factor for n in plan.neurons} == pytest.approx(moved, rel=1e-5)
    with pytest.raises(InputError, match=r"plan=None in .* but ab12 in"):
        make_plan(general, [first, second], contrast="difference", num_neurons=3)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [({"off_diagonal": 1.5}, "is not a share from 0 to 1"), ({"off_diagonal": 0.5, "fisher": False}, "is about costs")],
)
def test_shares_of_the_off_diagonal_that_are_refused(arguments, match):
    with pytest.raises(InputError, match=match):
        CONTRASTS.make({"class_path": "budget", "init_args": arguments})


# --- the Fisher information -------------------------------------------------------------------------------------------


def gain(model, layer, index, factor):
    down = model.get_submodule(layer.replace("up_proj", "down_proj"))
    down.weight.data[:, index] *= factor


def test_squares_of_summed_derivatives_are_the_cost_of_a_change(tmp_path):
    """Exact expectations over all labels instead of draws, against the measured divergence of an edited model."""
    layer, index, (ids,) = "model.layers.1.mlp.up_proj", 5, tokens(1, 6)
    model = tiny("llama").double()
    alpha = torch.ones((), dtype=torch.float64, requires_grad=True)
    down = model.get_submodule(layer.replace("up_proj", "down_proj"))

    def scale(_, inputs):
        factor = torch.ones(inputs[0].shape[-1], dtype=torch.float64)
        return (inputs[0] * torch.cat([factor[:index], alpha[None], factor[index + 1 :]]),)

    hook = down.register_forward_pre_hook(scale)
    logits = model(input_ids=ids[None]).logits[0, :-1]
    log_p = logits.log_softmax(-1)
    slopes = torch.stack(
        [torch.stack([torch.autograd.grad(v, alpha, retain_graph=True)[0] for v in row]) for row in log_p]
    )
    hook.remove()
    p = log_p.detach().exp()
    assert (p * slopes).sum(1).abs().max() < 1e-6  # each position's derivative has mean 0
    mean_square = (p * slopes**2).sum()  # of the sum over positions: independent labels add their variances
    folder = write(
        tmp_path / "f", {layer: torch.zeros(24)}, {layer: torch.full((24,), float(mean_square))},
        num_samples=1, num_tokens=len(ids), **GENERAL,
    )  # fmt: skip
    fisher = float(fisher_per_token(folder, layer)[index])
    assert fisher == pytest.approx(float((p * slopes**2).sum(1).mean()), rel=1e-6)
    for change in (-0.1, 0.1):
        edited = tiny("llama").double()
        gain(edited, layer, index, 1 + change)
        with torch.no_grad():
            other = edited(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
        divergence = float((p * (log_p.detach() - other)).sum(1).mean())
        assert divergence == pytest.approx(0.5 * fisher * change**2, rel=0.05)


# --- the search -------------------------------------------------------------------------------------------------------


def cheap(c):
    return 0.3 * c**2 - 0.001 * c


def dear(c):
    return 0.5 * c**2 + 0.002 * c**3 - 0.002 * c


@pytest.mark.parametrize("start", [0.01, 1.0, 50.0])
def test_the_search_finds_what_a_fine_grid_finds(start):
    search = search_scale(lambda c: (cheap(c), dear(c)), 0.01, start)
    grid = max(c / 1e5 for c in range(1, 100_000) if max(cheap(c / 1e5), dear(c / 1e5)) <= 0.01)
    assert search.reached
    assert 0.97 * grid < search.scale <= grid
    assert 0.0097 <= max(search.rises) <= 0.01
    assert len(search.trials) <= 10


@pytest.mark.parametrize("power", [1.8, 2.0, 2.2])
def test_a_search_that_begins_within_a_factor_of_two_needs_three_trials(power):
    """Each is a pass over all held-back text; the loss of a real model is nearly quadratic in the scale."""
    for start in (0.6, 0.8, 1.3, 2.0):
        search = search_scale(lambda c: (0.01 * c**power,), 0.01, start)
        assert search.reached
        assert len(search.trials) <= 3


@pytest.mark.parametrize("start", [0.7, 0.9, 1.2, 1.4])
def test_a_search_that_knows_how_other_text_is_curved_needs_two_trials(start):
    """Texts of a kind differ in how their loss begins; here one falls at first, so that its square alone misleads."""

    def other(c):
        return 0.012 * c**2 + 0.001 * c, 0.006 * c**2

    def these(c):
        return 0.012 * c**2 - 0.003 * c, 0.006 * c**2 + 0.001 * c

    alike = [(c, other(c)) for c in (0.5, 2.0)]
    assert len(search_scale(these, 0.01, start).trials) > 2
    search = search_scale(these, 0.01, start, alike=alike)
    assert search.reached
    assert len(search.trials) == 2


def test_the_forecast_is_that_of_the_text_which_meets_the_budget_first():
    trials = [(c, (0.01 * c**2 + 0.01 * c, 0.04 * c**2)) for c in (0.1, 0.2)]
    assert forecast_scale(trials, 1e-4) == pytest.approx((math.sqrt(1e-4 + 4e-6) - 0.01) / 0.02)  # the first
    assert forecast_scale(trials, 1.0) == pytest.approx(5.0)  # the second
    assert forecast_scale([(1.0, (-0.1, math.inf))], 0.01) == math.inf


def test_a_budget_that_the_range_cannot_use_up():
    search = search_scale(lambda c: (min(c, 3.0) * 1e-3,), 0.01, 0.5, largest=3.0)
    assert (search.scale, search.rises, search.reached) == (3.0, (3e-3,), False)


def test_a_model_that_breaks_is_too_far():
    search = search_scale(lambda c: (c**2 if c < 1 else math.inf,), 0.01, 40.0)
    assert search.reached
    assert search.scale <= 0.1


def test_a_hopeless_budget_gives_no_scale():
    assert search_scale(lambda c: (1.0,), 0.01, 1.0).scale == 0


def test_the_search_begins_where_the_prediction_meets_the_budget(sides):
    dose = make_dose(*sides)
    assert dose.at(dose.predicted_scale(0.004)).settings["gains"]["predicted_rise"] == pytest.approx(0.004)
    far = dose.at(dose.largest_scale())
    assert {n.factor for n in far.neurons} == {0.0}
    assert any(n.factor > 0 for n in dose.at(0.99 * dose.largest_scale()).neurons)


# --- controls ---------------------------------------------------------------------------------------------------------


def test_permuted_deals_out_the_factors_of_each_layer(sides):
    plan = make_plan(*sides, contrast="budget", edit="gains", scale=7.0)
    control, again, other = (
        make_plan(*sides, contrast="budget", edit="gains", scale=7.0, control="permuted", seed=seed)
        for seed in (1, 1, 2)
    )
    assert control.counts() == plan.counts()
    for layer in plan.entries:
        factors = [sorted(p.entries[layer].factor.tolist()) for p in (plan, control)]
        assert factors[0] == factors[1]
    places = [{(n.layer, n.index): n.factor for n in p.neurons} for p in (plan, control, again, other)]
    assert places[1] == places[2]
    assert places[0] != places[1] != places[3]
    assert control.control == "permuted"


def test_a_part_of_a_plan_does_not_claim_what_the_whole_was_predicted_to_do(sides):
    text = asdict(TextRise("a", 3.0, 3.01, 0.01, num_windows=2, num_tokens=9, num_left_out=0))
    plan = make_dose(*sides).at(0.5, {"budget": 0.01, "texts": [text]})
    part = plan.first(3)
    assert part.settings == plan.settings | {"gains": {"scale": 0.5}}
    assert [neuron.factor for neuron in part.neurons] == [neuron.factor for neuron in plan.neurons[:3]]


def test_matched_components_get_the_factors(sides):
    arguments = {"contrast": "budget", "edit": "gains", "scale": 7.0, "num_neurons": 12}
    plan, control = (make_plan(*sides, **arguments, control=name) for name in (None, "random_matched"))
    assert [n.factor for n in plan.neurons] == [n.factor for n in control.neurons]
    assert [n.layer for n in plan.neurons] == [n.layer for n in control.neurons]
    assert not {(n.layer, n.index) for n in plan.neurons} & {(n.layer, n.index) for n in control.neurons}
    _, costs, _ = by_hand(sides)
    distance = [
        abs(costs[a.layer, a.index] - costs[b.layer, b.index])
        for a, b in zip(plan.neurons, control.neurons, strict=True)
    ]
    assert sum(distance) / 12 < sum(costs.values()) / len(costs)  # of similar Fisher information


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("side", "fields", "match"),
    [
        ("general", {"signed": False}, "needs signed scores; score again with --model.signed true"),
        ("behaviour", {"signed": False}, "needs signed scores"),
        ("general", {"method": "wanda"}, "needs scores by gradient or lrp, not by wanda"),
        ("general", {"target": "predicted"}, "labels drawn from the model, not target predicted"),
        ("general", {"target_args": {"labels": "data"}}, "labels drawn from the model"),
        ("behaviour", {"target": "predicted"}, "needs the derivative of the behaviour itself, not of target predicted"),
        ("behaviour", {"at_values": False}, "needs derivatives by gains, read where the components' values are read"),
        ("general", {"method": "attribution_patching"}, "gradient or lrp, not by attribution_patching"),
        ("general", {"method": f"{extensions.__name__}.Squared"}, "gradient or lrp, not by extensions.Squared"),
        ("behaviour", {"method": "lrp"}, "method=gradient in .* but lrp in"),
        ("general", {"num_samples": 36}, "no sample has a second token"),
        ("general", {"plan": "ab12"}, "these are scores of an edited one; score general text again without --plan"),
    ],
)
def test_scores_that_are_not_what_it_needs(tmp_path, about, side, fields, match):
    fields = {"num_tokens": 36, **fields} if side == "general" else fields
    general = general_folder(tmp_path / "g", 0, about, **(fields if side == "general" else {}))
    behaviour = behaviour_folder(tmp_path / "b", 9, about, **(fields if side == "behaviour" else {}))
    with pytest.raises(InputError, match=match) as caught:
        make_dose([general], [behaviour])
    assert "\n" not in str(caught.value)


def test_scores_by_a_gradient_of_the_users_own_are_taken(tmp_path, about):
    own = {"method": f"{extensions.__name__}.Smoothed", "method_args": {"draws": 3}}
    general, behaviour = (
        make(tmp_path / side, 0, about, **own)
        for side, make in (("general", general_folder), ("behaviour", behaviour_folder))
    )
    assert make_dose([general], [behaviour]).plan.neurons


def test_squares_are_needed_for_the_fisher_information_only(tmp_path, about, sides):
    bare = write(tmp_path / "n", signed(3), granularity="neuron+channel", components=KINDS, model=about, **GENERAL)
    with pytest.raises(InputError, match="needs the squares of general scores"):
        make_dose([bare], sides[1])
    assert make_dose([bare], sides[1], contrast={"class_path": "budget", "init_args": {"fisher": False}}).fisher is None


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"edit": "zero"}, "give both or neither"),
        ({"contrast": "t"}, "does not say how far to turn a component"),
        ({"scale": None}, "edit=gains needs a scale, or a budget"),
        ({"scale": -1.0}, "scale=-1.0 of edit=gains is not a number above 0"),
        ({"control": "random"}, "control=random gives no factors"),
        ({"control": "null"}, "control=null gives no factors"),
        ({"contrast": {"class_path": "budget", "init_args": {"gains_range": [0.5, 0.9]}}}, "with 1 between them"),
        ({"contrast": {"class_path": "budget", "init_args": {"gains_range": [0.5]}}}, "give two numbers"),
        ({"contrast": {"class_path": "budget", "init_args": {"ridge": 0}}}, "ridge=0 is not a number above 0"),
        (
            {"contrast": {"class_path": "budget", "init_args": {"weights": [1, 2, 3]}}},
            "3 weights for 2 general folders",
        ),
        ({"contrast": {"class_path": "budget", "init_args": {"weights": [0, 0]}}}, r"weights=\[0, 0\]: give a number"),
        (
            {"contrast": {"class_path": "budget", "init_args": {"weights": [1, -1]}}},
            r"weights=\[1, -1\]: give a number",
        ),
        (
            {"contrast": {"class_path": "budget", "init_args": {"weights": [1, 2], "fisher": False}}},
            "are about costs, which fisher=false leaves out",
        ),
        (
            {"contrast": "t", "edit": "zero", "scale": None, "control": "permuted", "num_neurons": 3},
            "use random_matched",
        ),
        ({"contrast": "general", "edit": "zero", "num_neurons": 3}, "scale=1.0 is for edit=gains"),
    ],
)
def test_arguments_that_do_not_go_together(sides, arguments, match):
    with pytest.raises(InputError, match=match):
        make_plan(*sides, **({"contrast": "budget", "edit": "gains", "scale": 1.0} | arguments))


def test_completions_without_weights_are_told(tmp_path, about, sides):
    plain = behaviour_folder(tmp_path / "p", 9, about, data={"source": "demo", "sample_ids": []})
    (warning,) = make_dose(sides[0], [plain]).plan.warnings
    assert "the completions have no weights" in warning


# --- the edited model -------------------------------------------------------------------------------------------------


def test_what_is_multiplied_and_put_back(tmp_path, sides):
    plan = make_plan(*sides, contrast="budget", edit="gains", scale=7.0)
    model = tiny("llama")
    before = state(model)
    wanted = {name: value.clone() for name, value in before.items()}
    for neuron in plan.neurons:  # its reading column, by another road
        column = wanted[neuron.layer.replace("up_proj", "down_proj") + ".weight"][:, neuron.index]
        column.copy_((column.double() * neuron.factor).float() if neuron.factor else torch.zeros_like(column))
    loaded = PrunePlan.load(plan.save(tmp_path / "plan.json"))
    assert loaded.neurons == plan.neurons
    assert loaded.summary() == plan.summary()
    with pruned(model, loaded) as applied:
        assert same_bits(state(model), wanted)
        zeros = {(part.layer, i) for part in applied.zeroed for i in part.index.tolist()}
        assert len(zeros) == sum(n.factor == 0 for n in plan.neurons) > 0
    assert same_bits(state(model), before)
    saved = save_pruned(model, None, loaded, tmp_path / "model")
    assert saved.max_difference == 0
    kept = _with_kept_values(loaded, model)
    with pruned(model, loaded):
        revert(model, kept)
        assert same_bits(state(model), before)


def test_a_long_list_lies_beside_the_plan(tmp_path, sides, monkeypatch):
    plan = make_plan(*sides, contrast="budget", edit="gains", scale=7.0)
    monkeypatch.setattr("sparc3_pl.pruning.plan._MANY", 20)
    path = plan.save(tmp_path / "plan.json")
    assert json.loads(path.read_text())["neurons"] == []
    assert {file.name for file in tmp_path.glob("plan*")} == {"plan.json", "plan.listed.safetensors"}
    loaded = PrunePlan.load(path)
    assert loaded.neurons == plan.neurons
    assert loaded.summary() == plan.summary()
    model = tiny("llama")
    with pruned(model, plan):
        wanted = state(model)
    with pruned(model, loaded):
        assert same_bits(state(model), wanted)
    (tmp_path / "plan.listed.safetensors").write_bytes(b"0")
    with pytest.raises(InputError, match="does not match the sha256"):
        PrunePlan.load(path)


def test_only_factors_of_zero_can_be_removed(sides):
    contrast = {"class_path": "budget", "init_args": {"fisher": False}}
    arguments = {"contrast": contrast, "edit": "gains", "layers": ["*.up_proj"], "num_neurons": 8, "scope": "layer"}
    with pytest.raises(InputError, match=r"shrink removes neurons by edit=zero or mean \(or gains of 0\)"):
        shrink(tiny("llama"), make_plan(*sides, **arguments, scale=1.0))
    smaller = shrink(tiny("llama"), make_plan(*sides, **arguments, scale=1e9))
    assert smaller.config.intermediate_size == 20


def test_zeros_are_held_and_the_others_train_on(sides):
    plan = make_plan(*sides, contrast="budget", edit="gains", scale=7.0)
    model = tiny("llama")
    applied = apply_plan(model, plan)
    for parameter in model.parameters():
        parameter.data += 1.0
    applied.hold()
    for neuron in plan.neurons:
        column = model.get_submodule(neuron.layer.replace("up_proj", "down_proj")).weight[:, neuron.index]
        assert bool((column == 0).all()) == (neuron.factor == 0)


def test_a_gains_plan_without_factors_is_refused(sides):
    plan = make_plan(*sides, contrast="budget", edit="gains", scale=7.0)
    bare = entries_of([type(n)(n.layer, n.index, n.score) for n in plan.neurons])
    with pytest.raises(InputError, match="edit=gains needs a factor for each component"):
        apply_plan(tiny("llama"), type(plan)(**{**vars(plan), "entries": bare}))


# --- with the demo's model --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo_folders(tmp_path_factory):
    """Scores of the demo's neurons: made up, but for texts that the demo's text must leave out."""
    from sparc3_pl.data.encoding import load_encoder
    from sparc3_pl.data.texts import TextQuery
    from sparc3_pl.model.loading import load_model
    from sparc3_pl.model.source import ModelSource
    from sparc3_pl.model.structure import mlps

    folder = tmp_path_factory.mktemp("demo")
    model, encoder = load_model(ModelSource()), load_encoder(ModelSource())
    generator = torch.Generator().manual_seed(0)
    layers = {mlp.up: mlp.width for mlp in mlps(model)}
    derivative = {name: torch.randn(width, generator=generator) for name, width in layers.items()}
    squares = {name: torch.rand(width, generator=generator) for name, width in layers.items()}
    texts = [text for _, text in zip(range(30), TextQuery("demo", "text", seed=0).texts(), strict=False)]
    samples = [{"id": f"s{i}", "num_tokens": 9, "text_ids": [encoder.identity(t)]} for i, t in enumerate(texts)]
    about = {"model": {"pretrained": "demo", "fingerprint": fingerprint(model), "revision": None}}
    write(folder / "general", derivative, squares, samples=samples, num_samples=30, num_tokens=270, **about, **GENERAL)
    write(folder / "behaviour", derivative, data=WEIGHED, **about, **BEHAVIOUR)
    return folder, model, encoder


WORDS = ["--contrast", "budget", "--edit", "gains", "--budget_windows", "3", "--budget_length", "64"]


def test_the_command_finds_the_scale_that_the_budget_allows(demo_folders, tmp_path, capsys):
    folder, model, encoder = demo_folders
    before = state(model)
    sides = ["--general", str(folder / "general"), "--behaviour", str(folder / "behaviour"), *WORDS]
    words = [*sides, "--budget", "0.02", "--budget_text", "demo", "demo:text", "--output", str(tmp_path / "plan.json")]
    assert main(["prune", *words, "--save_model", str(tmp_path / "model")]) == 0
    plan = PrunePlan.load(tmp_path / "plan.json")
    gains = plan.settings["gains"]
    assert gains["reached"]
    assert 0.019 < max(text["rise"] for text in gains["texts"]) <= 0.02
    assert gains["texts"][0]["num_left_out"] > 0
    assert "perplexity of held-back text" in capsys.readouterr().out

    def loss(windows):  # by the library's own loss
        ids = torch.tensor([window.input_ids for window in windows])
        with torch.no_grad():
            return float(model(input_ids=ids, labels=ids).loss)

    general = [ScoreFolder.open(folder / "general")]
    held = held_back(
        [BudgetSource.of("demo"), BudgetSource.of("demo:text")], encoder, general, num_windows=3, length=64
    )
    names = {name for text in held for window in text.windows for name in window.text_ids}
    assert names
    assert plan.budget_samples == sorted(names)
    for source, told in zip(("demo", "demo:text"), gains["texts"], strict=True):
        (text,) = held_back([BudgetSource.of(source)], encoder, general, num_windows=3, length=64)
        assert told["num_tokens"] == 3 * 63
        used = {name for sample in general[0].samples() for name in sample.text_ids}
        assert not used & {name for window in text.windows for name in window.text_ids}
        plain = loss(text.windows)
        with pruned(model, plan):
            edited = loss(text.windows)
        assert told["nll_before"] == pytest.approx(plain, rel=1e-5)
        assert math.exp(edited - plain) - 1 == pytest.approx(told["rise"], rel=1e-3)
    assert same_bits(state(model), before)

    by_path = ['{"class_path": "sparc3_pl.pruning.gains.Gains"}' if word == "gains" else word for word in sides]
    control = [*by_path, "--scale", str(gains["scale"]), "--budget_text", "demo", "--control", "permuted"]
    assert main(["prune", *control, "--output", str(tmp_path / "control.json")]) == 0
    other = PrunePlan.load(tmp_path / "control.json").settings["gains"]
    assert (other["scale"], other["budget"], other["reached"]) == (gains["scale"], None, None)
    assert other["texts"][0]["nll_before"] == gains["texts"][0]["nll_before"]


def test_texts_of_a_budget_have_the_keys_of_other_texts(demo_folders, monkeypatch):
    """Of a hub data set subset and split are asked for; a text's own field and filter go before those of all."""
    encoder = demo_folders[2]
    lines = [{"body": {"text": f"{kind} line {n} of some plain English words"}, "kind": kind} for n in range(90)
             for kind in ("kept", "left out")]  # fmt: skip
    asked = []

    def records(source, *, split, subset, seed, key):
        asked.append((source, split, subset, key))
        return listed_records(lines, source)

    monkeypatch.setattr("sparc3_pl.data.texts.read_records", records)
    spec = {"source": "allenai/c4", "subset": "en", "split": "validation", "field": "body.text"}
    spec["filter"] = 'kind == "kept"'
    source = BudgetSource.of(spec, "text", "kind == 1")
    (text,) = held_back([source], encoder, [], num_windows=2, length=32)
    assert asked == [("allenai/c4", "validation", "en", "budget_text")]
    assert text.source == "c4 (en, validation)"
    assert all("left" not in encoder.decode(window.input_ids) for window in text.windows)
    assert BudgetSource.of("demo", "body.text", "kind == 1") == BudgetSource(
        "demo", None, "train", "body.text", "kind == 1"
    )
    assert BudgetSource.of("demo:text").name == "demo:text"


def test_texts_of_a_budget_on_the_command_line():
    parser = function_parser(prune, "sparc3 prune")
    given = parser.parse_args(["--budget_text", "web.jsonl", "{source: allenai/c4, subset: en}", "demo:text"])
    assert given.budget_text == ["web.jsonl", {"source": "allenai/c4", "subset": "en"}, "demo:text"]


def test_scores_are_read_once(sides, monkeypatch):
    """Ranking, steps and predictions need both sides several times."""
    reads = []
    blocks, squares = ScoreFolder.blocks, ScoreFolder.load_squares
    monkeypatch.setattr(
        ScoreFolder, "blocks", lambda f, layer, *a: reads.append((f.path.name, layer)) or blocks(f, layer, *a)
    )
    monkeypatch.setattr(
        ScoreFolder, "load_squares", lambda f, layer: reads.append((f.path.name, layer)) or squares(f, layer)
    )
    make_dose(*sides, num_neurons=9)
    assert sorted(reads) == sorted((name, layer) for name in ("g0", "g1", "b") for layer in KINDS)


def test_ranks_that_share_the_model_out_find_the_same_scale(demo_folders, tmp_path, ranks):
    folder, _, _ = demo_folders
    sides = ["--general", str(folder / "general"), "--behaviour", str(folder / "behaviour"), *WORDS]
    text = ["--budget", "0.02", "--budget_text", "demo:text", "--budget_windows", "2", "--budget_length", "96"]
    assert main(["prune", *sides, *text, "--output", str(tmp_path / "one.json")]) == 0
    started = ranks.start(["prune", *sides, *text, "--device", "sharded", "--output", tmp_path / "two.json"], 2)
    assert [rank.wait() for rank in started] == [0, 0], "\n".join(rank.text() for rank in started)
    one, two = (PrunePlan.load(tmp_path / name) for name in ("one.json", "two.json"))
    assert two.settings["gains"]["scale"] == pytest.approx(one.settings["gains"]["scale"], rel=1e-6)
    for layer, entries in one.entries.items():
        torch.testing.assert_close(two.entries[layer].factor, entries.factor, rtol=1e-6, atol=1e-9)


def test_a_model_that_lies_on_the_disk_in_part_gives_the_same_scale(demo_folders, tmp_path, monkeypatch):
    from sparc3_pl.model import loading

    places = {f"model.layers.{number}": "disk" if number == 2 else "cpu" for number in range(4)}
    places |= dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    real = loading._load_options
    monkeypatch.setattr(loading, "_load_options", lambda *args: real(*args) | {"device_map": places})
    folder, _, _ = demo_folders
    sides = ["--general", str(folder / "general"), "--behaviour", str(folder / "behaviour"), *WORDS]
    text = ["--scale", "500", "--budget_text", "demo:text", "--budget_windows", "1"]
    spread = [*sides, *text, "--device", "auto", "--output", str(tmp_path / "plan.json")]
    assert main(["prune", *spread]) == 0
    (measured,) = PrunePlan.load(tmp_path / "plan.json").settings["gains"]["texts"]
    monkeypatch.setattr(loading, "_load_options", real)
    assert main(["prune", *sides, *text, "--output", str(tmp_path / "whole.json")]) == 0
    (whole,) = PrunePlan.load(tmp_path / "whole.json").settings["gains"]["texts"]
    assert measured["nll_after"] == pytest.approx(whole["nll_after"], rel=1e-7) != whole["nll_before"]


def test_a_model_is_shared_out_by_several_processes_only(demo_folders, tmp_path, capsys):
    folder, _, _ = demo_folders
    sides = ["--general", str(folder / "general"), "--behaviour", str(folder / "behaviour"), "--device", "sharded"]
    text = ["--budget", "0.02", "--budget_text", "demo:text"]
    assert main(["prune", *sides, *WORDS, *text, "--output", str(tmp_path / "plan.json")]) == 2
    assert "device=sharded shares the model out over several processes, but this one" in capsys.readouterr().err
    assert main(["prune", *sides, "--num_neurons", "2", "--output", str(tmp_path / "plan.json")]) == 2
    assert "device=sharded shares a model out for the search of edit=gains" in capsys.readouterr().err
    assert not (tmp_path / "plan.json").exists()


def test_a_search_looks_first_at_one_window_in_eight(demo_folders, monkeypatch):
    folder, model, encoder = demo_folders
    sides = [[ScoreFolder.open(folder / name)] for name in ("general", "behaviour")]
    texts = held_back([BudgetSource.of("demo:text")], encoder, sides[0], num_windows=16, length=32)
    real, passes = _Rises._losses, []
    monkeypatch.setattr(_Rises, "_losses", lambda self, most=None: passes.append(most or 16) or real(self, most))
    plan = spend(make_dose(*sides), model, texts, 0.02)
    (cost,) = plan.settings["gains"]["texts"]
    assert 0.97 * 0.02 <= cost["rise"] <= 0.02 + 1e-12  # the budget is that of all windows
    assert cost["num_windows"] == 16
    whole = passes.count(16)
    assert passes[0] == 16  # without an edit
    assert passes[1:] == [2] * (len(passes) - whole) + [16] * (whole - 1)
    assert 2 in passes


def test_a_range_too_narrow_for_the_budget_is_told(demo_folders):
    folder, model, encoder = demo_folders
    sides = [[ScoreFolder.open(folder / name)] for name in ("general", "behaviour")]
    dose = make_dose(*sides, contrast={"class_path": "budget", "init_args": {"gains_range": [0.999, 1.0]}})
    plan = spend(
        dose, model, held_back([BudgetSource.of("demo:text")], encoder, sides[0], num_windows=1, length=64), 0.5
    )
    assert not plan.settings["gains"]["reached"]
    assert "the budget of 50.00% was not reached" in plan.warnings[-1]
    assert {n.factor for n in plan.neurons} == {0.999}


def test_what_the_model_loses_without_an_edit_is_measured_once(demo_folders, monkeypatch):
    """Of a model that a run keeps, for each choice of texts; plans are equal to those of models loaded anew."""
    folder, _, encoder = demo_folders
    sides = [[ScoreFolder.open(folder / name)] for name in ("general", "behaviour")]
    dose, source = make_dose(*sides), [BudgetSource.of("demo:text")]
    texts = [held_back(source, encoder, sides[0], num_windows=1, length=length) for length in (64, 32)]
    real, passes = _Rises._losses, []
    monkeypatch.setattr(_Rises, "_losses", lambda self, most=None: passes.append(1) or real(self, most))

    def plans() -> list[dict]:
        passes.clear()
        models = [load_model(ModelSource("demo")) for _ in range(3)]
        of_texts = zip(models, (texts[0], texts[0], texts[1]), strict=True)
        return [spend(dose, model, text, None, scale=2.0).settings["gains"] for model, text in of_texts]

    anew = plans()
    assert len(passes) == 6
    with models_kept():
        assert plans() == anew
        assert len(passes) == 5
        load_model(ModelSource("demo")).lm_head.weight.data[0, 0] += 1
        assert plans() == anew  # another model: it is loaded, and measured, again
        assert len(passes) == 5


def test_a_model_that_breaks_is_told(demo_folders, tmp_path, monkeypatch):
    folder, model, encoder = demo_folders
    sides = [[ScoreFolder.open(folder / name)] for name in ("general", "behaviour")]
    texts = held_back([BudgetSource.of("demo:text")], encoder, sides[0], num_windows=1, length=64)
    losses = [[[(nll, 63)]] for nll in (math.nan, 63.0, math.inf)]
    monkeypatch.setattr(_Rises, "_losses", lambda self, most=None: losses.pop(0))
    with pytest.raises(InputError, match=r"the model's own loss on .* is nan, so no rise can be measured"):
        spend(make_dose(*sides), model, texts, 0.5)
    plan = spend(make_dose(*sides), model, texts, None, scale=2.0)
    assert "scale 2 breaks the model: its loss on" in plan.warnings[-1]
    again = PrunePlan.load(plan.save(tmp_path / "plan.json"))
    assert again.settings["gains"]["texts"][0]["rise"] is None


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({}, "give one of the two"),
        ({"budget": 0.01}, "budget needs held-back text"),
        ({"budget": -0.01, "budget_text": ["demo"]}, "budget=-0.01 is not a rise"),
        ({"budget": 0.01, "budget_text": ["demo"], "scale": 2.0}, "give one of the two"),
        ({"budget": 0.01, "budget_text": ["demo"], "edit": "zero"}, "budget=0.01 is for edit=gains"),
        (
            {"budget": 0.01, "budget_text": ["demo"], "budget_windows": 10**6},
            "budget_windows=1000000, .*only .* windows",
        ),
        (
            {"budget": 0.01, "budget_text": ["demo", "demo"], "budget_length": 64},
            "two of the texts give the same windows",
        ),
        ({"budget": 0.01, "budget_text": ["demo"], "device": "cuda:9"}, "device='cuda:9'"),
        ({"budget": 0.01, "budget_text": ["demo"], "budget_length": 1}, "budget_length=1: give at least 2 tokens"),
        ({"budget": 0.01, "budget_text": ["demo"], "budget_windows": -1}, "budget_windows=-1: give at least 1"),
        ({"budget": 0.01, "budget_text": ["demo", "no/such.jsonl"], "pretrained": "never"}, "no/such.jsonl"),
        (
            {"budget": 0.01, "budget_text": ["demo", {"source": "no/such.jsonl"}], "pretrained": "never"},
            "no/such.jsonl",
        ),
        (
            {"budget": 0.01, "budget_text": [{"source": "a/b", "spilt": "test"}], "pretrained": "never"},
            "budget_text: spilt is none of a text's keys; they are source, subset, split, field, filter",
        ),
        ({"budget": 0.01, "budget_text": [{"subset": "en"}], "pretrained": "never"}, "give a source, as data.source"),
        ({"scale": -1.0, "budget_text": ["demo"], "pretrained": "never"}, "scale=-1.0 of edit=gains"),
        ({"budget": 0.01, "budget_text": ["demo"], "alpha": 0.5}, "edit=gains with alpha=0.5"),
        ({"scale": 1.0, "contrast": "t", "gains_range": [0.0, 2.0]}, "is for contrast=budget"),
        (
            {
                "scale": 1.0,
                "contrast": {"class_path": "budget", "init_args": {"gains_range": [0.0, 3.0]}},
                "gains_range": [0.0, 2.0],
            },
            "contrast has it too in init_args",
        ),
        ({"edit": {"class_path": "gains"}}, "give one of the two"),
        ({"edit": {"class_path": "sparc3_pl.pruning.gains.Gains"}, "budget": 0.01}, "budget needs held-back text"),
        ({"budget": 0.01, "edit": {"class_path": "zero"}}, "budget=0.01 is for edit=gains, and this is edit=zero"),
        (
            {"budget": 0.01, "budget_text": ["demo"], "shrink": True, "save_model": "small", "pretrained": "never"},
            "shrink removes whole neurons, and a budget weakens them in part",
        ),
    ],
)
def test_settings_that_are_refused(demo_folders, tmp_path, arguments, match):
    folder, _, _ = demo_folders
    given = {"general": [str(folder / "general")], "behaviour": [str(folder / "behaviour")], "contrast": "budget"}
    given |= {"edit": "gains", "output": str(tmp_path / "plan.json")}
    with pytest.raises(InputError, match=match) as caught:
        prune(**(given | arguments))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_general_folders_must_say_what_they_were_made_from(demo_folders, tmp_path):
    _, _, encoder = demo_folders
    folder = write(tmp_path / "g", {"l": torch.ones(2)})
    with pytest.raises(InputError, match="does not say which texts its samples were made from"):
        held_back([BudgetSource.of("demo")], encoder, [folder])
