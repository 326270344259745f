"""What to compute where: which tensors get memory, which are recomputed inside the loops of their consumers.

A *root* is an operation that runs loops of its own over its operands (store, reduce, dot, ...). All other tensor
operations are lazy: they are evaluated point by point inside the loops of the roots that need them. A lazy value
gets memory (is materialized) when that avoids repeating costly work, or when a store between its definition and its
use could change what it reads.
"""

from collections.abc import Iterable

from tilewright.codegen.cpu.ttir.overlap import Overlaps
from tilewright.codegen.cpu.ttir.records import Block, Function, Op, Value, walk

# Relative cost of repeating an operation for one vector; anything else is nearly free.
_COST = {"tt.load": 1, "arith.divf": 2, "math.sqrt": 2, "math.rsqrt": 3, "tt.precise_divf": 2, "tt.precise_sqrt": 2}
_COST |= {"tt.extern_elementwise": 6, "arith.remf": 6, "arith.divsi": 4, "arith.remsi": 4, "arith.divui": 4}
_COST |= {"arith.remui": 4, "tt.gather": 4, "tt.mulhiui": 2, "tt.elementwise_inline_asm": 4}
_CHEAP_MATH = {"math.absf", "math.fma", "math.floor", "math.ceil", "math.absi"}
_EXPENSIVE = 2
_REMAINDERS = ("arith.remsi", "arith.remui")
_INDEX = frozenset(("arith.addi", "arith.muli", "arith.extsi", "tt.addptr"))
ROOTS = {
    "tt.store", "tt.reduce", "tt.scan", "tt.dot", "tt.atomic_rmw", "tt.atomic_cas", "tt.histogram", "tt.print",
    "tt.assert", "scf.for", "scf.while", "scf.if", "scf.yield", "scf.condition", "cf.region", "cf.br",
    "cf.cond_br", "tt.return", "tt.map_elementwise", "tt.map_elementwise.return",
}  # fmt: skip
EFFECTS = {"tt.store", "tt.atomic_rmw", "tt.atomic_cas"}
_LOOPS = {"scf.for", "scf.while"}
MOVES = {"tt.trans", "tt.reshape", "tt.gather", "tt.join", "tt.split", "tt.cat"}
MOVES |= {"tile.exchange", "tile.pick", "tile.drop", "tile.bits"}


def cost_of(op: Op) -> int:
    """Cost of repeating one operation."""
    if op.name.startswith("math.") and op.name not in _CHEAP_MATH:
        return _COST.get(op.name, 5)
    return _COST.get(op.name, 0)


