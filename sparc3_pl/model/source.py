"""The source of a model, and the number format in which it is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from sparc3_pl.errors import InputError
from sparc3_pl.io.hub import local_path

__all__ = ["SHARDED", "DType", "ModelSource"]

SHARDED = "sharded"
"""Stands for a device map in commands without a Trainer: over the processes that ``torchrun`` has started (FSDP2)."""

DType = Literal["float32", "bfloat16", "float16", "auto"]


@dataclass(frozen=True)
class ModelSource:
    """The source of a language model, and how it is loaded.

    Args:
        pretrained: Hub id, local folder in the Hugging Face layout, ``FILE.gguf``, or ``demo`` (the embedded model).
        dtype: Number format of the weights; ``auto`` takes the checkpoint's own.
        revision: Branch, tag or commit of a hub id.
        device_map: As in transformers (``auto``, or module name to device): spreads the model over devices.
        trust_remote_code: Run Python code that the checkpoint brings along. Off unless you turn it on.
        dequantize: Make plain weights of packed ones (8 bits or fewer), where transformers can; else they are refused.
    """

    pretrained: str = "demo"
    dtype: DType = "auto"
    revision: str | None = None
    device_map: str | dict[str, Any] | None = None
    trust_remote_code: bool = False
    dequantize: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in get_args(DType):
            raise InputError(f"model.dtype={self.dtype!r} is not known; use one of {', '.join(get_args(DType))}")

    @property
    def path(self) -> Path | None:
        """The local folder or file, or None for a hub id.

        Raises:
            InputError: If ``pretrained`` is written like a path and nothing is there.
        """
        if self.pretrained == "demo":
            from sparc3_pl import demo

            return Path(demo.MODEL)
        return local_path(
            self.pretrained, "model.pretrained", suffixes=(".gguf", ".safetensors", ".bin", ".pt", ".ckpt")
        )
