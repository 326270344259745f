"""The passes that take a graph from exported to normalized, in order; docs/levels.md has the promises."""

from tilewright.passes.base import Pass
from tilewright.passes.normalize_pointwise import NormalizePointwise
from tilewright.passes.normalize_views import NormalizeViews
from tilewright.passes.simplify import Simplify


def normalization() -> tuple[Pass, ...]:
    """Passes from exported to normalized.

    Returns:
        In order: one spelling for elementwise ops and conversions first, since it removes nodes that hide views; then
        views; then ops with a meaning of their own are recognized; constants are folded last.
    """
    return (NormalizePointwise(), NormalizeViews(), Simplify())
