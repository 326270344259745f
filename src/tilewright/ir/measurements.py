"""Timings that the runtime took and that ``passes.specialize`` decides by. Passes themselves never run kernels."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class GemmKey:
    """A GEMM problem: out[M, N] = x[M, K] @ w[N, K].T, with the dtype's name."""

    n: int
    k: int
    dtype: str


@dataclass(frozen=True)
class Measurements:
    """Seconds per call by GEMM problem, variant name and row count.

    ``seconds[key][variant]`` is a tuple of (rows, seconds) sorted by rows. Empty for a compile without measuring.
    """

    seconds: dict[GemmKey, dict[str, tuple[tuple[int, float], ...]]] = field(default_factory=dict)
