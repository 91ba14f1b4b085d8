"""The whole experiment from one YAML: score, contrast, plan, evaluate before and after, controls, dose-response.

With ``shares`` it is one of compression: arms (methods, scopes, budgets) prune by general text to the same shares.

Every stage is a command that could have been typed; its configuration and its record are kept in ``stages/``, its
result in a folder of its own. So a stopped experiment resumes where it was, and a stage whose inputs have
changed since is done again.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparc3_pl.errors import InputError
from sparc3_pl.evaluation.compare import Comparison, compare_evaluations, write_comparison
from sparc3_pl.evaluation.measurement import TEXT
from sparc3_pl.evaluation.results import HEADLINE, Evaluation
from sparc3_pl.evaluation.results import MARKER as EVALUATION_MARKER
from sparc3_pl.experiment.arms import Arm, arms_of, curves_of
from sparc3_pl.experiment.correction import CorrectionArm, correction_arms
from sparc3_pl.experiment.pass_stage import pass_stage, typed
from sparc3_pl.experiment.stages import Settings, Stage, Stages, check_folder, write_json
from sparc3_pl.io.files import check_output, json_digest
from sparc3_pl.io.formats import to_json
from sparc3_pl.io.provenance import command_line, now, versions
from sparc3_pl.pruning.plan import PrunePlan
from sparc3_pl.report.effects import WORD_FILTER, largest_within, scale_of
from sparc3_pl.runtime.timing import StageTime, Timing, table_text
from sparc3_pl.scores.manifest import MARKER as SCORES_MARKER
from sparc3_pl.selection.controls import ControlName

if TYPE_CHECKING:
    from sparc3_pl.document.blocks import Table

__all__ = ["EditOutcome", "largest_within", "run"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EditOutcome:
    """One edit, measured against the model as it was."""

    name: str
    count: int
    """Neurons (or weights) edited."""
    control: str | None
    comparison: Comparison
    scale: float = 0.0
    """How far the gains go; 0 for any other edit."""
    arm: str | None = None
    """The arm that it is of; None: the experiment's own settings."""

    @property
    def dose(self) -> tuple[int, float]:
        """How far it goes, to compare with others."""
        return self.count, self.scale


