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
import shutil
import sys
import tempfile
import weakref
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from sparc3_pl.errors import InputError
from sparc3_pl.io.hub import first_line, hub_available, hub_name, offline

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from sparc3_pl.model.checks import (
    TOKENIZER_HINT,
    Vocabulary,
    check_causal,
    check_complete,
    check_finite,
    check_plain_weights,
    check_tokenizer,
    check_unquantised,
    compare_vocabularies,
    ensure_pad_token,
    forget_gguf,
    has_tokenizer_files,
)
from sparc3_pl.model.experts import is_routed
from sparc3_pl.model.quantised import quantisation_of
from sparc3_pl.model.source import ModelSource
from sparc3_pl.runtime.timing import timed

__all__ = [
    "auto_class", "load_model", "load_skeleton", "load_tokenizer", "load_vocabulary", "measured_once",
    "models_are_kept", "models_kept", "quiet_library", "ready_vocabulary",
]  # fmt: skip


log = logging.getLogger(__name__)

Measured = TypeVar("Measured")

_DTYPES: dict[str, torch.dtype | str] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "auto": "auto",
}

_WAY_OUT = "give a local folder or a .gguf file as model.pretrained"


_EXTRA = 'pip install "sparc3_pl[gguf]"'


def load_model(source: ModelSource) -> PreTrainedModel:
    """Load a causal language model in eval mode, its parameters frozen.

    A GGUF file is unpacked into ordinary weights, and so is another packed checkpoint if ``source.dequantize`` says so;
    its config no longer says that it is quantised, so that the model can be saved like any other.

    Raises:
        InputError: If nothing is there, the hub cannot be reached, the model is not a causal language model, the
            checkpoint lacks weights, or a weight is not finite.
    """
    with timed("loading"):
        return _load(source) if _kept is None else _kept.model(source)


@contextlib.contextmanager
def models_kept() -> Iterator[None]:
    """Inside the block a model that is asked for again is the one that was loaded before, if nothing of it has changed.

    Every bit of its weights and buffers, its configuration, and that no hook was left on it are checked; otherwise it
    is loaded again. One model is kept at a time, none that is spread over devices.
    """
    global _kept
    before, _kept = _kept, _KeptModel()
    try:
        yield
    finally:
        _kept = before


def models_are_kept() -> bool:
    """Whether ``models_kept`` is in force, so that it pays to put a model back as it was."""
    return _kept is not None


def measured_once(model: PreTrainedModel, key: Hashable, measure: Callable[[], Measured]) -> Measured:
    """``measure()``; of a model that ``models_kept`` keeps, the value that was measured first under this key.

    For what depends on nothing but the key and the model as ``load_model`` has returned it, with no edit in force.
    """
    if _kept is None or _kept.current is not model:
        return measure()
    if key not in _kept.values:
        _kept.values[key] = measure()
    return _kept.values[key]


class _KeptModel:
    """The model that was loaded last, its state at that time, and what was measured of it in that state.

    Its tokenizer too, of which everybody gets a copy: that of a GGUF file takes seconds to make.
    """

    def __init__(self) -> None:
        self._source: ModelSource | None = None
        self._files: tuple[Any, ...] = ()
        self._digest = ""
        self._vocabulary: tuple[tuple[ModelSource, tuple[Any, ...]], Vocabulary] | None = None
        self.current: PreTrainedModel | None = None
        self.values: dict[Hashable, Any] = {}

    def model(self, source: ModelSource) -> PreTrainedModel:
        files = _files_of(source)
        if self.current is not None and (source, files) == (self._source, self._files):
            if _digest_of(self.current) == self._digest:
                return self.current
            log.info("%s has changed since it was loaded: it is loaded again", source.pretrained)
        self.current, self.values = None, {}  # so that there is room for the next one
        model = _load(source)
        if source.device_map is None:
            self._source, self._files, self.current, self._digest = source, files, model, _digest_of(model)
        return model

    def vocabulary(self, source: ModelSource) -> Vocabulary:
        key = source, _files_of(source)
        if self._vocabulary is None or self._vocabulary[0] != key:
            vocabulary = _load_vocabulary(source)
            try:
                self._vocabulary = key, copy.deepcopy(vocabulary)
            except TypeError:  # a tokenizer around a compiled object that cannot be copied
                return vocabulary
        return copy.deepcopy(self._vocabulary[1])


_kept: _KeptModel | None = None


