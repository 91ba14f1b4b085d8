"""Heads by another road: taking a head away inside the attention function equals taking its rows and columns away."""

from contextlib import ExitStack

import pytest
import torch
from tiny_models import CONFIGS, VARIANTS, tokens, variant

from sparc3_pl.model.attention import wrapped_attention
from sparc3_pl.model.heads import attentions
from sparc3_pl.model.structure import weight_matrix


def without_head(block, head):
    """Attention functions whose output for one head of one block is 0."""

    def wrap(base):
        def attend(module, *args, **kwargs):
            output, weights = base(module, *args, **kwargs)  # [B, T, H, D]
            keep = torch.ones(block.num_heads)
            keep[head] = 0
            return output * keep[:, None], weights

        return attend

    return wrap


def keeping(given):
    """Attention functions that keep the query, key and value that they are given."""

    def wrap(base):
        def attend(module, *args, **kwargs):
            given.append(args[:3])
            return base(module, *args, **kwargs)

        return attend

    return wrap


@pytest.mark.parametrize("family", [*CONFIGS, *VARIANTS])
def test_columns_of_the_output_map_read_the_head(family):
    model, ids = variant(family), tokens(2, 5)
    block, head = attentions(model)[1], 2
    with torch.no_grad(), wrapped_attention(model.get_submodule(block.name), without_head(block, head)):
        expected = model(input_ids=ids).logits
    with torch.no_grad():
        weight_matrix(model.get_submodule(block.output))[:, block.columns(torch.tensor([head]))] = 0
        assert torch.allclose(model(input_ids=ids).logits, expected, atol=1e-5)


@pytest.mark.parametrize("family", [*CONFIGS, *VARIANTS])
def test_rows_of_query_key_and_value_write_the_head(family):
    """With the rows of one head at 0, what the attention function is given for that head is 0, and for no other."""
    model, ids = variant(family), tokens(2, 5)
    block, head = attentions(model)[0], 1
    kv = head // (block.num_heads // block.num_kv_heads)
    rows = {"query": (block.query, head), "key": (block.key, kv), "value": (block.value, kv)}
    for position, (part, ((layer, of_heads), index)) in enumerate(rows.items()):
        given = []
        module = model.get_submodule(layer)
        kept = {name: value.clone() for name, value in module.state_dict().items()}
        with torch.no_grad(), ExitStack() as undo:
            undo.enter_context(wrapped_attention(model.get_submodule(block.name), keeping(given)))
            weight_matrix(module)[of_heads[index]] = 0
            if module.bias is not None:
                module.bias[of_heads[index]] = 0
            model(input_ids=ids)
        module.load_state_dict(kept)
        silent = given[0][position].abs().amax((0, 2, 3)) < 1e-6  # [heads]
        with_norm_bias = part != "value" and family in ("phi", "stablelm", "stablelm_parallel")
        assert with_norm_bias or silent.tolist() == [h == index for h in range(len(silent))]


def test_a_shared_key_value_head_goes_with_all_its_query_heads():
    block = attentions(variant("llama"))[0]  # 4 query heads on 2
    assert block.kv_heads_of(torch.tensor([0, 2, 3])).tolist() == [1]
    assert block.kv_heads_of(torch.tensor([1])).tolist() == []
    assert block.kv_heads_of(torch.tensor([1, 1])).tolist() == []
