"""Evidence: a sound contrast passes, the published failure is flagged."""

import json

import numpy as np
import pytest
import torch
from scipy.stats import norm
from score_folders import write

from sparc3_pl.cli import main
from sparc3_pl.diagnosis.evidence import evidence, usual_size, weigh
from sparc3_pl.errors import InputError
from sparc3_pl.scores.folder import ScoreFolder
from sparc3_pl.scores.manifest import ScoredSample
from sparc3_pl.scores.writer import ScoreWriter
from sparc3_pl.selection.choose import make_plan
from sparc3_pl.selection.contrast import SideScores, contrast
from sparc3_pl.selection.stability import SelectionSettings

LAYERS = ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj")
WIDTH, GROUPS, EACH = 500, 8, 4


def folder(path, mean, noise=0.02, seed=0, groups=True, source="demo"):
    """Scores of 32 samples in 8 groups around ``mean``, ``[2, WIDTH]``."""
    generator = torch.Generator().manual_seed(seed)
    samples = mean + noise * mean * torch.randn(GROUPS, EACH, 2, WIDTH, generator=generator)
    records = [
        ScoredSample(f"{source}{seed}-{i}", 8, "cut", relevance=float(total))
        for i, total in enumerate(samples.sum((2, 3)).flatten())
    ]
    flat = samples.flatten(0, 1)
    with ScoreWriter(path) as writer:
        for i, layer in enumerate(LAYERS):
            parts = (samples[:, :, i].mean(1), [EACH] * GROUPS) if groups else None
            writer.add_layer(layer, flat[:, i].mean(0), flat[:, i].double().square().mean(0), parts)
        writer.finish(
            method="lrp", num_samples=32, num_tokens=256,
            model={"pretrained": "./nowhere", "revision": None, "fingerprint": "sha256:00"},
            data={"source": source, "seed": seed, "sample_ids": [record.id for record in records]}, samples=records,
        )  # fmt: skip
    return str(path)


@pytest.fixture
def strengths():
    """A few neurons are a hundred times as strong as most, as in real models."""
    generator = torch.Generator().manual_seed(9)
    return torch.rand(2, WIDTH, generator=generator).pow(8) * 100 + 1


def statuses(found):
    return {check.name: check.status for check in found.checks}


def test_a_sound_contrast_passes(tmp_path, strengths):
    used = strengths.clone()
    weak = strengths[0].argsort()[:20]
    used[0, weak] += 3
    found = evidence(
        [folder(tmp_path / "g", strengths, source="g")],
        [folder(tmp_path / "b", used, seed=1, source="b")],
        num_neurons=20,
        contrast="rank",
        output=str(tmp_path / "evidence.json"),
        html=str(tmp_path / "evidence.html"),
    )
    assert set(statuses(found).values()) == {"pass"}, found.checks
    assert found.strongest.top_5 == 0
    assert found.stability.halves[-1] > 0.9
    assert json.loads((tmp_path / "evidence.json").read_text())["kind"] == "evidence"
    assert "<svg" in (tmp_path / "evidence.html").read_text()


def test_the_published_failure_is_flagged(tmp_path, strengths):
    """A behaviour set that is merely stronger throughout: a raw difference takes the generally strongest."""
    found = evidence(
        [folder(tmp_path / "g", strengths, source="g")],
        [folder(tmp_path / "b", strengths * 1.4, seed=1, source="b")],
        num_neurons=20,
    )
    assert statuses(found)["strongest neurons"] == "fail"
    assert statuses(found)["totals"] == "warn"
    assert found.verdict == "fail"
    assert found.strongest.top_5 == 1.0
    assert found.correlation < -0.9


def test_no_behaviour_at_all_does_not_beat_the_null(tmp_path, strengths):
    sides = [[folder(tmp_path / name, strengths, seed=i, source=name)] for i, name in enumerate(("g", "b"))]
    found = evidence(*sides, num_neurons=20)
    assert statuses(found)["null contrast"] in ("warn", "fail")
    assert found.stability.null > 5 * found.stability.chance  # large by itself, as measured on real models


