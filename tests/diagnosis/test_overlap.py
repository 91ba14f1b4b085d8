"""The overlap command on selections whose overlap is known."""

import json
from pathlib import Path

import pytest
import torch
from scipy.stats import spearmanr
from score_folders import write

from sparc3_pl.diagnosis.overlap import overlap
from sparc3_pl.errors import InputError
from sparc3_pl.model.identity import ModelRecord
from sparc3_pl.pruning.plan import PlannedNeuron, PrunePlan, entries_of
from sparc3_pl.scores.folder import ScoreFolder
from sparc3_pl.selection.choose import make_plan

LAYERS = ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj")
WIDTH = 200


def scores(seed, shape=(WIDTH,)):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(*shape, generator=generator) for name in LAYERS}


@pytest.fixture
def folders(tmp_path):
    """General scores, and behaviours that use the neurons 0..9 of the first layer, 5..14, and 100..109."""
    base = scores(0)
    write(tmp_path / "general", base)
    for name, used in {"a": slice(0, 10), "b": slice(5, 15), "c": slice(100, 110)}.items():
        values = {layer: part.clone() for layer, part in base.items()}
        values[LAYERS[0]][used] += 2
        write(tmp_path / name, values, data={"source": name, "seed": 0, "sample_ids": [name]})
    return tmp_path


def test_known_intersections(folders, capsys):
    found = overlap(
        [str(folders / name) for name in "abc"],
        general=[str(folders / "general")],
        num_neurons=10,
        output=str(folders / "overlap.json"),
        html=str(folders / "overlap.html"),
    )
    by_names = {group.names: group for group in found.groups}
    assert by_names["a", "b"].common == 5
    assert by_names["a", "b"].jaccard == 5 / 15
    assert by_names["a", "c"].common == by_names["a", "b", "c"].common == 0
    assert by_names["a", "b"].p_value < 0.05 < by_names["a", "c"].p_value
    assert by_names["a", "b"].expected_random == pytest.approx(10 * 10 / 400)
    assert dict(found.exclusive) == {("a",): 5, ("a", "b"): 5, ("b",): 5, ("c",): 10}
    base = torch.cat(list(scores(0).values()))
    contrasts = []
    for name in "ab":
        folder = ScoreFolder.open(folders / name)
        contrasts.append((base - torch.cat([folder.load(layer) for layer in LAYERS])).numpy())
    assert by_names["a", "b"].correlation == pytest.approx(spearmanr(*contrasts).statistic)
    assert by_names["a", "b"].quadrants["--"] == 5 / 400
    said = json.loads((folders / "overlap.json").read_text())
    assert said["kind"] == "overlap"
    assert said["groups"][0]["common"] == 5
    assert "matched null" in capsys.readouterr().out
    assert "<svg" in (folders / "overlap.html").read_text()


def test_plans_without_general_scores(folders):
    general = [ScoreFolder.open(folders / "general")]
    for name in "ab":
        plan = make_plan(general, [ScoreFolder.open(folders / name)], num_neurons=10)
        plan.save(folders / f"{name}.json")
    found = overlap([str(folders / "a.json"), str(folders / "b.json")])
    (pair,) = found.groups
    assert pair.common == 5
    assert pair.p_value is None
    assert pair.p_hypergeometric < 1e-4
    with_null = overlap([str(folders / "a.json"), str(folders / "b.json")], general=[str(folders / "general")])
    assert with_null.groups[0].p_value is not None


def test_gains_that_turn_every_component_are_told_apart_by_their_cosine(tmp_path):
    """Layer and factors of three plans; the second turns one component that the first does not."""
    factors = {"a": [0.5, 0.0, 1.0], "b": [1.0, 0.0, 0.5, 0.2], "c": [0.25, -0.5, 1.0]}
    for name, own in factors.items():
        entries = entries_of([PlannedNeuron(LAYERS[0], place, -1.0, factor) for place, factor in enumerate(own)])
        shapes = {LAYERS[0]: [WIDTH]}
        plan = PrunePlan(entries=entries, model=ModelRecord(fingerprint="f"), edit="gains", shapes=shapes)
        plan.save(tmp_path / name)
    result = overlap([str(tmp_path / name) for name in "abc"])
    cosines = {group.names: group.cosine for group in result.groups}
    lengths = {"a": (0.25 + 1) ** 0.5, "b": (1 + 0.25 + 0.64) ** 0.5}
    assert cosines["a", "b"] == pytest.approx(1 / (lengths["a"] * lengths["b"]))
    assert cosines["a", "c"] == pytest.approx(1)
    assert cosines["a", "b", "c"] is None


