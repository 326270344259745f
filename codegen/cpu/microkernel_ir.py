"""Writer of LLVM IR text: fresh names, memory access at byte offsets, and counted loops with carried values."""

from collections.abc import Callable, Sequence

LLVM_TYPES = {"f64": "double", "f32": "float", "f16": "half", "bf16": "bfloat", "i32": "i32", "i16": "i16", "i8": "i8"}
BYTES = {"f64": 8, "f32": 4, "f16": 2, "bf16": 2, "i32": 4, "i16": 2, "i8": 1}


def vector(element: str, lanes: int) -> str:
    """LLVM type of ``lanes`` values of an LLVM element type."""
    return f"<{lanes} x {element}>"


def powers_of_two(count: int) -> list[int]:
    """The falling powers of two that add up to a count."""
    return [1 << bit for bit in reversed(range(count.bit_length())) if count >> bit & 1]


class IrText:
    """The body of one LLVM function, written in order.

    Values are strings: a name (``%v7``) or a literal. Offsets are i64 values in bytes.
    """

    def __init__(self) -> None:
        self._lines: list[str] = ["entry:"]
        self._count = 0
        self._block = "entry"

    def op(self, text: str) -> str:
        """Appends an instruction and returns the name of its result."""
        name = self._fresh("v")
        self._lines.append(f"  {name} = {text}")
        return name

    def do(self, text: str) -> None:
        """Appends an instruction without a result."""
        self._lines.append(f"  {text}")

    def mul(self, left: str | int, right: str | int) -> str:
        """i64 product; a factor of 0 or 1 costs nothing."""
        if isinstance(left, int) and isinstance(right, int):
            return str(left * right)
        if str(left) == "0" or str(right) == "0":
            return "0"
        if str(left) == "1":
            return str(right)
        if str(right) == "1":
            return str(left)
        return self.op(f"mul nsw i64 {left}, {right}")

    def add(self, left: str | int, right: str | int) -> str:
        """i64 sum; an addend of 0 costs nothing."""
        if str(left) == "0":
            return str(right)
        if str(right) == "0":
            return str(left)
        return self.op(f"add nsw i64 {left}, {right}")

    def at(self, pointer: str, offset: str | int) -> str:
        """Pointer moved by an offset in bytes."""
        return pointer if str(offset) == "0" else self.op(f"getelementptr inbounds i8, ptr {pointer}, i64 {offset}")

    def load(self, kind: str, pointer: str, align: int) -> str:
        """Loads an LLVM type; ``align`` in bytes."""
        return self.op(f"load {kind}, ptr {pointer}, align {align}")

    def store(self, kind: str, value: str, pointer: str, align: int) -> None:
        """Stores an LLVM type; ``align`` in bytes."""
        self.do(f"store {kind} {value}, ptr {pointer}, align {align}")

    def splat(self, element: str, value: str, lanes: int) -> str:
        """Vector with ``value`` in every lane."""
        kind = vector(element, lanes)
        first = self.op(f"insertelement {kind} poison, {element} {value}, i64 0")
        return self.op(f"shufflevector {kind} {first}, {kind} poison, <{lanes} x i32> zeroinitializer")

    def shuffle(self, element: str, lanes: int, left: str, right: str, picks: Sequence[int]) -> str:
        """Picks lanes of two vectors of the same type; lanes of ``right`` count from ``lanes``."""
        kind = vector(element, lanes)
        mask = ", ".join(f"i32 {pick}" for pick in picks)
        return self.op(f"shufflevector {kind} {left}, {kind} {right}, <{len(picks)} x i32> <{mask}>")

    def loop(
        self,
        count: int,
        body: Callable[[str, list[str]], list[str]],
        carried: Sequence[tuple[str, str]] = (),
        step: int = 1,
    ) -> list[str]:
        """Loop over 0, step, 2 * step, ... below ``count``, which is a multiple of ``step``.

        One iteration or none is written without a loop.

        Args:
            count: end of the range.
            body: called once with the index and the carried values; returns their new values.
            carried: LLVM type and first value of what one iteration hands to the next.
            step: distance of two indices.

        Returns:
            The carried values after the last iteration.
        """
        values = [value for _, value in carried]
        if count <= step:
            return body("0", values) if count > 0 else values
        before, label = self._block, self._fresh("loop")[1:]
        self.do(f"br label %{label}")
        self._enter(label)
        index, names = self._fresh("i"), [self._fresh("c") for _ in carried]
        # The phi nodes name values of the loop's last block, which is known after the body.
        place = len(self._lines)
        results = body(index, names)
        following = self.op(f"add nuw nsw i64 {index}, {step}")
        again = self.op(f"icmp ult i64 {following}, {count}")
        done = self._fresh("done")[1:]
        phis = [f"  {index} = phi i64 [ 0, %{before} ], [ {following}, %{self._block} ]"]
        for name, (kind, first), result in zip(names, carried, results, strict=True):
            phis.append(f"  {name} = phi {kind} [ {first}, %{before} ], [ {result}, %{self._block} ]")
        self._lines[place:place] = phis
        self.do(f"br i1 {again}, label %{label}, label %{done}")
        self._enter(done)
        return results

    def each(self, end: int, step: int, body: Callable[[str], None]) -> None:
        """Loop that carries no values; ``body`` is called once with the index."""

        def carrying_none(index: str, _: list[str]) -> list[str]:
            body(index)
            return []

        self.loop(end, carrying_none, step=step)

    def each_below(self, limit: str, step: int, body: Callable[[str], None]) -> None:
        """Loop over 0, step, 2 * step, ... below an i64 that is known when the code runs, and positive."""
        before, label, done = self._block, self._fresh("loop")[1:], self._fresh("done")[1:]
        self.do(f"br label %{label}")
        self._enter(label)
        index, following = self._fresh("i"), self._fresh("v")
        place = len(self._lines)
        body(index)
        self.do(f"{following} = add nuw nsw i64 {index}, {step}")
        self._lines.insert(place, f"  {index} = phi i64 [ 0, %{before} ], [ {following}, %{self._block} ]")
        self.do(f"br i1 {self.op(f'icmp slt i64 {following}, {limit}')}, label %{label}, label %{done}")
        self._enter(done)

    def choose(self, condition: str, then: Callable[[], None], other: Callable[[], None]) -> None:
        """Runs one of two bodies, as an i1 says."""
        labels = [self._fresh(name)[1:] for name in ("then", "other", "done")]
        self.do(f"br i1 {condition}, label %{labels[0]}, label %{labels[1]}")
        for label, body in zip(labels, (then, other), strict=False):
            self._enter(label)
            body()
            self.do(f"br label %{labels[2]}")
        self._enter(labels[2])

    def text(self) -> str:
        """Everything written so far, with a closing ``ret void``."""
        return "\n".join([*self._lines, "  ret void"])

    def _fresh(self, prefix: str) -> str:
        self._count += 1
        return f"%{prefix}{self._count}"

    def _enter(self, label: str) -> None:
        self._lines.append(f"{label}:")
        self._block = label


def widen(ir: IrText, value: str, source: str, result: str, lanes: int) -> str:
    """Converts a vector to an equal or wider dtype, exactly."""
    if source == result:
        return value
    if source == "bf16" and result == "f32":
        # A bf16 is the upper half of an f32; fpext would call a library routine where bf16 is no native type.
        bits = ir.op(f"bitcast {vector('bfloat', lanes)} {value} to {vector('i16', lanes)}")
        wide = ir.op(f"zext {vector('i16', lanes)} {bits} to {vector('i32', lanes)}")
        upper = ir.op(f"shl {vector('i32', lanes)} {wide}, {ir.splat('i32', '16', lanes)}")
        return ir.op(f"bitcast {vector('i32', lanes)} {upper} to {vector('float', lanes)}")
    if source == "bf16":
        return widen(ir, widen(ir, value, "bf16", "f32", lanes), "f32", result, lanes)
    kinds = vector(LLVM_TYPES[source], lanes), vector(LLVM_TYPES[result], lanes)
    return ir.op(f"{'sext' if source.startswith('i') else 'fpext'} {kinds[0]} {value} to {kinds[1]}")
