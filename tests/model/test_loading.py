import hashlib
import importlib.util
import json
import shutil
import socket
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny, tokens
from tiny_tokenizers import tiny_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

from sparc3_pl.errors import InputError
from sparc3_pl.io.formats import to_json
from sparc3_pl.io.hub import hub_available
from sparc3_pl.model import identity, loading
from sparc3_pl.model.checks import check_plain_weights, check_vocabulary
from sparc3_pl.model.identity import ModelRecord, describe, differing_config, fingerprint, model_config
from sparc3_pl.model.loading import (
    auto_class,
    load_model,
    load_skeleton,
    load_tokenizer,
    load_vocabulary,
    models_kept,
)
from sparc3_pl.model.source import ModelSource

VOCAB = 320


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    tiny("llama", vocab_size=VOCAB).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(whole, tmp_path / "model"))


def source(folder: Path, **options) -> ModelSource:
    return ModelSource(str(folder), **options)


def test_loads_what_was_saved(whole):
    model = load_model(source(whole))
    ids = tokens(2, 9)
    assert torch.equal(model(ids).logits, tiny("llama", vocab_size=VOCAB)(ids).logits)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "auto"])
def test_dtype(whole, dtype):
    expected = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    assert load_model(source(whole, dtype=dtype)).dtype == expected


def test_prints_nothing(whole, capfd):
    load_model(source(whole))
    load_tokenizer(source(whole))
    assert capfd.readouterr() == ("", "")


def test_describe(whole):
    model = load_model(source(whole))
    entry = describe(model, source(whole))
    assert entry == {
        "pretrained": str(whole),
        "revision": None,
        "fingerprint": fingerprint(model),
        "architecture": "LlamaForCausalLM",
        "dtype": "float32",
        "config": model_config(model),
    }
    model.dequantized = "fp8"
    packed = describe(model, source(whole)) | {"evaluated_fingerprint": "f"}
    written = to_json(ModelRecord(**packed))
    assert list(written.items()) == list(packed.items())  # an evaluation's file keeps keys and their order


def test_the_config_tells_models_of_the_same_weights_apart():
    plain, turned = tiny("llama"), tiny("llama")
    turned.config.rope_parameters = {**turned.config.rope_parameters, "rope_theta": 77.0}
    turned.config.transformers_version = turned.config.name_or_path = "another"
    assert fingerprint(plain) == fingerprint(turned)
    here, there = model_config(plain), model_config(turned)
    theta = plain.config.rope_parameters["rope_theta"]
    assert differing_config(here, there) == f"rope_parameters.rope_theta ({theta!r}, here 77.0)"
    assert differing_config(here, here) is None
    assert differing_config({}, here) is None  # entries of earlier versions have no config
    assert differing_config(here, {**here, "added_by_a_newer_library": 1}) is None
    assert json.loads(json.dumps(here)) == here


# --- fingerprint ------------------------------------------------------------------------------------------------------


def test_fingerprint_by_hand(tiny_llama):
    digest = hashlib.sha256()
    for name, value in tiny_llama.state_dict().items():
        digest.update(f"{name} {tuple(value.shape)}\n".encode())
        digest.update(value.bfloat16().view(torch.int16).numpy().tobytes())
    assert fingerprint(tiny_llama) == f"sha256:{digest.hexdigest()}"


def test_fingerprint_does_not_depend_on_dtype(whole):
    assert fingerprint(load_model(source(whole))) == fingerprint(load_model(source(whole, dtype="bfloat16")))


def test_fingerprint_sees_one_weight(tiny_llama):
    before = fingerprint(tiny_llama)
    tiny_llama.model.layers[1].mlp.up_proj.weight.data[3, 4] *= 1.1
    assert fingerprint(tiny_llama) != before


def test_fingerprint_is_kept_until_a_weight_changes(tiny_llama, monkeypatch):
    weight = tiny_llama.model.layers[1].mlp.up_proj.weight
    computed = []
    real = identity.named_values
    monkeypatch.setattr(identity, "named_values", lambda model: computed.append(1) or real(model))
    before = fingerprint(tiny_llama)
    assert fingerprint(tiny_llama) == before
    assert len(computed) == 1
    kept = weight.detach().clone()
    for change in (
        lambda: weight.detach()[3].zero_(),
        lambda: weight.detach()[[3, 4]].copy_(kept[[4, 3]]),
        lambda: weight.detach().copy_(kept[kept.shape[0] - 1 - torch.arange(kept.shape[0])]),  # the same numbers
        lambda: weight.data[0].mul_(2),
    ):
        change()
        assert (fingerprint(tiny_llama) == before) == torch.equal(weight, kept)
    weight.detach().copy_(kept)
    assert fingerprint(tiny_llama) == before


