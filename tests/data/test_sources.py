import gzip
import json
import socket
from pathlib import Path

import pytest

from sparc3_pl.data.sources import (
    get_field,
    local_source,
    parse_filter,
    partition,
    read_records,
    read_text,
    text_id,
)
from sparc3_pl.errors import InputError

RECORDS = [{"text": f"Text number {i}.", "prompt": {"score": None if i % 3 == 0 else i / 10}} for i in range(10)]


def write_lines(path: Path, records=RECORDS) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write(kind: str, folder: Path) -> Path:
    """A file of the given kind that holds the texts of RECORDS."""
    path = folder / f"data.{kind}"
    if kind in ("jsonl", "json"):
        write_lines(path)
    elif kind == "array.json":
        path.write_text(json.dumps(RECORDS, indent=1))
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(write_lines(folder / "plain.jsonl").read_bytes()))
    elif kind == "csv":
        path.write_text("id,text\n" + "".join(f'{i},"{r["text"]}"\n' for i, r in enumerate(RECORDS)))
    elif kind == "tsv":
        path.write_text("id\ttext\n" + "".join(f"{i}\t{r['text']}\n" for i, r in enumerate(RECORDS)))
    elif kind == "txt":
        path.write_text("".join(r["text"] + "\n" for r in RECORDS))
    elif kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "array.json", "jsonl.gz", "csv", "tsv", "txt", "parquet"])
def test_reads_every_kind_of_file(kind, tmp_path):
    texts = [record["text"] for record in read_records(str(write(kind, tmp_path)))]
    assert texts == [record["text"] for record in RECORDS]


def test_seed_decides_the_order(tmp_path):
    path = str(write_lines(tmp_path / "a.jsonl"))
    one, same, other = ([r["text"] for r in read_records(path, seed=seed)] for seed in (1, 1, 2))
    assert one == same
    assert one != other
    assert sorted(one) == sorted(other) == sorted(r["text"] for r in RECORDS)


def test_reads_only_what_is_asked_for(tmp_path):
    # The bad line lies far behind: nobody asked for it.
    lines = [json.dumps({"text": "x" * 1000})] * 30_000 + ["{broken"]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    records = read_records(str(tmp_path / "a.jsonl"))
    assert next(records)["text"] == "x" * 1000


def broken_line(line: str):
    def make(folder):
        lines = [json.dumps(record) for record in RECORDS]
        lines[6] = line
        (folder / "data.jsonl").write_text("\n".join(lines))
        return folder / "data.jsonl"

    return make


def raw(name: str, content: bytes):
    def make(folder):
        (folder / name).write_bytes(content)
        return folder / name

    return make


