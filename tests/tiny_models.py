"""Tiny random models of every supported family: two layers, biases not 0 and norm weights not 1, so that tests bite."""

import torch
from transformers import PreTrainedModel
from transformers.models.auto import CONFIG_MAPPING

from sparc3_pl.model.loading import auto_class

VOCAB = 50
SEED = 0

_COMMON = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_LLAMA = {
    **_COMMON,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_GPT2 = {**_COMMON, "n_embd": 32, "n_inner": 24, "n_layer": 2, "n_head": 4, "n_positions": 64}

CONFIGS: dict[str, dict] = {
    "llama": {**_LLAMA, "attention_bias": True, "mlp_bias": True},
    "mistral": {**_LLAMA, "sliding_window": 6},
    "qwen2": {**_LLAMA, "tie_word_embeddings": True},
    "qwen3": {**_LLAMA, "head_dim": 8, "attention_bias": True},
    "gemma3_text": {
        **_LLAMA,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"],
        "tie_word_embeddings": True,
    },
    "opt": {
        **_COMMON,
        "hidden_size": 32,
        "ffn_dim": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": 16,
    },
    "gpt2": _GPT2,
    "gpt_neox": {k: v for k, v in _LLAMA.items() if k != "num_key_value_heads"},
    "phi3": {**_LLAMA, "num_key_value_heads": 4},
}
FAMILIES = tuple(CONFIGS)
"""The families of the specification."""

_CAPS = {
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "sliding_window": 6,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 10.0,
}
_MORE: dict[str, dict] = {
    "cohere2": {**_LLAMA, "tie_word_embeddings": True, "sliding_window": 6},
    "gemma": {**_LLAMA, "head_dim": 8},
    "glm4": {**_LLAMA, "head_dim": 8, "attention_bias": True},
    "granite": {
        **_LLAMA,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.7,
        "attention_multiplier": 0.5,
        "logits_scaling": 3.0,
    },
    "olmo2": _LLAMA,
    "olmo3": {**_LLAMA, "sliding_window": 6},
    "phi": {**_LLAMA, "qk_layernorm": True},
    "smollm3": _LLAMA,
    "stablelm": {**_LLAMA, "use_qkv_bias": True, "qk_layernorm": True},
    "starcoder2": {**_LLAMA, "sliding_window": 6},
    # Caps so low that they bite.
    "gemma2": {**_LLAMA, **_CAPS, "tie_word_embeddings": True},
    "vaultgemma": {**_LLAMA, **_CAPS},
}
MORE_FAMILIES = tuple(_MORE)
"""Further families that the rules support."""
CONFIGS = {**CONFIGS, **_MORE}

_MIXTURE = {"num_experts_per_tok": 2, "intermediate_size": 12}
MIXTURES: dict[str, dict] = {
    "qwen3_moe": {**_LLAMA, **_MIXTURE, "head_dim": 8, "num_experts": 4, "moe_intermediate_size": 12},
    "mixtral": {**_LLAMA, **_MIXTURE, "num_local_experts": 4},
    "olmoe": {**_LLAMA, **_MIXTURE, "num_experts": 4, "norm_topk_prob": False},
    "granitemoe": {
        **{**_LLAMA, **_MIXTURE, "num_local_experts": 4},
        **{"embedding_multiplier": 2.0, "residual_multiplier": 0.7, "attention_multiplier": 0.5, "logits_scaling": 3.0},
    },
}
"""Mixtures of experts: their experts lie in fused parameters."""

EAGER_ONLY = ("gemma2", "vaultgemma")
"""Families whose soft-caps only eager attention computes."""

_TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
_MROPE = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
WRAPPED: dict[str, dict] = {
    "gemma3": {
        "text_config": CONFIGS["gemma3_text"],
        "vision_config": {**_TOWER, "image_size": 16, "patch_size": 8},
        "mm_tokens_per_image": 4,
    },
    "qwen2_vl": {
        "text_config": {**_LLAMA, "rope_parameters": _MROPE},
        "vision_config": {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 4},
    },
    "qwen2_5_vl": {
        "text_config": {**_LLAMA, "rope_parameters": _MROPE},
        "vision_config": {"depth": 1, "hidden_size": 16, "num_heads": 2, "patch_size": 4, "out_hidden_size": 32},
    },
    "qwen3_vl": {
        "text_config": {**_LLAMA, "head_dim": 8, "rope_parameters": _MROPE},
        "vision_config": {
            **{"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32},
            **{"patch_size": 4, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        },
    },
}
"""Text models inside a model that reads images too."""

VARIANTS: dict[str, tuple[str, dict]] = {
    "opt_post_norm": ("opt", {"do_layer_norm_before": False, "activation_function": "gelu"}),
    "opt_no_bias": ("opt", {"enable_bias": False, "layer_norm_elementwise_affine": False, "word_embed_proj_dim": 32}),
    "gpt2_scaled": ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "activation_function": "relu"}),
    "gpt_neox_serial": ("gpt_neox", {"use_parallel_residual": False, "hidden_act": "gelu_fast"}),
    "stablelm_parallel": ("stablelm", {"use_parallel_residual": True}),
    "gemma_tied_square": ("gemma3_text", {"intermediate_size": 32}),
    "llama_tied_square": ("llama", {"intermediate_size": 32, "tie_word_embeddings": True}),
    "phi3_square": ("phi3", {"intermediate_size": 32, "num_key_value_heads": 2}),
}
"""Switches inside a family that change its wiring: name -> (family, overrides)."""


def tiny(family: str, *, dtype: torch.dtype = torch.float32, seed: int = SEED, **overrides: object) -> PreTrainedModel:
    """A random model of ``family`` (a transformers ``model_type``) in eval mode, the same for the same arguments."""
    config = CONFIG_MAPPING[family](**{**(CONFIGS | WRAPPED | MIXTURES).get(family, _LLAMA), **overrides})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = auto_class(config).from_config(config)
        randomise(model)
    if family in MIXTURES and dtype == torch.float64:
        model.set_experts_implementation("eager")  # the grouped product is for float32 and less
    return model.to(dtype).eval()


@torch.no_grad()
def randomise(model: torch.nn.Module) -> None:
    """Weights large enough for every non-linearity to matter; biases and norm weights away from 0 and 1."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=1.0 if "embed" in name or "wte" in name or "wpe" in name else 0.25)
        else:
            parameter.add_(torch.randn_like(parameter) * 0.3)


def variant(name: str, **kwargs: object) -> PreTrainedModel:
    """``tiny`` for a family, or for a name in ``VARIANTS``."""
    family, overrides = VARIANTS.get(name, (name, {}))
    return tiny(family, **overrides, **kwargs)


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random token ids ``[batch, length]`` without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (batch, length), generator=generator)
