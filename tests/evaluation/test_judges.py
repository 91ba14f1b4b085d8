"""Judges on a tiny random classifier in Detoxify's checkpoint form, compared with Detoxify itself."""

import hashlib
import itertools
import json
import pickle
from typing import get_type_hints

import pytest
import torch
from judge_folder import judge_folder, save

from sparc3_pl.errors import InputError
from sparc3_pl.evaluation.judges import ClassifierJudge, DetoxifyJudge, SequenceJudge, describe_judge, judged

TEXTS = ["you are a bad idiot", "nice day", "", "this is the house that we hate and hate and hate", "a"]


@pytest.fixture
def folder(tmp_path):
    return judge_folder(tmp_path)


def judge_of(folder, **kwargs):
    return DetoxifyJudge(checkpoint=str(folder / "judge.ckpt"), config_path=str(folder), **kwargs)


def test_scores_are_those_of_detoxify_one_text_at_a_time(folder):
    from detoxify import Detoxify

    short = [t for t in TEXTS if len(t.split()) < 10]  # Detoxify itself cannot cut to this model's 12 positions
    theirs = Detoxify(checkpoint=str(folder / "judge.ckpt"), huggingface_config_path=str(folder))
    ours = judge_of(folder).score(short)
    assert list(ours) == ["toxicity", "identity_attack"]
    for i, text in enumerate(short):
        for label, score in theirs.predict(text).items():
            assert float(ours[label][i]) == pytest.approx(score, abs=1e-6)


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_order_and_batch_size_change_nothing(folder, batch_size):
    want = judge_of(folder).score(TEXTS)
    found = judge_of(folder, batch_size=batch_size).score(TEXTS[::-1])
    for label in want:
        torch.testing.assert_close(found[label].flip(0), want[label], atol=1e-6, rtol=0)


def test_half_precision_is_near_and_overflow_is_read_again(folder, monkeypatch):
    """As on a GPU, which is not here."""
    want = judge_of(folder).score(TEXTS)["toxicity"]
    assert "dtype" not in describe_judge(judge_of(folder))
    assert judge_of(folder, device="cuda:1").dtype == torch.float16
    monkeypatch.setattr(SequenceJudge, "dtype", torch.float16)
    judge = judge_of(folder)
    found = judge.score(TEXTS)["toxicity"]
    assert next(judge._loaded[0].parameters()).dtype == torch.float16
    assert 0 < float((found - want).abs().max()) < 0.01
    assert describe_judge(judge)["dtype"] == "float16"
    model = judge._loaded[0]
    inner = model.forward

    def overflowing(**inputs):
        out = inner(**inputs)
        if model.dtype == torch.float16:
            out.logits[0] = float("inf")
        return out

    monkeypatch.setattr(model, "forward", overflowing)
    torch.testing.assert_close(judge.score(TEXTS)["toxicity"], want, atol=0.01, rtol=0)


def test_no_text_one_text_and_a_text_too_long(folder):
    judge = judge_of(folder)
    assert {k: v.shape for k, v in judge.score([]).items()} == {"toxicity": (0,), "identity_attack": (0,)}
    assert judge.score(["a"])["toxicity"].shape == (1,)
    long = "hate " * 100
    torch.testing.assert_close(judge.score([long])["toxicity"], judge.score(["hate " * 10])["toxicity"])


def test_old_position_ids_are_no_weights(folder):
    state = torch.load(folder / "judge.ckpt", weights_only=True)["state_dict"]
    want = judge_of(folder).score(TEXTS)["toxicity"]
    save(folder / "judge.ckpt", state | {"bert.embeddings.position_ids": torch.arange(12)[None]})
    torch.testing.assert_close(judge_of(folder).score(TEXTS)["toxicity"], want)


def test_weights_under_a_wrong_name_are_refused(folder):
    state = torch.load(folder / "judge.ckpt", weights_only=True)["state_dict"]
    save(folder / "judge.ckpt", {f"model.{k}": v for k, v in state.items()})
    with pytest.raises(InputError, match="is missing"):
        judge_of(folder).score(["a"])


