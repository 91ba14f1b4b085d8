import json
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from tiny_tokenizers import digits_tokenizer, documents, tiny_tokenizer

from sparc3_pl.data.encoding import Encoder, load_encoder
from sparc3_pl.data.reference import ReferenceBatch, ReferenceData
from sparc3_pl.data.sources import text_id
from sparc3_pl.errors import InputError


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("corpus") / "general.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents(60)))
    return str(path)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> str:
    """40 prompts: every fourth score null, three records twice, one empty."""
    rows = [{"prompt": {"text": f"The last train {i}", "toxicity": None if i % 4 == 0 else i / 40}} for i in range(40)]
    rows += [*rows[5:8], {"prompt": {"text": "  ", "toxicity": 1.0}}]
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def ready(data: ReferenceData, rank: int = 0, world_size: int = 1, **tokenizer) -> ReferenceData:
    data.trainer = SimpleNamespace(global_rank=rank, world_size=world_size)
    data.read(Encoder(tiny_tokenizer(**{"pad_token": "</s>"} | tokenizer)))
    return data


def ids(data: ReferenceData) -> list[str]:
    return [sample.id for sample in data.samples]


def served(data: ReferenceData) -> list[str]:
    return [sample_id for batch in data.predict_dataloader() for sample_id in batch.ids]


PROMPTS = {"text_field": "prompt.text", "seq_len": None}


def test_a_seed_gives_the_same_windows_and_another_seed_others(corpus):
    one, same, other = (ids(ready(ReferenceData(corpus, seq_len=16, num_samples=8, seed=s))) for s in (0, 0, 1))
    assert one == same
    assert len(one) == 8
    assert not set(one) & set(other)


def test_random_windows(corpus, caplog):
    """As long as asked for, each of one document; what was too short is counted, told and kept with the data."""
    one, same, other = (
        ready(ReferenceData(corpus, seq_len=40, windows="random", num_samples=8, seed=seed)) for seed in (0, 0, 1)
    )
    assert ids(one) == ids(same) != ids(other)
    assert all(len(sample.input_ids) == 40 and len(sample.text_ids) == 1 for sample in one.samples)
    about = one.describe()
    assert about["windows"] == "random" and "windows" not in ready(ReferenceData(corpus, seq_len=16)).describe()
    short = ready(ReferenceData(corpus, seq_len=16)).describe()  # of packed windows nothing is too short
    assert "num_too_short" not in short
    with caplog.at_level("INFO"):
        every = ready(ReferenceData(corpus, seq_len=120, windows="random"))
    count = every.describe()["num_too_short"]
    assert count == 60 - len(every.samples) > 0
    assert f"{count} documents have no window of data.seq_len=120 tokens" in caplog.text


def test_a_seed_gives_other_texts(prompts):
    one, other = (ready(ReferenceData(prompts, **PROMPTS, num_samples=10, seed=s)) for s in (0, 1))
    assert set(ids(one)) != set(ids(other))


def test_filter_nulls_and_duplicates(prompts):
    data = ready(ReferenceData(prompts, **PROMPTS, filter="prompt.toxicity >= 0.1"))
    expected = {text_id(f"The last train {i}") for i in range(40) if i % 4 and i / 40 >= 0.1}
    assert set(ids(data)) == expected
    assert len(ids(data)) == len(expected)
    entry = data.describe()
    assert (entry["num_read"], entry["num_null"], entry["num_duplicates"], entry["num_empty"]) == (44, 10, 3, 1)
    assert entry["sample_ids"] == ids(data)
    assert entry["filter"] == "prompt.toxicity >= 0.1"
    json.dumps(entry)


