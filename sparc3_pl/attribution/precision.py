"""The number format in which attributions are computed."""

import torch

__all__ = ["exact"]


def exact(dtype: torch.dtype) -> torch.dtype:
    """Single precision where ``dtype`` is half precision, which cannot hold sums and quotients; else ``dtype``."""
    return torch.promote_types(dtype, torch.float32)
