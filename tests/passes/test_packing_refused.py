"""The ledger of refusals: graphs whose padding may not be removed, each with the rule and the node it breaks it at."""

from collections.abc import Callable

import pytest
import torch
from numerics.random_graphs import Padded, copy_of, run
from torch.fx import GraphModule, Node

from tilewright.errors import PackingRefused, Where
from tilewright.ir.facts import TensorType, set_fact
from tilewright.ir.graph import Level, info
from tilewright.ir.sizes import BATCH, SEQ
from tilewright.passes.base import run_pass
from tilewright.passes.packing.remove_padding import RemovePadding

aten = torch.ops.aten
tw = torch.ops.tilewright
pytestmark = pytest.mark.usefixtures("one_thread")
N = 24
Case = Callable[[Padded], Node]
LEDGER: dict[str, tuple[str, Case]] = {}


def case(rule: str) -> Callable[[Case], Case]:
    """Enters a graph into the ledger; it marks the node to be named as ``g.culprit``."""

    def enter(build: Case) -> Case:
        LEDGER[build.__name__] = (rule, build)
        return build

    return enter


def hidden(g: Padded) -> Node:
    """Tokens after one layer."""
    return g.encoder_layer(g.embed(g.ids, 23, N))


def blame(g: Padded, node: Node) -> Node:
    """Marks the node the refusal must name."""
    g.culprit = node  # type: ignore[attr-defined]
    return node


def attention_of(g: Padded) -> Node:
    """The attention that was added last."""
    return next(node for node in reversed(g.graph.nodes) if node.target is tw.attention.default)


@case("has_attention")
def no_attention(g: Padded) -> Node:
    return g.feed_forward(g.embed(g.ids, 23, N))


@case("has_validity")
def attention_over_pads(g: Padded) -> Node:
    x = g.attention(g.embed(g.ids, 23, N), valid=None)
    blame(g, attention_of(g))
    return x


@case("has_validity")
def second_attention_over_pads(g: Padded) -> Node:
    x = g.attention(hidden(g), valid=None)
    blame(g, attention_of(g))
    return x


@case("one_validity")
def two_validities(g: Padded) -> Node:
    x = g.attention(hidden(g), valid=g.call(aten.ne.Scalar, g.ids, 1))
    blame(g, attention_of(g))
    return x


@case("one_validity")
def second_mask_input(g: Padded) -> Node:
    x = g.attention(hidden(g), valid=g.mask("other_mask"))
    blame(g, attention_of(g))
    return x


@case("validity_is_boolean")
def float_validity(g: Padded) -> Node:
    valid = g.call(torch.ops.prims.convert_element_type.default, g.mask_input, torch.float64)
    x = g.attention(g.embed(g.ids, 23, N), valid=valid)
    blame(g, attention_of(g))
    return x


@case("validity_is_batch_by_sequence")
def one_validity_for_all_sequences(g: Padded) -> Node:
    valid = g.call(aten.ne.Scalar, g.column_positions(), 3)
    x = g.attention(g.embed(g.ids, 23, N), valid=valid)
    blame(g, attention_of(g))
    return x


@case("validity_is_batch_by_sequence")
def fixed_batch(g: Padded) -> Node:
    x = g.attention(g.embed(g.ids, 23, N))
    set_fact(g.mask_input, TensorType((7, SEQ), torch.int64))
    blame(g, attention_of(g))
    return x


@case("validity_from_tokens")
def tokens_decide_what_is_real(g: Padded) -> Node:
    scores = g.call(aten.sum.dim_IntList, g.embed(g.ids, 23, N), [2])
    valid = blame(g, g.call(aten.gt.Scalar, scores, 0.0))
    return g.attention(g.embed(g.ids, 23, N), valid=valid)


@case("masked_places_alike")
def masked_places_that_differ_before_column_0(g: Padded) -> Node:
    """A masked column 0 weighs all places alike, and these hold what their ids say."""
    x = g.attention(g.embed(g.ids, 23, N), uniform_pads=True)
    blame(g, attention_of(g))
    return g.call(aten.select.int, x, 1, 0)


