"""Contrasts against explicit loops over all components, in float64."""

import math

import numpy as np
import pytest
import torch
from score_folders import LAYERS, random_scores, write

from sparc3_pl.errors import InputError
from sparc3_pl.scores import folder as scores_module
from sparc3_pl.scores.folder import ScoreFolder
from sparc3_pl.selection.contrast import SetDifference, SideScores, average_ranks, contrast, format_warnings, protected
from sparc3_pl.selection.lowest import collect


def flat(passes) -> np.ndarray:
    return torch.cat([block.values for block in collect(passes).values()]).numpy().astype(np.float64)


def open_to_choice(passes) -> np.ndarray:
    """Positions of the components that may be chosen."""
    blocks = collect(passes).values()
    return torch.cat([torch.ones(len(b.values)) if b.allowed is None else b.allowed for b in blocks]).bool().numpy()


def side(tmp_path, name, seeds, shape=(7,), **kwargs) -> SideScores:
    return SideScores.of([write(tmp_path / f"{name}{seed}", random_scores(seed, shape), **kwargs) for seed in seeds])


def values_of(seeds, shape=(7,)) -> np.ndarray:
    sets = [torch.cat([v.flatten() for v in random_scores(seed, shape).values()]).double().numpy() for seed in seeds]
    return np.mean(sets, axis=0)


@pytest.mark.parametrize("shape", [(7,), (7, 5)], ids=["neuron", "weight"])
def test_difference_and_normalized_by_loops(tmp_path, shape):
    general, behaviour = side(tmp_path, "g", (1, 2), shape), side(tmp_path, "b", (3,), shape)
    g, b = values_of((1, 2), shape), values_of((3,), shape)
    np.testing.assert_allclose(flat(contrast("difference", general, behaviour)), g - b, atol=1e-7)
    expected = [x / sum(g) - y / sum(b) for x, y in zip(g, b, strict=True)]
    np.testing.assert_allclose(flat(contrast("normalized", general, behaviour)), expected, atol=1e-8)
    np.testing.assert_allclose(flat(contrast("general", general, None)), g, atol=1e-7)


def test_normalized_takes_magnitudes_of_signed_scores(tmp_path):
    values = {"a": torch.tensor([3.0, -3.0, 2.0])}
    general, behaviour = (SideScores.of([write(tmp_path / n, values, signed=True)]) for n in "gb")
    assert general.total() == 8
    assert not flat(contrast("normalized", general, behaviour)).any()


def test_ranks_share_their_mean():
    values = [3.0, 1.0, 3.0, -2.0, 3.0, 1.0]
    by_loop = [sum(v < x for v in values) + (sum(v == x for v in values) + 1) / 2 for x in values]
    assert average_ranks(torch.tensor(values)).tolist() == by_loop


def test_rank_by_loops(tmp_path):
    general, behaviour = side(tmp_path, "g", (1, 2)), side(tmp_path, "b", (3,))
    g, b = values_of((1, 2)), values_of((3,))
    expected = [sum(g < x) - sum(b < y) for x, y in zip(g, b, strict=True)]
    np.testing.assert_array_equal(flat(contrast("rank", general, behaviour)), expected)


def test_t_is_welchs_statistic(tmp_path):
    """From the per-sample scores themselves, by scipy."""
    from scipy.stats import ttest_ind

    generator = torch.Generator().manual_seed(0)
    samples = [torch.rand(n, 7, generator=generator) for n in (12, 5)]
    sides = [
        SideScores.of([write(tmp_path / str(i), {"a": x.mean(0)}, {"a": x.square().mean(0)}, num_samples=len(x))])
        for i, x in enumerate(samples)
    ]
    expected = ttest_ind(samples[0].double().numpy(), samples[1].double().numpy(), equal_var=False).statistic
    np.testing.assert_allclose(flat(contrast("t", *sides)), expected, rtol=1e-4)


