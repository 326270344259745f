"""Merges linears that read the same rows: queries, keys and values become one product over their joined weights."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from tilewright.ir.facts import TensorType, copy_origin, fact, find_fact, set_fact
from tilewright.ir.graph import Level, get_tensor
from tilewright.ir.layout import Layout
from tilewright.ir.sizes import contiguous_strides
from tilewright.ir.views import Strided, apply_view, row_stride, same_sizes
from tilewright.ops import Flow, traits_of
from tilewright.ops.block_linear import BLOCK_LINEAR
from tilewright.passes.base import Pass, PassResult
from tilewright.passes.regions.anchors import is_view
from tilewright.passes.rewrite import Rewriter, argument, erase_dead, is_call, operand

aten = torch.ops.aten


@dataclass(frozen=True)
class MergeLinears(Pass):
    """One linear over the joined weights and biases, and slices of its result, for linears that read one value.

    The rows are then read once, and one large product divides better among threads than several small ones. A product
    stays alone when that would cost more than it saves:

    - its consumer would be its epilogue: behind a slice that is a kernel of its own;
    - a slice of rows that lie further apart would have to be copied, for a view, another product, or the caller;
    - it is wanted much later: something that waits for one of the others lies before it, as between the layers of a
      decoder that all read the encoder's output;
    - its weight or bias is computed.

    Weights in blocks are joined where they are in one format. The joined weight takes the place of its parts in the
    graph. A part that is used elsewhere too stays as well.
    Each column of the result is the same sum as before.
    """

    name: ClassVar[str] = "merge_linears"
    requires: ClassVar[Level] = Level.PACKED
    ensures: ClassVar[Level] = Level.PACKED

    def run(self, gm: GraphModule) -> PassResult:
        """Rewrites ``gm`` in place."""
        reasons: dict[str, str] = {}
        merged = [bundle for bundle in _bundles(gm, reasons) if len(bundle) > 1]
        joiner = _Joiner(Rewriter(gm, self.name))
        for bundle in merged:
            joiner.join(bundle)
        if merged:
            erase_dead(gm)
            gm.recompile()
        counts = {"linears": sum(map(len, merged)), "into": len(merged)} if merged else {}
        return PassResult(gm, bool(merged), counts, reasons)


@dataclass
class _Bundle:
    """Linears that read one value and may run together; ``waiting`` holds what is computed from their results."""

    members: list[Node] = field(default_factory=list)
    waiting: set[Node] = field(default_factory=set)
    closed_by: str = ""


def _bundles(gm: GraphModule, reasons: dict[str, str]) -> list[list[Node]]:
    """Linears to merge, in graph order; why others that read the same value stay alone goes into ``reasons``."""
    found: list[list[Node]] = []
    open_: dict[tuple[Node, str], _Bundle] = {}
    for node in gm.graph.nodes:
        for bundle in open_.values():
            if not bundle.closed_by and not bundle.waiting.isdisjoint(node.all_input_nodes):
                bundle.waiting.add(node)
                if traits_of(node.target).flow in (Flow.CONTRACT, Flow.ATTENTION):
                    bundle.closed_by = node.name
        form = _form(node)
        if form is None or _readers_like(node) < 2:
            continue
        if why := _why_alone(node):
            reasons[node.name] = why
            continue
        known = open_.get((operand(node), form))
        if known is None or known.closed_by:
            if known is not None:
                first = known.members[0].name
                reasons[node.name] = f"'{known.closed_by}' lies before it and waits for '{first}', which reads the same"
            known = open_[operand(node), form] = _Bundle()
            found.append(known.members)
        known.members.append(node)
        known.waiting.add(node)
    return found


def _form(node: Node) -> str | None:
    """Block format of a linear's weight, "" for a matrix; None for other nodes. Weights of one form can be joined."""
    if is_call(node, BLOCK_LINEAR):
        return str(argument(node, 3, "format"))
    return "" if is_call(node, aten.linear.default) else None


