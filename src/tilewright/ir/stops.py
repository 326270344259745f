"""What a kernel that stops itself leaves behind, and what it is told about memory.

A kernel that checks its accesses, or that asserts, has one more argument slot than parameters: the address of a
``MemoryTable``. Whoever launches it fills one in, and looks at its ``StopRecord`` afterwards
(``tilewright.errors`` of it: ``tilewright.ir.stop_errors``). Both are arrays of 8-byte words.
"""

import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

TABLE_RANGES = 3
"""Word of a table at which the memory of parameter 0 stands, two words for each parameter."""


class StopRecord:
    """Where the first program to stop says why; the words are state, site, address, x, y, z, table.

    The state is 0, 1 while the record is being written, then 2. The site is the address of a text in the kernel's
    code.

    Attributes:
        address: of the record.
    """

    def __init__(self) -> None:
        self._words = (ctypes.c_uint64 * 7)()
        self.address = ctypes.addressof(self._words)

    def reset(self) -> None:
        """Before a launch."""
        self._words[0] = 0

    @property
    def stopped(self) -> bool:
        """Whether a program stopped."""
        return self._words[0] != 0

    def read(self) -> "Stop":
        """What is on record; the kernel's code still has to be loaded."""
        _, site, address, x, y, z, table = self._words
        return Stop(ctypes.string_at(site).decode(), address, (x, y, z), table)


@dataclass(frozen=True)
class Stop:
    """A program that stopped its kernel.

    Attributes:
        site: JSON text of the place in the kernel; ``tilewright.codegen.cpu.lower.stop`` writes it.
        address: of the access.
        program: coordinates.
        table: address of the ``MemoryTable`` the kernel was given.
    """

    site: str
    address: int
    program: tuple[int, int, int]
    table: int


class MemoryTable:
    """Memory that a launch may touch: of each parameter, and all of it for pointers of unknown origin.

    Words: address of the record; address and number of the (start, end) pairs that ``allow`` sets; then (start, bytes)
    of each parameter, zeros for one that is no pointer.

    Args:
        record: where the kernel reports.
        parameters: number of its parameters.

    Attributes:
        address: of the table.
    """

    def __init__(self, record: StopRecord, parameters: int) -> None:
        self.record = record
        self._words = (ctypes.c_uint64 * (TABLE_RANGES + 2 * parameters))()
        self._words[0] = record.address
        self._ranges = (ctypes.c_uint64 * 0)()
        self.address = ctypes.addressof(self._words)

    def set(self, parameter: int, start: int, nbytes: int) -> None:
        """Gives a parameter its memory."""
        at = TABLE_RANGES + 2 * parameter
        self._words[at], self._words[at + 1] = start, nbytes

    def allow(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Memory, as (start, end), that pointers made from numbers or read from memory may touch."""
        flat = [word for pair in merged(ranges) for word in pair]
        self._ranges = (ctypes.c_uint64 * len(flat))(*flat)
        self._words[1], self._words[2] = ctypes.addressof(self._ranges), len(flat) // 2


def merged(ranges: Iterable[tuple[int, int]]) -> Sequence[tuple[int, int]]:
    """Sorted ranges without empty ones; those that overlap become one."""
    out: list[tuple[int, int]] = []
    for start, end in sorted(pair for pair in ranges if pair[0] < pair[1]):
        if out and start < out[-1][1]:
            out[-1] = (out[-1][0], max(end, out[-1][1]))
        else:
            out.append((start, end))
    return out
