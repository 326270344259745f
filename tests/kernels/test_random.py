"""``tl.rand`` and its relatives: Philox 4x32-10 (Salmon et al., SC 2011) against one written in Python's integers."""

import math

import pytest
import torch
import triton
import triton.language as tl

_WORD = 0xFFFFFFFF
N = 64


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Four random words."""
    c, k = counter, key
    for _ in range(10):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = ((second >> 32) ^ c[1] ^ k[0], second & _WORD, (first >> 32) ^ c[3] ^ k[1], first & _WORD)
        k = ((k[0] + 0x9E3779B9) & _WORD, (k[1] + 0xBB67AE85) & _WORD)
    return c


def test_the_reference_is_philox() -> None:
    """Known answers of the authors' library, Random123."""
    assert philox((0, 0, 0, 0), (0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    ones = (_WORD,) * 4
    assert philox(ones, (_WORD, _WORD)) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)


@triton.jit
def random_kernel(int_ptr, float_ptr, seed, start, N: tl.constexpr):
    i = tl.arange(0, N)
    a, b, c, d = tl.randint4x(seed, start + i)
    tl.store(int_ptr + i, a.to(tl.int32, bitcast=True))
    tl.store(int_ptr + N + i, b.to(tl.int32, bitcast=True))
    tl.store(int_ptr + 2 * N + i, c.to(tl.int32, bitcast=True))
    tl.store(int_ptr + 3 * N + i, d.to(tl.int32, bitcast=True))
    tl.store(int_ptr + 4 * N + i, tl.randint(seed, start + i).to(tl.int32, bitcast=True))
    u, v, w, x = tl.rand4x(seed, start + i)
    tl.store(float_ptr + i, u)
    tl.store(float_ptr + N + i, v)
    tl.store(float_ptr + 2 * N + i, w)
    tl.store(float_ptr + 3 * N + i, x)
    tl.store(float_ptr + 4 * N + i, tl.rand(seed, start + i))
    tl.store(float_ptr + 5 * N + i, tl.randn(seed, start + i))
    u, v, w, x = tl.randn4x(seed, start + i)
    tl.store(float_ptr + 6 * N + i, u)
    tl.store(float_ptr + 7 * N + i, v)
    tl.store(float_ptr + 8 * N + i, w)
    tl.store(float_ptr + 9 * N + i, x)


def _uniform(word: int) -> float:
    """A word as a number in [0, 1), as Triton's documentation of ``uint_to_uniform_float`` describes it."""
    signed = word - (1 << 32) if word >> 31 else word
    return (-signed - 1 if signed < 0 else signed) * 4.6566127342e-10


def _normal(first: int, second: int) -> tuple[float, float]:
    """Box and Muller's transform."""
    radius = math.sqrt(-2 * math.log(max(_uniform(first), 1e-7)))
    angle = 2 * math.pi * _uniform(second)
    return radius * math.cos(angle), radius * math.sin(angle)


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**31 - 1, 2**40 + 7])
@pytest.mark.parametrize("start", [0, 1000003])
def test_random_numbers(seed: int, start: int) -> None:
    integers, floats = torch.empty(5, N, dtype=torch.int32), torch.empty(10, N)
    random_kernel[(1,)](integers, floats, seed, start, N=N)
    words = [philox((start + i, 0, 0, 0), (seed & _WORD, seed >> 32)) for i in range(N)]
    expected = torch.tensor([[*w, w[0]] for w in words], dtype=torch.int64).t()
    assert torch.equal(integers.long() & _WORD, expected)
    rows = []
    for word in words:
        uniform = [_uniform(x) for x in word]
        rows.append([*uniform, uniform[0], _normal(*word[:2])[0], *_normal(*word[:2]), *_normal(*word[2:])])
    torch.testing.assert_close(floats, torch.tensor(rows).t(), rtol=1e-5, atol=2e-6)


def test_distribution() -> None:
    """Mean and variance of many numbers: a wrong sign or scale would show."""
    integers, floats = torch.empty(5, 1 << 14, dtype=torch.int32), torch.empty(10, 1 << 14)
    random_kernel[(1,)](integers, floats, 7, 0, N=1 << 14)
    assert (floats[4].mean() - 0.5).abs() < 0.02
    assert floats[4].min() >= 0
    assert floats[4].max() < 1
    assert (floats[5].std() - 1).abs() < 0.05
    assert floats[5].mean().abs() < 0.05
