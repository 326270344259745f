"""The attention ops: one for padded tensors, one for packed tokens. Their eager code here is their definition.

Shapes use B batch, S padded length (of queries; Sk of keys), T packed tokens, Hq query heads, Hkv key heads (Hq a
multiple of
Hkv), D head size, Dv value head size.
"""

import torch
from torch import Tensor

from tilewright.ops.registry import register
from tilewright.ops.traits import Flow, Traits


def scores_reference(q: Tensor, k: Tensor, scale: float, softcap: float) -> Tensor:
    """Scores [B, H, S, Sk] of q [B, H, S, D] and k [B, Hkv, Sk, D] in fp32 or wider, scaled and capped."""
    groups = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(groups, dim=1) if groups != 1 else k
    compute = torch.float32 if q.dtype in (torch.float16, torch.bfloat16) else q.dtype
    scores = (q.to(compute) @ k.to(compute).transpose(-1, -2)) * scale
    return torch.tanh(scores / softcap) * softcap if softcap > 0.0 else scores


def _allowed(sq: int, sk: int, causal: bool, left: int, right: int, device: torch.device) -> Tensor | None:
    """Which (query, key) slots may attend by position alone; None when all may."""
    if not causal and left < 0 and right < 0:
        return None
    query = torch.arange(sq, device=device)[:, None] + (sk - sq)
    key = torch.arange(sk, device=device)[None, :]
    allowed = torch.ones_like(query * key, dtype=torch.bool)
    if causal:
        allowed = allowed & (key <= query)
    if left >= 0:
        allowed = allowed & (key > query - left - 1)
    if right >= 0:
        allowed = allowed & (key < query + right + 1)
    return allowed


def _looked_up(table: Tensor, index: Tensor) -> Tensor:
    """``table[b, h, i, index[i, j]]`` at (b, h, i, j)."""
    return table.gather(-1, index.long().expand(*table.shape[:2], -1, -1))


