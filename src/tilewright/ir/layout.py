"""The layout of a value once padding is removed: a fact on every tensor node of a packed graph."""

from dataclasses import dataclass
from enum import Enum


class LayoutKind(Enum):
    """How a value relates to the tokens of the batch."""

    PADDED = "padded"  # has the batch and the padded length among its axes, pad places included
    PACKED = "packed"  # one row a real token, axis 0
    PER_SEQUENCE = "per_sequence"  # one row a sequence
    FREE = "free"  # the same for every sequence and token: weights, tables, constants


@dataclass(frozen=True)
class Layout:
    """Layout of one value."""

    kind: LayoutKind
