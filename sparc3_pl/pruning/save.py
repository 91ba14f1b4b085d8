"""Saving a pruned model so that plain transformers loads it, and really removing neurons and experts."""

import copy
import logging
import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sparc3_pl.errors import InputError
from sparc3_pl.io.files import FolderKind, new_folder, strict_json, write_text, writing
from sparc3_pl.model.components import Neuron, WholeExpert
from sparc3_pl.model.experts import experts_modules, is_routed, keep_experts, keep_neurons, router_of
from sparc3_pl.model.loading import auto_class, quiet_library
from sparc3_pl.model.patching import swapped
from sparc3_pl.model.placement import input_device
from sparc3_pl.model.structure import MLP, mlps, module_name, weight_matrix
from sparc3_pl.pruning.edit import planned_changes, pruned
from sparc3_pl.pruning.edits import Mean, Remove, Zero
from sparc3_pl.pruning.gains import Gains
from sparc3_pl.pruning.plan import PrunePlan

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["KIND", "SavedModel", "check_shape", "save_pruned", "save_shrunk", "shrink"]

log = logging.getLogger(__name__)

KIND = FolderKind("a pruned model", "pruned_model.json", (), lambda marker: marker["files"], names_are_utf8=True)
"""Known by a file of its own: a plan may lie in any folder."""

_NUMBER_KEYS = ("num_experts", "num_local_experts")
_WIDTH_KEYS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "ffn_embed_dim", "inner_dim")
# How far logits may differ, as a share of the largest. Weights must be equal bit for bit; but a matrix product can
# round differently at another address in memory, sums are shorter once neurons are gone, and a model cast to 16 bit in
# memory has rotary frequencies of 16 bit, which the reloaded one has in full.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
_TOLERANCE_16_BIT = 0.03
_NONE = torch.empty(0, dtype=torch.int64)


@dataclass(frozen=True)
class SavedModel:
    """What was written, and the proof that it is what was meant.

    Attributes:
        folder: A Hugging Face model folder.
        max_difference: Largest difference between the logits of the reloaded model and of the pruned one in memory.
        parameters: Number of parameters before and after.
        bytes: Their size before and after.
        done: What was done to the chosen: ``neurons set to zero``; of a smaller model, what was removed and from where.
        zeros: Share of the parameters that are zero.
    """

    folder: Path
    max_difference: float
    parameters: tuple[int, int]
    bytes: tuple[int, int]
    done: str
    zeros: float = 0.0

    @property
    def effect(self) -> str:
        """What became of the model, in words."""
        if self.parameters[0] == self.parameters[1]:
            return f"same size: {self.done}, {self.zeros:.1%} of all parameters are zero"
        return f"smaller: {self.done}"

    def __str__(self) -> str:
        (before, after), (old, new) = self.parameters, self.bytes
        if before == after:
            size = f"{self.effect} ({after:,} parameters, {new / 2**20:,.1f} MiB)"
        else:
            size = f"smaller: {before:,} -> {after:,} parameters, {old / 2**20:,.1f} -> {new / 2**20:,.1f} MiB"
        checked = f"reloaded and compared: largest difference of a logit {self.max_difference:.2g}"
        return f"{self.folder}: {size}; {checked}"


def save_pruned(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase | None",
    plan: PrunePlan,
    folder: str | Path,
    overwrite: bool = False,
) -> SavedModel:
    """Writes the pruned model as a folder that ``AutoModelForCausalLM.from_pretrained`` loads.

    The weights keep their shapes; what the plan removes is zero in them. The folder holds the tokenizer, a model
    card and the plan besides. It is loaded again and compared, tensor by tensor and on logits, before it takes its
    name. ``model`` is pruned only meanwhile.

    Args:
        model: The model that the plan was made for (a GGUF-loaded one too).
        tokenizer: Its tokenizer; None if it has none.
        plan: What to prune.
        folder: Where to write.
        overwrite: Whether an earlier pruned model there may be replaced.

    Raises:
        InputError: if the plan does not fit the model or takes experts out of the routing, or the folder is taken or
            cannot be written.
    """
    check_shape(plan, shrunk=False)
    with pruned(model, plan):
        size = (_parameters(model), _parameters(model))
        return _save(model, model, tokenizer, plan, folder, overwrite, size)


