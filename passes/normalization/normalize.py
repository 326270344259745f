"""The passes that take a graph from exported to normalized, in order; docs/levels.md has the promises."""

from tilewright.passes.base import Pass
from tilewright.passes.normalization.fold_constants import FoldConstants
from tilewright.passes.normalization.merge_equal import MergeEqual
from tilewright.passes.normalization.pointwise import NormalizePointwise
from tilewright.passes.normalization.recognize_attention import RecognizeAttention
from tilewright.passes.normalization.recognize_columns import RecognizeColumns
from tilewright.passes.normalization.recognize_head_linear import RecognizeHeadLinear
from tilewright.passes.normalization.recognize_linear import RecognizeLinear
from tilewright.passes.normalization.recognize_lookups import RecognizeLookups
from tilewright.passes.normalization.recognize_norms import RecognizeNorms
from tilewright.passes.normalization.recognize_score_tables import RecognizeScoreTables
from tilewright.passes.normalization.recognize_top_k import RecognizeTopK
from tilewright.passes.normalization.recover_mask import RecoverMask
from tilewright.passes.normalization.views import NormalizeViews
from tilewright.passes.normalization.writes import NormalizeWrites


def normalization() -> tuple[Pass, ...]:
    """Passes from exported to normalized, in order."""
    return (
        NormalizePointwise(),  # first: it removes conversions and fills that hide views
        NormalizeViews(),  # every pattern below knows one spelling of each view
        NormalizeWrites(),
        FoldConstants(),  # weights that are computed from weights, e.g. 1 + w, become weights
        NormalizePointwise(),  # what has become a constant of no axes is a number beside a tensor
        RecognizeLinear(),
        RecognizeHeadLinear(),
        RecognizeNorms(),
        RecognizeTopK(),
        RecognizeColumns(),
        RecognizeLookups(),
        RecognizeAttention(),  # after linear: what is left of matmul multiplies two computed tensors
        RecognizeScoreTables(),  # before masks: what is left of a bias may be one
        RecoverMask(),  # needs the masks as operands of attention
        NormalizeViews(),  # attention yields another order of axes, which cancels against the views around it
        MergeEqual(),  # last: recognized ops can be equal where their formulas were not
    )
