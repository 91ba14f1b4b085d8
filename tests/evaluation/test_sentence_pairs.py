import json
import math
from pathlib import Path

import pytest
import torch
from tiny_models import tiny
from word_tokenizer import word_tokenizer

from sparc3_pl.cli import main
from sparc3_pl.data.encoding import Encoder, load_encoder
from sparc3_pl.data.sources import text_id
from sparc3_pl.data.texts import TextQuery
from sparc3_pl.errors import InputError
from sparc3_pl.evaluation.compare import compare
from sparc3_pl.evaluation.measurement import MEASUREMENTS, Measured, checked_rows, chosen_measurements
from sparc3_pl.evaluation.pairs import SentencePairs
from sparc3_pl.evaluation.results import Evaluation
from sparc3_pl.model.loading import load_model
from sparc3_pl.model.source import ModelSource
from sparc3_pl.scores.folder import ScoreFolder
from sparc3_pl.selection.command import prune

PAIRS = [
    ("w4 w5 w6", "w4 w7 w6", "a"),
    ("w8 w9", "w9 w9", "b"),  # they differ in the first token
    ("w10 w11 w12 w13 w14", "w10 w11 w12", "a"),
    ("w3 w4 w5", "w3 w4 w5", "b"),  # the same sentence twice
]


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("more,less,kind\n" + "".join(",".join(pair) + "\n" for pair in PAIRS))
    return str(path)


def by_hand(model, first_token: int, sentence: str) -> float:
    """The chain rule, one token at a time, each in a forward pass of its own without padding."""
    tokens = word_tokenizer()(sentence, add_special_tokens=False).input_ids
    total = 0.0
    for count, token in enumerate(tokens):
        ids = torch.tensor([[first_token, *tokens[:count]]])
        with torch.no_grad():
            probabilities = model.double()(ids).logits[0, -1].softmax(-1)
        total += math.log(float(probabilities[token]))
    return total


def measured(measurement: SentencePairs, model, encoder: Encoder) -> dict[str, dict]:
    units = measurement.units(encoder)
    with torch.no_grad():
        rows = [
            row
            for start in range(0, len(units), measurement.batch_size)
            for row in measurement.measure(model, encoder, units[start : start + measurement.batch_size])
        ]
    return {row["unit"]: row for row in checked_rows(measurement, rows, len(units))}


@pytest.mark.parametrize("size", [1, 3])
def test_differences_equal_a_loop_over_tokens(source, size):
    tokenizer, model = word_tokenizer(), tiny("llama").double().eval()
    encoder = Encoder(tokenizer)
    measurement = SentencePairs(source, batch_size=size)
    before = [*encoder.prefix, tokenizer.bos_token_id, tokenizer.eos_token_id]
    first_token = next(token for token in before if token is not None)
    rows = list(measured(measurement, model, encoder).values())
    expected = [by_hand(model, first_token, one) - by_hand(model, first_token, other) for one, other, _ in PAIRS]
    assert [row["difference"] for row in rows] == pytest.approx(expected, abs=1e-9)
    assert abs(expected[1]) > 1e-3
    assert [row["prefers_first"] for row in rows] == [float(value > 0) for value in expected[:3]] + [0.5]
    figures = measurement.figures(rows)
    assert figures["prefers_first"] == (sum(value > 0 for value in expected[:3]) + 0.5) / 4
    assert figures["difference"] == pytest.approx(sum(expected) / 4)


def test_a_filter_a_number_and_other_fields(source, tmp_path, caplog):
    encoder = Encoder(word_tokenizer())
    assert len(SentencePairs(source, filter='kind == "a"').units(encoder)) == 2
    assert len(SentencePairs(source, num_pairs=3).units(encoder)) == 3
    rows = [{"x": "w4", "y": "w5"}, {"x": "w4", "y": "w5"}, {"x": None, "y": "w5"}, {"x": "w6", "y": "w5"}]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = SentencePairs(str(tmp_path / "own.jsonl"), "x", "y")
    assert len(own.units(encoder)) == 2
    assert "1 the same as another, 1 null left out" in caplog.text
    with pytest.raises(InputError, match=r"pairs.num_pairs=5: .* gives only 2 pairs"):
        SentencePairs(str(tmp_path / "own.jsonl"), "x", "y", num_pairs=5).units(encoder)
    with pytest.raises(InputError, match=r"pairs.first_field: no field 'more'; there are: x, y \(line 1\)"):
        SentencePairs(str(tmp_path / "own.jsonl")).units(encoder)