def test_halves_are_disjoint_and_whole(prompts, tmp_path):
    halves = [set(ids(ready(ReferenceData(prompts, **PROMPTS, partition=p)))) for p in ("attribution", "evaluation")]
    assert not halves[0] & halves[1]
    assert halves[0] | halves[1] == set(ids(ready(ReferenceData(prompts, **PROMPTS))))
    assert all(halves)
    # The order of the file has no say in it.
    with open(prompts) as file:
        lines = file.readlines()
    (tmp_path / "reversed.jsonl").write_text("".join(reversed(lines)))
    again = ready(ReferenceData(str(tmp_path / "reversed.jsonl"), **PROMPTS, partition="attribution", seed=9))
    assert set(ids(again)) == halves[0]


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_ranks_share_the_samples_without_repetition(prompts, world_size):
    parts = [
        served(ready(ReferenceData(prompts, **PROMPTS, num_samples=7, batch_size=3), rank, world_size))
        for rank in range(world_size)
    ]
    everything = [sample_id for part in parts for sample_id in part]
    assert len(everything) == 7
    assert sorted(everything) == sorted(ids(ready(ReferenceData(prompts, **PROMPTS, num_samples=7))))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_excluded_samples_are_not_served(prompts):
    data = ready(ReferenceData(prompts, **PROMPTS))
    done = set(ids(data)[:11])
    data.exclude(done)
    assert sorted(served(data)) == sorted(set(ids(data)) - done)
    assert done <= set(data.describe()["sample_ids"])


def test_batches_are_padded_on_the_right_longest_first(corpus):
    data = ready(ReferenceData(corpus, seq_len=None, batch_size=4, num_samples=10))
    tokens = {sample.id: sample.input_ids for sample in data.samples}
    lengths = []
    for batch in data.predict_dataloader():
        assert batch.input_ids.dtype == batch.attention_mask.dtype == torch.int64
        for row, mask, sample_id in zip(batch.input_ids, batch.attention_mask, batch.ids, strict=True):
            length = len(tokens[sample_id])
            assert row[:length].tolist() == tokens[sample_id]
            assert set(row[length:].tolist()) <= {1}
            assert mask.tolist() == [1] * length + [0] * (len(row) - length)
            lengths.append(length)
    assert lengths == sorted(lengths, reverse=True)
    assert len(lengths) == 10


def test_equal_passes_end_in_stand_ins(corpus, monkeypatch):
    data = ready(ReferenceData(corpus, seq_len=16, batch_size=2, num_samples=5), rank=1, world_size=2)
    monkeypatch.setattr(ReferenceData, "equal_passes", True)
    monkeypatch.setattr("sparc3_pl.data.reference.gather_lists", lambda own: [3, *own])  # rank 0 has three batches
    *_, last = batches = list(data.predict_dataloader())
    assert [len(batch.ids) for batch in batches] == [2, 0, 0]
    assert last.input_ids.shape == last.attention_mask.shape == (1, 1)
    assert not last.attention_mask.any()


def test_without_a_trainer(corpus):
    data = ReferenceData(corpus, seq_len=16, num_samples=4)
    data.read(Encoder(tiny_tokenizer(pad_token="</s>")))
    assert sorted(served(data)) == sorted(ids(data))


def test_equal_windows_do_not_count_as_samples(tmp_path):
    rows = [json.dumps({"text": text}) for text in ("ab " * 400, *documents(9))]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    data = ready(ReferenceData(str(tmp_path / "a.jsonl"), seq_len=17))
    assert len(set(ids(data))) == len(ids(data))
    assert data.describe()["num_duplicates"] > 0


class Recorder(LightningModule):
    """Keeps the ids it was given, as the scoring module does."""

    def __init__(self):
        super().__init__()
        self.ids: list[str] = []

    def setup(self, stage):
        self.trainer.datamodule.read(Encoder(tiny_tokenizer(pad_token="</s>")))

    def predict_step(self, batch, batch_idx):
        assert isinstance(batch, ReferenceBatch)
        self.ids += batch.ids


def test_in_a_real_trainer(prompts, tmp_path):
    data, module = ReferenceData(prompts, **PROMPTS, num_samples=7, batch_size=2), Recorder()
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
    )
    trainer.predict(module, datamodule=data, return_predictions=False)
    assert sorted(module.ids) == sorted(ids(data))


# --- matched ----------------------------------------------------------------------------------------------------------


def formats(data: ReferenceData) -> Counter:
    return Counter((len(sample.input_ids), sample.ending) for sample in data.samples)


