"""Attention heads and attention channels as components."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sparc3_pl.errors import InputError
from sparc3_pl.model.components import Component, Group, Part, check_range, rows_and_bias
from sparc3_pl.model.heads import Attention, attentions
from sparc3_pl.model.structure import features

__all__ = ["Channel", "Head"]


class Head(Component):
    """One query head. Its scores lie at the attention's output projection, ``[heads]``.

    A head is written by its rows of the query projection, and read by its columns of the output projection. Rows of
    a key and value head that several query heads share belong to it only if all of them are chosen.
    """

    unit = "heads"

    def groups(self, model: nn.Module, patterns: Sequence[str] | None = None) -> list[Group]:
        return [
            Group(block.output, (block.num_heads,), "in", block.num_heads, width=block.head_dim)
            for block in _chosen(model, patterns)
        ]

    def parts(self, model: nn.Module, layer: str, index: Tensor) -> list[Part]:
        block = _block(model, layer)
        check_range("head", layer, index, block.num_heads, "heads")
        owner = torch.arange(len(index))
        name, rows = block.query
        parts = rows_and_bias(
            name, model.get_submodule(name), rows[index].flatten(), owner.repeat_interleave(rows.shape[1])
        )
        kv_heads = block.kv_heads_of(index)
        group = block.num_heads // block.num_kv_heads
        for name, rows in (block.key, block.value):
            # Among heads that share the rows, the first in the list owns them, so that an edit writes them once.
            first = [int((index // group == kv).nonzero()[0, 0]) for kv in kv_heads]
            owners = torch.tensor(first, dtype=torch.int64).repeat_interleave(rows.shape[1])
            if len(kv_heads):
                parts += rows_and_bias(name, model.get_submodule(name), rows[kv_heads].flatten(), owners)
        columns = block.columns(index)
        return [*parts, Part(block.output, "columns", columns, owner.repeat_interleave(block.head_dim), "reads")]


class Channel(Component):
    """One input of the attention's output projection: a column of it. Scores ``[in]``."""

    unit = "channels"

    def groups(self, model: nn.Module, patterns: Sequence[str] | None = None) -> list[Group]:
        widths = {b.output: features(model.get_submodule(b.output))[1] for b in _chosen(model, patterns)}
        return [Group(output, (width,), "in", width) for output, width in widths.items()]

    def parts(self, model: nn.Module, layer: str, index: Tensor) -> list[Part]:
        width = features(model.get_submodule(_block(model, layer).output))[1]
        check_range("channel", layer, index, width, "channels")
        return [Part(layer, "columns", index, torch.arange(len(index)), "reads")]


def _chosen(model: nn.Module, patterns: Sequence[str] | None) -> list[Attention]:
    """The blocks whose output projection matches one of the globs."""
    blocks = attentions(model)
    for pattern in patterns or ():
        if not fnmatch.filter([block.output for block in blocks], pattern):
            raise InputError(
                f"targets: {pattern!r} matches no output projection of attention; they are {blocks[0].output}, ..."
            )
    return [b for b in blocks if patterns is None or any(fnmatch.fnmatchcase(b.output, p) for p in patterns)]


def _block(model: nn.Module, layer: str) -> Attention:
    block = next((block for block in attentions(model) if block.output == layer), None)
    if block is None:
        raise InputError(f"{layer} is not the output projection of an attention block of this model")
    return block
