"""Ablations at the reading sites, against plans that zero weights and against slow loops over single pairs."""

from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from pair_batches import pair_batches
from plans import plan_for
from tiny_models import tiny

from sparc3_pl.circuit.ablation import ABLATIONS, Mean, ablated, allows_compact, masked_weights, readings
from sparc3_pl.circuit.components import Candidates
from sparc3_pl.circuit.measure import measure, predictions_of_batch
from sparc3_pl.errors import InputError
from sparc3_pl.model.components import COMPONENTS
from sparc3_pl.model.structure import weight_matrix
from sparc3_pl.pruning.edit import pruned

FAMILIES = ["llama", "gpt2", "opt", "phi3", "gemma3_text", "gpt_neox"]
"""Gated with shared key/value heads, Conv1D, an MLP that sees [B * T, D], fused gate and up, more norms, fused qkv."""
KINDS = {name: COMPONENTS.make(name) for name in ("neuron", "head")}


def frozen(family, **overrides):
    return tiny(family, dtype=torch.float64, **overrides).requires_grad_(False)


def some_kept(count, share=0.6, seed=0):
    return torch.rand(count, generator=torch.Generator().manual_seed(seed)) < share


def state(model):
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    return hooks, [sorted(vars(m)) for m in model.modules()], [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("family", FAMILIES)
def test_zero_ablation_is_what_zeroed_columns_give(family):
    """The reading columns set to 0 in the weights: the same model, whatever the biases."""
    model, batches = frozen(family), pair_batches([6, 6, 5, 7], 2)
    candidates = Candidates.of(model, KINDS)
    kept = some_kept(candidates.count)
    zero = ABLATIONS.make("zero").replacement(model, list(candidates.readers), batches)
    predictions = measure(model, candidates, batches, {"some": kept}, zero)["some"]
    weights = {}
    for span in candidates.spans:
        for part in KINDS[span.kind].parts(
            model, span.group.layer, torch.arange(span.group.own.start, span.group.own.stop)
        ):
            if part.role == "reads":
                matrix = weight_matrix(model.get_submodule(part.layer))
                weights.setdefault(part.layer, matrix.clone())
                for column, owner in zip(part.index.tolist(), part.owner.tolist(), strict=True):
                    if not kept[span.start + owner]:
                        matrix[:, column] = 0.0
    wanted = torch.cat([predictions_of_batch(model, batch)[0] for batch in batches])
    torch.testing.assert_close(torch.from_numpy(predictions.difference_P), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_neurons_that_are_read_as_zero_need_not_be_made(family):
    model, batches = frozen(family), pair_batches([6, 5, 7], 3)
    candidates = Candidates.of(model, KINDS)
    assert allows_compact(model, candidates, batches[0])
    before = state(model)
    kept = {share: some_kept(candidates.count, share) for share in (0.0, 0.3, 0.9)}
    slow, fast = (measure(model, candidates, batches, kept, lambda batch: {}, compact=c) for c in (False, True))
    for share, predictions in slow.items():
        assert fast[share].difference_P == pytest.approx(predictions.difference_P, rel=1e-9, abs=1e-9)
    assert state(model)[:2] == before[:2]


def test_an_mlp_that_mixes_its_neurons_is_not_compacted():
    model, (batch,) = frozen("gpt2"), pair_batches([6, 5], 2)
    candidates = Candidates.of(model, KINDS)
    for block in model.transformer.h:
        block.mlp.act.register_forward_hook(lambda _, args, y: y - y.mean(-1, keepdim=True))
    assert not allows_compact(model, candidates, batch)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_zero_ablation_equals_a_plan_that_zeroes_the_components(family, kind):
    """Rows, biases and columns of whole components in the weights, against their readings alone."""
    model, batches = frozen(family), pair_batches([6, 5, 7], 3)
    candidates = Candidates.of(model, {kind: KINDS[kind]})
    kept = some_kept(candidates.count)
    predictions = measure(model, candidates, batches, {0: kept}, lambda batch: {})[0]
    chosen = [(span.group.layer, i) for span, index in candidates.split(~kept).items() for i in index.tolist()]
    with pruned(model, replace(plan_for(model, chosen, granularity=kind), shapes={})):
        wanted = predictions_of_batch(model, batches[0])[0]
    torch.testing.assert_close(torch.from_numpy(predictions.difference_P), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("family", "by_position"), [("llama", True), ("gpt2", False), ("opt", True), ("phi3", False)])
def test_mean_and_counterfactual_by_loops_over_single_pairs(family, by_position):
    """Each pair alone: the reader's output less its columns times what was taken away."""
    model, discovery, batches = frozen(family), pair_batches([6, 5, 7], 2, seed=1), pair_batches([9, 6, 5], 3)
    candidates = Candidates.of(model, KINDS)
    readers, kept = list(candidates.readers), some_kept(candidates.count)
    means = mean_by_loops(model, readers, discovery, by_position)
    for name, ablation in (("mean", Mean(by_position)), ("counterfactual", ABLATIONS.make("counterfactual"))):
        predictions = measure(model, candidates, batches, {0: kept}, ablation.replacement(model, readers, discovery))[0]
        for pair, (clean, other, answer, foil) in enumerate(single_pairs(batches)):
            stand_in = means(len(clean)) if name == "mean" else inputs(model, readers, other)
            logits = patched_logits(model, candidates, kept, clean, stand_in)
            assert predictions.difference_P[pair] == pytest.approx(
                float(logits[answer] - logits[foil]), rel=1e-9, abs=1e-9
            )
            assert bool(predictions.first_P[pair]) == (int(logits.argmax()) == answer)


def single_pairs(batches):
    for batch in batches:
        for row, mask in enumerate(batch.attention_mask):
            length = int(mask.sum())
            yield (
                batch.input_ids[row, :length], batch.fields["counterfactual_ids"][row, :length],
                int(batch.fields["answer"][row]), int(batch.fields["foil"][row]),
            )  # fmt: skip


def inputs(model, readers, ids):
    """What each reader reads of one sentence, ``[T, I]``."""
    found, hooks = {}, []
    for name in readers:
        hook = lambda _, args, y, name=name: found.__setitem__(name, args[0].reshape(len(ids), -1))  # noqa: E731
        hooks.append(model.get_submodule(name).register_forward_hook(hook))
    model(input_ids=ids[None])
    for hook in hooks:
        hook.remove()
    return found


def mean_by_loops(model, readers, batches, by_position):
    tokens = {name: [] for name in readers}
    for clean, *_ in single_pairs(batches):
        for name, x in inputs(model, readers, clean).items():
            tokens[name] += list(enumerate(x))

    def of(length):
        result = {}
        for name, rows in tokens.items():
            overall = sum(x for _, x in rows) / len(rows)
            own = []
            for t in range(length):
                here = [x for place, x in rows if place == t]
                own.append(sum(here) / len(here) if by_position and here else overall)
            result[name] = torch.stack(own)
        return result

    return of


def patched_logits(model, candidates, kept, ids, stand_in):
    hooks = []
    for name, owner in candidates.readers.items():

        def hook(module, args, y, name=name, owner=owner):
            matrix, x = weight_matrix(module), args[0].reshape(len(ids), -1)
            y = y.clone()
            for i, position in enumerate(owner.tolist()):
                if position >= 0 and not kept[position]:
                    y += ((stand_in[name][:, i] - x[:, i])[:, None] * matrix[:, i]).reshape(y.shape)
            return y

        hooks.append(model.get_submodule(name).register_forward_hook(hook))
    logits = model(input_ids=ids[None]).logits[0, -1]
    for hook in hooks:
        hook.remove()
    return logits


def test_single_weights_are_masked_and_restored_bit_for_bit():
    model, batches = tiny("gpt2").requires_grad_(False), pair_batches([6, 5], 2)
    candidates = Candidates.of(model, {"weight": COMPONENTS.make("weight")}, ["*.mlp.c_fc"])
    kept, before = some_kept(candidates.count), state(model)
    predictions = measure(model, candidates, batches, {0: kept, 1: ~kept}, lambda batch: {})
    assert state(model)[2][0].equal(before[2][0]) and all(map(torch.equal, state(model)[2], before[2]))
    start = 0
    for span in candidates.spans:
        matrix = weight_matrix(model.get_submodule(span.group.layer))
        for o in range(matrix.shape[0]):
            for i in range(matrix.shape[1]):
                if not kept[start]:
                    matrix[o, i] = 0.0
                start += 1
    wanted = predictions_of_batch(model, batches[0])[0]
    torch.testing.assert_close(torch.from_numpy(predictions[0].difference_P), wanted)


@pytest.mark.parametrize("crash", [False, True])
@pytest.mark.parametrize("kind", ["neuron", "weight"])
def test_leaves_nothing_behind(crash, kind):
    model = tiny("llama").requires_grad_(False)
    candidates = Candidates.of(model, {kind: COMPONENTS.make(kind)})
    before, kept = state(model), some_kept(candidates.count)
    block = masked_weights(model, candidates, kept) if kind == "weight" else ablated(model, candidates, kept, {})
    with suppress(RuntimeError), block:
        if crash:
            raise RuntimeError
    after = state(model)
    assert after[:2] == before[:2] and all(map(torch.equal, after[2], before[2]))
    with pytest.raises(InputError, match="takes no part"):
        readings(model, ["lm_head"], torch.tensor([[3, 4]]), torch.ones(1, 2, dtype=torch.int64))
    assert state(model)[:2] == before[:2]


def test_batches_make_no_difference():
    model = frozen("qwen2")
    lengths = [6, 9, 4, 7, 5]
    candidates = Candidates.of(model, KINDS)
    kept, readers = some_kept(candidates.count), list(candidates.readers)
    for name in ABLATIONS:
        predictions = []
        for size in (5, 1):
            batches = pair_batches(lengths, size)
            replacement = ABLATIONS.make(name).replacement(model, readers, batches)
            predictions.append(measure(model, candidates, batches, {0: kept}, replacement)[0])
        assert predictions[0].difference_P == pytest.approx(predictions[1].difference_P, rel=1e-9, abs=1e-9)


def test_what_nothing_reads_is_refused():
    model = tiny("llama")
    with pytest.raises(
        InputError, match=r"nothing is known to read the neurons of model\.layers\.0\.self_attn\.q_proj"
    ):
        Candidates.of(model, {"neuron": COMPONENTS.make("neuron")}, ["*.q_proj"])
    with pytest.raises(InputError, match=r"read by the same columns of model\.layers\.0\.self_attn\.o_proj"):
        Candidates.of(model, {name: COMPONENTS.make(name) for name in ("head", "channel")})
    with pytest.raises(InputError, match="measure weights in a run of their own"):
        Candidates.of(model, {name: COMPONENTS.make(name) for name in ("head", "weight")})
