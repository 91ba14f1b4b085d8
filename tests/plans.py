"""Plans for tiny models."""

import torch

from sparc3_pl.model.identity import ModelRecord, fingerprint
from sparc3_pl.model.structure import features, mlps
from sparc3_pl.pruning.plan import Entries, PlannedNeuron, PrunePlan, entries_of


def plan_for(model, neurons: list[tuple[str, int]] | None = None, per_layer: int = 3, **fields) -> PrunePlan:
    """A plan of the given neurons, or of ``per_layer`` seeded ones in each MLP."""
    if neurons is None:
        generator = torch.Generator().manual_seed(0)
        neurons = [
            (mlp.up, mlp.up_rows.start + i)
            for mlp in mlps(model)
            for i in torch.randperm(mlp.width, generator=generator)[:per_layer].tolist()
        ]
    return PrunePlan(
        entries=entries_of([PlannedNeuron(layer, index, -1.0) for layer, index in neurons]),
        model=ModelRecord(pretrained="demo", revision=None, fingerprint=fingerprint(model), dtype="float32"),
        shapes={layer: [features(model.get_submodule(layer))[0]] for layer, _ in neurons},
        **fields,
    )


def weight_plan_for(model, layer: str, indices: list[int], **fields) -> PrunePlan:
    return PrunePlan(
        entries={layer: Entries(torch.tensor(indices, dtype=torch.int32))},
        granularity="weight",
        model=ModelRecord(pretrained="demo", fingerprint=fingerprint(model)),
        shapes={layer: list(features(model.get_submodule(layer)))},
        **fields,
    )


def state(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_bits(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    """Bit for bit, so that 0.0 and -0.0 differ."""
    return one.keys() == two.keys() and all(
        torch.equal(one[k].contiguous().view(torch.uint8), two[k].contiguous().view(torch.uint8)) for k in one
    )