def run(
    output: str,
    general: Settings,
    eval_data: Settings,
    plan: Settings | None = None,
    behaviour: Settings | None = None,
    eval_model: Settings | None = None,
    model: Settings | None = None,
    score: Settings | None = None,
    trainer: Settings | None = None,
    seeds: list[int] = [0, 1, 2],  # noqa: B006 (never changed; shown by --help)
    counts: list[int] | None = None,
    controls: list[ControlName] | None = None,
    shares: list[float] | None = None,
    arms: dict[str, Settings | None] | None = None,
    max_perplexity_increase: float = 0.01,
    completions: Settings | None = None,
    behaviour_score: Settings | None = None,
    general_score: Settings | None = None,
    texts: list[Settings] | None = None,
    budgets: list[float] | None = None,
    word_filter: str | None = None,
    rounds: int = 1,
    dry_run: bool = False,
) -> None:
    """Run a whole experiment from one YAML; what is done already is not done again.

    A stage is done again if the content of a file that it reads has changed: data, model, scores or plan. For what lies
    on the hub, only name and revision are compared.

    With shares, this is compression: general text alone, every arm pruned to every share, no behaviour and no controls.

    Args:
        output: Folder of the experiment: scores, plans, evaluations, comparisons, report.
        general: Keys of ``data`` of the general samples (see score); ``match: behaviour`` matches their format to the
            behaviour's samples.
        eval_data: Keys of ``data`` of eval.
        plan: Arguments of prune: ``num_neurons`` (or ``num_weights``), ``contrast``, ``scope``, ``protect``, ...; with
            ``edit: gains`` its ``budget`` and ``budget_text``.
        behaviour: Keys of ``data`` of the behaviour's samples. Not with shares.
        eval_model: Further keys of ``model`` of eval: ``max_length``, ``samples_per_prompt``, ``judge``, ...
        model: Keys of ``model`` that say which model it is, for all stages: ``pretrained``, ``dtype``, ...
        score: Further keys of ``model`` of the scoring pass: ``method``, ``granularity``, ``targets``, ...
        trainer: Keys of ``trainer``, for all stages.
        seeds: Seeds of the general samples; their scores are averaged, or, with shares, pruned by one after the other:
            tables show mean and deviation.
        counts: Further numbers of neurons (or weights), for the dose-response curve.
        controls: Controls of the plan's size: random_matched, random, top_general, null. With ``edit: gains`` permuted
            or, with num_neurons, random_matched, at every budget, each at the scale found for it. Default: the first of
            random_matched, random and permuted that the plan can have. Not with shares.
        shares: For compression: the shares to remove, e.g. [0.1, 0.3, 0.5].
        arms: By name, other ways to score and choose: sections ``score``, ``general`` and ``plan`` of each, added to
            the experiment's, and ``seeds`` and ``shares`` in place of its: ``{wanda: {score: {method: wanda}}}``. Equal
            scores are made once. Without shares, arms stand beside the experiment's own settings, and may have
            ``behaviour`` (with a ``source``, or null for the completions, instead of the experiment's, else added to
            it), ``behaviour_score``, ``general_score``, ``texts``, ``counts``, ``budgets`` and ``controls`` too. null
            takes a key away.
        max_perplexity_increase: Bound for "the largest edit within": 0.01 is 1 %.
        completions: ``data`` and further keys of ``model`` of an evaluation whose judged completions are samples of the
            behaviour, unless ``behaviour`` names a ``source``.
        behaviour_score: Keys of ``score`` that are the behaviour's own, as ``target: completion``.
        general_score: Keys of ``score`` that are general text's own, as ``target: text`` and ``labels: model``.
        texts: Further kinds of general text: each the keys of ``general`` in which it differs.
        budgets: For ``edit: gains``, further values of ``plan.budget``, by how much perplexity may rise, for the
            dose-response curve. (``plan.budgets`` is something else: shares by layer.)
        word_filter: ``model.word_filter`` of eval: a further evaluation of the model as it is, whose completions are
            drawn again while they hold a listed word, for edits to beat. Not with shares.
        rounds: With ``completions`` and a budget: from the second round on, an edit of a part of the budget is made
            from what there is, completions of the edited model are drawn and judged, and its derivative is taken. The
            edits follow the mean derivative of all rounds; those of an arm with scores of its own follow the first.
        dry_run: Say what each pass would load and how much memory it takes, and refuse what cannot fit; run nothing.

    Raises:
        InputError: If a setting is wrong, a stage fails, or an earlier result was made with other settings.
    """
    from sparc3_pl.document.terminal import print_result
    from sparc3_pl.report.command import KIND as REPORT

    check_folder(Path(output))
    check_output(Path(output) / "report", True, REPORT)  # what it replaces at the end
    plan, score = plan or {}, score or {}
    experiment = _Experiment(Path(output), Stages(Path(output) / "stages"), model or {}, trainer or {})
    measuring = {"model": (model or {}) | (eval_model or {}), "data": eval_data}
    if shares is not None:
        others = {"behaviour": behaviour, "counts": counts, "completions": completions, "texts": texts}
        others |= {"behaviour_score": behaviour_score, "general_score": general_score, "budgets": budgets}
        others |= {"word_filter": word_filter, "rounds": None if rounds == 1 else rounds}
        former_default = ["random_matched"]  # which configurations written by --print_config hold
        others |= {"controls": None if controls in ([], former_default) else controls}
        if useless := [key for key, value in others.items() if value is not None]:
            raise InputError(f"shares are for compression by general text; leave out {useless[0]}, or shares")
        each = arms_of(arms, score, general, plan, seeds, shares)
        _compress(experiment, each, measuring, max_perplexity_increase, dry_run)
        return
    if behaviour is None:
        raise InputError("behaviour is missing: give behaviour to correct one, or shares (and arms) to compress")
    if wrong := sorted((completions or {}).keys() - {"model", "data"}):
        raise InputError(f"completions: {wrong[0]} is none of its keys; they are model and data, each with its own")
    if word_filter is not None:  # hours come before it
        from sparc3_pl.evaluation.words import WordList

        WordList.read(word_filter, "word_filter")
    sections = {"general": general, "behaviour": behaviour, "score": score, "behaviour_score": behaviour_score}
    sections |= {"general_score": general_score, "plan": plan}
    lists = {"texts": texts or [], "seeds": seeds, "counts": counts, "budgets": budgets, "controls": controls}
    ways = correction_arms(arms, sections, **lists)
    _check_rounds(rounds, completions, ways[0], plan)
    stages = [] if completions is None else [experiment.completion_stage(completions)]
    completions_result = stages[0].result if stages else None
    scoring: dict[str, Stage] = {}
    sides = [experiment.scores_of(scoring, way, completions_result) for way in ways]
    stages += scoring.values()
    for number in range(2, rounds + 1):
        stages += experiment.round_stages(number, rounds, completions or {}, ways[0], plan, sides[0])
    further = {side: folder for side, folder in sides[0].items() if side.startswith("behaviour-")}
    for scores in sides[1:]:
        scores.update(further if scores["behaviour"] == sides[0]["behaviour"] else {})
    edits = {name: (way, edit) for way in ways for name, edit in way.edits.items()}
    for way, scores in zip(ways, sides, strict=True):
        stages += [experiment.plan_stage(name, scores, one.settings, one.scale_of) for name, one in way.edits.items()]
    for name in ("before", *edits):
        stages.append(experiment.evaluation_stage(name, measuring, None if name == "before" else name))
    if word_filter is not None:
        filtering = measuring | {"model": measuring["model"] | {"word_filter": word_filter}}
        stages.append(experiment.evaluation_stage("word_filter", filtering, None))
    if dry_run:
        experiment.tell_needs(stages)
        return
    times = experiment.do(stages)
    outcomes = [
        EditOutcome(
            name, experiment.count(name), edit.control, experiment.compare(name), experiment.scale(name), way.name
        )
        for name, (way, edit) in edits.items()
    ]
    if word_filter is not None:
        outcomes.append(EditOutcome("word_filter", 0, WORD_FILTER, experiment.compare("word_filter")))
    by_arm = {way.name: [outcome for outcome in outcomes if outcome.arm == way.name] for way in ways}
    best = {arm: largest_within(own, max_perplexity_increase) for arm, own in by_arm.items()}
    lines = []
    for arm, own in by_arm.items():
        num_edits = sum(outcome.control is None for outcome in own)
        verdict = f"none of {num_edits}" if best[arm] is None else f"{best[arm].name} ({best[arm].count})"
        if all(outcome.comparison.rise is None for outcome in own):
            verdict = "not known, no perplexity was measured"
        which = "" if arm is None else f" of arm {arm}"
        lines.append(f"largest edit{which} within {max_perplexity_increase:+.1%} perplexity: {verdict}")
    more = {"largest_within": best[None] and best[None].name, "timing": to_json(times)}
    # completions of further rounds are samples, from an edit that is not one of the experiment's: nothing to compare
    round_folders = {experiment.drawn_in(number) for number in range(2, rounds + 1)}
    stages_of_report = [stage for stage in stages if stage.output not in round_folders]
    experiment.conclude(outcomes, max_perplexity_increase, stages_of_report, more)
    print_result(outcome_table(outcomes), *lines)


