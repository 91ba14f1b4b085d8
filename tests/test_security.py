"""Secrets stay out of everything that is written; nothing that is read can run code or reach outside its folder."""

import json
import pickle
import re
import shlex
import socket
import sys
from pathlib import Path

import pytest
from tiny_models import tiny
from tiny_tokenizers import sentences, tiny_tokenizer

import sparc3_pl
from sparc3_pl.cli import main
from sparc3_pl.io.provenance import is_secret_name, redacted, redacted_command

PLANTED = "hf_PlantedInTheEnvironment123"
IN_PATH = "hf_PlantedInAPath4567890"
QUIET = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.enable_progress_bar=false"]


@pytest.fixture
def files(tmp_path, monkeypatch) -> Path:
    """A model and texts in a folder whose name is a token."""
    folder = tmp_path / IN_PATH
    folder.mkdir()
    tiny("llama", vocab_size=320, max_position_embeddings=64, bos_token_id=0, eos_token_id=1).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences(6)))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return folder


def test_planted_tokens_are_nowhere(files, monkeypatch, capfd):
    """Environment, paths and the command line, through score, shards, prune and eval with TensorBoard on."""
    monkeypatch.setenv("HF_TOKEN", PLANTED)
    monkeypatch.setenv("MY_API_KEY", "sesame-open-1234")
    monkeypatch.setattr(sys, "argv", ["sparc3", "score", f"--x={PLANTED}", "https://me:sesame-open-1234@host/a"])
    data = [f"--data.source={files / 'texts.jsonl'}", "--data.seq_len=16", "--data.num_samples=2"]
    score = ["score", f"--model.pretrained={files}", *data, *QUIET]
    assert main([*score, "--output=general"]) == 0
    assert main([*score, "--output=behaviour", "--data.seed=1", "--checkpoint_every=1"]) == 0
    assert main([*score, "--output=part", "--part=1/1"]) == 0
    prune = ["prune", "--general=general", "--behaviour=behaviour", "--num_neurons=2"]
    assert main([*prune, "--output=plan.json"]) == 0
    evaluation = [f"--model.pretrained={files}", "--model.judge=DetoxifyJudge", "--model.judge.variant=demo"]
    prompts = [f"--data.prompts_source={files / 'texts.jsonl'}", "--data.prompts_field=text", "--data.text_source=null"]
    made = ["--plan=plan.json", "--model.max_new_tokens=2", "--output=after", "--allow_overlap"]
    assert main(["eval", *evaluation, *prompts, *made, *QUIET]) == 0
    assert main([*score, f"--data.text_field={PLANTED}", "--output=wrong"]) == 2
    screen = "".join(capfd.readouterr())
    names = [str(path) for path in Path().rglob("*")]
    assert any("events.out.tfevents" in name for name in names)
    assert any(name.endswith("config.yaml") for name in names)
    for secret in (PLANTED, IN_PATH, "sesame-open-1234"):
        assert secret not in screen
        assert not [name for name in names if secret in name]
        assert not [path for path in Path().rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


class KeyJudge:
    """Asks for a key, as a judge behind an interface does."""

    def __init__(self, api_key: str, headers: dict[str, str], max_tokens: int = 5) -> None:
        assert (api_key, headers["Authorization"]) == ("open", "me")

    def score(self, texts, /):
        return {"label": [0.5] * len(texts)}


def test_a_judges_secrets_are_nowhere_and_config_yaml_says_what_is_missing(files, monkeypatch, capfd):
    """Short ones that look like words: known by the key that they stand under, in each way to give them."""
    judge = ["--model.judge=test_security.KeyJudge", "--model.judge.api_key", "open"]
    judge += ["--model.judge.headers", "{Authorization: me, x: visible}"]
    prompts = [f"--data.prompts_source={files / 'texts.jsonl'}", "--data.prompts_field=text", "--data.num_prompts=1"]
    words = [f"--model.pretrained={files}", *judge, *prompts, "--data.text_source=null", "--model.max_new_tokens=1"]
    monkeypatch.setattr(sys, "argv", ["sparc3", "eval", *words])
    assert main(["eval", *words, *QUIET, "--output=out"]) == 0
    assert "visible" in Path("out/config.yaml").read_text()
    written = [path for path in Path().rglob("*") if path.is_file()]
    assert any("events.out.tfevents" in path.name for path in written)
    for path in written:
        content = path.read_bytes()
        assert not re.search(rb"api_key\W+open|Authorization\W+me\b", content), path
    first = Path("out/config.yaml").read_text().splitlines()[0]
    assert first.endswith("give: model.judge.init_args.api_key, model.judge.init_args.headers.Authorization")
    capfd.readouterr()
    with pytest.raises(SystemExit):
        main(["eval", "--config=out/config.yaml", "--output=again"])
    assert "model.judge.init_args.api_key" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("https://user:pass@host/data", "https://***@host/data"),
        ("https://host/data?token=abc123&split=train", "https://host/data?token=***&split=train"),
        ("--token abc", "--token ***"),
        ("/data/hf_models/llama", "/data/hf_models/llama"),
        ("not finite at new token 3", "not finite at new token 3"),
        ("data.max_tokens=3", "data.max_tokens=3"),
        ("me@host.org", "me@host.org"),
        ("https://user:p@ss@host/data", "https://***@host/data"),
        ('{"api_key":"XYZ", "model": "m"}', '{"api_key":"***", "model": "m"}'),
        ("Namespace(api_key='XYZ', n=2)", "Namespace(api_key='***', n=2)"),
        ("Authorization: Bearer XYZ, then", "Authorization: ***, then"),
        ("prompt.token == 'a'", "prompt.token == 'a'"),
        ("the next token: 5", "the next token: 5"),
        ("--hf_token --overwrite", "--hf_token --overwrite"),
    ],
)
def test_what_counts_as_a_secret(text, kept):
    assert redacted(text) == kept
    assert redacted(kept) == kept
    assert redacted({"a": [text, 1, None]}) == {"a": [kept, 1, None]}