def test_t_with_several_seeds(tmp_path):
    generator = torch.Generator().manual_seed(0)
    seeds = [torch.rand(n, 4, generator=generator).double() for n in (6, 9)]
    other = torch.rand(5, 4, generator=generator).double()
    general = SideScores.of(
        [
            write(tmp_path / f"g{i}", {"a": x.mean(0)}, {"a": x.square().mean(0)}, num_samples=len(x))
            for i, x in enumerate(seeds)
        ]
    )
    behaviour = SideScores.of(
        [write(tmp_path / "b", {"a": other.mean(0)}, {"a": other.square().mean(0)}, num_samples=5)]
    )
    error = sum(x.var(0) / len(x) for x in seeds) / 4 + other.var(0) / 5
    expected = ((seeds[0].mean(0) + seeds[1].mean(0)) / 2 - other.mean(0)) / error.sqrt()
    np.testing.assert_allclose(flat(contrast("t", general, behaviour)), expected.numpy(), rtol=1e-4)


def test_t_of_dead_and_of_constant_neurons_is_finite(tmp_path):
    sides = [
        SideScores.of([write(tmp_path / n, {"a": torch.tensor([0.0, c])}, {"a": torch.tensor([0.0, c * c])})])
        for n, c in (("g", 2.0), ("b", 3.0))
    ]
    values = flat(contrast("t", *sides))
    assert values[0] == 0
    assert np.isfinite(values).all()
    assert values[1] < -500


def test_t_of_a_layer_that_is_read_in_several_blocks(tmp_path, monkeypatch):
    """As with more rows than a block has; all of them have their t."""
    monkeypatch.setattr(scores_module.mean_blocks, "__defaults__", (3,))
    generator = torch.Generator().manual_seed(0)
    samples = [torch.rand(n, 7, generator=generator).double() for n in (12, 5)]
    sides = [
        SideScores.of([write(tmp_path / str(i), {"a": x.mean(0)}, {"a": x.square().mean(0)}, num_samples=len(x))])
        for i, x in enumerate(samples)
    ]
    g, b = samples
    expected = (g.mean(0) - b.mean(0)) / (g.var(0) / 12 + b.var(0) / 5).sqrt()
    np.testing.assert_allclose(flat(contrast("t", *sides)), expected.numpy(), rtol=1e-4)


def test_set_difference_by_sets(tmp_path):
    general, behaviour = side(tmp_path, "g", (1,)), side(tmp_path, "b", (3,))
    g, b = values_of((1,)), values_of((3,))
    top_g, top_b = set(np.argsort(-g)[: round(0.2 * 21)]), set(np.argsort(-b)[: round(0.4 * 21)])
    passes = contrast(SetDifference(top_general=0.2, top_behaviour=0.4), general, behaviour)
    values = flat(passes)
    assert np.isfinite(values).all()
    assert set(np.flatnonzero(open_to_choice(passes))) == top_b - top_g
    np.testing.assert_allclose(values[list(top_b - top_g)], -b[list(top_b - top_g)], rtol=1e-6)


def test_protected_are_the_strongest_by_magnitude(tmp_path):
    general = SideScores.of([write(tmp_path / "g", {"a": torch.tensor([1.0, -9.0, 8.0, 0.5, -2.0])}, signed=True)])
    passes = protected(general, general, 0.4)
    assert np.flatnonzero(~open_to_choice(passes)).tolist() == [1, 2]
    assert flat(passes).tolist() == [1.0, -9.0, 8.0, 0.5, -2.0]
    assert flat(protected(general, general, 0)).tolist() == [1.0, -9.0, 8.0, 0.5, -2.0]


def test_layers_can_be_chosen(tmp_path):
    folder = write(tmp_path / "g", random_scores(1))
    assert SideScores.of([folder], ["*.1.*", "*.0.*"]).layers == LAYERS[:2]
    with pytest.raises(InputError, match=r"layers: 'x\*' matches no scored layer"):
        SideScores.of([folder], ["x*"])


