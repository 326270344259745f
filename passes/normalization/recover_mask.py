"""Takes attention masks apart: what of an additive mask is key validity, causal order and window becomes operands.

A mask is proved by what it is as a function of (batch b, head h, query q, key k): a conjunction of comparisons of q
with k and of facts about the token at (b, k), kept where true and about -inf where false. Whatever is not proved to
be that stays a bias: a mask that differs from query to query in any other way must not be taken for padding.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from tilewright.ir.facts import Reason, set_fact
from tilewright.ir.graph import Level, info, update_info
from tilewright.passes.base import Pass, PassResult
from tilewright.passes.layout.axes import positional
from tilewright.passes.normalization.elements import Apply, Element, Elements, Integer, Load, Number, Unknown
from tilewright.passes.normalization.mask_proof import Conjunction, NotProved, prove
from tilewright.passes.normalization.recognize_attention import ATTENTION, CONVERT, addends
from tilewright.passes.rewrite import Rewriter, dtype_of, erase_dead, is_call, operand, rank_of, shape_of

aten = torch.ops.aten
_COMPARED = {
    "eq": aten.eq, "ne": aten.ne, "lt": aten.lt, "le": aten.le, "gt": aten.gt, "ge": aten.ge
}  # fmt: skip


@dataclass(frozen=True)
class RecoverMask(Pass):
    """Sets ``valid``, ``causal`` and the windows of attentions whose bias is proved to be a mask."""

    name: ClassVar[str] = "recover_mask"
    requires: ClassVar[Level] = Level.EXPORTED
    ensures: ClassVar[Level] = Level.EXPORTED

    def run(self, gm: GraphModule) -> PassResult:
        rw = Rewriter(gm, self.name)
        elements = Elements(gm)
        validities: dict[tuple[Element, ...], Node] = {}
        proved: dict[Node, Conjunction] = {}
        counts, reasons = {"recovered": 0, "kept as bias": 0}, {}
        for node in gm.graph.find_nodes(op="call_function", target=ATTENTION):
            if operand(node, 4) is None:
                continue
            kept, why = _recover(rw, elements, node, proved, validities)
            counts["kept as bias" if kept else "recovered"] += 1
            if why:
                reasons[node.name] = why
                set_fact(node, Reason(why))
        dead = erase_dead(gm)
        if reasons:
            found = {f"mask of {name}": why for name, why in reasons.items()}
            update_info(gm, reasons=info(gm).reasons | found)
        gm.recompile()
        return PassResult(gm, bool(rw.changes or dead or reasons), counts, reasons)


def _recover(
    rw: Rewriter, elements: Elements, node: Node, proved: dict[Node, Conjunction], validities: dict[Any, Node]
) -> tuple[bool, str]:
    """Rewrites one attention; returns whether a bias stays and why a part of it did."""
    query, key, _, valid, bias, sinks, scale, causal, left, right, softcap, *tables, _ = positional(node)
    total = Conjunction(left=None if left == -1 else int(left), right=None if right == -1 else int(right))
    if causal:
        total.limit(right=0)
    same = shape_of(query)[2] == shape_of(key)[2]
    alone = valid is None and sinks is None and total == Conjunction()
    rest: list[Node] = []
    whys: list[str] = []
    uniform = False
    for term in addends(bias):
        try:
            found = proved.get(term) or prove(elements, term)
            proved[term] = found
            if not same and (found.left is not None or found.right is not None):
                raise NotProved("queries and keys differ in number, so their slots cannot be compared")
            if uniform or (found.queries and not (same and alone)):
                raise NotProved("a mask that blocks queries too stands beside another mask or sinks")
        except (NotProved, Unknown) as reason:
            rest.append(term)
            whys.append(f"'{term.name}' stays a bias: {reason}")
            continue
        uniform |= bool(found.queries)
        alone = False
        total.valid += [v for v in found.valid if v not in total.valid]
        total.limit(left=found.left, right=found.right)
    if len(rest) == len(addends(bias)):
        return True, "; ".join(whys)
    if total.valid:
        recovered = _validity(rw, node, tuple(total.valid), validities)
        both = valid is not None and valid is not recovered
        valid = rw.call(node, aten.logical_and.default, valid, recovered) if both else recovered
    rest = [_without_expand(term) for term in rest]
    new_bias: Any = rest[0] if rest else None
    for term in rest[1:]:
        new_bias = rw.call(node, aten.add.Tensor, new_bias, term)
    is_causal = total.right == 0
    limits = (-1 if total.left is None else total.left, -1 if is_causal or total.right is None else total.right)
    node.args = (*node.args[:3], valid, new_bias, sinks, scale, is_causal, *limits, softcap, *tables, uniform)
    rw.changes += 1
    return bool(rest), "; ".join(whys)


def _without_expand(term: Node) -> Node:
    """A bias broadcasts by itself: one that is the same for every sequence should be seen to be."""
    while is_call(term, aten.expand.default) and rank_of(operand(term)) == rank_of(term):
        term = operand(term)
    return term


def _validity(rw: Rewriter, node: Node, parts: tuple[Element, ...], known: dict[Any, Node]) -> Node:
    """A [B, S] node that computes all ``parts`` at (b, k)."""
    if parts not in known:
        first = next(n for n in rw.graph.nodes if n.op not in ("placeholder", "get_attr"))
        made = [_build(rw, first, part) for part in parts]
        total = made[0]
        for other in made[1:]:
            total = rw.call(first, aten.logical_and.default, total, other)
        known[parts] = total
    return known[parts]


def _build(rw: Rewriter, at: Node, element: Element) -> Any:
    """Nodes for a formula over tokens."""
    match element:
        case Load(node, _):
            return node
        case Number(value):
            return value
        case Integer(value):
            return int(value)
        case Apply("bool", (inner,)):
            source = _build(rw, at, inner)
            return source if dtype_of(source) == torch.bool else rw.call(at, CONVERT, source, torch.bool)
        case Apply("number", (inner,)):
            return _build(rw, at, inner)
        case Apply("not", (inner,)):
            return rw.call(at, aten.logical_not.default, _build(rw, at, inner))
        case Apply(("and" | "or") as name, (first, second)):
            target = aten.logical_and.default if name == "and" else aten.logical_or.default
            return rw.call(at, target, _build(rw, at, first), _build(rw, at, second))
        case Apply(name, (first, second)) if name in _COMPARED:
            left, right = _build(rw, at, first), _build(rw, at, second)
            overload = "Tensor" if isinstance(right, Node) else "Scalar"
            return rw.call(at, getattr(_COMPARED[name], overload), left, right)
    raise NotProved(f"no op computes {element}")