def _check_rounds(rounds: int, completions: Settings | None, way: CorrectionArm, plan: Settings) -> None:
    """Refuses rounds of an experiment whose behaviour is not drawn from the model, or that has no budget to share."""
    if rounds < 1:
        raise InputError(f"rounds={rounds}: give 1 (every completion is of the model as it is) or more")
    if rounds > 1 and (completions is None or way.behaviour.get("source") is not None):
        raise InputError(
            f"rounds={rounds} draw completions of the edited model; give completions, and no behaviour.source"
        )
    if rounds > 1 and not isinstance(plan.get("budget"), float):
        raise InputError(f"rounds={rounds} take a part of the budget each; give plan.edit: gains and plan.budget")


def _compress(experiment: _Experiment, arms: Sequence[Arm], measuring: Settings, bound: float, dry_run: bool) -> None:
    """Scores each method once, prunes each arm to each share, and measures all."""
    from sparc3_pl.document.terminal import print_result
    from sparc3_pl.report.curves import curve_table

    scoring: dict[str, Stage] = {}
    plans: list[Stage] = []
    cuts = [cut for arm in arms for cut in arm.cuts()]
    for arm in arms:
        scores = {seed: experiment.shared_scores(scoring, arm, seed) for seed in arm.seeds}
        plans += [
            experiment.plan_stage(cut.name, {"general": scores[cut.seed].output}, cut.settings) for cut in arm.cuts()
        ]
    stages = [*scoring.values(), *plans, experiment.evaluation_stage("before", measuring, None)]
    stages += [experiment.evaluation_stage(cut.name, measuring, cut.name) for cut in cuts]
    if dry_run:
        experiment.tell_needs(stages)
        return
    times = experiment.do(stages)
    comparisons = [(cut, experiment.compare(cut.name)) for cut in cuts]
    counts = [sum(PrunePlan.load(stage.output).counts().values()) for stage in plans]
    outcomes = [
        EditOutcome(cut.name, count, None, comparison)
        for (cut, comparison), count in zip(comparisons, counts, strict=True)
    ]
    curves = curves_of(comparisons)
    large = {stage.output for stage in (*scoring.values(), *plans)}  # gigabytes, which a report would read again
    small = [stage for stage in stages if stage.output not in large]
    more = {"curves": [curve.to_json() for curve in curves], "timing": to_json(times)}
    experiment.conclude(outcomes, bound, small, more)
    print_result(*map(curve_table, curves))


