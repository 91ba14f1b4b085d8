"""The doctor's verdicts: sound models pass, sick ones fail for the right reason."""

import json
import time

import pytest
import torch
from tiny_models import tiny, tokens
from tiny_tokenizers import documents, tiny_tokenizer, with_template

import sparc3_pl.attribution.rules as rules
from sparc3_pl.data.encoding import Encoder
from sparc3_pl.diagnosis.doctor import check_tokenizer, diagnose, doctor, doctor_sections
from sparc3_pl.errors import InputError


def samples(lengths=(10, 7, 5)):
    return [tokens(1, length, seed=length)[0] for length in lengths]


def statuses(found):
    return {check.name: check.status for check in found.checks}


def test_every_family_is_sound(tiny_model):
    found = diagnose(tiny_model.requires_grad_(False), samples())
    said = statuses(found)
    rough = said.pop("bfloat16 against float32")  # of a model with random weights of two dozen neurons: no matter
    assert rough in ("pass", "warn", "fail")
    assert set(said.values()) == {"pass"}, found.checks


def test_every_module_stands_in_the_table(tiny_llama):
    found = diagnose(tiny_llama.requires_grad_(False), samples())
    (table,) = doctor_sections(found)[0].blocks
    assert sum(row[2].value for row in table.rows) == len(found.rules)
    leaves = {name for name, module in tiny_llama.named_modules() if not module._modules}
    assert leaves <= set(found.rules)
    assert ("model.layers.*.mlp.down_proj (input)", "gated product: gradient halved", "2") in table.texts


def test_a_missing_rule_tips_the_balance(tiny_llama, monkeypatch):
    monkeypatch.setattr(rules, "_halve_input", lambda module, args: args)
    found = diagnose(tiny_llama.requires_grad_(False), samples())
    assert statuses(found)["balance sheet"] == "fail"
    assert found.verdict == "fail"


def test_a_family_that_is_not_listed_but_balances():
    found = diagnose(tiny("seed_oss").requires_grad_(False), samples())
    assert statuses(found) == {**dict.fromkeys(statuses(found), "pass"), "rules": "warn"}
    assert {"balance sheet", "forward values", "bfloat16 against float32"} <= statuses(found).keys()
    assert "'seed_oss' is not listed" in found.checks[0].reason
    assert "model.unlisted_family: true" in found.checks[0].reason
    assert doctor_sections(found)


def test_a_module_without_a_rule_is_named_and_its_size_told():
    found = diagnose(tiny("llama", hidden_act="sigmoid").requires_grad_(False), samples())
    assert statuses(found) == {"rules": "fail", "balance sheet": "fail"}
    assert "2 modules have none: model.layers.0.mlp.act_fn, model.layers.1.mlp.act_fn" in found.checks[0].reason
    assert found.rules["model.layers.1.mlp.act_fn"] == f"{rules.NO_RULE} (Sigmoid)"
    assert found.rules["model.layers.1.mlp.up_proj"] == "linear: plain gradient"
    assert min(account.relative_residual for account in found.accounts) > 1e-3
    assert len(doctor_sections(found)) == 3


def test_a_family_that_was_found_wrong_stays_refused():
    experts = {"num_experts": 2, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}
    found = diagnose(tiny("qwen2_moe", num_experts_per_tok=1, **experts).requires_grad_(False), samples())
    assert statuses(found) == {"rules": "fail", "balance sheet": "fail"}
    assert "sigmoid gate" in found.checks[0].reason


def test_routers_have_a_line_of_their_own():
    found = diagnose(tiny("qwen3_moe").requires_grad_(False), samples())
    said = {check.name: check.reason for check in found.checks}
    assert found.verdict != "fail", found.checks
    assert said["routers"].startswith("routers keep ")
    assert said["forward values"] == "bitwise equal with and without the rules"
    (table,) = doctor_sections(found)[1].blocks
    assert "routers" in table.columns


def test_nonfinite_weights_are_named(tiny_llama):
    tiny_llama.model.layers[1].mlp.up_proj.weight.data[3, 2] = torch.inf
    found = diagnose(tiny_llama.requires_grad_(False), samples())
    (check,) = [check for check in found.checks if check.name == "finite in float32"]
    assert check.status == "fail"
    assert "NaN or infinite relevances in 2 layers" in check.reason


def test_command(tmp_path, capsys):
    tokenizer = tiny_tokenizer()
    tiny("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("\n".join(documents(20)))
    options = {"pretrained": str(tmp_path / "model"), "source": str(tmp_path / "text.txt"), "seq_len": 16}
    found = doctor(**options, output=str(tmp_path / "doctor.json"), html=str(tmp_path / "doctor.html"))
    said = json.loads((tmp_path / "doctor.json").read_text())
    assert said["kind"] == "doctor"
    assert said["rules"] == found.rules
    assert statuses(found)["tokenizer"] == "pass"
    assert len(said["accounts"]) == 3
    assert "Balance sheet" in capsys.readouterr().out
    assert "<table" in (tmp_path / "doctor.html").read_text()
    with pytest.raises(InputError, match="already exists"):
        doctor(**options, output=str(tmp_path / "doctor.json"))


def test_what_a_tokenizer_puts_around_a_text_is_told():
    texts = documents(5)
    check = check_tokenizer(Encoder(with_template(tiny_tokenizer(), "<s> $A </s>")), texts)
    assert check.status == "pass"
    assert check.reason == "puts <s> before every text; </s>, which it puts after it, is left out"
    assert check_tokenizer(Encoder(None, 9), [[1, 2]]).status == "pass"
    tokenizer = tiny_tokenizer()
    encoder = Encoder(tokenizer)
    with_template(tokenizer, "<s> $A </s>")  # behind its back: what it does is not what was seen of it
    check = check_tokenizer(encoder, texts)
    assert check.status == "fail"
    assert "the added tokens depend on the text" in check.reason
    assert f"with [1] at position {len(encoder(texts[0]))}, where its sample has []" in check.reason


@pytest.mark.realdata
def test_smollm2_is_sound(smollm2, real_data):
    start = time.process_time()
    found = doctor(str(smollm2), source=str(real_data / "c4_dev.jsonl"))
    assert found.verdict == "pass", found.checks
    # Guards against a blow-up only: two test processes on two cores count up to twice the seconds of a quiet machine.
    assert time.process_time() - start < 180
