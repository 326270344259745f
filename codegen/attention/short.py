"""Attention with all keys of a sequence in one tile: scores against all keys at once, and a plain softmax.

A program holds the keys and values of one head of one sequence and goes over blocks of its queries; what keys and
values are computed from is computed once. Tiles come in a few widths, and each program takes the least that holds its
keys. Source: the short form of ByteTransformer's fused attention.
"""

from tilewright.codegen.attention.heads import LEAST_DOT
from tilewright.codegen.attention.problem import AttentionProblem
from tilewright.codegen.attention.tile import AttentionTile, Place
from tilewright.codegen.emit_gemm import dot
from tilewright.codegen.kernel_text import finish
from tilewright.codegen.results import needed_nodes
from tilewright.codegen.writer import TL_TYPES
from tilewright.ir.facts import TensorType, fact
from tilewright.ir.program import KernelStep
from tilewright.ir.sizes import ceil_div

_QUERIES = 32
# Queries of a program: a longer sequence is shared among programs, each of which reads its keys again.
_SPAN = 128
_WIDTHS = 3


def emit_short(problem: AttentionProblem, longest: int) -> tuple[KernelStep, ...]:
    """The step, for sequences of up to ``longest`` keys, a power of two."""
    few = isinstance(problem.length, int) and problem.length <= LEAST_DOT
    block, span = (LEAST_DOT, LEAST_DOT) if few else (_QUERIES, _SPAN)
    tile = AttentionTile(problem, block)
    tile.writer.constants["SPAN"] = span
    with tile.opened("tl.program_id(0) * SPAN", "SPAN") as place:
        tile.head_axis("d")
        tile.head_axis("dv")
        least = 0
        for width in _widths(longest):
            tile.writer.constants[f"BLOCK_KEYS_{width}"] = width
            above = f"(key_last - key_first > {least}) & " if least else ""
            with tile.writer.block(f"if {above}(key_last - key_first <= {width}):"):
                _attend(tile, place, f"BLOCK_KEYS_{width}")
            least = width
    shape = ", ".join(map(str, fact(problem.anchor, TensorType).shape))
    step = finish(
        tile.writer,
        family="attention_short",
        summary=f"Attention -> [{shape}] of up to {longest} keys, all in one tile. A program computes up to {span} "
        "queries of one head.",
        nodes=needed_nodes([node for node, _ in problem.results], problem.inputs),
        variables={**tile.evaluator.used, problem.anchor: "attention"},
        grid=(ceil_div(problem.length, span), problem.heads, problem.batch),
        writes=[view for _, view in problem.results],
        num_warps=4,
        num_stages=1,
    )
    return (step,)


def _widths(longest: int) -> list[int]:
    """Numbers of keys of a tile, rising."""
    widths = [longest >> shift for shift in reversed(range(_WIDTHS))]
    return [width for width in widths if width >= LEAST_DOT]


def _attend(tile: AttentionTile, place: Place, block: str) -> None:
    writer, problem = tile.writer, tile.problem
    keys = tile.read_keys(place, "key_first", block)
    v = tile.value_tile(place, keys.row)
    with writer.block(f"for start in range({place.top}, tl.minimum({place.top} + SPAN, {place.query_last}), BLOCK_M):"):
        row = tile.rows(place, "start")
        tile.write_scores(place, tile.read_queries(place, "start", row), keys)
        sink = tile.sink(place)
        peak = f"tl.max(scores, {tile.key_axis}, keep_dims=True)"
        writer.statement(f"peak = {peak if sink is None else f'tl.maximum({peak}, {sink})'}")
        # A query without a key has peak -inf, and -inf - -inf is no number.
        writer.statement('shift = tl.where(peak == float("-inf"), 0.0, peak)')
        writer.statement("weights = tl.exp(scores - shift)")
        extra = "" if sink is None else f" + tl.exp({sink} - shift)"
        writer.statement(f"total = tl.sum(weights, {tile.key_axis}, keep_dims=True){extra}")
        cast = "" if problem.dtype == problem.compute else f".to({TL_TYPES[problem.dtype]})"
        writer.statement(f"acc = {dot(tile.by_rows(f'weights{cast}'), v, None, problem.dtype)}")
        tile.count_pads(place, row)
        writer.statement(f"attention = acc / {tile.by_rows('tl.where(total == 0.0, 1.0, total)')}")
        tile.store(place, row)
