"""The packing ops: row index, gather of padded rows, scatter back, and one row of each sequence.

Packed row t stands for the padded place (b, i) = (row_index[t] // S, row_index[t] % S). Source: the offsets, pack
and unpack kernels of ByteTransformer; here the index is computed once per call for the whole model.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tilewright.ops.registry import register
from tilewright.ops.traits import Flow, Traits


def pack_index_reference(
    valid: Tensor, columns: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The row index of a batch.

    Args:
        valid: [B, S] bool or integer, nonzero at real tokens. Any pattern: right or left padding, holes, empty rows.
        columns: C tensors [B], int32 or int64: one column of each sequence, counted from the end where negative. That
            place is kept also where it is not valid, because an output reads it; its row is computed as a query but is
            no key.

    Returns:
        row_index [T] int32, ``b * S + i`` of each kept place, sequence by sequence: first the places that are no keys,
            then the keys, each in rising order;
        slots [T] int32, the column ``i`` of each;
        cu_seqlens [B + 1] int32, prefix sum of the kept counts;
        key_start [B] int32 and seqlens_k [B] int32: packed rows [key_start, key_start + seqlens_k) are b's valid keys;
        column_rows [C, B] int32, the packed row of each sequence at each of the columns.

    Raises:
        IndexError: a column is outside -S..S-1, as of ``valid[torch.arange(B), column]``.
    """
    batch, length = valid.shape
    real = valid != 0
    sequences, slots = torch.arange(batch, device=valid.device), torch.arange(length, device=valid.device)
    kept = real
    for column in columns:
        kept = kept | (slots == torch.where(column < 0, column + length, column)[:, None])
    ordered = torch.stack((kept & ~real, real), dim=1)
    place = torch.nonzero(ordered.reshape(-1)).reshape(-1)
    places = (sequences[:, None] * length + slots)[:, None].expand(ordered.shape)
    row_index, slots = (x.expand(ordered.shape).reshape(-1)[place] for x in (places, slots))
    zero = torch.zeros(1, dtype=torch.int32, device=valid.device)
    cu_seqlens = torch.cat((zero, kept.sum(dim=1).cumsum(0).to(torch.int32)))
    seqlens_k = real.sum(dim=1).to(torch.int32)
    key_start = cu_seqlens[1:] - seqlens_k
    rows = (ordered.reshape(-1).to(torch.int64).cumsum(0) - 1).reshape(batch, 2, length)
    found = [rows[sequences, real[sequences, column.long()].long(), column.long()] for column in columns]
    column_rows = torch.stack(found) if found else rows.new_zeros((0, batch))
    i32 = torch.int32
    return row_index.to(i32), slots.to(i32), cu_seqlens, key_start, seqlens_k, column_rows.to(i32)


pack_index = torch.library.custom_op("tilewright::pack_index", pack_index_reference, mutates_args=())


@pack_index.register_fake
def _pack_index_fake(valid, columns):  # type: ignore[no-untyped-def]
    tokens = torch.library.get_ctx().new_dynamic_size()
    index = valid.new_empty((tokens,), dtype=torch.int32)
    batch = valid.shape[0]
    per_sequence = valid.new_empty((batch,), dtype=torch.int32)
    offsets = valid.new_empty((batch + 1,), dtype=torch.int32)
    rows = valid.new_empty((len(columns), batch), dtype=torch.int32)
    return index, torch.empty_like(index), offsets, per_sequence, torch.empty_like(per_sequence), rows


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


def select_rows_reference(x: Tensor, rows: Tensor) -> Tensor:
    """One row of every sequence: x [T, ...], rows [B] int32, of the row index's ``column_rows`` -> [B, ...]."""
    return x[rows.long()].contiguous()


select_rows = torch.library.custom_op("tilewright::select_rows", select_rows_reference, mutates_args=())


@select_rows.register_fake
def _select_rows_fake(x, rows):  # type: ignore[no-untyped-def]
    return x.new_empty((rows.shape[0], *x.shape[1:]))


for _op, _reference in (
    (torch.ops.tilewright.pack_index, pack_index_reference),
    (torch.ops.tilewright.gather_rows, gather_rows_reference),
    (torch.ops.tilewright.scatter_rows, scatter_rows_reference),
    (torch.ops.tilewright.select_rows, select_rows_reference),
):
    register(_op.default, Traits(Flow.PACKING), _reference)
