"""AUROC of responses, against all pairs compared one by one."""

import pytest
import torch
from tiny_models import tiny, tokens

from sparc3_pl.attribution.methods_expertise import pairs_in_order
from sparc3_pl.attribution.scorers import Scorer
from sparc3_pl.attribution.soundness import padded
from sparc3_pl.cli import main
from sparc3_pl.data.batches import ReferenceBatch
from sparc3_pl.errors import InputError
from sparc3_pl.scoring.module import ScoringModule

SAMPLES = [tokens(1, length, seed=length)[0] for length in (7, 3, 5, 9, 4, 6, 2)]
LABELS = torch.tensor([1, 0, 0, 1, 0, 1, 0])


def batches(labels=LABELS):
    for part in (slice(0, 3), slice(3, 4), slice(4, 7)):
        yield ReferenceBatch(*padded(SAMPLES[part]), fields={"label": labels[part]})


def share_in_order(responses, labels):
    """One unit's AUROC."""
    marks = [
        1.0 if a > b else 0.5 if a == b else 0.0
        for a, label in zip(responses, labels, strict=True) if label
        for b, other in zip(responses, labels, strict=True) if not other
    ]  # fmt: skip
    return sum(marks) / len(marks)


def responses_of(model, layer, of_input):
    """``[samples, units]``: the largest input or output of a layer over each sample's own tokens."""
    rows = []

    def hook(_, args, output):
        seen = args[0] if of_input else output
        rows.append(seen.detach().reshape(-1, seen.shape[-1]).amax(0))

    handle = model.get_submodule(layer).register_forward_hook(hook)
    for sample in SAMPLES:
        model(sample[None])
    handle.remove()
    return torch.stack(rows)


CASES = {
    "neurons": ("llama", "neuron", "values", None),
    "neurons of a fused map": ("phi3", "neuron", "values", None),
    "channels": ("llama", "channel", "values", None),
    "outputs": ("llama", "neuron", "outputs", ["*.up_proj", "*.gate_proj", "*.down_proj"]),
    "outputs in one row a token": ("opt", "neuron", "outputs", ["*.fc1", "*.fc2"]),
}


@pytest.mark.parametrize("case", CASES)
def test_against_all_pairs(case):
    family, kind, at, layers = CASES[case]
    model = tiny(family, dtype=torch.float64).requires_grad_(False)
    scorer = Scorer(model, {"class_path": "expertise", "init_args": {"at": at}}, kind, layers)
    for batch in batches():
        scorer.update(batch)
    scorer.finish()
    for name, layer in scorer.layers.items():
        read = layer.group.site.layer if at == "values" else name
        responses = responses_of(model, read, at == "values")
        wanted = torch.tensor([share_in_order(column, LABELS) for column in responses.T.tolist()])
        torch.testing.assert_close(scorer.scores(name, len(SAMPLES)).scores[layer.group.own], wanted)


def test_equal_responses_count_half():
    generator = torch.Generator().manual_seed(0)
    labelled, others = (torch.randint(0, 3, (n, 5), generator=generator).float() for n in (6, 4))
    got = pairs_in_order(labelled, others) / 24
    for unit in range(5):
        responses = [*labelled[:, unit].tolist(), *others[:, unit].tolist()]
        assert got[unit] == pytest.approx(share_in_order(responses, [1] * 6 + [0] * 4))


def test_rounding_decides_nothing():
    """Responses to a token that every sample begins with differ in their last bits only."""
    noise = 1 + 1e-7 * torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
    scores = pairs_in_order(*(torch.tensor([3.0, -2.0, 0.5]) * noise).split([6, 4])) / 24
    assert scores.tolist() == [0.5] * 3


def test_two_runs_of_one_method_do_not_mix():
    model = tiny("llama").requires_grad_(False)
    first = Scorer(model, "expertise")
    second = Scorer(model, first.method)
    for batch in batches():
        first.update(batch)
    for batch in batches(1 - LABELS):
        second.update(batch)
    for scorer in (first, second):
        scorer.finish()
    for name in first.layers:  # the other labels: every pair the other way round
        torch.testing.assert_close(first.scores(name, 7).scores, 1 - second.scores(name, 7).scores)


def test_what_cannot_be_done():
    model = tiny("llama").requires_grad_(False)
    alike = Scorer(model, "expertise")
    for batch in batches(torch.zeros(7)):
        alike.update(batch)
    alike.finish()
    with pytest.raises(InputError, match="the samples are all labelled, or none is"):
        alike.scores("model.layers.0.mlp.up_proj", 7)
    with pytest.raises(InputError, match="not single units"):
        Scorer(model, "expertise", "head")
    with pytest.raises(InputError, match="cannot score it"):
        Scorer(model, "expertise", "weight")
    for key, value in (("part", "1/2"), ("checkpoint_every", 2)):
        with pytest.raises(InputError, match=f"neither sums in between nor those of a part can be kept; .*{key}"):
            ScoringModule(method="expertise", output="here", **{key: value})


def test_samples_of_one_kind_are_refused_before_the_model_is_loaded(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sparc3_pl.scoring.module.load_model", lambda source: pytest.fail("the model was loaded"))
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(f'{{"text": "The cat number {i} sat.", "label": 0.3}}\n' for i in range(20)))
    words = ["score", "--model.method", "expertise", "--data.source", str(file), "--data.label_field", "label"]
    more = ["--data.num_samples", "4", "--data.seq_len", "8", "--output", str(tmp_path / "scores")]
    assert main([*words, *more]) == 2
    assert "the samples are all labelled, or none is" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["expertise", "activation", "gradient"])
def test_a_layer_that_runs_twice_has_no_one_value(method):
    model = tiny("llama").requires_grad_(False)
    model.model.layers[1].mlp = model.model.layers[0].mlp
    scorer = Scorer(model, method)
    with pytest.raises(InputError, match="runs twice in one pass"):
        scorer.update(next(batches()))
