"""Sorting networks as loops over one axis.

``tl.sort``, ``tl.topk``, ``tl.flip`` and the networks that libraries write themselves cut a tile into axes of size 2
and combine the two elements of such an axis: ``reshape``, ``reduce`` along the axis, ``expand_dims``, ``broadcast``.
Taken literally, each step would be a nest of a dozen loops of two steps and a tile of its own. But the tiles' sizes are
powers of two, so an axis of size 2 is one bit of the element's number: this pass rewrites such code into operations on
tiles with one axis, in which the partner of element i is element ``i ^ distance``.

New operations, all lazy: ``tile.exchange`` (the partner), ``tile.pick`` (the element whose bit is 0 or 1),
``tile.drop`` (the same, for a result that lacks the axis) and ``tile.bits`` (an index along one of the old axes).
"""

import math
from collections.abc import Sequence

from tilewright.codegen.cpu.ttir.records import I32, Block, Function, Op, Type, Value, walk

_Key = tuple[Value, tuple[int, ...]]
_SHAPED = {"tt.splat", "arith.constant"}
_SAME_POINT = {"tt.bitcast", "tt.fp_to_fp", "tt.extern_elementwise", "tt.clampf", "tt.mulhiui", "tt.precise_divf"}
_SAME_POINT |= {"tt.precise_sqrt", "tt.addptr", "tt.int_to_ptr", "tt.ptr_to_int"}


def flatten_pairs(function: Function, lanes: int) -> set[Value]:
    """Rewrites the sorting networks of a kernel in place.

    Args:
        lanes: elements of a vector; partners that are nearer than this are found in the vector itself.

    Returns:
        Values that have to be in memory, because they are read at other points than where they are made.
    """
    rewriter = _Rewriter(function, lanes)
    for op in list(walk(function.blocks)):
        if op.name == "tt.reshape" and len(op.operands[0].shape) > 1:
            rewriter.leave(op)
    if rewriter.found:
        rewriter.insert_all()
        _remove_unused(function)
    return rewriter.kept


def _is_pairwise(op: Op) -> bool:
    """Whether an operation is a reduction along an axis of size 2, with a combine function without branches."""
    if op.name != "tt.reduce" or len(op.operands[0].shape) < 2 or op.operands[0].shape[op.int_attr("axis")] != 2:
        return False
    *body, _ = op.body().ops
    return all(_elementwise(each) or each.name == "arith.constant" for each in body)


def _expanded_pair(op: Op) -> Op | None:
    """The pairwise reduction whose axis an ``expand_dims`` puts back."""
    source = op.operands[0].op if op.name == "tt.expand_dims" else None
    if source is not None and _is_pairwise(source):
        return source if source.int_attr("axis") == op.int_attr("axis") else None
    return None


def _range_axis(value: Value) -> tuple[Op, int] | None:
    """The ``make_range`` behind a value that varies along one axis only, and that axis."""
    op = value.op
    if op is None or sum(size > 1 for size in value.shape) != 1:
        return None
    while op is not None and op.name in ("tt.reshape", "tt.expand_dims"):
        op = op.operands[0].op
    if op is None or op.name != "tt.make_range" or op.result.type.numel != value.type.numel:
        return None
    return op, next(axis for axis, size in enumerate(value.shape) if size > 1)


def _elementwise(op: Op) -> bool:
    return (op.name.startswith(("arith.", "math.")) or op.name in _SAME_POINT) and op.name not in _SHAPED


