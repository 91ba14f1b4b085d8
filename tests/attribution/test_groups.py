"""Scores of groups of samples: the same however the work is split, and their mean is the score."""

import pytest
import torch
from score_folders import LAYERS, random_scores
from tiny_models import tiny, tokens

from sparc3_pl.attribution.methods import Options, group_of
from sparc3_pl.attribution.scorers import Scorer
from sparc3_pl.attribution.soundness import padded
from sparc3_pl.data.batches import ReferenceBatch
from sparc3_pl.errors import InputError
from sparc3_pl.scores.folder import ScoreFolder
from sparc3_pl.scores.writer import ScoreWriter
from sparc3_pl.scoring.module import ScoringModule

GROUPS = 3
SAMPLES = [tokens(1, length, seed=length)[0] for length in (9, 4, 6, 2, 7, 5)]


def test_a_group_is_told_by_the_tokens_alone():
    right, left = (group_of(*padded(SAMPLES, side), GROUPS) for side in ("right", "left"))
    alone = [int(group_of(*padded([sample]), GROUPS)) for sample in SAMPLES]
    assert right.tolist() == left.tolist() == alone
    many = group_of(*padded([torch.tensor([i, i + 1]) for i in range(800)]), 8).bincount()
    assert many.min() > 60  # about 100 in each


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("batch", [1, 4, 6])
def test_groups_equal_scoring_each_group_by_itself(signed, batch):
    model = tiny("llama").requires_grad_(False)
    scorer = Scorer(model, options=Options(signed=signed, groups=GROUPS))
    for start in range(0, len(SAMPLES), batch):
        scorer.update(ReferenceBatch(*padded(SAMPLES[start : start + batch])))
    member = group_of(*padded(SAMPLES), GROUPS)
    for name in scorer.layers:
        means, sizes = scorer.scores(name, len(SAMPLES)).groups
        assert sizes == member.bincount(minlength=GROUPS).tolist()
        weighted = (means * torch.tensor(sizes)[:, None]).sum(0) / len(SAMPLES)
        torch.testing.assert_close(weighted, scorer.scores(name, len(SAMPLES)).scores)
    for group in range(GROUPS):
        inside = [sample for sample, one in zip(SAMPLES, member, strict=True) if one == group]
        alone = Scorer(model, options=Options(signed=signed))
        for sample in inside:
            alone.update(ReferenceBatch(*padded([sample])))
        for name in scorer.layers:
            expected = alone.scores(name, len(inside)).scores if inside else torch.zeros(24)
            means, _ = scorer.scores(name, len(SAMPLES)).groups
            torch.testing.assert_close(means[group], expected, rtol=1e-4, atol=1e-5)


def test_a_folder_keeps_groups(tmp_path):
    values, sizes = random_scores(1), [2, 0, 1]
    groups = {name: torch.rand(3, 7) for name in LAYERS}
    with ScoreWriter(tmp_path / "a") as writer:
        for name in LAYERS:
            writer.add_layer(name, values[name], groups=(groups[name], sizes))
        writer.finish(method="lrp", num_samples=3, num_tokens=9, model={"fingerprint": "sha256:00"}, data={})
    folder = ScoreFolder.open(tmp_path / "a")
    assert folder.manifest.group_sizes == sizes
    assert all(torch.equal(folder.load_groups(name), groups[name]) for name in LAYERS)
    file = tmp_path / "a" / "groups.safetensors"
    data = bytearray(file.read_bytes())
    data[-2] ^= 1
    file.write_bytes(data)
    with pytest.raises(InputError, match="sha256"):
        ScoreFolder.open(tmp_path / "a").load_groups(LAYERS[-1])
    file.unlink()
    with pytest.raises(InputError, match="groups"):
        ScoreFolder.open(tmp_path / "a")


@pytest.mark.parametrize(
    "options", [{"groups": -1}, {"groups": 4, "granularity": "weight"}, {"groups": 4, "method": "wanda"}]
)
def test_refused_where_there_are_none(options):
    with pytest.raises(InputError, match=r"model\.groups"):
        ScoringModule(**options)