@dataclass(frozen=True)
class _Experiment:
    """The folders of an experiment and the settings that all stages share."""

    folder: Path
    stages: Stages
    model: Settings
    trainer: Settings

    def do(self, stages: Sequence[Stage]) -> list[StageTime]:
        """Does the stages in their order; refuses wrong settings, or others than before, first of all.

        Stages that run in this process share one loaded model and its tokenizer.

        Returns:
            Where the time went.
        """
        from sparc3_pl.model.loading import models_kept  # torch

        with models_kept():
            for stage in self._distinct(stages).values():  # the last one comes hours after the first
                stage.check()
            for number, stage in enumerate(stages, start=1):
                self.stages.do(stage, f"stage {number} of {len(stages)}: ")
        times = self.stages.times(stages)
        log.info(table_text(Timing(stages=times), "Time of run, stages done earlier included"))
        return times

    def _distinct(self, stages: Sequence[Stage]) -> dict[str, Stage]:
        """The first of each ``_kind`` of stages, by that; the settings of all must be those of before."""
        distinct: dict[str, Stage] = {}
        for stage in stages:
            self.stages.check_settings(stage)
            distinct.setdefault(_kind(stage), stage)
        return distinct

    def tell_needs(self, stages: Sequence[Stage]) -> None:
        """Says what the passes among the stages will take, one after the other.

        Raises:
            InputError: if a setting is wrong, or one of them cannot fit; or all results not on the disk.
        """
        from sparc3_pl.document.needs import refuse_what_cannot_fit, table_of_stages
        from sparc3_pl.document.terminal import print_result
        from sparc3_pl.model.loading import models_kept  # torch

        with models_kept():
            distinct = self._distinct(stages)
            for stage in distinct.values():
                if stage.forecast is None:  # a forecast reads the settings itself
                    stage.check()
            each = {kind: one.forecast() for kind, one in distinct.items() if one.forecast is not None}
        forecasts = {stage.name: each[_kind(stage)] for stage in stages if stage.forecast is not None}
        free = next(iter(forecasts.values())).free
        print_result(table_of_stages({name: one.needs for name, one in forecasts.items()}, free))
        for forecast in each.values():
            forecast.refuse()
        on_disk = [need for one in forecasts.values() for need in one.needs if need.where == "disk"]
        refuse_what_cannot_fit(on_disk, {"disk": free["disk"]})

    def completion_stage(self, completions: Settings) -> Stage:
        """The stage that draws completions of the model as it is and has them judged."""
        settings = {"model": self.model | completions.get("model", {}), "data": completions.get("data", {})}
        return self._pass("eval", "completions", settings, self.folder / "completions", EVALUATION_MARKER)

    def drawn_in(self, number: int) -> Path:
        """The folder of the completions of a further round."""
        return self.folder / f"completions-round{number}"

    def round_stages(
        self,
        number: int,
        rounds: int,
        completions: Settings,
        way: CorrectionArm,
        plan: Settings,
        scores: dict[str, Path],
    ) -> list[Stage]:
        """The stages of a further round: an edit by the scores so far, completions of the edited model, its derivative.

        The derivative joins ``scores``. The completions have a seed of their own, so that their noise is new.
        """
        name = f"round{number}"
        settings = plan | {"budget": plan["budget"] * (number - 1) / rounds, "control": None}
        planning = self.plan_stage(name, scores, settings)
        own = completions.get("model", {})
        drawing = {
            "model": self.model | own | {"seed": own.get("seed", 0) + number - 1},
            "data": completions.get("data", {}),
            "allow_overlap": True,  # they are samples: nothing is measured on them
        }
        plans = {"plan": planning.result}
        completing = self._pass("eval", f"completions-{name}", drawing, self.drawn_in(number), EVALUATION_MARKER, plans)
        behaviour = way.behaviour | {"source": str(completing.result.with_name("completions.jsonl"))}
        reads = {"completions": completing.result}
        scoring = self._scoring_stage(f"behaviour-{name}", way.scores[0], behaviour, reads, plans)
        scores[f"behaviour-{name}"] = scoring.output
        return [planning, completing, scoring]

    def scores_of(
        self, scoring: dict[str, Stage], way: CorrectionArm, completions_result: Path | None
    ) -> dict[str, Path]:
        """The score folders of an arm, by side. Their stages join ``scoring``, unless another arm has the same scores.

        The behaviour comes first: general samples may be matched to it, and it may be scored on the completions
        of an evaluation, whose result is ``completions_result``.
        """
        behaviour, reads = way.behaviour, None
        if completions_result is not None and behaviour.get("source") is None:
            behaviour = behaviour | {"source": str(completions_result.with_name("completions.jsonl"))}
            reads = {"completions": completions_result}
        stage = self._shared(scoring, self._scoring_stage(way.named("behaviour"), way.scores[0], behaviour, reads))
        sides, general = {"behaviour": stage.output}, way.general
        if general.get("match") == "behaviour":
            general = general | {"match": str(stage.output)}
        data = {f"general-{seed}": general | {"seed": seed} for seed in way.seeds}
        for place, text in enumerate(way.texts, 1):
            data |= {f"general-text{place}-{seed}": general | text | {"seed": seed} for seed in way.seeds}
        for side, keys in data.items():
            sides[side] = self._shared(scoring, self._scoring_stage(way.named(side), way.scores[1], keys)).output
        return sides

    @staticmethod
    def _shared(scoring: dict[str, Stage], stage: Stage) -> Stage:
        """The stage of ``scoring`` that does the same, or ``stage``, which then joins them."""
        same = (one for one in scoring.values() if (one.settings, one.reads) == (stage.settings, stage.reads))
        return next(same, None) or scoring.setdefault(stage.name, stage)

    def _scoring_stage(
        self,
        name: str,
        score: Settings,
        data: Settings,
        reads: Mapping[str, Path] | None = None,
        plans: Mapping[str, Path] | None = None,
    ) -> Stage:
        settings = {"model": self.model | score, "data": data}
        return self._pass("score", name, settings, self.folder / "scores" / name, SCORES_MARKER, plans, reads)

    def shared_scores(self, scoring: dict[str, Stage], arm: Arm, seed: int) -> Stage:
        """The stage of ``scoring`` that makes an arm's scores, added to it unless another arm has the same."""
        return self._shared(scoring, self._scoring_stage(f"{arm.name}-seed{seed}", *arm.scoring(seed)))

    def evaluation_stage(self, name: str, measuring: Settings, plan: str | None) -> Stage:
        """The stage that measures the model, with the plan of that name applied."""
        plans = {} if plan is None else {"plan": self._plan_path(plan)}
        return self._pass("eval", name, measuring, self.folder / "evaluations" / name, EVALUATION_MARKER, plans)

    def plan_stage(
        self, name: str, scores: Mapping[str, Path], settings: Settings, scale_of: str | None = None
    ) -> Stage:
        """The stage that makes a plan from scores: ``behaviour`` and those of further rounds, all others are general.

        With ``scale_of``, a control of gains, it goes as far as the plan of that name.
        """
        from sparc3_pl.selection.command import Asked, prune

        path = self._plan_path(name)
        of_behaviour = [str(folder) for side, folder in scores.items() if side.startswith("behaviour")]
        general = [str(folder) for side, folder in scores.items() if not side.startswith("behaviour")] or None
        behaviour = {"behaviour": of_behaviour} if of_behaviour else {}
        arguments = {"general": general, **behaviour, "output": str(path)}
        arguments |= settings | {"control": settings.get("control") or "none"}
        try:
            inspect.signature(prune).bind(**arguments, overwrite=True)
        except TypeError as error:  # a key that prune does not have
            raise InputError(f"plan: {error}; see sparc3 prune --help for the keys") from error

        def parsed(scale: Settings) -> dict[str, Any]:
            from sparc3_pl.passes.parser import function_parser

            parser = function_parser(prune, "sparc3 prune")
            parser.ends_program = False
            of_plan = vars(parser.parse_object(arguments | scale))
            of_plan.pop("config")
            return of_plan

        def check() -> None:
            try:
                Asked.of(parsed({} if scale_of is None else {"scale": 1.0}))
            except InputError as error:
                raise InputError(f"plan-{name}: {error}") from None

        def make(overwrite: bool) -> None:
            scale = {} if scale_of is None else {"scale": self._plan(scale_of).gains.scale}
            with typed("prune", *_options(arguments | scale)):
                prune(**parsed(scale) | {"overwrite": overwrite})

        reads = {f"scores of {side}": folder / SCORES_MARKER for side, folder in scores.items()}
        reads |= {} if scale_of is None else {"plan": self._plan_path(scale_of)}
        return Stage(f"plan-{name}", settings, path, path, reads, make, check)

    def _pass(
        self,
        command: str,
        name: str,
        settings: Settings,
        output: Path,
        marker: str,
        plans: Mapping[str, Path] | None = None,
        reads: Mapping[str, Path] | None = None,
    ) -> Stage:
        """The stage that runs ``score`` or ``eval`` with these settings."""
        settings = settings | {"trainer": self.trainer}
        return pass_stage(self.stages, command, name, settings, output, marker, plans, reads)

    def compare(self, name: str) -> Comparison:
        """Compares with the evaluation of the model as it was, and keeps the result."""
        folders = [self.folder / "evaluations" / side for side in ("before", name)]
        comparison = compare_evaluations(*map(Evaluation.open, folders))
        path = self._comparison_path(name)
        with typed("compare", "--before", str(folders[0]), "--after", str(folders[1]), "--output", str(path)):
            write_comparison(path, comparison, overwrite=True)
        return comparison

    def conclude(
        self, outcomes: Sequence[EditOutcome], bound: float, stages: Sequence[Stage], more: Mapping[str, Any]
    ) -> None:
        """Writes what was measured, and makes the report of it and of the results of ``stages``."""
        from sparc3_pl.report.command import report

        rows = [asdict(outcome) | {"perplexity_increase": outcome.comparison.rise} for outcome in outcomes]
        summary = {"outcomes": rows, "max_perplexity_increase": bound, **more}
        origin = {"versions": versions(), "command": command_line(), "created": now()}
        path = self.folder / "experiment.json"
        write_json(path, summary | origin)
        inputs = [path, *(stage.output for stage in stages)]
        inputs += [self.stages.settings_file(stage.name) for stage in stages]
        inputs += [self._comparison_path(outcome.name) for outcome in outcomes]
        report([str(one) for one in inputs], output=str(self.folder / "report"), overwrite=True)

    def count(self, name: str) -> int:
        """How many components the plan of that name edits."""
        plan = self._plan(name)
        return plan.num_neurons or plan.num_weights

    def scale(self, name: str) -> float:
        """How far the gains of the plan of that name go; 0 for any other edit."""
        return scale_of(self._plan(name))

    def _plan(self, name: str) -> PrunePlan:
        return PrunePlan.load(self._plan_path(name))

    def _plan_path(self, name: str) -> Path:
        return self.folder / "plans" / f"{name}.json"

    def _comparison_path(self, name: str) -> Path:
        return self.folder / "comparisons" / f"{name}.json"


