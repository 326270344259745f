"""Mathematical functions as LLVM IR functions, written on demand, one per type and vector width.

In f32 the functions of ``exp``, ``log``, ``trig`` and ``erf`` are polynomials after range reduction; their coefficients
are minimax fits in higher precision (Remez exchange, rounded one by one). 16-bit types compute in f32. f64, and
functions in little use, call the C library for each lane.
"""

from collections.abc import Callable, Sequence

from tilewright.codegen.cpu.lower.arith import RULES, Rule, float_extreme, in_f32
from tilewright.codegen.cpu.lower.lanes import LaneBuilder, type_of
from tilewright.codegen.cpu.mathlib import erf, exp, f64, log, trig
from tilewright.codegen.cpu.mathlib.floatcode import FloatCode
from tilewright.codegen.cpu.target import CpuTarget
from tilewright.codegen.cpu.ttir.records import F32, Elem, Op

# Writes a function's body, given its operands; returns its value.
Body = Callable[..., str]


def _rsqrt(f: FloatCode, x: str) -> str:
    """With AVX-512 an estimate to 14 bits and a step of Newton's method, which is NaN at 0 and infinity: there the
    estimate is exact."""
    if not f.avx512:
        return f64.rsqrt(f, x)
    y = f.avx512_call("rsqrt14", x)
    off = f.fma(f.mul(x, y), f.negative(y), 1.0)
    better = f.fma(f.mul(y, off), 0.5, y)
    return f.choose(f.compare("uno", off, off), y, better)


_F32: dict[str, Body] = {
    "exp": exp.exp,
    "exp2": exp.exp2,
    "log": log.log,
    "log2": log.log2,
    "sin": trig.sin,
    "cos": trig.cos,
    "tan": trig.tan,
    "tanh": exp.tanh,
    "erf": erf.erf,
    "sigmoid": exp.sigmoid,
    "rsqrt": _rsqrt,
}
# f32 operands and results, computed in f64 to somewhat more than f32's digits.
_F32_WIDE: dict[str, Body] = {
    "exp10": exp.exp10_wide,
    "expm1": exp.expm1_wide,
    "sinh": exp.sinh_wide,
    "cosh": exp.cosh_wide,
    "log10": log.log10_wide,
    "log1p": log.log1p_wide,
    "pow": log.pow_wide,
    "cbrt": log.cbrt_wide,
    "rcbrt": log.rcbrt_wide,
    "asinh": log.asinh_wide,
    "acosh": log.acosh_wide,
    "atanh": log.atanh_wide,
    "sinpi": trig.sinpi_wide,
    "cospi": trig.cospi_wide,
    "asin": trig.asin_wide,
    "acos": trig.acos_wide,
    "atan": trig.atan_wide,
    "atan2": trig.atan2_wide,
    "erfc": erf.erfc_wide,
    "erfcx": erf.erfcx_wide,
    "normcdf": erf.normcdf_wide,
    "rsqrt_rn": f64.rsqrt,
    **dict.fromkeys(("hypot", "norm3d", "norm4d"), f64.norm_wide),
    **dict.fromkeys(("rhypot", "rnorm3d", "rnorm4d"), f64.rnorm_wide),
}
_F64: dict[str, Body] = {
    "rsqrt": f64.rsqrt,
    "sigmoid": f64.sigmoid,
    "rcbrt": f64.rcbrt,
    **dict.fromkeys(("norm3d", "norm4d"), f64.norm),
    **dict.fromkeys(("rhypot", "rnorm3d", "rnorm4d"), f64.rnorm),
    "sinpi": f64.sinpi,
    "cospi": f64.cospi,
    "cyl_bessel_i0": f64.cyl_bessel_i0,
    "cyl_bessel_i1": f64.cyl_bessel_i1,
    "erfcx": erf.erfcx,
    "normcdf": erf.normcdf,
    "erfinv": erf.erfinv,
    "erfcinv": erf.erfcinv,
    "normcdfinv": erf.normcdfinv,
}
_SAME_IN_BOTH: dict[str, Body] = {"saturate": f64.saturate, "fdim": f64.difference}
_INTRINSICS = {"sqrt": "sqrt", "absf": "fabs", "fabs": "fabs", "floor": "floor", "ceil": "ceil", "fma": "fma"}
_INTRINSICS |= {"trunc": "trunc", "rint": "roundeven", "nearbyint": "roundeven", "roundeven": "roundeven"}
_INTRINSICS |= {"round": "round", "copysign": "copysign"}
# In f32 some are exact, and some depend on the type's spacing: those are called in f32.
_LIBM = {
    "acos", "acosh", "asin", "asinh", "atan", "atan2", "atanh", "cbrt", "cos", "cosh", "erf", "erfc", "exp", "exp10",
    "exp2", "expm1", "fmod", "hypot", "j0", "j1", "lgamma", "log", "log10", "log1p", "log2", "logb", "nextafter",
    "pow", "remainder", "sin", "sinh", "tan", "tanh", "tgamma", "y0", "y1",
}  # fmt: skip
_LIBM_OWN_TYPE = {"nextafter", "fmod", "remainder", "logb"}
FUNCTIONS = {*_F32, *_F32_WIDE, *_F64, *_SAME_IN_BOTH, *_INTRINSICS, *_LIBM, "fmax", "fmin"}


