"""One op, ``tilewright::attention``, for scaled_dot_product_attention and for attention spelled out by its formula.

The formula, from "Attention Is All You Need" (Vaswani et al., 2017), equation 1: softmax(scale * q @ k^T + mask) @ v.
The factor may stand on the scores, on the queries, on the keys, or on both; masks may be added or filled in; scores
may be capped.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import sympy
import torch
from torch.fx import GraphModule, Node

from tilewright import ops as ops  # registers tilewright::attention
from tilewright.ir.facts import Reason, TensorType, fact, set_fact
from tilewright.ir.graph import Level, info, update_info
from tilewright.passes.base import Pass, PassResult
from tilewright.passes.rewrite import Rewriter, argument, dtype_of, erase_dead, is_call, operand, rank_of, shape_of

aten = torch.ops.aten
ATTENTION = torch.ops.tilewright.attention.default
CONVERT = torch.ops.prims.convert_element_type.default
_MOVES = (aten.permute.default, aten.reshape.default, aten.unsqueeze.default, aten.slice.Tensor)
# From here on down a number in a mask stands for "may not attend": exp of it is 0 in every float type.
LOWEST = -1e4


@dataclass
class _Scores:
    """What is found on the way from the softmax to the product of queries and keys.

    Attributes:
        heads: number of heads, where products are of batches [B * H, S, D].
    """

    scale: float = 1.0
    softcap: float = 0.0
    biases: list[Node] = field(default_factory=list)
    heads: int | None = None


class _NotAttention(Exception):
    """The calls are no attention of ours; the message says why."""


@dataclass(frozen=True)
class RecognizeAttention(Pass):
    """Turns every attention into ``tilewright::attention``; a mask becomes its ``bias`` until it is recovered."""

    name: ClassVar[str] = "recognize_attention"
    requires: ClassVar[Level] = Level.EXPORTED
    ensures: ClassVar[Level] = Level.EXPORTED

    def run(self, gm: GraphModule) -> PassResult:
        rw = Rewriter(gm, self.name)
        counts = {"attention": 0}
        reasons: dict[str, str] = {}
        for node in list(gm.graph.nodes):
            try:
                if is_call(node, aten.scaled_dot_product_attention.default):
                    new: Node | None = _from_sdpa(rw, node)
                elif is_call(node, aten.softmax.int) and operand(node, 1) == -1 and rank_of(node) in (3, 4):
                    new = _from_formula(rw, node)
                else:
                    continue
            except _NotAttention as why:
                reasons[node.name] = str(why)
                set_fact(node, Reason(str(why)))
                continue
            if new is not None:
                counts["attention"] += 1
        dead = erase_dead(gm)
        if reasons:
            update_info(gm, reasons=info(gm).reasons | {f"attention at {name}": why for name, why in reasons.items()})
        gm.recompile()
        return PassResult(gm, bool(rw.changes or dead or reasons), counts, reasons)


def _from_sdpa(rw: Rewriter, node: Node) -> Node:
    """scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, *, scale, enable_gqa)."""
    query, key, value = (operand(node, i) for i in range(3))
    mask = argument(node, 3, "attn_mask")
    if argument(node, 4, "dropout_p", 0.0):
        raise _NotAttention("it drops weights at random")
    causal = bool(argument(node, 5, "is_causal", False))
    if causal and shape_of(operand(node, 0))[-2] != shape_of(operand(node, 1))[-2]:
        raise _NotAttention("its causal order aligns the first query with the first key, and their numbers differ")
    scale: Any = node.kwargs.get("scale")
    scores = _Scores(float(scale if scale is not None else int(shape_of(operand(node))[-1]) ** -0.5))
    if mask is not None:
        scores.biases.append(_additive(rw, node, mask, dtype_of(node)))
    return _emit(rw, node, (query, key, value), scores, causal)


def _additive(rw: Rewriter, node: Node, mask: Node, dtype: torch.dtype) -> Node:
    """A boolean mask (True: may attend) as a term that is added."""
    if dtype_of(mask) != torch.bool:
        return mask
    blocked = rw.call(node, aten.logical_not.default, mask)
    return _blocked(rw, node, blocked, dtype, float("-inf"))


def _blocked(rw: Rewriter, node: Node, blocked: Node, dtype: torch.dtype, value: float) -> Node:
    """``value``, which stands for no attention, where ``blocked``, else 0."""
    device = rw.types.device
    zero = rw.call(node, aten.full.default, [], 0.0, dtype=dtype, device=device)
    lowest = rw.call(node, aten.full.default, [], float(value), dtype=dtype, device=device)
    return rw.call(node, aten.where.self, blocked, lowest, zero)


def _from_formula(rw: Rewriter, softmax: Node) -> Node | None:
    """Looks from a softmax at what feeds it and what reads it."""
    weights = softmax
    merged: int | None = None
    while len(weights.users) == 1:
        user = next(iter(weights.users))
        heads = _heads(weights, user)
        if not is_call(user, CONVERT) and heads is None:
            break
        weights, merged = user, merged or heads
    users = list(weights.users)
    product = next(
        (u for u in users if is_call(u, aten.matmul.default, aten.bmm.default) and u.args[0] is weights), None
    )
    if product is None:
        return None
    found = _find_scores(rw, product, operand(softmax), merged)
    if found is None:
        return None
    if len(users) != 1 or len(softmax.users) != 1:
        raise _NotAttention("its weights are used elsewhere too, e.g. returned")
    scores, query, key = found
    return _emit(rw, product, (query, key, operand(product, 1)), scores, False)


def _heads(inner: Node, outer: Node) -> int | None:
    """H where one of the nodes is a reshape of the other between [B, H, S, Sk] and [B * H, S, Sk]."""
    if not is_call(outer, aten.reshape.default) or {rank_of(inner), rank_of(outer)} != {3, 4}:
        return None
    wide, narrow = (shape_of(node) for node in sorted((inner, outer), key=rank_of, reverse=True))
    joined = wide[2:] == narrow[1:] and isinstance(wide[1], int) and sympy.expand(wide[0] * wide[1]) == narrow[0]
    return int(wide[1]) if joined else None


def _find_scores(rw: Rewriter, at: Node, node: Any, heads: int | None) -> tuple[_Scores, Node, Node] | None:
    """Walks from the softmax's operand to the product of queries and keys, and collects what it passes."""
    scores, outer, capped_biases = _Scores(heads=heads), 1.0, 0
    while isinstance(node, Node):
        if is_call(node, CONVERT) and dtype_of(node).is_floating_point:
            node = operand(node)
        elif is_call(node, aten.reshape.default) and (found := _heads(operand(node), node)) is not None:
            scores.heads, node = found, operand(node)
        elif is_call(node, aten.mul.Tensor, aten.div.Tensor) and isinstance(operand(node, 1), int | float):
            outer *= operand(node, 1) if node.target is aten.mul.Tensor else 1.0 / operand(node, 1)
            node = operand(node)
        elif is_call(node, aten.tanh.default) and not scores.softcap and outer > 0:
            # outer * tanh(inner): the op's cap is ``outer``, and its factor stands inside the tanh, divided by the cap.
            scores.softcap, capped_biases = outer, len(scores.biases)
            node = operand(node)
        elif is_call(node, aten.masked_fill.Scalar) and operand(node, 2) <= LOWEST:
            # What is blocked stays blocked under any factor, so the factor need not be applied to it.
            scores.biases.append(_blocked(rw, at, operand(node, 1), dtype_of(node), operand(node, 2)))
            node = operand(node)
        elif is_call(node, aten.clamp.default) and _only_blocks(node):
            node = operand(node)
        elif is_call(node, aten.add.Tensor) and len(node.args) == 2:
            inner = next((a for a in node.args if _is_scores(a)), None)
            bias = next((a for a in node.args if a is not inner), None)
            if inner is None or not isinstance(bias, Node):
                return None
            scores.biases += [t if outer == 1.0 else rw.call(at, aten.mul.Tensor, t, outer) for t in addends(bias)]
            node = inner
        elif is_call(node, aten.matmul.default, aten.bmm.default):
            break
        else:
            return None
    if not isinstance(node, Node):
        return None
    query, left = _take_factor(rw, at, operand(node))
    key, right = _take_factor(rw, at, operand(node, 1))
    scores.scale = outer * left * right
    if scores.softcap and len(scores.biases) != capped_biases:
        raise _NotAttention("it masks scores before it caps them")
    rank = rank_of(key)
    swap = [*range(rank - 2), rank - 1, rank - 2]
    order = operand(key, 1) if is_call(key, aten.permute.default) else None
    if order is not None and [order[i] for i in swap] == list(range(rank)):
        key = operand(key)
    elif order is not None:
        key = rw.call(at, aten.permute.default, operand(key), [order[i] for i in swap])
    else:
        key = rw.call(at, aten.permute.default, key, swap)
    return scores, query, key


