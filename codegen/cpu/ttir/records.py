"""Typed records for one TTIR module: element types, values, operations, blocks and functions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Elem:
    """Element type of a TTIR value.

    Attributes:
        kind: "int", "float", "bfloat", "fp8" or "ptr".
        bits: width in memory registers (1 for i1; 64 for pointers).
        name: the TTIR spelling, such as ``i32``, ``bf16``, ``f8E5M2`` or ``ptr``.
        pointee: element type behind a pointer.
    """

    kind: str
    bits: int
    name: str
    pointee: Elem | None = None

    @property
    def llvm(self) -> str:
        """LLVM register type. bf16 and fp8 are carried as their bit patterns in integers."""
        return _LLVM.get(self.name) or (f"i{self.bits}" if self.kind in ("int", "bfloat", "fp8") else "ptr")

    @property
    def memory(self) -> str:
        """LLVM type of one element in memory: booleans take a byte."""
        return "i8" if self.name == "i1" else self.llvm

    @property
    def size(self) -> int:
        """Bytes of one element in memory."""
        return max(self.bits // 8, 1)

    @property
    def is_float(self) -> bool:
        return self.kind in ("float", "bfloat", "fp8")

    @property
    def is_int(self) -> bool:
        return self.kind == "int"

    @property
    def is_ptr(self) -> bool:
        return self.kind == "ptr"


_LLVM = {"f16": "half", "f32": "float", "f64": "double", "ptr": "ptr"}
_FLOATS = {
    "f16": ("float", 16),
    "bf16": ("bfloat", 16),
    "f32": ("float", 32),
    "f64": ("float", 64),
    "f8E4M3FN": ("fp8", 8),
    "f8E5M2": ("fp8", 8),
}


def int_elem(bits: int) -> Elem:
    """Integer element type of ``bits`` bits."""
    return Elem("int", bits, f"i{bits}")


def float_elem(name: str) -> Elem:
    """Float element type by its TTIR name (f16, bf16, f32, f64, f8E4M3FN, f8E5M2)."""
    return Elem(*_FLOATS[name], name)


def ptr_elem(pointee: Elem) -> Elem:
    """Pointer to ``pointee``."""
    return Elem("ptr", 64, "ptr", pointee)


I1, I8, I16, I32, I64 = (int_elem(bits) for bits in (1, 8, 16, 32, 64))
F16, BF16, F32, F64 = (float_elem(name) for name in ("f16", "bf16", "f32", "f64"))


@dataclass(frozen=True)
class Type:
    """Type of a TTIR value: an element type and a shape, ``()`` for scalars."""

    elem: Elem
    shape: tuple[int, ...] = ()

    @property
    def is_tensor(self) -> bool:
        """Whether the value has a shape; ``tensor<1xf32>`` does, ``f32`` does not."""
        return bool(self.shape)

    @property
    def numel(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def nbytes(self) -> int:
        return self.numel * self.elem.size

    def with_elem(self, elem: Elem) -> Type:
        return Type(elem, self.shape)


@dataclass(eq=False)
class Value:
    """One SSA value. ``op`` is None for block arguments."""

    name: str
    type: Type
    op: Op | None = None
    index: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return self.type.shape

    @property
    def elem(self) -> Elem:
        return self.type.elem


@dataclass(eq=False)
class Block:
    """A list of operations with arguments. ``label`` names it for ``cf`` branches."""

    args: list[Value] = field(default_factory=list)
    ops: list[Op] = field(default_factory=list)
    label: str = ""


@dataclass(eq=False)
class Op:
    """One operation.

    Attributes:
        name: ``arith.addf``, ``tt.load``, ...
        attrs: raw attribute texts by name.
        words: what stands between the name and the types without operands and attributes, such as the
            predicate of a comparison; keyword settings are in ``attrs``.
        regions: nested regions, each a list of blocks.
        targets: successor labels with their arguments (``cf`` branches).
        loc: Python ``file:line``, or "".
    """

    name: str
    operands: list[Value]
    results: list[Value] = field(default_factory=list)
    attrs: dict[str, str] = field(default_factory=dict)
    words: tuple[str, ...] = ()
    regions: list[list[Block]] = field(default_factory=list)
    targets: list[tuple[str, list[Value]]] = field(default_factory=list)
    loc: str = ""

    @property
    def result(self) -> Value:
        return self.results[0]

    def int_attr(self, name: str) -> int:
        """Integer attribute such as ``axis = 1 : i32``."""
        return int(self.attrs[name].split(":")[0])

    def body(self, region: int = 0) -> Block:
        """The single block of a region."""
        return self.regions[region][0]


@dataclass(eq=False)
class Function:
    """One ``tt.func``."""

    name: str
    params: list[Value]
    blocks: list[Block]
    public: bool
    loc: str = ""


@dataclass(eq=False)
class Module:
    """All functions of one kernel's module."""

    functions: dict[str, Function]

    @property
    def kernel(self) -> Function:
        """The public function."""
        return next(f for f in self.functions.values() if f.public)


def walk(blocks: list[Block]) -> Iterator[Op]:
    """All operations in program order, a region's operations right after the operation that holds it."""
    for block in blocks:
        for op in block.ops:
            yield op
            for region in op.regions:
                yield from walk(region)
