"""Random transformer-like graphs at level normalized, out of registered ops; equal seeds give equal graphs.

Each graph embeds ids (or takes features), runs blocks in random order and shape, and ends in random heads. It takes an
attention mask [B, S] and never reads masked places, so packing it is legal.
"""

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from graphs import GraphBuilder
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from tilewright.ir.facts import TensorType, fact
from tilewright.ir.graph import Level
from tilewright.ir.sizes import BATCH, SEQ, TOKENS

aten = torch.ops.aten
tw = torch.ops.tilewright
VOCAB, PLACES = 23, 40
_FEW_ATTENTIONS = 12


class Padded(GraphBuilder):
    """A normalized graph under construction, floats of one dtype; weights are scaled so that values stay near one."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float64, few: bool = False) -> None:
        super().__init__(Level.NORMALIZED, seed)
        self.dtype = dtype
        self.few = few
        self.count = 0
        self.ids = self.input("input_ids", BATCH, SEQ, dtype=torch.int64, high=VOCAB)
        self.mask_input = self.mask("attention_mask")
        self.batch, self.length = self.size(self.ids, 0), self.size(self.ids, 1)

    def weight(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Node:
        """A parameter; matrices are scaled by their fan-in."""
        node = super().weight(name, *shape, dtype=dtype or self.dtype)
        tensor = getattr(self.root, name)
        if len(shape) > 1 and tensor.dtype.is_floating_point:
            tensor.mul_(shape[-1] ** -0.5)
        return node

    def fresh(self, stem: str) -> str:
        """A name not used before."""
        self.count += 1
        return f"{stem}_{self.count}"

    def width(self, x: Node) -> int:
        """Size of the last axis."""
        return int(self.values[x].shape[-1])

    def embed(self, ids: Node, rows: int, n: int) -> Node:
        """Rows of a new table."""
        return self.call(aten.embedding.default, self.weight(self.fresh("table"), rows, n), ids)

    def column_positions(self) -> Node:
        """[1, S]: the column indices."""
        table = self.weight(self.fresh("position_ids"), 1, PLACES, dtype=torch.int64)
        return self.call(aten.slice.Tensor, table, 1, 0, self.length)

    def counted_positions(self, pad: int = 1) -> Node:
        """[B, S]: how many ids other than ``pad`` there are up to each place, as RoBERTa counts."""
        real = self.call(aten.ne.Scalar, self.ids, pad)
        real = self.call(torch.ops.prims.convert_element_type.default, real, torch.int64)
        counted = self.call(aten.mul.Tensor, self.call(aten.cumsum.default, real, 1), real)
        return self.call(aten.add.Tensor, counted, pad)

    def heads(self, x: Node, heads: int) -> Node:
        """[B, S, H * D] -> [B, H, S, D]."""
        split = self.call(aten.reshape.default, x, [self.batch, self.length, heads, self.width(x) // heads])
        return self.call(aten.permute.default, split, [0, 2, 1, 3])

    def attention(self, x: Node, heads: int = 2, **options: Any) -> Node:
        """Self-attention of [B, S, N] with an output projection.

        Options: kv_heads, valid, bias, sinks, scale, causal, left, right, softcap, uniform_pads.
        """
        n = self.width(x)
        kv_heads, size = options.get("kv_heads", heads), n // heads
        q = self.heads(self.linear(x, self.fresh("q"), n), heads)
        k = self.heads(self.linear(x, self.fresh("k"), kv_heads * size), kv_heads)
        v = self.heads(self.linear(x, self.fresh("v"), kv_heads * size), kv_heads)
        mixed = self.call(
            tw.attention.default,
            *(q, k, v, options.get("valid", self.mask_input), options.get("bias"), options.get("sinks")),
            options.get("scale", size**-0.5),
            options.get("causal", False),
            options.get("left", -1),
            options.get("right", -1),
            options.get("softcap", 0.0),
            *(None, None, None, None, options.get("uniform_pads", False)),
        )
        merged = self.call(aten.reshape.default, mixed, [self.batch, self.length, n])
        return self.linear(merged, self.fresh("out"), n)

    def add(self, x: Node, y: Any) -> Node:
        """Sum."""
        return self.call(aten.add.Tensor, x, y)

    def feed_forward(self, x: Node, activation: Any = aten.gelu.default) -> Node:
        """Two linears with an activation between them."""
        n = self.width(x)
        return self.linear(self.call(activation, self.linear(x, self.fresh("up"), 2 * n)), self.fresh("down"), n)

    def encoder_layer(self, x: Node, **options: Any) -> Node:
        """A post-norm layer."""
        x = self.norm(self.add(self.attention(x, **options), x), self.fresh("norm"))
        return self.norm(self.add(self.feed_forward(x), x), self.fresh("norm"))

    def token_mask(self, n: int) -> Node:
        """[B, S, n]: the mask of each feature, as sentence-transformers expands it."""
        mask = self.call(aten.unsqueeze.default, self.mask_input, 2)
        mask = self.call(aten.expand.default, mask, [self.batch, self.length, n])
        return self.call(torch.ops.prims.convert_element_type.default, mask, self.dtype)

    def mean_pooled(self, x: Node) -> Node:
        """[B, N]: mean over real tokens."""
        mask = self.token_mask(self.width(x))
        total = self.call(aten.sum.dim_IntList, self.call(aten.mul.Tensor, x, mask), [1])
        count = self.call(aten.clamp.default, self.call(aten.sum.dim_IntList, mask, [1]), 1e-9)
        return self.call(aten.div.Tensor, total, count)

    def max_pooled(self, x: Node) -> Node:
        """[B, N]: maximum over real tokens."""
        masked = self.call(aten.eq.Scalar, self.call(aten.unsqueeze.default, self.mask_input, 2), 0)
        return self.call(aten.amax.default, self.call(aten.masked_fill.Scalar, x, masked, -1e9), [1])

    def first(self, x: Node) -> Node:
        """[B, N]: column 0."""
        return self.call(aten.select.int, x, 1, 0)


@dataclass(frozen=True)
class RandomGraph:
    """A graph and inputs for it.

    Attributes:
        graph: level normalized; outputs with B and S leading are per token.
        inputs: one example of each input, in order; the second is the attention mask.
    """

    graph: GraphModule
    inputs: tuple[Tensor, ...]

    def fresh_inputs(self, batch: int, length: int, seed: int, mask: Tensor | None = None) -> tuple[Tensor, ...]:
        """Inputs of other sizes: random ids, and ``mask`` or random lengths padded on the right."""
        g = torch.Generator().manual_seed(seed)
        lengths = torch.randint(0, length + 1, (batch,), generator=g)
        mask = (torch.arange(length)[None, :] < lengths[:, None]).long() if mask is None else mask
        made = [torch.randint(0, VOCAB, (batch, length), generator=g), mask]
        for example in self.inputs[2:]:
            made.append(torch.randn(batch, length, example.shape[-1], generator=g, dtype=example.dtype))
        return tuple(made)


def random_graph(seed: int, dtype: torch.dtype = torch.float64, few: bool = False) -> RandomGraph:
    """The graph of that seed.

    Args:
        few: fewer blocks, and sizes and kinds of attention from few, so that many graphs need few distinct kernels.
    """
    rng, g = random.Random(seed), Padded(seed, dtype, few)
    heads, size = rng.choice([(1, 24), (2, 12)] if few else [(1, 18), (2, 12), (4, 6), (2, 16)])
    n = heads * size
    x = _embeddings(g, rng, n)
    for _ in range(rng.randint(1, 3 if few else 5)):
        x = rng.choice(_BLOCKS)(g, rng, x, heads)
    x = _attend(g, rng, x, heads)
    outputs = [head(g, rng, x) for head in rng.sample(_HEADS, rng.randint(1, 3))]
    return RandomGraph(g.done(*outputs), tuple(g.example))


def _embeddings(g: Padded, rng: random.Random, n: int) -> Node:
    if rng.random() < 0.15:
        x = g.linear(g.input("features", BATCH, SEQ, 10, dtype=g.dtype), g.fresh("project"), n)
    else:
        x = g.embed(g.ids, VOCAB, n)
    kind = rng.choice(["none", "column", "counted", "arange"])
    if kind == "column":
        x = g.add(x, g.embed(g.column_positions(), PLACES, n))
    elif kind == "counted":
        x = g.add(x, g.embed(g.counted_positions(), PLACES, n))
    elif kind == "arange":
        columns = g.call(aten.arange.start_step, 0, g.length, 1)
        wave = g.call(torch.ops.prims.convert_element_type.default, columns, g.dtype)
        wave = g.call(aten.sin.default, g.call(aten.unsqueeze.default, wave, 1))
        x = g.add(x, g.call(aten.mul.Tensor, wave, g.weight(g.fresh("frequency"), n)))
    return g.norm(x, g.fresh("embedding_norm")) if rng.random() < 0.7 else x


def _attend(g: Padded, rng: random.Random, x: Node, heads: int) -> Node:
    rng = random.Random(rng.randrange(_FEW_ATTENTIONS)) if g.few else rng
    options: dict[str, Any] = {"heads": heads, "softcap": rng.choice([0.0, 0.0, 5.0])}
    if g.few:
        # Nothing keeps values near one: large scores would make any rounding before them a large error.
        options["scale"] = 0.25 * (g.width(x) // heads) ** -0.5
    options["causal"] = rng.random() < 0.3
    options["kv_heads"] = rng.choice([k for k in (1, 2, 4) if heads % k == 0])
    if rng.random() < 0.3:
        options |= {"left": rng.randint(0, 6), "right": rng.randint(0, 6)}
    if rng.random() < 0.2:
        options["sinks"] = g.weight(g.fresh("sinks"), heads)
    if rng.random() < 0.2:
        options["bias"] = _relative_bias(g, heads)
    if rng.random() < 0.3:
        options["valid"] = g.call(aten.ne.Scalar, g.mask_input, 0)
    return g.add(x, g.attention(x, **options))


def _relative_bias(g: Padded, heads: int) -> Node:
    """[1, H, S, S]: a function of the distance of two columns."""
    columns = g.call(aten.arange.start_step, 0, g.length, 1)
    rows, cols = g.call(aten.unsqueeze.default, columns, 1), g.call(aten.unsqueeze.default, columns, 0)
    distance = g.call(aten.abs.default, g.call(aten.sub.Tensor, rows, cols))
    bias = g.embed(g.call(aten.clamp.default, distance, 0, PLACES - 1), PLACES, heads)
    return g.call(aten.unsqueeze.default, g.call(aten.permute.default, bias, [2, 0, 1]), 0)


def _norm(g: Padded, rng: random.Random, x: Node, heads: int) -> Node:
    if rng.random() < 0.5:
        return g.norm(x, g.fresh("norm"))
    n = g.width(x)
    return g.call(aten.rms_norm.default, x, [n], g.weight(g.fresh("scale"), n), 1e-6)


def _feed_forward(g: Padded, rng: random.Random, x: Node, heads: int) -> Node:
    activation = rng.choice([aten.gelu.default, aten.relu.default, aten.silu.default, aten.tanh.default])
    return g.add(x, g.feed_forward(x, activation))


def _gated(g: Padded, rng: random.Random, x: Node, heads: int) -> Node:
    n = g.width(x)
    both = g.linear(x, g.fresh("gate_up"), 2 * n, bias=False)
    gate, up = (g.call(aten.slice.Tensor, both, 2, start, start + n) for start in (0, n))
    return g.add(x, g.linear(g.call(aten.mul.Tensor, g.call(aten.silu.default, gate), up), g.fresh("down"), n))


def _flattened(g: Padded, rng: random.Random, x: Node, heads: int) -> Node:
    n = g.width(x)
    flat = g.call(aten.reshape.default, x, [-1, n])
    flat = g.linear(flat, g.fresh("flat"), n)
    return g.add(x, g.call(aten.reshape.default, flat, [g.batch, g.length, n]))


def _head_norm(g: Padded, rng: random.Random, x: Node, heads: int) -> Node:
    n = g.width(x)
    split = g.heads(x, heads)
    mean = g.call(aten.mean.dim, g.call(aten.pow.Tensor_Scalar, split, 2), [-1], True)
    split = g.call(aten.mul.Tensor, split, g.call(aten.rsqrt.default, g.add(mean, 1e-5)))
    split = g.call(aten.mul.Tensor, split, g.weight(g.fresh("head_scale"), heads, 1, 1))
    merged = g.call(aten.permute.default, split, [0, 2, 1, 3])
    return g.call(aten.reshape.default, merged, [g.batch, g.length, n])


def _feature_gate(g: Padded, rng: random.Random, x: Node, heads: int) -> Node:
    peak = g.call(aten.amax.default, x, [2], True)
    weights = g.call(aten.softmax.int, g.call(aten.sub.Tensor, x, peak), -1)
    return g.add(g.call(aten.mul.Tensor, x, weights), g.weight(g.fresh("shift"), g.width(x)))


def _from_first(g: Padded, rng: random.Random, x: Node, heads: int) -> Node:
    summary = g.call(aten.tanh.default, g.linear(g.first(x), g.fresh("summary"), g.width(x)))
    return g.add(x, g.call(aten.unsqueeze.default, summary, 1))


def _from_mean(g: Padded, rng: random.Random, x: Node, heads: int) -> Node:
    return g.call(aten.sub.Tensor, x, g.call(aten.unsqueeze.default, g.mean_pooled(x), 1))


def _rotated(g: Padded, rng: random.Random, x: Node, heads: int) -> Node:
    n = g.width(x)
    halves = [g.call(aten.slice.Tensor, x, 2, start, stop) for start, stop in ((n // 2, n), (0, n // 2))]
    return g.call(aten.cat.default, [g.call(aten.neg.default, halves[0]), halves[1]], 2)


def _tokens(g: Padded, rng: random.Random, x: Node) -> Node:
    return x


def _token_scores(g: Padded, rng: random.Random, x: Node) -> Node:
    scores = g.linear(x, g.fresh("score"), 3)
    return g.call(aten.permute.default, scores, [0, 2, 1]) if rng.random() < 0.5 else scores


def _token_sums(g: Padded, rng: random.Random, x: Node) -> Node:
    return g.call(aten.sum.dim_IntList, x, [2], rng.random() < 0.5)


def _flat_logits(g: Padded, rng: random.Random, x: Node) -> Node:
    return g.call(aten.reshape.default, g.linear(x, g.fresh("logit"), 3), [-1, 3])


def _pooler(g: Padded, rng: random.Random, x: Node) -> Node:
    return g.call(aten.tanh.default, g.linear(g.first(x), g.fresh("pooler"), g.width(x)))


def _mean(g: Padded, rng: random.Random, x: Node) -> Node:
    return g.mean_pooled(x)


def _max(g: Padded, rng: random.Random, x: Node) -> Node:
    return g.max_pooled(x)


def _soft_pool(g: Padded, rng: random.Random, x: Node) -> Node:
    scores = g.call(aten.squeeze.dims, g.linear(x, g.fresh("key"), 1), [2])
    masked = g.call(aten.masked_fill.Scalar, scores, g.call(aten.eq.Scalar, g.mask_input, 0), -1e9)
    weights = g.call(aten.unsqueeze.default, g.call(aten.softmax.int, masked, 1), 2)
    weighted = g.call(aten.mul.Tensor, g.call(aten.mul.Tensor, x, weights), g.token_mask(g.width(x)))
    return g.call(aten.sum.dim_IntList, weighted, [1])


_BLOCKS = (
    *(_attend, _norm, _feed_forward, _gated, _flattened, _head_norm, _feature_gate, _rotated),
    *(_from_first, _from_mean),
)
_HEADS = (_tokens, _token_scores, _token_sums, _flat_logits, _pooler, _mean, _max, _soft_pool)


def run(gm: GraphModule, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The flat outputs, by running each op as it is."""
    with torch.no_grad():
        return list(Interpreter(gm).run(*inputs))


