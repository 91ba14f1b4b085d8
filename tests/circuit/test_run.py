"""Arms on tiny models: scores, rankings, curves and agreement, against explicit loops."""

import itertools

import numpy as np
import pytest
import torch
from pair_batches import pair_batches
from tiny_models import tiny

from sparc3_pl.attribution.methods import Random
from sparc3_pl.circuit.ablation import ABLATIONS, ablated
from sparc3_pl.circuit.arms import agreement, arms_of, kept_of, order_of, score_arm
from sparc3_pl.circuit.components import Candidates
from sparc3_pl.circuit.curves import num_kept
from sparc3_pl.circuit.export import circuit_plan, node_importances
from sparc3_pl.circuit.measure import predictions_of_batch
from sparc3_pl.circuit.run import Bench, measure_arm, overlaps_of_arms, strength_request
from sparc3_pl.errors import InputError
from sparc3_pl.model.components import COMPONENTS
from sparc3_pl.model.heads import attentions
from sparc3_pl.model.identity import fingerprint
from sparc3_pl.pruning.edit import pruned
from sparc3_pl.scoring.score_run import ScoreRequest
from sparc3_pl.statistics.agreement import jaccard

FRACTIONS = (0.05, 0.2, 0.5, 1.0)
LENGTHS = [7, 7, 6, 6, 5, 5, 5, 4]


def setting(family="llama", kinds=("neuron", "head"), sets=1):
    model = tiny(family, dtype=torch.float64).requires_grad_(False)
    discovery = [pair_batches(LENGTHS, 1, seed=seed) for seed in range(1, sets + 1)]
    candidates = Candidates.of(model, {name: COMPONENTS.make(name) for name in kinds})
    return model, candidates, discovery, as_it_should(model, pair_batches(LENGTHS, 5))


def as_it_should(model, batches):
    """The pairs with answer and foil so exchanged that the model is right on each."""
    for batch in batches:
        difference, _ = predictions_of_batch(model, batch)
        swap, (answer, foil) = difference < 0, (batch.fields[name] for name in ("answer", "foil"))
        batch.fields |= {"answer": torch.where(swap, foil, answer), "foil": torch.where(swap, answer, foil)}
    return batches


