"""Combine functions that kernel texts of the table use."""

HEADER = """
import triton
import triton.language as tl


@triton.jit
def first_of(a, b):
    return a


@triton.jit
def larger_pair(a, b, c, d):
    return tl.where(a >= c, a, c), tl.where(a >= c, b, d)


@triton.jit
def larger_plus_one(a, b):
    if a > b:
        return a + 1
    else:
        return b + 1
"""
