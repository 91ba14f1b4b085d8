"""The report that the documentation shows: one small page that opens anywhere."""

from build_examples import EXAMPLES, LIMIT


def test_the_example_report_is_one_small_page():
    text = (EXAMPLES / "demo_report.html").read_text(encoding="utf-8")
    assert 'name="generator" content="sparc3_pl"' in text
    assert "control-random_matched" in text
    assert "<script" not in text
    assert len(text.encode()) < LIMIT
