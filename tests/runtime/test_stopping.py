"""Programs in checked mode: a kernel may touch the values it was given, not the arena around them."""

from collections.abc import Iterator

import pytest
import torch
from program_specs import Builder

from tilewright import settings
from tilewright.codegen.cpu import launch
from tilewright.codegen.cpu.build import build
from tilewright.errors import MemoryViolation
from tilewright.ir.kernels import KernelSource
from tilewright.ir.program import KernelStep, Pointer, ReadTokens, Scalar, Storage, View
from tilewright.ir.sizes import BATCH, SEQ, TOKENS
from tilewright.runtime.program import Program

TEXT = """import triton
import triton.language as tl


@triton.jit
def shift_kernel(x_ptr, out_ptr, shift_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    shift = tl.load(shift_ptr)
    tl.store(out_ptr + i, tl.load(x_ptr + shift + i, mask=i < n, other=0.0), mask=i < n)
"""
SIGNATURE = (("x_ptr", "*fp32"), ("out_ptr", "*fp32"), ("shift_ptr", "*i64"), ("n", "i32"))
SHIFT = KernelSource("shift", TEXT, "shift_kernel", SIGNATURE, (("BLOCK", 32),))


@pytest.fixture(autouse=True)
def checked() -> Iterator[None]:
    with settings.scope(check=True):
        yield


def shift(b: Builder, x: View, out: View, by: View) -> None:
    """out[i] = x[i + by], with programs of 32 elements."""
    n = x.shape[0] * 8
    arguments = (Pointer(x), Pointer(out), Pointer(by), Scalar(n))
    grid = ((n + 31) // 32, 1, 1)
    b.steps.append(KernelStep(SHIFT, arguments, grid, (x.value, by.value), (out.value,), ("shift",)))


def program() -> Program:
    """x [B, 8] goes through two values of the arena and a weight's shift to an output, with a shift at each step."""
    b = Builder((BATCH,))
    x = b.value(Storage.INPUT, (BATCH, 8))
    shifts = [b.value(Storage.INPUT, (1,), torch.int64) for _ in range(3)]
    rows = [b.value(Storage.ARENA, (BATCH, 8)) for _ in range(2)]
    out = b.value(Storage.OUTPUT, (BATCH, 8))
    for source, target, by in zip([x, *rows], [*rows, out], shifts, strict=True):
        shift(b, source, target, by)
    return Program(b.spec([(BATCH, 0, 0)], [out]), {SHIFT: build(SHIFT)}, launch.launcher())


@pytest.mark.parametrize("profiled", [False, True])
def test_each_value_has_its_own_memory(profiled: bool) -> None:
    run = program()
    call = run.profile if profiled else run
    for batch in (1, 5, 100):
        x = torch.randn(batch, 8)
        good = [torch.zeros(1, dtype=torch.int64) for _ in range(3)]
        assert torch.equal(run(x, *good)[0], x)
        for step, by in ((0, 1), (0, -1), (1, 1), (1, -1), (2, 1), (2, -1)):
            bad = [torch.full((1,), by if number == step else 0) for number in range(3)]
            with pytest.raises(MemoryViolation, match="'x_ptr' \\(value 'v") as caught:
                call(x, *bad)
            assert caught.value.kernel == "shift_kernel"
            assert caught.value.program == ((batch * 8 - 1) // 32 if by > 0 else 0, 0, 0)
            assert f"value '{('v0', 'v4', 'v5')[step]}'" in str(caught.value)
        assert torch.equal(run(x, *good)[0], x)


def test_weights_and_values_of_an_earlier_phase() -> None:
    b = Builder((BATCH, SEQ, TOKENS))
    x = b.value(Storage.INPUT, (BATCH, SEQ))
    by, zero = b.value(Storage.INPUT, (1,), torch.int64), b.weight(torch.zeros(1, dtype=torch.int64))
    weight = b.weight(torch.arange(16.0).reshape(2, 8))
    early = b.value(Storage.ARENA, (2, 8))
    tokens = b.value(Storage.ARENA, (1,), torch.int32)
    out = b.value(Storage.OUTPUT, (2, 8))
    shift(b, weight, early, zero)
    b.eager(lambda x, sizes: (torch.ones(1, dtype=torch.int32),), [x], [tokens])
    b.steps.append(ReadTokens(tokens, TOKENS, BATCH * SEQ, (tokens.value,)))
    shift(b, early, out, by)
    run = Program(b.spec([(BATCH, 0, 0), (SEQ, 0, 1)], [out]), {SHIFT: build(SHIFT)}, launch.launcher())
    x_given = torch.zeros(2, 3)
    assert torch.equal(run(x_given, torch.zeros(1, dtype=torch.int64))[0].flatten(), torch.arange(16.0))
    with pytest.raises(MemoryViolation, match="value 'v4'"):
        run(x_given, torch.ones(1, dtype=torch.int64))


def test_a_kernel_is_built_once_for_each_mode() -> None:
    with settings.scope(check=False):
        plain = build(SHIFT)
    checked = build(SHIFT)
    assert (plain.stops, checked.stops) == (False, True)
    assert plain.address != checked.address
    assert build(SHIFT).address == checked.address
