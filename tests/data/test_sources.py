import codecs
import gzip
import itertools
import json
import socket
from pathlib import Path

import pytest

from sparc3_pl import demo
from sparc3_pl.data import sources
from sparc3_pl.data.sources import get_field, local_source, parse_filter, partition, read_records, read_text, text_id
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


@pytest.mark.parametrize("kind", ["jsonl", "json", "array.json", "jsonl.gz", "csv", "tsv", "txt", "parquet"])
def test_a_short_file_keeps_the_order_of_the_library(kind, tmp_path):
    # Runs made when the library read local files can be made again.
    import datasets

    texts = datasets.Dataset.from_list([{"text": record["text"]} for record in RECORDS]).to_iterable_dataset()
    expected = [record["text"] for record in texts.shuffle(seed=5, buffer_size=10_000)]
    assert [record["text"] for record in read_records(str(write(kind, tmp_path)), seed=5)] == expected


@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv", "parquet", "txt.gz", "folder"])
def test_a_local_source_is_drawn_from_as_a_whole(kind, tmp_path):
    texts = [f"text {i}" for i in range(24_000)]
    lines = {"txt": texts, "csv": ["text", *texts], "jsonl": [json.dumps({"text": text}) for text in texts]}
    path = tmp_path / f"data.{kind}"
    if kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=5000)
    elif kind == "folder":
        path.mkdir()
        (path / "train-0.txt").write_text("\n".join(texts[:1000]))
        (path / "train-1.txt").write_text("\n".join(texts[1000:]))
    else:
        content = "\n".join(lines[kind.removesuffix(".gz")]).encode()
        path.write_bytes(gzip.compress(content) if kind.endswith(".gz") else content)
    drawn = [int(r["text"].split()[1]) for r in itertools.islice(read_records(str(path), seed=0), 300)]
    thirds = [sum(i // 8000 == third for i in drawn) for third in range(3)]
    assert len(set(drawn)) == 300
    assert min(thirds) > 60  # 100 expected, standard deviation 8
    if kind in ("parquet", "folder"):
        assert sorted(r["text"] for r in read_records(str(path), seed=1)) == sorted(texts)


def test_a_folder_too_large_to_be_read_whole_says_what_it_drew_from(tmp_path, monkeypatch, caplog):
    for i in range(4):
        (tmp_path / f"train-{i}.txt").write_text(f"{i}\n" * 10)
    monkeypatch.setattr(sources, "WHOLE_BYTES", 50)
    records = read_records(str(tmp_path), seed=0)
    assert records.origin["drawn_from"] == "all records of 2 of 4 files, which the seed chose"
    assert "2 of 4 files" in caplog.text
    assert len({record["text"] for record in records}) == 2


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
    "UTF-16": (raw("data.csv", "text\na\n".encode("utf-16")), "UTF-16; convert"),
    "UTF-16 without a mark": (raw("data.txt", "ab\n".encode("utf-16-le")), "line 1 holds a NUL byte"),
    "csv encoding": (raw("data.csv", b"text\n\ncaf\xe9\n"), "line 3 is not UTF-8"),
    "open quote": (raw("data.csv", b'a,b\n"1\n2",2\n"3,4\n5,6\n'), "line 4 breaks the rules of quotes"),
    "stray quotes": (raw("data.tsv", b'text\n"Hi" she said\n'), "line 2 breaks the rules of quotes"),
    "deep": (raw("data.jsonl", b"{}\n" + b'{"a":' * 10**5 + b"1" + b"}" * 10**5), "line 2 is JSON that cannot be held"),
    "cut array": (raw("data.json", b'[\n{"text": "a"},\n'), "line 3 is not JSON"),
    "array of numbers": (raw("data.json", b'[{"text": "a"}, 3]'), "record 2 is JSON but not an object"),
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


TYPED = [{"id": "001", "text": "2020-01-01"}, {"id": "NA", "text": "null"}, {"id": "1e3", "text": "a\x0cb\u2028c\x85d"}]


@pytest.mark.parametrize("seed", [None, 0])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "txt"])
def test_what_a_file_says_does_not_depend_on_its_editor(kind, end, mark, packed, seed, tmp_path):
    separator = "\t" if kind == "tsv" else ","
    lines = {
        "jsonl": [json.dumps(record, ensure_ascii=False) for record in TYPED],
        "json": json.dumps(TYPED, indent=1, ensure_ascii=False).split("\n"),
        "txt": [record["text"] for record in TYPED],
    }.get(kind, [separator.join(row) for row in (("id", "text"), *(record.values() for record in TYPED))])
    content = mark + end.join([*lines, ""]).encode()
    path = tmp_path / (f"a.{kind}.gz" if packed else f"a.{kind}")
    path.write_bytes(gzip.compress(content) if packed else content)
    read = list(read_records(str(path), seed=seed))
    expected = [{"text": record["text"]} for record in TYPED] if kind == "txt" else TYPED
    assert read == expected if seed is None else sorted(map(str, read)) == sorted(map(str, expected))


