"""Attention kernels: one pass over the keys with a running maximum and sum (online softmax), packed or padded.

A program computes a block of queries of one head of one sequence. Source: Milakov and Gimelshein, "Online normalizer
calculation for softmax", 2018; Dao et al., "FlashAttention", 2022. Exponentials are to base 2, with the factor in the
scale.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from tilewright.codegen.builder import ProgramBuilder
from tilewright.codegen.columns import define_columns, next_power_of_2
from tilewright.codegen.emit_gemm import dot
from tilewright.codegen.emit_row import emit_rows
from tilewright.codegen.evaluate import Evaluator
from tilewright.codegen.index import Index, constant, linear, reshape, same_count, variable, without_ones
from tilewright.codegen.kernel_text import finish
from tilewright.codegen.nodes import arguments, compute_dtype, literal, size_of
from tilewright.codegen.region_call import Inputs, RegionCall
from tilewright.codegen.results import depends_on, needed_nodes, peel, store
from tilewright.codegen.views import broadcast
from tilewright.codegen.writer import TL_TYPES, KernelWriter, Register, Var
from tilewright.errors import CodegenError
from tilewright.ir.facts import TensorType, fact, where
from tilewright.ir.program import KernelStep, View
from tilewright.ir.sizes import Size, ceil_div, contiguous_strides
from tilewright.ops import Flow, traits_of

packing = torch.ops.tilewright

_LOG2_E = 1.4426950408889634
_NAMES = (
    *("tile", "head", "sequence", "top", "key_first", "key_last", "rows", "row_mask", "d", "dv", "d_rows"),
    *("keys", "key_mask", "key_rows", "key_row_mask", "scores", "peak", "new_peak", "shift", "weights", "fade"),
    *("total", "acc", "attention"),
)
_LEAST_DOT = 16
_QUERIES = 32
_KEYS = 32


@dataclass(frozen=True)
class Place:
    """Where a program stands: index variables and texts that the kernel's parts share.

    Attributes:
        sequence, head, row: index variables of the queries; ``row`` runs along axis 0.
        first, last: text of the first key and the end of the keys that this tile of queries may see.
    """

    sequence: Index
    head: Index
    row: Index
    first: str
    last: str


def emit_attention(call: RegionCall, builder: ProgramBuilder) -> tuple[KernelStep, ...]:
    """The steps of a region with one attention; results that do not depend on it get kernels of their own.

    Raises:
        CodegenError: the region has no or several attentions, or an epilogue that does not follow its tiles.
    """
    inputs = call.read(builder)
    results = list(call.results())
    anchors = [node for node in call.graph.graph.nodes if traits_of(node.target).flow is Flow.ATTENTION]
    if len(anchors) != 1:
        raise CodegenError(
            "an attention region needs exactly one attention", where=call.name, why=f"it has {len(anchors)}"
        )
    ahead = [(node, view) for node, view in results if not depends_on(node, anchors[0])]
    behind = [(node, view) for node, view in results if depends_on(node, anchors[0])]
    steps = emit_rows(call.graph, inputs, ahead) if ahead else ()
    return (*steps, _Attention(call, inputs, behind, anchors[0]).emit())


class _Attention:
    """Writes one attention kernel."""

    def __init__(self, call: RegionCall, inputs: Inputs, results: Sequence[tuple[Node, View]], anchor: Node) -> None:
        self.anchor, self.inputs, self.results = anchor, inputs, results
        self.writer = KernelWriter(2)
        self.evaluator = Evaluator(call.graph, self.writer, inputs)
        self.given: dict[str, Any] = arguments(anchor)
        self.packed = anchor.target == packing.attention_packed.default
        # Queries that are not all tokens stand at other rows than their keys: only slots tell how far apart they are.
        self.apart = self.packed and self.given["slots_q"] is not self.given["slots_k"]
        query, value = fact(self.given["q"], TensorType), fact(self.given["v"], TensorType)
        self.heads = query.shape[1]
        self.group = self._static(self.heads) // self._static(fact(self.given["k"], TensorType).shape[1])
        self.size, self.value_size = self._static(query.shape[-1]), self._static(value.shape[-1])
        self.dtype, self.compute = query.dtype, compute_dtype(query.dtype)
        self.length = size_of(self.given["max_seqlen_q"]) if self.packed else query.shape[2]
        self.key_length = (
            size_of(self.given["max_seqlen_k"]) if self.packed else fact(self.given["k"], TensorType).shape[2]
        )
        self.kind = TL_TYPES[self.compute]
        few = isinstance(self.length, int) and self.length <= _LEAST_DOT
        self.block = _LEAST_DOT if few else _QUERIES

    def _static(self, size: Size) -> int:
        if not isinstance(size, int):
            raise CodegenError("attention needs fixed numbers of heads and head sizes", where=where(self.anchor))
        return size

    def emit(self) -> KernelStep:
        """The step."""
        batch = fact(self.given["cu_seqlens_q"], TensorType).shape[0] - 1 if self.packed else self._shape("q")[0]
        writer = self.writer
        writer.reserve(*_NAMES)
        writer.constants.update(BLOCK_M=self.block)
        writer.statement("tile = tl.program_id(0) * BLOCK_M")
        writer.statement("head = tl.program_id(1)")
        writer.statement("sequence = tl.program_id(2).to(tl.int64)")
        head = writer.define(Var("head", self.heads))
        sequence = writer.define(Var("sequence", batch))
        opened = self._open_packed if self.packed else self._open_padded
        with opened(sequence, head) as place:
            self._attend(place)
            self._store(place)
        shape = ", ".join(map(str, fact(self.anchor, TensorType).shape))
        return finish(
            writer,
            family="attention",
            summary=f"Attention -> [{shape}] by online softmax. A program computes {self.block} queries of one head.",
            nodes=needed_nodes([node for node, _ in self.results], self.inputs),
            variables={**self.evaluator.used, self.anchor: "attention"},
            grid=(ceil_div(self.length, self.block), self.heads, batch),
            writes=[view for _, view in self.results],
            num_warps=4,
            num_stages=2,
        )

    def _shape(self, name: str) -> tuple[Size, ...]:
        return fact(self.given[name], TensorType).shape

    @contextmanager
    def _open_packed(self, sequence: Index, head: Index) -> Iterator[Place]:
        """Tiles past the end of a short sequence do nothing."""
        writer, value = self.writer, self.evaluator.value
        first = value(self.given["cu_seqlens_q"], (sequence,)).text
        last = value(self.given["cu_seqlens_q"], (sequence + 1,)).text
        with writer.block(f"if {first} + tile < {last}:"):
            key = value(self.given["key_start"], (sequence,)).text
            count = value(self.given["seqlens_k"], (sequence,)).text
            writer.statement(f"top = ({first} + tile).to(tl.int64)")
            writer.statement(f"key_first = {key}.to(tl.int64)")
            writer.statement(f"key_last = key_first + {count}")
            row = self._rows("top", self._shape("q")[0], last)
            if self.apart:
                self._limit_keys_by_slot(row)
            else:
                self._limit_keys("top")
            yield Place(sequence, head, row, "key_first", "key_last")

    @contextmanager
    def _open_padded(self, sequence: Index, head: Index) -> Iterator[Place]:
        writer = self.writer
        writer.statement("key_first = 0")
        writer.statement(f"key_last = {writer.size(self.key_length)}")
        self._limit_keys(f"tile + {writer.size(self.key_length - self.length)}")
        yield Place(sequence, head, self._rows("tile", self.length, writer.size(self.length)), "key_first", "key_last")

    def _limit_keys(self, top: str) -> None:
        """Leaves out keys that no query of the tile may see: slots are at least as far apart as packed rows."""
        right = 0 if self.given["causal"] else self.given["window_right"]
        if right >= 0:
            end = f"{top} + BLOCK_M + {right}" if right else f"{top} + BLOCK_M"
            self.writer.statement(f"key_last = tl.minimum(key_last, {end})")
        if self.given["window_left"] >= 0:
            self.writer.statement(f"key_first = tl.maximum(key_first, {top} - {self.given['window_left']})")

    def _limit_keys_by_slot(self, row: Index) -> None:
        """As above: the first key of a sequence has slot 0 or more, and slots rise at least as fast as rows."""
        right = 0 if self.given["causal"] else self.given["window_right"]
        if right >= 0:
            slot = self.writer.index_text(self._slot(row, "q"))
            end = f"key_first + tl.max(tl.where(row_mask, {slot}, 0)) + {right + 1}"
            self.writer.statement(f"key_last = tl.minimum(key_last, {end})")

    def _rows(self, top: str, bound: Size, last: str) -> Index:
        self.writer.statement(f"rows = {top} + tl.arange(0, BLOCK_M)[:, None]")
        self.writer.statement(f"row_mask = rows < {last}")
        return self.writer.define(Var("rows", bound, 0, "BLOCK_M", "row_mask"))

    def _head_axis(self, name: str, size: int) -> Index:
        """The variable that runs over the head size along axis 1; equal sizes share it."""
        writer = self.writer
        name = writer.column_names.setdefault(size, name)
        if name in writer.variables:
            return variable(name, size)
        return define_columns(writer, name, size, max(_LEAST_DOT, next_power_of_2(size)))

    def _attend(self, place: Place) -> None:
        """The loop over blocks of keys."""
        writer = self.writer
        d = self._head_axis("d", self.size)
        dv = self._head_axis("dv", self.value_size)
        q = self.evaluator.raw(self.given["q"], self._index("q", place, place.row, place.head, d), self.dtype)
        self._start(place, f"BLOCK_{writer.column_names[self.value_size].upper()}")
        writer.constants["BLOCK_KEYS"] = _KEYS
        with writer.block(f"for start in range({place.first}, {place.last}, BLOCK_KEYS):"):
            writer.statement("keys = start + tl.arange(0, BLOCK_KEYS)[None, :]")
            writer.statement(f"key_mask = keys < {place.last}")
            key = writer.define(Var("keys", self._bound(), 1, "BLOCK_KEYS", "key_mask"))
            writer.statement("key_rows = start + tl.arange(0, BLOCK_KEYS)[:, None]")
            writer.statement(f"key_row_mask = key_rows < {place.last}")
            key_row = writer.define(Var("key_rows", self._bound(), 0, "BLOCK_KEYS", "key_row_mask"))
            k = self._keys(place, key, key_row, d)
            writer.statement(f"scores = {dot(q.text, k, None, self.dtype)}")
            self._scores(place, key)
            v = self._values(place, key_row, dv)
            cast = "" if self.dtype == self.compute else f".to({TL_TYPES[self.dtype]})"
            for line in (
                "new_peak = tl.maximum(peak, tl.max(scores, 1, keep_dims=True))",
                # A row that has seen no key yet has peak -inf, and -inf - -inf is no number.
                'shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)',
                "weights = tl.exp2(scores - shift)",
                "fade = tl.exp2(peak - shift)",
                "total = total * fade + tl.sum(weights, 1, keep_dims=True)",
                f"acc = {dot(f'weights{cast}', v, 'acc * fade', self.dtype)}",
                "peak = new_peak",
            ):
                writer.statement(line)
        writer.statement("attention = acc / tl.where(total == 0.0, 1.0, total)")

    def _bound(self) -> Size:
        return self._shape("k")[0] if self.packed else self.key_length

    def _index(self, name: str, place: Place, row: Index, head: Index, column: Index) -> tuple[Index, ...]:
        return (row, head, column) if self.packed else (place.sequence, head, row, column)

    def _start(self, place: Place, block: str) -> None:
        """Running maximum, sum and result; a sink is a key without a value that every query has seen."""
        writer = self.writer
        if isinstance(self.given["sinks"], Node):
            sink = self.evaluator.number(self.given["sinks"], (place.head,), self.compute).text
            writer.statement(f"peak = tl.zeros([BLOCK_M, 1], {self.kind}) + {sink} * {_LOG2_E}")
            writer.statement(
                f'total = tl.zeros([BLOCK_M, 1], {self.kind}) + tl.where({sink} == float("-inf"), 0.0, 1.0)'
            )
        else:
            writer.statement(f'peak = tl.full([BLOCK_M, 1], float("-inf"), {self.kind})')
            writer.statement(f"total = tl.zeros([BLOCK_M, 1], {self.kind})")
        writer.statement(f"acc = tl.zeros([BLOCK_M, {block}], {self.kind})")

    def _keys(self, place: Place, key: Index, key_row: Index, d: Index) -> str:
        """Text of the keys' tile [D, BLOCK_KEYS]; computed keys are transposed, stored ones are read that way."""
        head = place.head // self.group
        if not self.evaluator.is_stored(self.given["k"]):
            k = self.evaluator.raw(self.given["k"], self._index("k", place, key_row, head, d), self.dtype)
            return f"tl.trans({k.text})"
        block = f"BLOCK_{self.writer.column_names[self.size].upper()}"
        full = self.size == self.writer.constants[block]
        self.writer.statement(f"d_rows = tl.arange(0, {block})[:, None]")
        if not full:
            self.writer.statement(f"d_rows_mask = d_rows < {self.size}")
        down = self.writer.define(Var("d_rows", self.size, 0, block, None if full else "d_rows_mask"))
        return self.evaluator.raw(self.given["k"], self._index("k", place, key, head, down), self.dtype).text

    def _values(self, place: Place, key_row: Index, dv: Index) -> str:
        """Text of the values' tile; a key that is not valid has zeros, whatever is stored there: 0 * NaN is NaN."""
        index = self._index("v", place, key_row, place.head // self.group, dv)
        if not isinstance(self.given.get("valid"), Node):
            return self.evaluator.raw(self.given["v"], index, self.dtype).text
        valid = self.evaluator.number(self.given["valid"], (place.sequence, key_row), torch.bool)
        with self.evaluator.guarded(valid):
            return self.evaluator.raw(self.given["v"], index, self.dtype).text

    def _scores(self, place: Place, key: Index) -> None:
        """Scale, softcap, bias and mask, in the order of the op's definition."""
        writer, given = self.writer, self.given
        scale, cap = float(given["scale"]), float(given["softcap"])
        if cap > 0.0:
            writer.statement(f"scores = tanh(scores * {literal(scale / cap)}) * {literal(cap * _LOG2_E)}")
        else:
            writer.statement(f"scores = scores * {literal(scale * _LOG2_E)}")
        if isinstance(given["bias"], Node):
            shape = fact(given["bias"], TensorType).shape
            full = (place.sequence, place.head, self._slot(place.row, "q"), self._slot(key, "k"))
            bias = self.evaluator.number(given["bias"], broadcast(full[4 - len(shape) :], shape), self.compute)
            writer.statement(f"scores = scores + {bias.text} * {_LOG2_E}")
        writer.statement(f'scores = tl.where({" & ".join(self._allowed(place, key))}, scores, float("-inf"))')

    def _slot(self, row: Index, of: str) -> Index:
        """The column of a query ("q") or a key ("k") in the padded batch."""
        return self.evaluator.loaded_index(self.given[f"slots_{of}"], (row,), self.key_length) if self.packed else row

    def _allowed(self, place: Place, key: Index) -> list[str]:
        """Conditions under which a query sees a key."""
        given, text = self.given, self.writer.index_text
        conditions = ["key_mask"]
        offset = constant(0) if self.packed else constant(self.key_length - self.length)
        if isinstance(given.get("valid"), Node):
            conditions.append(self.evaluator.number(given["valid"], (place.sequence, key), torch.bool).text)
        if given["causal"] and self.apart:
            conditions.append(f"({text(self._slot(key, 'k'))} <= {text(self._slot(place.row, 'q'))})")
        elif given["causal"]:
            # Rows of a sequence are in the order of their slots.
            conditions.append(f"(keys <= {text(place.row + offset)})")
        if given["window_left"] >= 0:
            query = self._slot(place.row, "q") + offset + constant(-given["window_left"])
            conditions.append(f"({text(self._slot(key, 'k'))} >= {text(query)})")
        if given["window_right"] >= 0:
            query = self._slot(place.row, "q") + offset + constant(given["window_right"])
            conditions.append(f"({text(self._slot(key, 'k'))} <= {text(query)})")
        return conditions

    def _store(self, place: Place) -> None:
        """Evaluates what follows the attention on its tile, and stores it."""
        shape = fact(self.anchor, TensorType).shape
        name = self.writer.column_names[self.value_size]
        dv = variable(name, self.value_size)
        index = (place.row, place.head, dv) if self.packed else (place.sequence, place.row, place.head, dv)
        strides = contiguous_strides(shape)
        position = linear(index, strides)
        here = without_ones(index, shape)
        deps = position.deps

        def attention(at: tuple[Index, ...]) -> Register:
            if linear(at, strides) != linear(here, strides):
                raise CodegenError("an epilogue needs elements of other tiles", where=where(self.anchor))
            return Register("attention", self.compute, deps)

        self.evaluator.bindings[self.anchor] = attention
        for node, view in self.results:
            result = peel(node, view, self.inputs)
            if result.scatter is not None or not same_count(result.shape, shape):
                raise CodegenError("a result of an attention region has another shape", where=where(node))
            value = self.evaluator.value(result.node, reshape(here, result.shape, shape))
            store(self.writer, view, fact(result.node, TensorType).dtype, position, value)
