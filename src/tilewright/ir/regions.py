"""Fusion regions: what one region is, as facts on the ``call_module`` node that stands for it.

At the fused level every compute node is inside exactly one region, a small GraphModule called from the outer graph:

    %region_3 : call_module[target=region_3](args = (%x, %residual, %weight, %bias))

Its placeholders are the values it reads (weights included), each with a ``TensorType``; its output is a tuple of the
values other regions read. Views (reshape, permute, slice, ...) between regions stay in the outer graph: they cost
nothing. Regions of equal structure are called through different nodes, but their kernels have one text, and so are one.
"""

from dataclasses import dataclass
from enum import Enum

from tilewright.ir.sizes import Size


class Anchor(Enum):
    """The node a region is built around; it decides the kernel family."""

    GEMM = "gemm"  # linear: out[M, N] = x[M, K] @ w[N, K].T
    EXPERTS = "experts"  # grouped GEMM: each row of x is multiplied by the weight that its expert has
    ROUTE = "route"  # which rows each expert has
    ATTENTION = "attention"
    APPEND = "append"  # rows of keys and values go into pages
    ROW = "row"  # pointwise work and reductions along the last axis; embedding lookups may feed it
    INDEX = "index"  # the row index of packing
    OPAQUE = "opaque"  # runs eager, with the reason on record


@dataclass(frozen=True)
class Region:
    """Fact on a region's call node.

    Attributes:
        id: position among the graph's regions.
        anchor: kernel family.
        anchor_node: name of the anchor inside the region's GraphModule; None for pointwise regions.
        reason: for OPAQUE, why no kernel was made.
        refused: (node name, sentence) for each neighbour that did not join and why.
    """

    id: int
    anchor: Anchor
    anchor_node: str | None
    reason: str = ""
    refused: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class RegionTag:
    """Fact on each node that will be inside a region, set by the analysis and used up when regions are outlined.

    Attributes:
        region: number of the region, in an order in which regions can run.
        record: the ``Region`` fact to be, on the region's first node only.
    """

    region: int
    record: Region | None = None


@dataclass(frozen=True)
class CopyBefore:
    """Fact on a node: some of its tensor operands must first be copied to contiguous memory.

    Attributes:
        operands: positions in the node's ``all_input_nodes``.
        why: the reason, in a sentence a user can read.
    """

    operands: tuple[int, ...]
    why: str


SPLITS = (2, 4, 8)
"""Parts that K can be cut into."""

GEMM_VARIANTS = (
    "triton_one",
    "triton_few",
    "triton",
    "triton_many",
    "vendor",
    *(f"{tile}:{parts}" for tile in ("triton_one", "triton_few") for parts in SPLITS),
)
"""How a GEMM can be run: our kernel with tiles of one, few, some or many rows; the vendor library; our kernel with
tiles of one or few rows for each part of K, and a second one that adds the parts up (DeepSpeed Inference, III.B)."""


@dataclass(frozen=True)
class GemmTable:
    """Fact on a GEMM region from the specialized level on: a variant for every row count, once.

    Attributes:
        rows: the row count the table is indexed by.
        entries: (inclusive upper bound, variant of ``GEMM_VARIANTS``) in rising order; the last bound is None.
        measured: True when the bounds come from measurements, False when from the default rule.
    """

    rows: Size
    entries: tuple[tuple[int | None, str], ...]
    measured: bool = False

    @property
    def size(self) -> Size:
        """What chooses the entry at run time."""
        return self.rows


ATTENTION_VARIANTS: dict[str, int | None] = {
    "online": None,
    "online_16": None,
    "short_128": 128,
    "short_512": 512,
    "long": 1024,
}
"""How attention can be run, with the longest sequence of keys each form takes (None: any): blocks of keys with an
online softmax, for 32 queries or for 16; all keys in one tile; two grouped products with the scores in memory between.
"""


PAGED_VARIANTS: dict[str, int | None] = {"paged_one": 1, "paged_few": 8, "paged_many": None}
"""How attention over pages can be run, with the most queries of a sequence each form takes (None: any). The first two
share the keys of a long sequence out among programs.
"""


@dataclass(frozen=True)
class AttentionTable:
    """Fact on an attention region from the specialized level on: a variant for every padded length, once.

    Attributes:
        length: bound of the keys of a sequence, which the table is indexed by; over pages, that of its queries.
        entries: (inclusive upper bound, variant of ``ATTENTION_VARIANTS`` or, over pages, ``PAGED_VARIANTS``) in rising
            order; the last bound is None.
        measured: True when the bounds come from measurements, False when from the default rule.
    """

    length: Size
    entries: tuple[tuple[int | None, str], ...]
    measured: bool = False

    @property
    def size(self) -> Size:
        """What chooses the entry at run time."""
        return self.length


@dataclass(frozen=True)
class Placement:
    """Fact on a region from the placed level on: where it runs and where its weights live."""

    device: str = "cpu"
    stage: int = 0
    weight_tier: str = "cpu"
