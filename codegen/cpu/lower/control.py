"""Structured control flow with scalars in registers and tensors in scratch memory."""

from collections.abc import Callable, Sequence

from tilewright.codegen.cpu.lower.carry import claim, tile_for, write_all
from tilewright.codegen.cpu.lower.context import Buffer, Context, Scalar, Shifted
from tilewright.codegen.cpu.lower.lanes import ZERO, Uniform
from tilewright.codegen.cpu.lower.nest import index_like
from tilewright.codegen.cpu.lower.stop import leave_if_stopped
from tilewright.codegen.cpu.lower.tiles import materialize
from tilewright.codegen.cpu.lower.wrap import unwrapping, wraps
from tilewright.codegen.cpu.ttir.records import I64, Block, Op, Value

LowerBlock = Callable[[Context, Block], None]


def increments(ctx: Context, arg: Value, result: Value) -> list[Value] | None:
    """Tensors, the same everywhere, whose sum a loop adds to ``arg``; None if it does something else."""
    added: list[Value] = []
    while result is not arg:
        op = result.op
        if op is None or op.name not in ("tt.addptr", "arith.addi") or result in ctx.plan.materialized:
            return None
        left, right = op.operands
        if not ctx.plan.axes(right) and right.type.is_tensor:
            added.append(right)
            result = left
        elif op.name == "arith.addi" and not ctx.plan.axes(left):
            added.append(left)
            result = right
        else:
            return None
    return added


class _For:
    """One ``scf.for``: how each carried value is kept."""

    def __init__(self, ctx: Context, op: Op, lower: LowerBlock) -> None:
        self.ctx, self.op, self.lower = ctx, op, lower
        self.block = op.body()
        self.index, *self.args = self.block.args
        self.inits = op.operands[3:]
        self.yielded = self.block.ops[-1].operands
        self.steps: dict[int, list[Value]] = {}
        self.buffers: dict[int, Buffer] = {}
        for k, arg in enumerate(self.args):
            if not arg.type.is_tensor:
                continue
            steps = increments(ctx, arg, self.yielded[k])
            if steps is not None:
                self.steps[k] = steps
                self._keep_origin(self.inits[k])
            else:
                self.buffers[k] = self._initial(self.inits[k])

    def _keep_origin(self, init: Value) -> None:
        """The loop evaluates the initial tensor again and again: only index arithmetic stays lazy."""
        ctx = self.ctx
        if init in ctx.bindings or index_like(ctx, init):
            return
        kept_in_range = wraps(ctx, init)
        with unwrapping(ctx, kept_in_range):
            lazy = index_like(ctx, init)
        for value in reversed(kept_in_range) if lazy else [init]:
            if value not in ctx.bindings:
                ctx.bind(value, materialize(ctx, value, op=self.op))

    def _initial(self, init: Value) -> Buffer:
        ctx = self.ctx
        binding = ctx.bindings.get(init)
        owned = len(ctx.plan.users[init]) == 1 and ctx.plan.loops_around(init) == ctx.plan.loops_of(self.op)
        if isinstance(binding, Buffer) and owned:
            return binding
        return materialize(ctx, init, op=self.op)

    def _phi_type(self, k: int) -> str:
        return "i64" if self.args[k].elem.is_ptr else self.args[k].elem.llvm

    def run(self) -> None:
        """Writes the loop and binds its results."""
        ctx = self.ctx
        phis = [k for k in range(len(self.args)) if k not in self.buffers]
        init = []
        for k in phis:
            first = "0" if k in self.steps else ctx.scalar(self.inits[k])
            init.append((self._phi_type(k) if k in self.steps else self.args[k].elem.llvm, first))
        low, high, step = (ctx.scalar(v) for v in self.op.operands[:3])

        def body(index: str, carried: list[str]) -> list[str]:
            leave_if_stopped(ctx)
            ctx.bind(self.index, Scalar(index))
            for k, ref in zip(phis, carried, strict=True):
                self._bind_carried(self.args[k], k, ref)
            for k, buffer in self.buffers.items():
                ctx.bind(self.args[k], buffer)
                claim(ctx, self.yielded[k], buffer, self.args[k])
            self.lower(ctx, self.block)
            following = [self._following(k, ref) for k, ref in zip(phis, carried, strict=True)]
            write_all(ctx, [(self.yielded[k], buffer) for k, buffer in self.buffers.items()], self.op)
            return following

        final = ctx.b.loop(low, high, step, init, body, index_type=self.index.elem.llvm, small=False)
        for k, ref in zip(phis, final, strict=True):
            self._bind_carried(self.op.results[k], k, ref)
        for k, buffer in self.buffers.items():
            ctx.bind(self.op.results[k], buffer)

    def _bind_carried(self, value: Value, k: int, ref: str) -> None:
        if k in self.steps:
            elem = I64 if value.elem.is_ptr else value.elem
            self.ctx.bind(value, Shifted(self.inits[k], Uniform(elem, ref)))
        else:
            self.ctx.bind(value, Scalar(ref))

    def _following(self, k: int, ref: str) -> str:
        ctx = self.ctx
        if k not in self.steps:
            return ctx.scalar(self.yielded[k])
        is_ptr = self.args[k].elem.is_ptr
        for step in self.steps[k]:
            lane = ctx.value(step, (ZERO,) * len(step.shape))
            assert isinstance(lane, Uniform)
            amount = ctx.b.widen_index(lane.ref, lane.elem) if is_ptr else lane.ref
            ref = ctx.b.int_op("add", ref, amount, I64 if is_ptr else lane.elem)
        return ref


