"""Rules of every level: at each level, one broken graph for each rule."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import sympy
import torch
from torch.fx import GraphModule, Node
from verifier.broken import insert, last_tensor_call, output, return_instead, type_of, valid

from tilewright.errors import VerifierError, Where
from tilewright.ir.facts import Origin, TensorType, TupleType, drop_fact, set_fact
from tilewright.ir.graph import Level, info, update_info
from tilewright.ir.regions import Anchor, Region
from tilewright.passes.spec.common import COMMON
from tilewright.passes.spec.verify import SPECS, verify

aten = torch.ops.aten
BREAKERS: dict[str, Callable[[GraphModule], Node | None]] = {}
pytestmark = pytest.mark.usefixtures("one_thread")


def breaks(rule: str) -> Callable[[Callable[[GraphModule], Node | None]], None]:
    """Enters a function that breaks the rule and returns the node to be named."""

    def enter(function: Callable[[GraphModule], Node | None]) -> None:
        BREAKERS[rule] = function

    return enter


@breaks("known_nodes")
def _(gm: GraphModule) -> Node:
    with gm.graph.inserting_before(output(gm)):
        return gm.graph.call_method("sigmoid", (last_tensor_call(gm),))


@breaks("ordered")
def _(gm: GraphModule) -> Node:
    node = last_tensor_call(gm)
    next(operand for operand in node.all_input_nodes if operand.op.startswith("call_")).prepend(node)
    return node


@breaks("typed")
def _(gm: GraphModule) -> Node:
    node = last_tensor_call(gm)
    drop_fact(node, TensorType)
    return node


@breaks("inputs_described")
def _(gm: GraphModule) -> Node:
    update_info(gm, inputs=tuple(reversed(info(gm).inputs)))
    return next(iter(gm.graph.nodes))


@breaks("output_flat")
def _(gm: GraphModule) -> Node:
    last = output(gm)
    last.args = ([*last.args[0]],)  # type: ignore[misc]
    return last


@breaks("origin_known")
def _(gm: GraphModule) -> Node:
    node = last_tensor_call(gm)
    drop_fact(node, Origin)
    return node


@breaks("weights_resolve")
def _(gm: GraphModule) -> Node:
    node = next(node for node in gm.graph.nodes if node.op == "get_attr")
    set_fact(node, replace(type_of(node), dtype=torch.float16))
    return node


@breaks("functional")
def _(gm: GraphModule) -> Node:
    x = last_tensor_call(gm)
    return insert(gm, aten.add_.Tensor, (x, 1.0), type_of(x))


@breaks("no_random")
def _(gm: GraphModule) -> Node:
    x = last_tensor_call(gm)
    return insert(gm, aten.rand_like.default, (x,), type_of(x))


@breaks("no_dead_nodes")
def _(gm: GraphModule) -> Node:
    x = last_tensor_call(gm)
    return insert(gm, aten.neg.default, (x,), type_of(x))


@breaks("known_symbols")
def _(gm: GraphModule) -> Node:
    node = last_tensor_call(gm)
    size = sympy.Symbol("Q", integer=True, positive=True)
    set_fact(node, TensorType((size, *type_of(node).shape[1:]), type_of(node).dtype))
    return node


@breaks("results_by_item")
def _(gm: GraphModule) -> Node:
    x = last_tensor_call(gm)
    item = TensorType(type_of(x).shape[:-1], type_of(x).dtype)
    both = insert(gm, aten.max.dim, (x, -1), TupleType((item, replace(item, dtype=torch.int64))))
    return return_instead(gm, insert(gm, aten.neg.default, (both,), item))


@breaks("facts_fit")
def _(gm: GraphModule) -> Node:
    node = last_tensor_call(gm)
    set_fact(node, Region(99, Anchor.ROW, None))
    return node


@breaks("types_hold")
def _(gm: GraphModule) -> Node:
    node = last_tensor_call(gm)
    set_fact(node, replace(type_of(node), dtype=torch.float16))
    return node


def check(gm: GraphModule, rule: str, node: Node | None) -> None:
    """The verifier names the rule, the node and its line."""
    with pytest.raises(VerifierError) as error:
        verify(gm, after="some_pass")
    assert error.value.rule == rule, str(error.value)
    if node is None:
        assert error.value.where is None
    else:
        assert isinstance(error.value.where, Where)
        assert error.value.where.node == node.name, str(error.value)
        has_line = node.op.startswith("call_") and rule not in ("origin_known", "known_nodes")
        assert bool(error.value.where.source) or not has_line
    assert "some_pass" in error.value.hint
    assert error.value.why


@pytest.mark.parametrize("level", Level)
def test_valid_graphs_pass(level: Level) -> None:
    verify(valid(level))


@pytest.mark.parametrize("level", Level)
@pytest.mark.parametrize("rule", BREAKERS)
def test_common_rule(level: Level, rule: str) -> None:
    gm = valid(level)
    check(gm, rule, BREAKERS[rule](gm))


def test_every_common_rule_has_a_broken_graph() -> None:
    assert set(BREAKERS) == {rule.name for rule in COMMON}


@pytest.mark.parametrize("level", Level)
def test_rules_have_unique_names(level: Level) -> None:
    names = [rule.name for rule in SPECS[level]]
    assert len(names) == len(set(names))
    assert len(names) >= 8


def test_a_type_that_holds_at_one_size_alone_is_caught() -> None:
    """B + 2 equals S at the first sizes tried, 3 and 5, and not at the second, 4 and 7."""
    gm = valid(Level.NORMALIZED)
    node = next(node for node in gm.graph.nodes if node.target is aten.embedding.default)
    batch, _, width = type_of(node).shape
    assert isinstance(batch, sympy.Symbol)
    set_fact(node, TensorType((batch, batch + 2, width), type_of(node).dtype))
    check(gm, "types_hold", node)
