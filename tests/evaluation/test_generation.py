"""Generation against an explicit loop: one row at a time, no cache, no padding, the inverse CDF in Python floats."""

import itertools
import math

import numpy as np
import pytest
import torch
from tiny_models import VOCAB, tiny
from tiny_tokenizers import with_template
from transformers import GenerationConfig, TopPLogitsWarper
from word_tokenizer import word_tokenizer

from sparc3_pl.errors import InputError
from sparc3_pl.evaluation import generation
from sparc3_pl.evaluation.decoding import _chunks
from sparc3_pl.evaluation.generation import Generator, Sampling, _largest, choose_tokens, completion_seed, uniforms
from sparc3_pl.evaluation.words import WordFilter
from sparc3_pl.model.kernels import repacked_linears

PROMPTS = ["w4 w5 w6", "w7", "w8 w9 w10 w11 w12 w13", "w14 w15", "w16 w17 w18 w19", "w20 w21 w22"]
IDS = [f"p{i}" for i in range(len(PROMPTS))]
SAMPLING = Sampling(max_new_tokens=12, temperature=0.8, top_p=0.9, samples_per_prompt=3, seed=5)


def slow_choice(logits: list[float], u: float, temperature: float, top_p: float) -> int:
    """Temperature, nucleus and inverse CDF in plain Python."""
    top = max(logits)
    weights = [math.exp((v - top) / temperature) for v in logits]
    probs = [w / sum(weights) for w in weights]
    order, mass, kept = sorted(range(len(probs)), key=lambda i: -probs[i]), 0.0, []
    for i in order:
        if mass >= top_p:
            break
        kept.append(i)
        mass += probs[i]
    target, mass = u * sum(probs[i] for i in kept), 0.0
    for i in sorted(kept):
        mass += probs[i]
        if mass > target:
            return i
    return max(kept)


@torch.no_grad()
def slow_completion(model, ids: list[int], seed: int, s: Sampling, end: int = 2) -> list[int]:
    new: list[int] = []
    for u in uniforms(seed, s.max_new_tokens):
        logits = model(input_ids=torch.tensor([ids + new]), use_cache=False).logits[0, -1].double().tolist()
        token = slow_choice(logits, u, s.temperature, s.top_p) if s.temperature else int(np.argmax(logits))
        if token == end:
            break
        new.append(token)
    return new


def test_equal_to_a_loop_of_single_rows(tiny_model):
    found = Generator(tiny_model, word_tokenizer(), SAMPLING)(IDS, PROMPTS)
    assert [(c.id, c.k) for c in found] == list(itertools.product(IDS, range(3)))
    for c in found:
        ids = [int(w[1:]) for w in c.prompt.split()]
        assert list(c.tokens) == slow_completion(tiny_model, ids, c.seed, SAMPLING)
        assert c.drawn == [*c.tokens, *[2][: SAMPLING.max_new_tokens - len(c.tokens)]]
        assert c.text == " ".join(f"w{t}" for t in c.tokens if t > 2)
        assert c.failed is None


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("split", [1, 2, 6])
def test_independent_of_batch_size_and_of_who_is_in_a_batch(tiny_llama, rows, split):
    want = Generator(tiny_llama, word_tokenizer(), SAMPLING)(IDS, PROMPTS)
    generator = Generator(tiny_llama, word_tokenizer(), SAMPLING, rows)
    found = []
    for start in range(split):  # as ranks share prompts out: every split-th one
        found += generator(IDS[start::split], PROMPTS[start::split])
    assert sorted(found, key=lambda c: (c.id, c.k)) == want


@pytest.mark.parametrize("fewest", [1, 10**9])
def test_copies_of_the_weights_change_no_completion(tiny_llama, monkeypatch, fewest):
    want = Generator(tiny_llama, word_tokenizer(), SAMPLING)(IDS, PROMPTS)
    entered = []
    monkeypatch.setattr(generation, "FEWEST_TOKENS_FOR_COPIES", fewest)
    monkeypatch.setattr(generation, "repacked_linears", lambda model: entered.append(1) or repacked_linears(model))
    assert Generator(tiny_llama, word_tokenizer(), SAMPLING)(IDS, PROMPTS) == want
    assert len(entered) == (fewest == 1)


def test_more_completions_begin_with_the_same_ones(tiny_llama):
    few = Generator(tiny_llama, word_tokenizer(), SAMPLING)(IDS, PROMPTS)
    more = Generator(tiny_llama, word_tokenizer(), Sampling(12, 0.8, 0.9, 5, seed=5))(IDS, PROMPTS)
    assert [c for c in more if c.k < 3] == few


