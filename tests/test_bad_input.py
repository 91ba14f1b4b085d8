"""Whatever the user gets wrong: exit code 2, one line that says what, which value and the way out, nothing written."""

import errno
import gzip
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny_models import tiny
from tiny_tokenizers import sentences, tiny_tokenizer

from sparc3_pl.cli import main

QUIET = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.enable_progress_bar=false"]


@dataclass(frozen=True)
class World:
    """Everything in order: what the cases break copies of."""

    root: Path
    here: Path
    """The case's own folder, and its working folder."""

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def texts(self) -> Path:
        return self.root / "texts.jsonl"

    def copy(self, name: str) -> Path:
        """A copy that may be broken."""
        source, target = self.root / name, self.here / name
        return Path(shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target))

    def file(self, name: str, content: str | bytes) -> Path:
        path = self.here / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def given(self, option: str, name: str, content: str | bytes) -> str:
        """``--option=FILE`` with a new file."""
        return f"--{option}={self.file(name, content)}"

    def rows(self, name: str, rows: list) -> Path:
        return self.file(name, "".join(json.dumps(row) + "\n" for row in rows))

    # --- commands that would do, but for what a case adds ---

    def score(self, *words: object) -> list[str]:
        data = [f"--data.source={self.texts}", "--data.seq_len=16", "--data.num_samples=2"]
        return ["score", f"--model.pretrained={self.model}", *data, *QUIET, "--output=out", *map(str, words)]

    def eval(self, *words: object) -> list[str]:
        data = [f"--data.text_source={self.root / 'text.txt'}", f"--data.prompts_source={self.root / 'prompts.jsonl'}"]
        sizes = ["--model.max_length=32", "--model.max_new_tokens=2", "--data.prompts_field=p"]
        judge = ["--model.judge=DetoxifyJudge", "--model.judge.variant=demo"]
        model = f"--model.pretrained={self.model}"
        return ["eval", model, *judge, *data, *sizes, *QUIET, "--output=out", *map(str, words)]

    def prune(self, *words: object) -> list[str]:
        folders = [f"--general={self.root / 'general'}", f"--behaviour={self.root / 'behaviour'}"]
        return ["prune", *folders, "--num_neurons=3", "--output=plan.json", *map(str, words)]

    def model_with(self, **config: object) -> Path:
        """The model's folder with a changed config.json."""
        folder = self.copy("model")
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
        return folder

    def weights_with(self, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
        """The model's folder with changed weights."""
        folder = self.copy("model")
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return folder

    def json_with(self, name: str, file: str = "", **values: object) -> Path:
        """A copy of a result with changed keys in its JSON, the digest made to fit."""
        copied = self.copy(name)
        path = copied / file if file else copied
        content = json.loads(path.read_text()) | values
        content.pop("sha256", None)
        path.write_text(json.dumps(content))
        return copied


def flipped(path: Path, place: float = 0.9) -> None:
    """Changes one bit of a file."""
    data = bytearray(path.read_bytes())
    data[int(len(data) * place)] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    model = tiny("llama", vocab_size=320, max_position_embeddings=64, bos_token_id=0, eos_token_id=1)
    model.save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    good = World(folder, folder)
    good.rows("texts.jsonl", [{"text": text, "score": i, "nothing": None} for i, text in enumerate(sentences(9))])
    good.rows("prompts.jsonl", [{"p": sentence[:-6]} for sentence in sentences(3)])
    good.file("text.txt", " ".join(sentences(9)))
    for seed, name in enumerate(("general", "behaviour")):
        assert main(good.score(f"--output={folder / name}", f"--data.seed={seed}", "--trainer.logger=false")) == 0
    assert main(good.prune(f"--output={folder / 'plan.json'}")) == 0
    assert main(good.eval(f"--output={folder / 'before'}", "--trainer.logger=false")) == 0
    part = [f"--output={folder / 'part'}", "--part=1/2", "--trainer.logger=false"]
    assert main(good.score(*part)) == 0
    return folder


CASES: dict[str, tuple[Callable[[World], list[str]], list[str]]] = {}
"""By name: makes the command line, and what the one line must contain (regular expressions)."""


def case(*contains: str) -> Callable:
    def register(make: Callable[[World], list[str]]) -> Callable[[World], list[str]]:
        CASES[make.__name__.replace("_", " ").strip()] = (make, list(contains))
        return make

    return register


# --- the command line and its files -----------------------------------------------------------------------------------


@case("data.num_sample", "did you mean.*data.num_samples")
def misspelt_option(w: World):
    return w.score("--data.num_sample=3")


@case("data.num_sampels", "did you mean.*num_samples", r"c\.yaml")
def misspelt_key_in_a_file(w: World):
    return w.score(w.given("config", "c.yaml", "data:\n  num_sampels: 3\n"))


@case("max_length", r"c\.yaml")
def a_key_of_another_command_in_a_file(w: World):
    return w.score(w.given("config", "c.yaml", "model:\n  max_length: 3\n"))


@case("invalid choice|unknown|not.*command", "scroe")
def unknown_command(w: World):
    return ["scroe"]


@case("data.batch_size", "two")
def wrong_type(w: World):
    return w.score("--data.batch_size=two")


@case("num_samples", "many", r"c\.yaml")
def wrong_type_in_a_file(w: World):
    return w.score(w.given("config", "c.yaml", "data:\n  num_samples: many\n"))


@case(r"none\.yaml")
def config_that_is_not_there(w: World):
    return w.score("--config=none.yaml")


@case(r"bad\.yaml", "line 2")
def config_that_is_no_yaml(w: World):
    return w.score(w.given("config", "bad.yaml", "data:\n  source: [a, b\nmodel: }\n"))


@case(r"list\.yaml")
def config_that_is_a_list(w: World):
    return w.score(w.given("config", "list.yaml", "- a\n- b\n"))


@case("model.method", "lpr", "lrp")
def unknown_method(w: World):
    return w.score("--model.method=lpr")


@case("granularity", "layer", "neuron")
def unknown_granularity(w: World):
    return w.score("--model.granularity=layer")


@case("dtype", "int8", "float32")
def unknown_dtype(w: World):
    return w.score("--model.dtype=int8")


@case("signed", "weight")
def signed_weight_scores(w: World):
    return w.score("--model.signed=true", "--model.granularity=weight")


@case("squares", "wanda")
def squares_of_wanda(w: World):
    return w.score("--model.squares=true", "--model.method=wanda")


@case("batch_size=0", "1 or more")
def no_batch_size(w: World):
    return w.score("--data.batch_size=0")


@case("num_samples=-3", "1 or more")
def negative_samples(w: World):
    return w.score("--data.num_samples=-3")


@case("seq_len=1", "raise data.seq_len")
def windows_without_room(w: World):
    return w.score("--data.seq_len=1")


@case("seq_len=100", "context of 64")
def windows_longer_than_the_context(w: World):
    return w.score("--data.seq_len=100")


@case("limit_predict_batches=0", "at least 1")
def no_batches(w: World):
    return w.score("--trainer.limit_predict_batches=0")


@case("rank_timeout=-1", "positive")
def negative_timeout(w: World):
    return w.score("--trainer.rank_timeout=-1")


@case("checkpoint_every=0", "1 batch or more")
def no_checkpoint_interval(w: World):
    return w.score("--checkpoint_every=0")


@case("accelerator|gpu|GPU|CUDA")
def no_such_accelerator(w: World):
    return w.score("--trainer.accelerator=gpu")


@case("strategy", "dpp")
def unknown_strategy(w: World):
    return w.score("--trainer.strategy=dpp")


@case("devices", "-2|0")
def no_devices(w: World):
    return w.score("--trainer.devices=0")


# --- data -------------------------------------------------------------------------------------------------------------


@case(r"none\.jsonl", "no such|not there|does not exist|nothing")
def data_that_is_not_there(w: World):
    return w.score("--data.source=none.jsonl")


@case("empty", "file is empty")
def empty_data(w: World):
    return w.score(w.given("data.source", "empty.jsonl", ""))


@case("line 2 is not JSON", "repair")
def malformed_line(w: World):
    return w.score(w.given("data.source", "bad.jsonl", '{"text": "a"}\n{"text": \n'))


@case("line 2", "not an object")
def a_line_that_is_no_object(w: World):
    return w.score(w.given("data.source", "bad.jsonl", '{"text": "a"}\n3\n'))


@case("breaks off|damaged")
def damaged_archive(w: World):
    packed = gzip.compress(w.texts.read_bytes())
    return w.score(f"--data.source={w.file('bad.jsonl.gz', packed[: len(packed) // 2])}")


@case("UTF-8|utf-8")
def not_text(w: World):
    return w.score(w.given("data.source", "bad.txt", b"caf\xe9 " * 50))


@case("unknown kind of file", r"\.jsonl")
def unknown_kind_of_file(w: World):
    return w.score(w.given("data.source", "texts.docx", "a"))


@case("no field 'txet'", "there are: .*text")
def missing_field(w: World):
    return w.score("--data.text_field=txet")


@case("no field 'scores'", "there are: .*score")
def missing_field_in_the_filter(w: World):
    return w.score("--data.filter=scores > 1")


@case("data.filter", "score >> 1", "FIELD OP VALUE")
def malformed_filter(w: World):
    return w.score("--data.filter=score >> 1")


@case("cannot compare", "text")
def filter_of_another_type(w: World):
    return w.score("--data.filter=text > 3")


@case("9 records hold a null", "windows")
def all_scores_null(w: World):
    return w.score("--data.filter=nothing >= 0.9")


@case("num_samples=500", "only .* windows", "lower data.num_samples")
def fewer_samples_than_asked(w: World):
    return w.score("--data.num_samples=500")


@case("only 0 windows", "lower .*data.seq_len")
def text_shorter_than_a_window(w: World):
    return w.score(f"--data.source={w.rows('short.jsonl', [{'text': 'a'}])}")


@case("context of 64", "max_tokens")
def a_text_longer_than_the_context(w: World):
    rows = w.rows("long.jsonl", [{"text": " ".join(sentences(40))}])
    return w.score(f"--data.source={rows}", "--data.seq_len=null", "--data.num_samples=1")


@case("data.match", "no samples.jsonl")
def match_without_samples(w: World):
    (w.here / "nothing").mkdir()
    return w.score(f"--data.match={w.here / 'nothing'}")


@case("unknown|no such", "demo:promts", "demo:prompts")
def misspelt_demo_corpus(w: World):
    return w.score("--data.source=demo:promts")


@case("[Hh]ub|offline", "local file")
def unreachable_hub_data(w: World):
    return w.score("--data.source=nobody/nothing")


@case("partition", "test")
def unknown_partition(w: World):
    return w.score("--data.partition=test")


# --- models -----------------------------------------------------------------------------------------------------------


@case(r"nowhere", "no such|not there|does not exist|nothing")
def model_that_is_not_there(w: World):
    return w.score("--model.pretrained=./nowhere")


@case("hub|offline", "local folder")
def unreachable_hub_model(w: World):
    return w.score("--model.pretrained=nobody/nothing")


@case("config.json")
def a_folder_that_is_no_model(w: World):
    (w.here / "folder").mkdir()
    return w.score(f"--model.pretrained={w.here / 'folder'}")


@case("tokenizer")
def model_without_tokenizer(w: World):
    folder = w.copy("model")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    return w.score(f"--model.pretrained={folder}")


@case("bert|BERT|causal|encoder")
def encoder_only_model(w: World):
    return w.score(f"--model.pretrained={w.model_with(model_type='bert', architectures=['BertModel'])}")


@case("causal|t5|T5")
def encoder_decoder_model(w: World):
    folder = w.model_with(model_type="t5", architectures=["T5ForConditionalGeneration"])
    return w.score(f"--model.pretrained={folder}")


@case("model_type|nonsense")
def unknown_architecture(w: World):
    return w.score(f"--model.pretrained={w.model_with(model_type='nonsense', architectures=['Nonsense'])}")


@case("vocabular|embedding|token")
def vocabulary_mismatch(w: World):
    folder = w.copy("model")
    small = tiny("llama", vocab_size=64, max_position_embeddings=64)
    small.save_pretrained(folder)
    return w.score(f"--model.pretrained={folder}")


@case("NaN|not finite|nan", "down_proj")
def nan_weights(w: World):
    folder = w.weights_with(lambda t: t["model.layers.0.mlp.down_proj.weight"].fill_(float("nan")))
    return w.score(f"--model.pretrained={folder}")


@case("up_proj", "lack|missing|not in")
def missing_weights(w: World):
    folder = w.weights_with(lambda t: t.pop("model.layers.0.mlp.up_proj.weight"))
    return w.score(f"--model.pretrained={folder}")


@case("safetensors|cannot be")
def cut_weights(w: World):
    folder = w.copy("model")
    cut(folder / "model.safetensors")
    return w.score(f"--model.pretrained={folder}")


@case("config.json|JSON|json")
def damaged_config(w: World):
    folder = w.copy("model")
    cut(folder / "config.json")
    return w.score(f"--model.pretrained={folder}")


@case("gguf|GGUF")
def a_file_that_is_no_gguf(w: World):
    return w.score(w.given("model.pretrained", "model.gguf", b"not a model" * 100))


@case(r"\*\.up_prjo", r"nearest: .*up_proj")
def pattern_that_matches_nothing(w: World):
    return w.score('--model.targets=["*.up_prjo"]')


@case("rule|lrp|AttnLRP", "gradient")
def a_family_without_rules(w: World):
    tiny("gptj", n_embd=32, n_layer=1, n_head=4, rotary_dim=4, n_positions=64, vocab_size=320).save_pretrained(
        w.here / "gptj"
    )
    tiny_tokenizer().save_pretrained(w.here / "gptj")
    return w.score(f"--model.pretrained={w.here / 'gptj'}", "--model.targets=null")


# --- outputs ----------------------------------------------------------------------------------------------------------


@case("already exists", "--overwrite")
def existing_output(w: World):
    shutil.copytree(w.root / "general", w.here / "out")
    return w.score()


@case("not an earlier result", "another output")
def overwriting_something_else(w: World):
    (w.here / "out").mkdir()
    (w.here / "out" / "thesis.tex").write_text("do not lose me")
    return w.score("--overwrite")


@case("is a file", "another output")
def output_that_is_a_file(w: World):
    return w.score(w.given("output", "out.txt", "mine"), "--overwrite")


@case("is not a writable folder", "another output")
def output_below_a_file(w: World):
    return w.score(f"--output={w.file('file', 'mine')}/below")


@case("is a folder", "file name")
def plan_that_is_a_folder(w: World):
    (w.here / "plan.json").mkdir()
    return w.prune()


@case("already exists", "--overwrite")
def existing_plan(w: World):
    w.file("plan.json", "{}")
    return w.prune()


# --- pruning ----------------------------------------------------------------------------------------------------------


@case("num_neurons=500", "only 48|48 ")
def more_neurons_than_there_are(w: World):
    return w.prune("--num_neurons=500")


@case("num_neurons=-1|num_neurons.*-1")
def negative_neurons(w: World):
    return w.prune("--num_neurons=-1")


@case("num_neurons|num_weights|share")
def no_size(w: World):
    return ["prune", f"--general={w.root / 'general'}", f"--behaviour={w.root / 'behaviour'}", "--output=plan.json"]


@case("behaviour")
def no_behaviour(w: World):
    return ["prune", f"--general={w.root / 'general'}", "--num_neurons=3", "--output=plan.json"]


@case("general")
def no_general(w: World):
    return ["prune", f"--behaviour={w.root / 'behaviour'}", "--num_neurons=3", "--output=plan.json"]


@case("no such score folder", "check the path")
def scores_that_are_not_there(w: World):
    return w.prune("--behaviour=nowhere")


@case("squares", "score again")
def t_contrast_without_squares(w: World):
    return w.prune("--contrast=t")


@case("contrast", "diference", "difference")
def unknown_contrast(w: World):
    return w.prune("--contrast=diference")


@case("method=lrp|method='lrp'|method", "gradient")
def mixed_methods(w: World):
    return w.prune(f"--behaviour={w.json_with('behaviour', 'manifest.json', method='gradient')}")


@case("fingerprint")
def scores_of_another_model(w: World):
    model = json.loads((w.root / "behaviour" / "manifest.json").read_text())["model"]
    other = w.json_with("behaviour", "manifest.json", model=model | {"fingerprint": "sha256:0000"})
    return w.prune(f"--behaviour={other}")


@case("format_version=0", "score again")
def scores_of_an_old_version(w: World):
    return w.prune(f"--behaviour={w.json_with('behaviour', 'manifest.json', format_version=0)}")


@case("format_version=9", "update")
def scores_of_a_newer_version(w: World):
    return w.prune(f"--behaviour={w.json_with('behaviour', 'manifest.json', format_version=9)}")


@case(r"scores\.safetensors", "cut short|damaged")
def cut_scores(w: World):
    folder = w.copy("behaviour")
    cut(folder / "scores.safetensors")
    return w.prune(f"--behaviour={folder}")


@case(r"scores\.safetensors", "sha256")
def flipped_scores(w: World):
    folder = w.copy("behaviour")
    flipped(folder / "scores.safetensors")
    return w.prune(f"--behaviour={folder}")


@case(r"manifest\.json", "sha256|JSON")
def flipped_manifest(w: World):
    folder = w.copy("behaviour")
    flipped(folder / "manifest.json", 0.4)
    return w.prune(f"--behaviour={folder}")


@case("missing")
def incomplete_scores(w: World):
    folder = w.copy("behaviour")
    (folder / "scores.safetensors").unlink()
    return w.prune(f"--behaviour={folder}")


@case("outside the folder", "refused")
def a_manifest_that_points_elsewhere(w: World):
    layers = json.loads((w.root / "behaviour" / "manifest.json").read_text())["layers"]
    layers = {name: entry | {"file": "../../../etc/passwd"} for name, entry in layers.items()}
    return w.prune(f"--behaviour={w.json_with('behaviour', 'manifest.json', layers=layers)}")


# --- evaluation and comparison ----------------------------------------------------------------------------------------


@case(r"none\.json", "cannot be read|no such|not there")
def plan_that_is_not_there(w: World):
    return w.eval("--plan=none.json")


@case(r"plan\.json", "JSON|sha256")
def flipped_plan(w: World):
    flipped(w.copy("plan.json"), 0.3)
    return w.eval("--plan=plan.json")


@case(r"plan\.json", "JSON")
def cut_plan(w: World):
    cut(w.copy("plan.json"))
    return w.eval("--plan=plan.json")


@case("the plan was made for", "give that model")
def plan_of_another_model(w: World):
    folder = w.weights_with(lambda t: t["model.layers.0.mlp.down_proj.weight"].mul_(2))
    return w.eval(f"--plan={w.root / 'plan.json'}", f"--model.pretrained={folder}")


@case("max_length=100", "at most 64")
def window_longer_than_the_context(w: World):
    return w.eval("--model.max_length=100")


@case("stride=40", "max_length=32")
def stride_longer_than_the_window(w: World):
    return w.eval("--model.stride=40")


@case("temperature=-1", "positive")
def negative_temperature(w: World):
    return w.eval("--model.temperature=-1")


@case("top_p=1.5", "at most 1")
def top_p_above_one(w: World):
    return w.eval("--model.top_p=1.5")


@case("max_new_tokens=0", "at least 1")
def no_new_tokens(w: World):
    return w.eval("--model.max_new_tokens=0")


@case("nothing|text_source|prompts_source")
def nothing_to_evaluate(w: World):
    return w.eval("--data.text_source=null", "--data.prompts_source=null")


@case("num_prompts=50|only 3")
def fewer_prompts_than_asked(w: World):
    return w.eval("--data.num_prompts=50")


@case(r"empty\.txt", "empty")
def empty_text(w: World):
    return w.eval(w.given("data.text_source", "empty.txt", ""))


@case("judge|Judge", "NoJudge")
def unknown_judge(w: World):
    return w.eval("--model.judge=NoJudge")


@case(r"none\.ckpt")
def judge_that_is_not_there(w: World):
    return w.eval("--model.judge=DetoxifyJudge", "--model.judge.variant=null", "--model.judge.checkpoint=none.ckpt")


@case("judge.words='none.txt' cannot be read as text")
def judge_by_words_that_are_not_there(w: World):
    return w.eval("--model.judges={rude: {class_path: WordsJudge, init_args: {words: none.txt}}}")


@case("model.judges='NoJudge': there is no such class")
def unknown_judge_among_several(w: World):
    return w.eval("--model.judges={words: WordsJudge, mine: NoJudge}")


@case("'api_key' cannot name a judge")
def judge_with_the_name_of_a_secret(w: World):
    return w.eval("--model.judges={api_key: WordsJudge}")


@case("judge: variant='demo' and checkpoint='none.ckpt' are both set")
def judge_that_is_named_twice(w: World):
    return w.eval("--model.judge.checkpoint=none.ckpt")


@case(r"results\.json")
def comparing_a_folder_that_is_no_evaluation(w: World):
    return ["compare", f"--before={w.root / 'before'}", f"--after={w.root / 'general'}"]


@case(r"completions\.jsonl", "sha256")
def flipped_completions(w: World):
    folder = w.copy("before")
    flipped(folder / "completions.jsonl")
    return ["compare", f"--before={w.root / 'before'}", f"--after={folder}"]


@case(r"windows\.jsonl", "missing")
def incomplete_evaluation(w: World):
    folder = w.copy("before")
    (folder / "windows.jsonl").unlink()
    return ["compare", f"--before={w.root / 'before'}", f"--after={folder}"]


@case("format_version")
def evaluation_of_an_old_version(w: World):
    folder = w.json_with("before", "results.json", format_version=0)
    return ["compare", f"--before={w.root / 'before'}", f"--after={folder}"]


@case("seed")
def unequal_seeds(w: World):
    other = w.here / "other"
    assert main(w.eval(f"--output={other}", "--model.seed=1", "--trainer.logger=false")) == 0
    return ["compare", f"--before={w.root / 'before'}", f"--after={other}"]


# --- other commands ---------------------------------------------------------------------------------------------------


@case("nowhere")
def auditing_nothing(w: World):
    return ["audit", "nowhere"]


@case("part 2/2 is missing")
def merging_half(w: World):
    return ["merge", str(w.root / "part"), "--output=out"]


@case("nowhere", "shard.json")
def merging_nothing(w: World):
    return ["merge", "nowhere", "--output=out"]


@case("nowhere")
def reporting_nothing(w: World):
    return ["report", "nowhere", "--output=out"]


@case("num_neurons|plan")
def an_experiment_without_size(w: World):
    content = {"output": "exp", "general": {}, "behaviour": {}, "eval_data": {}, "plan": {}}
    return ["run", f"--config={w.file('exp.yaml', yaml.safe_dump(content))}"]


@case("behaviuor|behaviour", r"exp\.yaml|did you mean|required")
def a_misspelt_experiment(w: World):
    content = {"output": "exp", "general": {}, "behaviuor": {"source": "demo"}, "eval_data": {}, "plan": {}}
    return ["run", f"--config={w.file('exp.yaml', yaml.safe_dump(content))}"]


# --- the tests --------------------------------------------------------------------------------------------------------


def tree(*folders: Path) -> dict[str, bytes]:
    """Every file and folder, with what is in it."""
    found = [path for folder in folders for path in sorted(folder.rglob("*"))]
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in found}