SECRET_NAMES = (
    "token hf_token HF_TOKEN apiKey APIKEY api-key secret_key aws_secret_access_key client_secret Authorization "
    "X-Auth-Token passwd accessToken OPENAI_API_KEY hftoken model.judge.init_args.password credentials"
)
OTHER_NAMES = (
    "tokenizer max_new_tokens num_tokens tokens bos_token eos_token first_token key keys author max_tokens token_ids "
    "model.judge.init_args.text_field token.name"
)


def test_names_of_secrets():
    assert [name for name in SECRET_NAMES.split() if not is_secret_name(name)] == []
    assert [name for name in OTHER_NAMES.split() if is_secret_name(name)] == []


def test_what_stands_under_a_secret_name_is_left_out_whatever_it_looks_like():
    value = {"judge": [{"api_key": "abc", "max_new_tokens": 5}], "credentials": {"user": "u", "codes": [1, None, True]}}
    assert redacted(value) == {
        "judge": [{"api_key": "***", "max_new_tokens": 5}],
        "credentials": {"user": "***", "codes": ["***", None, True]},
    }
    assert redacted({"password": 1234, "secret": {"mean": 0.5}}) == {"password": "***", "secret": {"mean": 0.5}}


@pytest.mark.parametrize(
    "words",
    [
        ["--model.judge.init_args.api_key", "XYZ and more"],
        ["--model.judge.init_args.api_key=XYZ"],
        ["api_key=XYZ"],
        ["--model.judge", "{class_path: J, init_args: {api_key: XYZ and more, model: m}}"],
        ['--model.judge={"api_key": "XYZ"}'],
        ["--headers", "{Authorization: Bearer XYZ, X-API-Key: XYZ}"],
        ["https://user:XYZ@host/a"],
    ],
)
def test_a_command_is_told_without_secrets(words):
    told = redacted_command(["sparc3", "eval", *words, "--data.seq_len", "16"])
    assert "XYZ" not in told
    assert "more" not in told
    assert told.startswith("sparc3 eval ")
    assert told.endswith(" --data.seq_len 16")


def test_a_command_without_secrets_is_told_as_it_was_typed():
    words = ["sparc3", "run", "--general", "{source: 'a b', seed: 1}", "--model.tokenizer=t", "--max_new_tokens", "3"]
    assert shlex.split(redacted_command(words)) == words


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "judge.ckpt"])
def test_a_pickle_is_never_run(files, tmp_path, capfd, name):
    bomb = tmp_path / "it-ran"
    words = ["--model.max_new_tokens=1", f"--data.prompts_source={files / 'texts.jsonl'}", "--data.prompts_field=text"]
    if name == "judge.ckpt":
        (files / name).write_bytes(pickle.dumps(Bomb(bomb)))
        words += ["--model.judge=DetoxifyJudge", f"--model.judge.checkpoint={files / name}"]
    else:
        (files / "model.safetensors").unlink()
        (files / name).write_bytes(pickle.dumps(Bomb(bomb)))
    assert main(["eval", f"--model.pretrained={files}", *words, *QUIET, "--data.text_source=null", "--output=out"]) == 2
    assert "Traceback" not in capfd.readouterr().err
    assert not bomb.exists()


def test_no_source_unpickles():
    """torch.load only with weights_only=True; no other way to run what a file says."""
    forbidden = re.compile(
        r"\b(pickle\.loads?|np\.load|joblib|yaml\.load\(|eval\(|exec\(|weights_only=False|cloudpickle)"
    )
    for path in Path(sparc3_pl.__file__).parent.rglob("*.py"):
        text = path.read_text()
        assert not [m[0] for m in forbidden.finditer(text) if m[0] not in ("eval(", "exec(")], path
        assert text.count("torch.load(") == len(re.findall(r"torch\.load\([^)]*weights_only=True", text)), path


def test_no_network_for_local_names(files, monkeypatch):
    """Any attempt to connect would fail the run."""

    def refuse(*args: object) -> None:
        raise AssertionError(f"connected to {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    data = [f"--data.source={files / 'texts.jsonl'}", "--data.seq_len=16", "--data.num_samples=2"]
    assert main(["score", f"--model.pretrained={files}", *data, *QUIET, "--output=out"]) == 0


def test_code_of_a_checkpoint_is_not_run_unasked(files, tmp_path, capfd):
    ran = tmp_path / "it-ran"
    config = json.loads((files / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (files / "config.json").write_text(json.dumps(config))
    (files / "code.py").write_text(f"from pathlib import Path\nPath({str(ran)!r}).touch()\n")
    data = [f"--data.source={files / 'texts.jsonl'}", "--data.seq_len=16"]
    assert main(["score", f"--model.pretrained={files}", *data, *QUIET, "--output=out"]) == 2
    assert "trust_remote_code" in capfd.readouterr().err
    assert not ran.exists()