class _Rewriter:
    """Makes copies of values with one axis, on demand, each right behind its original."""

    def __init__(self, function: Function, lanes: int) -> None:
        self.lanes = lanes
        self.kept: set[Value] = set()
        self.found = False
        self._flat: dict[_Key, Value] = {}
        self._behind: dict[Op, list[Op]] = {}
        self._at_start: dict[Block, list[Op]] = {}
        self._blocks: list[Block] = []
        self._arguments: dict[Value, Block] = {}
        self._note_blocks(function.blocks)

    def _note_blocks(self, blocks: Sequence[Block]) -> None:
        for block in blocks:
            self._blocks.append(block)
            self._arguments |= dict.fromkeys(block.args, block)
            for op in block.ops:
                for region in op.regions:
                    self._note_blocks(region)

    def leave(self, op: Op) -> None:
        """A reshape out of a tile cut into pairs: its operand is made with one axis if there is a network in it."""
        value = op.operands[0]
        key = (value, value.shape)
        if key not in self._flat:
            order = self._needed(key)
            if order is None:
                return
            for each in order:
                self._flat[each] = self._copy(each)
            self.kept.add(self._flat[key])
        self.found = True
        op.operands[0] = self._flat[key]

    def _needed(self, key: _Key) -> list[_Key] | None:
        """What has to be copied for a value, operands first; None if no pairwise reduction is in it."""
        order: list[_Key] = []
        seen: set[_Key] = set()
        pairwise = False
        pending = [(key, False)]
        while pending:
            current, ready = pending.pop()
            if ready:
                order.append(current)
            elif current not in seen and current not in self._flat:
                seen.add(current)
                pending.append((current, True))
                pairwise = pairwise or _joins_pairs(current[0].op)
                pending += [(source, False) for source in self._sources(current)]
            elif current in self._flat:
                pairwise = True
        return order if pairwise else None

    def _sources(self, key: _Key) -> list[_Key]:
        """The values with one axis that a copy is made of."""
        value, shape = key
        op = value.op
        if op is None or op.name in _SHAPED or _range_axis(value) is not None:
            return []
        if (swapped := _swapped(op)) is not None:
            return [(swapped[0], shape)]
        if (pair := _expanded_pair(op)) is not None:
            return [(operand, shape) for operand in pair.operands]
        if _is_pairwise(op) and value.shape == shape:
            return [(operand, operand.shape) for operand in op.operands]
        if op.name == "tt.broadcast" or _elementwise(op):
            return [(operand, shape) for operand in op.operands if operand.type.is_tensor]
        return []

    def _copy(self, key: _Key) -> Value:
        """The value with one axis; its operands are there already."""
        value, shape = key
        size = math.prod(shape)
        flat = Type(value.elem, (size,))
        op = value.op
        if op is None:
            return self._outside(value, shape)
        if op.name in _SHAPED:
            return self._add(op, Op(op.name, op.operands, attrs=op.attrs, words=op.words), flat)
        if (ranged := _range_axis(value)) is not None:
            return self._index(op, *ranged, shape)
        if (swapped := _swapped(op)) is not None:
            source, axis = swapped
            return self._move(op, "tile.exchange", self._flat[source, shape], math.prod(shape[axis + 1 :]), flat)
        if (pair := _expanded_pair(op)) is not None:
            distance = math.prod(shape[pair.int_attr("axis") + 1 :])
            return self._combine(op, pair, [self._flat[v, shape] for v in pair.operands], "tile.pick", distance, flat)
        if _is_pairwise(op) and value.shape == shape:
            full = op.operands[0].shape
            distance = math.prod(full[op.int_attr("axis") + 1 :])
            return self._combine(op, op, [self._flat[v, full] for v in op.operands], "tile.drop", distance, flat, value)
        if op.name == "tt.broadcast":
            return self._flat[op.operands[0], shape]
        if _elementwise(op):
            operands = [self._flat.get((v, shape), v) for v in op.operands]
            return self._add(op, Op(op.name, operands, attrs=op.attrs, words=op.words), flat)
        return self._outside(value, shape)

    def _add(self, after: Op | Block, op: Op, type_: Type) -> Value:
        op.results = [Value("", type_, op)]
        if isinstance(after, Op):
            op.loc = after.loc
            self._behind.setdefault(after, []).append(op)
        else:
            self._at_start.setdefault(after, []).append(op)
        return op.result

    def _outside(self, value: Value, shape: tuple[int, ...]) -> Value:
        """A value that is not made of pairs, seen with one axis."""
        flat = Type(value.elem, (math.prod(shape),))
        source: Value | None = value
        while source is not None and source.shape != flat.shape:
            source = source.op.operands[0] if source.op is not None and source.op.name == "tt.reshape" else None
        if source is not None:
            return source
        anchor = value.op or self._arguments[value]
        if value.shape != shape:
            value = self._add(anchor, Op("tt.broadcast", [value]), Type(value.elem, shape))
        return self._add(anchor, Op("tt.reshape", [value]), flat)

    def _index(self, after: Op, range_: Op, axis: int, shape: tuple[int, ...]) -> Value:
        attrs = {"distance": str(math.prod(shape[axis + 1 :])), "size": str(shape[axis])}
        attrs["start"] = range_.attrs["start"]
        return self._add(after, Op("tile.bits", [], attrs=attrs), Type(I32, (math.prod(shape),)))

    def _move(self, after: Op, name: str, source: Value, distance: int, type_: Type, half: int = 0) -> Value:
        if distance >= self.lanes or name == "tile.drop":
            # Below casts: the value itself is used beside its partner.
            kept = source
            while kept.op is not None and kept.op.name == "tt.bitcast":
                kept = kept.op.operands[0]
            self.kept.add(kept)
        return self._add(after, Op(name, [source], attrs={"distance": str(distance), "half": str(half)}), type_)

    def _combine(
        self, after: Op, reduce: Op, sources: Sequence[Value], name: str, distance: int, type_: Type,
        wanted: Value | None = None,
    ) -> Value:  # fmt: skip
        """The combine function on both halves of each source."""
        block = reduce.body()
        values: dict[Value, Value] = {}
        for half in range(2):
            for source, arg in zip(sources, block.args[half * len(sources) :], strict=False):
                values[arg] = self._move(after, name, source, distance, Type(source.elem, type_.shape), half)
        for op in block.ops:
            if op.name == "tt.reduce.return":
                results = [values[v] for v in op.operands]
                break
            copy = Op(op.name, [values.get(v, v) for v in op.operands], attrs=op.attrs, words=op.words)
            values[op.result] = self._add(after, copy, Type(op.result.elem, type_.shape))
        number = (wanted or after.operands[0]).index
        return results[number]

    def insert_all(self) -> None:
        """Puts the copies into the blocks."""
        for block in self._blocks:
            ops = [each for op in block.ops for each in (op, *self._behind.get(op, []))]
            block.ops = [*self._at_start.get(block, []), *ops]


