"""Largest error of each f32 function of one operand over all 2**32 inputs, in units of the last place.

    python benchmarks/ulp.py [--only exp tanh ...] [--every 1001]

The reference is the same function in f64, made of the C library's. Each function takes a minute or two on two
threads; ``--every N`` tries each Nth input (N odd), which takes seconds. A NaN where there should be none, a missing
one and a zero of the wrong sign count as infinite error.
"""

import argparse
import time

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

BLOCK, STEPS = 256, 1024
TARGET = ("exp", "exp2", "log", "sin", "cos", "tanh", "erf", "sigmoid", "rsqrt")
FURTHER = (
    "log2", "log10", "log1p", "exp10", "expm1", "sinh", "cosh", "tan", "asin", "acos", "atan", "asinh", "acosh",
    "atanh", "erfc", "cbrt", "rcbrt", "sinpi", "cospi", "normcdf", "erfcx", "sqrt", "rsqrt_rn",
)  # fmt: skip


@triton.jit
def function(x, NAME: tl.constexpr):
    if NAME == "sigmoid":
        y = tl.sigmoid(x)
    elif NAME == "rsqrt_rn" and x.dtype == tl.float64:
        y = libdevice.rsqrt(x)
    else:
        y = getattr(libdevice, NAME)(x)
    return y


@triton.jit
def worst_kernel(worst_ptr, input_ptr, first, EVERY: tl.constexpr, NAME: tl.constexpr, BLOCK: tl.constexpr, STEPS):
    lane = tl.arange(0, BLOCK)
    start = first + tl.program_id(0).to(tl.int64) * (STEPS * BLOCK)
    worst = tl.full([BLOCK], -1.0, tl.float64)
    where = tl.zeros([BLOCK], tl.int32)
    for step in range(0, STEPS):
        bits = ((start + step * BLOCK + lane) * EVERY).to(tl.int32)
        x = bits.to(tl.float32, bitcast=True)
        y = function(x, NAME).to(tl.float64)
        exact = function(x.to(tl.float64), NAME)
        exponent = ((exact.to(tl.int64, bitcast=True) >> 52) & 0x7FF) - 23
        ulp = (tl.maximum(exponent, 1023 - 126 - 23) << 52).to(tl.float64, bitcast=True)
        # Infinity counts as the number after the largest.
        top: tl.constexpr = 2.0**128
        error = tl.abs(tl.clamp(y, -top, top) - tl.clamp(exact, -top, top)) / tl.minimum(ulp, 2.0**104)
        nans = (y != y).to(tl.int32) + (exact != exact).to(tl.int32)
        error = tl.where(nans == 1, float("inf"), tl.where(nans == 2, 0.0, error))
        signs = y.to(tl.int64, bitcast=True) ^ exact.to(tl.int64, bitcast=True)
        error = tl.where((nans == 0) & (exact == 0.0) & (signs != 0), float("inf"), error)
        larger = error > worst
        worst = tl.where(larger, error, worst)
        where = tl.where(larger, bits, where)
    at = tl.program_id(0) * BLOCK + lane
    tl.store(worst_ptr + at, worst)
    tl.store(input_ptr + at, where)


def largest_error(name: str, every: int = 1) -> tuple[float, float]:
    """In units of the last place, and the input where it is."""
    programs = max(1, (1 << 32) // (BLOCK * STEPS * every))
    worst = torch.empty(programs * BLOCK, dtype=torch.float64)
    inputs = torch.empty(programs * BLOCK, dtype=torch.int32)
    worst_kernel[(programs,)](worst, inputs, 0, EVERY=every, NAME=name, BLOCK=BLOCK, STEPS=STEPS)
    at = int(worst.argmax())
    return float(worst[at]), float(inputs[at : at + 1].view(torch.float32))


def main() -> None:
    """Prints one line a function, in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=TARGET + FURTHER, default=TARGET + FURTHER)
    parser.add_argument("--every", type=int, default=1, help="try each Nth input only; odd")
    options = parser.parse_args()
    print("| function | largest error (ULP) | at | seconds |\n| --- | --- | --- | --- |")
    for name in options.only:
        start = time.perf_counter()
        error, at = largest_error(name, options.every)
        print(f"| {name} | {error:.3f} | {at:.9g} | {time.perf_counter() - start:.0f} |", flush=True)


if __name__ == "__main__":
    main()
