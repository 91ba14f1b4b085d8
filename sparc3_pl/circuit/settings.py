"""The settings of a circuit run: the keys under ``model`` and ``data``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from sparc3_pl.errors import InputError
from sparc3_pl.registry import Spec

__all__ = ["CircuitData", "CircuitModel"]


@dataclass(frozen=True)
class CircuitModel:
    """Which model, and how its components are scored; the keys are those of ``score`` where that has them.

    Args:
        pretrained: Hub id, local folder, ``FILE.gguf``, or ``demo``, the model that comes with the package.
        dtype: Precision to load the model in; ``auto``: as it was saved.
        revision: Commit, branch or tag of a hub model.
        device_map: ``auto`` spreads the model over the GPUs of this process, and what does not fit there over the
            host's memory and the disk; ``sharded`` shares it out over processes that ``torchrun`` has started (FSDP2).
        trust_remote_code: Run the model code that a hub repository brings. Off unless you turn it on.
        dequantize: Make plain weights of those of an 8-bit or 4-bit checkpoint, where transformers can (FP8, MXFP4,
            compressed-tensors, bitsandbytes); else it is refused. GGUF files are unpacked in any case.
        methods: Ways to score components, each an arm of the comparison: names as in ``model.method`` of score, or
            ``class_path`` and ``init_args``.
        granularity: What circuits consist of: ``neuron``, ``head``, ``mlp`` (whole MLPs), ``channel``, ``weight`` (in a
            run of its own), or a class of your own. Kinds in a list compete in one ranking.
        target: What the methods attribute.
        targets: Glob patterns of the layers to choose from; unset: each kind's own choice.
        signed: Keep the sign of scores: the area CPR ranks by it. Without it scores are sums of absolute values.
        nonfinite: ``error`` stops at the first NaN or infinity; ``zero`` replaces each by 0 and counts them.
        draws: Random circuits that method ``random`` draws; each is measured like any other.
        seed: Seed of the first random circuit.
    """

    pretrained: str = "demo"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    revision: str | None = None
    device_map: str | None = None
    trust_remote_code: bool = False
    dequantize: bool = False
    methods: list[Spec] = field(default_factory=lambda: ["lrp", "gradient", "random"])
    granularity: Spec | list[Spec] = field(default_factory=lambda: ["neuron", "head"])
    target: Spec = "answer"
    targets: list[str] | None = None
    signed: bool = True
    nonfinite: Literal["error", "zero"] = "error"
    draws: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise InputError(f"model.draws={self.draws}; draw 1 random circuit or more")


@dataclass(frozen=True)
class CircuitData:
    """Which pairs. The discovery pairs score the components, the test pairs measure circuits; they share no text.

    Args:
        source: ``ioi``, ``greater_than`` or ``agreement``, tasks whose sentences are made for the model's tokenizer; or
            a hub data set or local file of pairs of your own, as ``data.source`` of score.
        num_samples: Discovery pairs of a set.
        num_test: Test pairs.
        num_sets: Sets of discovery pairs, drawn by seeds that count up from ``seed``. Scores are their means.
        seed: Decides which pairs are drawn.
        batch_size: Pairs of a batch.
        counterfactual: Kind of counterfactual sentence of a task (``abc`` or ``s2_io`` for ``ioi``); unset: its first.
        text_field: Field of the sentence in pairs of your own.
        answer_field: Field of the right continuation.
        foil_field: Field of the wrong continuation.
        counterfactual_field: Field of the sentence with the decisive words exchanged; needed by the ablation
            ``counterfactual`` and by methods that patch.
        filter: Condition on a record's fields, as in score.
        split: Split of a hub data set.
        subset: Configuration of a hub data set.
        partition_seed: Decides which texts (or templates and names) are for discovery and which for the test.
        partition_share: Share of them that is for discovery.
    """

    source: str = "ioi"
    num_samples: int = 100
    num_test: int = 200
    num_sets: int = 1
    seed: int = 0
    batch_size: int = 16
    counterfactual: str | None = None
    text_field: str = "clean"
    answer_field: str = "answer"
    foil_field: str = "foil"
    counterfactual_field: str | None = "counterfactual"
    filter: str | None = None
    split: str = "train"
    subset: str | None = None
    partition_seed: int = 0
    partition_share: float = 0.5

    def __post_init__(self) -> None:
        for name in ("num_samples", "num_sets", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"data.{name}={getattr(self, name)}; give 1 or more")
