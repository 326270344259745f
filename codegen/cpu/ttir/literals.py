"""Literals of TTIR as literals of LLVM IR."""

import functools
import math
import struct

from tilewright.codegen.cpu.ttir.records import I1, Elem


def float_literal(number: float, bits: int = 32) -> str:
    """LLVM literal of an f32 or f64: the hexadecimal bits of the number as a double, after rounding to ``bits``."""
    if bits == 32 and math.isfinite(number):
        number = struct.unpack("f", struct.pack("f", number))[0]
    return f"0x{struct.unpack('<Q', struct.pack('<d', number))[0]:016X}"


def scalar_literal(text: str, elem: Elem) -> str:
    """LLVM literal of a TTIR scalar literal such as ``1.0``, ``0xFF800000``, ``-3`` or ``true``."""
    text = text.strip()
    if elem == I1:
        return {"1": "true", "-1": "true", "0": "false"}.get(text, text)
    if not elem.is_float:
        return text
    if text.startswith("0x"):
        return _from_pattern(int(text, 16), elem)
    if elem.name in ("f32", "f64"):
        return float_literal(float(text), elem.bits)
    return _from_pattern(_encode(float(text), elem), elem)


def python_value(text: str, elem: Elem) -> float | None:
    """Value of a scalar or ``dense`` splat literal; None for types and literals that are not read."""
    text = text.strip().removeprefix("dense<").removesuffix(">")
    if text.startswith("0x"):
        if elem.name not in ("f16", "f32", "f64"):
            return None
        pattern = int(text, 16).to_bytes(elem.bits // 8, "little")
        return float(struct.unpack({16: "<e", 32: "<f", 64: "<d"}[elem.bits], pattern)[0])
    try:
        return float({"true": "1", "false": "0"}.get(text, text))
    except ValueError:
        return None


def _from_pattern(pattern: int, elem: Elem) -> str:
    if elem.kind in ("bfloat", "fp8"):
        return str(pattern)
    if elem.name == "f16":
        return f"0xH{pattern:04X}"
    if elem.bits == 64:
        return f"0x{pattern:016X}"
    number = struct.unpack("<f", struct.pack("<I", pattern))[0]
    return "0x7FF8000000000000" if math.isnan(number) else float_literal(number)


def _encode(number: float, elem: Elem) -> int:
    """Bit pattern of the nearest value of an 8- or 16-bit float."""
    if elem.name == "f16":
        return int(struct.unpack("<H", struct.pack("<e", number))[0])
    if elem.name == "bf16":
        bits = int(struct.unpack("<I", struct.pack("<f", number))[0])
        return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    table = _fp8_values(elem.name)
    size = min(range(len(table)), key=lambda code: (abs(table[code] - abs(number)), code & 1))
    return size | (0x80 if math.copysign(1.0, number) < 0 else 0)


@functools.cache
def _fp8_values(name: str) -> tuple[float, ...]:
    """Finite non-negative values in the order of their patterns."""
    mantissa, bias, top = (2, 15, 0x7C) if name == "f8E5M2" else (3, 7, 0x7F)
    values = []
    for code in range(top):
        exponent, fraction = code >> mantissa, code & ((1 << mantissa) - 1)
        scale = 2.0 ** (max(exponent, 1) - bias - mantissa)
        values.append((fraction + ((1 << mantissa) if exponent else 0)) * scale)
    return tuple(values)
