"""All components that a circuit is chosen from, in one order, and where the model reads each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparc3_pl.errors import InputError
from sparc3_pl.model.components import Component, Group
from sparc3_pl.model.structure import features

__all__ = ["Candidates", "Span"]


@dataclass(frozen=True)
class Span:
    """The components of one scored layer: ``start .. start + group.count`` among all candidates.

    Attributes:
        kind: Name of the kind of component.
        group: Where their scores are.
        start: The first one's position.
    """

    kind: str
    group: Group
    start: int

    @property
    def own(self) -> slice:
        """Their positions among all candidates."""
        return slice(self.start, self.start + self.group.count)


@dataclass(frozen=True)
class Candidates:
    """The components that a circuit is chosen from; N of them.

    Attributes:
        spans: The spans of the scored layers, in the model's order; the layers of one kind stand together.
        readers: For each linear layer that reads some of them, by name, the candidate that each input column carries:
            ``[in]`` int64, positions among the candidates, -1 for none. Empty for single weights.
    """

    spans: tuple[Span, ...]
    readers: Mapping[str, Tensor]

    @classmethod
    def of(cls, model: nn.Module, kinds: Mapping[str, Component], patterns: Sequence[str] | None = None) -> Candidates:
        """The candidates of a model.

        Args:
            model: A causal language model.
            kinds: Kinds of component by name; single weights stand alone.
            patterns: Globs of layers to choose from; None: each kind's own choice.

        Raises:
            InputError: if a glob matches nothing, nothing reads a component, or two components share an input column.
        """
        spans, start = [], 0
        for name, kind in kinds.items():
            for group in kind.groups(model, patterns):
                if group.routed:
                    raise InputError(
                        f"model.targets: only some tokens reach {group.layer}, an expert's, so that no ablation is "
                        "known for it; measure heads or channels, or layers outside of the experts"
                    )
                spans.append(Span(name, group, start))
                start += group.count
        weights = [kind.dims == 2 for kind in kinds.values()]
        if any(weights) and len(weights) > 1:
            raise InputError(
                "model.granularity: single weights are masked and other components are read, which no one curve "
                "compares; measure weights in a run of their own"
            )
        readers: dict[str, Tensor] = {}
        if not any(weights):
            for span in spans:
                _add_reader(readers, model, kinds[span.kind], span)
        return cls(tuple(spans), readers)

    @property
    def count(self) -> int:
        """The number of candidates, N."""
        return sum(span.group.count for span in self.spans)

    @property
    def are_weights(self) -> bool:
        """Whether the candidates are single weights."""
        return not self.readers

    @property
    def kinds(self) -> dict[str, int]:
        """The number of candidates of each kind, by the kind's name."""
        counts: dict[str, int] = {}
        for span in self.spans:
            counts[span.kind] = counts.get(span.kind, 0) + span.group.count
        return counts

    def flat(self, scores: Mapping[str, Tensor]) -> Tensor:
        """The scores of all candidates, ``[N]`` float32, from those of each scored layer."""
        return torch.cat([scores[span.group.layer][span.group.own].flatten().cpu().float() for span in self.spans])

    def split(self, chosen: Tensor) -> dict[Span, Tensor]:
        """The chosen candidates (bool ``[N]``) of each span that has any: ascending indices into the layer's flattened
        scores.
        """
        parts = {}
        for span in self.spans:
            index = chosen[span.own].nonzero().flatten()
            if len(index):
                parts[span] = index + (0 if span.group.axis == "both" else span.group.first)
        return parts


def _add_reader(readers: dict[str, Tensor], model: nn.Module, kind: Component, span: Span) -> None:
    """Enters the columns that read the components of a span."""
    index = torch.arange(span.group.own.start, span.group.own.stop)
    parts = [part for part in kind.parts(model, span.group.layer, index) if part.role == "reads"]
    if not parts:
        raise InputError(
            f"model.targets: nothing is known to read the {kind.unit} of {span.group.layer}, so they cannot be "
            "ablated; choose layers whose output one layer reads, as the up-projections, or single weights"
        )
    for part in parts:
        assert part.where == "columns", f"{part.layer}: components are read by columns"
        size = features(model.get_submodule(part.layer))[1]
        owner = readers.setdefault(part.layer, torch.full((size,), -1))
        if (owner[part.index] >= 0).any():
            raise InputError(
                f"model.granularity: two kinds of component are read by the same columns of {part.layer}; measure them "
                "in two runs"
            )
        owner[part.index] = part.owner + span.start