def refused(words: list[str], capfd: pytest.CaptureFixture) -> str:
    """The one line."""
    try:
        code = main(words)
    except SystemExit as error:
        code = error.code
    out, err = capfd.readouterr()
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2, f"exit code {code}\n{err}"
    assert len(errors) == 1, err
    assert err.rstrip("\n").endswith(errors[0]), err
    assert "Traceback" not in err + out
    assert out == ""
    return errors[0]


@pytest.fixture
def world(root, tmp_path, monkeypatch) -> World:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return World(root, tmp_path)


@pytest.mark.parametrize("name", CASES)
def test_is_refused_in_one_line(world, capfd, name):
    make, contains = CASES[name]
    words = make(world)
    before = tree(world.here, world.root)
    capfd.readouterr()
    error = refused(words, capfd)
    for pattern in contains:
        assert re.search(pattern, error), f"{pattern!r} is not in: {error}"
    assert len(error) < 600
    assert tree(world.here, world.root) == before


def test_there_are_enough_cases():
    assert len(CASES) >= 60


@pytest.mark.parametrize(("command", "after"), [(c, n) for c in ("score", "eval") for n in (0, 1, 3)] + [("prune", 0)])
def test_a_full_disk_leaves_nothing(world, capfd, monkeypatch, command, after):
    """The ``after``-th file that is flushed does not fit any more."""
    real, count = os.fsync, iter(range(10**6))

    def full(handle: int) -> None:
        if next(count) >= after:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    words = getattr(world, command)("--trainer.logger=false") if command != "prune" else world.prune()
    monkeypatch.setattr(os, "fsync", full)
    error = refused(words, capfd)
    assert "No space left on device" in error
    assert "free some space" in error
    left = [path for path in world.here.iterdir() if not path.name.endswith(".completions.partial")]
    assert left == []  # finished completions are kept for the next run