def test_what_is_wrong_is_said_before_the_model_is_there(source):
    with pytest.raises(InputError, match=r"pairs.source='./no.csv'"):
        SentencePairs("./no.csv")
    with pytest.raises(InputError, match=r"pairs.filter='kind' is not FIELD OP VALUE"):
        SentencePairs(source, filter="kind")
    with pytest.raises(InputError, match=r"pairs.num_pairs=0 is too small"):
        SentencePairs(source, num_pairs=0)
    with pytest.raises(InputError, match=r"pairs.partition='half' is not known"):
        SentencePairs(source, partition="half")
    with pytest.raises(InputError, match=r"pairs.partition_share=1.5 is not between 0 and 1"):
        SentencePairs(source, partition="attribution", partition_share=1.5)


def test_too_long_a_sentence_has_failed_and_is_no_number(source):
    encoder = Encoder(word_tokenizer(), context=5)
    rows = measured(SentencePairs(source, batch_size=4), tiny("llama").eval(), encoder)
    assert [row.get("failed") for row in rows.values()] == [
        None,
        None,
        "longer than the model's context of 5 tokens",
        None,
    ]


def test_a_sentence_without_tokens_is_not_the_likeliest_of_all(tmp_path, caplog):
    rows = [{"more": "w4 w5", "less": "<s>"}, {"more": "w4", "less": "w5"}]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for bos in (False, True):  # written out, or what the tokenizer puts there anyway
        assert len(SentencePairs(str(tmp_path / "own.jsonl")).units(Encoder(word_tokenizer(bos)))) == 1
    assert caplog.text.count("1 with a sentence that gives no token left out") == 2


def test_a_model_whose_weights_are_elsewhere(source):
    from accelerate import cpu_offload

    want = measured(SentencePairs(source), tiny("llama").eval(), Encoder(word_tokenizer()))
    assert measured(SentencePairs(source), cpu_offload(tiny("llama").eval(), "cpu"), Encoder(word_tokenizer())) == want


def test_from_the_command_line_to_the_comparison(source, tmp_path, capsys):
    tiny("llama").save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    command = [
        *("eval", "--model.pretrained", str(tmp_path / "model"), "--data.text_source", "null"),
        *("--data.prompts_source", "null", "--data.pairs_source", source, "--trainer.accelerator", "cpu"),
        *("--trainer.devices", "1", "--trainer.logger", "false"),
    ]
    assert main([*command, "--output", str(tmp_path / "eval")]) == 0
    results = json.loads((tmp_path / "eval" / "results.json").read_text())
    expected = measured(SentencePairs(source), tiny("llama").eval(), Encoder(word_tokenizer())).values()
    figures = results["measurements"]["pairs"]
    assert figures["difference"] == pytest.approx(sum(row["difference"] for row in expected) / 4, abs=1e-6)
    assert figures["prefers_first"] == sum(row["prefers_first"] for row in expected) / 4
    assert "prefers_first" in capsys.readouterr().out
    compare(str(tmp_path / "eval"), str(tmp_path / "eval"), num_resamples=100)
    assert "better is a lower value of pairs" in " ".join(capsys.readouterr().out.split())
    # A field that is not there is refused before the weights load.
    (tmp_path / "model" / "model.safetensors").unlink()
    assert main([*command, "--data.pairs_first_field", "most", "--output", str(tmp_path / "other")]) == 2
    assert "pairs.first_field: no field 'most'; there are: more, less, kind (line 2)" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_it_is_built_in_by_name(source):
    (choice,) = chosen_measurements([{"class_path": "pairs", "init_args": {"source": source}}])
    assert choice.name == "pairs"
    assert "pairs" in MEASUREMENTS
    rows = list(measured(choice.object, tiny("llama").eval(), Encoder(word_tokenizer())).values())
    settings = Measured.of(choice, rows).settings()
    assert settings.paired == ["prefers_first", "difference"]
    assert settings.settings["source"] == source
    assert "batch_size" not in settings.settings


# --- halves, and scores of the same pairs -----------------------------------------------------------------------------


