"""Values of a tensor at one point: a scalar per loop index and, along one axis, a vector of lanes.

A point gives an index for every axis. At most one axis runs over the lanes of a vector, so what a tensor is
there has one of four forms: the same in all lanes, arithmetic in the lane number, a condition that holds for the
first lanes, or any vector. Keeping the form gives contiguity of addresses and simple masks without further analysis.
"""

from dataclasses import dataclass

from tilewright.codegen.cpu.lower.builder import Builder
from tilewright.codegen.cpu.ttir.records import I1, I32, Elem


@dataclass(frozen=True)
class Uniform:
    """The same scalar in all lanes."""

    elem: Elem
    ref: str


@dataclass(frozen=True)
class Affine:
    """``base + lane * stride``: integers, or pointers with the stride in elements of the pointee.

    Attributes:
        stride: a number, or the name of an integer of the element's type (i64 for pointers).
    """

    elem: Elem
    base: str
    stride: int | str
    width: int


@dataclass(frozen=True)
class Vector:
    """Any values: ``ref`` is of the LLVM type ``<width x elem>``."""

    elem: Elem
    ref: str
    width: int


@dataclass(frozen=True)
class Mask:
    """A condition: the conjunction of the parts that are given; all lanes are true when none is.

    Attributes:
        uniform: i1 that holds for all lanes.
        bound: i32; lanes with a number below it are true. It may be negative or larger than the width.
        vector: ``<width x i1>``.
    """

    width: int
    uniform: str | None = None
    bound: str | None = None
    vector: str | None = None

    @property
    def elem(self) -> Elem:
        return I1

    @property
    def all_true(self) -> bool:
        return self.uniform is None and self.bound is None and self.vector is None


Lane = Uniform | Affine | Vector | Mask
Point = tuple[Lane, ...]

TRUE = Uniform(I1, "true")
ZERO = Uniform(I32, "0")


def is_const(ref: str) -> bool:
    """Whether a reference is an integer literal."""
    return ref.lstrip("-").isdigit()


def width_of(*lanes: Lane) -> int:
    """Number of lanes: the largest of the arguments, 0 when all are uniform."""
    return max((getattr(lane, "width", 0) for lane in lanes), default=0)


def type_of(elem: Elem, width: int) -> str:
    """LLVM type of ``width`` lanes; 0 is a scalar."""
    return f"<{width} x {elem.llvm}>" if width else elem.llvm


