"""Parts that all forms of attention share: a program's place, tiles of operands, scores with their mask, the store.

Where a program goes over keys, scores
are [keys, queries]: keys are read as they are stored, one behind the other, and only the queries, which stay, are
turned. A bias is stored query by query, and with one, as with tables, scores are [queries, keys].
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.fx import Node

from tilewright.codegen.attention.heads import head_axis, head_block, store_attention
from tilewright.codegen.attention.problem import AttentionProblem
from tilewright.codegen.attention.scores import AttentionScores, Place
from tilewright.codegen.emit_gemm import dot
from tilewright.codegen.evaluate import Evaluator
from tilewright.codegen.index import Index
from tilewright.codegen.nodes import literal
from tilewright.codegen.writer import KernelWriter, Register, Var

_NAMES = (
    *("tile", "head", "sequence", "top", "are_keys", "key_first", "key_last", "last_query", "rows", "row_mask", "d"),
    *("dv", "queries", "query_mask", "turned"),
    *("d_rows", "keys", "key_mask", "key_rows", "key_row_mask", "scores", "peak", "new_peak", "shift", "weights"),
    *("fade", "total", "acc", "attention", "part", "parts", "part_mask", "inverse", "pads"),
)


@dataclass(frozen=True)
class Queries:
    """A tile of queries: the index variable that stands for them in the scores, and its text as an operand."""

    index: Index
    text: str


@dataclass(frozen=True)
class Keys:
    """A tile of keys: the variable in the scores, that along axis 0, and the text of the operand."""

    index: Index
    row: Index
    text: str


class AttentionTile(AttentionScores):
    """A kernel under construction that computes, for one head of one sequence, a block of queries.

    Args:
        problem: the attention.
        span: queries of one program.
    """

    def __init__(self, problem: AttentionProblem, span: int) -> None:
        writer = KernelWriter(2)
        writer.reserve(*_NAMES)
        super().__init__(problem, writer, Evaluator(problem.call.graph, writer, problem.inputs))
        self.writer.constants["BLOCK_M"] = span
        self._span = "BLOCK_M"

    @contextmanager
    def opened(self, tile: str, span: str = "BLOCK_M") -> Iterator[Place]:
        """The program's place; programs past the end of a short sequence do nothing.

        Args:
            tile: text of the number of the program's first query within its sequence.
            span: text of the number of queries of a program.
        """
        writer, problem = self.writer, self.problem
        self._span = span
        writer.statement(f"tile = {tile}")
        writer.statement("head = tl.program_id(1)")
        writer.statement("sequence = tl.program_id(2).to(tl.int64)")
        head = writer.define(Var("head", problem.heads))
        sequence = writer.define(Var("sequence", problem.batch))
        opened = self._open_packed if problem.packed else self._open_padded
        with opened(sequence, head) as place:
            yield place

    @contextmanager
    def _open_packed(self, sequence: Index, head: Index) -> Iterator[Place]:
        writer, value = self.writer, self.evaluator.value
        first = value(self.given["cu_seqlens_q"], (sequence,)).text
        last = value(self.given["cu_seqlens_q"], (sequence + 1,)).text
        with writer.block(f"if {first} + tile < {last}:"):
            key = value(self.given["key_start"], (sequence,)).text
            count = value(self.given["seqlens_k"], (sequence,)).text
            writer.statement(f"top = ({first} + tile).to(tl.int64)")
            writer.statement(f"key_first = {key}.to(tl.int64)")
            writer.statement(f"key_last = key_first + {count}")
            place = Place(sequence, head, "top", last)
            if self.problem.apart:
                self._limit_keys_by_slot(place)
            else:
                self._limit_keys("top", "top >= key_first")
            yield place

    @contextmanager
    def _open_padded(self, sequence: Index, head: Index) -> Iterator[Place]:
        writer, problem = self.writer, self.problem
        writer.statement("key_first = 0")
        writer.statement(f"key_last = {writer.size(problem.key_length)}")
        self._limit_keys(f"tile + {writer.size(problem.key_length - problem.length)}")
        yield Place(sequence, head, "tile", writer.size(problem.length))

    def _limit_keys(self, top: str, are_keys: str | None = None) -> None:
        """Leaves out keys that no query of the program may see: slots are at least as far apart as packed rows.

        Args:
            top: text of the first query's place among the keys.
            are_keys: text of whether all queries are keys; where not, some come before the keys, whatever their slots.
        """
        left, right = self.problem.reach
        first, last = f"tl.maximum(key_first, {top} - {left})", f"tl.minimum(key_last, {top} + {self._span}"
        limits = {"key_last": f"{last} + {right})" if right else f"{last})"} if right >= 0 else {}
        limits |= {"key_first": first} if left >= 0 else {}
        if limits and are_keys is not None:
            self.writer.statement(f"are_keys = {are_keys}")
        for name, limit in limits.items():
            self.writer.statement(f"{name} = {limit if are_keys is None else f'tl.where(are_keys, {limit}, {name})'}")

    def _limit_keys_by_slot(self, place: Place) -> None:
        """As above: the first key of a sequence has slot 0 or more, and slots rise at least as fast as rows."""
        right = self.problem.reach[1]
        if right >= 0:
            self.writer.statement(f"last_query = tl.minimum({place.query_last}, top + {self._span}) - 1")
            last = self.writer.define(Var("last_query", self.problem.shape("q")[0]))
            end = f"key_first + {self.writer.index_text(self.slot(last, 'q'))} + {right + 1}"
            self.writer.statement(f"key_last = tl.minimum(key_last, {end})")

    # Index variables

    def rows(self, place: Place, top: str, block: str = "BLOCK_M") -> Index:
        """The variable of the queries, along axis 0."""
        bound = self.problem.shape("q")[0] if self.problem.packed else self.problem.length
        self.writer.statement(f"rows = {top} + tl.arange(0, {block})[:, None]")
        self.writer.statement(f"row_mask = rows < {place.query_last}")
        return self.writer.define(Var("rows", bound, 0, block, "row_mask"))

    def queries(self, place: Place, top: str) -> Index:
        """The variable of the same queries along axis 1."""
        self.writer.statement(f"queries = {top} + tl.arange(0, BLOCK_M)[None, :]")
        self.writer.statement(f"query_mask = queries < {place.query_last}")
        bound = self.problem.shape("q")[0] if self.problem.packed else self.problem.length
        return self.writer.define(Var("queries", bound, 1, "BLOCK_M", "query_mask"))

    def keys(self, start: str, block: str) -> tuple[Index, Index]:
        """The variables of keys from ``start``, along axis 1 and along axis 0."""
        writer, bound = self.writer, self.problem.key_bound
        writer.statement(f"keys = {start} + tl.arange(0, {block})[None, :]")
        writer.statement("key_mask = keys < key_last")
        key = writer.define(Var("keys", bound, 1, block, "key_mask"))
        return key, self.key_rows(start, block)

    def key_rows(self, start: str, block: str) -> Index:
        """The variable of keys from ``start`` along axis 0."""
        self.writer.statement(f"key_rows = {start} + tl.arange(0, {block})[:, None]")
        self.writer.statement("key_row_mask = key_rows < key_last")
        return self.writer.define(Var("key_rows", self.problem.key_bound, 0, block, "key_row_mask"))

    def head_axis(self, name: str) -> Index:
        """The variable along axis 1 over the size of a head: "d" of queries and keys, "dv" of values; equal ones are
        one variable."""
        size = self.problem.size if name == "d" else self.problem.value_size
        return head_axis(self.writer, name, size)

    def head_block(self, size: int) -> str:
        """Name of the constant that is the width of a tile of heads of this size."""
        return head_block(self.writer, size)

    # Tiles

    def query_tile(self, place: Place, row: Index) -> str:
        """Text of the queries' tile [BLOCK_M, D]."""
        index = self.problem.index(place.sequence, row, place.head, self.head_axis("d"))
        return self.evaluator.raw(self.given["q"], index, self.problem.dtype).text

    @property
    def turned(self) -> bool:
        """Whether scores are [keys, queries]."""
        by_query = (self.given[name] for name in ("bias", "query_table", "key_table"))
        return not self.given["uniform_pads"] and not any(isinstance(each, Node) for each in by_query)

    @property
    def key_axis(self) -> int:
        """Axis of the scores that runs over keys."""
        return 0 if self.turned else 1

    @property
    def per_query(self) -> str:
        """Shape of what there is one of for each query, beside scores."""
        return "[1, BLOCK_M]" if self.turned else "[BLOCK_M, 1]"

    def by_rows(self, text: str) -> str:
        """What runs along the queries of the scores, with queries along axis 0."""
        return f"tl.trans({text})" if self.turned else text

    def read_queries(self, place: Place, top: str, row: Index) -> Queries:
        """The queries' tile as the scores want it, with the scale in it where that rounds nothing away."""
        q = self.query_tile(place, row)
        if not self.turned:
            return Queries(row, q)
        query = self.queries(place, top)
        factor = f" * {literal(self.factor)}" if self._scaled_queries else ""
        self.writer.statement(f"turned = tl.trans({q}{factor})")
        return Queries(query, "turned")

    @property
    def _scaled_queries(self) -> bool:
        return self.problem.dtype == self.problem.compute

    def read_keys(self, place: Place, start: str, block: str) -> Keys:
        """A tile of keys from ``start`` as the scores want it."""
        problem = self.problem
        if not self.turned:
            key, key_row = self.keys(start, block)
            return Keys(key, key_row, self.key_tile(place, key, key_row))
        key_row = self.key_rows(start, block)
        index = problem.index(place.sequence, key_row, place.head // problem.group, self.head_axis("d"))
        return Keys(key_row, key_row, self.evaluator.raw(self.given["k"], index, problem.dtype).text)

    def write_scores(self, place: Place, queries: Queries, keys: Keys) -> None:
        """Writes ``scores``, complete."""
        pair = (keys.text, queries.text) if self.turned else (queries.text, keys.text)
        self.writer.statement(f"scores = {dot(*pair, None, self.problem.dtype)}")
        self.finish_scores(place, queries.index, keys.index, scaled=self.turned and self._scaled_queries)

    def key_tile(self, place: Place, key: Index, key_row: Index) -> str:
        """Text of the keys' tile [D, keys]; computed keys are transposed, stored ones are read that way."""
        problem, writer = self.problem, self.writer
        head = place.head // problem.group
        d = self.head_axis("d")
        if not self.evaluator.is_stored(self.given["k"]):
            index = problem.index(place.sequence, key_row, head, d)
            return f"tl.trans({self.evaluator.raw(self.given['k'], index, problem.dtype).text})"
        block = self.head_block(problem.size)
        full = problem.size == writer.constants[block]
        writer.statement(f"d_rows = tl.arange(0, {block})[:, None]")
        if not full:
            writer.statement(f"d_rows_mask = d_rows < {problem.size}")
        down = writer.define(Var("d_rows", problem.size, 0, block, None if full else "d_rows_mask"))
        index = problem.index(place.sequence, key, head, down)
        return self.evaluator.raw(self.given["k"], index, problem.dtype).text

    def value_tile(self, place: Place, key_row: Index) -> str:
        """Text of the values' tile; a key that is not valid has zeros, whatever is stored there: 0 * NaN is NaN."""
        problem = self.problem
        index = problem.index(place.sequence, key_row, place.head // problem.group, self.head_axis("dv"))
        if not isinstance(self.given.get("valid"), Node) or self.given["uniform_pads"]:
            return self.evaluator.raw(self.given["v"], index, problem.dtype).text
        valid = self.evaluator.number(self.given["valid"], (place.sequence, key_row), torch.bool)
        with self.evaluator.guarded(valid):
            return self.evaluator.raw(self.given["v"], index, problem.dtype).text

    def sink(self, place: Place) -> str | None:
        """Text of the sink's logit: a key without a value that every query sees."""
        if not isinstance(self.given["sinks"], Node):
            return None
        sink = self.evaluator.number(self.given["sinks"], (place.head,), self.problem.compute)
        return self.writer.emit("sink", sink.text, sink.deps)

    # Results

    def count_pads(self, place: Place, row: Index) -> None:
        """Adds to ``total`` and ``acc`` of a packed query that is padding the places of its sequence without a key: all
        hold what stands at its own, the row before the first key."""
        if not (self.given["uniform_pads"] and self.problem.packed):
            return
        writer, problem = self.writer, self.problem
        writer.statement(f"pads = {writer.size(problem.key_length)} - (key_last - key_first)")
        own = writer.define(Var("key_first", problem.key_bound)) + -1
        exists = Register(writer.emit("own_exists", "key_first > 0", own.deps), torch.bool, own.deps)
        index = problem.index(place.sequence, own, place.head // problem.group, self.head_axis("dv"))
        with self.evaluator.guarded(exists):
            value = self.evaluator.number(self.given["v"], index, problem.compute)
        is_pad = self.is_pad(place, row)
        writer.statement(f"acc = tl.where({is_pad}, acc + pads * {value.text}, acc)")
        writer.statement(f"total = tl.where({is_pad}, total + pads, total)")

    def store(self, place: Place, row: Index) -> None:
        """Evaluates what follows the attention on its tile, ``attention`` in the text, and stores it."""
        problem, dv = self.problem, self.head_axis("dv")
        index = (row, place.head, dv) if problem.packed else (place.sequence, row, place.head, dv)
        store_attention(self.evaluator, problem.anchor, problem.results, problem.inputs, problem.compute, index)
