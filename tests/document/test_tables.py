"""Cells: how figures are written, and which columns are aligned on the right."""

import html
import re

import pytest

from sparc3_pl.document.blocks import (
    Number,
    Numbers,
    Section,
    Table,
    better_worse,
    count,
    from_to,
    interval,
    number,
    p_value,
    percent,
    with_relative,
)
from sparc3_pl.document.markdown import markdown
from sparc3_pl.document.page import page
from sparc3_pl.document.terminal import print_result


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        (number(1234.5678), "1,235"),
        (number(12345.678, 6), "12,345.7"),
        (number(0.000012345, 3), "1.23e-05"),
        (number(0.0), "0"),
        (number(float("nan")), "–"),
        (number(None), "–"),
        (number(float("inf")), "inf"),
        (count(1234567), "1,234,567"),
        (percent(0.12345), "12.3 %"),
        (percent(None), "–"),
        (p_value(0.0123), "0.0123"),
        (p_value(0.00001), "< 0.0001"),
        (p_value(None), "–"),
        (interval(-0.5, 0.25, 60, "+.3f"), "-0.500 .. +0.250"),
        (interval(0.5, 1.25, 60, "+.2f", " %"), "+0.50 % .. +1.25 %"),
        (interval(None, None, 3, "+.3f"), "none: 3 of 6 needed"),
        (from_to(0.997, 0.52, ".3f"), "0.997 to 0.520"),
        (with_relative(-0.477, -0.478, "+.3f", "+.0f"), "-0.477 (-48 %)"),
        (with_relative(0.1, None, "+.3f", "+.0f"), "+0.100"),
        (better_worse(31, 4, 60), "31/4 of 60"),
        (Numbers("{} ({})", (Number(2), interval(1, 3, 9, "d"))), "2 (1 .. 3)"),
    ],
)
def test_how_a_figure_is_written(cell, text):
    assert str(cell) == f"{cell}" == text


TABLE = Table.of(
    ("name", "figures", "gaps", "looks like figures", "mixed"),
    [("1", Number(1.5), None, "3.12", "text"), ("2", interval(1, 20, 9, "d"), Number(2), "3", Number(3))],
)
RIGHT = (False, True, True, False, False)
"""By column: figures, with gaps or not, are on the right; text is on the left, whatever it looks like."""


def test_values_decide_the_side_of_a_column():
    assert TABLE.numeric == RIGHT
    assert TABLE.texts == (("1", "1.5", "", "3.12", "text"), ("2", "1 .. 20", "2", "3", "3"))


def test_all_renderers_write_the_same_cells_on_the_same_side(capsys):
    sections = [Section("One", (TABLE,))]
    text = markdown("Title", sections)
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    assert [cell == "---:" for cell in rows[1]] == list(RIGHT)
    assert "| 2 | 1 .. 20 | 2 | 3 | 3 |" in text

    source = page("Title", sections)
    cells = re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", source[source.index("<tbody>") :])
    assert tuple(map(html.unescape, cells)) == sum(TABLE.texts, ())
    heads = re.findall(r"<th scope=\"col\"([^>]*)>", source)
    assert ['class="n"' in head for head in heads] == list(RIGHT)

    print_result(TABLE)
    lines = capsys.readouterr().out.splitlines()
    (one,), (two,) = ([line for line in lines if line.strip().startswith(name)] for name in "12")
    assert one.index("1.5") + len("1.5") == two.index("1 .. 20") + len("1 .. 20")
    assert one.index("3.12") == two.index(" 3 ", two.index("20")) + 1
