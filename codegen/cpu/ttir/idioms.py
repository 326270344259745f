"""Rewrites expressions that lose range as they are written.

``1 / (1 + exp(-x))`` overflows where the sigmoid is still a number: it becomes one operation, ``math.sigmoid``.
"""

from tilewright.codegen.cpu.ttir.literals import python_value
from tilewright.codegen.cpu.ttir.records import F32, F64, Function, Op, Value, walk

_SHAPE_ONLY = {"tt.splat", "tt.broadcast", "tt.expand_dims"}


def recognize_idioms(function: Function) -> None:
    """Changes a function in place; operations left without a use cost nothing, they are lazy."""
    for op in walk(function.blocks):
        argument = _argument_of_sigmoid(op)
        if argument is not None:
            op.name, op.operands, op.attrs = "math.sigmoid", [argument], {}


def _constant(value: Value) -> float | None:
    op = value.op
    while op is not None and op.name in _SHAPE_ONLY:
        value = op.operands[0]
        op = value.op
    if op is None or op.name != "arith.constant":
        return None
    return python_value(op.attrs.get("value", ""), value.elem)


def _defined_by(value: Value, *names: str) -> Op | None:
    return value.op if value.op is not None and value.op.name in names else None


def _argument_of_sigmoid(op: Op) -> Value | None:
    """x, if the operation is ``1 / (1 + exp(-x))``."""
    if op.name not in ("arith.divf", "tt.precise_divf") or op.result.elem not in (F32, F64):
        return None
    total = _defined_by(op.operands[1], "arith.addf")
    if total is None or _constant(op.operands[0]) != 1.0:
        return None
    for one, other in (total.operands, total.operands[::-1]):
        power = _defined_by(other, "math.exp")
        if power is not None and _constant(one) == 1.0:
            return _negated(power.operands[0])
    return None


def _negated(value: Value) -> Value | None:
    op = _defined_by(value, "arith.negf", "arith.subf")
    if op is None:
        return None
    if op.name == "arith.negf":
        return op.operands[0]
    return op.operands[1] if _constant(op.operands[0]) == 0.0 else None
