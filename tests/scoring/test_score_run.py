"""A scoring run in plain Python, with a method, a component and a target of one's own."""

import json
from pathlib import Path

import pytest
import torch
from score_folders import random_scores, write
from tiny_models import tiny, tokens

from sparc3_pl.attribution.methods import Gradient, Lrp, Method
from sparc3_pl.attribution.recording import LayerPass
from sparc3_pl.attribution.soundness import padded
from sparc3_pl.attribution.targets import Attributed, Target
from sparc3_pl.data.batches import ReferenceBatch
from sparc3_pl.diagnosis.score_checks import audit_folder
from sparc3_pl.errors import InputError
from sparc3_pl.io.files import json_digest
from sparc3_pl.model.components import Component, Group
from sparc3_pl.model.patching import swapped
from sparc3_pl.model.structure import features, mlps
from sparc3_pl.scores.folder import ScoreFolder, require_comparable
from sparc3_pl.scores.manifest import FORMAT, ScoredSample
from sparc3_pl.scoring.merge import merge
from sparc3_pl.scoring.module import ScoringModule
from sparc3_pl.scoring.score_run import Destination, ScoreRequest, ScoreRun

SAMPLES = [tokens(1, length, seed=length)[0] for length in (9, 4, 6, 2)]
IDS = ["d", "b", "c", "a"]


# --- of one's own -----------------------------------------------------------------------------------------------------


class IntegratedGradients(Gradient):
    """Gradients at several strengths of the word embeddings, in one sum."""

    def __init__(self, steps: int = 4) -> None:
        self.steps = steps

    def passes(self, model, batch, target, sites, take):
        kept = {name: [] for name in sites}
        words = model.get_input_embeddings()
        forward = words.forward
        for step in range(1, self.steps + 1):
            weaker = swapped(words, "forward", lambda ids, step=step: forward(ids) * (step / self.steps))
            with weaker:
                attributed = super().passes(model, batch, target, sites, lambda layer: kept[layer.name].append(layer))
        for name, parts in kept.items():
            x, z, delta = (
                torch.cat([getattr(part, key) for part in parts], 1) for key in ("x_BTI", "z_BTO", "delta_BTO")
            )
            take(LayerPass(name, x, z, delta / self.steps, parts[0].weight_OI))
        return attributed


class Longest(Method):
    """The length of the longest sample, for every component: sums that no built-in method has."""

    def sums(self, group, weight_OI, options):
        return {"lengths": torch.zeros(16, dtype=torch.int64)}

    def take_in(self, model, batch, layers, target, options):
        for layer in layers.values():
            layer.sums["lengths"] += batch.attention_mask.sum(1).bincount(minlength=16)

    def scores(self, sums, group, num_samples, weight_OI, options):
        return torch.full(group.shape, float(sums["lengths"].nonzero().max()))


class Channel(Component):
    """An input of the attention's output projection."""

    unit = "channels"

    def groups(self, model, patterns=None):
        names = [name for name, _ in model.named_modules() if name.endswith("o_proj")]
        sizes = [features(model.get_submodule(name))[1] for name in names]
        return [Group(name, (size,), "in", size) for name, size in zip(names, sizes, strict=True)]

    def parts(self, model, layer, index):
        raise NotImplementedError


class Labelled(Target):
    """The logit of the token that a sample's label names."""

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor

    def __call__(self, hidden_BTH, head, batch):
        last_B = batch.attention_mask.sum(1) - 1
        logits_BV = head(hidden_BTH[torch.arange(len(last_B)), last_B])
        logit_B = logits_BV[torch.arange(len(last_B)), batch.fields["label"]]
        return Attributed(self.factor * logit_B, {"label": batch.fields["label"]})


# --- the run ----------------------------------------------------------------------------------------------------------


def batches(size=2, **fields):
    for start in range(0, len(SAMPLES), size):
        part = slice(start, start + size)
        own = {name: values[part] for name, values in fields.items()}
        yield ReferenceBatch(*padded(SAMPLES[part]), IDS[part], ["cut"] * len(IDS[part]), fields=own)


def score(folder: Path, model, batches, part=None, config=None, **request) -> ScoreFolder | None:
    request = ScoreRequest.of(**request)
    about = request.about({"pretrained": "tiny", "fingerprint": "sha256:0", "dtype": "float32", "revision": None},
                          {"source": "here", "sample_ids": sorted(IDS)})  # fmt: skip
    run = ScoreRun(request.scorer(model), about, Destination(folder, part=part, config=config))
    for batch in batches:
        run.add(batch)
    run.finish()
    return ScoreFolder.open(folder) if part is None else None


@pytest.fixture(scope="module")
def model():
    return tiny("llama").requires_grad_(False)


