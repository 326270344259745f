"""Cases of arithmetic, comparisons, mathematical functions, casts and random numbers."""

import math
from collections.abc import Callable

import numpy as np
from tests.coverage.cases import Case
from tests.coverage.values import (
    DTYPES,
    FLOATS,
    INTS,
    NOT_BOOL,
    NUMBERS,
    SMALL_FLOATS,
    Array,
    is_float,
    tl_name,
)

WIDE = ("fp32", "fp64")
ANY_FLOAT = SMALL_FLOATS + FLOATS
_erf = np.vectorize(math.erf)
_erf.otypes = "d"


def _quotient(a: Array, b: Array) -> Array:
    """Division of integers towards zero, or of floats."""
    if a.dtype.kind == "f":
        return a / b
    wide = a.astype(object), b.astype(object)
    exact = np.abs(wide[0]) // np.abs(wide[1]) * np.sign(wide[0]) * np.sign(wide[1])
    return (exact % (1 << (8 * a.dtype.itemsize))).astype(f"u{a.dtype.itemsize}").view(a.dtype)


def _remainder(a: Array, b: Array) -> Array:
    return np.fmod(a, b)


def _as_float(x: Array) -> Array:
    """What Triton makes of an integer in a division: fp32."""
    return x if x.dtype.kind == "f" else x.astype(np.float32).astype(np.float64)


def _operators() -> list[Case]:
    """Operators with a tensor, and with a number on either side."""
    cases = [
        Case("tensor.__add__", "out = x + y", lambda x, y, z: x + y, NOT_BOOL),
        Case("tensor.__radd__", "out = 3 + x", lambda x, y, z: 3 + x, NUMBERS),
        Case("tensor.__sub__", "out = x - y", lambda x, y, z: x - y, NOT_BOOL),
        Case("tensor.__rsub__", "out = 3 - x", lambda x, y, z: 3 - x, NUMBERS),
        Case("tensor.__mul__", "out = x * y", lambda x, y, z: x * y, NOT_BOOL),
        Case("tensor.__rmul__", "out = 3 * x", lambda x, y, z: 3 * x, NUMBERS),
        Case("tensor.__truediv__", "out = x / y", lambda x, y, z: _as_float(x) / _as_float(y), NOT_BOOL),
        Case("tensor.__rtruediv__", "out = 3 / y", lambda x, y, z: 3 / _as_float(y), NUMBERS),
        Case("tensor.__floordiv__", "out = x // y", lambda x, y, z: _quotient(x, y), INTS),
        Case("tensor.__rfloordiv__", "out = 100 // y", lambda x, y, z: _quotient(np.full_like(y, 100), y), INTS),
        Case("tensor.__mod__", "out = x % y", lambda x, y, z: _remainder(x, y), NUMBERS, ulps=4),
        Case("tensor.__rmod__", "out = 96 % y", lambda x, y, z: _remainder(np.full_like(y, 96), y), NUMBERS, ulps=64),
        Case("tensor.__neg__", "out = -x", lambda x, y, z: -x, NOT_BOOL),
        Case("tensor.__invert__", "out = ~x", lambda x, y, z: ~x, ("int1", *INTS)),
        Case("tensor.__not__", "out = not (tl.load(p) > 1)", lambda x, y, z: ~(x[0] > 1), INTS + FLOATS),
        Case("tensor.__lshift__", "out = x << z", lambda x, y, z: x << z, INTS),
        Case("tensor.__rlshift__", "out = 3 << z", lambda x, y, z: np.full_like(z, 3) << z, INTS),
        Case("tensor.__rshift__", "out = x >> z", lambda x, y, z: x >> z, INTS),
        Case("tensor.__rrshift__", "out = 100 >> z", lambda x, y, z: np.full_like(z, 100) >> z, INTS),
    ]
    for name, symbol, function in (
        ("and", "&", np.bitwise_and),
        ("or", "|", np.bitwise_or),
        ("xor", "^", np.bitwise_xor),
    ):
        cases.append(Case(f"tensor.__{name}__", f"out = x {symbol} y", _binary(function), ("int1", *INTS)))
        cases.append(Case(f"tensor.__r{name}__", f"out = 5 {symbol} x", _with_five(function), INTS))
    cases += [
        Case("tensor.logical_and", "out = (x > y).logical_and(x > z)", lambda x, y, z: (x > y) & (x > z), NUMBERS),
        Case("tensor.logical_or", "out = (x > y).logical_or(x > z)", lambda x, y, z: (x > y) | (x > z), NUMBERS),
    ]
    return cases