def test_folders_stand_in_for_groups_and_less_is_told(tmp_path, strengths):
    general = [folder(tmp_path / f"g{i}", strengths, seed=i, groups=False, source="g") for i in range(4)]
    behaviour = [folder(tmp_path / f"b{i}", strengths, seed=9 + i, groups=False, source="b") for i in range(2)]
    found = evidence(general, behaviour, num_neurons=20)
    assert found.stability.null is not None
    assert len(found.stability.halves) == 1
    alone = evidence(general[:1], behaviour[:1], num_neurons=20)
    assert alone.stability.halves == ()
    assert {c.status for c in alone.checks if "not measured" in c.reason} == {"warn"}


@pytest.mark.parametrize("kind", ["difference", "normalized", "rank"])
def test_the_selection_is_that_of_prune(tmp_path, strengths, kind):
    """Two general folders of 32 and of 4 samples, far apart: prune lets each count the same."""
    general = [folder(tmp_path / "g0", strengths, source="g")]
    other = torch.rand(2, WIDTH, generator=torch.Generator().manual_seed(3)) * 100
    scores = {layer: other[i] for i, layer in enumerate(LAYERS)}
    about = {"pretrained": "./nowhere", "revision": None, "fingerprint": "sha256:00"}
    general.append(str(write(tmp_path / "g1", scores, num_samples=4, model=about).path))
    behaviour = [folder(tmp_path / "b", strengths.flip(1), seed=1, source="b")]
    sides = [[ScoreFolder.open(path) for path in side] for side in (general, behaviour)]
    plan = make_plan(*sides, num_neurons=20, contrast=kind)
    totals = [torch.cat([f.load(layer).double() for layer in LAYERS]) for f in sides[0]]
    mean = (totals[0] + totals[1]) / 2
    chosen = [LAYERS.index(n.layer) * WIDTH + n.index for n in plan.neurons]
    measured = weigh(*(SideScores.of(side) for side in sides), SelectionSettings(kind, 20))
    top = set(mean.argsort(descending=True)[: round(0.05 * 2 * WIDTH)].tolist())
    assert measured.strongest.top_5 == len(top & set(chosen)) / 20
    assert measured.totals[0] == pytest.approx(float(mean.sum()), rel=1e-6)
    assert measured.relevance_share == pytest.approx(float(mean[chosen].sum() / mean.sum()), rel=1e-6)


def test_t_is_that_of_the_t_contrast(tmp_path, strengths):
    used = strengths.clone()
    used[1, :20] += 3
    paths = folder(tmp_path / "g", strengths, source="g"), folder(tmp_path / "b", used, seed=1, source="b")
    sides = [SideScores.of([ScoreFolder.open(path)]) for path in paths]
    expected = torch.cat([block.values for block in contrast("t", *sides)()])
    difference = torch.cat([block.values for block in contrast("difference", *sides)()])
    lowest = difference.argsort(stable=True)[:20]
    found = evidence(*([path] for path in paths), num_neurons=20)
    assert found.t.median == pytest.approx(float(expected[lowest].median()), rel=1e-4)


@pytest.mark.parametrize(("granularity", "count", "size"), [("neuron", 600, 100), ("head", 600, 60), ("head", 16, 1)])
def test_the_size_of_a_selection_that_is_not_given(tmp_path, granularity, count, size):
    path = str(write(tmp_path / "g", {LAYERS[0]: torch.rand(count)}, granularity=granularity).path)
    assert evidence([path], [path]).num_neurons == size


def test_refusals(tmp_path, strengths):
    path = folder(tmp_path / "g", strengths)
    with pytest.raises(InputError, match="num_neurons=1000"):
        evidence([path], [path], num_neurons=1000)
    weights = str(write(tmp_path / "w", {LAYERS[0]: torch.rand(3, 4)}).path)
    with pytest.raises(InputError, match="neuron scores"):
        evidence([weights], [weights], num_neurons=1)


