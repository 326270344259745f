"""One region of each kernel family, as a model would give it, for tests of the kernels' text."""

import operator
from collections.abc import Callable
from functools import partial

import torch
from tests.codegen.bodies import Body, emit

from tilewright.ir.facts import TensorType, TupleType, set_fact
from tilewright.ir.program import KernelStep
from tilewright.ir.regions import Anchor
from tilewright.ir.sizes import BATCH, SEQ, TOKENS

aten = torch.ops.aten
ops = torch.ops.tilewright


def kernel_steps(
    body: Body, outputs: list[torch.fx.Node], anchor: Anchor = Anchor.ROW, **options: object
) -> list[KernelStep]:
    """The kernel steps of a finished body."""
    steps, _, _ = emit(body.module(*outputs), anchor, **options)  # type: ignore[arg-type]
    return [step for step in steps if isinstance(step, KernelStep)]


def row(dtype: torch.dtype = torch.float32) -> list[KernelStep]:
    """Embedding of gathered ids, residual, layer norm."""
    body = Body()
    ids, rows = body.input((BATCH, SEQ), torch.int64), body.input((TOKENS,), torch.int32)
    table, other = body.input((100, 384), dtype), body.input((TOKENS, 384), dtype)
    weight, bias = body.input((384,), dtype), body.input((384,), dtype)
    word = body.call(aten.embedding.default, table, body.call(ops.gather_rows.default, ids, rows))
    total = body.call(aten.add.Tensor, word, other)
    return kernel_steps(body, [body.call(aten.layer_norm.default, total, [384], weight, bias, 1e-12)])


def scatter(dtype: torch.dtype = torch.float32) -> list[KernelStep]:
    """An activation scattered to padded places."""
    body = Body()
    x, rows = body.input((TOKENS, 384), dtype), body.input((TOKENS,), torch.int32)
    valid = body.input((BATCH, SEQ), torch.int64)
    out = body.call(aten.gelu.default, x, approximate="tanh")
    return kernel_steps(body, [body.call(ops.scatter_rows.default, out, rows, valid)])


def gemm(dtype: torch.dtype = torch.float32) -> list[KernelStep]:
    """Norm in front of a product with a stored weight, bias and GELU behind, N not a multiple of the tile."""
    body = Body()
    x, weight, bias = body.input((TOKENS, 384), dtype), body.input((1000, 384), dtype), body.input((1000,), dtype)
    norm = body.call(aten.layer_norm.default, x, [384], None, None, 1e-12)
    out = body.call(aten.gelu.default, body.call(aten.linear.default, norm, weight, bias))
    weights = {1: torch.zeros(1000, 384, dtype=dtype), 2: torch.zeros(1000, dtype=dtype)}
    return kernel_steps(body, [out], Anchor.GEMM, weights=weights)


def gemm_split(dtype: torch.dtype = torch.float32) -> list[KernelStep]:
    """A product of few rows by a weight of few rows, in parts of K; GELU behind the sum of the parts."""
    body = Body()
    x, weight, bias = body.input((TOKENS, 4096), dtype), body.input((100, 4096), dtype), body.input((100,), dtype)
    out = body.call(aten.gelu.default, body.call(aten.linear.default, x, weight, bias))
    weights = {1: torch.zeros(100, 4096, dtype=dtype), 2: torch.zeros(100, dtype=dtype)}
    return kernel_steps(body, [out], Anchor.GEMM, weights=weights, variant="triton_few:4")


def attention_packed(dtype: torch.dtype = torch.float32, variant: str = "online") -> list[KernelStep]:
    """Causal, windowed, grouped heads."""
    body = Body()
    q, k, v = (body.input((TOKENS, heads, 64), dtype) for heads in (4, 2, 2))
    index = [
        body.input((BATCH + 1,), torch.int32),
        body.input((BATCH,), torch.int32),
        body.input((BATCH,), torch.int32),
    ]
    slots = body.input((TOKENS,), torch.int32)
    more = (None, None, SEQ, SEQ, 0.125, True, 100, -1, 0.0)
    out = body.call(ops.attention_packed.default, q, k, v, *index, slots, slots, *more)
    return kernel_steps(body, [out], Anchor.ATTENTION, variant=variant)


def attention_padded(dtype: torch.dtype = torch.float32) -> list[KernelStep]:
    """Any validity, additive bias, softcap, sinks."""
    body = Body()
    q, k, v = (body.input((BATCH, 4, SEQ, 64), dtype) for _ in range(3))
    valid, bias = body.input((BATCH, SEQ), torch.bool), body.input((1, 4, SEQ, SEQ), dtype)
    more = (body.input((4,), dtype), 0.125, False, -1, -1, 30.0)
    return kernel_steps(body, [body.call(ops.attention.default, q, k, v, valid, bias, *more)], Anchor.ATTENTION)


def index(dtype: torch.dtype = torch.float32) -> list[KernelStep]:
    """The row index of a batch of which one column is read."""
    body = Body()
    valid = body.input((BATCH, SEQ), torch.int64)
    node = body.graph.call_function(ops.pack_index.default, (valid, [body.input((BATCH,), torch.int64)]))
    shapes = ((TOKENS,), (TOKENS,), (BATCH + 1,), (BATCH,), (BATCH,), (1, BATCH))
    kinds = tuple(TensorType(shape, torch.int32) for shape in shapes)
    set_fact(node, TupleType(kinds))
    outputs = [body.graph.call_function(operator.getitem, (node, place)) for place in range(6)]
    for item, kind in zip(outputs, kinds, strict=True):
        set_fact(item, kind)
    return kernel_steps(body, outputs, Anchor.INDEX)


FAMILIES: dict[str, Callable[..., list[KernelStep]]] = {
    "row": row,
    "scatter": scatter,
    "gemm": gemm,
    "gemm_split": gemm_split,
    "attention_packed": attention_packed,
    "attention_short": partial(attention_packed, variant="short_128"),
    "attention_long": partial(attention_packed, variant="long"),
    "attention_padded": attention_padded,
    "index": index,
}
