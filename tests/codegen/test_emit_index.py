"""Row index kernels against ``pack_index`` itself: any pattern, dtype, batch and length."""

import operator

import pytest
import torch
from tests.codegen.bodies import Body, run
from torch.fx import GraphModule, Node

from tilewright.errors import KernelAssertion
from tilewright.ir.facts import TensorType, TupleType, set_fact
from tilewright.ir.regions import Anchor
from tilewright.ir.sizes import BATCH, SEQ, TOKENS

aten = torch.ops.aten
ops = torch.ops.tilewright
SHAPES = ((TOKENS,), (TOKENS,), (BATCH + 1,), (BATCH,), (BATCH,))
COLUMNS = ("none", "first", "first and last", "some of any type")


def columns_of(name: str, body: Body, batch: int, length: int) -> tuple[list[Node], list[torch.Tensor], list[Node]]:
    """Columns as nodes and as tensors, and those of the nodes that are inputs."""
    made = [
        body.call(aten.full.default, [BATCH], fill, dtype=torch.int64, device=torch.device("cpu"))
        for fill in {"none": [], "first": [0], "first and last": [0, -1]}.get(name, [])
    ]
    if made or name == "none":
        return made, [torch.full((batch,), number) for number in (0, -1)[: len(made)]], []
    kinds = (torch.int32, torch.int64)
    inputs = [body.input((BATCH,), kind) for kind in kinds]
    return inputs, [torch.randint(-length, length, (batch,)).to(kind) for kind in kinds], inputs


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize(
    ("batch", "length", "share"), [(5, 300, 0.5), (3, 7, 0.0), (700, 3, 0.6), (1, 1, 1.0), (4, 256, 1.0)]
)
def test_row_index(batch: int, length: int, share: float, kind: torch.dtype, columns: str) -> None:
    valid = (torch.rand(batch, length) < share).to(kind)
    body = Body()
    x = body.input((BATCH, SEQ), kind)
    nodes, chosen, inputs = columns_of(columns, body, batch, length)
    gm = index_region(body, x, nodes)
    want = ops.pack_index(valid, chosen)
    sizes = {BATCH: batch, SEQ: length, TOKENS: want[0].shape[0]}
    found = run(gm, [valid, *chosen[: len(inputs)]], sizes, Anchor.INDEX)
    for got, expected in zip(found, want, strict=False):
        assert torch.equal(got, expected)
    for number, column in enumerate(chosen):
        place = torch.arange(batch) * length + column % length
        assert torch.equal(want[0][want[5][number].long()].long(), place)


def index_region(body: Body, valid: Node, columns: list[Node]) -> GraphModule:
    """The region of a row index with all its results."""
    node = body.graph.call_function(ops.pack_index.default, (valid, columns))
    shapes = (*SHAPES, *([(len(columns), BATCH)] if columns else []))
    kinds = tuple(TensorType(shape, torch.int32) for shape in shapes)
    set_fact(node, TupleType(kinds))
    outputs = [body.graph.call_function(operator.getitem, (node, place)) for place in range(len(kinds))]
    for item, item_kind in zip(outputs, kinds, strict=True):
        set_fact(item, item_kind)
    return body.module(*outputs)


@pytest.mark.parametrize("outside", [7, -8, 2**32])
def test_a_column_outside_of_the_sequence_stops_the_kernel(outside: int) -> None:
    """As indexing with it raises; one that is 2^32 too far is not taken for one inside."""
    body = Body()
    x, column = body.input((BATCH, SEQ), torch.bool), body.input((BATCH,), torch.int64)
    gm = index_region(body, x, [column])
    tensors = [torch.ones(3, 7, dtype=torch.bool), torch.tensor([0, outside, 2])]
    with pytest.raises(KernelAssertion, match="outside of the sequence"):
        run(gm, tensors, {BATCH: 3, SEQ: 7, TOKENS: 21}, Anchor.INDEX)
    with pytest.raises(IndexError):
        ops.pack_index(tensors[0], [tensors[1]])
