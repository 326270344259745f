"""``libdevice``'s rounding modes and conversions against exact fractions."""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np
import pytest
import torch
from tests.kernels.libdevice_kernels import INF, N, cast_kernel, numbers, run
from torch import Tensor

ROUND: dict[str, Callable[[Tensor], Tensor]] = {"rn": torch.round, "rz": torch.trunc, "rd": torch.floor}
ROUND["ru"] = torch.ceil
RANGES = {"int": (-(2**31), 2**31 - 1), "uint": (0, 2**32 - 1), "ll": (-(2**63), 2**63 - 1), "ull": (0, 2**64 - 1)}


@pytest.mark.parametrize("source", ["float", "double"])
@pytest.mark.parametrize("kind", RANGES)
def test_floats_to_integers(source: str, kind: str) -> None:
    """Rounded as asked for, saturated at both ends, and the GPU's values for NaN."""
    dtype = torch.float32 if source == "float" else torch.float64
    low, high = RANGES[kind]
    x = torch.cat(
        [numbers(dtype, 100.0)[:16], torch.tensor([1e10, -1e10, 1e25, -1e25, 2.0**31, 2.0**63] * 3)[:16].to(dtype)]
    )
    out = torch.empty(4, N, dtype=torch.int64 if "ll" in kind else torch.int32)
    cast_kernel[(1,)](x, out, NAMES=tuple(f"{source}2{kind}_{mode}" for mode in ROUND), N=N)
    bits = 64 if "ll" in kind else 32
    nan = 0 if source == "float" and bits == 32 else 1 << (bits - 1)
    for row, function in zip(out.tolist(), ROUND.values(), strict=True):
        for got, value in zip(row, function(x).tolist(), strict=True):
            exact = nan if math.isnan(value) else max(low, min(high, value if math.isinf(value) else int(value)))
            exact = {INF: high, -INF: low}.get(exact, exact)
            assert got % (1 << bits) == int(exact) % (1 << bits), (value, got, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_to_long_integers(dtype: torch.dtype) -> None:
    x = numbers(dtype, 1e5).nan_to_num(0, 0, 0)
    out = torch.empty(2, N, dtype=torch.int64)
    cast_kernel[(1,)](x, out, NAMES=("llrint", "llround"), N=N)
    assert torch.equal(out[0], x.round().long())
    assert torch.equal(out[1], (x.double().sign() * (x.double().abs() + 0.5).floor()).long())


def _rounded(value: Fraction, mode: str, kind: type[np.floating]) -> float:
    """The exact value rounded by search from a number near it."""
    top = Fraction(float(np.finfo(kind).max))
    near = kind(float(max(-top, min(top, value))))
    while Fraction(float(near)) > value:
        near = np.nextafter(near, kind(-INF))
        if np.isinf(near):
            break
    down = near  # the largest number that is at most the value
    if not np.isinf(down):
        while np.isfinite(up := np.nextafter(down, kind(INF))) and Fraction(float(up)) <= value:
            down = up
    if not np.isinf(down) and Fraction(float(down)) == value:
        return float(down)
    toward = {
        "rd": down,
        "ru": np.nextafter(down, kind(INF)),
        "rz": down if value > 0 else np.nextafter(down, kind(INF)),
    }
    return float(toward[mode])


def _exact(name: str, operands: Sequence[float]) -> Fraction | None:
    parts = [Fraction(v) for v in operands]
    if name == "add":
        return parts[0] + parts[1]
    if name == "sub":
        return parts[0] - parts[1]
    if name == "mul":
        return parts[0] * parts[1]
    if name == "div":
        return parts[0] / parts[1]
    if name == "rcp":
        return 1 / parts[0]
    if name == "fma":
        return parts[0] * parts[1] + parts[2]
    return parts[0]


@pytest.mark.parametrize("mode", ["rz", "ru", "rd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_directed_rounding(dtype: torch.dtype, mode: str) -> None:
    kind = np.float32 if dtype == torch.float32 else np.float64
    scale = 10.0 ** (torch.rand(3, N, dtype=torch.float64) * 16 - 8)
    x, y, z = (torch.randn(3, N, dtype=torch.float64) * scale).to(dtype)
    # Results that are subnormal, overflow, or are exact.
    x[:4], y[:4] = (
        torch.tensor([1e-30, 3e38, 1.5, 1.0], dtype=dtype),
        torch.tensor([1e-12, 3e38, 2.0, 3.0], dtype=dtype),
    )
    if dtype == torch.float64:
        x[:2], y[:2] = torch.tensor([1e-300, 1.7e308], dtype=dtype), torch.tensor([1e-20, 1.7e308], dtype=dtype)
    for names, operands in ((("rcp",), (x,)), (("add", "sub", "mul", "div"), (x, y)), (("fma",), (x, y, z))):
        out = run([f"{name}_{mode}" for name in names], *operands)
        for name, row in zip(names, out.tolist(), strict=True):
            values = zip(*(t.tolist() for t in operands), strict=True)
            assert row == [_rounded(_exact(name, v), mode, kind) for v in values], name
    root = run([f"sqrt_{mode}"], x.abs())[0]
    for value, got in zip(x.abs().tolist(), root.tolist(), strict=True):
        other = float(np.nextafter(kind(got), kind(INF if mode != "ru" else -INF)))
        assert (Fraction(got) ** 2 <= Fraction(value)) == (mode != "ru") or Fraction(got) ** 2 == value
        assert (Fraction(other) ** 2 > Fraction(value)) == (mode != "ru")


INTEGERS = [0, 1, -1, 2**31 - 1, -(2**31), 16777217, 33554433, -16777217, 2147483583]
LONG_INTEGERS = [*INTEGERS, 2**63 - 1, -(2**63), 2**53 + 1, -(2**53) - 1, 2**62 + 2**38 + 1, 2**40 + 1]


@pytest.mark.parametrize("kind", ["int", "uint", "ll", "ull"])
@pytest.mark.parametrize("mode", ["rn", "rz", "ru", "rd"])
def test_integers_to_floats(kind: str, mode: str) -> None:
    long = "ll" in kind
    bits = 64 if long else 32
    x = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1, (N,), dtype=torch.int64 if long else torch.int32)
    special = LONG_INTEGERS if long else INTEGERS
    x[: len(special)] = torch.tensor(special)
    names = [f"{kind}2float_{mode}"] + ([f"{kind}2double_{mode}"] if long or mode == "rn" else [])
    out = torch.empty(len(names), N, dtype=torch.float64)
    cast_kernel[(1,)](x, out, NAMES=tuple(names), N=N, UNSIGNED=bits if kind.startswith("u") else 0)
    for row, float_kind in zip(out.tolist(), (np.float32, np.float64), strict=False):
        for value, got in zip(x.tolist(), row, strict=True):
            number = value % (1 << bits) if kind.startswith("u") else value
            if mode == "rn":
                up, down = (_rounded(Fraction(number), m, float_kind) for m in ("ru", "rd"))
                nearest = min(abs(Fraction(v) - number) for v in (up, down))
                assert abs(Fraction(got) - number) == nearest, (number, got)
            else:
                assert got == _rounded(Fraction(number), mode, float_kind), (number, got)


@pytest.mark.parametrize("mode", ["rn", "rz", "ru", "rd"])
def test_double_to_float(mode: str) -> None:
    x = torch.randn(N, dtype=torch.float64) * 10.0 ** (torch.rand(N, dtype=torch.float64) * 80 - 42)
    out = torch.empty(1, N)
    cast_kernel[(1,)](x, out, NAMES=(f"double2float_{mode}",), N=N)
    if mode == "rn":
        assert torch.equal(out[0], x.float())
    else:
        assert out[0].tolist() == [_rounded(Fraction(v), mode, np.float32) for v in x.tolist()]
