"""GGUF files: metadata and tensors, opened by mapping the file into memory and checked before anything is believed.

The format (ggml's ``docs/gguf.md``): magic, version, counts; metadata, each a key, a type and a value; one record for
each tensor with its name, sizes, type and offset; and, from the next multiple of the alignment on, the tensors' data.
All numbers are little-endian. Versions 2 and 3 are read.
"""

import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tilewright.errors import GgufError
from tilewright.ir.stored_weight import StoredWeight
from tilewright.models.gguf.cursor import Cursor
from tilewright.ops.blocks import FORMATS, dequantize

TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 6: "Q5_0", 8: "Q8_0", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 30: "BF16",
}  # fmt: skip
"""Formats that are read, by their number in ``enum ggml_type``."""

_OTHER_TYPES = {
    3: "Q4_1", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS",
    19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64",
    28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4",
}  # fmt: skip
_VERSIONS = (2, 3)
_MOST_AXES = 4
_LEAST_ALIGNMENT = 8  # of the format; less, and numbers could not be read in place
_LEAST_ENTRY = 8 + 4 + 1  # bytes: a key's length, a type, a value
_LEAST_TENSOR = 8 + 4 + 4 + 8  # bytes: a name's length, the number of axes, type, offset


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies in the file.

    Attributes:
        name: in the file.
        format: of its elements, a value of ``TYPES``.
        shape: outermost axis first, as in torch; the file has them the other way round.
        start: its first byte, counted from the file's.
        nbytes: that it takes.
    """

    name: str
    format: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True)
class GgufFile:
    """An open file. It stays mapped as long as this or a tensor made from it lives.

    Attributes:
        path: of the file. It must not be shortened while it is open: the system would end the process.
        version: of the format.
        metadata: by key: int, float, bool, str, tuple of str, or numpy array.
        entries: for each key, the first byte of its entry and the byte after it.
        tensors: by name, in the file's order.
        mapped: the file, uint8.
    """

    path: Path
    version: int
    metadata: Mapping[str, Any] = field(repr=False)
    entries: Mapping[str, tuple[int, int]] = field(repr=False)
    tensors: Mapping[str, GgufTensor] = field(repr=False)
    mapped: mmap.mmap = field(repr=False)

    @cached_property
    def _bytes(self) -> Tensor:
        return torch.frombuffer(self.mapped, dtype=torch.uint8)

    def stored(self, name: str) -> StoredWeight:
        """A tensor of the file as it is stored, without a copy."""
        tensor = self.tensors[name]
        *lead, k = tensor.shape
        data = self._bytes[tensor.start : tensor.start + tensor.nbytes]
        return StoredWeight(tensor.format, tensor.shape, data.view(*lead, FORMATS[tensor.format].row_bytes(k)))

    def dense(self, name: str) -> Tensor:
        """A tensor of the file in fp32, a copy."""
        return widen(self.stored(name))

    def error(self, what: str, *, item: str = "", why: str = "", hint: str = "") -> GgufError:
        """An error about this file."""
        return GgufError(what, where=f"{self.path}, {item}" if item else str(self.path), why=why, hint=hint)


def widen(weight: StoredWeight) -> Tensor:
    """The elements of a stored weight, fp32, of its shape."""
    return dequantize(weight.format, weight.data.reshape(-1, weight.data.shape[-1])).view(weight.shape)


def open_gguf(path: str | Path) -> GgufFile:
    """Maps a file and reads all but its tensors' data.

    Raises:
        GgufError: there is no such file, it is damaged anywhere before the tensors' data or ends early, or it holds a
            type of tensor that is not read. The message names the byte, the section and the key or tensor.
    """
    path = Path(path).expanduser()
    cursor = Cursor(path, mapped := _map(path))
    version, tensor_count, entry_count = _header(cursor)
    metadata, entries = _metadata(cursor, entry_count)
    alignment = _alignment(cursor, metadata, entries)
    tensors = _tensors(cursor, tensor_count, alignment)
    return GgufFile(path, version, metadata, entries, tensors, mapped)


def _map(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            # Private pages: torch takes only memory that could be written, and the file must never be.
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except ValueError:
        raise GgufError("the GGUF file is empty", where=str(path), hint="copy or download it again") from None
    except OSError as error:
        raise GgufError(f"cannot open {path}", why=error.strerror or str(error), hint="name a GGUF file") from error


def _header(cursor: Cursor) -> tuple[int, int, int]:
    """Version, number of tensors, number of metadata entries."""
    magic = bytes(cursor.take(4, "the magic"))
    if magic != b"GGUF":
        raise cursor.error("this is no GGUF file", f"it begins with {magic!r}, not b'GGUF'", "name a GGUF file", at=0)
    version = cursor.u32("the version")
    if version not in _VERSIONS:
        big_endian = int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS
        why = "it is big-endian" if big_endian else f"its version is {version}; versions 2 and 3 are read"
        raise cursor.error("this form of GGUF is not read", why, "convert it with llama.cpp's tools", at=4)
    tensor_count = cursor.count("the number of tensors", _LEAST_TENSOR)
    return version, tensor_count, cursor.count("the number of metadata entries", _LEAST_ENTRY)


def _metadata(cursor: Cursor, count: int) -> tuple[dict[str, Any], dict[str, tuple[int, int]]]:
    cursor.section = "metadata"
    metadata: dict[str, Any] = {}
    entries: dict[str, tuple[int, int]] = {}
    for index in range(count):
        start, cursor.item = cursor.position, f"entry {index} of {count}"
        key = cursor.string("a key")
        cursor.item = f"key '{key}'"
        if not key or key in metadata:
            raise cursor.error("the metadata is damaged", "this key is empty or was there before", at=start)
        metadata[key] = cursor.value()
        entries[key] = start, cursor.position
    cursor.item = ""
    return metadata, entries


def _alignment(cursor: Cursor, metadata: Mapping[str, Any], entries: Mapping[str, tuple[int, int]]) -> int:
    key = "general.alignment"
    alignment = metadata.get(key, 32)
    if type(alignment) is not int or alignment < _LEAST_ALIGNMENT or alignment & (alignment - 1):
        cursor.item = f"key '{key}'"
        why = f"it is {alignment!r}; a power of two from {_LEAST_ALIGNMENT} on was expected"
        raise cursor.error("the alignment is wrong", why, at=entries[key][0])
    return alignment


def _tensors(cursor: Cursor, count: int, alignment: int) -> dict[str, GgufTensor]:
    cursor.section = "tensor table"
    found: dict[str, tuple[int, GgufTensor]] = {}
    for index in range(count):
        at, cursor.item = cursor.position, f"entry {index} of {count}"
        tensor = _tensor(cursor, alignment)
        if tensor.name in found:
            raise cursor.error("two tensors have one name", f"'{tensor.name}' was there before", at=at)
        found[tensor.name] = at, tensor
    cursor.item = ""
    cursor.pad(alignment)
    return _place(cursor, found)


def _tensor(cursor: Cursor, alignment: int) -> GgufTensor:
    """A tensor whose start still is counted from the first of the data."""
    name = cursor.string("a tensor's name")
    cursor.item = f"tensor '{name}'"
    at = cursor.position
    axes = cursor.u32("the number of axes")
    if not 0 < axes <= _MOST_AXES or not name:
        why = f"it has {axes} axes; 1 to {_MOST_AXES} are allowed" if name else "its name is empty"
        raise cursor.error("a tensor's entry is damaged", why, at=at)
    shape = tuple(cursor.u64("the size of an axis") for _ in range(axes))[::-1]
    if 0 in shape:
        raise cursor.error("a tensor's entry is damaged", f"an axis has no elements: its shape is {shape}", at=at)
    at = cursor.position
    form = FORMATS[_format(cursor)]
    if shape[-1] % form.block:
        why = f"a row has {shape[-1]} elements; blocks of {form.name} have {form.block}"
        raise cursor.error("a tensor's size does not fit its type", why, at=at)
    at = cursor.position
    start = cursor.u64("the offset of the data")
    if start % alignment:
        raise cursor.error(
            "a tensor's data is not aligned", f"its offset is {start}, no multiple of {alignment}", at=at
        )
    return GgufTensor(name, form.name, shape, start, math.prod(shape[:-1]) * form.row_bytes(shape[-1]))


def _format(cursor: Cursor) -> str:
    at = cursor.position
    number = cursor.u32("the type of the elements")
    if number in TYPES:
        return TYPES[number]
    name = _OTHER_TYPES.get(number)
    raise cursor.error(
        "a tensor's type is not read",
        f"its elements are {name} (type {number})" if name else f"type {number} is unknown",
        f"read are {', '.join(TYPES.values())}: quantize the model to one of these, for example with llama-quantize",
        at=at,
    )


def _place(cursor: Cursor, found: Mapping[str, tuple[int, GgufTensor]]) -> dict[str, GgufTensor]:
    """Starts counted from the file's first byte, once the data of all is inside the file and apart from all others."""
    first = cursor.position
    placed, end, before = {}, 0, ""
    for at, tensor in sorted(found.values(), key=lambda entry: entry[1].start):
        cursor.item = f"tensor '{tensor.name}'"
        missing = first + tensor.start + tensor.nbytes - cursor.size
        if missing > 0:
            why = f"its data ends {missing} bytes beyond the end of the file, which has {cursor.size}"
            raise cursor.error("the GGUF file ends early", why, at=at)
        if tensor.start < end:
            raise cursor.error("two tensors share data", f"this one begins inside '{before}'", at=at)
        end, before = tensor.start + tensor.nbytes, tensor.name
        start = first + tensor.start
        placed[tensor.name] = GgufTensor(tensor.name, tensor.format, tensor.shape, start, tensor.nbytes)
    cursor.item = ""
    return {name: placed[name] for name in found}