# --- gains ------------------------------------------------------------------------------------------------------------


def gains_sides(folder, strength):
    """A behaviour of 40 samples whose first 30 of 300 derivatives are not 0; general text with unequal costs."""
    generator = torch.Generator().manual_seed(0)
    layer, samples = "model.layers.0.mlp.up_proj", 40
    values_SN = torch.randn(samples, 300, generator=generator, dtype=torch.float64)
    values_SN[:, :30] += strength
    groups = values_SN.view(8, 5, 300).mean(1)
    about = {"signed": True, "at_values": True, "method": "gradient", "num_samples": samples}
    with ScoreWriter(folder / "b") as writer:
        writer.add_layer(layer, values_SN.mean(0), values_SN.square().mean(0), (groups, [5] * 8))
        writer.finish(target="completion", num_tokens=400, model={"fingerprint": "f"}, data={"sample_ids": []}, **about)
    cost = {layer: 0.5 + torch.rand(300, generator=generator)}
    text = {"target": "text", "target_args": {"labels": "model"}, "num_tokens": 400, "model": {"fingerprint": "f"}}
    write(folder / "g", {layer: torch.zeros(300)}, cost, **about, **text)
    return values_SN, cost[layer].double() * samples / (400 - samples)


@pytest.mark.parametrize(
    ("about", "wanted"),
    [
        ({"granularity": "neuron"}, 100),
        ({"granularity": "sparc3_pl.model.components.Neuron"}, 100),
        ({"granularity": "channel"}, 30),
        ({"granularity": "neuron+channel", "components": {"one": "neuron", "two": "channel"}}, 60),
    ],
)
def test_size_of_a_selection_that_is_not_given(tmp_path, about, wanted):
    layers = about.get("components", {"one": None})
    scores = SideScores.of([write(tmp_path / "s", {name: torch.rand(300) for name in layers}, signed=False, **about)])
    assert usual_size(scores) == wanted


def test_derivatives_are_held_against_chance_and_halves_against_each_other(tmp_path, capsys):
    values_SN, fisher = gains_sides(tmp_path, 1.0)
    sides = {"general": [str(tmp_path / "g")], "behaviour": [str(tmp_path / "b")]}
    result = evidence(**sides, contrast="budget", output=str(tmp_path / "e.json"))
    t = values_SN.mean(0) / (values_SN.std(0) / 40**0.5)
    (kind,) = result.kinds.values()
    assert (kind.components, kind.far) == (300, int((t.abs() >= 3).sum()))
    assert kind.expected == pytest.approx(2 * norm.sf(3) * 300)
    cosines = []
    rng = np.random.default_rng(0)
    for _ in range(20):
        order = rng.permutation(8)
        halves = (values_SN.view(8, 5, 300)[list(part)].mean((0, 1)) for part in (order[:4], order[4:]))
        one, other = (half / (fisher + 0.1 * fisher.mean()) for half in halves)
        cosines.append(float(one @ other / (one.norm() * other.norm())))
    assert result.halves == pytest.approx(sum(cosines) / 20, rel=1e-4)
    assert result.verdict == "pass"
    said = json.loads((tmp_path / "e.json").read_text())
    assert (said["contrast"], said["verdict"]) == ("budget", "pass")
    assert "Derivatives by the gains" in capsys.readouterr().out


