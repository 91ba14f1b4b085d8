"""The whole experiment from one YAML: score, contrast, plan, evaluate before and after, controls, dose-response.

Every stage is a command that could have been typed; its configuration is kept in ``stages/``, its result in a folder
of its own. A stage whose result is there is not done again, so an experiment that was stopped goes on where it was.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparc3_pl.errors import InputError
from sparc3_pl.evaluation.compare import Comparison, compare_evaluations
from sparc3_pl.evaluation.results import Evaluation
from sparc3_pl.files import strict_json, write_text
from sparc3_pl.processes import kept, run_child
from sparc3_pl.provenance import command_line, now, versions
from sparc3_pl.pruning.controls import Control

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Outcome", "run"]

log = logging.getLogger(__name__)

Settings = dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """One edit, measured against the model as it was."""

    name: str
    count: int
    """Neurons (or weights) edited."""
    control: str | None
    comparison: Comparison

    @property
    def perplexity_increase(self) -> float:
        """As a fraction: 0.01 is 1 %; NaN without a perplexity."""
        change = self.comparison.perplexity
        return float("nan") if change is None else change.ratio - 1


def run(
    output: str,
    general: Settings,
    behaviour: Settings,
    eval_data: Settings,
    plan: Settings,
    eval_model: Settings | None = None,
    model: Settings | None = None,
    score: Settings | None = None,
    trainer: Settings | None = None,
    seeds: list[int] = [0, 1, 2],  # noqa: B006 (never changed; shown by --help)
    counts: list[int] | None = None,
    controls: list[Control] = ["random_matched"],  # noqa: B006
    max_perplexity_increase: float = 0.01,
) -> None:
    """Run a whole experiment from one YAML; what is done already is not done again.

    Args:
        output: Folder of the experiment: scores, plans, evaluations, comparisons, report.
        general: Keys of ``data`` of the general samples (see score); ``match: behaviour`` matches their format to the
            behaviour's samples.
        behaviour: Keys of ``data`` of the behaviour's samples.
        eval_data: Keys of ``data`` of eval.
        plan: Arguments of prune: ``num_neurons`` (or ``num_weights``), ``contrast``, ``protect``, ``edit``, ...
        eval_model: Further keys of ``model`` of eval: ``max_length``, ``samples_per_prompt``, ``judge``, ...
        model: Keys of ``model`` that say which model it is, for all stages: ``pretrained``, ``dtype``, ...
        score: Further keys of ``model`` of the scoring pass: ``method``, ``granularity``, ``targets``, ...
        trainer: Keys of ``trainer``, for all stages.
        seeds: Seeds of the general samples; their scores are averaged.
        counts: Further numbers of neurons (or weights), for the dose-response curve.
        controls: Controls of the plan's size: random_matched, random, top_general, null.
        max_perplexity_increase: Bound for "the largest edit within": 0.01 is 1 %.

    Raises:
        InputError: If a setting is wrong, a stage fails, or an earlier result was made with other settings.
    """
    size = _size_key(plan, score or {})
    experiment = _Experiment(Path(output), model or {}, score or {}, trainer or {})
    folders = experiment.score(general, behaviour, seeds)
    edits = {f"prune-{count}": (count, None) for count in sorted({plan[size], *(counts or [])})}
    edits |= {f"control-{control}": (plan[size], control) for control in controls}
    for name, (count, control) in edits.items():
        experiment.plan(name, folders, {**plan, size: count, "control": control})
    measuring = {"model": (model or {}) | (eval_model or {}), "data": eval_data}
    experiment.evaluate("before", measuring, None)
    outcomes = []
    for name, (count, control) in edits.items():
        experiment.evaluate(name, measuring, name)
        outcomes.append(Outcome(name, count, control, experiment.compare(name)))
    experiment.conclude(outcomes, max_perplexity_increase)


def largest_within(outcomes: Sequence[Outcome], bound: float) -> Outcome | None:
    """The largest edit (no control) that raises perplexity by at most ``bound``; None if there is none."""
    within = [o for o in outcomes if o.control is None and o.perplexity_increase <= bound]
    return max(within, key=lambda outcome: outcome.count, default=None)


@dataclass(frozen=True)
class _Experiment:
    """The folders of an experiment and the settings that all stages share."""

    folder: Path
    model: Settings
    scoring: Settings
    trainer: Settings

    def score(self, general: Settings, behaviour: Settings, seeds: Sequence[int]) -> tuple[list[str], str]:
        """Scores the behaviour first: general samples may be matched to it."""
        behaviour_folder = str(self.folder / "scores" / "behaviour")
        self._score("behaviour", behaviour)
        if general.get("match") == "behaviour":
            general = general | {"match": behaviour_folder}
        names = [f"general-{seed}" for seed in seeds]
        for name, seed in zip(names, seeds, strict=True):
            self._score(name, general | {"seed": seed})
        return [str(self.folder / "scores" / name) for name in names], behaviour_folder

    def _score(self, name: str, data: Settings) -> None:
        config = {"model": self.model | self.scoring, "data": data, "trainer": self.trainer}
        self._pass("score", f"score-{name}", config, self.folder / "scores" / name, [])

    def evaluate(self, name: str, measuring: Settings, plan: str | None) -> None:
        """Measures the model, with the plan of that name applied."""
        extra = [] if plan is None else ["--plan", str(self._plan_path(plan))]
        folder = self.folder / "evaluations" / name
        self._pass("eval", f"eval-{name}", measuring | {"trainer": self.trainer}, folder, extra)

    def plan(self, name: str, folders: tuple[list[str], str], settings: Settings) -> None:
        """Makes a plan."""
        from sparc3_pl.pruning.command import prune

        path = self._plan_path(name)
        if self._is_done(f"plan-{name}", settings, path):
            return
        log.info("plan %s", name)
        try:
            asked = settings | {"control": settings["control"] or "none"}
            prune(general=folders[0], behaviour=[folders[1]], output=str(path), overwrite=True, **asked)
        except TypeError as error:  # a key that prune does not have
            raise InputError(f"plan: {error}; see sparc3 prune --help for the keys") from error

    def compare(self, name: str) -> Comparison:
        """Compares with the evaluation of the model as it was, and keeps the result."""
        before, after = (Evaluation.open(self.folder / "evaluations" / side) for side in ("before", name))
        found = compare_evaluations(before, after)
        _write_json(self.folder / "comparisons" / f"{name}.json", asdict(found))
        return found

    def conclude(self, outcomes: Sequence[Outcome], bound: float) -> None:
        """Writes and prints what was found, and makes the report."""
        from sparc3_pl.evaluation.reporting import stdout_console

        best = largest_within(outcomes, bound)
        rows = [asdict(o) | {"perplexity_increase": o.perplexity_increase} for o in outcomes]
        summary = {"outcomes": rows, "max_perplexity_increase": bound, "largest_within": best and best.name}
        made = {"versions": versions(), "command": command_line(), "created": now()}
        _write_json(self.folder / "experiment.json", summary | made)
        console = stdout_console()
        console.print(outcome_table(outcomes))
        verdict = f"none of {len(outcomes)}" if best is None else f"{best.name} ({best.count})"
        console.print(f"largest edit within {bound:+.1%} perplexity: {verdict}", soft_wrap=True, highlight=False)
        from sparc3_pl.report.command import report

        report([str(self.folder)], output=str(self.folder / "report"), overwrite=True)

    # --- stages -------------------------------------------------------------------------------------------------------

    def _plan_path(self, name: str) -> Path:
        return self.folder / "plans" / f"{name}.json"

    def _pass(self, command: str, stage: str, config: Settings, output: Path, extra: Sequence[str]) -> None:
        """Runs ``score`` or ``eval`` with this configuration, unless its result is there."""
        config = {key: value for key, value in config.items() if value}
        if self._is_done(stage, config, output):
            return
        log.info("%s %s", command, output)
        arguments = [command, "--config", str(self._stage_file(stage)), "--output", str(output), *extra]
        if self.trainer.get("devices") == 1:
            from sparc3_pl.cli import execute

            execute(arguments)
        else:  # Lightning starts further processes by repeating this process's command line: it needs one of its own
            code = run_child([sys.executable, "-m", "sparc3_pl.cli", *arguments])
            if code:
                raise SystemExit(code)  # it has said why

    def _stage_file(self, stage: str) -> Path:
        return self.folder / "stages" / f"{stage}.yaml"

    def _is_done(self, stage: str, config: Settings, output: Path) -> bool:
        """Whether the stage's result is there; keeps the configuration that it is made with.

        Raises:
            InputError: if the result was made with another one.
        """
        import yaml

        path, text = self._stage_file(stage), yaml.safe_dump(config, sort_keys=True)
        before = path.read_text(encoding="utf-8") if path.exists() else text
        if output.exists() and before != text:
            key = next(_differing(yaml.safe_load(before), config))
            raise InputError(
                f"{output}: was made with another {key} than is asked for now; choose another output, or delete it "
                "and what was made from it"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
        if output.exists():
            kept(output)  # so a stop from here on can say that the same command resumes
        return output.exists()


def _size_key(plan: Settings, score: Settings) -> str:
    """The key of ``plan`` that says how many.

    Raises:
        InputError: if there is none.
    """
    key = "num_weights" if score.get("granularity") == "weight" else "num_neurons"
    if not isinstance(plan.get(key), int):
        raise InputError(f"plan.{key}={plan.get(key)!r}: say how many to choose; give a whole number")
    return key


def _differing(one: Any, other: Any, path: str = "") -> Iterator[str]:
    """Dotted keys at which two configurations differ."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for key in sorted({*one, *other}):
            yield from _differing(one.get(key), other.get(key), f"{path}.{key}" if path else str(key))
    elif one != other:
        yield f"{path} ({one!r}, now {other!r})"


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, strict_json(value, indent=1) + "\n")


def outcome_table(outcomes: Sequence[Outcome]) -> Table:
    """A line an edit: toxicity before and after with its interval and p-value, and the change of perplexity."""
    from rich.table import Table

    table = Table(title="Against the model as it was", title_justify="left")
    for name in ("edit", "number", "toxicity", "change", "95 % interval", "p", "perplexity"):
        table.add_column(name, justify="left" if name == "edit" else "right")
    for outcome in outcomes:
        found = outcome.comparison
        perplexity = "" if found.perplexity is None else f"{outcome.perplexity_increase:+.2%}"
        for label, figures in found.toxicity.items() or [("", {})]:
            change = figures.get("mean")
            cells = ["", "", "", ""]
            if change is not None:
                relative = "" if change.relative_change is None else f" ({change.relative_change:+.1%})"
                cells = [
                    f"{change.before:.3f} to {change.after:.3f}",
                    f"{change.change:+.3f}{relative}",
                    f"{change.low:+.3f} .. {change.high:+.3f}",
                    f"{change.p_value:.4f}",
                ]
            name = outcome.name if len(found.toxicity) < 2 else f"{outcome.name}: {label}"
            table.add_row(name, str(outcome.count), *cells, perplexity)
    return table
