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
from sparc3_pl.evaluation.generation import Generator, Sampling, choose_tokens, completion_seed, uniforms

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


def test_more_completions_begin_with_the_same_ones(tiny_llama):
    few = Generator(tiny_llama, word_tokenizer(), SAMPLING)(IDS, PROMPTS)
    more = Generator(tiny_llama, word_tokenizer(), Sampling(12, 0.8, 0.9, 5, seed=5))(IDS, PROMPTS)
    assert [c for c in more if c.k < 3] == few


def test_seeds_differ_between_prompts_completions_and_runs():
    seeds = {completion_seed(s, i, k) for s in range(3) for i in IDS for k in range(4)}
    assert len(seeds) == 3 * len(IDS) * 4
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
    inner = tiny_llama.forward

    def forward(*args, **kwargs):
        out = inner(*args, **kwargs)
        out.logits[1, -1, 7] = math.nan
        return out

    want = Generator(tiny_llama, word_tokenizer(), Sampling(6))(["a", "b"], ["w4 w5 w6", "w4"])
    tiny_llama.forward = forward
    found = Generator(tiny_llama, word_tokenizer(), Sampling(6))(["a", "b"], ["w4 w5 w6", "w4"])
    assert found[0] == want[0]
    assert (found[1].text, found[1].failed) == (None, "the model's logits are not finite at new token 0")


def test_a_batch_that_does_not_fit_is_halved(tiny_llama):
    want = Generator(tiny_llama, word_tokenizer(), SAMPLING)(IDS, PROMPTS)
    inner = tiny_llama.generate

    def generate(input_ids, **kwargs):
        if len(input_ids) > 4:
            raise torch.OutOfMemoryError
        return inner(input_ids, **kwargs)

    tiny_llama.generate = generate
    generator = Generator(tiny_llama, word_tokenizer(), SAMPLING)
    assert generator(IDS, PROMPTS) == want
    assert generator.rows_per_batch <= 4


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


def test_gemma_2_with_sliding_cache():
    model = tiny("gemma2", head_dim=8, query_pre_attn_scalar=8, sliding_window=6)
    for c in Generator(model, word_tokenizer(), SAMPLING)(IDS, PROMPTS):
        ids = [int(w[1:]) for w in c.prompt.split()]
        assert list(c.tokens) == slow_completion(model, ids, c.seed, SAMPLING)
