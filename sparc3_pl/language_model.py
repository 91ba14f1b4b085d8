"""Load a causal language model and its tokenizer: hub id, local folder, GGUF file, or ``demo``.

Everything that would turn into a wrong number later is refused here: weights that are not in the checkpoint (a library
fills them with random values), weights that are not finite, attention that looks ahead, a tokenizer with more tokens
than the model has embeddings.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import importlib.util
import logging
import sys
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sparc3_pl.distributed import whole
from sparc3_pl.errors import InputError
from sparc3_pl.hub import first_line, hub_available, hub_name, local_path, offline

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "DType",
    "ModelSource",
    "Vocabulary",
    "check_vocabulary",
    "describe",
    "differing_config",
    "fingerprint",
    "load_model",
    "load_skeleton",
    "load_tokenizer",
    "load_vocabulary",
    "model_config",
]

log = logging.getLogger(__name__)

DType = Literal["float32", "bfloat16", "float16", "auto"]

_DTYPES: dict[str, torch.dtype | str] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "auto": "auto",
}
_WAY_OUT = "give a local folder or a .gguf file as model.pretrained"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.*model*", "vocab.*", "*.model", "*.tiktoken", "tekken.json")
_TOKENIZER_HINT = "put the tokenizer's files (tokenizer.json, tokenizer_config.json) beside config.json"
_EXTRA = 'pip install "sparc3_pl[gguf]"'


@dataclass(frozen=True)
class ModelSource:
    """Where a language model comes from and how it is loaded.

    Args:
        pretrained: Hub id, local folder in the Hugging Face layout, ``FILE.gguf``, or ``demo`` (the embedded model).
        dtype: Number format of the weights; ``auto`` takes the checkpoint's own.
        revision: Branch, tag or commit of a hub id.
        device_map: As in transformers (``auto``, or module name to device): spreads the model over devices.
        trust_remote_code: Run Python code that the checkpoint brings along. Off unless you turn it on.
    """

    pretrained: str = "demo"
    dtype: DType = "auto"
    revision: str | None = None
    device_map: str | dict[str, Any] | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise InputError(f"model.dtype={self.dtype!r} is not known; use one of {', '.join(_DTYPES)}")

    @property
    def path(self) -> Path | None:
        """The local folder or file, or None for a hub id.

        Raises:
            InputError: If ``pretrained`` is written like a path and nothing is there.
        """
        if self.pretrained == "demo":
            from sparc3_pl import demo

            return Path(demo.MODEL)
        return local_path(
            self.pretrained, "model.pretrained", suffixes=(".gguf", ".safetensors", ".bin", ".pt", ".ckpt")
        )


# --- loading ----------------------------------------------------------------------------------------------------------


def load_model(source: ModelSource) -> PreTrainedModel:
    """Load a causal language model in eval mode, its parameters frozen.

    A GGUF file is unpacked into ordinary weights, and its config no longer says that it is quantised, so that the
    model can be saved like any other.

    Raises:
        InputError: If nothing is there, the hub cannot be reached, the model is not a causal language model, the
            checkpoint lacks weights, or a weight is not finite.
    """
    from transformers import AutoModelForCausalLM

    where = _locate(source)
    with _quiet_stdout(), _network(where), _as_input_error(source, where):
        config = _causal_config(source, where)
        model, info = AutoModelForCausalLM.from_pretrained(
            **where, **_load_options(source, where), config=config, output_loading_info=True
        )
    if "gguf_file" in where:
        _forget_gguf(model)
    model.eval().requires_grad_(False)
    _check_plain_weights(model, source)
    _check_finite(model, source)
    _check_causal(model, source)
    _check_complete(info, source)
    return model


def load_skeleton(source: ModelSource) -> PreTrainedModel:
    """The model as its config describes it, on the meta device: names and shapes of its modules, no weights.

    Raises:
        InputError: If nothing is there, the hub cannot be reached, or the model is not a causal language model.
    """
    from transformers import AutoModelForCausalLM

    where = _locate(source)
    with _quiet_stdout(), _network(where), _as_input_error(source, where, what="config"):
        config = _causal_config(source, where)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=source.trust_remote_code)


@dataclass(frozen=True)
class Vocabulary:
    """What a model reads: sequences of up to ``context`` token ids below ``size``.

    Attributes:
        tokenizer: The model's; None if its folder has none.
        size: Number of token ids.
        context: Longest sequence, in tokens; None if unknown.
    """

    tokenizer: PreTrainedTokenizerBase | None
    size: int
    context: int | None


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer, padding on the right, with a pad token and the model's context length.

    A tokenizer without a pad token pads with its end-of-text token (or the unknown token): pads are masked wherever
    they are used, so the choice has no effect on any number.

    Raises:
        InputError: If there is no tokenizer, or it has more tokens than the model has embeddings.
    """
    tokenizer = load_vocabulary(source).tokenizer
    if tokenizer is None:
        raise InputError(f"model.pretrained={source.pretrained!r} has no tokenizer; {_TOKENIZER_HINT}")
    return tokenizer


