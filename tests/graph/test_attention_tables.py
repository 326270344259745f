"""Definitions in plain torch: tables and uniform pads of attention pair by pair, packed like padded; head_linear."""

import math

import pytest
import torch
from torch import Tensor

ops = torch.ops.tilewright
HEADS, SIZE = 2, 4


def _operands(batch: int, length: int) -> dict[str, Tensor]:
    rows = {name: torch.randn(batch, HEADS, length, SIZE, dtype=torch.float64) for name in "qkv"}
    tables = {
        "query_table": torch.randn(batch, HEADS, length, 5, dtype=torch.float64),
        "query_index": torch.randint(0, 5, (length, length)),
        "key_table": torch.randn(batch, HEADS, length, 7, dtype=torch.float64),
        "key_index": torch.randint(0, 7, (length, length)),
    }
    return rows | tables


def _pair_by_pair(given: dict[str, Tensor], valid: Tensor, uniform: bool) -> Tensor:
    batch, heads, length, size = given["q"].shape
    out = given["q"].new_zeros(batch, length, heads, size)
    for b, h, i in torch.cartesian_prod(torch.arange(batch), torch.arange(heads), torch.arange(length)).tolist():
        if uniform and not valid[b, i]:
            out[b, i, h] = given["v"][b, h].mean(0)
            continue
        weights = [
            math.exp(
                float(given["q"][b, h, i] @ given["k"][b, h, j]) * 0.5
                + float(given["query_table"][b, h, i, given["query_index"][i, j]])
                + float(given["key_table"][b, h, j, given["key_index"][j, i]])
            )
            * bool(valid[b, j])
            for j in range(length)
        ]
        if sum(weights):
            out[b, i, h] = torch.tensor(weights, dtype=torch.float64) @ given["v"][b, h] / sum(weights)
    return out


def _padded(given: dict[str, Tensor], valid: Tensor, uniform: bool) -> Tensor:
    tables = [given[name] for name in ("query_table", "query_index", "key_table", "key_index")]
    options = (0.5, False, -1, -1, 0.0, *tables, uniform)
    out: Tensor = ops.attention(given["q"], given["k"], given["v"], valid, None, None, *options)
    return out


VALID = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 1, 1, 1], [0, 0, 0, 0, 0]]).bool()


@pytest.mark.parametrize("uniform", [False, True])
def test_pair_by_pair(uniform: bool) -> None:
    given = _operands(*VALID.shape)
    assert torch.allclose(_padded(given, VALID, uniform), _pair_by_pair(given, VALID, uniform), atol=1e-12)


def test_packed_is_padded_where_masked_places_hold_the_same() -> None:
    """Row for row, column 0 of each sequence included where it is masked."""
    given = _operands(*VALID.shape)
    for name in ("q", "k", "v", "query_table", "key_table"):
        given[name] = torch.where(VALID[:, None, :, None], given[name], given[name][:, :, 2:3].flip(0))
    column = torch.zeros(VALID.shape[0], dtype=torch.int64)
    row_index, slots, *offsets, _ = ops.pack_index(VALID, [column])

    def rows(x: Tensor) -> Tensor:
        packed: Tensor = ops.gather_rows(x.transpose(1, 2), row_index)
        return packed

    tables = [rows(given["query_table"]), given["query_index"], rows(given["key_table"]), given["key_index"]]
    options = (5, 5, 0.5, False, -1, -1, 0.0, *tables, True)
    packed = ops.attention_packed(*(rows(given[n]) for n in "qkv"), *offsets, slots, slots, None, None, *options)
    expected = ops.gather_rows(_padded(given, VALID, True), row_index)
    assert torch.allclose(packed, expected, atol=1e-12)


@pytest.mark.parametrize("rows", [(), (0,), (3, 5)], ids=str)
def test_head_linear_is_a_linear_for_each_head(rows: tuple[int, ...]) -> None:
    x, weight = torch.randn(*rows, 3, 4), torch.randn(3 * 6, 4)
    out = ops.head_linear(x, weight)
    assert out.shape == (*rows, 3, 6)
    for head in range(3):
        part = torch.nn.functional.linear(x[..., head, :], weight[6 * head : 6 * head + 6])
        assert torch.allclose(out[..., head, :], part, atol=1e-6)
