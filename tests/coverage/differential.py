"""Random kernels of one operation each: any dtype, tiles of 0 to 5 axes, uneven extents, any strides."""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from tests.coverage.values import EPSILON, Array, exact, is_float, to_torch
from torch import Tensor

DTYPES = ("int8", "int16", "int32", "int64", "uint8", "fp16", "bf16", "fp32", "fp64")
SHAPE_CLASSES = ("scalar", "one", "small", "uneven", "matrix", "cube")
_SENTINEL = 77


@dataclass(frozen=True)
class Operation:
    """An operation on tiles x and y.

    Attributes:
        code: text of the result; AXIS stands for the number of an axis.
        reference: the result from x and y in fp64 or exact integers, and the axis.
        elementwise: the result has the operands' shape and is stored under their mask, where there is one.
        least_rank: axes that the tiles must have.
        roundings: error allowed in a float result, in rounding errors of the dtype, relative to the largest result.
    """

    code: str
    reference: Callable[[Array, Array, int], Array]
    elementwise: bool = False
    least_rank: int = 1
    roundings: float = 4


def _total(x: Array) -> "np.dtype[Any]":
    """Sums of small integers are computed in 32 bits."""
    small = x.dtype.kind in "iu" and x.dtype.itemsize < 4
    return np.dtype(f"{x.dtype.kind}4") if small else x.dtype


OPERATIONS = {
    "arithmetic": Operation("x * y - x", lambda x, y, _: x * y - x, elementwise=True, least_rank=0),
    "select": Operation("tl.where(x > y, x, y + x)", lambda x, y, _: np.where(x > y, x, y + x), True, 0),
    "extremes": Operation(
        "tl.maximum(x, y) - tl.minimum(x, y)", lambda x, y, _: np.maximum(x, y) - np.minimum(x, y), True, 0
    ),
    "cast": Operation("x.to(tl.float32) * 0.5", lambda x, y, _: x.astype(np.float32) * 0.5, True, 0),
    "sum": Operation("tl.sum(x, AXIS)", lambda x, y, axis: x.sum(axis, dtype=_total(x)), roundings=64),
    "sum of product": Operation(
        "tl.sum(x.to(tl.float32) * y.to(tl.float32), AXIS)",
        lambda x, y, axis: (x.astype(np.float64) * y).sum(axis),
        roundings=64,
    ),
    "max": Operation("tl.max(x, AXIS)", lambda x, y, axis: x.max(axis)),
    "argmin": Operation("tl.argmin(x, AXIS)", lambda x, y, axis: x.argmin(axis)),
    # The largest of small integers is found in 32 bits.
    "centered": Operation(
        "x - tl.max(x, AXIS, keep_dims=True)",
        lambda x, y, axis: x.astype(_total(x)) - x.max(axis, keepdims=True).astype(_total(x)),
        elementwise=True,
    ),
    "cumsum": Operation("tl.cumsum(x, AXIS)", lambda x, y, axis: x.cumsum(axis, dtype=_total(x)), roundings=128),
    "reversed cumsum": Operation(
        "tl.cumsum(x, AXIS, reverse=True)",
        lambda x, y, axis: np.flip(np.flip(x, axis).cumsum(axis, dtype=_total(x)), axis),
        roundings=128,
    ),
    "transpose": Operation("tl.trans(x + y)", lambda x, y, _: np.swapaxes(x + y, -1, -2), least_rank=2),
    # A tile of one axis and one element becomes a scalar in tl.flip, which Triton then refuses: hence the second axis.
    "flip": Operation("tl.flip(tl.join(x, y), AXIS)", lambda x, y, axis: np.flip(np.stack([x, y], -1), axis)),
    "sort": Operation("tl.sort(x)", lambda x, y, _: np.sort(x, -1)),
    "join": Operation("tl.join(x, y)", lambda x, y, _: np.stack([x, y], -1)),
    "gather": Operation(
        "tl.gather(x, tl.sort((x - x).to(tl.int32) + (INDEX) * 3 % LAST), RANK - 1)",
        lambda x, y, _: np.take_along_axis(
            x, np.broadcast_to(np.sort(np.arange(x.shape[-1]) * 3 % x.shape[-1]), x.shape), -1
        ),
    ),
}


@dataclass(frozen=True)
class Example:
    """Sizes of one kernel: powers of two for the tile, what the tensors hold of it, and how they lie in memory."""

    dtype: str
    block: tuple[int, ...]
    extent: tuple[int, ...]
    axis: int
    layouts: tuple[str, str]
    seed: int


@st.composite
def examples(draw: st.DrawFn, least_rank: int) -> Example:
    """Examples of every dtype and class of shapes that has ``least_rank`` axes."""
    classes = [name for name in SHAPE_CLASSES if _ranks(name)[1] >= least_rank]
    kind = draw(st.sampled_from(classes))
    low, high = _ranks(kind)
    rank = draw(st.integers(max(low, least_rank), high))
    largest = {"scalar": 1, "one": 1, "small": 16, "uneven": 256, "matrix": 32, "cube": 4}[kind]
    block = tuple(2 ** draw(st.integers(0, largest.bit_length() - 1)) for _ in range(rank))
    uneven = kind in ("uneven", "matrix", "cube")
    extent = tuple(draw(st.integers(1, size)) if uneven else size for size in block)
    layout = st.sampled_from(("contiguous", "transposed", "strided", "repeated"))
    return Example(
        draw(st.sampled_from(DTYPES)),
        block,
        extent,
        draw(st.integers(0, max(rank - 1, 0))),
        (draw(layout), draw(layout)),
        draw(st.integers(0, 2**16)),
    )