class LaneBuilder(Builder):
    """Builder with integer arithmetic that keeps the form of lanes."""

    def __init__(self) -> None:
        super().__init__()
        self._sums: dict[str, tuple[str, str]] = {}

    def vector_of_scalar(self, ref: str, llvm: str, width: int) -> str:
        """Broadcasts a scalar."""
        if not ref.startswith("%"):
            return f"splat ({llvm} {ref})"
        one = self.emit(f"insertelement <{width} x {llvm}> poison, {llvm} {ref}, i32 0")
        return self.emit(
            f"shufflevector <{width} x {llvm}> {one}, <{width} x {llvm}> poison, <{width} x i32> zeroinitializer"
        )

    def vector(self, lane: Lane, width: int) -> str:
        """``<width x elem>`` with the values of ``lane``."""
        if isinstance(lane, Vector):
            return lane.ref
        if isinstance(lane, Uniform):
            return self.vector_of_scalar(lane.ref, lane.elem.llvm, width)
        if isinstance(lane, Mask):
            return self._mask_vector(lane)
        if lane.elem.is_ptr:
            assert lane.elem.pointee is not None
            steps = self._ramp("i64", lane.stride, width)
            return self.emit(f"getelementptr {lane.elem.pointee.memory}, ptr {lane.base}, <{width} x i64> {steps}")
        llvm = lane.elem.llvm
        steps = self._ramp(llvm, lane.stride, width)
        start = self.vector_of_scalar(lane.base, llvm, width)
        return steps if lane.base == "0" else self.emit(f"add <{width} x {llvm}> {start}, {steps}")

    def _ramp(self, llvm: str, stride: int | str, width: int) -> str:
        if isinstance(stride, int):
            return "<" + ", ".join(f"{llvm} {lane * stride}" for lane in range(width)) + ">"
        ramp = self._ramp(llvm, 1, width)
        return self.emit(f"mul <{width} x {llvm}> {ramp}, {self.vector_of_scalar(stride, llvm, width)}")

    def _mask_vector(self, mask: Mask) -> str:
        parts = [mask.vector] if mask.vector else []
        if mask.bound is not None:
            limit = self.vector_of_scalar(mask.bound, "i32", mask.width)
            ramp = self._ramp("i32", 1, mask.width)
            parts.append(self.emit(f"icmp slt <{mask.width} x i32> {ramp}, {limit}"))
        if mask.uniform is not None:
            parts.append(self.vector_of_scalar(mask.uniform, "i1", mask.width))
        result = parts[0] if parts else "splat (i1 true)"
        for part in parts[1:]:
            result = self.emit(f"and <{mask.width} x i1> {result}, {part}")
        return result

    def mask(self, lane: Lane, width: int) -> Mask:
        """A boolean lane as a condition over ``width`` lanes."""
        if isinstance(lane, Mask):
            return lane
        if isinstance(lane, Uniform):
            return Mask(width, uniform=None if lane.ref == "true" else lane.ref)
        assert isinstance(lane, Vector)
        return Mask(width, vector=lane.ref)

    def both(self, a: Mask, b: Mask) -> Mask:
        """Conjunction."""
        uniform = a.uniform or b.uniform
        if a.uniform and b.uniform and a.uniform != b.uniform:
            uniform = self.emit(f"and i1 {a.uniform}, {b.uniform}")
        bound = a.bound or b.bound
        if a.bound and b.bound:
            bound = self.int_min(a.bound, b.bound)
        vector = a.vector or b.vector
        if a.vector and b.vector and a.vector != b.vector:
            vector = self.emit(f"and <{a.width} x i1> {a.vector}, {b.vector}")
        return Mask(a.width, uniform, bound, vector)

    def int_min(self, a: str, b: str, llvm: str = "i32") -> str:
        """Smaller of two signed scalars."""
        if a == b:
            return a
        if is_const(a) and is_const(b):
            return str(min(int(a), int(b)))
        return self.emit(f"call {llvm} @llvm.smin.{llvm}({llvm} {a}, {llvm} {b})")

    def int_max(self, a: str, b: str, llvm: str = "i32") -> str:
        """Larger of two signed scalars."""
        if is_const(a) and is_const(b):
            return str(max(int(a), int(b)))
        return self.emit(f"call {llvm} @llvm.smax.{llvm}({llvm} {a}, {llvm} {b})")

    def int_op(self, op: str, a: str, b: str, elem: Elem) -> str:
        """Scalar ``add``, ``sub`` or ``mul`` with literals folded."""
        if is_const(a) and is_const(b):
            exact = {"add": int(a) + int(b), "sub": int(a) - int(b), "mul": int(a) * int(b)}[op]
            half = 1 << (elem.bits - 1)
            return str((exact + half) % (2 * half) - half)
        if b == "0" and op in ("add", "sub"):
            return a
        if a == "0" and op == "add":
            return b
        if op == "mul" and "0" in (a, b):
            return "0"
        if op == "mul" and "1" in (a, b):
            return b if a == "1" else a
        name = self.emit(f"{op} {elem.llvm} {a}, {b}")
        if op == "add":
            self._sums[name] = (a, b)
        return name

    def _stride(self, ref: str) -> int | str:
        return int(ref) if is_const(ref) else ref

    def affine_parts(self, lane: Lane) -> tuple[str, str] | None:
        """Base and stride of a uniform or affine lane."""
        if isinstance(lane, Uniform):
            return lane.ref, "0"
        if isinstance(lane, Affine):
            return lane.base, str(lane.stride)
        return None

    def affine(self, elem: Elem, base: str, stride: str, width: int) -> Lane:
        """Lane from base and stride; uniform when the stride is the literal 0."""
        return Uniform(elem, base) if stride == "0" else Affine(elem, base, self._stride(stride), width)

    def add_sub(self, op: str, a: Lane, b: Lane) -> Lane | None:
        """``add`` or ``sub`` of affine lanes; None if one is not affine."""
        left, right = self.affine_parts(a), self.affine_parts(b)
        if left is None or right is None:
            return None
        base = self.int_op(op, left[0], right[0], a.elem)
        return self.affine(a.elem, base, self.int_op(op, left[1], right[1], a.elem), width_of(a, b))

    def mul(self, a: Lane, b: Lane) -> Lane | None:
        """Product of an affine and a uniform lane; None otherwise."""
        if isinstance(a, Uniform):
            a, b = b, a
        parts = self.affine_parts(a)
        if parts is None or not isinstance(b, Uniform):
            return None
        base = self.int_op("mul", parts[0], b.ref, a.elem)
        return self.affine(a.elem, base, self.int_op("mul", parts[1], b.ref, a.elem), width_of(a))

    def widen_index(self, ref: str, elem: Elem) -> str:
        """Signed integer as i64."""
        if is_const(ref) or elem.bits == 64:
            return ref
        return self.emit(f"sext {elem.llvm} {ref} to i64")

    def _widen_terms(self, ref: str, elem: Elem) -> list[str]:
        """A sum as i64 terms, each in the outermost loop where it is known.

        Like the widening of affine lanes this takes the index not to wrap around. LLVM may not split a widened sum
        by itself, and would add and widen in the innermost loop for every access.
        """
        parts = self._sums.get(ref)
        if parts is None or elem.bits == 64 or self.level_of(parts[0]) == self.level_of(parts[1]):
            return [self.widen_index(ref, elem)]
        terms = [term for part in parts for term in self._widen_terms(part, elem)]
        return sorted(terms, key=lambda term: self.level_of(term))

    def add_pointer(self, pointer: Lane, offset: Lane) -> Lane:
        """``pointer + offset`` elements."""
        pointee = pointer.elem.pointee
        assert pointee is not None
        ptr_parts, off_parts = self.affine_parts(pointer), self.affine_parts(offset)
        if ptr_parts and off_parts:
            base = ptr_parts[0]
            if off_parts[0] != "0":
                lanes = width_of(pointer, offset)
                shifts = self._widen_terms(off_parts[0], offset.elem) if lanes else []
                for shift in shifts or [self.widen_index(off_parts[0], offset.elem)]:
                    base = self.emit(f"getelementptr {pointee.memory}, ptr {base}, i64 {shift}")
            stride = self.widen_index(off_parts[1], offset.elem)
            total = self.int_op("add", ptr_parts[1], stride, Elem("int", 64, "i64"))
            return self.affine(pointer.elem, base, total, width_of(pointer, offset))
        width = width_of(pointer, offset)
        if isinstance(pointer, Uniform):
            base_type, base = "ptr", pointer.ref
        else:
            base_type, base = f"<{width} x ptr>", self.vector(pointer, width)
        index = self.vector(offset, width)
        index_type = type_of(offset.elem, width)
        ref = self.emit(f"getelementptr {pointee.memory}, {base_type} {base}, {index_type} {index}")
        return Vector(pointer.elem, ref, width)
