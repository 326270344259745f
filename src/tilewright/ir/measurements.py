"""Timings that the runtime took and that ``passes.specialize`` decides by. Passes themselves never run kernels."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class GemmKey:
    """A GEMM problem: out[M, N] = x[M, K] @ w[N, K].T, with the dtype's name and what its region computes around it.

    Attributes:
        heads: products of x [M, heads, K] with as many parts of w, in one problem; ``n`` counts the rows of all.
        around: the region's other calls in a canonical text; empty for a product, with or without bias, by itself.
    """

    n: int
    k: int
    dtype: str
    around: str = ""
    heads: int = 1


@dataclass(frozen=True)
class AttentionKey:
    """An attention problem: sizes of a head, query heads for each head of keys, the dtype's name, and what it masks.

    Attributes:
        query_table, key_table: numbers that are looked up for each query, and for each key; 0 without a table.
    """

    size: int
    value_size: int
    group: int
    dtype: str
    causal: bool = False
    window_left: int = -1
    window_right: int = -1
    bias: bool = False
    query_table: int = 0
    key_table: int = 0
    uniform_pads: bool = False


@dataclass(frozen=True)
class Measurements:
    """Seconds per call by problem, variant name and size. Empty for a compile without measuring.

    ``seconds[key][variant]`` is a tuple of (rows, seconds) sorted by rows; ``attention[key][variant]`` one of (padded
    length, seconds), for the lengths that the variant takes.

    Attributes:
        units: programs that the machine runs at once.
    """

    seconds: dict[GemmKey, dict[str, tuple[tuple[int, float], ...]]] = field(default_factory=dict)
    attention: dict[AttentionKey, dict[str, tuple[tuple[int, float], ...]]] = field(default_factory=dict)
    units: int = 1
