"""Indices that a kernel keeps in range by an operation: ``i % n``, ``where(i < n, i, 0)``.

They are no index arithmetic, but where the operation changes nothing the index behind them is. Whether it does is known
when the kernel runs.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tilewright.codegen.cpu.lower.context import UNWRAPPED, Context, Shifted
from tilewright.codegen.cpu.lower.nest import expression
from tilewright.codegen.cpu.ttir.records import Value


def wraps(ctx: Context, value: Value) -> list[Value]:
    """Results of ``UNWRAPPED`` operations in an expression of indices or pointers, from the outside in."""
    found = []
    for part in expression(ctx, value):
        binding = ctx.bindings.get(part)
        if isinstance(binding, Shifted):
            found += wraps(ctx, binding.origin)
        elif part.type.is_tensor and part.op is not None and part.op.name in UNWRAPPED:
            found.append(part)
    return list(dict.fromkeys(found))


@contextmanager
def unwrapping(ctx: Context, values: Sequence[Value]) -> Iterator[None]:
    """Inside, each of these values is taken to be the index it is made of."""
    before = ctx.unwrapped
    ctx.unwrapped = before | frozenset(values)
    try:
        yield
    finally:
        ctx.unwrapped = before
