"""Attention as two grouped matrix products with the softmax folded in, for long sequences.

The first product stores scores and, for each block of keys, the maximum and the sum of exponentials of each query. A
light kernel merges these. The second product turns scores into weights, exp(x - M) / L, as it loads them. Every head of
every sequence is a problem of its own length. Source: the long form of ByteTransformer's fused attention.
"""

from tilewright.codegen.attention.heads import LEAST_DOT
from tilewright.codegen.attention.problem import AttentionProblem
from tilewright.codegen.attention.tile import AttentionTile, Place
from tilewright.codegen.builder import ProgramBuilder
from tilewright.codegen.emit_gemm import dot
from tilewright.codegen.index import Index, constant, linear
from tilewright.codegen.kernel_text import finish
from tilewright.codegen.results import needed_nodes
from tilewright.codegen.writer import TL_TYPES, Var
from tilewright.ir.facts import TensorType, fact
from tilewright.ir.program import KernelStep, View
from tilewright.ir.sizes import Size, at_most, ceil_div

_QUERIES = 64
_KEYS = 64


def emit_long(problem: AttentionProblem, builder: ProgramBuilder, longest: int) -> tuple[KernelStep, ...]:
    """The three steps, for sequences of up to ``longest`` keys."""
    return _Long(problem, builder, longest).steps()


