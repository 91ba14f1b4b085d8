"""The site's versions: a folder each, listed newest first, and a first page that leads to the newest."""

import json
import shutil

import pytest
from build_site import version_of_package, versions_in, write_versions
from check_site import WIDTHS, complaints, views_of

from sparc3_pl import __version__


def test_versions_are_listed_newest_first(tmp_path):
    for name in ("0.2.0", "0.10.0", "0.9.1", "notes", "0.3.0"):
        (tmp_path / name).mkdir()
        if name != "0.3.0":  # a build that did not end
            (tmp_path / name / "index.html").touch()
    assert write_versions(tmp_path) == versions_in(tmp_path) == ["0.10.0", "0.9.1", "0.2.0"]
    listed = json.loads((tmp_path / "versions.json").read_text())
    assert [(one["version"], one["aliases"]) for one in listed] == [
        ("0.10.0", ["latest"]),
        ("0.9.1", []),
        ("0.2.0", []),
    ]
    assert "./0.10.0/index.html" in (tmp_path / "index.html").read_text()


PAGE = """<!doctype html><meta charset="utf-8"><body><div style="width: {width}px; {style}">text</div><script>
document.body.dataset.mdColorScheme = matchMedia("(prefers-color-scheme: dark)").matches ? "slate" : "default";
</script></body>"""


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_a_page_that_scrolls_sideways_is_seen(tmp_path):
    """Pages whose widths are known: one fits all windows, one only the wide one, one only if its box scrolls itself."""
    (tmp_path / "howto").mkdir()
    (tmp_path / "fits.html").write_text(PAGE.format(width=200, style=""))
    (tmp_path / "howto" / "wide.html").write_text(PAGE.format(width=800, style="border: 1px solid"))
    box = PAGE.replace("<div", "<section style='overflow: auto'><div").replace("</div>", "</div></section>")
    (tmp_path / "box.html").write_text(box.format(width=2000, style=""))
    (tmp_path / "index.html").write_text('<meta http-equiv="refresh" content="0; url=fits.html">')  # leads elsewhere
    views = views_of(tmp_path, "dark")
    assert [(view.page, view.window) for view in views] == [
        (page, width) for page in ("box.html", "fits.html", "howto/wide.html") for width in WIDTHS
    ]
    assert {view.scheme for view in views} == {"slate"}
    (line,) = complaints(views)  # 8 pixels are margin, 2 border
    assert line.startswith("howto/wide.html is 810 pixels wide in a window of 360: <div style=")


def test_the_version_is_the_packages():
    assert version_of_package() == __version__
