"""Checked mode: accesses outside of a tensor's storage, by one element, stop the kernel before they happen."""

import os
import pickle
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

import tilewright
from tilewright import settings
from tilewright.errors import InputError, KernelStopped, MemoryViolation


def inside(count: int, dtype: torch.dtype = torch.float32, pad: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor whose storage is a piece of a larger block, and the block, to see that nothing else was written."""
    size = dtype.itemsize
    block = np.full((count + 2 * pad) * size, 0x2A, dtype=np.uint8)
    middle = memoryview(block)[pad * size : (pad + count) * size]
    piece = torch.frombuffer(middle, dtype=dtype) if count else torch.empty(0, dtype=dtype)
    assert piece.untyped_storage().nbytes() == count * size
    return piece, torch.from_numpy(block)


def untouched(block: torch.Tensor, piece: torch.Tensor, pad: int = 64) -> bool:
    edge = pad * piece.itemsize
    return bool((block[:edge] == 0x2A).all() and (block[-edge:] == 0x2A).all())


@triton.jit
def copy_kernel(x_ptr, out_ptr, x_first, out_first, n, stride, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if MASKED:
        value = tl.load(x_ptr + x_first + i * stride, mask=i < n, other=0)
        tl.store(out_ptr + out_first + i * stride, value, mask=i < n)
    else:
        tl.store(out_ptr + out_first + i * stride, tl.load(x_ptr + x_first + i * stride))


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8, torch.float64])
def test_vectors(masked: bool, stride: int, dtype: torch.dtype) -> None:
    n, options = 64, {"BLOCK": 64, "MASKED": masked}
    count = (n - 1) * stride + 1
    (x, _), (out, block) = inside(count, dtype), inside(count, dtype)
    x.copy_(torch.randint(-9, 9, (count,)))
    copy_kernel[(1,)](x, out, 0, 0, n, stride, **options)
    assert torch.equal(out[::stride], x[::stride])
    for x_first, out_first, name, side in (
        (-1, 0, "x_ptr", "before the first"), (1, 0, "x_ptr", "after the last"),
        (0, -1, "out_ptr", "before the first"), (0, 1, "out_ptr", "after the last"),
    ):  # fmt: skip
        with pytest.raises(MemoryViolation, match=rf"1 element .* {side} element of '{name}'") as caught:
            copy_kernel[(1,)](x, out, x_first, out_first, n, stride, **options)
        tensor = x if name == "x_ptr" else out
        edge = tensor.data_ptr() - x.itemsize if "before" in side else tensor.data_ptr() + count * x.itemsize
        assert (caught.value.address, caught.value.nbytes) == (edge, x.itemsize)
        assert caught.value.kind == ("load" if name == "x_ptr" else "store")
        assert untouched(block, out)
    copy_kernel[(1,)](x, out, 0, 0, n, stride, **options)


@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 100, 127])
def test_lanes_that_a_mask_switches_off_are_free_to_point_anywhere(n: int) -> None:
    (x, _), (out, block) = inside(n), inside(n)
    x.normal_()
    copy_kernel[(2,)](x, out, 0, 0, n, 1, BLOCK=64, MASKED=True)
    assert torch.equal(out, x)
    with pytest.raises(MemoryViolation) as caught:
        copy_kernel[(2,)](x, out, 0, 0, n + 1, 1, BLOCK=64, MASKED=True)
    assert caught.value.program == (n // 64, 0, 0)
    assert untouched(block, out)


def test_the_storage_counts_and_not_the_view() -> None:
    whole = torch.randn(100)
    out = torch.empty(66)
    copy_kernel[(1,)](whole[20:30], out, -20, 0, 64, 1, BLOCK=64, MASKED=True)
    copy_kernel[(1,)](whole[36:], out, 0, 2, 64, 1, BLOCK=64, MASKED=True)
    with pytest.raises(MemoryViolation, match="at element 20 of its storage"):
        copy_kernel[(1,)](whole[20:30], out, -21, 0, 64, 1, BLOCK=64, MASKED=True)


def test_a_pointer_may_not_leave_its_own_argument_for_another() -> None:
    whole = torch.zeros(256)
    x, out = torch.randn(64), torch.empty(64)
    distance = (out.data_ptr() - x.data_ptr()) // 4
    with pytest.raises(MemoryViolation, match="the address is inside of 'out_ptr'"):
        copy_kernel[(1,)](x, out, distance, 0, 64, 1, BLOCK=64, MASKED=True)
    copy_kernel[(1,)](whole[:64], whole[64:], 0, 0, 64, 1, BLOCK=64, MASKED=True)


@triton.jit
def indexed_kernel(x_ptr, index_ptr, out_ptr, n, BLOCK: tl.constexpr, SCATTER: tl.constexpr):
    i = tl.arange(0, BLOCK)
    at = tl.load(index_ptr + i, mask=i < n, other=1 << 40)
    if SCATTER:
        tl.store(out_ptr + at, tl.load(x_ptr + i, mask=i < n), mask=i < n)
    else:
        tl.store(out_ptr + i, tl.load(x_ptr + at, mask=i < n), mask=i < n)


@pytest.mark.parametrize("scatter", [False, True])
@pytest.mark.parametrize("lane", [0, 7, 16, 49])
def test_gather_and_scatter(scatter: bool, lane: int) -> None:
    n = 50
    (x, x_block), (out, out_block) = inside(n), inside(n)
    x.normal_()
    index = torch.randperm(n)
    indexed_kernel[(1,)](x, index, out, n, BLOCK=64, SCATTER=scatter)
    assert torch.equal(out[index] if scatter else out, x if scatter else x[index])
    moved = out if scatter else x
    for bad in (-1, n, 2**40, -(2**40)):
        index[lane] = bad
        with pytest.raises(MemoryViolation) as caught:
            indexed_kernel[(1,)](x, index, out, n, BLOCK=64, SCATTER=scatter)
        assert caught.value.address == moved.data_ptr() + 4 * bad
    assert untouched(x_block, x)
    assert untouched(out_block, out)


@triton.jit
def scalar_kernel(x_ptr, out_ptr, i, j, go):
    value = tl.load(x_ptr + i, mask=go, other=5.0)
    if go:
        tl.store(out_ptr + j, value + 1)


def test_scalars() -> None:
    x, out = torch.ones(1), torch.zeros(1)
    scalar_kernel[(1,)](x, out, 0, 0, True)
    assert out.item() == 2
    scalar_kernel[(1,)](x, out, 10**6, -(10**6), False)
    for i, j in ((1, 0), (-1, 0), (0, 1), (0, -1)):
        with pytest.raises(MemoryViolation, match="'x_ptr'" if i else "'out_ptr'"):
            scalar_kernel[(1,)](x, out, i, j, True)


@triton.jit
def atomic_kernel(x_ptr, index_ptr, n, BLOCK: tl.constexpr, CAS: tl.constexpr):
    i = tl.arange(0, BLOCK)
    at = tl.load(index_ptr + i)
    if CAS:
        zero = tl.zeros([BLOCK], x_ptr.dtype.element_ty)
        tl.atomic_cas(x_ptr + at, zero, zero + 1)
    else:
        tl.atomic_add(x_ptr + at, 1, mask=i < n)


@pytest.mark.parametrize("cas", [False, True])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_atomics(cas: bool, dtype: torch.dtype) -> None:
    x, block = inside(8, dtype)
    x.zero_()
    index = torch.arange(8)
    atomic_kernel[(1,)](x, index, 8, BLOCK=8, CAS=cas)
    assert bool((x == 1).all())
    for bad in (-1, 8):
        index[5] = bad
        with pytest.raises(MemoryViolation) as caught:
            atomic_kernel[(1,)](x, index, 8, BLOCK=8, CAS=cas)
        assert (caught.value.kind, caught.value.address) == ("atomic", x.data_ptr() + bad * x.itemsize)
        assert untouched(block, x)
    if not cas:
        atomic_kernel[(1,)](x, index, 5, BLOCK=8, CAS=cas)


@triton.jit
def tile_kernel(x_ptr, out_ptr, rows, columns, row, column, BM: tl.constexpr, BN: tl.constexpr, ROW: tl.constexpr):
    i, j = tl.arange(0, BM)[:, None], tl.arange(0, BN)[None, :]
    mask = (i < rows) & (j < columns)
    tl.store(out_ptr + i * ROW + j, tl.load(x_ptr + i * row + j * column, mask=mask, other=0), mask=mask)


@pytest.mark.parametrize("transposed", [False, True])
def test_tiles(transposed: bool) -> None:
    rows, columns = 7, 29
    x, _ = inside(rows * columns)
    out, block = inside((rows - 1) * 32 + columns)
    x.normal_()
    row, column = (1, rows) if transposed else (columns, 1)
    options = {"BM": 8, "BN": 32, "ROW": 32}
    tile_kernel[(1,)](x, out, rows, columns, row, column, **options)
    assert torch.equal(out.as_strided((rows, columns), (32, 1)), x.as_strided((rows, columns), (row, column)))
    for more_rows, more_columns in ((1, 0), (0, 1)):
        with pytest.raises(MemoryViolation, match="'x_ptr'"):
            tile_kernel[(1,)](x, torch.zeros(10**4), rows + more_rows, columns + more_columns, row, column, **options)
    with pytest.raises(MemoryViolation, match="'out_ptr'"):
        tile_kernel[(1,)](torch.zeros(10**4), out, rows, columns + 1, row, column, **options)
    assert untouched(block, out)


@triton.jit
def dot_kernel(
    a_ptr, b_ptr, out_ptr, n, a_row, a_col, b_row, b_col, TAIL: tl.constexpr, B: tl.constexpr, STEPS: tl.constexpr
):
    i, j = tl.arange(0, B)[:, None], tl.arange(0, B)[None, :]
    a, b = a_ptr + i * a_row + j * a_col, b_ptr + i * b_row + j * b_col
    acc = tl.zeros([B, B], tl.float32)
    for _ in range(STEPS):
        if TAIL:
            acc += tl.dot(tl.load(a, mask=i < n, other=0), tl.load(b, mask=i < n, other=0))
        else:
            acc += tl.dot(tl.load(a), tl.load(b))
        a += B * a_col
        b += B * b_row
    tl.store(out_ptr + i * B + j, acc)


@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("a_transposed", "b_transposed"), [(False, False), (True, False), (False, True)])
def test_operands_of_dots(tail: bool, dtype: torch.dtype, a_transposed: bool, b_transposed: bool) -> None:
    size, steps = 32, 2
    a, _ = inside(size * size * steps, dtype)
    b, _ = inside(size * size * steps, dtype)
    a.copy_(torch.randn(a.shape))
    b.copy_(torch.randn(b.shape))
    a_strides = (1, size) if a_transposed else (size * steps, 1)
    b_strides = (1, size * steps) if b_transposed else (size, 1)
    out = torch.empty(size, size)
    options = {"TAIL": tail, "B": size, "STEPS": steps}
    dot_kernel[(1,)](a, b, out, size, *a_strides, *b_strides, **options)
    left, right = a.as_strided((size, size * steps), a_strides), b.as_strided((size * steps, size), b_strides)
    torch.testing.assert_close(out.double(), left.double() @ right.double(), rtol=1e-4, atol=1e-4)
    for operand, name in ((a, "a_ptr"), (b, "b_ptr")):
        short, _ = inside(operand.numel() - 1, dtype)
        short.zero_()
        pair = (short, b) if operand is a else (a, short)
        with pytest.raises(MemoryViolation, match=rf"1 element .* after the last element of '{name}'"):
            dot_kernel[(1,)](*pair, out, size, *a_strides, *b_strides, **options)
        assert settings.get("check")


@triton.jit
def walk_kernel(x_ptr, out_ptr, limit):
    at, total = 0, 0.0
    while at < limit:
        total += tl.load(x_ptr + at)
        at += 1
    tl.store(out_ptr, total)


def test_while_loop() -> None:
    x, out = torch.ones(100), torch.zeros(1)
    walk_kernel[(1,)](x, out, 100)
    assert out.item() == 100
    with pytest.raises(MemoryViolation, match="1 element"):
        walk_kernel[(1,)](x, out, 2**31 - 1)


@triton.jit
def two_pointers_kernel(x_ptr, y_ptr, out_ptr, which, i):
    p = x_ptr
    if which:
        p = y_ptr
    for _ in range(3):
        p += 1
    tl.store(out_ptr, tl.load(p + i))


def test_a_pointer_chosen_from_two_may_touch_both() -> None:
    x, y, out = torch.tensor([1.0, 2, 3, 4]), torch.tensor([5.0, 6, 7, 8]), torch.zeros(1)
    for which, expected in ((0, 4), (1, 8)):
        two_pointers_kernel[(1,)](x, y, out, which, 0)
        assert out.item() == expected
        with pytest.raises(MemoryViolation, match="'x_ptr'" if not which else "'y_ptr'"):
            two_pointers_kernel[(1,)](x, y, out, which, 1)


@triton.jit
def descriptor_kernel(desc, out_ptr, row, BLOCK: tl.constexpr):
    tile = desc.load([row, 0])
    i, j = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    tl.store(out_ptr + i * BLOCK + j, tile)


def test_tensor_descriptors() -> None:
    x, out = torch.randn(20, 16), torch.empty(16, 16)
    descriptor_kernel[(1,)](TensorDescriptor.from_tensor(x, [16, 16]), out, 8, BLOCK=16)
    assert torch.equal(out[:12], x[8:])
    assert not out[12:].any()
    too_long = TensorDescriptor(x, [21, 16], [16, 1], [16, 16])
    with pytest.raises(MemoryViolation, match="after the last element of 'desc'"):
        descriptor_kernel[(1,)](too_long, out, 8, BLOCK=16)


@triton.jit
def tuple_kernel(pair, i):
    tl.store(pair[1], tl.load(pair[0] + i))


def test_tuples_wrappers_and_none() -> None:
    x, out = torch.ones(4), torch.zeros(1)
    tuple_kernel[(1,)]((x, out), 3)
    with pytest.raises(MemoryViolation, match=r"of 'pair\[0\]'"):
        tuple_kernel[(1,)]((x, out), 4)
    wrapped = triton.reinterpret(torch.ones(4, dtype=torch.uint8), tl.int8)
    bytes_out = torch.zeros(1, dtype=torch.int8)
    scalar_kernel[(1,)](wrapped, bytes_out, 3, 0, True)
    with pytest.raises(MemoryViolation, match="uint8 tensor"):
        scalar_kernel[(1,)](wrapped, bytes_out, 4, 0, True)
    with pytest.raises(MemoryViolation, match=r"float32 tensor of shape \(0,\) and has no memory"):
        scalar_kernel[(1,)](torch.empty(0), out, 0, 0, True)


@triton.jit
def table_kernel(table_ptr, out_ptr, shift, n, BLOCK: tl.constexpr):
    source = tl.load(table_ptr + tl.program_id(0)).to(tl.pointer_type(tl.float32))
    i = tl.arange(0, BLOCK)
    value = tl.load(source + shift + i, mask=i < n, other=0.0)
    tl.store(out_ptr + tl.program_id(0) * BLOCK + i, value)


def test_addresses_in_a_table_may_lead_to_any_living_tensor() -> None:
    tensors = [torch.randn(10), torch.randn(64)[50:60], torch.nn.Parameter(torch.randn(10))]
    table = torch.tensor([tensor.data_ptr() for tensor in tensors])
    out = torch.empty(3, 16)
    table_kernel[(3,)](table, out, 0, 10, BLOCK=16)
    assert torch.equal(out[:, :10], torch.stack([tensor.detach() for tensor in tensors]))
    lonely = np.ones(1000, dtype=np.float32)
    table = torch.tensor([lonely.ctypes.data] * 3)
    with pytest.raises(MemoryViolation, match="known_memory"):
        table_kernel[(3,)](table, out, 0, 10, BLOCK=16)
    for known in (lonely, (lonely.ctypes.data, lonely.nbytes)):
        with tilewright.known_memory(known):
            table_kernel[(3,)](table, out, 990, 10, BLOCK=16)
            assert bool((out[:, :10] == 1).all())
            with pytest.raises(MemoryViolation, match="know"):
                table_kernel[(3,)](table, out, 991, 10, BLOCK=16)
    with pytest.raises(InputError, match="dict"), tilewright.known_memory({}):
        pass


@triton.jit
def wait_kernel(x_ptr, flag_ptr, out_ptr, i):
    if tl.program_id(0) == 0:
        tl.store(out_ptr, tl.load(x_ptr + i))
        tl.atomic_xchg(flag_ptr, 1)
    else:
        while tl.atomic_add(flag_ptr, 0) == 0:
            pass


def test_programs_that_wait_for_a_stopped_one_end(two_threads: None) -> None:
    x, out = torch.ones(4), torch.zeros(1)
    wait_kernel[(2,)](x, torch.zeros(1, dtype=torch.int32), out, 3)
    for _ in range(5):
        with pytest.raises(MemoryViolation, match="'x_ptr'"):
            wait_kernel[(2,)](x, torch.zeros(1, dtype=torch.int32), out, 4)


@triton.jit
def far_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i) + 1)


def test_one_of_many_programs_is_on_record_and_all_stop(two_threads: None) -> None:
    x, (out, block) = torch.zeros(64 * 1000), inside(64 * 20)
    for _ in range(20):
        with pytest.raises(MemoryViolation) as caught:
            far_kernel[(1000,)](x, out, 0, BLOCK=64)
        program = caught.value.program[0]
        assert 20 <= program < 1000
        assert caught.value.address == out.data_ptr() + 64 * 4 * program
        assert untouched(block, out)
    far_kernel[(20,)](x, out, 0, BLOCK=64)
    assert bool((out == 1).all())


def test_huge_grids_stop_at_once() -> None:
    with pytest.raises(MemoryViolation):
        far_kernel[(2**31 - 1, 2**15)](torch.zeros(1), torch.zeros(1), 0, BLOCK=64)


def test_prepared_launches() -> None:
    x, out = torch.randn(64), torch.empty(64)

    index = torch.arange(64)
    launch = tilewright.prepare(indexed_kernel, (1,), x, index, out, 64, BLOCK=64, SCATTER=False)
    for _ in range(2):
        launch()
        assert torch.equal(out, x)
        index[3] = 64
        for _ in range(2):
            with pytest.raises(MemoryViolation):
                launch()
        index[3] = 3


def test_launches_from_several_threads_report_for_themselves() -> None:
    errors: dict[int, BaseException] = {}

    def run(number: int) -> None:
        x, out = torch.ones(number + 1), torch.zeros(1)
        try:
            for _ in range(20):
                scalar_kernel[(1,)](x, out, number, 0, True, check=True)
            scalar_kernel[(1,)](x, out, number + 1, 0, True, check=True)
        except MemoryViolation as error:
            errors[number] = error

    scalar_kernel[(1,)](torch.ones(1), torch.ones(1), 0, 0, True)
    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(errors) == [0, 1, 2, 3]
    assert all(f"shape ({number + 1},)" in str(error) for number, error in errors.items())


def test_the_error_names_all_there_is_to_know() -> None:
    x, out = torch.randn(3, 5), torch.empty(1)
    with pytest.raises(MemoryViolation) as caught:
        scalar_kernel[(1, 1, 1)](x, out, 17, 0, True)
    error, end = caught.value, x.data_ptr() + 60
    line = next(n for n, text in enumerate(Path(__file__).read_text().splitlines(), 1) if "mask=go, other=5.0" in text)
    assert error.source == f"{__file__}:{line}"
    assert (error.kernel, error.program) == ("scalar_kernel", (0, 0, 0))
    assert isinstance(error, KernelStopped)
    assert "value = tl.load(x_ptr + i, mask=go, other=5.0)" in str(error)
    assert f"it reads 4 bytes at {end + 8:#x}" in str(error)
    assert "3 elements (12 bytes) after the last element of 'x_ptr' (float32 tensor of shape (3, 5)" in str(error)
    assert f"storage {x.data_ptr():#x} to {end:#x}, 60 bytes" in str(error)
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), copy.__dict__) == (type(error), str(error), error.__dict__)


def test_the_option_and_the_setting() -> None:
    x, out = torch.zeros(8), torch.zeros(4)

    def run(**options: bool) -> None:
        # Behind the view but inside of the storage of the larger tensor: harmless without checks, too.
        copy_kernel[(1,)](x, out, 0, 0, 4, 1, BLOCK=16, MASKED=True, **options)

    with settings.scope(check=False):
        plain = copy_kernel.warmup(x, out, 0, 0, 4, 1, BLOCK=16, MASKED=True, grid=(1,))
        assert not plain.metadata.stops
        assert "tw.stop" not in plain.asm["llir"]
        run()
        checked = copy_kernel.warmup(x, out, 0, 0, 4, 1, BLOCK=16, MASKED=True, grid=(1,), check=True)
        assert checked.metadata.stops
        with pytest.raises(MemoryViolation):
            copy_kernel[(1,)](x, out, 5, 0, 4, 1, BLOCK=16, MASKED=True, check=True)
    # A change of the setting takes effect for kernels that are compiled already.
    for _ in range(2):
        with pytest.raises(MemoryViolation):
            copy_kernel[(1,)](x, out, 5, 0, 4, 1, BLOCK=16, MASKED=True)
        with settings.scope(check=False):
            assert not copy_kernel.warmup(x, out, 0, 0, 4, 1, BLOCK=16, MASKED=True, grid=(1,)).metadata.stops


SCRIPT = """
import os, sys, torch
sys.path.insert(0, {folder!r})
from test_checked import copy_kernel
from tilewright.errors import MemoryViolation
x, out = torch.zeros(8), torch.zeros(8)
def run(first):
    try:
        copy_kernel[(1,)](x, out, first, 0, 8, 1, BLOCK=8, MASKED=True)
    except MemoryViolation:
        return 7
    return 0
assert run(0) == 0
child = os.fork()
if child == 0:
    os._exit(run(1) + run(0))
_, status = os.waitpid(child, 0)
print(os.waitstatus_to_exitcode(status), run(1))
"""


def test_forked_processes_and_the_environment() -> None:
    code = SCRIPT.format(folder=str(Path(__file__).parent))
    environment = {**os.environ, "TILEWRIGHT_CHECK": "1"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment)
    assert re.sub(r"\s+", " ", result.stdout).strip() == "7 7", result.stderr
