"""Options of ``tilewright.compile``, checked once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tilewright.errors import OptionError

_CHOICES = {
    "opt_level": (0, 1, 2, 3),
    "unpad": ("auto", "on", "off"),
    "target": ("auto", "cpu", "cuda"),
    "gemm": ("auto", "triton", "vendor"),
}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class CompileOptions:
    """How to compile; the fields are documented at ``tilewright.compile``."""

    dtype: torch.dtype | None = None
    opt_level: int = 2
    unpad: str = "auto"
    target: str = "auto"
    gemm: str = "auto"
    cache_dir: Path | None = None

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            value: Any = getattr(self, name)
            if value not in choices:
                raise OptionError(
                    f"{name}={value!r} is not a choice", hint=f"choose one of {', '.join(map(repr, choices))}"
                )
        if self.dtype is not None and self.dtype not in _DTYPES:
            raise OptionError(
                f"dtype={self.dtype!r} is not a choice", hint=f"choose None or one of {', '.join(map(str, _DTYPES))}"
            )
        if self.target == "cuda":
            raise OptionError(
                "target='cuda' cannot run yet",
                why="this version runs kernels on the CPU; for GPUs they are only compiled ahead of time, in the tests",
                hint="use target='cpu' or 'auto'",
            )
