"""Disentangled attention: tables and indices are found, and what only looks like them stays a bias with a reason."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from references import masks
from torch import Tensor, nn
from torch.fx import Node
from zoo import normalize, ops, run

import tilewright
from tilewright.ir.facts import TensorType, fact
from tilewright.ir.graph import info
from tilewright.ir.sizes import BATCH, SEQ
from tilewright.models.capture import capture

TARGET = torch.ops.tilewright.attention.default
LOWEST = torch.finfo(torch.float32).min
HEADS, SIZE, ENTRIES = 2, 8, 12
WIDTH = HEADS * SIZE


def _buckets(length: int) -> Tensor:
    place = torch.arange(length)
    return (place[:, None] - place[None, :]).clamp(-ENTRIES // 2, ENTRIES // 2 - 1) + ENTRIES // 2


class _Disentangled(nn.Module):
    """softmax(q k^T + terms) v, its terms given by ``make(self, q, k, mask)`` on [B, H, S, D], its mask filled in.

    Args:
        make: the terms besides the product.
        merged: products are of batches [B * H, S, D].
        fill: of (mask [B, S], scores [B, H, S, S]): the masked scores.
    """

    def __init__(self, make: Callable[..., Tensor], merged: bool = False, fill: Callable[..., Tensor] | None = None):
        super().__init__()
        self.make, self.merged, self.fill = make, merged, fill or _keys_and_queries
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.positions = nn.Parameter(torch.randn(HEADS, ENTRIES, SIZE))
        self.others = nn.Parameter(torch.randn(HEADS, ENTRIES, SIZE))

    def times(self, rows: Tensor, weight: Tensor) -> Tensor:
        """[B, H, S, D] times a [H, R, D] transposed, as one product of batches or not."""
        if not self.merged:
            return rows @ weight.transpose(-1, -2)
        copies = weight.repeat(rows.shape[0], 1, 1).transpose(-1, -2)
        return torch.bmm(rows.reshape(-1, *rows.shape[2:]), copies).view(*rows.shape[:3], -1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (f(x).view(*x.shape[:2], HEADS, SIZE).transpose(1, 2) for f in (self.q, self.k, self.v))
        if self.merged:
            flat = [each.reshape(-1, *each.shape[2:]) for each in (q, k, v)]
            scores = torch.bmm(flat[0], flat[1].transpose(1, 2) / math.sqrt(SIZE))
            scores = (scores + self.make(self, q, k, mask).reshape(scores.shape)).view(-1, HEADS, *scores.shape[1:])
            weights = torch.softmax(self.fill(mask, scores), -1)
            out = torch.bmm(weights.view(-1, *weights.shape[2:]), flat[2]).view(v.shape)
        else:
            scores = q @ k.transpose(-1, -2) / math.sqrt(SIZE) + self.make(self, q, k, mask)
            out = torch.softmax(self.fill(mask, scores), -1) @ v
        return out.transpose(1, 2).reshape(x.shape)


def _keys_and_queries(mask: Tensor, scores: Tensor) -> Tensor:
    both = mask[:, None, None, :] * mask[:, None, :, None]
    return scores.masked_fill(~both.bool(), LOWEST)


def _of_queries(m: _Disentangled, q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    table = m.times(q, m.positions)
    return table.gather(-1, _buckets(q.shape[2]).expand(*table.shape[:3], -1)) / 3.0


def _of_keys(m: _Disentangled, q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    table = m.times(k, m.others)
    return (table.gather(-1, (ENTRIES - 1 - _buckets(q.shape[2])).expand(*table.shape[:3], -1)) * 0.7).transpose(-1, -2)


TERMS: dict[str, tuple[Callable[..., Tensor], tuple[bool, bool]]] = {
    "queries": (_of_queries, (True, False)),
    "keys": (_of_keys, (False, True)),
    "both": (lambda *given: _of_queries(*given) + _of_keys(*given), (True, True)),
}


def _looked_up(index: Callable[[Tensor, Tensor], Tensor], axis: int = -1) -> Callable[..., Tensor]:
    def make(m: _Disentangled, q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
        table = m.times(q, m.positions)
        return (table if axis == -1 else table @ table.mT).gather(axis, index(q, mask))

    return make


def _everywhere(index: Tensor, q: Tensor) -> Tensor:
    return index.expand(*q.shape[:2], -1, -1)


REFUSED: dict[str, tuple[Callable[..., Tensor], str]] = {
    "index from an input": (
        _looked_up(lambda q, m: _everywhere(_buckets(m.shape[1]) * m[:1, :1], q)), "its index is computed from inputs",
    ),
    "index of each sequence": (
        _looked_up(lambda q, m: _everywhere(_buckets(m.shape[1]) * m[:, None, None, :], q)),
        "its index differs between sequences or heads",
    ),
    "index of each head": (
        _looked_up(lambda q, m: _everywhere(_buckets(m.shape[1]), q) // torch.arange(1, HEADS + 1)[:, None, None]),
        "its index differs between sequences or heads",
    ),
    "other axis": (
        _looked_up(lambda q, m: _everywhere(_buckets(m.shape[1]) * 0, q), axis=2), "not gathered along the last axis",
    ),
    "second table": (lambda *given: _of_queries(*given) + 0.5 * _of_queries(*given), "there is another table already"),
}  # fmt: skip


def _inputs(pattern: str = "holes") -> tuple[Tensor, Tensor]:
    return torch.randn(3, 9, WIDTH), masks(3, 9, pattern, torch.Generator().manual_seed(1))


def _recognized(model: nn.Module) -> tuple[Any, Node]:
    gm, _ = normalize(capture(model.eval(), example=(_inputs(), {})))
    (node,) = gm.graph.find_nodes(op="call_function", target=TARGET)
    for pattern in ("right", "left", "holes", "empty_row"):
        x, mask = _inputs(pattern)
        with torch.no_grad():
            expected = model(x, mask)
        assert torch.allclose(run(gm, x=x, mask=mask), expected, atol=1e-5)
    return gm, node


@pytest.mark.parametrize("merged", [False, True], ids=["heads", "merged heads"])
@pytest.mark.parametrize("kind", TERMS)
def test_tables(kind: str, merged: bool) -> None:
    """All places agree, also those of padding, which weigh all places alike."""
    make, given = TERMS[kind]
    gm, node = _recognized(_Disentangled(make, merged))
    assert (node.args[3] is not None, node.args[4]) == (True, None)
    assert node.args[-1] is True
    for (table, index), wanted in zip((node.args[11:13], node.args[13:15]), given, strict=True):
        assert (table is not None) == wanted
        if wanted:
            assert fact(table, TensorType).shape == (BATCH, HEADS, SEQ, ENTRIES)
            assert fact(index, TensorType).shape == (SEQ, SEQ)
    counts = ops(gm)
    assert counts["tilewright.head_linear.default"] == sum(given)
    assert not {"aten.bmm.default", "aten.matmul.default", "aten.gather.default"} & set(counts)


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(kind: str) -> None:
    make, why = REFUSED[kind]
    gm, node = _recognized(_Disentangled(make))
    assert node.args[4] is not None
    assert any("stays a bias" in reason and why in reason for reason in info(gm).reasons.values())


def _filled(value: float, block: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def fill(mask: Tensor, scores: Tensor) -> Tensor:
        return scores.masked_fill(block(mask[:, None, :, None], mask[:, None, None, :]), value)

    return fill


NOT_UNIFORM: dict[str, Callable[..., Tensor]] = {
    "no number": _filled(float("-inf"), lambda q, k: ~(q.bool() & k.bool())),
    "other queries": _filled(LOWEST, lambda q, k: ~((q == 2) & k.bool())),
    "small number": _filled(-1e5, lambda q, k: ~(q.bool() & k.bool())),
    "an order too": _filled(
        LOWEST, lambda q, k: ~(q.bool() & k.bool() & torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril())
    ),
}


@pytest.mark.parametrize("kind", NOT_UNIFORM)
def test_blocked_queries_stay_in_the_bias(kind: str) -> None:
    model = _Disentangled(_of_queries, fill=NOT_UNIFORM[kind]).eval()
    gm, _ = normalize(capture(model, example=(_inputs(), {})))
    (node,) = gm.graph.find_nodes(op="call_function", target=TARGET)
    assert node.args[3] is None
    assert node.args[4] is not None
    assert any("it blocks queries otherwise" in reason for reason in info(gm).reasons.values())


class _Encoder(nn.Module):
    """Two layers over ids, zero at masked places; column 0 is returned beside all."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, WIDTH)
        self.layers = nn.ModuleList(_Disentangled(TERMS["both"][0], merged=True) for _ in range(2))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embedding(input_ids) * attention_mask.unsqueeze(-1)
        for layer in self.layers:
            x = torch.tanh(x + layer(x, attention_mask))
        return x, x[:, 0]


@pytest.mark.usefixtures("one_thread")
def test_a_masked_first_column_is_that_of_the_model() -> None:
    """Masked places of the second layer are no constant; one of each sequence stands for them."""
    torch.manual_seed(0)
    model = _Encoder().eval()
    compiled = tilewright.compile(model)
    for pattern in ("left", "holes", "empty_row", "right"):
        mask = masks(4, 11, pattern, torch.Generator().manual_seed(2))
        given = {"input_ids": torch.randint(50, mask.shape), "attention_mask": mask}
        with torch.no_grad():
            wide = model.double()(**given)
            model.float()
        ours = compiled(**given)
        assert torch.allclose(ours[1].double(), wide[1], atol=1e-5)
        assert torch.allclose(ours[0][mask.bool()].double(), wide[0][mask.bool()], atol=1e-5)
    assert compiled.stats.eager_steps == compiled.stats.fallbacks == 0
    assert compiled.stats.rows_computed < compiled.stats.rows_padded
