"""Masks taken apart: each kind of padding mask is recovered, and nothing else is ever taken for one."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as sdpa
from zoo import normalize, run

from tilewright.models.capture import capture

TARGET = torch.ops.tilewright.attention.default
LOWEST = torch.finfo(torch.float32).min


class _State(NamedTuple):
    """What a mask may be made from besides the padding mask: the states and three tables."""

    x: Tensor
    triangle: Tensor
    band: Tensor
    table: Tensor


class _Masked(nn.Module):
    """One attention over [B, S, 16] with 2 heads, masked by ``make(mask [B, S], state)``."""

    def __init__(self, make: Callable[[Tensor, _State], Tensor | None], causal: bool = False) -> None:
        super().__init__()
        self.make, self.causal = make, causal
        self.register_buffer("triangle", torch.ones(64, 64).tril().view(1, 1, 64, 64))
        self.register_buffer("band", torch.ones(64, 64).tril().triu(-3).bool().view(1, 1, 64, 64))
        self.register_buffer("table", torch.rand(64, 64) > 0.5)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        heads = x.view(*x.shape[:2], 2, 8).transpose(1, 2)
        state = _State(x, self.triangle, self.band, self.table)
        out = sdpa(heads, heads, heads, self.make(mask, state), is_causal=self.causal)
        return out.transpose(1, 2).reshape(x.shape)


def _places(mask: Tensor) -> tuple[Tensor, Tensor]:
    place = torch.arange(mask.shape[1])
    return place[:, None], place[None, :]


def _valid(mask: Tensor) -> Tensor:
    return mask[:, None, None, :] != 0


def _gathered(mask: Tensor, _: Any) -> Tensor:
    batch, place = torch.arange(mask.shape[0]), torch.arange(mask.shape[1])
    inside = mask.bool()[batch[:, None, None, None], place[None, None, None, :]]
    return (place[None, None, :, None] >= 0) & inside


# (mask, is validity found, causal, window_left, window_right)
POSITIVE: dict[str, tuple[Callable[..., Any], bool, bool, int, int]] = {
    "boolean": (lambda m, _: m[:, None, None, :].bool(), True, False, -1, -1),
    "expanded": (lambda m, _: _valid(m).expand(-1, 1, m.shape[1], -1), True, False, -1, -1),
    "advanced indexing": (_gathered, True, False, -1, -1),
    "additive": (lambda m, _: torch.where(_valid(m), 0.0, LOWEST), True, False, -1, -1),
    "filled": (lambda m, _: torch.zeros(m.shape)[:, None, None].masked_fill(~_valid(m), -1e9), True, False, -1, -1),
    "one minus": (lambda m, _: (1.0 - m.bool()[:, None, None, :].float()) * LOWEST, True, False, -1, -1),
    "causal and": (lambda m, _: _valid(m) & (_places(m)[1] <= _places(m)[0]), True, True, -1, -1),
    "causal sum": (
        lambda m, _: torch.where(_valid(m), 0.0, LOWEST) + torch.where(_places(m)[0] >= _places(m)[1], 0.0, -1e9),
        True, True, -1, -1,
    ),
    "triangle table": (
        lambda m, s: _valid(m) & (s.triangle[:, :, : m.shape[1], : m.shape[1]] != 0), True, True, -1, -1,
    ),
    "band": (
        lambda m, s: _valid(m) & s.band[:, :, : m.shape[1], : m.shape[1]], True, True, 3, -1,
    ),
    "band of numbers": (
        lambda m, s: torch.where(s.band[:, :, : m.shape[1], : m.shape[1]], 0.0, LOWEST)
        + torch.where(_valid(m), 0.0, LOWEST), True, True, 3, -1,
    ),
    "tril": (lambda m, _: torch.ones(m.shape[1], m.shape[1], dtype=torch.bool).tril(), False, True, -1, -1),
    "window": (lambda m, _: _valid(m) & (_places(m)[1] > _places(m)[0] - 3), True, False, 2, -1),
    "two sided": (lambda m, _: _valid(m) & ((_places(m)[0] - _places(m)[1]).abs() <= 2), True, False, 2, 2),
    "causal window": (
        lambda m, _: _valid(m) & (_places(m)[1] <= _places(m)[0]) & ~(_places(m)[1] <= _places(m)[0] - 4),
        True, True, 3, -1,
    ),
}  # fmt: skip

NEGATIVE: dict[str, Callable[..., Any]] = {
    "per query": lambda m, _: (m[:, None, :, None] != 0).expand(-1, 1, -1, m.shape[1]),
    "query and key": lambda m, _: m[:, None, :, None] == m[:, None, None, :],
    "either": lambda m, _: _valid(m) | (_places(m)[1] <= _places(m)[0]),
    "shifted by a token": lambda m, _: (m.roll(1, 1)[:, None, None, :] != 0) | (_places(m)[0] == _places(m)[1]),
    "soft": lambda m, _: torch.where(_valid(m), 0.0, -2.0),
    "slope": lambda m, _: -0.5 * (_places(m)[0] - _places(m)[1]).abs().float() + torch.where(_valid(m), 0.0, 1.5),
    "band from a later key": lambda m, s: s.band[:, :, : m.shape[1], 1 : m.shape[1] + 1] | (_places(m)[1] == 0),
    "random table": lambda m, s: s.table[: m.shape[1], : m.shape[1]] | (_places(m)[0] == _places(m)[1]),
    "strictly causal": lambda m, _: (_places(m)[1] < _places(m)[0]) | (_places(m)[1] == 0),
    "blocks": lambda m, _: _places(m)[0] // 2 == _places(m)[1] // 2,
    "by place": lambda m, _: (m[:, None, None, :] > _places(m)[1]) | (_places(m)[0] == _places(m)[1]),
    "scaled twice": lambda m, _: (2.0 - m.bool()[:, None, None, :].float()) * -30.0,
    "from states": lambda m, s: (s.x.sum(-1)[:, None, None, :] > 0) | (_places(m)[0] == _places(m)[1]),
    "next token": lambda m, _: (m[:, :1, None, None] != 0) & _valid(m) | (_places(m)[0] == _places(m)[1]),
}


def _inputs() -> tuple[Tensor, Tensor]:
    mask = (torch.arange(9)[None] < torch.tensor([9, 4, 1])[:, None]).long()
    return torch.randn(3, 9, 16), mask


def _captured(make: Callable[..., Any], causal: bool = False) -> tuple[Any, nn.Module]:
    model = _Masked(make, causal).eval()
    gm, _ = normalize(capture(model, example=(_inputs(), {})))
    (node,) = gm.graph.find_nodes(op="call_function", target=TARGET)
    return (gm, node), model


@pytest.mark.parametrize("kind", POSITIVE)
def test_recovered(kind: str) -> None:
    make, valid, *order = POSITIVE[kind]
    (gm, node), model = _captured(make)
    assert (node.args[3] is not None) == valid
    assert node.args[4] is None
    assert list(node.args[7:10]) == order
    x, mask = _inputs()
    with torch.no_grad():
        expected = model(x, mask)
    assert torch.allclose(run(gm, x=x, mask=mask)[mask.bool()], expected[mask.bool()], atol=1e-5)


@pytest.mark.parametrize("kind", NEGATIVE)
def test_kept_as_bias(kind: str) -> None:
    (gm, node), model = _captured(NEGATIVE[kind])
    assert node.args[4] is not None, "a mask that is no padding mask was taken for one"
    assert node.args[3] is None or kind == "slope"
    assert list(node.args[7:10]) == [False, -1, -1]
    x, mask = _inputs()
    with torch.no_grad():
        expected = model(x, mask)
    real = ~expected.isnan()
    assert torch.allclose(run(gm, x=x, mask=mask)[real], expected[real], atol=1e-5)


def test_reason_is_recorded() -> None:
    from tilewright.ir.graph import info

    (gm, _), _ = _captured(NEGATIVE["per query"])
    assert any("stays a bias" in reason for reason in info(gm).reasons.values())


def test_is_causal_flag() -> None:
    (gm, node), model = _captured(lambda m, _: None, causal=True)
    assert node.args[7] is True
    x, mask = _inputs()
    with torch.no_grad():
        assert torch.allclose(run(gm, x=x, mask=mask), model(x, mask), atol=1e-5)
