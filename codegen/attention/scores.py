"""What becomes of a tile of scores: scale, softcap, bias, tables and masks, in the order of the op's definition.

Scores are to base e: to base 2, which would save ``exp`` a product, the factor would round each query and bias.
"""

from dataclasses import dataclass

import torch
from torch.fx import Node

from tilewright.codegen.attention.problem import AttentionProblem
from tilewright.codegen.evaluate import Evaluator
from tilewright.codegen.index import Index, constant
from tilewright.codegen.nodes import literal
from tilewright.codegen.views import broadcast
from tilewright.codegen.writer import KernelWriter, Register, Var
from tilewright.ir.facts import TensorType, fact

_FAR = 2**30
"""A distance of columns that no sequence has, and that can be added to one in 32 bits."""


@dataclass(frozen=True)
class Place:
    """Where a program stands: index variables that the parts of a kernel share.

    The text names ``key_first`` and ``key_last``: first key and end of the keys that the program's queries may see.
    ``query_last`` is the text of the end of the sequence's queries.
    """

    sequence: Index
    head: Index
    top: str
    query_last: str


class AttentionScores:
    """Scores of a kernel under construction; ``scores`` in its text.

    Args:
        problem: the attention.
        writer, evaluator: of the kernel.
    """

    def __init__(self, problem: AttentionProblem, writer: KernelWriter, evaluator: Evaluator) -> None:
        self.problem, self.given = problem, problem.given
        self.writer, self.evaluator = writer, evaluator

    @property
    def factor(self) -> float:
        """What products of queries and keys are multiplied by."""
        scale, cap = float(self.given["scale"]), float(self.given["softcap"])
        return scale / cap if cap > 0.0 else scale

    def finish_scores(self, place: Place, row: Index, key: Index, scaled: bool = False) -> None:
        """Scale, softcap, bias and mask of ``scores``, in the order of the op's definition."""
        writer, given = self.writer, self.given
        cap = float(given["softcap"])
        if not scaled:
            writer.statement(f"scores = scores * {literal(self.factor)}")
        if cap > 0.0:
            writer.statement(f"scores = tanh(scores) * {literal(cap)}")
        if isinstance(given["bias"], Node):
            shape = fact(given["bias"], TensorType).shape
            full = (place.sequence, place.head, self.slot(row, "q"), self.slot(key, "k"))
            index = broadcast(full[4 - len(shape) :], shape)
            bias = self.evaluator.number(given["bias"], index, self.problem.compute)
            writer.statement(f"scores = scores + {bias.text}")
        self._add_tables(place, row, key)
        if given["uniform_pads"]:
            writer.statement(f"scores = tl.where({self.is_pad(place, row)}, 0.0, scores)")
        allowed = " & ".join(self._allowed(place, row, key))
        writer.statement(f'scores = tl.where({allowed}, scores, float("-inf"))')

    def _add_tables(self, place: Place, row: Index, key: Index) -> None:
        """Adds what is looked up for each pair, in the table of its query and in that of its key."""
        for of, own, other, kind in (("query", row, key, "qk"), ("key", key, row, "kq")):
            table = self.given[f"{of}_table"]
            if not isinstance(table, Node):
                continue
            slots = (self.slot(own, kind[0]), self.slot(other, kind[1]))
            entry = self.evaluator.loaded_index(self.given[f"{of}_index"], slots, fact(table, TensorType).shape[-1])
            index = self.problem.index(place.sequence, own, place.head, entry)
            number = self.evaluator.number(table, index, self.problem.compute)
            self.writer.statement(f"scores = scores + {number.text}")

    def slot(self, row: Index, of: str) -> Index:
        """The column of a query ("q") or a key ("k") in the padded batch."""
        if not self.problem.packed:
            return row
        return self.evaluator.loaded_index(self.given[f"slots_{of}"], (row,), self.problem.key_length)

    def _column(self, row: Index, of: str, distance: int = 0) -> str:
        """Text of the column ``distance`` behind that of a query or key, where keys and the last queries are level."""
        problem = self.problem
        if problem.packed:
            column = self.evaluator.value(self.given[f"slots_{of}"], (row,)).text
            return f"{column} + {literal(distance)}" if distance else column
        offset = problem.key_length - problem.length if of == "q" else 0
        return self.writer.index_text(row + constant(offset + distance))

    def _allowed(self, place: Place, row: Index, key: Index) -> list[str]:
        """Conditions under which a query sees a key."""
        given = self.given
        conditions = [self.writer.mask(key.deps) or "True"]
        if isinstance(given.get("valid"), Node):
            valid = self.evaluator.number(given["valid"], (place.sequence, key), torch.bool).text
            conditions.append(f"({valid} | {self.is_pad(place, row)})" if given["uniform_pads"] else valid)
        left, right = (min(given[name], _FAR) for name in ("window_left", "window_right"))
        limits = [("<=", 0)] if given["causal"] else []
        limits += [(">=", -left)] if left >= 0 else []
        limits += [("<=", right)] if right >= 0 else []
        for order, distance in limits:
            conditions.append(f"({self._column(key, 'k')} {order} {self._column(row, 'q', distance)})")
        return conditions

    def is_pad(self, place: Place, row: Index) -> str:
        """Whether a query is no key itself: of packed ones, whether it stands before the first key of its sequence."""
        if not self.problem.packed:
            valid = self.evaluator.number(self.given["valid"], (place.sequence, row), torch.bool)
            return f"({valid.text} == 0)"
        if not self.problem.apart:
            return "(rows < key_first)"
        first = self.writer.define(Var("key_first", self.problem.key_bound))
        found = Register(self.writer.emit("has_keys", "key_first < key_last", first.deps), torch.bool, first.deps)
        with self.evaluator.guarded(found):  # behind the last sequence there is no row
            start = self.writer.index_text(self.slot(first, "k"))
        return f"(({found.text} == 0) | ({self.writer.index_text(self.slot(row, 'q'))} < {start}))"
