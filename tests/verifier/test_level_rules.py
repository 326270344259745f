"""Rules of single levels: one broken graph for each rule."""

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.fx import GraphModule, Node
from verifier.broken import body, first, insert, output, region, return_also, return_instead, returned, type_of, valid
from verifier.test_common_rules import check

from tilewright.ir.facts import Origin, TensorType, TupleType, drop_fact, fact, set_fact
from tilewright.ir.graph import InputSpec, Level, info, update_info
from tilewright.ir.layout import Layout, LayoutKind
from tilewright.ir.regions import Anchor, AttentionTable, GemmTable, Placement, Region, RegionTag
from tilewright.ir.sizes import BATCH, PAGES, SEQ, TABLE, TOKENS
from tilewright.passes.spec.common import COMMON
from tilewright.passes.spec.verify import SPECS

aten = torch.ops.aten
tw = torch.ops.tilewright
pytestmark = pytest.mark.usefixtures("one_thread")
Breaker = Callable[[GraphModule], Node | None]
BREAKERS: dict[tuple[Level, str], Breaker] = {}
PADDED = Layout(LayoutKind.PADDED, 0, 1)
PACKED = Layout(LayoutKind.PACKED, 0, 1)


def breaks(rule: str, *levels: Level) -> Callable[[Breaker], Breaker]:
    """Enters a function that breaks the rule and returns the node to be named."""

    def enter(function: Breaker) -> Breaker:
        for level in levels:
            BREAKERS[level, rule] = function
        return function

    return enter


SPELLED = (Level.NORMALIZED, Level.PACKED, Level.FUSED, Level.SPECIALIZED, Level.PLACED)


def _on_result(gm: GraphModule, target: Any, *args: Any, shape: Any = None, **kwargs: Any) -> Node:
    """Inserts an op on the first output and returns its result instead."""
    x = returned(gm)
    type_ = type_of(x) if shape is None else TensorType(shape(type_of(x).shape), type_of(x).dtype)
    return return_instead(gm, insert(gm, target, (x, *args), type_, PADDED, **kwargs))


@breaks("dispatcher_ops", Level.EXPORTED, *SPELLED)
def _(gm: GraphModule) -> Node:
    return _on_result(gm, torch.relu)


@breaks("one_view_spelling", *SPELLED)
def _(gm: GraphModule) -> Node:
    return _on_result(gm, aten.alias.default)


@breaks("axes_from_zero", *SPELLED)
def _(gm: GraphModule) -> Node:
    return _on_result(gm, aten.unsqueeze.default, -1, shape=lambda shape: (*shape, 1))


@breaks("tensors_or_numbers", *SPELLED)
def _(gm: GraphModule) -> Node:
    return _on_result(gm, aten.add.Tensor, 1.0, alpha=2)


@breaks("one_cast", *SPELLED)
def _(gm: GraphModule) -> Node:
    return _on_result(gm, aten._to_copy.default, dtype=torch.float64)


@breaks("nothing_idle", *SPELLED)
def _(gm: GraphModule) -> Node:
    return _on_result(gm, torch.ops.prims.convert_element_type.default, torch.float64)


@breaks("weights_through_linear", *SPELLED)
def _(gm: GraphModule) -> Node:
    weight = next(node for node in gm.graph.nodes if node.op == "get_attr" and type_of(node).shape == (24, 24))
    return _on_result(gm, aten.matmul.default, weight)


@breaks("linear_weight", *SPELLED)
def _(gm: GraphModule) -> Node:
    weight = next(node for node in gm.graph.nodes if node.op == "get_attr" and type_of(node).shape == (24,))
    return _on_result(gm, aten.linear.default, weight, shape=lambda shape: shape[:-1])


@breaks("expert_weights", *SPELLED)
def _(gm: GraphModule) -> Node:
    x = returned(gm)
    weight = next(node for node in gm.graph.nodes if node.op == "get_attr" and type_of(node).shape == (24, 24))
    experts = insert(gm, tw.top_indices.default, (x, 2), TensorType((*type_of(x).shape[:-1], 2), torch.int64), PADDED)
    type_ = TensorType((*type_of(experts).shape, 24), type_of(x).dtype)
    return return_instead(gm, insert(gm, tw.expert_linear.default, (x, weight, experts), type_, PADDED))