def _readers_like(node: Node) -> int:
    """Linears of the same form that read the same rows, this one included."""
    return sum(_form(user) == _form(node) and operand(user) is operand(node) for user in operand(node).users)


def _why_alone(node: Node) -> str | None:
    for part, what in ((operand(node, 1), "weight"), (argument(node, 2, "bias"), "bias")):
        if isinstance(part, Node) and part.op != "get_attr":
            return f"its {what} '{part.name}' is computed, not a parameter"
    shape = fact(node, TensorType).shape
    for user in node.users:
        kind = find_fact(user, TensorType)
        if traits_of(user.target).flow is Flow.POINTWISE and kind is not None and same_sizes(kind.shape, shape):
            return f"'{user.name}' joins it as its epilogue, and behind a slice it would be a kernel of its own"
    rows = (*shape[:-1], shape[-1] + 1)  # as they lie in a wider result, of any width
    return _why_copied(node, Strided(shape, contiguous_strides(rows)))


def _why_copied(node: Node, layout: Strided) -> str | None:
    """Whether some reader would need the elements copied when they lie as in ``layout``."""
    for user in node.users:
        if user.op == "output":
            return "it is returned, and a slice of a larger result would be copied first"
        if is_view(user):
            moved = apply_view(user, layout)
            why = f"the view '{user.name}' of a slice would need a copy" if moved is None else _why_copied(user, moved)
            if why is not None:
                return why
        elif traits_of(user.target).flow is Flow.CONTRACT and row_stride(layout) is None:
            return f"the product '{user.name}' reads it, for which a slice would have to be copied"
    return None


class _Joiner:
    """Writes merged linears. What is joined from the same tensors, by layers that share them, is joined once."""

    def __init__(self, rw: Rewriter) -> None:
        self.rw = rw
        self.joined: dict[Any, torch.Tensor] = {}

    def join(self, bundle: Sequence[Node]) -> None:
        """Puts one linear and slices in place of several linears."""
        first = bundle[0]
        x, layout = operand(first), fact(first, Layout)
        kinds = [fact(node, TensorType) for node in bundle]
        widths = [int(kind.shape[-1]) for kind in kinds]
        args = [x, self._constant(first, [operand(node, 1) for node in bundle], widths)]
        biases = [argument(node, 2, "bias") for node in bundle]
        has_bias, form = any(bias is not None for bias in biases), _form(first)
        if has_bias or form:
            args.append(self._constant(first, biases, widths) if has_bias else None)
        if form:
            args.append(form)
        type_ = TensorType((*kinds[0].shape[:-1], sum(widths)), kinds[0].dtype)
        product = self.rw.call(first, first.target, *args, type=type_)
        set_fact(product, layout)
        ends = list(accumulate(widths))
        parts = []
        for node, kind, begin, end in zip(bundle, kinds, [0, *ends], ends, strict=False):
            part = self.rw.call(first, aten.slice.Tensor, product, len(kind.shape) - 1, begin, end, type=kind)
            copy_origin(node, part, MergeLinears.name)
            set_fact(part, fact(node, Layout))
            parts.append(part)
        for node, part in zip(bundle, parts, strict=True):
            self.rw.replace(node, part)

    def _constant(self, like: Node, parts: Sequence[Node | None], widths: Sequence[int]) -> Node:
        """A parameter joined along its first axis, zeros where a part is missing."""
        tensors = [None if part is None else get_tensor(self.rw.gm, part).detach() for part in parts]
        key = tuple(width if t is None else _identity(t) for t, width in zip(tensors, widths, strict=True))
        if key not in self.joined:
            known = next(tensor for tensor in tensors if tensor is not None)
            self.joined[key] = torch.cat(
                [known.new_zeros(width) if t is None else t for t, width in zip(tensors, widths, strict=True)]
            )
        node = self.rw.constant(like, self.joined[key], "joined")
        present = next(part for part in parts if part is not None)
        set_fact(node, fact(present, Layout))
        copy_origin(present, node, MergeLinears.name)
        return node


def _identity(tensor: torch.Tensor) -> tuple[object, ...]:
    return (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
