"""What the passes may know of an op: how its axes flow, and how it is written in Triton.

A pass never asks for an op by name when a trait can answer. An op with declared traits packs and fuses without a
change to any pass.
"""

from dataclasses import dataclass
from enum import Enum


class Flow(Enum):
    """How the axes of an op's tensor inputs become axes of its output."""

    POINTWISE = "pointwise"  # inputs broadcast against one another from the right; every axis flows
    LAST_AXIS = "last_axis"  # works along the last axis of input 0 (norm, softmax over -1); all others flow
    CONTRACT = "contract"  # linear, of heads or not: the last axis of input 0 is replaced; all others flow
    GROUPED = "grouped"  # linear whose weight each row chooses; as CONTRACT
    ROUTE = "route"  # tables of the rows that each weight of a GROUPED op has
    LOOKUP = "lookup"  # embedding(table, ids): the axes of ids flow, one new last axis
    REDUCE = "reduce"  # reduces the axes named by ``axes_arg``; the others flow
    COLUMN = "column"  # one place of each sequence: of input 0, axis 1 is gone and all others flow
    VIEW = "view"  # moves elements without computing; each has a rule of its own
    ATTENTION = "attention"  # mixes the tokens of one sequence, given which keys are valid
    APPEND = "append"  # puts rows into pages of the caller
    CREATE = "create"  # makes a tensor from sizes (arange, full)
    SIZE = "size"  # yields an integer, not a tensor
    PACKING = "packing"  # row index, gather and scatter of packed tokens
    OTHER = "other"  # nothing is known: runs eager, never packed


@dataclass(frozen=True)
class Traits:
    """Traits of one op.

    Attributes:
        flow: how axes flow.
        triton: for POINTWISE ops, a Triton expression with ``{0}``, ``{1}`` for tensor or scalar operands in order,
            computed
            in the compute dtype (fp32 for half types), e.g. ``"tl.maximum({0}, 0.0)"``. None: no kernel is emitted
            and the
            op runs eager.
        axes_arg: position of the argument that names the axes worked on (REDUCE; LAST_AXIS ops that take an axis).
        shape_arg: for LAST_AXIS, position of the argument that lists the sizes of the trailing axes worked on.
        row_args: for LAST_AXIS and GROUPED, positions of the operands with a row for each row of the result; their
            leading axes are the result's. Other operands are the same for all rows.
        reduce: for REDUCE, "sum", "mean", "max", "min", "argmax", "any", "all".
        zero_preserving: f(0) = 0 for a pointwise op of one tensor.
        absorbs_zero: for POINTWISE, one operand that is 0 makes the result 0, whatever finite value the others have.
        choose: for POINTWISE, (condition, value where it holds, value where not) as positions of arguments.
        why_not: for OTHER, why nothing more is promised; shown to the user.
    """

    flow: Flow
    triton: str | None = None
    axes_arg: int | None = None
    shape_arg: int | None = None
    row_args: tuple[int, ...] = (0,)
    reduce: str | None = None
    zero_preserving: bool = False
    absorbs_zero: bool = False
    choose: tuple[int, int, int] | None = None
    why_not: str = ""
