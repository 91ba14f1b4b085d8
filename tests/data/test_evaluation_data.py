import gzip
import json
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from tiny_tokenizers import documents, tiny_tokenizer, with_template

from sparc3_pl.data.encoding import Encoder
from sparc3_pl.data.evaluation_data import (
    EvaluationData,
    PromptBatch,
    UnitBatch,
    Units,
    WindowBatch,
    WindowSize,
    published_windows,
    sliding_windows,
    window_size,
)
from sparc3_pl.data.reference import ReferenceData
from sparc3_pl.data.sources import text_id
from sparc3_pl.errors import InputError

TEXT = "\n\n".join(documents(8))


@pytest.fixture
def text(tmp_path) -> str:
    (tmp_path / "text.txt").write_text(TEXT)
    return str(tmp_path / "text.txt")


@pytest.fixture
def prompts(tmp_path) -> str:
    rows = [{"prompt": {"text": f"The last train {'x' * (i % 5)} {i}", "toxicity": i / 20}} for i in range(20)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[3]]))
    return str(tmp_path / "prompts.jsonl")


def ready(data, rank=0, world_size=1, max_length=16, stride=16, units=(), **tokenizer):
    data.trainer = SimpleNamespace(global_rank=rank, world_size=world_size)
    data.read(Encoder(tiny_tokenizer(**{"pad_token": "</s>"} | tokenizer)))
    if isinstance(data, EvaluationData):
        data.plan_batches(WindowSize(max_length, stride), units)
    return data


def scored(batches) -> list[int]:
    """Tokens that are scored, in order."""
    return [int(t) for b in batches if isinstance(b, WindowBatch) for t in b.labels.flatten() if t != -100]


# --- windows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_tokens", [2, 3, 8, 9, 16, 17, 50])
@pytest.mark.parametrize(("max_length", "stride"), [(8, 8), (8, 4), (8, 1), (8, 7), (2, 1), (2, 2)])
def test_each_token_is_scored_once_in_the_first_window_that_reaches_it(num_tokens, max_length, stride):
    windows = sliding_windows(num_tokens, max_length, stride)
    first = {}
    for start in range(0, num_tokens, stride):  # the slow way: ask every window for every token
        for token in range(start, min(start + max_length, num_tokens)):
            first.setdefault(token, start)
    expected = {token: start for token, start in first.items() if token > start}
    got = {token: w.start for w in windows for token in range(w.scored, w.end)}
    assert got == expected
    assert sum(w.end - w.scored for w in windows) == len(expected)
    without_context = {0} if stride < max_length else set(range(0, num_tokens, max_length))
    assert set(range(num_tokens)) - set(got) == without_context
    assert [w.index for w in windows] == list(range(len(windows)))


@pytest.mark.parametrize(
    ("max_length", "stride", "message"),
    [(8, 9, r"model\.stride=9"), (8, 0, r"model\.stride=0"), (8, -1, r"model\.stride=-1"), (1, 1, "max_length=1")],
)
def test_windows_that_would_leave_tokens_out(max_length, stride, message):
    with pytest.raises(InputError, match=message):
        sliding_windows(100, max_length, stride)