def test_matches_a_file(corpus, prompts):
    behaviour = ready(ReferenceData(prompts, **PROMPTS, filter="prompt.toxicity >= 0.5"))
    match = {"match": prompts, "match_field": "prompt.text", "match_filter": "prompt.toxicity >= 0.5"}
    general, other = (ready(ReferenceData(corpus, **match, seed=s)) for s in (0, 1))
    assert formats(general) == formats(other) == formats(behaviour)
    assert set(ids(general)) != set(ids(other))
    assert ids(general) == ids(ready(ReferenceData(corpus, **match)))
    entry = general.describe()
    assert (entry["match"], entry["seq_len"], entry["num_unmatched_endings"]) == (prompts, None, 0)


def test_matches_a_score_folder(corpus, tmp_path):
    rows = [{"num_tokens": n, "ending": "cut"} for n in (6, 8, 11)]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ready(ReferenceData(corpus, match=str(tmp_path)))
    assert formats(data) == {(6, "cut"): 1, (8, "cut"): 1, (11, "cut"): 1}
    more = ready(ReferenceData(corpus, match=str(tmp_path), num_samples=7))
    assert len(more.samples) == 7
    assert set(formats(more)) == set(formats(data))
    assert min(formats(more).values()) == 2


def test_what_is_too_short_to_match_is_not_held_against_a_window_that_is_not_used(tmp_path, caplog):
    caplog.set_level("INFO")
    rows = [{"num_tokens": 11, "ending": "cut"}] * 5
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [*documents(5), "A.", "B."]
    (tmp_path / "general.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = ready(ReferenceData(str(tmp_path / "general.jsonl"), match=str(tmp_path)))
    assert data.describe()["num_too_short"] > 0
    assert "data.seq_len" not in caplog.text


def test_match_that_is_not_there(corpus, tmp_path):
    with pytest.raises(InputError, match=r"data\.match=.*no such file"):
        ReferenceData(corpus, match=str(tmp_path / "nothing"))
    with pytest.raises(InputError, match=r"data\.match_field: no field"):
        ready(ReferenceData(corpus, match=corpus, match_field="prompt"))


# --- what the samples were made from ----------------------------------------------------------------------------------


def records_of(data: ReferenceData) -> dict[str, dict]:
    found = {}
    for batch in data.predict_dataloader():
        lengths = batch.attention_mask.sum(1).tolist()
        for row in zip(batch.ids, lengths, batch.endings, map(list, batch.text_ids), strict=False):
            found[row[0]] = dict(zip(("id", "num_tokens", "ending", "text_ids"), row, strict=True))
    return found


def test_records_of_the_samples(prompts):
    data = ready(ReferenceData(prompts, **PROMPTS, batch_size=4))
    records = records_of(data)
    assert sorted(records) == sorted(ids(data))
    for sample in data.samples:
        expected = {"id": sample.id, "num_tokens": len(sample.input_ids), "ending": "cut", "text_ids": [sample.id]}
        assert records[sample.id] == expected


@pytest.mark.parametrize("options", [{"seq_len": 8}, {"seq_len": None}, {"match": "this"}])
def test_samples_know_the_prompts_that_a_text_was_cut_out_of(tmp_path, options):
    rows = [{"text": text, "text_ids": [f"prompt{i}", f"text{i}"]} for i, text in enumerate(documents(6))]
    source = tmp_path / "cuts.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if "match" in options:
        source_of_formats = tmp_path / "formats.jsonl"
        source_of_formats.write_text(json.dumps({"text": "The red fox crosses the"}) + "\n")
        options = {"match": str(source_of_formats)}
    records = records_of(ready(ReferenceData(str(source), **options)))
    names = {name for record in records.values() for name in record["text_ids"]}
    known = [i for i in range(6) if f"prompt{i}" in names]
    assert known
    texts = [text_id(rows[i]["text"]) for i in known]
    assert names == {*texts, *(f"prompt{i}" for i in known), *(f"text{i}" for i in known)}


def test_special_tokens_in_the_data_are_counted_and_told(tmp_path, caplog):
    texts = ["<s>The red fox", "The red fox", "<s>A green door</s> the wide field", "\u200b"]
    source = tmp_path / "chat.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = ready(ReferenceData(str(source), seq_len=None))
    counts = data.describe()
    assert (counts["num_with_prefix"], counts["num_with_special"], counts["num_duplicates"]) == (2, 1, 1)
    assert all(sample.input_ids.count(0) == 1 for sample in data.samples)
    assert "2 texts begin with special tokens" in caplog.text
    assert "1 texts have special tokens within" in caplog.text


def test_texts_that_give_no_token_are_counted_and_told(tmp_path, caplog):
    source = tmp_path / "mixed.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("12", "abc", "3")))
    data = ReferenceData(str(source), seq_len=None)
    data.read(Encoder(digits_tokenizer()))
    assert sorted(sample.input_ids for sample in data.samples) == [[0, 3], [0, 10]]
    assert data.describe()["num_without_tokens"] == 1
    assert "1 texts give no token" in caplog.text
    data = ReferenceData(str(source), seq_len=None, num_samples=3)
    with pytest.raises(InputError, match=r"gives only 2 samples.*1 records give no token"):
        data.read(Encoder(digits_tokenizer()))


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["seq_len", "num_samples", "batch_size", "max_tokens"])
@pytest.mark.parametrize("value", [0, -3])
def test_counts_below_one(key, value):
    with pytest.raises(InputError, match=rf"data\.{key}={value} is too small"):
        ReferenceData(**{key: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"partition": "train"}, r"data\.partition='train'"),
        ({"partition_share": 1.5}, r"data\.partition_share=1\.5"),
        ({"filter": "toxicity"}, r"data\.filter='toxicity'"),
        ({"windows": "rand"}, r"data\.windows='rand' is unknown; give packed or random"),
        ({"windows": "random", "seq_len": None}, r"data\.windows=random: with data\.seq_len=null no windows"),
        ({"windows": "random", "match": "scores"}, r"data\.windows=random: with data\.match='scores' no windows"),
        ({"windows": "random", "label_field": "label"}, r"data\.windows=random: with data\.label_field no windows"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(InputError, match=message):
        ReferenceData(**options)


def test_what_the_data_do_not_hold(prompts, corpus, tmp_path):
    with pytest.raises(InputError, match=r"data\.text_field: no field 'text'; there are: prompt"):
        ready(ReferenceData(prompts))
    with pytest.raises(InputError, match=r"data\.text_field: 'prompt\.toxicity' holds float, not text"):
        ready(ReferenceData(prompts, "prompt.toxicity", filter="prompt.toxicity > 0"))
    with pytest.raises(InputError, match="gives only 0 samples"):
        ready(ReferenceData(prompts, **PROMPTS, filter="prompt.toxicity > 2"))
    with pytest.raises(InputError, match=r"data\.num_samples=100: .* gives only 60"):
        ready(ReferenceData(corpus, seq_len=None, num_samples=100))
    (tmp_path / "nulls.jsonl").write_text('{"text": "a", "score": null}\n' * 3)
    with pytest.raises(InputError, match="gives only 0 samples"):
        ready(ReferenceData(str(tmp_path / "nulls.jsonl"), filter="score > 0", seq_len=None))


# --- real data --------------------------------------------------------------------------------------------------------


@pytest.mark.realdata
def test_real_prompts_and_text_matched_to_them(real_data, smollm2):
    from sparc3_pl.model.source import ModelSource

    encoder = load_encoder(ModelSource(str(smollm2)))

    def drawn(**options) -> ReferenceData:
        data = ReferenceData(**options)
        data.read(encoder)
        return data

    rtp, c4 = str(real_data / "rtp_dev.jsonl"), str(real_data / "c4_dev.jsonl")
    behaviour = drawn(source=rtp, **PROMPTS, filter="prompt.toxicity >= 0.9")
    assert len(behaviour.samples) + behaviour.describe()["num_duplicates"] == 101
    assert behaviour.describe()["num_null"] > 0
    match = {"match": rtp, "match_field": "prompt.text", "match_filter": "prompt.toxicity >= 0.9"}
    assert formats(drawn(source=c4, **match)) == formats(behaviour)
    windows = drawn(source=c4, seq_len=256, num_samples=16)
    assert [len(sample.input_ids) for sample in windows.samples] == [256] * 16
