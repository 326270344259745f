"""Cases of loads, stores, atomics, block pointers, descriptors, random numbers and control flow."""

from collections.abc import Callable

import numpy as np
from tests.coverage.cases import Case, Reference
from tests.coverage.values import DTYPES, FLOATS, NOT_BOOL, Array

ATOMIC_INTS = ("int32", "int64", "uint32", "uint64")
Combine = Callable[[Array, Array], Array]
UP_TO_32_BITS = tuple(dtype for dtype in NOT_BOOL if not dtype.endswith("64"))
DESCRIPTOR_INTS = ("int32", "uint32", "uint64")


def _grid(x: Array) -> Array:
    return x.reshape(4, 8)


def _accesses() -> list[Case]:
    return [
        Case(
            "load",
            "out = tl.load(p + i, mask=i < 20, other=y)",
            lambda x, y, z: np.where(np.arange(32) < 20, x, y),
            DTYPES,
        ),
        Case(
            "load",
            'out = tl.load(p + i * 7 % 32, cache_modifier=".cg", eviction_policy="evict_last", volatile=True)',
            lambda x, y, z: x[np.arange(32) * 7 % 32],
            DTYPES,
        ),
        Case("load", "out = tl.load(p + 5)", lambda x, y, z: x[5], DTYPES),
        Case(
            "store",
            'tl.store(mem + 31 - i, x, mask=i < 20, cache_modifier=".wb", eviction_policy="evict_first")\nout = x',
            _stored,
            DTYPES,
        ),
        Case(
            "store",
            "tl.store(mem + 3, tl.load(p))\nout = x",
            lambda x, y, z: (x, np.concatenate([y[:3], x[:1], y[4:]])),
            DTYPES,
        ),
        Case("tensor.store", "(mem + i).store(x)\nout = x", lambda x, y, z: (x, x), DTYPES),
        Case("make_block_ptr", _BLOCK_LOAD, lambda x, y, z: np.pad(_grid(x)[:, 6:], ((0, 0), (0, 2))), NOT_BOOL),
        Case(
            "advance",
            "b = tl.make_block_ptr(p, (4, 8), (8, 1), (0, 0), (2, 8), (1, 0))\nout = tl.load(tl.advance(b, (2, 0)))",
            lambda x, y, z: _grid(x)[2:],
            DTYPES,
        ),
        Case("make_block_ptr", _BLOCK_STORE, lambda x, y, z: (x, np.concatenate([y[:24], x[:8]])), NOT_BOOL),
    ]


_BLOCK_LOAD = """b = tl.make_block_ptr(p, (4, 8), (8, 1), (0, 6), (4, 4), (1, 0))
out = tl.load(b, boundary_check=(0, 1), padding_option="zero")"""
_BLOCK_STORE = """b = tl.make_block_ptr(mem, (4, 8), (8, 1), (3, 0), (4, 8), (1, 0))
tl.store(b, x2, boundary_check=(0,))
out = x"""


def _stored(x: Array, y: Array, z: Array) -> "tuple[Array, Array]":
    return x, np.concatenate([y[:12], x[:20][::-1]])


_DESCRIPTOR = """d = tl.make_tensor_descriptor({0}, (4, 8), (8, 1), ({1}, {2}))
"""


def _descriptors() -> list[Case]:
    """The block is 16 bytes wide at least, so 16 elements of a byte; there are 8 columns."""
    load = _DESCRIPTOR.format("p", "2", "16")
    store = _DESCRIPTOR.format("mem", "2", "16")
    value = "v = tl.reshape(tl.load(p + i), 2, 16)\n"

    def atomic(name: str, function: Combine, dtypes: tuple[str, ...]) -> Case:
        return Case(
            f"tensor_descriptor.{name}",
            store + value + f"d.{name}([3, -4], v)\nout = x",
            lambda x, y, z: (x, _combined(function, x, y)),
            dtypes,
        )

    return [
        Case("make_tensor_descriptor", load + "out = d.load([3, -4])", lambda x, y, z: _window(x), NOT_BOOL),
        Case(
            "tensor_descriptor.load",
            load + "out = d.load([0, 4])",
            lambda x, y, z: np.pad(_grid(x)[:2, 4:], ((0, 0), (0, 12))),
            NOT_BOOL,
        ),
        Case(
            "load_tensor_descriptor",
            load + "out = tl.load_tensor_descriptor(d, [3, -4])",
            lambda x, y, z: _window(x),
            NOT_BOOL,
        ),
        Case(
            "tensor_descriptor.store",
            store + value + "d.store([3, -4], v)\nout = x",
            lambda x, y, z: (x, np.concatenate([y[:24], x[4:12]])),
            NOT_BOOL,
        ),
        Case(
            "store_tensor_descriptor",
            store + value + "tl.store_tensor_descriptor(d, [3, -4], v)\nout = x",
            lambda x, y, z: (x, np.concatenate([y[:24], x[4:12]])),
            NOT_BOOL,
        ),
        Case(
            "tensor_descriptor.gather",
            _DESCRIPTOR.format("p", "1", "32") + "out = d.gather(tl.arange(0, 8) * 3 % 5, 4)",
            lambda x, y, z: _gathered(x),
            UP_TO_32_BITS,
        ),
        Case(
            "tensor_descriptor.scatter",
            _DESCRIPTOR.format("mem", "1", "32")
            + "d.scatter(tl.broadcast_to(x[None, :], 8, 32), tl.arange(0, 8) // 4 * 2, 4)\nout = x",
            lambda x, y, z: (x, _scattered(x, y)),
            UP_TO_32_BITS,
        ),
        atomic("atomic_add", np.add, (*DESCRIPTOR_INTS, "fp32", "fp16", "bf16")),
        atomic("atomic_min", np.minimum, (*DESCRIPTOR_INTS, "int64")),
        atomic("atomic_max", np.maximum, (*DESCRIPTOR_INTS, "int64")),
        atomic("atomic_and", np.bitwise_and, (*DESCRIPTOR_INTS, "int64")),
        atomic("atomic_or", np.bitwise_or, (*DESCRIPTOR_INTS, "int64")),
        atomic("atomic_xor", np.bitwise_xor, (*DESCRIPTOR_INTS, "int64")),
    ]


