"""Tiles that are stored where they were loaded, at other places: everything is read before anything is written."""

import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def move_kernel(x_ptr, start, sign, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(x_ptr + start + i * sign, tl.load(x_ptr + i))


@pytest.mark.parametrize("n", [1, 16, 1024])
@pytest.mark.parametrize("shift", [-3, 0, 1, 17])
def test_tiles_move_along_in_their_memory(n: int, shift: int) -> None:
    memory = torch.randn(2 * n + 40)
    x = memory.clone()[20:]
    move_kernel[(1,)](x, shift, 1, N=n)
    expected = memory.clone()
    expected[20 + shift : 20 + shift + n] = memory[20 : 20 + n]
    assert torch.equal(x, expected[20:])


@pytest.mark.parametrize("n", [1, 2, 64, 512])
def test_a_tile_is_reversed_in_place(n: int) -> None:
    x = torch.randn(n)
    expected = x.flip(0)
    move_kernel[(1,)](x, n - 1, -1, N=n)
    assert torch.equal(x, expected)


@triton.jit
def transpose_kernel(x_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i[:, None] * N + i[None, :])
    tl.store(x_ptr + i[None, :] * N + i[:, None], x * 2)


def test_a_tile_is_transposed_in_place() -> None:
    x = torch.randn(32, 32)
    expected = x.T * 2
    transpose_kernel[(1,)](x, N=32)
    assert torch.equal(x, expected)


@triton.jit
def add_to_next_kernel(x_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.atomic_add(x_ptr + i + 1, tl.load(x_ptr + i))


def test_atomic_operations_at_the_next_place() -> None:
    x = torch.arange(300)
    expected = x + torch.cat([torch.zeros(1).long(), x[:256], torch.zeros(43).long()])
    add_to_next_kernel[(1,)](x, N=256)
    assert torch.equal(x, expected)


@triton.jit
def repeated_kernel(x_ptr, index_ptr, M: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    rows = tl.broadcast_to((x_ptr + i)[None, :], (M, N))
    tl.store(rows, tl.load(rows) + 1)
    chosen = x_ptr + N + tl.load(index_ptr + i)
    tl.store(chosen, tl.load(chosen) + 1)


def test_an_element_that_is_written_often_is_read_once() -> None:
    x, index = torch.arange(256), torch.randint(0, 9, (128,))
    expected = x.clone()
    expected[:128] += 1
    expected[128 + index.unique()] += 1
    repeated_kernel[(1,)](x, index, M=4, N=128)
    assert torch.equal(x, expected)
