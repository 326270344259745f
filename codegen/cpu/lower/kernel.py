"""One kernel: the loop over programs, the parameters, and the operations in program order."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from tilewright.codegen.cpu.lower import exchange, shapes  # noqa: F401  (register their operations)
from tilewright.codegen.cpu.lower.access import SAFE_PAGE_IR, STREAM_HINT_IR
from tilewright.codegen.cpu.lower.assertion import lower_assert
from tilewright.codegen.cpu.lower.atomic import EAGER_ELEMENTS
from tilewright.codegen.cpu.lower.blocks import lower_blocks
from tilewright.codegen.cpu.lower.carry import tile_for
from tilewright.codegen.cpu.lower.checks import Checks
from tilewright.codegen.cpu.lower.context import LAZY, Context, Scalar
from tilewright.codegen.cpu.lower.control import lower_for, lower_if, lower_while
from tilewright.codegen.cpu.lower.dot import find_tile_shapes, lower_dot
from tilewright.codegen.cpu.lower.elementwise_map import lower_map_elementwise
from tilewright.codegen.cpu.lower.lanes import ZERO, Uniform
from tilewright.codegen.cpu.lower.memory import lower_store, scalar_load
from tilewright.codegen.cpu.lower.printing import lower_print
from tilewright.codegen.cpu.lower.reduce import lower_reduce
from tilewright.codegen.cpu.lower.scan import lower_scan
from tilewright.codegen.cpu.lower.stop import bind_table
from tilewright.codegen.cpu.lower.stream import FENCE, unread_stores
from tilewright.codegen.cpu.lower.tiles import carrier, materialize
from tilewright.codegen.cpu.microkernel_amx import RELEASE
from tilewright.codegen.cpu.target import CpuTarget
from tilewright.codegen.cpu.ttir.idioms import recognize_idioms
from tilewright.codegen.cpu.ttir.inline import inline_calls
from tilewright.codegen.cpu.ttir.literals import scalar_literal
from tilewright.codegen.cpu.ttir.origin import Origins
from tilewright.codegen.cpu.ttir.pairs import flatten_pairs
from tilewright.codegen.cpu.ttir.parser import parse_module
from tilewright.codegen.cpu.ttir.plan import Plan, is_lazy
from tilewright.codegen.cpu.ttir.records import Block, Elem, Function, Op, walk
from tilewright.codegen.cpu.ttir.scaled import expand_scaled_dots
from tilewright.errors import CodegenError, TilewrightError, Where

_AXES = "xyz"


@dataclass(frozen=True)
class Lowered:
    """A kernel as LLVM IR.

    Attributes:
        llvm_ir: text of a module that defines ``void name(ptr args, i32 grid_x, i32 grid_y, i32 grid_z, i64 first,
            i64 last)``, which runs the programs with linear numbers first to last - 1, x fastest. ``args`` points to
            one 8-byte slot per parameter: addresses, integers extended to i64, floats in the low bytes.
        name: the kernel's name.
        params: TTIR types of the parameters, such as ``!tt.ptr<f32>`` and ``i32``.
        stops: whether it can stop itself: then there is one slot more, the address of a ``MemoryTable``.
        searches: whether it asks the table for memory that is no parameter's, in checked mode.
    """

    llvm_ir: str
    name: str
    params: tuple[str, ...]
    stops: bool = False
    searches: bool = False


def lower_module(ttir: str, target: CpuTarget, check: bool = False) -> Lowered:
    """Lowers TTIR text, with or without debug locations, to LLVM IR.

    Args:
        check: test every access to memory (checked mode).

    Raises:
        UnsupportedOp: the kernel uses an operation that this backend cannot run.
    """
    function = inline_calls(parse_module(ttir))
    expand_scaled_dots(function)
    recognize_idioms(function)
    kept = flatten_pairs(function, target.lanes_f32)
    ctx = Context(function.name, target, Plan(function, kept))
    ctx.tile_shapes = find_tile_shapes(ctx, function.blocks)
    ctx.b.open("program")
    _bind_program(ctx)
    _bind_params(ctx, function)
    stops = check or any(op.name == "tt.assert" for op in walk(function.blocks))
    if stops:
        bind_table(ctx, len(function.params))
    if check:
        ctx.checks = Checks(ctx, Origins(function))
    elif target.is_x86:
        ctx.unread = unread_stores(function)
    lower_blocks(ctx, function.blocks, lower_block)
    searches = ctx.checks is not None and ctx.checks.searches
    params = tuple(_spelling(p.elem) for p in function.params)
    return Lowered(_module_text(ctx, function), function.name, params, stops, searches)


def _spelling(elem: Elem) -> str:
    return f"!tt.ptr<{_spelling(elem.pointee)}>" if elem.pointee is not None else elem.name


def _bind_params(ctx: Context, function: Function) -> None:
    """Reads the argument slots once, outside the loop over programs."""
    entry = ctx.b.scopes[0]
    for number, param in enumerate(function.params):
        slot, name = f"%slot{number}", f"%arg{number}"
        entry.lines.append(f"  {slot} = getelementptr i8, ptr %args, i64 {8 * number}")
        entry.lines.append(f"  {name} = load {param.elem.memory}, ptr {slot}, align 8")
        if param.elem.memory != param.elem.llvm:
            entry.lines.append(f"  {name}.bit = trunc {param.elem.memory} {name} to {param.elem.llvm}")
            name += ".bit"
        ctx.b.define(name, 0)
        ctx.bind(param, Scalar(name))
        ctx.levels[param] = 0


def _bind_program(ctx: Context) -> None:
    """Coordinates of the program from its linear number."""
    b = ctx.b
    b.define("%program_id", 1)
    for axis in _AXES:
        ctx.grid[axis] = b.define(f"%grid_{axis}", 0)
    x = b.emit(f"zext i32 {ctx.grid['x']} to i64")
    y = b.emit(f"zext i32 {ctx.grid['y']} to i64")
    rows = b.emit(f"udiv i64 %program_id, {x}")
    parts = {
        "x": b.emit(f"urem i64 %program_id, {x}"),
        "y": b.emit(f"urem i64 {rows}, {y}"),
        "z": b.emit(f"udiv i64 {rows}, {y}"),
    }
    for axis, wide in parts.items():
        ctx.program_ids[axis] = b.emit(f"trunc i64 {wide} to i32")


def _module_text(ctx: Context, function: Function) -> str:
    b = ctx.b
    program = b.close()
    entry = b.scopes[0]
    name = function.name if re.fullmatch(r"[\w.$]+", function.name) else f'"{function.name}"'
    header = f"define void @{name}(ptr %args, i32 %grid_x, i32 %grid_y, i32 %grid_z, i64 %first, i64 %last)"
    tiles = ctx.tile_shapes
    start = [f"  {tiles[0].load_shape()}"] if len(tiles) == 1 else []
    lines = [f"{header} nounwind {{", "entry:", *b.allocas, *entry.lines, *start, "  br label %programs", "programs:"]
    lines += [
        f"  %program_id = phi i64 [%first, %entry], [%next_program, %{program.label}]",
        "  %any_program = icmp slt i64 %program_id, %last",
        "  br i1 %any_program, label %program, label %exit",
        *program.lines,
        "  %next_program = add i64 %program_id, 1",
        "  br label %programs",
        *b.exits,
        "exit:",
        *b.frees,
        *([f"  {FENCE}"] if ctx.unread else []),
        # Tiles that stay in use would make every later switch of threads save and restore 8 KB.
        *([f"  {RELEASE}"] if tiles else []),
        "  ret void",
        "}",
    ]
    heap = "declare noalias ptr @aligned_alloc(i64, i64)\ndeclare void @free(ptr)" if b.frees else ""
    parts = [
        f'target triple = "{ctx.target.triple}"',
        SAFE_PAGE_IR,
        heap,
        ctx.math.definitions(),
        *ctx.functions.values(),
        *(shape.definition() for shape in tiles),
    ]
    return "\n".join([*parts, *lines, STREAM_HINT_IR])


def lower_block(ctx: Context, block: Block) -> None:
    """All operations of a block but its terminator."""
    for position, op in enumerate(block.ops):
        if op.name in _TERMINATORS:
            return
        try:
            _lower(ctx, op, block, position)
        except TilewrightError:
            raise
        except Exception as error:
            raise CodegenError(
                f"lowering of {op.name} failed",
                where=Where(node=ctx.kernel, source=op.loc or None),
                why=f"{type(error).__name__}: {error}",
                hint="rewrite this line with other tl operations; a report with this kernel helps us mend it",
            ) from error


def _lower(ctx: Context, op: Op, block: Block, position: int) -> None:
    handler = EAGER.get(op.name)
    if handler is not None:
        handler(ctx, op)
    elif op.name in _CONTROL:
        _CONTROL[op.name](ctx, op, lower_block)
    elif is_lazy(op):
        _define_lazy(ctx, op, block, position)
    else:
        _scalar(ctx, op)


def _define_lazy(ctx: Context, op: Op, block: Block, position: int) -> None:
    if op.name not in LAZY and not ctx.knows(op):
        raise ctx.unsupported(op, "it is not among the operations this backend knows")
    for value in op.results:
        ctx.levels[value] = ctx.b.depth
        if value not in ctx.plan.materialized:
            continue
        reduction = None if value in ctx.destinations else carrier(ctx, value, block.ops[position + 1 :])
        if reduction is not None:
            ctx.carried.setdefault(reduction, []).append(value)
        else:
            ctx.bind(value, materialize(ctx, value, tile_for(ctx, value, op)))


def _scalar(ctx: Context, op: Op) -> None:
    """An operation on scalars."""
    if op.name == "tt.load":
        scalar_load(ctx, op)
        return
    lanes = [ctx.value(v, (ZERO,) * len(v.shape)) for v in op.operands]
    lane = ctx.apply(op, lanes)
    assert isinstance(lane, Uniform)
    ctx.bind(op.result, Scalar(lane.ref))


def _constant(ctx: Context, op: Op) -> None:
    if op.result.type.is_tensor:
        ctx.levels[op.result] = ctx.b.depth
        return
    ctx.bind(op.result, Scalar(scalar_literal(op.attrs.get("value", "0"), op.result.elem)))


def _program_id(ctx: Context, op: Op) -> None:
    ctx.bind(op.result, Scalar(ctx.program_ids[op.words[0]]))


def _num_programs(ctx: Context, op: Op) -> None:
    ctx.bind(op.result, Scalar(ctx.grid[op.words[0]]))


def _unsplat(ctx: Context, op: Op) -> None:
    source = op.operands[0]
    lane = ctx.value(source, (ZERO,) * len(source.shape))
    assert isinstance(lane, Uniform)
    ctx.bind(op.result, Scalar(lane.ref))


def _region(ctx: Context, op: Op) -> None:
    lower_blocks(ctx, op.regions[0], lower_block, op.results)


def _nothing(ctx: Context, op: Op) -> None:
    """Hints and barriers: the threads of a program are one."""


_TERMINATORS = {"scf.yield", "scf.condition", "tt.return", "tt.map_elementwise.return", "cf.br", "cf.cond_br"}
_CONTROL = {
    "scf.for": lower_for,
    "scf.if": lower_if,
    "scf.while": lower_while,
    "tt.map_elementwise": lower_map_elementwise,
}
EAGER: dict[str, Callable[[Context, Op], None]] = {
    "tt.store": lower_store,
    "tt.reduce": lower_reduce,
    "tt.scan": lower_scan,
    "tt.dot": lower_dot,
    **EAGER_ELEMENTS,
    "tt.print": lower_print,
    "tt.assert": lower_assert,
    "arith.constant": _constant,
    "ub.poison": _constant,
    "tt.get_program_id": _program_id,
    "tt.get_num_programs": _num_programs,
    "tt.unsplat": _unsplat,
    "cf.region": _region,
    "gpu.barrier": _nothing,
    "ttg.barrier": _nothing,
    "ttg.local_barrier": _nothing,
    "llvm.intr.assume": _nothing,
}