def test_a_pair_is_in_the_half_of_its_first_sentence(tmp_path):
    """In score, by ``partition_field``, both fields give the same pairs; in eval the other half is measured."""
    records = [{"more": f"w{i} w4", "less": f"w{i} w5"} for i in range(3, 23)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    number = {}
    for half in ("attribution", "evaluation"):
        queries = [TextQuery(str(path), field, half=half, partition_field="more") for field in ("more", "less")]
        more, less = (list(query.texts()) for query in queries)
        assert [text.split()[0] for text in more] == [text.split()[0] for text in less]
        assert set(more) == set(TextQuery(str(path), "more", half=half).texts())
        units = SentencePairs(str(path), partition=half).units(Encoder(word_tokenizer()))
        assert {unit.id for unit in units} == {text_id("\n".join(pair)) for pair in zip(more, less, strict=True)}
        number[half] = len(units)
    assert sum(number.values()) == 20 and min(number.values()) >= 5
    with pytest.raises(InputError, match="partition='eval' is not known"):
        SentencePairs(str(path), partition="eval")


def test_evaluations_of_all_pairs_say_nothing_of_halves(source):
    assert not [name for name in SentencePairs(source).describe() if name.startswith("partition")]
    assert SentencePairs(source, partition="evaluation", partition_seed=3).describe()["partition_seed"] == 3


@pytest.fixture(scope="module")
def scored_pairs(tmp_path_factory) -> tuple[Path, dict[str, ScoreFolder]]:
    """Pairs of sentences that the demo can read, and its signed scores of the attribution half, by side."""
    folder = tmp_path_factory.mktemp("scored")
    path = folder / "pairs.jsonl"
    names = [("woman", "farmer"), ("drum", "cart"), ("wind", "fox"), ("children", "birds"), ("road", "river")]
    pairs = [(f"The old {one} was there.", f"The old {other} was there.") for one, other in names]
    pairs += [(f"He told the {one} a story.", f"He told the {other} a story.") for one, other in names]
    path.write_text("".join(json.dumps({"more": more, "less": less}) + "\n" for more, less in pairs))
    for field in ("more", "less"):
        options = ["--model.method", "gradient", "--model.target", "text", "--model.signed", "true"]
        options += ["--model.granularity", "neuron", "--data.source", str(path), "--data.text_field", field]
        options += ["--data.partition", "attribution", "--data.partition_field", "more"]
        options += ["--data.seq_len", "null", "--output", str(folder / field)]
        assert main(["score", *options, *QUIET]) == 0
    return path, {field: ScoreFolder.open(folder / field) for field in ("more", "less")}


QUIET = ["--trainer.accelerator", "cpu", "--trainer.logger", "false", "--trainer.enable_progress_bar", "false"]


def test_scores_of_both_sides_are_the_derivative_of_the_measured_difference(scored_pairs):
    """Signed scores of target ``text``, `more` less `less`, against finite differences of the measurement itself."""
    path, folders = scored_pairs
    sides = [{name: folder.load(name) for name in folder.layers} for folder in folders.values()]
    derivative = {layer: (sides[0][layer] - sides[1][layer]).double() for layer in sides[0]}
    layer = max(derivative, key=lambda name: float(derivative[name].abs().max()))
    neuron = int(derivative[layer].abs().argmax())
    source = ModelSource("demo", dtype="float32")
    encoder, model = load_encoder(source), load_model(source).double().eval()
    column = model.get_submodule(layer.replace("up_proj", "down_proj")).weight
    before = column[:, neuron].clone()

    def difference(gain: float) -> float:
        with torch.no_grad():
            column[:, neuron] = before * gain
        measurement = SentencePairs(str(path), partition="attribution")
        return measurement.figures(list(measured(measurement, model, encoder).values()))["difference"]

    slope = (difference(1 + 1e-2) - difference(1 - 1e-2)) / 2e-2  # log-likelihoods are float32: a smaller step drowns
    assert abs(slope) > 1e-3
    assert float(derivative[layer][neuron]) == pytest.approx(slope, rel=1e-3)


def test_an_edit_is_not_measured_on_the_pairs_it_was_made_from(scored_pairs, tmp_path, capsys):
    path, folders = scored_pairs
    plan = str(tmp_path / "plan.json")
    prune([str(folders["less"].path)], [str(folders["more"].path)], plan, num_neurons=5)
    words = ["eval", "--plan", plan, "--data.text_source", "null", "--data.prompts_source", "null", *QUIET]
    words += ["--data.pairs_source", str(path)]
    number = len(SentencePairs(str(path), partition="attribution").units(load_encoder(ModelSource("demo"))))
    assert main([*words, "--output", str(tmp_path / "all")]) == 2
    assert f"{number} pairs hold a sentence from which the plan was made" in capsys.readouterr().err
    assert main([*words, "--data.pairs_partition", "evaluation", "--output", str(tmp_path / "half")]) == 0
    assert main([*words, "--allow_overlap", "--output", str(tmp_path / "allowed")]) == 0
    half, allowed = (Evaluation.open(tmp_path / name).results for name in ("half", "allowed"))
    assert (half["overlap"], half["measurement_settings"]["pairs"]["num_units"]) == ("none", 10 - number)
    assert (allowed["overlap"], allowed["num_overlapping_pairs"]) == ("allowed", number)
    assert "not held out" in capsys.readouterr().out
