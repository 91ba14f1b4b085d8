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

This page is made by `python scripts/build_families.py`, which measures tiny random models of every family (two layers;
float64 for the account, float32 for the rest). A test measures them again. Real models have the same modules and more
of them: `sparc3 doctor --pretrained NAME` says the same of yours.

- *residual*: the share of the logit that the relevance account of AttnLRP leaves unexplained. It is rounding: some
  models compute norms, softmax or routers in float32 whatever their precision.
- *rules*: the operations that have a rule of their own. Linear layers, embeddings and rotary angles pass the plain
  gradient on.
- *components*: what `model.granularity` may be.
- *reload*: the largest difference of a logit between a pruned model in memory and the same model, saved and loaded.
- *refused*: methods by which its neurons cannot be scored, and circuits where they cannot be made of them. These
  compare or replace values at every token, and an expert of a mixture has none at the tokens that go elsewhere
  ([mixtures of experts](howto/experts.md#what-is-refused)).
"""

REFUSED = """\
## Refused by `lrp`

An operation of these has no rule, or there is no place where a rule could act; `model.unlisted_family` does not help.
`gradient`, `wanda`, `magnitude` and `random` score them, as far as their layers are linear maps.

| model type | why |
|---|---|
"""

OTHERS = """
Any other family is refused until it is asked for: [your own model family](howto/own-model-family.md).

## Quantised checkpoints

A checkpoint with packed weights, of any family, is refused before its weights are read. With `model.dequantize: true`
(`score`, `eval`, `circuit`; `doctor --dequantize`) the plain weights that it stands for are loaded instead, in
`model.dtype` and in the memory of plain weights. The manifest says so (`dequantized`), `prune` unpacks the checkpoint
of such scores by itself, and `--save_model` writes plain weights.

| quantised by | with `model.dequantize: true` | checked |
|---|---|---|
| `fp8` (in blocks) | unpacked while it is loaded | on tiny Llama and Qwen3-MoE checkpoints |
| `mxfp4`, `mxfp8` | unpacked while it is loaded | not run |
| `compressed-tensors`, with its package | unpacked while it is loaded | not run |
| `bitsandbytes`, with its package | unpacked once it is loaded | not run: only that transformers is asked to |
| `gptq`, `awq` and others | refused: transformers cannot unpack them | that they are refused |
| GGUF | unpacked in any case | on SmolLM2 |
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