def _only_blocks(clamp: Node) -> bool:
    """Whether a clamp changes scores only where they stand for no attention, before it and after it."""
    least, most = argument(clamp, 1, "min"), argument(clamp, 2, "max")
    return most is None and isinstance(least, int | float) and least <= LOWEST


def addends(bias: Node) -> list[Node]:
    """The terms of a sum of tensors."""
    if is_call(bias, aten.add.Tensor) and all(isinstance(a, Node) for a in bias.args):
        return [*addends(operand(bias)), *addends(operand(bias, 1))]
    return [bias]


def _is_scores(node: Any) -> bool:
    """True for a node on the way to a product of two computed tensors."""
    for _ in range(8):
        if is_call(node, aten.matmul.default, aten.bmm.default):
            return True
        if is_call(node, aten.add.Tensor):
            return any(_is_scores(a) for a in node.args)
        passes = (
            CONVERT, aten.mul.Tensor, aten.div.Tensor, aten.tanh.default, aten.masked_fill.Scalar, aten.clamp.default,
        )  # fmt: skip
        merges = is_call(node, aten.reshape.default) and _heads(operand(node), node) is not None
        if not merges and not is_call(node, *passes):
            return False
        node = operand(node)
    return False


def _take_factor(rw: Rewriter, at: Node, node: Node) -> tuple[Node, float]:
    """A number that queries or keys are multiplied by before the product, looked for behind views too."""
    chain: list[Node] = []
    inner = node
    while is_call(inner, *_MOVES):
        chain.append(inner)
        inner = operand(inner)
    if not (is_call(inner, aten.mul.Tensor, aten.div.Tensor) and isinstance(operand(inner, 1), int | float)):
        return node, 1.0
    factor = operand(inner, 1) if inner.target is aten.mul.Tensor else 1.0 / operand(inner, 1)
    moved = operand(inner)
    if fact(moved, TensorType) != fact(inner, TensorType):
        return node, 1.0
    for move in reversed(chain):
        moved = rw.call(at, move.target, moved, *move.args[1:], type=fact(move, TensorType), **move.kwargs)
    return moved, float(factor)