def test_a_column_that_comes_late_or_changes_its_type(tmp_path):
    long = "x" * 6 * 2**20
    records = [{"text": long, "n": None}, {"text": long, "n": 1}, {"n": "one", "text": "a"}, {"n": {"m": 1}, "o": []}]
    records = list(read_records(str(write_lines(tmp_path / "a.jsonl", records))))
    assert [record.get("text") for record in records] == [long, long, "a", None]
    assert [record["n"] for record in records] == [None, 1, "one", {"m": 1}]


def test_objects_over_several_lines(tmp_path):
    (tmp_path / "a.json").write_text("".join(json.dumps(record, indent=2) + "\n" for record in RECORDS))
    assert list(read_records(str(tmp_path / "a.json"))) == RECORDS


def test_what_nobody_asks_for_cannot_fail(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a", "b": "\\ud800", "c": 1, "c": 2}\n')
    (tmp_path / "a.json").write_text('[{"text": "a", "b": "\\ud800", "c": 1, "c": 2}]')
    (tmp_path / "a.csv").write_text("text,c,c,,\na,1,2,,\n")
    for name in ("a.jsonl", "a.json", "a.csv"):
        (record,) = read_records(str(tmp_path / name))
        assert get_field(record, "text") == "a"
        with pytest.raises(
            InputError, match=r"data\.text_field: 'c' cannot be used: there are several fields named 'c'"
        ):
            get_field(record, "c")
        if "b" in record:
            with pytest.raises(InputError, match="'b' holds half a character"):
                get_field(record, "b")


def test_parquet_values_that_have_no_python_form(tmp_path):
    import pyarrow
    import pyarrow.parquet

    times = pyarrow.array([1, 2], pyarrow.timestamp("ns", "Nowhere/City"))
    kinds = pyarrow.array(["x", "y"]).dictionary_encode()
    pyarrow.parquet.write_table(pyarrow.table({"text": kinds, "time": times}), tmp_path / "a.parquet")
    for seed in (None, 0):
        records = list(read_records(str(tmp_path / "a.parquet"), seed=seed))
        assert sorted(get_field(record, "text") for record in records) == ["x", "y"]
        with pytest.raises(InputError, match="'time' cannot be used"):
            get_field(records[0], "time")


def test_cells_of_a_table(tmp_path):
    rows = ["text,score,flag", '"one\ntwo, ""three""",0.95,True', ",NA,false", "b,,", "c,1,true,", "d"]
    (tmp_path / "a.csv").write_text("\n".join(rows))
    records = list(read_records(str(tmp_path / "a.csv")))
    assert [get_field(record, "text") for record in records] == ['one\ntwo, "three"', None, "b", "c", "d"]
    assert [parse_filter("score >= 0.9").passes(record) for record in records] == [True, None, None, True, None]
    assert [parse_filter("flag == true").passes(record) for record in records] == [True, False, None, True, None]
    assert [parse_filter("score == '1'").passes(record) for record in records] == [False, False, None, True, None]
    with pytest.raises(InputError, match=r"holds 'b' \(text\), which > cannot compare"):
        parse_filter("text > 1").passes(records[2])


def test_a_column_with_a_dot_in_its_name(tmp_path):
    (tmp_path / "a.csv").write_text("prompt.text\nhello\n")
    assert [get_field(record, "prompt.text") for record in read_records(str(tmp_path / "a.csv"))] == ["hello"]


@pytest.mark.parametrize("seed", [None, 3])
def test_place_is_the_line_of_the_file(seed, tmp_path):
    (tmp_path / "a.jsonl").write_text('\n{"line": 2}\n\n\n{"line": 5}\n{"line": 6}')
    (tmp_path / "a.csv").write_text('line,text\n2,"a\nb"\n\n5,c\n6,d')
    for name in ("a.jsonl", "a.csv"):
        records = read_records(str(tmp_path / name), seed=seed)
        for record in records:
            assert records.place == f"line {record['line']}"


def test_a_folder_that_tells_how_to_read_it(tmp_path):
    (tmp_path / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: a.csv\n  sep: ';'\n---\n")
    (tmp_path / "a.csv").write_text("text;b\nx,y;1\n")
    records = read_records(str(tmp_path), seed=0)
    assert [record["text"] for record in records] == ["x,y"]
    assert records.origin["revision"] is None


def test_a_file_needs_no_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    for name, seed in (("a.jsonl", 0), ("a.jsonl", None)):
        assert len(list(read_records(str(write_lines(tmp_path / name)), seed=seed))) == 10
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"a"))
    assert len(list(read_records(str(tmp_path / "a.txt.gz")))) == 1
    with pytest.raises(InputError, match=r"none.* cannot be read or written \(No such file or directory\)"):
        list(read_records(str(tmp_path / "a.txt.gz"), seed=0))


