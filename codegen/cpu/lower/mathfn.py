"""Mathematical functions as LLVM IR functions, written on demand, one per type and vector width.

f32 functions are polynomials after range reduction (Muller, "Elementary Functions", 3rd ed., 2016, chapters 3 and
11; reduction constants after Cody and Waite, 1980), within 2 ULP. The coefficients are minimax fits by Lawson's
algorithm in higher precision. 16-bit types compute in f32. f64, and functions without a polynomial, call the scalar
C library for each lane.
"""

from collections.abc import Callable, Sequence

from tilewright.codegen.cpu.lower.arith import RULES, Rule, float_extreme, in_f32
from tilewright.codegen.cpu.lower.builder import Builder
from tilewright.codegen.cpu.lower.convert import const, typed
from tilewright.codegen.cpu.lower.lanes import LaneBuilder, type_of
from tilewright.codegen.cpu.lower.literals import float_literal
from tilewright.codegen.cpu.lower.ttir import F32, F64, Elem, Op

_EXP = (0.4999999341226095, 0.166665201055461, 0.0416683942591605, 0.008368780622237353, 0.0013814464752130381)
_EXP2 = (
    0.6931471807056958, 0.2402265106878076, 0.055504103629733084, 0.009618037768835613, 0.001333393657203482,
    0.00015466882564021755, 1.5196041758848166e-05,
)  # fmt: skip
_LOG = (
    0.3333331260280287, -0.25000009603654566, 0.2000211873219938, -0.16667995667070884, 0.1421955090827969,
    -0.12405591417678506, 0.11888174598596882, -0.11675641299703071, 0.06746601322307955,
)  # fmt: skip
_SIN = (-0.16666666640692265, 0.008333329292653568, -0.00019839308334157412, 2.7180839715169686e-06)
_COS = (0.04166664561835528, -0.0013887313044701041, 2.4432783323441863e-05)
_TANH = (-0.33333330802643624, 0.13333206005450843, -0.053946762736028255, 0.02170070161211123,
         -0.008177394589741526, 0.00214295874665384)  # fmt: skip
_ERF = (
    0.12837916572669061, -0.37612625824093415, 0.11283585147030036, -0.026853811869047683, 0.005188327559877521,
    -0.0008010192519593213, 7.85385770266165e-05,
)  # fmt: skip
_LOG_ERFC_CENTER = 2.4
_LOG_ERFC = (-7.280975079356353, -5.164236737048378, -0.9405016469896994, -0.01176526800292075, 0.002391621163416954,
             -0.00047135138692946515, 7.903319328077078e-05, -2.0489337824955266e-05,
             2.5132650873303957e-07)  # fmt: skip
_LOG2E = 1.4426950408889634
_LN2_HIGH, _LN2_LOW = 0.693145751953125, 1.428606765330187e-06
_TWO_OVER_PI = 0.6366197723675814
_PI_HALF = (1.5707963267341256, 6.077100506303966e-11, 2.0222662487959506e-21)


class FloatCode(Builder):
    """Body of one function on ``<width x float>``; operands are names or Python floats."""

    def __init__(self, width: int, elem: Elem = F32) -> None:
        super().__init__()
        self.width, self.elem = width, elem
        self.type = typed(elem.llvm, width)
        self.int_type = typed(f"i{elem.bits}", width)
        self.flag = typed("i1", width)
        self.suffix = (f"v{width}" if width else "") + f"f{elem.bits}"

    def ref(self, operand: str | float) -> str:
        if isinstance(operand, str):
            return operand
        text = float_literal(operand, self.elem.bits)
        return f"splat ({self.elem.llvm} {text})" if self.width else text

    def op(self, name: str, *operands: str | float) -> str:
        return self.emit(f"{name} {self.type} " + ", ".join(self.ref(x) for x in operands))

    def call(self, name: str, *operands: str | float) -> str:
        args = ", ".join(f"{self.type} {self.ref(x)}" for x in operands)
        return self.emit(f"call {self.type} @llvm.{name}.{self.suffix}({args})")

    def fma(self, a: str | float, b: str | float, c: str | float) -> str:
        return self.call("fma", a, b, c)

    def integer(self, name: str, a: str, b: int | str) -> str:
        right = const(b, self.width, self.elem.bits) if isinstance(b, int) else b
        return self.emit(f"{name} {self.int_type} {a}, {right}")

    def bits(self, ref: str) -> str:
        return self.emit(f"bitcast {self.type} {ref} to {self.int_type}")

    def unbits(self, ref: str) -> str:
        return self.emit(f"bitcast {self.int_type} {ref} to {self.type}")

    def compare(self, predicate: str, a: str | float, b: str | float) -> str:
        return self.emit(f"fcmp {predicate} {self.type} {self.ref(a)}, {self.ref(b)}")

    def choose(self, flag: str, yes: str | float, no: str | float) -> str:
        return self.emit(f"select {self.flag} {flag}, {self.type} {self.ref(yes)}, {self.type} {self.ref(no)}")

    def horner(self, x: str, coefficients: Sequence[float]) -> str:
        """``sum(c[i] * x**i)``."""
        total: str | float = coefficients[-1]
        for c in reversed(coefficients[:-1]):
            total = self.fma(total, x, c)
        return self.ref(total)

    def clamp(self, x: str, low: float, high: float) -> str:
        """NaN stays NaN."""
        x = self.choose(self.compare("olt", x, low), low, x)
        return self.choose(self.compare("ogt", x, high), high, x)

    def scale_by_power(self, value: str, power: str) -> str:
        """``value * 2**power`` for an integral float, in two steps so that subnormal results round once."""
        n = self.emit(f"fptosi {self.type} {power} to {self.int_type}")
        n = self.emit(f"freeze {self.int_type} {n}")  # of a NaN it is undefined, and the product NaN anyway
        half = self.integer("ashr", n, 1)
        for part in (half, self.integer("sub", n, half)):
            factor = self.unbits(self.integer("shl", self.integer("add", part, 127), 23))
            value = self.op("fmul", value, factor)
        return value


