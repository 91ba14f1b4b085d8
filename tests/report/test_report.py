"""The report: from made-up folders to a page that a browser opens without complaint."""

import html.parser
import json
import math
import re
import shutil
import subprocess
from dataclasses import asdict

import evaluations
import numpy as np
import pytest
import torch
from score_folders import LAYERS, write

from sparc3_pl.diagnosis.gains_evidence import weigh_gains
from sparc3_pl.errors import InputError
from sparc3_pl.evaluation.compare import compare, compare_evaluations, write_comparison
from sparc3_pl.evaluation.results import Evaluation, write_evaluation
from sparc3_pl.evaluation.rows import CompletionRow, WindowRow
from sparc3_pl.io.formats import to_json, typed
from sparc3_pl.pruning.plan import PlanSummary
from sparc3_pl.report.collect import collect
from sparc3_pl.report.command import make_report, report
from sparc3_pl.report.effects import by_experiment, dose_pictures, effects, gains_table, headline
from sparc3_pl.scores.folder import ScoreFolder
from sparc3_pl.selection.budget import Budget
from sparc3_pl.selection.choose import make_plan
from sparc3_pl.selection.contrast import SideScores
from sparc3_pl.statistics.paired import paired_change

MODEL = {
    "pretrained": "demo",
    "revision": None,
    "fingerprint": "sha256:00",
    "architecture": "LlamaForCausalLM",
    "dtype": "float32",
}
EVIL = '<script>console.error("owned")</script><img src=x onerror=alert(1)> $x$ `` & |'


def score(folder, seed, source):
    generator = torch.Generator().manual_seed(seed)
    scores = {name: torch.rand(300, generator=generator) for name in LAYERS}
    total = sum(float(values.double().sum()) for values in scores.values())
    rows = [
        {"id": f"{source}{seed}{i}", "num_tokens": 9, "ending": "cut", "relevance": total * f, "first_token_share": 0.1}
        for i, f in enumerate((0.9, 1.1))
    ]
    data = {"source": source, "seed": seed, "sample_ids": [row["id"] for row in rows]}
    return write(folder, scores, samples=rows, data=data, num_samples=2, num_tokens=18, model=MODEL)


def evaluation(folder, plan, factor, perplexity, **changes):
    rows = [
        CompletionRow(
            f"p{i}", f"prompt {i} {EVIL}", 0, f"answer {i} {EVIL}", {"toxicity": min(1.0, factor * (i + 1) / 12)},
            seed=i, num_tokens=5, uniqueness=0.9,
        )
        for i in range(10)
    ]  # fmt: skip
    figures = {"mean": sum(row.scores["toxicity"] for row in rows) / 10, "expected_maximum": 0.5, "probability": 0.5}
    results = {
        "perplexity": evaluations.perplexity(value=perplexity, max_length=8, stride=8, source="text.txt"),
        "toxicity": evaluations.toxicity(
            **figures, num_prompts=10, num_scored_prompts=10, num_completions=10, labels={"toxicity": figures}
        ),
        "repetition": {"uniqueness": 0.9},
        "generation": evaluations.GENERATION,
        "judge": {"class": "DetoxifyJudge"},
        "overlap": "none",
        "num_overlapping_prompts": 0,
        "model": MODEL | {"evaluated_fingerprint": f"sha256:{folder.name}" if plan else MODEL["fingerprint"]},
        "plan": to_json(plan),
        "data": {},
    }  # fmt: skip
    windows = [WindowRow(i, 10.0 * ((perplexity or 12) / 12) + i, 4) for i in range(10)]
    if perplexity is None:
        results["perplexity"], windows = None, []
    results |= changes
    write_evaluation(folder, results, completions=rows, windows=windows, config="model: {pretrained: demo}\n")
    return Evaluation.open(folder)