def attend_reference(
    scores: Tensor, v: Tensor, allowed: Tensor | None, sinks: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Softmax over scores [B, H, S, Sk], and the sum of values [B, Hkv, Sk, Dv] by it; no allowed key gives zeros."""
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    if sinks is not None:
        sink = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        scores = torch.cat((scores, sink), dim=-1)
    peak = scores.amax(dim=-1, keepdim=True)
    peak = torch.where(torch.isinf(peak), torch.zeros_like(peak), peak)
    weights = torch.exp(scores - peak)
    total = weights.sum(dim=-1, keepdim=True)
    weights = weights / torch.where(total == 0, torch.ones_like(total), total)
    weights = weights[..., : v.shape[2]]
    groups = weights.shape[1] // v.shape[1]
    v = v.repeat_interleave(groups, dim=1) if groups != 1 else v
    if allowed is not None:
        # A masked key has weight zero, but 0 * NaN is NaN: whatever stands in pad rows of V must not reach a real row.
        used = allowed.any(dim=-2, keepdim=True).transpose(-1, -2).expand(v.shape[0], v.shape[1], -1, 1)
        v = torch.where(used, v, torch.zeros_like(v))
    return (weights @ v.to(weights.dtype)).to(dtype)


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    valid: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    causal: bool,
    window_left: int,
    window_right: int,
    softcap: float,
    query_table: Tensor | None = None,
    query_index: Tensor | None = None,
    key_table: Tensor | None = None,
    key_index: Tensor | None = None,
    uniform_pads: bool = False,
) -> Tensor:
    """Attention over padded sequences.

    Args:
        q: [B, Hq, S, D]. k: [B, Hkv, Sk, D]. v: [B, Hkv, Sk, Dv]. Same float dtype; any strides.
        valid: [B, Sk] bool or integer, nonzero where a key is a real token; None when all are.
        bias: added to the scaled scores, broadcastable to [B, Hq, S, Sk]; may hold -inf.
        sinks: [Hq] logits that join the softmax without a value.
        scale: factor of the scores.
        causal: key slot <= query slot, the last query aligned with the last key.
        window_left, window_right: greatest slot distance of a key to the left and right of the query; -1 for no limit.
        softcap: scores become ``softcap * tanh(scores / softcap)`` before bias, tables and mask; 0 for none.
        query_table: [B, Hq, S, R], a row of numbers of each query, of which ``query_index`` [S, Sk] (integer, in
            [0, R)) says which is added to its score with each key. Both or none. "Content to position" of DeBERTa
            (He et al., 2021), section 3.1.
        key_table: [B, Hq, Sk, R'], the same of each key, and ``key_index`` [Sk, S]: "position to content".
        uniform_pads: a query whose own place is not valid weighs all Sk values alike, valid or not. Needs ``valid``,
            S = Sk, no order, window or sinks.

    Returns:
        [B, S, Hq, Dv], contiguous, dtype of q. A query with no allowed key gives zeros.
    """
    allowed = _allowed(q.shape[2], k.shape[2], causal, window_left, window_right, q.device)
    if valid is not None:
        keys = (valid != 0)[:, None, None, :]
        allowed = keys if allowed is None else allowed & keys
        k = torch.where(keys.transpose(-1, -2), k, torch.zeros_like(k))
    scores = scores_reference(q, k, scale, softcap)
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    if query_table is not None and query_index is not None:
        scores = scores + _looked_up(query_table.to(scores.dtype), query_index)
    if key_table is not None and key_index is not None:
        scores = scores + _looked_up(key_table.to(scores.dtype), key_index).transpose(-1, -2)
    if uniform_pads and valid is not None and allowed is not None:
        pads = (valid == 0)[:, None, :, None]
        scores, allowed = scores.masked_fill(pads, 0.0), allowed | pads
    return attend_reference(scores, v, allowed, sinks, q.dtype).transpose(1, 2).contiguous()


attention = torch.library.custom_op("tilewright::attention", attention_reference, mutates_args=())


@attention.register_fake
def _attention_fake(q, k, v, *args):  # type: ignore[no-untyped-def]
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3]))


def attention_packed_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    key_start: Tensor,
    seqlens_k: Tensor,
    slots_q: Tensor,
    slots_k: Tensor,
    bias: Tensor | None,
    sinks: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    causal: bool,
    window_left: int,
    window_right: int,
    softcap: float,
    query_table: Tensor | None = None,
    query_index: Tensor | None = None,
    key_table: Tensor | None = None,
    key_index: Tensor | None = None,
    uniform_pads: bool = False,
) -> Tensor:
    """Attention over packed tokens: queries of sequence b see only keys of sequence b.

    Queries have rows of their own: all tokens, or only those whose results are needed.

    Args:
        q: [Tq, Hq, D]. k: [T, Hkv, D]. v: [T, Hkv, Dv]. Any strides.
        cu_seqlens_q: [B + 1] int32, first query row of each sequence; the last entry is Tq.
        key_start: [B] int32, first packed row that is a valid key of each sequence.
        seqlens_k: [B] int32, number of valid keys; they are contiguous from ``key_start``.
        slots_q: [Tq] int32, column each query had in the padded batch. Queries that are rows of the row index come in
            its order: those that are no keys first, then the keys, whose slots rise.
        slots_k: [T] int32, the same of keys; causal order and windows are on slots.
        bias: broadcastable to [B, Hq, S, S], indexed by slots.
        sinks: [Hq].
        max_seqlen_q: upper bound of the number of queries of a sequence.
        max_seqlen_k: padded length S: upper bound of the number of keys of a sequence and of all slots.
        query_table: [Tq, Hq, R]. key_table: [T, Hq, R'].
        query_index, key_index: [S, S], indexed by slots.
        uniform_pads: a query that stands before the first key of its sequence, at row ``key_start - 1`` of k and v,
            weighs S values alike: those of all keys, and its own for each of the S - ``seqlens_k`` places without one.
            A query that is no row of the row index must, where it is no key, have a slot before those of all keys.
        Others as in ``attention``.

    Returns:
        [Tq, Hq, Dv], contiguous. A query with no allowed key gives zeros.
    """
    batch = cu_seqlens_q.shape[0] - 1
    query_sequence = (torch.arange(q.shape[0], device=q.device)[:, None] >= cu_seqlens_q[None, 1:]).sum(dim=1)
    query_place = query_sequence * max_seqlen_k + slots_q.long()
    rows = torch.arange(k.shape[0], device=k.device)[:, None]
    is_key_of = (rows >= key_start[None]) & (rows < (key_start + seqlens_k)[None])
    # A row that is no key of any sequence goes to a place after the last one, which is cut off again.
    number = torch.arange(batch, device=k.device)[None]
    key_sequence = torch.where(is_key_of.any(dim=1), (is_key_of * number).sum(dim=1), batch)
    key_place = torch.where(key_sequence < batch, key_sequence * max_seqlen_k + slots_k.long(), batch * max_seqlen_k)

    def padded(x: Tensor, place: Tensor) -> Tensor:
        flat = x.new_zeros((batch * max_seqlen_k + 1, *x.shape[1:])).index_put((place,), x)[: batch * max_seqlen_k]
        return flat.view(batch, max_seqlen_k, *x.shape[1:]).transpose(1, 2)

    valid = padded(torch.ones_like(key_place, dtype=torch.bool)[:, None], key_place)[:, 0]
    own = v[(key_start.long() - 1).clamp(min=0)][:, :, None] if uniform_pads and len(v) else None
    q, k, v = padded(q, query_place), padded(k, key_place), padded(v, key_place)
    if own is not None:
        v = torch.where(valid[:, None, :, None], v, own)
    tables = (
        None if query_table is None else padded(query_table, query_place),
        query_index,
        None if key_table is None else padded(key_table, key_place),
        key_index,
    )
    options = (scale, causal, window_left, window_right, softcap, *tables, uniform_pads)
    out = attention_reference(q, k, v, valid, bias, sinks, *options)
    return out.reshape(batch * max_seqlen_k, q.shape[1], v.shape[3])[query_place]


attention_packed = torch.library.custom_op("tilewright::attention_packed", attention_packed_reference, mutates_args=())


@attention_packed.register_fake
def _attention_packed_fake(q, k, v, *args):  # type: ignore[no-untyped-def]
    return q.new_empty((q.shape[0], q.shape[1], v.shape[2]))


register(torch.ops.tilewright.attention.default, Traits(Flow.ATTENTION), attention_reference)
register(torch.ops.tilewright.attention_packed.default, Traits(Flow.ATTENTION), attention_packed_reference)