def load_vocabulary(source: ModelSource) -> Vocabulary:
    """Load the model's tokenizer as ``load_tokenizer`` does, and what the model's config says about token ids.

    A local folder may be without a tokenizer: then the model reads token ids only.

    Raises:
        InputError: If the tokenizer cannot be loaded, or has more tokens than the model has embeddings.
    """
    from transformers import AutoTokenizer

    where = _locate(source)
    tokenizer = None
    with _quiet_stdout(), _network(where), _as_input_error(source, where, what="tokenizer"):
        if _has_tokenizer_files(source):
            tokenizer = AutoTokenizer.from_pretrained(**where)
        config = _config(where).get_text_config()
    context = getattr(config, "max_position_embeddings", None)
    if tokenizer is None:
        return Vocabulary(None, config.vocab_size, context)
    _check_tokenizer(tokenizer, source)
    _compare_vocabularies(tokenizer, config.vocab_size, source.pretrained)
    _ensure_pad_token(tokenizer)
    tokenizer.padding_side = "right"
    tokenizer.model_max_length = min(tokenizer.model_max_length, context or tokenizer.model_max_length)
    known = tokenizer.model_max_length < 10**9  # transformers writes "unknown" as 1e30
    return Vocabulary(tokenizer, config.vocab_size, int(tokenizer.model_max_length) if known else None)


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Refuse a tokenizer that has ids beyond the model's embedding rows; a model without a tokenizer passes.

    Raises:
        InputError: Naming both sizes.
    """
    if tokenizer is None:
        return
    rows = model.get_input_embeddings().weight.shape[0]
    _compare_vocabularies(tokenizer, rows, model.config.name_or_path)


def _locate(source: ModelSource) -> dict[str, Any]:
    """What every ``from_pretrained`` of this source is called with."""
    where: dict[str, Any] = {"trust_remote_code": source.trust_remote_code}
    path = source.path
    if path is None:
        online = hub_available()
        if not online:
            log.info("the hub (%s) is not available: looking for %s in the local cache", hub_name(), source.pretrained)
        where |= {"pretrained_model_name_or_path": source.pretrained, "local_files_only": not online}
        return where | ({"revision": source.revision} if source.revision else {})
    where["local_files_only"] = True
    if path.is_dir():
        _check_folder(path, source)
        return where | {"pretrained_model_name_or_path": str(path)}
    if path.suffix.lower() != ".gguf":
        raise InputError(f"model.pretrained={source.pretrained!r} is a file but not a .gguf file; {_WAY_OUT}")
    for package in ("gguf", "accelerate"):
        _require(package, "loading a GGUF file", "model.pretrained")
    return where | {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}


def _check_folder(path: Path, source: ModelSource) -> None:
    if (path / "config.json").is_file():
        return
    files = sorted(entry.name for entry in path.glob("*.gguf"))
    hint = f"name its file: {path / files[0]}" if files else "give a folder written by save_pretrained"
    raise InputError(f"model.pretrained={source.pretrained!r}: the folder has no config.json; {hint}")


def _require(package: str, what: str, key: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise InputError(f"{key}: {what} needs the package {package}: {_EXTRA}")


def _load_options(source: ModelSource, where: dict[str, Any]) -> dict[str, Any]:
    # Mismatched shapes are let through to be named by _check_complete: the library's own error names nothing.
    options: dict[str, Any] = {"dtype": _DTYPES[source.dtype], "ignore_mismatched_sizes": True}
    if source.device_map is not None:
        _require("accelerate", "spreading a model over devices", "model.device_map")
        options["device_map"] = source.device_map
    if "gguf_file" in where:
        import transformers

        # Where GPU kernels for packed weights are installed, transformers would keep them packed: no plain matrices.
        if hasattr(transformers, "GgufConfig"):
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    return options


def _config(where: dict[str, Any]) -> PretrainedConfig:
    from transformers import AutoConfig

    if "gguf_file" not in where:
        return AutoConfig.from_pretrained(**where)
    file = Path(where["pretrained_model_name_or_path"]) / where["gguf_file"]
    return copy.deepcopy(_gguf_config(file.parent, file.name, file.stat().st_mtime_ns))


@functools.lru_cache(maxsize=1)
def _gguf_config(folder: Path, name: str, _modified: int) -> PretrainedConfig:
    """Kept, because parsing the vocabulary beside it takes seconds, and tokenizer and model both ask."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, gguf_file=name, local_files_only=True)