def by_hand(model, name, values):
    """Mean over samples of |W * G| at one layer, by parameter gradients of ``values(logits, i)``."""
    module = model.get_submodule(name)
    module.weight.requires_grad_(True)
    total = torch.zeros_like(module.weight)
    for i, sample in enumerate(SAMPLES):
        module.weight.grad = None
        values(model(sample[None]).logits[0, -1], i).backward()
        total += (module.weight * module.weight.grad).detach().abs()
    module.weight.grad = None
    module.weight.requires_grad_(False)
    return total / len(SAMPLES)


def test_a_run_without_lightning(model, tmp_path):
    folder = score(tmp_path / "s", model, batches(), method="gradient", config="seed: 0\n")
    for name in folder.layers:
        wanted = by_hand(model, name, lambda logits, _: logits.max()).sum(1)
        torch.testing.assert_close(folder.load(name), wanted, rtol=1e-4, atol=1e-6)
    manifest, samples = folder.manifest, folder.samples()
    assert manifest.data["sample_ids"] == [sample.id for sample in samples] == sorted(IDS)
    assert [sample.num_tokens for sample in samples] == [2, 4, 6, 9]
    assert sum(sample.relevance for sample in samples) / 4 == pytest.approx(manifest.total_relevance, rel=1e-5)
    assert (manifest.target, manifest.nonfinite, manifest.seed, manifest.neuron_rows) == (
        "predicted",
        "error",
        None,
        {},
    )
    assert (folder.path / "config.yaml").read_text() == "seed: 0\n"


def test_nothing_scored_is_refused_and_nothing_written(model, tmp_path):
    with pytest.raises(InputError, match="no sample was scored"):
        score(tmp_path / "s", model, [])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["lrp", f"{__name__}.Longest"])
def test_parts_are_merged_by_the_method_itself(model, tmp_path, method, capsys):
    whole = score(tmp_path / "whole", model, batches(), method=method)
    for number, own in enumerate(batches(), start=1):
        score(tmp_path / f"{number}", model, [own], part=(number, 2), method=method)
    merge([str(tmp_path / "1"), str(tmp_path / "2")], str(tmp_path / "merged"))
    merged = ScoreFolder.open(tmp_path / "merged")
    for name in whole.layers:
        torch.testing.assert_close(merged.load(name), whole.load(name))
    assert merged.manifest.total_relevance == pytest.approx(whole.manifest.total_relevance)
    assert merged.samples() == whole.samples()
    assert len(merged.manifest.shards) == 2
    if method != "lrp":
        assert set(whole.load(whole.layers[0]).tolist()) == {9.0}


@pytest.mark.parametrize("method", ["relevance_patching", "integrated_gradients"])
def test_parts_of_scores_of_values_are_merged(model, tmp_path, method, capsys):
    def pairs():
        answers = {"answer": torch.tensor([5, 6, 7, 8]), "foil": torch.tensor([9, 9, 4, 4])}
        for batch in batches(**answers):
            batch.fields["counterfactual_ids"] = (batch.input_ids * 7 + 3) % 47 + 3
            yield batch

    request = {"method": method, "target": "answer", "granularity": ["neuron", "head", "mlp"], "signed": True}
    whole = score(tmp_path / "whole", model, pairs(), **request)
    for number, own in enumerate(pairs(), start=1):
        score(tmp_path / f"{number}", model, [own], part=(number, 2), **request)
    merge([str(tmp_path / "1"), str(tmp_path / "2")], str(tmp_path / "merged"))
    merged = ScoreFolder.open(tmp_path / "merged")
    for name in whole.layers:
        torch.testing.assert_close(merged.load(name), whole.load(name))
    assert merged.manifest.at_values
    assert whole.manifest.at_values


def test_parts_of_an_earlier_version_are_merged(tmp_path, capsys):
    """They do not say where the components are, but which rows of a fused map are neurons."""
    model = tiny("phi3").requires_grad_(False)
    score(tmp_path / "p", model, batches(), part=(1, 1))
    whole = score(tmp_path / "whole", model, batches())
    path = tmp_path / "p/shard.json"
    content = json.loads(path.read_text())
    del content["groups"], content["sha256"]
    content["about"] = {
        key: content["about"][key]
        for key in ("method", "granularity", "signed", "model", "data", "targets", "nonfinite", "seed")
    } | {"neuron_rows": {name: [24, 48] for name in whole.layers}}
    path.write_text(json.dumps(content | {"sha256": json_digest(content)}))
    merge([str(tmp_path / "p")], str(tmp_path / "merged"))
    merged = ScoreFolder.open(tmp_path / "merged")
    assert merged.manifest.layers == whole.manifest.layers
    assert merged.manifest.neuron_rows == whole.manifest.neuron_rows == {name: [24, 48] for name in whole.layers}