class Plan:
    """Static facts and decisions about one function.

    Attributes:
        users: operations that use a value, once per operand.
        materialized: lazy values that get memory where they are defined.

    Args:
        kept: values that get memory in any case.
    """

    def __init__(self, function: Function, kept: Iterable[Value] = ()) -> None:
        self.users: dict[Value, list[Op]] = {}
        self.materialized: set[Value] = set(kept)
        self._position: dict[Op, int] = {}
        self._last: dict[Op, int] = {}
        self._loops: dict[Op, list[Op]] = {}
        self._argument_loops: dict[Value, list[Op]] = {}
        self._axes: dict[Value, frozenset[int]] = {}
        self._costly: dict[Value, frozenset[Op]] = {}
        self._roots: dict[Value, frozenset[tuple[Op, bool]]] = {}
        self._number(function.blocks, [])
        ops = list(walk(function.blocks))
        for op in ops:
            for value in [*op.operands, *(v for _, args in op.targets for v in args)]:
                self.users.setdefault(value, []).append(op)
        self._effects = [self._position[op] for op in ops if op.name in EFFECTS]
        lazy = [op for op in ops if is_lazy(op)]
        for op in lazy:
            for value in op.results:
                if self._worth_memory(value):
                    self.materialized.add(value)
        self._roots.clear()
        overlaps = Overlaps(function)
        for op in lazy:
            if op.name == "tt.load" and (self._crosses_effect(op.result) or self._is_disturbed(op, overlaps)):
                self.materialized.add(op.result)

    def _number(self, blocks: list[Block], loops: list[Op]) -> None:
        for block in blocks:
            for arg in block.args:
                self._argument_loops[arg] = loops
            for op in block.ops:
                self._position[op] = len(self._position)
                self._loops[op] = loops
                for region in op.regions:
                    self._number(region, [*loops, op] if op.name in _LOOPS else loops)
                self._last[op] = len(self._position) - 1

    def position(self, op: Op) -> int:
        """Number of an operation in program order."""
        return self._position[op]

    def end(self, op: Op) -> int:
        """Number of the last operation in the regions of an operation."""
        return self._last[op]

    def loops_around(self, value: Value) -> list[Op]:
        """Loops that hold the definition of a value, from the outside in."""
        if value.op is not None:
            return self._loops[value.op]
        return self._argument_loops.get(value, [])

    def loops_of(self, op: Op) -> list[Op]:
        """Loops that hold an operation."""
        return self._loops[op]

    def roots(self, value: Value) -> frozenset[tuple[Op, bool]]:
        """Operations whose loops evaluate a value; the flag says whether at another point than their own."""
        if value not in self._roots:
            found: set[tuple[Op, bool]] = set()
            for user in self.users.get(value, []):
                if not is_lazy(user):
                    found.add((user, False))
                    continue
                for result in user.results:
                    if result in self.materialized:
                        found.add((user, user.name in MOVES))
                    else:
                        moved = user.name in MOVES
                        found |= {(root, flag or moved) for root, flag in self.roots(result)}
            self._roots[value] = frozenset(found)
        return self._roots[value]

    def last_read(self, value: Value) -> int:
        """Position after which nothing evaluates a value any more.

        A root in a loop that does not hold the definition reads again in every iteration, to the loop's end.
        """
        around = self.loops_around(value)
        last = -1
        for root, _ in self.roots(value):
            outer = [loop for loop in self._loops[root] if loop not in around]
            last = max(last, self._last[outer[0]] if outer else self._position[root])
            if root.name == "scf.for":
                # A loop that only adds to a tensor keeps the one it began with, and so does its result.
                results = [root.results[k] for k, init in enumerate(root.operands[3:]) if init is value]
                last = max(last, self._last[root] if results else -1, *map(self.last_read, results))
        return last

    def costly(self, value: Value) -> frozenset[Op]:
        """Costly operations that evaluating a value repeats."""
        if value not in self._costly:
            found: set[Op] = set()
            op = value.op
            if op is not None and is_lazy(op) and value.type.is_tensor:
                if cost_of(op):
                    found.add(op)
                for operand in op.operands:
                    if operand not in self.materialized:
                        found |= self.costly(operand)
            self._costly[value] = frozenset(found)
        return self._costly[value]

    def axes(self, value: Value) -> frozenset[int]:
        """Axes along which a tensor may vary."""
        if value not in self._axes:
            self._axes[value] = self._find_axes(value)
        return self._axes[value]

    def _find_axes(self, value: Value) -> frozenset[int]:
        op = value.op
        varying = frozenset(axis for axis, size in enumerate(value.shape) if size > 1)
        if op is None or not is_lazy(op):
            return varying
        if op.name == "tt.splat" or (op.name == "arith.constant"):
            return frozenset()
        if op.name == "tt.expand_dims":
            axis = op.int_attr("axis")
            return frozenset(a + (a >= axis) for a in self.axes(op.operands[0]))
        if op.name == "tt.trans":
            order = order_of(op)
            inner = self.axes(op.operands[0])
            return frozenset(new for new, old in enumerate(order) if old in inner)
        if op.name in MOVES or op.name == "tt.make_range":
            return varying
        return frozenset().union(*(self.axes(v) for v in op.operands if v.type.is_tensor)) & varying

    def _worth_memory(self, value: Value) -> bool:
        if not value.type.is_tensor:
            return False
        users = set(self.users.get(value, []))
        costly = self.costly(value)
        cost = sum(cost_of(op) for op in costly)
        if not users or not cost:
            return False
        around = self.loops_around(value)
        roots = self.roots(value)
        repeated = any(len(self._loops[root]) > len(around) for root, _ in roots)
        if repeated and not self._is_dot_operand(value):
            return True
        # Loads along the vectors are not worth memory of their own; anything dearer is, and what uses it is cheap then.
        if self._feeds_broadcast(value) and any(cost_of(op) >= _EXPENSIVE for op in costly):
            return True
        if value.op is not None and value.op.name in _REMAINDERS and self._feeds_broadcast(value, _INDEX):
            # The remainder itself, not the addresses made of it, so that they stay index arithmetic.
            return True
        # A value with one user leaves the decision to that user, which sees the same roots.
        return len(users) > 1 and len(roots) > 1 and cost >= _EXPENSIVE

    def _is_dot_operand(self, value: Value) -> bool:
        """A plain load for dot products is read where it is."""
        if _feeds_grouped(value, self.users):
            return True
        if value.op is None or value.op.name not in ("tt.load", "tt.trans"):
            return False
        return all(user.name == "tt.dot" or user.name == "tt.trans" for user in self.users.get(value, []))

    def _feeds_broadcast(self, value: Value, through: frozenset[str] = frozenset()) -> bool:
        """Whether a broadcast would make loops repeat this value, maybe after operations ``through``."""
        for user in self.users.get(value, []):
            passes = user.name in ("tt.expand_dims", "tt.reshape") or user.name in through
            if user.name == "tt.broadcast" or (passes and self._feeds_broadcast(user.result, through)):
                return True
        return False

    def _crosses_effect(self, value: Value) -> bool:
        if value in self.materialized or not value.type.is_tensor or value.op is None:
            return False
        start, last = self._position[value.op], self.last_read(value)
        return any(start < effect < last for effect in self._effects)

    def _is_disturbed(self, load: Op, overlaps: Overlaps) -> bool:
        """Whether a store that evaluates a load as it goes could write what the load has yet to read."""
        pointer = load.operands[0]
        varies = len(self.axes(pointer)) == sum(size > 1 for size in pointer.shape)
        return any(
            root.name in EFFECTS and overlaps.disturbs(root, load, moved=moved, varies=varies)
            for root, moved in self.roots(load.result)
        )


