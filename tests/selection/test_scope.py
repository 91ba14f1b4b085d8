"""Rows, n:m patterns and budgets against explicit loops over every row and group."""

import json
import random

import numpy as np
import pytest
import torch
from score_folders import write
from test_lowest import VALUES, passes_over

from sparc3_pl.errors import InputError
from sparc3_pl.selection.budgets import block_of
from sparc3_pl.selection.choose import make_plan
from sparc3_pl.selection.lowest import TooFewCandidates, lowest_in_groups
from sparc3_pl.statistics.lowest_of_groups import lowest_of_each_group

ATTENTION, MLP, HEAD = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "lm_head"
SHAPES = {ATTENTION: (6, 8), MLP: (3, 20), HEAD: (11, 8)}


def scores(seed: int, shapes=SHAPES, ties: bool = False) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = {name: torch.rand(*shape, generator=generator) for name, shape in shapes.items()}
    return {name: (4 * tensor).round() if ties else tensor for name, tensor in values.items()}


def weights(folder, values):
    return write(folder, values, granularity="weight")


def lowest(values: list[float], count: int) -> list[int]:
    return sorted(place for _, place in sorted((value, place) for place, value in enumerate(values))[:count])


def by_loops(matrix: torch.Tensor, count: int, width: int | None = None) -> list[int]:
    """Flat indices of the lowest ``count`` of every group of ``width`` (a row without it), row by row."""
    chosen = []
    for row, values in enumerate(matrix.tolist()):
        for start in range(0, len(values), width or len(values)):
            group = values[start : start + (width or len(values))]
            chosen += [row * len(values) + start + place for place in lowest(group, count)]
    return chosen


def chosen(plan) -> dict[str, list[int]]:
    plan.check()
    return {layer: index.tolist() for layer, index in plan.weights.items()}


