"""Options of ``tilewright.compile``, checked once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tilewright.errors import OptionError
from tilewright.passes.pipeline import pipeline

_NAMES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
_KEPT = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}
_CHOICES: dict[str, tuple[Any, ...]] = {
    "opt_level": (0, 1, 2, 3),
    "unpad": ("auto", "on", "off"),
    "target": ("auto", "cpu", "cuda"),
    "gemm": ("auto", "triton", "vendor"),
    "activations": ("int8", "float"),
    "kv_dtype": (None, *_KEPT, *_KEPT.values()),
}
QUANTIZED = ("int8", "int4")
"""Weights that are rounded to whole numbers when a model is compiled."""


@dataclass(frozen=True)
class CompileOptions:
    """How to compile; the fields are documented at ``tilewright.compile``."""

    dtype: torch.dtype | str | None = None
    opt_level: int = 2
    unpad: str = "auto"
    target: str = "auto"
    gemm: str = "auto"
    cache_dir: Path | None = None
    without: tuple[str, ...] = ()
    activations: str = "int8"
    kv_dtype: torch.dtype | str | None = None

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            value: Any = getattr(self, name)
            if value not in choices:
                raise OptionError(
                    f"{name}={value!r} is not a choice", hint=f"choose one of {', '.join(map(repr, choices))}"
                )
        if self.dtype not in (None, torch.int8, *QUANTIZED, *_NAMES, *_NAMES.values()):
            names = ", ".join(map(repr, (*_NAMES, *QUANTIZED)))
            raise OptionError(
                f"dtype={self.dtype!r} is not a choice", hint=f"choose None, one of {names}, or torch's own"
            )
        if self.quantized and self.opt_level == 0:
            raise OptionError(
                f"dtype='{self.quantized}' has no effect at opt_level=0",
                why="that level runs the model's own operations, and products become whole numbers after it",
                hint="choose opt_level 1, 2 or 3",
            )
        pipeline(self.opt_level, without=self.without)  # says what cannot be left out
        if self.target == "cuda":
            raise OptionError(
                "target='cuda' cannot run yet",
                why="this version runs kernels on the CPU; for GPUs they are only compiled ahead of time, in the tests",
                hint="use target='cpu' or 'auto'",
            )

    @property
    def quantized(self) -> str:
        """The one of ``QUANTIZED`` that weights of products are rounded to; "" for none."""
        name = "int8" if self.dtype is torch.int8 else self.dtype
        return name if isinstance(name, str) and name in QUANTIZED else ""

    @property
    def model_dtype(self) -> torch.dtype | None:
        """Element type that the model is converted to; None keeps its own."""
        if self.quantized or self.dtype is None:
            return None
        return _NAMES[self.dtype] if isinstance(self.dtype, str) else self.dtype

    @property
    def pages_dtype(self) -> torch.dtype | None:
        """Element type of the keys and values that generation keeps; None for that of the model."""
        return _KEPT[self.kv_dtype] if isinstance(self.kv_dtype, str) else self.kv_dtype