def save_shrunk(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase | None",
    plan: PrunePlan,
    folder: str | Path,
    overwrite: bool = False,
) -> SavedModel:
    """Writes a smaller model, as ``save_pruned`` does, with the neurons or experts really removed (``shrink``).

    Without neurons sums have fewer terms and round differently, so that its logits are close to those of the zeroed
    model, not equal.

    Raises:
        InputError: as ``save_pruned`` and ``shrink``.
    """
    smaller = shrink(model, plan)
    with pruned(model, plan, check_fingerprint=False):  # shrink has checked it
        size = (_parameters(model), _parameters(smaller))
        return _save(smaller, model, tokenizer, plan, folder, overwrite, size)


def shrink(model: "PreTrainedModel", plan: PrunePlan) -> "PreTrainedModel":
    """A copy of ``model`` without what the plan removes.

    Neurons: rows of up and gate and columns of down are gone; whole experts (``edit=remove``): their matrices, and
    their rows of the router. Architectures have one width, and one number of experts, for all layers, so the plan must
    remove the same number from each.

    Raises:
        InputError: if the plan does not fit the model, or the architecture does not permit it.
    """
    check_shape(plan, shrunk=True)
    changes = planned_changes(model, plan)
    if isinstance(plan.load_edit(), Remove):
        return _without_experts(model, {change.part.layer: change.part.index for change in changes})
    removed = _removed(model, plan)
    width = next(mlp.width for mlp in mlps(model))
    routed = {is_routed(model.get_submodule(mlp.down)) for mlp in mlps(model)}
    if len(routed) > 1:
        raise InputError("shrink: some MLPs of this model are experts and some are not; save without shrink")
    if routed == {True}:
        _check_experts_width(model, width - len(next(iter(removed.values()))))
    config_keys = ("moe_intermediate_size", *_WIDTH_KEYS) if routed == {True} else _WIDTH_KEYS
    key = _key_of(model.config.get_text_config(), "width", width, config_keys, (width, None))
    with pruned(model, plan, check_fingerprint=False):  # a mean that is folded into a bias stays
        smaller = copy.deepcopy(model)
    width_left = width - len(next(iter(removed.values())))
    for name, experts in experts_modules(smaller).items():
        removed_of_each = [removed[f"{name}.{e}"] for e in range(experts.down_proj.shape[0])]
        keep_neurons(experts, torch.tensor([[i for i in range(width) if i not in one] for one in removed_of_each]))
    for mlp in mlps(smaller) if routed == {False} else ():
        _cut(smaller, mlp, removed[mlp.up])
    setattr(smaller.config.get_text_config(), key, width_left)
    return smaller


def check_shape(plan: PrunePlan, shrunk: bool) -> None:
    """Refuses, before there is a model, an edit that a saved model of this kind cannot hold.

    Args:
        plan: What is to be saved.
        shrunk: Whether the saved model is to be smaller.

    Raises:
        InputError: if neurons are to be removed that the edit leaves in the model in part, or experts left in the model
            that the edit takes out of the routing.
    """
    edit = plan.load_edit()
    if isinstance(edit, Remove) and not shrunk:
        raise InputError(
            "edit=remove takes experts out of the routing, which no saved weight says; save with --shrink, which takes "
            "them and their rows of the router out of the model"
        )
    if not shrunk or isinstance(edit, Remove):
        return
    components = set(plan.load_components().values())
    all_zero = isinstance(edit, Gains) and not any(one.factor.any() for one in plan.entries.values())
    are_neurons = all(isinstance(component, Neuron) for component in components)
    if not are_neurons or not (isinstance(edit, Zero | Mean) or all_zero):
        are_experts = all(isinstance(component, WholeExpert) for component in components)
        way_out = "make the plan with edit=remove" if are_experts else "save without shrink"
        raise InputError(
            "shrink removes neurons by edit=zero or mean (or gains of 0), or whole experts by edit=remove, but the "
            f"plan is for {plan.unit} with edit={plan.edit}; {way_out}"
        )