def test_halves_of_a_budget_that_counts_what_components_cost_together(tmp_path, capsys):
    """Against the whole matrix, solved."""
    values_SN, _ = gains_sides(tmp_path, 1.0)
    layer = "model.layers.0.mlp.up_proj"
    draws_SN = torch.randn(40, 300, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    draws_SN[:, 40:] += draws_SN[:, :1]  # most cost much together
    about = {"signed": True, "at_values": True, "method": "gradient", "num_samples": 40, "model": {"fingerprint": "f"}}
    text = {"target": "text", "target_args": {"labels": "model"}, "num_tokens": 400}
    with ScoreWriter(tmp_path / "together") as writer:
        writer.add_layer(layer, draws_SN.mean(0), draws_SN.square().mean(0), (draws_SN, [1] * 40))
        writer.finish(data={"sample_ids": []}, **about, **text)
    sides = ["--general", str(tmp_path / "together"), "--behaviour", str(tmp_path / "b")]
    contrast = "{class_path: budget, init_args: {off_diagonal: 0.5, ridge: 0.2}}"
    assert main(["evidence", *sides, "--contrast", contrast, "--output", str(tmp_path / "e.json")]) == 0
    fisher_NN = draws_SN.T @ draws_SN / 360
    diagonal_N = fisher_NN.diagonal()
    cost_NN = 0.5 * fisher_NN + torch.diag(0.5 * diagonal_N + 0.2 * diagonal_N.mean())
    cosines = []
    rng = np.random.default_rng(0)
    for _ in range(20):
        order = rng.permutation(8)
        halves = (values_SN.view(8, 5, 300)[list(part)].mean((0, 1)) for part in (order[:4], order[4:]))
        one, other = (torch.linalg.solve(cost_NN, half) for half in halves)
        cosines.append(float(one @ other / (one.norm() * other.norm())))
    assert json.loads((tmp_path / "e.json").read_text())["halves"] == pytest.approx(sum(cosines) / 20, rel=1e-4)
    assert main(["evidence", *sides, "--contrast", "{class_path: rank}"]) == 2
    assert "arguments are for budget only" in capsys.readouterr().err


def test_costs_that_are_0_everywhere_are_refused(tmp_path):
    gains_sides(tmp_path, 1.0)
    layer = "model.layers.0.mlp.up_proj"
    about = {"signed": True, "at_values": True, "method": "gradient", "num_samples": 40, "model": {"fingerprint": "f"}}
    text = {"target": "text", "target_args": {"labels": "model"}, "num_tokens": 400}
    write(tmp_path / "nothing", {layer: torch.zeros(300)}, {layer: torch.zeros(300)}, **about, **text)
    with pytest.raises(InputError, match="Fisher information of general text is 0 everywhere"):
        evidence(general=[str(tmp_path / "nothing")], behaviour=[str(tmp_path / "b")], contrast="budget")


def test_settings_that_a_budget_does_not_read_are_refused(tmp_path):
    sides = {"general": [str(tmp_path / "g")], "behaviour": [str(tmp_path / "b")]}
    for name, value in (("num_neurons", 3), ("protect", 0.1)):
        with pytest.raises(InputError, match=f"{name}={value} with contrast=budget"):
            evidence(**sides, contrast="budget", **{name: value})


def test_halves_that_contradict_each_other_tell_nothing(tmp_path):
    """A single component: the steps of two halves are alike or opposite."""
    layer = "model.layers.0.mlp.up_proj"
    about = {"signed": True, "at_values": True, "method": "gradient", "num_samples": 2, "model": {"fingerprint": "f"}}
    with ScoreWriter(tmp_path / "b") as writer:
        writer.add_layer(layer, torch.tensor([0.5]), torch.tensor([2.5]), (torch.tensor([[2.0], [-1.0]]), [1, 1]))
        writer.finish(target="completion", num_tokens=8, data={"sample_ids": []}, **about)
    text = {"target": "text", "target_args": {"labels": "model"}, "num_tokens": 8}
    write(tmp_path / "g", {layer: torch.zeros(1)}, {layer: torch.ones(1)}, **about, **text)
    result = evidence(general=[str(tmp_path / "g")], behaviour=[str(tmp_path / "b")], contrast="budget")
    assert (result.halves, result.whole) == (-1.0, 0.0)


def test_derivatives_that_are_noise_do_not_pass(tmp_path):
    gains_sides(tmp_path, 0.0)
    result = evidence(general=[str(tmp_path / "g")], behaviour=[str(tmp_path / "b")], contrast="budget")
    assert {check.name: check.status for check in result.checks}["split halves of the edit"] != "pass"
    assert result.verdict == "fail"