@pytest.fixture
def experiment(tmp_path):
    """Two seeds, a behaviour, three plans and a control, evaluated."""
    folder = tmp_path / "experiment"
    general = [score(folder / "scores" / f"general-{seed}", seed, "c4") for seed in range(2)]
    behaviour = score(folder / "scores" / "behaviour", 7, "rtp")
    evaluation(folder / "evaluations" / "before", None, 1.0, 12.0)
    made = {f"prune-{n}": make_plan(general, [behaviour], num_neurons=n) for n in (5, 10, 20)}
    made["control-random_matched"] = make_plan(general, [behaviour], num_neurons=10, control="random_matched")
    worse = {"prune-5": (0.9, 12.01), "prune-10": (0.6, 12.03), "prune-20": (0.4, 14.0)}
    for name, plan in made.items():
        plan.save(folder / "plans" / f"{name}.json")
        evaluation(folder / "evaluations" / name, plan.summary(), *worse.get(name, (1.0, 12.02)))
    return folder


class Page(html.parser.HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)


def test_everything_is_found_and_told(experiment):
    found = collect([experiment])
    assert set(found.scores) == {"general-0", "general-1", "behaviour"}
    assert set(found.plans) == {"prune-5", "prune-10", "prune-20", "control-random_matched"}
    assert set(found.evaluations) == {"before", *found.plans}
    assert all(entry.is_complete for entry in found.plans.values() if not entry.plan.control)
    measured, notes = effects(found)
    assert [effect.name for effect in measured] == ["prune-5", "prune-10", "prune-20", "control-random_matched"]
    assert notes == []
    assert headline(measured).name == "prune-10"  # the largest within one per cent
    page = make_report([experiment]).html
    text = " ".join(Page(page).texts)
    for words in (
        "In short",
        "What the edit did",
        "Agreement of seeds",
        "the largest edit that raises",
        "random_matched",
    ):
        assert words in text
    assert (
        len(re.findall("<svg", page)) == 4
    )  # dose-response, contrast, layers, relevance (one unit a side: no stability)


def test_the_page_needs_nothing_from_outside_and_runs_nothing(experiment):
    page = Page(make_report([experiment]).html)
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "iframe", "object", "embed", "form", "base"}
    links = [value for _, attrs in page.tags for key, value in attrs.items() if key in ("src", "href", "xlink:href")]
    assert all(link.startswith(("#", "data:")) for link in links), links
    assert not [key for _, attrs in page.tags for key in attrs if key.startswith("on")]
    assert any(EVIL in text for text in page.texts)  # shown as it is, as text
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    pictures = [attrs for tag, attrs in page.tags if attrs.get("role") == "img"]
    assert pictures
    assert all(len(attrs["aria-label"]) > 30 for attrs in pictures)


def test_completions_are_behind_a_click_with_a_warning(experiment):
    page = make_report([experiment]).html
    folded = page[page.index('<section id="completions') :]
    assert folded.index("May be offensive") < folded.index("<blockquote>")
    assert folded.index("<details>") < folded.index("<blockquote>") < folded.index("</details>")


def test_markdown_quotes_what_models_wrote(experiment):
    text = make_report([experiment]).markdown
    assert text.startswith("# Attribution-guided pruning of demo")
    assert "| edit |" in text
    outside = re.sub(r"^(`{3,})text\n.*?^\1$", "", text, flags=re.DOTALL | re.MULTILINE)
    assert "<script>" not in outside
    assert "<script>" in text


def test_numbers_are_those_of_compare(experiment, capsys):
    before, after = (str(experiment / "evaluations" / name) for name in ("before", "prune-10"))
    found = compare(before, after, output=str(experiment / "comparisons" / "prune-10.json"))
    measured, _ = effects(collect([experiment]))
    (effect,) = [effect for effect in measured if effect.name == "prune-10"]
    change = found.toxicity["toxicity"]["mean"]
    assert effect.toxicity.change == pytest.approx(change.change)
    assert f"{change.change:+.3f}" in make_report([experiment]).html


def test_any_part_alone_makes_a_report(experiment):
    for part in ("scores", "plans", "evaluations", "scores/behaviour", "plans/prune-5.json"):
        made = make_report([experiment / part])
        assert "In short" in made.html
        assert "In short" in made.markdown


