"""StoreBlocks: weights that a file stores in blocks are used as they are stored, where an op for that is there."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from tilewright.ir.facts import TensorType, copy_origin, fact
from tilewright.ir.graph import Level
from tilewright.ir.stored_weight import StoredParameter, StoredWeight
from tilewright.ops.block_linear import BLOCK_EMBEDDING, BLOCK_LINEAR
from tilewright.ops.blocks import block_format, dequantize
from tilewright.ops.expert_blocks import EXPERT_BLOCK_LINEAR
from tilewright.ops.experts import EXPERT_LINEAR
from tilewright.passes.base import Pass, PassResult
from tilewright.passes.rewrite import Rewriter, argument, erase_dead, is_call, operand

aten = torch.ops.aten
CONVERT = torch.ops.prims.convert_element_type.default


@dataclass(frozen=True)
class StoreBlocks(Pass):
    """Gives attributes of the graph the contents that a file stores for them.

    A linear becomes ``tilewright::block_linear``, a product of experts ``tilewright::expert_block_linear`` and an
    embedding ``tilewright::block_embedding``: their bytes are shared with the file. A product whose weight has parts in
    different formats becomes one for each. Numbers (F32, F16, BF16) are shared where they have the graph's type. For
    any other use the weight is widened once, with the reason.

    Attributes:
        stored: what the attributes of that name are; the graph's own tensors of these names are not read.
    """

    name: ClassVar[str] = "store_blocks"
    requires: ClassVar[Level] = Level.NORMALIZED
    ensures: ClassVar[Level] = Level.NORMALIZED
    stored: Mapping[str, StoredParameter] = field(default_factory=dict, repr=False)

    def run(self, gm: GraphModule) -> PassResult:
        """Rewrites ``gm`` in place."""
        store = _Store(Rewriter(gm, self.name))
        for node in [node for node in gm.graph.nodes if node.op == "get_attr" and str(node.target) in self.stored]:
            store.replace(node, self.stored[str(node.target)])
        if store.counts:
            erase_dead(gm)
            gm.recompile()
        return PassResult(gm, bool(store.counts), dict(store.counts), store.reasons)


class _Store:
    def __init__(self, rw: Rewriter) -> None:
        self.rw = rw
        self.counts: Counter[str] = Counter()
        self.reasons: dict[str, str] = {}
        self.data: dict[tuple[str, int], Node] = {}

    def replace(self, weight: Node, stored: StoredParameter) -> None:
        """Replaces all uses of one attribute."""
        parts = _joined(stored.parts)
        in_blocks = all(block_format(part.format).decode is not None for part in parts)
        rest = "" if in_blocks else _why_numbers(parts)
        for user in list(weight.users) if in_blocks else ():
            turned = is_call(user, aten.permute.default) and stored.transposed
            linears = list(user.users) if turned else [user]
            for node in linears:
                why = self._use(node, user if turned else weight, stored.transposed == turned, weight, parts)
                rest = rest or why
        if any(user.op == "output" or user.users for user in weight.users):
            self._widen(weight, stored, rest)

    def _use(self, node: Node, source: Node, upright: bool, weight: Node, parts: tuple[StoredWeight, ...]) -> str:
        """Replaces one reader, or says why not; ``source`` is [N, K] if ``upright``."""
        if upright and is_call(node, aten.linear.default, EXPERT_LINEAR) and operand(node, 1) is source:
            self._linear(node, weight, parts)
            return ""
        if upright and is_call(node, aten.embedding.default) and operand(node) is source and len(parts) == 1:
            self._embedding(node, weight, parts[0])
            return ""
        return f"'{node.name}' has no form that reads blocks"

    def _linear(self, node: Node, weight: Node, parts: tuple[StoredWeight, ...]) -> None:
        kind, experts = fact(node, TensorType), is_call(node, EXPERT_LINEAR)
        target = EXPERT_BLOCK_LINEAR if experts else BLOCK_LINEAR
        third = operand(node, 2) if experts else argument(node, 2, "bias")
        products, first = [], 0
        for place, part in enumerate(parts):
            own, n = third, part.shape[-2]
            if isinstance(third, Node) and not experts and len(parts) > 1:
                own = self.rw.call(node, aten.slice.Tensor, third, 0, first, first + n)
            data = self._data(weight, place, part.data)
            type_ = TensorType((*kind.shape[:-1], n), kind.dtype)
            products.append(self.rw.call(node, target, operand(node), data, own, part.format, type=type_))
            first += n
        result = products[0]
        if len(products) > 1:
            result = self.rw.call(node, aten.cat.default, products, len(kind.shape) - 1, type=kind)
        self.rw.replace(node, result)
        self.counts["experts" if experts else "linear"] += 1

    def _embedding(self, node: Node, weight: Node, part: StoredWeight) -> None:
        kind = fact(node, TensorType)
        wide = TensorType(kind.shape, torch.float32)
        data = self._data(weight, 0, part.data)
        result = self.rw.call(node, BLOCK_EMBEDDING, data, operand(node, 1), part.format, type=wide)
        if kind.dtype != torch.float32:
            result = self.rw.call(node, CONVERT, result, kind.dtype, type=kind)
        self.rw.replace(node, result)
        self.counts["embedding"] += 1

    def _widen(self, weight: Node, stored: StoredParameter, why: str) -> None:
        dtype = fact(weight, TensorType).dtype
        elements = _elements(stored, dtype)
        made = self.rw.constant(weight, elements, "stored")
        copy_origin(weight, made, self.rw.name)
        weight.replace_all_uses_with(made)
        shared = elements.data_ptr() == stored.parts[0].data.data_ptr()
        self.counts["shared" if shared else "widened"] += 1
        if not shared:
            self.reasons[weight.name] = f"it is widened to {dtype}: {why}"

    def _data(self, weight: Node, place: int, data: Tensor) -> Node:
        key = (str(weight.target), place)
        if key not in self.data:
            self.data[key] = self.rw.constant(weight, data, "stored")
            copy_origin(weight, self.data[key], self.rw.name)
        return self.data[key]


def _joined(parts: tuple[StoredWeight, ...]) -> tuple[StoredWeight, ...]:
    """Parts of one format as one."""
    first = parts[0]
    if len(parts) == 1 or any(part.format != first.format for part in parts):
        return parts
    *lead, _, k = first.shape
    shape = (*lead, sum(part.shape[-2] for part in parts), k)
    return (StoredWeight(first.format, shape, torch.cat([part.data for part in parts], -2)),)


def _why_numbers(parts: tuple[StoredWeight, ...]) -> str:
    return f"its elements are numbers in {', '.join(dict.fromkeys(part.format for part in parts))}"


def _elements(stored: StoredParameter, dtype: torch.dtype) -> Tensor:
    """The parameter in numbers; memory is shared with the file where they are stored so."""
    wide = []
    for part in stored.parts:
        own = block_format(part.format).dtype
        rows = part.data.flatten(0, -2)
        same = own == dtype and rows.is_contiguous() and rows.data_ptr() % dtype.itemsize == 0
        elements = rows.flatten().view(dtype) if same else dequantize(part.format, rows).to(dtype)
        wide.append(elements.view(part.shape))
    joined = wide[0] if len(wide) == 1 else torch.cat(wide, -2)
    return joined.transpose(-1, -2).contiguous() if stored.transposed else joined
