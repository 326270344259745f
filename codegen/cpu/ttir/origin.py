"""Which pointer parameters a pointer is made from: an access through it may touch their memory and no other."""

from tilewright.codegen.cpu.ttir.records import Block, Function, Op, Value, walk

# Operations whose pointers are those of an operand, moved, copied or chosen from.
_FIRST = {
    "tt.addptr",
    "tt.splat",
    "tt.broadcast",
    "tt.expand_dims",
    "tt.reshape",
    "tt.trans",
    "tt.bitcast",
    "tt.unsplat",
}
_FIRST |= {"tt.split", "tt.gather"}
_ALL = {"tt.join", "tt.cat"}


class Origins:
    """The pointer parameters behind every pointer of a function without calls."""

    def __init__(self, function: Function) -> None:
        self._slots = {param: number for number, param in enumerate(function.params) if param.elem.is_ptr}
        self._sources: dict[Value, list[Value]] = {}
        self._known: dict[Value, frozenset[int] | None] = {}
        _join_blocks(self._sources, function.blocks)
        for op in walk(function.blocks):
            _join(self._sources, op)

    def of(self, pointer: Value) -> frozenset[int] | None:
        """Numbers of the parameters; None if the pointer comes from a number or from memory."""
        if pointer not in self._known:
            self._known[pointer] = self._find(pointer)
        return self._known[pointer]

    def _find(self, pointer: Value) -> frozenset[int] | None:
        found: set[int] = set()
        seen = {pointer}
        pending = [pointer]
        while pending:
            value = pending.pop()
            if value in self._slots:
                found.add(self._slots[value])
                continue
            sources = self._sources.get(value)
            if sources is None:
                return None
            pending += [source for source in sources if source not in seen]
            seen.update(sources)
        return frozenset(found)


def _join_blocks(sources: dict[Value, list[Value]], blocks: list[Block]) -> None:
    """Arguments of blocks come from the branches to them."""
    by_label = {block.label: block for block in blocks}
    for block in blocks:
        for label, values in block.ops[-1].targets if block.ops else ():
            _flow(sources, by_label[label].args, values)


def _flow(sources: dict[Value, list[Value]], targets: list[Value], values: list[Value]) -> None:
    for target, value in zip(targets, values, strict=True):
        sources.setdefault(target, []).append(value)


def _join(sources: dict[Value, list[Value]], op: Op) -> None:
    """Where an operation's results, and the arguments of its regions, come from."""
    if op.name in _FIRST:
        for result in op.results:
            _flow(sources, [result], op.operands[:1])
    elif op.name in _ALL:
        sources[op.result] = list(op.operands)
    elif op.name == "arith.select":
        sources[op.result] = op.operands[1:]
    elif op.name == "scf.for" and op.results:  # without results the yield is not printed
        carried = op.body().args[1:]
        for target in (carried, op.results):
            _flow(sources, target, op.operands[3:])
            _flow(sources, target, op.body().ops[-1].operands)
    elif op.name == "scf.while":
        before, after = op.body(0), op.body(1)
        if op.operands:
            _flow(sources, before.args, op.operands)
            _flow(sources, before.args, after.ops[-1].operands)
        for target in (after.args, op.results):
            _flow(sources, target, before.ops[-1].operands[1:])
    elif op.name == "scf.if" and op.results:
        for region in op.regions:
            _flow(sources, op.results, region[0].ops[-1].operands)
    elif op.name == "cf.region":
        _join_blocks(sources, op.regions[0])
        for block in op.regions[0]:
            if block.ops and block.ops[-1].name == "tt.return":
                _flow(sources, op.results, block.ops[-1].operands)