@breaks("one_attention", *SPELLED)
def _(gm: GraphModule) -> Node:
    x = returned(gm)
    return _on_result(gm, aten.scaled_dot_product_attention.default, x, x)


@breaks("no_packing", Level.EXPORTED, Level.NORMALIZED)
def _(gm: GraphModule) -> Node:
    mask = next(node for node in gm.graph.nodes if node.target == "attention_mask")
    offsets = insert(gm, aten.sum.dim_IntList, (mask, [1]), TensorType((BATCH,), torch.int64))
    type_ = type_of(returned(gm))
    rows = TensorType((BATCH, *type_.shape[1:]), type_.dtype)
    return return_instead(gm, insert(gm, tw.select_rows.default, (returned(gm), offsets), rows))


@breaks("score_tables", Level.NORMALIZED)
def _(gm: GraphModule) -> Node:
    attention = first(gm, tw.attention.default)
    attention.args = (*attention.args[:11], attention.args[0], None, None, None, False)
    return attention


@breaks("validity_of_keys", Level.NORMALIZED)
def _(gm: GraphModule) -> Node:
    attention = first(gm, tw.attention.default)
    with gm.graph.inserting_before(attention):
        valid_ = gm.graph.call_function(aten.cumsum.default, (attention.args[3], 1))
    set_fact(valid_, TensorType((BATCH, SEQ), torch.int64))
    set_fact(valid_, Origin("test.py:1 cumsum"))
    attention.update_arg(3, valid_)
    return attention


@breaks("layout_known", Level.PACKED)
def _(gm: GraphModule) -> Node:
    node = first(gm, aten.linear.default)
    drop_fact(node, Layout)
    return node


@breaks("one_row_index", Level.PACKED)
def _(gm: GraphModule) -> Node:
    index, gather = first(gm, tw.pack_index.default), first(gm, tw.gather_rows.default)
    with gm.graph.inserting_before(gather):
        second = gm.graph.node_copy(index)
        rows = gm.graph.node_copy(gather.args[1], lambda _: second)  # type: ignore[arg-type]
    gather.update_arg(1, rows)
    return second


@breaks("reason_when_padded", Level.PACKED)
def _(gm: GraphModule) -> None:
    made = valid(Level.NORMALIZED)
    for node in made.graph.nodes:
        set_fact(node, Layout(LayoutKind.PADDED))
    gm.graph = made.graph
    update_info(gm, reasons={})


@breaks("from_row_index", Level.PACKED)
def _(gm: GraphModule) -> Node:
    gather = first(gm, tw.gather_rows.default)
    gather.update_arg(1, next(node for node in gm.graph.nodes if node.name == "slots"))
    return gather


@breaks("tokens_first", Level.PACKED)
def _(gm: GraphModule) -> Node:
    node = first(gm, aten.linear.default)
    set_fact(node, PADDED)
    return node


@breaks("gathered_once", Level.PACKED)
def _(gm: GraphModule) -> Node:
    node = first(gm, tw.gather_rows.default)
    return return_also(gm, insert(gm, node.target, node.args, type_of(node), PACKED))


@breaks("scattered_once", Level.PACKED)
def _(gm: GraphModule) -> Node:
    scatter = first(gm, tw.scatter_rows.default)
    return return_also(gm, insert(gm, scatter.target, scatter.args, type_of(scatter), PADDED))


@breaks("stays_packed", Level.PACKED)
def _(gm: GraphModule) -> Node:
    scatter = first(gm, tw.scatter_rows.default)
    type_ = type_of(scatter.args[0])  # type: ignore[arg-type]
    args = (scatter, scatter.args[1])
    return return_instead(gm, insert(gm, tw.gather_rows.default, args, type_, PACKED))


