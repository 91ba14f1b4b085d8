"""How much memory and disk is free, and how much memory was used at most."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["free_by_place", "free_memory", "peak_memory"]


def free_memory(device: torch.device | None = None) -> int | None:
    """Bytes that can still be allocated on ``device``, or on the host; None where the system does not say."""
    if device is not None and device.type == "cuda":
        import torch

        reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserve
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text(encoding="ascii").splitlines() if meminfo.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def free_by_place(device: torch.device, folder: str | Path) -> dict[str, int | None]:
    """Free bytes of the ``device``, unless that is the host, of the ``host``, and of the ``disk`` where ``folder`` is
    or will be; None: unknown.
    """
    there = next(path for path in (Path(folder).absolute(), *Path(folder).absolute().parents) if path.exists())
    places = {"host": free_memory(), "disk": shutil.disk_usage(there).free}
    return places if device.type == "cpu" else {"device": free_memory(device)} | places


def peak_memory(device: torch.device | None = None) -> int:
    """The most bytes that this process has held so far: on ``device`` if it is a GPU, else of the host."""
    if device is not None and device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