def filter_of(tmp_path, words, tries):
    (tmp_path / "words.txt").write_text("\n".join(words))
    return WordFilter.of(str(tmp_path / "words.txt"), tries, SAMPLING.temperature)


def test_completions_with_a_listed_word_are_drawn_again_by_a_slow_loop(tiny_llama, tmp_path):
    words, tries = ["w4", "w10", "w30"], 3
    found = Generator(tiny_llama, word_tokenizer(), SAMPLING, word_filter=filter_of(tmp_path, words, tries))(
        IDS, PROMPTS
    )
    for c in found:
        ids = [int(w[1:]) for w in c.prompt.split()]
        for redraws in range(tries + 1):
            seed = completion_seed(SAMPLING.seed, c.id, c.k, redraws)
            tokens = slow_completion(tiny_llama, ids, seed, SAMPLING)
            if {4, 10, 30}.isdisjoint(tokens):
                break
        assert (list(c.tokens), c.seed, c.redraws) == (tokens, seed, redraws)
    left = [c for c in found if not {4, 10, 30}.isdisjoint(c.tokens)]
    redraws = {c.redraws for c in found}
    assert {0, 1, tries} <= redraws and 0 < len(left) < len(found)  # else the loop shows little
    assert all(c.redraws == tries for c in left)
    plain = Generator(tiny_llama, word_tokenizer(), SAMPLING)(IDS, PROMPTS)
    assert [c for c in found if not c.redraws] == [p for p, c in zip(plain, found, strict=True) if not c.redraws]


@pytest.mark.parametrize("rows", [1, 5])
def test_a_filter_leaves_completions_independent_of_batches_and_ranks(tiny_llama, tmp_path, rows):
    word_filter = filter_of(tmp_path, ["w4", "w10", "w30"], 2)
    want = Generator(tiny_llama, word_tokenizer(), SAMPLING, word_filter=word_filter)(IDS, PROMPTS)
    generator = Generator(tiny_llama, word_tokenizer(), SAMPLING, rows, word_filter)
    found = [c for start in range(3) for c in generator(IDS[start::3], PROMPTS[start::3])]
    assert sorted(found, key=lambda c: (c.id, c.k)) == want


def test_a_filter_that_could_change_nothing_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"model\.word_filter_tries=0"):
        WordFilter.of("default", 0, 0.7)
    with pytest.raises(InputError, match=r"model\.temperature=0"):
        WordFilter.of("default", 5, 0.0)
    with pytest.raises(InputError, match=r"model\.word_filter='none\.txt' cannot be read"):
        WordFilter.of("none.txt", 5, 0.7)


def test_seeds_differ_between_prompts_completions_and_runs():
    seeds = {completion_seed(s, i, k) for s in range(3) for i in IDS for k in range(4)}
    assert len(seeds) == 3 * len(IDS) * 4
    again = {completion_seed(s, i, k, r) for s in range(3) for i in IDS for k in range(4) for r in range(1, 4)}
    assert len(again) == 3 * len(seeds) and again.isdisjoint(seeds)
    assert completion_seed(0, "a", 0) == completion_seed(0, "a", 0)
    np.testing.assert_array_equal(uniforms(9, 40)[:7], uniforms(9, 7))


def test_temperature_zero_is_greedy(tiny_llama):
    sampling = Sampling(max_new_tokens=12, temperature=0)
    for c in Generator(tiny_llama, word_tokenizer(), sampling)(IDS, PROMPTS):
        ids = [int(w[1:]) for w in c.prompt.split()]
        assert list(c.tokens) == slow_completion(tiny_llama, ids, c.seed, sampling)


def test_the_models_own_generation_settings_are_not_used(tiny_llama):
    want = Generator(tiny_llama, word_tokenizer(), SAMPLING)(IDS, PROMPTS)
    own = GenerationConfig(
        do_sample=True, temperature=5.0, top_k=2, repetition_penalty=9.0, min_new_tokens=9, forced_eos_token_id=4,
        suppress_tokens=[5, 6], max_length=5, eos_token_id=2,
    )  # fmt: skip
    tiny_llama.generation_config = own
    assert Generator(tiny_llama, word_tokenizer(), SAMPLING)(IDS, PROMPTS) == want
    assert tiny_llama.generation_config is own


