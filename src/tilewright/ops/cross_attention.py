"""Attention of packed queries over keys of another text: what the decoder of an encoder-decoder does with its source.

Keys and values are given, one set a sequence, and are no rows of the packed batch. Its eager code is its definition;
``AddCache`` puts pages in the place of keys and values, for which there is a kernel.
"""

import itertools

import torch
from torch import Tensor

from tilewright.ops.attention import attend_reference, scores_reference
from tilewright.ops.registry import register
from tilewright.ops.traits import Flow, Traits


def cross_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, cu_seqlens_q: Tensor, scale: float, softcap: float
) -> Tensor:
    """Every query of a sequence sees all valid keys that are given for the sequence.

    Args:
        q: [T, Hq, D]. k: [B, Hkv, S, D]. v: [B, Hkv, S, Dv]. S is the length of the other text. Any strides.
        valid: [B, S] bool or integer, nonzero at keys; None: all are.
        cu_seqlens_q: [B + 1] int32, first query row of each sequence; the last entry is T.
        scale, softcap: as in ``attention``.

    Returns:
        [T, Hq, Dv], contiguous, dtype of q.
    """
    out = q.new_zeros((q.shape[0], q.shape[1], v.shape[3]))
    for sequence, (first, last) in enumerate(itertools.pairwise(cu_seqlens_q.tolist())):
        scores = scores_reference(q[first:last].transpose(0, 1)[None], k[sequence, None], scale, softcap)
        allowed = torch.ones_like(scores, dtype=torch.bool)
        if valid is not None:
            allowed = allowed & (valid[sequence] != 0)
        found = attend_reference(scores, v[sequence, None], allowed, None, q.dtype)
        out[first:last] = found[0].transpose(0, 1)
    return out


cross_attention = torch.library.custom_op("tilewright::cross_attention", cross_attention_reference, mutates_args=())


@cross_attention.register_fake
def _cross_attention_fake(q, k, v, *args):  # type: ignore[no-untyped-def]
    return q.new_empty((q.shape[0], q.shape[1], v.shape[3]))


register(torch.ops.tilewright.cross_attention.default, Traits(Flow.ATTENTION), cross_attention_reference)