def _emit(rw: Rewriter, node: Node, operands: tuple[Node, Node, Node], scores: _Scores, causal: bool) -> Node:
    """Replaces ``node``, which yields [B, H, S, Dv] or [B, S, Dv], by the op."""
    query, key, value = operands
    ranks, heads = {rank_of(o) for o in operands}, scores.heads
    if not ranks <= {3, 4} or (len(ranks) > 1 and heads is None):
        raise _NotAttention(f"its operands have {[rank_of(o) for o in operands]} axes, 3 or 4 are known")
    single = rank_of(node) == 3
    if 3 in ranks and heads is not None:
        query, key, value = (_split(rw, node, o, heads) if rank_of(o) == 3 else o for o in operands)
        split = [_split(rw, node, b, heads) if rank_of(b) == 3 else b for b in scores.biases]
        scores.biases = [term for bias in split for term in addends(bias)]
    elif single:
        query, key, value = (rw.call(node, aten.unsqueeze.default, o, 1) for o in operands)
        scores.biases = [rw.call(node, aten.unsqueeze.default, b, 1) if rank_of(b) == 3 else b for b in scores.biases]
    key, value = _without_repeat(key, value, query)
    _check(query, key, value)
    bias = scores.biases[0] if scores.biases else None
    for other in scores.biases[1:]:
        bias = rw.call(node, aten.add.Tensor, bias, other)
    args = (query, key, value, None, bias, None, scores.scale, causal, -1, -1, scores.softcap)
    out = rw.call(node, ATTENTION, *args)
    if single and heads is None:
        out = rw.call(node, aten.select.int, out, 2, 0)
    else:
        out = rw.call(node, aten.permute.default, out, [0, 2, 1, 3])
    if single and heads is not None:
        length = rw.size(node, shape_of(node)[1], [operands[0]])
        out = rw.call(node, aten.reshape.default, out, [-1, length, shape_of(node)[2]])
    if fact(out, TensorType) != fact(node, TensorType):
        out = rw.call(node, CONVERT, out, dtype_of(node))
    rw.replace(node, out)
    return out