@pytest.mark.parametrize("num_tokens", [8, 9, 15, 16, 50])
def test_published_windows_are_whole_and_the_rest_is_dropped(num_tokens):
    windows, tokens = published_windows(num_tokens, 8), list(range(num_tokens))
    slices = []  # the papers' loop: as many whole windows as fit
    for i in range(num_tokens // 8):
        slices.append(tokens[i * 8 : (i + 1) * 8])
    assert [tokens[w.start : w.end] for w in windows] == slices
    assert all(w.scored == w.start + 1 for w in windows)
    assert [w.index for w in windows] == list(range(len(slices)))


def test_published_windows_that_do_not_fit():
    with pytest.raises(
        InputError, match=r"windows=published: the text's 7 tokens fill no window of model\.max_length=8"
    ):
        published_windows(7, 8)
    with pytest.raises(InputError, match=r"model\.stride=4: published windows do not overlap"):
        window_size(64, 8, 4, "published")
    assert window_size(64, None, None, "published") == WindowSize(64, 64, "published")


@pytest.mark.parametrize(("max_length", "stride"), [(16, 16), (16, 5)])
@pytest.mark.parametrize("window_batch_size", [1, 3])
def test_labels_are_the_tokens_scored_here(text, max_length, stride, window_batch_size):
    data = EvaluationData(text, prompts_source=None, window_batch_size=window_batch_size)
    ready(data, max_length=max_length, stride=stride)
    ids = tiny_tokenizer()(TEXT).input_ids
    assert ids[0] == 0  # BOS, once
    batches = list(data.test_dataloader())
    left_out = range(0, len(ids), stride) if stride == max_length else [0]
    assert scored(batches) == [token for i, token in enumerate(ids) if i not in left_out]
    assert [i for batch in batches for i in batch.index] == list(range(len(data.windows())))
    for batch in batches:
        here = batch.labels != -100
        assert torch.equal(batch.labels[here], batch.input_ids[here])
        assert batch.attention_mask[here].all()
        assert (batch.input_ids[batch.attention_mask == 0] == 1).all()
        assert not here[:, 0].any()


def test_window_longer_than_the_context(text):
    with pytest.raises(InputError, match=r"model\.max_length=65 is longer than the model's context of 64"):
        ready(EvaluationData(text, prompts_source=None), max_length=65, stride=65, context=64)


# --- text -------------------------------------------------------------------------------------------------------------


def test_records_are_joined_by_an_empty_line(tmp_path):
    texts = [*documents(3), "", "last"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"t": {"x": text}}) + "\n" for text in texts))
    data = ready(EvaluationData(str(tmp_path / "a.jsonl"), "t.x", prompts_source=None))
    assert data.token_ids == tiny_tokenizer()("\n\n".join(texts)).input_ids
    assert data.describe()["protocol"]["documents"] == "joined by '\\n\\n'"


def test_packed_text_file(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(TEXT.encode()))
    data = ready(EvaluationData(str(tmp_path / "a.txt.gz"), prompts_source=None))
    assert data.token_ids == tiny_tokenizer()(TEXT).input_ids


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
@pytest.mark.parametrize("limit", [30, 31, 32, 33, 10_000])
def test_limit_in_bytes(tmp_path, kind, limit):
    texts = ["Fünf Öfen für", "größere Räume"]
    whole = "\n\n".join(texts)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    path = tmp_path / f"a.{kind}"
    path.write_text(whole if kind == "txt" else lines, encoding="utf-8")
    data = ready(EvaluationData(str(path), prompts_source=None, text_max_bytes=limit))
    expected = whole
    while len(expected.encode()) > limit:
        expected = expected[:-1]
    assert data.token_ids == tiny_tokenizer()(expected).input_ids
    assert data.describe()["protocol"]["num_bytes"] == len(expected.encode())