@breaks("attention_packed", Level.PACKED)
def _(gm: GraphModule) -> Node:
    x = returned(gm)
    batch, seq, width = type_of(x).shape
    heads = insert(gm, aten.unsqueeze.default, (x, 1), TensorType((batch, 1, seq, width), type_of(x).dtype), PADDED)
    mask = next(node for node in gm.graph.nodes if node.target == "attention_mask")
    args = (heads, heads, heads, mask, None, None, 1.0, False, -1, -1, 0.0)
    type_ = TensorType((batch, seq, 1, width), type_of(x).dtype)
    return return_instead(gm, insert(gm, tw.attention.default, args, type_, PADDED))


@breaks("queries_placed", Level.PACKED)
def _(gm: GraphModule) -> Node:
    attention = first(gm, tw.attention_packed.default)
    attention.update_arg(6, attention.args[4])
    return attention


def _paged(gm: GraphModule) -> Node:
    """One more output: attention over pages that are inputs of their own."""
    kind = type_of(first(gm, aten.layer_norm.default)).dtype
    i32, slots = torch.int32, first(gm, tw.attention_packed.default).args[6]
    keys = (("keys", (PAGES, 1, 8, 24)), ("values", (PAGES, 1, 8, 24)))
    told = (("places", (TOKENS,)), ("cu_rows", (BATCH + 1,)), ("page_table", (BATCH, TABLE)))
    made = {}
    for name, shape in (*keys, *told):
        dtype = kind if (name, shape) in keys else i32
        with gm.graph.inserting_before(next(iter(gm.graph.nodes))):
            made[name] = gm.graph.placeholder(name)
        set_fact(made[name], TensorType(shape, dtype))
        set_fact(made[name], Origin("test.py:1"))
        set_fact(made[name], PACKED if shape == (TOKENS,) else Layout(LayoutKind.FREE))
        spec = InputSpec(name, dtype, shape, state=(name, shape) in keys)
        update_info(gm, inputs=(spec, *info(gm).inputs))
    x = first(gm, aten.layer_norm.default)
    heads = insert(gm, aten.unsqueeze.default, (x, 1), TensorType((TOKENS, 1, 24), kind), PACKED)
    pages = (made["keys"], made["values"])
    args = (heads, heads, heads, *pages, made["places"], made["cu_rows"], slots, made["page_table"], None, 1.0, -1, 0.0)
    return insert(gm, tw.attention_paged.default, args, TensorType((TOKENS, 1, 24), kind), PACKED)


@breaks("step_given", Level.PACKED)
def _(gm: GraphModule) -> Node:
    return return_also(gm, _paged(gm))  # its slots are those of the row index


@breaks("pages_once", Level.PACKED)
def _(gm: GraphModule) -> Node:
    one = _paged(gm)
    return return_also(gm, insert(gm, one.target, (one, *one.args[1:]), type_of(one), PACKED))


@breaks("rows_of_columns", Level.PACKED)
def _(gm: GraphModule) -> Node:
    select = first(gm, tw.select_rows.default)
    rows = select.args[1]
    with gm.graph.inserting_before(select):
        other = gm.graph.call_function(aten.neg.default, (rows,))
    set_fact(other, type_of(rows))  # type: ignore[arg-type]
    set_fact(other, Layout(LayoutKind.PER_SEQUENCE, 0))
    set_fact(other, Origin("test.py:1 neg"))
    select.update_arg(1, other)
    return select


@breaks("tokens_not_mixed", Level.PACKED)
def _(gm: GraphModule) -> Node:
    rows = first(gm, aten.layer_norm.default)
    return return_also(gm, insert(gm, aten.cumsum.default, (rows, 0), type_of(rows), PACKED))


def test_other_ways_to_mix_tokens() -> None:
    for target, args, shape in (
        (aten.flip.default, ([0],), (TOKENS, 24)),
        (aten.select.int, (0, 0), (24,)),
        (aten.permute.default, ([1, 0],), (24, TOKENS)),
        (aten.amax.default, ([0],), (24,)),
    ):
        gm = valid(Level.PACKED)
        rows = first(gm, aten.layer_norm.default)
        # A result with T is called packed, or the rule on T would speak first.
        layout = PACKED if shape[0] is TOKENS else PADDED
        type_ = TensorType(shape, type_of(rows).dtype)
        node = return_also(gm, insert(gm, target, (rows, *args), type_, layout))
        check(gm, "tokens_first" if target is aten.permute.default else "tokens_not_mixed", node)


