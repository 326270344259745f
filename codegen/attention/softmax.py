"""A softmax over keys that come block by block: its text, which kernels of attention share.

A running maximum ``peak``, a running sum ``total`` and an unfinished result ``acc`` stand in the kernel; each block
rescales what the blocks before it have summed. Source: Milakov and Gimelshein, "Online normalizer
calculation for softmax", 2018; Dao et al., "FlashAttention", 2022.
"""

import torch

from tilewright.codegen.emit_gemm import dot
from tilewright.codegen.writer import TL_TYPES, KernelWriter


def start_softmax(writer: KernelWriter, kind: str, per_query: str, acc: str, sink: str | None) -> None:
    """Writes the state before the first block; every query has seen the sink.

    Args:
        kind: element type of the state.
        per_query, acc: shape of what there is one of for each query, and of the result.
        sink: text of the sink's logit, or None.
    """
    if sink is not None:
        writer.statement(f"peak = tl.zeros({per_query}, {kind}) + {sink}")
        writer.statement(f'total = tl.zeros({per_query}, {kind}) + tl.where({sink} == float("-inf"), 0.0, 1.0)')
    else:
        writer.statement(f'peak = tl.full({per_query}, float("-inf"), {kind})')
        writer.statement(f"total = tl.zeros({per_query}, {kind})")
    writer.statement(f"acc = tl.zeros({acc}, {kind})")


def fold_scores(
    writer: KernelWriter,
    values: str,
    *,
    dtype: torch.dtype,
    compute: torch.dtype,
    turned: bool = False,
    value_scales: str | None = None,
) -> None:
    """Adds a block to the state: its masked ``scores`` and its values.

    Args:
        values: text of the values' tile.
        dtype, compute: of the values, and of the scores.
        turned: whether scores are [keys, queries].
        value_scales: text of what each key's values are to be multiplied by, along the keys of the scores.
    """
    cast = "" if dtype == compute else f".to({TL_TYPES[dtype]})"
    axis = 0 if turned else 1
    scaled = "weights" if value_scales is None else f"(weights * {value_scales})"
    weights, fade = (f"tl.trans({text})" if turned else text for text in (f"{scaled}{cast}", "fade"))
    for line in (
        f"new_peak = tl.maximum(peak, tl.max(scores, {axis}, keep_dims=True))",
        # A query that has seen no key yet has peak -inf, and -inf - -inf is no number.
        'shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)',
        "weights = tl.exp(scores - shift)",
        "fade = tl.exp(peak - shift)",
        f"total = total * fade + tl.sum(weights, {axis}, keep_dims=True)",
        f"acc = {dot(weights, values, f'acc * {fade}', dtype)}",
        "peak = new_peak",
    ):
        writer.statement(line)


def fold_part(writer: KernelWriter) -> None:
    """Adds to the state what another program has made of other keys: ``part_peak``, ``part_total`` and ``part_acc``."""
    for line in (
        "new_peak = tl.maximum(peak, part_peak)",
        'shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)',
        "weights = tl.exp(part_peak - shift)",
        "fade = tl.exp(peak - shift)",
        "total = total * fade + part_total * weights",
        "acc = acc * fade + part_acc * weights",
        "peak = new_peak",
    ):
        writer.statement(line)


def finish_softmax(writer: KernelWriter) -> None:
    """Writes ``attention``, the result; a query that has seen no key has 0."""
    writer.statement("attention = acc / tl.where(total == 0.0, 1.0, total)")
