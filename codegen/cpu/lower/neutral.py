"""Neutral elements of the combine functions of reductions."""

from tilewright.codegen.cpu.ttir.literals import scalar_literal
from tilewright.codegen.cpu.ttir.records import I1, Block, Elem

_NEUTRAL = {
    "arith.addf": "-0.0", "arith.mulf": "1.0", "arith.maximumf": "-inf", "arith.minimumf": "inf",
    "arith.maxnumf": "nan", "arith.minnumf": "nan", "arith.addi": "0", "arith.muli": "1", "arith.ori": "0",
    "arith.xori": "0", "arith.andi": "-1", "arith.maxui": "0", "arith.minui": "-1",
}  # fmt: skip


def neutral(block: Block, elem: Elem) -> str | None:
    """Neutral element of a combine function of one operation; None if it has none."""
    ops = [op for op in block.ops if op.name not in ("arith.extf", "arith.truncf")]
    if len(ops) != 2 or len(block.args) != 2:
        return None
    name = ops[0].name
    if name in ("arith.maxsi", "arith.minsi"):
        top = (1 << (elem.bits - 1)) - 1
        return str(-top - 1 if name == "arith.maxsi" else top)
    text = _NEUTRAL.get(name)
    if text is None or not elem.is_float:
        return text if text is None or elem != I1 else scalar_literal(text, I1)
    patterns = {"-inf": _infinity(elem, 1), "inf": _infinity(elem, 0), "nan": _nan(elem)}
    return scalar_literal(patterns.get(text, text), elem)


def _fields(elem: Elem) -> tuple[int, int]:
    exponent = {"f16": 5, "bf16": 8, "f32": 8, "f64": 11, "f8E5M2": 5, "f8E4M3FN": 4}[elem.name]
    return exponent, elem.bits - 1 - exponent


def _infinity(elem: Elem, sign: int) -> str:
    exponent, mantissa = _fields(elem)
    return hex((sign << (elem.bits - 1)) | (((1 << exponent) - 1) << mantissa))


def _nan(elem: Elem) -> str:
    exponent, mantissa = _fields(elem)
    return hex((((1 << exponent) - 1) << mantissa) | (1 << (mantissa - 1)))


def masked_element(block: Block, elem: Elem, start: str) -> str:
    """What the masked elements of a reduction are: for maxima an infinity, where the neutral element is NaN."""
    name = block.ops[0].name
    if name in ("arith.maxnumf", "arith.minnumf"):
        return scalar_literal(_infinity(elem, int(name == "arith.maxnumf")), elem)
    return start