def _swapped(op: Op) -> tuple[Value, int] | None:
    """``x ^ xor_sum(x, axis)`` on an axis of size 2: the partner of x along the axis."""
    if op.name != "arith.xori":
        return None
    for value, spread in (op.operands, op.operands[::-1]):
        if spread.op is None or spread.op.name != "tt.broadcast":
            continue
        expand = spread.op.operands[0].op
        pair = _expanded_pair(expand) if expand is not None else None
        if pair is not None and pair.operands == [value] and _is_xor(pair.body()):
            return value, pair.int_attr("axis")
    return None


def _is_xor(combine: Block) -> bool:
    first, *others = combine.ops
    return first.name == "arith.xori" and set(first.operands) == set(combine.args) and len(others) == 1


def _joins_pairs(op: Op | None) -> bool:
    """Whether an operation is a step of a network."""
    return op is not None and (_is_pairwise(op) or _expanded_pair(op) is not None or _swapped(op) is not None)


def _remove_unused(function: Function) -> None:
    """Removes tensor operations without effects whose results nothing uses any more."""
    ops = list(walk(function.blocks))
    uses: dict[Value, int] = {}
    for op in ops:
        for value in [*op.operands, *(v for _, args in op.targets for v in args)]:
            uses[value] = uses.get(value, 0) + 1
    dead: set[Op] = set()
    for op in reversed(ops):
        removable = op.name == "tt.reduce" or (not op.regions and _elementwise(op)) or op.name in _REMOVABLE
        if removable and op.results and not any(uses.get(v) for v in op.results):
            dead.add(op)
            for value in op.operands:
                uses[value] -= 1

    def prune(blocks: Sequence[Block]) -> None:
        for block in blocks:
            block.ops = [op for op in block.ops if op not in dead]
            for op in block.ops:
                for region in op.regions:
                    prune(region)

    prune(function.blocks)


_REMOVABLE = {"tt.reshape", "tt.expand_dims", "tt.broadcast", "tt.make_range", "tt.splat"}
