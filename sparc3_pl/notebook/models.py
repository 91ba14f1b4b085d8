"""A model that somebody else has loaded: checked, borrowed for a while, and given back as it was."""

from __future__ import annotations

import copy
import inspect
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sparc3_pl import demo
from sparc3_pl.data.encoding import Encoder
from sparc3_pl.errors import InputError
from sparc3_pl.io.provenance import redacted
from sparc3_pl.model.checks import check_causal, check_finite, check_vocabulary
from sparc3_pl.model.loading import ready_vocabulary
from sparc3_pl.model.source import ModelSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sparc3_pl.pruning.plan import PrunePlan

__all__ = ["IN_MEMORY", "as_call", "borrowed", "edits_in_force", "encoder_of", "require_free", "require_plain"]

IN_MEMORY = "in memory"
"""What messages, manifests and results call texts, prompts and scores that no file holds."""

edits_in_force: weakref.WeakKeyDictionary[nn.Module, PrunePlan] = weakref.WeakKeyDictionary()
"""The models that are inside an ``edited`` block, and their plans."""

_borrowers: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
"""The models that are being scored or measured, and the threads that do it."""

_LONGEST = 80  # letters of an argument that a manifest records

_PLAIN = {torch.float64, torch.float32, torch.bfloat16, torch.float16}


def encoder_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, source: ModelSource) -> Encoder:
    """The encoder of texts into token ids. It holds a copy of the tokenizer, to which a missing pad token is added.

    Raises:
        InputError: if the tokenizer is not the model's.
    """
    if tokenizer is not None and not hasattr(tokenizer, "get_vocab"):
        raise InputError(f"tokenizer is a {type(tokenizer).__name__}; give the one of AutoTokenizer.from_pretrained")
    check_vocabulary(model, tokenizer)
    vocabulary = ready_vocabulary(copy.deepcopy(tokenizer), model.config.get_text_config(), source)
    return Encoder(vocabulary.tokenizer, vocabulary.size, vocabulary.context)


@contextmanager
def borrowed(model: PreTrainedModel) -> Iterator[ModelSource]:
    """Inside the block no parameter asks for gradients; afterwards each does as it did, an exception included.

    Yields:
        Where the model came from.

    Raises:
        InputError: if ``model`` is no language model of transformers, keeps its weights packed, is in training mode,
            looks ahead, holds a value that is not finite, or is in use in another thread.
    """
    require_plain(model)
    require_free(model)
    if (name := next((name for name, module in model.named_modules() if module.training), None)) is not None:
        what = f"its module {name} is" if name else "it is"
        raise InputError(f"the model cannot be used as it is: {what} in training mode; call model.eval() first")
    if torch.is_inference_mode_enabled():
        raise InputError("torch.inference_mode() is on, which forbids gradients; leave that block first")
    place = model.name_or_path or f"{type(model).__name__} {IN_MEMORY}"
    is_demo = Path(place).resolve() == demo.MODEL.resolve()
    source = ModelSource("demo" if is_demo else place)
    asks = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    earlier = _borrowers.get(model)  # in this thread, as where a judge uses the model too
    _borrowers[model] = threading.get_ident()
    try:
        model.requires_grad_(False)
        check_finite(model, source)
        check_causal(model, source)
        yield source
    finally:
        for name, requires_grad in asks.items():  # by name: an offloaded parameter is a new one after each pass
            model.get_parameter(name).requires_grad_(requires_grad)
        if earlier is None:
            del _borrowers[model]


def require_free(model: nn.Module) -> None:
    """Refuses a model that another thread is scoring or measuring: both would change it under each other's feet.

    Raises:
        InputError: if it is in use.
    """
    if _borrowers.get(model, threading.get_ident()) != threading.get_ident():
        raise InputError("the model is in use by a call in another thread; wait until it is done, or load it again")


def require_plain(model: Any) -> None:
    """Refuses what is no loaded causal language model whose weights can be read and written one by one.

    Raises:
        InputError: naming what it is.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is None:
        raise InputError(
            f"model is a {type(model).__name__}, not a loaded language model; give the one of "
            "AutoModelForCausalLM.from_pretrained"
        )
    quantisation = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    method = getattr(getattr(quantisation, "quant_method", None), "value", None)
    is_unpacked = method == "gguf" or getattr(quantisation, "dequantize", False)  # while it was loaded
    odd = next(
        (f"{n} is {p.dtype}".replace("torch.", "") for n, p in model.named_parameters() if p.dtype not in _PLAIN), None
    )
    packed_modules = (
        f"{n} is a {type(m).__module__}" for n, m in model.named_modules() if hasattr(m, "_packed_params")
    )
    odd = next(packed_modules, None) if odd is None else odd
    if odd is not None or (getattr(model, "hf_quantizer", None) is not None and not is_unpacked):
        reason = "" if odd is None else f": {odd}"
        raise InputError(
            f"the model is quantised ({method or 'weights are packed'}{reason}), so that no single weight can be read "
            "or removed; load the unquantised checkpoint, or unpack it by model.dequantize()"
        )
    if any(p.is_meta for p in model.parameters()) and not any(hasattr(m, "_hf_hook") for m in model.modules()):
        raise InputError("the model has no weights (device meta); load them with AutoModelForCausalLM.from_pretrained")


def as_call(function: Callable[..., Any], arguments: Mapping[str, Any]) -> str:
    """A call as a manifest records it: the arguments that are short values and not the default, without secrets."""
    values = {
        name: arguments[name]
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and arguments[name] != parameter.default
    }
    plain = {name: repr(value) for name, value in values.items() if isinstance(value, str | int | float | dict)}
    short = (f"{name}={text}" for name, text in plain.items() if len(text) <= _LONGEST and name != "progress")
    return redacted(f"sparc3_pl.{function.__name__}({', '.join(short)})")
