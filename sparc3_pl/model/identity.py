"""The identity of a model: the digest of its weights, and its entry in manifests."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, get_type_hints

import torch
from torch import Tensor, nn

from sparc3_pl.io.formats import Record
from sparc3_pl.model.placement import values_of
from sparc3_pl.runtime.collectives import is_sharded

if TYPE_CHECKING:
    from transformers import PreTrainedModel
from sparc3_pl.model.experts import closed_routes
from sparc3_pl.model.source import ModelSource

__all__ = ["ModelRecord", "describe", "differing_config", "fingerprint", "model_config"]


class ModelRecord(dict[str, Any]):
    """A file's record of the model that it belongs to. Its keys can be read as attributes, None where there is no key.

    It is exactly what the file says: keys that only another version knows are kept, and none is added, because digests
    are of the whole.

    Attributes:
        pretrained: Hub id, folder or file.
        revision: Commit, branch or tag of a hub model.
        fingerprint: Fingerprint of the weights as they were loaded.
        architecture: Name of the class.
        dtype: Number format in which it was loaded, such as ``float32``.
        config: What its config says of how it computes; files of earlier versions do not.
        dequantized: The method that had packed the weights, if they were packed.
        evaluated_fingerprint: In an evaluation, the fingerprint of the weights that were evaluated.
        pruned_fingerprint: In a plan that keeps values, the fingerprint of the pruned model.
    """

    pretrained: str | None
    revision: str | None
    fingerprint: str | None
    architecture: str | None
    dtype: str | None
    config: Record | None
    dequantized: str | None
    evaluated_fingerprint: str | None
    pruned_fingerprint: str | None

    def __getattr__(self, name: str) -> Any:
        if name not in ModelRecord.__annotations__:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return self.get(name)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        fields = {
            name: core_schema.typed_dict_field(handler.generate_schema(kind), required=False)
            for name, kind in get_type_hints(cls).items()
        }

        def kept(record: Any, check: Any) -> ModelRecord:
            check(record)
            return cls(record)

        return core_schema.no_info_wrap_validator_function(
            kept, core_schema.typed_dict_schema(fields, extra_behavior="allow")
        )


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
    cache = _fingerprints.setdefault(model, {})
    if state is not None and state in cache:
        return cache[state]
    digest = hashlib.sha256()
    for name, value in named_values(model):
        digest.update(f"{name} {tuple(value.shape)}\n".encode())
        rounded = value.detach().to(torch.bfloat16).cpu().contiguous()
        digest.update(memoryview(rounded.view(torch.uint8).numpy()).cast("B"))
    result = f"sha256:{digest.hexdigest()}"
    if state is not None:
        cache.clear()  # one state per model: the current one
        cache[state] = result
    return result


_fingerprints: weakref.WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], str]] = weakref.WeakKeyDictionary()


def _state(model: nn.Module) -> tuple[Any, ...] | None:
    """A cheap state that changes whenever a weight does: its place, how often it was written to, the sum of its bits.

    The count misses only what is written through ``.data``; that, the sum sees, unless it swaps equal numbers.

    Returns:
        None if that is unknown: weights are offloaded or sharded, or not in one piece.
    """
    state = []
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        if parameter.is_meta or is_sharded(parameter) or value.is_inference() or not value.is_contiguous():
            return None
        bits = value.reshape(-1).view(torch.uint8)
        even = bits.numel() // 8 * 8
        whole_words = bits[:even].view(torch.int64) if bits.storage_offset() % 8 == 0 else bits[:even]
        sums = [int(part.sum(dtype=torch.int64)) for part in (whole_words, bits[even:])]
        state.append((name, value.dtype, tuple(value.shape), value.data_ptr(), parameter._version, *sums))
    state += [(name, *routes.tolist()) for name, routes in closed_routes(model)]
    return tuple(state)


def differing_config(one: Mapping[str, Any] | None, other: Mapping[str, Any] | None, path: str = "") -> str | None:
    """The first key in which two models' ``config`` entries differ, with both values; None if they are alike.

    A key that only one of them has is passed over: another version of the library may have added it, and entries made
    before this program kept the config have none.
    """
    if one is None or other is None:
        return None
    for key in sorted(one.keys() & other.keys()):
        mine, yours, name = one[key], other[key], f"{path}{key}"
        if isinstance(mine, Mapping) and isinstance(yours, Mapping):
            if (inner := differing_config(mine, yours, f"{name}.")) is not None:
                return inner
        elif mine != yours:
            return f"{name} ({mine!r}, here {yours!r})"
    return None


def model_config(model: PreTrainedModel) -> Record:
    """The part of the model's ``config.json`` that says how it computes: sizes, activation, epsilon, rotary base, ...

    Left out are names, versions, token ids, the number format, and what matters in training or for labels only.
    """
    return _computing(model.config.to_dict())


def _computing(config: Mapping[str, Any]) -> Record:
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


def named_values(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter once, by name; a value offloaded to CPU or disk is fetched while it is used.

    Where an edit has taken experts out of the routing, what it has done there is one of the values.
    """
    yield from closed_routes(model)
    ties = getattr(model, "all_tied_weights_keys", {})  # an offloaded one is another object in each of its modules
    names = [name for name, _ in model.named_parameters()]
    for name in names:
        if not (model.get_parameter(name).is_meta and ties.get(name) in names):
            owner, _, leaf = name.rpartition(".")
            yield name, values_of(model.get_submodule(owner), leaf)


def describe(model: PreTrainedModel, source: ModelSource, known: str | None = None) -> ModelRecord:
    """The manifest's ``model`` entry: ``pretrained``, ``revision``, ``fingerprint``, ``architecture``, ``dtype``, and
    ``config``: what the model's config says of how it computes, which the fingerprint of its weights does not tell.
    If the weights were packed, ``dequantized`` says by what (``8-bit bitsandbytes``).

    The fingerprint is not taken again if it is ``known``.
    """
    kind = type(model)
    if any(map(is_sharded, model.parameters())):  # FSDP2 gives the model a class of its own, derived from its first one
        kind = kind.__bases__[1]
    quantised = getattr(model, "dequantized", None)
    return ModelRecord(
        pretrained=source.pretrained,
        revision=getattr(model.config, "_commit_hash", None) or source.revision,
        fingerprint=known or fingerprint(model),
        architecture=kind.__name__,
        dtype=str(model.dtype).removeprefix("torch."),
        config=model_config(model),
        **({"dequantized": quantised} if quantised else {}),
    )