def _kind(stage: Stage) -> str:
    """A digest of what a stage does and its settings: stages that differ only in what they read have the same."""
    return json_digest([stage.name.partition("-")[0], stage.settings])


def _options(arguments: Settings) -> Iterator[str]:
    """Arguments of a function as words of a command line."""
    for name, value in arguments.items():
        if value is not None and value is not False:
            values = value if isinstance(value, list) else ["true" if value is True else value]
            yield from (f"--{name}", *map(str, values))


def outcome_table(outcomes: Sequence[EditOutcome]) -> Table:
    """A row for each edit, label and judge: before and after, interval, p-value, and the change of perplexity.

    Where no completions were judged, the rows are those of the measurements' figures.
    """
    from sparc3_pl.document.blocks import Number, Numbers, Table, from_to, interval, p_value

    rows = []
    texts = list(dict.fromkeys(["", *(text for outcome in outcomes for text in outcome.comparison.rises)]))
    labels: set[str] = set()
    for outcome in outcomes:
        comparison = outcome.comparison
        perplexity = [Number(outcome.comparison.rises.get(text), form="+.2%") for text in texts]
        further = {f"{name}: {label}": f for name, one in comparison.judges.items() for label, f in one.items()}
        by_label = comparison.toxicity | further
        if not by_label:
            by_label = {
                f"{measurement}: {figure}": {"mean": change}
                for measurement, changes in comparison.measurements.items()
                if not measurement.startswith(TEXT)  # perplexities have columns of their own
                for figure, change in changes.items()
            }
        labels.update(by_label)
        for label, figures in by_label.items() or [("", {})]:
            change = figures.get("mean")
            cells = [None, None, None, None]
            if change is not None:
                absolute, relative = Number(change.change, form="+.3f"), change.relative_change
                cells = [
                    from_to(change.before, change.after, ".3f"),
                    absolute if relative is None else Numbers("{} ({})", (absolute, Number(relative, form="+.1%"))),
                    interval(change.low, change.high, change.num_pairs, "+.3f"),
                    p_value(change.p_value),
                ]
            name = outcome.name if len(by_label) < 2 else f"{outcome.name}: {label}"
            rows.append((name, Number(outcome.count, form="d"), *cells, *perplexity))
    figure = next(iter(labels)) if len(labels) == 1 else HEADLINE if HEADLINE in labels else "figure"
    columns = ("edit", "number", figure, "change", "95 % interval", "p")
    columns += tuple(f"perplexity of {text}" if text else "perplexity" for text in texts)
    return Table.of(columns, rows, title="Against the model as it was")
