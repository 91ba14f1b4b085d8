"""Lightning's launcher of rank processes, under this program's supervision."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector

from sparc3_pl.runtime.processes import LAUNCHER, is_supervised, watch_children

__all__ = ["Launcher", "NoSignals"]


class Launcher(_SubprocessScriptLauncher):
    """Lightning's launcher of the other ranks, watched by us.

    Lightning's own watcher kills every process, rank 0 included, when one ends badly: nobody could say why.
    """

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        """Starts the other ranks, then calls ``function`` on this one."""
        if not is_supervised():
            return super().launch(function, *args, trainer=trainer, **kwargs)
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not self.cluster_environment.creates_processes_externally:
            os.environ[LAUNCHER] = str(os.getpid())
            self._call_children_scripts()
            watch_children(self.procs)
        _set_num_threads_if_needed(num_processes=self.num_processes)
        return function(*args, **kwargs)


class NoSignals(_SignalConnector):
    """Leaves the signals alone: Lightning's handler broadcasts from inside itself, and then continues the pass."""

    def register_signal_handlers(self) -> None:
        """Registers nothing."""