@pytest.mark.parametrize("width", [2, 4, 16, 17, 40])
@pytest.mark.parametrize("kind", VALUES)
def test_lowest_of_each_group(kind, width):
    values = torch.cat([VALUES[kind]() for _ in range(34)]).view(-1, width)
    for count in {1, width // 2, width - 1, width}:
        flags = lowest_of_each_group(values.numpy(), count)
        assert np.flatnonzero(flags).tolist() == by_loops(values, count)


@pytest.mark.parametrize("block", [1, 5, 20, 64, 1000])
@pytest.mark.parametrize("width", [4, 20])
def test_blocks_may_end_within_a_group(block, width):
    layers = {name: torch.randn(60) for name in "ab"}
    allowed = {name: torch.rand(60) < 0.9 for name in "ab"}
    for values in allowed.values():
        values.view(-1, width)[:, :2] = True  # two of each group at least
    passes = passes_over(layers, block, allowed)
    masks = dict(lowest_in_groups(passes, dict.fromkeys("ab", width), {"a": 2, "b": 1}, dict.fromkeys("ab", 60)))
    for name, count in (("a", 2), ("b", 1)):
        values = layers[name].masked_fill(~allowed[name], torch.inf).view(-1, width)
        assert masks[name].index().tolist() == by_loops(values, count)


def test_a_group_with_too_few_candidates_is_an_error():
    allowed = {"a": torch.tensor([True] * 4 + [True, False, False, False])}
    with pytest.raises(TooFewCandidates, match=r"weights 4 and on of layer a: 2 are to be chosen, but .* only 1"):
        dict(lowest_in_groups(passes_over({"a": torch.randn(8)}, 8, allowed), {"a": 4}, {"a": 2}, {"a": 8}))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("share", [0.5, 0.3, 0.13])
def test_the_same_share_of_every_row_rounded_down(tmp_path, share, ties):
    values = scores(0, ties=ties)
    plan = make_plan([weights(tmp_path / "g", values)], contrast="general", scope="row", share=share)
    expected = {name: by_loops(values[name], int(SHAPES[name][1] * share)) for name in (ATTENTION, MLP)}
    assert chosen(plan) == expected
    assert (plan.settings["scope"], plan.settings["share"]) == ("row", share)
    assert plan.num_candidates == 6 * 8 + 3 * 20


def test_rows_of_a_difference_of_means(tmp_path):
    sides = [scores(seed) for seed in range(3)]
    folders = [weights(tmp_path / str(seed), side) for seed, side in enumerate(sides)]
    plan = make_plan(folders[:2], folders[2:], contrast="difference", scope="row", share=0.5)
    for name in (ATTENTION, MLP):
        mean = ((sides[0][name].double() + sides[1][name].double()) / 2).float()
        assert chosen(plan)[name] == by_loops(mean - sides[2][name], SHAPES[name][1] // 2)


@pytest.mark.parametrize(("pattern", "stay", "of"), [("2:4", 2, 4), ("1:4", 1, 4), ("3:4", 3, 4), ("1:2", 1, 2)])
@pytest.mark.parametrize("ties", [False, True])
def test_n_of_every_m_stay(tmp_path, pattern, stay, of, ties):
    values = scores(1, ties=ties)
    scope = {"class_path": "pattern", "init_args": {"pattern": pattern}}
    plan = make_plan([weights(tmp_path / "g", values)], contrast="general", scope=scope)
    assert chosen(plan) == {name: by_loops(values[name], of - stay, of) for name in (ATTENTION, MLP)}
    assert (plan.settings["scope"], plan.settings["pattern"]) == ("pattern", pattern)


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_scopes_without_rows_are_as_sorting_says(tmp_path, scope):
    values = scores(2, ties=True)
    plan = make_plan([weights(tmp_path / "g", values)], contrast="general", scope=scope, share=0.4)
    if scope == "layer":
        expected = {n: lowest(v.flatten().tolist(), round(0.4 * v.numel())) for n, v in values.items()}
    else:
        flat = [(float(x), order, i) for order, v in enumerate(values.values()) for i, x in enumerate(v.flatten())]
        first = sorted(flat)[: round(0.4 * len(flat))]
        every = {name: sorted(i for _, at, i in first if at == order) for order, name in enumerate(values)}
        expected = {name: index for name, index in every.items() if index}
    assert chosen(plan) == expected
    assert any("lm_head competes with the rest" in text for text in plan.warnings)


def test_the_output_head_is_left_out_unless_it_is_named(tmp_path):
    folder = weights(tmp_path / "g", scores(0))
    plan = make_plan([folder], contrast="general", scope="row", share=0.5)
    assert plan.settings["left_out"] == [HEAD]
    assert HEAD not in plan.entries
    named = make_plan([folder], contrast="general", scope="row", share=0.5, layers=["*"])
    assert set(named.entries) == set(SHAPES)
    assert "left_out" not in named.settings
    assert [block_of(name) for name in ("lm_head", MLP, "h.3.c_fc", "12.fc")] == [None, "model.layers.1", "h.3", "12"]


def test_random_is_random_within_rows(tmp_path):
    folder = weights(tmp_path / "g", scores(0))
    one, other = (
        make_plan([folder], contrast="general", scope="row", share=0.5, control="random", seed=seed) for seed in (0, 1)
    )
    for plan in (one, other):
        rows = np.bincount(np.array(chosen(plan)[ATTENTION]) // 8, minlength=6)
        assert rows.tolist() == [4] * 6
    assert chosen(one) != chosen(other)


@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_budgets_of_a_file(tmp_path, suffix):
    path = tmp_path / f"budgets.{suffix}"
    path.write_text(json.dumps({"*.mlp.*": 0.25, "*layers.1*": 0.9}))  # the first that fits counts
    values = scores(0)
    folder = weights(tmp_path / "g", values)
    plan = make_plan([folder], contrast="general", scope="row", share=0.5, budgets=str(path))
    assert chosen(plan) == {ATTENTION: by_loops(values[ATTENTION], 4), MLP: by_loops(values[MLP], 5)}
    assert plan.settings["shares"] == {ATTENTION: 0.5, MLP: 0.25}
    by_layer = make_plan([folder], contrast="general", scope="layer", share=0.5, budgets=str(path))
    assert by_layer.counts() == {ATTENTION: 24, MLP: 15}
    path.write_text(json.dumps({"*.mlp.*": 0.25, "*q_proj": 0}))
    assert list(make_plan([folder], contrast="general", scope="row", budgets=str(path)).entries) == [MLP]
    path.write_text(json.dumps({"*": 0}))
    neurons = write(tmp_path / "n", {"model.layers.0.mlp.up_proj": torch.rand(9)})
    for one, scope in ((folder, "row"), (neurons, "layer")):
        with pytest.raises(InputError, match="nothing is chosen: the share of every layer is 0"):
            make_plan([one], contrast="general", scope=scope, budgets=str(path))


def test_owl_by_loops(tmp_path):
    """D, the share of outliers of a block; a linear map of it whose mean is the share, and lambda its largest step."""
    shapes = {f"model.layers.{i}.{part}": (10, 20) for i in range(3) for part in ("mlp.up_proj", "self_attn.o_proj")}
    rng, values = random.Random(0), scores(3, shapes)
    for number, (_, tensor) in enumerate(values.items()):
        for _ in range(7 * number):
            tensor[rng.randrange(10), rng.randrange(20)] = 30.0
    plan = make_plan([weights(tmp_path / "g", values)], contrast="general", scope="row", share=0.6, budgets="owl")
    density = []
    for i in range(3):
        block = [x for name, tensor in values.items() if f".{i}." in name for x in tensor.flatten().tolist()]
        mean = sum(block) / len(block)
        density.append(sum(x > 5 * mean for x in block) / len(block))
    assert density[0] < density[1] < density[2]
    middle = sum(density) / 3
    step = 0.08 / max(abs(d - middle) for d in density)
    expected = [0.6 - step * (d - middle) for d in density]
    shares = plan.settings["shares"]
    for name, share in shares.items():
        assert share == pytest.approx(expected[int(name.split(".")[2])], abs=1e-12)
        assert plan.counts()[name] == 10 * int(20 * share)
    assert sum(shares.values()) / len(shares) == pytest.approx(0.6, abs=1e-12)
    assert min(shares.values()) >= 0.52 - 1e-12 and max(shares.values()) <= 0.68 + 1e-12
    assert {plan.settings[key] for key in ("budgets", "outlier", "spread")} == {"owl", 5.0, 0.08}


def test_owl_without_differences_is_the_same_share_everywhere(tmp_path):
    folder = weights(tmp_path / "g", {name: torch.ones(4, 8) for name in (ATTENTION, MLP)})
    plan = make_plan([folder], contrast="general", scope="row", share=0.5, budgets="owl")
    assert plan.settings["shares"] == {ATTENTION: 0.5, MLP: 0.5}


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"scope": "row", "num_weights": 6}, "num_weights=6 with scope=row: give a share of each row"),
        ({"scope": "row", "share": 0.01}, "share=0.01 of the 8 inputs of .*q_proj is not one weight of a row"),
        ({"scope": "row", "share": 1.0}, "share=1.0 is not a share"),
        ({"scope": "row", "share": 0.5, "protect": 0.9}, r"of 8 are to be chosen, but only .*\(protect=0.9\); lower"),
        ({"scope": {"class_path": "pattern", "init_args": {"pattern": "4:2"}}}, "pattern='4:2': give n:m"),
        ({"scope": {"class_path": "pattern", "init_args": {"pattern": "4:8"}}}, "the 20 inputs of .*down_proj are no"),
        ({"scope": "pattern", "share": 0.5}, "scope=pattern says by itself how many are chosen; leave out share=0.5"),
        ({"scope": "pattern", "budgets": "owl"}, "but scope=pattern; use scope=row or layer"),
        ({"scope": "model", "share": 0.5, "budgets": "owl"}, "but scope=model; use scope=row or layer"),
        ({"scope": "row", "budgets": "owl"}, "budgets=owl spreads a share over the layers; give --share"),
        ({"scope": "row", "share": 0.95, "budgets": "owl"}, r"shares from 0.87 to 1.03 .* not all between 0 and 1"),
        ({"scope": "row", "share": 0.5, "budgets": "none.json"}, "none.json: cannot be read as shares by layer"),
        ({"scope": "row", "share": 0.5, "budgets": "howl"}, "budgets='howl' is unknown; did you mean owl"),
    ],
)
def test_refusals(tmp_path, arguments, match):
    folder = weights(tmp_path / "g", scores(0))
    with pytest.raises(InputError, match=match) as caught:
        make_plan([folder], contrast="general", **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("table", "match"),
    [
        ({"*.mlp.*": 0.5}, "no pattern fits .*q_proj; add one, or give --share"),
        ({"*": 1.0}, r"\*: 1.0 is not a share from 0 to below 1"),
        ({"*.experts.*": 0.5, "*": 0.5}, "'.*experts.*' matches no layer"),
        ({"*": 0}, "nothing is chosen: the share of every layer is 0"),
        ([], "holds no shares by layer"),
    ],
)
def test_bad_files_of_budgets(tmp_path, table, match):
    (tmp_path / "b.json").write_text(json.dumps(table))
    with pytest.raises(InputError, match=match):
        make_plan(
            [weights(tmp_path / "g", scores(0))], contrast="general", scope="row", budgets=str(tmp_path / "b.json")
        )


@pytest.mark.parametrize("arguments", [{"scope": "row", "share": 0.5}, {"scope": "pattern"}])
def test_vectors_have_no_rows(tmp_path, arguments):
    folder = write(tmp_path / "g", {name: torch.rand(8) for name in (ATTENTION, MLP)})
    with pytest.raises(InputError, match="rows and patterns are for weight scores, but these are of neurons"):
        make_plan([folder], contrast="general", **arguments)