# --- additions from this file -----------------------------------------------------------------------------------------


def test_a_target_of_ones_own(model, tmp_path):
    labels = torch.tensor([5, 6, 7, 8])
    target = {"class_path": f"{__name__}.Labelled", "init_args": {"factor": 2.0}}
    folder = score(tmp_path / "s", model, batches(label=labels), method="gradient", target=target)
    for name in folder.layers:
        wanted = by_hand(model, name, lambda logits, i: 2 * logits[labels[i]]).sum(1)
        torch.testing.assert_close(folder.load(name), wanted, rtol=1e-4, atol=1e-6)
    assert (folder.manifest.target, folder.manifest.target_args) == (f"{__name__}.Labelled", {"factor": 2.0})
    assert {sample.id: sample.more["label"] for sample in folder.samples()} == dict(
        zip(IDS, labels.tolist(), strict=True)
    )
    other = score(tmp_path / "t", model, batches(), method="gradient")
    with pytest.raises(InputError, match=r"target=.*Labelled in .* but predicted in"):
        require_comparable([folder, other])


def test_a_component_of_ones_own(model, tmp_path):
    folder = score(tmp_path / "s", model, batches(), method="gradient", granularity=f"{__name__}.Channel")
    assert folder.manifest.granularity == f"{__name__}.Channel"
    assert all(name.endswith("o_proj") and folder.shape(name) == (32,) for name in folder.layers)
    for name in folder.layers:
        wanted = by_hand(model, name, lambda logits, _: logits.max()).sum(0)
        torch.testing.assert_close(folder.load(name), wanted, rtol=1e-4, atol=1e-6)


def test_neurons_and_channels_in_one_pass(model, tmp_path):
    kinds = ["neuron", f"{__name__}.Channel"]
    folder = score(tmp_path / "s", model, batches(), granularity=kinds)
    assert folder.manifest.granularity == "+".join(kinds)
    for kind in kinds:
        alone = score(tmp_path / kind, model, batches(), granularity=kind)
        assert all(torch.equal(folder.load(name), alone.load(name)) for name in alone.layers)


def test_a_method_of_ones_own(model, tmp_path):
    """Integrated gradients of a model without norms would be complete; here they equal the mean of their steps."""
    method = {"class_path": f"{__name__}.IntegratedGradients", "init_args": {"steps": 1}}
    one, plain = (score(tmp_path / str(i), model, batches(), method=m) for i, m in enumerate((method, "gradient")))
    assert one.manifest.method_args == {"steps": 1}
    assert all(torch.equal(one.load(name), plain.load(name)) for name in one.layers)

    method["init_args"]["steps"] = 3
    three = score(tmp_path / "three", model, batches(), method=method)
    words, name = model.get_input_embeddings(), three.layers[0]
    module, total = model.get_submodule(name), 0
    module.weight.requires_grad_(True)
    for sample in SAMPLES:
        module.weight.grad, forward = None, words.forward
        for step in (1, 2, 3):
            with swapped(words, "forward", lambda ids, f=step / 3, forward=forward: forward(ids) * f):
                (model(sample[None]).logits[0, -1].max() / 3).backward()
        total = total + (module.weight * module.weight.grad).detach().abs().sum(1) / len(SAMPLES)
    module.weight.grad = None
    module.weight.requires_grad_(False)
    torch.testing.assert_close(three.load(name), total, rtol=1e-4, atol=1e-6)
    with pytest.raises(InputError, match="method_args="):
        require_comparable([one, three])


def test_arguments_of_a_built_in_method(model, tmp_path):
    conservative = {"class_path": "lrp", "init_args": {"rules": "cp"}}
    one, other = (score(tmp_path / str(i), model, batches(), method=m) for i, m in enumerate((conservative, "lrp")))
    assert (one.manifest.method, one.manifest.method_args) == ("lrp", {"rules": "cp"})
    assert not torch.equal(one.load(one.layers[0]), other.load(other.layers[0]))
    with pytest.raises(InputError, match="rules='other' is unknown"):
        Lrp("other")


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"method": "lpr"}, r"model\.method='lpr' is unknown; did you mean lrp"),
        ({"method": "no.such.Thing"}, "there is no such class"),
        ({"method": f"{__name__}.Channel"}, "is not a Method"),
        ({"method": {"class_path": "lrp", "init_args": {"rule": "cp"}}}, "its arguments do not fit"),
        ({"method": {"path": "lrp"}}, "give a name, or class_path"),
        ({"method": None}, "give a name, or class_path"),
        ({"target": "answers"}, r"model\.target='answers' is unknown; did you mean answer"),
        ({"granularity": []}, "empty list"),
        ({"granularity": ["neuron", "weight"]}, "need two runs"),
        ({"method": "wanda", "target": f"{__name__}.Labelled"}, "attributes no target"),
        ({"method": "wanda", "signed": True}, r"model\.signed=true has no effect"),
        ({"method": f"{__name__}.Longest", "squares": True}, r"model\.squares=true has no effect"),
        ({"part": "1/2", "shard": "2/2"}, "two names of one setting"),
        ({"part": "1/2", "method": "random"}, "needs no sample"),
    ],
)
def test_refused_before_a_model_is_loaded(settings, match):
    with pytest.raises(InputError, match=match) as caught:
        ScoringModule(**settings)
    assert "\n" not in str(caught.value)


