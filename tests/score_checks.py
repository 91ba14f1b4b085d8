"""Comparing score folders."""

from pathlib import Path

import torch

from sparc3_pl.scores.folder import ScoreFolder

TOLERANCE = 1e-6
"""Relative: of a layer as a whole (norm and sum), and of its largest score for every element. A small element that is a
sum of large terms depends, in float32, on the shape of the batch that it was computed in: 4e-6 of itself was seen.
"""


def assert_same_scores(found: Path, wanted: Path, num_samples: int) -> None:
    """Scores, squares, samples and counts are the same; no sample is missing or counted twice."""
    one, other = ScoreFolder.open(found), ScoreFolder.open(wanted)
    ids = one.manifest.data["sample_ids"]
    assert len(ids) == len(set(ids)) == one.manifest.num_samples == num_samples
    assert ids == other.manifest.data["sample_ids"] == [sample.id for sample in one.samples()]
    assert one.manifest.num_tokens == other.manifest.num_tokens
    assert one.layers == other.layers
    for name in one.layers:
        _assert_close(one.load(name), other.load(name))
        counts = [(m.layers[name].nan, m.layers[name].inf) for m in (one.manifest, other.manifest)]
        assert counts[0] == counts[1]
        if one.manifest.squares:
            _assert_close(one.load_squares(name), other.load_squares(name))
        assert one.manifest.group_sizes == other.manifest.group_sizes
        if one.manifest.groups:
            _assert_close(one.load_groups(name), other.load_groups(name))


def _assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    found, wanted = found.double(), wanted.double()
    torch.testing.assert_close(found, wanted, rtol=TOLERANCE, atol=float(wanted.abs().max()) * TOLERANCE)
    assert (found - wanted).norm() <= TOLERANCE * wanted.norm()
    assert abs(found.sum() - wanted.sum()) <= TOLERANCE * wanted.sum().abs()