def test_every_end_token_of_the_model_ends_a_completion(tiny_llama):
    free = Generator(tiny_llama, word_tokenizer(), SAMPLING)(IDS, PROMPTS)
    stop = next(c.tokens[3] for c in free if len(c.tokens) > 6)
    tiny_llama.generation_config.eos_token_id = [2, stop]
    generator = Generator(tiny_llama, word_tokenizer(), SAMPLING)
    assert generator.describe()["eos_token_ids"] == sorted({2, stop})
    for before, after in zip(free, generator(IDS, PROMPTS), strict=True):
        end = before.tokens.index(stop) if stop in before.tokens else len(before.tokens)
        assert after.tokens == before.tokens[:end]


def test_special_tokens_before_a_prompt_are_kept_and_an_empty_prompt_is_bos(tiny_llama):
    sampling = Sampling(max_new_tokens=5, temperature=0)
    found = Generator(tiny_llama, word_tokenizer(bos=True), sampling)(["a", "b"], ["w4 w5", ""])
    assert list(found[0].tokens) == slow_completion(tiny_llama, [1, 4, 5], 0, sampling)
    assert list(found[1].tokens) == slow_completion(tiny_llama, [1], 0, sampling)


def test_what_a_tokenizer_puts_after_a_prompt_is_not_read(tiny_llama):
    ending = with_template(word_tokenizer(bos=True), "<s> $A </s>")
    sampling = Sampling(max_new_tokens=5, temperature=0)
    (found,) = Generator(tiny_llama, ending, sampling)(["a"], ["<s> w4 w5"])
    assert list(found.tokens) == slow_completion(tiny_llama, [1, 4, 5], 0, sampling)


def test_prompts_that_leave_no_room_fail_and_the_others_do_not(tiny_llama):
    prompts = ["w4 w5", " ".join(["w6"] * 60)]  # the context is 64
    found = Generator(tiny_llama, word_tokenizer(), SAMPLING)(["a", "b"], prompts)
    assert [c.failed is None for c in found] == [True] * 3 + [False] * 3
    assert "60 tokens and 12 new ones" in found[-1].failed
    assert found[-1].text is None


def test_a_prompt_without_tokens_fails_where_there_is_no_bos(tiny_llama):
    tokenizer = word_tokenizer()
    tokenizer.bos_token = None
    (found,) = Generator(tiny_llama, tokenizer, Sampling(4))(["a"], ["  "])
    assert found.failed == "the prompt has no tokens"


def test_broken_logits_fail_one_completion_only(tiny_llama):
    want = Generator(tiny_llama, word_tokenizer(), Sampling(6))(["a", "b"], ["w4 w5 w6", "w4"])
    inner = tiny_llama.forward

    def forward(input_ids, **kwargs):
        out = inner(input_ids=input_ids, **kwargs)
        if input_ids.shape == (1, 1) and "position_ids" not in kwargs:  # the prompt of one token
            out.logits[0, -1, 7] = math.nan
        return out

    generator = Generator(tiny_llama, word_tokenizer(), Sampling(6))
    assert generator(["a"], ["w4 w5 w6"]) == want[:1]  # so that the model has been tried
    tiny_llama.forward = forward
    found = generator(["a", "b"], ["w4 w5 w6", "w4"])
    assert found[0] == want[0]
    assert (found[1].text, found[1].failed) == (None, "the model's logits are not finite at new token 0")


def test_logits_that_break_later_fail_the_completion_from_there_on(tiny_llama):
    generator = Generator(tiny_llama, word_tokenizer(), SAMPLING)
    want = generator(IDS, PROMPTS)
    inner = tiny_llama.forward

    def forward(position_ids=None, **kwargs):
        out = inner(position_ids=position_ids, **kwargs)
        if position_ids is not None:
            out.logits[position_ids[:, 0] == 6] = math.inf
        return out

    tiny_llama.forward = forward
    for before, after in zip(want, generator(IDS, PROMPTS), strict=True):
        step = 7 - len(before.prompt.split())  # the position that breaks is read for this new token
        if len(before.drawn) > step:
            assert after.failed == f"the model's logits are not finite at new token {step}"
        else:
            assert after == before


