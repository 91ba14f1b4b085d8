"""What pyproject.toml cannot say: the wheel has the configurations, as ``sparc3_pl/configs``."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildPy(build_py):
    """Copies the folder ``configs``; an editable installation finds it beside the package."""

    def run(self) -> None:
        """Builds as usual first."""
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "sparc3_pl" / "configs"
            shutil.copytree("configs", target, dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildPy})