def lower_if(ctx: Context, op: Op, lower: LowerBlock) -> None:
    """``scf.if``."""
    buffers = {k: tile_for(ctx, v, op) for k, v in enumerate(op.results) if v.type.is_tensor}
    scalars = [k for k, v in enumerate(op.results) if not v.type.is_tensor]

    def side(block: Block) -> Callable[[], Sequence[str]]:
        def write() -> Sequence[str]:
            yielded = block.ops[-1].operands if block.ops else []
            lower(ctx, block)
            write_all(ctx, [(yielded[k], buffer) for k, buffer in buffers.items()], op)
            return [ctx.scalar(yielded[k]) for k in scalars]

        return write

    sides = [side(region[0]) for region in op.regions]
    types = [op.results[k].elem.llvm for k in scalars]
    joined = ctx.b.branch(ctx.scalar(op.operands[0]), sides[0], sides[1] if len(sides) > 1 else None, types)
    for k, ref in zip(scalars, joined, strict=True):
        ctx.bind(op.results[k], Scalar(ref))
    for k, buffer in buffers.items():
        ctx.bind(op.results[k], buffer)


def lower_while(ctx: Context, op: Op, lower: LowerBlock) -> None:
    """``scf.while``: tensors have one tile before the test and one behind it."""
    before, after = op.body(0), op.body(1)
    condition = before.ops[-1]
    state = {k: materialize(ctx, v, op=op) for k, v in enumerate(op.operands) if v.type.is_tensor}
    passed = {k: ctx.new_buffer(v.type, op) for k, v in enumerate(op.results) if v.type.is_tensor}
    carried = [k for k in range(len(op.operands)) if k not in state]
    handed = [k for k in range(len(op.results)) if k not in passed]

    def test(refs: list[str]) -> tuple[str, list[tuple[str, str]]]:
        leave_if_stopped(ctx)
        for k, ref in zip(carried, refs, strict=True):
            ctx.bind(before.args[k], Scalar(ref))
        for k, buffer in state.items():
            ctx.bind(before.args[k], buffer)
        lower(ctx, before)
        values = condition.operands[1:]
        write_all(ctx, [(values[k], buffer) for k, buffer in passed.items()], op)
        return ctx.scalar(condition.operands[0]), [(values[k].elem.llvm, ctx.scalar(values[k])) for k in handed]

    def body(refs: list[str]) -> list[str]:
        for k, ref in zip(handed, refs, strict=True):
            ctx.bind(after.args[k], Scalar(ref))
        for k, buffer in passed.items():
            ctx.bind(after.args[k], buffer)
        lower(ctx, after)
        yielded = after.ops[-1].operands
        write_all(ctx, [(yielded[k], buffer) for k, buffer in state.items()], op)
        return [ctx.scalar(yielded[k]) for k in carried]

    init = [(op.operands[k].elem.llvm, ctx.scalar(op.operands[k])) for k in carried]
    final = ctx.b.while_loop(init, test, body)
    for k, ref in zip(handed, final, strict=True):
        ctx.bind(op.results[k], Scalar(ref))
    for k, buffer in passed.items():
        ctx.bind(op.results[k], buffer)


def lower_for(ctx: Context, op: Op, lower: LowerBlock) -> None:
    """``scf.for``."""
    _For(ctx, op, lower).run()