def _causal_config(source: ModelSource, where: dict[str, Any]) -> PretrainedConfig:
    """The model's config, if it is one of a causal language model as far as a config can tell."""
    from transformers import AutoModelForCausalLM

    config = _config(where)
    kind = f"model.pretrained={source.pretrained!r} is of type {config.model_type!r}"
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(f"{kind}, an encoder-decoder; give a decoder-only (causal) language model")
    remote = source.trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if type(config) not in AutoModelForCausalLM._model_mapping and not remote:
        raise InputError(f"{kind}, which has no causal language model; give a decoder-only (causal) language model")
    return config


def _network(where: dict[str, Any]) -> contextlib.AbstractContextManager[None]:
    return offline() if where["local_files_only"] else contextlib.nullcontext()


@contextlib.contextmanager
def _quiet_stdout() -> Iterator[None]:
    """Keep what the library prints off stdout, and its bars off anything but a terminal."""
    from transformers.utils import logging as hf_logging

    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    if not sys.stderr.isatty():
        hf_logging.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


@contextlib.contextmanager
def _as_input_error(source: ModelSource, where: dict[str, Any], what: str = "model") -> Iterator[None]:
    """Turn what the loader raises about the user's input into one line that says what, which value and the way out."""
    from pickle import UnpicklingError  # what torch.load(weights_only=True) raises; nothing is unpickled here

    from safetensors import SafetensorError

    name = f"model.pretrained={source.pretrained!r}"
    try:
        yield
    except InputError:
        raise
    except UnpicklingError as error:
        raise InputError(
            f"{name}: its weights file is no plain checkpoint (a pickle of anything else is not opened); {_WAY_OUT}"
        ) from error
    except (OSError, ValueError, KeyError, SafetensorError, RuntimeError, ImportError, TypeError) as error:
        if "trust_remote_code" in str(error):
            raise InputError(
                f"{name} brings Python code of its own, which is not run unless you say so; if you trust it, "
                "set model.trust_remote_code: true"
            ) from error
        if isinstance(error, OSError) and source.path is None and where["local_files_only"]:
            raise InputError(
                f"{name}: the hub ({hub_name()}) cannot be reached and the {what} is not in the local cache; {_WAY_OUT}"
            ) from error
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise InputError(f"{name}: the {what} cannot be loaded ({reason}); {_WAY_OUT}") from error


