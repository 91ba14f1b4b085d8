"""What is printed: whole at any width, in any encoding, to any reader; and written before."""

import io
import os
import re
import subprocess
import sys

import pytest

from sparc3_pl.cli import main
from sparc3_pl.document.blocks import Number, Section, Table, Text, better_worse, interval, p_value, with_relative
from sparc3_pl.document.publish import publish
from sparc3_pl.document.terminal import print_result, print_sections, printable, unfailing_output


def decimals(value):
    return Number(value, form=".4f")


ROWS = [
    (
        "perplexity",
        decimals(12.3456),
        decimals(12.4567),
        Number(0.9, form="+.2f", unit=" %"),
        interval(0.5, 1.2, 10, "+.2f", " %"),
        p_value(1e-5),
        None,
        "of 123,456,789 tokens",
    ),
    (
        "toxicity [bold]x",
        decimals(0.997),
        decimals(0.52),
        with_relative(-0.477, -0.478, "+.4f", "+.1f"),
        interval(-0.5, -0.45, 60, "+.2f"),
        p_value(0.0123),
        better_worse(31, 4, 60),
        "12 prompts",
    ),
]
WIDE = Table.of(
    ("figure", "before", "after", "change", "interval", "p", "better", "needed"), ROWS, "title", "note 98765"
)


class Stream(io.TextIOWrapper):
    """A stdout in memory."""

    def __init__(self, encoding="utf-8", raw=None, errors="strict"):
        super().__init__(raw or io.BytesIO(), encoding=encoding, errors=errors)

    @property
    def text(self):
        self.flush()
        return self.buffer.getvalue().decode(self.encoding)


@pytest.mark.parametrize("width", [160, 100, 60, 40, 25])
def test_no_figure_is_cut_or_wrapped(width, monkeypatch):
    stream = Stream()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr("sparc3_pl.document.terminal._WIDTH", width)
    print_result(WIDE)
    told = stream.text
    assert max(map(len, told.splitlines())) <= width
    for row in WIDE.texts:
        for figure in re.findall(r"[\d.,]*\d", " ".join(row)):
            assert re.search(rf"(?<![\d.,]){re.escape(figure)}(?![\d.,])", told), figure
    assert "…" not in told
    assert "[bold]x" in told


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_encoding_shows_what_it_can(encoding, monkeypatch):
    stream = Stream(encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    print_sections([Section("Title – one", (Text("± ≤ é ☃ \udcff \x1b[31m [red]"), WIDE))])
    told = stream.text
    dash, snow = ("–", "☃") if encoding == "utf-8" else ("-", "\\u2603")
    assert f"Title {dash} one" in told
    assert f"{snow} \\udcff \\x1b[31m [red]" in told


def test_what_a_terminal_would_obey_is_escaped():
    assert printable("a\x1b[2J\r\x07\u202eb\u2028c\udcff\n\té") == "a\\x1b[2J\\r\\x07\\u202eb\\u2028c\\udcff\n\té"


class Broken(io.RawIOBase):
    """A pipe that nobody reads."""

    def writable(self):
        return True

    def write(self, data):
        raise BrokenPipeError(32, "Broken pipe")


def test_nothing_printed_raises(monkeypatch):
    for stream in (Stream(raw=io.BufferedWriter(Broken())), None, Stream("ascii")):
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", stream)
        with unfailing_output():
            print("é" * 10_000)
            print_result("é", WIDE)
            print("é" * 10_000, file=sys.stderr)
        assert sys.stdout is stream
        monkeypatch.undo()


def test_a_result_is_written_before_it_is_printed(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Stream(raw=io.BufferedWriter(Broken())))
    places = {"output": str(tmp_path / "a.json"), "html": str(tmp_path / "a.html")}
    publish("Title", [Section("–", (WIDE,))], json='{"kind": "audit"}', overwrite=False, **places)
    assert (tmp_path / "a.json").read_text() == '{"kind": "audit"}'
    assert "12.3456" in (tmp_path / "a.html").read_text()
    monkeypatch.undo()


@pytest.mark.parametrize("args", [["--help"], ["score", "--print_config"], ["score", "--help"]])
def test_help_may_be_read_in_part(args, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Stream(raw=io.BufferedWriter(Broken())))
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 0
    monkeypatch.undo()


def test_a_process_whose_reader_left_ends_well():
    """Python itself would end with code 120 and a message, for what it could not flush."""
    code = (
        "from sparc3_pl.document.terminal import print_result, unfailing_output\n"
        "with unfailing_output():\n    print_result(*['x' * 99] * 9999)\n"
    )
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    with subprocess.Popen([sys.executable, "-c", code], stdout=-1, stderr=-1, env=env) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 0
