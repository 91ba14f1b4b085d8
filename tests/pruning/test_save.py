"""Saved models: loaded by plain transformers, they do what the pruned model in memory did."""

import re

import pytest
import torch
from plans import plan_for, same_bits, state
from tiny_models import tiny, tokens
from tiny_tokenizers import of_letters
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparc3_pl.errors import InputError
from sparc3_pl.model.identity import fingerprint
from sparc3_pl.model.structure import mlps
from sparc3_pl.pruning import save as save_module
from sparc3_pl.pruning.edit import pruned, revert
from sparc3_pl.pruning.edits import mean_activations
from sparc3_pl.pruning.plan import PrunePlan
from sparc3_pl.pruning.save import SavedModel, _model_card, save_pruned, save_shrunk, shrink

IDS = tokens(3, 11, seed=7)


@pytest.fixture(scope="module")
def tokenizer():
    return of_letters()


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, use_cache=False).logits


def test_loads_plainly_with_equal_logits(tiny_model, tokenizer, tmp_path):
    plan, before = plan_for(tiny_model), state(tiny_model)
    with pruned(tiny_model, plan):
        expected = logits(tiny_model)
    result = save_pruned(tiny_model, tokenizer, plan, tmp_path / "m")
    assert same_bits(state(tiny_model), before)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    assert torch.equal(logits(loaded), expected)
    assert result.max_difference == 0
    assert "same size: neurons set to zero" in str(result)
    assert AutoTokenizer.from_pretrained(tmp_path / "m")("a b")["input_ids"] == [3, 4]
    assert PrunePlan.load(tmp_path / "m/plan.json").neurons == plan.neurons
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_keeps_the_number_format(tiny_llama, tokenizer, tmp_path, dtype):
    model = tiny_llama.to(dtype)
    save_pruned(model, tokenizer, plan_for(model), tmp_path / "m")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "m").dtype == dtype


def test_a_model_that_says_it_is_quantised(tiny_llama, tokenizer, tmp_path):
    """As a GGUF file leaves it; transformers refuses to save such a model."""
    from transformers import GgufConfig

    plan = plan_for(tiny_llama)
    tiny_llama.config.quantization_config = quantised = GgufConfig(dequantize=True)
    save_pruned(tiny_llama, tokenizer, plan, tmp_path / "m")
    assert tiny_llama.config.quantization_config is quantised
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert not hasattr(loaded.config, "quantization_config")


def test_saved_model_can_be_reverted(tiny_llama, tokenizer, tmp_path):
    from sparc3_pl.selection.command import _with_kept_values

    plan = _with_kept_values(plan_for(tiny_llama), tiny_llama)
    save_pruned(tiny_llama, tokenizer, plan, tmp_path / "m")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert fingerprint(loaded) == plan.model["pruned_fingerprint"]
    revert(loaded, PrunePlan.load(tmp_path / "m/plan.json"))
    assert same_bits(state(loaded), state(tiny_llama))


def test_model_card_tells_the_provenance(tiny_llama, tokenizer, tmp_path):
    command = "sparc3 prune --general /home/me/g --output=/home/me/p.json"
    plan = plan_for(tiny_llama, warnings=["general samples are long"], command=command)
    save_pruned(tiny_llama, tokenizer, plan, tmp_path / "m")
    text = (tmp_path / "m/README.md").read_text()
    for part in (
        plan.fingerprint,
        "Same size: neurons set to zero, ",
        "general samples are long",
        "model.layers.1.mlp.up_proj",
        "6 neurons",
    ):
        assert part in text
    assert "`sparc3 prune --general g --output=p.json`" in text
    assert str(tmp_path) not in text
    assert re.match(r"---\n.*\n---\n", text, re.DOTALL)


@pytest.mark.parametrize(
    ("fields", "told"),
    [({"edit": "scale", "alpha": 0.5}, "neurons multiplied by 0.5"), ({"edit": "mean"}, "replaced by their mean")],
)
def test_what_is_said_of_an_edit_is_what_it_did(tokenizer, tmp_path, fields, told):
    model = tiny("opt")
    means = mean_activations(model, [(IDS, torch.ones_like(IDS))])
    result = save_pruned(model, tokenizer, plan_for(model, means=means, **fields), tmp_path / "m")
    assert f"same size: {told if told.startswith('neurons') else 'neurons ' + told}" in str(result)
    assert told in (tmp_path / "m/README.md").read_text()
    assert "zeroed" not in (tmp_path / "m/README.md").read_text()