def _window(x: Array) -> Array:
    """The block at (3, -4) of a descriptor of 4 x 8."""
    out = np.zeros((2, 16), x.dtype)
    out[0, 4:12] = x[24:]
    return out


def _combined(function: Combine, x: Array, y: Array) -> Array:
    out = y.copy()
    out[24:] = function(y[24:], x[4:12])
    return out


def _gathered(x: Array) -> Array:
    out = np.zeros((8, 32), x.dtype)
    for row, source in enumerate(np.arange(8) * 3 % 5):
        if source < 4:
            out[row, :4] = _grid(x)[source, 4:]
    return out


def _scattered(x: Array, y: Array) -> Array:
    out = _grid(y).copy()
    out[0, 4:] = out[2, 4:] = x[:4]
    return out.reshape(-1)


def _atomics() -> list[Case]:
    """Every address four times; then every address once, with the old values."""
    cases = []
    for name, function, dtypes in (
        ("atomic_add", np.add, (*ATOMIC_INTS, *FLOATS)),
        ("atomic_max", np.maximum, (*ATOMIC_INTS, "fp32", "fp64")),
        ("atomic_min", np.minimum, (*ATOMIC_INTS, "fp32", "fp64")),
        ("atomic_and", np.bitwise_and, ATOMIC_INTS),
        ("atomic_or", np.bitwise_or, ATOMIC_INTS),
        ("atomic_xor", np.bitwise_xor, ATOMIC_INTS),
        ("atomic_and", _on_bits(np.bitwise_and, "f4"), ("fp32",)),
        ("atomic_or", _on_bits(np.bitwise_or, "f8"), ("fp64",)),
        ("atomic_xor", _on_bits(np.bitwise_xor, "f4"), ("fp32",)),
        ("atomic_and", _on_bits(np.bitwise_and, "f8"), ("fp64",)),
        ("atomic_or", _on_bits(np.bitwise_or, "f4"), ("fp32",)),
        ("atomic_xor", _on_bits(np.bitwise_xor, "f8"), ("fp64",)),
        ("atomic_xchg", lambda old, new: new, (*ATOMIC_INTS, "fp32", "fp64")),
    ):
        once = f"out = tl.{name}(mem + i, x, mask=i < 20, sem='relaxed', scope='cta')\nout = tl.where(i < 20, out, x)"
        cases.append(Case(name, once, _atomic_once(function), dtypes))
        if dtypes[0] in FLOATS and name in ("atomic_and", "atomic_or", "atomic_xor"):
            continue  # bits of floats combined again and again become NaN, whose bits numpy does not keep
        many = f"tl.{name}(mem + i % 8, x)\nout = x"
        cases.append(Case(name, many, _atomic_many(function), dtypes, ulps=16))
        scalar = f"out = tl.{name}(mem + 1, tl.load(p + 2), sem='acquire')"
        cases.append(Case(name, scalar, _atomic_scalar(function), dtypes))
    cas = ("int16", "uint16", *ATOMIC_INTS, *FLOATS)
    cases.append(
        Case(
            "atomic_cas",
            "out = tl.atomic_cas(mem + i, tl.where(i % 2 == 0, y, x), x)",
            lambda x, y, z: (y, np.where((np.arange(32) % 2 == 0) | (x == y), x, y)),
            cas,
        )
    )
    cases.append(
        Case(
            "atomic_cas",
            "out = tl.atomic_cas(mem, tl.load(p), tl.load(p + 1), sem='release')",
            lambda x, y, z: (y[0], np.concatenate([np.where(x[0] == y[0], x[1:2], y[:1]), y[1:]])),
            cas,
        )
    )
    return cases


