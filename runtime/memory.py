"""Arena planning: which values share memory, and where each begins, for sizes known only at each call.

Values get shared buffers by liveness ("shared objects", greedy by size: Pisarchyk and Lee, Efficient Memory Management
for Deep Neural Net Inference, 2020, section 4). Two values share a buffer only if no step needs both, so a plan is
right for every (B, S, T); a buffer is as large as the largest of its values, and buffers lie one after another. Sizes
decide only how good the reuse is, never whether it is right.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import sympy
import torch
from torch import Tensor

from tilewright.ir.program import Choice, Step
from tilewright.ir.sizes import Size, compile_sizes
from tilewright.runtime.pages import empty_bytes

ALIGNMENT = 64
"""Bytes; a cache line, and the widest vector."""

_PAGE = 4096
# What sizes are compared at while planning: a batch of middling size, half of it padding.
_TYPICAL = {"B": 8, "S": 128, "T": 512, "R": 8, "P": 16, "N": 512}


@dataclass(frozen=True)
class Lifetime:
    """When a value is needed.

    Attributes:
        value: index of the value.
        size: bytes.
        first, last: positions of the first and the last step that touches it, both included.
    """

    value: int
    size: Size
    first: int
    last: int

    def overlaps(self, other: "Lifetime") -> bool:
        """Whether some step needs both values."""
        return self.first <= other.last and other.first <= self.last


def touched(steps: Iterable[Step]) -> dict[int, tuple[int, int]]:
    """First and last position that touches each value.

    The steps of a table's entries are numbered one after another, as if all of them ran: so scratch of different
    entries may share memory, while whatever is needed by any entry or after the table stays.
    """
    spans: dict[int, tuple[int, int]] = {}
    position = 0
    for step in steps:
        for inner in [s for _, _, entry in step.table for s in entry] if isinstance(step, Choice) else [step]:
            for value in (*inner.reads, *inner.writes):
                spans[value] = (spans.get(value, (position, 0))[0], position)
            position += 1
    return spans


class MemoryPlan:
    """Where values lie in an arena.

    Args:
        symbols: size symbols, in the order ``place`` takes their values.
        lifetimes: values that share the arena.

    Attributes:
        values: indices of the values, also as the array ``value_numbers``.
        buffers: which of them share memory.
    """

    def __init__(self, symbols: Sequence[sympy.Symbol], lifetimes: Iterable[Lifetime]) -> None:
        self.symbols = tuple(symbols)
        self.lifetimes = tuple(lifetimes)
        self.buffers = _assign(self.lifetimes)
        buffer_of = {life.value: i for i, buffer in enumerate(self.buffers) for life in buffer}
        self.values = tuple(life.value for life in self.lifetimes)
        self.value_numbers = np.array(self.values, dtype=np.int64)
        self._buffer_of = np.array([buffer_of[value] for value in self.values], dtype=np.int64)
        candidates = [tuple(dict.fromkeys(life.size for life in buffer)) for buffer in self.buffers]
        self._starts = np.cumsum([0, *map(len, candidates)], dtype=np.int64)[:-1]
        self._sizes = compile_sizes(self.symbols, [size for buffer in candidates for size in buffer])

    def place(self, sizes: Sequence[int]) -> tuple[np.ndarray, int]:
        """Offset of each of ``values`` in bytes (int64), and the bytes needed in all."""
        if not self.values:
            return np.zeros(0, dtype=np.int64), 0
        largest = np.maximum.reduceat(np.array(self._sizes(*sizes), dtype=np.int64), self._starts)
        largest += ALIGNMENT - 1
        largest &= -ALIGNMENT
        ends = np.cumsum(largest)
        return (ends - largest)[self._buffer_of], int(ends[-1])

    def bytes_without_reuse(self, sizes: Sequence[int]) -> int:
        """Bytes if every value had memory of its own."""
        each = compile_sizes(self.symbols, [life.size for life in self.lifetimes])(*sizes)
        return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in each)


def _assign(lifetimes: Sequence[Lifetime]) -> list[list[Lifetime]]:
    """Largest first, each value goes to the buffer that fits it best and is free while it lives."""
    sizes = dict.fromkeys(life.size for life in lifetimes)
    bytes_of = {size: _typical_size(size) for size in sizes}
    family_of = {size: sympy.sympify(size).as_coeff_Mul()[1] for size in sizes}
    buffers: list[list[Lifetime]] = []
    for life in sorted(lifetimes, key=lambda life: (-bytes_of[life.size], life.first)):
        free = [buffer for buffer in buffers if not any(life.overlaps(other) for other in buffer)]
        if free:
            # All are at least as large here. One of proportional size stays so whatever the sizes of a call are.
            family = family_of[life.size]
            best = min(
                (family_of[buffer[0].size] != family, bytes_of[buffer[0].size], i) for i, buffer in enumerate(free)
            )
            free[best[2]].append(life)
        else:
            buffers.append([life])
    return buffers


def _typical_size(size: Size) -> int:
    expression = sympy.sympify(size)
    return int(expression.subs({s: _TYPICAL.get(s.name, 64) for s in expression.free_symbols}))


class Arena:
    """One block of memory that grows when needed and is kept between calls.

    Attributes:
        bytes: its size.
        address: of its first byte; a multiple of the page size. 0 before the first ``reserve``.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self.address = 0
        self._typed: Mapping[torch.dtype, Tensor] = {}

    def reserve(self, needed: int) -> bool:
        """Makes it at least ``needed`` bytes; returns True if it moved, with its contents gone.

        Raises:
            MemoryError: the system has no such block.
        """
        if needed <= self.bytes and self.address:
            return False
        # Slowly rising sizes should not move it at every call; pages that are never touched cost nothing.
        size = -(-max(needed, self.bytes + self.bytes // 4) // _PAGE) * _PAGE
        self.bytes, self.address, self._typed = 0, 0, {}
        try:
            block = empty_bytes(size + 2 * _PAGE)
        except RuntimeError as error:
            raise MemoryError(f"the arena of a program needs {needed} bytes") from error
        # A page is left after the end: a kernel may read the first vector of an empty value.
        start = -block.data_ptr() % _PAGE
        block = block[start : start + size + _PAGE]
        self._typed = {torch.uint8: block}
        self.bytes, self.address = size, block.data_ptr()
        return True

    def tensor(self, dtype: torch.dtype) -> Tensor:
        """All of it as elements of one dtype; views of it are values."""
        found = self._typed.get(dtype)
        if found is None:
            found = self._typed[torch.uint8].view(dtype)
            self._typed = {**self._typed, dtype: found}
        return found

    def clear(self, count: int) -> None:
        """Zeroes the first ``count`` bytes."""
        self._typed[torch.uint8][:count].zero_()
