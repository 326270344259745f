"""Chooses a GEMM variant for each row count."""

from dataclasses import dataclass, field
from typing import ClassVar

from torch.fx import GraphModule, Node

from tilewright.errors import OptionError
from tilewright.ir.facts import TensorType, fact, find_fact, set_fact
from tilewright.ir.graph import Level
from tilewright.ir.measurements import GemmKey, Measurements
from tilewright.ir.regions import Anchor, GemmTable, Region
from tilewright.ir.sizes import product
from tilewright.ops import Flow, traits_of
from tilewright.passes.base import Pass, PassResult

TRITON = "triton"
VENDOR = "vendor"

# Up to about this many rows a GEMM is bound by reading its weight, and a kernel with the epilogue inside saves passes
# over its result; above, the vendor library's tuning counts for more. DeepSpeed Inference switches likewise.
_FEW_ROWS = 32

Entries = tuple[tuple[int | None, str], ...]


@dataclass(frozen=True)
class Specialize(Pass):
    """Gives each GEMM region its ``GemmTable``.

    Attributes:
        gemm: "triton" or "vendor" for that variant alone, "auto" for a choice by row count.
        measurements: timings on this machine; a GEMM without any gets the default rule: Triton up to 32 rows.
    """

    name: ClassVar[str] = "specialize"
    requires: ClassVar[Level] = Level.FUSED
    ensures: ClassVar[Level] = Level.SPECIALIZED
    gemm: str = "auto"
    measurements: Measurements = field(default_factory=Measurements, repr=False)

    def run(self, gm: GraphModule) -> PassResult:
        """Sets the facts.

        Raises:
            OptionError: ``gemm`` is not one of the choices.
        """
        if self.gemm not in ("auto", TRITON, VENDOR):
            raise OptionError(f"gemm={self.gemm!r} is not a choice", hint="auto, triton or vendor")
        counts = {"measured": 0, "by_rule": 0}
        for node in gm.graph.nodes:
            region = find_fact(node, Region)
            if region is None or region.anchor is not Anchor.GEMM:
                continue
            anchor = gemm_of(gm.get_submodule(str(node.target)))  # type: ignore[arg-type]
            key = gemm_key(anchor)
            entries, measured = self._entries(key)
            rows = product(fact(anchor, TensorType).shape[:-1])
            set_fact(node, GemmTable(rows, entries, measured))
            counts["measured" if measured else "by_rule"] += 1
        return PassResult(gm, True, {topic: count for topic, count in counts.items() if count})

    def _entries(self, key: GemmKey) -> tuple[Entries, bool]:
        if self.gemm != "auto":
            return ((None, self.gemm),), False
        timings = self.measurements.seconds.get(key, {})
        if TRITON in timings and VENDOR in timings:
            return measured_entries(timings[TRITON], timings[VENDOR]), True
        return ((_FEW_ROWS, TRITON), (None, VENDOR)), False


def gemm_of(body: GraphModule) -> Node:
    """The product that a GEMM region is built around."""
    return next(node for node in body.graph.nodes if traits_of(node.target).flow is Flow.CONTRACT)


def gemm_key(anchor: Node) -> GemmKey:
    """What timings of this product are filed under."""
    weight = anchor.args[1]
    if not isinstance(weight, Node):
        raise TypeError(f"the weight of '{anchor.name}' is not a node")
    kind = fact(weight, TensorType)
    n, k = (int(size) for size in kind.shape)
    return GemmKey(n, k, str(kind.dtype).removeprefix("torch."))


def measured_entries(triton: tuple[tuple[int, float], ...], vendor: tuple[tuple[int, float], ...]) -> Entries:
    """A table that is never slower than the vendor library as far as was measured.

    Between two measured row counts Triton is chosen only when it wins at both; below the least and above the greatest
    the choice there holds.

    Args:
        triton, vendor: (rows, seconds) at the same row counts, rising.
    """
    ours, theirs = dict(triton), dict(vendor)
    rows = sorted(ours.keys() & theirs.keys())
    wins = [ours[count] < theirs[count] for count in rows]
    entries: list[tuple[int | None, str]] = []
    for place, (count, win) in enumerate(zip(rows, wins, strict=True)):
        if place and (win != wins[place - 1]):
            # Triton gives way right after the last count where it wins, and starts at the first where it wins again.
            bound = count - 1 if win else rows[place - 1]
            entries.append((bound, TRITON if wins[place - 1] else VENDOR))
    last = TRITON if wins and wins[-1] else VENDOR
    return (*entries, (None, last))