def _files_of(source: ModelSource) -> tuple[Any, ...]:
    """Names, sizes and times of the files, which tell whether they have changed; nothing for a hub model."""
    path = source.path
    files = [] if path is None else [path] if path.is_file() else sorted(path.iterdir())
    return tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files)


def _digest_of(model: PreTrainedModel) -> str:
    """Digest of every bit of the weights and buffers, the configuration, and what may have been hung on the modules."""
    digest = hashlib.sha256(f"{model.config}{getattr(model, 'generation_config', None)}".encode())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.requires_grad}".encode())
        digest.update(memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
    for name, module in model.named_modules():
        hooks = [len(hung) for key, hung in vars(module).items() if key.endswith("hooks") and hung]
        if is_routed(module) and not hooks:  # made by whoever asked for experts: nothing but a view of a parameter
            continue
        digest.update(f"{name} {type(module)} {module.training} {'forward' in vars(module)} {hooks}".encode())
    return digest.hexdigest()


def _load(source: ModelSource) -> PreTrainedModel:
    where = _locate(source)
    options = _load_options(source, where)
    try:
        with quiet_library(), _network(where), _as_input_error(source, where):
            config = _causal_config(source, where)
            quantised = None if "gguf_file" in where else quantisation_of(config)
            if quantised is not None and quantised.dequantised == "while loading":
                config.quantization_config = {**quantised.about, "dequantize": True}
            model, info = auto_class(config).from_pretrained(
                **where, **options, config=config, output_loading_info=True
            )
            if quantised is not None and quantised.dequantised == "once loaded":
                model = model.dequantize()
    except BaseException:
        shutil.rmtree(options.get("offload_folder", ""), ignore_errors=True)
        raise
    if "offload_folder" in options:
        weakref.finalize(model, shutil.rmtree, options["offload_folder"], ignore_errors=True)
    if quantised is not None:
        model.dequantized = str(quantised)
        model._weight_conversions = None  # by which save_pretrained would quantise the weights again
        log.warning("%s: its weights were packed (%s), and what they stand for is used", source.pretrained, quantised)
    if "gguf_file" in where:
        forget_gguf(model)
    model.eval().requires_grad_(False)
    check_plain_weights(model, source)
    check_finite(model, source)
    check_causal(model, source)
    check_complete(info, source)
    return model


def load_skeleton(source: ModelSource) -> PreTrainedModel:
    """The model as its config describes it, on the meta device: names and shapes of its modules, no weights.

    Raises:
        InputError: If nothing is there, the hub cannot be reached, or the model is not a causal language model.
    """
    where = _locate(source)
    with quiet_library(), _network(where), _as_input_error(source, where, what="config"):
        config = _causal_config(source, where)
        with torch.device("meta"):
            return auto_class(config).from_config(config, trust_remote_code=source.trust_remote_code)


def auto_class(config: PretrainedConfig) -> Any:
    """The class of transformers that loads the model of a config as a language model.

    ``AutoModelForCausalLM``; of a text model inside one that reads images too, such as Qwen3-VL's,
    ``AutoModelForImageTextToText``.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    both = AutoModelForCausalLM, AutoModelForImageTextToText
    return next((auto for auto in both if type(config) in auto._model_mapping), AutoModelForCausalLM)


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer, padding on the right, with a pad token and the model's context length.

    A tokenizer without a pad token pads with its end-of-text token (or the unknown token): pads are masked wherever
    they are used, so the choice has no effect on any number.

    Raises:
        InputError: If there is no tokenizer, or it has more tokens than the model has embeddings.
    """
    tokenizer = load_vocabulary(source).tokenizer
    if tokenizer is None:
        raise InputError(f"model.pretrained={source.pretrained!r} has no tokenizer; {TOKENIZER_HINT}")
    return tokenizer


def load_vocabulary(source: ModelSource) -> Vocabulary:
    """Load the model's tokenizer as ``load_tokenizer`` does, and what the model's config says about token ids.

    A local folder may be without a tokenizer: then the model reads token ids only.

    Raises:
        InputError: If the tokenizer cannot be loaded, or has more tokens than the model has embeddings.
    """
    with timed("loading"):
        return _load_vocabulary(source) if _kept is None else _kept.vocabulary(source)


def _load_vocabulary(source: ModelSource) -> Vocabulary:
    from transformers import AutoTokenizer

    where = _locate(source)
    tokenizer = None
    with quiet_library(), _network(where), _as_input_error(source, where, what="tokenizer"):
        if has_tokenizer_files(source):
            tokenizer = AutoTokenizer.from_pretrained(**where)
        config = _config(where).get_text_config()
    return ready_vocabulary(tokenizer, config, source)


def ready_vocabulary(
    tokenizer: PreTrainedTokenizerBase | None, config: PretrainedConfig, source: ModelSource
) -> Vocabulary:
    """Makes a tokenizer ready: it gets a pad token, pads on the right, and knows the model's context.

    Args:
        tokenizer: The model's tokenizer, changed in place; None: the model reads token ids only.
        config: Config of the model's text part.
        source: The model, for messages.

    Raises:
        InputError: If the tokenizer has no vocabulary, or more tokens than the model has embeddings.
    """
    context = getattr(config, "max_position_embeddings", None)
    if tokenizer is None:
        return Vocabulary(None, config.vocab_size, context)
    check_tokenizer(tokenizer, source)
    compare_vocabularies(tokenizer, config.vocab_size, source.pretrained)
    ensure_pad_token(tokenizer)
    tokenizer.padding_side = "right"
    tokenizer.model_max_length = min(tokenizer.model_max_length, context or tokenizer.model_max_length)
    has_limit = tokenizer.model_max_length < 10**9  # transformers writes "unknown" as 1e30
    return Vocabulary(tokenizer, config.vocab_size, int(tokenizer.model_max_length) if has_limit else None)


def _locate(source: ModelSource) -> dict[str, Any]:
    """The arguments of every ``from_pretrained`` call for this source."""
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
        if not (path / "config.json").is_file():
            files = sorted(entry.name for entry in path.glob("*.gguf"))
            hint = f"name its file: {path / files[0]}" if files else "give a folder written by save_pretrained"
            raise InputError(f"model.pretrained={source.pretrained!r}: the folder has no config.json; {hint}")
        return where | {"pretrained_model_name_or_path": str(path)}
    if path.suffix.lower() != ".gguf":
        raise InputError(f"model.pretrained={source.pretrained!r} is a file but not a .gguf file; {_WAY_OUT}")
    for package in ("gguf", "accelerate"):
        _require(package, "loading a GGUF file", "model.pretrained")
    return where | {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}


def _require(package: str, what: str, key: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise InputError(f"{key}: {what} needs the package {package}: {_EXTRA}")


def _load_options(source: ModelSource, where: dict[str, Any]) -> dict[str, Any]:
    # Mismatched shapes are let through to be named by check_complete: the library's own error names nothing.
    options: dict[str, Any] = {"dtype": _DTYPES[source.dtype], "ignore_mismatched_sizes": True}
    if source.device_map is not None:
        _require("accelerate", "spreading a model over devices", "model.device_map")
        # What lies on the disk is read from the checkpoint, but for weights that the model holds in another form.
        options |= {"device_map": source.device_map, "offload_folder": tempfile.mkdtemp(prefix="sparc3-offload-")}
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
    """The config of a GGUF file. Cached: parsing the vocabulary takes seconds, and tokenizer and model both ask."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, gguf_file=name, local_files_only=True)


def _causal_config(source: ModelSource, where: dict[str, Any]) -> PretrainedConfig:
    """The model's config, if it is one of a causal language model with plain weights, as far as a config can tell."""
    config = _config(where)
    if "gguf_file" not in where:
        check_unquantised(config, source)
    kind = f"model.pretrained={source.pretrained!r} is of type {config.model_type!r}"
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(f"{kind}, an encoder-decoder; give a decoder-only (causal) language model")
    remote = source.trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if type(config) not in auto_class(config)._model_mapping and not remote:
        raise InputError(f"{kind}, which has no causal language model; give a decoder-only (causal) language model")
    return config


def _network(where: dict[str, Any]) -> contextlib.AbstractContextManager[None]:
    return offline() if where["local_files_only"] else contextlib.nullcontext()


@contextlib.contextmanager
def quiet_library() -> Iterator[None]:
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
    """Turn what the loader raises about the user's input into one line: what is wrong, which value, how to fix it."""
    from pickle import UnpicklingError  # what torch.load(weights_only=True) raises; nothing is unpickled here

    from safetensors import SafetensorError

    name = f"model.pretrained={source.pretrained!r}"
    try:
        yield
    except InputError:
        raise
    except UnpicklingError as error:
        raise InputError(
            f"{name}: its weights file is not a plain checkpoint (a pickle of anything else is not opened); {_WAY_OUT}"
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
