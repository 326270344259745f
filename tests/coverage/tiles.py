"""Cases of shapes, reductions, scans, sorting and dot products."""

from typing import Any

import numpy as np
import torch
from tests.coverage.cases import Case
from tests.coverage.values import DTYPES, FLOATS, INTS, NOT_BOOL, NUMBERS, SMALL_FLOATS, Array

ORDERED = ("int1", *NUMBERS)
_PAIRS = (4, 8)


def _grid(x: Array) -> Array:
    return x.reshape(_PAIRS)


def _shapes() -> list[Case]:
    return [
        Case("arange", "out = tl.arange(32, 64)", lambda x, y, z: np.arange(32, 64), ("int32",), once=True),
        Case("full", "out = tl.full((4, 8), 3, D)", lambda x, y, z: np.full(_PAIRS, 3, x.dtype), NOT_BOOL),
        Case("zeros", "out = tl.zeros((4, 8), D)", lambda x, y, z: np.zeros(_PAIRS, x.dtype), DTYPES),
        Case("zeros_like", "out = tl.zeros_like(x2)", lambda x, y, z: np.zeros(_PAIRS, x.dtype), DTYPES),
        Case("reshape", "out = tl.reshape(x2, 2, 4, 4)", lambda x, y, z: x.reshape(2, 4, 4), DTYPES),
        Case("view", "out = tl.view(x2, 8, 4)", lambda x, y, z: x.reshape(8, 4), DTYPES),
        Case("ravel", "out = tl.ravel(x2)", lambda x, y, z: x, DTYPES),
        Case("trans", "out = tl.trans(x2)", lambda x, y, z: _grid(x).T, DTYPES),
        Case(
            "permute",
            "out = tl.permute(tl.reshape(x, 2, 2, 1, 4, 2), 3, 0, 4, 2, 1)",
            lambda x, y, z: x.reshape(2, 2, 1, 4, 2).transpose(3, 0, 4, 2, 1),
            DTYPES,
        ),
        Case("expand_dims", "out = tl.expand_dims(x2, (0, 2))", lambda x, y, z: x.reshape(1, 4, 1, 8), DTYPES),
        Case("squeeze", "out = tl.squeeze(x2[:, None, :], 1)", lambda x, y, z: _grid(x), DTYPES),
        Case("unsqueeze", "out = tl.unsqueeze(x2, 1)", lambda x, y, z: x.reshape(4, 1, 8), DTYPES),
        Case("tensor.__getitem__", "out = x2[None, :, None, :]", lambda x, y, z: x.reshape(1, 4, 1, 8), DTYPES),
        Case(
            "broadcast",
            "a, b = tl.broadcast(x2[:, None, :], tl.reshape(y, 4, 8, 1))\nout = tl.where(a != b, a, b)",
            lambda x, y, z: np.broadcast_to(_grid(x)[:, None, :], (4, 8, 8)),
            DTYPES,
        ),
        Case("broadcast_to", "out = tl.broadcast_to(x[None, :], 4, 32)", lambda x, y, z: np.tile(x, (4, 1)), DTYPES),
        Case(
            "join", "out = tl.join(x2, tl.reshape(y, 4, 8))", lambda x, y, z: np.stack([_grid(x), _grid(y)], -1), DTYPES
        ),
        Case(
            "split",
            "a, b = tl.split(tl.reshape(x, 4, 4, 2))\nout = tl.join(b, a)",
            lambda x, y, z: x.reshape(4, 4, 2)[..., ::-1],
            DTYPES,
        ),
        Case("interleave", "out = tl.interleave(x, y)", lambda x, y, z: np.stack([x, y], -1).reshape(-1), DTYPES),
        Case("cat", "out = tl.cat(x, y, can_reorder=True)", lambda x, y, z: np.concatenate([x, y]), DTYPES),
        Case("cat", "out = tl.cat(x2, x2, dim=1)", lambda x, y, z: np.concatenate([_grid(x)] * 2, 1), DTYPES),
        Case("flip", "out = tl.flip(x2, 0)", lambda x, y, z: _grid(x)[::-1], DTYPES),
        Case("gather", "out = tl.gather(x2, 7 - i2 % 8, 1)", lambda x, y, z: _grid(x)[:, ::-1], DTYPES),
        Case(
            "tensor.item",
            "out = tl.reshape(tl.load(p + 3 + tl.arange(0, 1)), 1, 1).item()",
            lambda x, y, z: x[3],
            DTYPES,
        ),
    ]