def _without_experts(model: "PreTrainedModel", gone: dict[str, Tensor]) -> "PreTrainedModel":
    """A copy of ``model`` without the experts that are ``gone``, which are given by their router's name."""
    routers = {name: module_name(model, router_of(model, name)) for name in experts_modules(model)}
    number = next(iter(experts_modules(model).values())).down_proj.shape[0]
    counts = sorted({len(gone.get(router, _NONE)) for router in routers.values()})
    if len(counts) > 1:
        raise InputError(
            f"shrink needs the same number of experts gone from each layer, but the plan removes {counts[0]} to "
            f"{counts[-1]}; make the plan with --shrink, over all layers, which chooses layer by layer"
        )
    config, number_left = model.config.get_text_config(), number - counts[0]
    key = _key_of(config, "number of experts", number, _NUMBER_KEYS, (number,))
    at_once = config.num_experts_per_tok
    smaller = copy.deepcopy(model)
    for name, router in routers.items():
        keep = torch.tensor(sorted(set(range(number)) - set(gone[router].tolist())))
        keep_experts(smaller.get_submodule(name), smaller.get_submodule(router), keep)
    config = smaller.config.get_text_config()
    setattr(config, key, number_left)
    config.num_experts_per_tok = min(at_once, number_left)
    for module in smaller.modules():  # what the config says is also kept here and there
        for attribute in ("num_experts", "num_experts_per_tok", "top_k"):
            before, after = (
                (number, number_left) if attribute == "num_experts" else (at_once, min(at_once, number_left))
            )
            if vars(module).get(attribute) == before:
                setattr(module, attribute, after)
    return smaller


def _removed(model: nn.Module, plan: PrunePlan) -> dict[str, set[int]]:
    """Neurons to remove by up-projection; the same number everywhere."""
    blocks = mlps(model)
    if strange := set(plan.entries) - {mlp.up for mlp in blocks}:
        raise InputError(
            f"shrink removes MLP neurons, but the plan names {sorted(strange)[0]}; plan up-projections only"
        )
    chosen = {layer: entries.index for layer, entries in plan.entries.items()}
    removed = {mlp.up: set((chosen.get(mlp.up, _NONE) % mlp.width).tolist()) for mlp in blocks}
    widths = {mlp.width - len(removed[mlp.up]) for mlp in blocks}
    if len(widths) > 1 or len({mlp.width for mlp in blocks}) > 1:
        counts = sorted({len(gone) for gone in removed.values()})
        raise InputError(
            f"shrink needs the same number of neurons gone from each layer, but the plan removes {counts[0]} to "
            f"{counts[-1]}; make the plan with --shrink"
        )
    if min(widths) < 1:
        raise InputError("shrink would leave layers without neurons; lower num_neurons")
    return removed


def _check_experts_width(model: nn.Module, width: int) -> None:
    """Refuses a width of experts whose rows are not whole 16 bytes: the product of all experts at once needs them."""
    step = 16 // next(iter(experts_modules(model).values())).down_proj.element_size()
    if width % step:
        raise InputError(
            f"shrink would leave {width} neurons in each expert, but their number must be a multiple of {step} for "
            "the experts to be computed together; change num_neurons"
        )


def _key_of(
    config: "PretrainedConfig", what: str, size: int, keys: Sequence[str], values: tuple[int | None, ...]
) -> str:
    """The key of the configuration that holds a size (GPT-2's width: ``n_inner``, None for 4 * hidden size)."""
    for key in keys:
        if (key in config.to_dict() or key in config.attribute_map) and getattr(config, key) in values:
            return key
    raise InputError(
        f"shrink: no key of the {config.model_type} configuration holds the {what} {size} (looked for "
        f"{', '.join(keys)}), so the architecture does not permit it; save without shrink"
    )