def _ranks(kind: str) -> tuple[int, int]:
    return {"scalar": (0, 0), "one": (1, 3), "small": (1, 1), "uneven": (1, 1), "matrix": (2, 2), "cube": (3, 5)}[kind]


def operand(example: Example, layout: str, rng: np.random.Generator) -> Tensor:
    """A tensor of the example's extent in memory of the layout."""
    shape, dtype = example.extent, example.dtype
    if layout == "repeated":
        shape = tuple(1 if number == example.axis else size for number, size in enumerate(shape))
    elif layout == "strided":
        shape = (*shape[:-1], shape[-1] * 3) if shape else shape
    elif layout == "transposed":
        shape = tuple(reversed(shape))
    values = rng.normal(size=shape) if is_float(dtype) else rng.integers(0 if dtype == "uint8" else -9, 10, shape)
    tensor = to_torch(np.asarray(values), dtype)
    if layout == "strided" and shape:
        return tensor[..., ::3]
    if layout == "transposed":
        return tensor.permute(*reversed(range(tensor.dim()))) if shape else tensor
    return tensor.expand(example.extent)


def kernel_text(operation: Operation, example: Example, result_rank: int, result: tuple[int, ...]) -> str:
    """Text of the example's kernel; extents and strides are arguments."""
    rank = len(example.block)
    names = [f"{kind}{number}" for kind in ("n", "a", "b") for number in range(rank)]
    lines = ["import triton", "import triton.language as tl", "", "", "@triton.jit"]
    lines.append(
        f"def kernel(x_ptr, y_ptr, out_ptr, {', '.join(names)}):" if names else "def kernel(x_ptr, y_ptr, out_ptr):"
    )
    for number, size in enumerate(example.block):
        subscript = ", ".join(":" if other == number else "None" for other in range(rank))
        lines.append(f"    i{number} = tl.arange(0, {size})" + (f"[{subscript}]" if rank > 1 else ""))
    inside = " & ".join(f"(i{number} < n{number})" for number in range(rank))
    for name, strides in (("x", "a"), ("y", "b")):
        offset = "".join(f" + i{number} * {strides}{number}" for number in range(rank))
        mask = f", mask={inside}, other=0" if rank else ""
        lines.append(f"    {name} = tl.load({name}_ptr{offset}{mask})")
    code = operation.code.replace("AXIS", str(example.axis)).replace("RANK", str(rank))
    code = code.replace("INDEX", f"i{rank - 1}").replace("LAST", str(example.block[-1] if rank else 1))
    lines.append(f"    out = {code}")
    steps = [prod(result[number + 1 :]) for number in range(result_rank)]
    offset = ""
    for number, size in enumerate(result):
        subscript = ", ".join(":" if other == number else "None" for other in range(result_rank))
        index = f"tl.arange(0, {size})" + (f"[{subscript}]" if result_rank > 1 else "")
        offset += f" + {index} * {steps[number]}"
    mask = f", mask={inside}" if operation.elementwise and rank else ""
    lines.append(f"    tl.store(out_ptr{offset}, out{mask})")
    return "\n".join(lines) + "\n"


def padded(values: Array, block: tuple[int, ...]) -> Array:
    """The tile: zeros beyond the extent."""
    if not block:
        return values
    return np.pad(values, [(0, size - used) for size, used in zip(block, values.shape, strict=True)])


def difference(operation: Operation, example: Example, launch: Callable[..., None]) -> str:
    """Runs an example; says where the result is wrong, "" if nowhere.

    Args:
        launch: runs the text of a kernel with arguments.
    """
    rng = np.random.default_rng(example.seed)
    tensors = [operand(example, layout, rng) for layout in example.layouts]
    arrays = [padded(exact(tensor, example.dtype), example.block) for tensor in tensors]
    expected = np.asarray(operation.reference(arrays[0], arrays[1], example.axis))
    wide = torch.float64 if expected.dtype.kind == "f" else torch.int64
    out = torch.full(expected.shape, _SENTINEL, dtype=wide)
    text = kernel_text(operation, example, expected.ndim, expected.shape)
    launch(text, *tensors, out, *example.extent, *tensors[0].stride(), *tensors[1].stride())
    if operation.elementwise:
        inside = padded(np.ones(example.extent, bool), example.block)
        expected = np.where(inside, expected, np.asarray(_SENTINEL, expected.dtype))
    got, scale = out.numpy(), np.abs(expected.astype(float)).max(initial=1)
    precision = EPSILON["fp32"] if "float32" in operation.code else EPSILON.get(example.dtype, 0)
    allowed = operation.roundings * max(precision, EPSILON.get(example.dtype, 0)) * scale
    wrong = np.abs(got.astype(float) - expected.astype(float)) > allowed
    return f"{got[wrong][:4]} instead of {expected[wrong][:4]} in\n{text}" if wrong.any() else ""