def _reductions() -> list[Case]:
    return [
        Case("sum", "out = tl.sum(x2, 1)", lambda x, y, z: _sum(_grid(x), 1), NUMBERS, ulps=8),
        Case("sum", "out = tl.sum(x2, 0, keep_dims=True)", lambda x, y, z: _sum(_grid(x), 0), NUMBERS, ulps=8),
        Case("sum", "out = tl.sum(x2)", lambda x, y, z: _sum(x, 0), NUMBERS, ulps=32),
        Case("max", "out = tl.max(x2, 0)", lambda x, y, z: _grid(x).max(0), NUMBERS),
        Case("min", "out = tl.min(x2, 1)", lambda x, y, z: _grid(x).min(1), NUMBERS),
        Case("max", "out, _ = tl.max(x2, 1, return_indices=True)", lambda x, y, z: _grid(x).max(1), NUMBERS),
        Case(
            "argmax",
            "out = tl.argmax(tl.where(i2 % 8 > 4, tl.max(x), x2), 1)",
            lambda x, y, z: np.where(_grid(x)[:, :5].max(1) == x.max(), _grid(x).argmax(1), 5),
            ORDERED,
        ),
        Case(
            "argmin",
            "out = tl.argmin(tl.where(i2 % 8 > 4, tl.min(x), x2), 1)",
            lambda x, y, z: np.where(_grid(x)[:, :5].min(1) == x.min(), _grid(x).argmin(1), 5),
            ORDERED,
        ),
        Case(
            "argmax",
            "out = tl.argmax(x2, 0, tie_break_left=False)",
            lambda x, y, z: _grid(x).argmax(0),
            ("int32", "int64", "fp32", "fp64"),
        ),
        Case("argmin", "out = tl.argmin(x, 0)", lambda x, y, z: x.argmin(), ORDERED),
        Case("xor_sum", "out = tl.xor_sum(x2, 1)", lambda x, y, z: np.bitwise_xor.reduce(_grid(x), 1), ("int1", *INTS)),
        Case(
            "reduce_or", "out = tl.reduce_or(x2, 0)", lambda x, y, z: np.bitwise_or.reduce(_grid(x), 0), ("int1", *INTS)
        ),
        Case("reduce", "out = tl.reduce(x2, 1, first_of)", lambda x, y, z: _grid(x)[:, 0], DTYPES),
        Case(
            "reduce",
            "a, b = tl.reduce((x2, tl.reshape(y, 4, 8)), 0, larger_pair)\nout = tl.join(a, b)",
            lambda x, y, z: np.stack(
                [_grid(x).max(0), np.take_along_axis(_grid(y), _grid(x).argmax(0)[None], 0)[0]], -1
            ),
            NUMBERS,
        ),
        Case("cumsum", "out = tl.cumsum(x2, 1)", lambda x, y, z: _running(_grid(x), 1), NUMBERS, ulps=16),
        Case(
            "cumsum",
            "out = tl.cumsum(x2, 0, reverse=True)",
            lambda x, y, z: _running(_grid(x)[::-1], 0)[::-1],
            NUMBERS,
            ulps=16,
        ),
        Case(
            "cumprod", "out = tl.cumprod(x2, 1)", lambda x, y, z: _grid(x).cumprod(1, dtype=x.dtype), NUMBERS, ulps=64
        ),
        Case(
            "associative_scan",
            "out = tl.associative_scan(x2, 1, first_of)",
            lambda x, y, z: np.repeat(_grid(x)[:, :1], 8, 1),
            DTYPES,
        ),
        Case(
            "associative_scan",
            "a, b = tl.associative_scan((x2, tl.reshape(y, 4, 8)), 1, larger_pair, reverse=True)\nout = tl.join(a, b)",
            _running_pairs,
            NUMBERS,
        ),
        Case("sort", "out = tl.sort(x2)", lambda x, y, z: np.sort(_grid(x), 1), ORDERED),
        Case("sort", "out = tl.sort(x, descending=True)", lambda x, y, z: np.sort(x)[::-1], ORDERED),
        Case("topk", "out = tl.topk(x2, 4)", lambda x, y, z: np.sort(_grid(x), 1)[:, :3:-1], ORDERED),
        Case(
            "bitonic_merge",
            "out = tl.bitonic_merge(tl.where(i < 16, i, 47 - i).to(D))",
            lambda x, y, z: np.arange(32),
            INTS + FLOATS,
        ),
        Case("histogram", "out = tl.histogram(z, 8)", lambda x, y, z: np.bincount(z.astype(int), minlength=8), INTS),
        Case(
            "histogram",
            "out = tl.histogram(z, 4, mask=i < 20)",
            lambda x, y, z: np.bincount(z[:20].astype(int), minlength=8)[:4],
            INTS,
        ),
    ]