def grouped_source(value: Value) -> Value | None:
    """The tile [K / g, N, g] of ``reshape(trans(tile, (0, 2, 1)))`` to [K, N]; None for anything else."""
    reshape = value.op
    if reshape is None or reshape.name != "tt.reshape" or len(value.shape) != 2:
        return None
    turn = reshape.operands[0].op
    if turn is None or turn.name != "tt.trans" or order_of(turn) != (0, 2, 1):
        return None
    source = turn.operands[0]
    groups, columns, group = source.shape
    return source if value.shape == (groups * group, columns) else None


def _feeds_grouped(value: Value, users: dict[Value, list[Op]]) -> bool:
    """Whether a value is a link of the chain of ``grouped_source`` that ends in dot products only."""
    following = users.get(value, [])
    while len(following) == 1 and following[0].name in ("tt.trans", "tt.reshape"):
        value = following[0].result
        following = users.get(value, [])
    return grouped_source(value) is not None and all(user.name == "tt.dot" for user in following)


def is_lazy(op: Op) -> bool:
    """Whether an operation is evaluated inside its consumers."""
    return op.name not in ROOTS and any(value.type.is_tensor for value in op.results)


def order_of(op: Op) -> tuple[int, ...]:
    """Permutation of a ``tt.trans``: axis i of the result is axis order[i] of the operand."""
    return tuple(int(text) for text in op.attrs["order"].partition(":")[2].rstrip(">").split(","))
