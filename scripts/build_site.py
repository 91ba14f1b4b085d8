"""Builds the documentation as a site with versions: a folder for this version beside those that were built before.

python scripts/build_site.py [FOLDER]

FOLDER (default: site) then holds VERSION/ for each version, versions.json, from which a page's header offers the
others, and index.html, which leads to the newest. They are plain files for any web server; nothing is fetched from
elsewhere. To add an earlier version, build its checkout into the same folder.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

INDEX = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Documentation</title>
<meta http-equiv="refresh" content="0; url=./{version}/index.html"></head>
<body><a href="./{version}/index.html">Documentation of version {version}</a></body></html>
"""


def version_of_package() -> str:
    """The version that stands in the package's source."""
    text = (ROOT / "sparc3_pl" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.+)"$', text, flags=re.MULTILINE)[1]


def versions_in(folder: Path) -> list[str]:
    """The versions that were built into a folder, newest first."""
    names = [path.parent.name for path in folder.glob("*/index.html") if re.fullmatch(r"\d+(\.\d+)+", path.parent.name)]
    return sorted(names, key=lambda name: [int(part) for part in name.split(".")], reverse=True)


def write_versions(folder: Path) -> list[str]:
    """Writes ``versions.json`` and ``index.html`` for the versions that are there, and returns these, newest first."""
    versions = versions_in(folder)
    entries = [{"version": name, "title": name, "aliases": ["latest"] * (name == versions[0])} for name in versions]
    (folder / "versions.json").write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    (folder / "index.html").write_text(INDEX.format(version=versions[0]), encoding="utf-8")
    return versions


def main() -> int:
    """Builds this version, strictly: a link that leads nowhere is an error."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "site").absolute()
    place = folder / version_of_package()
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--clean", "--site-dir", str(place)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    )  # of Material, at each build
    if done.returncode == 0:
        print(f"versions in {folder}: {', '.join(write_versions(folder))}")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