def arms(*methods, kinds=("neuron", "head"), draws=3, signed=True):
    return arms_of(list(methods), list(kinds), "answer", None, signed, draws, 0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_an_arm_by_loops(family):
    """Each component's score by the derivative of its gain; each circuit by hooks of its own; areas by a sum."""
    model, candidates, sets, tests = setting(family)
    bench = Bench.of(model, candidates, ABLATIONS.make("zero"), sets, tests, FRACTIONS)
    (arm,) = arms("gradient")
    measured = measure_arm(arm, bench, sets, resamples=0)
    wanted = derivatives_by_gains(model, candidates, pair_batches(LENGTHS, 8, seed=1))
    torch.testing.assert_close(measured.values_N.double(), wanted, rtol=1e-5, atol=1e-7)
    order = sorted(range(candidates.count), key=lambda i: -float(measured.values_N[i]))
    by_size = sorted(range(candidates.count), key=lambda i: -abs(float(measured.values_N[i])))
    full, empty = mean_difference(model, candidates, tests, None), mean_difference(model, candidates, tests, [])
    shares, absolute = [], []
    for place, fraction in enumerate(FRACTIONS):
        number = num_kept(fraction, candidates.count)
        top = mean_difference(model, candidates, tests, order[:number])
        rest = mean_difference(model, candidates, tests, order[number:])
        point, necessity = measured.result.curve[place], measured.result.necessity[place]
        assert (point.kept, necessity.kept) == (number, candidates.count - number)
        assert point.logit_difference == pytest.approx(top) and necessity.logit_difference == pytest.approx(rest)
        shares.append((top - empty) / (full - empty))
        absolute.append((mean_difference(model, candidates, tests, by_size[:number]) - empty) / (full - empty))
    if bench.ends.gap.is_clear:
        assert [p.faithfulness for p in measured.result.curve] == pytest.approx(shares)
        assert measured.result.cpr == pytest.approx(area(shares))
        assert measured.result.cmd == pytest.approx(area([abs(1 - share) for share in absolute]))
    assert measured.result.curve[-1].logit_difference == pytest.approx(bench.ends.full.difference_P.mean())


def area(values):
    return sum(
        (b - a) * (x + y) / 2 for (a, b), (x, y) in zip(*map(itertools.pairwise, (FRACTIONS, values)), strict=True)
    )


def derivatives_by_gains(model, candidates, batches):
    """Mean over pairs of the derivative of the logit difference by a gain that multiplies each component's value."""
    gains = torch.ones(candidates.count + 1, dtype=torch.float64, requires_grad=True)  # the last for what is no one's
    hooks = []
    for name, owner in candidates.readers.items():
        hook = lambda _, args, owner=owner: (args[0] * gains[owner], *args[1:])  # noqa: E731
        hooks.append(model.get_submodule(name).register_forward_pre_hook(hook))
    total = sum(predictions_of_batch(model, batch)[0].sum() for batch in batches) / len(LENGTHS)
    for hook in hooks:
        hook.remove()
    return torch.autograd.grad(total, gains)[0][:-1]


def mean_difference(model, candidates, batches, kept):
    """The mean logit difference, pair by pair; None keeps every component."""
    every = torch.zeros(candidates.count, dtype=torch.bool)
    every[range(candidates.count) if kept is None else kept] = True
    with torch.no_grad(), ablated(model, candidates, every, {}):
        return float(np.mean([d for batch in batches for d in predictions_of_batch(model, batch)[0].tolist()]))


def test_a_method_that_compares_all_samples_is_completed_for_each_set():
    """As one scoring run of each set alone; the values are AUROCs, of which there are none before the last batch."""
    model, candidates, sets, _ = setting(kinds=("neuron",), sets=2)
    batches = [pair_batches(LENGTHS, 3, seed=seed) for seed in range(len(sets))]
    for batch in itertools.chain(*batches):
        batch.fields["label"] = torch.arange(len(batch.ids)) % 2
    request = ScoreRequest.of("expertise", "neuron")
    scores = score_arm(request, model, batches)
    assert [unit.num_samples for unit in scores.units] == [len(LENGTHS)] * 2
    for number, own in enumerate(batches):
        alone = request.scorer(model)
        for batch in own:
            alone.update(batch)
        alone.finish()
        wanted = candidates.flat({name: alone.scores(name, len(LENGTHS)).scores for name in alone.layers})
        assert torch.equal(scores.values(candidates, group=number), wanted) and wanted.unique().numel() > 2


def test_random_circuits_have_a_mean_and_a_band():
    model, candidates, sets, tests = setting()
    bench = Bench.of(model, candidates, ABLATIONS.make("zero"), sets, tests, FRACTIONS)
    (arm,) = arms("random", draws=4)
    result = measure_arm(arm, bench, sets).result
    assert result.draws == 4 and result.curve_absolute is None and not result.stability
    means = []
    for request in arm.requests:
        order = order_of(score_arm(request, model, sets).values(candidates))
        means.append(mean_difference(model, candidates, tests, order[: num_kept(0.2, candidates.count)].tolist()))
    assert len(set(means)) == 4
    assert result.curve[1].logit_difference == pytest.approx(np.mean(means))
    assert result.curve[1].logit_difference_low == pytest.approx(np.quantile(means, 0.025))


class Centred(Random):
    """Drawn scores of both signs."""

    def scores(self, *args):
        return super().scores(*args) - 0.5


def test_drawn_scores_may_have_a_sign():
    model, candidates, sets, tests = setting(kinds=("neuron",))
    bench = Bench.of(model, candidates, ABLATIONS.make("zero"), sets, tests, FRACTIONS)
    (arm,) = arms({"class_path": f"{__name__}.Centred"}, kinds=("neuron",), draws=3)
    result = measure_arm(arm, bench, sets).result
    means = []
    for request in arm.requests:
        order = order_of(score_arm(request, model, sets).values(candidates).abs())
        means.append(mean_difference(model, candidates, tests, order[: num_kept(0.2, candidates.count)].tolist()))
    assert result.signed and result.draws == 3
    assert result.curve_absolute[1].logit_difference == pytest.approx(np.mean(means))


def test_one_pass_for_each_fraction_whatever_the_number_of_components():
    model, candidates, sets, tests = setting()
    pairs = []
    bench = Bench.of(model, candidates, ABLATIONS.make("zero"), sets, tests, FRACTIONS, 0, pairs.append)
    assert sum(pairs) == 2 * len(LENGTHS)
    pairs.clear()
    measure_arm(arms("wanda")[0], bench, sets, resamples=0, progress=pairs.append)
    to_score = sum(len(batch.ids) for batches in sets for batch in batches)
    assert sum(pairs) == to_score + 2 * (len(FRACTIONS) - 1) * len(LENGTHS)  # all and nothing were measured already


def test_kinds_compete_by_value_or_by_share():
    model, candidates, sets, _ = setting()
    for method, signed, wanted in (("gradient", True, "value"), ("gradient", False, "share"), ("wanda", True, "share")):
        scores = score_arm(arms(method, signed=signed)[0].request, model, sets)
        values, raw = scores.values(candidates), candidates.flat({n: s.scores for n, s in scores.of().items()})
        assert scores.across_kinds == wanted
        assert values.equal(raw) is (wanted == "value")
        first = 0
        for count in candidates.kinds.values():  # the order within a kind is that of the scores
            own = slice(first, first + count)
            assert order_of(values[own]).equal(order_of(raw[own]))
            if wanted == "share":
                assert sorted(values[own].tolist()) == pytest.approx([(i + 1) / count for i in range(count)])
            first += count


def test_scores_of_units_add_up_to_those_of_one_pass():
    model, candidates, sets, _ = setting(sets=2)
    for method in ("lrp", "wanda"):
        request = arms(method)[0].request
        parts = score_arm(request, model, sets)
        together = score_arm(request, model, [pair_batches(LENGTHS, 8, seed=1)]).values(candidates)
        torch.testing.assert_close(parts.values(candidates, group=0), together)
        twice = parts.values(candidates, dict.fromkeys(range(8), 2))  # the first set twice, the second not at all
        torch.testing.assert_close(twice if method == "lrp" else together, together)
        assert [len(parts.samples[number]) for number in (0, 1)] == [8, 8]


def test_stability_over_resamples_and_sets():
    model, candidates, sets, tests = setting(sets=2)
    bench = Bench.of(model, candidates, ABLATIONS.make("zero"), sets, tests, FRACTIONS)
    measured = measure_arm(arms("gradient")[0], bench, sets, resamples=6)
    orders = [order_of(measured.scores[0].values(candidates, group=number)) for number in (0, 1)]
    for row in measured.result.stability:
        wanted = jaccard(*(order[: row.kept].tolist() for order in orders))
        assert row.sets == pytest.approx(wanted)
        assert row.resamples_low <= row.resamples <= row.resamples_high <= 1
    assert measured.result.stability[-1].resamples == 1.0
    alike = [[pair_batches([6], 1, seed=5)[0]] * 4]  # all units are one pair: no resample changes anything
    rows = measure_arm(arms("gradient")[0], bench, [alike[0]], resamples=3).result.stability
    assert all(row.resamples == 1.0 and row.sets is None for row in rows)
    assert agreement(torch.tensor([0, 1, 2, 3]), torch.tensor([1, 0, 3, 2]), 1) == 0.0


def test_overlaps_against_circuits_of_the_same_strength():
    model, candidates, sets, tests = setting()
    bench = Bench.of(model, candidates, ABLATIONS.make("zero"), sets, tests, FRACTIONS)
    strength = score_arm(strength_request(arms("gradient")[0]), model, sets)
    order = order_of(torch.rand(candidates.count))
    _, same, _ = overlaps_of_arms({"a": order, "b": order}, strength, bench, 99)
    assert same.common == num_kept(0.2, candidates.count) and same.jaccard == 1.0
    assert same.p_value == pytest.approx(1 / 100) and same.expected < same.common


def test_plans_remove_and_keep_the_circuit():
    model, candidates, _, tests = setting("phi3")
    kept = kept_of(order_of(torch.rand(candidates.count)), 20)
    about = {"pretrained": "demo", "fingerprint": fingerprint(model)}
    for chosen in (kept, ~kept):
        plan = circuit_plan(candidates, "lrp", chosen, torch.rand(candidates.count), about, {}, [])
        assert plan.num_neurons == int(chosen.sum())
        stays = (~chosen).nonzero().flatten().tolist()
        with pruned(model, plan):
            found = float(np.mean([d for batch in tests for d in predictions_of_batch(model, batch)[0].tolist()]))
        assert found == pytest.approx(mean_difference(model, candidates, tests, stays))


def test_importances_name_heads_and_mlps():
    model, candidates, sets, _ = setting("gpt2")
    scores = score_arm(arms("gradient")[0].request, model, sets)
    graph = node_importances(model, candidates, scores)
    assert graph["cfg"] == {"n_layers": 2, "n_heads": 4, "d_model": 32, "parallel_attn_mlp": False}
    names = {"input", "logits", *(f"a{layer}.h{head}" for layer in range(2) for head in range(4)), "m0", "m1"}
    assert set(graph["nodes"]) == names and graph["edges"] == {}
    layers = scores.of()
    assert graph["nodes"]["a1.h2"]["score"] == float(layers[attentions(model)[1].output].scores[2])
    assert graph["nodes"]["m0"]["score"] == pytest.approx(
        float(layers["transformer.h.0.mlp.c_fc"].scores.sum()), rel=1e-5
    )
    assert node_importances(model, setting("gpt2", ("neuron",))[1], scores) is None


def test_single_weights():
    model, candidates, sets, tests = setting("gpt2", ("weight",))
    bench = Bench.of(model, candidates, ABLATIONS.make("zero"), sets, tests, FRACTIONS)
    before = [p.clone() for p in model.parameters()]
    measured = measure_arm(arms("lrp", kinds=("weight",))[0], bench, sets)
    assert all(map(torch.equal, before, model.parameters()))
    assert not measured.result.signed and measured.result.stability[0].resamples is None
    assert measured.result.curve[-1].logit_difference == pytest.approx(bench.ends.full.difference_P.mean())


def test_wanda_compares_single_weights_within_their_row():
    model, candidates, sets, _ = setting("gpt2", ("weight",))
    scores = score_arm(arms("wanda", kinds=("weight",))[0].request, model, sets)
    kept = kept_of(order_of(scores.values(candidates)), candidates.count // 4)
    for span in candidates.spans:
        rows, raw = kept[span.own].view(span.group.shape), scores.of()[span.group.layer].scores
        assert set(rows.sum(1).tolist()) == {rows.shape[1] // 4}
        for row, values in zip(rows, raw, strict=True):
            assert float(values[row].min()) >= float(values[~row].max())


def test_methods_that_cannot_be_arms():
    with pytest.raises(InputError, match="gradient is named twice"):
        arms("gradient", "gradient")
    with pytest.raises(InputError, match=r"model\.methods is an empty list"):
        arms()
    assert [arm.name for arm in arms("lrp", {"class_path": "lrp", "init_args": {"rules": "cp"}})] == [
        "lrp",
        "lrp-rules-cp",
    ]
    with pytest.raises(InputError, match=r"model\.granularity is an empty list"):
        arms("lrp", kinds=())


@pytest.mark.parametrize("method", ["lrp", "integrated_gradients", "attribution_patching", "relevance_patching"])
def test_every_method_with_a_target_attributes_the_answer(method):
    """Also one that no other target suits."""
    (arm,) = arms(method)
    assert arm.request.target.name == "answer" and arm.request.options.signed
