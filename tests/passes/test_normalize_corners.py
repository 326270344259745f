"""Spellings that real models brought up: each keeps its result and meets the level's spec, which every run checks."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Interpreter
from zoo import normalize, ops

from tilewright.ir.facts import TensorType, find_fact
from tilewright.ir.graph import Level, info
from tilewright.models.capture import capture
from tilewright.passes.spec.verify import verify


def _ranks(x: Tensor) -> Tensor:
    return (x > 0).int()


def _filled(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 0] = 3.0
    return y


def _by_group(x: Tensor) -> Tensor:
    """Tokens as one axis, a product with a weight of each group, and an axis of tokens that is split again."""
    grouped = x.reshape(-1, 2, 4).transpose(0, 1)
    return torch.bmm(grouped, _GROUPS).transpose(0, 1).reshape(*x.shape[:2], 2, 3).flatten(2)


def _chunks(x: Tensor) -> Tensor:
    """The length filled up to whole chunks of 4, which become an axis."""
    filled = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[1] % 4))
    chunks = filled.reshape(x.shape[0], 2, filled.shape[1] // 4, 4, 4)
    return (chunks.cumsum(-2) * 2).sum((1, 2, 3))


def _shared_keys(x: Tensor) -> Tensor:
    """Attention of every query over keys of the first sequence."""
    heads = x.view(*x.shape[:2], 2, 4).transpose(1, 2)
    return torch.nn.functional.scaled_dot_product_attention(heads, heads[:1], heads[:1])


_GROUPS = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
CASES: dict[str, Callable[[Tensor], Tensor]] = {
    "slice from minus its size": lambda x: x[:, -x.shape[1] :] * 2,
    "cumsum to int32": lambda x: torch.cumsum(_ranks(x), dim=-1, dtype=torch.int32),
    "sum to int32": lambda x: _ranks(x).sum(dim=(1, 2), dtype=torch.int32),
    "sum of booleans": lambda x: (x > 0).sum(dim=-1),
    "scaled product": lambda x: torch.baddbmm(x[:, :, :1], x, x.transpose(1, 2), beta=0.5, alpha=0.25),
    "unread start": lambda x: torch.baddbmm(x[:, :, :1] * float("nan"), x, x.transpose(1, 2), beta=0),
    "cat with an empty tensor": lambda x: torch.cat((torch.zeros(0), x + 1), dim=1),
    "one place written": _filled,
    "weights of groups": _by_group,
    "chunks": _chunks,
    "attention that broadcasts": _shared_keys,
}


class _Calls(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.parametrize("case", CASES)
def test_corner(case: str) -> None:
    model = _Calls(CASES[case]).eval()
    gm, _ = normalize(capture(model, example=((torch.randn(2, 5, 8),), {})))
    assert info(gm).level is Level.NORMALIZED
    verify(gm)
    assert not any("baddbmm" in name for name in ops(gm))
    assert not any(0 in kind.shape for node in gm.graph.nodes if (kind := find_fact(node, TensorType)))
    for shape in ((3, 7, 8), (1, 1, 8)):
        x = torch.randn(shape)
        (ours,) = Interpreter(gm).run(x)
        assert ours.dtype == model(x).dtype
        torch.testing.assert_close(ours, model(x))
