"""Replaces calls of functions in the same module by copies of their bodies."""

from tilewright.codegen.cpu.ttir.records import Block, Function, Module, Op, Value
from tilewright.errors import UnsupportedOp, Where


class _Copier:
    """Copies operations with fresh values."""

    def __init__(self, values: dict[Value, Value]) -> None:
        self.values = values

    def value(self, value: Value) -> Value:
        return self.values.get(value, value)

    def _fresh(self, value: Value, op: Op | None) -> Value:
        copy = Value(value.name, value.type, op, value.index)
        self.values[value] = copy
        return copy

    def op(self, op: Op, loc: str) -> Op:
        copy = Op(op.name, [self.value(v) for v in op.operands], attrs=op.attrs, words=op.words, loc=loc or op.loc)
        copy.regions = [self.blocks(region, loc) for region in op.regions]
        copy.targets = [(label, [self.value(v) for v in args]) for label, args in op.targets]
        copy.results = [self._fresh(v, copy) for v in op.results]
        return copy

    def blocks(self, blocks: list[Block], loc: str) -> list[Block]:
        out = []
        for block in blocks:
            copy = Block(label=block.label)
            copy.args = [self._fresh(arg, None) for arg in block.args]
            copy.ops = [self.op(op, loc) for op in block.ops]
            out.append(copy)
        return out


def inline_calls(module: Module) -> Function:
    """The module's kernel without calls.

    Raises:
        UnsupportedOp: a function calls itself.
    """
    kernel = module.kernel
    _inline_blocks(module, kernel.blocks, (kernel.name,))
    return kernel


def _inline_blocks(module: Module, blocks: list[Block], stack: tuple[str, ...]) -> None:
    renamed: dict[Value, Value] = {}  # blocks that follow use results too
    for block in blocks:
        ops: list[Op] = []
        for op in block.ops:
            _rename(op, renamed)
            for region in op.regions:
                _inline_blocks(module, region, stack)
            ops += _expand(module, op, stack, renamed) if op.name == "tt.call" else [op]
        block.ops = ops


def _rename(op: Op, renamed: dict[Value, Value]) -> None:
    if not renamed:
        return
    op.operands = [renamed.get(v, v) for v in op.operands]
    op.targets = [(label, [renamed.get(v, v) for v in args]) for label, args in op.targets]
    for region in op.regions:
        for block in region:
            for inner in block.ops:
                _rename(inner, renamed)


def _expand(module: Module, call: Op, stack: tuple[str, ...], renamed: dict[Value, Value]) -> list[Op]:
    """The operations that stand for a call; its results are renamed to the callee's where possible."""
    callee = call.attrs["callee"]
    if callee in stack:
        raise UnsupportedOp(
            f"function {callee} calls itself",
            where=Where(node=stack[0], source=call.loc or None),
            why="kernels have no stack for recursion",
            hint="write it as a loop",
        )
    function = module.functions[callee]
    copier = _Copier(dict(zip(function.params, call.operands, strict=True)))
    blocks = copier.blocks(function.blocks, "")
    _inline_blocks(module, blocks, (*stack, callee))
    if len(blocks) > 1:
        region = Op("cf.region", [], results=call.results, regions=[blocks], loc=call.loc)
        for value in region.results:
            value.op = region
        return [region]
    *body, last = blocks[0].ops
    renamed |= dict(zip(call.results, last.operands, strict=True))
    return body