class _Long:
    """The kernels and what they pass on: scores [rows, heads, keys], and for each row and head the maximum and sum of
    each block of keys, and of all."""

    def __init__(self, problem: AttentionProblem, builder: ProgramBuilder, longest: int) -> None:
        few = isinstance(problem.length, int) and problem.length <= LEAST_DOT
        self.problem = problem
        self.queries = LEAST_DOT if few else _QUERIES
        self.blocks = ceil_div(problem.key_length, _KEYS)
        self.most_blocks = longest // _KEYS
        rows, name = problem.query_rows, problem.call.name

        def scratch(what: str, columns: Size) -> View:
            shape = (rows, problem.heads, columns * at_most(problem.key_length, longest))
            return builder.scratch(f"{name}_{what}", problem.compute, shape)

        self.scores = scratch("scores", problem.key_length)
        self.peaks, self.sums = scratch("peaks", self.blocks), scratch("sums", self.blocks)
        self.peak, self.inverse = scratch("peak", 1), scratch("inverse", 1)

    def steps(self) -> tuple[KernelStep, ...]:
        """The kernels in order."""
        return self._first_product(), self._merge(), self._second_product()

    def _at(self, place: Place, row: Index, column: Index, columns: Size) -> Index:
        """Place in a scratch value with so many columns."""
        problem = self.problem
        total = row if problem.packed else place.sequence * problem.length + row
        return linear((total, place.head, column), (problem.heads * columns, columns, 1))

    def _finish(self, tile: AttentionTile, what: str, summary: str, programs: Size, writes: list[View]) -> KernelStep:
        problem = self.problem
        shape = ", ".join(map(str, fact(problem.anchor, TensorType).shape))
        return finish(
            tile.writer,
            family=f"attention_{what}",
            summary=f"Attention -> [{shape}] of up to {self.most_blocks * _KEYS} keys: {summary}",
            nodes=needed_nodes([node for node, _ in problem.results], problem.inputs),
            variables=dict(tile.evaluator.used),
            grid=(programs, problem.heads, problem.batch),
            writes=writes,
            num_warps=4,
            num_stages=2,
        )

    def _first_product(self) -> KernelStep:
        tile = AttentionTile(self.problem, self.queries)
        writer, problem = tile.writer, self.problem
        writer.constants["BLOCK_KEYS"] = _KEYS
        parts = writer.size(self.blocks)
        with tile.opened(f"tl.program_id(0) // {parts} * BLOCK_M") as place:
            writer.statement(f"part = tl.program_id(0) % {parts}")
            part = writer.define(Var("part", self.blocks))
            with writer.block("if key_first + part * BLOCK_KEYS < key_last:"):
                row = tile.rows(place, place.top)
                tile.head_axis("d")
                key, key_row = tile.keys("key_first + part * BLOCK_KEYS", "BLOCK_KEYS")
                q, k = tile.query_tile(place, row), tile.key_tile(place, key, key_row)
                writer.statement(f"scores = {dot(q, k, None, problem.dtype)}")
                tile.finish_scores(place, row, key)
                writer.statement("peak = tl.max(scores, 1, keep_dims=True)")
                writer.statement('shift = tl.where(peak == float("-inf"), 0.0, peak)')
                writer.statement("total = tl.sum(tl.exp(scores - shift), 1, keep_dims=True)")
                column = self._column(key, tile)
                self._write(tile, self.scores, self._at(place, row, column, problem.key_length), "scores")
                at = self._at(place, row, part, self.blocks)
                self._write(tile, self.peaks, at, "peak")
                self._write(tile, self.sums, at, "total")
        return self._finish(
            tile,
            "scores",
            "scores, and their maximum and sum of exponentials by block of keys.",
            ceil_div(problem.length, self.queries) * self.blocks,
            [self.scores, self.peaks, self.sums],
        )

    def _merge(self) -> KernelStep:
        tile = AttentionTile(self.problem, self.queries)
        writer, problem = tile.writer, self.problem
        writer.constants.update(BLOCK_KEYS=_KEYS, PARTS=self.most_blocks)
        with tile.opened("tl.program_id(0) * BLOCK_M") as place:
            row = tile.rows(place, place.top)
            writer.statement("parts = tl.arange(0, PARTS)[None, :]")
            writer.statement("part_mask = key_first + parts * BLOCK_KEYS < key_last")
            part = writer.define(Var("parts", self.blocks, 1, "PARTS", "part_mask"))
            at = self._at(place, row, part, self.blocks)
            writer.statement(f"scores = {self._read(tile, self.peaks, at, 'peaks', float('-inf'))}")
            writer.statement(f"weights = {self._read(tile, self.sums, at, 'sums', 0.0)}")
            sink = tile.sink(place)
            peak = "tl.max(scores, 1, keep_dims=True)"
            writer.statement(f"peak = {peak if sink is None else f'tl.maximum({peak}, {sink})'}")
            writer.statement('shift = tl.where(peak == float("-inf"), 0.0, peak)')
            extra = "" if sink is None else f" + tl.exp({sink} - shift)"
            writer.statement(f"total = tl.sum(weights * tl.exp(scores - shift), 1, keep_dims=True){extra}")
            writer.statement("inverse = 1.0 / tl.where(total == 0.0, 1.0, total)")
            at = self._at(place, row, constant(0), 1)
            self._write(tile, self.peak, at, "shift")
            self._write(tile, self.inverse, at, "inverse")
        programs = ceil_div(problem.length, self.queries)
        return self._finish(tile, "merge", "maximum and sum of all keys.", programs, [self.peak, self.inverse])

    def _second_product(self) -> KernelStep:
        tile = AttentionTile(self.problem, self.queries)
        writer, problem = tile.writer, self.problem
        writer.constants["BLOCK_KEYS"] = _KEYS
        with tile.opened("tl.program_id(0) * BLOCK_M") as place:
            row = tile.rows(place, place.top)
            tile.head_axis("dv")
            at = self._at(place, row, constant(0), 1)
            writer.statement(f"shift = {self._read(tile, self.peak, at, 'peak', 0.0)}")
            writer.statement(f"inverse = {self._read(tile, self.inverse, at, 'inverse', 0.0)}")
            writer.statement(f"acc = tl.zeros([BLOCK_M, {tile.head_block(problem.value_size)}], {problem.kind})")
            with writer.block("for start in range(key_first, key_last, BLOCK_KEYS):"):
                key, key_row = tile.keys("start", "BLOCK_KEYS")
                at = self._at(place, row, self._column(key, tile), problem.key_length)
                writer.statement(f"scores = {self._read(tile, self.scores, at, 'scores', float('-inf'))}")
                writer.statement("weights = tl.exp(scores - shift) * inverse")
                cast = "" if problem.dtype == problem.compute else f".to({TL_TYPES[problem.dtype]})"
                v = tile.value_tile(place, key_row)
                writer.statement(f"acc = {dot(f'weights{cast}', v, 'acc', problem.dtype)}")
            writer.statement("attention = acc")
            tile.store(place, row)
        return self._finish(
            tile,
            "weighted",
            "scores become weights as they are loaded, and sum up values.",
            ceil_div(problem.length, self.queries),
            [view for _, view in problem.results],
        )

    def _column(self, key: Index, tile: AttentionTile) -> Index:
        """Column of a key's score: its distance from the first key that the program may see."""
        first = tile.writer.define(Var("key_first", None))
        return key + first * -1

    def _write(self, tile: AttentionTile, view: View, at: Index, text: str) -> None:
        writer = tile.writer
        pointer = writer.pointer(view, self.problem.compute, "partial")
        writer.statement(f"tl.store({pointer} + {writer.index_text(at)}, {text}, mask={writer.mask(at.deps)})")

    def _read(self, tile: AttentionTile, view: View, at: Index, hint: str, other: float) -> str:
        writer = tile.writer
        pointer, mask = writer.pointer(view, self.problem.compute, hint), writer.mask(at.deps)
        rest = f'float("{other}")' if other else "0.0"
        return f"tl.load({pointer} + {writer.index_text(at)}, mask={mask}, other={rest})"
