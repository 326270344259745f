"""A function's blocks: branches without cycles, as early returns leave them, written as nested ifs.

Two branches are written up to the block where they meet again, the immediate post-dominator of the block that parts
them, and what follows is written once, however many branches come one after the other.
"""

from collections.abc import Callable, Sequence

from tilewright.codegen.cpu.lower.carry import write_all
from tilewright.codegen.cpu.lower.context import Buffer, Context, Scalar
from tilewright.codegen.cpu.lower.tiles import materialize
from tilewright.codegen.cpu.ttir.records import Block, Op, Value, walk

LowerBlock = Callable[[Context, Block], None]


class _Joint:
    """Values that get what one of several branches passes on: scalars in registers, tensors in scratch memory."""

    def __init__(self, ctx: Context, values: Sequence[Value]) -> None:
        self.ctx, self.values = ctx, values
        self.buffers: dict[int, Buffer] = {
            k: ctx.new_buffer(v.type, v.op) for k, v in enumerate(values) if v.type.is_tensor
        }
        self.scalars = [k for k in range(len(values)) if k not in self.buffers]
        self.types = [values[k].elem.llvm for k in self.scalars]

    def receive(self, passed: Sequence[Value], op: Op) -> list[str]:
        """Writes the tensors to their memory; returns the scalars."""
        write_all(self.ctx, [(passed[k], buffer) for k, buffer in self.buffers.items()], op)
        return [self.ctx.scalar(passed[k]) for k in self.scalars]

    def bind(self, refs: Sequence[str]) -> None:
        for k, ref in zip(self.scalars, refs, strict=True):
            self.ctx.bind(self.values[k], Scalar(ref))
        for k, buffer in self.buffers.items():
            self.ctx.bind(self.values[k], buffer)


class _Flow:
    """The blocks of one function or inlined call."""

    def __init__(self, ctx: Context, blocks: Sequence[Block], lower: LowerBlock) -> None:
        self.ctx, self.lower = ctx, lower
        self.by_label = {block.label: block for block in blocks}
        # Post-dominators of a block, itself included; an empty set while it is being computed.
        self._behind: dict[Block, frozenset[Block]] = {}

    def follow(self, block: Block, stop: Block | None, joint: _Joint) -> list[str]:
        """Writes a block and what comes after it, up to ``stop`` or the return; returns the scalars of the joint."""
        while True:
            self._write(block)
            last = block.ops[-1]
            if last.name in ("tt.return", "tt.map_elementwise.return"):
                return joint.receive(last.operands, last)
            if len(last.targets) == 1:
                label, values = last.targets[0]
                target = self.by_label[label]
                if target is stop:
                    return joint.receive(values, last)
                self._enter(target, values)
                block = target
                continue
            meeting = self._meeting(block)
            if meeting is None or meeting is stop:
                return self._part(last, meeting, joint)
            inner = _Joint(self.ctx, meeting.args)
            inner.bind(self._part(last, meeting, inner))
            block = meeting

    def _write(self, block: Block) -> None:
        # A block that several branches share without meeting there is written again, with values of its own.
        for op in walk([block]):
            for value in op.results:
                self.ctx.bindings.pop(value, None)
        self.lower(self.ctx, block)

    def _part(self, last: Op, stop: Block | None, joint: _Joint) -> list[str]:
        def side(label: str, values: Sequence[Value]) -> Callable[[], Sequence[str]]:
            def write() -> Sequence[str]:
                target = self.by_label[label]
                if target is stop:
                    return joint.receive(values, last)
                self._enter(target, values)
                return self.follow(target, stop, joint)

            return write

        first, second = (side(*target) for target in last.targets)
        return self.ctx.b.branch(self.ctx.scalar(last.operands[0]), first, second, joint.types)

    def _enter(self, block: Block, values: Sequence[Value]) -> None:
        """Binds the arguments of a block when control goes there from one place."""
        ctx = self.ctx
        for arg, value in zip(block.args, values, strict=True):
            if not arg.type.is_tensor:
                ctx.bind(arg, Scalar(ctx.scalar(value)))
            elif value in ctx.bindings and len(ctx.plan.users[value]) == 1:
                ctx.bind(arg, ctx.bindings[value])
            else:
                ctx.bind(arg, materialize(ctx, value))

    def _meeting(self, block: Block) -> Block | None:
        """The nearest block that every way from here passes; None if some ways end before they meet."""
        behind = self._post_dominators(block) - {block}
        return max(behind, key=lambda b: len(self._post_dominators(b)), default=None)

    def _post_dominators(self, block: Block) -> frozenset[Block]:
        found = self._behind.get(block)
        if found is not None:
            if not found:
                raise self.ctx.unsupported(block.ops[-1], "branches that form a loop", "use a for or while loop")
            return found
        self._behind[block] = frozenset()
        following = [self._post_dominators(self.by_label[label]) for label, _ in block.ops[-1].targets]
        shared = frozenset.intersection(*following) if following else frozenset()
        self._behind[block] = shared | {block}
        return self._behind[block]


def lower_blocks(ctx: Context, blocks: Sequence[Block], lower: LowerBlock, results: Sequence[Value] = ()) -> None:
    """Writes all blocks and binds ``results`` to what they return.

    Raises:
        UnsupportedOp: the branches form a loop.
    """
    joint = _Joint(ctx, results)
    joint.bind(_Flow(ctx, blocks, lower).follow(blocks[0], None, joint))