@breaks("region_known", Level.FUSED)
def _(gm: GraphModule) -> Node:
    call, _ = region(gm, Anchor.GEMM)
    drop_fact(call, Region)
    return call


@breaks("work_in_regions", Level.FUSED)
def _(gm: GraphModule) -> Node:
    return _on_result(gm, aten.neg.default)


@breaks("tags_used_up", Level.FUSED)
def _(gm: GraphModule) -> Node:
    call, _ = region(gm, Anchor.GEMM)
    set_fact(call, RegionTag(3))
    return call


def _change(gm: GraphModule, kind: Anchor, **changes: Any) -> Node:
    call, record = region(gm, kind)
    set_fact(call, replace(record, **changes))
    return call


@breaks("ids_unique", Level.FUSED)
def _(gm: GraphModule) -> Node:
    calls = [node for node in gm.graph.nodes if node.op == "call_module"]
    set_fact(calls[-1], replace(fact(calls[-1], Region), id=fact(calls[0], Region).id))
    return calls[-1]


def _append_to_body(gm: GraphModule, call: Node, target: Any, *args: Any) -> Node:
    """Puts an op of unchanged type between a body's first result and its output."""
    inside = body(gm, call)
    return return_instead(inside, insert(inside, target, (returned(inside), *args), type_of(returned(inside))))


@breaks("bodies_closed", Level.FUSED)
def _(gm: GraphModule) -> Node:
    call, _ = region(gm, Anchor.GEMM)
    inside = body(gm, call)
    inside.register_buffer("hidden_weight", torch.ones((), dtype=torch.float64))
    with inside.graph.inserting_before(output(inside)):
        weight = inside.graph.get_attr("hidden_weight")
    set_fact(weight, TensorType((), torch.float64))
    _append_to_body(gm, call, aten.add.Tensor, weight)
    return call


@breaks("operands_by_position", Level.FUSED)
def _(gm: GraphModule) -> Node:
    call, _ = region(gm, Anchor.GEMM)
    call.kwargs = {"extra": call.args[0]}
    return call


@breaks("results_read", Level.FUSED)
def _(gm: GraphModule) -> Node:
    call, _ = region(gm, Anchor.GEMM)
    inside = body(gm, call)
    last = output(inside)
    last.args = ((*last.args[0], returned(inside)),)  # type: ignore[misc]
    items = fact(call, TupleType).items
    set_fact(call, TupleType((*items, items[0])))
    return call


@breaks("one_anchor", Level.FUSED)
def _(gm: GraphModule) -> Node:
    return _change(gm, Anchor.GEMM, anchor=Anchor.ROW)


@breaks("anchor_named", Level.FUSED)
def _(gm: GraphModule) -> Node:
    return _change(gm, Anchor.GEMM, anchor_node="nobody")


@breaks("opaque_has_reason", Level.FUSED)
def _(gm: GraphModule) -> Node:
    return _change(gm, Anchor.GEMM, anchor=Anchor.OPAQUE, reason="", anchor_node=None)


@breaks("tile_dependence", Level.FUSED)
def _(gm: GraphModule) -> Node:
    call, _ = region(gm, Anchor.GEMM)
    _append_to_body(gm, call, aten.softmax.int, 1)
    return call


def _table(gm: GraphModule, *entries: tuple[int | None, str]) -> Node:
    call, _ = region(gm, Anchor.GEMM)
    set_fact(call, replace(fact(call, GemmTable), entries=entries))
    return call


@breaks("table_known", Level.SPECIALIZED)
def _(gm: GraphModule) -> Node:
    call, _ = region(gm, Anchor.GEMM)
    drop_fact(call, GemmTable)
    return call


@breaks("table_on_its_region", Level.SPECIALIZED)
def _(gm: GraphModule) -> Node:
    call, _ = region(gm, Anchor.ATTENTION)
    set_fact(call, GemmTable(TOKENS, ((None, "vendor"),)))
    return call


@breaks("table_not_empty", Level.SPECIALIZED)
def _(gm: GraphModule) -> Node:
    return _table(gm)


