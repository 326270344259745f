"""What one attention asks for, read off its node once: operands, sizes, groups of heads, element types."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from tilewright.codegen.index import Index
from tilewright.codegen.nodes import arguments, compute_dtype, size_of
from tilewright.codegen.region_call import Inputs, RegionCall
from tilewright.codegen.writer import TL_TYPES
from tilewright.errors import CodegenError
from tilewright.ir.facts import TensorType, fact, where
from tilewright.ir.program import View
from tilewright.ir.sizes import Size

packing = torch.ops.tilewright


class AttentionProblem:
    """The attention of a region.

    Attributes:
        call, inputs, results: the region, what stands behind its placeholders, and what is stored.
        anchor, given: the attention's node and its arguments by name.
        packed: whether its rows are packed tokens.
        apart: whether queries stand at other rows than their keys, so that only slots tell how far apart they are.
        batch, heads: numbers of sequences and of query heads.
        group: query heads that share a head of keys.
        size, value_size: of a head, of queries and keys and of values.
        length, key_length: bounds of the queries and of the keys of one sequence.
        dtype, compute: element type of the operands, and that of scores and sums; ``kind`` is the latter in a kernel.
    """

    def __init__(self, call: RegionCall, inputs: Inputs, results: Sequence[tuple[Node, View]], anchor: Node) -> None:
        self.call, self.inputs, self.results, self.anchor = call, inputs, results, anchor
        self.given: dict[str, Any] = arguments(anchor)
        self.packed = anchor.target == packing.attention_packed.default
        self.apart = self.packed and self.given["slots_q"] is not self.given["slots_k"]
        query, key, value = (fact(self.given[name], TensorType) for name in "qkv")
        self.heads = query.shape[1]
        self.group = self._static(self.heads) // self._static(key.shape[1])
        self.size, self.value_size = self._static(query.shape[-1]), self._static(value.shape[-1])
        self.dtype, self.compute = query.dtype, compute_dtype(query.dtype)
        self.kind = TL_TYPES[self.compute]
        if self.packed:
            self.batch = self.shape("cu_seqlens_q")[0] - 1
            self.length, self.key_length = size_of(self.given["max_seqlen_q"]), size_of(self.given["max_seqlen_k"])
        else:
            self.batch, self.length, self.key_length = query.shape[0], query.shape[2], key.shape[2]

    def _static(self, size: Size) -> int:
        if not isinstance(size, int):
            raise CodegenError("attention needs fixed numbers of heads and head sizes", where=where(self.anchor))
        return size

    def shape(self, name: str) -> tuple[Size, ...]:
        """Shape of an operand."""
        return fact(self.given[name], TensorType).shape

    @property
    def query_rows(self) -> Size:
        """Rows of queries of all sequences."""
        return self.shape("q")[0] if self.packed else self.batch * self.length

    @property
    def key_bound(self) -> Size:
        """Bound of the row of a key, as ``index`` takes it."""
        return self.shape("k")[0] if self.packed else self.key_length

    def index(self, sequence: Index, row: Index, head: Index, column: Index) -> tuple[Index, ...]:
        """Index of q, k or v."""
        return (row, head, column) if self.packed else (sequence, head, row, column)

    @property
    def reach(self) -> tuple[int, int]:
        """Greatest distance of a key to the left and right of its query, in slots; -1 for no limit."""
        return self.given["window_left"], 0 if self.given["causal"] else self.given["window_right"]