def _exp(f: FloatCode, x: str) -> str:
    x = f.clamp(x, -104.0, 89.0)
    n = f.call("roundeven", f.op("fmul", x, _LOG2E))
    r = f.fma(n, -_LN2_LOW, f.fma(n, -_LN2_HIGH, x))
    poly = f.fma(f.op("fmul", r, r), f.horner(r, _EXP), r)
    return f.scale_by_power(f.op("fadd", poly, 1.0), n)


def _exp2(f: FloatCode, x: str) -> str:
    x = f.clamp(x, -151.0, 129.0)
    n = f.call("roundeven", x)
    r = f.op("fsub", x, n)
    return f.scale_by_power(f.fma(r, f.horner(r, _EXP2), 1.0), n)


def _log_parts(f: FloatCode, x: str) -> tuple[str, str]:
    """Exponent and ``m - 1`` with ``x = 2**e * m``, m in [sqrt(1/2), sqrt(2))."""
    tiny = f.compare("olt", x, 1.1754943508222875e-38)
    scaled = f.choose(tiny, f.op("fmul", x, 8388608.0), x)
    bits = f.integer("sub", f.bits(scaled), 0x3F3504F3)
    e = f.emit(f"sitofp {f.int_type} {f.integer('ashr', bits, 23)} to {f.type}")
    e = f.op("fadd", e, f.choose(tiny, -23.0, 0.0))
    m = f.unbits(f.integer("add", f.integer("and", bits, 0x7FFFFF), 0x3F3504F3))
    return e, f.op("fsub", m, 1.0)


def _log_special(f: FloatCode, x: str, out: str) -> str:
    out = f.choose(f.compare("oeq", x, float("inf")), float("inf"), out)
    out = f.choose(f.compare("oeq", x, 0.0), float("-inf"), out)
    return f.choose(f.compare("ult", x, 0.0), float("nan"), out)


def _log(f: FloatCode, x: str) -> str:
    e, m = _log_parts(f, x)
    square = f.op("fmul", m, m)
    tail = f.op("fmul", f.op("fmul", square, m), f.horner(m, _LOG))
    tail = f.fma(e, _LN2_LOW, tail)
    tail = f.fma(square, -0.5, tail)
    return _log_special(f, x, f.fma(e, _LN2_HIGH, f.op("fadd", m, tail)))


def _log2(f: FloatCode, x: str) -> str:
    e, m = _log_parts(f, x)
    square = f.op("fmul", m, m)
    tail = f.fma(f.op("fmul", square, m), f.horner(m, _LOG), f.op("fmul", square, -0.5))
    # log2(1 + m) = (m + tail) * log2(e), with m split so that the product with the leading part is exact.
    high = f.unbits(f.integer("and", f.bits(f.op("fadd", m, tail)), -4096))
    low = f.op("fadd", f.op("fsub", m, high), tail)
    out = f.op("fmul", high, 1.4426950408889634 - 1.44140625)
    out = f.fma(low, _LOG2E, out)
    return _log_special(f, x, f.op("fadd", f.fma(high, 1.44140625, out), e))