def _cut(model: nn.Module, mlp: MLP, removed: set[int]) -> None:
    """Removes the neurons of one MLP from its linear layers."""
    keep = torch.tensor([i for i in range(mlp.width) if i not in removed])
    rows = torch.cat([keep, keep + mlp.width]) if mlp.fused else keep
    for name in (mlp.up, mlp.gate):
        if name is not None:
            _replace(model.get_submodule(name), rows, dim=0)
    _replace(model.get_submodule(mlp.down), keep, dim=1)
    owner = model.get_submodule(mlp.name)
    for key in _WIDTH_KEYS:
        if getattr(owner, key, None) == mlp.width:
            setattr(owner, key, len(keep))


def _replace(layer: nn.Module, index: Tensor, dim: int) -> None:
    """Keeps the rows (``dim`` 0) or columns (1) ``index`` of a linear layer's ``[out, in]`` matrix."""
    matrix = weight_matrix(layer).detach()
    rows = matrix.index_select(dim, index.to(matrix.device))
    is_linear = isinstance(layer, nn.Linear)
    layer.weight = nn.Parameter((rows if is_linear else rows.T).contiguous(), layer.weight.requires_grad)
    if dim == 0 and layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias.detach()[index.to(layer.bias.device)], layer.bias.requires_grad)
    names = ("out_features", "in_features") if is_linear else ("nf", "nx")
    setattr(layer, names[dim], len(index))


# --- writing and checking ---------------------------------------------------------------------------------------------


def _parameters(model: nn.Module) -> tuple[int, int]:
    """Number of parameters and their bytes; tied ones count once."""
    return (
        sum(p.numel() for p in model.parameters()),
        sum(p.numel() * p.element_size() for p in model.parameters()),
    )


def _save(
    model: "PreTrainedModel",
    reference: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase | None",
    plan: PrunePlan,
    folder: str | Path,
    overwrite: bool,
    size: tuple[tuple[int, int], tuple[int, int]],
) -> SavedModel:
    """Writes ``model``; its reloaded copy must do what ``reference``, the pruned model in memory, does."""
    (before, old), (after, new) = size
    with new_folder(folder, overwrite, KIND) as temporary:
        with writing(Path(folder)), quiet_library():
            _write_model(model, temporary)
            if tokenizer is not None:
                tokenizer.save_pretrained(temporary)
        plan.save(temporary / "plan.json")
        with quiet_library():
            difference = _compare(temporary, model, reference)
        title = f"{plan.unit} {plan.load_edit().participle()}"
        if before != after:
            title = "the neurons are removed from the matrices"
            if isinstance(plan.load_edit(), Remove):
                title = "the experts are removed, and their rows of the routers"
        num_zeros = sum(int((p == 0).sum()) for p in model.parameters())
        share = num_zeros / _parameters(model)[0]
        result = SavedModel(Path(folder), difference, (before, after), (old, new), title, share)
        write_text(temporary / "README.md", _model_card(model, plan, result))
        marker = {"format_version": 1, "files": sorted(path.name for path in temporary.iterdir())}
        write_text(temporary / KIND.marker, strict_json(marker, indent=1) + "\n")
    return result


def _write_model(model: "PreTrainedModel", folder: Path) -> None:
    """``save_pretrained``; a model unpacked from a GGUF file still says that it is quantised, and would be refused."""
    config = copy.deepcopy(model.config)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    with ExitStack() as undo:
        undo.enter_context(swapped(model, "config", config))
        for name in ("hf_quantizer", "is_quantized", "quantization_method"):
            if name in vars(model):
                undo.enter_context(swapped(model, name, None))
        model.save_pretrained(folder)


