"""Samples of a behaviour, from the model itself: it completes prompts, and the completions that show it are kept."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparc3_pl.data.sources import Filter, parse_filter, partition
from sparc3_pl.errors import InputError
from sparc3_pl.evaluation.results import MARKER, Evaluation
from sparc3_pl.experiment.pass_stage import pass_stage, settings_in_file
from sparc3_pl.experiment.stages import Settings, Stage, Stages, check_folder
from sparc3_pl.io.files import FileKind, new_file, strict_json, write_text
from sparc3_pl.io.formats import Record

if TYPE_CHECKING:
    from sparc3_pl.evaluation.cuts import CutRule
    from sparc3_pl.evaluation.rows import CompletionRow

__all__ = ["Halves", "KeepRule", "elicit", "kept_samples"]

log = logging.getLogger(__name__)

SAMPLES = "samples.jsonl"
_KIND = FileKind("elicited samples", lambda path: True)  # in a folder of ours, and checked against its record

_SCORED = ("scores", "judges", "prefix_scores")
"""Fields of a completion that judges fill."""

_NO_MODEL = {"class_path": "sparc3_pl.evaluation.repetition.RepetitionJudge"}
"""The judge where nobody asks for a judge's scores: it needs no model."""


def elicit(
    output: str,
    keep: str,
    data: Settings,
    model: Settings | None = None,
    num_samples: int | None = None,
    cut: Settings | None = None,
    trainer: Settings | None = None,
) -> None:
    """Let a model complete prompts, and keep what shows a behaviour as samples for score and eval.

    The completions are those of eval (``completions`` in the output folder): an interrupted run resumes, and
    ``trainer.devices`` processes share the prompts. The samples are the lines of ``samples.jsonl``: prompt, completion,
    completion_ids, scores, uniqueness and half (attribution or evaluation, as data.partition decides by the prompt).

    Args:
        output: Folder for samples and completions. The same command resumes there; one with other settings is refused.
        keep: Which completions are samples: a condition on a line of completions.jsonl, as ``scores.toxicity >= 0.5``,
            ``judges.NAME.LABEL > 0``, or ``uniqueness < 0.5`` (unique tokens / tokens), which needs no judge. Empty
            completions are left out.
        data: Keys of ``data`` of eval: ``prompts_source``, ``prompts_field``, ``prompts_filter``, ``num_prompts``, ...
        model: Keys of ``model`` of eval: ``pretrained``, ``judge``, ``temperature``, ``samples_per_prompt``, ...
        num_samples: Most samples: those that go furthest beyond the bound in keep's first condition.
        cut: Cut each sample right before the behaviour begins: before the first word that the judge objects to and
            that the model predicts; and the same texts before harmless words (``behaviour: false``), to compare with.
            Keys: ``criterion`` (word or text), ``threshold``, ``harmless``, ``label``, ``general_per_cut``,
            ``batch_size``; an empty mapping, ``{}``, takes the defaults.
        trainer: Keys of ``trainer`` of eval.

    Raises:
        InputError: If a setting is wrong, no completion is to be kept, or an earlier result was made with other
            settings.
    """
    from sparc3_pl.document.terminal import print_result

    folder = Path(output)
    rule = KeepRule.of(keep, num_samples)
    data = {"text_source": None} | data
    if data["text_source"] is not None or not data.get("prompts_source"):
        raise InputError("data: give prompts_source, the prompts to complete, and no text_source")
    if others := sorted(key for key in data if key.startswith("pairs_")):
        raise InputError(f"data.{others[0]}: is for eval, and nothing is measured here; leave it out")
    halves = Halves.of(data)
    model = dict(model or {})
    for key in ("output", "overwrite", "measurements", "tasks"):
        if key in model:
            raise InputError(f"model.{key}: is no key of elicit, which makes completions only; leave it out")
    if not (rule.asks_judge or cut is not None or model.get("judge") or model.get("judges")):
        model["judge"] = _NO_MODEL
    cuts = None if cut is None else _cut_rule(cut)
    check_folder(folder)
    stages = Stages(folder / "stages")
    settings = {"model": model, "data": data, "trainer": trainer or {}}
    completions = pass_stage(stages, "eval", "completions", settings, folder / "completions", MARKER)
    request = {"keep": keep, "num_samples": num_samples, "cut": cut, **vars(halves)}
    making = _Making(folder, rule, halves, cuts, settings)
    samples = Stage(
        "samples", request, folder / SAMPLES, folder / SAMPLES, {"completions": completions.result}, making.make
    )
    for stage in (completions, samples):
        stages.check_settings(stage)
    from sparc3_pl.model.loading import models_kept  # torch

    with models_kept():  # the cuts are made with the same model
        for stage in (completions, samples):
            stages.do(stage)
    print_result(*_summary(folder))


@dataclass(frozen=True)
class KeepRule:
    """Which completions are samples.

    Attributes:
        condition: The condition on a line of ``completions.jsonl``.
        num_samples: Keep only so many, the furthest beyond the bound of the first condition first; None: all.
    """

    condition: Filter
    num_samples: int | None = None

    @classmethod
    def of(cls, keep: str, num_samples: int | None) -> KeepRule:
        """The rule that ``keep`` writes as a condition.

        Raises:
            InputError: if it cannot be read, or says nothing of an order that ``num_samples`` needs.
        """
        condition = parse_filter(keep, "keep")
        if num_samples is not None:
            if num_samples < 1:
                raise InputError(f"num_samples={num_samples}; give at least 1")
            if condition.conditions[0].op in ("==", "!="):
                raise InputError(
                    f"num_samples={num_samples} keeps the furthest beyond a bound, and keep={keep!r} begins with none; "
                    "put a condition with < or > first"
                )
        return cls(condition, num_samples)

    @property
    def asks_judge(self) -> bool:
        """Whether a judge's score is in the condition."""
        return any(condition.field.split(".")[0] in _SCORED for condition in self.condition.conditions)

    def furthest_first(self, record: Mapping[str, Any]) -> float:
        """A key to sort by: the further beyond the bound, the lower."""
        from sparc3_pl.data.sources import get_field

        first = self.condition.conditions[0]
        value = float(get_field(dict(record), first.field, "keep"))
        return -value if first.op in (">", ">=") else value