def test_a_batch_that_does_not_fit_is_halved(tiny_llama):
    generator = Generator(tiny_llama, word_tokenizer(), SAMPLING)
    want = generator(IDS, PROMPTS)
    inner = tiny_llama.forward

    def forward(input_ids, **kwargs):
        if len(input_ids) > 4:
            raise torch.OutOfMemoryError
        return inner(input_ids=input_ids, **kwargs)

    tiny_llama.forward = forward
    assert generator(IDS, PROMPTS) == want
    assert generator.rows_per_batch <= 4


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "qwen3", "gemma2", "phi3", "mamba"])
def test_the_fast_and_the_general_way_draw_the_same(family):
    """``gpt2``: no groups of heads; ``mistral`` and ``gemma2``: windows, here of 6; ``mamba``: no attention at all."""
    window = {"sliding_window": 6} if family in ("mistral", "gemma2") else {}
    heads = {"head_dim": 8, "query_pre_attn_scalar": 8} if family == "gemma2" else {}
    state = {"intermediate_size": 64} if family == "mamba" else {}
    generator = Generator(tiny(family, **window, **heads, **state), word_tokenizer(), SAMPLING)
    prompts = ["w9 w5", *PROMPTS]
    found = generator(["x", *IDS], prompts)
    assert (generator._decoder is None) == (family == "mamba")
    assert family != "mistral" or generator._decoder.longest == 6
    generator._decoder = None
    assert found == generator(["x", *IDS], prompts)


def test_a_window_longer_than_all_rows_is_no_window():
    model = tiny("mistral", sliding_window=18)  # the longest prompt has 6 tokens, 12 are new
    generator = Generator(model, word_tokenizer(), SAMPLING)
    model.generate = None
    for c in generator(IDS, PROMPTS):
        ids = [int(w[1:]) for w in c.prompt.split()]
        assert list(c.tokens) == slow_completion(model, ids, c.seed, SAMPLING)
    assert generator._decoder_for((1,), 19) is None


def test_a_model_whose_cache_misleads_goes_the_general_way(tiny_llama):
    inner = tiny_llama.forward

    def forward(position_ids=None, **kwargs):
        return inner(**kwargs)  # positions by the number of slots in the cache, wrong for the shorter row

    tiny_llama.forward = forward
    generator = Generator(tiny_llama, word_tokenizer(), SAMPLING)
    assert generator._decoder_for((4, 5, 6), 10) is None


def test_a_prompt_is_read_once_and_rows_that_have_ended_leave(tiny_llama):
    generator = Generator(tiny_llama, word_tokenizer(), Sampling(12, 0.8, 0.9, 8, seed=5))
    found = generator(IDS, PROMPTS)  # tried
    shapes = []
    inner = tiny_llama.forward

    def forward(input_ids, **kwargs):
        shapes.append(tuple(input_ids.shape))
        return inner(input_ids=input_ids, **kwargs)

    tiny_llama.forward = forward
    assert generator(IDS, PROMPTS) == found
    steps = [rows for rows, width in shapes if width == 1][1:]  # but for the prompt of one token
    assert sorted(shapes[: len(shapes) - len(steps)]) == [
        (1, 1),
        (1, 2),
        (1, 4),
        (1, 6),
        (2, 3),
    ]  # all too short to pad
    alive = [sum(len(c.drawn) > step for c in found) for step in range(1, 12)]
    assert alive[-1] < len(found)  # some must end for this to bite
    assert all(rows < 8 / 7 * a + 1 for rows, a in zip(steps, alive, strict=True))


def test_prompts_of_about_one_length_are_read_together(tiny_llama):
    prompts = [" ".join(f"w{3 + (7 * i + n) % 47}" for i in range(n)) for n in (24, 23, 21, 20, 5)]
    ids = [f"p{n}" for n in range(5)]
    generator = Generator(tiny_llama, word_tokenizer(), SAMPLING)
    found = generator(ids, prompts)
    for c in found:
        tokens = [int(w[1:]) for w in c.prompt.split()]
        assert list(c.tokens) == slow_completion(tiny_llama, tokens, c.seed, SAMPLING)
    a, b, c, d, e = ((0,) * n for n in (24, 23, 21, 20, 5))
    assert _chunks([a, a, b, b, c, d, e]) == [(0, 5), (5, 6), (6, 7)]
    assert _chunks([(1,) * 3000, (2,) * 3000, (3,) * 1, (3,) * 1]) == [(0, 1), (1, 2), (2, 4)]
    assert _chunks([(1, 2), (1, 2, 3)]) == [(0, 1), (1, 2)]