@torch.no_grad()
def _compare(folder: Path, model: "PreTrainedModel", reference: "PreTrainedModel") -> float:
    """Loads the folder as anyone would, and returns the largest difference of a logit on two seeded token sequences."""
    options = {"attn_implementation": reference.config._attn_implementation}
    if getattr(reference, "hf_device_map", None):
        options["device_map"] = reference.hf_device_map
    loaded = auto_class(reference.config).from_pretrained(folder, **options).eval()
    if "device_map" not in options:
        loaded.to(reference.device)
    expected, actual = model.state_dict(), loaded.state_dict()
    unequal = [key for key in expected if key not in actual or not torch.equal(expected[key], actual[key])]
    if unequal or expected.keys() != actual.keys():
        raise RuntimeError(
            f"{folder}: the saved model differs from the one in memory ({unequal[:3]}); nothing was kept"
        )
    vocabulary = reference.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, (2, 16), generator=torch.Generator().manual_seed(0))
    device = input_device(reference)
    with _in_eval_mode(reference):
        expected, logits = (m(input_ids=ids.to(device), use_cache=False).logits.float() for m in (reference, loaded))
    difference = float((expected - logits).abs().max())
    tolerance = _TOLERANCE.get(reference.dtype, _TOLERANCE_16_BIT) * float(expected.abs().max())
    if not difference <= tolerance:
        raise RuntimeError(f"{folder}: logits of the saved model are off by {difference:.3g}; nothing was kept")
    return difference


def _in_eval_mode(model: nn.Module) -> ExitStack:
    """Turns dropout off inside the block; afterwards each module is as it was."""
    undo = ExitStack()
    for module in model.modules():
        undo.enter_context(swapped(module, "training", False))
    return undo


def _model_card(model: "PreTrainedModel", plan: PrunePlan, result: SavedModel) -> str:
    """README.md: what was removed from what, on what evidence, and how to check it."""
    base = str(plan.model.pretrained)
    name = base if not Path(base).exists() else Path(base).name  # a path says nothing to anyone else
    size = result.effect[:1].upper() + result.effect[1:]
    template = Template(Path(__file__).with_name("model_card.md").read_text(encoding="utf-8"))
    card = template.substitute(
        hub=f"base_model: {name}\n" if "/" in name else "",
        title=Path(name).stem if name.endswith(".gguf") else name.rsplit("/")[-1],
        count=f"{sum(plan.counts().values()):,}",
        unit=plan.unit,
        share=f" of {plan.num_candidates:,} scored" if plan.num_candidates else "",
        how=f"`{plan.edit}`" + ("" if plan.alpha is None else f" (alpha {plan.alpha})"),
        name=name,
        architecture=type(model).__name__,
        size=size,
        parameters=f"{result.parameters[1]:,}",
        revision=plan.model.revision,
        fingerprint=plan.fingerprint,
        contrast=plan.contrast,
        control=plan.control,
        settings=plan.settings,
        general=_scores_described(plan, "general"),
        behaviour=_scores_described(plan, "behaviour"),
        created=plan.created,
        command=re.sub(r"(?<![^\s'\"=])/\S*/(?=[^/\s])", "", plan.command),  # no folders of this machine are published
        versions=", ".join(f"{package} {version}" for package, version in plan.versions.items()),
        warnings="".join(f"\n- Warning: {text}" for text in plan.warnings),
        difference=f"{result.max_difference:.2g}",
        layers="\n".join(f"| `{layer}` | {number} |" for layer, number in plan.counts().items()),
    )
    return card.encode("utf-8", "backslashreplace").decode()  # bytes of a path that are not UTF-8


def _scores_described(plan: PrunePlan, side: str) -> str:
    descriptions = [
        f"`{s['name']}` ({s['method']}, {s['num_samples']} samples of {s['source']}, sha256 {s['sha256'][:12]})"
        for s in plan.scores.get(side, [])
    ]
    return ", ".join(descriptions) or "none"
