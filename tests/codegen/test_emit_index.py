"""Row index kernels against ``pack_index`` itself: any pattern, dtype, batch and length."""

import operator

import pytest
import torch
from tests.codegen.bodies import Body, Memory, emit, launch

from tilewright.ir.facts import TensorType, TupleType, set_fact
from tilewright.ir.regions import Anchor
from tilewright.ir.sizes import BATCH, SEQ, TOKENS

ops = torch.ops.tilewright
SHAPES = ((TOKENS,), (TOKENS,), (BATCH + 1,), (BATCH,), (BATCH,))


@pytest.mark.parametrize("keep_first", [False, True])
@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize(
    ("batch", "length", "share"), [(5, 300, 0.5), (3, 7, 0.0), (700, 3, 0.6), (1, 1, 1.0), (4, 256, 1.0)]
)
def test_row_index(batch: int, length: int, share: float, kind: torch.dtype, keep_first: bool) -> None:
    valid = (torch.rand(batch, length) < share).to(kind)
    body = Body()
    x = body.input((BATCH, SEQ), kind)
    node = body.graph.call_function(ops.pack_index.default, (x, keep_first))
    kinds = tuple(TensorType(shape, torch.int32) for shape in SHAPES)
    set_fact(node, TupleType(kinds))
    outputs = [body.graph.call_function(operator.getitem, (node, place)) for place in range(5)]
    for item, item_kind in zip(outputs, kinds, strict=True):
        set_fact(item, item_kind)
    want = ops.pack_index(valid, keep_first)
    steps, builder, call = emit(body.module(*outputs), Anchor.INDEX)
    memory = Memory(builder, {0: valid}, {BATCH: batch, SEQ: length, TOKENS: want[0].shape[0]})
    for step in steps:
        launch(step, memory)
    for view, expected in zip(call.outputs, want, strict=True):
        assert torch.equal(memory.tensor(view), expected)