def _forget_gguf(model: PreTrainedModel) -> None:
    """The weights are plain now: drop what says otherwise, or the model refuses to be saved."""
    for attribute in ("hf_quantizer", "is_quantized", "quantization_method"):
        if attribute in vars(model):
            delattr(model, attribute)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


# --- checks -----------------------------------------------------------------------------------------------------------


def _check_plain_weights(model: PreTrainedModel, source: ModelSource) -> None:
    if getattr(model, "hf_quantizer", None) is not None:
        method = getattr(model, "quantization_method", "quantised")
        raise InputError(
            f"model.pretrained={source.pretrained!r} keeps its weights packed ({getattr(method, 'value', method)}), so "
            "that no single weight can be read or removed; give the unquantised checkpoint or a .gguf file"
        )


def _check_finite(model: nn.Module, source: ModelSource) -> None:
    for name, value in _named_values(model):
        if value.is_floating_point() and value.numel() and not torch.stack(value.aminmax()).isfinite().all():
            raise InputError(
                f"model.pretrained={source.pretrained!r}: the tensor {name!r} has values that are not finite "
                f"(as {str(value.dtype).removeprefix('torch.')}); repair the checkpoint or choose another model.dtype"
            )


def _check_complete(info: dict[str, Any], source: ModelSource) -> None:
    """A checkpoint that lacks weights gets random ones from the library, which would become a number."""
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
def _check_causal(model: PreTrainedModel, source: ModelSource) -> None:
    """Change the last token only: a causal model's logits before it stay as they were."""
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


def _has_tokenizer_files(source: ModelSource) -> bool:
    """Without files some tokenizer classes come up with a default vocabulary that has nothing to do with the model."""
    folder = source.path
    return folder is None or not folder.is_dir() or any(any(folder.glob(pattern)) for pattern in _TOKENIZER_FILES)


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, source: ModelSource) -> None:
    # A folder without tokenizer files can give an object that knows its special tokens only.
    words = set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)
    if not words:
        raise InputError(f"model.pretrained={source.pretrained!r}: its tokenizer has no vocabulary; {_TOKENIZER_HINT}")


def _compare_vocabularies(tokenizer: PreTrainedTokenizerBase, rows: int, name: str) -> None:
    highest = max(tokenizer.get_vocab().values())
    if highest >= rows:
        raise InputError(
            f"model.pretrained={name!r}: its tokenizer gives ids up to {highest}, but the model has only {rows} "
            "embedding rows; put the tokenizer that belongs to this model beside it"
        )


def _ensure_pad_token(tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.pad_token_id is not None:
        return
    tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)


# --- identity ---------------------------------------------------------------------------------------------------------


def fingerprint(model: nn.Module) -> str:
    """Identity of a model's weights: ``sha256:`` over names, shapes and values rounded to bfloat16.

    Rounding makes the fingerprint of a bfloat16 checkpoint, and of a float32 one loaded as float32 or bfloat16, the
    same. (float16 cannot hold all of a bfloat16's range, so a model loaded as float16 may differ.) Tied weights count
    once; one tensor at a time is brought to the CPU. About 1 s per gigabyte of bfloat16 weights. Of a model that is
    sharded over ranks, each tensor is gathered: every rank must call this.

    It is kept with the model: asking again costs a fraction of that, as long as no weight has changed.
    """
    state = _state(model)
    known = _fingerprints.setdefault(model, {})
    if state is not None and state in known:
        return known[state]
    digest = hashlib.sha256()
    for name, value in _named_values(model):
        digest.update(f"{name} {tuple(value.shape)}\n".encode())
        rounded = value.detach().to(torch.bfloat16).cpu().contiguous()
        digest.update(memoryview(rounded.view(torch.uint8).numpy()).cast("B"))
    result = f"sha256:{digest.hexdigest()}"
    if state is not None:
        known.clear()  # one state a model: the one that it is in
        known[state] = result
    return result


