"""Regions of scalar operations evaluated on lanes: both sides of a branch run, and a selection joins them.

Combine functions of reductions and scans are written for scalars and may branch. On vectors each lane may go another
way, so branches become selections (if-conversion).
"""

from collections.abc import Sequence

from tilewright.codegen.cpu.lower.arith import select
from tilewright.codegen.cpu.lower.assertion import hold
from tilewright.codegen.cpu.lower.context import Context
from tilewright.codegen.cpu.lower.lanes import TRUE, Lane, Mask, Uniform
from tilewright.codegen.cpu.ttir.literals import scalar_literal
from tilewright.codegen.cpu.ttir.records import Block, Op, Value

_RETURNS = {"tt.reduce.return", "tt.scan.return", "tt.return", "scf.yield"}


def evaluate(ctx: Context, blocks: Sequence[Block], arguments: Sequence[Lane], live: Mask | None = None) -> list[Lane]:
    """What a region returns.

    Args:
        arguments: one lane for each argument of the first block.
        live: lanes whose result is used, all when None; only in these may an assertion fail.

    Raises:
        UnsupportedOp: the region loops, or holds an operation that is not elementwise.
    """
    return _Region(ctx, blocks, {}, live, ()).run(blocks[0], arguments)


class _Region:
    """One region with the values known so far, those of the regions around it included.

    Both sides of a branch run, so an assertion counts in lanes that would go there: ``guards`` has the condition of
    each branch on the way, and the side.
    """

    def __init__(
        self,
        ctx: Context,
        blocks: Sequence[Block],
        values: dict[Value, Lane],
        live: Mask | None,
        guards: tuple[tuple[Lane, bool], ...],
    ) -> None:
        self.ctx, self.values, self.live, self.guards = ctx, values, live, guards
        self.by_label = {block.label: block for block in blocks}
        self.path: list[Block] = []

    def lane(self, value: Value) -> Lane:
        return self.values[value] if value in self.values else self.ctx.value(value, ())

    def run(self, block: Block, arguments: Sequence[Lane]) -> list[Lane]:
        """Runs a block and all that follows it."""
        if block in self.path:
            raise self.ctx.unsupported(block.ops[-1], "a combine function that loops", "write it without a loop")
        self.values.update(zip(block.args, arguments, strict=True))
        for op in block.ops:
            if op.name in _RETURNS:
                return [self.lane(v) for v in op.operands]
            if op.name in ("cf.br", "cf.cond_br"):
                self.path.append(block)
                out = self._branch(op)
                self.path.pop()
                return out
            self._operation(op)
        return []

    def _branch(self, op: Op) -> list[Lane]:
        if len(op.targets) == 1:
            ((label, args),) = op.targets
            return self.run(self.by_label[label], [self.lane(v) for v in args])
        condition, before, sides = self.lane(op.operands[0]), self.guards, []
        for (label, args), side in zip(op.targets, (True, False), strict=True):
            self.guards = (*before, (condition, side))
            sides.append(self.run(self.by_label[label], [self.lane(v) for v in args]))
        self.guards = before
        return self._joined(condition, sides)

    def _joined(self, condition: Lane, sides: Sequence[Sequence[Lane]]) -> list[Lane]:
        return [select(self.ctx.b, condition, yes, no) for yes, no in zip(*sides, strict=True)]

    def _operation(self, op: Op) -> None:
        if op.name == "arith.constant":
            self.values[op.result] = Uniform(op.result.elem, scalar_literal(op.attrs["value"], op.result.elem))
        elif op.name == "scf.if":
            condition = self.lane(op.operands[0])
            sides = [
                self._inner(region, (condition, side)).run(region[0], ())
                for region, side in zip(op.regions, (True, False), strict=False)
            ]
            if op.results:
                self._bind(op, self._joined(condition, sides))
        elif op.name == "cf.region":
            (region,) = op.regions
            self._bind(op, self._inner(region).run(region[0], ()))
        elif op.name == "tt.assert":
            self._assert(op)
        elif self.ctx.knows(op):
            self.values[op.result] = self.ctx.apply(op, [self.lane(v) for v in op.operands])
        else:
            raise self.ctx.unsupported(op, "a combine function may hold only elementwise operations and branches")

    def _inner(self, blocks: Sequence[Block], *guards: tuple[Lane, bool]) -> "_Region":
        return _Region(self.ctx, blocks, self.values, self.live, (*self.guards, *guards))

    def _assert(self, op: Op) -> None:
        condition = self.lane(op.operands[0])
        for guard, side in self.guards:
            condition = select(self.ctx.b, guard, *((condition, TRUE) if side else (TRUE, condition)))
        hold(self.ctx, op, condition, self.ctx.b.depth, self.live)

    def _bind(self, op: Op, lanes: Sequence[Lane]) -> None:
        self.values.update(zip(op.results, lanes, strict=True))
