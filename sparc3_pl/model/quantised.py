"""Checkpoints whose weights are packed into 8 bits or fewer, and whether transformers can make plain ones of them."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["Quantisation", "quantisation_of"]

_BITS = (("load_in_4bit", 4), ("load_in_8bit", 8))
"""How bitsandbytes says how many bits a weight has; others have a key ``bits``."""


@dataclass(frozen=True)
class Quantisation:
    """How the weights of a checkpoint were quantised.

    Attributes:
        method: The method, as the config names it: ``bitsandbytes``, ``gptq``, ``fp8``, ...
        bits: Bits of a weight, if the config says so.
        about: All that the config says of it.
    """

    method: str
    bits: int | None
    about: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.bits}-bit {self.method}" if self.bits else self.method

    @property
    def dequantised(self) -> Literal["while loading", "once loaded"] | None:
        """The time at which transformers can make the weights plain, by its classes for the method; None: never."""
        from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
        from transformers.quantizers.base import HfQuantizer

        name = f"{self.method}_{self.bits}bit" if self.method == "bitsandbytes" else self.method
        settings, quantizer = AUTO_QUANTIZATION_CONFIG_MAPPING.get(name), AUTO_QUANTIZER_MAPPING.get(name)
        if settings is None or quantizer is None:
            return None
        if "dequantize" in inspect.signature(settings.__init__).parameters:
            return "while loading"
        return None if quantizer._dequantize is HfQuantizer._dequantize else "once loaded"


def quantisation_of(config: PretrainedConfig) -> Quantisation | None:
    """How the weights of a checkpoint with this config were quantised; None: its config says nothing of the kind."""
    says = getattr(config, "quantization_config", None)
    if says is None:
        says = getattr(config.get_text_config(), "quantization_config", None)
    if says is None:
        return None
    about = dict(says) if isinstance(says, dict) else says.to_dict()
    method = str(getattr(about.get("quant_method"), "value", about.get("quant_method") or "an unnamed method"))
    bits = next((bits for key, bits in _BITS if about.get(key) is True), about.get("bits"))
    return Quantisation(method, bits, about)
