"""The packing ops: row index, gather of padded rows, scatter back, and one column of each sequence.

Packed row t stands for the padded place (b, i) = (row_index[t] // S, row_index[t] % S). Source: the offsets, pack
and unpack kernels of ByteTransformer; here the index is computed once per call for the whole model.
"""

import torch
from torch import Tensor

from tilewright.ops.registry import register
from tilewright.ops.traits import Flow, Traits


def pack_index_reference(valid: Tensor, keep_first: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The row index of a batch.

    Args:
        valid: [B, S] bool or integer, nonzero at real tokens. Any pattern: right or left padding, holes, empty rows.
        keep_first: also keep column 0 of a row whose column 0 is not valid, because an output reads it; such a row is
            computed as a query but is no key.

    Returns:
        row_index [T] int32, ``b * S + i`` of each kept place in rising order;
        slots [T] int32, the column ``i`` of each;
        cu_seqlens [B + 1] int32, prefix sum of the kept counts;
        key_start [B] int32 and seqlens_k [B] int32: packed rows [key_start, key_start + seqlens_k) are b's valid keys.
    """
    real = valid != 0
    kept = real.clone()
    if keep_first:
        kept[:, 0] = True
    columns = torch.arange(valid.shape[1], dtype=torch.int32, device=valid.device).expand(valid.shape).reshape(-1)
    row_index = torch.nonzero(kept.reshape(-1)).reshape(-1)
    zero = torch.zeros(1, dtype=torch.int32, device=valid.device)
    cu_seqlens = torch.cat((zero, kept.sum(dim=1).cumsum(0).to(torch.int32)))
    seqlens_k = real.sum(dim=1).to(torch.int32)
    key_start = cu_seqlens[:-1] + (kept.sum(dim=1) - real.sum(dim=1)).to(torch.int32)
    return row_index.to(torch.int32), columns[row_index], cu_seqlens, key_start, seqlens_k


pack_index = torch.library.custom_op("tilewright::pack_index", pack_index_reference, mutates_args=())


@pack_index.register_fake
def _pack_index_fake(valid, keep_first):  # type: ignore[no-untyped-def]
    tokens = torch.library.get_ctx().new_dynamic_size()
    index = valid.new_empty((tokens,), dtype=torch.int32)
    batch = valid.shape[0]
    per_sequence = valid.new_empty((batch,), dtype=torch.int32)
    offsets = valid.new_empty((batch + 1,), dtype=torch.int32)
    return index, torch.empty_like(index), offsets, per_sequence, torch.empty_like(per_sequence)


def gather_rows_reference(x: Tensor, row_index: Tensor) -> Tensor:
    """Packs: x [B, S, ...] (an expanded [1, S, ...] costs nothing) -> [T, ...] in the order of row_index."""
    return x.reshape(-1, *x.shape[2:])[row_index.long()].contiguous()


gather_rows = torch.library.custom_op("tilewright::gather_rows", gather_rows_reference, mutates_args=())


@gather_rows.register_fake
def _gather_rows_fake(x, row_index):  # type: ignore[no-untyped-def]
    return x.new_empty((row_index.shape[0], *x.shape[2:]))


def scatter_rows_reference(x: Tensor, row_index: Tensor, valid: Tensor) -> Tensor:
    """Rebuilds padding: x [T, ...], valid [B, S] -> [B, S, ...]; 0 at places that are not valid."""
    batch, length = valid.shape
    flat = x.new_zeros((batch * length, *x.shape[1:])).index_put((row_index.long(),), x)
    real = (valid != 0).reshape(batch, length, *([1] * (x.dim() - 1)))
    return torch.where(real, flat.view(batch, length, *x.shape[1:]), torch.zeros_like(real, dtype=x.dtype))


scatter_rows = torch.library.custom_op("tilewright::scatter_rows", scatter_rows_reference, mutates_args=())


@scatter_rows.register_fake
def _scatter_rows_fake(x, row_index, valid):  # type: ignore[no-untyped-def]
    return x.new_empty((*valid.shape, *x.shape[1:]))


def first_rows_reference(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Column 0 of every sequence: x [T, ...], cu_seqlens [B + 1] -> [B, ...]. Needs ``keep_first`` in the row index."""
    return x[cu_seqlens[:-1].long()].contiguous()


first_rows = torch.library.custom_op("tilewright::first_rows", first_rows_reference, mutates_args=())


@first_rows.register_fake
def _first_rows_fake(x, cu_seqlens):  # type: ignore[no-untyped-def]
    return x.new_empty((cu_seqlens.shape[0] - 1, *x.shape[1:]))


for _op, _reference in (
    (torch.ops.tilewright.pack_index, pack_index_reference),
    (torch.ops.tilewright.gather_rows, gather_rows_reference),
    (torch.ops.tilewright.scatter_rows, scatter_rows_reference),
    (torch.ops.tilewright.first_rows, first_rows_reference),
):
    register(_op.default, Traits(Flow.PACKING), _reference)
