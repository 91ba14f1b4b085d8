"""Text models inside a model that reads images too: the text model alone is scored and edited."""

import pytest
import torch
from plans import plan_for, same_bits, state
from tiny_models import EAGER_ONLY, WRAPPED, tiny, tokens
from transformers import AutoModelForCausalLM

from sparc3_pl.attribution.account import relevance_account
from sparc3_pl.attribution.methods import Options
from sparc3_pl.attribution.scorers import Scorer
from sparc3_pl.data.batches import ReferenceBatch
from sparc3_pl.model.loading import auto_class, load_model, load_skeleton
from sparc3_pl.model.source import ModelSource
from sparc3_pl.model.structure import decoder_layers, linear_layers, mlps
from sparc3_pl.pruning.edit import pruned
from sparc3_pl.pruning.save import save_pruned, save_shrunk

IDS = tokens(1, 11)


@pytest.mark.parametrize("family", WRAPPED)
def test_only_the_text_model_is_seen(family):
    model = tiny(family)
    assert [mlp.up for mlp in mlps(model)] == [f"model.language_model.layers.{i}.mlp.up_proj" for i in range(2)]
    assert all(name == "lm_head" or name.startswith("model.language_model.") for name in linear_layers(model))
    assert len(decoder_layers(model)) == 2


@pytest.mark.parametrize("family", WRAPPED)
def test_account_balances(family):
    account = relevance_account(tiny(family, dtype=torch.float64), IDS)
    assert account.relative_residual <= 1e-6
    assert account.softmax != 0


@pytest.mark.parametrize("side", ["right", "left"])
def test_scores_are_those_of_the_text_model_alone(side):
    wrapped = tiny("gemma3").requires_grad_(False)
    alone = AutoModelForCausalLM.from_config(wrapped.config.text_config).eval().requires_grad_(False)
    alone.model.load_state_dict(wrapped.model.language_model.state_dict())
    alone.lm_head.load_state_dict(wrapped.lm_head.state_dict())
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.int64)
    mask[1, slice(5, None) if side == "right" else slice(0, 4)] = 0
    for method, options in (("lrp", Options()), ("gradient", Options(signed=True)), ("wanda", Options())):
        vectors = []
        for model in (wrapped, alone):
            scorer = Scorer(model, method, "neuron", options=options)
            scorer.update(ReferenceBatch(ids, mask))
            vectors.append(torch.cat([scorer.scores(name, 2).scores for name in scorer.layers]))
        torch.testing.assert_close(*vectors)


@pytest.mark.parametrize("save", [save_pruned, save_shrunk])
@pytest.mark.parametrize("family", WRAPPED)
def test_an_edit_leaves_the_rest_untouched(family, save, tmp_path):
    model = tiny(family)
    before, plan = state(model), plan_for(model)
    result = save(model, None, plan, tmp_path / "m")
    assert same_bits(state(model), before)
    assert result.max_difference < 1e-5
    loaded = auto_class(model.config).from_pretrained(tmp_path / "m").eval()
    with pruned(model, plan), torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits, rtol=0, atol=1e-5)
    after = loaded.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items() if ".mlp." not in name)
    assert all(torch.equal(after[name], before[name]) for name in before if "vision" in name or "visual" in name)
    assert loaded.config.text_config.intermediate_size == (24 if save is save_pruned else 21)


def test_load_and_skeleton(tmp_path):
    model = tiny("qwen3_vl")
    model.save_pretrained(tmp_path / "m")
    loaded = load_model(ModelSource(str(tmp_path / "m")))
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)
    skeleton = load_skeleton(ModelSource(str(tmp_path / "m")))
    assert [mlp.up for mlp in mlps(skeleton)] == [mlp.up for mlp in mlps(model)]


@pytest.mark.parametrize("family", EAGER_ONLY)
def test_soft_capped_attention_is_loaded_as_eager(family, tmp_path):
    """The caps bite, and are not lost on the way."""
    model = tiny(family)
    model.save_pretrained(tmp_path / "m")
    loaded = load_model(ModelSource(str(tmp_path / "m")))
    assert loaded.config._attn_implementation == "eager"
    with torch.no_grad():
        got = loaded(input_ids=IDS).logits
        assert torch.equal(got, model(input_ids=IDS).logits)
        for layer in loaded.model.layers:
            layer.self_attn.attn_logit_softcapping = None
        assert not torch.allclose(loaded(input_ids=IDS).logits, got, atol=1e-2)
