"""Lookups by an input become embeddings, and the input is checked against the table; others stay as they are."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from zoo import normalize, ops

import tilewright
from tilewright.errors import InputError
from tilewright.ir.graph import info
from tilewright.models.capture import capture

ROWS = 11


class _Lookup(nn.Module):
    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("table", torch.arange(ROWS * 6.0).reshape(ROWS, 6))

    def forward(self, ids: Tensor) -> Tensor:
        return self.function(self.table, ids)


def gathered(table: Tensor, ids: Tensor) -> Tensor:
    """Rows by a gather over a copy of the table for each sequence."""
    return torch.gather(table.repeat(ids.shape[0], 1, 1), 1, ids[..., None].repeat(1, 1, table.shape[1]))


FOUND = {
    "indexed": lambda table, ids: table[ids] * 2.0,
    "indexed, in another order": lambda table, ids: table[ids.t().int()],
    "gathered": gathered,
    "selected": lambda table, ids: table.index_select(0, ids.view(-1)).view(*ids.shape, -1),
    "both": lambda table, ids: gathered(table, ids) + table[ids],
}
LEFT = {
    "computed": lambda table, ids: table[ids * 2],
    "one number a row": lambda table, ids: torch.gather(
        table.expand(ids.shape[0], -1, -1), 1, (ids[..., None] + torch.arange(6)) % ROWS
    ),
    "by condition": lambda table, ids: table * (ids[:1, :1] > 0),
}


@pytest.mark.parametrize("kind", FOUND)
def test_found(kind: str) -> None:
    model = _Lookup(FOUND[kind]).eval()
    gm, _ = normalize(capture(model, example=((torch.ones(2, 5, dtype=torch.int64),), {})))
    assert ops(gm)["aten.embedding.default"] == kind.count("both") + 1
    assert not any("aten.index" in name or "gather" in name for name in ops(gm))
    (spec,) = info(gm).inputs
    assert (spec.vocab, spec.lowest) == (ROWS, -ROWS if "indexed" in kind else 0)
    compiled = tilewright.compile(model)
    ids = torch.randint(spec.lowest, ROWS, (3, 8), generator=torch.Generator().manual_seed(0))
    ids[0, :2] = torch.tensor([spec.lowest, ROWS - 1])
    assert torch.equal(compiled(ids), model(ids))
    for bad in (ROWS, spec.lowest - 1):
        ids[1, 1] = bad
        with pytest.raises(InputError, match=f"holds {bad}, outside {spec.lowest}..10"):
            compiled(ids)


@pytest.mark.parametrize("kind", LEFT)
def test_left(kind: str) -> None:
    model = _Lookup(LEFT[kind]).eval()
    gm, _ = normalize(capture(model, example=((torch.ones(2, 5, dtype=torch.int64),), {})))
    assert "aten.embedding.default" not in ops(gm)
    assert info(gm).inputs[0].vocab is None


def test_a_number_is_added() -> None:
    """The input's bounds are those of the table, shifted; a second table narrows them."""

    def function(table: Tensor, ids: Tensor) -> Tensor:
        return table.index_select(0, (ids + 2).view(-1)).view(*ids.shape, -1) + table[1 + ids]

    model = _Lookup(function).eval()
    gm, _ = normalize(capture(model, example=((torch.ones(2, 5, dtype=torch.int64),), {})))
    assert ops(gm)["aten.embedding.default"] == 2
    (spec,) = info(gm).inputs
    assert (spec.lowest, spec.vocab) == (-2, ROWS - 2)
    ids = torch.tensor([[-2, -1, 0, ROWS - 3]])
    assert torch.equal(tilewright.compile(model)(ids), model(ids))