@case("sinks_are_fixed")
def sinks_of_each_sequence(g: Padded) -> Node:
    sinks = g.weight("sinks", 2)
    set_fact(sinks, TensorType((BATCH,), torch.float64))
    x = g.attention(g.embed(g.ids, 23, N), sinks=sinks)
    blame(g, attention_of(g))
    return x


@case("attention_over_itself")
def attention_over_a_memory(g: Padded) -> Node:
    q = g.heads(hidden(g), 2)
    memory = g.weight("memory", 7, 2, 13, 12)
    set_fact(memory, TensorType((BATCH, 2, 13, 12), torch.float64))
    out = g.call(tw.attention.default, q, memory, memory, g.mask_input, None, None, 1.0, False, -1, -1, 0.0)
    return blame(g, out)


@case("no_mixing_of_places")
def mean_over_pads(g: Padded) -> Node:
    return blame(g, g.call(aten.mean.dim, hidden(g), [1]))


@case("no_mixing_of_places")
def maximum_over_pads(g: Padded) -> Node:
    return blame(g, g.call(aten.amax.default, hidden(g), [1]))


@case("no_mixing_of_places")
def mean_under_another_mask(g: Padded) -> Node:
    x = hidden(g)
    other = g.call(aten.unsqueeze.default, g.call(aten.ne.Scalar, g.ids, 1), 2)
    other = g.call(torch.ops.prims.convert_element_type.default, other, torch.float64)
    return blame(g, g.call(aten.sum.dim_IntList, g.call(aten.mul.Tensor, x, other), [1]))


@case("no_mixing_of_places")
def shifted_masked_mean(g: Padded) -> Node:
    x = g.call(aten.mul.Tensor, hidden(g), g.token_mask(N))
    x = g.call(aten.add.Tensor, x, g.weight("shift", N))
    return blame(g, g.call(aten.sum.dim_IntList, x, [1]))


@case("column_from_tokens")
def column_of_the_greatest_feature(g: Padded) -> Node:
    """Which column is read depends on rows that there are only once it is known."""
    x = hidden(g)
    column = g.call(
        aten.argmax.default, g.call(aten.sum.dim_IntList, g.call(aten.mul.Tensor, x, g.token_mask(N)), [2]), 1
    )
    return blame(g, g.call(tw.select_column.default, x, column))


@case("no_mixing_of_places")
def one_place_of_each_head(g: Padded) -> Node:
    """Heads are on the axis of which one place is read."""
    column = g.call(aten.mul.Tensor, g.call(aten.sum.dim_IntList, g.ids, [1]), 0)
    return blame(g, g.call(tw.select_column.default, g.heads(hidden(g), 2), column))


@case("no_mixing_of_places")
def all_but_the_first_column(g: Padded) -> Node:
    return blame(g, g.call(aten.slice.Tensor, hidden(g), 1, 1, 9223372036854775807))


@case("no_mixing_of_places")
def first_sequence(g: Padded) -> Node:
    return blame(g, g.call(aten.select.int, hidden(g), 0, 0))


@case("no_mixing_of_places")
def softmax_over_the_sequence(g: Padded) -> Node:
    return blame(g, g.call(aten.softmax.int, hidden(g), 1))


@case("no_mixing_of_places")
def running_sum(g: Padded) -> Node:
    return blame(g, g.call(aten.cumsum.default, hidden(g), 1))


@case("no_mixing_of_places")
def norm_over_sequence_and_features(g: Padded) -> Node:
    return blame(g, g.call(aten.layer_norm.default, hidden(g), [13, N]))


@case("no_mixing_of_places")
def sum_over_the_batch(g: Padded) -> Node:
    return blame(g, g.call(aten.sum.dim_IntList, hidden(g), [0]))


@case("no_mixing_of_places")
def tokens_mixed_by_a_linear(g: Padded) -> Node:
    return blame(g, g.linear(g.call(aten.permute.default, hidden(g), [0, 2, 1]), "mixer", 5))


@case("no_mixing_of_places")
def whole_sequence_as_features(g: Padded) -> Node:
    return blame(g, g.call(aten.reshape.default, hidden(g), [g.batch, -1]))


@case("no_mixing_of_places")
def rows_in_another_order(g: Padded) -> Node:
    swapped = g.call(aten.permute.default, hidden(g), [1, 0, 2])
    return blame(g, g.call(aten.reshape.default, swapped, [-1, N]))


