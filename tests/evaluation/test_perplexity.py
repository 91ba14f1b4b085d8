"""Perplexity against explicit loops: one window at a time, one token at a time, float64."""

import copy
import math

import pytest
import torch
from tiny_models import FAMILIES, VOCAB, tiny, tokens

from sparc3_pl.evaluation.perplexity import Perplexity, token_nll
from sparc3_pl.model.likelihood import IGNORE, WindowScorer, row_nll

MORE_THAN_A_HEAD = {
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 6, "final_logit_softcapping": 2.0},
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 4.0},
}


def window(text: torch.Tensor, max_length: int, stride: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Windows of a token sequence as (ids, labels): each token is scored in the window that first reaches it."""
    found, reached = [], 0
    for start in range(0, len(text), stride):
        ids = text[start : start + max_length]
        labels = ids.clone()
        labels[: max(0, reached - start)] = IGNORE
        found.append((ids, labels))
        reached = start + len(ids)
        if reached == len(text):
            break
    return found


def padded(windows, pad: int = 0):
    """Right-padded ids, mask and labels."""
    length = max(len(ids) for ids, _ in windows)
    ids = torch.full((len(windows), length), pad)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORE)
    for row, (i, wanted) in enumerate(windows):
        ids[row, : len(i)], mask[row, : len(i)], labels[row, : len(i)] = i, 1, wanted
    return ids, mask, labels


def slow_nll(model, ids: torch.Tensor, labels: torch.Tensor) -> tuple[float, int]:
    """One window, token by token, in Python floats, from the model's own logits."""
    logits = model(input_ids=ids[None]).logits[0].double()
    total, count = 0.0, 0
    for t in range(1, len(ids)):
        if labels[t] != IGNORE:
            row = logits[t - 1].tolist()
            top = max(row)
            total += top + math.log(sum(math.exp(v - top) for v in row)) - row[int(labels[t])]
            count += 1
    return total, count


@pytest.mark.parametrize("stride", [16, 5])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_windows_equal_a_loop_of_single_windows(tiny_model, stride, batch_size):
    windows = window(tokens(1, 57)[0], 16, stride)
    metric, scorer = Perplexity(), WindowScorer(tiny_model)
    for start in range(0, len(windows), batch_size):
        nll, count = scorer(*padded(windows[start : start + batch_size]))
        metric.update(nll=nll, num_tokens=count)
    with torch.no_grad():
        sums = [slow_nll(tiny_model, *w) for w in windows]
    assert int(metric.num_tokens) == sum(c for _, c in sums)
    assert float(metric.nll) == pytest.approx(sum(n for n, _ in sums), rel=1e-6)
    assert float(metric.compute()) == pytest.approx(
        math.exp(sum(n for n, _ in sums) / sum(c for _, c in sums)), rel=1e-6
    )


def test_every_token_but_the_first_is_scored_once_at_a_stride():
    text = tokens(1, 57)[0]
    assert sum(int((labels[1:] != IGNORE).sum()) for _, labels in window(text, 16, 5)) == 56


@pytest.mark.parametrize(("family", "extra"), MORE_THAN_A_HEAD.items())
def test_a_cap_or_scale_after_the_head_is_respected(family, extra):
    model = tiny(family, **extra)
    windows = window(tokens(1, 40)[0], 16, 5)
    scorer = WindowScorer(model)
    nll, count = scorer(*padded(windows))
    assert scorer.head_only is False
    with torch.no_grad():
        sums = [slow_nll(model, *w) for w in windows]
    torch.testing.assert_close(nll, torch.tensor([n for n, _ in sums], dtype=torch.float64), rtol=1e-5, atol=1e-5)
    assert count.tolist() == [c for _, c in sums]


@pytest.mark.parametrize("family", FAMILIES)
def test_supported_families_need_the_head_only(family):
    scorer = WindowScorer(tiny(family))
    scorer(tokens(1, 8), torch.ones(1, 8, dtype=torch.int64), tokens(1, 8))
    assert scorer.head_only is True


def test_a_model_without_logits_to_keep_is_scored_from_full_logits(tiny_llama):
    inner = tiny_llama.forward
    tiny_llama.forward = lambda input_ids, attention_mask, use_cache: inner(
        input_ids=input_ids, attention_mask=attention_mask
    )
    scorer = WindowScorer(tiny_llama)
    scorer.head_only = False
    ids, mask, labels = padded(window(tokens(1, 40)[0], 16, 5))
    nll, _ = scorer(ids, mask, labels)
    del tiny_llama.forward
    torch.testing.assert_close(nll, WindowScorer(tiny_llama)(ids, mask, labels)[0])


def test_padding_on_the_left_is_masked(tiny_llama):
    text = tokens(1, 9)
    ids = torch.cat([torch.zeros(1, 4, dtype=torch.int64), text], 1)
    labels = torch.cat([torch.full((1, 5), IGNORE), text[:, 1:]], 1)
    mask = (torch.arange(13) >= 4).long()[None]
    want, _ = WindowScorer(tiny_llama)(text, torch.ones_like(text), text)
    torch.testing.assert_close(WindowScorer(tiny_llama)(ids, mask, labels)[0], want)  # rotary positions are relative


def test_a_window_without_scored_tokens_counts_nothing(tiny_llama):
    ids = tokens(2, 8)
    nll, count = WindowScorer(tiny_llama)(ids, torch.ones_like(ids), torch.full_like(ids, IGNORE))
    assert nll.tolist() == [0.0, 0.0]
    assert count.tolist() == [0, 0]


def test_token_nll_equals_explicit_sum():
    logits, labels = torch.randn(3, 9, VOCAB) * 5, torch.randint(VOCAB, (3, 9))
    labels[0, 5:], labels[2, :4] = IGNORE, IGNORE
    total, count = 0.0, 0
    for b in range(3):
        for t in range(8):
            if labels[b, t + 1] != IGNORE:
                total -= float(logits[b, t].double().log_softmax(-1)[labels[b, t + 1]])
                count += 1
    nll, num = token_nll(logits, labels)
    assert (nll.dtype, num.dtype) == (torch.float64, torch.int64)
    assert float(nll) == pytest.approx(total, rel=1e-6)
    assert int(num) == count


def test_token_nll_refuses_labels_of_another_size():
    with pytest.raises(ValueError, match="do not fit"):
        token_nll(torch.zeros(2, 5, 7), torch.zeros(2, 4, dtype=torch.int64))


def test_large_logit_gaps_stay_finite():
    logits = torch.zeros(1, 2, 4)
    logits[0, 0, 1] = 1e4
    nll, _ = token_nll(logits, torch.tensor([[0, 2]]))
    assert float(nll) == pytest.approx(1e4)


@pytest.mark.parametrize("rows", [1, 2, 7, 100])
def test_blocks_of_rows_change_nothing(rows):
    logits, targets = torch.randn(7, 11), torch.randint(11, (7,))
    want = torch.nn.functional.cross_entropy(logits.double(), targets, reduction="none").float()
    torch.testing.assert_close(row_nll(logits, targets, rows), want)


def test_no_bias_at_the_logits_of_a_real_model():
    """Errors of one sign do not average out over a text: the mean must be far below what an edit changes."""
    logits, targets = torch.randn(200, 20_000) * 5 + 6, torch.randint(20_000, (200,))
    want = torch.nn.functional.cross_entropy(logits.double(), targets, reduction="none")
    assert abs(float((row_nll(logits, targets) - want).mean())) < 5e-7


def test_counts_beyond_what_float32_holds():
    metric = Perplexity()
    metric.update(nll=torch.tensor(2.0**24, dtype=torch.float64), num_tokens=torch.tensor(2**24))
    for _ in range(3):
        metric.update(nll=torch.tensor(1.0, dtype=torch.float64), num_tokens=torch.tensor(1))
    assert metric.totals() == (2.0**24 + 3, 2**24 + 3)


def test_states_add_up_over_processes_and_an_idle_one_takes_part():
    logits, labels = torch.randn(4, 6, 9), torch.randint(9, (4, 6))
    whole, parts = Perplexity(), [Perplexity() for _ in range(3)]
    whole.update(logits, labels)
    parts[0].update(logits[:3], labels[:3])
    parts[1].update(logits[3:], labels[3:])
    merged = copy.deepcopy(parts[2])
    merged.merge_state(parts[0])
    merged.merge_state(parts[1])
    assert float(merged.compute()) == pytest.approx(float(whole.compute()), rel=1e-12)
    assert set(whole.metric_state) == {"nll", "num_tokens"}
