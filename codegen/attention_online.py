"""Attention in one pass over blocks of keys, with a running maximum and sum (online softmax).

Any length of keys; each block rescales what the blocks before it have summed. Source: Milakov and Gimelshein, "Online
normalizer calculation for softmax", 2018; Dao et al., "FlashAttention", 2022.
"""

from tilewright.codegen.attention_problem import AttentionProblem
from tilewright.codegen.attention_tile import LEAST_DOT, AttentionTile, Place
from tilewright.codegen.emit_gemm import dot
from tilewright.codegen.kernel_text import finish
from tilewright.codegen.results import needed_nodes
from tilewright.codegen.writer import TL_TYPES
from tilewright.ir.facts import TensorType, fact
from tilewright.ir.program import KernelStep
from tilewright.ir.sizes import ceil_div

_QUERIES = 32
_KEYS = 32


def emit_online(problem: AttentionProblem) -> tuple[KernelStep, ...]:
    """The step: a program for each block of queries, head and sequence."""
    few = isinstance(problem.length, int) and problem.length <= LEAST_DOT
    block = LEAST_DOT if few else _QUERIES
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
    q = tile.query_tile(place, row)
    _start(tile, place)
    writer.constants["BLOCK_KEYS"] = _KEYS
    with writer.block("for start in range(key_first, key_last, BLOCK_KEYS):"):
        key, key_row = tile.keys("start", "BLOCK_KEYS")
        k = tile.key_tile(place, key, key_row)
        writer.statement(f"scores = {dot(q, k, None, problem.dtype)}")
        tile.finish_scores(place, row, key)
        v = tile.value_tile(place, key_row)
        cast = "" if problem.dtype == problem.compute else f".to({TL_TYPES[problem.dtype]})"
        for line in (
            "new_peak = tl.maximum(peak, tl.max(scores, 1, keep_dims=True))",
            # A row that has seen no key yet has peak -inf, and -inf - -inf is no number.
            'shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)',
            "weights = tl.exp2(scores - shift)",
            "fade = tl.exp2(peak - shift)",
            "total = total * fade + tl.sum(weights, 1, keep_dims=True)",
            f"acc = {dot(f'weights{cast}', v, 'acc * fade', problem.dtype)}",
            "peak = new_peak",
        ):
            writer.statement(line)
    writer.statement("attention = acc / tl.where(total == 0.0, 1.0, total)")
    tile.store(place, row)


def _start(tile: AttentionTile, place: Place) -> None:
    """Running maximum, sum and result; every query has seen the sink."""
    writer, kind = tile.writer, tile.problem.kind
    sink = tile.sink(place)
    if sink is not None:
        writer.statement(f"peak = tl.zeros([BLOCK_M, 1], {kind}) + {sink}")
        writer.statement(f'total = tl.zeros([BLOCK_M, 1], {kind}) + tl.where({sink} == float("-inf"), 0.0, 1.0)')
    else:
        writer.statement(f'peak = tl.full([BLOCK_M, 1], float("-inf"), {kind})')
        writer.statement(f"total = tl.zeros([BLOCK_M, 1], {kind})")
    writer.statement(f"acc = tl.zeros([BLOCK_M, {tile.head_block(tile.problem.value_size)}], {kind})")