@dataclass(frozen=True)
class Halves:
    """How prompts are assigned to the halves: as ``data.partition`` does."""

    partition_seed: int = 0
    partition_share: float = 0.5

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Halves:
        """The halves that the keys of ``data`` describe."""
        return cls(**{name: data[name] for name in ("partition_seed", "partition_share") if name in data})


def kept_samples(rows: Sequence[CompletionRow], rule: KeepRule, halves: Halves) -> list[Record]:
    """The completions that are samples, as lines of ``samples.jsonl``, in the order of prompts and numbers.

    With ``num_samples`` the furthest beyond the bound are kept, equal ones in that order.

    Raises:
        InputError: if a field of the condition is none of a completion's, or too few are kept.
    """
    counts: Counter[str] = Counter()
    samples = []
    for row in rows:
        line = row.to_json()
        if row.failed is not None:
            counts["failed"] += 1
        elif not row.completion or not row.completion.strip():
            counts["empty"] += 1
        elif rule.condition.passes(line):
            half = partition(row.id, halves.partition_seed, halves.partition_share)
            samples.append({**{name: value for name, value in line.items() if name != "failed"}, "half": half})
    left_out = "".join(f", {number} {why}" for why, number in counts.items())
    if left_out:
        log.warning("of %d completions%s are left out", len(rows), left_out)
    if len(samples) < (rule.num_samples or 1):
        raise InputError(
            f"keep={rule.condition.text!r}: only {len(samples)} of {len(rows)} completions{left_out}; widen it"
            f"{', lower num_samples' if rule.num_samples else ''} or give more prompts (the completions are kept)"
        )
    if rule.num_samples is not None:
        order = sorted(range(len(samples)), key=lambda place: (rule.furthest_first(samples[place]), place))
        samples = [samples[place] for place in sorted(order[: rule.num_samples])]
    return samples


@dataclass(frozen=True)
class _Making:
    """Makes ``samples.jsonl`` from the completions."""

    folder: Path
    rule: KeepRule
    halves: Halves
    cut: CutRule | None
    settings: Settings

    def make(self, overwrite: bool) -> None:
        evaluation = Evaluation.open(self.folder / "completions")
        samples = kept_samples(evaluation.completions, self.rule, self.halves)
        if self.cut is not None:
            samples = self._cut(samples, self.cut)
        with new_file(self.folder / SAMPLES, overwrite, _KIND) as file:
            write_text(file, "".join(strict_json(sample) + "\n" for sample in samples))

    def _cut(self, samples: Sequence[Mapping[str, Any]], rule: CutRule) -> list[Record]:
        """Cuts the samples' texts with the judge, model and device that eval used."""
        from sparc3_pl.evaluation.cuts import CutText, cut_samples
        from sparc3_pl.model.loading import load_model
        from sparc3_pl.passes.run import make_pass

        settings = {key: value for key, value in self.settings.items() if value}
        with settings_in_file(settings, Stages(self.folder / "stages").settings_file("eval-completions")) as config:
            cli = make_pass("eval", ["--config", str(config)])
        module, device = cli.model, cli.trainer.strategy.root_device

        def load() -> Any:
            model = load_model(module.source).eval()
            return model if module.source.device_map is not None else model.to(device)

        texts = [CutText(sample["prompt"], sample["completion"]) for sample in samples]
        half = {sample["prompt"]: sample["half"] for sample in samples}
        cuts = cut_samples(texts, module.settings.judge, rule, module.encoder, load)
        return [{**one, "half": half[one["prompt"]]} for one in cuts]


def _cut_rule(cut: Settings) -> CutRule:
    from sparc3_pl.evaluation.cuts import CutRule

    try:
        return CutRule(**cut)
    except TypeError as error:
        raise InputError(f"cut: {error}; see sparc3 elicit --help for its keys") from None


def _summary(folder: Path) -> list[Any]:
    """How many samples there are of which half."""
    import json

    from sparc3_pl.document.blocks import Number, Table

    lines = (folder / SAMPLES).read_text(encoding="utf-8").split("\n")
    samples = [json.loads(line) for line in lines if line]
    evaluation = Evaluation.open(folder / "completions")
    kinds = {"samples": samples}
    if samples and "behaviour" in samples[0]:
        kinds = {
            "cut before the behaviour": [one for one in samples if one["behaviour"]],
            "cut before a harmless word": [one for one in samples if not one["behaviour"]],
        }
    rows = []
    for kind, ones in kinds.items():
        halves = Counter(one["half"] for one in ones)
        prompts = len({one["prompt"] for one in ones})
        numbers = (len(ones), prompts, halves["attribution"], halves["evaluation"])
        rows.append((kind, *(Number(number, form="d") for number in numbers)))
    columns = ("", "number", "of prompts", "attribution", "evaluation")
    prompts = len({row.id for row in evaluation.completions})
    title = f"Elicited by {prompts} prompts, {len(evaluation.completions)} completions"
    return [Table.of(columns, rows, title=title), str(folder / SAMPLES)]