def _sum_type(x: Array) -> "np.dtype[Any]":
    """Integers are summed in 32 bits at least, of the same sign."""
    small = x.dtype.kind in "iu" and x.dtype.itemsize < 4
    return np.dtype(f"{x.dtype.kind}4") if small else x.dtype


def _sum(x: Array, axis: int) -> Array:
    return np.asarray(x.sum(axis, dtype=_sum_type(x)))


def _running(x: Array, axis: int) -> Array:
    return x.cumsum(axis, dtype=_sum_type(x))


def _running_pairs(x: Array, y: Array, z: Array) -> Array:
    a, b = _grid(x).copy(), _grid(y).copy()
    for column in reversed(range(7)):
        keep = a[:, column] <= a[:, column + 1]
        a[keep, column], b[keep, column] = a[keep, column + 1], b[keep, column + 1]
    return np.stack([a, b], -1)


def _dots() -> list[Case]:
    return [
        Case(
            "dot",
            "out = tl.dot(x2, tl.trans(tl.reshape(y, 4, 8)))",
            lambda x, y, z: _grid(_wide(x)) @ _grid(_wide(y)).T,
            ("int8", *SMALL_FLOATS, *FLOATS),
            ulps=16,
        ),
        Case(
            "dot",
            "out = tl.dot(tl.reshape(x, 2, 2, 8), tl.reshape(y, 2, 8, 2))",
            lambda x, y, z: _wide(x).reshape(2, 2, 8) @ _wide(y).reshape(2, 8, 2),
            ("int8", *SMALL_FLOATS, *FLOATS),
            ulps=16,
        ),
        Case("dot_scaled", _SCALED, _scaled, ("fp32",), ulps=64, once=True),
    ]


_SCALED = """a = (i2 % 8 * 5 + tl.arange(0, 4)[:, None] * 3 + 40).to(tl.uint8)
a = tl.reshape(tl.join(tl.join(a, a + 1), tl.join(a + 2, a + 3)), 4, 32)
scale = (tl.arange(0, 4)[:, None] + 126).to(tl.uint8)
out = tl.dot_scaled(a, scale, "e4m3", tl.trans(a), scale, "e4m3")"""


def _scaled(x: Array, y: Array, z: Array) -> Array:
    """Blocks of 32 numbers of e4m3 with a power of two each."""
    first = np.arange(8) * 5 + np.arange(4)[:, None] * 3 + 40
    joined = np.stack([np.stack([first, first + 1], -1), np.stack([first + 2, first + 3], -1)], -1).reshape(4, 32)
    a = torch.from_numpy(joined.astype(np.uint8)).view(torch.float8_e4m3fn).double().numpy()
    a = a * 2.0 ** (np.arange(4)[:, None] - 1)
    return a @ a.T


def _wide(x: Array) -> Array:
    return x.astype(np.int32) if x.dtype.kind in "iu" else x


CASES = [*_shapes(), *_reductions(), *_dots()]
