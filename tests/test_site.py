"""The site's versions: a folder each, listed newest first, and a first page that leads to the newest."""

import json

from build_site import version_of_package, versions_in, write_versions

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


def test_the_version_is_the_packages():
    assert version_of_package() == __version__