def test_code_in_a_checkpoint_is_not_run(folder):
    class Trap:
        def __reduce__(self):
            return (folder.joinpath("trapped").touch, ())

    with (folder / "judge.ckpt").open("wb") as stream:
        pickle.dump({"config": {}, "state_dict": Trap()}, stream)
    with pytest.raises(InputError, match="without running code"):
        judge_of(folder).score(["a"])
    assert not (folder / "trapped").exists()


def test_a_tokenizer_that_reads_no_word_is_refused(folder):
    data = json.loads((folder / "tokenizer.json").read_text())
    data["model"]["vocab"] = {w: i for w, i in data["model"]["vocab"].items() if i < 4}
    (folder / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match="reads no word"):
        judge_of(folder).score(["a"])


@pytest.mark.parametrize("damage", [b"", b"not a checkpoint"])
def test_a_damaged_checkpoint_is_refused(folder, damage):
    (folder / "judge.ckpt").write_bytes(damage)
    with pytest.raises(InputError, match=r"judge\.ckpt"):
        judge_of(folder).score(["a"])


def test_files_that_are_not_there_are_named(folder):
    with pytest.raises(InputError, match=r"none\.ckpt"):
        DetoxifyJudge(checkpoint=str(folder / "none.ckpt")).score(["a"])
    with pytest.raises(InputError, match=r"no config\.json"):
        DetoxifyJudge(checkpoint=str(folder / "judge.ckpt"), config_path=str(folder / "elsewhere")).score(["a"])
    with pytest.raises(InputError, match="both set"):
        DetoxifyJudge(variant="original", checkpoint="x")
    with pytest.raises(InputError, match="original-small"):
        DetoxifyJudge(variant="orginal").score(["a"])


def test_an_unreachable_download_says_the_way_out(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: (_ for _ in ()).throw(OSError("no route")))
    with pytest.raises(InputError, match=r"cannot be fetched \(no route\).*judge\.checkpoint"):
        DetoxifyJudge(variant="original").score(["a"])