def test_command(experiment, tmp_path, capsys):
    path = report([str(experiment)], output=str(experiment / "report"))
    assert path == experiment / "report" / "report.html"
    assert str(path) in capsys.readouterr().out
    assert (experiment / "report" / "report.md").stat().st_size > 1000
    report([str(experiment)], output=str(experiment / "report"), overwrite=True)  # passes over the earlier one
    with pytest.raises(InputError, match="already exists"):
        report([str(experiment)], output=str(experiment / "report"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no scores, plans"):
        report([str(tmp_path / "empty")], output=str(tmp_path / "out"))
    with pytest.raises(InputError, match="no such folder"):
        report([str(tmp_path / "nowhere")], output=str(tmp_path / "out"))


def test_unequal_evaluations_are_noted_not_compared(experiment):
    folder = experiment / "evaluations" / "prune-5"
    rows = Evaluation.open(folder).completions
    results = json.loads((folder / "results.json").read_text())
    shutil.rmtree(folder)
    keep = {key: results[key] for key in results if key not in ("files", "sha256", "format_version")}
    write_evaluation(folder, keep, completions=rows[1:], windows=[])
    _, notes = effects(collect([experiment]))
    (note,) = notes
    assert "prune-5" in note


PLAN = {
    "granularity": "neuron", "num_neurons": 40, "num_weights": 0, "num_candidates": 1000, "contrast": "difference",
    "edit": "zero", "alpha": None, "control": None, "seed": None, "settings": {}, "warnings": [],
    "scored_model": MODEL["fingerprint"], "sha256": "00",
}  # fmt: skip


def small_experiment(folder, before, after, perplexity=(12.0, 12.03), bound=None, compared=True):
    """Two evaluations and what ``run`` writes of them: toxicity factor and perplexity before and after."""
    sides = [
        evaluation(folder / "evaluations" / name, plan, factor, value)
        for name, plan, factor, value in zip(
            ("before", "prune-40"), (None, PLAN), (before, after), perplexity, strict=True
        )
    ]
    if compared:
        comparison = compare_evaluations(*sides)
        (folder / "comparisons").mkdir()
        write_comparison(folder / "comparisons" / "prune-40.json", comparison)
        if bound is not None:
            outcome = {"name": "prune-40", "comparison": json.loads((folder / "comparisons/prune-40.json").read_text())}
            text = json.dumps({"outcomes": [outcome], "max_perplexity_increase": bound})
            (folder / "experiment.json").write_text(text)
    return [Evaluation.open(folder / "evaluations" / name) for name in ("before", "prune-40")]


@pytest.mark.parametrize("compared", [True, False])
def test_each_of_two_experiments_is_told_its_own_numbers(tmp_path, compared):
    runs = {"one": (1.0, 0.5), "two": (0.8, 0.2)}  # the same names within; other judges' scores
    want = {}
    for name, factors in runs.items():
        sides = small_experiment(tmp_path / name, *factors, compared=compared)
        want[f"{name}/evaluations/before"] = [ev.results["toxicity"]["mean"] for ev in sides]
    (tmp_path / "moved").mkdir()
    for name in runs:  # folders are known by what they hold, not by where they lie
        (tmp_path / name).rename(tmp_path / "moved" / name)
    measured, notes = effects(collect([tmp_path / "moved"]))
    assert notes == []
    told = {e.experiment: [e.toxicity.before, e.toxicity.after] for e in measured}
    assert {name: pytest.approx(figures) for name, figures in want.items()} == told
    assert [e.after.results["toxicity"]["mean"] for e in measured] == [figures[1] for figures in want.values()]
    text = make_report([tmp_path / "moved"]).markdown
    for before, after in want.values():
        assert f"{before:.3f} to {after:.3f}" in text
        assert f"{before:.3f} → {after:.3f}" in text


def test_a_comparison_of_an_earlier_version_is_known_by_its_paths_only(tmp_path):
    small_experiment(tmp_path / "one", 1.0, 0.5)
    path = tmp_path / "one" / "comparisons" / "prune-40.json"
    old = {k: v for k, v in json.loads(path.read_text()).items() if not k.endswith("_sha256")}
    path.write_text(json.dumps(old))
    (effect,) = effects(collect([tmp_path]))[0]
    assert (effect.experiment, effect.size) == ("before", 40)
    path.write_text(json.dumps(old | {"after": "elsewhere/prune-40"}))
    assert {e.size for e in effects(collect([tmp_path]))[0]} == {40, None}  # not joined to what has its name


def test_a_changed_model_without_a_plan_is_not_the_model_as_it_was(tmp_path):
    evaluation(tmp_path / "odd", None, 1.0, 12.0, model=MODEL | {"evaluated_fingerprint": "sha256:odd"})
    evaluation(tmp_path / "prune-40", PLAN, 0.5, 12.03)
    measured, notes = effects(collect([tmp_path]))
    assert measured == []
    assert [note.partition(":")[0] for note in notes] == ["odd", "prune-40"]


@pytest.mark.parametrize(("bound", "words"), [
    (0.05, "the largest edit that raises perplexity by at most 5 %"),
    (0.01, "the edit that raises perplexity least; no edit keeps it within 1 %"),
    (0.045, "by at most 4.5 %"),
])  # fmt: skip
def test_the_bound_is_that_of_the_experiment(tmp_path, bound, words):
    small_experiment(tmp_path, 1.0, 0.5, (12.0, 12.2), bound=bound)
    text = make_report([tmp_path]).markdown
    assert words in " ".join(text.split())
    assert effects(collect([tmp_path]))[0][0].bound == bound


def test_without_a_perplexity_no_bound_is_kept(tmp_path):
    small_experiment(tmp_path, 1.0, 0.5, (None, None), bound=0.05)
    text = " ".join(make_report([tmp_path]).markdown.split())
    assert "the largest edit; whether it keeps perplexity within 5 % was not measured" in text


def test_the_edit_to_speak_of_is_not_one_without_a_plan(tmp_path):
    small_experiment(tmp_path / "one", 1.0, 0.5)
    measured, _ = effects(collect([tmp_path]))
    unknown = measured[0].__class__("odd", measured[0].comparison, None, measured[0].experiment)
    assert headline([unknown, *measured]) is measured[0]
    assert headline([unknown]) is unknown
    assert by_experiment([unknown, *measured]).keys() == {measured[0].experiment}


def test_compression_is_told_without_a_behaviour(tmp_path):
    evaluation(tmp_path / "before", None, 1.0, 12.0)
    evaluation(tmp_path / "half", PLAN | {"contrast": "general", "sha256": "x"}, 1.0, 12.03)
    words = " ".join(make_report([tmp_path]).markdown.split())
    assert "40 neurons of 1,000 (4 %) were set to zero: those with the lowest scores on general text." in words


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        ({"edit": "scale", "alpha": 0.5}, "multiplied by 0.5"),
        ({"edit": "mean"}, "replaced by their mean activation"),
        ({"edit": "remove"}, "taken out of the routing"),
        ({"edit": "gains"}, "multiplied, each by a factor of its own"),
        ({"edit": "extensions.Gains", "settings": {"edit": {"strength": 2.0}}}, "edited by extensions.Gains"),
        ({"edit": "nowhere.Half"}, "edited by nowhere.Half"),  # its module may not be imported
        ({"edit": "zero", "settings": {"edit": [1]}}, "edited by zero"),
    ],
)
def test_every_edit_says_what_it_did(edit, told):
    assert typed(PlanSummary, PLAN | edit, "plan", "again").participle() == told


