"""Kernels of a program that can stop themselves: what they may touch in a call, and the error when one did."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from tilewright.ir.stop_errors import Memory, stop_error
from tilewright.ir.stops import MemoryTable, StopRecord
from tilewright.runtime.phase import StoppingKernel

if TYPE_CHECKING:
    from tilewright.runtime.bound import Bound, Call


class Checks:
    """The memory tables of a bound phase whose kernels can stop themselves; the memory of a value is its own buffer.

    Args:
        bound: the phase; addresses of the tables are written to its slots.
    """

    def __init__(self, bound: "Bound") -> None:
        self._bound = bound
        self._record = StopRecord()
        kernels = bound.phase.stopping
        self._tables = {number: MemoryTable(self._record, len(k.step.args)) for number, k in kernels.items()}
        for number, kernel in kernels.items():
            bound.slots[kernel.position] = self._tables[number].address

    def prepare(self, numbers: Sequence[int], call: "Call") -> None:
        """Before a launch of these kernels: fills in where values are in this call."""
        self._record.reset()
        self._memory = {
            number: self._memory_of(kernel, call)
            for number in numbers
            if (kernel := self._bound.phase.stopping.get(number)) is not None
        }
        for number, memory in self._memory.items():
            table = self._tables[number]
            for argument, block in memory.items():
                table.set(argument, block.start, block.nbytes)
            table.allow((block.start, block.start + block.nbytes) for block in memory.values())

    def raise_if_stopped(self) -> None:
        """After the launch.

        Raises:
            MemoryViolation: a kernel left the memory of its values.
        """
        if self._record.stopped:
            stop = self._record.read()
            raise stop_error(stop, next(m for n, m in self._memory.items() if self._tables[n].address == stop.table))

    def _memory_of(self, kernel: StoppingKernel, call: "Call") -> dict[int, Memory]:
        bound, found = self._bound, {}
        for argument, (value, size) in kernel.memory.items():
            record = bound.phase.spec.values[value]
            tensor = call.tensors.get(value)
            weight = bound.phase.weights.get(value)
            tensor = weight if tensor is None and isinstance(weight, Tensor) else tensor
            if tensor is not None:
                start, nbytes = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
            else:
                start, nbytes = bound.address(value, call), bound.sizes[size]
            about = f"value '{record.name}', {str(record.dtype).removeprefix('torch.')} of shape {record.shape}"
            name = kernel.step.kernel.signature[argument][0]
            found[argument] = Memory(name, start, nbytes, record.dtype.itemsize, about)
        return found
