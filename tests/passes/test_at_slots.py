"""AtSlots: at the slots of tokens, a value over the columns of a batch has what it had at these columns."""

import operator
from typing import Any

import torch
from graphs import SIZES, GraphBuilder
from torch import Tensor
from torch.fx import Interpreter, Node

from tilewright.ir.facts import SizeValue, TensorType, fact, set_fact
from tilewright.ir.sizes import BATCH, SEQ, TOKENS
from tilewright.passes.steps.at_slots import AtSlots

aten = torch.ops.aten
MADE: dict[str, Any] = {"dtype": torch.int64, "device": torch.device("cpu"), "pin_memory": False}
SLOTS = torch.arange(SIZES[TOKENS], dtype=torch.int32) * 5 % SIZES[SEQ]


def columns(g: GraphBuilder, start: int) -> Node:
    """start, start + 1, and so on, for each column."""
    ids = g.input("input_ids", BATCH, SEQ, dtype=torch.int64)
    length = g.size(ids, 1)
    end = g.graph.call_function(operator.add, (length, start))
    g.values[end] = SIZES[SEQ] + start
    set_fact(end, SizeValue(SEQ + start))
    return g.call(aten.arange.start_step, start, end, 1, **MADE)


def at_slots(g: GraphBuilder, value: Node) -> Tensor | None:
    """What is made of a value for the slots of ``SLOTS``; None if nothing is."""
    slots = g.input("slots", TOKENS, dtype=torch.int32)
    g.values[slots] = SLOTS
    mark = g.call(aten.clone.default, slots)
    made = AtSlots(slots, "test").of(value, mark)
    if made is None:
        return None
    g.values[made] = g.values[value]
    gm = g.done(made)
    (found,) = Interpreter(gm).run(*g.example)
    kind = fact(made, TensorType)
    assert (kind.shape[0], *map(int, kind.shape[1:])) == (TOKENS, *found.shape[1:])
    assert kind.dtype == found.dtype
    return found


def test_iotas_arithmetic_and_tables() -> None:
    g = GraphBuilder()
    places = g.call(aten.add.Tensor, g.call(aten.mul.Tensor, columns(g, start=2), 3), 1)
    rows = g.call(aten.embedding.default, g.weight("table", 60, 6), places)
    wide = g.call(aten.mul.Tensor, g.call(aten.unsqueeze.default, rows, 0), 0.5)
    found = at_slots(g, wide)
    assert found is not None
    torch.testing.assert_close(found, g.values[wide][0][SLOTS.long()])


def test_what_depends_on_tokens_is_not_made() -> None:
    g = GraphBuilder()
    places = columns(g, start=0)
    ids = next(node for node in g.graph.nodes if node.op == "placeholder")
    assert at_slots(g, g.call(aten.add.Tensor, places, ids)) is None
    # Neither is what mixes columns.
    assert at_slots(g, g.call(aten.cumsum.default, places, 0)) is None
