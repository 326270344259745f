"""Regions of scalar operations evaluated on lanes: both sides of a branch run, and a selection joins them.

Combine functions of reductions and scans are written for scalars and may branch. On vectors each lane may go another
way, so branches become selections (if-conversion).
"""

from collections.abc import Sequence

from tilewright.codegen.cpu.lower.arith import select
from tilewright.codegen.cpu.lower.context import Context
from tilewright.codegen.cpu.lower.lanes import Lane, Uniform
from tilewright.codegen.cpu.lower.literals import scalar_literal
from tilewright.codegen.cpu.lower.ttir import Block, Op, Value

_RETURNS = {"tt.reduce.return", "tt.scan.return", "tt.return", "scf.yield"}


def evaluate(ctx: Context, blocks: Sequence[Block], arguments: Sequence[Lane]) -> list[Lane]:
    """What a region returns.

    Args:
        arguments: one lane for each argument of the first block.

    Raises:
        UnsupportedOp: the region loops, or holds an operation that is not elementwise.
    """
    return _Region(ctx, blocks, {}).run(blocks[0], arguments)


class _Region:
    """One region with the values known so far, those of the regions around it included."""

    def __init__(self, ctx: Context, blocks: Sequence[Block], values: dict[Value, Lane]) -> None:
        self.ctx, self.values = ctx, values
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
        sides = [self.run(self.by_label[label], [self.lane(v) for v in args]) for label, args in op.targets]
        return sides[0] if len(sides) == 1 else self._joined(self.lane(op.operands[0]), sides)

    def _joined(self, condition: Lane, sides: Sequence[Sequence[Lane]]) -> list[Lane]:
        return [select(self.ctx.b, condition, yes, no) for yes, no in zip(*sides, strict=True)]

    def _operation(self, op: Op) -> None:
        if op.name == "arith.constant":
            self.values[op.result] = Uniform(op.result.elem, scalar_literal(op.attrs["value"], op.result.elem))
        elif op.name == "scf.if":
            sides = [_Region(self.ctx, region, self.values).run(region[0], ()) for region in op.regions]
            if op.results:
                self._bind(op, self._joined(self.lane(op.operands[0]), sides))
        elif op.name == "cf.region":
            (region,) = op.regions
            self._bind(op, _Region(self.ctx, region, self.values).run(region[0], ()))
        elif self.ctx.knows(op):
            self.values[op.result] = self.ctx.apply(op, [self.lane(v) for v in op.operands])
        else:
            raise self.ctx.unsupported(op, "a combine function may hold only elementwise operations and branches")

    def _bind(self, op: Op, lanes: Sequence[Lane]) -> None:
        self.values.update(zip(op.results, lanes, strict=True))
