"""One place of every sequence of a padded batch, at a column that may be known only at run time."""

import torch
from torch import Tensor

from tilewright.ops.registry import register
from tilewright.ops.traits import Flow, Traits


def select_column_reference(x: Tensor, column: Tensor) -> Tensor:
    """``x[torch.arange(B), column]``: x [B, S, ...], column [B] int32 or int64 -> [B, ...].

    Raises:
        IndexError: a column is outside of -S..S-1; negative ones count from the end. A kernel raises
            ``KernelAssertion`` instead.
    """
    return x[torch.arange(x.shape[0], device=x.device), column.long()]


select_column = torch.library.custom_op("tilewright::select_column", select_column_reference, mutates_args=())


@select_column.register_fake
def _select_column_fake(x, column):  # type: ignore[no-untyped-def]
    return x.new_empty((x.shape[0], *x.shape[2:]))


register(torch.ops.tilewright.select_column.default, Traits(Flow.COLUMN), select_column_reference)
