"""Reads the values of a GGUF file one after the other, each only after it was found to lie inside the file."""

import mmap
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tilewright.errors import GgufError

_DAMAGED = "the file is incomplete or damaged: copy or download it again, and compare its checksum"
_DEEPEST = 4  # arrays inside of arrays; the format allows more, no writer uses any
_STRING, _ARRAY, _BOOL = 8, 9, 7
_NUMBERS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "<u1", 10: "<u8", 11: "<i8"}
_NUMBERS[12] = "<f8"
_LEAST = {kind: np.dtype(code).itemsize for kind, code in _NUMBERS.items()} | {_STRING: 8, _ARRAY: 12}
"""Fewest bytes a value of each type takes."""


class Cursor:
    """A place in a file.

    Attributes:
        position: byte that is read next.
        section: what is being read, for messages.
        item: the key or tensor being read, for messages.
    """

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.size = path, len(data)
        self._data = memoryview(data)
        self.position = 0
        self.section = "header"
        self.item = ""

    def error(self, what: str, why: str, hint: str = _DAMAGED, at: int | None = None) -> GgufError:
        """An error at byte ``at``, or where the cursor is."""
        place = f"{self.path}, byte {self.position if at is None else at}, {self.section}"
        return GgufError(what, where=f"{place}, {self.item}" if self.item else place, why=why, hint=hint)

    def take(self, nbytes: int, what: str) -> memoryview:
        """The next bytes.

        Raises:
            GgufError: the file ends before them.
        """
        left = self.size - self.position
        if nbytes > left:
            raise self.error("the GGUF file ends early", f"{what} takes {nbytes} bytes, {left} are left")
        start, self.position = self.position, self.position + nbytes
        return self._data[start : self.position]

    def u32(self, what: str) -> int:
        """An unsigned integer of 32 bits."""
        return int.from_bytes(self.take(4, what), "little")

    def u64(self, what: str) -> int:
        """An unsigned integer of 64 bits."""
        return int.from_bytes(self.take(8, what), "little")

    def count(self, what: str, least: int) -> int:
        """A number of things of at least so many bytes each, which therefore must all fit into the rest of the file.

        Raises:
            GgufError: they do not.
        """
        at = self.position
        count = self.u64(what)
        if count * least > self.size - self.position:
            raise self.error(
                "a count in the GGUF file is too large",
                f"{what} is {count}, but the {self.size - self.position} bytes that are left hold fewer",
                at=at,
            )
        return count

    def string(self, what: str) -> str:
        """A string: its length in 64 bits, then UTF-8."""
        at = self.position
        content = self.take(self.count(f"the length of {what}", 1), what)
        return self._text(content, what, at)

    def value(self) -> Any:
        """A value of the metadata with its type before it: a number, bool, str, or tuple or numpy array of those."""
        return self._value(self._kind(), 0)

    def pad(self, alignment: int) -> None:
        """Moves on to the next multiple of ``alignment``."""
        self.position = -(-self.position // alignment) * alignment

    def _kind(self) -> int:
        at = self.position
        kind = self.u32("the type of a value")
        if kind not in _LEAST:
            raise self.error("unknown type of value in the GGUF file", f"type {kind}; known are 0 to 12", at=at)
        return kind

    def _value(self, kind: int, depth: int) -> Any:
        if kind == _STRING:
            return self.string("a value")
        if kind == _ARRAY:
            return self._array(depth)
        return self._numbers(kind, 1)[0].item()

    def _array(self, depth: int) -> Any:
        if depth == _DEEPEST:
            raise self.error("arrays too deep in the GGUF file", f"more than {_DEEPEST} lie inside one another")
        kind = self._kind()
        count = self.count("the length of an array", _LEAST[kind])
        if kind == _STRING:
            return self._strings(count)
        if kind == _ARRAY:
            return tuple(self._array(depth + 1) for _ in range(count))
        return self._numbers(kind, count)

    def _numbers(self, kind: int, count: int) -> np.ndarray:
        at = self.position
        content = self.take(count * _LEAST[kind], f"{count} values")
        numbers = np.frombuffer(content, _NUMBERS[kind], count)
        if kind != _BOOL:
            return numbers
        if (numbers > 1).any():
            raise self.error("no truth value in the GGUF file", f"byte {numbers.max()}; 0 or 1 was expected", at=at)
        return numbers.astype(bool)

    def _strings(self, count: int) -> tuple[str, ...]:
        """As ``string`` does, ``count`` times; a vocabulary has hundreds of thousands."""
        data, position, size = self._data, self.position, self.size
        length_at: Callable[..., tuple[int]] = struct.Struct("<Q").unpack_from
        found = []
        for index in range(count):
            start = position + 8
            end = start + length_at(data, position)[0] if start <= size else size + 1
            if end > size:
                self.position = position
                raise self.error("the GGUF file ends early", f"string {index} of {count} goes beyond its end")
            found.append(self._text(data[start:end], f"string {index}", position))
            position = end
        self.position = position
        return tuple(found)

    def _text(self, content: memoryview, what: str, at: int) -> str:
        try:
            return str(content, "utf-8")
        except UnicodeDecodeError as error:
            raise self.error(
                f"{what} is no text", f"no UTF-8: {error.reason}, byte {error.start} of it", at=at
            ) from None