def test_limit_reads_no_further(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one two"}\n{"text": null}\n')
    ready(EvaluationData(str(tmp_path / "a.jsonl"), prompts_source=None, text_max_bytes=5))
    with pytest.raises(InputError, match=r"data\.text_source=.*'text' of record 2 is null"):
        ready(EvaluationData(str(tmp_path / "a.jsonl"), prompts_source=None))


def test_too_short_a_text(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(InputError, match="1 tokens are too few"):
        ready(EvaluationData(str(tmp_path / "a.txt"), prompts_source=None), bos=False)


# --- prompts ----------------------------------------------------------------------------------------------------------


def served(data) -> list[str]:
    return [i for batch in data.test_dataloader() if isinstance(batch, PromptBatch) for i in batch.ids]


def test_prompts(prompts):
    data = ready(EvaluationData(None, prompts_source=prompts, prompts_filter="prompt.toxicity >= 0.5", batch_size=3))
    batches = list(data.test_dataloader())
    assert all(isinstance(batch, PromptBatch) for batch in batches)
    assert [len(batch.prompts) for batch in batches] == [3, 3, 3, 1]
    assert all(batch.ids == [text_id(prompt) for prompt in batch.prompts] for batch in batches)
    assert sorted(served(data)) == sorted(data.prompt_ids)
    assert {p.split()[-1] for b in batches for p in b.prompts} == {str(i) for i in range(10, 20)}


def test_seed_and_number_of_prompts(prompts):
    draws = [ready(EvaluationData(None, prompts_source=prompts, num_prompts=6, seed=s)).prompt_ids for s in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert len(draws[0]) == 6
    with pytest.raises(InputError, match=r"data\.num_prompts=21: only 20 prompts in .*1 duplicates"):
        ready(EvaluationData(None, prompts_source=prompts, num_prompts=21))


def test_ids_and_halves_agree_with_the_reference_samples(prompts):
    attributed = ReferenceData(prompts, "prompt.text", seq_len=None, partition="attribution", partition_seed=5)
    evaluated = EvaluationData(None, prompts_source=prompts, partition="evaluation", partition_seed=5)
    ready(attributed), ready(evaluated)
    ids = {sample.id for sample in attributed.samples}
    assert ids
    assert not ids & set(evaluated.prompt_ids)
    everything = ready(EvaluationData(None, prompts_source=prompts))
    assert ids | set(evaluated.prompt_ids) == set(everything.prompt_ids)


@pytest.mark.parametrize("world_size", [1, 2, 4, 8, 30])
def test_ranks_share_windows_and_prompts_without_repetition(text, prompts, world_size):
    options = {"text_source": text, "prompts_source": prompts, "num_prompts": 7, "batch_size": 3}
    tokens, ids = [], []
    for rank in range(world_size):
        data = ready(EvaluationData(**options), rank, world_size)
        tokens += scored(data.test_dataloader())
        ids += served(data)
    whole = ready(EvaluationData(**options))
    assert len(ids) == 7
    assert sorted(ids) == sorted(whole.prompt_ids)
    assert sorted(tokens) == sorted(scored(whole.test_dataloader()))


@pytest.mark.parametrize("seq_len", [None, 8])
def test_prompts_of_which_samples_were_made_are_known(tmp_path, prompts, seq_len):
    """As a score folder and a plan hand them on: the samples' ids, and those of their texts."""
    attributed = ready(ReferenceData(prompts, "prompt.text", seq_len=seq_len, num_samples=4))
    known = {name for sample in attributed.samples for name in (sample.id, *sample.text_ids)}
    texts = ready(EvaluationData(None, prompts_source=prompts)).prompts
    used = {text for text in texts if text_id(text) in {name for s in attributed.samples for name in s.text_ids}}
    assert 0 < len(used) < len(texts)
    rows = [form.format(text) for text in texts for form in ("{}", "{} ", "<s>{}", "\ufeff{}\n")]
    (tmp_path / "variants.jsonl").write_text("".join(json.dumps({"prompt": row}) + "\n" for row in rows))
    data = ready(EvaluationData(None, prompts_source=str(tmp_path / "variants.jsonl"), prompts_field="prompt"))
    expected = {text_id(row) for row in rows if row.strip("\ufeff\n ").removeprefix("<s>") in used}
    assert data.known_prompts(known) == expected
    assert data.known_prompts(set()) == set()


def test_prompts_are_known_by_their_letters_and_by_their_token_ids(prompts):
    data = ready(EvaluationData(None, prompts_source=prompts))
    text = data.prompts[3]
    body = tiny_tokenizer(bos=False)(text).input_ids
    for name in (text_id(text), text_id(body), text_id([0, *body])):  # a folder of an earlier version; lists of ids
        assert data.known_prompts({name, "another"}) == {text_id(text)}


@pytest.mark.parametrize("form", ["txt", "jsonl"])
def test_text_that_is_known_from_elsewhere_is_measured(tmp_path, form):
    """Of the lines of a file, or its records, and of what is read of them only."""
    lines = ["= A heading =", "The first train leaves at noon, and on time.", "", "The last one does not."]
    path = tmp_path / f"text.{form}"
    path.write_text("\n".join(lines if form == "txt" else [json.dumps({"text": line}) for line in lines]))
    data = ready(EvaluationData(str(path), prompts_source=None))
    known = {text_id(lines[1]), "another"}
    assert data.known_text(known) == len(lines[1]) / sum(map(len, lines))
    assert data.known_text(set()) == data.known_text({"another"}) == 0
    short = ready(EvaluationData(str(path), prompts_source=None, text_max_bytes=10))
    assert short.known_text(known) == 0
    assert ready(EvaluationData(None, prompts_source=str(path), prompts_field="text")).known_text(known) == 0


def test_a_text_has_nothing_after_it(text):
    plain = ready(EvaluationData(text, prompts_source=None))
    data = EvaluationData(text, prompts_source=None)
    data.read(Encoder(with_template(tiny_tokenizer(), "<s> $A </s>")))
    assert data.token_ids == plain.token_ids
    assert data.describe()["protocol"] == plain.describe()["protocol"]


def test_units_follow_windows_and_prompts_and_are_shared_out(text, prompts):
    units = [Units("first", list("abcdefg"), 2), Units("second", [1, 2], 5)]
    seen = []
    for rank in range(3):
        data = ready(EvaluationData(text, prompts_source=prompts), rank, 3, units=units)
        batches = list(data.test_dataloader())
        kinds = [type(batch) for batch in batches]
        assert kinds == sorted(kinds, key=[WindowBatch, PromptBatch, UnitBatch].index)
        seen += [(batch.measurement, list(batch.items)) for batch in batches if isinstance(batch, UnitBatch)]
    assert seen == [
        ("first", ["a", "d"]), ("first", ["g"]), ("second", [1]), ("first", ["b", "e"]), ("second", [2]),
        ("first", ["c", "f"]),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "size"),
    [
        ((64, None, None), (64, 64)),
        ((4096, None, None), (2048, 2048)),
        ((None, None, 512), (2048, 512)),
        ((64, 32, 8), (32, 8)),
    ],
)
def test_the_size_of_a_window(asked, size):
    assert window_size(*asked) == WindowSize(*size)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ((64, 65, None), "max_length=65 .* at most 64"),
        ((64, None, 65), "stride=65 .*max_length=64; give at most 64"),
        ((64, None, 0), "stride=0; give at least 1"),
        ((64, 1, None), "max_length=1; give at least 2 tokens"),
        ((64, 32, None, "whole"), "windows='whole' is unknown; give sliding or published"),
    ],
)
def test_a_window_that_does_not_fit(asked, message):
    with pytest.raises(InputError, match=message):
        window_size(*asked)