def test_rows_of_a_fused_map_that_are_not_neurons_are_left_out(tmp_path):
    folder = write(tmp_path / "g", {"a": torch.arange(6.0), "b": torch.arange(6.0)}, neuron_rows={"a": [3, 6]})
    scores = SideScores.of([folder])
    assert scores.count == 9
    assert [(layer, block.offset, block.values.tolist()) for layer, block in collect(scores).items()] == [
        ("a", 3, [3.0, 4.0, 5.0]),
        ("b", 0, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]),
    ]


@pytest.mark.parametrize("kind", ["difference", "normalized", "set_difference"])
def test_one_block_at_a_time(tmp_path, monkeypatch, kind):
    """Weight scores are never read whole: a block of each folder, of one layer, whatever the contrast."""
    monkeypatch.setattr(ScoreFolder, "load", None)
    monkeypatch.setattr(scores_module, "BLOCK", 8)
    monkeypatch.setattr(scores_module.mean_blocks, "__defaults__", (8,))
    general, behaviour = side(tmp_path, "g", (1, 2), (7, 5)), side(tmp_path, "b", (3,), (7, 5))
    kind = SetDifference(0.3, 0.3) if kind == "set_difference" else kind
    sizes = [len(block.values) for block in contrast(kind, general, behaviour)()]
    assert sizes == [8, 8, 8, 8, 3] * 3
    assert sum(sizes) == 3 * 35


def test_scores_that_are_not_finite_are_refused(tmp_path):
    folder = write(tmp_path / "g", {"a": torch.tensor([1.0, math.nan])})
    with pytest.raises(InputError, match="layer a has scores that are not finite"):
        flat(contrast("general", SideScores.of([folder]), None))


@pytest.mark.parametrize(
    ("kind", "shape", "match"),
    [
        ("rank", (7, 5), "is not for weight scores; use difference"),
        ("t", (7, 5), "is not for weight scores"),
        ("t", (7,), "holds no squares"),
        ("guess", (7,), "contrast='guess' is unknown; known are difference"),
    ],
)
def test_refused(tmp_path, kind, shape, match):
    general, behaviour = side(tmp_path, "g", (1,), shape), side(tmp_path, "b", (3,), shape)
    with pytest.raises(InputError, match=match):
        contrast(kind, general, behaviour)


def test_needs_behaviour(tmp_path):
    with pytest.raises(InputError, match="needs behaviour scores; give --behaviour"):
        contrast("difference", side(tmp_path, "g", (1,)), None)


def test_all_zero_cannot_be_normalized(tmp_path):
    zero = SideScores.of([write(tmp_path / "z", {"a": torch.zeros(3)})])
    with pytest.raises(InputError, match="all scores are zero"):
        contrast("normalized", zero, zero)


def folder_of(tmp_path, name, lengths, endings):
    samples = [{"id": f"{name}{i}", "num_tokens": n, "ending": e} for i, (n, e) in enumerate(zip(lengths, endings))]  # noqa: B905
    return write(tmp_path / name, random_scores(1), samples=samples)


def test_unlike_formats_are_told(tmp_path):
    windows = folder_of(tmp_path, "w", [256] * 4, ["cut"] * 4)
    prompts = folder_of(tmp_path, "p", [10, 12, 14, 18], ["stop", "stop", "stop", "cut"])
    alike = folder_of(tmp_path, "a", [11, 12, 14, 18], ["stop", "stop", "stop", "cut"])
    found = format_warnings([windows], [prompts])
    assert len(found) == 2
    assert "256.0 tokens on average, behaviour samples 13.5" in found[0]
    assert "0% of general samples end with a full stop, of behaviour samples 75%" in found[1]
    assert format_warnings([alike], [prompts]) == []
    assert format_warnings([write(tmp_path / "n", random_scores(1))], [prompts]) == []
