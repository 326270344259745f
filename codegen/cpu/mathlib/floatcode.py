"""Writer of the bodies of mathematical functions: float arithmetic on ``<width x float>`` or ``<width x double>``.

What one instruction of AVX-512 does (scaling by a power of two, splitting off the exponent, ...) has a method here,
with the portable instructions beside it, so that the formulas are written once. Both ways round alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tilewright.codegen.cpu.lower.builder import Builder
from tilewright.codegen.cpu.lower.convert import const, typed
from tilewright.codegen.cpu.ttir.literals import float_literal
from tilewright.codegen.cpu.ttir.records import F32, F64, Elem

_FRACTION = {32: 23, 64: 52}  # bits below the exponent
_BIAS = {32: 127, 64: 1023}
_AVX512_WIDTHS = (4, 8, 16)
_TABLE_LANES = 16


class FloatCode(Builder):
    """Body of one function; operands are names of ``<width x elem>`` values or Python floats.

    Attributes:
        functions: definitions and declarations that the body needs, by name; shared by all bodies of a module.
        magic: ``x + magic`` rounds x to an integer, which the lowest bits of the sum hold.
    """

    def __init__(self, width: int, elem: Elem, avx512: bool, functions: dict[str, str]) -> None:
        super().__init__()
        self.width, self.elem, self.functions = width, elem, functions
        self.avx512 = avx512 and width in _AVX512_WIDTHS
        self.type = typed(elem.llvm, self.width)
        self.int_type = typed(f"i{elem.bits}", self.width)
        self.flag = typed("i1", self.width)
        self.suffix = (f"v{self.width}" if self.width else "") + f"f{elem.bits}"
        self.magic = 1.5 * 2.0 ** _FRACTION[elem.bits]

    def in_f64(self) -> FloatCode:
        """A writer of f64 operations into the same body."""
        wide = FloatCode(self.width, F64, False, self.functions)
        wide.scopes, wide._counter, wide._levels = self.scopes, self._counter, self._levels
        return wide

    def ref(self, operand: str | float) -> str:
        if isinstance(operand, str):
            return operand
        text = float_literal(operand, self.elem.bits)
        return f"splat ({self.elem.llvm} {text})" if self.width else text

    def op(self, name: str, *operands: str | float) -> str:
        return self.emit(f"{name} {self.type} " + ", ".join(self.ref(x) for x in operands))

    def add(self, a: str | float, b: str | float) -> str:
        return self.op("fadd", a, b)

    def sub(self, a: str | float, b: str | float) -> str:
        return self.op("fsub", a, b)

    def mul(self, a: str | float, b: str | float) -> str:
        return self.op("fmul", a, b)

    def div(self, a: str | float, b: str | float) -> str:
        return self.op("fdiv", a, b)

    def call(self, name: str, *operands: str | float) -> str:
        """An LLVM intrinsic of one type."""
        args = ", ".join(f"{self.type} {self.ref(x)}" for x in operands)
        return self.emit(f"call {self.type} @llvm.{name}.{self.suffix}({args})")

    def fma(self, a: str | float, b: str | float, c: str | float) -> str:
        return self.call("fma", a, b, c)

    def abs(self, x: str) -> str:
        return self.call("fabs", x)

    def negative(self, x: str) -> str:
        return self.op("fneg", x)

    def copysign(self, size: str | float, sign: str) -> str:
        return self.call("copysign", size, sign)

    def integer(self, name: str, a: str, b: int | str) -> str:
        right = const(b, self.width, self.elem.bits) if isinstance(b, int) else b
        return self.emit(f"{name} {self.int_type} {a}, {right}")

    def bits(self, ref: str) -> str:
        return self.emit(f"bitcast {self.type} {ref} to {self.int_type}")

    def unbits(self, ref: str) -> str:
        return self.emit(f"bitcast {self.int_type} {ref} to {self.type}")

    def compare(self, predicate: str, a: str | float, b: str | float) -> str:
        return self.emit(f"fcmp {predicate} {self.type} {self.ref(a)}, {self.ref(b)}")

    def both(self, a: str, b: str) -> str:
        return self.emit(f"and {self.flag} {a}, {b}")

    def choose(self, flag: str, yes: str | float, no: str | float) -> str:
        return self.emit(f"select {self.flag} {flag}, {self.type} {self.ref(yes)}, {self.type} {self.ref(no)}")

    def horner(self, x: str, coefficients: Sequence[float]) -> str:
        """``sum(c[i] * x**i)``."""
        total: str | float = coefficients[-1]
        for c in reversed(coefficients[:-1]):
            total = self.fma(total, x, c)
        return self.ref(total)

    @property
    def looks_up(self) -> bool:
        """Whether ``look_up`` exists: on full registers of AVX-512."""
        return self.avx512 and self.width == _TABLE_LANES and self.elem == F32

    def look_up(self, index: str, table: Sequence[float]) -> str:
        """Elements of a table of 32 numbers; of each index the lowest 5 bits count."""
        lanes = f"<{_TABLE_LANES} x float>"
        halves = []
        for start in (0, _TABLE_LANES):
            numbers = (f"float {float_literal(x)}" for x in table[start : start + _TABLE_LANES])
            halves.append(f"{lanes} <{', '.join(numbers)}>")
        name = "@llvm.x86.avx512.vpermi2var.ps.512"
        return self.emit(f"call {lanes} {name}({halves[0]}, {self.int_type} {index}, {halves[1]})")

    def clamp(self, x: str, low: float, high: float) -> str:
        """NaN stays NaN."""
        x = self.choose(self.compare("olt", x, low), low, x)
        return self.choose(self.compare("ogt", x, high), high, x)

    def extend(self, x: str) -> str:
        """An f32 as f64; for use on the writer that ``in_f64`` gave."""
        return self.emit(f"fpext {typed(F32.llvm, self.width)} {x} to {self.type}")

    def round_to_f32(self, x: str) -> str:
        """An f64 rounded to f32."""
        return self.emit(f"fptrunc {self.type} {x} to {typed(F32.llvm, self.width)}")

    def scale(self, value: str, shifted: str) -> str:
        """``value * 2**n`` rounded once, for n rounded by adding ``magic``; -150 <= n <= 129 (f32), |n| < 1000 (f64).

        In two steps for f32, because results may be subnormal; a NaN in ``shifted`` is taken to be one in ``value``.
        """
        fraction = _FRACTION[self.elem.bits]
        one = _BIAS[self.elem.bits] << fraction
        power = self.integer("shl", self.bits(shifted), fraction)
        if self.elem == F64:
            return self.mul(value, self.unbits(self.integer("add", power, one)))
        half = self.integer("and", self.integer("ashr", power, 1), -1 << fraction)
        for part in (half, self.integer("sub", power, half)):
            value = self.mul(value, self.unbits(self.integer("add", part, one)))
        return value

    def avx512_call(self, name: str, *operands: str, immediate: int | None = None) -> str:
        """An f32 instruction of AVX-512 by the name of its masked intrinsic, for all lanes.

        Args:
            immediate: its operand that must be a constant, after the vectors.
        """
        bits = self.width * 32
        args = [f"{self.type} {ref}" for ref in operands]
        if immediate is not None:
            args.append(f"i32 {immediate}")
        args += [f"{self.type} zeroinitializer", f"i{max(self.width, 8)} -1"]
        estimate = name.endswith("14")
        if bits == 512 and not estimate:
            args.append("i32 4")  # rounding as it is set
        prefix = "" if estimate else "mask."
        return self.emit(f"call {self.type} @llvm.x86.avx512.{prefix}{name}.ps.{bits}({', '.join(args)})")

    def libm(self, name: str, *operands: str) -> str:
        """The C library's function, called for each lane; for f32 its version with an ``f``."""
        symbol = f"@tw.libm.{name}.{self.suffix}"
        if symbol not in self.functions:
            self.functions[symbol] = self._lanes_by_libm(symbol, name, len(operands))
        # Where it is written, not further out: what is slow may stand in a branch for a reason.
        return self.effect_value(f"call {self.type} {symbol}({', '.join(f'{self.type} {ref}' for ref in operands)})")

    def _lanes_by_libm(self, symbol: str, name: str, arity: int) -> str:
        """A function of its own, not inlined: a call for each lane is long, and its time is that of the calls."""
        callee, scalar = name + ("f" if self.elem == F32 else ""), self.elem.llvm
        declared = ", ".join([scalar] * arity)
        self.functions[callee] = f"declare {scalar} @{callee}({declared}) memory(none) nounwind\n"
        f = FloatCode(self.width, self.elem, False, self.functions)
        params = [f.define(f"%x{i}", 0) for i in range(arity)]
        result = f.each_lane(
            lambda *refs: f.emit(f"call {scalar} @{callee}({', '.join(f'{scalar} {r}' for r in refs)})"), *params
        )
        return f.definition(symbol, params, result, "noinline")

    def definition(self, symbol: str, params: Sequence[str], result: str, attributes: str) -> str:
        """LLVM IR text of the function whose body has been written."""
        declared = ", ".join(f"{self.type} {p}" for p in params)
        head = f"define internal {self.type} {symbol}({declared}) {attributes} {{"
        return "\n".join([head, "entry:", *self.scopes[0].lines, f"  ret {self.type} {result}", "}", ""])

    def each_lane(self, function: Callable[..., str], *operands: str) -> str:
        """A function of scalars applied to the lanes of its operands."""
        if not self.width:
            return function(*operands)
        scalar, result = self.elem.llvm, "poison"
        for lane in range(self.width):
            value = function(*(self.emit(f"extractelement {self.type} {ref}, i32 {lane}") for ref in operands))
            result = self.emit(f"insertelement {self.type} {result}, {scalar} {value}, i32 {lane}")
        return result

    def any(self, flag: str) -> str:
        """i1: the condition holds in some lane. LLVM is told that this is rare."""
        if self.width:
            flag = self.emit(f"call i1 @llvm.vector.reduce.or.v{self.width}i1({self.flag} {flag})")
        return self.emit(f"call i1 @llvm.expect.i1(i1 {flag}, i1 false)")