def _split(rw: Rewriter, at: Node, value: Node, heads: int) -> Node:
    """[B * H, S, D] as [B, H, S, D]; what is the same for all of the batch stays so."""
    if is_call(value, aten.reshape.default) and _heads(operand(value), value) == heads:
        return operand(value)
    if shape_of(value)[0] == 1:
        return rw.call(at, aten.unsqueeze.default, value, 0)
    sizes = [rw.size(at, size, [value]) for size in shape_of(value)[1:]]
    return rw.call(at, aten.reshape.default, value, [-1, heads, *sizes])


def _check(query: Node, key: Node, value: Node) -> None:
    q, k, v = shape_of(query), shape_of(key), shape_of(value)
    if not (q[0] == k[0] == v[0] and k[1] == v[1] and k[2] == v[2] and q[3] == k[3]):
        raise _NotAttention(f"its operands broadcast: {q}, {k}, {v}")
    if not (isinstance(q[1], int) and isinstance(k[1], int) and q[1] % k[1] == 0):
        raise _NotAttention(f"{q[1]} query heads do not divide among {k[1]} key heads")
    if not dtype_of(query) == dtype_of(key) == dtype_of(value):
        raise _NotAttention("its operands differ in dtype")


def _without_repeat(key: Node, value: Node, query: Node) -> tuple[Node, Node]:
    """Keys and values before their heads were repeated for the query heads, where both were repeated alike."""
    first, second = _unrepeated(key), _unrepeated(value)
    if first is not None and second is not None and shape_of(first)[1] == shape_of(second)[1]:
        return first, second
    return key, value


def _unrepeated(node: Node) -> Node | None:
    """x of reshape(expand(unsqueeze(x, 2), [B, Hkv, n, S, D]), [B, Hkv * n, S, D]): each head n times in a row."""
    if is_call(node, aten.repeat_interleave.self_int) and argument(node, 2, "dim") == 1:
        return operand(node)
    if not (is_call(node, aten.reshape.default) and is_call(operand(node), aten.expand.default)):
        return None
    expanded = operand(node)
    narrow = operand(expanded)
    if not (is_call(narrow, aten.unsqueeze.default) and operand(narrow, 1) == 2):
        return None
    source = operand(narrow)
    b, h, s, d = shape_of(source)
    wide = shape_of(expanded)
    fits = wide[:2] == (b, h) and wide[3:] == (s, d) and shape_of(node) == (b, h * wide[2], s, d)
    return source if fits else None