def test_fingerprint_counts_tied_weights_once():
    tied = tiny("qwen2")
    names = [name for name, _ in identity.named_values(tied)]
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


def test_fingerprint_of_an_offloaded_model(tiny_llama):
    accelerate = pytest.importorskip("accelerate")
    before = fingerprint(tiny_llama)
    accelerate.cpu_offload(tiny_llama, execution_device="cpu")
    assert tiny_llama.lm_head.weight.is_meta
    assert fingerprint(tiny_llama) == before


# --- tokenizer --------------------------------------------------------------------------------------------------------


def test_pads_with_the_end_token_on_the_right(whole):
    tokenizer = load_tokenizer(source(whole))
    assert tokenizer.pad_token == "</s>"
    assert tokenizer.padding_side == "right"
    assert tokenizer(["a b c", "a"], padding=True).input_ids[1][-1] == tokenizer.eos_token_id


def test_knows_the_models_context(whole):
    assert load_tokenizer(source(whole)).model_max_length == 64


def test_pads_with_something_whatever_is_missing(folder):
    tiny_tokenizer(bos=False, bos_token=None, eos_token=None).save_pretrained(folder)
    assert load_tokenizer(source(folder)).pad_token_id is not None


def test_check_vocabulary(whole, tiny_llama):
    tokenizer = load_tokenizer(source(whole))
    check_vocabulary(load_model(source(whole)), tokenizer)
    with pytest.raises(InputError, match="ids up to 319, but the model has only 50"):
        check_vocabulary(tiny_llama, tokenizer)


# --- what is refused --------------------------------------------------------------------------------------------------


