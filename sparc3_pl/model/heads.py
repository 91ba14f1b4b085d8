"""The rows and columns of a model's attention that belong to each head.

Query, key and value projections are recognised by feeding the attention function, the output projection by reading
from it. Where one fused map makes query, key and value together, families order its rows in different ways; the order
is found by value, on one token: at position 0 no rotary embedding has turned anything yet.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparc3_pl.errors import InputError
from sparc3_pl.model.attention import AttentionFunction, attention_modules, wrapped_attention
from sparc3_pl.model.placement import input_device
from sparc3_pl.model.remembered import by_structure
from sparc3_pl.model.structure import decoder, features, is_linear

__all__ = ["Attention", "attentions"]

_QUERY, _KEY, _VALUE = ("q_proj", "query", "wq"), ("k_proj", "key", "wk"), ("v_proj", "value", "wv")


@dataclass(frozen=True)
class Attention:
    """The attention block of one decoder layer.

    Attributes:
        name: The attention module.
        output: Its output projection; columns ``h * head_dim`` to ``(h + 1) * head_dim`` read head h.
        num_heads: Query heads.
        num_kv_heads: Key and value heads; query heads ``g * n`` to ``(g + 1) * n`` share the g-th.
        head_dim: Width of a head at the output projection.
        query: Layer and rows of the query heads, ``[num_heads, d]`` int64.
        key: Layer and rows of the key heads, ``[num_kv_heads, d]``.
        value: Layer and rows of the value heads, ``[num_kv_heads, head_dim]``.
    """

    name: str
    output: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    query: tuple[str, Tensor]
    key: tuple[str, Tensor]
    value: tuple[str, Tensor]

    def columns(self, heads: Tensor) -> Tensor:
        """Columns of ``output`` that read ``heads`` (``[n]``), in their order: ``[n * head_dim]`` int64."""
        return (heads[:, None] * self.head_dim + torch.arange(self.head_dim)).flatten()

    def kv_heads_of(self, heads: Tensor) -> Tensor:
        """Key and value heads all of whose query heads are in ``heads``, ascending: ``[m]`` int64."""
        group, heads = self.num_heads // self.num_kv_heads, heads.unique()  # one that is named twice is no second one
        return (torch.bincount(heads // group, minlength=self.num_kv_heads) == group).nonzero().flatten()


@by_structure
def attentions(model: nn.Module) -> list[Attention]:
    """The attention blocks of ``model`` in layer order.

    Raises:
        InputError: if a block's projections cannot be told apart, or there is no block.
    """
    inside = {id(module) for module in decoder(model).modules()}
    modules = {name: m for name, m in attention_modules(model).items() if id(m) in inside}
    if not modules:
        raise InputError(
            f"{type(model).__name__} has no attention that goes through transformers' registry, so its heads are "
            "unknown; score neurons or weights instead"
        )
    is_separate = {
        name: all(_named(m, names) is not None for names in (_QUERY, _KEY, _VALUE)) for name, m in modules.items()
    }
    others = {name: m for name, m in modules.items() if not is_separate[name]}
    first_by_name = _first_token(model, others) if others else {}
    return [
        _from_separate(name, m) if is_separate[name] else _from_fused(name, m, *first_by_name[name])
        for name, m in modules.items()
    ]


def _named(module: nn.Module, names: tuple[str, ...]) -> str | None:
    return next((n for n, m in module.named_children() if n in names and is_linear(m)), None)


def _output(name: str, module: nn.Module, inputs: set[str]) -> str:
    others = [n for n, m in module.named_children() if is_linear(m) and n not in inputs]
    if len(others) != 1:
        raise InputError(f"{name}: {len(others)} linear layers besides {sorted(inputs)}, so its output map is unknown")
    return others[0]


def _head_dim(name: str, module: nn.Module, output: str, num_heads: int) -> int:
    width = features(getattr(module, output))[1]
    if width % num_heads:
        raise InputError(f"{name}.{output} reads {width} channels, which {num_heads} heads do not share evenly")
    return width // num_heads


def _num_heads(name: str, module: nn.Module) -> tuple[int, int]:
    config = module.config
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int):
        raise InputError(f"{name}: its configuration does not say how many heads it has")
    return heads, getattr(config, "num_key_value_heads", None) or heads


def _from_separate(name: str, module: nn.Module) -> Attention:
    q, k, v = (_named(module, names) for names in (_QUERY, _KEY, _VALUE))
    output = _output(name, module, {q, k, v})
    heads, kv_heads = _num_heads(name, module)
    rows = {part: features(getattr(module, part))[0] for part in (q, k, v)}
    if rows[q] % heads or rows[k] % kv_heads or rows[v] % kv_heads:
        raise InputError(f"{name}: rows {rows} are not shared evenly by {heads} query and {kv_heads} key-value heads")
    order = {part: torch.arange(rows[part]) for part in (q, k, v)}
    return Attention(
        name, f"{name}.{output}", heads, kv_heads, _head_dim(name, module, output, heads),
        query=(f"{name}.{q}", order[q].reshape(heads, -1)),
        key=(f"{name}.{k}", order[k].reshape(kv_heads, -1)),
        value=(f"{name}.{v}", order[v].reshape(kv_heads, -1)),
    )  # fmt: skip


def _from_fused(
    name: str, module: nn.Module, outputs: dict[str, Tensor], qkv: tuple[Tensor, Tensor, Tensor]
) -> Attention:
    """``outputs``: outputs of the module's linear layers at one token, ``[rows]``; ``qkv``: ``[heads, d]`` each."""
    heads, kv_heads = len(qkv[0]), len(qkv[1])
    size = sum(part.numel() for part in qkv)
    (fused,) = [part for part, y in outputs.items() if len(y) == size and features(getattr(module, part))[0] == size]
    for order in _orders(heads, kv_heads, qkv[0].shape[1]):
        if all(torch.equal(outputs[fused][rows], part) for rows, part in zip(order, qkv, strict=True)):
            output = _output(name, module, {fused})
            layer = f"{name}.{fused}"
            q, k, v = ((layer, rows) for rows in order)
            return Attention(name, f"{name}.{output}", heads, kv_heads, _head_dim(name, module, output, heads), q, k, v)
    raise InputError(f"{name}.{fused}: in which order its rows hold query, key and value is unknown")


