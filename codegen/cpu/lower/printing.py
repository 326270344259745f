"""``tt.print``: one line an element, in the format of Triton's GPU backends."""

import re
from functools import partial

from tilewright.codegen.cpu.lower.context import Context
from tilewright.codegen.cpu.lower.convert import widen
from tilewright.codegen.cpu.lower.lanes import Point
from tilewright.codegen.cpu.lower.reduce import as_vector, ref_of, scalar_nest
from tilewright.codegen.cpu.ttir.records import I1, Elem, Op

_PRINTF = "declare i32 @printf(ptr, ...)\ndeclare i32 @fflush(ptr)"
_ESCAPE = re.compile(rb"\\([0-9A-Fa-f]{2}|\\)")


def lower_print(ctx: Context, op: Op) -> None:
    """``tt.print``; a scalar is printed once a program, where a GPU prints it for each thread."""
    ctx.functions["printf"] = _PRINTF
    prefix = _text(op)
    signs = [int(x) for x in op.attrs.get("isSigned", ":").partition(":")[2].strip(" >").split(",") if x.strip()]
    if not op.operands:
        _print_line(ctx, b"pid (%u, %u, %u)" + prefix, [])
    for number, value in enumerate(op.operands):
        digits = (f"%{len(str(size - 1))}d" for size in value.shape)
        text = f"pid (%u, %u, %u) idx ({', '.join(digits)})".encode() + prefix
        text += f"(operand {number}) ".encode() if len(op.operands) > 1 else b""
        signed = number < len(signs) and bool(signs[number])
        scalar_nest(ctx, value.shape, partial(_print_element, ctx, op, number, text, signed))
    ctx.b.effect("call i32 @fflush(ptr null)")


def _text(op: Op) -> bytes:
    """The words of the call, from MLIR's form of a string to printf's."""
    inner = op.attrs.get("text", '""')[1:-1].encode()
    plain = _ESCAPE.sub(lambda m: b"\\" if m[1] == b"\\" else bytes([int(m[1], 16)]), inner)
    return plain.replace(b"%", b"%%")


def _print_element(ctx: Context, op: Op, number: int, text: bytes, signed: bool, point: Point) -> None:
    value = op.operands[number]
    ref = ref_of(as_vector(ctx, ctx.simplify(ctx.value(value, point)), 0))
    form, argument = _printf_argument(ctx, ref, value.elem, op.attrs.get("hex") == "true", signed)
    _print_line(ctx, text + form.encode(), [*(f"i32 {ref_of(index)}" for index in point), argument])


def _print_line(ctx: Context, text: bytes, arguments: list[str]) -> None:
    data = text + b"\n\0"
    name = f"@tw.text{len(ctx.functions)}"
    escaped = "".join(f"\\{byte:02X}" for byte in data)
    ctx.functions[name] = f'{name} = internal constant [{len(data)} x i8] c"{escaped}"'
    program = [f"i32 {ctx.program_ids[axis]}" for axis in "xyz"]
    ctx.b.effect(f"call i32 (ptr, ...) @printf({', '.join([f'ptr {name}', *program, *arguments])})")


def _printf_argument(ctx: Context, ref: str, elem: Elem, hexadecimal: bool, signed: bool) -> tuple[str, str]:
    b = ctx.b
    if elem.is_float:
        wide = b.emit(f"fpext float {widen(b, ref, elem, 0)} to double") if elem.name != "f64" else ref
        return "%f", f"double {wide}"
    if elem.is_ptr:
        return "%p", f"ptr {ref}"
    extend = "sext" if signed and elem != I1 and not hexadecimal else "zext"
    wide = ref if elem.bits == 64 else b.emit(f"{extend} {elem.llvm} {ref} to i64")
    form = f"0x%0{max(elem.bits // 4, 1)}llx" if hexadecimal else "%lld" if signed else "%llu"
    return form, f"i64 {wide}"