@pytest.mark.parametrize("is_folder", [False, True])
def test_local_data_needs_no_cache_of_the_library(is_folder, tmp_path, monkeypatch):
    path = write_lines(tmp_path / "train.jsonl")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", path / "cache")  # nothing can be made below a file
    assert len(list(read_records(str(tmp_path if is_folder else path)))) == 10


def test_the_file_that_cannot_be_opened_is_named(tmp_path, monkeypatch):
    path = write_lines(tmp_path / "train.jsonl")

    def denied(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(InputError, match=r"train\.jsonl' cannot be read .*\(Permission denied\)$"):
        list(read_records(str(path)))


class Builder:
    """Stands in for the library's builder of a hub data set."""

    hash = "0123456789" * 4

    def as_streaming_dataset(self, split):
        import datasets

        return datasets.Dataset.from_list(RECORDS).to_iterable_dataset()


def test_a_hub_data_set_says_its_commit_and_what_it_was_drawn_from(monkeypatch):
    monkeypatch.setattr(sources, "hub_available", lambda: True)
    monkeypatch.setattr("datasets.load_dataset_builder", lambda *args, **kwargs: Builder())
    records = read_records("someone/some-set", seed=0)
    assert records.origin["revision"] == Builder.hash
    assert "a buffer of 10,000" in records.origin["drawn_from"]
    assert sorted(record["text"] for record in records) == [record["text"] for record in RECORDS]
    monkeypatch.setattr(Builder, "hash", None)
    assert read_records("someone/some-set").origin == {"revision": None, "drawn_from": "records in their order"}


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
    (tmp_path / "a.txt").write_bytes(" = Title = \n\n  x\t\x0c\u2028 \ufeff".encode())
    assert read_text(tmp_path / "a.txt", "data.text_source") == " = Title = \n\n  x\t\x0c\u2028 \ufeff"


@pytest.mark.parametrize("limit", [None, 100, 6000])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_text_is_the_same_from_any_editor(end, mark, packed, limit, tmp_path):
    text = demo.TEXT.read_text(encoding="utf-8")[:6000]
    content = mark + text.replace("\n", end).encode()
    path = tmp_path / ("a.txt.gz" if packed else "a.txt")
    path.write_bytes(gzip.compress(content) if packed else content)
    assert text.isascii()
    assert read_text(path, "data.text_source", limit) == text[:limit]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"caf\xe9 au lait", "byte 3 is not UTF-8"),
        (b" \n", "empty"),
        ("caf\xe9".encode("utf-16"), "UTF-16"),
        ("cafe".encode("utf-16-le"), "byte 1 holds a NUL"),
    ],
)
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
