"""From folders to plans: what is chosen, the controls, the warnings, the refusals."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from score_folders import LAYERS, random_scores, write

from sparc3_pl.errors import InputError
from sparc3_pl.selection.choose import make_plan
from sparc3_pl.selection.controls import null_sides, random_matched

WIDTH = 40


@pytest.fixture
def general(tmp_path):
    return [write(tmp_path / f"g{seed}", random_scores(seed, (WIDTH,))) for seed in (1, 2)]


@pytest.fixture
def behaviour(tmp_path):
    samples = [{"id": "one", "num_tokens": 3}, {"id": "two", "num_tokens": 3}]
    return [write(tmp_path / "b", random_scores(3, (WIDTH,)), samples=samples)]


def pairs(plan) -> list[tuple[str, int]]:
    return [(neuron.layer, neuron.index) for neuron in plan.neurons]


def expected_order() -> list[tuple[str, int]]:
    """By loops over all neurons in float64."""
    g1, g2, b = (random_scores(seed, (WIDTH,)) for seed in (1, 2, 3))
    found = [
        (float(np.float32((float(g1[layer][i]) + float(g2[layer][i])) / 2)) - float(b[layer][i]), order, i)
        for order, layer in enumerate(LAYERS)
        for i in range(WIDTH)
    ]
    return [(LAYERS[order], i) for _, order, i in sorted(found)]


def test_chooses_the_lowest_of_all_layers(general, behaviour):
    plan = make_plan(general, behaviour, num_neurons=10)
    assert pairs(plan) == expected_order()[:10]
    assert plan.num_neurons == 10
    assert plan.behaviour_samples == ["one", "two"]
    assert plan.fingerprint == "sha256:00"
    assert [side["name"] for side in plan.scores["general"]] == ["g1", "g2"]
    assert sum(plan.counts().values()) == 10
    plan.check()


def test_experts_that_no_sample_reached_are_named(general, behaviour):
    for folder in general:
        folder.manifest = replace(folder.manifest, unreached=[LAYERS[0], "not chosen"])
    (warning,) = [text for text in make_plan(general, behaviour, num_neurons=WIDTH).warnings if "no token" in text]
    assert f"no token of the general samples reached 1 of the chosen layers (first: {LAYERS[0]})" in warning
    general[1].manifest = replace(general[1].manifest, unreached=[])  # one of the folders knows it
    assert not any("no token" in text for text in make_plan(general, behaviour, num_neurons=WIDTH).warnings)


def test_texts_that_the_samples_were_made_from_are_the_behaviours(tmp_path, general):
    samples = [
        {"id": "one", "num_tokens": 3, "text_ids": ["first", "second"]},
        {"id": "two", "num_tokens": 3, "text_ids": ["second", "two"]},
    ]
    packed = [write(tmp_path / "packed", random_scores(3, (WIDTH,)), samples=samples)]
    assert make_plan(general, packed, num_neurons=3).behaviour_samples == ["first", "one", "second", "two"]


def test_share(general, behaviour):
    assert pairs(make_plan(general, behaviour, share=0.1)) == expected_order()[:12]


def test_ties_go_by_layer_then_index(tmp_path):
    folders = [write(tmp_path / n, {name: torch.full((4,), v) for name in LAYERS}) for n, v in (("g", 1.0), ("b", 2.0))]
    plan = make_plan(folders[:1], folders[1:], num_neurons=6)
    assert pairs(plan) == [(LAYERS[0], i) for i in range(4)] + [(LAYERS[1], i) for i in range(2)]


def test_protected_neurons_are_not_chosen(general, behaviour):
    means = (
        torch.cat(list(random_scores(1, (WIDTH,)).values())) + torch.cat(list(random_scores(2, (WIDTH,)).values()))
    ) / 2
    strong = {(LAYERS[i // WIDTH], i % WIDTH) for i in means.argsort(descending=True)[:60].tolist()}
    plan = make_plan(general, behaviour, num_neurons=20, protect=0.5)
    assert pairs(plan) == [pair for pair in expected_order() if pair not in strong][:20]


def test_same_number_in_each_layer(general, behaviour):
    plan = make_plan(general, behaviour, num_neurons=9, scope="layer")
    assert plan.counts() == dict.fromkeys(LAYERS, 3)
    for layer in LAYERS:
        assert plan.entries[layer].index.tolist() == [i for name, i in expected_order() if name == layer][:3]


def test_weight_plan(tmp_path):
    folders = [write(tmp_path / str(seed), random_scores(seed, (6, 5))) for seed in (1, 3)]
    plan = make_plan(folders[:1], folders[1:], num_weights=7)
    general, behaviour = (torch.cat([v.flatten() for v in random_scores(seed, (6, 5)).values()]) for seed in (1, 3))
    values = general - behaviour
    expected = sorted(np.argsort(values.numpy(), kind="stable")[:7].tolist())
    assert [LAYERS.index(layer) * 30 + i for layer, index in plan.weights.items() for i in index.tolist()] == expected
    assert (plan.num_weights, plan.num_neurons, plan.neurons) == (7, 0, [])
    plan.check()


@pytest.mark.parametrize("amount", [{"num_weights": 12}, {"share": 0.2}])
def test_weights_compete_within_their_layer(tmp_path, amount):
    """A share of layers of unlike width is a share of each."""
    widths = dict(zip(LAYERS, (5, 5, 5) if "num_weights" in amount else (5, 9, 3), strict=True))
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 3)]
    sides = [{name: torch.rand(6, n, generator=generator) for name, n in widths.items()} for generator in generators]
    general, behaviour = (write(tmp_path / name, scores) for name, scores in zip("gb", sides, strict=True))
    plan = make_plan([general], [behaviour], scope="layer", **amount)
    for layer, width in widths.items():
        count = 4 if "num_weights" in amount else round(0.2 * 6 * width)
        values = (sides[0][layer] - sides[1][layer]).flatten().numpy()
        assert plan.weights[layer].tolist() == sorted(np.argsort(values, kind="stable")[:count].tolist())
    plan.check()


def test_growing_plans_are_nested(general, behaviour):
    large = make_plan(general, behaviour, num_neurons=20)
    assert pairs(large.first(8)) == pairs(make_plan(general, behaviour, num_neurons=8))
    large.first(8).check()
    with pytest.raises(InputError, match="num_neurons=21, but the plan has 20"):
        large.first(21)


# --- controls ---------------------------------------------------------------------------------------------------------


def test_random_is_seeded_nested_and_even(general):
    plans = [make_plan(general, num_neurons=30, control="random", seed=seed) for seed in (0, 0, 1)]
    assert pairs(plans[0]) == pairs(plans[1]) != pairs(plans[2])
    assert plans[0].seed == 0
    assert set(pairs(make_plan(general, num_neurons=10, control="random"))) < set(pairs(plans[0]))
    counts = Counter(p for s in range(200) for p in pairs(make_plan(general, num_neurons=12, control="random", seed=s)))
    # 200 draws of 10 %: each neuron 20 times on average, standard deviation 4.2
    assert len(counts) == 3 * WIDTH
    assert max(counts.values()) < 20 + 5 * 4.3


def test_random_matched_keeps_layers_and_general_scores(general, behaviour):
    chosen = make_plan(general, behaviour, num_neurons=12)
    control = make_plan(general, behaviour, num_neurons=12, control="random_matched", seed=3)
    assert control.counts() == chosen.counts()
    assert not set(pairs(control)) & set(pairs(chosen))
    assert len(set(pairs(control))) == 12
    assert control.behaviour_samples == ["one", "two"]
    assert pairs(control) == pairs(make_plan(general, behaviour, num_neurons=12, control="random_matched", seed=3))
    assert pairs(control) != pairs(make_plan(general, behaviour, num_neurons=12, control="random_matched", seed=4))


def test_random_matched_takes_near_ranks():
    general = {"a": torch.arange(100.0).flip(0)}
    drawn = random_matched([("a", 50), ("a", 10)], general, {"a": torch.ones(100, dtype=torch.bool)}, 0, candidates=6)
    assert 0 < abs(drawn[0][1] - 50) <= 4
    assert 0 < abs(drawn[1][1] - 10) <= 4


def test_random_matched_avoids_the_protected(general, behaviour):
    strong = set(pairs(make_plan(general, num_neurons=36, control="top_general")))  # the top 30 % by general score
    control = make_plan(general, behaviour, num_neurons=20, control="random_matched", protect=0.3)
    assert not set(pairs(control)) & strong


def test_random_matched_without_enough_neurons(tmp_path):
    folders = [write(tmp_path / str(seed), random_scores(seed, (3,))) for seed in (1, 2)]
    with pytest.raises(InputError, match="has nothing left to match"):
        make_plan(folders[:1], folders[1:], num_neurons=7, control="random_matched")


def test_top_general(general):
    mean = sum(torch.cat(list(random_scores(seed, (WIDTH,)).values())).double() for seed in (1, 2)) / 2
    expected = {(LAYERS[i // WIDTH], i % WIDTH) for i in mean.argsort(descending=True)[:15].tolist()}
    assert set(pairs(make_plan(general, num_neurons=15, control="top_general"))) == expected


def test_null_is_general_against_general(general):
    plans = [make_plan(general, num_neurons=5, control="null", seed=seed) for seed in (0, 1)]
    assert pairs(plans[0]) == pairs(make_plan(general[1:], general[:1], num_neurons=5))
    assert pairs(plans[1]) == pairs(make_plan(general[:1], general[1:], num_neurons=5))
    assert null_sides(["a", "b", "c"], 4) == (["a", "c"], ["b"])
    with pytest.raises(InputError, match="give --general two folders"):
        make_plan(general[:1], num_neurons=5, control="null")


# --- warnings and refusals --------------------------------------------------------------------------------------------


def test_a_choice_of_strong_neurons_is_flagged(tmp_path):
    strong = torch.linspace(0, 1, 100)
    general, behaviour = write(tmp_path / "g", {"a": strong}), write(tmp_path / "b", {"a": strong * 1.5})
    plan = make_plan([general], [behaviour], num_neurons=4)
    assert any("100% of the chosen are among the 5% that general text uses most" in text for text in plan.warnings)
    assert make_plan([general], [behaviour], num_neurons=4, protect=0.05).warnings == []


def test_shared_samples_are_flagged(tmp_path):
    folders = [
        write(tmp_path / name, random_scores(i), samples=[{"id": "x", "num_tokens": 3}]) for i, name in enumerate("gb")
    ]
    assert any("share samples" in text for text in make_plan(folders[:1], folders[1:], num_neurons=2).warnings)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"num_neurons": 500}, "num_neurons=500, but only 120 are scored; lower num_neurons or widen layers"),
        ({"num_neurons": 0}, "at least 1"),
        ({"num_neurons": -3}, "num_neurons=-3"),
        ({"share": 1.5}, "share=1.5 is not a share"),
        ({}, r"give num_neurons \(or num_weights\), or share"),
        ({"num_neurons": 3, "share": 0.1}, "num_neurons=3, share=0.1: say in one way how many to choose"),
        ({"num_weights": 3}, "these are neuron scores"),
        ({"num_neurons": 3, "contrast": "best"}, "contrast='best' is unknown"),
        ({"num_neurons": 3, "control": "best"}, "control='best' is unknown"),
        ({"num_neurons": 3, "edit": "burn"}, "edit='burn' is unknown"),
        ({"num_neurons": 3, "edit": "scale"}, "edit=scale needs a finite alpha, but alpha=None"),
        ({"num_neurons": 3, "scope": "column"}, "scope='column' is unknown; known are model, layer"),
        ({"num_neurons": 3, "protect": 1.0}, "protect=1.0 is not a share"),
        ({"num_neurons": 100, "protect": 0.5}, r"only 60 of 120 may be chosen \(protect=0.5\)"),
        ({"num_neurons": 3, "layers": ["y*"]}, "matches no scored layer"),
        ({"num_neurons": 10, "scope": "layer"}, "not the same number in each of 3 layers; e.g. 9 is"),
        ({"num_neurons": 120, "scope": "layer"}, "not the same number"),
        ({"num_neurons": 60, "contrast": "set_difference"}, "only .* of 120 may be chosen .*top_behaviour=0.05"),
    ],
)
def test_refused(general, behaviour, arguments, match):
    with pytest.raises(InputError, match=match) as caught:
        make_plan(general, behaviour, **arguments)
    assert "\n" not in str(caught.value)


def test_unlike_folders_are_refused(tmp_path, general):
    other = write(tmp_path / "o", random_scores(3, (WIDTH,)), model={"fingerprint": "sha256:11"})
    with pytest.raises(InputError, match=r"model\.fingerprint=sha256:00 in .*g1 but sha256:11 in .*o"):
        make_plan(general, [other], num_neurons=3)


def test_scores_of_several_kinds_must_say_which_layer_is_of_which(tmp_path):
    folder = write(tmp_path / "both", random_scores(1), granularity="neuron+head")  # as earlier versions wrote it
    with pytest.raises(InputError, match=r"does not say which layer is of which kind, .*; score again"):
        make_plan([folder], num_neurons=3, contrast="general")
