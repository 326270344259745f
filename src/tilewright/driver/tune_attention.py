"""Times the forms of attention on this machine, once for each problem, and keeps the figures in the cache.

What is timed is a program of one attention on packed tokens of sequences of uneven lengths, with a mean of about 0.6 of
the longest, its operands slices of one matrix, as behind a joint projection.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from tilewright.driver.timing_store import Timings, may_measure, stored_or_measured
from tilewright.ir.facts import Origin, SizeValue, TensorType, find_fact, set_fact
from tilewright.ir.graph import GraphInfo, InputSpec, Level, OutputSpec, set_info
from tilewright.ir.measurements import AttentionKey
from tilewright.ir.regions import ATTENTION_VARIANTS, Anchor, Region
from tilewright.ir.sizes import BATCH, SEQ, Size
from tilewright.passes.regions.specialize_attention import attention_key, attention_of, forms_of, over_pages
from tilewright.runtime.measure import Make, measure_variants

Compile = Callable[[GraphModule, str], Callable[..., Any]]
Progress = Callable[[int, int, str], None]

# Lengths and seconds for each problem and length, by opt_level.
_EFFORT: dict[int, tuple[tuple[int, ...], float]] = {
    2: ((32, 64, 128, 256, 512), 0.05),
    3: ((16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024), 0.3),
}
_TOKENS = 2048
_HEADS = 4


def attention_timings(
    gm: GraphModule, opt_level: int, compile_one: Compile, progress: Progress | None
) -> dict[AttentionKey, Timings]:
    """Timings for all attentions of a graph at level fused, from the cache where they are there.

    Args:
        gm: the graph.
        opt_level: how finely to measure; below 2, with the setting ``tune`` off, or in checked mode, in which kernels
            take longer, nothing is measured.
        compile_one: compiles a normalized graph with one form alone and returns what runs it.
        progress: called before each problem.
    """
    if opt_level not in _EFFORT or not may_measure():
        return {}
    regions = [node for node in gm.graph.nodes if (fact := find_fact(node, Region)) and fact.anchor is Anchor.ATTENTION]
    bodies = [gm.get_submodule(str(node.target)) for node in regions]
    anchors = [attention_of(body) for body in bodies if isinstance(body, GraphModule)]
    keys = list(dict.fromkeys(attention_key(anchor) for anchor in anchors if not over_pages(anchor)))
    found = {}
    for done, key in enumerate(keys):
        if progress is not None:
            progress(done, len(keys), f"timing attention of heads of {key.size}")
        measure = partial(_measure, key, opt_level, compile_one)
        found[key] = stored_or_measured("attention-table", key, opt_level, measure)
    return found


def _measure(key: AttentionKey, opt_level: int, compile_one: Compile) -> Timings:
    lengths, budget = _EFFORT[opt_level]
    heads = _query_heads(key)
    makes = {name: _runner(compile_one(attention_graph(key, heads), name), key, heads) for name in forms_of(key)}
    found: Timings = dict.fromkeys(makes, ())
    for length in lengths:
        longest = {name: ATTENTION_VARIANTS[name] or length for name in makes}
        fitting = {name: make for name, make in makes.items() if length <= longest[name]}
        for name, times in measure_variants(fitting, (length,), budget).items():
            found[name] += times
    return found


def _runner(run: Callable[..., Any], key: AttentionKey, heads: int) -> Make:
    def make(length: int) -> Callable[[], None]:
        inputs = attention_inputs(key, heads, uneven_lengths(length))
        return lambda: run(*inputs)

    return make


def uneven_lengths(longest: int) -> list[int]:
    """Lengths of a batch from ``longest`` down to a fifth of it, in equal steps, of about as many tokens for all."""
    count = min(32, max(2, _TOKENS // longest))
    return [max(1, round(longest * (1.0 - 0.8 * place / (count - 1)))) for place in range(count)]


def _query_heads(key: AttentionKey) -> int:
    return _HEADS if key.group == 1 else 2 * key.group


def attention_inputs(key: AttentionKey, heads: int, lengths: Sequence[int]) -> list[torch.Tensor]:
    """Inputs of ``attention_graph`` for sequences of these lengths."""
    dtype = getattr(torch, key.dtype)
    longest = max(lengths)
    valid = torch.arange(longest)[None] < torch.tensor(lengths)[:, None]
    inputs = [torch.randn(len(lengths), longest, sum(_widths(key, heads))).to(dtype), valid]
    if key.bias:
        inputs.append(torch.randn(1, heads, longest, longest).to(dtype))
    apart = torch.arange(longest)[:, None] - torch.arange(longest)[None, :]
    for entries in (key.query_table, key.key_table):
        if entries:
            inputs.append(torch.randn(len(lengths), heads, longest, entries).to(dtype))
            inputs.append((apart + entries // 2).clamp(0, entries - 1))
    return inputs


def _widths(key: AttentionKey, heads: int) -> tuple[int, int, int]:
    key_heads = heads // key.group
    return heads * key.size, key_heads * key.size, key_heads * key.value_size


def attention_graph(key: AttentionKey, heads: int) -> GraphModule:
    """A normalized graph of one attention with so many query heads.

    Its inputs: x [B, S, q | k | v], valid [B, S], and where the key has them a bias [1, H, S, S], and tables
    [B, H, S, R] with their indices [S, S].
    """
    dtype = getattr(torch, key.dtype)
    widths, key_heads = _widths(key, heads), heads // key.group
    graph = Graph()
    specs = [InputSpec("x", dtype, (BATCH, SEQ, sum(widths))), InputSpec("valid", torch.bool, (BATCH, SEQ))]
    if key.bias:
        specs.append(InputSpec("bias", dtype, (1, heads, SEQ, SEQ)))
    for of, entries in (("query", key.query_table), ("key", key.key_table)):
        if entries:
            specs.append(InputSpec(f"{of}_table", dtype, (BATCH, heads, SEQ, entries)))
            specs.append(InputSpec(f"{of}_index", torch.int64, (SEQ, SEQ)))
    given = {spec.name: _typed(graph.placeholder(spec.name), spec.dtype, spec.shape) for spec in specs}
    x, valid = given["x"], given["valid"]
    sizes = [graph.call_function(torch.ops.aten.sym_size.int, (x, axis)) for axis in (0, 1)]
    for node, size in zip(sizes, (BATCH, SEQ), strict=True):
        set_fact(node, SizeValue(size))
        set_fact(node, Origin(made_by="tuning"))
    parts, start = [], 0
    for width, count in zip(widths, (heads, key_heads, key_heads), strict=True):
        piece = graph.call_function(torch.ops.aten.slice.Tensor, (x, 2, start, start + width))
        split = graph.call_function(torch.ops.aten.reshape.default, (piece, [*sizes, count, width // count]))
        moved = graph.call_function(torch.ops.aten.permute.default, (split, [0, 2, 1, 3]))
        _typed(piece, dtype, (BATCH, SEQ, width))
        _typed(split, dtype, (BATCH, SEQ, count, width // count))
        parts.append(_typed(moved, dtype, (BATCH, count, SEQ, width // count)))
        start += width
    options = (key.size**-0.5, key.causal, key.window_left, key.window_right, 0.0)
    tables = (given.get(name) for name in ("query_table", "query_index", "key_table", "key_index"))
    arguments = (*parts, valid, given.get("bias"), None, *options, *tables)
    out = graph.call_function(torch.ops.tilewright.attention.default, arguments)
    _typed(out, dtype, (BATCH, SEQ, heads, key.value_size))
    graph.output((out,))
    gm = GraphModule(torch.nn.Module(), graph)
    output = OutputSpec(lambda flat: flat[0], ("out",))
    set_info(gm, GraphInfo(Level.NORMALIZED, tuple(specs), output, name="attention"))
    return gm


def _typed(node: Node, dtype: torch.dtype, shape: tuple[Size, ...]) -> Node:
    set_fact(node, TensorType(shape, dtype))
    set_fact(node, Origin(made_by="tuning"))
    return node
