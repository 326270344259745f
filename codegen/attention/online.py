"""Attention in one pass over blocks of keys, with a running maximum and sum; any length of keys."""

from tilewright.codegen.attention.heads import LEAST_DOT
from tilewright.codegen.attention.problem import AttentionProblem
from tilewright.codegen.attention.softmax import fold_scores, start_softmax
from tilewright.codegen.attention.tile import AttentionTile, Place
from tilewright.codegen.kernel_text import finish
from tilewright.codegen.results import needed_nodes
from tilewright.ir.facts import TensorType, fact
from tilewright.ir.program import KernelStep
from tilewright.ir.sizes import ceil_div

_KEYS = 32


def emit_online(problem: AttentionProblem, queries: int) -> tuple[KernelStep, ...]:
    """The step: a program for each block of so many queries, head and sequence."""
    few = isinstance(problem.length, int) and problem.length <= LEAST_DOT
    block = LEAST_DOT if few else queries
    tile = AttentionTile(problem, block)
    with tile.opened("tl.program_id(0) * BLOCK_M") as place:
        _attend(tile, place)
    shape = ", ".join(map(str, fact(problem.anchor, TensorType).shape))
    step = finish(
        tile.writer,
        family="attention",
        summary=f"Attention -> [{shape}] by online softmax. A program computes {block} queries of one head.",
        nodes=needed_nodes([node for node, _ in problem.results], problem.inputs),
        variables={**tile.evaluator.used, problem.anchor: "attention"},
        grid=(ceil_div(problem.length, block), problem.heads, problem.batch),
        writes=[view for _, view in problem.results],
        num_warps=4,
        num_stages=2,
    )
    return (step,)


def _attend(tile: AttentionTile, place: Place) -> None:
    writer, problem = tile.writer, tile.problem
    row = tile.rows(place, place.top)
    tile.head_axis("d")
    tile.head_axis("dv")
    queries = tile.read_queries(place, place.top, row)
    acc = f"[BLOCK_M, {tile.head_block(problem.value_size)}]"
    start_softmax(writer, problem.kind, tile.per_query, acc, tile.sink(place))
    writer.constants["BLOCK_KEYS"] = _KEYS
    with writer.block("for start in range(key_first, key_last, BLOCK_KEYS):"):
        keys = tile.read_keys(place, "start", "BLOCK_KEYS")
        tile.write_scores(place, queries, keys)
        v = tile.value_tile(place, keys.row)
        fold_scores(writer, v, dtype=problem.dtype, compute=problem.compute, turned=tile.turned)
    tile.count_pads(place, row)
    writer.statement(f"attention = acc / {tile.by_rows('tl.where(total == 0.0, 1.0, total)')}")
    tile.store(place, row)
