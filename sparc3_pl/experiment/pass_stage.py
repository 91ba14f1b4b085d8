"""A stage that is a pass of the Trainer: ``score`` or ``eval``, as if it had been typed."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparc3_pl import passes
from sparc3_pl.experiment.stages import Settings, Stage, Stages
from sparc3_pl.io.provenance import redacted
from sparc3_pl.io.yaml_format import dump_yaml
from sparc3_pl.model.patching import swapped
from sparc3_pl.runtime.processes import run_child

if TYPE_CHECKING:
    from sparc3_pl.passes.run import Forecast

__all__ = ["pass_stage", "settings_in_file", "typed"]


def pass_stage(
    stages: Stages,
    command: str,
    name: str,
    settings: Settings,
    output: Path,
    marker: str,
    plans: Mapping[str, Path] | None = None,
    reads: Mapping[str, Path] | None = None,
) -> Stage:
    """The stage of one pass.

    Args:
        stages: Where its settings and its record are kept.
        command: ``score`` or ``eval``.
        name: Name of the pass among those of the command.
        settings: Its sections ``model``, ``data`` and ``trainer``, and further keys; empty ones are left out.
        output: The folder that it makes.
        marker: The file that stands for the folder.
        plans: Plan files by the option that names them.
        reads: Results of earlier stages, by what they are to this one.
    """
    settings = {key: value for key, value in settings.items() if value}
    stage, plans = f"{command}-{name}", plans or {}

    def make(overwrite: bool) -> None:
        rest = ["--output", str(output), *(word for key, path in plans.items() for word in (f"--{key}", str(path)))]
        rest += ["--overwrite"] if overwrite else []
        words = [command, "--config", str(stages.settings_file(stage)), *rest]
        with settings_in_file(settings, stages.settings_file(stage)) as config:
            arguments = ["--config", str(config), *rest]
            if settings.get("trainer", {}).get("devices") == 1:
                from sparc3_pl.passes.run import run_pass

                with typed(*words):
                    run_pass(command, arguments)
                return
            # Lightning starts further processes by repeating this process's command line: it needs one of its own
            if code := run_child([sys.executable, "-m", passes.__name__, command, *arguments]):
                raise SystemExit(code)  # it has said why

    def check() -> None:
        from sparc3_pl.passes.run import check_pass

        with _temporary(settings, f"{stage}-") as config:
            check_pass(command, ["--config", str(config)])

    def forecast() -> Forecast:
        from sparc3_pl.passes.run import forecast_of

        with _temporary(settings, f"{stage}-") as config:
            return forecast_of(command, ["--config", str(config), "--output", str(output)])

    return Stage(stage, settings, output, output / marker, {**plans, **(reads or {})}, make, check, forecast)


def typed(*words: str) -> AbstractContextManager[Any]:
    """Inside the block results say that they were made by this command, not by the experiment's."""
    return swapped(sys, "argv", ["sparc3", *words])


@contextmanager
def settings_in_file(settings: Settings, settings_file: Path) -> Iterator[Path]:
    """A file with the settings: the one that is kept, or, if secrets were left out there, one that goes afterwards."""
    if redacted(settings) == settings:
        yield settings_file
        return
    with _temporary(settings) as path:
        yield path


@contextmanager
def _temporary(settings: Settings, prefix: str | None = None) -> Iterator[Path]:
    """A file with the settings, for its owner's eyes only, that goes afterwards."""
    handle, name = tempfile.mkstemp(suffix=".yaml", prefix=prefix)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(dump_yaml(settings))
        yield Path(name)
    finally:
        Path(name).unlink()