def _on_bits(function: Combine, kind: str) -> Combine:
    """Logic on the bits of floats, given and returned as fp64."""

    def combine(a: Array, b: Array) -> Array:
        patterns = [np.asarray(v, dtype=kind).view(f"u{kind[1]}") for v in (a, b)]
        return function(*patterns).view(kind).astype(np.float64)

    return combine


def _atomic_once(function: Combine) -> Reference:
    def reference(x: Array, y: Array, z: Array) -> tuple[Array, Array]:
        mem = y.copy()
        mem[:20] = function(y[:20], x[:20])
        return np.where(np.arange(32) < 20, y, x), mem

    return reference


def _atomic_many(function: Combine) -> Reference:
    def reference(x: Array, y: Array, z: Array) -> tuple[Array, Array]:
        mem = y.copy()
        for number in range(32):
            mem[number % 8] = function(mem[number % 8], x[number])
        return x, mem

    return reference


def _atomic_scalar(function: Combine) -> Reference:
    def reference(x: Array, y: Array, z: Array) -> tuple[Array, Array]:
        mem = y.copy()
        mem[1] = function(y[1], x[2])
        return y[1], mem

    return reference


def _hints() -> list[Case]:
    """Hints and compile-time functions: what matters is that they change nothing."""
    return [
        Case("multiple_of", "out = tl.load(p + tl.multiple_of(i, 32))", lambda x, y, z: x, ("int32",), once=True),
        Case("max_contiguous", "out = tl.load(p + tl.max_contiguous(i, 32))", lambda x, y, z: x, ("int32",), once=True),
        Case(
            "max_constancy",
            "out = tl.load(p + tl.max_constancy(i * 0, 32))",
            lambda x, y, z: np.repeat(x[:1], 32),
            ("int32",),
            once=True,
        ),
        Case("assume", "tl.assume(tl.program_id(0) >= 0)\nout = x", lambda x, y, z: x, ("int32",), once=True),
        Case("debug_barrier", "tl.debug_barrier()\nout = x", lambda x, y, z: x, ("int32",), once=True),
        Case("static_assert", "tl.static_assert(D == tl.int32)\nout = x", lambda x, y, z: x, ("int32",), once=True),
        Case("static_print", 'tl.static_print("tilewright", D)\nout = x', lambda x, y, z: x, ("int32",), once=True),
        Case("device_assert", "tl.device_assert(x != y)\nout = x", lambda x, y, z: x, ("int32",), once=True),
        Case(
            "static_range",
            "out = x\nfor k in tl.static_range(1, 4):\n    out += k",
            lambda x, y, z: x + 6,
            ("int32",),
            once=True,
        ),
        Case(
            "range",
            "out = x\nfor k in tl.range(3, 0, -1, num_stages=3, loop_unroll_factor=2, flatten=True, "
            "warp_specialize=True, disable_licm=True):\n    out = out * 2 + k",
            lambda x, y, z: ((x * 2 + 3) * 2 + 2) * 2 + 1,
            ("int32",),
            once=True,
        ),
        Case(
            "condition",
            "out = x\nk = tl.program_id(0)\nwhile tl.condition(k < 3, disable_licm=True):\n    out += k\n    k += 1",
            lambda x, y, z: x + 3,
            ("int32",),
            once=True,
        ),
        Case(
            "program_id",
            "out = x + tl.program_id(0) + tl.program_id(1) + tl.program_id(2)",
            lambda x, y, z: x,
            ("int32",),
            once=True,
        ),
        Case(
            "num_programs",
            "out = x + tl.num_programs(0) + tl.num_programs(1) + tl.num_programs(2)",
            lambda x, y, z: x + 3,
            ("int32",),
            once=True,
        ),
        Case("to_tensor", "out = x + tl.to_tensor(5)", lambda x, y, z: x + 5, ("int32",), once=True),
        Case("cast", "out = tl.cast(x, tl.int16)", lambda x, y, z: x.astype("int16"), ("int32",), once=True),
        Case("device_print", 'tl.device_print("x", tl.load(p))\nout = x', lambda x, y, z: x, ("int32",), once=True),
        Case("tuple", "a = tl.tuple((x, y))\nout = a[0] + a[1]", lambda x, y, z: x + y, ("int32",), once=True),
        Case("constexpr", "K: tl.constexpr = 4\nout = x + K", lambda x, y, z: x + 4, ("int32",), once=True),
        Case(
            "target_info",
            "if tl.target_info.is_cuda():\n    out = y\nelse:\n    out = x",
            lambda x, y, z: x,
            ("int32",),
            once=True,
        ),
    ]


CASES = [*_accesses(), *_descriptors(), *_atomics(), *_hints()]
