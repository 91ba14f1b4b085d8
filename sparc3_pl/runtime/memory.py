"""How much memory is free, and how much was used at most."""

from __future__ import annotations

from pathlib import Path

import torch

__all__ = ["free_memory"]


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had on ``device``; of the host 4 GB where the system does not say."""
    if device.type == "cuda":
        held_and_unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held_and_unused
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text(encoding="ascii").splitlines() if meminfo.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 4 * 10**9)