# --- fused maps -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["phi3", "glm4"])
def test_a_fused_maps_neurons_are_counted_once(tmp_path, family):
    model = tiny(family).requires_grad_(False)
    first = mlps(model)[0]
    with torch.no_grad():  # 24 gates and 24 neurons; 5 of the gates and 2 of the neurons have scores of 0
        model.get_submodule(first.up).weight[:5] = 0
        model.get_submodule(first.up).weight[24:26] = 0
    folder = score(tmp_path / "s", model, batches(), method="magnitude")
    values = {name: folder.load(name) for name in folder.layers}
    stats = folder.manifest.layers
    assert all(len(scores) == 48 for scores in values.values())
    for name, scores in values.items():
        assert stats[name].sum == pytest.approx(float(scores[24:].double().sum()))
    assert stats[first.up].zero == 2
    assert folder.manifest.total_relevance == pytest.approx(sum(float(v[24:].double().sum()) for v in values.values()))
    audit = audit_folder(folder)
    checks = {check.name: check for check in audit.checks}
    assert (audit.num_scores, audit.counts["zero"]) == (48, 2)
    assert checks["integrity"].status == "pass"
    assert "4.17%" in checks["zeros"].reason.replace(" ", "")


def test_the_total_is_the_mean_of_the_samples_totals(tmp_path):
    model = tiny("phi3").requires_grad_(False)
    folder = score(tmp_path / "s", model, batches())
    relevance = [sample.relevance for sample in folder.samples()]
    assert sum(relevance) / 4 == pytest.approx(folder.manifest.total_relevance, rel=1e-5)
    wanted = sum(float(folder.load(name)[24:].double().sum()) for name in folder.layers)
    assert folder.manifest.total_relevance == pytest.approx(wanted)


# --- records and manifests --------------------------------------------------------------------------------------------


def test_a_record_is_read_as_it_was_written():
    record = {"id": "a", "num_tokens": 3, "ending": "cut", "relevance": 2.0, "logit": 1.0, "target": 7, "other": [1]}
    sample = ScoredSample.from_json(record)
    assert (sample.relevance, sample.first_token_share, sample.more["target"]) == (2.0, None, 7)
    assert sample.to_json() == record


def test_a_manifest_of_an_earlier_version(tmp_path):
    """It names no target, and its figures are of all rows."""
    folder = write(tmp_path / "s", random_scores(1))
    data = json.loads((folder.path / "manifest.json").read_text())
    del data["sha256"], data["target"]
    name = folder.layers[0]
    data |= {"neuron_rows": {name: [3, 7]}, "note": "kept"}
    manifest = FORMAT.parse(data, "m")
    assert (manifest.target, manifest.neuron_rows, manifest.extra) == ("predicted", {name: [3, 7]}, {"note": "kept"})
    assert manifest.layers[name].rows is None
    assert manifest.num_scores == 21
    data["layers"][name]["rows"] = [5, 9]
    with pytest.raises(InputError, match=r"rows of layer .* are \[5, 9\]"):
        FORMAT.parse(data, "m")


def test_an_unlisted_family_is_tried_on_request():
    from sparc3_pl.scoring.score_run import as_unlisted

    assert as_unlisted("lrp") == {"class_path": "lrp", "init_args": {"unlisted": True}}
    own = {"class_path": "extensions.Composite", "init_args": {"unlisted": True}}
    assert as_unlisted("extensions.Composite") == own
    spec = {"class_path": "relevance_patching", "init_args": {"rules": "attn"}}
    assert as_unlisted(spec)["init_args"] == {"rules": "attn", "unlisted": True}
    assert ScoringModule(unlisted_family=True).request.method.arguments == {"unlisted": True}
    for method in ("wanda", {"class_path": "gradient"}):
        with pytest.raises(InputError, match=r"unlisted_family=true: method (wanda|gradient) scores any"):
            ScoringModule(method=method, unlisted_family=True)
