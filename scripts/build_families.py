"""Write docs/families.md: every model family that is known, measured on the tiny random models of the tests.

``PYTHONPATH=. python scripts/build_families.py`` after a change to the rules or to ``tests/tiny_models.py``; a test
measures each family again and compares it with its row.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "families.md"
sys.path.insert(0, str(ROOT / "tests"))

from plans import plan_for  # noqa: E402
from tiny_models import FAMILIES, MIXTURES, MORE_FAMILIES, WRAPPED, tiny, tokens  # noqa: E402

from sparc3_pl.attribution.account import relevance_account  # noqa: E402
from sparc3_pl.attribution.methods import METHODS  # noqa: E402
from sparc3_pl.attribution.rules import REASONS, rule_table  # noqa: E402
from sparc3_pl.attribution.scorers import Scorer  # noqa: E402
from sparc3_pl.circuit.components import Candidates  # noqa: E402
from sparc3_pl.errors import InputError  # noqa: E402
from sparc3_pl.model.components import COMPONENTS, Neuron  # noqa: E402
from sparc3_pl.pruning.save import save_pruned  # noqa: E402

EVERYTHING = (*FAMILIES, *MORE_FAMILIES, *WRAPPED, *MIXTURES)

INTRODUCTION = """\
# Model families

This page lists the model families that `lrp` supports, those that it refuses, and the quantised checkpoints that
load. `python scripts/build_families.py` makes it by measuring a tiny random model of every family (two layers; float64
for the account, float32 for the rest); a test measures them again. Real models have the same modules, only more of
them; `sparc3 doctor --pretrained NAME` checks yours.

- *residual*: the share of the logit that the relevance account of AttnLRP leaves unexplained. It is rounding error:
  some models compute norms, softmax or routers in float32 whatever their precision.
- *rules*: the operations that have a rule of their own. Linear layers, embeddings and rotary angles pass the plain
  gradient on.
- *components*: what `model.granularity` may be.
- *reload*: the largest difference in any logit between a pruned model in memory and the same model saved and loaded.
- *refused*: methods that cannot score the family's neurons, and `circuit` where it cannot be run on them. These
  compare or replace values at every token, but an expert of a mixture has no value at the tokens that go elsewhere
  ([mixtures of experts](howto/experts.md#what-is-refused)).
"""

REFUSED = """\
## Refused by `lrp`

An operation of these families has no rule, or there is no place where a rule could act; `model.unlisted_family` does
not help. `gradient`, `wanda`, `magnitude` and `random` can still score those of their layers that are linear maps.

| model type | reason |
|---|---|
"""

OTHERS = """
`lrp` refuses any other family too, unless you set `model.unlisted_family`
([your own model family](howto/own-model-family.md)).

## Quantised checkpoints

A checkpoint with packed weights, of any family, is refused before its weights are read. With `model.dequantize: true`
(`score`, `eval`, `circuit`; `doctor --dequantize`) its weights are unpacked to plain ones in `model.dtype`, which take
the memory of plain weights. The manifest says so (`dequantized`), `prune` unpacks the checkpoint of such scores by
itself, and `--save_model` writes plain weights.

| quantised by | with `model.dequantize: true` | checked |
|---|---|---|
| `fp8` (in blocks) | unpacked while it is loaded | on tiny Llama and Qwen3-MoE checkpoints |
| `mxfp4`, `mxfp8` | unpacked while it is loaded | not run |
| `compressed-tensors`, with its package | unpacked while it is loaded | not run |
| `bitsandbytes`, with its package | unpacked after it is loaded | only that transformers is asked to unpack it |
| `gptq`, `awq` and others | refused, because transformers cannot unpack them | that they are refused |
| GGUF | always unpacked, with or without the key | on SmolLM2 |
"""

HEADER = """\
| model type | class | residual | rules | components | reload | refused |
|---|---|---|---|---|---|---|
"""

_PASSED_ON = ("linear", "embedding", "rotary angles", "none needed")


@dataclass(frozen=True)
class Row:
    """What the page says of a family.

    Attributes:
        family: transformers' ``model_type``.
        class_name: The class that loads it.
        residual: Of the relevance account, relative.
        rules: Operations with a rule.
        components: Names of the kinds of component it has.
        reload: Largest difference of a logit after saving and loading.
        refused: Methods that do not score its neurons; ``circuit`` where there are none of them.
    """

    family: str
    class_name: str
    residual: float
    rules: tuple[str, ...]
    components: tuple[str, ...]
    reload: float
    refused: tuple[str, ...]

    @property
    def cells(self) -> tuple[str, ...]:
        """As they stand in the table."""
        numbers = ("0" if not value else f"{value:.0e}" for value in (self.residual, self.reload))
        residual, reload = numbers
        lists = (", ".join(self.rules), ", ".join(self.components))
        return (
            f"`{self.family}`",
            f"`{self.class_name}`",
            residual,
            *lists,
            reload,
            ", ".join(self.refused) or "nothing",
        )


def measured(family: str) -> Row:
    """The row of a family, from its tiny model."""
    exact, model = tiny(family, dtype=torch.float64), tiny(family).requires_grad_(False)
    rules = rule_table(model).values()
    names = [rule.partition(":")[0] for rule in rules] + ["soft-cap"] * any("soft-cap" in rule for rule in rules)
    with tempfile.TemporaryDirectory() as folder:
        saved = save_pruned(model, None, plan_for(model), Path(folder) / "m")
    return Row(
        family,
        type(model).__name__,
        relevance_account(exact, tokens(1, 11)).relative_residual,
        tuple(name for name in dict.fromkeys(names) if name not in _PASSED_ON),
        tuple(name for name in COMPONENTS if _has(model, name)),
        saved.max_difference,
        tuple(_refused(model)),
    )


def _refused(model: torch.nn.Module) -> Iterator[str]:
    for method in METHODS:
        target = "answer" if method == "integrated_gradients" else "predicted"  # which it does not take
        try:
            Scorer(model, method, "neuron", target=target)
        except InputError:
            yield method
    try:
        Candidates.of(model, {"neuron": Neuron()})
    except InputError:
        yield "circuit"


def _has(model: torch.nn.Module, component: str) -> bool:
    try:
        groups = COMPONENTS.make(component).groups(model)
    except InputError:
        return False
    return bool(groups)


def page(rows: Iterable[Row]) -> str:
    """The whole page."""
    table = "".join(f"| {' | '.join(row.cells)} |\n" for row in rows)
    refused = "".join(f"| `{family}` | {reason} |\n" for family, reason in sorted(REASONS.items()))
    return f"{INTRODUCTION}\n{HEADER}{table}\n{REFUSED}{refused}{OTHERS}"


def rows_of(text: str) -> dict[str, tuple[str, ...]]:
    """The cells of each family's row on a page."""
    lines = re.findall(r"^\| (`\w+` \| `\w+` \| .+) \|$", text, flags=re.MULTILINE)
    return {cells[0].strip("`"): cells for cells in (tuple(line.split(" | ")) for line in lines)}


if __name__ == "__main__":
    PAGE.write_text(page(map(measured, EVERYTHING)), encoding="utf-8")
