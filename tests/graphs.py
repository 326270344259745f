"""Builds small graphs by hand, with their facts, and computes the value of each node on the way.

Sizes B, S, T stand for the numbers in ``SIZES``; no other axis of a test graph may have these lengths.
"""

import operator
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from tilewright.ir.facts import Origin, SizeValue, TensorType, TupleType, set_fact
from tilewright.ir.graph import GraphInfo, InputSpec, Level, OutputSpec, set_info
from tilewright.ir.sizes import BATCH, SEQ, TOKENS, Size

aten = torch.ops.aten
packing = torch.ops.tilewright
SIZES = {BATCH: 7, SEQ: 13, TOKENS: 53}


class GraphBuilder:
    """A graph under construction; ``values`` holds an example of each node.

    Args:
        level: that the graph will claim to be at.
        seed: of all random contents.
        dtype: of weights, unless they say another.
    """

    def __init__(self, level: Level = Level.PACKED, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(seed)
        self.level = level
        self.dtype = dtype
        self.graph = Graph()
        self.root = torch.nn.Module()
        self.values: dict[Node, Any] = {}
        self.inputs: list[InputSpec] = []
        self.outputs: tuple[Node, ...] = ()

    def input(self, name: str, *shape: Size, dtype: torch.dtype = torch.float32, high: int = 5) -> Node:
        """A placeholder with random contents; integers are below ``high``."""
        node = self.graph.placeholder(name)
        numbers = [int(sympy.sympify(size).subs(SIZES)) for size in shape]
        value = torch.randn(numbers, dtype=dtype) if dtype.is_floating_point else torch.randint(high, numbers).to(dtype)
        set_fact(node, TensorType(tuple(shape), dtype))
        self.inputs.append(InputSpec(name, dtype, tuple(shape)))
        return self._named(node, value)

    def mask(self, name: str = "mask") -> Node:
        """A [B, S] int64 input that marks T tokens, rows of uneven length padded on the right."""
        node = self.input(name, BATCH, SEQ, dtype=torch.int64)
        lengths = torch.tensor([13, 13, 1, 9, 2, 5, 10])
        self.values[node] = (torch.arange(SIZES[SEQ])[None, :] < lengths[:, None]).to(torch.int64)
        return node

    def weight(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Node:
        """A parameter with random contents; integers count up along the last axis."""
        dtype = dtype or self.dtype
        tensor = torch.randn(shape, dtype=dtype) if dtype.is_floating_point else torch.arange(shape[-1]).expand(shape)
        self.root.register_buffer(name, tensor)
        node = self.graph.get_attr(name)
        set_fact(node, TensorType(shape, dtype))
        return self._named(node, tensor)

    def size(self, x: Node, dim: int) -> Node:
        """``x.shape[dim]`` as a node."""
        node = self.graph.call_function(aten.sym_size.int, (x, dim))
        value = self.values[x].shape[dim]
        set_fact(node, SizeValue(_symbolic(value)))
        return self._named(node, value)

    def call(self, target: Callable[..., Any], *args: Any, name: str | None = None, **kwargs: Any) -> Node:
        """A call; its types come from running it on the example values."""
        node = self.graph.create_node("call_function", target, args, kwargs, name)
        given = torch.fx.node.map_arg((args, kwargs), lambda n: self.values[n])
        value = target(*given[0], **given[1])
        if isinstance(value, tuple):
            set_fact(node, TupleType(tuple(map(_type, value))))
        else:
            set_fact(node, _type(value))
        return self._named(node, value)

    def item(self, node: Node, place: int) -> Node:
        """One of several results."""
        return self.call(operator.getitem, node, place)

    def linear(self, x: Node, name: str, n: int, bias: bool = True) -> Node:
        """A linear with a weight of its own."""
        k = int(self.values[x].shape[-1])
        weight = self.weight(f"{name}_weight", n, k)
        extra = (self.weight(f"{name}_bias", n),) if bias else ()
        return self.call(aten.linear.default, x, weight, *extra, name=name)

    def norm(self, x: Node, name: str) -> Node:
        """A layer norm over the last axis."""
        n = int(self.values[x].shape[-1])
        weight, bias = self.weight(f"{name}_weight", n), self.weight(f"{name}_bias", n)
        return self.call(aten.layer_norm.default, x, [n], weight, bias, 1e-5, name=name)

    def done(self, *outputs: Node) -> GraphModule:
        """The graph module, with its info; also the inputs and expected outputs as ``example`` and ``expected``."""
        self.graph.output(tuple(outputs))
        gm = GraphModule(self.root, self.graph)
        build = OutputSpec(lambda flat: tuple(flat), tuple(f"out{i}" for i in range(len(outputs))))
        set_info(gm, GraphInfo(self.level, tuple(self.inputs), build))
        self.example: list[Tensor] = [self.values[n] for n in self.graph.nodes if n.op == "placeholder"]
        self.expected: list[Tensor] = [self.values[n] for n in outputs]
        return gm

    def _named(self, node: Node, value: Any) -> Node:
        self.values[node] = value
        set_fact(node, Origin(f"test.py:1 {node.name}"))
        return node


def _symbolic(size: int) -> Size:
    by_number = {number: symbol for symbol, number in SIZES.items()} | {
        SIZES[BATCH] * SIZES[SEQ]: BATCH * SEQ,
        SIZES[BATCH] + 1: BATCH + 1,
    }
    return by_number.get(size, size)


def _type(value: Tensor) -> TensorType:
    return TensorType(tuple(_symbolic(size) for size in value.shape), value.dtype)


def bert_layer(g: GraphBuilder, x: Node, index: dict[str, Node], prefix: str, heads: int = 2) -> Node:
    """A packed post-norm encoder layer on x [T, N]."""
    n = int(g.values[x].shape[-1])
    q, k, v = (g.linear(x, f"{prefix}_{part}", n) for part in "qkv")
    rows = g.size(x, 0)
    q, k, v = (g.call(aten.reshape.default, part, [rows, heads, n // heads]) for part in (q, k, v))
    offsets = [index[key] for key in ("cu_seqlens", "key_start", "seqlens_k", "slots", "slots")]
    scale = (n // heads) ** -0.5
    context = g.call(
        packing.attention_packed.default,
        *(q, k, v, *offsets, None, None, index["length"], index["length"], scale, False, -1, -1, 0.0),
        name=f"{prefix}_attention",
    )
    merged = g.call(aten.reshape.default, context, [rows, n])
    attended = g.call(aten.add.Tensor, g.linear(merged, f"{prefix}_out", n), x, name=f"{prefix}_out_residual")
    normed = g.norm(attended, f"{prefix}_norm1")
    hidden = g.call(aten.gelu.default, g.linear(normed, f"{prefix}_ff1", 4 * n), name=f"{prefix}_gelu")
    added = g.call(aten.add.Tensor, g.linear(hidden, f"{prefix}_ff2", n), normed, name=f"{prefix}_ff2_residual")
    return g.norm(added, f"{prefix}_norm2")


def packed_bert(layers: int = 2, n: int = 32) -> GraphBuilder:
    """A packed encoder: embeddings, layers, scatter, pooler. Call ``done`` on its ``outputs``."""
    g = GraphBuilder()
    ids = g.input("input_ids", BATCH, SEQ, dtype=torch.int64)
    mask = g.mask()
    length = g.size(ids, 1)
    made = {"dtype": torch.int64, "device": torch.device("cpu"), "pin_memory": False}
    column = g.call(aten.full.default, [g.size(mask, 0)], 0, name="column", **made)
    packed = g.call(packing.pack_index.default, mask, [column], name="pack")
    names = ("row_index", "slots", "cu_seqlens", "key_start", "seqlens_k", "column_rows")
    index = {name: g.item(packed, place) for place, name in enumerate(names)} | {"length": length}
    rows = g.call(aten.select.int, index["column_rows"], 0, 0, name="rows")
    positions = g.weight("position_ids", 1, 20, dtype=torch.int64)
    positions = g.call(aten.slice.Tensor, positions, 1, 0, length)
    positions = g.call(aten.expand.default, positions, [g.size(ids, 0), length])
    words = g.call(packing.gather_rows.default, ids, index["row_index"], name="gather_ids")
    places = g.call(packing.gather_rows.default, positions, index["row_index"], name="gather_positions")
    word = g.call(aten.embedding.default, g.weight("words", 5, n), words, name="word_embedding")
    place = g.call(aten.embedding.default, g.weight("places", 20, n), places, name="position_embedding")
    x = g.norm(g.call(aten.add.Tensor, word, place, name="embedding_sum"), "embedding_norm")
    for layer in range(layers):
        x = bert_layer(g, x, index, f"l{layer}")
    hidden = g.call(packing.scatter_rows.default, x, index["row_index"], mask, name="scatter")
    first = g.call(packing.select_rows.default, x, rows, name="first")
    pooled = g.call(aten.tanh.default, g.linear(first, "pooler", n), name="pooler_tanh")
    g.outputs = (hidden, pooled)
    return g
