"""``tl.device_print``: the text that Triton's GPU backends print."""

import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def print_kernel(x_ptr, count, ROWS: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, ROWS)[:, None] * 2 + tl.arange(0, 2)[None, :])
    tl.device_print('100% "quoted"\\', x)
    tl.device_print("hex", x, hex=True)
    tl.device_print("both", count, x + 0.5)
    print("at", tl.program_id(1))


def test_lines_have_coordinates_and_padding(capfd: pytest.CaptureFixture[str]) -> None:
    x = torch.tensor([[7, -1]] * 16, dtype=torch.int16)
    print_kernel[(1, 1, 1)](x, 3, ROWS=16)
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == 32 + 32 + 33 + 1
    assert lines[:2] == [
        'pid (0, 0, 0) idx ( 0, 0) 100% "quoted"\\: 7',
        'pid (0, 0, 0) idx ( 0, 1) 100% "quoted"\\: -1',
    ]
    assert lines[31].startswith("pid (0, 0, 0) idx (15, 1) ")
    assert lines[32:34] == ["pid (0, 0, 0) idx ( 0, 0) hex: 0x0007", "pid (0, 0, 0) idx ( 0, 1) hex: 0xffff"]
    assert lines[64] == "pid (0, 0, 0) idx () both: (operand 0) 3"
    assert lines[65:67] == [
        "pid (0, 0, 0) idx ( 0, 0) both: (operand 1) 7.500000",
        "pid (0, 0, 0) idx ( 0, 1) both: (operand 1) -0.500000",
    ]


@triton.jit
def places_kernel(flag_ptr):
    print("no value")
    tl.device_print("flag", tl.load(flag_ptr))


def test_programs_are_told_apart(capfd: pytest.CaptureFixture[str]) -> None:
    places_kernel[(2, 1, 3)](torch.tensor([True]))
    lines = sorted(capfd.readouterr().out.splitlines())
    places = [f"({x}, 0, {z})" for x in range(2) for z in range(3)]
    assert lines == sorted([f"pid {p} no value" for p in places] + [f"pid {p} idx () flag: 1" for p in places])