class MathLibrary:
    """Calls of functions, and the definitions those calls need."""

    def __init__(self, target: CpuTarget) -> None:
        self._avx512 = target.is_x86 and target.vector_bits == 512
        self.functions: dict[str, str] = {}

    def definitions(self) -> str:
        """LLVM IR text of everything called so far."""
        return "\n".join(self.functions.values())

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
        symbol = f"@tw.{name}.{suffix}"
        if symbol not in self.functions:
            f = FloatCode(width, elem, self._avx512, self.functions)
            params = [f.define(f"%x{i}", 0) for i in range(len(refs))]
            result = _body(f, name, params)
            self.functions[symbol] = f.definition(symbol, params, result, "alwaysinline")
        return b.emit(f"call {type_} {symbol}({args})")


def _body(f: FloatCode, name: str, params: list[str]) -> str:
    if name in _SAME_IN_BOTH:
        return _SAME_IN_BOTH[name](f, *params)
    if f.elem == F32:
        if name in _F32:
            return _F32[name](f, *params)
        if name not in _LIBM_OWN_TYPE:
            wide = f.in_f64()
            body = _F32_WIDE.get(name) or _F64.get(name) or _by_libm(name)
            return wide.round_to_f32(body(wide, *(wide.extend(param) for param in params)))
    return (_F64.get(name) or _by_libm(name))(f, *params)


def _by_libm(name: str) -> Body:
    if name not in _LIBM:
        raise KeyError(name)
    return lambda f, *params: f.libm(name, *params)


def rules(library: MathLibrary) -> dict[str, Rule]:
    """The table of the operations of ``arith`` and of the math dialect."""

    def by_name(b: LaneBuilder, op: Op, refs: list[str], elem: Elem, width: int) -> str:
        name = op.name.split(".")[1].removeprefix("precise_")
        return library.call(b, name, refs, elem, width)

    def absi(b: LaneBuilder, op: Op, refs: list[str], elem: Elem, width: int) -> str:
        type_ = type_of(elem, width)
        suffix = (f"v{width}" if width else "") + elem.llvm
        return b.emit(f"call {type_} @llvm.abs.{suffix}({type_} {refs[0]}, i1 false)")

    table: dict[str, Rule] = {f"math.{name}": in_f32(by_name) for name in FUNCTIONS}
    table |= {"tt.precise_sqrt": in_f32(by_name), "math.absi": absi}
    return {**RULES, **table}
