"""A share of its own for every layer: from a file, or by how many outliers the scores of its block have."""

from __future__ import annotations

import fnmatch
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path

from sparc3_pl.errors import InputError
from sparc3_pl.io.formats import Record
from sparc3_pl.registry import Registry, Spec
from sparc3_pl.selection.contrast import Side

__all__ = ["BUDGETS", "Budgets", "FileBudgets", "Owl", "block_of", "budgets_of"]


class Budgets(ABC):
    """What share of each layer is chosen. Arguments are the fields of a dataclass."""

    @abstractmethod
    def shares(self, general: Side, share: float | None) -> dict[str, float]:
        """The share of every layer of ``general``, in [0, 1); 0 leaves a layer as it is.

        Args:
            general: Scores on general text.
            share: The share that was asked for, of all.

        Raises:
            InputError: if they cannot be told from these.
        """

    def arguments(self) -> Record:
        """Its arguments, by name."""
        return asdict(self) if is_dataclass(self) else {}


@dataclass(frozen=True)
class FileBudgets(Budgets):
    """Shares by glob of the layers' names; the first that fits counts, and ``share`` where none does.

    Args:
        path: A JSON or YAML file: ``{"*.mlp.*": 0.6, "*.self_attn.*": 0.4}``.
    """

    path: str

    def shares(self, general: Side, share: float | None) -> dict[str, float]:
        table = self._read()
        for pattern in table:
            if not fnmatch.filter(general.layers, pattern):
                raise InputError(f"{self.path}: {pattern!r} matches no layer to choose from; mend it or leave it out")
        result = {}
        for layer in general.layers:
            own = next((table[pattern] for pattern in table if fnmatch.fnmatchcase(layer, pattern)), share)
            if own is None:
                raise InputError(f"{self.path}: no pattern fits {layer}; add one, or give --share for the rest")
            result[layer] = own
        return result

    def _read(self) -> dict[str, float]:
        from sparc3_pl.io.yaml_format import load_yaml

        path = Path(self.path)
        try:
            text = path.read_text(encoding="utf-8")
            table = json.loads(text) if path.suffix == ".json" else load_yaml(text)
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: cannot be read as shares by layer ({error}); give a JSON or YAML file") from None
        if not isinstance(table, Mapping) or not table:
            raise InputError(f'{path}: holds no shares by layer; write e.g. {{"*.mlp.*": 0.6, "*": 0.5}}')
        for pattern, value in table.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
                raise InputError(f"{path}: {pattern}: {value!r} is not a share from 0 to below 1; e.g. 0.5")
        return {str(pattern): float(value) for pattern, value in table.items()}


@dataclass(frozen=True)
class Owl(Budgets):
    """Outlier weighed layerwise sparsity (Yin et al., ICML 2024, arXiv 2310.05175, Section 3).

    With A the scores of a transformer block, D = share of its weights with A > M mean(A) (Eq. 1) is its share of
    outliers. A block with more of them is pruned less: S_l falls linearly with D_l, under the paper's two conditions
    that every S_l is in [S - lambda, S + lambda] and that their mean (over weights) is S. The block that is furthest
    from S is lambda away. (The authors' program stretches the S_l over 2 lambda, which may put one end outside.)

    Args:
        outlier: M: how many times the mean an outlier exceeds.
        spread: lambda: how far a share may be from the one that was asked for.
    """

    outlier: float = 5.0
    spread: float = 0.08

    def shares(self, general: Side, share: float | None) -> dict[str, float]:
        if share is None:
            raise InputError("budgets=owl spreads a share over the layers; give --share")
        if not 0 < share - self.spread < share + self.spread < 1:
            raise InputError(
                f"budgets=owl: shares from {share - self.spread:g} to {share + self.spread:g} (share={share}, "
                f"spread={self.spread}) are not all between 0 and 1; give another share or a smaller spread above 0"
            )
        blocks = {layer: block_of(layer) or layer for layer in general.layers}
        sizes, sums, outliers = dict.fromkeys(blocks.values(), 0), dict.fromkeys(blocks.values(), 0.0), {}
        for piece in general():
            sizes[blocks[piece.layer]] += len(piece.values)
            sums[blocks[piece.layer]] += float(piece.values.abs().double().sum())
        outliers = dict.fromkeys(sizes, 0)
        for piece in general():
            block = blocks[piece.layer]
            outliers[block] += int((piece.values.abs() > self.outlier * sums[block] / sizes[block]).sum())
        density = {block: outliers[block] / sizes[block] for block in sizes}
        mean = sum(density[block] * sizes[block] for block in sizes) / sum(sizes.values())
        furthest = max(abs(value - mean) for value in density.values())
        each = {
            block: share - (self.spread * (value - mean) / furthest if furthest else 0.0)
            for block, value in density.items()
        }
        return {layer: each[block] for layer, block in blocks.items()}


BUDGETS: Registry[Budgets] = Registry("budgets", Budgets, {"owl": f"{__name__}.Owl", "file": f"{__name__}.FileBudgets"})


def budgets_of(spec: Spec | Budgets) -> Budgets:
    """Budgets by name, class path, or the path of a file.

    Raises:
        InputError: if there is neither.
    """
    if isinstance(spec, str) and (Path(spec).is_file() or Path(spec).suffix in (".json", ".yaml", ".yml")):
        return FileBudgets(spec)
    return BUDGETS.make(spec)


def block_of(layer: str) -> str | None:
    """The transformer block that a layer lies in, by its name: up to the first number; None if it is in none.

    The output head is in none, nor are projections around the embeddings.
    """
    match = re.match(r"(.*?(?:^|\.)\d+)\.", layer)
    return match[1] if match else None