def _trig_parts(f: FloatCode, x: str) -> tuple[str, str]:
    """Quadrant and remainder of ``x`` by pi/2. Reduced in f64, exact to f32 for |x| < 2**28."""
    wide = FloatCode(f.width, F64)
    wide.scopes, wide._counter, wide._levels = f.scopes, f._counter, f._levels
    y = f.emit(f"fpext {f.type} {x} to {wide.type}")
    n = wide.call("roundeven", wide.op("fmul", y, _TWO_OVER_PI))
    for part in _PI_HALF:
        y = wide.fma(n, -part, y)
    quadrant = f.emit(f"fptosi {wide.type} {n} to {wide.int_type}")
    quadrant = f.emit(f"freeze {wide.int_type} {quadrant}")
    quadrant = f.emit(f"trunc {wide.int_type} {quadrant} to {f.int_type}")
    return quadrant, f.emit(f"fptrunc {wide.type} {y} to {f.type}")


def _sin_cos(shift: int) -> Callable[[FloatCode, str], str]:
    def body(f: FloatCode, x: str) -> str:
        quadrant, r = _trig_parts(f, x)
        quadrant = f.integer("add", quadrant, shift)
        square = f.op("fmul", r, r)
        sine = f.fma(f.op("fmul", square, r), f.horner(square, _SIN), r)
        cosine = f.fma(square, -0.5, f.fma(f.op("fmul", square, square), f.horner(square, _COS), 0.0))
        cosine = f.op("fadd", cosine, 1.0)
        odd = f.emit(f"trunc {f.int_type} {quadrant} to {f.flag}")
        sign = f.integer("shl", f.integer("and", quadrant, 2), 30)
        return f.unbits(f.integer("xor", f.bits(f.choose(odd, cosine, sine)), sign))

    return body


def _tanh(f: FloatCode, x: str) -> str:
    size = f.call("fabs", x)
    square = f.op("fmul", x, x)
    small = f.fma(f.op("fmul", square, x), f.horner(square, _TANH), x)
    e = _exp(f, f.op("fmul", f.clamp(size, 0.0, 20.0), 2.0))
    large = f.op("fsub", 1.0, f.op("fdiv", 2.0, f.op("fadd", e, 1.0)))
    return f.choose(f.compare("olt", size, 0.625), small, f.call("copysign", large, x))


def _erf(f: FloatCode, x: str) -> str:
    size = f.call("fabs", x)
    square = f.op("fmul", x, x)
    small = f.fma(x, f.horner(square, _ERF), x)
    t = f.op("fsub", f.clamp(size, 0.0, 4.0), _LOG_ERFC_CENTER)
    large = f.op("fsub", 1.0, _exp(f, f.horner(t, _LOG_ERFC)))
    return f.choose(f.compare("olt", size, 1.0), small, f.call("copysign", large, x))


_POLYNOMIALS: dict[str, Callable[[FloatCode, str], str]] = {
    "exp": _exp,
    "exp2": _exp2,
    "log": _log,
    "log2": _log2,
    "sin": _sin_cos(0),
    "cos": _sin_cos(1),
    "tanh": _tanh,
    "erf": _erf,
}
_INTRINSICS = {"sqrt": "sqrt", "absf": "fabs", "fabs": "fabs", "floor": "floor", "ceil": "ceil", "fma": "fma"}
_INTRINSICS |= {"trunc": "trunc", "rint": "roundeven", "nearbyint": "roundeven", "roundeven": "roundeven"}
_INTRINSICS |= {"round": "round", "copysign": "copysign"}
_LIBM = {
    "acos", "acosh", "asin", "asinh", "atan", "atan2", "atanh", "cbrt", "cos", "cosh", "erf", "erfc", "exp", "exp10",
    "exp2", "expm1", "fdim", "fmod", "hypot", "j0", "j1", "lgamma", "log", "log10", "log1p", "log2", "logb",
    "nextafter", "pow", "remainder", "sin", "sinh", "tan", "tanh", "tgamma", "y0", "y1",
}  # fmt: skip