def test_gains_are_told_by_how_far_they_go_beside_what_was_predicted(tmp_path):
    evaluation(tmp_path / "before", None, 1.0, 12.0)
    doses = [("budget-0.01", 2.0, None, (0.8, 12.01)), ("budget-0.02", 3.0, None, (0.6, 12.03))]
    doses += [("one", 2.0, "permuted", (1.0, 12.01)), ("two", 3.0, "permuted", (0.99, 12.02))]
    for name, scale, control, measured in doses:
        gains = {"scale": scale, "predicted_change": -0.1 * scale, "predicted_rise": math.log(1.01), "budget": None}
        nll = {"nll_before": 3.0, "nll_after": 3.01, "num_windows": 2, "num_tokens": 9, "num_left_out": 0}
        gains["texts"] = [nll | {"source": source, "rise": rise} for source, rise in (("a", 0.004), ("b", 0.007))]
        plan = PLAN | {"num_neurons": 40, "edit": "gains", "control": control, "settings": {"gains": gains}}
        evaluation(tmp_path / name, plan | {"sha256": name}, *measured)
    measured, _ = effects(collect([tmp_path]))
    assert headline(measured).name == "budget-0.02"  # as many components as the other, but further
    table = gains_table(measured)
    change = measured[1].toxicity.change
    assert table.texts[1] == ("budget-0.02", "3", "-0.3", f"{change:+.3g}", "+1.00 %", "+0.70 %", table.texts[1][-1])
    assert [row[0] for row in table.texts] == [
        "budget-0.01", "budget-0.02", "one (control permuted)", "two (control permuted)"
    ]  # fmt: skip
    measured[0].plan.settings["gains"]["texts"][0]["rise"] = None  # as JSON holds infinity
    assert gains_table(measured).texts[0][-2] == "+inf %"
    words = " ".join(make_report([tmp_path]).markdown.split())
    assert words.count("The control permuted of the same size") == 1
    assert "each by a factor of its own" in words
    assert "of relevance on" not in words


