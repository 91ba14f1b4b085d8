"""The ``circuit`` command: the circuits of a task by several methods, and how much of the task each keeps."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from sparc3_pl.attribution.likelihood import require_known_logits
from sparc3_pl.attribution.methods_patching import COUNTERFACTUAL
from sparc3_pl.circuit.ablation import ABLATIONS, Ablation
from sparc3_pl.circuit.arms import Arm, arms_of, kept_of, score_arm
from sparc3_pl.circuit.components import Candidates
from sparc3_pl.circuit.curves import checked_fractions, levels, num_kept
from sparc3_pl.circuit.export import circuit_plan, curve_table, node_importances, write_arm_scores, write_importances
from sparc3_pl.circuit.pairs import CircuitPairs, load_pairs
from sparc3_pl.circuit.results import FORMAT, KIND, MARKER, CircuitResults, ComponentCounts, PairRecords
from sparc3_pl.circuit.run import Bench, Measured, measure_arm, overlaps_of_arms, strength_request
from sparc3_pl.circuit.sections import circuit_sections, curves_figure
from sparc3_pl.circuit.settings import CircuitData, CircuitModel
from sparc3_pl.data.encoding import load_encoder
from sparc3_pl.document.terminal import print_result, print_sections
from sparc3_pl.errors import InputError
from sparc3_pl.io.claims import sole_run
from sparc3_pl.io.files import check_output, new_folder, sha256_of_file, strict_json, write_text
from sparc3_pl.io.provenance import command_line, hardware, now, redacted, versions
from sparc3_pl.io.yaml_format import dump_yaml
from sparc3_pl.model.checks import check_vocabulary
from sparc3_pl.model.identity import describe
from sparc3_pl.model.loading import load_model
from sparc3_pl.model.placement import input_device
from sparc3_pl.model.source import SHARDED, ModelSource
from sparc3_pl.model.structure import output_head
from sparc3_pl.registry import Choice, Spec
from sparc3_pl.runtime.collectives import is_rank_zero, joined_ranks
from sparc3_pl.runtime.timing import Timing, measuring, table_text, timed, timing
from sparc3_pl.scoring.score_run import require_fields

__all__ = ["circuit"]

log = logging.getLogger(__name__)


def circuit(
    model: CircuitModel = CircuitModel(),  # noqa: B008 (frozen)
    data: CircuitData = CircuitData(),  # noqa: B008
    ablation: Spec = "zero",
    fractions: list[float] = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0],  # noqa: B006 (never changed)
    resamples: int = 20,
    permutations: int = 200,
    save_fraction: float | None = None,
    tensorboard: bool = False,
    output: str = "circuit",
    overwrite: bool = False,
) -> CircuitResults:
    """Find the circuits of a task by several methods, and measure how much of the task they keep.

    Components are scored on discovery pairs. On test pairs the top k stay and all others are ablated (sufficiency), or
    the top k are ablated and all others stay (necessity). A run that is stopped writes nothing, and begins anew.

    Args:
        model: Which model, and how its components are scored.
        data: Which pairs.
        ablation: What stands in for a component that is taken out: ``zero``, ``mean`` (of the discovery pairs; with
            ``init_args: {by_position: true}`` a mean for each position), ``counterfactual`` (its value in the paired
            sentence), or a class of your own.
        fractions: Sizes of the circuits as shares of all components, ascending; the default is MIB's.
        resamples: Bootstrap resamples of the discovery pairs, for the stability of circuits. 0: none.
        permutations: Random circuits behind the p-values of overlaps between methods.
        save_fraction: Write plans of each method's circuit of this share: one that removes it, one that keeps only it.
        tensorboard: Write the curves as TensorBoard events too.
        output: Folder of the results.
        overwrite: Replace an earlier circuit there.

    Raises:
        InputError: If a setting is wrong, the model or the pairs cannot be loaded, or the output is taken.
    """
    settings = {
        "model": asdict(model), "data": asdict(data), "ablation": ablation, "fractions": fractions,
        "resamples": resamples, "permutations": permutations, "save_fraction": save_fraction,
        "tensorboard": tensorboard,
    }  # fmt: skip
    sizes = checked_fractions(fractions)
    if resamples < 0 or permutations < 1:
        raise InputError(f"resamples={resamples}, permutations={permutations}: give 0 or more, and 1 or more")
    if save_fraction is not None and not 0 < save_fraction < 1:
        raise InputError(f"save_fraction={save_fraction}: give a share between 0 and 1, such as 0.05")
    kind = ABLATIONS.choose(ablation)
    arms = arms_of(
        model.methods, model.granularity, model.target, model.targets, model.signed, model.draws, model.seed,
        model.nonfinite,
    )  # fmt: skip
    if any(c.object.dims == 2 for c in arms[0].request.components) and not kind.object.of_weights:
        raise InputError(f"ablation={kind.name}: single weights are ablated by zero only; give ablation: zero")
    if model.device_map == SHARDED and any(c.object.dims == 2 for c in arms[0].request.components):
        raise InputError(
            "model.device_map=sharded: the sums of single weights would be shared out too, which circuit cannot do; "
            "use model.device_map=auto, or other components"
        )
    with ExitStack() as run_once:
        if model.device_map == SHARDED:
            run_once.enter_context(joined_ranks("model.device_map=sharded"))
        if is_rank_zero():
            check_output(output, overwrite, KIND)
            run_once.enter_context(sole_run(output))
        else:  # takes part in every pass, also in those that writing needs; what it writes is thrown away
            output = f"{run_once.enter_context(TemporaryDirectory())}/circuit"
        run_once.enter_context(measuring())
        run = _Run(model, data, kind, arms, sizes, save_fraction)
        results = run.measure(resamples, permutations)
        with timed("writing"):
            run.write(Path(output), overwrite, results, settings, save_fraction, tensorboard)
        if not is_rank_zero():
            return results
        if (times := timing()) is not None:
            log.info(table_text(times, "Time of circuit"))
    print_sections(circuit_sections(results))
    print_result(f"circuit: {output}")
    return results


class _Run:
    """One run, with what it has loaded and measured."""

    def __init__(
        self,
        model: CircuitModel,
        data: CircuitData,
        ablation: Choice[Ablation],
        arms: list[Arm],
        fractions: tuple[float, ...],
        save_fraction: float | None,
    ) -> None:
        self.settings, self.ablation, self.arms, self.fractions = model, ablation, arms, fractions
        self.arm_results: dict[str, Measured] = {}
        self.seconds: dict[str, float] = {}
        self._clock = time.perf_counter()
        spread = None if model.device_map == SHARDED else model.device_map
        source = ModelSource(
            model.pretrained, model.dtype, model.revision, spread, model.trust_remote_code, model.dequantize
        )
        encoder = load_encoder(source)
        methods = [arm.request.method.object for arm in arms]
        needs_counterfactuals = ablation.object.needs_pairs or any(COUNTERFACTUAL in one.needs for one in methods)
        with timed("reading"):
            self.pairs: CircuitPairs = load_pairs(data, encoder, needs_counterfactuals)
        for arm in arms:
            require_fields(arm.request, self.pairs.tests[0].fields.keys())
        self.model = load_model(source)
        check_vocabulary(self.model, encoder.tokenizer)
        kinds = {choice.name: choice.object for choice in arms[0].request.components}
        self.candidates = Candidates.of(self.model, kinds, model.targets)
        if save_fraction is not None and not num_kept(save_fraction, self.candidates.count):
            total = self.candidates.count
            raise InputError(f"save_fraction={save_fraction} of {total} components is less than 1; raise it")
        self.description = describe(self.model, source)
        if model.device_map == SHARDED:
            self._check_arms()  # now, while the weights are whole
            for arm in arms:
                arm.request.method.object.prepare(self.model)
            self._place()
        else:
            self._place()
            self._check_arms()
        self._lap("loading")

    def _place(self) -> None:
        """Moves the model to the GPU (or its parts to the ranks' GPUs), if there is one, and the pairs to the model."""
        if self.settings.device_map == SHARDED:
            from sparc3_pl.model.fsdp import shard_over_all

            shard_over_all(self.model)
        elif self.settings.device_map is None and torch.cuda.is_available():
            self.model.to("cuda")
        device = input_device(self.model)
        sets = [[batch.to(device) for batch in batches] for batches in self.pairs.sets]
        self.pairs = replace(self.pairs, sets=sets, tests=[batch.to(device) for batch in self.pairs.tests])

    def _check_arms(self) -> None:
        """Refuses a model that an arm, or the measurement itself, is not right on, before the first is measured."""
        first = self.pairs.sets[0][0]
        sample = first.input_ids[0][first.attention_mask[0].bool()].tolist()
        require_known_logits(self.model, sample)
        for arm in self.arms:
            arm.request.method.object.check(self.model, sample)
            arm.request.target.object.check(self.model, sample)

    def _lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name], self._clock = round(now - self._clock, 2), now

    def measure(self, resamples: int, permutations: int) -> CircuitResults:
        """Measures all arms; returns their figures."""
        sets, tests = self.pairs.sets, self.pairs.tests
        with _progress("model as it is, and empty") as progress:
            bench = Bench.of(
                self.model, self.candidates, self.ablation.object, sets, tests, self.fractions,
                self.settings.seed, progress,
            )  # fmt: skip
        self._lap("full and empty")
        for arm in self.arms:
            with _progress(arm.name) as progress:
                self.arm_results[arm.name] = measure_arm(arm, bench, sets, resamples, progress)
            self._lap(arm.name)
        orders = {arm.name: self.arm_results[arm.name].order_N for arm in self.arms if not arm.is_random}
        overlaps = []
        if len(orders) > 1 and not self.candidates.are_weights:
            strength = score_arm(strength_request(self.arms[0], self.settings.nonfinite), self.model, sets)
            overlaps = overlaps_of_arms(orders, strength, bench, permutations)
            self._lap("overlaps")
        full, empty = levels(bench.ends)
        gap, components = bench.ends.gap, self.arms[0].request.components
        return CircuitResults(
            arms={name: one.result for name, one in self.arm_results.items()},
            full=full,
            empty=empty,
            gap=gap,
            warnings=list(_warnings(bench)),
            ablation={"kind": self.ablation.name, **self.ablation.arguments},
            components=ComponentCounts(
                [choice.name for choice in components],
                self.candidates.kinds,
                self.candidates.count,
                self.settings.targets,
                self.arms[0].request.target.name,
            ),
            pairs=PairRecords(self.pairs.about, self.pairs.about_tests),
            model=self.description,
            overlaps=overlaps,
            seconds=self.seconds,
            timing=timing() or Timing(),
            versions=versions(),
            hardware=hardware(),
            command=command_line(),
            created=now(),
        )

    def write(
        self,
        output: Path,
        overwrite: bool,
        results: CircuitResults,
        settings: Mapping[str, Any],
        save_fraction: float | None,
        tensorboard: bool,
    ) -> None:
        """Writes the folder, whole or not at all."""
        with new_folder(output, overwrite, KIND) as folder:
            for arm in self.arms:
                scores = self.arm_results[arm.name].scores[0]
                write_arm_scores(folder / "scores", arm, scores, self.description, self.pairs.about)
                importances = node_importances(self.model, self.candidates, scores)
                if importances is not None and not arm.is_random:
                    write_importances(folder / "importances" / arm.name, importances)
            if save_fraction is not None:
                self._write_plans(folder / "plans", save_fraction)
            write_text(folder / "curve.csv", curve_table(results))
            curves_figure(results).savefig(folder / "curves.svg", metadata={"Date": None})
            if tensorboard:
                _write_events(folder / "tensorboard", results)
            write_text(folder / "config.yaml", dump_yaml(redacted(dict(settings))))
            files = {
                path.relative_to(folder).as_posix(): sha256_of_file(path)
                for path in sorted(folder.rglob("*"))
                if path.is_file()
            }
            content = FORMAT.seal(redacted(FORMAT.content(replace(results, files=files))))
            write_text(folder / MARKER, strict_json(content, indent=1) + "\n")

    def _write_plans(self, folder: Path, fraction: float) -> None:
        folder.mkdir()
        number = num_kept(fraction, self.candidates.count)
        batches = [batch for batches in self.pairs.sets for batch in batches]
        samples = {name for batch in batches for name in batch.ids}
        samples |= {name for batch in batches for texts in batch.text_ids for name in texts}
        for arm in (arm for arm in self.arms if not arm.is_random):
            arm_result = self.arm_results[arm.name]
            kept_N = kept_of(arm_result.order_N, number)
            for what, edited_N in (("remove", kept_N), ("keep", ~kept_N)):
                settings = {"fraction": fraction, "circuit": what}
                values_N = arm_result.values_N
                plan = circuit_plan(
                    self.candidates, arm.name, edited_N, values_N, self.description, settings, sorted(samples)
                )
                plan.save(folder / f"{arm.name}-{what}.json")