def test_few_rows_where_little_memory_is_free(tiny_llama, monkeypatch):
    want = Generator(tiny_llama, word_tokenizer(), SAMPLING)(IDS, PROMPTS)
    generator = Generator(tiny_llama, word_tokenizer(), SAMPLING)
    # Two layers, two heads for keys and two for values of 8 numbers of 4 bytes.
    row_bytes = 2 * 18 * (2 * 2 * 2 * 8 * 4) + 24 * VOCAB
    monkeypatch.setattr("sparc3_pl.evaluation.generation.free_memory", lambda _: 2 * 3.5 * row_bytes)
    assert generator._most_rows((1,) * 6) == 3
    assert generator(IDS, PROMPTS) == want
    monkeypatch.setattr("sparc3_pl.evaluation.generation.free_memory", lambda _: 0)
    assert generator._most_rows((1,) * 6) == 1


@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("vocabulary", [20, 5000])
def test_nucleus_is_the_one_of_transformers(top_p, vocabulary):
    logits = torch.randn(6, vocabulary) * 2
    kept = TopPLogitsWarper(top_p)(None, logits.clone()).softmax(-1)
    for u in (0.0, 0.1, 0.5, 0.77, 0.999999):
        found = choose_tokens(logits, torch.full((6,), u, dtype=torch.float64), 1.0, top_p)
        cdf = kept.double().cumsum(-1)
        want = (cdf <= u * cdf[:, -1:]).sum(-1)
        assert found.tolist() == want.tolist()


def test_drawn_as_often_as_the_probabilities_say():
    logits = torch.tensor([2.0, 0.0, 1.0, -30.0, 1.5])
    draws = torch.from_numpy(uniforms(0, 20_000))
    found = choose_tokens(logits.expand(20_000, -1), draws, 1.0, 1.0).bincount(minlength=5) / 20_000
    torch.testing.assert_close(found, logits.softmax(-1), atol=0.01, rtol=0)


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.5}, {"max_new_tokens": 0}, {"samples_per_prompt": 0}]
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        Sampling(**wrong)


def test_large_vocabulary_with_a_flat_distribution():
    logits = torch.zeros(2, VOCAB * 100)
    assert (
        choose_tokens(logits, torch.tensor([0.0, 0.5], dtype=torch.float64), 1.0, 0.9) == torch.tensor([0, 2500])
    ).all()


def test_a_number_just_below_one_picks_a_token_of_the_nucleus():
    logits = torch.tensor([[0.1, 3.0, 2.9, 0.2, 2.8, -1.0]])
    u = torch.tensor([1 - 2**-53], dtype=torch.float64)
    assert choose_tokens(logits, u, 1.0, 0.8).item() == 4
    assert choose_tokens(logits, u, 1.0, 1.0).item() == 5


@pytest.mark.parametrize("vocabulary", [50, 8192, 8192 + 37, 20_000])
def test_the_largest_by_columns_are_those_of_topk(vocabulary):
    values = torch.randn(5, vocabulary).round(decimals=2)  # many are equal
    for count in (1, 64, 500):
        largest, places = _largest(values, min(count, vocabulary))
        torch.testing.assert_close(largest, values.topk(min(count, vocabulary)).values, rtol=0, atol=0)
        torch.testing.assert_close(values.gather(1, places), largest, rtol=0, atol=0)
        assert all(len(set(row)) == len(row) for row in places.tolist())


def test_tokens_as_likely_as_the_last_of_the_nucleus_stay_also_beyond_the_head():
    logits = torch.full((1, 20_000), -20.0)
    logits[0, 7] = 10.0
    logits[0, 1000:1300] = 5.0  # 300 alike, of which the nucleus needs 12
    top_p = 0.35 + 1e-3
    probs = logits.double().softmax(-1)[0]
    first, rest = float(probs[7]), float(probs[1000])
    assert first < top_p < first + 64 * rest
    for u in (0.0, 0.4, 0.7, 0.999):
        total = first + 300 * rest
        want = 7 if u * total < first else 1000 + int((u * total - first) / rest)
        assert choose_tokens(logits, torch.tensor([u], dtype=torch.float64), 1.0, top_p).item() == want


def test_gemma_2_with_sliding_cache():
    model = tiny("gemma2", head_dim=8, query_pre_attn_scalar=8, sliding_window=6)
    for c in Generator(model, word_tokenizer(), SAMPLING)(IDS, PROMPTS):
        ids = [int(w[1:]) for w in c.prompt.split()]
        assert list(c.tokens) == slow_completion(model, ids, c.seed, SAMPLING)