def _binary(function: Callable[[Array, Array], Array]) -> Callable[[Array, Array, Array], Array]:
    return lambda x, y, z: function(x, y)


def _with_five(function: Callable[[Array, Array], Array]) -> Callable[[Array, Array, Array], Array]:
    return lambda x, y, z: function(np.full_like(x, 5), x)


def _comparisons() -> list[Case]:
    cases = []
    for name, symbol, function in (
        ("lt", "<", np.less),
        ("le", "<=", np.less_equal),
        ("gt", ">", np.greater),
        ("ge", ">=", np.greater_equal),
        ("eq", "==", np.equal),
        ("ne", "!=", np.not_equal),
    ):
        # Every other element is compared with itself.
        code = f"out = x {symbol} tl.where(i % 2 == 0, x, y)"
        cases.append(Case(f"tensor.__{name}__", code, _with_itself(function), DTYPES))
        cases.append(Case(f"tensor.__r{name}__", f"out = 1 {symbol} x", _from_one(function), INTS + FLOATS))
    return cases


def _with_itself(function: Callable[[Array, Array], Array]) -> Callable[[Array, Array, Array], Array]:
    return lambda x, y, z: function(x, np.where(np.arange(x.size) % 2 == 0, x, y))


def _from_one(function: Callable[[Array, Array], Array]) -> Callable[[Array, Array, Array], Array]:
    return lambda x, y, z: function(np.ones_like(x), x)


