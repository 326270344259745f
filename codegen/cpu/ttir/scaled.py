"""``tt.dot_scaled`` as conversions, multiplications and a ``tt.dot``: a rewrite of records before planning.

Formats and scales are those of the OCP Microscaling Formats specification 1.0 (2023): elements e2m1 (two in a byte, the
first in the low bits), e4m3 and e5m2, scales 2^(s - 127) with 255 for NaN; and NVFP4's scales in e4m3. An element has
at most four significant bits and the scale at most as many, so their product is exact in bf16. Beside an fp16 operand
the product is computed in f32.
"""

from collections.abc import Sequence

from tilewright.codegen.cpu.ttir.records import BF16, F16, F32, I1, I32, Block, Elem, Function, Op, Type, Value

_NAN_SCALE = 255
# f32 with the exponent and the mantissa bit of e2m1 in the right places is this much too small: bias 127 against 1.
_E2M1_BIAS = "0x7E800000"


class _Writer:
    """Appends operations that stand for one operation of the text."""

    def __init__(self, loc: str) -> None:
        self.ops: list[Op] = []
        self._loc = loc

    def op(self, name: str, operands: Sequence[Value], type_: Type, words: tuple[str, ...] = (), **attrs: str) -> Value:
        op = Op(name, list(operands), [Value("", type_)], attrs, words, loc=self._loc)
        op.result.op = op
        self.ops.append(op)
        return op.result

    def fill(self, literal: str, like: Value, elem: Elem = I32) -> Value:
        """A tensor of one number, of the shape of another."""
        return self.op("arith.constant", [], Type(elem, like.shape), value=f"dense<{literal}>")

    def with_number(self, name: str, value: Value, number: int) -> Value:
        """An integer operation with a constant right operand."""
        return self.op(name, [value, self.fill(str(number), value)], value.type)

    def choose(self, value: Value, equal: int, literal: str, otherwise: Value) -> Value:
        """``literal where value == equal else otherwise``."""
        flags = self.op("arith.cmpi", [value, self.fill(str(equal), value)], value.type.with_elem(I1), ("eq",))
        return self.op(
            "arith.select", [flags, self.fill(literal, otherwise, otherwise.elem), otherwise], otherwise.type
        )

    def bits_as_f32(self, value: Value) -> Value:
        return self.op("arith.bitcast", [value], value.type.with_elem(F32))

    def repeat(self, value: Value, axis: int, times: int) -> Value:
        """Each element ``times`` times in succession along an axis."""
        shape = value.shape
        at = axis + 1
        apart = self.op("tt.expand_dims", [value], Type(value.elem, (*shape[:at], 1, *shape[at:])), axis=str(at))
        wide = self.op("tt.broadcast", [apart], Type(value.elem, (*shape[:at], times, *shape[at:])))
        return self.op("tt.reshape", [wide], Type(value.elem, (*shape[:axis], shape[axis] * times, *shape[at:])))

    def unpacked(self, value: Value, axis: int) -> Value:
        """f32 values of e2m1 elements, of which each byte holds two neighbours along ``axis``."""
        wide = self.op("arith.extui", [value], value.type.with_elem(I32))
        pairs = self.repeat(wide, axis, 2)
        number = self.op("tt.make_range", [], Type(I32, (pairs.shape[axis],)), start="0", end=str(pairs.shape[axis]))
        for at in range(len(pairs.shape)):
            if at != axis:
                shape = (*number.shape[:at], 1, *number.shape[at:])
                number = self.op("tt.expand_dims", [number], Type(I32, shape), axis=str(at))
        number = self.op("tt.broadcast", [number], pairs.type)
        shift = self.with_number("arith.shli", self.with_number("arith.andi", number, 1), 2)
        code = self.op("arith.shrui", [pairs, shift], pairs.type)
        size = self.with_number("arith.shli", self.with_number("arith.andi", code, 7), 22)
        small = self.bits_as_f32(size)
        exact = self.op("arith.mulf", [small, self.fill(_E2M1_BIAS, small, F32)], small.type)
        sign = self.with_number("arith.shli", self.with_number("arith.andi", code, 8), 28)
        whole = self.op("arith.ori", [self.op("arith.bitcast", [exact], sign.type), sign], sign.type)
        return self.bits_as_f32(whole)

    def scale(self, value: Value) -> Value:
        """f32 values of scales."""
        if value.elem.is_float:
            return self.op("tt.fp_to_fp", [value], value.type.with_elem(F32))
        wide = self.op("arith.extui", [value], value.type.with_elem(I32))
        power = self.bits_as_f32(self.with_number("arith.shli", wide, 23))
        power = self.choose(wide, 0, "0x00400000", power)  # 2^-127 is below the normal numbers
        return self.choose(wide, _NAN_SCALE, "0x7FC00000", power)

    def operand(self, value: Value, scale: Value | None, form: str, k_axis: int, packed_axis: int, to: Elem) -> Value:
        """One operand of the product, as ``to``."""
        if form == "e2m1":
            wide = self.unpacked(value, packed_axis)
        elif scale is None and value.elem == to:
            return value
        else:
            wide = self.op("tt.fp_to_fp", [value], value.type.with_elem(F32))
        if scale is not None:
            groups = self.scale(scale)
            last = len(scale.shape) - 1
            factors = self.repeat(groups, last, wide.shape[k_axis] // scale.shape[last])
            if k_axis != last:
                order = (*range(last - 1), last, last - 1)
                factors = self.op("tt.trans", [factors], wide.type, order=f"array<i32: {', '.join(map(str, order))}>")
            wide = self.op("arith.mulf", [wide, factors], wide.type)
        return self.op("tt.fp_to_fp", [wide], wide.type.with_elem(to))


def expand_scaled_dots(function: Function) -> None:
    """Replaces every ``tt.dot_scaled`` of a function, in place."""
    _expand(function.blocks)


def _expand(blocks: list[Block]) -> None:
    for block in blocks:
        ops: list[Op] = []
        for op in block.ops:
            for region in op.regions:
                _expand(region)
            ops += _expanded(op) if op.name == "tt.dot_scaled" else [op]
        block.ops = ops


def _expanded(op: Op) -> list[Op]:
    values = list(op.operands)
    left = values.pop(0)
    left_scale = values.pop(0) if "lhs" in op.attrs["scaled"] else None
    right = values.pop(0)
    right_scale = values.pop(0) if "rhs" in op.attrs["scaled"] else None
    forms = op.attrs["lhs"], op.attrs["rhs"]
    to = F32 if F16 in (left.elem, right.elem) else BF16
    last = len(left.shape) - 1
    writer = _Writer(op.loc)
    left_packed = last if op.attrs.get("lhs_k_pack", "true") == "true" else last - 1
    right_packed = last - 1 if op.attrs.get("rhs_k_pack", "true") == "true" else last
    left = writer.operand(left, left_scale, forms[0], last, left_packed, to)
    right = writer.operand(right, right_scale, forms[1], last - 1, right_packed, to)
    dot = Op("tt.dot", [left, right, *values], op.results, loc=op.loc)
    for value in dot.results:
        value.op = dot
    return [*writer.ops, dot]
