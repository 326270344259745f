"""Chooses a GEMM variant for each row count."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch.fx import GraphModule, Node

from tilewright.errors import OptionError
from tilewright.ir.facts import TensorType, fact, find_fact, set_fact
from tilewright.ir.graph import Level
from tilewright.ir.measurements import GemmKey, Measurements
from tilewright.ir.regions import GEMM_VARIANTS, Anchor, GemmTable, Region
from tilewright.ir.sizes import product
from tilewright.ops import Flow, traits_of
from tilewright.passes.base import Pass, PassResult

VENDOR = "vendor"

Entries = tuple[tuple[int | None, str], ...]

# Without measurements. Up to about 32 rows a GEMM is bound by reading its weight, and a kernel with the epilogue inside
# saves passes over its result; above, the vendor library's tuning counts for more. DeepSpeed Inference switches alike.
_BY_RULE: dict[str, Entries] = {
    "auto": ((8, "triton_few"), (32, "triton"), (None, VENDOR)),
    "triton": ((8, "triton_few"), (128, "triton"), (None, "triton_many")),
}


@dataclass(frozen=True)
class Specialize(Pass):
    """Gives each GEMM region its ``GemmTable``.

    Attributes:
        gemm: "auto" for a choice by row count, "triton" for our kernels alone, or one variant for all row counts.
        measurements: timings on this machine; "auto" goes by a rule where there are none.
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
        choices = dict.fromkeys((*_BY_RULE, *GEMM_VARIANTS))
        if self.gemm not in choices:
            raise OptionError(f"gemm={self.gemm!r} is not a choice", hint=f"choose one of {', '.join(choices)}")
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
        timings = self.measurements.seconds.get(key, {})
        if self.gemm == "auto" and VENDOR in timings:
            return measured_entries(timings), True
        return _BY_RULE.get(self.gemm, ((None, self.gemm),)), False


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


def measured_entries(timings: Mapping[str, Sequence[tuple[int, float]]], baseline: str = VENDOR) -> Entries:
    """A table that is never slower than ``baseline`` as far as was measured.

    At a measured row count the fastest variant is chosen; between two of them, the fastest that beats the
    baseline at both; below the least and above the greatest the choice there holds.

    Args:
        timings: by variant, the baseline among them, (rows, seconds) at the same row counts.
    """
    seconds = {variant: dict(times) for variant, times in timings.items()}
    counts = sorted(seconds[baseline])
    entries: list[tuple[int | None, str]] = []
    for place, count in enumerate(counts):
        if place and count - counts[place - 1] > 1:
            entries.append((count - 1, _fastest(seconds, (counts[place - 1], count), baseline)))
        entries.append((count, _fastest(seconds, (count,), baseline)))
    entries[-1] = (None, entries[-1][1])
    return tuple(
        entry for entry, after in zip(entries, [*entries[1:], (None, "")], strict=True) if entry[1] != after[1]
    )


def _fastest(seconds: Mapping[str, Mapping[int, float]], counts: Sequence[int], baseline: str) -> str:
    """The variant that beats the baseline at all these counts and by most on the whole, else the baseline."""
    ratios = {
        variant: [times[count] / seconds[baseline][count] for count in counts] for variant, times in seconds.items()
    }
    winners = {variant: sum(each) for variant, each in ratios.items() if max(each) < 1.0}
    return min(winners, key=lambda variant: winners[variant], default=baseline)