@breaks("last_is_open", Level.SPECIALIZED)
def _(gm: GraphModule) -> Node:
    return _table(gm, (32, "triton"), (64, "vendor"))


@breaks("others_are_bounded", Level.SPECIALIZED)
def _(gm: GraphModule) -> Node:
    return _table(gm, (None, "triton"), (None, "vendor"))


@breaks("bounds_rise", Level.SPECIALIZED)
def _(gm: GraphModule) -> Node:
    return _table(gm, (32, "triton"), (32, "vendor"), (None, "vendor"))


@breaks("bounds_positive", Level.SPECIALIZED)
def _(gm: GraphModule) -> Node:
    return _table(gm, (0, "triton"), (None, "vendor"))


@breaks("variants_known", Level.SPECIALIZED)
def _(gm: GraphModule) -> Node:
    return _table(gm, (32, "cutlass"), (None, "vendor"))


@breaks("variants_fit", Level.SPECIALIZED)
def _(gm: GraphModule) -> Node:
    call, _ = region(gm, Anchor.ATTENTION)
    set_fact(call, replace(fact(call, AttentionTable), entries=((256, "short_128"), (None, "online"))))
    return call


@breaks("rows_of_product", Level.SPECIALIZED)
def _(gm: GraphModule) -> Node:
    call, _ = region(gm, Anchor.GEMM)
    set_fact(call, replace(fact(call, GemmTable), rows=BATCH))
    return call


def _place(gm: GraphModule, **changes: Any) -> Node:
    calls = [node for node in gm.graph.nodes if node.op == "call_module"]
    set_fact(calls[1], replace(fact(calls[1], Placement), **changes))
    return calls[1]


@breaks("placement_known", Level.PLACED)
def _(gm: GraphModule) -> Node:
    call, _ = region(gm, Anchor.GEMM)
    drop_fact(call, Placement)
    return call


@breaks("only_regions_placed", Level.PLACED)
def _(gm: GraphModule) -> Node:
    node = next(node for node in gm.graph.nodes if node.target is operator.getitem)
    set_fact(node, Placement())
    return node


@breaks("device_known", Level.PLACED)
def _(gm: GraphModule) -> Node:
    return _place(gm, device="tpu")


@breaks("tier_known", Level.PLACED)
def _(gm: GraphModule) -> Node:
    return _place(gm, weight_tier="tape")


@breaks("stage_counted", Level.PLACED)
def _(gm: GraphModule) -> Node:
    return _place(gm, stage=-1)


@breaks("stages_forward", Level.PLACED)
def _(gm: GraphModule) -> Node:
    _place(gm, stage=1)
    return _reader(gm)


@breaks("stages_without_gap", Level.PLACED)
def _(gm: GraphModule) -> Node:
    calls = [node for node in gm.graph.nodes if node.op == "call_module"]
    set_fact(calls[-1], replace(fact(calls[-1], Placement), stage=2))
    return calls[-1]


@breaks("transfers_explicit", Level.PLACED)
def _(gm: GraphModule) -> Node:
    calls = [node for node in gm.graph.nodes if node.op == "call_module"]
    set_fact(calls[-1], Placement("cuda:1", 0, "cuda:1"))
    return calls[-1]


def _reader(gm: GraphModule) -> Node:
    """The first region that reads a result of the second."""
    second = [node for node in gm.graph.nodes if node.op == "call_module"][1]
    reached = {second}
    for node in gm.graph.nodes:
        if reached & set(node.all_input_nodes):
            if node.op == "call_module":
                return node
            reached.add(node)
    raise AssertionError("nothing reads it")


@pytest.mark.parametrize(("level", "rule"), BREAKERS, ids=[f"{level.name.lower()}-{rule}" for level, rule in BREAKERS])
def test_rule(level: Level, rule: str) -> None:
    gm = valid(level)
    check(gm, rule, BREAKERS[level, rule](gm))


def test_every_rule_has_a_broken_graph() -> None:
    common = {rule.name for rule in COMMON}
    own = {rule.name for spec in SPECS.values() for rule in spec} - common
    assert {rule for _, rule in BREAKERS} == own