def _functions() -> list[Case]:
    cases = [
        Case(name, f"out = tl.{name}({operand})", reference, dtypes, ulps)
        for name, operand, reference, dtypes, ulps in (
            ("exp", "x", lambda x, y, z: np.exp(x), WIDE, 4),
            ("exp2", "x", lambda x, y, z: np.exp2(x), WIDE, 4),
            ("log", "z", lambda x, y, z: np.log(z), WIDE, 4),
            ("log2", "z", lambda x, y, z: np.log2(z), WIDE, 4),
            ("sin", "x", lambda x, y, z: np.sin(x), WIDE, 4),
            ("cos", "x", lambda x, y, z: np.cos(x), WIDE, 4),
            ("erf", "x", lambda x, y, z: _erf(x), WIDE, 4),
            ("sqrt", "z", lambda x, y, z: np.sqrt(z), WIDE, 1),
            ("sqrt_rn", "z", lambda x, y, z: np.sqrt(z), ("fp32",), 1),
            ("rsqrt", "z", lambda x, y, z: 1 / np.sqrt(z), WIDE, 4),
            ("floor", "x", lambda x, y, z: np.floor(x), WIDE, 0),
            ("ceil", "x", lambda x, y, z: np.ceil(x), WIDE, 0),
            ("sigmoid", "x", lambda x, y, z: 1 / (1 + np.exp(-x)), WIDE, 8),
            ("softmax", "x", lambda x, y, z: np.exp(x - x.max()) / np.exp(x - x.max()).sum(), ANY_FLOAT, 16),
        )
    ]
    return [
        *cases,
        Case("abs", "out = tl.abs(x)", lambda x, y, z: np.abs(x), NOT_BOOL),
        Case("fdiv", "out = tl.fdiv(x, y)", lambda x, y, z: x / y, ANY_FLOAT),
        Case("div_rn", "out = tl.div_rn(x, y)", lambda x, y, z: x / y, ("fp32",), 1),
        Case("fma", "out = tl.fma(x, y, z)", lambda x, y, z: x * y + z, ANY_FLOAT),
        Case("umulhi", "out = tl.umulhi(x, y)", _umulhi, ("int32", "int64", "uint32", "uint64")),
        Case("add", "out = tl.add(x, y)", lambda x, y, z: x + y, NUMBERS),
        Case("sub", "out = tl.sub(x, y)", lambda x, y, z: x - y, NUMBERS),
        Case("mul", "out = tl.mul(x, y)", lambda x, y, z: x * y, NUMBERS),
        Case("maximum", "out = tl.maximum(x, y)", lambda x, y, z: np.maximum(x, y), NUMBERS),
        Case("minimum", "out = tl.minimum(x, y)", lambda x, y, z: np.minimum(x, y), NUMBERS),
        Case(
            "PropagateNan",
            _NAN_CODE,
            lambda x, y, z: np.where(np.arange(x.size) % 4 == 0, np.nan, y),
            ("fp32",),
            once=True,
            exact=True,
        ),
        Case("clamp", "out = tl.clamp(x, -z, z)", lambda x, y, z: np.clip(x, -z, z), ANY_FLOAT),
        Case("cdiv", "out = tl.cdiv(z, 3)", lambda x, y, z: (z + 2) // 3, INTS),
        Case(
            "where",
            "out = tl.where(i % 3 == 0, x, y)",
            lambda x, y, z: np.where(np.arange(x.size) % 3 == 0, x, y),
            DTYPES,
        ),
        Case("map_elementwise", "out = tl.map_elementwise(larger_plus_one, x, y)", _larger_plus_one, NUMBERS),
        Case("swizzle2d", "a, b = tl.swizzle2d(i // 8, i % 8, 4, 8, 2)\nout = a * 8 + b", _swizzled, INTS, once=True),
        Case("inline_asm_elementwise", _ASM_CODE, lambda x, y, z: x, ("int32",), once=True),
    ]


_NAN_CODE = """w = tl.where(i % 2 == 0, float("nan"), x)
v = tl.where(i % 4 == 0, w, y)
out = tl.where(i % 4 == 0, tl.maximum(v, x, propagate_nan=tl.PropagateNan.ALL), tl.minimum(w, y))
out = tl.where(i % 2 == 0, out, y)"""
_ASM_CODE = 'out = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1)'


def _umulhi(x: Array, y: Array, z: Array) -> Array:
    bits = 8 * x.dtype.itemsize
    unsigned = f"u{x.dtype.itemsize}"
    product = x.view(unsigned).astype(object) * y.view(unsigned).astype(object)
    return (product >> bits).astype(unsigned).view(x.dtype)


def _larger_plus_one(x: Array, y: Array, z: Array) -> Array:
    return np.where(x > y, x + 1, y + 1)


def _swizzled(x: Array, y: Array, z: Array) -> Array:
    """Column-major in groups of two rows of eight."""
    out = []
    for linear in range(32):
        group, rest = divmod(linear, 16)
        out.append((group * 2 + rest % 2) * 8 + rest // 2)
    return np.array(out, dtype=np.int32)


def _cast(source: Array, target: str) -> Array:
    """A cast in exact arithmetic: floats to nearest even, to integers towards zero, integers modulo a power of two."""
    if target == "int1":
        return source != 0
    if is_float(target):
        return _rounded(source, target)
    if source.dtype.kind == "f":
        source = np.trunc(source).astype(np.int64)
    return source.astype(np.int64).view(np.uint64).astype(f"u{np.dtype(target).itemsize}").view(target)


def _rounded(source: Array, target: str) -> Array:
    if target == "fp64":
        return source.astype(np.float64)
    mantissa = {"fp8e4nv": 3, "fp8e5": 2, "fp16": 10, "bf16": 7, "fp32": 23}[target]
    smallest = {"fp8e4nv": -6, "fp8e5": -14, "fp16": -14, "bf16": -126, "fp32": -126}[target]
    largest = {"fp8e4nv": 448.0, "fp8e5": 57344.0, "fp16": 65504.0, "bf16": 3.3895313892515355e38}.get(
        target, 3.4028234663852886e38
    )
    values = []
    for number in source.tolist():
        if number == 0:
            values.append(float(number))
            continue
        from fractions import Fraction

        exact = Fraction(number)
        exponent = max(math.frexp(abs(number))[1] - 1, smallest)
        unit = Fraction(2) ** (exponent - mantissa)
        value = float(round(exact / unit) * unit)
        overflow = largest if target.startswith("fp8") else math.inf
        values.append(math.copysign(overflow, value) if abs(value) > largest else value)
    return np.array(values)


def _casts() -> list[Case]:
    """To every dtype from every dtype; casts of floats beyond the range of an integer are undefined."""
    cases = []
    for target in DTYPES:
        name, code = f"cast to {target}", f"out = x.to(tl.{tl_name(target)})"
        if is_float(target) or target == "int1":
            cases.append(Case(name, code, _caster(target), _sources(target), exact=True))
            continue
        cases.append(Case(name, code, _caster(target), ("int1", *INTS)))
        cases.append(Case(name, f"out = z.to(tl.{tl_name(target)})", lambda x, y, z: np.trunc(z).astype(int), FLOATS))
    return cases


def _sources(target: str) -> tuple[str, ...]:
    """fp8 is converted from and to floats only."""
    if target in SMALL_FLOATS:
        return ANY_FLOAT
    return DTYPES if is_float(target) else ("int1", *INTS, *FLOATS)


def _caster(target: str) -> Callable[[Array, Array, Array], Array]:
    return lambda x, y, z: _cast(x, target)


CASES = [*_operators(), *_comparisons(), *_functions(), *_casts()]