def test_a_downloaded_checkpoint_is_named_by_its_digest(folder, monkeypatch, tmp_path):
    checkpoint = torch.load(folder / "judge.ckpt", weights_only=True)
    checkpoint["config"].setdefault("arch", {"args": {}})["args"]["model_type"] = str(folder)
    (tmp_path / "checkpoints").mkdir()
    path = tmp_path / "checkpoints" / "published.ckpt"
    torch.save(checkpoint, path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("detoxify.detoxify.MODEL_URLS", {"original": "https://example.org/published.ckpt"})
    described = describe_judge(DetoxifyJudge(variant="original"))
    assert described["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_classifiers_with_other_weights_are_told_apart(folder):
    from transformers import AutoConfig, AutoModelForSequenceClassification

    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
        found.append(describe_judge(ClassifierJudge(str(folder), "LABEL_1")))
    assert found[0] == found[1] != found[2]


def test_a_judges_secrets_are_not_described():
    judge = LengthJudge()
    judge.api_key, judge.endpoint, judge.max_tokens = "abcdef123456", "https://me:pass123@host/v1", 7
    described = describe_judge(judge)
    assert described["max_tokens"] == 7
    assert described["endpoint"].endswith("@host/v1")
    assert not any(secret in str(described) for secret in ("abcdef123456", "pass123"))


def test_made_once_and_late(folder, monkeypatch):
    judge, calls = judge_of(folder), []
    inner = judge._load
    monkeypatch.setattr(judge, "_load", lambda: calls.append(1) or inner())
    assert not calls
    judge.score(["a"])
    judge.score(["a"])
    assert len(calls) == 1


def test_classifier_reads_one_label(folder):
    from transformers import AutoConfig, AutoModelForSequenceClassification, pipeline

    config = AutoConfig.from_pretrained(folder)
    config.id2label, config.label2id = {0: "fine", 1: "toxic"}, {"fine": 0, "toxic": 1}
    model = AutoModelForSequenceClassification.from_config(config)
    model.load_state_dict(torch.load(folder / "judge.ckpt", weights_only=True)["state_dict"])
    model.save_pretrained(folder)
    found = ClassifierJudge(str(folder), "toxic").score(TEXTS[:2])
    theirs = pipeline("text-classification", model=str(folder), top_k=None)
    for text, score in zip(TEXTS, found["toxic"].tolist(), strict=False):
        assert score == pytest.approx(next(d["score"] for d in theirs([text])[0] if d["label"] == "toxic"), abs=1e-6)
    with pytest.raises(InputError, match="'fine', 'toxic'"):
        ClassifierJudge(str(folder), "insult").score(["a"])


def test_a_classifier_without_a_trained_head_is_refused(folder):
    from transformers import AutoConfig, AutoModel

    AutoModel.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    with pytest.raises(InputError, match=r"lacks the weight 'classifier\.bias'"):
        ClassifierJudge(str(folder), "LABEL_1").score(["a"])


class LengthJudge:
    """A user's judge: no base class."""

    def __init__(self, scale: float = 0.01):
        self.scale = scale

    def score(self, texts):
        return {"length": torch.tensor([len(t) * self.scale for t in texts])}


def test_a_users_class_is_a_judge():
    assert judged(LengthJudge(), ["ab", ""])["length"].tolist() == pytest.approx([0.02, 0.0])
    assert describe_judge(LengthJudge())["scale"] == 0.01


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ({"t": torch.tensor([0.5, 1.5])}, "'t' of text 1 is 1.5"),
        ({"t": torch.tensor([float("nan"), 0.5])}, "'t' of text 0 is nan"),
        ({"t": torch.tensor([0.5])}, "one score per text"),
        ([0.5, 0.5], "dict of label"),
        ({}, "dict of label"),
    ],
)
def test_a_judge_that_breaks_its_contract_is_named(returned, message):
    judge = LengthJudge()
    judge.score = lambda texts: returned
    with pytest.raises(InputError, match=message):
        judged(judge, ["a", "b"])


def test_a_judge_by_class_path_needs_no_annotations():
    from jsonargparse import ArgumentParser

    from sparc3_pl.evaluation.module import EvaluationModule

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--judge", type=get_type_hints(EvaluationModule.__init__)["judge"])
    for name in ("test_judges.LengthJudge", "sparc3_pl.evaluation.judges.DetoxifyJudge", "DetoxifyJudge"):
        config = parser.parse_args([f"--judge={name}"])
        assert type(parser.instantiate_classes(config).judge).__name__ == name.rpartition(".")[2]


@pytest.mark.realdata
def test_shared_judge_equals_detoxify(real_data, tmp_path):
    from detoxify import Detoxify

    folder = real_data / "toxicity_judge"
    path = folder / "bert-tiny-toxicity.detoxify.ckpt"
    texts = ["You are a stupid idiot and I hate you.", "have a nice day, friend", "", "word " * 900]
    with (real_data / "rtp_dev.jsonl").open(encoding="utf-8") as stream:
        texts += [json.loads(line)["prompt"]["text"] for line in itertools.islice(stream, 40)]
    ours = judged(DetoxifyJudge(checkpoint=str(path), config_path=str(folder)), texts)["toxicity"].tolist()
    checkpoint = torch.load(path, weights_only=True)  # Detoxify asks for the folder that it was made in: tell it ours
    checkpoint["config"]["arch"]["args"]["model_type"] = str(folder)
    torch.save(checkpoint, tmp_path / "judge.ckpt")
    theirs = Detoxify(checkpoint=str(tmp_path / "judge.ckpt"), huggingface_config_path=str(folder))
    assert ours == pytest.approx([theirs.predict(text)["toxicity"] for text in texts], abs=1e-5)
    assert ours[:3] == pytest.approx([0.99, 0.02, 0.03], abs=0.02)