@case("no_mixing_of_places")
def rows_split_in_another_order(g: Padded) -> Node:
    flat = g.call(aten.reshape.default, hidden(g), [-1, N])
    return blame(g, g.call(aten.reshape.default, flat, [g.length, g.batch, N]))


@case("no_mixing_of_places")
def prepended_column(g: Padded) -> Node:
    x = hidden(g)
    return blame(g, g.call(aten.cat.default, [g.call(aten.slice.Tensor, x, 1, 0, 1), x], 1))


@case("same_token_axes")
def pairs_of_tokens(g: Padded) -> Node:
    x = hidden(g)
    rows, columns = (g.call(aten.unsqueeze.default, x, axis) for axis in (2, 1))
    return blame(g, g.call(aten.add.Tensor, rows, columns))


@case("known_flow")
def product_of_tokens(g: Padded) -> Node:
    x = hidden(g)
    return blame(g, g.call(aten.matmul.default, x, g.call(aten.permute.default, x, [0, 2, 1])))


@case("known_flow")
def convolution_over_pads(g: Padded) -> Node:
    x = g.call(aten.permute.default, hidden(g), [0, 2, 1])
    kernel = g.weight("kernel", N, N, 3)
    return blame(g, g.call(aten.convolution.default, x, kernel, None, [1], [1], [1], False, [0], 1))


@case("known_flow")
def reversed_sequence(g: Padded) -> Node:
    return blame(g, g.call(aten.flip.default, hidden(g), [1]))


@case("known_flow")
def last_real_token(g: Padded) -> Node:
    x = hidden(g)
    last = g.call(aten.sub.Tensor, g.call(aten.sum.dim_IntList, g.mask_input, [1]), 1)
    rows = g.call(aten.arange.start_step, 0, g.batch, 1)
    return blame(g, g.call(aten.index.Tensor, x, [rows, last]))


@case("weights_are_fixed")
def table_of_tokens(g: Padded) -> Node:
    table = g.call(aten.reshape.default, hidden(g), [-1, N])
    return blame(g, g.call(aten.embedding.default, table, g.ids))


@case("fixed_features")
def one_feature_for_each_column(g: Padded) -> Node:
    score = g.linear(hidden(g), "score", 1)
    return blame(g, g.call(aten.expand.default, score, [g.batch, g.length, g.length]))


@case("packed_once")
def packed_already(g: Padded) -> Node:
    blame(g, g.call(tw.pack_index.default, g.mask_input, []))
    rows = g.item(g.culprit, 0)  # type: ignore[attr-defined]
    return g.call(tw.gather_rows.default, g.embed(g.ids, 23, N), rows)


def build(name: str) -> tuple[GraphModule, Padded]:
    """The graph of that name."""
    g = Padded()
    return g.done(LEDGER[name][1](g)), g


@pytest.mark.parametrize("name", LEDGER)
def test_refused_with_rule_and_node(name: str) -> None:
    graph, g = build(name)
    rule = LEDGER[name][0]
    with pytest.raises(PackingRefused, match=f"rule {rule} ") as refused:
        run_pass(RemovePadding("on"), copy_of(graph))
    culprit = getattr(g, "culprit", None)
    if culprit is not None:
        assert refused.value.where == Where(culprit.name, f"test.py:1 {culprit.name}")
    assert refused.value.why


@pytest.mark.parametrize("name", [name for name in LEDGER if name != "fixed_batch"])
def test_left_padded_with_a_reason(name: str) -> None:
    graph, g = build(name)
    left, record = run_pass(RemovePadding("auto"), copy_of(graph))
    reason = info(left).reasons["packing"]
    assert reason.startswith(LEDGER[name][0] + ": ")
    assert record.reasons == {"packing": reason}
    if hasattr(g, "culprit"):
        assert f"node '{g.culprit.name}'" in reason
    assert info(left).level is Level.PACKED
    assert [node.target for node in left.graph.nodes] == [node.target for node in graph.graph.nodes]
    assert torch.equal(run(graph, g.example)[0], run(left, g.example)[0])


def test_the_ledger_is_long_enough() -> None:
    assert len(LEDGER) >= 15
