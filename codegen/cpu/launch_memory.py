"""What a launch tells a kernel that can stop itself: the memory of its arguments, and that of other tensors."""

import gc
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tilewright.codegen.cpu.arguments import ArgumentPacker, address_of
from tilewright.errors import InputError
from tilewright.ir.stop_errors import Memory, stop_error
from tilewright.ir.stops import MemoryTable, StopRecord

_known: list[Memory] = []
_known_lock = threading.Lock()


@contextmanager
def known_memory(*objects: Any) -> Iterator[None]:
    """Memory that kernels in checked mode may touch although it is no argument of theirs.

    Needed for pointers that a kernel makes from numbers or reads from memory, where they lead to memory that is not
    of a tensor with a living Python object. For all threads, while the ``with`` block runs.

    Args:
        objects: tensors on the CPU, pairs (address, bytes), and objects with the buffer protocol such as numpy arrays.

    Raises:
        InputError: an object has no memory that can be named.
    """
    blocks = [_block(thing) for thing in objects]
    with _known_lock:
        _known.extend(blocks)
    try:
        yield
    finally:
        with _known_lock:
            for block in blocks:
                _known.remove(block)


def _block(thing: Any) -> Memory:
    import numpy
    import torch

    if isinstance(thing, torch.Tensor):
        return tensor_memory("known memory", thing)
    try:
        if isinstance(thing, tuple):
            start, nbytes = (int(number) for number in thing)
        else:
            view = numpy.frombuffer(thing, dtype=numpy.uint8)
            start, nbytes = view.ctypes.data, view.nbytes
    except (TypeError, ValueError, BufferError) as error:
        raise InputError(
            f"the memory of a {type(thing).__name__} is not known",
            why=str(error),
            hint="pass CPU tensors, pairs (address, bytes) or contiguous buffers",
        ) from error
    return Memory("known memory", start, nbytes, 1, f"a {type(thing).__name__}")


class LaunchMemory:
    """The table and the record of one launch.

    Args:
        packer: of the kernel's arguments.
        names: of the arguments, as ``flat_names`` gives them.
        arguments: of the launch.
        searches: the kernel asks for memory that is no argument's.
    """

    def __init__(self, packer: ArgumentPacker, names: Sequence[str], arguments: Sequence[Any], searches: bool) -> None:
        self.record = StopRecord()
        self.table = MemoryTable(self.record, packer.slots)
        self._memory: dict[int, Memory] = {}
        self._other: list[Memory] = []
        for slot, index, value in packer.pointers(arguments):
            block = self._memory[slot] = argument_memory(names[index], value)
            self.table.set(slot, block.start, block.nbytes)
        if searches:
            self._other = [*_known, *living_tensors()]
            blocks = [*self._memory.values(), *self._other]
            self.table.allow((block.start, block.start + block.nbytes) for block in blocks)

    @property
    def slot(self) -> bytes:
        """The argument slot that the kernel has behind its parameters'."""
        return self.table.address.to_bytes(8, "little")

    def raise_if_stopped(self) -> None:
        """After the launch.

        Raises:
            MemoryViolation: an access left the memory it may touch.
            KernelAssertion: an assertion failed.
        """
        if self.record.stopped:
            raise stop_error(self.record.read(), self._memory, self._other)


def argument_memory(name: str, value: Any) -> Memory:
    """Memory that belongs to a pointer argument: the whole storage, of which a tensor may be a part."""
    import torch

    while not isinstance(value, torch.Tensor) and isinstance(getattr(value, "base", None), torch.Tensor):
        value = value.base
    if isinstance(value, torch.Tensor):
        return tensor_memory(name, value)
    address = address_of(value)
    for block in (*_known, *living_tensors()) if address else ():
        if block.start <= address < block.start + block.nbytes:
            return Memory(name, block.start, block.nbytes, block.itemsize, f"an address in a {block.about}")
    return Memory(name, address, 0, 1, "None" if value is None else f"a {type(value).__name__} of unknown memory")


def tensor_memory(name: str, tensor: Any) -> Memory:
    """Memory of a tensor's storage."""
    storage = tensor.untyped_storage()
    about = f"{str(tensor.dtype).removeprefix('torch.')} tensor of shape {tuple(tensor.shape)}"
    if storage.nbytes() != tensor.numel() * tensor.itemsize:
        about += f" at element {tensor.storage_offset()} of its storage"
    return Memory(name, storage.data_ptr(), storage.nbytes(), tensor.itemsize, about)


def living_tensors() -> list[Memory]:
    """Memory of all CPU tensors that Python knows of."""
    import torch

    found = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor):
            try:
                block = tensor_memory("another tensor", thing)
            except (RuntimeError, NotImplementedError):
                continue  # fake and sparse tensors have no storage
            if thing.is_cpu and block.nbytes and block.start:
                found[block.start, block.nbytes] = block
    return list(found.values())
