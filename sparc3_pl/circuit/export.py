"""Writes what a circuit folder holds beside its figures: scores, plans, and importances for MIB's circuit track."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sparc3_pl.circuit.arms import Arm, ArmScores
from sparc3_pl.circuit.components import Candidates
from sparc3_pl.circuit.results import CircuitResults, rows_of
from sparc3_pl.io.files import strict_json, write_text
from sparc3_pl.io.formats import Record
from sparc3_pl.model.heads import attentions
from sparc3_pl.model.identity import ModelRecord
from sparc3_pl.model.structure import mlps
from sparc3_pl.pruning.plan import Entries, PlannedNeuron, PrunePlan, entries_of
from sparc3_pl.scores.writer import write_scores

__all__ = ["circuit_plan", "curve_table", "node_importances", "write_arm_scores", "write_importances"]


def write_arm_scores(
    folder: Path, arm: Arm, scores: ArmScores, model: ModelRecord, data: Sequence[Mapping[str, Any]]
) -> None:
    """Writes the scores of an arm below ``folder``: a score folder, or one for each of several sets of pairs.

    Args:
        folder: Where score folders go.
        arm: The arm.
        scores: The arm's scores.
        model: ``describe(model, source)``.
        data: The record of each set of discovery pairs.
    """
    for number in range(len(data) if scores.units else 1):
        samples = scores.samples.get(number, [])
        layers = scores.of(group=number if scores.units else None).values()
        about = arm.request.about(model, dict(data[number]) if samples else {})
        name = arm.name if len(data) == 1 or not scores.units else f"{arm.name}-{number}"
        write_scores(folder / name, False, layers, replace(about, relevance_account=scores.account), samples)


def circuit_plan(
    candidates: Candidates,
    arm: str,
    chosen_N: Tensor,
    values_N: Tensor,
    model: ModelRecord,
    settings: Mapping[str, Any],
    samples: Sequence[str],
) -> PrunePlan:
    """A plan that sets the chosen components to zero, best first.

    Args:
        candidates: All N components.
        arm: Name of the arm that ranks them.
        chosen_N: Whether each is set to zero, bool.
        values_N: The values that they are ranked by.
        model: ``describe(model, source)``.
        settings: Further settings of the choice.
        samples: Ids of the discovery pairs and their texts: these must not be evaluated on.
    """
    parts = candidates.split(chosen_N)
    if candidates.are_weights:
        entries = {span.group.layer: Entries(index) for span, index in parts.items()}
    else:
        values = {span: values_N[span.own][index - span.group.first] for span, index in parts.items()}
        neurons = [
            PlannedNeuron(span.group.layer, place, value)
            for span, index in parts.items()
            for place, value in zip(index.tolist(), values[span].tolist(), strict=True)
        ]
        entries = entries_of(sorted(neurons, key=lambda neuron: -(neuron.score or 0.0)))
    kinds = dict.fromkeys(span.kind for span in parts)
    return PrunePlan(
        entries=entries,
        model=model,
        granularity="+".join(kinds),
        components={span.group.layer: span.kind for span in parts} if len(kinds) > 1 else {},
        num_candidates=candidates.count,
        contrast="circuit",
        edit="zero",
        settings={"arm": arm, **settings},
        shapes={span.group.layer: list(span.group.shape) for span in parts},
        behaviour_samples=sorted(samples),
    )


def node_importances(model: nn.Module, candidates: Candidates, scores: ArmScores) -> Record | None:
    """The scores of heads and MLPs as the graph that MIB's circuit track loads; None for other components.

    The form is that of the track's own graph files: ``cfg``, ``nodes`` by name (``a0.h3`` head 3 of layer 0, ``m0`` the
    MLP of layer 0) with ``score`` and ``in_graph``, and no edge scores. A node without a score is kept by the track's
    tools. An MLP that was not scored as a whole has the sum of its neurons' scores, if these have a sign.
    """
    kinds, config = set(candidates.kinds), model.config.get_text_config()
    if "head" not in kinds:
        return None
    blocks, heads = attentions(model), [span for span in candidates.spans if span.kind == "head"]
    layer_of = {block.output: number for number, block in enumerate(blocks)}
    if len({block.num_heads for block in blocks}) > 1 or len(blocks) != config.num_hidden_layers:
        return None
    all_scores = {name: layer.scores for name, layer in scores.of().items()}
    nodes: dict[str, Record] = {"input": {"in_graph": True}, "logits": {"in_graph": True}}
    for span in heads:
        number = layer_of[span.group.layer]
        for head, score in enumerate(all_scores[span.group.layer][span.group.own].tolist()):
            nodes[f"a{number}.h{head}"] = {"in_graph": True, "score": score}
    kind_in_mlps = "mlp" if "mlp" in kinds else "neuron" if scores.across_kinds == "value" else None
    numbers = {name: number for number, mlp in enumerate(mlps(model)) for name in (mlp.up, mlp.down)}
    for span in candidates.spans:
        if span.kind == kind_in_mlps and span.group.layer in numbers:
            score = float(all_scores[span.group.layer][span.group.own].double().sum())
            nodes[f"m{numbers[span.group.layer]}"] = {"in_graph": True, "score": score}
    sizes = {
        "n_layers": len(blocks),
        "n_heads": blocks[0].num_heads,
        "d_model": config.hidden_size,
        "parallel_attn_mlp": bool(getattr(config, "use_parallel_residual", config.model_type in _PARALLEL)),
    }
    return {"cfg": sizes, "nodes": nodes, "edges": {}}


_PARALLEL = ("cohere", "cohere2", "phi")
"""Families whose MLP reads what their attention reads, whatever the config says."""


def curve_table(results: CircuitResults) -> str:
    """All curves as CSV."""
    rows, stream = rows_of(results), io.StringIO()
    writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def write_importances(folder: Path, importances: Mapping[str, Any]) -> None:
    """Writes ``importances.json`` into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "importances.json", strict_json(importances, indent=1) + "\n")
