"""The page of model families says what the tests measure."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
_SPEC = importlib.util.spec_from_file_location("build_families", ROOT / "scripts" / "build_families.py")
build_families = sys.modules["build_families"] = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(build_families)

TEXT = build_families.PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("family", build_families.EVERYTHING)
def test_the_row_of_a_family_is_what_is_measured(family):
    row, cells = build_families.measured(family), build_families.rows_of(TEXT)[family]
    numbers = {2, 5}
    assert [cell for place, cell in enumerate(row.cells) if place not in numbers] == [
        cell for place, cell in enumerate(cells) if place not in numbers
    ]
    assert row.residual <= min(1e-6, 10 * max(float(cells[2]), 1e-12))  # rounding is another on another machine
    assert row.reload <= 1e-6 + float(cells[5])


def test_the_rest_of_the_page_is_what_the_script_makes():
    rows = build_families.rows_of(TEXT)
    assert tuple(rows) == build_families.EVERYTHING

    class Known:
        def __init__(self, cells):
            self.cells = cells

    assert build_families.page(map(Known, rows.values())) == TEXT