def test_plans_that_do_not_say_how_many_candidates_there_were(folders):
    """As hand-written ones: what needs their number is not measured."""
    for name, indices in {"a": [1, 2, 3], "b": [2, 3, 4]}.items():
        neurons = [{"layer": LAYERS[0], "index": i} for i in indices]
        plan = {"format_version": 1, "neurons": neurons, "model": {"fingerprint": "sha256:00"}}
        (folders / f"{name}.json").write_text(json.dumps(plan))
    paths = [str(folders / f"{name}.json") for name in "ab"]
    found = overlap(paths, output=str(folders / "overlap.json"))
    (pair,) = found.groups
    assert (pair.common, pair.jaccard) == (2, 0.5)
    assert pair.expected_random is pair.p_hypergeometric is found.num_candidates is None
    assert json.loads((folders / "overlap.json").read_text())["groups"][0]["expected_random"] is None
    with_general = overlap(paths, general=[str(folders / "general")])
    assert with_general.groups[0].expected_random == pytest.approx(3 * 3 / 400)


def test_refusals(folders):
    with pytest.raises(InputError, match="two or more"):
        overlap([str(folders / "a")], general=[str(folders / "general")])
    with pytest.raises(InputError, match="--general"):
        overlap([str(folders / "a"), str(folders / "b")])
    with pytest.raises(InputError, match="given twice"):
        overlap([str(folders / "a"), str(folders / "a")], general=[str(folders / "general")])
    other = {"pretrained": "demo", "revision": None, "fingerprint": "sha256:11"}
    foreign = write(folders / "other", scores(0), model=other)
    made = make_plan([foreign], [foreign], num_neurons=3)
    made.save(folders / "other.json")
    make_plan([ScoreFolder.open(folders / "general")], [ScoreFolder.open(folders / "a")], num_neurons=3).save(
        folders / "mine.json"
    )
    with pytest.raises(InputError, match="different models"):
        overlap([str(folders / "mine.json"), str(folders / "other.json")])


def test_plans_of_weights_are_compared_by_their_masks(tmp_path, capsys):
    values = {seed: scores(seed, (20, 10)) for seed in range(3)}
    sets = {}
    for seed, layers in values.items():
        folder = write(tmp_path / str(seed), layers, granularity="weight")
        # The last leaves only a few: a list of indices, which is compared with the others' masks.
        share = {"scope": "row", "share": 0.5} if seed < 2 else {"num_weights": 5}
        plan = make_plan([folder], contrast="general", **share)
        plan.save(tmp_path / f"{seed}.json")
        flat = [
            (layer, row * 10 + column)
            for layer, matrix in layers.items()
            for row, row_values in enumerate(matrix.tolist())
            for _, column in sorted((value, place) for place, value in enumerate(row_values))[:5]
        ]
        lowest = sorted(((float(x), i, layer) for layer, m in layers.items() for i, x in enumerate(m.flatten())))
        sets[f"{seed}.json"] = set(flat) if seed < 2 else {(layer, i) for _, i, layer in lowest[:5]}
    found = overlap([str(tmp_path / name) for name in sets])
    assert sorted(found.sizes.values()) == [5, 200, 200]
    for group in found.groups:
        own = [sets[f"{Path(name).stem}.json"] for name in group.names]
        assert group.common == len(set.intersection(*own))
        assert group.jaccard == group.common / len(set.union(*own))
        assert group.p_value is None and group.p_hypergeometric is None
    assert "weights" in capsys.readouterr().out