# --- in a Trainer, and bad input --------------------------------------------------------------------------------------


class Recorder(LightningModule):
    def __init__(self):
        super().__init__()
        self.seen: list[str] = []

    def setup(self, stage):
        self.trainer.datamodule.read(Encoder(tiny_tokenizer(pad_token="</s>")))

    def configure_model(self):
        self.trainer.datamodule.plan_batches(WindowSize(16, 8))

    def test_step(self, batch, batch_idx):
        self.seen.append(type(batch).__name__)
        assert batch.index if isinstance(batch, WindowBatch) else batch.ids


def test_in_a_real_trainer(text, prompts, tmp_path):
    module = Recorder()
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
    )
    trainer.test(module, datamodule=EvaluationData(text, prompts_source=prompts), verbose=False)
    assert set(module.seen) == {"WindowBatch", "PromptBatch"}
    assert module.seen == sorted(module.seen, reverse=True)  # windows first


def test_description_is_json(text, prompts):
    both = ready(EvaluationData(text, prompts_source=prompts)).describe()
    json.dumps(both)
    assert both["num_prompts"] == 20
    assert both["num_duplicates"] == 1
    assert both["protocol"]["tokens_before_text"] == [0]
    assert both["protocol"]["num_text_tokens"] == len(tiny_tokenizer()(TEXT).input_ids)
    assert ready(EvaluationData(None, prompts_source=prompts)).describe()["text_source"] is None
    assert ready(EvaluationData(text, prompts_source=None)).describe()["prompts_source"] is None


@pytest.mark.parametrize("key", ["text_max_bytes", "num_prompts", "batch_size", "window_batch_size"])
def test_counts_below_one(key):
    with pytest.raises(InputError, match=rf"data\.{key}=0 is too small"):
        EvaluationData(**{key: 0})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts_filter": "toxicity"}, r"data\.prompts_filter='toxicity'"),
        ({"prompts_field": "prompt.txt"}, r"data\.prompts_field: no field 'prompt\.txt'; there are: prompt\.text"),
        ({"prompts_filter": "prompt.tox > 1"}, r"data\.prompts_filter: no field"),
        ({"prompts_field": "prompt.toxicity"}, r"data\.prompts_field: 'prompt\.toxicity' holds float, not text"),
    ],
)
def test_keys_are_named_as_in_the_configuration(prompts, options, message):
    with pytest.raises(InputError, match=message):
        ready(EvaluationData(None, prompts_source=prompts, **options))


@pytest.mark.parametrize(("key", "field"), [("text_source", "text"), ("prompts_source", "prompts")])
def test_missing_files(tmp_path, key, field):
    options = {"text_source": None, "prompts_source": None} | {key: str(tmp_path / "nothing.jsonl")}
    with pytest.raises(InputError, match=rf"data\.{key}=.*no such file"):
        ready(EvaluationData(**options))


@pytest.mark.parametrize("options", [{"num_pairs": 5}, {"pairs_filter": "a > 1"}, {"pairs_subset": "en"}])
def test_settings_of_pairs_need_a_source_of_pairs(options):
    with pytest.raises(InputError, match=rf"data\.{next(iter(options))}=.* needs data\.pairs_source"):
        EvaluationData(**options)