def _orders(heads: int, kv_heads: int, width: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The ways to order the rows of a fused map: all queries, keys, values; or group by group."""
    rows = torch.arange((heads + 2 * kv_heads) * width)
    q, k, v = rows.split([heads * width, kv_heads * width, kv_heads * width])
    blocks = q.reshape(heads, width), k.reshape(kv_heads, width), v.reshape(kv_heads, width)
    group = heads // kv_heads
    by_group = rows.reshape(kv_heads, group + 2, width)
    of_groups = by_group[:, :group].reshape(heads, width), by_group[:, group], by_group[:, group + 1]
    return [blocks, of_groups]


@torch.no_grad()
def _first_token(
    model: nn.Module, modules: dict[str, nn.Module]
) -> dict[str, tuple[dict[str, Tensor], tuple[Tensor, Tensor, Tensor]]]:
    """Outputs of the linear layers, and inputs of the attention function, of each module at a text's first token."""
    outputs: dict[str, dict[str, Tensor]] = {name: {} for name in modules}
    qkv: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    def keep(name: str, part: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, y: Tensor) -> None:
            outputs[name][part] = y.reshape(-1, y.shape[-1])[0].cpu()

        return hook

    def watch(name: str) -> Callable[[AttentionFunction], AttentionFunction]:
        def wrap(base: AttentionFunction) -> AttentionFunction:
            def attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any):
                qkv[name] = tuple(part[0, :, 0].cpu() for part in (q, k, v))
                return base(module, q, k, v, *args, **kwargs)

            return attend

        return wrap

    with ExitStack() as undo:
        for name, module in modules.items():
            undo.enter_context(wrapped_attention(module, watch(name)))
            for part, child in module.named_children():
                if is_linear(child):
                    undo.callback(child.register_forward_hook(keep(name, part)).remove)
        device = input_device(model)
        decoder(model)(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=device), use_cache=False)
    return {name: (outputs[name], qkv[name]) for name in modules}
