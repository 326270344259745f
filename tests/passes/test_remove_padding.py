"""RemovePadding on hand-written graphs: what a packed graph looks like, and that it gives what the padded one gives."""

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from numerics.random_graphs import Padded, assert_same_at_real_tokens, copy_of, run
from references import masks
from torch import Tensor
from torch.fx import GraphModule, Node

from tilewright.errors import PackingRefused
from tilewright.ir.facts import TensorType, fact, where
from tilewright.ir.graph import Level, info
from tilewright.ir.layout import Layout, LayoutKind
from tilewright.ir.sizes import BATCH, SEQ, TOKENS
from tilewright.ops import Flow, Traits, register
from tilewright.passes.base import run_pass
from tilewright.passes.packing.remove_padding import RemovePadding
from tilewright.passes.spec.verify import verify

aten = torch.ops.aten
tw = torch.ops.tilewright
pytestmark = pytest.mark.usefixtures("one_thread")
PATTERNS = ("full", "uneven", "left", "right", "one_token", "holes", "empty_row")


def pack(graph: GraphModule, unpad: str = "on") -> GraphModule:
    """The packed graph, verified; the one given stays as it is."""
    verify(graph)
    packed, _ = run_pass(RemovePadding(unpad), copy_of(graph))
    verify(packed)
    return packed


def ops(graph: GraphModule) -> Counter[object]:
    """How often each op is called."""
    return Counter(node.target for node in graph.graph.nodes if node.op == "call_function")


def check(graph: GraphModule, packed: GraphModule, inputs: tuple[Tensor, ...]) -> None:
    """Both graphs agree on these inputs; the second is the mask."""
    assert_same_at_real_tokens(graph, run(graph, inputs), run(packed, inputs), inputs[1], 1e-12)