def copy_of(gm: GraphModule) -> GraphModule:
    """A copy that a pass may rewrite; it shares the weights."""
    shared = {id(tensor): tensor for tensor in gm.state_dict(keep_vars=True).values()}
    return copy.deepcopy(gm, shared)


def real_places(graph: GraphModule, outputs: Sequence[Tensor], mask: Tensor) -> list[tuple[Tensor, Tensor]]:
    """For each output what counts, and what a packed run must have set to 0.

    Of per-token outputs (B and S among their axes, or flattened to B * S rows) the rows of real tokens [T, ..] and of
    masked places; of others all and nothing.
    """
    output = next(iter(reversed(graph.graph.nodes)))
    real = mask != 0
    found = []
    for node, value in zip(output.args[0], outputs, strict=True):
        shape = fact(node, TensorType).shape
        assert TOKENS not in shape
        if BATCH in shape and SEQ in shape:
            order = [shape.index(BATCH), shape.index(SEQ)]
            value = value.permute(order + [axis for axis in range(len(shape)) if axis not in order])
        elif BATCH * SEQ in shape:
            value = value.reshape(*mask.shape, *value.shape[1:])
        else:
            found.append((value, value[:0]))
            continue
        found.append((value[real], value[~real]))
    return found


def assert_same_at_real_tokens(
    graph: GraphModule, expected: Sequence[Tensor], got: Sequence[Tensor], mask: Tensor, tolerance: float
) -> None:
    """Per-token outputs agree at real tokens and are 0 at masked places; others agree everywhere."""
    for old, new in zip(expected, got, strict=True):
        assert old.shape == new.shape
        assert old.dtype == new.dtype
    pairs = zip(real_places(graph, expected, mask), real_places(graph, got, mask), strict=True)
    for (old, _), (new, masked) in pairs:
        assert (masked == 0).all()
        scale = float(old.abs().max()) if old.numel() else 0.0
        worst = float((old - new).abs().max()) if old.numel() else 0.0
        assert worst <= tolerance * max(scale, 1.0), f"differs by {worst:.2e} where values reach {scale:.2e}"


def in_double(made: RandomGraph) -> RandomGraph:
    """The same computation in fp64: weights, features, and the types that ops name."""
    gm = copy.deepcopy(made.graph)
    gm.double()
    swap = {torch.float32: torch.float64}
    for node in gm.graph.nodes:
        node.args = tuple(swap.get(arg, arg) if isinstance(arg, torch.dtype) else arg for arg in node.args)
    gm.recompile()
    return RandomGraph(gm, to_double(made.inputs))


def to_double(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Floating-point tensors in fp64, others as they are."""
    return tuple(x.double() if x.dtype.is_floating_point else x for x in inputs)
