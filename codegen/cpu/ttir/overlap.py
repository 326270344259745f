"""Whether an operation that writes memory may change what loads read that are evaluated in its own loops.

A kernel loads a whole tile before it stores one. A lazy load is evaluated next to the store, element by element: that
is the same if the store writes an element where the load has just read it, and not if it writes one that is read later,
as when a tile is moved along in its memory or turned in place.
"""

from tilewright.codegen.cpu.ttir.origin import Origins
from tilewright.codegen.cpu.ttir.records import Function, Op, Value

# Index arithmetic, cheap to evaluate anywhere. Made of these, an address that varies along every axis is taken to be
# another one at every point.
INDEX_OPS = {
    "arith.addi", "arith.subi", "arith.muli", "arith.extsi", "arith.constant", "tt.make_range", "tt.splat",
    "tt.expand_dims", "tt.broadcast", "tt.addptr", "tt.bitcast",
}  # fmt: skip


class Overlaps:
    """Compares the addresses of loads and writes of one function.

    Pointers of different parameters are taken to point to different memory, or to the same one in the same way.
    """

    def __init__(self, function: Function) -> None:
        self._function = function
        self._origins: Origins | None = None

    def disturbs(self, effect: Op, load: Op, *, moved: bool, varies: bool) -> bool:
        """Whether an operation may write what a load in its loops reads at another point.

        Args:
            moved: the loops evaluate the load at other points than their own.
            varies: the load's pointer varies along every axis.
        """
        target, pointer = effect.operands[0], load.operands[0]
        if not target.type.is_tensor or not self._may_meet(target, pointer):
            return False
        return moved or not varies or target.shape != pointer.shape or not (_same(target, pointer) and _plain(pointer))

    def _may_meet(self, a: Value, b: Value) -> bool:
        self._origins = self._origins or Origins(self._function)
        first, second = self._origins.of(a), self._origins.of(b)
        return first is None or second is None or bool(first & second)


def _same(a: Value, b: Value) -> bool:
    """Whether two values are equal because they are made in the same way."""
    if a is b:
        return True
    x, y = a.op, b.op
    if x is None or y is None or x.name != y.name or x.name not in INDEX_OPS or a.type != b.type:
        return False
    return x.attrs == y.attrs and all(_same(v, w) for v, w in zip(x.operands, y.operands, strict=True))


def _plain(pointer: Value) -> bool:
    """Whether an address is index arithmetic, as far as it can be seen."""
    pending, seen = [pointer], {pointer}
    while pending:
        value = pending.pop()
        if value.op is None or not value.type.is_tensor:
            continue
        if value.op.regions:
            continue
        if value.op.name not in INDEX_OPS:
            return False
        for operand in value.op.operands:
            if operand not in seen:
                seen.add(operand)
                pending.append(operand)
    return True