BROKEN = {
    "cut line": (broken_line('{"text": "x'), "line 7 is not JSON"),
    "no JSON": (broken_line("hello"), "line 7 is not JSON"),
    "no object": (broken_line('"hello"'), "line 7 is JSON but not an object"),
    "array": (raw("data.json", b'[\n {"text": "a"},\n {"text" "b"}\n]'), "line 3 is not JSON"),
    "encoding": (raw("data.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}\n'), "line 2 is not UTF-8"),
    "text encoding": (raw("data.txt", b"caf\xe9\n"), "line 1 is not UTF-8"),
    "empty": (raw("data.jsonl", b""), "empty"),
    "blank": (raw("data.jsonl", b"\n\n"), "no records"),
    "half a gzip": (raw("data.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99)[:30]), "breaks off or is damaged"),
    "no gzip": (raw("data.jsonl.gz", b"hello"), "damaged"),
    "no parquet": (raw("data.parquet", b"PAR1 and no more"), "Parquet"),
    "csv columns": (raw("data.csv", b"a,b\n1,2\n1,2,3,4\n"), "line 3"),
    "kind": (raw("data.docx", b"hello"), r"unknown kind of file; use \.jsonl"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_says_what_is_wrong_with_a_file(case, tmp_path, capfd):
    make, message = BROKEN[case]
    path = make(tmp_path)
    with pytest.raises(InputError, match=message) as error:
        list(read_records(str(path)))
    assert "data.source" in str(error.value)
    assert path.name in str(error.value)
    assert "\n" not in str(error.value)
    assert capfd.readouterr().err == ""


def test_missing_file_is_named_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("sparc3_pl.data.sources.hub_available", lambda: pytest.fail("asked the hub"))
    write_lines(tmp_path / "general.jsonl")
    with pytest.raises(InputError, match=r"no such file.*nearest names.*general\.jsonl"):
        list(read_records(str(tmp_path / "genral.jsonl")))
    with pytest.raises(InputError, match="no such file"):
        list(read_records("bare_name.jsonl"))


def test_unreachable_hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InputError, match=r"data\.source='allenai/c4': the hub .* cannot be reached; give a local file"):
        list(read_records("allenai/c4", subset="en"))


def test_local_files_make_no_request(tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        monkeypatch.setattr("datasets.config.S3_DATASETS_BUCKET_PREFIX", address)  # where loads are counted
        assert len(list(read_records(str(write_lines(tmp_path / "a.jsonl"))))) == 10
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()


def test_offline_mode_with_nothing_in_the_cache(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(InputError, match="cannot be opened"):
        list(read_records("nobody/no-such-set"))


def test_folder_of_a_data_set(tmp_path):
    write_lines(tmp_path / "train.jsonl")
    assert len(list(read_records(str(tmp_path)))) == 10
    with pytest.raises(InputError, match="cannot be opened"):
        list(read_records(str(tmp_path), split="nosuch"))


def test_embedded_corpora():
    assert local_source("demo") == local_source("demo:general")
    assert local_source("demo:prompts_heldout").name == "prompts_heldout.jsonl"
    with pytest.raises(InputError, match="no such embedded corpus; there are demo, demo:general"):
        local_source("demo:poems")


# --- text files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", range(1, 9))
def test_text_is_cut_at_a_whole_character(limit, tmp_path):
    text = "aé€😀b"  # 1, 2, 3, 4 and 1 bytes
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    expected = "".join(c for i, c in enumerate(text) if len(text[: i + 1].encode()) <= limit)
    assert read_text(tmp_path / "a.txt", "data.text_source", limit) == expected


def test_text_is_verbatim(tmp_path):
    (tmp_path / "a.txt").write_bytes(b" = Title = \r\n\n  x\t")
    assert read_text(tmp_path / "a.txt", "data.text_source") == " = Title = \r\n\n  x\t"


@pytest.mark.parametrize(("content", "message"), [(b"caf\xe9 au lait", "byte 3 is not UTF-8"), (b" \n", "empty")])
@pytest.mark.parametrize("limit", [None, 100])
def test_text_is_refused(content, message, limit, tmp_path):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_text(tmp_path / "a.txt", "data.text_source", limit)


# --- fields and filters -----------------------------------------------------------------------------------------------

RECORD = {"a": {"b": 0.5, "n": None, "text": "it's", "flag": True}, "gone": None, "nan": float("nan"), "x y": 1}


def test_get_field():
    assert get_field(RECORD, "a.b") == 0.5
    assert get_field(RECORD, "a.n") is None
    assert get_field(RECORD, "gone.b") is None
    assert get_field(RECORD, "nan") is None
    with pytest.raises(InputError, match=r"no field 'a\.c'; there are: a\.b, a\.n"):
        get_field(RECORD, "a.c")
    with pytest.raises(InputError, match="no field 'z'; there are: a, gone"):
        get_field(RECORD, "z")
    with pytest.raises(InputError, match=r"'a\.b' is float"):
        get_field(RECORD, "a.b.c")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.b >= 0.5", True),
        ("a.b > 0.5", False),
        ("a.b <= 0.5", True),
        ("a.b < 0.5", False),
        ("a.b == .5", True),
        ("a.b != 5e-1", False),
        ("a.b>=0.5", True),
        ("a.b >= -1 and a.b < 1", True),
        ("a.b >= -1 and a.b < 0", False),
        ('a.text == "it\'s"', True),
        ("a.text != 'x and y' and a.b > 0", True),
        ("a.flag == true", True),
        ("a.flag != True", False),
        ("a.n >= 0", None),
        ("a.n != 0", None),
        ("nan < 1", None),
        ("a.n > 0 and a.b > 1", False),
        ("a.n > 0 and a.b < 1", None),
    ],
)
def test_filter(text, expected):
    assert parse_filter(text).passes(RECORD) is expected


@pytest.mark.parametrize(
    "text",
    ["", "a.b", "a.b >=", ">= 0.5", "a.b => 0.5", "a.b = 0.5", "a.b > 0.5 or a.b < 1", "a.b > 1 and", "a.b > 1 a.b < 2",
     "a.text == it", "a.b > 0,5", "a.b > nan", "a.text == 'x", "1 < a.b < 2", "a.b > 1 and and a.b < 2"],
)  # fmt: skip
def test_wrong_filters(text):
    with pytest.raises(InputError, match=r"data\.filter="):
        parse_filter(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.z > 1", r"data\.filter: no field 'a\.z'; there are: a\.b"),
        ("a.text > 1", r"holds \"it's\" \(text\), which > cannot compare with 1\.0 \(a number\)"),
        ("a.b == 'x'", "cannot compare"),
        ("a.b == true", "cannot compare"),
        ("a.flag > 0", "cannot compare"),
        ("a > 1", "cannot compare"),
    ],
)
def test_filters_that_do_not_fit_the_data(text, message):
    with pytest.raises(InputError, match=message):
        parse_filter(text).passes(RECORD)


# --- identity ---------------------------------------------------------------------------------------------------------


def test_text_id_is_the_hash_of_the_text():
    assert text_id("abc") == "ba7816bf8f01cfea"  # FIPS 180 example
    assert text_id("\ud800")  # half a surrogate pair, which some data sets hold


def test_partition_depends_on_content_and_seed_only():
    ids = [text_id(str(i)) for i in range(2000)]
    halves = [partition(i, seed=3) for i in ids]
    assert halves == [partition(i, seed=3) for i in ids]
    assert halves != [partition(i, seed=4) for i in ids]
    assert 900 < halves.count("attribution") < 1100
    assert 150 < [partition(i, 3, share=0.1) for i in ids].count("attribution") < 250
    assert {partition(i, 0, share=1.0) for i in ids} == {"attribution"}
    assert {partition(i, 0, share=0.0) for i in ids} == {"evaluation"}
