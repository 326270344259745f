"""Cases of random numbers, against Philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011)."""

import numpy as np
from tests.coverage.cases import Case
from tests.coverage.values import Array

_SEED = 12345678901234


def _philox(rounds: int = 10) -> list[Array]:
    """Four words for each of the counters 0 to 31."""
    c = [np.arange(32, dtype=np.uint64), *(np.zeros(32, np.uint64) for _ in range(3))]
    k = [np.uint64(_SEED & 0xFFFFFFFF), np.uint64(_SEED >> 32)]
    low = np.uint64(0xFFFFFFFF)
    for _ in range(rounds):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [(b >> np.uint64(32)) ^ c[1] ^ k[0], b & low, (a >> np.uint64(32)) ^ c[3] ^ k[1], a & low]
        k = [(k[0] + np.uint64(0x9E3779B9)) & low, (k[1] + np.uint64(0xBB67AE85)) & low]
    return [word.astype(np.uint32) for word in c]


def _uniform(word: Array) -> Array:
    signed = word.view(np.int32).astype(np.int64)
    return np.where(signed < 0, -signed - 1, signed) * 4.6566127342e-10


def _normal(first: Array, second: Array) -> "tuple[Array, Array]":
    radius = np.sqrt(-2 * np.log(np.maximum(1e-7, first)))
    return radius * np.cos(2 * np.pi * second), radius * np.sin(2 * np.pi * second)


def _case(name: str, code: str, reference: "Array", ulps: float = 8) -> Case:
    return Case(name, code, lambda x, y, z: reference, ("fp32",), ulps, once=True)


def _cases() -> list[Case]:
    words = _philox()
    uniform = [_uniform(word) for word in words]
    four = "out = tl.join(tl.join(a, b), tl.join(c, d))"
    stacked = np.stack([np.stack(uniform[:2], -1), np.stack(uniform[2:], -1)], -1)
    stacked_words = np.stack([np.stack(words[:2], -1), np.stack(words[2:], -1)], -1)
    normal = [*_normal(*uniform[:2]), *_normal(*uniform[2:])]
    stacked_normal = np.stack([np.stack(normal[:2], -1), np.stack(normal[2:], -1)], -1)
    seed = f"k = tl.to_tensor({_SEED})\n"
    halves = "lo, hi = (k & 0xffffffff).to(tl.uint32), (k >> 32).to(tl.uint32)\no = i.to(tl.uint32)\nn = o * 0\n"
    return [
        _case("rand", f"out = tl.rand({_SEED}, i)", uniform[0]),
        _case("randn", f"out = tl.randn({_SEED}, i)", normal[0], ulps=64),
        _case("randint", f"out = tl.randint({_SEED}, i)", words[0]),
        _case("rand4x", f"a, b, c, d = tl.rand4x({_SEED}, i)\n{four}", stacked),
        _case("randn4x", f"a, b, c, d = tl.randn4x({_SEED}, i)\n{four}", stacked_normal, ulps=64),
        _case("randint4x", f"a, b, c, d = tl.randint4x({_SEED}, i)\n{four}", stacked_words),
        _case(
            "philox",
            seed + f"o = i.to(tl.uint32)\na, b, c, d = tl.philox(k, o, o * 0, o * 0, o * 0)\n{four}",
            stacked_words,
        ),
        _case("philox_impl", seed + halves + f"a, b, c, d = tl.philox_impl(o, n, n, n, lo, hi)\n{four}", stacked_words),
        _case("uint_to_uniform_float", f"out = tl.uint_to_uniform_float(tl.randint({_SEED}, i))", uniform[0]),
        _case(
            "pair_uniform_to_normal",
            f"a, b, c, d = tl.rand4x({_SEED}, i)\na, b = tl.pair_uniform_to_normal(a, b)\nout = tl.join(a, b)",
            np.stack(normal[:2], -1),
            ulps=64,
        ),
    ]


CASES = _cases()