class MathLibrary:
    """Calls of functions, and the definitions those calls need."""

    def __init__(self) -> None:
        self._functions: dict[str, str] = {}
        self.externals: dict[str, str] = {}

    def definitions(self) -> str:
        """LLVM IR text of everything called so far."""
        return "\n".join([*self.externals.values(), *self._functions.values()])

    def knows(self, name: str) -> bool:
        return name in _POLYNOMIALS or name in _LIBM or name in _INTRINSICS or name in ("rsqrt", "fmax", "fmin")

    def call(self, b: LaneBuilder, name: str, refs: Sequence[str], elem: Elem, width: int) -> str:
        """Value of ``name`` for operands of f32 or f64.

        Raises:
            KeyError: no such function.
        """
        type_ = type_of(elem, width)
        args = ", ".join(f"{type_} {ref}" for ref in refs)
        suffix = (f"v{width}" if width else "") + f"f{elem.bits}"
        if name in _INTRINSICS:
            return b.emit(f"call {type_} @llvm.{_INTRINSICS[name]}.{suffix}({args})")
        if name in ("fmax", "fmin"):
            return float_extreme(b, f"{name[1:]}num", refs, elem, width)
        if name == "rsqrt":
            root = b.emit(f"call {type_} @llvm.sqrt.{suffix}({args})")
            one = float_literal(1.0)
            return b.emit(f"fdiv {type_} {f'splat ({elem.llvm} {one})' if width else one}, {root}")
        symbol = f"@tw.{name}.{suffix}"
        if symbol not in self._functions:
            self._functions[symbol] = self._define(symbol, name, len(refs), elem, width)
        return b.emit(f"call {type_} {symbol}({args})")

    def _define(self, symbol: str, name: str, arity: int, elem: Elem, width: int) -> str:
        f = FloatCode(width, elem)
        params = [f.define(f"%x{i}", 0) for i in range(arity)]
        if elem == F32 and name in _POLYNOMIALS:
            result = _POLYNOMIALS[name](f, params[0])
        elif name in _LIBM:
            result = self._lanes_by_libm(f, name, params)
        else:
            raise KeyError(name)
        body = "\n".join(f.scopes[0].lines)
        declared = ", ".join(f"{f.type} {p}" for p in params)
        return f"define internal {f.type} {symbol}({declared}) alwaysinline {{\n{body}\n  ret {f.type} {result}\n}}\n"

    def _lanes_by_libm(self, f: FloatCode, name: str, params: Sequence[str]) -> str:
        """One call of the C library's f64 function a lane; an f32 result is then rounded correctly nearly always."""
        self.externals[name] = f"declare double @{name}({', '.join(['double'] * len(params))}) memory(none) nounwind"
        result = "poison"
        for lane in range(max(f.width, 1)):
            args = []
            for param in params:
                one = f.emit(f"extractelement {f.type} {param}, i32 {lane}") if f.width else param
                one = f.emit(f"fpext float {one} to double") if f.elem == F32 else one
                args.append(f"double {one}")
            value = f.emit(f"call double @{name}({', '.join(args)})")
            value = f.emit(f"fptrunc double {value} to float") if f.elem == F32 else value
            if not f.width:
                return value
            result = f.emit(f"insertelement {f.type} {result}, {f.elem.llvm} {value}, i32 {lane}")
        return result


def extern_name(symbol: str) -> str:
    """Function meant by a libdevice or ocml symbol: ``__nv_tanhf`` and ``__ocml_tanh_f32`` are tanh."""
    symbol = symbol.strip('"')
    if symbol.startswith("__ocml_"):
        return symbol[len("__ocml_") :].rsplit("_", 1)[0]
    name = symbol.removeprefix("__nv_").removeprefix("fast_")
    return name.removesuffix("f") if name not in ("erf",) and name.endswith("f") else name


def rules(library: MathLibrary) -> dict[str, Rule]:
    """The table of all elementwise operations, those of ``arith`` included."""

    def by_name(b: LaneBuilder, op: Op, refs: list[str], elem: Elem, width: int) -> str:
        name = op.name.split(".")[1].removeprefix("precise_")
        return library.call(b, name, refs, elem, width)

    def extern(b: LaneBuilder, op: Op, refs: list[str], elem: Elem, width: int) -> str:
        return library.call(b, extern_name(op.attrs["symbol"]), refs, elem, width)

    def absi(b: LaneBuilder, op: Op, refs: list[str], elem: Elem, width: int) -> str:
        type_ = type_of(elem, width)
        suffix = (f"v{width}" if width else "") + elem.llvm
        return b.emit(f"call {type_} @llvm.abs.{suffix}({type_} {refs[0]}, i1 false)")

    names = [*_POLYNOMIALS, *_INTRINSICS, *_LIBM, "rsqrt"]
    table: dict[str, Rule] = {f"math.{name}": in_f32(by_name) for name in names}
    table |= {"tt.precise_sqrt": in_f32(by_name), "tt.extern_elementwise": in_f32(extern), "math.absi": absi}
    return {**RULES, **table}