def rewrite(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def poison(value: float):
    def change(weights):
        weights["model.layers.1.mlp.up_proj.weight"][2, 3] = value

    return lambda folder: rewrite(folder, change)


def encoder(folder):
    small = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
    BertForMaskedLM(BertConfig(vocab_size=VOCAB, **small)).save_pretrained(folder)


def encoder_decoder(folder):
    T5ForConditionalGeneration(
        T5Config(vocab_size=VOCAB, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    ).save_pretrained(folder)


def vision(folder):
    small = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
    ViTModel(ViTConfig(image_size=32, **small)).save_pretrained(folder)


def remote_code(folder):
    edit_config(folder, model_type="homemade", auto_map={"AutoConfig": "code.MyConfig"})


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def drop_tokenizer(folder):
    for file in folder.glob("token*"):
        file.unlink()


BROKEN_MODELS = {
    "nan": (poison(float("nan")), r"'model\.layers\.1\.mlp\.up_proj\.weight' has values that are not finite"),
    "inf": (poison(float("inf")), r"'model\.layers\.1\.mlp\.up_proj\.weight' has values that are not finite"),
    "missing": (lambda f: rewrite(f, lambda w: w.pop("lm_head.weight")), r"1 weights are not .*'lm_head\.weight'"),
    "shape": (lambda f: edit_config(f, intermediate_size=20), r"another shape \(first: 'model\.layers\.0\.mlp"),
    "truncated": (truncate, "cannot be loaded"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "cannot be loaded"),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "cannot be loaded"),
    "encoder": (encoder, "depends on later tokens"),
    "encoder-decoder": (encoder_decoder, "encoder-decoder"),
    "vision": (vision, "no causal language model"),
    "unknown type": (lambda f: edit_config(f, model_type="homemade"), "cannot be loaded"),
    "remote code": (remote_code, r"model\.trust_remote_code: true"),
}


@pytest.mark.parametrize("case", BROKEN_MODELS)
def test_refuses_model(folder, case):
    damage, message = BROKEN_MODELS[case]
    damage(folder)
    with pytest.raises(InputError, match=message) as error:
        load_model(source(folder))
    assert "\n" not in str(error.value)


def test_nothing_is_executed(folder):
    remote_code(folder)
    (folder / "code.py").write_text("raise SystemExit('executed')")
    with pytest.raises(InputError, match="not run unless you say so"):
        load_tokenizer(source(folder))


BROKEN_TOKENIZERS = {
    "none": (drop_tokenizer, "has no tokenizer"),
    "too many tokens": (lambda f: edit_config(f, vocab_size=300), "ids up to 319, but the model has only 300"),
    "broken": (lambda f: (f / "tokenizer.json").write_text("{"), "tokenizer cannot be loaded"),
}


@pytest.mark.parametrize("case", BROKEN_TOKENIZERS)
def test_refuses_tokenizer(folder, case):
    damage, message = BROKEN_TOKENIZERS[case]
    damage(folder)
    with pytest.raises(InputError, match=message) as error:
        load_tokenizer(source(folder))
    assert "\n" not in str(error.value)


def test_refuses_unknown_dtype():
    with pytest.raises(InputError, match=r"model\.dtype='int4'.*float32"):
        ModelSource("demo", dtype="int4")


@pytest.mark.parametrize("name", ["./nothing", "/nowhere/model", "nothing.gguf", "a/b/c", "~/no-such-folder", ""])
def test_a_missing_path_never_asks_the_hub(name, monkeypatch):
    monkeypatch.setattr(loading, "hub_available", lambda: pytest.fail("asked the hub"))
    with pytest.raises(InputError, match=r"model\.pretrained"):
        load_model(ModelSource(name))


def test_names_near_a_missing_path(whole):
    with pytest.raises(InputError, match=f"nearest names.*{whole.name}"):
        load_model(ModelSource(str(whole)[:-1] + "x"))


def test_refuses_other_files(tmp_path):
    (tmp_path / "weights.pt").write_bytes(b"x")
    with pytest.raises(InputError, match=r"not a \.gguf file"):
        load_model(source(tmp_path / "weights.pt"))
    (tmp_path / "model.gguf").write_bytes(b"x" * 100)
    with pytest.raises(InputError, match="cannot be loaded"):
        load_model(source(tmp_path / "model.gguf"))
    with pytest.raises(InputError, match=r"name its file: .*model\.gguf"):
        load_model(source(tmp_path))


@pytest.mark.parametrize("options", [{"device_map": "auto"}, {}])
def test_names_the_missing_extra(whole, tmp_path, options, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "accelerate" else real(name, *a))
    (tmp_path / "model.gguf").touch()
    path = whole if options else tmp_path / "model.gguf"
    with pytest.raises(InputError, match=r'accelerate: pip install "sparc3_pl\[gguf\]"'):
        load_model(source(path, **options))


def test_device_map_is_respected(whole):
    pytest.importorskip("accelerate")
    places = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    spread = load_model(source(whole, device_map=places | {"model.layers.1": "disk"}))
    assert spread.model.layers[1].mlp.up_proj.weight.is_meta
    model, ids = load_model(source(whole)), tokens(1, 7)
    assert torch.equal(spread(ids).logits, model(ids).logits)
    assert fingerprint(spread) == fingerprint(model)


# --- hub --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def silent_server(monkeypatch):
    """Takes connections and never answers, as a swallowed network does."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        yield server


def test_a_silent_hub_is_given_up_in_time(silent_server):
    start = time.monotonic()
    assert not hub_available(timeout=0.5)
    assert time.monotonic() - start < 5


def test_local_models_make_no_request(whole, silent_server):
    load_model(source(whole))
    load_tokenizer(source(whole))
    silent_server.setblocking(False)
    with pytest.raises(BlockingIOError):
        silent_server.accept()


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_unreachable_hub(load, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # the discard port: refused
    start = time.monotonic()
    with pytest.raises(
        InputError, match=r"127\.0\.0\.1:9\) cannot be reached .* local folder or a \.gguf file"
    ) as error:
        load(ModelSource("someone/some-model"))
    assert time.monotonic() - start < 10
    assert "\n" not in str(error.value)


def test_offline_mode_does_not_even_try(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("sparc3_pl.io.hub._answers", lambda timeout: pytest.fail("asked the hub"))
    assert not hub_available()


# --- real model -------------------------------------------------------------------------------------------------------


@pytest.mark.realdata
def test_gguf_model_is_plain_and_can_be_saved(smollm2, tmp_path):
    where = ModelSource(str(smollm2), dtype="float32")
    model, tokenizer = load_model(where), load_tokenizer(where)
    check_vocabulary(model, tokenizer)
    assert "quantization_config" not in model.config.to_dict()
    assert (tokenizer.padding_side, tokenizer.model_max_length) == ("right", 8192)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert torch.equal(model(ids).logits, again(ids).logits)
    assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"
    assert fingerprint(again) == fingerprint(model)


@pytest.mark.parametrize(
    ("about", "said"),
    [
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False},
            "4-bit weights packed by bits.*model.dequantize: true",
        ),
        (
            {"quant_method": "bitsandbytes", "load_in_8bit": True},
            "8-bit weights packed by bitsandbytes.*model.dequantize: true",
        ),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "4-bit weights packed by gptq, which transf.* cannot"),
        ({"quant_method": "awq", "bits": 4, "zero_point": True}, "4-bit weights packed by awq, which transf.* cannot"),
        ({"quant_method": "of my own", "bits": 4}, "4-bit weights packed by of my own, which transformers cannot"),
        ({"quant_method": "fp8"}, "holds weights packed by fp8.*model.dequantize: true"),
    ],
)
def test_quantised_checkpoints_are_refused_before_their_weights_are_read(tmp_path, about, said):
    says_quantised(tmp_path, tiny("llama"), about)
    for load in (load_model, load_skeleton):  # there are no weights in the folder
        with pytest.raises(InputError, match=said) as refusal:
            load(ModelSource(str(tmp_path)))
        assert "\n" not in str(refusal.value)
        if "cannot" in said:
            with pytest.raises(InputError, match=said):
                load(ModelSource(str(tmp_path), dequantize=True))


def says_quantised(folder, model, about):
    model.config.save_pretrained(folder)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"quantization_config": about}))


BLOCK = 8
"""Rows and columns of a weight matrix that have one scale; real checkpoints have 128."""


def save_in_fp8(folder, model):
    """An FP8 checkpoint as the hub has them, and what its weights stand for: each block of a matrix times its scale.

    Experts lie there one by one.
    """
    stored, stand_for = {}, {}
    for name, value in model.state_dict().items():
        if value.dim() == 1 or "embed" in name or "lm_head" in name or name.endswith("gate.weight"):
            stored[name] = stand_for[name] = value
            continue
        per_expert = {name: value}
        if value.dim() == 3:
            names = ("gate_proj", "up_proj") if "gate_up" in name else ("down_proj",)
            halves = dict(zip(names, value.chunk(len(names), 1), strict=True))
            block = name.rpartition(".")[0]
            per_expert = {f"{block}.{e}.{k}.weight": v[e] for k, v in halves.items() for e in range(len(value))}
        exact = {}
        for key, matrix in per_expert.items():
            scales = torch.empty(matrix.shape[0] // BLOCK, matrix.shape[1] // BLOCK)
            packed, exact[key] = torch.empty_like(matrix, dtype=torch.float8_e4m3fn), torch.empty_like(matrix)
            for i in range(scales.shape[0]):
                for j in range(scales.shape[1]):
                    here = slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK)
                    scales[i, j] = matrix[here].abs().max() / 448
                    packed[here] = (matrix[here] / scales[i, j]).to(torch.float8_e4m3fn)
                    exact[key][here] = packed[here].float() * scales[i, j]
            stored |= {key: packed, f"{key}_scale_inv": scales}
        if value.dim() == 3:
            rows = [torch.cat([exact[f"{block}.{e}.{k}.weight"] for k in halves]) for e in range(len(value))]
            exact = {name: torch.stack(rows)}
        stand_for |= exact
    says_quantised(folder, model, {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]})
    save_file({key: value.contiguous() for key, value in stored.items()}, folder / "model.safetensors")
    return stand_for


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_an_fp8_checkpoint_is_the_weights_that_it_stands_for(tmp_path, family, caplog):
    sizes = {"moe_intermediate_size": 16} if family == "qwen3_moe" else {}
    original = tiny(family, **sizes)
    expected = save_in_fp8(tmp_path, original)
    where = ModelSource(str(tmp_path), dtype="float32", dequantize=True)
    model = load_model(where)
    assert "packed (fp8)" in caplog.text
    values = model.state_dict()
    assert values.keys() == expected.keys() == original.state_dict().keys()
    assert all(torch.equal(values[name], expected[name]) for name in values)
    assert any(not torch.equal(values[name], value) for name, value in original.state_dict().items())
    assert describe(model, where)["dequantized"] == "fp8"
    assert "dequantized" not in describe(original, where)
    model.save_pretrained(tmp_path / "plain")
    again = load_model(ModelSource(str(tmp_path / "plain")))
    assert all(torch.equal(again.state_dict()[name], value) for name, value in values.items())


def test_what_bitsandbytes_packed_is_unpacked_once_it_is_loaded(tmp_path, monkeypatch):
    """With a stand-in for transformers' loader, for want of bitsandbytes: what is asked of it, and in which order."""
    says_quantised(tmp_path, tiny("llama"), {"quant_method": "bitsandbytes", "load_in_8bit": True})
    where, calls = ModelSource(str(tmp_path), dequantize=True), []

    class Loader:
        _model_mapping = auto_class(tiny("llama").config)._model_mapping

        @staticmethod
        def from_pretrained(**options):
            calls.append(options["config"].quantization_config)
            model = tiny("llama")
            model.hf_quantizer = "packed"

            def dequantize():
                calls.append("dequantize")
                del model.hf_quantizer
                return model

            model.dequantize = dequantize
            return model, {"missing_keys": [], "mismatched_keys": [], "unexpected_keys": []}

    with pytest.raises(InputError, match="bitsandbytes"):  # not installed: said before a weight is read
        load_model(where)
    monkeypatch.setattr(loading, "auto_class", lambda config: Loader)
    assert describe(load_model(where), where)["dequantized"] == "8-bit bitsandbytes"
    assert calls == [{"quant_method": "bitsandbytes", "load_in_8bit": True}, "dequantize"]


def test_weights_of_8_bits_that_no_config_speaks_of_are_refused(folder, monkeypatch):
    model = tiny("llama")
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(torch.zeros(24, 32).to(torch.float8_e4m3fn), False)
    with pytest.raises(InputError, match=r"layers.0.mlp.up_proj.weight' are torch.float8_e4m3fn values"):
        check_plain_weights(model, source(folder))


def test_a_model_that_is_kept_is_loaded_once(folder):
    assert load_model(source(folder)) is not load_model(source(folder))
    with models_kept():
        first = load_model(source(folder))
        assert load_model(source(folder)) is first
        weight = first.get_output_embeddings().weight
        before = weight.detach().clone()
        weight.data[3, 4] += 1
        weight.data.copy_(before)
        assert load_model(source(folder)) is first  # what was undone
        weight.data[3, 4] = weight.data[3, 4].nextafter(torch.tensor(9.0))  # one bit
        second = load_model(source(folder))
        assert second is not first
        assert torch.equal(second.get_output_embeddings().weight, before)
        assert load_model(source(folder, dtype="bfloat16")) is not second
    assert load_model(source(folder)) is not second


def test_the_tokenizer_of_a_model_that_is_kept_is_made_once(folder, monkeypatch):
    made = []
    real = AutoTokenizer.from_pretrained
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *a, **k: made.append(k) or real(*a, **k))
    with models_kept():
        first = load_vocabulary(source(folder))
        first.tokenizer.padding_side = "left"  # whoever changes his own
        first.tokenizer.add_tokens(["<more>"])
        second = load_vocabulary(source(folder))
        assert len(made) == 1
        assert second.tokenizer.padding_side == "right"
        assert len(second.tokenizer) == len(first.tokenizer) - 1
        words = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps(words | {"model_max_length": 7}))
        assert load_vocabulary(source(folder)).context == 7
        assert len(made) == 2
    load_vocabulary(source(folder))
    assert len(made) == 3