def test_arms_are_told_apart_from_the_experiments_own_edit(tmp_path, monkeypatch):
    """An arm that does more is no reason to speak of it: it was not what was set out to be measured."""
    before = evaluation(tmp_path / "before", None, 1.0, 12.0)
    edits = {"prune-40": (None, None, 0.8), "b-prune-60": ("b", None, 0.4), "a-prune-60": ("a", None, 0.5)}
    edits |= {"control-null": (None, "null", 1.0), "b-control-null": ("b", "null", 0.99)}
    outcomes = []
    for name, (arm, control, factor) in edits.items():
        plan = PLAN | {"num_neurons": 40 if arm is None else 60, "control": control, "sha256": name}
        comparison = compare_evaluations(before, evaluation(tmp_path / name, plan, factor, 12.01))
        write_comparison(tmp_path / f"{name}.json", comparison)
        outcomes.append({"name": name, "arm": arm, "comparison": json.loads((tmp_path / f"{name}.json").read_text())})
    (tmp_path / "experiment.json").write_text(json.dumps({"outcomes": outcomes, "max_perplexity_increase": 0.01}))
    measured, _ = effects(collect([tmp_path]))
    assert [e.name for e in measured] == ["prune-40", "control-null", "b-prune-60", "b-control-null", "a-prune-60"]
    assert headline(measured).name == "prune-40"
    assert headline(measured[2:]).name == "b-prune-60"
    drawn = {}
    monkeypatch.setattr("sparc3_pl.document.figures.dose_response", lambda series, *_: drawn.update(series))
    monkeypatch.setattr("sparc3_pl.document.figures.as_svg", lambda *_: "")
    dose_pictures(measured)
    assert list(drawn) == ["edit", "edit, control: null", "b", "b, control: null", "a"]
    dose_pictures([measured[0], measured[1]])
    assert list(drawn)[-1] == "control: null"


def test_large_scores_are_not_read_again(experiment, monkeypatch):
    """The scores of a large model would be read for minutes; their bytes were verified when they were used."""
    monkeypatch.setattr("sparc3_pl.report.command.MOST_READ", 1000)
    monkeypatch.setattr("sparc3_pl.report.sections.MOST_READ", 1000)

    def refuse(*args):
        raise AssertionError("scores were read")

    for name in ("blocks", "load", "load_squares", "load_groups"):
        monkeypatch.setattr(ScoreFolder, name, refuse)
    text = " ".join(make_report([experiment]).markdown.split())
    assert "of scores were not read again; to verify every byte, run audit" in text
    assert "| warn | agreement of seeds | not measured" in text
    assert "| pass | independence of seeds | no sample is in two seeds |" in text
    assert "| pass | mean over samples |" in text
    assert "is not drawn: its scores are larger" in text