def inputs_for(pattern: str, batch: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """Ids and a mask."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 23, (batch, length), generator=g), masks(batch, length, pattern, g)


def encoder(g: Padded, layers: int = 2, n: int = 24) -> Node:
    """Embeddings by id and column, then post-norm layers."""
    x = g.add(g.embed(g.ids, 23, n), g.embed(g.column_positions(), 40, n))
    x = g.norm(x, "embedding_norm")
    for _ in range(layers):
        x = g.encoder_layer(x)
    return x


@pytest.fixture(scope="module")
def bert() -> tuple[GraphModule, GraphModule]:
    """A BERT with per-token output and pooler, padded and packed."""
    g = Padded()
    hidden = encoder(g)
    pooled = g.call(aten.tanh.default, g.linear(g.first(hidden), "pooler", 24))
    graph = g.done(hidden, pooled)
    return graph, pack(graph)


def test_one_index_one_gather_an_input_one_scatter_an_output(bert: tuple[GraphModule, GraphModule]) -> None:
    counts = ops(bert[1])
    assert counts[tw.pack_index.default] == 1
    assert counts[tw.gather_rows.default] == 2
    assert counts[tw.scatter_rows.default] == 1
    assert counts[tw.select_rows.default] == 1
    assert counts[tw.attention_packed.default] == 2
    assert counts[tw.attention.default] == 0


def test_gathers_take_integers_before_the_embeddings(bert: tuple[GraphModule, GraphModule]) -> None:
    for node in bert[1].graph.nodes:
        if node.target is tw.gather_rows.default:
            assert fact(node, TensorType) == TensorType((TOKENS,), torch.int64)


def test_all_work_between_gather_and_scatter_is_on_tokens(bert: tuple[GraphModule, GraphModule]) -> None:
    for node in bert[1].graph.nodes:
        if node.target in (aten.linear.default, aten.layer_norm.default, aten.gelu.default, aten.embedding.default):
            assert fact(node, TensorType).shape[0] in (TOKENS, BATCH)
            assert SEQ not in fact(node, TensorType).shape


def test_packed_nodes_keep_their_lines(bert: tuple[GraphModule, GraphModule]) -> None:
    lines = {node.name: str(where(node)) for node in bert[0].graph.nodes}
    for node in bert[1].graph.nodes:
        if node.target is aten.linear.default:
            assert str(where(node)) == lines[node.name]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_agrees_with_the_padded_graph(bert: tuple[GraphModule, GraphModule], pattern: str) -> None:
    for seed, (batch, length) in enumerate([(1, 1), (1, 9), (4, 6), (3, 2)]):
        check(*bert, inputs_for(pattern, batch, length, seed))


def test_empty_batch_and_no_token(bert: tuple[GraphModule, GraphModule]) -> None:
    check(*bert, (torch.zeros(0, 5, dtype=torch.long), torch.zeros(0, 5, dtype=torch.long)))
    ids, mask = inputs_for("full", 2, 4, 0)
    check(*bert, (ids, torch.zeros_like(mask)))


def test_left_padding_keeps_column_0_as_query_only(bert: tuple[GraphModule, GraphModule]) -> None:
    ids, _ = inputs_for("full", 2, 5, 0)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
    index = next(node for node in bert[1].graph.nodes if node.target is tw.pack_index.default)
    assert [column.args[1] for column in index.args[1]] == [0]
    check(*bert, (ids, mask))
    # Column 0 of the first row is masked: the pooler reads it, and what stands there may be anything.
    other = ids.clone()
    other[0, 1] = 22 - other[0, 1]
    for old, new in zip(run(bert[1], (ids, mask)), run(bert[1], (other, mask)), strict=True):
        torch.testing.assert_close(old, new, rtol=0, atol=0)


def test_without_a_pooler_no_row_is_kept_for_it() -> None:
    g = Padded()
    packed = pack(g.done(encoder(g, 1)))
    index = next(node for node in packed.graph.nodes if node.target is tw.pack_index.default)
    assert index.args[1] == []


def test_nan_in_pad_rows_reaches_nothing() -> None:
    g = Padded()
    x = g.linear(g.input("features", BATCH, SEQ, 10, dtype=g.dtype), "project", 24)
    x = g.encoder_layer(g.encoder_layer(g.add(x, g.embed(g.column_positions(), 40, 24)), causal=True))
    outputs = (x, g.first(x), g.mean_pooled(x), g.max_pooled(x))
    graph = g.done(*outputs)
    packed = pack(graph)
    ids, mask = inputs_for("right", 4, 7, 3)
    features = torch.randn(4, 7, 10, dtype=torch.float64)
    dirty = features.masked_fill((mask == 0)[:, :, None], float("nan"))
    expected = run(graph, (ids, mask, features))
    got = run(packed, (ids, mask, dirty))
    assert all(torch.isfinite(each).all() for each in got)
    assert_same_at_real_tokens(graph, expected, got, mask, 1e-12)


def test_features_are_gathered_first() -> None:
    g = Padded()
    parts = [g.input(name, BATCH, SEQ, 10, dtype=g.dtype) for name in ("features", "more_features")]
    total = g.call(aten.mul.Tensor, g.call(aten.add.Tensor, *parts), 3.0)
    packed = pack(g.done(g.encoder_layer(g.linear(total, "project", 24))))
    gathers = [node for node in packed.graph.nodes if node.target is tw.gather_rows.default]
    assert [node.args[0].name for node in gathers] == ["features", "more_features"]


def test_a_value_used_twice_is_gathered_once() -> None:
    g = Padded()
    columns = g.column_positions()
    x = g.add(g.embed(g.ids, 23, 24), g.embed(columns, 40, 24))
    x = g.call(aten.mul.Tensor, x, g.embed(columns, 40, 24))
    graph = g.done(g.encoder_layer(g.add(x, g.embed(g.ids, 23, 24))))
    packed = pack(graph)
    assert ops(packed)[tw.gather_rows.default] == 2
    check(graph, packed, inputs_for("left", 3, 6, 0))


def test_tokens_broadcast_against_axes_before_them() -> None:
    g = Padded()
    scores = g.call(aten.sum.dim_IntList, g.encoder_layer(g.embed(g.ids, 23, 24)), [2])
    each = g.call(aten.mul.Tensor, scores, g.weight("factors", 3, 1, 1))
    graph = g.done(each, g.call(aten.add.Tensor, each, g.mask_input))
    packed = pack(graph)
    for seed, pattern in enumerate(PATTERNS):
        check(graph, packed, inputs_for(pattern, 4, 6, seed))


def _pooled(method: str) -> Callable[[Padded, Node], Node]:
    return lambda g, x: getattr(g, method)(x)


def _first_slice(g: Padded, x: Node) -> Node:
    return g.call(aten.slice.Tensor, x, 1, 0, 1)


def _first_of_heads(g: Padded, x: Node) -> Node:
    return g.call(aten.select.int, g.heads(x, 2), 2, 0)


def _last_column(g: Padded, x: Node) -> Node:
    return g.call(aten.select.int, x, 1, -1)


def _last_token(g: Padded, x: Node) -> Node:
    """Of an empty row column -1, the last one; with left padding a place that may be masked."""
    count = g.call(aten.sum.dim_IntList, g.mask_input, [1])
    return g.call(tw.select_column.default, x, g.call(aten.sub.Tensor, count, 1))


def _rightmost_id(g: Padded, x: Node) -> Node:
    """The last id that is not the smallest one, masked or not, and column 0 beside it."""
    real = g.call(torch.ops.prims.convert_element_type.default, g.call(aten.ne.Scalar, g.ids, 0), torch.int64)
    places = g.call(aten.mul.Tensor, real, g.call(aten.arange.start_step, 0, g.length, 1))
    column = g.call(aten.argmax.default, places, 1)
    return g.call(aten.add.Tensor, g.call(tw.select_column.default, x, column), g.first(x))


def _second_column(g: Padded, x: Node) -> Node:
    return g.call(aten.slice.Tensor, g.encoder_layer(x, causal=True), 1, 1, 2)


def _convolved(g: Padded, x: Node) -> Node:
    masked = g.call(aten.permute.default, g.call(aten.mul.Tensor, x, g.token_mask(24)), [0, 2, 1])
    mixed = g.call(aten.convolution.default, masked, g.weight("kernel", 24, 24, 3), None, [1], [1], [1], False, [0], 1)
    mixed = g.call(aten.permute.default, mixed, [0, 2, 1])
    return g.encoder_layer(mixed)


def _per_head_output(g: Padded, x: Node) -> Node:
    return g.heads(x, 2)


def _flat(g: Padded, x: Node) -> Node:
    return g.call(aten.reshape.default, x, [-1, 24])


def _flat_front(g: Padded, x: Node) -> Node:
    flat = g.call(aten.permute.default, _flat(g, x), [1, 0])
    return g.call(aten.reshape.default, flat, [2, 12, -1])


ACCEPTED = {
    "mean pooling": _pooled("mean_pooled"),
    "max pooling": _pooled("max_pooled"),
    "first column, axis kept": _first_slice,
    "first column of heads": _first_of_heads,
    "last column": _last_column,
    "last token": _last_token,
    "right-most id and first column": _rightmost_id,
    "second column, behind causal attention, axis kept": _second_column,
    "convolution of masked tokens": _convolved,
    "heads": _per_head_output,
    "flat tokens": _flat,
    "flat tokens, last axis": _flat_front,
}


@pytest.mark.parametrize("head", ACCEPTED.values(), ids=ACCEPTED.keys())
def test_heads_that_are_legal(head: Callable[[Padded, Node], Node]) -> None:
    g = Padded()
    x = encoder(g, 1)
    graph = g.done(head(g, x), x)
    packed = pack(graph)
    for seed, pattern in enumerate(PATTERNS):
        batch, length = 4, 6
        inputs = inputs_for(pattern, batch, length, seed)
        expected, got = run(graph, inputs), run(packed, inputs)
        if head in (_flat, _flat_front):
            real = inputs[1].reshape(-1) != 0
            place = 0 if head is _flat else 2
            old, new = expected[0].movedim(place, 0), got[0].movedim(place, 0)
            assert old.shape == new.shape
            assert (new[~real] == 0).all()
            torch.testing.assert_close(old[real], new[real], rtol=1e-12, atol=1e-12)
            continue
        if head is _first_slice:
            torch.testing.assert_close(expected[0], got[0], rtol=1e-12, atol=1e-12)
            continue
        assert_same_at_real_tokens(graph, expected, got, inputs[1], 1e-12)


def test_several_hidden_states_are_each_scattered_once() -> None:
    g = Padded()
    first = encoder(g, 1)
    second = g.encoder_layer(first)
    packed = pack(g.done(first, second, second))
    assert ops(packed)[tw.scatter_rows.default] == 2


def test_values_that_are_not_packed_are_returned_as_they_are() -> None:
    g = Padded()
    counted = g.counted_positions()
    graph = g.done(g.encoder_layer(g.add(g.embed(g.ids, 23, 24), g.embed(counted, 40, 24))), counted, g.ids)
    packed = pack(graph)
    inputs = inputs_for("left", 3, 6, 0)
    for old, new in zip(run(graph, inputs)[1:], run(packed, inputs)[1:], strict=True):
        assert torch.equal(old, new)


def test_counted_positions_are_counted_before_packing() -> None:
    """Rule 1: positions are carried. Ids equal to the pad id inside a sequence would shift positions counted after."""
    g = Padded()
    x = g.add(g.embed(g.ids, 23, 24), g.embed(g.counted_positions(pad=1), 40, 24))
    graph = g.done(g.encoder_layer(x))
    packed = pack(graph)
    ids = torch.tensor([[1, 5, 1, 7, 1, 9], [3, 1, 1, 1, 2, 8]])
    mask = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 0, 1, 0, 1, 1]])
    check(graph, packed, (ids, mask))
    sums = [node for node in packed.graph.nodes if node.target is aten.cumsum.default]
    assert fact(sums[0], TensorType).shape == (BATCH, SEQ)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_windows_and_causal_order_are_on_slots(pattern: str) -> None:
    """Rule 4: with holes in the mask, packed distance is not slot distance."""
    g = Padded()
    x = g.embed(g.ids, 23, 24)
    x = g.add(x, g.attention(x, left=2, right=1))
    x = g.add(x, g.attention(x, causal=True, left=3))
    graph = g.done(x)
    check(graph, pack(graph), inputs_for(pattern, 4, 9, 1))


def _bias_of_masks(g: Padded, x: Node) -> Node:
    """[B, 1, S, S]: 1 where both places are real."""
    rows, columns = (g.call(aten.unsqueeze.default, g.mask_input, axis) for axis in (1, 2))
    both = g.call(aten.unsqueeze.default, g.call(aten.mul.Tensor, rows, columns), 1)
    return g.call(torch.ops.prims.convert_element_type.default, both, torch.float64)


def _bias_by_count(g: Padded, x: Node) -> Node:
    """[B, H, 1, S]: the number of a key among the real ones, times the slope of a head."""
    counted = g.call(aten.cumsum.default, g.mask_input, 1)
    return g.call(aten.mul.Tensor, g.weight("slopes", 2, 1, 1), _at_axes(g, counted, 1, 2))


def _bias_given(g: Padded, x: Node) -> Node:
    return g.input("bias", BATCH, 1, SEQ, SEQ, dtype=torch.float64)


def _bias_given_by_key(g: Padded, x: Node) -> Node:
    return g.input("bias", BATCH, 2, 1, SEQ, dtype=torch.float64)


def _bias_of_keys(g: Padded, x: Node) -> Node:
    """[B, H, 1, S], computed from packed tokens."""
    return g.call(aten.unsqueeze.default, g.call(aten.permute.default, g.linear(x, "score", 2), [0, 2, 1]), 2)


def _at_axes(g: Padded, value: Node, *axes: int) -> Node:
    for axis in axes:
        value = g.call(aten.unsqueeze.default, value, axis)
    return value


BIASES = [_bias_of_masks, _bias_by_count, _bias_given, _bias_given_by_key, _bias_of_keys]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("bias", BIASES)
def test_a_bias_of_each_sequence_stays_padded(bias: Callable[[Padded, Node], Node], pattern: str) -> None:
    g = Padded()
    x = g.embed(g.ids, 23, 24)
    made = bias(g, x)
    graph = g.done(g.attention(x, bias=made, causal=True), g.first(g.attention(x, bias=made)))
    inputs = inputs_for(pattern, 4, 9, 1)
    if made.op == "placeholder":
        shape = [{BATCH: 4, SEQ: 9}.get(size, size) for size in fact(made, TensorType).shape]  # type: ignore[call-overload]
        generator = torch.Generator().manual_seed(2)
        inputs = (*inputs, torch.randn(shape, generator=generator, dtype=torch.float64))  # type: ignore[assignment]
    check(graph, pack(graph), inputs)


def test_equal_validities_are_one() -> None:
    g = Padded()
    x = g.embed(g.ids, 23, 24)
    x = g.add(x, g.attention(x, valid=g.call(aten.ne.Scalar, g.mask_input, 0)))
    cast = g.call(torch.ops.prims.convert_element_type.default, g.mask_input, torch.bool)
    x = g.add(x, g.attention(x, valid=cast))
    x = g.add(x, g.attention(x))
    graph = g.done(x)
    packed = pack(graph)
    assert ops(packed)[tw.pack_index.default] == 1
    check(graph, packed, inputs_for("right", 3, 5, 0))


def test_validity_from_ids() -> None:
    """A mask made of the ids packs as well: a place is real where the id is not the pad id."""
    g = Padded()
    valid = g.call(aten.ne.Scalar, g.ids, 1)
    x = g.embed(g.ids, 23, 24)
    graph = g.done(g.add(x, g.attention(x, valid=valid)))
    packed = pack(graph)
    ids = torch.tensor([[1, 1, 4, 5], [3, 4, 5, 1]])
    expected, got = run(graph, (ids, ids)), run(packed, (ids, ids))
    torch.testing.assert_close(expected[0][ids != 1], got[0][ids != 1], rtol=1e-12, atol=1e-12)


@torch.library.custom_op("tilewright_tests::squared_relu", mutates_args=())
def squared_relu(x: Tensor) -> Tensor:
    """An op no pass has heard of."""
    return torch.relu(x) ** 2


@squared_relu.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("tilewright_tests::unit_norm", mutates_args=())
def unit_norm(x: Tensor, eps: float) -> Tensor:
    """Scales the last axis to length one."""
    return x / (x.norm(dim=-1, keepdim=True) + eps)


@unit_norm.register_fake
def _(x: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)


def test_another_transformer_with_new_ops_packs() -> None:
    """Parallel pre-norm blocks with a gate and two ops that only declare their traits."""
    activation = torch.ops.tilewright_tests.squared_relu.default
    scale = torch.ops.tilewright_tests.unit_norm.default
    register(activation, Traits(Flow.POINTWISE, triton="tl.where({0} > 0, {0} * {0}, 0.0)", zero_preserving=True))
    register(scale, Traits(Flow.LAST_AXIS))
    g = Padded()
    x = g.embed(g.ids, 23, 24)
    for _ in range(2):
        normed = g.call(scale, x, 1e-6)
        gate = g.call(aten.sigmoid.default, g.linear(normed, g.fresh("gate"), 24))
        mixed = g.call(aten.mul.Tensor, gate, g.attention(normed, heads=4, kv_heads=2, causal=True, left=4))
        x = g.add(g.add(x, mixed), g.feed_forward(normed, activation))
    graph = g.done(g.call(scale, x, 1e-6), g.mean_pooled(x))
    packed = pack(graph)
    for node in packed.graph.nodes:
        if node.target in (activation, scale):
            assert fact(node, Layout).kind is LayoutKind.PACKED
    for seed, pattern in enumerate(PATTERNS):
        check(graph, packed, inputs_for(pattern, 3, 8, seed))


def test_options() -> None:
    g = Padded()
    x = encoder(g, 1)
    graph = g.done(g.call(aten.mean.dim, x, [1]))
    for unpad, start in (("auto", "no_mixing_of_places"), ("off", "turned off")):
        left = pack(graph, unpad)
        assert info(left).level is Level.PACKED
        assert info(left).reasons["packing"].startswith(start)
        kinds = [fact(node, Layout).kind for node in left.graph.nodes if node.target is aten.linear.default]
        assert set(kinds) == {LayoutKind.PADDED}
        inputs = inputs_for("right", 3, 5, 0)
        assert torch.equal(run(graph, inputs)[0], run(left, inputs)[0])
    with pytest.raises(PackingRefused, match="no_mixing_of_places") as refused:
        pack(graph, "on")
    assert "mean" in str(refused.value.where)
    assert "test.py:1" in str(refused.value.where)