def test_a_tokenizer_that_cannot_be_copied_is_loaded_again(folder, monkeypatch):
    real = AutoTokenizer.from_pretrained

    def from_pretrained(*args, **kwargs):
        tokenizer = real(*args, **kwargs)
        tokenizer.compiled = threading.Lock()
        return tokenizer

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", from_pretrained)
    with models_kept():
        first, second = (load_vocabulary(source(folder)).tokenizer for _ in range(2))
    assert first is not second
    assert first.get_vocab() == second.get_vocab()


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.model.layers[0].register_forward_hook(lambda *_: None),
        lambda model: setattr(model.model.layers[0].mlp, "forward", model.model.layers[0].mlp.forward),
        lambda model: setattr(model.config, "rms_norm_eps", 0.5),
        lambda model: model.model.layers[1].train(),
        lambda model: model.requires_grad_(True),
    ],
)
def test_a_model_on_which_something_was_left_is_loaded_again(folder, change):
    with models_kept():
        first = load_model(source(folder))
        change(first)
        assert load_model(source(folder)) is not first


def test_a_model_whose_files_have_changed_is_loaded_again(folder):
    with models_kept():
        first = load_model(source(folder))
        weights = load_file(folder / "model.safetensors")
        save_file({name: 2 * value for name, value in weights.items()}, folder / "new", {"format": "pt"})
        (folder / "new").replace(folder / "model.safetensors")  # written over, the old one would change in memory
        assert not torch.equal(load_model(source(folder)).lm_head.weight, first.lm_head.weight)
