"""``tt.map_elementwise``: a function of scalars, with control flow of its own, for every element of a tile."""

from tilewright.codegen.cpu.lower.blocks import LowerBlock, lower_blocks
from tilewright.codegen.cpu.lower.context import Context, Scalar
from tilewright.codegen.cpu.lower.lanes import Point, Uniform
from tilewright.codegen.cpu.lower.reduce import as_vector, ref_of
from tilewright.codegen.cpu.lower.shapes import unflatten
from tilewright.codegen.cpu.ttir.records import I32, Op, Type, Value


def lower_map_elementwise(ctx: Context, op: Op, lower: LowerBlock) -> None:
    """``tt.map_elementwise``: ``pack`` neighbours in row-major order go through the function at once.

    The function's parameters are those of the first tensor's neighbours, then those of the second, and so on; its
    results likewise.
    """
    pack = op.int_attr("pack")
    blocks = op.regions[0]
    shape = op.operands[0].shape
    buffers = [ctx.new_buffer(value.type, op) for value in op.results]

    def points(first: str) -> list[Point]:
        indices = (ctx.b.int_op("add", first, str(number), I32) for number in range(pack))
        return [unflatten(ctx, Uniform(I32, index), shape) for index in indices]

    def step(first: str, _: list[str]) -> list[str]:
        places = points(first)
        lanes = [ctx.value(operand, place) for operand in op.operands for place in places]
        for parameter, lane in zip(blocks[0].args, lanes, strict=True):
            ctx.bind(parameter, Scalar(ref_of(as_vector(ctx, lane, 0))))
        results = [Value("", Type(value.elem)) for value in op.results for _ in places]
        lower_blocks(ctx, blocks, lower, results)
        targets = ((buffer, place) for buffer in buffers for place in places)
        for (buffer, place), result in zip(targets, results, strict=True):
            ctx.write(buffer, place, Uniform(result.elem, ctx.scalar(result)))
        return []

    ctx.b.loop("0", str(op.operands[0].type.numel), str(pack), [], step)
    for value, buffer in zip(op.results, buffers, strict=True):
        ctx.bind(value, buffer)