_fingerprints: weakref.WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], str]] = weakref.WeakKeyDictionary()


def _state(model: nn.Module) -> tuple[Any, ...] | None:
    """What changes whenever a weight does, cheaply: where it lies, how often it was written to, the sum of its bits.

    The count misses only what is written through ``.data``; that, the sum sees, unless it swaps equal numbers.

    Returns:
        None if it cannot be told: weights that are offloaded or sharded, or not in one piece.
    """
    state = []
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        if parameter.is_meta or isinstance(parameter, DTensor) or value.is_inference() or not value.is_contiguous():
            return None
        bits = value.reshape(-1).view(torch.uint8)
        even = bits.numel() // 8 * 8
        whole_words = bits[:even].view(torch.int64) if bits.storage_offset() % 8 == 0 else bits[:even]
        sums = [int(part.sum(dtype=torch.int64)) for part in (whole_words, bits[even:])]
        state.append((name, value.dtype, tuple(value.shape), value.data_ptr(), parameter._version, *sums))
    return tuple(state)


def differing_config(one: Mapping[str, Any], other: Mapping[str, Any], path: str = "") -> str | None:
    """The first key in which two models' ``config`` entries differ, with both values; None if they are alike.

    A key that only one of them has is passed over: another version of the library may have added it, and entries made
    before this program kept the config have none.
    """
    for key in sorted(one.keys() & other.keys()):
        mine, yours, name = one[key], other[key], f"{path}{key}"
        if isinstance(mine, Mapping) and isinstance(yours, Mapping):
            if (inner := differing_config(mine, yours, f"{name}.")) is not None:
                return inner
        elif mine != yours:
            return f"{name} ({mine!r}, here {yours!r})"
    return None


def model_config(model: PreTrainedModel) -> dict[str, Any]:
    """What the model's ``config.json`` says of how it computes: sizes, activation, epsilon, rotary base, ...

    Left out are names, versions, token ids, the number format, and what matters in training or for labels only.
    """
    return _computing(model.config.to_dict())


def _computing(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _computing(value) if isinstance(value, Mapping) else value
        for key, value in sorted(config.items())
        if not (key.startswith("_") or key.endswith(_NOT_COMPUTING_ENDINGS) or key in _NOT_COMPUTING)
        and isinstance(value, Mapping | list | str | int | float | None)
    }


_NOT_COMPUTING = {
    "transformers_version", "architectures", "dtype", "torch_dtype", "auto_map", "quantization_config",
    "return_dict", "output_attentions", "output_hidden_states", "use_cache", "chunk_size_feed_forward",
    "id2label", "label2id", "problem_type", "initializer_range", "pretraining_tp", "tie_word_embeddings",
}  # fmt: skip
_NOT_COMPUTING_ENDINGS = ("_token_id", "dropout", "_pdrop")


def _named_values(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter once, by name; a value offloaded to CPU or disk is fetched while it is used."""
    for name, parameter in model.named_parameters():
        if not parameter.is_meta:
            yield name, whole(parameter)
            continue
        from accelerate.utils import align_module_device

        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        with align_module_device(module, "cpu"):
            yield name, getattr(module, leaf)


def describe(model: PreTrainedModel, source: ModelSource, known: str | None = None) -> dict[str, Any]:
    """The manifest's ``model`` entry: ``pretrained``, ``revision``, ``fingerprint``, ``architecture``, ``dtype``, and
    ``config``: what the model's config says of how it computes, which the fingerprint of its weights does not tell.

    The fingerprint is not taken again if it is ``known``.
    """
    return {
        "pretrained": source.pretrained,
        "revision": getattr(model.config, "_commit_hash", None) or source.revision,
        "fingerprint": known or fingerprint(model),
        "architecture": type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "config": model_config(model),
    }
