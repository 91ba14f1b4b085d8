"""The checks of a loaded model and its tokenizer before either is used."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sparc3_pl.errors import InputError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from sparc3_pl.model.identity import named_values
from sparc3_pl.model.quantised import quantisation_of
from sparc3_pl.model.source import ModelSource

__all__ = ["Vocabulary", "check_vocabulary"]

log = logging.getLogger(__name__)

_PLAIN = {torch.float64, torch.float32, torch.bfloat16, torch.float16}

TOKENIZER_HINT = "put the tokenizer's files (tokenizer.json, tokenizer_config.json) beside config.json"

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.*model*", "vocab.*", "*.model", "*.tiktoken", "tekken.json")


@dataclass(frozen=True)
class Vocabulary:
    """The input that a model reads: sequences of up to ``context`` token ids below ``size``.

    Attributes:
        tokenizer: The model's tokenizer; None if its folder has none.
        size: Number of token ids.
        context: Longest sequence, in tokens; None if unknown.
    """

    tokenizer: PreTrainedTokenizerBase | None
    size: int
    context: int | None


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Refuse a tokenizer that has ids beyond the model's embedding rows; a model without a tokenizer passes.

    Raises:
        InputError: Naming both sizes.
    """
    if tokenizer is None:
        return
    rows = model.get_input_embeddings().weight.shape[0]
    compare_vocabularies(tokenizer, rows, model.config.name_or_path or type(model).__name__)


def forget_gguf(model: PreTrainedModel) -> None:
    """Drops what says that the weights are packed: they are plain now, and the model would refuse to be saved."""
    for attribute in ("hf_quantizer", "is_quantized", "quantization_method"):
        if attribute in vars(model):
            delattr(model, attribute)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


# --- checks -----------------------------------------------------------------------------------------------------------


def check_unquantised(config: PretrainedConfig, source: ModelSource) -> None:
    """Refuses a checkpoint whose config says that its weights are packed, before any of them is read.

    With ``source.dequantize`` those pass that transformers can unpack.
    """
    quantised = quantisation_of(config)
    if quantised is None or (source.dequantize and quantised.dequantised is not None):
        return
    bits = f"{quantised.bits}-bit " if quantised.bits else ""
    what = f"model.pretrained={source.pretrained!r} holds {bits}weights packed by {quantised.method}"
    if quantised.dequantised is None:
        raise InputError(
            f"{what}, which transformers cannot turn into plain ones; give the checkpoint that it was made from"
        )
    raise InputError(
        f"{what}, of which none can be read or removed alone; give the checkpoint that it was made from, or have it "
        "unpacked (model.dequantize: true), which takes the memory of plain weights"
    )


def check_plain_weights(model: PreTrainedModel, source: ModelSource) -> None:
    if getattr(model, "hf_quantizer", None) is not None:
        method = getattr(model, "quantization_method", "quantised")
        raise InputError(
            f"model.pretrained={source.pretrained!r} keeps its weights packed ({getattr(method, 'value', method)}), so "
            "that no single weight can be read or removed; give the unquantised checkpoint or a .gguf file"
        )
    for name, parameter in model.named_parameters():
        if parameter.dtype not in _PLAIN:
            raise InputError(
                f"model.pretrained={source.pretrained!r}: the weights {name!r} are {parameter.dtype} values, which "
                "stand for nothing without their scales; give the unquantised checkpoint"
            )


def check_finite(model: nn.Module, source: ModelSource) -> None:
    for name, value in named_values(model):
        if value.is_floating_point() and value.numel() and not torch.stack(value.aminmax()).isfinite().all():
            raise InputError(
                f"model.pretrained={source.pretrained!r}: the tensor {name!r} has values that are not finite "
                f"(as {str(value.dtype).removeprefix('torch.')}); repair the checkpoint or choose another model.dtype"
            )


def check_complete(info: dict[str, Any], source: ModelSource) -> None:
    """Refuses a checkpoint that lacks weights: the library fills in random ones, which would become a number."""
    missing = sorted(info["missing_keys"]) + sorted(str(key[0]) for key in info["mismatched_keys"])
    if missing:
        raise InputError(
            f"model.pretrained={source.pretrained!r}: {len(missing)} weights are not in the checkpoint or have another "
            f"shape (first: {missing[0]!r}), and random ones would take their place; give a complete checkpoint"
        )
    if info["unexpected_keys"]:
        keys = sorted(info["unexpected_keys"])
        log.warning("%s: %d weights of the checkpoint are not used (first: %s)", source.pretrained, len(keys), keys[0])


@torch.no_grad()
def check_causal(model: PreTrainedModel, source: ModelSource) -> None:
    """Refuses a model whose logits before the last token change with that token: it is not causal."""
    rows = model.get_input_embeddings().weight.shape[0]
    prefix = torch.arange(2, 8) % rows
    ids = torch.stack([torch.cat([prefix, torch.tensor([last])]) for last in (0, 1)])
    logits = model(input_ids=ids.to(model.device), use_cache=False).logits.float()
    change = (logits[0] - logits[1]).abs().amax(-1)  # [T]
    tolerance = 1e-4 if model.dtype == torch.float32 else 2e-2
    if change[:-1].max() > tolerance * change[-1]:
        raise InputError(
            f"model.pretrained={source.pretrained!r} ({type(model).__name__}): what it predicts depends on later "
            "tokens, as in an encoder; give a decoder-only (causal) language model"
        )


def has_tokenizer_files(source: ModelSource) -> bool:
    """Whether there are tokenizer files; without any, some classes make up a vocabulary that is not the model's."""
    folder = source.path
    return folder is None or not folder.is_dir() or any(any(folder.glob(pattern)) for pattern in _TOKENIZER_FILES)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, source: ModelSource) -> None:
    # A folder without tokenizer files can give an object that knows its special tokens only.
    words = set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)
    if not words:
        raise InputError(f"model.pretrained={source.pretrained!r}: its tokenizer has no vocabulary; {TOKENIZER_HINT}")


def compare_vocabularies(tokenizer: PreTrainedTokenizerBase, rows: int, name: str) -> None:
    highest = max(tokenizer.get_vocab().values())
    if highest >= rows:
        raise InputError(
            f"model.pretrained={name!r}: its tokenizer gives ids up to {highest}, but the model has only {rows} "
            "embedding rows; put the tokenizer that belongs to this model beside it"
        )


def ensure_pad_token(tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.pad_token_id is not None:
        return
    tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