def test_model_card_of_a_plan_from_a_folder_whose_name_is_not_utf8(tiny_llama, tokenizer, tmp_path):
    plan = plan_for(tiny_llama, command="sparc3 prune --general caf\udce9")
    result = SavedModel(tmp_path, 0.0, (1, 1), (4, 4), "neurons set to zero")
    assert r"--general caf\udce9" in _model_card(tiny_llama, plan, result).encode().decode()


def test_a_model_that_differs_is_not_kept(tiny_llama, tokenizer, tmp_path, monkeypatch):
    write = save_module._write_model

    def spoiled(model, folder):
        with torch.no_grad():
            model.lm_head.weight[0, 0] += 1
            write(model, folder)
            model.lm_head.weight[0, 0] -= 1

    monkeypatch.setattr(save_module, "_write_model", spoiled)
    with pytest.raises(RuntimeError, match="differs from the one in memory"):
        save_pruned(tiny_llama, tokenizer, plan_for(tiny_llama), tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_existing_folder_is_kept(tiny_llama, tokenizer, tmp_path):
    save_pruned(tiny_llama, tokenizer, plan_for(tiny_llama), tmp_path / "m")
    before = state(tiny_llama)
    with pytest.raises(InputError, match="already exists"):
        save_pruned(tiny_llama, tokenizer, plan_for(tiny_llama), tmp_path / "m")
    assert same_bits(state(tiny_llama), before)
    save_pruned(tiny_llama, tokenizer, plan_for(tiny_llama), tmp_path / "m", overwrite=True)


@pytest.mark.realdata
def test_gguf_model(smollm2, tmp_path):
    """SmolLM2 as plain transformers loads it: its config says that it is quantised."""
    source = {"pretrained_model_name_or_path": smollm2.parent, "gguf_file": smollm2.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).eval()
    assert model.config.quantization_config is not None
    plan = plan_for(model)
    save_pruned(model, AutoTokenizer.from_pretrained(**source), plan, tmp_path / "m")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    with pruned(model, plan):
        torch.testing.assert_close(logits(loaded), logits(model))


# --- shrink -----------------------------------------------------------------------------------------------------------


def test_shrink_really_removes(tiny_model, tokenizer, tmp_path):
    plan, before = plan_for(tiny_model, per_layer=4), state(tiny_model)
    with pruned(tiny_model, plan):
        expected = logits(tiny_model)
    result = save_shrunk(tiny_model, tokenizer, plan, tmp_path / "m")
    assert same_bits(state(tiny_model), before)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-4)
    assert {mlp.width for mlp in mlps(loaded)} == {20}
    by_hand = sum(4 * (len(mlp.rows(0)) + 1) * 32 for mlp in mlps(tiny_model))  # rows and columns of hidden size 32
    biases = [tiny_model.get_submodule(n) for mlp in mlps(tiny_model) for n, _ in mlp.rows(0)]
    by_hand += sum(4 for module in biases if module.bias is not None)
    assert result.parameters[0] - result.parameters[1] == by_hand
    assert sum(p.numel() for p in loaded.parameters()) == result.parameters[1]
    assert result.bytes[0] - result.bytes[1] == 4 * by_hand
    assert "smaller" in str(result)


def test_shrink_keeps_folded_means():
    from dataclasses import replace

    model = tiny("opt")
    plan = replace(plan_for(model, edit="mean"), means=mean_activations(model, [(IDS, torch.ones_like(IDS))]))
    with pruned(model, plan):
        expected = logits(model)
    torch.testing.assert_close(logits(shrink(model, plan)), expected, rtol=1e-4, atol=1e-4)


def test_gpt2_without_n_inner():
    model = tiny("gpt2", n_inner=None)
    smaller = shrink(model, plan_for(model, per_layer=8))
    assert smaller.config.n_inner == 4 * 32 - 8
    assert model.config.n_inner is None


@pytest.mark.parametrize(
    ("neurons", "fields", "match"),
    [
        ([("model.layers.0.mlp.up_proj", 1)], {}, "the plan removes 0 to 1"),
        ([("model.layers.0.self_attn.q_proj", 1)], {}, "plan up-projections only"),
        (None, {"edit": "scale", "alpha": 0.5}, "edit=scale; save without shrink"),
    ],
)
def test_shrink_is_refused(tiny_llama, neurons, fields, match):
    with pytest.raises(InputError, match=match):
        shrink(tiny_llama, plan_for(tiny_llama, neurons, **fields))
