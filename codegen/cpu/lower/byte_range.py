"""Largest value that a byte may have, read as unsigned, as far as masks and shifts that made it tell."""

from tilewright.codegen.cpu.ttir.literals import python_value
from tilewright.codegen.cpu.ttir.records import I8, Value

_ANY = 255
_LEAST_SIGNED, _LARGEST_SIGNED = -128, 127
_SAME = {"tt.reshape", "tt.trans", "tt.broadcast", "tt.expand_dims", "tt.splat", "tt.bitcast"}


def largest_byte(value: Value) -> int:
    """The bound of an i8 tensor; 255 where nothing is known."""
    op = value.op
    if op is None or value.elem != I8:
        return _ANY
    if op.name == "arith.constant":
        number = python_value(op.attrs["value"], value.elem)
        return _ANY if number is None else int(number) % 256
    if op.name in _SAME:
        return largest_byte(op.operands[0])
    if op.name not in ("arith.andi", "arith.ori", "arith.shrui", "arith.shli"):
        return _ANY
    left, right = op.operands
    if op.name == "arith.andi":
        return min(largest_byte(left), largest_byte(right))
    if op.name == "arith.ori":
        # All bits up to the highest of either may be set.
        return (1 << (largest_byte(left) | largest_byte(right)).bit_length()) - 1
    shift = splat_constant(right)
    if shift is None or not 0 <= shift < 8:
        return _ANY
    return largest_byte(left) >> shift if op.name == "arith.shrui" else min(_ANY, largest_byte(left) << shift)


def without_offset(value: Value) -> tuple[Value, int]:
    """(u, c) of bytes computed as u - c that do not wrap around, u read as unsigned; (value, 0) of any other."""
    op = value.op
    while op is not None and op.name == "tt.bitcast":
        op = op.operands[0].op
    if op is None or op.name not in ("arith.subi", "arith.addi"):
        return value, 0
    constant = splat_constant(op.operands[1])
    if constant is None:
        return value, 0
    offset = -constant if op.name == "arith.addi" else constant
    fits = 0 < offset <= -_LEAST_SIGNED and largest_byte(op.operands[0]) - offset <= _LARGEST_SIGNED
    return (op.operands[0], offset) if fits else (value, 0)


def splat_constant(value: Value) -> int | None:
    """The number that all elements of a tensor of integers are; None where they are not one known number."""
    op = value.op
    while op is not None and op.name in _SAME:
        op = op.operands[0].op
    if op is None or op.name != "arith.constant":
        return None
    number = python_value(op.attrs["value"], value.elem)
    return None if number is None else int(number)
