"""Where the batch and the sequence are among the axes of a value, and whether its rows are packed.

``RemovePadding`` decides a ``Layout`` for every tensor node; it is a fact of the node from the packed level on.
"""

from dataclasses import dataclass
from enum import Enum

from tilewright.ir.facts import TensorType
from tilewright.ir.sizes import TOKENS, Size


class LayoutKind(Enum):
    """How the rows of a value are stored."""

    PADDED = "padded"  # depends on the batch; stored at every place, pads included
    PACKED = "packed"  # one row per kept token, T first
    PER_SEQUENCE = "per_sequence"  # one entry per sequence
    SELECTED = "selected"  # some packed rows, those whose results are wanted
    TABLE = "table"  # made from all rows at once, in an order of its own: where the rows of each expert are
    FREE = "free"  # does not depend on the batch: weights, constants, column indices


@dataclass(frozen=True)
class Layout:
    """Layout of one value. The axes are those of the padded form, whatever the kind.

    Attributes:
        kind: how the rows are stored.
        batch_axis: axis that runs over the sequences, or None.
        seq_axis: axis that runs over the columns of a sequence, or None. Equal to ``batch_axis`` where one axis of size
            B * S runs over both, sequence by sequence.
        pad_value: the one value all its elements have at masked places, where that is proven; for a FREE value, the one
            value all its elements have.
    """

    kind: LayoutKind
    batch_axis: int | None = None
    seq_axis: int | None = None
    pad_value: float | None = None

    @property
    def per_token(self) -> bool:
        """Both axes are known: the value has one row per place of the padded batch."""
        return self.batch_axis is not None and self.seq_axis is not None

    @property
    def token_axes(self) -> tuple[int, ...]:
        """The known ones of batch axis and sequence axis, each once."""
        axes = dict.fromkeys(axis for axis in (self.batch_axis, self.seq_axis) if axis is not None)
        return tuple(axes)


def rest_axes(rank: int, layout: Layout) -> tuple[int, ...]:
    """Axes of the padded form that are neither batch nor sequence, in order."""
    return tuple(axis for axis in range(rank) if axis not in layout.token_axes)


def packed_type(type_: TensorType, layout: Layout) -> TensorType:
    """Type of the packed form of a per-token value: T first, the other axes in their order."""
    rest: tuple[Size, ...] = tuple(type_.shape[axis] for axis in rest_axes(len(type_.shape), layout))
    return TensorType((TOKENS, *rest), type_.dtype)
