"""Attention over a cache of keys and values in pages, and the selection of rows: what a causal model needs to go on
from tokens it has seen before. Their eager code here is their definition.

Pages come from vLLM's PagedAttention (Kwon et al., "Efficient Memory Management for Large Language Model Serving with
PagedAttention", 2023): memory of a fixed number of slots; a table says which pages hold the slots of a sequence.

Shapes use B sequences, T new tokens, Hq query heads, Hkv key heads (Hq a multiple of Hkv), D head size, Dv value head
size, N pages of G slots each, P pages in the longest table.
"""

import itertools

import torch
from torch import Tensor

from tilewright.ops.attention import attend_reference, scores_reference
from tilewright.ops.registry import register
from tilewright.ops.traits import Flow, Traits

_PAGES = ("key_pages", "value_pages", "key_scales", "value_scales")
STEPS = 127
"""Steps of a rounded key or value either side of zero; the largest magnitude of a token and head is that many."""
LEAST_MAGNITUDE = 1e-30
"""Stands for the magnitude of a key or value of zeros: its elements stay zero."""


def append_pages_reference(
    k: Tensor,
    v: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    places: Tensor,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> Tensor:
    """Puts keys and values into pages; operands as of ``attention_paged``.

    Returns:
        [0] int32, a token: what is to come after the pages are filled depends on it.
    """
    slots = value_pages.shape[2]
    page, slot = places.long() // slots, places.long() % slots
    if key_scales is not None and value_scales is not None:
        k, key_scales[page, :, slot] = _rounded(k)
        v, value_scales[page, :, slot] = _rounded(v)
    key_pages[page, :, :, slot] = k.to(key_pages.dtype)
    value_pages[page, :, slot] = v.to(value_pages.dtype)
    return places.new_empty(0)


def _rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers of steps [T, H, D] and the size of a step [T, H] in fp32."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    magnitude = wide.abs().amax(-1).clamp(min=LEAST_MAGNITUDE)
    return torch.floor(wide * (STEPS / magnitude)[..., None] + 0.5), (magnitude / STEPS).float()


append_pages = torch.library.custom_op("tilewright::append_pages", append_pages_reference, mutates_args=_PAGES)


@append_pages.register_fake
def _append_pages_fake(k, v, key_pages, value_pages, places, *scales):  # type: ignore[no-untyped-def]
    return places.new_empty(0)


def attention_paged_reference(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    key_pages: Tensor,
    value_pages: Tensor,
    places: Tensor | None,
    cu_seqlens_q: Tensor,
    slots_q: Tensor,
    page_table: Tensor,
    sinks: Tensor | None,
    scale: float,
    window_left: int,
    softcap: float,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
    slot_bias: Tensor | None = None,
    bias_by: str = "key",
) -> Tensor:
    """Puts new keys and values into their pages, then causal attention of the queries over all pages of a sequence.

    Queries have rows of their own: all new tokens, or only those whose results are needed.

    Args:
        q: [Tq, Hq, D]. k: [T, Hkv, D]. v: [T, Hkv, Dv]. Any strides. Without k, v and places nothing is written: pages
            then hold what others have put there, as the keys of a source do for a decoder.
        key_pages: [N, Hkv, D, G], written. value_pages: [N, Hkv, G, Dv], written. Their dtype may be narrower than
            that of keys and values, which are rounded to it; all keys are read from there, the new ones too.
        places: [T] int32, ``page * G + slot % G`` of each new token.
        cu_seqlens_q: [B + 1] int32, first query row of each sequence; the last entry is Tq.
        slots_q: [Tq] int32, place of each query in its sequence, counted from 0, rising within it. A query sees the
            keys of slots up to its own, which have all been put into pages. Where the query is none of the keys'
            sequence, as over a source, it stands at the last of them and sees all.
        page_table: [B, P] int32, the page of slots [p * G, (p + 1) * G) of each sequence.
        sinks: [Hq] logits that join the softmax without a value.
        scale, softcap: as in ``attention``.
        window_left: greatest distance of a key before its query; -1 for no limit.
        key_scales, value_scales: [N, Hkv, G] fp32, written. Pages are then int8: whole numbers of steps, each of 1/127
            of the largest magnitude in the key or value of a token and head.
        slot_bias: [Hq, L], added to the scores of a head after the softcap; any strides, L above every slot.
        bias_by: which column is that of a key: "key", its slot; or "distance", L - 1 less the slots from it to the
            query, so that columns rise with keys and the last one is the query's own.

    Returns:
        [Tq, Hq, Dv], contiguous, dtype of q.
    """
    slots = value_pages.shape[2]
    if k is not None and v is not None and places is not None:
        append_pages_reference(k, v, key_pages, value_pages, places, key_scales, value_scales)
    out = q.new_zeros((q.shape[0], q.shape[1], value_pages.shape[3]))
    offsets = cu_seqlens_q.tolist()
    for sequence, (first, last) in enumerate(itertools.pairwise(offsets)):
        if first == last:
            continue
        query = slots_q[first:last].long()
        count = int(query.max()) + 1
        table = page_table[sequence, : -(-count // slots)].long()
        keys, values = (
            _rows_of_pages(pages[table], None if scales is None else scales[table])[None, :, :count].to(q.dtype)
            for pages, scales in ((key_pages.transpose(2, 3), key_scales), (value_pages, value_scales))
        )
        key = torch.arange(count, device=q.device)
        allowed = key[None] <= query[:, None]
        if window_left >= 0:
            allowed = allowed & (key[None] >= query[:, None] - window_left)
        queries = q[first:last].transpose(0, 1)[None]
        scores = scores_reference(queries, keys, scale, softcap)
        if slot_bias is not None:
            column = key[None] + (0 if bias_by == "key" else slot_bias.shape[1] - 1 - query[:, None])
            # What a query does not see may lie behind the last column.
            scores = scores + slot_bias.to(scores.dtype)[:, column.clamp(max=slot_bias.shape[1] - 1)]
        found = attend_reference(scores, values, allowed[None, None], sinks, q.dtype)
        out[first:last] = found[0].transpose(0, 1)
    return out


def _rows_of_pages(pages: Tensor, scales: Tensor | None) -> Tensor:
    """Pages [P, H, G, D] of one sequence, with steps [P, H, G], as its rows [H, P * G, D]."""
    if scales is not None:
        pages = pages * scales[..., None]
    return pages.transpose(0, 1).flatten(1, 2)


attention_paged = torch.library.custom_op("tilewright::attention_paged", attention_paged_reference, mutates_args=_PAGES)


@attention_paged.register_fake
def _attention_paged_fake(q, k, v, key_pages, value_pages, *args):  # type: ignore[no-untyped-def]
    return q.new_empty((q.shape[0], q.shape[1], value_pages.shape[3]))


def take_rows_reference(x: Tensor, rows: Tensor, cu_rows: Tensor) -> Tensor:
    """Some rows: x [T, ...] -> [R, ...].

    Args:
        x: [T, ...].
        rows: [R] int32, the rows, sequence by sequence.
        cu_rows: [B + 1] int32, first of ``rows`` of each sequence; what computes only these rows needs to know.
    """
    return x[rows.long()].contiguous()


take_rows = torch.library.custom_op("tilewright::take_rows", take_rows_reference, mutates_args=())


@take_rows.register_fake
def _take_rows_fake(x, rows, cu_rows):  # type: ignore[no-untyped-def]
    return x.new_empty((rows.shape[0], *x.shape[1:]))


register(torch.ops.tilewright.attention_paged.default, Traits(Flow.ATTENTION), attention_paged_reference)
register(torch.ops.tilewright.append_pages.default, Traits(Flow.APPEND), append_pages_reference)
register(torch.ops.tilewright.take_rows.default, Traits(Flow.PACKING), take_rows_reference)
