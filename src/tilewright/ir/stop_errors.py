"""The error for a kernel that stopped itself: which access or assertion, and what is in memory near it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tilewright.errors import KernelAssertion, KernelStopped, MemoryViolation
from tilewright.ir.stops import Stop

_VERBS = {"load": "reads", "store": "writes", "atomic": "changes"}


@dataclass(frozen=True)
class Memory:
    """One block of memory.

    Attributes:
        name: parameter it belongs to, or what else it is called.
        start: address.
        nbytes: size; 0 for None and for empty tensors.
        itemsize: bytes of an element.
        about: what it is, such as ``float32 tensor of shape (3, 4)``.
    """

    name: str
    start: int
    nbytes: int
    itemsize: int
    about: str

    def distance(self, address: int, nbytes: int) -> int:
        """Bytes between it and an access; 0 if they touch or overlap."""
        return max(self.start - (address + nbytes), address - (self.start + self.nbytes), 0)


def stop_error(stop: Stop, memory: Mapping[int, Memory], other: Sequence[Memory] = ()) -> KernelStopped:
    """The error for a record.

    Args:
        stop: what the kernel left behind.
        memory: what the pointer parameters were given, by number of the parameter.
        other: more memory that the kernel might have touched.
    """
    site = json.loads(stop.site)
    place = {"kernel": site["kernel"], "source": site["line"], "program": stop.program}
    if site["kind"] == "assert":
        return KernelAssertion(
            site["message"],
            **place,
            hint="what the kernel wrote before is there; the other programs stopped, too",
        )
    nbytes, parameters = site["bytes"], site["parameters"]
    if parameters is None:
        candidates = [*memory.values(), *other]
        why = f"the pointer was made from a number or read from memory, and no tensor is at {stop.address:#x}"
        hint = "keep a reference to the tensor whose address it is, or name the memory with tilewright.known_memory"
    else:
        candidates = [memory[number] for number in parameters]
        why = f"it {_VERBS[site['kind']]} {nbytes} bytes at {stop.address:#x}"
        hint = "look at the mask and at the sizes and strides passed; other memory was not touched by this access"
    nearest = min(candidates, key=lambda block: (block.distance(stop.address, nbytes), not block.nbytes), default=None)
    if nearest is not None:
        why += "; " + _relation(nearest, stop.address, nbytes)
    inside = next((m for m in memory.values() if m.start <= stop.address < m.start + m.nbytes and m != nearest), None)
    why += f"; the address is inside of '{inside.name}' ({inside.about})" if inside is not None else ""
    return MemoryViolation(
        f"a kernel {_VERBS[site['kind']]} memory outside of its tensors",
        address=stop.address,
        nbytes=nbytes,
        kind=site["kind"],
        **place,
        why=why,
        hint=hint,
    )


def _relation(block: Memory, address: int, nbytes: int) -> str:
    """Where an access lies, seen from a block."""
    if not block.nbytes:
        return f"'{block.name}' is {block.about} and has no memory"
    end = block.start + block.nbytes
    if address < block.start:
        count = block.start - address
        place = f"{_elements(count, block.itemsize)} before the first element of"
    elif address >= end:
        count = address - (end - block.itemsize)
        place = f"{_elements(count, block.itemsize)} after the last element of"
    else:
        place = f"with {_bytes(address + nbytes - end)} beyond the end of"
    storage = f"storage {block.start:#x} to {end:#x}, {_bytes(block.nbytes)}"
    return f"that is {place} '{block.name}' ({block.about}; {storage})"


def _elements(nbytes: int, itemsize: int) -> str:
    if nbytes % itemsize:
        return _bytes(nbytes)
    count = nbytes // itemsize
    return f"{count} element{'s' if count > 1 else ''} ({_bytes(nbytes)})"


def _bytes(count: int) -> str:
    return f"{count} byte{'s' if count != 1 else ''}"