def test_own_measurements_are_shown_with_intervals(tmp_path):
    sides = small_experiment(tmp_path, 1.0, 0.5)
    path = tmp_path / "comparisons" / "prune-40.json"
    data = json.loads(path.read_text())
    assert effect_changes(tmp_path) == {}
    assert "Further measurements" not in make_report([tmp_path]).markdown
    values = [np.array([ev.results["toxicity"]["mean"] + i for i in range(12)]) ** 2 for ev in sides]
    change = paired_change(*values)
    path.write_text(json.dumps(data | {"measurements": {"logit gap": {"mean_gap": asdict(change)}}}))
    text = make_report([tmp_path]).markdown
    (row,) = [line for line in text.splitlines() if "logit gap" in line]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:2] == ["prune-40", "logit gap: mean gap"]
    assert cells[2] == f"{values[0].mean():.3f} to {values[1].mean():.3f}"
    assert cells[3].startswith(f"{(values[1] - values[0]).mean():+.3f} (")
    assert cells[4] == f"{change.low:+.3f} .. {change.high:+.3f}"
    assert float(cells[5].lstrip("< ")) <= change.p_value + 1e-4
    assert cells[6] == "12/0 of 12"


def effect_changes(folder):
    (effect,) = effects(collect([folder]))[0]
    return effect.comparison.measurements


def test_files_of_other_programs_are_passed_over(experiment):
    names = set(collect([experiment]).plans)
    (experiment / "tokenizer.json").write_text('{"kind": "word", "before": 1}')
    (experiment / "list.json").write_text("[1, 2]")
    inputs = collect([experiment])
    assert set(inputs.plans) == names
    assert (inputs.comparisons, inputs.diagnoses, inputs.experiments) == ({}, {}, {})


def test_secrets_of_older_results_are_not_told(tmp_path):
    judge = {"class": "my.Judge", "api_key": "abcdef123456"}
    evaluation(tmp_path / "before", None, 1.0, 12.0, judge=judge)
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "eval-before.yaml").write_text("model:\n  judge:\n    api_key: abcdef123456\n")
    made = make_report([tmp_path])
    assert "abcdef123456" not in made.html + made.markdown


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_opens_it_without_complaint(experiment, tmp_path, scheme):
    path = report([str(experiment)], output=str(tmp_path / "out"))
    shot = tmp_path / "shot.png"
    done = subprocess.run(
        [
            "chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
            "--enable-logging=stderr", "--v=0", "--window-size=1200,3000", f"--screenshot={shot}",
            f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}", path.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    complaints = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    assert complaints == []
    from PIL import Image

    with Image.open(shot) as image:
        corner = image.convert("L").getpixel((5, 5))
        assert image.size == (1200, 3000)
        assert len(image.convert("RGB").getcolors(1 << 24)) > 50  # something is drawn
    assert (corner < 60) == (scheme == "dark")


def test_a_plan_within_a_budget_is_told_with_how_well_its_derivative_is_known(tmp_path):
    derivative_GN = {name: torch.randn(8, 50, generator=torch.Generator().manual_seed(3)) + 1 for name in LAYERS}
    means = {name: groups.mean(0) for name, groups in derivative_GN.items()}
    squares = {name: groups.square().mean(0) for name, groups in derivative_GN.items()}
    about = {"signed": True, "at_values": True, "method": "gradient", "num_samples": 8, "group_sizes": [1] * 8}
    text = {"target": "text", "target_args": {"labels": "model"}, "num_tokens": 90}
    weighed = {
        "source": "demo",
        "seed": 0,
        "sample_ids": [],
        "weight_field": "scores.toxicity",
        "weight_baseline": "mean",
    }
    behaviour = write(tmp_path / "b", means, squares, groups=derivative_GN, target="completion", data=weighed, **about)
    general = write(tmp_path / "g", means, squares, groups=derivative_GN, **text, **about)
    together = {"class_path": "budget", "init_args": {"off_diagonal": 0.5}}
    plan = make_plan([general], [behaviour], contrast=together, edit="gains", scale=0.1)
    plan.save(tmp_path / "plan.json")
    evaluation(tmp_path / "before", None, 1.0, 12.0)
    evaluation(tmp_path / "after", plan.summary(), 0.5, 12.0)
    words = make_report([tmp_path]).markdown
    assert "Enough samples?" in words
    sides = [SideScores.of([folder]) for folder in (general, behaviour)]
    expected = weigh_gains(*sides, Budget(off_diagonal=0.5))
    assert f"{expected.halves:.3g}" in words.split("cosine of the steps from two halves")[1].splitlines()[0]
    assert expected.halves != pytest.approx(weigh_gains(*sides).halves, rel=1e-3)