def _warnings(bench: Bench) -> Iterator[str]:
    ends = bench.ends
    if not ends.gap.is_clear:
        yield (
            f"the logit difference of the model as it is ({ends.full.difference_P.mean():.3g}) is not above that with "
            f"every component ablated ({ends.empty.difference_P.mean():.3g}) beyond the noise of {len(ends.whole_P)} "
            "pairs: faithfulness, CPR and CMD are not given"
        )
    right = float(ends.full.right_P.mean())
    if right < 0.75:
        yield f"the model itself is right on {right:.0%} of the test pairs only: there may be no circuit to find"
    if none := [fraction for fraction, size in zip(bench.fractions, bench.sizes, strict=True) if not size]:
        yield (
            f"the fractions {', '.join(f'{fraction:g}' for fraction in none)} of {bench.candidates.count} components "
            "are less than 1: the curve begins with the empty model"
        )
    name, head = output_head(bench.model)
    layers = {span.group.layer for span in bench.candidates.spans}
    if bench.candidates.are_weights and name in layers and head.weight is bench.model.get_input_embeddings().weight:
        yield f"{name} and the word embeddings are one matrix: what is ablated in the one is ablated in the other too"


@contextmanager
def _progress(name: str) -> Iterator[Callable[[int], None]]:
    """A bar on stderr that counts pairs, on a terminal only."""
    from tqdm import tqdm

    with tqdm(desc=name, unit=" pairs", disable=None, leave=False) as bar:
        yield lambda done: bar.update(done)


def _write_events(folder: Path, results: CircuitResults) -> None:
    """The curves as TensorBoard events; the step is the number of components of the circuit."""
    from torch.utils.tensorboard import SummaryWriter

    count = sum(results.components.counts.values())
    with SummaryWriter(str(folder)) as writer:
        for name, arm in results.arms.items():
            for kind, points in (("sufficiency", arm.curve), ("necessity", arm.necessity)):
                for point in points:
                    step = point.kept if kind == "sufficiency" else count - point.kept  # those that are removed
                    for figure in ("faithfulness", "logit_difference", "accuracy"):
                        if (value := getattr(point, figure)) is not None:
                            writer.add_scalar(f"{kind}/{figure}/{name}", value, step)
            for figure in ("cpr", "cmd"):
                if (value := getattr(arm, figure)) is not None:
                    writer.add_scalar(f"{figure}/{name}", value)
        writer.add_figure("curves", curves_figure(results))
