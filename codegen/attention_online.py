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
    _start(tile, place)
    writer.constants["BLOCK_KEYS"] = _KEYS
    with writer.block("for start in range(key_first, key_last, BLOCK_KEYS):"):
        keys = tile.read_keys(place, "start", "BLOCK_KEYS")
        tile.write_scores(place, queries, keys)
        v = tile.value_tile(place, keys.row)
        cast = "" if problem.dtype == problem.compute else f".to({TL_TYPES[problem.dtype]})"
        fade = tile.by_rows("fade")
        for line in (
            f"new_peak = tl.maximum(peak, tl.max(scores, {tile.key_axis}, keep_dims=True))",
            # A query that has seen no key yet has peak -inf, and -inf - -inf is no number.
            'shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)',
            "weights = tl.exp2(scores - shift)",
            "fade = tl.exp2(peak - shift)",
            f"total = total * fade + tl.sum(weights, {tile.key_axis}, keep_dims=True)",
            f"acc = {dot(tile.by_rows(f'weights{cast}'), v, f'acc * {fade}', problem.dtype)}",
            "peak = new_peak",
        ):
            writer.statement(line)
    tile.count_pads(place, row)
    writer.statement(f"attention = acc / {tile.by_rows('tl.where(total == 0.0, 1.0, total)')}")
    tile.store(place, row)


def _start(tile: AttentionTile, place: Place) -> None:
    """Running maximum, sum and result; every query has seen the sink."""
    writer, kind, shape = tile.writer, tile.problem.kind, tile.per_query
    sink = tile.sink(place)
    if sink is not None:
        writer.statement(f"peak = tl.zeros({shape}, {kind}) + {sink}")
        writer.statement(f'total = tl.zeros({shape}, {kind}) + tl.where({sink} == float("-inf"), 0.0, 1.0)')
    else:
        writer.statement(f'peak = tl.full({shape}, float("-inf"), {kind})')
        writer.statement(f"total = tl.zeros({shape}, {kind})")
    writer.statement(f"acc = tl.zeros([BLOCK_M, {tile.head_block(tile.problem.value_size)}], {kind})")
